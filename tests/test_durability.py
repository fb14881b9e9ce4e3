"""What a writer leaves behind: nothing that looks complete until it is, and never a lost dataset."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import logitstore
from logitstore.io import DurableFile, write_atomic
from logitstore.io import files as io

pytestmark = pytest.mark.usefixtures("quiet")


def add(writer, name):
    writer.add([1], [[1, 2]], [[-1.0, -2.0]], id=name)


def files(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def test_an_exception_leaves_an_unfinished_dataset(tmp_path):
    def fail():
        with logitstore.Writer(tmp_path / "d", logit_width=10, chunk_candidates=2) as writer:
            add(writer, "a")
            raise RuntimeError("teacher gone")

    with pytest.raises(RuntimeError):
        fail()
    assert files(tmp_path / "d") == ["data/train/train-00000.arrow.partial", "parts/train-00000-of-00001/journal"]
    with pytest.raises(logitstore.IncompleteDatasetError):
        logitstore.open(tmp_path / "d")
    with pytest.raises(logitstore.DatasetExistsError, match="unfinished"):
        logitstore.Writer(tmp_path / "d")
    with logitstore.Writer(tmp_path / "d", logit_width=10, overwrite=True) as writer:
        add(writer, "b")
    assert [s.id for s in logitstore.open(tmp_path / "d")] == ["b"]
    assert files(tmp_path / "d") == ["data/train/train-00001.arrow", "logitstore.json"]


def test_nothing_is_created_before_something_is_written(tmp_path):
    with pytest.raises(ValueError, match="x"), logitstore.Writer(tmp_path / "d"):
        raise ValueError("x")
    assert not (tmp_path / "d").exists()


def test_nothing_is_overwritten_unless_asked(tmp_path, write):
    path = write()
    before = {name: (path / name).read_bytes() for name in files(path)}
    with pytest.raises(FileExistsError, match="--overwrite"):
        logitstore.Writer(path)
    (tmp_path / "file").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(logitstore.DatasetExistsError, match="is a file"):
            logitstore.Writer(tmp_path / "file", overwrite=overwrite)
    assert {name: (path / name).read_bytes() for name in files(path)} == before


def test_overwriting_keeps_the_old_dataset_until_the_new_one_is_complete(write):
    path = write(sequences=3)
    (path / "notes.txt").write_text("mine")
    old = logitstore.open(path)

    def fail():
        with logitstore.Writer(path, logit_width=10, chunk_candidates=1, shard_bytes=1, overwrite=True) as writer:
            add(writer, "x")
            assert [s.id for s in logitstore.open(path)] == ["0", "1", "2"]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [s.id for s in logitstore.open(path)] == ["0", "1", "2"]
    with logitstore.Writer(path, logit_width=10, overwrite=True) as writer:
        add(writer, "y")
    assert [s.id for s in logitstore.open(path)] == ["y"]
    assert (path / "notes.txt").read_text() == "mine"
    assert len([name for name in files(path) if "arrow" in name]) == 1
    assert len(old) == 3


def test_another_tokenizer_does_not_damage_the_dataset_that_it_replaces(tmp_path, monkeypatch):
    def vocabulary(name, text):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "tokenizer.json"
        file.write_text(f'{{"model": {{"type": "WordLevel", "vocab": {{"{text}": 1, "b": 2}}}}}}')
        return file

    path = tmp_path / "d"
    with logitstore.Writer(path, logit_width=10, tokenizer=vocabulary("one", "a")) as writer:
        add(writer, "old")

    def fail(*_arguments):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("logitstore.dataset.commit.serialise_manifest", fail)
        with pytest.raises(OSError, match="Input"), logitstore.Writer(
            path, logit_width=10, tokenizer=vocabulary("two", "c"), overwrite=True
        ) as writer:  # fmt: skip
            add(writer, "new")
    assert logitstore.is_valid(logitstore.validate(path, deep=True))
    assert logitstore.open(path).tokenizer().token_bytes(1) == b"a"
    with logitstore.Writer(path, logit_width=10, tokenizer=tmp_path / "two" / "tokenizer.json", resume=True) as writer:
        add(writer, "new")
    assert [s.id for s in logitstore.open(path)] == ["new"]
    assert logitstore.open(path).tokenizer().token_bytes(1) == b"c"
    assert [finding.code for finding in logitstore.validate(path, deep=True)] == ["teacher-unknown"]
    assert len(files(path)) == 3


def test_bad_input_at_the_end_commits_nothing(tmp_path):
    """Two values without a common type are found when the chunk is written: in the closing of the block."""
    with (
        pytest.raises(logitstore.InvalidInputError, match="no common"),
        logitstore.Writer(tmp_path / "d", logit_width=10) as writer,
    ):
        writer.add([1], [[1]], [[-1.0]], what=1)
        writer.add([1], [[1]], [[-1.0]], what="one")
    assert not (tmp_path / "d" / "logitstore.json").exists()


SCRIPT = """
import sys, time, warnings, numpy as np, logitstore
warnings.simplefilter("ignore")
random = np.random.default_rng(0)
with logitstore.Writer(sys.argv[1], logit_width=500, chunk_candidates=4000, shard_bytes=30_000) as writer:
    print("started", flush=True)
    for i in range(600):
        lp = -np.cumsum(random.uniform(0.1, 1, (20, 30)), axis=1) - 2
        ids = random.permuted(np.tile(np.arange(500), (20, 1)), axis=1)[:, :30]
        writer.add(random.integers(0, 500, 20), ids, lp, id=f"s{i}")
print("done", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems")
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 5.0])
def test_a_killed_writer_leaves_a_refused_or_a_complete_dataset(tmp_path, delay):
    path = tmp_path / "d"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    try:
        dataset = logitstore.open(path)
    except (logitstore.IncompleteDatasetError, logitstore.DatasetNotFoundError):
        assert not (path / "logitstore.json").exists()
        return
    assert [s.id for s in dataset] == [f"s{i}" for i in range(600)]
    assert logitstore.is_valid(logitstore.validate(path, deep=True))


def test_shards_are_synced_before_they_are_named_and_the_manifest_is_last(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: events.append(("sync", str(Path(f"/proc/self/fd/{fd}").readlink()))) or fsync(fd)
    )
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda self, to: events.append(("name", str(to))) or replace(self, to)
    )
    with logitstore.Writer(tmp_path / "d", logit_width=10) as writer:
        add(writer, "a")
    root = str(tmp_path / "d")
    shard = f"{root}/data/train/train-00000.arrow"
    at = events.index(("name", shard))
    assert events[at - 2 : at + 2] == [
        ("sync", f"{shard}.partial"),  # the shard is whole,
        ("sync", f"{root}/parts/train-00000-of-00001/journal"),  # the journal says so,
        ("name", shard),
        ("sync", f"{root}/data/train"),
    ]
    assert events[-2:] == [("name", f"{root}/logitstore.json"), ("sync", root)]
    assert events[-3][0] == "sync"
    assert ".logitstore.json" in events[-3][1]


def test_writes_are_synced_in_groups_by_bytes_and_by_age(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(DurableFile, "sync", lambda self: synced.append(self.size) or setattr(self, "_unsynced", 0))
    monkeypatch.setattr(io, "SYNC_BYTES", 100)
    file = DurableFile(tmp_path / "f")
    due = []
    for _ in range(5):
        file.write(b"x" * 40)
        due.append(file.sync_is_due)
        if file.sync_is_due:
            file.sync()
    assert due == [False, False, True, False, False]
    monkeypatch.setattr(io, "SYNC_SECONDS", 0.0)
    assert file.sync_is_due
    file.sync()
    assert not file.sync_is_due
    assert synced == [120, 200]
    file.close()


def test_a_temporary_file_of_another_writer_is_not_touched(tmp_path):
    (tmp_path / "d" / "data" / "train").mkdir(parents=True)
    with (
        pytest.raises(logitstore.InvalidInputError, match="nothing was committed"),
        logitstore.Writer(tmp_path / "d", logit_width=10) as writer,
    ):
        theirs = tmp_path / "d" / "data" / "train" / "train-00000.arrow.partial"
        theirs.write_text("another writer's")
        add(writer, "a")
        with pytest.raises(FileExistsError, match="another writer is at work"):
            writer.close()
    assert theirs.read_text() == "another writer's"


def test_atomic_writing_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["f"]


def test_a_full_disk_is_an_error_and_no_dataset(tmp_path, monkeypatch):
    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    writer = logitstore.Writer(tmp_path / "d", logit_width=10)
    add(writer, "a")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        writer.close()
    monkeypatch.undo()
    with pytest.raises(logitstore.IncompleteDatasetError):
        logitstore.open(tmp_path / "d")


def test_a_chunk_that_was_not_written_whole_ends_the_writing(tmp_path, monkeypatch):
    """Also for those who catch the error and go on: what came behind half a chunk could not be read."""
    write = DurableFile.write

    def fail(self, data):
        if self.size == 0:
            return write(self, data)
        self._file.write(bytes(memoryview(data)[:100]))
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(logitstore.InvalidInputError, match=r"nothing was committed.*No space"),
        logitstore.Writer(tmp_path / "d", logit_width=10, chunk_candidates=1) as writer,
    ):
        monkeypatch.setattr(DurableFile, "write", fail)
        with pytest.raises(OSError, match="No space"):
            add(writer, "a")
        monkeypatch.undo()
        with pytest.raises(logitstore.InvalidInputError, match="closed"):
            add(writer, "b")
    with pytest.raises(logitstore.IncompleteDatasetError):
        logitstore.open(tmp_path / "d")
