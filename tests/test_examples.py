"""The examples run, and show what they say."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DRY = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}  # nothing but the data is drawn
CAPTURE = ROOT / "tests" / "data" / "gemma3-270m-shakespeare-top64.npz"


def test_a_small_distillation_comes_out_better_than_hard_labels():
    """The README's, with a smaller student and the capture that comes with the tests: a twentieth of the text."""
    pytest.importorskip("torch", reason="the example trains with torch")
    options = ["--seeds", "3", "--epochs", "8", "--vocabulary", "1024", "--width", "96", "--layers", "2"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "distil.py", CAPTURE, *options], capture_output=True, text=True, check=True
    )
    assert re.search(r"hard labels +held-out loss \d\.\d+ ± \d\.\d+ nats", done.stdout)
    gain, better = re.search(r"better by ([+-][\d.]+) nats, in (\d) of 3 seeds", done.stdout).groups()
    assert float(gain) > 0
    assert int(better) >= 2


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore")  # transformers, trl, accelerate and torch warn of each other
def test_the_recipe_for_trl(tmp_path, write):
    transformers = pytest.importorskip("transformers", reason="the recipe trains with transformers")
    pytest.importorskip("trl", reason="the recipe trains with TRL")
    tokenizers = pytest.importorskip("tokenizers")
    make = runpy.run_path(str(EXAMPLES / "trl_sft.py"))["trainer"]
    vocabulary = {f"w{number}": number for number in range(998)} | {"<eos>": 998, "<pad>": 999}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>")),
        eos_token="<eos>",
        pad_token="<pad>",
    )

    path = write(sequences=12, positions=20)

    def trainer(folder, **settings):
        config = transformers.GPT2Config(vocab_size=1000, n_positions=64, n_embd=32, n_layer=1, n_head=2, **DRY)
        transformers.set_seed(0)
        return make(
            path, transformers.GPT2LMHeadModel(config), tokenizer, folder,
            per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False, logging_steps=1, learning_rate=1e-2,
            disable_tqdm=True, **settings,
        )  # fmt: skip

    whole = trainer(tmp_path / "a", num_train_epochs=8)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 24
    assert losses[-1] < 0.8 * losses[0]
    first = trainer(tmp_path / "b", num_train_epochs=8, save_steps=4)
    first.train()
    assert (tmp_path / "b" / "checkpoint-4" / "logitstore_loader.json").is_file()
    again = trainer(tmp_path / "b", num_train_epochs=8)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert resumed == pytest.approx([e["loss"] for e in first.state.log_history if "loss" in e], rel=1e-4)
