"""Reading a dataset on the Hub where it is, beside reading it from a local disk.

    python benchmarks/hub.py [CAPTURE]

The Hub is the one of the tests, on loopback, as a process of its own, with 50 ms added to every request. The capture is
written again and again under new ids (64 candidates, sequences of up to 512), as 8 shards of 64 MB, and as 200 small
ones for what a single sequence costs. Every run is a process of its own, remote ones begin with an empty cache.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import logitstore

ROOT = Path(__file__).parent.parent
CAPTURES = (
    ROOT.parent / "shared" / "data" / "gemma3-270m-wikitext2-top128.npz",
    ROOT / "tests" / "data" / "gemma3-270m-shakespeare-top64.npz",
)
LATENCY_MS = 50
ROUNDS = 5
TOKEN = "hf_benchmark"  # noqa: S105 - of the loopback server


@contextmanager
def hub() -> Iterator[str]:
    """The endpoint of a Hub that ends with the block."""
    command = [sys.executable, "-m", "hub.serve", "--token", TOKEN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as server:
        assert server.stdout is not None  # noqa: S101 - for the type checker
        yield json.loads(server.stdout.readline())["endpoint"]
        server.communicate()


def control(endpoint: str, method: str, what: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{endpoint}/_ctl/{what}", data, method=method)  # noqa: S310 - loopback
    with urllib.request.urlopen(request) as answer:  # noqa: S310 - loopback
        return json.load(answer)


def write(path: Path, capture: Path, copies: int, shard_bytes: int, chunk: int = 2**19) -> None:
    arrays = np.load(capture)
    ends = np.cumsum(arrays["lengths"])
    tokens, ids, logprobs = arrays["tokens"], arrays["ids"][:, :64], arrays["logprobs"][:, :64]
    settings: dict[str, Any] = {"teacher": "google/gemma-3-270m", "logit_width": 262_144}
    with logitstore.Writer(path, shard_bytes=shard_bytes, chunk_candidates=chunk, **settings) as writer:
        for copy in range(copies):
            for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                rows = slice(start, end)
                writer.add(tokens[rows], ids[rows], logprobs[rows], id=f"{copy}-{number}")


def iterate(place: str) -> float:
    """Positions a second of decoding every sequence of an opened dataset."""
    dataset = logitstore.open(place).select(["tokens", "ids", "logprobs"])
    start = time.perf_counter()
    positions = sum(len(sequence) for sequence in dataset)
    return positions / (time.perf_counter() - start)


def one(place: str) -> float:
    """Seconds from opening to one decoded sequence."""
    start = time.perf_counter()
    dataset = logitstore.open(place)
    len(dataset[len(dataset) // 2].logprobs)
    return time.perf_counter() - start


def apart(what: str, place: str, environment: dict[str, str]) -> float:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, place]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main(capture: Path) -> None:
    warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
    with tempfile.TemporaryDirectory() as folder, hub() as endpoint:
        work = Path(folder)
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(work / "home"), "LOGITSTORE_CACHE": str(work / "cache")}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        for name, copies, size, chunk in (("large", 100, 64 * 2**20, 2**19), ("small", 10, 2**18, 2**17)):
            write(work / name, capture, copies, size, chunk)
            command = [sys.executable, "-m", "logitstore_cli", "push", str(work / name), f"me/{name}"]
            subprocess.run(command, env=environment, check=True, capture_output=True)
            totals = logitstore.open(work / name).info.totals
            print(f"{name}: {totals.shards} shards, {totals.bytes / 1e6:.0f} MB, {totals.positions:,} positions")
        control(endpoint, "POST", "settings", {"latency": LATENCY_MS / 1000})
        rounds(work, endpoint, environment)
        single(work, endpoint, environment)


def rounds(work: Path, endpoint: str, environment: dict[str, str]) -> None:
    size = logitstore.open(work / "large").info.totals.bytes
    local, remote, cached = [], [], []
    for _ in range(ROUNDS):
        shutil.rmtree(work / "cache", ignore_errors=True)
        local.append(apart("iterate", str(work / "large"), environment))
        control(endpoint, "DELETE", "log")
        remote.append(apart("iterate", "hf://datasets/me/large", environment))
        log = control(endpoint, "GET", "log")
        cached.append(apart("iterate", "hf://datasets/me/large", environment))
    sent = sum(request["sent"] for request in log)
    ratio = statistics.median(r / at for r, at in zip(remote, local, strict=True))
    again = statistics.median(r / at for r, at in zip(cached, local, strict=True))
    print(f"iterating, local: {statistics.median(local):,.0f} positions/s")
    print(f"iterating, remote, {LATENCY_MS} ms: {statistics.median(remote):,.0f} positions/s, {ratio:.2f} of local")
    print(f"iterating again, from the cache: {statistics.median(cached):,.0f} positions/s, {again:.2f} of local")
    print(f"bytes fetched over bytes of the shards: {sent / size:.4f}, by {len(log)} requests")


def single(work: Path, endpoint: str, environment: dict[str, str]) -> None:
    dataset = logitstore.open(work / "small")
    control(endpoint, "DELETE", "log")
    seconds = apart("one", "hf://datasets/me/small", environment)
    log = control(endpoint, "GET", "log")
    chunk = dataset.info.totals.bytes / dataset.info.totals.shards
    sent = sum(request["sent"] for request in log if request["origin"] == "storage")
    print(
        f"one sequence of {dataset.info.totals.shards} shards: {seconds:.2f} s, {len(log)} requests, {sent:,} bytes of "
        f"the shard, {sent / chunk:.2f} chunks"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print({"iterate": iterate, "one": one}[sys.argv[2]](sys.argv[3]))
    else:
        given = [Path(text) for text in sys.argv[1:]] or [path for path in CAPTURES if path.exists()]
        main(given[0])
