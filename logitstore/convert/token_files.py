"""`--tokens FILE`: the input tokens of captures that hold none, one sample after another.

The file is an npy or npz with integers [N, L]; an npz with flat `tokens` and `lengths`; safetensors with one tensor, or
`tensor.0`, `tensor.1`, ... [B, L]; or JSON lines, Parquet or Arrow with a column `tokens` or `input_ids`. Its samples
are in the order of the capture's.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Options, Record, Tally
from logitstore.convert.beside import TOKEN_COLUMNS, needed_tokens, rows_beside
from logitstore.convert.safetensors_file import open_safetensors
from logitstore.convert.source import BROKEN_ARCHIVE, Input, natural
from logitstore.errors import InvalidInputError, LogitStoreError, SourceError

_ZIP: Final = b"PK\x03\x04"
_NPY: Final = b"\x93NUMPY"
_BLOCK_BYTES: Final = 2**22


@dataclass(frozen=True, slots=True)
class Sample:
    """A piece of one record: what a capture says of one sample, and its tokens.

    Attributes:
        place: where it stands.
        number: its number in the whole input, from 0.
        data: what `parse` makes items of.
    """

    place: str
    number: int
    data: Any

    def records(self) -> Iterator[Record]:
        """The sample."""
        yield Record(self.place, self.number, self.data)


class TokenFile:
    """The tokens of one sample after another.

    Args:
        path: the file.

    Raises:
        SourceNotFoundError: it is not there.
        SourceError: it is damaged, or of no kind that is known.
    """

    def __init__(self, path: Path) -> None:
        self._source = Input(path)
        self.name = self._source.name
        self.taken = 0
        self._more = False
        self._samples = _samples(self._source)

    def take(self) -> NDArray[np.int64]:
        """The tokens of the next sample.

        Raises:
            SourceError: there is none any more, or it is damaged.
        """
        tokens = next(self._samples, None)
        if tokens is None:
            raise SourceError(
                f"{self.name} has {self.taken} samples, fewer than the capture; give the tokens of the same run"
            )
        self.taken += 1
        return tokens

    def finish(self) -> bool:
        """Say that the capture is at its end, and close the file.

        Returns:
            Whether there are samples that were not taken.
        """
        self._more = next(self._samples, None) is not None
        self._source.close()
        return self._more

    def notes(self, _tally: Tally, final: bool) -> list[str]:  # noqa: FBT001 - the signature of `Import.check`
        """What is to be said at the end, for `Import.check`."""
        if not final or not self._more:
            return []
        return [f"{self.name} has more samples than the capture: its first {self.taken:,} were taken, in order."]


def needed(options: Options, what: str) -> TokenFile:
    """The tokens that the user gives.

    Args:
        options: with the file.
        what: the format, for the message.

    Raises:
        InvalidInputError: there is no such option.
        SourceError: the file cannot be read.
    """
    if options.tokens is None:
        raise InvalidInputError(
            f"{what} holds no tokens, and without them no row has its place: give them with --tokens FILE (npy, npz, "
            f"safetensors, JSON lines or Parquet; one row a sample, in the order of the capture)"
        )
    return TokenFile(options.tokens)


def samples_of(path: Path) -> Iterator[NDArray[np.int64]]:
    """The tokens of one sample after another.

    Raises:
        SourceNotFoundError: the file is not there.
        SourceError: it is damaged, or of no kind that is known.
    """
    source = Input(path)
    try:
        yield from _samples(source)
    finally:
        source.close()


def _samples(source: Input) -> Iterator[NDArray[np.int64]]:
    try:
        head = source.head()
        if source.size is not None and head.startswith((_ZIP, _NPY)):
            yield from (_npz if head.startswith(_ZIP) else _npy)(source)
        elif source.path.suffix == ".safetensors":
            yield from _of_tensors(source)
        else:
            yield from rows_beside(source.path, needed_tokens, TOKEN_COLUMNS)
    except BROKEN_ARCHIVE as error:
        if isinstance(error, LogitStoreError):
            raise
        raise SourceError(f"{source.name}: cannot be read as tokens ({error}); write the file again") from error


def _npy(source: Input) -> Iterator[NDArray[np.int64]]:
    yield from _of_matrix(source.name, np.load(source.path, mmap_mode="r", allow_pickle=False))


def _of_matrix(name: str, matrix: NDArray[Any]) -> Iterator[NDArray[np.int64]]:
    _check(name, matrix.dtype, matrix.ndim)
    for row in matrix:
        yield row.astype(np.int64)


def _check(name: str, dtype: np.dtype[Any], dimensions: int, wanted: int = 2) -> None:
    if dtype.kind not in "iu" or dimensions != wanted:
        raise SourceError(
            f"{name}: tokens are {dtype} of {dimensions} dimensions; integers [samples, length] are needed"
        )


def _npz(source: Input) -> Iterator[NDArray[np.int64]]:
    """The rows of an npz; its array is read as a stream, so that it is never whole in memory."""
    with zipfile.ZipFile(source.path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        name = next((name for name in TOKEN_COLUMNS if name in names), names[0] if len(names) == 1 else None)
        if name is None:
            raise SourceError(f"{source.name}: there is no array `tokens` or `input_ids`; there are {sorted(names)}")
        with archive.open(f"{name}.npy") as stream:
            shape, dtype = _header(stream)  # type: ignore[arg-type]  # ZipExtFile reads as BinaryIO
            if "lengths" in names and len(shape) == 1:
                with archive.open("lengths.npy") as other:
                    lengths = _lengths(other)  # type: ignore[arg-type]  # likewise
                _check(source.name, dtype, len(shape), 1)
            else:
                _check(source.name, dtype, len(shape))
                lengths = iter([shape[1]] * shape[0])
            for length in lengths:
                data = stream.read(length * dtype.itemsize)
                if len(data) != length * dtype.itemsize:
                    raise EOFError("tokens are missing")
                yield np.frombuffer(data, dtype).astype(np.int64)
            if stream.read(1):
                raise SourceError(f"{source.name}: lengths do not sum to the number of tokens")


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError("an array of Python objects, or in Fortran order")
    return tuple(shape), dtype


def _lengths(stream: BinaryIO) -> Iterator[int]:
    shape, dtype = _header(stream)
    if dtype.kind not in "iu" or len(shape) != 1:
        raise ValueError("lengths are no list of integers")
    found: list[int] = []
    while data := stream.read(_BLOCK_BYTES - _BLOCK_BYTES % dtype.itemsize):
        found += np.frombuffer(data, dtype).tolist()
    if min(found, default=0) < 0:
        raise ValueError("a length below 0")
    return iter(found)


def _of_tensors(source: Input) -> Iterator[NDArray[np.int64]]:
    tensors = open_safetensors(source)
    names = [name for name in TOKEN_COLUMNS if name in tensors][:1]
    for name in names or sorted(tensors, key=lambda name: natural(Path(name))):
        yield from _of_matrix(f"{source.name}, tensor {name}", tensors[name].values)
