"""Each byte of each small vector changed, with digests that are right again: it is read safely, or refused.

A forger can compute digests, so the data may of course be others. They keep a reader's promises all the same: ids in
range, shapes that agree, no crash, no other exception. Here a sample; `slow` goes through all bytes.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VECTORS = sorted(
    path.parents[2].name
    for path in (ROOT / "spec" / "vectors" / "v1").glob("*/data/train/train-00000.arrow")
    if path.stat().st_size < 4000
)
SCHEMA = "user-columns"
"""The vector whose schema message is changed as well: it is much the same in all."""


def changes(byte):
    """Other values of a byte: zero or one bit, and all bits."""
    return sorted({byte ^ 1, 255 if byte != 255 else 0} - {byte})


def places(name, data, step):
    """The bytes that are changed."""
    sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
    import forge

    first = 0 if name == SCHEMA else len(forge.Shard.of(data).schema)
    return range(first + hash_of(name) % step, len(data), step)


def hash_of(name):
    return sum(name.encode())


def child(name, step, log):
    """Change and read one byte after another; what it says last is at work."""
    sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
    import forge
    import run
    import targets

    data = (ROOT / "spec" / "vectors" / "v1" / name / targets.SHARD).read_bytes()
    assert targets.read_shard(forge.reseal(data)) is not None
    opened = 0
    base = run.forget_peak()
    for at in places(name, data, step):
        for value in changes(data[at]):
            Path(log).write_text(f"byte {at} becomes {value}")
            signal.alarm(10)
            changed = bytearray(data)
            changed[at] = value
            opened += targets.read_shard(forge.reseal(bytes(changed))) is not None
    signal.alarm(0)
    assert opened > 0
    assert run.peak() - base < 256 * 2**20


def read_forged(name, step, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, __file__, name, str(step), str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {log.read_text() if log.exists() else ''}: {done.stderr[-3000:]}"


@pytest.mark.parametrize("name", VECTORS)
def test_a_sample_of_bytes(tmp_path, name):
    read_forged(name, 89, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", VECTORS)
def test_many_bytes(tmp_path, name):
    """Every byte where LOGITSTORE_EVERY_BYTE says so, as `make exhaustive` does."""
    read_forged(name, 1 if "LOGITSTORE_EVERY_BYTE" in os.environ else 7, tmp_path)


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), sys.argv[3])
