"""How fast `stats --full` and `compare` go through a dataset, in how much memory, and how large the page of `view` is.

    python benchmarks/look.py [CAPTURE]

The capture is written again and again under new ids (64 candidates, sequences of up to 512): a million positions, and
four million for the memory. Short sequences of 8 positions are made of the same rows. Every run is a process of its own
that reads in one thread; the first pass over the files is not counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import logitstore
from logitstore.look.compare import compare
from logitstore.look.page import page
from logitstore.look.stats import stats

ROOT = Path(__file__).parent.parent
CAPTURES = (
    ROOT.parent / "shared" / "data" / "gemma3-270m-wikitext2-top128.npz",
    ROOT / "tests" / "data" / "gemma3-270m-shakespeare-top64.npz",
)
ROUNDS = 5


def write(path: Path, capture: Path, positions: int, length: int = 512, **settings: Any) -> Path:
    """A dataset of so many positions, in sequences of at most this length."""
    arrays = np.load(capture)
    ends = np.cumsum(arrays["lengths"])
    windows = [np.arange(end - n, end, length) for n, end in zip(arrays["lengths"], ends, strict=True)]
    starts = np.concatenate(windows)
    spans = list(zip(starts.tolist(), [*starts[1:].tolist(), len(arrays["tokens"])], strict=True))
    tokens, ids, logprobs, entropy = (
        arrays["tokens"],
        arrays["ids"][:, :64],
        arrays["logprobs"][:, :64],
        arrays["entropy"],
    )
    with logitstore.Writer(path, teacher="google/gemma-3-270m", logit_width=262_144, **settings) as writer:
        number = 0
        while writer.summary.positions < positions:
            start, end = spans[number % len(spans)]
            rows = slice(start, end)
            writer.add(tokens[rows], ids[rows], logprobs[rows], entropy=entropy[rows], id=str(number))
            number += 1
    return path


def status(name: str) -> float:
    """A line of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1]) / 1000


def timed(what: str, paths: list[str]) -> dict[str, float]:
    """Positions a second of the second pass, and what the process's own memory grew by at most."""
    datasets = [logitstore.open(path) for path in paths]
    most, before = 0.0, status("RssAnon")

    def watch(_done: int, _total: int) -> None:
        nonlocal most
        most = max(most, status("RssAnon") - before)

    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        if what == "stats":
            positions = stats(datasets[0], full=True, progress=watch).positions
        elif what == "compare":
            positions = compare(datasets[0], datasets[1], progress=watch).positions
        else:
            positions = sum(len(sequence) for sequence in datasets[0].select(["tokens", "ids", "logprobs"]))
        seconds.append(time.perf_counter() - start)
    return {"rate": positions / seconds[1], "memory": most}


def run(what: str, *paths: Path) -> dict[str, float]:
    """`timed` in processes of its own: medians."""
    command = [sys.executable, __file__, "--timed", what, *map(str, paths)]
    rounds = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(ROUNDS)
    ]
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def main() -> None:
    given = [Path(argument) for argument in sys.argv[1:]]
    capture = next(path for path in [*given, *CAPTURES] if path.exists())
    print(f"{capture.name}; medians of {ROUNDS} processes, one thread each")
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        folder = Path(scratch)
        usual = write(folder / "usual", capture, 1_000_000)
        coarse = write(folder / "coarse", capture, 1_000_000, resolution=1 / 8)
        short = write(folder / "short", capture, 400_000, length=8)
        large = write(folder / "large", capture, 4_000_000)
        for name, what, paths in (
            ("reading alone", "read", [usual]),
            ("stats --full", "stats", [usual]),
            ("stats --full, four times as many", "stats", [large]),
            ("stats --full, sequences of 8", "stats", [short]),
            ("reading alone, sequences of 8", "read", [short]),
            ("compare, the same candidates", "compare", [usual, coarse]),
        ):
            found = run(what, *paths)
            print(f"{name:<36}{found['rate']:>12,.0f} positions/s{found['memory']:>8.0f} MB")
        dataset = logitstore.open(usual)
        made = page(dataset, rows=range(40), candidates=10, positions=20_000)
        print(f"page of view, 20,000 tokens: {len(made.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        print(json.dumps(timed(sys.argv[2], sys.argv[3:])))
    else:
        main()
