"""Reading a dataset: rows, ids, chunks, splits and columns."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final, Literal, overload

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import (
    CorruptDataError,
    DatasetNotFoundError,
    IncompleteDatasetError,
    InvalidInputError,
    RowIndexError,
    SequenceNotFoundError,
    SourceNotFoundError,
    UnsupportedVersionError,
)
from logitstore.io import MappedFile, read_limited
from logitstore.limits import MANIFEST_BYTES
from logitstore.schema import Manifest, ShardInfo, parse_manifest
from logitstore.schema.manifest import MANIFEST_NAME
from logitstore.shard.chunk import Chunk
from logitstore.shard.reader import Shard
from logitstore.shard.sequence import DEFAULT_COLUMNS, SEQUENCE_COLUMNS, Sequence
from logitstore.tokenizer import Tokenizer

Decoding = Literal["cpu", "device"]
"""Who decodes the candidates of the sequences that a dataset gives."""

_OPEN_SHARDS: Final = 1024  # mappings kept at once, far below what systems allow a process


def open(path: str | os.PathLike[str]) -> Dataset:  # noqa: A001 - as safetensors, zarr and tarfile name it
    """Open a dataset. Only its manifest is read; shards are opened when they are touched.

    Args:
        path: directory of the dataset.

    Raises:
        DatasetNotFoundError: there is none.
        IncompleteDatasetError: its writer has not finished.
        CorruptDataError: the manifest is damaged.
        UnsupportedVersionError: this release cannot read it.
    """
    root = Path(path)
    return Dataset(root, read_manifest(root))


def read_manifest(root: Path) -> Manifest:
    """The manifest of a dataset, verified.

    Args:
        root: directory of the dataset.

    Raises:
        DatasetNotFoundError: there is none.
        IncompleteDatasetError: its writer has not finished.
        CorruptDataError: the manifest is damaged.
        UnsupportedVersionError: this release cannot read it.
    """
    path = root / MANIFEST_NAME
    try:
        return parse_manifest(read_limited(path, MANIFEST_BYTES))
    except SourceNotFoundError:
        if any(root.glob("data/*/*.arrow*")):
            raise IncompleteDatasetError(
                f"{root} has shards but no {MANIFEST_NAME}: it is still being written, or its writer was stopped"
            ) from None
        raise DatasetNotFoundError(f"{root} is no logitstore dataset: there is no {MANIFEST_NAME} in it") from None
    except CorruptDataError as error:
        raise error.at(path=str(path)) from error
    except UnsupportedVersionError as error:
        raise UnsupportedVersionError(f"{path}: {error}") from error


class Shards:
    """The shards of a dataset, each opened when it is first touched and checked against the manifest."""

    def __init__(self, root: Path, infos: tuple[ShardInfo, ...], manifest: Manifest, *, remembered: int = 1) -> None:
        self.root = root
        self.infos = infos
        self.manifest = manifest
        self.remembered = remembered
        self._open: dict[int, Shard] = {}
        self._chunks: OrderedDict[tuple[int, int], Chunk] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_chunks": OrderedDict()}  # a mapping belongs to its process

    def __getitem__(self, number: int) -> Shard:
        """One shard.

        Raises:
            CorruptDataError: it is missing, damaged, or not the one that the manifest names.
            UnsupportedVersionError: this release cannot read it.
        """
        shard = self._open.get(number)
        if shard is None:
            shard = open_shard(self.root, self.infos[number], self.manifest)
            # Single dictionary operations: threads may open a shard twice, which harms nothing.
            while len(self._open) >= _OPEN_SHARDS:
                with contextlib.suppress(StopIteration, RuntimeError):
                    self._open.pop(next(iter(self._open)), None)
            self._open[number] = shard
        return shard

    def chunk(self, number: int, chunk: int) -> Chunk:
        """One chunk of a shard; the last ones are remembered, for rows that are read one after another."""
        # Single dictionary operations, for threads: another one may have dropped the chunk meanwhile.
        place = number, chunk
        read = self._chunks.get(place)
        if read is not None:
            with contextlib.suppress(KeyError):
                self._chunks.move_to_end(place)
            return read
        read = self._chunks[place] = self[number].chunk(chunk)
        while len(self._chunks) > self.remembered:
            with contextlib.suppress(KeyError):
                self._chunks.popitem(last=False)
        return read


def open_shard(root: Path, info: ShardInfo, manifest: Manifest) -> Shard:
    """Open one shard and check that it is the one the manifest names.

    Raises:
        CorruptDataError: it is missing, damaged, or another.
        UnsupportedVersionError: this release cannot read it.
    """
    path = root / info.path
    try:
        source = MappedFile(path)
    except SourceNotFoundError:
        raise CorruptDataError("the shard is missing", code="shard-missing", path=str(path)) from None
    if source.size != info.bytes:
        raise CorruptDataError(
            f"the shard has {source.size} bytes, the manifest says {info.bytes}",
            code="shard-size",
            path=str(path),
        )
    shard = Shard(source)
    said = (info.tail_digest, info.sequences, info.positions, info.candidates)
    tail = shard.tail
    if said != (shard.tail_digest, tail.sequences, tail.positions, tail.candidates):
        raise CorruptDataError("this is not the shard that the manifest names", code="shard-other", path=str(path))
    if not manifest.header_agrees(shard.header):
        raise CorruptDataError(
            "the shard's header and the manifest disagree about logit width, normalisation, temperature or resolution",
            code="shard-header",
            path=str(path),
        )
    return shard


class Dataset:
    """A dataset, or a view of some of its rows and columns. Sequences are read when they are asked for.

    Views share the opened shards. A dataset pickles, and works after fork, under spawn and from threads.

    Args:
        root: directory.
        manifest: its manifest.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        *,
        _shards: Shards | None = None,
        _rows: range | None = None,
        _columns: frozenset[str] | None = None,
        _decoding: Decoding = "cpu",
    ) -> None:
        self._root = root
        self._manifest = manifest
        self._starts = [0, *accumulate(shard.sequences for shard in manifest.shards)]
        self._shards = _shards if _shards is not None else Shards(root, manifest.shards, manifest)
        self._rows = _rows if _rows is not None else range(self._starts[-1])
        self._columns = _columns if _columns is not None else DEFAULT_COLUMNS | frozenset(manifest.user_columns)
        self._decoding = _decoding

    @property
    def info(self) -> Manifest:
        """The manifest: teacher, tokenizer, totals, shards."""
        return self._manifest

    @property
    def path(self) -> Path:
        """Directory of the dataset."""
        return self._root

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._manifest.splits)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that are decoded."""
        order = (*SEQUENCE_COLUMNS, *self._manifest.user_columns)
        return tuple(name for name in order if name in self._columns)

    @property
    def decode(self) -> Decoding:
        """Who decodes the candidates, see `with_decoding`."""
        return self._decoding

    def tokenizer(self) -> Tokenizer | None:
        """The teacher's tokenizer from the dataset's own files; None when it has none.

        Raises:
            InvalidInputError: the files are damaged.
        """
        return None if self._manifest.tokenizer is None else Tokenizer.from_path(self._root / "tokenizer")

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Dataset({str(self._root)!r}, sequences={len(self)}, columns={list(self.columns)})"

    @overload
    def __getitem__(self, index: int) -> Sequence: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Sequence | Dataset:
        """A sequence by row, or a view of a slice of the rows.

        Raises:
            RowIndexError: the row is outside the dataset.
            CorruptDataError: its bytes are not what was written.
        """
        if isinstance(index, slice):
            return self._view(rows=self._rows[index])
        try:
            row = self._rows[index]
        except IndexError:
            raise RowIndexError(f"row {index} of a dataset of {len(self)} sequences") from None
        number, place = self._locate(row)
        shard = self._shards[number]
        chunk, place = shard.locate(place)
        return next(self._decode(number, chunk, [place]))

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences in order, decoded one by one; each chunk is read once.

        Raises:
            CorruptDataError: a chunk's bytes are not what was written.
        """
        for number, chunk, places in self._runs():
            yield from self._decode(number, chunk, places)

    def chunks(self) -> Iterator[list[Sequence]]:
        """The sequences chunk by chunk, decoded; memory in proportion to one chunk.

        Raises:
            CorruptDataError: a chunk's bytes are not what was written.
        """
        for number, chunk, places in self._runs():
            yield list(self._decode(number, chunk, places))

    def by_id(self, sequence_id: str) -> Sequence:
        """The sequence with this id.

        Raises:
            SequenceNotFoundError: there is none in this view.
            CorruptDataError: its bytes are not what was written.
        """
        for number in range(len(self._shards.infos)):
            row = self._shards[number].find(sequence_id)
            if row is not None and row + self._starts[number] in self._rows:
                chunk, place = self._shards[number].locate(row)
                return next(self._decode(number, chunk, [place]))
        raise SequenceNotFoundError(f"no sequence has the id {sequence_id!r} in {self._root}")

    def split(self, name: str) -> Dataset:
        """A view of one split.

        Raises:
            InvalidInputError: there is no such split.
        """
        if name not in self._manifest.splits:
            raise InvalidInputError(f"no split is called {name!r}; there are: {', '.join(self.splits)}")
        numbers = [i for i, shard in enumerate(self._manifest.shards) if shard.split == name]
        start, end = (self._starts[numbers[0]], self._starts[numbers[-1] + 1]) if numbers else (0, 0)
        step = 1 if self._rows.step > 0 else -1
        rows = self._rows[::step]
        return self._view(rows=rows[bisect_left(rows, start) : bisect_left(rows, end)][::step])

    def select(self, columns: Iterable[str]) -> Dataset:
        """A view that decodes only these columns; `id` is always there, and `count` with any of the candidates.

        Args:
            columns: names of attributes of `Sequence` (`tokens`, `ids`, `logprobs`, ...) or of users' columns.

        Raises:
            InvalidInputError: there is no such column.
        """
        names = frozenset([columns] if isinstance(columns, str) else columns)
        known = (*SEQUENCE_COLUMNS, *self._manifest.user_columns)
        for name in sorted(names):
            if name not in known:
                raise InvalidInputError(f"no column is called {name!r}; there are: {', '.join(known)}")
        return self._view(columns=names)

    def with_decoding(self, decode: Decoding) -> Dataset:
        """A view that decodes the candidates itself, or leaves that to the device that trains.

        Args:
            decode: `cpu`: sequences are a `Sequence`, as they are without this; `device`: they are an
                `EncodedSequence`, which holds codes and gaps, about 6 bytes a candidate instead of 12, for
                `logitstore.torch.device`. The candidates are there whatever columns are selected.

        Raises:
            InvalidInputError: it is neither of them.
        """
        if decode not in ("cpu", "device"):
            raise InvalidInputError(f"decode is {decode!r}; it can be 'cpu' or 'device'")
        return self._view(decoding=decode)

    def with_remembered(self, chunks: int) -> Dataset:
        """A view, with shards of its own, that remembers the chunks it read last: for rows in shuffled order.

        Args:
            chunks: how many; a chunk is a few KB, beside the mapped bytes of its file.

        Raises:
            InvalidInputError: the number is below 1.
        """
        if chunks < 1:
            raise InvalidInputError(f"{chunks} chunks to be remembered; give a number from 1")
        view = self._view()
        view._shards = Shards(self._root, self._manifest.shards, self._manifest, remembered=chunks)
        return view

    def lengths(self) -> NDArray[np.uint32]:
        """Positions of each sequence of this view, in order: uint32 [len(self)].

        Every chunk with a sequence of the view is read and verified; none of their cells is decoded.

        Raises:
            CorruptDataError: a chunk's bytes are not what was written.
        """
        rows = self._rows if self._rows.step > 0 else self._rows[::-1]
        lengths = np.empty(len(rows), np.uint32)
        for number, chunk, start, places in self._chunks_within(rows):
            of_chunk = self._shards[number].chunk(chunk).lengths
            here = rows[places]
            lengths[places] = of_chunk[np.arange(here.start, here.stop, here.step) - start]
        return lengths if rows is self._rows else lengths[::-1]

    def _view(
        self,
        rows: range | None = None,
        columns: frozenset[str] | None = None,
        decoding: Decoding | None = None,
    ) -> Dataset:
        return Dataset(
            self._root,
            self._manifest,
            _shards=self._shards,
            _rows=self._rows if rows is None else rows,
            _columns=self._columns if columns is None else columns,
            _decoding=self._decoding if decoding is None else decoding,
        )

    def _locate(self, row: int) -> tuple[int, int]:
        """(shard, row in the shard)."""
        number = bisect_right(self._starts, row) - 1
        return number, row - self._starts[number]

    def _chunks_within(self, rows: range) -> Iterator[tuple[int, int, int, slice]]:
        """(shard, chunk, row of its first sequence, places in `rows`) of each chunk with some of ascending rows."""
        for number, (start, end) in enumerate(pairwise(self._starts)):
            if rows[_within(rows, start, end)]:
                for chunk, (first, last) in enumerate(pairwise(self._shards[number].starts)):
                    if rows[places := _within(rows, start + first, start + last)]:
                        yield number, chunk, start + first, places

    def _runs(self) -> Iterator[tuple[int, int, list[int]]]:
        """(shard, chunk, rows in the chunk) of the rows of this view, in order."""
        here = (-1, -1)
        places: list[int] = []
        for row in self._rows:
            number, place = self._locate(row)
            chunk, place = self._shards[number].locate(place)
            if here != (number, chunk):
                if places:
                    yield *here, places
                here, places = (number, chunk), []
            places.append(place)
        if places:
            yield *here, places

    def _decode(self, number: int, chunk: int, places: list[int]) -> Iterator[Sequence]:
        read = self._shards.chunk(number, chunk)
        try:
            for place in places:
                yield read.sequence(place, self._columns, encoded=self._decoding == "device")
        except CorruptDataError as error:
            shard = self._shards[number]
            offset = int(shard.index["offset"][chunk])
            raise error.at(path=shard.path, chunk=chunk, offset=offset) from error


def _within(rows: range, start: int, end: int) -> slice:
    """The places in ascending rows whose row is in [start, end)."""
    return slice(bisect_left(rows, start), bisect_left(rows, end))
