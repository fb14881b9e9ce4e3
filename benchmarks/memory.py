"""Memory of a process that iterates over a million sequences in shuffled order, and what the loader's state costs.

    python benchmarks/memory.py [SEQUENCES]

Sequences of 8 positions with 4 candidates each, made here: what is measured is what a number of sequences costs, not
what they hold. The process that iterates is one of its own; of its memory are printed what importing torch and
logitstore takes, the most that iterating adds to its own (anonymous) memory, and the mapped pages of the dataset, which
the system takes back when it needs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import logitstore

BATCH = 64


def status(name: str) -> float:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(name)).split()[1])


def make(folder: Path, sequences: int) -> None:
    random = np.random.default_rng(0)
    ids = np.argsort(random.random((8192, 64)), axis=1)[:, :4]
    logprobs = np.tile(np.array([-1, -2, -3, -4], np.float32), (8, 1))
    with logitstore.Writer(folder, teacher="none", logit_width=64, values="grid") as writer:
        for number in range(sequences):
            start = 8 * (number % 1000)
            candidates = ids[start : start + 8]
            writer.add(candidates[:, 0], candidates, logprobs, id=str(number))


def measure(folder: Path, shuffle: Any) -> dict[str, float]:
    from logitstore.torch import LogitLoader, StreamingLogits  # noqa: PLC0415 - in the process that is measured only

    imported, anonymous = status("VmRSS"), status("RssAnon")
    stream = StreamingLogits(folder, batch_size=BATCH, seed=1, shuffle=shuffle)
    loader = LogitLoader(stream)
    most = most_mapped = 0.0
    count = 0
    start = time.perf_counter()
    for number, batch in enumerate(loader):
        count += len(batch)
        if number % 256 == 0:
            most = max(most, status("RssAnon") - anonymous)
            most_mapped = max(most_mapped, status("RssFile"))
    seconds = time.perf_counter() - start
    begun = time.perf_counter()
    for _ in range(100):
        state = json.dumps(loader.state_dict())
    return {
        "sequences": count,
        "imported": imported,
        "added": most,
        "mapped": most_mapped - (imported - anonymous),
        "seconds": seconds,
        "state_bytes": len(state),
        "state_seconds": (time.perf_counter() - begun) / 100,
    }


def main(sequences: int) -> None:
    warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "d", sequences)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        print(f"{sequences:,} sequences, {size / 1e6:.0f} MB", flush=True)
        for shuffle in ("blocks", "full"):
            command = [sys.executable, __file__, "--measure", str(Path(folder) / "d"), shuffle]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if found["sequences"] != sequences:
                raise SystemExit(f"{found['sequences']} sequences came out")
            rate, microseconds = sequences / found["seconds"], 1e6 * found["state_seconds"]
            imported, added, mapped = (found[name] / 1e6 for name in ("imported", "added", "mapped"))
            print(
                f"shuffle={shuffle}: imports {imported:.0f} MB; iterating adds {added:.0f} MB of its own and "
                f"{mapped:.0f} MB of mapped file; {rate:,.0f} sequences/s; "
                f"state {found['state_bytes']} bytes, {microseconds:.0f} µs",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
