"""Going on where a writer was stopped: nothing is lost, nothing is doubled, and the bytes are those of one that was not."""

import hashlib
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

import logitstore

pytestmark = pytest.mark.usefixtures("quiet")

KILLS = int(os.environ.get("LOGITSTORE_KILLS", "20"))
CHUNKED = {"logit_width": 1000, "chunk_candidates": 200, "shard_bytes": 9000}


def content(path):
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "lock")
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def fill(writer, rows, numbers, **more):
    for number in numbers:
        writer.add(*rows(number, 3 + number % 7, 6), id=f"s{number}", **more)


def stop(path, rows, numbers, **settings):
    """Write some sequences, and stop before the end, as an error in the teacher would."""
    with pytest.raises(ZeroDivisionError), logitstore.Writer(path, **{**CHUNKED, **settings}) as writer:
        fill(writer, rows, numbers)
        raise ZeroDivisionError


@pytest.mark.parametrize("stopped_at", [0, 1, 7, 20, 39, 40])
def test_a_resumed_writer_makes_the_same_bytes(tmp_path, rows, stopped_at):
    with logitstore.Writer(tmp_path / "whole", **CHUNKED) as writer:
        fill(writer, rows, range(40))
    stop(tmp_path / "d", rows, range(stopped_at))
    with logitstore.Writer(tmp_path / "d", resume=True, **CHUNKED) as resumed:
        assert not resumed.finished
        fill(resumed, rows, range(40))
    assert content(tmp_path / "d") == content(tmp_path / "whole")
    assert resumed.given == 40
    for name in ("sequences", "positions", "candidates", "bytes", "encodings", "max_error", "mean_kl"):
        assert getattr(resumed.summary, name) == getattr(writer.summary, name)
    assert resumed.summary.alignment.hits.tolist() == writer.summary.alignment.hits.tolist()


def test_sequences_that_are_there_can_be_left_out_or_given_again(tmp_path, rows):
    stop(tmp_path / "d", rows, range(30))
    with logitstore.Writer(tmp_path / "d", resume=True, **CHUNKED) as writer:
        there = [number for number in range(40) if f"s{number}" in writer]
        assert there == list(range(len(there)))
        assert 0 < len(there) < 30
        fill(writer, rows, range(20, 40))
    assert [s.id for s in logitstore.open(tmp_path / "d")] == [f"s{number}" for number in range(40)]


def test_an_id_twice_in_one_run_is_refused_also_when_it_was_there_before(tmp_path, rows):
    stop(tmp_path / "d", rows, range(30))
    with logitstore.Writer(tmp_path / "d", resume=True, **CHUNKED) as writer:
        fill(writer, rows, range(30))
        for number in (0, 29):
            with pytest.raises(logitstore.InvalidInputError, match=f"'s{number}'.*added before"):
                fill(writer, rows, [number])
        fill(writer, rows, [30])
    assert len(logitstore.open(tmp_path / "d")) == 31


def test_running_numbers_count_what_is_passed_over(tmp_path, rows):
    def feed(path, upto, **more):
        with logitstore.Writer(path, **CHUNKED, **more) as writer:
            for number in range(upto):
                writer.add(*rows(number, 5, 8))
            if upto < 20:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        feed(tmp_path / "d", 13)
    feed(tmp_path / "d", 20, resume=True)
    feed(tmp_path / "whole", 20)
    assert content(tmp_path / "d") == content(tmp_path / "whole")


def test_a_finished_dataset_stays_as_it_is(tmp_path, rows, write):
    path = write(sequences=5)
    before, times = content(path), {p: p.stat().st_mtime_ns for p in path.rglob("*.*")}
    with logitstore.Writer(path, resume=True, logit_width=1000, teacher="t") as writer:
        assert writer.finished
        assert "4" in writer
        assert "5" not in writer
        writer.add(*rows(0, 12, 8), id="0")
        with pytest.raises(logitstore.InvalidInputError, match=r"'new'.*finished.*append"):
            writer.add(*rows(0, 12, 8), id="new")
    assert writer.summary.sequences == 5
    assert content(path) == before
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*.*")} == times


DIFFERENT = {
    "resolution": 1 / 16, "values": "grid", "top_k": 5, "top_p": 0.9, "temperature": 2.0, "normalised": "candidates",
    "logit_width": 2000, "teacher": "another", "chunk_candidates": 100, "shard_bytes": 10_000,
    "source": logitstore.Source(format="vllm", files=("b.jsonl",)), "split": "validation",
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_settings_are_refused_by_name(tmp_path, rows, name):
    stop(tmp_path / "d", rows, range(30), teacher="t", source=logitstore.Source(format="vllm", files=("a.jsonl",)))
    before = content(tmp_path / "d")
    settings = {**CHUNKED, "teacher": "t", "source": logitstore.Source(format="vllm", files=("a.jsonl",))}
    expected = "not committed" if name == "split" else f"begun with {name}"
    with pytest.raises((logitstore.InvalidInputError, logitstore.DatasetExistsError), match=expected):
        logitstore.Writer(tmp_path / "d", resume=True, **{**settings, name: DIFFERENT[name]})
    assert content(tmp_path / "d") == before


@pytest.mark.parametrize("name", ["resolution", "teacher", "logit_width", "temperature"])
def test_other_settings_than_those_of_a_finished_dataset_are_refused_too(write, name):
    path = write(sequences=3)
    with pytest.raises(logitstore.InvalidInputError, match=f"begun with {name}"):
        logitstore.Writer(path, **{"logit_width": 1000, "teacher": "t", "resume": True, name: DIFFERENT[name]})


def test_to_overwrite_and_to_go_on_are_two_things(tmp_path):
    with pytest.raises(logitstore.InvalidInputError, match="give one of them"):
        logitstore.Writer(tmp_path / "d", overwrite=True, resume=True)


def test_what_was_begun_is_neither_doubled_nor_lost_without_being_asked(tmp_path, rows):
    stop(tmp_path / "d", rows, range(30))
    before = content(tmp_path / "d")
    with pytest.raises(logitstore.DatasetExistsError, match="--resume"):
        logitstore.Writer(tmp_path / "d", **CHUNKED)
    assert content(tmp_path / "d") == before
    with logitstore.Writer(tmp_path / "d", overwrite=True, **CHUNKED) as writer:
        fill(writer, rows, range(3))
    assert [s.id for s in logitstore.open(tmp_path / "d")] == ["s0", "s1", "s2"]
    assert len(content(tmp_path / "d")) == 2


def test_the_width_that_logits_showed_is_known_again(tmp_path):
    def feed(path, upto, **more):
        with logitstore.Writer(path, chunk_candidates=40, top_k=4, **more) as writer:
            for number in range(upto):
                logits = np.random.default_rng(number).normal(size=(5, 50)).astype(np.float32)
                writer.add_logits(np.arange(5), logits, id=f"s{number}")
            if upto < 9:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        feed(tmp_path / "d", 6)
    feed(tmp_path / "d", 9, resume=True)
    feed(tmp_path / "whole", 9)
    assert content(tmp_path / "d") == content(tmp_path / "whole")
    assert logitstore.open(tmp_path / "d").info.logit_width == 50


def test_the_types_of_users_columns_are_known_again(tmp_path, rows):
    stop(tmp_path / "a", rows, range(1))
    with pytest.raises(ZeroDivisionError), logitstore.Writer(tmp_path / "d", **CHUNKED) as writer:
        fill(writer, rows, range(30), score=1.5, tags=["a"])
        raise ZeroDivisionError
    with logitstore.Writer(tmp_path / "d", resume=True, **CHUNKED) as writer:
        with pytest.raises(logitstore.InvalidInputError, match=r"'s30'.*'score'"):
            fill(writer, rows, [30], score="high")
        fill(writer, rows, range(40), score=1.5, tags=["a"])
    dataset = logitstore.open(tmp_path / "d")
    assert dataset.info.user_columns == {"score": "double", "tags": "list<item: string>"}
    assert dataset[39].columns == {"score": 1.5, "tags": ["a"]}


def test_declared_columns_have_to_be_those_that_were_declared(tmp_path, rows):
    schema = pa.schema([("score", pa.float32())])
    stop(tmp_path / "d", rows, range(30), columns=schema)
    with pytest.raises(logitstore.InvalidInputError, match="columns"):
        logitstore.Writer(tmp_path / "d", resume=True, columns=pa.schema([("score", pa.int32())]), **CHUNKED)
    with logitstore.Writer(tmp_path / "d", resume=True, columns=schema, **CHUNKED) as writer:
        fill(writer, rows, range(40))
    assert logitstore.open(tmp_path / "d").info.user_columns == {"score": "float"}


def test_damage_in_what_was_synced_is_no_silent_loss(tmp_path, rows):
    stop(tmp_path / "d", rows, range(40))
    shard = tmp_path / "d" / "data" / "train" / "train-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    with pytest.raises(logitstore.CorruptDataError, match=r"train-00000\.arrow"):
        logitstore.Writer(tmp_path / "d", resume=True, **CHUNKED)
    shard.unlink()
    with pytest.raises(logitstore.CorruptDataError, match=r"train-00000\.arrow.*recover"):
        logitstore.Writer(tmp_path / "d", resume=True, **CHUNKED)


def test_any_cut_and_any_flipped_bit_of_a_journal_loses_no_sequence(tmp_path, rows):
    """Chunks that a damaged journal does not vouch for are written again."""
    path = tmp_path / "d"
    with logitstore.Writer(tmp_path / "whole", **CHUNKED) as writer:
        fill(writer, rows, range(20))
    stop(path, rows, range(20))
    left = {name: (path / name).read_bytes() for name in content(path)}
    journal = "parts/train-00000-of-00001/journal"
    chance = random.Random(0)
    for _ in range(30):
        data = bytearray(left[journal])
        at = chance.randrange(len(data))
        if chance.random() < 0.5:
            del data[at:]
        else:
            data[at] ^= 1 << chance.randrange(8)
        for name in content(path):
            (path / name).unlink()
        for name, old in left.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data if name == journal else old)
        try:
            with logitstore.Writer(path, resume=True, **CHUNKED) as writer:
                fill(writer, rows, range(20))
        except (logitstore.DatasetExistsError, logitstore.CorruptDataError) as error:
            assert "recover" in str(error)  # where the journal does not know of what is complete
        else:
            assert content(path) == content(tmp_path / "whole")


DRIVER = """
import os, signal, sys, time, traceback, warnings, numpy as np, logitstore
warnings.simplefilter("ignore")

def write(path):
    random = np.random.default_rng(0)
    with logitstore.Writer(path, logit_width=500, chunk_candidates=4000, shard_bytes=30_000, resume=True) as writer:
        for i in range(600):
            lp = -np.cumsum(random.uniform(0.1, 1, (20, 30)), axis=1) - 2
            ids = random.permuted(np.tile(np.arange(500), (20, 1)), axis=1)[:, :30]
            writer.add(random.integers(0, 500, 20), ids, lp, id=f"s{i}")

for line in sys.stdin:
    path, limit = line.split()
    child = os.fork()
    if child == 0:
        try:
            write(path)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + float(limit)
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.001)
    if found == (0, 0):
        os.kill(child, signal.SIGKILL)
        found = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(found[1]), flush=True)
"""


@pytest.fixture
def run():
    """A function that runs a writer in a process, and kills it after so many seconds; whether it was."""
    process = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(path, limit=60):
        process.stdin.write(f"{path} {limit}\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code != 0

    yield run
    process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems")
def test_a_writer_that_is_killed_again_and_again_makes_the_same_bytes(tmp_path, run):
    """LOGITSTORE_KILLS says how often; a killed writer's dataset is refused until it is complete."""
    run(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    chance, kills, number = random.Random(0), 0, 0
    while kills < KILLS:
        path, number = tmp_path / f"d{number}", number + 1
        before = kills
        while kills < before + 8 and run(path, chance.uniform(0, 0.25)):
            kills += 1
            try:
                assert len(logitstore.open(path)) == 600
            except (logitstore.IncompleteDatasetError, logitstore.DatasetNotFoundError):
                assert not (path / "logitstore.json").exists()
        run(path)
        assert content(path) == whole
    assert logitstore.is_valid(logitstore.validate(tmp_path / "d0", deep=True))
