"""Ways in which work could be lost, doubled or mixed without a word; each ends in an error, or in nothing lost."""

import json
import os

import numpy as np
import pytest

import logitstore
from logitstore.convert import convert
from logitstore.dataset import part as writing
from logitstore.schema.journal import Part, decode_line, encode_line

pytestmark = pytest.mark.usefixtures("quiet")

CHUNKED = {"logit_width": 1000, "chunk_candidates": 200, "shard_bytes": 9000}
JOURNAL = "parts/train-00000-of-00001/journal"


def fill(path, rows, numbers, *, stop=False, **settings):
    with logitstore.Writer(path, **{**CHUNKED, **settings}) as writer:
        for number in numbers:
            writer.add(*rows(number, 3 + number % 7, 6), id=f"s{number}")
        if stop:
            raise ZeroDivisionError


def stopped(path, rows, numbers, **settings):
    with pytest.raises(ZeroDivisionError):
        fill(path, rows, numbers, stop=True, **settings)
    return path


def ids(path):
    return [s.id for s in logitstore.open(path)]


def test_a_journal_that_lost_complete_shards_is_not_gone_on_with(tmp_path, rows):
    """A flipped bit early in it, and a writer that gives new sequences alone."""
    path = stopped(tmp_path / "d", rows, range(40))
    data = bytearray((path / JOURNAL).read_bytes())
    data[data.index(b"\n") + 30] ^= 1
    (path / JOURNAL).write_bytes(data)
    before = {p: p.read_bytes() for p in path.rglob("*.arrow*")}
    with pytest.raises(logitstore.CorruptDataError, match=r"does not know of train-0000\d\.arrow.*recover"):
        logitstore.Writer(path, resume=True, **CHUNKED)
    assert {p: p.read_bytes() for p in path.rglob("*.arrow*")} == before
    assert logitstore.recover(path, tmp_path / "saved").lost == ()
    assert len(ids(tmp_path / "saved")) > 30


def test_synced_bytes_that_changed_are_not_cut_off(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("logitstore.io.files.SYNC_BYTES", 2000)
    path = stopped(tmp_path / "d", rows, range(40), shard_bytes=10**6)
    (partial,) = path.rglob("*.partial")
    data = bytearray(partial.read_bytes())
    data[3000] ^= 1
    partial.write_bytes(data)
    with pytest.raises(logitstore.CorruptDataError, match=r"changed after they were synced.*recover"):
        logitstore.Writer(path, resume=True, **{**CHUNKED, "shard_bytes": 10**6})
    assert partial.read_bytes() == data


def test_a_journal_that_is_damaged_meanwhile_is_not_committed(tmp_path, rows):
    path = tmp_path / "d"
    with (
        pytest.raises(logitstore.CorruptDataError, match="journal is damaged"),
        logitstore.Writer(path, **CHUNKED) as writer,
    ):
        for number in range(40):
            writer.add(*rows(number, 5, 6), id=f"s{number}")
        data = bytearray((path / JOURNAL).read_bytes())
        data[len(data) // 2] ^= 1
        (path / JOURNAL).write_bytes(data)
    assert not (path / "logitstore.json").exists()
    assert len(list(path.rglob("*.arrow"))) > 1


def test_an_id_that_no_journal_can_hold_is_refused(tmp_path):
    with pytest.raises(logitstore.InvalidInputError, match="the limit is"), logitstore.Writer(tmp_path / "d") as writer:
        writer.add([1], [[1]], [[-1.0]], id="x" * (2**20 + 1))
    with pytest.raises(logitstore.InvalidInputError, match="too long"):
        logitstore.Writer(tmp_path / "d", source=logitstore.Source(files=tuple(f"{n:080d}" for n in range(500_000))))


@pytest.mark.parametrize("alone", [False, True])
def test_overwriting_leaves_what_others_wrote(tmp_path, rows, alone):
    path = tmp_path / "d"
    fill(path, rows, range(3))
    fill(path, rows, range(50, 60), part="0/2", split="validation", overwrite=True)
    stopped(path, rows, range(60, 75), part="1/2", split="validation", overwrite=True)
    if alone:
        fill(path, rows, range(10, 20), overwrite=True)
    else:
        with pytest.raises(logitstore.IncompleteDatasetError):
            logitstore.commit(path, overwrite=True)
    assert ids(path) == [f"s{n}" for n in (range(10, 20) if alone else range(3))]
    fill(path, rows, range(60, 75), part="1/2", split="validation", resume=True)
    logitstore.commit(path, overwrite=True)
    assert ids(path) == [f"s{n}" for n in range(50, 75)]


def test_two_writers_of_two_splits_do_not_replace_each_other(tmp_path, rows):
    first = logitstore.Writer(tmp_path / "d", split="train", **CHUNKED)
    with pytest.raises(logitstore.DatasetExistsError, match="which is not committed"):
        logitstore.Writer(tmp_path / "d", split="validation", **CHUNKED)
    first.add(*rows(0, 5, 6), id="a")
    first.close()
    assert ids(tmp_path / "d") == ["a"]


def test_a_dataset_that_came_meanwhile_is_not_replaced(tmp_path, rows, write):
    path = stopped(tmp_path / "d", rows, range(30))
    other = write("other", sequences=3)
    writer = logitstore.Writer(path, resume=True, **CHUNKED)
    (other / "logitstore.json").rename(path / "logitstore.json")
    with pytest.raises(logitstore.DatasetExistsError, match="made a dataset here meanwhile"):
        writer.close()
    with pytest.raises(logitstore.InvalidInputError, match="nothing was committed"):
        writer.close()


def test_overwriting_that_was_stopped_before_its_first_chunk_is_gone_on_with(tmp_path, rows):
    path = tmp_path / "d"
    fill(path, rows, range(3))
    stopped(path, rows, range(1), overwrite=True)
    assert ids(path) == ["s0", "s1", "s2"]
    fill(path, rows, range(7, 9), resume=True)
    assert ids(path) == ["s7", "s8"]


def test_an_interrupt_within_add_ends_the_writer(tmp_path, rows, monkeypatch):
    writer = logitstore.Writer(tmp_path / "d", **CHUNKED)
    writer.add(*rows(0, 5, 6))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing.PartWriter, "_count", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        writer.add(*rows(1, 5, 6))
    with pytest.raises(logitstore.InvalidInputError, match="closed"):
        writer.add(*rows(2, 5, 6))
    with pytest.raises(logitstore.InvalidInputError, match="nothing was committed"):
        writer.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_copy_of_the_process_cannot_use_the_writer(tmp_path, rows):
    writer = logitstore.Writer(tmp_path / "d", **CHUNKED)
    for number in range(20):
        writer.add(*rows(number, 5, 6))
    child = os.fork()
    if child == 0:
        code = 0
        for act in (writer.close, lambda: writer.add(*rows(99, 5, 6))):
            try:
                act()
                code = 1
            except logitstore.InvalidInputError:
                pass
        writer.abort()
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    writer.add(*rows(20, 5, 6))
    writer.close()
    assert len(ids(tmp_path / "d")) == 21


def test_the_working_directory_may_change(tmp_path, rows, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    with logitstore.Writer("d", **CHUNKED) as writer:
        for number in range(40):
            monkeypatch.chdir(tmp_path / ("x", "y")[number % 2])
            writer.add(*rows(number, 5, 6))
    assert len(ids(tmp_path / "x" / "d")) == 40
    assert list((tmp_path / "y").iterdir()) == []


def test_an_empty_part_fits_those_that_found_their_width(tmp_path):
    logits = np.random.default_rng(0).normal(size=(5, 50)).astype(np.float32)
    with logitstore.Writer(tmp_path / "d", part="0/2") as writer:
        writer.add_logits(np.arange(5), logits, id="a")
    with logitstore.Writer(tmp_path / "d", part="1/2"):
        pass
    logitstore.commit(tmp_path / "d")
    assert logitstore.open(tmp_path / "d").info.logit_width == 50


def test_logits_that_are_refused_do_not_say_the_width(tmp_path):
    def logits(width):
        return np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)

    with logitstore.Writer(tmp_path / "d") as writer:
        with pytest.raises(logitstore.InvalidInputError):
            writer.add_logits(np.arange(5), logits(40), entropy=[1.0])
        writer.add_logits(np.arange(5), logits(50))
    assert logitstore.open(tmp_path / "d").info.logit_width == 50


@pytest.fixture
def capture(tmp_path):
    def make(name, shift=0):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            for number in range(60):
                row = {"tokens": [9, 1, 2 + shift], "ids": [[1, 2], [2, 3], [3, 4 + number]], "lp": [[-0.5, -1.5]] * 3}
                file.write(json.dumps(row) + "\n")
        return path

    return make


def columns(path, output, **more):
    names = {"tokens": "tokens", "ids": "ids", "logprobs": "lp"}
    settings = {"alignment": "next", "logit_width": 100, "chunk_candidates": 20, "value_kind": "logprob", **more}
    return convert([path], output, importer="columns", map=names, **settings)


def test_a_conversion_is_not_gone_on_with_by_other_options_or_inputs(tmp_path, capture, monkeypatch):
    path, out = capture("a/c.jsonl"), tmp_path / "d"
    add, calls = logitstore.Writer.add, []

    def fail(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 30:
            raise OSError(5, "Input/output error")
        add(self, *arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input"):
        patch.setattr(logitstore.Writer, "add", fail)
        columns(path, out)
    with pytest.raises(logitstore.InvalidInputError, match="another alignment"):
        columns(path, out, resume=True, alignment="same")
    with pytest.raises(logitstore.InvalidInputError, match="another input 0"):
        columns(capture("b/c.jsonl", shift=1), out, resume=True)
    columns(path, out, resume=True)
    assert len(ids(out)) == 60
    with pytest.raises(logitstore.DatasetExistsError, match="without the split validation"):
        columns(path, out, resume=True, split="validation")


def test_directories_that_are_no_parts_are_none():
    for name in ("train-00000-of-999999", "train-00000-of-000002", "train-00002-of-00002", "train-0-of-1", "x"):
        assert Part.of_directory(name) is None
    assert Part.of_directory("train-00000-of-100000") == Part(split="train", number=0, of=100_000)


def test_a_forged_journal_is_refused(tmp_path, rows):
    path = stopped(tmp_path / "d", rows, range(30))
    lines = (path / JOURNAL).read_bytes().splitlines(keepends=True)
    at = max(number for number, line in enumerate(lines) if b'"shard-opened"' in line)
    opened = json.loads(lines[at][17:])
    for change in ({"schema": "AAAA"}, {"path": "data/train/other-00000.arrow"}, {"path": "../x-00000.arrow"}):
        body = json.dumps({**opened, **change}).encode()
        (path / JOURNAL).write_bytes(b"".join(lines[:at]) + sealed(body) + b"".join(lines[at + 1 :]))
        with pytest.raises(logitstore.CorruptDataError):
            logitstore.Writer(path, resume=True, **CHUNKED)


def sealed(body):
    import xxhash

    return xxhash.xxh3_64_hexdigest(body).encode() + b" " + body + b"\n"


def test_lines_come_back(tmp_path, rows):
    path = stopped(tmp_path / "d", rows, range(30))
    for number, line in enumerate((path / JOURNAL).read_bytes().splitlines(keepends=True)):
        assert encode_line(decode_line(line, first=number == 0)) == line
