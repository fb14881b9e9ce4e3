"""Reading for a long time, from many threads, and in copies of the process."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.hub import repair  # noqa: F401 - imported before descriptors are counted

DESCRIPTORS = Path("/proc/self/fd")
MAPPINGS = Path("/proc/self/maps")


def open_files():
    return len(list(DESCRIPTORS.iterdir()))


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="descriptors are counted in /proc")
def test_ten_thousand_opens_leave_no_descriptor_and_no_mapping(write):
    path = write(sequences=4, chunk_candidates=1)
    expected = logitstore.open(path)[3].logprobs.tolist()
    gc.collect()
    files, mappings = open_files(), MAPPINGS.read_text().count(str(path))
    for number in range(10_000):
        dataset = logitstore.open(path)
        if number % 100 == 0:
            assert dataset[3].logprobs.tolist() == expected
        else:
            assert len(dataset[3].tokens) == 15
    assert open_files() <= files + 1
    del dataset
    gc.collect()
    assert open_files() == files
    assert MAPPINGS.read_text().count(str(path)) == mappings == 0


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="descriptors are counted in /proc")
def test_what_fails_leaves_no_descriptor_either(write, tmp_path):
    path = write(sequences=4)
    shard = next(path.glob("data/*/*.arrow"))
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "logitstore.json").write_bytes(b"{}")
    gc.collect()
    files = open_files()
    for _ in range(1000):
        with pytest.raises(logitstore.CorruptDataError):
            list(logitstore.open(path))
        with pytest.raises(logitstore.CorruptDataError):
            logitstore.open(tmp_path / "manifest")
        with pytest.raises(logitstore.DatasetExistsError):
            logitstore.Writer(path)
    gc.collect()
    assert open_files() == files


def facts(sequence):
    return sequence.id, sequence.tokens.tobytes(), sequence.ids.tobytes(), sequence.logprobs.tobytes(), sequence.columns


@pytest.fixture
def many(write):
    """Several shards of several chunks each."""
    return write(
        sequences=120, chunk_candidates=300, shard_bytes=12_000, per_sequence=lambda i: {"id": f"s{i}", "number": i}
    )


@pytest.mark.parametrize("remembered", [1, 5])
def test_eight_threads_read_the_same_data(many, remembered):
    """One dataset, all its ways of reading, in random order."""
    dataset = logitstore.open(many).with_remembered(remembered)
    expected = [facts(sequence) for sequence in logitstore.open(many)]
    barrier = threading.Barrier(8)

    def read(seed):
        chance = np.random.default_rng(seed)
        barrier.wait()
        if seed % 4 == 0:
            assert [facts(s) for _ in range(3) for s in dataset] == 3 * expected
        for row in chance.integers(0, len(expected), 300).tolist():
            assert facts(dataset[row]) == expected[row]
            if row % 7 == 0:
                assert facts(dataset.by_id(f"s{row}")) == expected[row]
        return [facts(s) for part in dataset.parts() for s in dataset[part]] == expected

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [True] * 8


@pytest.mark.parametrize(
    "method", [m for m in ("fork", "forkserver", "spawn") if m in multiprocessing.get_all_start_methods()]
)
def test_a_dataset_is_the_same_in_other_processes(many, method):
    """Also one that was read from before, whose decompressors and mappings belong to the process that made them."""
    script = f"""
import hashlib, multiprocessing, sys
import logitstore

def read(dataset, sink):
    digest = hashlib.sha256()
    for sequence in dataset:
        digest.update(sequence.id.encode() + sequence.ids.tobytes() + sequence.logprobs.tobytes())
    sink.put((digest.hexdigest(), dataset[7].id, dataset.by_id("s99").id))

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    dataset = logitstore.open(sys.argv[1])
    here, sink = context.SimpleQueue(), context.SimpleQueue()
    read(dataset, here)
    processes = [context.Process(target=read, args=(dataset, sink)) for _ in range(3)]
    [process.start() for process in processes]
    found = {{sink.get() for _ in processes}}
    [process.join() for process in processes]
    read(dataset, here)
    assert found == {{here.get(), here.get()}}, found
    assert [process.exitcode for process in processes] == [0, 0, 0]
    print("same")
"""
    path = many.parent / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, path, many], capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ)
    )
    assert done.stdout == "same\n", done.stderr
