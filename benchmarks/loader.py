"""From mapped files to collated CPU tensors, beside `datasets` and MosaicML Streaming.

    python benchmarks/loader.py --datasets PYTHON --streaming PYTHON [CAPTURE.npz]

`make bench-loader` makes the two environments, one for each peer: they need different releases of huggingface_hub. Real
rows (Gemma 3 270M on WikiText-2, else the Shakespeare rows of the tests), the best 64 candidates, sequences of 512
positions, repeated to some 330,000 positions; batches of [8, 512, 64] int64 ids and float32 logprobs, with tokens, from
one worker process and from none, in the order of the files. Each figure comes from a process of its own, all in turn,
three times over; the medians are printed, and ratios are medians over the rounds. Every process iterates once to warm
the page cache and once for the time, from the first batch on: the workers' start is left out. MDS shards are
decompressed anew in the timed pass.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

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
ROUNDS: Final = 3

Row = dict[str, Any]
Loader = Callable[[Path, int], Iterable[Any]]
"""From the folder of the data and the number of workers to the batches of one pass."""


def real_rows(capture: Path) -> list[Row]:
    """Sequences of 512 positions, repeated."""
    arrays = dict(np.load(capture))
    ends = np.cumsum(arrays["lengths"]).tolist()
    rows = [
        {
            "tokens": arrays["tokens"][end - LENGTH : end].astype(np.int32),
            "ids": np.ascontiguousarray(arrays["ids"][end - LENGTH : end, :K]).astype(np.int32),
            "logprobs": np.ascontiguousarray(arrays["logprobs"][end - LENGTH : end, :K]),
        }
        for end, length in zip(ends, arrays["lengths"].tolist(), strict=True)
        if length >= LENGTH
    ]
    return (rows * (1 + POSITIONS // (LENGTH * len(rows))))[: POSITIONS // LENGTH // BATCH * BATCH]


def stacked(rows: list[Row]) -> dict[str, torch.Tensor]:
    """[8, 512, 64] of arrays or tensors."""
    return {
        "tokens": torch.stack([torch.as_tensor(row["tokens"]) for row in rows]).long(),
        "ids": torch.stack([torch.as_tensor(row["ids"]) for row in rows]).long(),
        "logprobs": torch.stack([torch.as_tensor(row["logprobs"]) for row in rows]).float(),
    }


# Each contestant: how its data are made, and how they are read.


def make_ours(rows: list[Row], folder: Path) -> None:
    import logitstore  # noqa: PLC0415 - each contestant is imported in its own environment only

    with logitstore.Writer(folder, teacher="google/gemma-3-270m", logit_width=WIDTH) as writer:
        for number, row in enumerate(rows):
            writer.add(row["tokens"], row["ids"], row["logprobs"], id=str(number))


def ours(folder: Path, workers: int, decode: Literal["cpu", "device"] = "cpu") -> Iterable[Any]:
    from logitstore.torch import HFCollator, LogitLoader, StreamingLogits  # noqa: PLC0415

    stream = StreamingLogits(folder, batch_size=BATCH, shuffle="none", decode=decode)
    return LogitLoader(stream, collate_fn=HFCollator(k=K), num_workers=workers)


def make_arrays(rows: list[Row], folder: Path) -> None:
    folder.mkdir()
    for name, dtype in (("ids", np.int64), ("logprobs", np.float32), ("tokens", np.int64)):
        np.save(folder / f"{name}.npy", np.stack([row[name] for row in rows]).astype(dtype))


class Arrays(Dataset[Row]):
    """Rows that are decoded already: what copying alone allows."""

    def __init__(self, folder: Path) -> None:
        self.arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.iterdir()}

    def __len__(self) -> int:
        return len(self.arrays["tokens"])

    def __getitem__(self, row: int) -> Row:
        return {name: np.asarray(array[row]) for name, array in self.arrays.items()}


def arrays(folder: Path, workers: int) -> Iterable[Any]:
    warnings.simplefilter("ignore")  # the arrays are mapped for reading only, which torch has a warning for
    return DataLoader(Arrays(folder), batch_size=BATCH, num_workers=workers, collate_fn=stacked)


def make_datasets(rows: list[Row], folder: Path) -> None:
    import datasets  # noqa: PLC0415

    kind = {"tokens": "int32", "ids": "int32", "logprobs": "float16"}
    features = {name: datasets.Sequence(datasets.Value(dtype)) for name, dtype in kind.items()}
    features |= {name: datasets.Sequence(features[name]) for name in ("ids", "logprobs")}

    def generate() -> Iterator[Row]:
        for row in rows:
            yield {name: list(row[name]) for name in kind}

    cache = folder.with_name("cache")
    made = datasets.Dataset.from_generator(generate, features=datasets.Features(features), cache_dir=str(cache))
    made.save_to_disk(str(folder))
    shutil.rmtree(cache)


def of_datasets(folder: Path, workers: int) -> Iterable[Any]:
    import datasets  # noqa: PLC0415

    loaded = datasets.load_from_disk(str(folder)).with_format("torch")
    return DataLoader(loaded, batch_size=BATCH, num_workers=workers, collate_fn=stacked)


def streaming_package() -> Any:
    # It imports its datasets of pictures, and so torchvision, which its newest torch on a CPU may be without.
    sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
    import streaming  # noqa: PLC0415

    return streaming


def make_streaming(rows: list[Row], folder: Path) -> None:
    columns = {"tokens": "ndarray:int32", "ids": "ndarray:int32", "logprobs": "ndarray:float16"}
    with streaming_package().MDSWriter(out=str(folder), columns=columns, compression="zstd") as writer:
        for row in rows:
            writer.write({**row, "logprobs": row["logprobs"].astype(np.float16)})


def of_streaming(folder: Path, workers: int) -> Iterable[Any]:
    streaming = streaming_package()
    work = folder.with_name("work")
    shutil.rmtree(work, ignore_errors=True)
    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(remote=str(folder), local=str(work), shuffle=False, batch_size=BATCH)
    return DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=stacked)


CONTESTANTS: Final[dict[str, tuple[str, str, Callable[[list[Row], Path], None], Loader]]] = {
    "decoded arrays, copied (the limit)": ("arrays", "own", make_arrays, arrays),
    "logitstore, decode=cpu": ("ours", "own", make_ours, ours),
    "logitstore, decode=device": ("ours", "own", make_ours, partial(ours, decode="device")),
    "datasets, Arrow lists, torch format": ("datasets", "datasets", make_datasets, of_datasets),
    "streaming, MDS, zstd": ("mds", "streaming", make_streaming, of_streaming),
}
OURS: Final = ("logitstore, decode=cpu", "logitstore, decode=device")
PEERS: Final = tuple(CONTESTANTS)[3:]


def measure(name: str, folder: Path, workers: int) -> dict[str, float]:
    """Positions a second of the second pass, from the first batch on."""
    torch.set_num_threads(1)
    place, loader = CONTESTANTS[name][0], CONTESTANTS[name][3]
    seconds = 0.0
    for _ in range(2):
        batches = iter(loader(folder / place, workers))
        first = next(batches)
        if first["ids" if "ids" in first else "target_ids"].shape != (BATCH, LENGTH, K):
            raise SystemExit(f"{name}: batches of another shape")
        start = time.perf_counter()
        count = sum(1 for _ in batches)
        seconds = time.perf_counter() - start
    return {"rate": count * BATCH * LENGTH / seconds, "batches": count + 1}


def apart(python: str, *arguments: str) -> Any:
    """What this script prints in a process of another environment, as JSON."""
    done = subprocess.run([python, __file__, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def compare(capture: Path, pythons: dict[str, str], folder: Path) -> None:
    sizes, batches = {}, POSITIONS // LENGTH // BATCH
    for name, (place, environment, _, _) in CONTESTANTS.items():
        if not (folder / place).exists():
            apart(pythons[environment], "--make", name, str(folder), str(capture))
        sizes[name] = size_of(folder / place) / (batches * BATCH * LENGTH)
    for workers in (1, 0):
        rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for _ in range(ROUNDS):
            for name, (_, environment, _, _) in CONTESTANTS.items():
                found = apart(pythons[environment], "--measure", name, str(folder), str(workers))
                if found["batches"] != batches:
                    raise SystemExit(f"{name}: {found['batches']} batches, not {batches}")
                rates[name].append(found["rate"])
        print(f"{workers} workers")
        for name, each in rates.items():
            print(f"  {name:36} {statistics.median(each):12,.0f} positions/s {sizes[name]:8.1f} bytes a position")
        for mine in OURS:
            for peer in PEERS:
                ratio = statistics.median(a / b for a, b in zip(rates[mine], rates[peer], strict=True))
                smaller = sizes[mine] / sizes[peer]
                print(f"  {mine} : {peer}: {ratio:.2f} times the rate, {smaller:.2f} of the bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare loaders.")
    parser.add_argument("capture", nargs="?", type=Path, default=next(path for path in CAPTURES if path.exists()))
    parser.add_argument("--datasets", required=True, help="python of an environment with datasets")
    parser.add_argument("--streaming", required=True, help="python of an environment with mosaicml-streaming")
    given = parser.parse_args()
    rows = real_rows(given.capture)
    print(f"{given.capture.name}: {len(rows)} sequences of {LENGTH} positions, {K} candidates each", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pythons = {"own": sys.executable, "datasets": given.datasets, "streaming": given.streaming}
        compare(given.capture, pythons, Path(folder))


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        chosen = CONTESTANTS[sys.argv[2]]
        chosen[2](real_rows(Path(sys.argv[4])), Path(sys.argv[3]) / chosen[0])
        print("{}")
    elif sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
