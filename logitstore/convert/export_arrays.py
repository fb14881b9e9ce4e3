"""`npz` and `safetensors`: flat arrays over all positions, as the importer `arrays` reads them.

`tokens` [T] and `lengths` [S]; `ids` and `logprobs` [T, k] where every position has k candidates, else [N] with `count`
[T]; of `tail`, `target_logprob`, `target_rank`, `logsumexp`, `entropy` and `loss_mask` [T] those that the dataset has,
NaN (0 for ranks, -1 for the mask) in sequences that lack them. Row t predicts token t + 1. The dataset is read once for
each array, so that none is ever whole in memory.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Export, Exporter
from logitstore.convert.export_tables import chosen, cut, cut_notes
from logitstore.convert.facts import described
from logitstore.dataset.reader import Dataset
from logitstore.errors import CorruptDataError

_DTYPES: Final = {
    "lengths": "<i8",
    "target_rank": "<i8",
    "tokens": "<i4",
    "count": "<i4",
    "ids": "<i4",
    "logprobs": "<f4",
    "tail": "<f4",
    "target_logprob": "<f4",
    "logsumexp": "<f4",
    "entropy": "<f4",
    "loss_mask": "|i1",
}
"""The arrays and their types, the widest first, so that each stands at a multiple of its width."""

_CUT: Final = ("count", "ids", "logprobs", "tail")  # what a smaller k changes
_FILL: Final = {"target_rank": 0, "loss_mask": -1}
_NAMES: Final = {"<i8": "I64", "<i4": "I32", "<f4": "F32", "|i1": "I8"}


@dataclass(frozen=True, slots=True)
class _Plan:
    """The arrays of a dataset.

    Attributes:
        dataset: the dataset.
        k: most candidates of a position; None keeps all.
        lengths: int64 [S].
        shapes: those of the arrays, in the order of the file.
        normalised: over what the probabilities sum to one.
        notes: what is lost.
    """

    dataset: Dataset
    k: int | None
    lengths: NDArray[np.int64]
    shapes: dict[str, tuple[int, ...]]
    normalised: str
    notes: list[str]

    def parts(self, name: str) -> Iterator[NDArray[Any]]:
        """An array, sequence by sequence."""
        if name == "lengths":
            yield self.lengths
            return
        needed = ["tail", "logprobs"] if name == "tail" and self.k is not None else [name]
        dtype = np.dtype(_DTYPES[name])
        for length, sequence in zip(self.lengths.tolist(), self.dataset.select(needed), strict=True):
            values = getattr(cut(sequence, self.k) if name in _CUT else sequence, name)
            if values is None:
                values = np.full(length, _FILL.get(name, np.nan))
            yield np.ascontiguousarray(values, dtype)

    def write(self, name: str, file: BinaryIO, done: Callable[[], None]) -> None:
        """The values of an array.

        Raises:
            CorruptDataError: there are not as many as before.
        """
        size = 0
        for part in self.parts(name):
            size += file.write(part.tobytes())
            if name != "lengths":
                done()
        if size != self.bytes(name):
            raise CorruptDataError(
                f"{name} has {size} bytes, where {self.bytes(name)} were counted: the dataset changed meanwhile",
                code="export",
                path=str(self.dataset.path),
            )

    def bytes(self, name: str) -> int:
        """How many bytes an array has."""
        return math.prod(self.shapes[name]) * np.dtype(_DTYPES[name]).itemsize


def _plan(dataset: Dataset, k: int | None) -> _Plan:
    what = chosen(dataset)
    info = dataset.info
    notes = ["Ids of sequences were left out: a sequence is known by its number."]
    optional = [name for name in what.names if name in _DTYPES and name not in ("tokens", "ids", "logprobs")]
    sampled = set(info.totals.encodings) == {"draws"}
    if sampled:
        notes.append("Draws were made into logprobs, normalised over the candidates of each position.")
        if "target_logprob" in optional:
            optional.remove("target_logprob")
            notes.append("target_logprob was left out: it is not normalised over the candidates.")
    elif "draws" in what.names:
        notes.append("Draws were made into logprobs of the candidates' share in all draws; they have no tail.")
    lengths: list[int] = []
    candidates, low, high = 0, 2**32, 0
    found = {"tail"} & set(optional)
    scanned = [name for name in optional if name != "tail"]
    for sequence in dataset.select(["count", *scanned]):
        lengths.append(len(sequence))
        if len(sequence):
            count = sequence.count if k is None else np.minimum(sequence.count, k)
            candidates += int(count.sum(dtype=np.int64))
            low, high = min(low, int(count.min())), max(high, int(count.max()))
        found |= {name for name in scanned if getattr(sequence, name) is not None}
    positions = sum(lengths)
    shapes: dict[str, tuple[int, ...]] = {"lengths": (len(lengths),), "tokens": (positions,)}
    rectangle = low == high > 0
    shapes |= {} if rectangle else {"count": (positions,)}
    shapes |= dict.fromkeys(("ids", "logprobs"), (positions, high) if rectangle else (candidates,))
    shapes |= dict.fromkeys(found, (positions,))
    if what.user:
        notes.append(f"The columns {', '.join(what.user)} were left out.")
    if len(dataset.splits) > 1:
        notes.append(f"The splits {', '.join(dataset.splits)} follow one another.")
    return _Plan(
        dataset,
        k,
        np.array(lengths, np.int64),
        {name: shapes[name] for name in _DTYPES if name in shapes},
        "candidates" if sampled else info.normalised,
        [*notes, *cut_notes(dataset, k)],
    )


def _reporter(plan: _Plan, options: Export) -> Callable[[], None]:
    """To be called for each sequence in each array; says how many sequences that is."""
    passes, calls = len(plan.shapes) - 1, [0]

    def done() -> None:
        calls[0] += 1
        if calls[0] % passes == 0:
            options.progress(calls[0] // passes)

    return done


def _write_npz(dataset: Dataset, path: Path, options: Export) -> list[str]:
    plan = _plan(dataset, options.k)
    done = _reporter(plan, options)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        singles = {"normalised": np.array(plan.normalised), "temperature": np.array(float(dataset.info.temperature))}
        for name, value in singles.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:
                np.lib.format.write_array(file, value, allow_pickle=False)
        for name, shape in plan.shapes.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                header = {"descr": _DTYPES[name], "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                plan.write(name, file, done)  # type: ignore[arg-type]
    return [*plan.notes, "Teacher and tokenizer were left out."]


def _write_safetensors(dataset: Dataset, path: Path, options: Export) -> list[str]:
    plan = _plan(dataset, options.k)
    done = _reporter(plan, options)
    facts = {**described(dataset, options.k), "normalised": plan.normalised}
    header: dict[str, Any] = {
        "__metadata__": {name: _text(value) for name, value in facts.items() if value is not None}
    }
    at = 0
    for name, shape in plan.shapes.items():
        end = at + plan.bytes(name)
        header[name] = {"dtype": _NAMES[_DTYPES[name]], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in plan.shapes:
            plan.write(name, file, done)
    return plan.notes


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


NPZ: Final = Exporter(
    name="npz",
    description="one npz file of flat arrays, as the importer arrays reads them",
    loses="ids of sequences, users' columns, splits, draws (made into logprobs), teacher and tokenizer",
    write=_write_npz,
)

SAFETENSORS: Final = Exporter(
    name="safetensors",
    description="one safetensors file of flat tensors, as the importer arrays reads them",
    loses="ids of sequences, users' columns, splits, draws (made into logprobs), the tokenizer's files",
    write=_write_safetensors,
)
