"""Power cuts at every step: the dataset is refused or complete, resuming gives what no cut would have given."""

import os
import random
import shutil

import numpy as np
import pytest
from crash_disk import Disk, Recorder

import logitstore
from logitstore.dataset.parts import read_part
from logitstore.io import files as io
from logitstore.schema.journal import Part

pytestmark = pytest.mark.usefixtures("quiet")

SEQUENCES = 24
SEEDS = int(os.environ.get("LOGITSTORE_POWER_CUTS", "50")) // 25
REFUSED = (logitstore.IncompleteDatasetError, logitstore.DatasetNotFoundError)


def add(writer, number):
    random = np.random.default_rng(number)
    n = int(random.integers(1, 12))
    ids = random.permuted(np.tile(np.arange(300), (n, 1)), axis=1)[:, :5]
    logprobs = -1 - np.cumsum(random.uniform(0.5, 2, (n, 5)), axis=1)
    writer.add(random.integers(0, 300, n), ids, logprobs, id=f"s{number}")


def write(path, marks=None, numbers=range(SEQUENCES), **settings):
    settings = {"logit_width": 300, "chunk_candidates": 60, "shard_bytes": 4000, **settings}
    with logitstore.Writer(path, **settings) as writer:
        for number in numbers:
            if f"s{number}" not in writer:
                add(writer, number)
                if marks is not None:
                    marks(f"s{number}")


def content(path):
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "lock"
    }


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A function that records the steps of an action on a directory."""

    def record(root, act):
        monkeypatch.setattr(io, "SYNC_BYTES", 1500)
        root.mkdir(exist_ok=True)
        with monkeypatch.context() as patches:
            recorder = Recorder(root, patches)
            recorder.observe()
            before = len(recorder.steps)
            act(recorder)
            recorder.observe()
        return recorder.steps, before

    return record


def disks(steps, before, root, random, times):
    """Disks after some number of steps, ascending, each with a crash to be made."""
    disk = Disk(root.stat().st_ino)
    for step in steps[:before]:
        disk.step(step)
    for step in [step for step in disk.pending if step[0] == "name"]:
        disk.durable[step[1]] = step[2]
    disk.pending, disk.synced = [], dict(disk.written)
    points = sorted({*random.sample(range(before, len(steps) + 1), min(times, len(steps) + 1 - before)), len(steps)})
    at = before
    for point in points:
        for step in steps[at:point]:
            disk.step(step)
        at = point
        yield disk


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_power_cut_loses_nothing_that_resuming_does_not_bring_back(tmp_path, recorded, seed):
    chance = random.Random(seed)
    write(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    steps, before = recorded(tmp_path / "d", lambda recorder: write(tmp_path / "d", recorder.mark))
    assert content(tmp_path / "d") == whole
    finished = 0
    for disk in disks(steps, before, tmp_path / "d", chance, 25):
        left = tmp_path / "left"
        disk.crash(left, chance)
        try:
            dataset = logitstore.open(left)
            assert [s.id for s in dataset] == [f"s{i}" for i in range(SEQUENCES)]
            finished += 1
        except REFUSED:
            pass
        write(left, resume=True)
        assert content(left) == whole
        shutil.rmtree(left)
    assert 0 < finished < 20


def synced_sequences(disk, folder):
    """How many sequences are in chunks that were synced, and of which a synced line of the journal tells."""
    files = disk.certain()
    journal = "parts/train-00000-of-00001/journal"
    if journal not in files:
        return 0
    (folder / journal).parent.mkdir(parents=True, exist_ok=True)
    (folder / journal).write_bytes(files[journal])
    state = read_part(folder, Part(split="train"))
    if state is None:
        return 0
    there = [info for info in state.shards if info.path in files or info.path + ".partial" in files]
    assert there == list(state.shards)  # the journal says nothing of a shard that could be lost
    partial = files.get(state.opened.path + ".partial", b"") if state.opened is not None else b""
    chunks = [chunk for chunk in state.chunks if chunk.offset + chunk.length <= len(partial)]
    assert chunks == list(state.chunks)  # nor of a chunk
    return sum(each.sequences for each in (*there, *chunks))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_recovering_after_a_power_cut_loses_no_synced_chunk(tmp_path, recorded, seed):
    chance = random.Random(100 + seed)
    steps, before = recorded(tmp_path / "d", lambda recorder: write(tmp_path / "d", recorder.mark))
    most = 0
    for number, disk in enumerate(disks(steps, before, tmp_path / "d", chance, 25)):
        left, saved = tmp_path / f"left{number}", tmp_path / f"saved{number}"
        disk.crash(left, chance)
        synced = synced_sequences(disk, tmp_path / f"synced{number}")
        most = max(most, synced)
        try:
            logitstore.recover(left, saved)
        except (logitstore.LogitStoreError, OSError) as error:
            assert synced == 0, error
            continue
        ids = [s.id for s in logitstore.open(saved)]
        assert ids == [f"s{i}" for i in range(len(ids))]
        assert len(ids) >= synced
        assert logitstore.is_valid(logitstore.validate(saved, deep=True))
    assert most > SEQUENCES // 2


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_power_cut_while_a_dataset_is_replaced_leaves_the_old_or_the_new_one(tmp_path, recorded, seed):
    chance = random.Random(seed)
    path = tmp_path / "d"
    write(path, numbers=range(5))
    old = content(path)
    steps, before = recorded(path, lambda recorder: write(path, recorder.mark, overwrite=True))
    new = content(path)
    assert len(new) > len(old)
    seen = set()
    for disk in disks(steps, before, path, chance, 25):
        left = tmp_path / "left"
        disk.crash(left, chance)
        ids = [s.id for s in logitstore.open(left)]
        assert ids in ([f"s{i}" for i in range(5)], [f"s{i}" for i in range(SEQUENCES)])
        seen.add(len(ids))
        if (left / "parts" / "train-00000-of-00001" / "journal").exists() and len(ids) == 5:
            try:
                write(left, resume=True)
            except logitstore.DatasetExistsError as error:
                assert "begin it anew" in str(error)  # nothing of the journal was synced
            else:
                assert content(left) == new
        shutil.rmtree(left)
    assert seen == {5, SEQUENCES}
