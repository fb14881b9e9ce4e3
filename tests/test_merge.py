"""`merge`: several datasets as one, of their shards as they are."""

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from restructured import assert_same, check_valid, everything, files, make, small_tokenizer
from restructured import run as in_process

import logitstore
from logitstore.dataset import join
from logitstore.io import MappedFile
from logitstore.shard.reader import Shard

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def no_links(monkeypatch):
    """As on a file system without hard links, or between two."""

    def link(_source, _target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)


def two(tmp_path, **settings):
    a = make(tmp_path / "a", prefix="a", seed=1, chunk_candidates=30, shard_bytes=4000, **settings)
    return a, make(tmp_path / "b", prefix="b", seed=2, chunk_candidates=30, shard_bytes=4000, **settings)


def check_joined(path, *parts, killed=False):
    info = check_valid(path, killed)
    expected = [s for part in parts for s in everything(part)]
    for a, b in zip(expected, everything(path), strict=True):
        assert_same(a, b)
    assert info.totals.sequences == len(expected)
    return info


def test_shards_are_linked_as_they_are(tmp_path):
    a, b = two(tmp_path)
    done = logitstore.merge([a, b], tmp_path / "m")
    info = check_joined(tmp_path / "m", a, b)
    assert (done.linked, done.copied, done.notes) == (info.totals.shards, 0, ())
    of_b = logitstore.open(b).info.shards
    at = [shard for shard in info.shards if shard.sha256 == of_b[-1].sha256]
    assert (tmp_path / "m" / at[0].path).samefile(b / of_b[-1].path)
    shutil.rmtree(a)
    shutil.rmtree(b)
    check_valid(tmp_path / "m")


@pytest.mark.usefixtures("no_links")
def test_shards_are_copied_where_they_cannot_be_linked(tmp_path):
    a, b = two(tmp_path)
    seen = []
    done = logitstore.merge([a, b], tmp_path / "m", progress=lambda *each: seen.append(each))
    info = check_joined(tmp_path / "m", a, b)
    assert (done.linked, done.copied) == (0, info.totals.shards)
    assert seen[-1] == (info.totals.bytes, info.totals.bytes)
    assert seen == sorted(seen)


def test_other_errors_of_linking_are_errors(tmp_path, monkeypatch):
    a, b = two(tmp_path)

    def full(_source, _target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space"):
        logitstore.merge([a, b], tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.usefixtures("no_links")
def test_a_copy_is_verified(tmp_path):
    a, b = two(tmp_path)
    shard = b / logitstore.open(b).info.shards[-1].path
    data = bytearray(shard.read_bytes())
    data[Shard(MappedFile(shard)).tail.schema_bytes + 500] ^= 1
    shard.write_bytes(data)
    with pytest.raises(logitstore.CorruptDataError, match="sha256") as caught:
        logitstore.merge([a, b], tmp_path / "m")
    assert caught.value.path == str(shard)
    assert not (tmp_path / "m").exists()
    shard.unlink()
    with pytest.raises(logitstore.CorruptDataError, match="missing"):
        logitstore.merge([a, b], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_splits_of_one_name_are_joined(tmp_path):
    paths = []
    for number, split in enumerate(("train", "test", "train", "extra", "test")):
        paths.append(make(tmp_path / f"d{number}", prefix=f"{number}-", split=split, sequences=2 + number))
    logitstore.merge(paths, tmp_path / "m")
    info = check_joined(tmp_path / "m", paths[0], paths[2], paths[1], paths[4], paths[3])
    assert {name: split.sequences for name, split in info.splits.items()} == {"train": 6, "test": 9, "extra": 5}


def test_split_and_merge_hold_the_same(tmp_path):
    path = make(tmp_path / "d", sequences=30, column=lambda i: {"text": f"t{i}"})
    logitstore.split(path, tmp_path / "s", {"a": 0.5, "b": 0.5})
    for name in "ab":
        ids = [s.id for s in logitstore.open(tmp_path / "s").split(name)]
        logitstore.select(path, tmp_path / name, ids)
    logitstore.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    after = {s.id: s for s in everything(tmp_path / "m")}
    for sequence in everything(path):
        assert_same(sequence, after.pop(sequence.id))
    assert after == {}


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ({}, {"logit_width": 999}, "the logit width is 1000 in one and 999 in the other"),
        ({}, {"temperature": 2.0}, "the temperature is 1.0"), ({}, {"normalised": "candidates"}, "the normalisation"),
        ({}, {"resolution": 1 / 16}, "the resolution is 0.03125 .*repack"), ({}, {"encoding": "draws"}, "holds draws"),
        ({}, {"column": lambda i: {"x": i}}, "their own columns"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_dataset(tmp_path, one, other, says):
    a = make(tmp_path / "a", prefix="a", counts=(1, 5), **one)
    b = make(tmp_path / "b", prefix="b", counts=(1, 5), **other)
    for call in (lambda: logitstore.merge([a, b], tmp_path / "m"), lambda: logitstore.append(a, [b])):
        with pytest.raises(logitstore.InvalidInputError, match=says) as caught:
            call()
        assert str(a) in str(caught.value)
        assert str(b) in str(caught.value)
    assert not (tmp_path / "m").exists()
    check_joined(a, a)


def test_an_id_that_is_in_two(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", prefix="x", sequences=3)
    with logitstore.Writer(tmp_path / "c", logit_width=1000, teacher="t") as writer:
        writer.add([1], [[1]], [[-1.0]], id="y")
        writer.add([1], [[1]], [[-1.0]], id="s7")
    with pytest.raises(logitstore.InvalidInputError, match="have a sequence of the id 's7'") as caught:
        logitstore.merge([a, b, tmp_path / "c"], tmp_path / "m")
    assert str(a) in str(caught.value)
    assert str(tmp_path / "c") in str(caught.value)
    with pytest.raises(logitstore.InvalidInputError, match="both have a sequence of the id 's0'"):
        logitstore.merge([a, a], tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(logitstore.InvalidInputError, match="the id 's7'"):
        logitstore.append(a, [tmp_path / "c"])
    check_joined(a, a)


def test_two_ids_of_one_hash_are_two(tmp_path, monkeypatch):
    a, b = make(tmp_path / "a", prefix="a"), make(tmp_path / "b", prefix="b")
    monkeypatch.setattr(join, "repeated", lambda hashes: iter([[(0, 1), (1, 3)]]))
    logitstore.merge([a, b], tmp_path / "m")
    check_joined(tmp_path / "m", a, b)


def test_the_tokenizer_comes_along(tmp_path):
    tok = small_tokenizer(tmp_path / "tok", template="a")
    a, b = make(tmp_path / "a", prefix="a", tokenizer=tok), make(tmp_path / "b", prefix="b", tokenizer=tok)
    logitstore.merge([a, b], tmp_path / "m")
    info = check_joined(tmp_path / "m", a, b)
    assert info.tokenizer == logitstore.open(a).info.tokenizer
    assert logitstore.open(tmp_path / "m").tokenizer().digest == info.tokenizer.digest
    c = make(tmp_path / "c", prefix="c", tokenizer=small_tokenizer(tmp_path / "other", "xyz"))
    with pytest.raises(logitstore.InvalidInputError, match="the tokenizer is"):
        logitstore.merge([a, c], tmp_path / "n")
    again = make(tmp_path / "e", prefix="e", tokenizer=small_tokenizer(tmp_path / "instruct", template="b"))
    done = logitstore.merge([a, again], tmp_path / "n")
    assert done.notes == ("the tokenizer's chat template differs; the first dataset's is taken",)
    check_valid(tmp_path / "n")
    logitstore.merge([c], tmp_path / "n", overwrite=True)
    check_joined(tmp_path / "n", c)
    assert logitstore.open(tmp_path / "n").tokenizer().digest == logitstore.open(c).tokenizer().digest


def partial(path, prefix, pieces):
    with logitstore.Writer(path, logit_width=1000, teacher="t") as writer:
        writer.use_partial_vocabulary(pieces)
        writer.add([1], [[1]], [[-1.0]], id=prefix)
    return path


def test_partial_vocabularies_are_joined(tmp_path):
    a, b = partial(tmp_path / "a", "a", {1: b"one"}), partial(tmp_path / "b", "b", {2: b"two"})
    c = partial(tmp_path / "c", "c", {1: b"other"})
    logitstore.merge([a, b], tmp_path / "m")
    assert dict(logitstore.open(tmp_path / "m").tokenizer().items()) == {1: b"one", 2: b"two"}
    check_joined(tmp_path / "m", a, b)
    with pytest.raises(logitstore.InvalidInputError, match="the token 1"):
        logitstore.merge([a, c], tmp_path / "n")
    assert not (tmp_path / "n").exists()
    with pytest.raises(logitstore.InvalidInputError, match="the token 1"):
        logitstore.append(a, [c])
    before = logitstore.open(a)
    logitstore.append(a, [b])
    assert dict(logitstore.open(a).tokenizer().items()) == {1: b"one", 2: b"two"}
    assert dict(before.tokenizer().items()) == {1: b"one"}  # who opened it before has it as it was
    assert [s.id for s in logitstore.open(a)] == ["a", "b"]


def test_what_is_not_agreed_on_is_said(tmp_path):
    a = make(tmp_path / "a", prefix="a", top_k=5, source=logitstore.Source(format="x", name="one", files=("1",)))
    b = make(tmp_path / "b", prefix="b", top_k=6, source=logitstore.Source(format="x", name="two"))
    done = logitstore.merge([a, b], tmp_path / "m")
    assert len(done.notes) == 1
    assert "top_k" in done.notes[0]
    info = check_joined(tmp_path / "m", a, b)
    assert (info.source, [each.name for each in info.lineage]) == (None, ["one", "two"])
    c = make(tmp_path / "c", prefix="c", source=logitstore.Source(format="x", name="three"))
    logitstore.append(tmp_path / "m", [c])
    info = logitstore.open(tmp_path / "m").info
    assert info.source is None  # `three` is not what all of it was made from
    assert {each.name for each in info.lineage} == {"one", "two", "three"}


def test_places_that_are_taken(tmp_path):
    a, b = two(tmp_path)
    before = files(a)
    with pytest.raises(logitstore.DatasetExistsError, match="--overwrite"):
        logitstore.merge([a], b)
    (tmp_path / "link").symlink_to(a)
    for place in (a, tmp_path / "link", a / "inside"):
        with pytest.raises(logitstore.InvalidInputError, match="which is read"):
            logitstore.merge([b, a], place, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(logitstore.DatasetExistsError, match="is a file"):
        logitstore.merge([a, b], tmp_path / "file")
    with pytest.raises(logitstore.InvalidInputError, match=r"hf://datasets/x/y is a URL; .*logitstore pull"):
        logitstore.merge([a, "hf://datasets/x/y"], tmp_path / "m")
    with pytest.raises(logitstore.DatasetNotFoundError):
        logitstore.merge([a, tmp_path / "nowhere"], tmp_path / "m")
    with pytest.raises(logitstore.InvalidInputError, match="no datasets"):
        logitstore.merge([], tmp_path / "m")
    assert files(a) == before
    assert not (tmp_path / "m").exists()
    c = make(tmp_path / "c", prefix="c", sequences=3)
    (c / "notes.txt").write_text("mine")
    logitstore.merge([a, b], c, overwrite=True)
    (c / "notes.txt").unlink()
    check_joined(c, a, b)


def test_empty_datasets(tmp_path):
    a, e = make(tmp_path / "a"), make(tmp_path / "e", sequences=0, split="nothing")
    logitstore.merge([e, a, e], tmp_path / "m")
    info = check_joined(tmp_path / "m", a)
    assert (list(info.splits), info.splits["nothing"].sequences) == (["train", "nothing"], 0)
    logitstore.merge([e], tmp_path / "n")
    check_joined(tmp_path / "n", e)


def test_a_manifest_that_was_written_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    a, b = two(tmp_path)
    move = join._move

    def meanwhile(root, *rest):
        moved = move(root, *rest)
        make(root, prefix="other", sequences=1, split="theirs", overwrite=True)
        return moved

    monkeypatch.setattr(join, "_move", meanwhile)
    with pytest.raises(logitstore.DatasetExistsError, match="changed meanwhile"):
        logitstore.merge([a, b], tmp_path / "m")
    assert [s.id for s in logitstore.open(tmp_path / "m")] == ["other0"]


def test_two_at_once(tmp_path):
    a, b = two(tmp_path)
    from logitstore.dataset.output import locked

    with locked(tmp_path / "m"), pytest.raises(logitstore.DatasetExistsError, match="another"):
        logitstore.merge([a, b], tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    logitstore.merge([a, b], tmp_path / "m")


SLOW = """
import errno, os, sys, time, logitstore

def link(*_):
    raise OSError(errno.EXDEV, "no")

fsync = os.fsync
os.link = link
os.fsync = lambda descriptor: (time.sleep(0.002), fsync(descriptor))
for line in sys.stdin:
    what, target, *others = line.rstrip().split("|")
    pid = os.fork()
    if pid == 0:
        match what:
            case "merge":
                logitstore.merge(others, target)
            case "append":
                logitstore.append(target, others)
            case "reshard":
                logitstore.repack(others[0], target, shard_bytes=1)
            case "repack":
                logitstore.repack(others[0], target, top_k=3, shard_bytes=1)
            case "split":
                logitstore.split(others[0], target, {"a": 0.5, "b": 0.5})
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Forks for each line, since importing takes longer than merging. Copies, and syncs slowly."""


class Killed:
    """Runs one command in a process each, and kills it after a while."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", SLOW], text=True, **pipes)

    def __call__(self, delay, *what):
        """Whether it was killed before it was through; with a delay of None it is not."""
        print(*what, sep="|", file=self.process.stdin, flush=True)
        pid = int(self.process.stdout.readline())
        if delay is not None:
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return int(self.process.stdout.readline()) == -signal.SIGKILL


@pytest.fixture
def killed():
    if os.name == "nt":
        pytest.skip("SIGKILL is of POSIX systems")
    killed = Killed()
    yield killed
    killed.process.stdin.close()
    killed.process.wait(60)
    killed.process.stdout.close()


def test_a_killed_merge_leaves_nothing_that_looks_complete(tmp_path, killed):
    paths = two(tmp_path)
    outcomes = []
    start = time.monotonic()
    killed(None, "merge", tmp_path / "whole", *paths)
    took = time.monotonic() - start
    for number in range(16):
        out = tmp_path / f"m{number}"
        # The first one, which was measured, was cold: sooner each time, until the process does not begin.
        killed(None if number == 15 else took * 0.7**number, "merge", out, *paths)
        try:
            logitstore.open(out)
        except (logitstore.IncompleteDatasetError, logitstore.DatasetNotFoundError) as error:
            outcomes.append(type(error))
            logitstore.merge(paths, out, overwrite=True)
            check_joined(out, *paths)
        else:
            outcomes.append(None)
            check_joined(out, *paths, killed=True)
    assert None in outcomes
    assert logitstore.IncompleteDatasetError in outcomes


def test_the_command(tmp_path, monkeypatch, capsys):
    run = functools.partial(in_process, monkeypatch, capsys)
    a, b = two(tmp_path)
    out, err = run("merge", a, b, tmp_path / "m")
    assert err == ""
    assert out.startswith(f"{tmp_path / 'm'}: 24 sequences, ")
    content = json.loads(run("merge", a, b, tmp_path / "m", "--overwrite", "--json")[0])
    assert (content["totals"]["sequences"], content["copied"], content["notes"]) == (24, 0, [])
    out, err = run("merge", a, b, tmp_path / "m", status=1)
    assert (out, "--overwrite" in err) == ("", True)
    run("merge", a, status=2)
    c = make(tmp_path / "c", prefix="c", top_k=4)
    assert run("merge", a, c, tmp_path / "n")[1].startswith("Note: what was asked for")
