"""`arrays`: one npz or safetensors file with flat arrays over all positions, cut into sequences by `lengths`.

Names: `tokens` [T], `lengths` [S], and either `ids` and `logprobs` ([T, k], or [N] with `count` [T]), or `logits`
[T, V]; optional [T]: `tail`, `target_logprob`, `target_rank`, `logsumexp`, `entropy`, `loss_mask`. Row t predicts
token t + 1. Ids of sequences are row numbers. `normalised` and `temperature` may stand there too: single values in npz,
metadata in safetensors.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Ready, Record, Tally
from logitstore.convert.rows import within_one
from logitstore.convert.source import BROKEN_ARCHIVE, Input
from logitstore.errors import LogitStoreError, SourceError
from logitstore.io import MappedFile
from logitstore.limits import SEQUENCE_POSITIONS

POSITIONAL: Final = ("tail", "target_logprob", "target_rank", "logsumexp", "entropy", "loss_mask")
"""The arrays with one value a position that a file may have."""


_SETTINGS: Final = ("normalised", "temperature")
_KNOWN: Final = frozenset(("tokens", "lengths", "ids", "logprobs", "logits", "count", *POSITIONAL, *_SETTINGS))
_BLOCK: Final = 2**16  # lengths that are read at once
_OF_LOGITS: Final = frozenset(("ids", "logprobs", "count", *POSITIONAL)) - {"entropy", "loss_mask"}
_HEADER_LIMIT: Final = 100_000_000  # safetensors' own
_TYPES: Final = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Array:
    """One array of a file, read forwards.

    Attributes:
        dtype: of its values; bfloat16 comes as bit patterns in uint16.
        shape: its shape.
        take: the next so many rows.
        bfloat16: whether the values are bfloat16.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    take: Callable[[int], NDArray[Any]]
    bfloat16: bool = False


def _recognises(source: Input) -> bool:
    """By the names tokens and lengths: other formats are npz and safetensors too."""
    if source.size is None:
        return False
    try:
        head = source.head()
        if head[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(source.path) as archive:
                return {"tokens.npy", "lengths.npy"} <= set(archive.namelist())
    except (LogitStoreError, *BROKEN_ARCHIVE):
        return False
    named = all(re.search(rb'"%s"\s*:\s*\{' % name, head) for name in (b"tokens", b"lengths"))
    return source.path.suffix == ".safetensors" and head[8:9] == b"{" and named


def _read(inputs: list[Input], _options: Options) -> Import:
    done = [0]
    files = [_open(source) for source in inputs]
    total = sum(math.prod(a.shape) * a.dtype.itemsize for arrays in files for a in arrays.values())
    notes: list[str] = []
    said = [_settings(source, arrays) for source, arrays in zip(inputs, files, strict=True)]
    for source, arrays, settings in zip(inputs, files, said, strict=True):
        _check(source, arrays)
        notes += _left_out(source, arrays)
        if settings != said[0]:
            raise SourceError(f"{source.name}: {settings} is said here, {said[0]} in {inputs[0].name}")

    def pieces() -> Iterator[Ready]:
        number = itertools.count()
        for source, arrays in zip(inputs, files, strict=True):
            for row, item in enumerate(_sequences(source, arrays, done)):
                yield Ready(f"{source.name}, sequence {row}", next(number), item)

    return Import(
        pieces=pieces(),
        parse=_parse,
        settings=said[0],
        done=lambda: done[0],
        total=total,
        sequences=sum(arrays["lengths"].shape[0] for arrays in files),
        notes=notes,
    )


def _parse(record: Record, tally: Tally) -> tuple[Item]:
    item: Item = record.data
    return (Item(item.method, within_one(item.arguments, tally)),)


def _settings(source: Input, arrays: dict[str, _Array]) -> dict[str, Any]:
    """The arguments of a writer that a file says."""
    said: dict[str, Any] = {}
    for name in _SETTINGS:
        if name not in arrays:
            continue
        array = arrays[name]
        try:
            value = array.take(1).reshape(-1)[0].item() if array.shape == () else None
        except BROKEN_ARCHIVE as error:
            raise SourceError(f"{source.name}: the array {name!r} is damaged or cut off ({error})") from error
        if name == "normalised" and value not in ("vocabulary", "candidates"):
            raise SourceError(f"{source.name}: normalised is {value!r}; it is 'vocabulary' or 'candidates'")
        if name == "temperature" and not (isinstance(value, float) and 0 < value <= 1e6):
            raise SourceError(f"{source.name}: temperature is {value!r}; it is a number above 0")
        said[name] = value
    return said


def _left_out(source: Input, arrays: dict[str, _Array]) -> list[str]:
    """Notes on arrays that are not read."""
    notes = []
    if left := sorted(set(arrays) - _KNOWN):
        notes.append(f"{source.name}: the arrays {', '.join(left)} are not known and were left out.")
    if "logits" in arrays and (left := sorted(set(arrays) & _OF_LOGITS)):
        notes.append(f"{source.name}: the arrays {', '.join(left)} were left out: they follow from the logits.")
    return notes


def _check(source: Input, arrays: dict[str, _Array]) -> None:
    needed = ("tokens", "lengths", "logits") if "logits" in arrays else ("tokens", "lengths", "ids", "logprobs")
    if missing := [name for name in needed if name not in arrays]:
        raise SourceError(
            f"{source.name}: there is no array {missing[0]!r}; needed are tokens, lengths, and ids with logprobs, or "
            f"logits; there are: {', '.join(sorted(arrays))}"
        )
    positions = arrays["tokens"].shape
    if len(positions) != 1 or len(arrays["lengths"].shape) != 1:
        raise SourceError(f"{source.name}: tokens and lengths are not of one dimension")
    flat = "count" in arrays
    for name, array in arrays.items():
        if name in ("lengths", *_SETTINGS) or name not in _KNOWN:
            continue
        if flat and name in ("ids", "logprobs"):
            if len(array.shape) != 1 or array.shape != arrays["ids"].shape:
                shape = list(array.shape)
                raise SourceError(f"{source.name}: {name} has shape {shape}; with count, ids and logprobs are flat [N]")
            continue
        if array.shape[:1] != positions:
            raise SourceError(f"{source.name}: {name} has shape {list(array.shape)} for {positions[0]} tokens")
    for name in ("lengths", "count"):
        if name in arrays and arrays[name].dtype.kind not in "iu":
            raise SourceError(f"{source.name}: {name} are not non-negative integers")


def _sequences(source: Input, arrays: dict[str, _Array], done: list[int]) -> Iterator[Item]:
    def take(name: str, rows: int) -> NDArray[Any]:
        array = arrays[name]
        try:
            values = array.take(rows)
        except BROKEN_ARCHIVE as error:
            raise SourceError(f"{source.name}: the array {name!r} is damaged or cut off ({error})") from error
        done[0] += values.nbytes
        if array.bfloat16 and name != "logits":
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values

    positions, candidates = 0, 0
    for length in _lengths(source, arrays, take):
        arguments: dict[str, Any] = {"tokens": take("tokens", length)}
        positions += length
        if "logits" in arrays:
            arguments["logits"] = take("logits", length)
            arguments |= {name: take(name, length) for name in ("entropy", "loss_mask") if name in arrays}
            yield Item("add_logits", arguments)
            continue
        rows = length
        if "count" in arrays:
            arguments["count"] = count = take("count", length)
            rows = int(count.sum(dtype=np.int64))
            if (length and int(count.min()) < 0) or not 0 <= rows <= arrays["ids"].shape[0] - candidates:
                raise SourceError(f"{source.name}: count does not fit the {arrays['ids'].shape[0]} candidates")
            candidates += rows
        for name in ("ids", "logprobs"):
            arguments[name] = take(name, rows)
        arguments |= {name: take(name, length) for name in POSITIONAL if name in arrays}
        yield Item("add", arguments)
    if "count" in arrays and "logits" not in arrays and candidates != arrays["ids"].shape[0]:
        raise SourceError(f"{source.name}: count sums to {candidates}, but {arrays['ids'].shape[0]} ids are there")


def _lengths(source: Input, arrays: dict[str, _Array], take: Callable[[str, int], NDArray[Any]]) -> Iterator[int]:
    """The lengths of the sequences, which must sum to the number of tokens."""
    tokens, left, total = arrays["tokens"].shape[0], arrays["lengths"].shape[0], 0
    while left > 0:
        lengths = take("lengths", min(left, _BLOCK))
        left -= len(lengths)
        if int(lengths.min()) < 0:
            raise SourceError(f"{source.name}: lengths are not non-negative integers")
        for length in lengths.tolist():
            total += length
            if length > SEQUENCE_POSITIONS:
                raise SourceError(f"{source.name}: a sequence of {length} positions is over {SEQUENCE_POSITIONS}")
            if total > tokens:
                raise SourceError(f"{source.name}: lengths sum to {total} or more, but there are {tokens} tokens")
            yield length
    if total != tokens:
        raise SourceError(f"{source.name}: lengths sum to {total}, but there are {tokens} tokens")


def _open(source: Input) -> dict[str, _Array]:
    if source.size is None:
        raise SourceError("arrays cannot be read from standard input: name the file")
    try:
        return _open_safetensors(source) if source.path.suffix == ".safetensors" else _open_npz(source)
    except BROKEN_ARCHIVE as error:
        raise SourceError(f"{source.name}: not a whole npz or safetensors file ({error})") from error


def _open_npz(source: Input) -> dict[str, _Array]:
    """The arrays of an npz; a zip's members are read as streams, so that no array is ever whole in memory."""
    file = MappedFile(source.path)
    archive = zipfile.ZipFile(pa.BufferReader(file.read(0, file.size)))  # mapped: there is no descriptor to close
    return {
        name.removesuffix(".npy"): _npy(archive.open(name))  # type: ignore[arg-type]  # ZipExtFile reads as BinaryIO
        for name in archive.namelist()
        if name.endswith(".npy")
    }


def _npy(stream: BinaryIO) -> _Array:
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError("an array of Python objects, or in Fortran order")

    def take(rows: int) -> NDArray[Any]:
        size = rows * math.prod(shape[1:]) * dtype.itemsize
        data = stream.read(size)
        if len(data) != size:
            raise EOFError(f"{size - len(data)} bytes are missing")
        return np.frombuffer(data, dtype).reshape(rows, *shape[1:])

    return _Array(dtype, tuple(shape), take)


def _open_safetensors(source: Input) -> dict[str, _Array]:
    """The tensors of a safetensors file, mapped."""
    size = source.size or 0
    with source.path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    data = np.memmap(source.path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
    arrays = {name: _tensor(data, entry) for name, entry in header.items() if name != "__metadata__"}
    said = header.get("__metadata__", {})
    if "normalised" in said:
        arrays["normalised"] = _single(np.array(str(said["normalised"])))
    if "temperature" in said:
        arrays["temperature"] = _single(np.array(float(said["temperature"])))
    return arrays


def _single(value: NDArray[Any]) -> _Array:
    return _Array(value.dtype, (), lambda _rows: value)


def _tensor(data: NDArray[np.uint8], entry: dict[str, Any]) -> _Array:
    dtype = np.dtype(_TYPES[entry["dtype"]])
    shape = tuple(int(n) for n in entry["shape"])
    start, end = (int(n) for n in entry["data_offsets"])
    if min(shape, default=0) < 0 or not 0 <= start <= end <= len(data):
        raise ValueError("a tensor outside the file")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor whose size is not that of its shape")
    values = data[start:end].view(dtype).reshape(shape)
    at = [0]

    def take(rows: int) -> NDArray[Any]:
        at[0] += rows
        if at[0] > len(values):
            raise EOFError("fewer rows than needed")
        return np.asarray(values[at[0] - rows : at[0]])

    return _Array(dtype, shape, take, bfloat16=entry["dtype"] == "BF16")


IMPORTER: Final = Importer(
    name="arrays",
    description="npz or safetensors with tokens, lengths, ids and logprobs (or logits)",
    loses="arrays of other names",
    recognises=_recognises,
    read=_read,
    patterns=("*.npz", "*.safetensors"),
)
