"""`DistillationTrainer`: a `transformers.Trainer` that learns stored distributions (extra `transformers`).

```python
from logitstore.torch.trainer import DistillationTrainer

trainer = DistillationTrainer(
    model, args, train_dataset=StreamingLogits("distributions", batch_size=8), loss_options={"tail": "ghost"}
)
trainer.train()
```

With TRL, put the mixin before its trainer: `class Distil(DistillationMixin, trl.SFTTrainer): ...`, with
`SFTConfig(dataset_kwargs={"skip_prepare_dataset": True})`; see examples/trl_sft.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from logitstore.errors import InvalidInputError, MissingDependencyError
from logitstore.io import write_atomic
from logitstore.torch.collate import HFCollator
from logitstore.torch.loader import LogitLoader, StreamingLogits
from logitstore.torch.losses import distillation_loss
from logitstore.torch.source import check_student

try:
    import transformers
except ImportError as error:
    says = "DistillationTrainer needs transformers: pip install 'logitstore[transformers]'"
    raise MissingDependencyError(says) from error

STATE_FILE: Final = "logitstore_loader.json"
"""Where a checkpoint says how far the data are."""

_TARGETS: Final = "target_"
_OURS: Final = ("labels", "document_ids")  # not for the model: it would compute a loss of its own


class _Loader(LogitLoader):
    """A loader that is not sent back to the beginning of an epoch in which training is resumed."""

    def set_epoch(self, epoch: int) -> None:
        """Nothing: every iteration goes on where the last one was left."""


class _SavesLoader(transformers.TrainerCallback):
    """Writes into each checkpoint where the loader is."""

    def __init__(self, stream: StreamingLogits) -> None:
        self.stream = stream

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the callback's signature
        """After a checkpoint was written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_atomic(folder / STATE_FILE, msgspec.json.encode(self.stream.state_dict()))


class DistillationMixin:
    """What makes a trainer of transformers, or one derived from it, learn stored distributions.

    The batch is that of `HFCollator`; the loss is `distillation_loss`, its mean over the positions of a micro-batch.
    `StreamingLogits` as the training data keep their own order, and a checkpoint resumes at the exact sample.

    Args:
        *args: of the trainer.
        loss_options: of `distillation_loss`: kind, tail, temperature, alpha, ...
        **kwargs: of the trainer; `data_collator` is `HFCollator()` unless given.
    """

    args: Any
    train_dataset: Any
    data_collator: Any
    model: Any

    def __init__(self, *args: Any, loss_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.loss_options = dict(loss_options or {})
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = HFCollator()
        data = kwargs.get("train_dataset")
        if data is not None and super().__init__.__func__ is not transformers.Trainer.__init__:  # type: ignore[attr-defined]
            super().__init__(*args, **{**kwargs, "train_dataset": _stand_in()})
            self.train_dataset = data
        else:
            super().__init__(*args, **kwargs)
        # The trainer would drop what the model does not know: the targets.
        self.args.remove_unused_columns = False
        self.model_accepts_loss_kwargs = False  # so that it divides by the number of accumulated micro-batches
        self._check_width()
        if isinstance(self.train_dataset, StreamingLogits):
            self._check_batch(self.train_dataset)
            self.add_callback(_SavesLoader(self.train_dataset))  # type: ignore[attr-defined]

    def _check_width(self) -> None:
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        data = self.train_dataset
        read = data.source if isinstance(data, StreamingLogits) else getattr(data, "samples", None)
        if head is not None and read is not None:
            check_student(read, None, int(head.weight.shape[0]))

    def _check_batch(self, stream: StreamingLogits) -> None:
        wanted = self.args.per_device_train_batch_size * max(1, self.args.n_gpu)
        if stream.batch_size != wanted:
            raise InvalidInputError(
                f"StreamingLogits has batch_size={stream.batch_size}, but the trainer's arguments say {wanted} a "
                f"process; give both the same"
            )

    def get_train_dataloader(self) -> Any:
        """Batches in the order of `StreamingLogits`; the trainer's own loader for other data."""
        if not isinstance(self.train_dataset, StreamingLogits):
            return super().get_train_dataloader()  # type: ignore[misc]
        return _Loader(
            self.train_dataset,
            collate_fn=self.data_collator,
            device=self.args.device,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train; from a checkpoint, the data go on at the exact sample."""
        if isinstance(self.train_dataset, StreamingLogits) and resume_from_checkpoint:
            folder = resume_from_checkpoint
            if folder is True:
                folder = transformers.trainer_utils.get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
            path = Path(folder or "") / STATE_FILE
            if path.is_file():
                self.train_dataset.load_state_dict(msgspec.json.decode(path.read_bytes()))
                self.args.ignore_data_skip = True
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:  # noqa: FBT001, FBT002 - the trainer's signature
        """`distillation_loss` of a batch.

        Raises:
            InvalidInputError: the batch has no targets.
        """
        known = {name: value for name, value in inputs.items() if not name.startswith(_TARGETS) and name not in _OURS}
        if "document_ids" in inputs:
            # transformers keeps packed documents apart by position_ids, but only without a mask and a cache.
            known = {name: value for name, value in known.items() if name != "attention_mask"} | {"use_cache": False}
        outputs = model(**known)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        loss = distillation_loss(logits, inputs, **self.loss_options)
        return (loss, outputs) if return_outputs else loss


def _stand_in() -> Any:
    """What TRL's trainers look at when they are made: they refuse all data but those of `datasets`."""
    import datasets  # noqa: PLC0415 - comes with TRL

    return datasets.Dataset.from_list([{"input_ids": [0], "labels": [0]}])


class DistillationTrainer(DistillationMixin, transformers.Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` that learns stored distributions; see `DistillationMixin`."""
