"""Size, error and speed of the format on real rows, beside what people store them in today.

    python benchmarks/format.py [CAPTURE.npz]

CAPTURE has the names of the `arrays` importer; without it, the Gemma 3 270M rows of WikiText-2 beside the repository
are taken, else the Shakespeare rows of the tests. The best 64 candidates are used. Everything runs on one core and one
thread; speeds are medians, and ratios are of pairs measured in turn in one run.
"""

from __future__ import annotations

import functools
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import logitstore
from logitstore.dataset.shards import open_shard
from logitstore.encoding.anchor import find_anchors

ROOT = Path(__file__).parent.parent
CAPTURES = (
    ROOT.parent / "shared" / "data" / "gemma3-270m-wikitext2-top128.npz",
    ROOT / "tests" / "data" / "gemma3-270m-shakespeare-top64.npz",
)
K = 64
WIDTH = 262_144
ROUNDS = 9

Arrays = dict[str, NDArray[Any]]


def write(path: Path, arrays: Arrays, **settings: Any) -> logitstore.Writer:
    with logitstore.Writer(path, teacher="t", logit_width=WIDTH, overwrite=True, **settings) as writer:
        start = 0
        for length in arrays["lengths"].tolist():
            part = slice(start, start + length)
            more: dict[str, Any] = {"logsumexp": arrays["logsumexp"][part]} if "logsumexp" in arrays else {}
            writer.add(arrays["tokens"][part], arrays["ids"][part], arrays["logprobs"][part], **more)
            start += length
    return writer


def read(path: Path) -> int:
    """Mapped files to int64 ids and float32 logprobs [T, K], digests verified."""
    total = 0
    for sequence in logitstore.open(path).select(["ids", "logprobs"]):
        ids, logprobs = sequence.dense(K)
        total += ids.size + 0 * logprobs.size
    return total


def write_parquet(path: Path, arrays: Arrays) -> None:
    """int32 and float16 lists of lists, zstd, otherwise defaults."""
    rows = pa.array(np.concatenate([[0], np.cumsum(arrays["lengths"])]).astype(np.int32))
    positions = pa.array(np.arange(len(arrays["tokens"]) + 1, dtype=np.int32) * K)

    def lists(values: NDArray[Any]) -> pa.Array:
        return pa.ListArray.from_arrays(rows, pa.ListArray.from_arrays(positions, pa.array(values.ravel())))

    columns = {
        "tokens": pa.ListArray.from_arrays(rows, pa.array(arrays["tokens"])),
        "ids": lists(arrays["ids"].astype(np.int32)),
        "logprobs": lists(arrays["logprobs"].astype(np.float16)),
    }
    pq.write_table(pa.table(columns), path, compression="zstd")


def read_parquet(path: Path) -> int:
    table = pq.read_table(path, columns=["ids", "logprobs"], use_threads=False, memory_map=True)
    total = 0
    for ids, logprobs in zip(table["ids"].chunks, table["logprobs"].chunks, strict=True):
        flat = ids.flatten().flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        values = logprobs.flatten().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        total += flat.size + 0 * values.size
    return total


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float, float]:
    """Median seconds of both and median of the ratios theirs / ours, taken in turn after a warm-up."""
    ours(), theirs()
    pairs = [(timed(ours), timed(theirs)) for _ in range(ROUNDS)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def kl(given: NDArray[Any], decoded: NDArray[Any]) -> float:
    """Mean KL(given || decoded), both renormalised over the candidates, in float64."""
    p, q = np.exp(given.astype(np.float64)), np.exp(decoded.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    q /= q.sum(axis=1, keepdims=True)
    return float((p * np.log(p / q)).sum(axis=1).mean())


def dense(path: Path, *columns: str) -> list[NDArray[Any]]:
    dataset = logitstore.open(path).select([*columns, "count"])
    return [np.concatenate([getattr(s, name).reshape(-1, K) for s in dataset]) for name in columns]


def bar(name: str, value: float, form: str, wanted: str, good: bool) -> None:  # noqa: FBT001
    print(f"  {name:<58} {value:>12{form}}   {wanted:<14} {'ok' if good else 'MISSED'}")


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.arrow"))


def sorted_rows(arrays: Arrays) -> Arrays:
    """The best K candidates, equal logprobs by id, as the format orders them."""
    order = np.lexsort((arrays["ids"], -arrays["logprobs"]), axis=1)[:, :K]
    ids = np.take_along_axis(arrays["ids"], order, 1)
    return {**arrays, "ids": ids, "logprobs": np.take_along_axis(arrays["logprobs"], order, 1)}


def grid(work: Path, arrays: Arrays) -> None:
    positions = len(arrays["tokens"])
    for resolution, most, kl_most in ((1 / 32, 126.0, 3e-5), (1 / 16, 120.0, 2e-4)):
        write(work / "grid", arrays, values="grid", resolution=resolution)
        ids, logprobs = dense(work / "grid", "ids", "logprobs")
        per_position = size_of(work / "grid") / positions
        error = float(np.abs(logprobs.astype(np.float64) - arrays["logprobs"]).max())
        name = f"grid 1/{round(1 / resolution)}"
        bar(f"{name}: bytes a position, shard files whole", per_position, ".1f", f"<= {most:.0f}", per_position <= most)
        # float32 rounds the decoded value once; half a unit in the last place comes on top of half a step.
        bar(f"{name}: largest error, nats", error, ".7f", f"<= {resolution / 2:.6f}", error <= resolution / 2 + 2e-6)
        found = kl(arrays["logprobs"], logprobs)
        bar(f"{name}: mean KL(given || decoded), nats", found, ".2e", f"<= {kl_most:.0e}", found <= kl_most)
        wrong = int((ids != arrays["ids"]).sum())
        bar(f"{name}: candidates that differ", wrong, "d", "0", wrong == 0)


def bfloat16(work: Path, arrays: Arrays) -> None:
    positions = len(arrays["tokens"])
    exact = arrays["logprobs"].astype(np.float64) + arrays["logsumexp"][:, None]
    bits = exact.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    # Rounding the logits of the candidates moves the normaliser by what it adds to their part of the mass.
    moved = np.exp(rounded - arrays["logsumexp"][:, None].astype(np.float64)).sum(axis=1) - np.exp(
        arrays["logprobs"].astype(np.float64)
    ).sum(axis=1)
    logsumexp = (arrays["logsumexp"] + np.log1p(moved)).astype(np.float32)
    order = np.lexsort((arrays["ids"], -rounded), axis=1)
    logits = np.take_along_axis(rounded, order, 1)
    made = {
        "tokens": arrays["tokens"],
        "lengths": arrays["lengths"],
        "ids": np.take_along_axis(arrays["ids"], order, 1),
        "logprobs": logits - logsumexp[:, None],
    }
    difference = logits.astype(np.float64) - logits[:, :1]
    for name, given in (("with logsumexp", {**made, "logsumexp": logsumexp}), ("logprobs alone", made)):
        write(work / "bfloat16", given)
        ids, found = dense(work / "bfloat16", "ids", "logits")
        per_position = size_of(work / "bfloat16") / positions
        bar(f"bfloat16, {name}: bytes a position", per_position, ".1f", "<= 117.5", per_position <= 117.5)
        wrong = int((found.astype(np.float64) - found[:, :1] != difference).sum()) + int((ids != given["ids"]).sum())
        bar(f"bfloat16, {name}: ids or logit differences that differ", wrong, "d", "0", wrong == 0)
    count = np.full(positions, K, np.uint32)
    flat = made["logprobs"].ravel()
    rate = positions / statistics.median(timed(lambda: find_anchors(flat, count)) for _ in range(5))
    bar("bfloat16: anchors found, positions/s", rate, ",.0f", ">= 30,000", rate >= 30_000)


def draws(work: Path, whole: Arrays) -> None:
    """50 draws a position from the best 128, renormalised."""
    positions = len(whole["tokens"])
    random = np.random.default_rng(0)
    p = np.exp(whole["logprobs"].astype(np.float64))
    times = random.multinomial(50, p / p.sum(axis=1, keepdims=True))
    with logitstore.Writer(work / "draws", teacher="t", logit_width=WIDTH) as writer:
        start = 0
        for length in whole["lengths"].tolist():
            part = slice(start, start + length)
            writer.add_draws(whole["tokens"][part], whole["ids"][part], times[part], 50)
            start += length
    per_position = size_of(work / "draws") / positions
    entries = int((times > 0).sum())
    bar("50 draws from the best 128: bytes a position", per_position, ".1f", "<= 22", per_position <= 22)
    print(f"  ({entries / positions:.1f} candidates a position, {8 * size_of(work / 'draws') / entries:.1f} bits each)")


def speed(work: Path, arrays: Arrays) -> None:
    n = arrays["ids"].size
    write(work / "ours", arrays, values="grid")
    write_parquet(work / "theirs.parquet", arrays)
    ours, theirs, ratio = paired(lambda: read(work / "ours"), lambda: read_parquet(work / "theirs.parquet"))
    print(f"  reading: ours {n / ours / 1e6:.0f}, parquet {n / theirs / 1e6:.0f} million candidates/s")
    bar("reading, times pyarrow's zstd parquet (median of pairs)", ratio, ".2f", ">= 3", ratio >= 3)
    fresh = (work / f"fresh-{number}" for number in itertools.count())  # both write files that are not there yet

    def ours_written() -> None:
        write(next(fresh), arrays, values="grid")

    def theirs_written(*, synced: bool) -> None:
        path = next(fresh)
        write_parquet(path, arrays)
        if synced:
            with path.open("rb+") as file:
                os.fsync(file.fileno())

    ours, theirs, ratio = paired(ours_written, lambda: theirs_written(synced=True))
    print(f"  writing: ours {n / ours / 1e6:.1f}, parquet {n / theirs / 1e6:.1f} million candidates/s")
    bar("writing, times that parquet, both synced to the disk", ratio, ".2f", ">= 1", ratio >= 1)
    _, _, ratio = paired(ours_written, lambda: theirs_written(synced=False))
    print(f"  (ours synced, parquet left to the system's cache: {ratio:.2f})")


def random_access(work: Path, arrays: Arrays) -> None:
    dataset = logitstore.open(work / "ours")
    long = [i for i in range(len(dataset)) if len(dataset[i]) >= 500] or list(range(len(dataset)))
    chosen = np.random.default_rng(0).choice(long, 300)
    median = statistics.median(timed(functools.partial(dataset.__getitem__, int(i))) for i in chosen) * 1000
    bar("a random sequence of 500 positions, warm, ms (median)", median, ".2f", "< 1", median < 1)
    many = work / "many"
    part = {name: values[:2] for name, values in arrays.items() if name != "lengths"}
    with logitstore.Writer(many, teacher="t", logit_width=WIDTH, shard_bytes=1, chunk_candidates=1) as writer:
        for _ in range(2000):
            writer.add(part["tokens"], part["ids"], part["logprobs"])
    script = (
        "import sys, time, resource, logitstore\n"
        "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "before, start = rss(), time.perf_counter()\n"
        "dataset = logitstore.open(sys.argv[1])\n"
        "assert len(dataset[1000].ids)\n"
        "print(time.perf_counter() - start, rss() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, many], capture_output=True, text=True, check=True)
    seconds, grown = (float(word) for word in done.stdout.split())
    bar("2,000 shards: opening and one sequence from the middle, s", seconds, ".3f", "< 0.5", seconds < 0.5)
    bar("2,000 shards: memory above the imports, MB", grown / 1e6, ".1f", "< 100", grown < 100e6)


def comparison(work: Path, arrays: Arrays) -> None:
    """The table of the README."""
    positions, n = len(arrays["tokens"]), arrays["ids"].size
    print("\n| stored as | bytes a position | mean KL, nats | million positions/s read |")
    print("|---|---|---|---|")

    def row(name: str, size: int, error: float, seconds: float) -> None:
        print(f"| {name} | {size / positions:.1f} | {error:.1e} | {positions / seconds / 1e6:.2f} |")

    halves = arrays["logprobs"].astype(np.float16)
    write_parquet(work / "x.parquet", arrays)
    seconds = statistics.median(timed(lambda: read_parquet(work / "x.parquet")) for _ in range(ROUNDS))
    row(
        "parquet, zstd, int32 + float16 lists",
        (work / "x.parquet").stat().st_size,
        kl(arrays["logprobs"], halves),
        seconds,
    )
    np.save(work / "ids.npy", arrays["ids"].astype(np.int32))
    np.save(work / "logprobs.npy", halves)

    def read_npy() -> int:
        ids = np.load(work / "ids.npy", mmap_mode="r").astype(np.int64)
        return int(ids.size + np.load(work / "logprobs.npy", mmap_mode="r").astype(np.float32).size)

    size = sum((work / f"{name}.npy").stat().st_size for name in ("ids", "logprobs")) + 4 * positions
    row(
        "npy, mapped, int32 + float16",
        size,
        kl(arrays["logprobs"], halves),
        statistics.median(timed(read_npy) for _ in range(ROUNDS)),
    )
    for name, settings in (
        ("logitstore, grid 1/32 (default)", {"values": "grid"}),
        ("logitstore, grid 1/16", {"values": "grid", "resolution": 1 / 16}),
        ("logitstore, float16", {"values": "float16"}),
        ("logitstore, float32 (exact)", {"values": "float32"}),
    ):
        write(work / "row", arrays, **settings)
        (decoded,) = dense(work / "row", "logprobs")
        seconds = statistics.median(timed(lambda: read(work / "row")) for _ in range(ROUNDS))
        row(name, size_of(work / "row"), abs(kl(arrays["logprobs"], decoded)), seconds)
    print(f"\n{positions:,} positions, {n:,} candidates; digests verified where there are any")


def columns(work: Path) -> None:
    """Bytes a position of each column."""
    dataset = logitstore.open(work / "ours")
    sums: dict[str, int] = {}
    for info in dataset.info.shards:
        shard = open_shard(dataset.store, info, dataset.info)
        for number in range(len(shard.index)):
            batch = shard.chunk(number).batch
            for name in batch.schema.names:
                sums[name] = sums.get(name, 0) + batch.column(name).nbytes
    positions = dataset.info.totals.positions
    print("  " + ", ".join(f"{name} {size / positions:.1f}" for name, size in sums.items() if size / positions >= 0.05))


def main() -> None:
    """Print everything."""
    warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else next(p for p in CAPTURES if p.exists())
    with np.load(path) as file:
        whole = {name: file[name] for name in file}
    arrays = sorted_rows(whole)
    logsumexp = arrays.pop("logsumexp")
    arrays.pop("entropy", None)
    print(f"{path.name}: {len(arrays['tokens']):,} positions, best {K} candidates; pyarrow {pa.__version__}\n")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        print("  " + " " * 58 + " " * 8 + "here   wanted")
        grid(work, arrays)
        bfloat16(work, {**arrays, "logsumexp": logsumexp})
        draws(work, whole)
        speed(work, arrays)
        columns(work)
        random_access(work, arrays)
        comparison(work, arrays)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of this process: {peak / 1024:.0f} MiB (the capture itself included)")


if __name__ == "__main__":
    main()
