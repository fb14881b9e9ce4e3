"""A recipe: TRL's SFTTrainer learns stored distributions.

    python examples/trl_sft.py DATASET MODEL OUTPUT

DATASET is a dataset of logitstore, MODEL a causal language model with the teacher's tokenizer, by name or directory.
Needs `pip install 'logitstore[transformers]' trl`.

The trainer's own preparation is left out: the dataset holds tokens, and which of them are trained on. Its columns are
kept, which `remove_unused_columns` would drop. A checkpoint says how far the data are, and training goes on there with
`trainer.train(resume_from_checkpoint=True)`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import transformers
import trl

from logitstore.torch import StreamingLogits
from logitstore.torch.trainer import DistillationMixin


class DistillationSFTTrainer(DistillationMixin, trl.SFTTrainer):
    """TRL's SFTTrainer with the loss and the order of logitstore."""


def trainer(dataset: Path, model: Any, processing_class: Any, output: Path, **settings: Any) -> DistillationSFTTrainer:
    """A trainer of this model on this dataset; settings are those of `trl.SFTConfig`."""
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 3, **settings}
    arguments = trl.SFTConfig(str(output), dataset_kwargs={"skip_prepare_dataset": True}, **settings)
    stream = StreamingLogits(dataset, batch_size=arguments.per_device_train_batch_size, seed=arguments.seed)
    return DistillationSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=stream,
        processing_class=processing_class,
        loss_options={"kind": "forward_kl", "tail": "ghost", "alpha": 0.9},  # a tenth is cross-entropy
    )


def main(dataset: str, model: str, output: str) -> None:
    """Train, and save the student."""
    student = transformers.AutoModelForCausalLM.from_pretrained(model)
    made = trainer(Path(dataset), student, transformers.AutoTokenizer.from_pretrained(model), Path(output))
    made.train()
    made.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
