"""`maxtext`: the ArrayRecord files of MaxText's `save_top_k_teacher_logits.py`.

`teacher_top_k_part_{i:05d}_host_{h:03d}.array_record` has one tf.train.Example a sample: `inputs` int64 [T],
`top_k_logits` float32 [T * K] (raw) and `top_k_indices` int64 [T * K], and where the batch had them `inputs_position`,
`inputs_segmentation`, `targets_segmentation` and `targets`, [T] each. Row t is the forward pass's: it predicts
`targets[t]`, which inside a document is `inputs[t + 1]`. Samples may hold several documents, one after another, whose
number in the segmentations is not 0, and padding behind them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally
from logitstore.convert.raw_logits import CANDIDATES_NOTE, rows_of_logits
from logitstore.convert.source import Input
from logitstore.convert.tf_example import read_example
from logitstore.errors import LogitStoreError, MissingDependencyError, SourceError

_SIGNATURE: Final = bytes.fromhex("83af70d10d884a3f")  # of Riegeli, on which ArrayRecord is built
_PICKLED: Final = (b"\x80\x04", b"\x80\x05")
_PIECE_BYTES: Final = 2**20
_OPTIONAL: Final = ("inputs_position", "inputs_segmentation", "targets_segmentation", "targets")
_COLUMNS: Final = pa.schema([(name, pa.list_(pa.int32())) for name in _OPTIONAL])
_SHIFTED: Final = 8  # rows that are needed to tell that targets are no shifted inputs

_ALIGNED_NOTE: Final = "Row t of a sample is the forward pass's, and predicts targets[t], which is inputs[t + 1]."
_PADDED_NOTE: Final = "In {n} of the samples there is padding behind the last document; it was left out."
_ENDS_NOTE: Final = (
    "In {n} of the positions targets is not the next token of inputs, as where a document ends; there loss_mask is 0."
)


def _recognises(source: Input) -> bool:
    try:
        return source.size is not None and source.head().startswith(_SIGNATURE)
    except (LogitStoreError, OSError):
        return False


def _read(inputs: list[Input], _options: Options) -> Import:
    reader = _reader_class()
    done = [0]
    return Import(
        pieces=_pieces(inputs, reader, done),
        parse=_parse,
        settings={"normalised": "candidates", "columns": _COLUMNS},
        done=lambda: done[0],
        total=sum(source.size or 0 for source in inputs),
        notes=[CANDIDATES_NOTE, _ALIGNED_NOTE],
    )


def _reader_class() -> Any:
    try:
        return importlib.import_module("array_record.python.array_record_module").ArrayRecordReader
    except ImportError as error:
        says = "reading ArrayRecord needs the package array_record: pip install 'logitstore[maxtext]'"
        raise MissingDependencyError(says) from error


@dataclass(frozen=True, slots=True)
class _Examples:
    """Some records of a file: its name, the first one's number in the whole input and in the file, their bytes."""

    name: str
    first: int
    row: int
    records_of: list[bytes]

    def records(self) -> Iterator[Record]:
        """One record an example."""
        for at, data in enumerate(self.records_of):
            yield Record(f"{self.name}, record {self.row + at}", self.first + at, data)


def _pieces(inputs: list[Input], reader: Any, done: list[int]) -> Iterator[_Examples]:
    first = 0
    for source in inputs:
        before, row = done[0], 0
        for total, group in _groups(source, reader):
            yield _Examples(source.name, first, row, group)
            first, row = first + len(group), row + len(group)
            done[0] = before + (source.size or 0) * row // total
        done[0] = before + (source.size or 0)


def _groups(source: Input, reader: Any) -> Iterator[tuple[int, list[bytes]]]:
    """(records of the file, the bytes of some of them)."""
    if source.size is None:
        raise SourceError("ArrayRecord cannot be read from standard input: name the file")
    with source.path.open("rb") as file:
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            raise SourceError(f"{source.name}: no ArrayRecord file; decompress it where it is compressed")
    held: list[bytes] = []
    size = row = 0
    try:
        # Read ahead by nobody: the records of several threads would wait in memory.
        opened = reader(str(source.path), "readahead_buffer_size:0,max_parallelism:0")
        try:
            total = opened.num_records()
            for row in range(total):
                held.append(opened.read())
                size += len(held[-1])
                if size >= _PIECE_BYTES or row == total - 1:
                    yield total, held
                    held, size = [], 0
        finally:
            opened.close()
    except (RuntimeError, ValueError, IndexError, OSError) as error:  # as pybind11 translates them
        if isinstance(error, LogitStoreError):
            raise
        raise SourceError(f"{source.name}: damaged at record {row} ({error}); fetch the file again") from error


def _parse(record: Record, tally: Tally) -> Iterator[Item]:
    if record.data.startswith(_PICKLED):
        raise SourceError(
            "a pickle, as older versions of MaxText wrote; pickles are not read: capture again with a later one"
        )
    example = read_example(record.data)
    inputs, ids, logits = _arrays(example)
    optional: dict[str, NDArray[Any]] = {name: example[name] for name in _OPTIONAL if name in example}
    length = _length(optional.get("inputs_segmentation"), len(inputs))
    if length < len(inputs):
        tally.note(_PADDED_NOTE)
    optional = {name: values[:length] for name, values in optional.items()}
    tokens, mask = _targets(inputs[:length], optional, tally)
    rows = rows_of_logits(ids[:length], logits[:length])
    arguments = rows.arguments(tokens, slice(0, length))
    if mask is not None:
        arguments["loss_mask"] = np.append(mask, np.zeros(len(tokens) - length, np.bool_))
    yield Item("add", arguments | {name: optional.get(name) for name in _OPTIONAL})


def _arrays(example: dict[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Tokens [T], ids [T, K] and logits [T, K]."""
    for name in ("inputs", "top_k_indices", "top_k_logits"):
        if name not in example:
            there = ", ".join(sorted(example)) or "nothing"
            raise SourceError(f"there is no {name} among the features; there are {there}")
    inputs, ids, logits = (example[name] for name in ("inputs", "top_k_indices", "top_k_logits"))
    for name in ("inputs", "top_k_indices", *_OPTIONAL):
        if name in example and example[name].dtype.kind != "i":
            raise SourceError(f"{name} holds floats; integers are needed")
        if name in _OPTIONAL and name in example and len(example[name]) != len(inputs):
            raise SourceError(f"{name} has {len(example[name])} numbers for {len(inputs)} inputs")
        if name in _OPTIONAL and name in example and bool((np.abs(example[name]) >= 2**31).any()):
            raise SourceError(f"{name} has a number that does not fit 32 bits")
    if logits.dtype.kind != "f":
        raise SourceError("top_k_logits holds integers; floats are needed")
    if len(inputs) == 0 or len(ids) != len(logits) or len(ids) % len(inputs) or len(ids) == 0:
        raise SourceError(
            f"top_k_indices has {len(ids)} numbers and top_k_logits {len(logits)} for {len(inputs)} inputs; both must "
            f"have the same number of candidates for each input"
        )
    return inputs, ids.reshape(len(inputs), -1), logits.reshape(len(inputs), -1)


def _length(segments: NDArray[Any] | None, length: int) -> int:
    """Positions up to the padding at the end."""
    if segments is None:
        return length
    inside = np.flatnonzero(segments)
    if len(inside) == 0:
        raise SourceError("inputs_segmentation is 0 throughout: the sample is nothing but padding")
    return int(inside[-1]) + 1


def _targets(
    inputs: NDArray[Any], optional: dict[str, NDArray[Any]], tally: Tally
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """The tokens, with the last row's target behind them where it is known; and which rows are trained on."""
    mask = optional["targets_segmentation"] > 0 if "targets_segmentation" in optional else None
    segments = optional.get("inputs_segmentation")
    if "targets" not in optional:
        if segments is not None:  # what follows a document is another one
            ends = np.append(segments[1:] != segments[:-1], False)
            tally.note(_ENDS_NOTE, int(np.count_nonzero(ends)))
            mask = ~ends if mask is None else mask & ~ends
        return inputs, mask
    targets = optional["targets"]
    trained = np.ones(len(inputs), np.bool_) if mask is None else mask
    tokens = np.append(inputs, targets[-1:]) if trained[-1] else inputs
    following = tokens[1 : len(inputs) + 1]
    differs = np.zeros(len(inputs), np.bool_)
    differs[: len(following)] = targets[: len(following)] != following
    differs &= trained
    if np.count_nonzero(trained) >= _SHIFTED and 2 * np.count_nonzero(differs) > np.count_nonzero(trained):
        raise SourceError(
            f"targets is not inputs shifted by one: at {np.count_nonzero(differs)} of {np.count_nonzero(trained)} "
            f"positions targets[t] is not inputs[t + 1]; row t cannot have its place"
        )
    tally.note(_ENDS_NOTE, int(np.count_nonzero(differs)))
    return tokens, trained & ~differs if mask is not None or bool(differs.any()) else None


IMPORTER: Final = Importer(
    name="maxtext",
    description="MaxText: ArrayRecord files of save_top_k_teacher_logits.py",
    loses="the level of the raw logits; sequence_hash; padding",
    recognises=_recognises,
    read=_read,
    patterns=("*.array_record",),
)
