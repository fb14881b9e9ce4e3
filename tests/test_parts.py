"""Many writers of one dataset: parts, their locks, and the commit that joins them."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
from click.testing import CliRunner

import logitstore
from logitstore.dataset import commit as commits
from logitstore_cli.main import main

pytestmark = pytest.mark.usefixtures("quiet")

SETTINGS = {"logit_width": 1000, "chunk_candidates": 200, "shard_bytes": 9000, "teacher": "t"}


def part(path, rows, number, of, numbers=range(20), finish=True, **more):
    with logitstore.Writer(path, part=f"{number}/{of}", **{**SETTINGS, **more}) as writer:
        for each in numbers:
            writer.add(*rows(each, 3 + each % 7, 6))
        if not finish:
            raise ZeroDivisionError


def stopped(*arguments, **more):
    with pytest.raises(ZeroDivisionError):
        part(*arguments, finish=False, **more)


def cli(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments], standalone_mode=False)


def names(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def test_parts_become_one_dataset_in_the_order_of_their_numbers(tmp_path, rows):
    path = tmp_path / "d"
    for number in (2, 0, 1):
        part(path, rows, number, 3)
        with pytest.raises(logitstore.IncompleteDatasetError):
            logitstore.open(path)
    committed = logitstore.commit(path)
    dataset = logitstore.open(path)
    assert [s.id for s in dataset] == [str(i + 3 * n) for i in range(3) for n in range(20)]
    assert committed.manifest == dataset.info
    assert not committed.unchanged
    assert dataset.info.totals.encodings == {"grid": 60}
    assert dataset.info.totals.columns == {"tail": 60}
    assert {name.split("/")[0] for name in names(path)} == {"data", "logitstore.json"}
    assert [f for f in logitstore.validate(path, deep=True) if f.severity == "error"] == []
    assert logitstore.commit(path).unchanged
    with logitstore.Writer(path, part="1/3", resume=True, **SETTINGS) as writer:
        assert writer.finished


def test_parts_that_are_not_finished_are_named_and_nothing_is_committed(tmp_path, rows):
    path = tmp_path / "d"
    part(path, rows, 0, 4)
    stopped(path, rows, 2, 4)
    before = names(path)
    with pytest.raises(logitstore.IncompleteDatasetError) as caught:
        logitstore.commit(path)
    assert "part 1/4 of train was never begun; part 2/4 of train was stopped; part 3/4" in str(caught.value)
    assert "0/4" not in str(caught.value)
    assert names(path) == before
    found = logitstore.status(path)
    assert [each.state for each in found.parts] == ["finished", "missing", "stopped", "missing"]
    assert found.parts[0].sequences == 20
    assert found.parts[0].last == str(4 * 19)
    assert 0 < found.parts[2].sequences < 20
    assert found.parts[2].last == str(2 + 4 * (found.parts[2].sequences - 1))
    assert found.manifest is None
    part(path, rows, 2, 4, resume=True)
    for number in (1, 3):
        part(path, rows, number, 4)
    logitstore.commit(path)
    assert len(logitstore.open(path)) == 80
    assert logitstore.status(path).parts == ()


def test_splits_are_committed_together(tmp_path, rows):
    path = tmp_path / "d"
    part(path, rows, 0, 1, split="validation", numbers=range(3))
    assert not (path / "data" / "validation" / "validation-00000.arrow.partial").exists()
    with pytest.raises(logitstore.DatasetExistsError):
        part(path, rows, 0, 2)
    for number in range(2):
        part(tmp_path / "e", rows, number, 2, split="train")
    for number in range(3):
        part(tmp_path / "e", rows, number, 3, split="test", numbers=range(number))
    with pytest.raises(logitstore.InvalidInputError, match=r"part 1/3 of test and part 1/2 of train.*'1'"):
        logitstore.commit(tmp_path / "e")


def test_two_parts_with_one_sequence_are_refused_by_name(tmp_path, rows):
    path = tmp_path / "d"
    for number in range(2):
        with logitstore.Writer(path, part=f"{number}/2", **SETTINGS) as writer:
            writer.add(*rows(0, 5, 8), id=f"a{number}")
            writer.add(*rows(0, 5, 8), id="both")
    before = names(path)
    with pytest.raises(logitstore.InvalidInputError, match=r"part 0/2 of train and part 1/2 of train.*'both'"):
        logitstore.commit(path)
    assert names(path) == before
    with logitstore.Writer(path, part="1/2", overwrite=True, **SETTINGS) as writer:
        writer.add(*rows(0, 5, 8), id="a1")
    logitstore.commit(path)
    assert [s.id for s in logitstore.open(path)] == ["a0", "both", "a1"]
    assert len(names(path)) == 3


@pytest.mark.parametrize(
    ("setting", "values"),
    [("teacher", ["t", "u"]), ("resolution", [1 / 32, 1 / 16]), ("logit_width", [1000, 2000]), ("temperature", [1, 2])],
)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, rows, setting, values):
    """Before any work is done in vain."""
    part(tmp_path / "d", rows, 0, 2, **{setting: values[0]})
    with pytest.raises(logitstore.InvalidInputError, match=f"part 0/2 .* part 1/2 .*{setting.replace('_', ' ')} is"):
        part(tmp_path / "d", rows, 1, 2, **{setting: values[1]})


def test_what_parts_do_not_agree_on_is_not_said_and_noted(tmp_path, rows):
    for number in range(2):
        teacher = logitstore.Teacher(name="t", engine="vllm", engine_version=f"0.{number}")
        source = logitstore.Source(format="vllm", files=(f"{number}.jsonl",))
        part(tmp_path / "d", rows, number, 2, teacher=teacher, top_k=6 + number, source=source)
    committed = logitstore.commit(tmp_path / "d")
    assert committed.manifest.teacher == logitstore.Teacher(name="t", engine="vllm")
    assert committed.manifest.sampling.top_k is None
    assert committed.manifest.source.files == ("0.jsonl", "1.jsonl")
    assert len(committed.notes) == 2


def test_partial_vocabularies_of_parts_are_joined(tmp_path, rows):
    for number in range(3):
        with logitstore.Writer(tmp_path / "d", part=f"{number}/3", **SETTINGS) as writer:
            writer.add(*rows(number, 5, 8))
            writer.use_partial_vocabulary({number: bytes([97 + number]), 9: b"same"})
    logitstore.commit(tmp_path / "d")
    assert dict(logitstore.open(tmp_path / "d").tokenizer().items()) == {0: b"a", 1: b"b", 2: b"c", 9: b"same"}


def test_all_parts_of_a_split_are_of_one_number(tmp_path, rows):
    part(tmp_path / "d", rows, 0, 4)
    with pytest.raises(logitstore.DatasetExistsError, match="one number"):
        part(tmp_path / "d", rows, 1, 3)
    with pytest.raises(logitstore.DatasetExistsError, match="part 0/4 of train, which is not committed"):
        logitstore.Writer(tmp_path / "d")


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "1/0", "01/4", "1/4/5", "", "0/999999"])
def test_parts_are_numbered_from_0(tmp_path, text):
    with pytest.raises(logitstore.InvalidInputError, match=r"'0/16' to '15/16'"):
        logitstore.Writer(tmp_path / "d", part=text)


def test_an_empty_part_is_a_part(tmp_path, rows):
    part(tmp_path / "d", rows, 0, 2, numbers=())
    part(tmp_path / "d", rows, 1, 2, numbers=range(3))
    logitstore.commit(tmp_path / "d")
    assert [s.id for s in logitstore.open(tmp_path / "d")] == ["1", "3", "5"]


def test_a_commit_over_a_dataset_is_asked_for_and_replaces_it(tmp_path, rows, write):
    path = write("d", sequences=3)
    with pytest.raises(logitstore.DatasetExistsError, match="--overwrite"):
        part(path, rows, 0, 2)
    for number in range(2):
        part(path, rows, number, 2, overwrite=True)
    assert [s.id for s in logitstore.open(path)] == ["0", "1", "2"]
    logitstore.commit(path)
    assert len(logitstore.open(path)) == 40
    assert not [name for name in names(path) if name.startswith(("data/train/train-00000.arrow", "parts"))]


def test_a_commit_that_was_stopped_is_finished_by_another_one(tmp_path, rows, monkeypatch):
    path = tmp_path / "d"
    for number in range(3):
        part(path, rows, number, 3)

    def fail(*_arguments):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(commits, "clean", fail)
        with pytest.raises(OSError, match="Input/output"):
            logitstore.commit(path)
    assert len(logitstore.open(path)) == 60
    assert logitstore.commit(path).unchanged
    assert not (path / "parts").exists()
    assert len(logitstore.open(path)) == 60


HOLD = """
import signal, sys, logitstore
writer = logitstore.Writer(sys.argv[1], part="1/2")
print("held", flush=True)
signal.pause()
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems")
def test_a_second_writer_of_a_part_is_refused_until_the_first_one_dies(tmp_path, rows):
    path = tmp_path / "d"
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    for more in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(logitstore.DatasetExistsError, match="another writer is at work on part 1/2"):
            logitstore.Writer(path, part="1/2", **more)
    part(path, rows, 0, 2)
    assert [each.state for each in logitstore.status(path).parts] == ["finished", "writing"]
    with pytest.raises(logitstore.DatasetExistsError, match="part 1/2 of train is still being written"):
        logitstore.commit(path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    part(path, rows, 1, 2, resume=True)
    logitstore.commit(path)
    assert len(logitstore.open(path)) == 40


def test_two_writers_in_one_process_are_two_writers(tmp_path):
    first = logitstore.Writer(tmp_path / "d")
    with pytest.raises(logitstore.DatasetExistsError, match="at work"):
        logitstore.Writer(tmp_path / "d")
    first.abort()
    logitstore.Writer(tmp_path / "d").abort()
    assert not (tmp_path / "d").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_copy_of_the_process_does_not_hold_the_lock(tmp_path):
    """A data loader's worker that lives on must not keep a part locked whose writer has died."""
    writer = logitstore.Writer(tmp_path / "d")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        writer.abort()
        logitstore.Writer(tmp_path / "d").abort()
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        os.close(reading)


def write_part(path, number, of):
    warnings.simplefilter("ignore")
    random = np.random.default_rng(number)
    with logitstore.Writer(path, part=f"{number}/{of}", **SETTINGS) as writer:
        for _ in range(200):
            n = int(random.integers(1, 6))
            ids = random.permuted(np.tile(np.arange(50), (n, 1)), axis=1)[:, :4]
            writer.add(random.integers(0, 50, n), ids, -1 - np.cumsum(random.uniform(0.5, 2, (n, 4)), axis=1))


def test_processes_write_at_the_same_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_part, args=(tmp_path / "d", number, 3)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    logitstore.commit(tmp_path / "d")
    assert sorted(int(s.id) for s in logitstore.open(tmp_path / "d")) == list(range(600))
    assert logitstore.is_valid(logitstore.validate(tmp_path / "d", deep=True))


def test_the_commands_say_what_there_is_to_do(tmp_path, rows):
    path = tmp_path / "d"
    assert isinstance(cli("status", path).exception, logitstore.DatasetNotFoundError)
    assert isinstance(cli("commit", path).exception, logitstore.DatasetNotFoundError)
    part(path, rows, 0, 2)
    stopped(path, rows, 1, 2)
    said = cli("status", path).stdout
    assert "2 parts (1 finished, 1 stopped)" in said
    assert "--resume" in said
    assert "last id 38" in said
    listed = json.loads(cli("status", path, "--json").stdout)
    assert listed["committed"] is None
    assert [each["state"] for each in listed["parts"]] == ["finished", "stopped"]
    assert isinstance(cli("commit", path).exception, logitstore.IncompleteDatasetError)
    part(path, rows, 1, 2, resume=True)
    assert "logitstore commit" in cli("status", path).stdout
    assert "40 sequences" in cli("commit", path).stdout
    assert json.loads(cli("commit", path, "--json").stdout)["unchanged"] is True
    assert json.loads(cli("status", path, "--json").stdout)["committed"]["sequences"] == 40


def test_shards_that_nobody_knows_of_are_not_taken_for_a_part(tmp_path, rows):
    path = tmp_path / "d"
    part(path, rows, 0, 2)
    (path / "parts" / "train-00000-of-00002" / "journal").unlink()
    with pytest.raises(logitstore.DatasetExistsError, match=r"without a journal.*recover"):
        part(path, rows, 0, 2, resume=True)
    assert "never begun" in str(cli("commit", path).exception) or isinstance(
        cli("commit", path).exception, logitstore.DatasetNotFoundError
    )
