"""Saving what a killed writer or a damaged disk left: to a new directory or in place, killed itself or not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import recover_data as data_of
from click.testing import CliRunner

import logitstore
from logitstore.dataset.parts import read_part
from logitstore.io.lock import FileLock
from logitstore.schema.journal import Part

pytestmark = pytest.mark.usefixtures("quiet")

WRITER = f"""
import sys, pathlib, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
import logitstore, recover_data as data_of
warnings.simplefilter("ignore")
with logitstore.Writer(sys.argv[1], part=sys.argv[2] or None, tokenizer=sys.argv[3], **data_of.SETTINGS) as writer:
    for number in range(int(sys.argv[4]), 10**6):
        writer.add(*data_of.rows(number), id=f"s{{number}}", n=number)
        print(number, flush=True)
"""


def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"type": "WordLevel", "vocab": {"a": 1, "b": 299}}}')
    return path


def killed(tmp_path, sequences, part="", first=0, name="d"):
    """A directory that a writer left which was killed after so many sequences."""
    command = [sys.executable, "-c", WRITER, tmp_path / name, part, tokenizer(tmp_path), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= first + sequences:
                break
        process.kill()
    return tmp_path / name


def same_as(found, numbers, tmp_path):
    """Whether all that was found are these sequences as they were."""
    whole = tmp_path / "whole"
    if not whole.exists():
        data_of.write(whole, range(120))
    want = data_of.content(whole)
    assert all(want[name] == value for name, value in found.items())
    return set(found) == {f"s{number}" for number in numbers}


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems")
@pytest.mark.parametrize("sequences", [3, 37, 61])
def test_a_killed_writer_loses_no_chunk(tmp_path, sequences):
    path = killed(tmp_path, sequences)
    state, before = read_part(path, Part(split="train")), data_of.files(path)
    done = logitstore.recover(path, tmp_path / "o")
    assert data_of.files(path) == before
    found = data_of.content(tmp_path / "o")
    assert len(found) >= state.sums.sequences >= 1  # the journal's, and what was written behind it
    assert same_as(found, range(len(found)), tmp_path)
    assert logitstore.open(tmp_path / "o").info.teacher.name == "t"
    assert logitstore.open(tmp_path / "o").tokenizer().token_bytes(299) == b"b"
    assert any("--resume" in note for note in done.notes)
    with logitstore.Writer(path, resume=True, tokenizer=tokenizer(tmp_path), **data_of.SETTINGS) as writer:
        assert f"s{len(found) - 1}" in writer  # resuming loses nothing, and is still possible


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems")
def test_a_killed_writer_without_its_journal(tmp_path):
    path = killed(tmp_path, 40)
    whole = logitstore.recover(path, tmp_path / "whole-journal").sequences
    shutil.rmtree(path / "parts")
    done = logitstore.recover(path, tmp_path / "o", teacher="x", tokenizer=tokenizer(tmp_path))
    assert done.sequences == whole
    assert done.unverified_chunks > 0
    assert done.unverified_sequences < whole
    found = logitstore.open(tmp_path / "o")
    assert found.info.teacher.name == "x"
    assert found.info.tokenizer.vocabulary_size == 300
    assert any("what was asked for" in note for note in done.notes)


@pytest.mark.parametrize("at", [5, 0.3, 0.6, 0.9])
def test_a_damaged_journal_still_says_what_its_other_lines_say(tmp_path, at):
    path = stopped(tmp_path)
    whole = logitstore.recover(path, tmp_path / "first").sequences
    journal = path / "parts" / "train-00000-of-00001" / "journal"
    data = bytearray(journal.read_bytes())
    data[at if isinstance(at, int) else int(at * len(data))] ^= 4
    journal.write_bytes(data)
    done = logitstore.recover(path, tmp_path / "o")
    assert done.sequences == whole
    assert done.unverified_chunks <= 1  # the one whose line is damaged
    assert logitstore.open(tmp_path / "o").info.teacher == (None if at == 5 else logitstore.Teacher(name="t"))


def stopped(tmp_path, name="d", numbers=range(30), **settings):
    """What a writer leaves that was stopped by an exception."""
    with pytest.raises(KeyError), logitstore.Writer(tmp_path / name, **{**data_of.SETTINGS, **settings}) as writer:
        for number in numbers:
            writer.add(*data_of.rows(number), id=f"s{number}", n=number)
        raise KeyError
    return tmp_path / name


def test_a_chunk_of_the_journal_that_was_not_synced_is_named(tmp_path):
    path = stopped(tmp_path)
    state = read_part(path, Part(split="train"))
    file = path / (state.opened.path + ".partial")
    last = state.chunks[-1]
    data = bytearray(file.read_bytes())
    data[last.offset + 100 : last.offset + last.length] = bytes(last.length - 100)
    file.write_bytes(data)
    done = logitstore.recover(path, tmp_path / "o")
    (lost,) = done.lost
    assert (lost.sequences, lost.chunk) == (last.sequences, len(state.chunks) - 1)
    assert done.sequences == state.sums.sequences - last.sequences


def test_parts_of_several_writers(tmp_path):
    path = data_of.write(tmp_path / "d", range(10), part="0/3")
    stopped(tmp_path, numbers=range(10, 25), part="1/3")
    done = logitstore.recover(path, tmp_path / "o")
    found = data_of.content(tmp_path / "o")
    assert same_as(found, range(len(found)), tmp_path)
    assert len(found) > 20
    assert done.lost == ()
    shutil.rmtree(path / "parts" / "train-00001-of-00003")
    done = logitstore.recover(path, in_place=True)
    assert data_of.content(path) == found
    assert not (path / "parts").exists()
    assert (path / "before-recovery" / "parts" / "train-00000-of-00003" / "journal").exists()


def test_a_lost_manifest(tmp_path):
    path = data_of.write(tmp_path / "d", tokenizer=tokenizer(tmp_path))
    want, before = data_of.content(path), logitstore.open(path).info
    manifest = (path / "logitstore.json").read_bytes()
    (path / "logitstore.json").unlink()
    done = logitstore.recover(path, tmp_path / "o")
    assert data_of.content(tmp_path / "o") == want
    assert (done.lost, done.shards_whole, done.unverified_chunks) == ((), 4, 0)
    after = logitstore.open(tmp_path / "o").info
    assert after.teacher is None
    assert after.totals == before.totals
    assert after.dataset_digest == before.dataset_digest
    assert after.tokenizer == before.tokenizer
    # One that is damaged: words are taken of it, numbers never.
    at = manifest.index(b'"sequences"') + 14
    (path / "logitstore.json").write_bytes(manifest[:at] + b"7" + manifest[at + 1 :])
    done = logitstore.recover(path, in_place=True)
    assert logitstore.open(path).info.teacher.name == "t"
    assert logitstore.open(path).info.totals == before.totals
    assert any("check that" in note for note in done.notes)
    assert (path / "before-recovery" / "logitstore.json").read_bytes()[at : at + 1] == b"7"


def test_in_place_repairs_and_keeps_what_was_damaged(tmp_path):
    path = data_of.write(tmp_path / "d")
    want = data_of.content(path)
    assert logitstore.recover(path, in_place=True).unchanged
    for repetition in ("before-recovery", "before-recovery-2"):
        name = data_of.shard_paths(path)[1]
        _, end, ids = data_of.chunks(path, name)[0]
        data = bytearray((path / name).read_bytes())
        data[end - 20] ^= 1
        (path / name).write_bytes(data)
        manifest = (path / "logitstore.json").read_bytes()
        done = logitstore.recover(path, in_place=True)
        want = {key: value for key, value in want.items() if key not in ids}
        assert data_of.content(path) == want
        assert [name for each in done.lost for name in each.ids] == ids
        assert done.kept == str(path / repetition)
        assert (path / repetition / name).read_bytes() == bytes(data)
        assert (path / repetition / "logitstore.json").read_bytes() == manifest
        assert [finding.code for finding in logitstore.validate(path, deep=True)] == ["tokenizer-unknown"]
        assert not (path / ".recovering").exists()


def test_files_of_a_tokenizer_that_are_damaged(tmp_path):
    path = data_of.write(tmp_path / "d", tokenizer=tokenizer(tmp_path))
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    done = logitstore.recover(path, tmp_path / "o")
    assert [each.path for each in done.lost] == ["tokenizer"]
    assert logitstore.open(tmp_path / "o").info.tokenizer.digest is not None  # the manifest's word stays
    done = logitstore.recover(path, in_place=True, tokenizer=tokenizer(tmp_path))
    assert done.lost == ()
    assert logitstore.open(path).tokenizer().token_bytes(1) == b"a"
    assert (path / "before-recovery" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    other = tmp_path / "other.json"
    other.write_text('{"model": {"type": "WordLevel", "vocab": {"z": 1}}}')
    other = other.rename(tmp_path / "whole" / "tokenizer.json") if (tmp_path / "whole").exists() else other
    (tmp_path / "z").mkdir()
    other.rename(tmp_path / "z" / "tokenizer.json")
    with pytest.raises(logitstore.InvalidInputError, match="not that of the dataset"):
        logitstore.recover(path, tmp_path / "o2", tokenizer=tmp_path / "z")


def test_what_is_there_twice_is_kept_once(tmp_path):
    path = data_of.write(tmp_path / "d")
    want, names = data_of.content(path), data_of.shard_paths(path)
    (path / "logitstore.json").unlink()
    data = (path / names[0]).read_bytes()
    (path / f"{names[0]}.partial").write_bytes(data[: len(data) // 2])
    rows = data_of.write(tmp_path / "other", range(3, 6), chunk_candidates=1000)  # in one chunk: it is cut up
    shutil.copy(rows / data_of.shard_paths(rows)[0], path / "data" / "train" / "train-00009.arrow")
    with logitstore.Writer(tmp_path / "third", **data_of.SETTINGS) as writer:
        writer.add(*data_of.rows(77), id="s2", n=2)  # another sequence of an id that is there
        writer.add(*data_of.rows(78), id="new", n=2)
    shutil.copy(tmp_path / "third" / names[0], path / "data" / "train" / "train-00010.arrow")
    done = logitstore.recover(path, tmp_path / "o")
    found = data_of.content(tmp_path / "o")
    assert found.pop("new")
    assert found == want
    assert done.duplicates > 3
    assert [(each.ids, each.sequences) for each in done.lost if each.sequences] == [(("s2",), 1)]


def test_a_writer_at_work_and_places_that_are_taken_are_refused(tmp_path):
    path = stopped(tmp_path)
    with FileLock(path / "parts" / "train-00000-of-00001" / "lock", "busy"):
        for where in ({"output": tmp_path / "o"}, {"in_place": True}):
            with pytest.raises(logitstore.DatasetExistsError, match="still being written"):
                logitstore.recover(path, **where)
    with pytest.raises(logitstore.DatasetExistsError, match="is there already"):
        logitstore.recover(path, data_of.write(tmp_path / "full"))
    for wrong in ({"output": path / "o"}, {"output": tmp_path}, {}, {"output": tmp_path / "o", "in_place": True}):
        with pytest.raises(logitstore.InvalidInputError):
            logitstore.recover(path, **wrong)
    with pytest.raises(logitstore.DatasetNotFoundError):
        logitstore.recover(tmp_path / "nothing", tmp_path / "o")
    with pytest.raises(logitstore.InvalidInputError, match="--teacher"):
        logitstore.recover(path, tmp_path / "o", teacher="another")
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "nothing").exists()


def test_what_is_not_valid_does_not_become_a_dataset(tmp_path):
    bad = Path(__file__).parent.parent / "spec" / "bad" / "logprob-nan"
    before = data_of.files(bad)
    with pytest.raises(logitstore.CorruptDataError, match="not a valid dataset"):
        logitstore.recover(bad, tmp_path / "o")
    assert not list(tmp_path.glob("*o*"))
    assert data_of.files(bad) == before


KILLER = """
import os, shutil, sys
import logitstore
source, target, first, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "open"}
left = None
def watch(event, arguments):
    global left
    if left is None or event not in CHANGES or (event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
        return
    left -= 1
    if left < 0:
        os._exit(9)
sys.addaudithook(watch)
number = first
while True:
    shutil.copytree(source, f"{target}-{number}")
    child = os.fork()
    if child == 0:
        left = number
        logitstore.recover(f"{target}-{number}", in_place=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    number += step
"""


def kill_everywhere(tmp_path, source, step):
    whole = tmp_path / "recovered"
    shutil.copytree(source, whole)
    result = logitstore.recover(whole, in_place=True)
    want, manifest = data_of.content(whole), (whole / "logitstore.json").read_bytes()
    old, before = source / "logitstore.json", data_of.files(source)
    subprocess.run([sys.executable, "-c", KILLER, source, tmp_path / "k", "0", str(step)], check=True)
    paths = sorted(tmp_path.glob("k-*"))
    assert len(paths) > 100 / step / 4
    recovered = 0
    for path in paths:
        now = (path / "logitstore.json").read_bytes() if (path / "logitstore.json").exists() else None
        if now == manifest:
            recovered += 1
            assert data_of.content(path) == want
        else:
            assert now == (old.read_bytes() if old.exists() else None)
            after = data_of.files(path)
            assert all(after[name] == data for name, data in before.items() if not name.endswith("lock"))
        done = logitstore.recover(path, in_place=True)
        assert data_of.content(path) == want
        assert done.lost in (result.lost, ())
        kept = set(before) - set(data_of.files(path))
        assert all(
            (path / "before-recovery" / name).read_bytes() == before[name] for name in kept if not name.endswith("lock")
        )
        assert not (path / ".recovering").exists()
    assert 0 < recovered < len(paths)


@pytest.fixture(params=["damaged", "unfinished"])
def broken(tmp_path, request):
    if request.param == "unfinished":
        return stopped(tmp_path, numbers=range(14), tokenizer=tokenizer(tmp_path))
    path = data_of.write(tmp_path / "d", range(14))
    name = data_of.shard_paths(path)[0]
    data = bytearray((path / name).read_bytes())
    data[data_of.chunks(path, name)[1][1] - 20] ^= 1
    (path / name).write_bytes(data)
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_place_killed_at_some_steps(tmp_path, broken):
    kill_everywhere(tmp_path, broken, 11)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_place_killed_at_every_step(tmp_path, broken):
    kill_everywhere(tmp_path, broken, 1)


def run(*arguments):
    from logitstore_cli.main import main

    return CliRunner().invoke(main, ["recover", *map(str, arguments)], standalone_mode=False)


def test_the_command(tmp_path):
    path = data_of.write(tmp_path / "d")
    done = run(path, tmp_path / "o")
    assert (done.return_value, done.stdout.splitlines()[-1]) == (0, "  lost: nothing")
    name = data_of.shard_paths(path)[0]
    _, end, ids = data_of.chunks(path, name)[1]
    data = bytearray((path / name).read_bytes())
    data[end - 20] ^= 1
    (path / name).write_bytes(data)
    done = run(path, tmp_path / "o2")
    assert done.return_value == 3
    assert f"lost: {ids[0]} ({name}, chunk 1, row " in done.stdout
    said = json.loads(run(path, tmp_path / "o3", "--json").stdout)
    assert said["lost"][0]["ids"] == ids
    assert said["lost_sequences"] == len(ids)
    assert run(path, "--in-place").return_value == 3
    assert "nothing is damaged" in run(path, "--in-place").stdout
    process = subprocess.run(
        [sys.executable, "-m", "logitstore_cli", "recover", path], capture_output=True, check=False
    )
    assert process.returncode == 2
    assert process.returncode != signal.SIGTERM


def test_long_lists_are_cut_on_the_terminal():
    from logitstore_cli.recover import _lines, lost_lines

    many = tuple(logitstore.Lost("f", "r", 1, 0, number) for number in range(1500))
    lines = list(_lines(logitstore.Recovered("d", 0, many)))
    assert "lost: and 500 more; all are in --json" in lines
    one = logitstore.Lost("f", "r", 5, 2, 10, ("a", None, None, "b", None))
    assert list(lost_lines(one)) == [
        "lost: a (f, chunk 2, row 10): r",
        "lost: b (f, chunk 2, row 13): r",
        "lost: f, chunk 2, 2 sequences (rows 11 to 12): r",
        "lost: f, chunk 2, 1 sequence (row 14): r",
    ]
