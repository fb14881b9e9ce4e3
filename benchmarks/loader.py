"""From mapped files to collated CPU tensors, beside `datasets` and MosaicML Streaming.

    python benchmarks/loader.py [CAPTURE.npz]

Needs an environment of its own (`make bench-loader` makes it): datasets and mosaicml-streaming, which bring much with
them. Real rows (Gemma 3 270M on WikiText-2, else the Shakespeare rows of the tests), the best 64 candidates, sequences
of 512 positions, repeated to some 330,000 positions; batches of [8, 512, 64] int64 ids and float32 logprobs from a
DataLoader with one worker, in the order of the files. The best of three passes, the workers' start left out. MDS
shards are decompressed anew in each pass.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import logitstore
from logitstore.torch import EncodedCollator, HFCollator, LogitLoader, StreamingLogits, decode_batch

ROOT: Final = Path(__file__).parent.parent
CAPTURES: Final = (
    ROOT.parent / "shared" / "data" / "gemma3-270m-wikitext2-top128.npz",
    ROOT / "tests" / "data" / "gemma3-270m-shakespeare-top64.npz",
)
K: Final = 64
LENGTH: Final = 512
BATCH: Final = 8
WIDTH: Final = 262_144
POSITIONS: Final = 330_000

Row = dict[str, Any]


def real_rows() -> list[Row]:
    """Sequences of 512 positions, repeated."""
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else next(path for path in CAPTURES if path.exists())
    arrays = np.load(given)
    ends = np.cumsum(arrays["lengths"])
    rows = [
        {
            "tokens": arrays["tokens"][end - LENGTH : end].astype(np.int32),
            "ids": np.ascontiguousarray(arrays["ids"][end - LENGTH : end, :K]),
            "logprobs": np.ascontiguousarray(arrays["logprobs"][end - LENGTH : end, :K]),
        }
        for end, length in zip(ends.tolist(), arrays["lengths"].tolist(), strict=True)
        if length >= LENGTH
    ]
    print(f"{given.name}: {len(rows)} sequences of {LENGTH}", flush=True)
    return (rows * (1 + POSITIONS // (LENGTH * len(rows))))[: POSITIONS // LENGTH // BATCH * BATCH]


def passes(make: Callable[[], Iterable[Any]], positions: int, before: Callable[[], None] = lambda: None) -> float:
    """Positions a second of the best of three passes, from the second batch on: the first waits for the workers."""
    best = 0.0
    for _ in range(3):
        before()
        batches: Iterator[Any] = iter(make())
        next(batches)
        start = time.perf_counter()
        count = sum(1 for _ in batches)
        best = max(best, count * BATCH * LENGTH / (time.perf_counter() - start))
        if count * BATCH * LENGTH < positions - 2 * BATCH * LENGTH:
            raise SystemExit(f"only {count} batches came out")
    return best


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Arrays(Dataset[Row]):
    """Rows that are decoded already: what copying alone allows."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [
            {"ids": row["ids"].astype(np.int64), "logprobs": row["logprobs"], "tokens": row["tokens"]}
            for row in rows[:64]
        ]
        self.length = len(rows)

    def __len__(self) -> int:
        """Number of rows."""
        return self.length

    def __getitem__(self, row: int) -> Row:
        """One row."""
        return self.rows[row % len(self.rows)]


def stacked(rows: list[Row]) -> dict[str, torch.Tensor]:
    """[8, 512, 64] of arrays or tensors."""
    return {
        "ids": torch.stack([torch.as_tensor(row["ids"]) for row in rows]).long(),
        "logprobs": torch.stack([torch.as_tensor(row["logprobs"]) for row in rows]).float(),
        "tokens": torch.stack([torch.as_tensor(row["tokens"]) for row in rows]).long(),
    }


def ours(rows: list[Row], folder: Path) -> dict[str, tuple[float, int]]:
    with logitstore.Writer(folder, teacher="t", logit_width=WIDTH) as writer:
        for number, row in enumerate(rows):
            writer.add(row["tokens"], row["ids"], row["logprobs"], id=str(number))
    positions, size = len(rows) * LENGTH, size_of(folder)

    def loader(data: Any, collate: Any) -> LogitLoader:
        return LogitLoader(StreamingLogits(data, batch_size=BATCH, shuffle="none"), collate_fn=collate, num_workers=1)

    plain = logitstore.open(folder)
    found = {"logitstore, decode=cpu": (passes(lambda: loader(plain, HFCollator(k=K)), positions), size)}
    encoded = plain.with_decoding("device")
    device = passes(lambda: map(decode_batch, loader(encoded, EncodedCollator())), positions)
    return found | {"logitstore, decode=device on CPU": (device, size)}


def of_datasets(rows: list[Row], folder: Path) -> tuple[float, int]:
    import datasets  # noqa: PLC0415 - of the environment of this benchmark

    def generate() -> Iterator[Row]:
        for row in rows:
            yield {"tokens": row["tokens"], "ids": row["ids"].tolist(), "logprobs": row["logprobs"].tolist()}

    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("int32")),
            "ids": datasets.Sequence(datasets.Sequence(datasets.Value("int32"))),
            "logprobs": datasets.Sequence(datasets.Sequence(datasets.Value("float16"))),
        }
    )
    made = datasets.Dataset.from_generator(generate, features=features, cache_dir=str(folder / "cache"))
    made.save_to_disk(str(folder / "saved"))
    loaded = datasets.load_from_disk(str(folder / "saved")).with_format("torch")
    rate = passes(lambda: DataLoader(loaded, batch_size=BATCH, num_workers=1, collate_fn=stacked), len(rows) * LENGTH)
    return rate, size_of(folder / "saved")


def of_streaming(rows: list[Row], folder: Path) -> tuple[float, int]:
    import streaming  # noqa: PLC0415 - of the environment of this benchmark

    columns = {"tokens": "ndarray:int32", "ids": "ndarray:int32", "logprobs": "ndarray:float16"}
    with streaming.MDSWriter(out=str(folder), columns=columns, compression="zstd") as writer:
        for row in rows:
            writer.write({**row, "logprobs": row["logprobs"].astype(np.float16)})
    size = size_of(folder)
    work = folder.with_name("work")

    def before() -> None:
        shutil.rmtree(work, ignore_errors=True)
        streaming.base.util.clean_stale_shared_memory()

    def make() -> DataLoader[Any]:
        data = streaming.StreamingDataset(remote=str(folder), local=str(work), shuffle=False, batch_size=BATCH)
        return DataLoader(data, batch_size=BATCH, num_workers=1, collate_fn=stacked)

    return passes(make, len(rows) * LENGTH, before), size


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = real_rows()
    positions = len(rows) * LENGTH
    arrays = Arrays(rows)
    copying = passes(lambda: DataLoader(arrays, batch_size=BATCH, num_workers=1, collate_fn=stacked), positions)
    results: dict[str, tuple[float, int]] = {"decoded arrays, copied (the limit)": (copying, 0)}
    with tempfile.TemporaryDirectory() as folder:
        results |= ours(rows, Path(folder) / "ours")
        results["datasets, Arrow lists"] = of_datasets(rows, Path(folder) / "datasets")
        results["streaming, MDS zstd"] = of_streaming(rows, Path(folder) / "mds")
    for name, (rate, size) in results.items():
        print(f"{name:36} {rate:12,.0f} positions/s {size / positions:8.1f} bytes a position")
    mine = results["logitstore, decode=cpu"]
    for peer in ("datasets, Arrow lists", "streaming, MDS zstd"):
        rate, size = results[peer]
        print(f"against {peer}: {mine[0] / rate:.2f} times the rate, {mine[1] / size:.2f} of the bytes")


if __name__ == "__main__":
    main()
