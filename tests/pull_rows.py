"""What the tests of `pull` share: datasets that are on the Hub, and what a directory should hold."""

import hashlib
import json
import shutil
import sys

import msgspec
import numpy as np
import pytest

import logitstore
from logitstore.errors import (
    DatasetNotFoundError,
    IncompleteDatasetError,
)

pytest.importorskip("huggingface_hub")

from hub import Fault

from logitstore.hub import parts
from logitstore.schema import Split, Totals, dataset_digest, parse_manifest, serialise_manifest
from logitstore.schema.manifest import sum_splits

REPO = "me/x"
MODULE = sys.modules["logitstore.hub.pull"]  # the name is that of the function
MANIFEST = "logitstore.json"
CARD = b"---\nlicense: mit\n---\n# Logits\n"


def content(root, *, hidden=False):
    """Bytes of all files by path."""
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if hidden or not name.startswith(".pull/")}


def make(path, make_rows, sequences=40, *, split="train", seed=0, **options):
    tokenizer = path.parent / "teacher"
    tokenizer.mkdir(parents=True, exist_ok=True)
    vocab = {f"w{i}": i for i in range(1000)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    (tokenizer / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"made": path.parent.name}))
    settings = {"chunk_candidates": 2000, "shard_bytes": 9000, "tokenizer": tokenizer, **options}
    with logitstore.Writer(path, logit_width=1000, teacher="t", split=split, **settings) as writer:
        for i in range(sequences):
            columns = {"loss_mask": np.ones(30 + i, np.uint8)} if split == "test" and i % 2 else {}
            writer.add(*make_rows(seed + i, 30 + i, 8), id=f"{split}-{seed}-{i}", **columns)
    return path


def joined(path, *others):
    """Several datasets of one split each as one."""
    manifests = [parse_manifest((one / MANIFEST).read_bytes()) for one in others]
    for one in others:
        shutil.copytree(one, path, dirs_exist_ok=True)
    shards = tuple(info for manifest in manifests for info in manifest.shards)
    totals = [manifest.totals for manifest in manifests]
    summed = {
        name: sum(getattr(t, name) for t in totals)
        for name in ("shards", "sequences", "positions", "candidates", "bytes")
    }
    counted = {
        name: {key: sum(getattr(t, name).get(key, 0) for t in totals) for t in totals for key in getattr(t, name)}
        for name in ("encodings", "columns")
    }
    whole = msgspec.structs.replace(
        manifests[0],
        shards=shards,
        splits={**sum_splits(shards), **{name: Split() for m in manifests for name in m.splits if not m.shards}},
        totals=Totals(**summed, **counted, highest_id=max(t.highest_id or 0 for t in totals)),
        dataset_digest=dataset_digest(shards, manifests[0].tokenizer),
    )
    (path / MANIFEST).write_bytes(serialise_manifest(whole))
    return path


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A dataset of a train split of 10 shards or so, a test split, and an empty one, with a card."""
    from conftest import make_rows

    base = tmp_path_factory.mktemp("pull")
    train = make(base / "train", make_rows, sequences=40)
    test = make(base / "test", make_rows, sequences=9, split="test", seed=500, values="float32")
    empty = make(base / "empty", make_rows, sequences=0, split="dev")
    path = joined(base / "whole", train, test, empty)
    (path / "README.md").write_bytes(CARD)
    assert 6 <= len(logitstore.open(path).info.shards) <= 40
    assert not [f for f in logitstore.validate(path, deep=True) if f.severity == "error"]
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    from conftest import make_rows

    return make(tmp_path_factory.mktemp("other") / "o", make_rows, sequences=40, seed=9000)


@pytest.fixture
def files(local):
    return content(local)


@pytest.fixture
def there(hub, files):
    """The dataset on the Hub."""
    hub.commit_files(REPO, files)
    hub.clear_log()
    return files


@pytest.fixture
def breaks_off(hub, there, monkeypatch):
    """The storage breaks off after some answers, each time so early that nothing more can be had."""
    monkeypatch.setattr(MODULE, "BUFFER", 1024)
    hub.fault(Fault(kind="drop-body", after=700, origin="storage", skip=3, times=None))


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(parts, "SEGMENT", 4096)
    monkeypatch.setattr(MODULE, "BUFFER", 1024)


def stored(hub):
    """Bytes that the storage sent."""
    return sum(request.sent for request in hub.requests if request.origin == "storage" and request.status < 300)


def shards_of(files):
    return [name for name in files if name.endswith(".arrow")]


def size_of(files, *more):
    return sum(len(data) for name, data in files.items() if name not in (MANIFEST, "README.md", *more))


def assert_valid(root):
    assert [f for f in logitstore.validate(root, deep=True) if f.severity == "error" or "unreferenced" in f.code] == []


def assert_whole(root, files):
    assert content(root, hidden=True) == files
    assert_valid(root)


def assert_absent(root):
    """There is nothing that looks complete."""
    assert not (root / MANIFEST).exists()
    with pytest.raises((DatasetNotFoundError, IncompleteDatasetError)):
        logitstore.open(root)


def cli(monkeypatch, capfd, *arguments, status=0):
    from logitstore_cli.main import run

    monkeypatch.setattr(sys, "argv", ["logitstore", "pull", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run()
    out, err = capfd.readouterr()
    assert ended.value.code == status, (out, err)
    assert "Traceback" not in err
    assert "hf_" not in out + err
    return out, err


def sealed(manifest, **changes):
    """A manifest with other fields, whatever its parser says of them."""
    data = json.loads(manifest)
    del data["sha256"]
    data.update(changes)
    body = json.dumps(data, indent=1).encode().removesuffix(b"\n}")
    return body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'
