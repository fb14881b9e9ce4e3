"""From a directory to the Hub and back, as people do it: by the command, by Python, and by `datasets`."""

import json
import os
import subprocess
import sys
import warnings
from importlib.resources import files

import huggingface_hub
import pytest

import logitstore
from logitstore.convert import convert
from logitstore.hub import pull, push

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def demo(tmp_path):
    """The capture that comes with the package: Gemma 3 270M, twelve replies with texts."""
    path = tmp_path / "demo"
    capture = files("logitstore") / "demo" / "llama-server-completion.jsonl.zst"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert([str(capture)], path, teacher="google/gemma-3-270m", logit_width=262_144)
    return path


def run(*words, check=True):
    command = [sys.executable, "-m", "logitstore_cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=check, env=dict(os.environ))


def contents(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_by_the_command(hub, demo, tmp_path):
    done = run("push", demo, "me/demo", "--tag", "v1", "--licence", "cc-by-4.0", "--language", "en")
    assert "/datasets/me/demo: 5 files, " in done.stdout
    again = run("push", demo, "me/demo", "--tag", "v1")
    assert "unchanged, all of it is there already" in again.stdout
    assert len(hub.commits("me/demo")) == 2  # the first is the repository's own
    back = tmp_path / "back"
    done = run("pull", "me/demo@v1", back)
    assert "verified" in done.stdout
    found = contents(back)
    card = found.pop("README.md").decode()
    assert found == contents(demo)
    assert run("validate", "--deep", back).returncode == 0
    metadata = huggingface_hub.DatasetCard(card).data
    assert (metadata.license, metadata.language) == ("cc-by-4.0", ["en"])
    assert [config["config_name"] for config in metadata.configs] == ["preview", "logits"]
    for command in ("info", "head"):
        remote = run(command, "hf://datasets/me/demo@v1", "--json").stdout
        assert json.loads(remote) == json.loads(run(command, demo, "--json").stdout)


def test_by_python(hub, write, tmp_path):
    path = write(sequences=50, chunk_candidates=1000, shard_bytes=20_000)
    pushed = push(path, "me/x", private=True)
    assert (pushed.unchanged, pushed.commit) == (False, hub.commits("me/x")[0].sha)
    pulled = pull("me/x", tmp_path / "back")
    assert pulled.commit == pushed.commit
    assert {**contents(path), "README.md": hub.files("me/x")["README.md"]} == contents(tmp_path / "back")
    assert logitstore.validate(tmp_path / "back", deep=True) == logitstore.validate(path, deep=True)
    assert push(tmp_path / "back", "me/x").unchanged


SCRIPT = """
import json, sys
from datasets import load_dataset
preview = load_dataset("me/demo", split="train")
logits = load_dataset("me/demo", "logits", split="train")
streamed = list(load_dataset("me/demo", "logits", split="train", streaming=True))
print(json.dumps({
    "preview": preview[0], "previewed": len(preview), "columns": logits.column_names, "ids": logits["id"][:],
    "lengths": logits["length"][:], "prompt": logits["prompt"][0], "streamed": [row["id"] for row in streamed],
    "cell": isinstance(logits[0]["ids"], bytes) and logits[0]["ids"] == streamed[0]["ids"],
}))
"""


def test_by_datasets(hub, demo, tmp_path):
    """The default is the preview, which people understand; `logits` gives ids, lengths, users' columns and cells."""
    pytest.importorskip("datasets", reason="load_dataset is its")
    push(demo, "me/demo")
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    local = logitstore.open(demo)
    assert found["ids"] == found["streamed"] == [sequence.id for sequence in local]
    assert found["lengths"] == [len(sequence) for sequence in local]
    assert found["prompt"] == local[0].columns["prompt"]
    assert found["cell"]
    assert {"id", "length", "tokens", "ids", "gaps", "prompt"} <= set(found["columns"])
    first = found["preview"]
    assert found["previewed"] > 100
    assert len(first["candidates"]) == len(first["probabilities"]) == 5
    assert 0 < sum(first["probabilities"]) + first["rest"] < 1.02  # the grid and the tail are rounded
    assert all(isinstance(text, str) for text in (first["text"], first["token"], *first["candidates"]))


def test_with_the_real_capture(hub, shared, tmp_path):
    """WikiText-2, 81 sequences of a vocabulary of 262,144, with the tokenizer's 33 MB."""
    capture, tokenizer = shared("gemma3-270m-wikitext2-top128.npz"), shared("tokenizers")
    (folder,) = [path.parent for path in tokenizer.rglob("tokenizer.json") if "gemma" in path.parent.name.lower()][
        :1
    ] or [None]
    if folder is None:
        pytest.skip("no tokenizer of Gemma among the shared ones")
    path = tmp_path / "wikitext"
    convert(
        [str(capture)],
        path,
        teacher="google/gemma-3-270m",
        top_k=64,
        logit_width=262_144,
        tokenizer=str(folder),
        shard_bytes=2**20,
    )
    push(path, "me/wikitext")
    pull("me/wikitext", tmp_path / "back")
    assert {**contents(path), "README.md": hub.files("me/wikitext")["README.md"]} == contents(tmp_path / "back")
    assert not [finding for finding in logitstore.validate(tmp_path / "back", deep=True) if finding.severity == "error"]
    remote = logitstore.open("hf://datasets/me/wikitext")
    assert [len(s.ids) for s in remote] == [len(s.ids) for s in logitstore.open(path)]
    assert remote.tokenizer().digest == logitstore.open(path).info.tokenizer.digest
