"""Deep validation in several processes: the findings of one, in the same order, and bounded."""

import importlib.util
import json
import pickle
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitstore
from logitstore.checks import parts as parts_module
from logitstore.checks import repeated
from logitstore.checks.findings import Findings
from logitstore.checks.parts import Task, check_part, parts_of
from logitstore.checks.workers import SMALL_BYTES, workers_for
from logitstore.dataset.shards import open_shard
from logitstore.errors import InvalidInputError
from logitstore.io import LocalStore
from logitstore.processes import cores

BAD = Path(__file__).parent.parent / "spec" / "bad"

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def forge():
    """spec/bad/make.py, for what it seals again."""
    spec = importlib.util.spec_from_file_location("bad_make", BAD / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dataset(tmp_path, rows):
    """Six shards of two chunks of two sequences."""
    path = tmp_path / "d"
    settings = {"values": "float32", "chunk_candidates": 32, "shard_bytes": 3000}
    with logitstore.Writer(path, teacher="t", logit_width=1000, **settings) as writer:
        for seed in range(24):
            writer.add(*rows(seed, 4, 4), entropy=[1.0] * 4)
    assert [info.sequences for info in logitstore.open(path).info.shards] == [4] * 6
    return path


@pytest.fixture
def split_up(monkeypatch):
    """Even the smallest shards are several parts."""
    monkeypatch.setattr(parts_module, "PART_BYTES", 700)


def name_of(number):
    return f"data/train/train-{number:05d}.arrow"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def forge_shard(forge, monkeypatch, path, number):
    monkeypatch.setattr(forge, "SHARD", name_of(number))
    return forge.Forgery(path)


def task_of(path):
    return Task(path, logitstore.open(path).info, deep=True)


def same_with_all(path, workers=(0, 2)):
    """The findings, which are the same with any number of workers."""
    here, *others = (logitstore.validate(path, deep=True, workers=n) for n in workers)
    for other in others:
        assert other == here
    return [f for f in here if f.code != "tokenizer-unknown"]


def damage(path, forge, monkeypatch):
    """Damage of many kinds, in bytes, cells, ids and sums."""
    forgery = forge_shard(forge, monkeypatch, path, 1)
    forgery.rows[0]["encoding"] = 77
    forgery.rows[1]["id"] = "0"
    forgery.put("entropy", np.float32, [1.0, 1.0, 1.0, -1.0], row=3)
    forgery.seal()
    forgery = forge_shard(forge, monkeypatch, path, 4)
    forgery.rows[2]["id"] = "0"
    forgery.rows[3]["id"] = "3"
    forgery.hashes[1] ^= 1
    forgery.seal()
    info = logitstore.open(path).info
    index = open_shard(LocalStore(path), info.shards[0], info).index
    flip(path / name_of(0), int(index["offset"][1]) + 200)
    (path / name_of(2)).unlink()
    flip(path / name_of(3), -1)


def test_a_good_dataset_has_no_findings(dataset, split_up):
    assert len(list(parts_of(task_of(dataset)))) > 20
    assert same_with_all(dataset) == []


def test_findings_are_the_same_and_in_the_same_order(dataset, split_up, forge, monkeypatch):
    damage(dataset, forge, monkeypatch)
    findings = same_with_all(dataset, workers=(0, 1, 2))
    assert [(f.code, f.shard, f.chunk, f.row) for f in findings] == [
        ("shard-sha256", name_of(0), None, None),
        ("chunk-digest", name_of(0), 1, None),
        ("cell", name_of(1), 0, 4),
        ("shard-hashes", name_of(1), 0, 5),
        ("optional-range", name_of(1), 1, 7),
        ("shard-missing", name_of(2), None, None),
        ("shard-tail", name_of(3), None, None),
        ("shard-hashes", name_of(4), 0, 17),
        ("shard-hashes", name_of(4), 1, 18),
        ("shard-hashes", name_of(4), 1, 19),
        ("duplicate-sequence-id", name_of(1), 0, 5),
        ("duplicate-sequence-id", name_of(4), 1, 18),
    ]


def test_parts_do_not_change_the_findings(dataset, forge, monkeypatch):
    damage(dataset, forge, monkeypatch)
    whole = logitstore.validate(dataset, deep=True)
    for size in (200, 1000):
        monkeypatch.setattr(parts_module, "PART_BYTES", size)
        assert logitstore.validate(dataset, deep=True) == whole


def test_progress_of_parts_ends_at_the_bytes_of_all_shards(dataset, split_up):
    total = logitstore.open(dataset).info.totals.bytes
    for workers in (0, 2):
        seen = []
        logitstore.validate(dataset, deep=True, workers=workers, progress=lambda *told, seen=seen: seen.append(told))
        assert seen == sorted(seen)
        assert seen[-1] == (total, total)
        assert len(seen) == len(list(parts_of(task_of(dataset))))


# Ids


def test_ids_are_compared_and_not_their_hashes_alone(dataset, monkeypatch):
    monkeypatch.setattr(parts_module, "id_hash", lambda _: 7)
    assert {f.code for f in logitstore.validate(dataset, deep=True, workers=0)} == {"tokenizer-unknown", "shard-hashes"}


def test_among_ids_of_one_hash_the_equal_ones_are_found(dataset, forge, monkeypatch):
    forgery = forge_shard(forge, monkeypatch, dataset, 5)
    forgery.rows[0]["id"] = "0"
    forgery.rows[2]["id"] = "1"
    forgery.rows[3]["id"] = "0"
    forgery.seal()
    monkeypatch.setattr(parts_module, "id_hash", lambda _: 7)
    found = [f for f in logitstore.validate(dataset, deep=True, workers=0) if f.code == "duplicate-sequence-id"]
    assert [(f.row, f.message.split("'")[1]) for f in found] == [(20, "0"), (22, "1"), (23, "0")]


@given(st.lists(st.integers(0, 20), max_size=60), st.sampled_from([1, 3, 7, 100]), st.sampled_from([1, 2, 100]))
def test_entries_whose_hash_was_there_before_are_found(values, block, listed):
    hashes = np.array(values, np.uint64) + np.uint64(2**64 - 21)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "_BLOCK", block)
        patch.setattr(repeated, "LISTED", listed)
        twice, left = repeated._twice(hashes)
        found = list(repeated._later(hashes, twice)) if left else []
    assert all(len(entries) <= listed for entries, _ in found)
    assert [(entry, first) for pair in found for entry, first in zip(*(a.tolist() for a in pair), strict=True)] == [
        (at, values.index(value)) for at, value in enumerate(values) if value in values[:at]
    ]
    assert left == len(values) - len(set(values))
    assert len(twice) == sum(n > 1 for n in Counter(values).values())


def test_a_file_that_is_gone_when_ids_are_compared_ends_nothing(dataset, forge, monkeypatch):
    forgery = forge_shard(forge, monkeypatch, dataset, 5)
    forgery.rows[0]["id"] = "0"
    forgery.seal()
    last = len(list(parts_of(task_of(dataset))))
    calls = []

    def remove(*_):
        calls.append(1)
        if len(calls) == last:
            (dataset / name_of(0)).unlink()

    codes = {f.code for f in logitstore.validate(dataset, deep=True, workers=0, progress=remove)}
    assert "duplicate-sequence-id" not in codes


# Bounds


@pytest.fixture
def many(tmp_path, forge, monkeypatch):
    """Several shards, every hash wrong, and the ids of each those of the first."""
    path = tmp_path / "many"
    settings = {"values": "float32", "chunk_candidates": 64, "shard_bytes": 80_000}
    with logitstore.Writer(path, teacher="t", logit_width=10, **settings) as writer:
        for _ in range(2400):
            writer.add([1], [[2]], [[-1.0]])
    for number in range(len(logitstore.open(path).info.shards)):
        forgery = forge_shard(forge, monkeypatch, path, number)
        for at, row in enumerate(forgery.rows):
            row["id"] = str(at)
        forgery.hashes = [1] * len(forgery.rows)
        forgery.seal()
    return path


def test_more_than_a_thousand_findings_are_counted(many):
    sequences = [info.sequences for info in logitstore.open(many).info.shards]
    assert len(sequences) >= 3
    findings = same_with_all(many)
    times = Counter(f.code for f in findings)
    assert times["shard-hashes"] == times["duplicate-sequence-id"] == 1001
    last = {f.code: f.message for f in findings}
    assert last["shard-hashes"] == "1400 more findings of this kind are not listed"
    again = 2400 - max(sequences)
    assert last["duplicate-sequence-id"] == f"{again - 1000} more findings of this kind are not listed"


def test_a_part_sends_no_more_than_is_listed(tmp_path, forge):
    path = tmp_path / "d"
    with logitstore.Writer(path, teacher="t", logit_width=10) as writer:
        for _ in range(3000):
            writer.add([], [], [], count=[])
    forgery = forge.Forgery(path)
    forgery.hashes = [1] * 3000
    forgery.seal()
    (part,) = parts_of(task_of(path))
    checked = pickle.loads(pickle.dumps(check_part(task_of(path), part)))
    assert len(checked.found.listed) == 1000
    assert dict(checked.found.times) == {("shard-hashes", "error"): 3000}
    assert sum(each.hashes.nbytes for each in checked.ids) == 8 * 3000


def test_joined_findings_are_those_of_one_list():
    one, joined = Findings(), Findings()
    for part in range(4):
        own = Findings()
        for n in range(400 * part):
            for findings in (one, own):
                findings.add(f"code-{n % 2}", f"{part} {n}", "warning" if n % 3 else "error")
        joined.join(own.found())
    assert joined.done() == one.done()


def test_a_manifest_that_claims_a_petabyte_is_not_believed(dataset):
    info = logitstore.open(dataset).info
    first = msgspec.structs.replace(info.shards[0], bytes=2**50)
    claimed = msgspec.structs.replace(info, shards=(first, *info.shards[1:]))
    assert len(list(parts_of(Task(dataset, claimed, deep=True)))) == 6


# How many


def test_how_many_processes_there_are(monkeypatch):
    assert workers_for(2**60, 3) == 3
    assert workers_for(2**60, 0) == 0
    assert workers_for(SMALL_BYTES - 1, None) == 0
    assert workers_for(SMALL_BYTES, None) == (cores() if cores() > 1 else 0)
    with pytest.raises(InvalidInputError, match="workers is -1"):
        workers_for(0, -1)
    monkeypatch.setattr("logitstore.checks.workers.cores", lambda: 1)
    assert workers_for(SMALL_BYTES, None) == 0


@pytest.mark.parametrize(
    ("source", "several"),
    [(None, True), ("import x\nx.run()\n", False), ('if __name__ == "__main__":\n    run()\n', True)],
)
def test_a_script_that_each_process_would_run_again_gets_none(tmp_path, monkeypatch, source, several):
    main = types.ModuleType("__main__")
    if source is not None:
        main.__file__ = str(tmp_path / "script.py")
        (tmp_path / "script.py").write_text(source)
    monkeypatch.setattr("logitstore.checks.workers.cores", lambda: 4)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert workers_for(SMALL_BYTES, None) == (4 if several else 0)


def cli(*arguments, status=0):
    command = [sys.executable, "-m", "logitstore_cli", "validate", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_the_command_says_the_same(dataset, forge, monkeypatch):
    damage(dataset, forge, monkeypatch)
    here, _ = cli(dataset, "--deep", "--json", "--workers", 0, status=1)
    there, _ = cli(dataset, "--deep", "--json", "--workers", 2, status=1)
    assert here == there
    assert len(json.loads(here)["findings"]) > 5
    _, err = cli(dataset, "--workers", 2, status=2)
    assert "--workers is for --deep" in err
