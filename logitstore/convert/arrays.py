"""`arrays`: one npz or safetensors file with flat arrays over all positions, cut into sequences by `lengths`.

Names: `tokens` [T], `lengths` [S], and either `ids` and `logprobs` ([T, k], or [N] with `count` [T]), or `logits`
[T, V]; optional [T]: `tail`, `target_logprob`, `target_rank`, `logsumexp`, `entropy`, `loss_mask`. Row t predicts
token t + 1. Ids of sequences are row numbers.
"""

from __future__ import annotations

import itertools
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Ready
from logitstore.convert.source import Input
from logitstore.errors import SourceError

_POSITIONAL: Final = ("tail", "target_logprob", "target_rank", "logsumexp", "entropy", "loss_mask")
_KNOWN: Final = frozenset(("tokens", "lengths", "ids", "logprobs", "logits", "count", *_POSITIONAL))
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
    if source.size is None:
        return False
    head = source.head()
    if head[:4] == b"PK\x03\x04":
        return b".npy" in head[:200]
    return source.path.suffix == ".safetensors" and head[8:9] == b"{"


def _read(inputs: list[Input], _options: Options) -> Import:
    done = [0]
    files = [_open(source) for source in inputs]
    total = sum(math.prod(a.shape) * a.dtype.itemsize for arrays in files for a in arrays.values())
    notes = []
    for source, arrays in zip(inputs, files, strict=True):
        _check(source, arrays)
        if left := sorted(set(arrays) - _KNOWN):
            notes.append(f"{source.name}: the arrays {', '.join(left)} are not known and were left out.")

    def pieces() -> Iterator[Ready]:
        number = itertools.count()
        for source, arrays in zip(inputs, files, strict=True):
            for row, item in enumerate(_sequences(source, arrays, done)):
                yield Ready(f"{source.name}, sequence {row}", next(number), item)

    return Import(
        pieces=pieces(),
        done=lambda: done[0],
        total=total,
        sequences=sum(arrays["lengths"].shape[0] for arrays in files),
        notes=notes,
    )


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
        if name == "lengths" or name not in _KNOWN or (flat and name in ("ids", "logprobs")):
            continue
        if array.shape[:1] != positions:
            raise SourceError(f"{source.name}: {name} has shape {list(array.shape)} for {positions[0]} tokens")


def _sequences(source: Input, arrays: dict[str, _Array], done: list[int]) -> Iterator[Item]:
    def take(name: str, rows: int) -> NDArray[Any]:
        try:
            values = arrays[name].take(rows)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
            raise SourceError(f"{source.name}: the array {name!r} is damaged or cut off ({error})") from error
        done[0] += values.nbytes
        return values

    lengths = take("lengths", arrays["lengths"].shape[0])
    if lengths.dtype.kind not in "iu" or (len(lengths) and int(lengths.min()) < 0):
        raise SourceError(f"{source.name}: lengths are not non-negative integers")
    if int(lengths.sum(dtype=np.int64)) != arrays["tokens"].shape[0]:
        raise SourceError(
            f"{source.name}: lengths sum to {lengths.sum(dtype=np.int64)}, but there are "
            f"{arrays['tokens'].shape[0]} tokens"
        )
    for length in lengths.tolist():
        arguments: dict[str, Any] = {"tokens": take("tokens", length)}
        if "logits" in arrays:
            arguments["logits"] = take("logits", length)
            arguments |= {name: take(name, length) for name in ("entropy", "loss_mask") if name in arrays}
            yield Item("add_logits", arguments)
            continue
        rows = length
        if "count" in arrays:
            arguments["count"] = take("count", length)
            rows = int(arguments["count"].sum(dtype=np.int64))
        for name in ("ids", "logprobs"):
            arguments[name] = take(name, rows)
        if arrays["logprobs"].bfloat16:
            arguments["logprobs"] = (arguments["logprobs"].astype(np.uint32) << np.uint32(16)).view(np.float32)
        arguments |= {name: take(name, length) for name in _POSITIONAL if name in arrays}
        yield Item("add", arguments)


def _open(source: Input) -> dict[str, _Array]:
    if source.size is None:
        raise SourceError("arrays cannot be read from standard input: name the file")
    try:
        return _open_safetensors(source) if source.path.suffix == ".safetensors" else _open_npz(source)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, OSError) as error:
        raise SourceError(f"{source.name}: not a whole npz or safetensors file ({error})") from error


def _open_npz(source: Input) -> dict[str, _Array]:
    """The arrays of an npz; a zip's members are read as streams, so that no array is ever whole in memory."""
    archive = zipfile.ZipFile(source.path)
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
    return {name: _tensor(data, entry) for name, entry in header.items() if name != "__metadata__"}


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
