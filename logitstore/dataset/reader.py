"""Reading a dataset: rows, ids, chunks, splits and columns."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from logitstore.dataset.shards import Run, Shards, read_manifest
from logitstore.errors import CorruptDataError, InvalidInputError, RowIndexError, SequenceNotFoundError
from logitstore.io import LocalStore, Store
from logitstore.io.store import store_of
from logitstore.schema import Manifest
from logitstore.shard.sequence import DEFAULT_COLUMNS, SEQUENCE_COLUMNS, Sequence
from logitstore.tokenizer import Tokenizer

Decoding = Literal["cpu", "device"]
"""Who decodes the candidates of the sequences that a dataset gives."""


def open(  # noqa: A001 - as safetensors, zarr and tarfile name it
    path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> Dataset:
    """Open a dataset. Only its manifest is read; shards are opened when they are touched.

    A remote one is not downloaded: what is read of it is fetched in ranges, verified, and kept in a bounded cache
    (`LOGITSTORE_CACHE`, `LOGITSTORE_CACHE_SIZE`).

    Args:
        path: directory of the dataset; or `hf://datasets/ns/name[@revision][/folder]`, whose revision is resolved
            once, now; or a URL that fsspec knows, such as `s3://`, `gs://` and `https://`.
        storage_options: for URLs: `token` and `endpoint` of the Hub, or what fsspec's file system takes.

    Raises:
        DatasetNotFoundError: there is none.
        IncompleteDatasetError: its writer has not finished.
        CorruptDataError: the manifest is damaged.
        UnsupportedVersionError: this release cannot read it.
        RemoteError: it cannot be reached.
        RemoteAccessError: another token is needed.
        MissingDependencyError: fsspec needs a package for this URL.
    """
    store = store_of(path, storage_options)
    return Dataset(store, read_manifest(store))


@dataclass(frozen=True, slots=True)
class Stored:
    """What chunks take in their shards.

    Attributes:
        positions: in them.
        candidates: in them.
        bytes: of their messages.
        columns: bytes of each column's values; the rest of the messages are Arrow's framing and the token order.
    """

    positions: int = 0
    candidates: int = 0
    bytes: int = 0
    columns: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Stored) -> Stored:
        names = dict.fromkeys([*self.columns, *other.columns])
        columns = {name: self.columns.get(name, 0) + other.columns.get(name, 0) for name in names}
        return Stored(
            self.positions + other.positions, self.candidates + other.candidates, self.bytes + other.bytes, columns
        )


class Dataset:
    """A dataset, or a view of some of its rows and columns. Sequences are read when they are asked for.

    Views share the opened shards. A dataset pickles, and works after fork, under spawn and from threads.

    Args:
        store: its files.
        manifest: its manifest.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        _shards: Shards | None = None,
        _rows: range | None = None,
        _columns: frozenset[str] | None = None,
        _decoding: Decoding = "cpu",
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._shards = _shards if _shards is not None else Shards(store, manifest)
        self._rows = _rows if _rows is not None else range(self._shards.starts[-1])
        self._columns = _columns if _columns is not None else DEFAULT_COLUMNS | frozenset(manifest.user_columns)
        self._decoding = _decoding

    @property
    def info(self) -> Manifest:
        """The manifest: teacher, tokenizer, totals, shards."""
        return self._manifest

    @property
    def path(self) -> Path | str:
        """Directory of the dataset, or URL of a remote one."""
        return self._store.root if isinstance(self._store, LocalStore) else self._store.name

    @property
    def name(self) -> str:
        """Its path or URL, as messages name it."""
        return self._store.name

    @property
    def store(self) -> Store:
        """The files of the dataset."""
        return self._store

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
            CorruptDataError: those of a remote dataset are.
        """
        info = self._manifest.tokenizer
        if info is None or not info.files:
            return None
        return Tokenizer.from_path(self._store.folder(info.folder, info.files))

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Dataset({self._store.name!r}, sequences={len(self)}, columns={list(self.columns)})"

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
        number, place = self._shards.locate(self._row(index))
        shard = self._shards[number]
        chunk, place = shard.locate(place)
        return next(self._decode(number, chunk, [place]))

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences in order, decoded one by one; each chunk is read once.

        Raises:
            CorruptDataError: a chunk's bytes are not what was written.
        """
        # Before `list` takes memory for as many sequences as the manifest says.
        self._shards.check_numbers(self._rows)
        return self._sequences()

    def _sequences(self) -> Iterator[Sequence]:
        for number, chunk, places in self._shards.in_order(self._runs(), self._rows):
            yield from self._decode(number, chunk, places)

    def chunks(self) -> Iterator[list[Sequence]]:
        """The sequences chunk by chunk, decoded; memory in proportion to one chunk.

        Raises:
            CorruptDataError: a chunk's bytes are not what was written.
        """
        for number, chunk, places in self._shards.in_order(self._runs(), self._rows):
            yield list(self._decode(number, chunk, places))

    def parts(self) -> Iterator[slice]:
        """The places of this view chunk by chunk, in the order of the file: only the shards' indexes are read.

        `dataset[part]` of all parts are all sequences, and each chunk is in one part.

        Raises:
            CorruptDataError: a shard's index is damaged.
        """
        for _, _, (_, places) in self._chunks_within(self._ascending):
            yield self._mirrored(places)

    def stored(self) -> Stored:
        """What the chunks that hold sequences of this view take in their shards; each is read and verified.

        Raises:
            CorruptDataError: a chunk's bytes are not what was written.
        """
        total = Stored()
        rows = self._ascending
        for number, chunk, _ in self._shards.in_order(self._chunks_within(rows), rows):
            entry = self._shards[number].index[chunk]
            cells = self._shards.chunk(number, chunk).bytes_by_column()
            total += Stored(int(entry["positions"]), int(entry["candidates"]), int(entry["length"]), cells)
        return total

    def expect(self, rows: Iterable[int]) -> None:
        """Say which rows will be read soon; those of a remote dataset are fetched meanwhile, by threads.

        Args:
            rows: row numbers of this view.

        Raises:
            RowIndexError: a row is outside the dataset.
        """
        if self._store.remote:
            self._shards.expect([self._row(row) for row in rows])

    def by_id(self, sequence_id: str) -> Sequence:
        """The sequence with this id.

        Raises:
            SequenceNotFoundError: there is none in this view.
            CorruptDataError: its bytes are not what was written.
        """
        return self[self.row_of(sequence_id)]

    def row_of(self, sequence_id: str) -> int:
        """The row of the sequence with this id, in this view.

        Raises:
            SequenceNotFoundError: there is none in this view.
            CorruptDataError: a shard's bytes are not what was written.
        """
        for number, place in self._shards.find(sequence_id):
            row = self._shards.starts[number] + place
            if row in self._rows:
                return self._rows.index(row)
        raise SequenceNotFoundError(f"no sequence has the id {sequence_id!r} in {self._store.name}")

    def split(self, name: str) -> Dataset:
        """A view of one split.

        Raises:
            InvalidInputError: there is no such split.
        """
        if name not in self._manifest.splits:
            raise InvalidInputError(f"no split is called {name!r}; there are: {', '.join(self.splits)}")
        numbers = [i for i, shard in enumerate(self._manifest.shards) if shard.split == name]
        start, end = (self._shards.starts[numbers[0]], self._shards.starts[numbers[-1] + 1]) if numbers else (0, 0)
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
        view._shards = Shards(self._store, self._manifest, remembered=chunks)
        return view

    def lengths(self) -> NDArray[np.uint32]:
        """Positions of each sequence of this view, in order: uint32 [len(self)].

        Every chunk with a sequence of the view is read and verified; none of their cells is decoded.

        Raises:
            CorruptDataError: a chunk's bytes are not what was written.
        """
        rows = self._ascending
        # Joined from what was read: the manifest's own number of them may be forged.
        parts = [np.empty(0, np.uint32)]
        for number, chunk, (start, places) in self._shards.in_order(self._chunks_within(rows), rows):
            here = rows[places]
            of_chunk = self._shards.chunk(number, chunk).lengths
            parts.append(of_chunk[np.arange(here.start, here.stop, here.step) - start])
        lengths = np.concatenate(parts)
        return lengths if self._rows.step > 0 else lengths[::-1]

    @property
    def _ascending(self) -> range:
        return self._rows if self._rows.step > 0 else self._rows[::-1]

    def _mirrored(self, places: slice) -> slice:
        """Places among the ascending rows as places of the view."""
        n = len(self._rows)
        return places if self._rows.step > 0 else slice(n - places.stop, n - places.start)

    def _row(self, index: int) -> int:
        try:
            return self._rows[index]
        except IndexError:
            there = f"the rows are 0 to {len(self) - 1}" if len(self) else "there are no sequences"
            raise RowIndexError(f"there is no row {index}: {there}") from None

    def _view(
        self,
        rows: range | None = None,
        columns: frozenset[str] | None = None,
        decoding: Decoding | None = None,
    ) -> Dataset:
        return Dataset(
            self._store,
            self._manifest,
            _shards=self._shards,
            _rows=self._rows if rows is None else rows,
            _columns=self._columns if columns is None else columns,
            _decoding=self._decoding if decoding is None else decoding,
        )

    def _chunks_within(self, rows: range) -> Iterator[Run]:
        """(shard, chunk, (row of its first sequence, places in `rows`)) of each chunk with some of ascending rows."""
        for number, (start, end) in enumerate(pairwise(self._shards.starts)):
            if rows[_within(rows, start, end)]:
                for chunk, (first, last) in enumerate(pairwise(self._shards[number].starts)):
                    if rows[places := _within(rows, start + first, start + last)]:
                        yield number, chunk, (start + first, places)

    def _runs(self) -> Iterator[Run]:
        """(shard, chunk, rows in the chunk) of the rows of this view, in order."""
        here = (-1, -1)
        places: list[int] = []
        for row in self._rows:
            number, place = self._shards.locate(row)
            if places and number != here[0]:  # before the next shard is opened, which may fail
                yield *here, places
                places = []
            chunk, place = self._shards[number].locate(place)
            if places and chunk != here[1]:
                yield *here, places
                places = []
            here = (number, chunk)
            places.append(place)
        if places:
            yield *here, places

    def _decode(self, number: int, chunk: int, places: list[int]) -> Iterator[Sequence]:
        read = self._shards.chunk(number, chunk)
        left = int(self._shards[number].index["candidates"][chunk])
        try:
            for place in places:
                sequence = read.sequence(place, self._columns, encoded=self._decoding == "device")
                left = _without(left, sequence)
                yield sequence
        except CorruptDataError as error:
            shard = self._shards[number]
            offset = int(shard.index["offset"][chunk])
            raise error.at(path=shard.path, chunk=chunk, offset=offset) from error


def _without(left: int, sequence: Sequence) -> int:
    """How many candidates of a chunk are left after a sequence of it."""
    offsets = vars(sequence).get("offsets")
    left -= 0 if offsets is None else int(offsets[-1])
    if left < 0:
        raise CorruptDataError("the chunk has more candidates than the index says", code="chunk-counts")
    return left


def _within(rows: range, start: int, end: int) -> slice:
    """The places in ascending rows whose row is in [start, end)."""
    return slice(bisect_left(rows, start), bisect_left(rows, end))
