"""The shards of a dataset as a reader needs them: opened when touched, asked for ahead where that saves waiting."""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Any, Final

from logitstore.dataset.ahead import Ahead
from logitstore.errors import (
    CorruptDataError,
    DatasetNotFoundError,
    IncompleteDatasetError,
    LogitStoreError,
    SourceNotFoundError,
    UnsupportedVersionError,
)
from logitstore.io import Store
from logitstore.limits import MANIFEST_BYTES
from logitstore.schema import Manifest, ShardInfo, parse_manifest
from logitstore.schema.manifest import MANIFEST_NAME
from logitstore.shard.chunk import Chunk
from logitstore.shard.reader import Shard

_OPEN_SHARDS: Final = 1024  # mappings kept at once, far below what systems allow a process

REMEMBERED_BYTES: Final = 64 * 2**20
"""The most bytes of chunks that were fetched which are remembered; mapped ones take no memory of their own."""

AHEAD_BYTES: Final = 32 * 2**20
"""So many bytes of chunks are fetched before they are asked for."""

AHEAD_CHUNKS: Final = 512
AHEAD_SHARDS: Final = 16
AHEAD_FIRST: Final = 2**20

SURPRISING: Final = 2**20
"""Shards of more sequences are rare, and are opened before memory is taken for as many."""

GROUP_BYTES: Final = 4 * 2**20
"""Chunks that follow one another are fetched together up to this size."""

Run = tuple[int, int, Any]
"""(shard, chunk, which of its rows) that are read together."""


def read_manifest(store: Store) -> Manifest:
    """The manifest of a dataset, verified.

    Args:
        store: the dataset's files.

    Raises:
        DatasetNotFoundError: there is none.
        IncompleteDatasetError: its writer has not finished.
        CorruptDataError: the manifest is damaged.
        UnsupportedVersionError: this release cannot read it.
        RemoteError: it cannot be fetched.
    """
    path = store.where(MANIFEST_NAME)
    attempts = 3 if store.remote else 1  # what a network damaged comes whole another time
    while True:
        attempts -= 1
        try:
            return parse_manifest(store.small(MANIFEST_NAME, MANIFEST_BYTES))
        except SourceNotFoundError:
            if store.has_shards():
                raise IncompleteDatasetError(
                    f"{store.name} has shards but no {MANIFEST_NAME}: it is still being written, or its writer was "
                    f"stopped"
                ) from None
            raise DatasetNotFoundError(
                f"{store.name} is no logitstore dataset: there is no {MANIFEST_NAME} in it"
            ) from None
        except CorruptDataError as error:
            if attempts == 0 or error.code != "manifest":
                raise error.at(path=path) from error
        except UnsupportedVersionError as error:
            raise UnsupportedVersionError(f"{path}: {error}") from error


def open_shard(store: Store, info: ShardInfo, manifest: Manifest) -> Shard:
    """Open one shard and check that it is the one the manifest names.

    Raises:
        CorruptDataError: it is missing, damaged, or another.
        UnsupportedVersionError: this release cannot read it.
        RemoteError: it cannot be fetched.
    """
    path = store.where(info.path)
    try:
        source = store.shard(info)
        if source.size != info.bytes:
            raise CorruptDataError(
                f"the shard has {source.size} bytes, the manifest says {info.bytes}", code="shard-size", path=path
            )
        shard = Shard(source)
    except SourceNotFoundError:
        raise CorruptDataError(
            "the shard is missing; fetch it from where there is a copy (`logitstore pull`, `validate --repair-from`)",
            code="shard-missing",
            path=path,
        ) from None
    said = (info.tail_digest, info.sequences, info.positions, info.candidates)
    tail = shard.tail
    if said != (shard.tail_digest, tail.sequences, tail.positions, tail.candidates):
        raise CorruptDataError("this is not the shard that the manifest names", code="shard-other", path=path)
    if not manifest.header_agrees(shard.header):
        raise CorruptDataError(
            "the shard's header and the manifest disagree about logit width, normalisation, temperature or resolution",
            code="shard-header",
            path=path,
        )
    return shard


class Shards:
    """The shards of a dataset, each opened when it is first touched and checked against the manifest."""

    def __init__(self, store: Store, manifest: Manifest, *, remembered: int = 1) -> None:
        self.store = store
        self.manifest = manifest
        self.infos = manifest.shards
        self.starts = [0, *accumulate(info.sequences for info in self.infos)]
        self.remembered = remembered
        self._fresh()

    def _fresh(self) -> None:
        self._open: dict[int, Shard] = {}
        self._chunks: OrderedDict[tuple[int, int], Chunk] = OrderedDict()
        self._ahead = Ahead()
        self._waiting: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        own = {"_open", "_chunks", "_ahead", "_waiting"}  # a mapping belongs to its process, and so does a thread
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self._fresh()

    def __getitem__(self, number: int) -> Shard:
        """One shard.

        Raises:
            CorruptDataError: it is missing, damaged, or not the one that the manifest names.
            UnsupportedVersionError: this release cannot read it.
            RemoteError: it cannot be fetched.
        """
        shard = self._open.get(number)
        if shard is None:
            shard = self._ahead.take(number)
            if shard is None:
                shard = open_shard(self.store, self.infos[number], self.manifest)
            self._keep(number, shard)
        return shard

    def check_numbers(self, rows: range) -> None:
        """Refuse a manifest whose shards have not as many sequences as it says, where it says that many.

        Args:
            rows: of the dataset; shards without any of them are not opened.

        Raises:
            CorruptDataError: a shard is missing, damaged, or not the one that the manifest names.
        """
        if len(rows) > SURPRISING:
            for number in self._touched(rows):
                if self.infos[number].sequences > SURPRISING:
                    self[number]

    def _keep(self, number: int, shard: Shard) -> None:
        # Single dictionary operations: threads may open a shard twice, which harms nothing.
        while len(self._open) >= _OPEN_SHARDS:
            with contextlib.suppress(StopIteration, RuntimeError):
                self._open.pop(next(iter(self._open)), None)
        self._open[number] = shard

    def locate(self, row: int) -> tuple[int, int]:
        """(shard, row in the shard) of a row of the dataset."""
        number = bisect_right(self.starts, row) - 1
        return number, row - self.starts[number]

    def chunk(self, number: int, chunk: int) -> Chunk:
        """One chunk of a shard; the last ones are remembered, for rows that are read one after another."""
        # Single dictionary operations, for threads: another one may have dropped the chunk meanwhile.
        place = number, chunk
        read = self._chunks.get(place)
        if read is not None:
            with contextlib.suppress(KeyError):
                self._chunks.move_to_end(place)
            return read
        read = self._chunks[place] = self[number].chunk(chunk, self._ahead.take(place))
        while len(self._chunks) > self._remembered(read):
            with contextlib.suppress(KeyError):
                self._chunks.popitem(last=False)
        return read

    def _remembered(self, chunk: Chunk) -> int:
        if not self.store.remote:
            return self.remembered
        return max(1, min(self.remembered, REMEMBERED_BYTES // max(1, int(chunk.batch.nbytes))))

    def in_order(self, runs: Iterator[Run], rows: range) -> Iterator[Run]:
        """The same runs; those of a remote dataset are fetched while others are worked on.

        Args:
            runs: may open shards as it goes; those that follow are being opened meanwhile.
            rows: of the dataset, in the order of the runs.
        """
        if not self.store.remote:
            yield from runs
            return
        window: deque[tuple[Run, int]] = deque()
        touched = self._touched(rows)
        held = done = 0
        failure: Exception | None = None
        try:
            while True:
                # As much ahead as eight times what was read: whoever looks at one sequence does not fetch a window.
                limit = min(AHEAD_BYTES, AHEAD_FIRST + 8 * done)
                try:
                    held += self._fill(runs, window, limit - held, touched)
                except LogitStoreError as error:  # of a later shard: what comes before it is given first
                    failure = error
                while window:
                    run, length = window.popleft()
                    held -= length
                    done += length
                    yield run
                    # Not after each chunk: several that follow come by one request.
                    room = held <= limit - limit // 8 and len(window) <= AHEAD_CHUNKS - AHEAD_CHUNKS // 8
                    if room and failure is None:
                        break
                else:
                    if failure is not None:
                        raise failure
                    return
        finally:
            self._ahead.forget([(number, chunk) for (number, chunk, _), _ in window])
            self._ahead.forget(touched[: 1 + AHEAD_SHARDS])

    def _fill(self, runs: Iterator[Run], window: deque[tuple[Run, int]], wanted: int, touched: list[int]) -> int:
        """Start fetching more runs and append them to the window: bytes of them."""
        got = size = 0
        group: list[tuple[int, int]] = []
        try:
            for run in runs:
                number, chunk, _ = run
                if touched and touched[0] != number:
                    del touched[: touched.index(number)]
                self._expect_shards(touched[1 : 1 + AHEAD_SHARDS])
                length = int(self[number].index["length"][chunk])
                if group and (group[-1] != (number, chunk - 1) or size + length > GROUP_BYTES):
                    self._expect_chunks(group)
                    group, size = [], 0
                group.append((number, chunk))
                window.append((run, length))
                size += length
                got += length
                if got >= wanted or len(window) >= AHEAD_CHUNKS:
                    break
        finally:
            self._expect_chunks(group)
        return got

    def expect(self, rows: Iterable[int]) -> None:
        """Say which rows of a remote dataset will be read soon: their chunks are fetched meanwhile."""
        if not self.store.remote:
            return
        # One list for another: threads may tell the same row twice, or lose one, which harms nothing.
        waiting, self._waiting = [*self._waiting, *rows], []
        left = []
        for row in waiting:
            number, place = self.locate(row)
            shard = self._open.get(number) or self._ahead.done(number)
            if shard is None:
                self._expect_shard(number)
                left.append(row)
                continue
            chunk = shard.locate(place)[0]
            if len(self._ahead) * int(shard.index["length"][chunk]) > 2 * AHEAD_BYTES:
                left.append(row)
            else:
                self._expect_chunks([(number, chunk)])
        self._waiting += left[:AHEAD_CHUNKS]

    def find(self, sequence_id: str) -> Iterator[tuple[int, int]]:
        """(shard, row in it) of each sequence with this id; remote shards are looked through several at a time."""
        numbers, started, search = range(len(self.infos)), 0, object()
        try:
            for number in numbers:
                while self.store.remote and started < min(number + AHEAD_SHARDS, len(numbers)):
                    self._ahead.start([(search, started)], self._found, started, sequence_id)
                    started += 1
                (row,) = self._ahead.take((search, number)) or self._found(number, sequence_id)[0]
                if row is not None:
                    yield number, row
        finally:
            self._ahead.forget([(search, number) for number in numbers[:started]])

    def _found(self, number: int, sequence_id: str) -> list[tuple[int | None]]:
        # In a thread of those that others wait for: it opens the shard itself, whoever else is about to.
        shard = self._open.get(number) or self._ahead.done(number)
        if shard is None:
            shard = open_shard(self.store, self.infos[number], self.manifest)
            self._keep(number, shard)
        return [(shard.find(sequence_id),)]

    def _touched(self, rows: range) -> list[int]:
        """The shards that hold some of the rows, in the rows' order."""
        ascending = rows if rows.step > 0 else rows[::-1]
        numbers = [
            number
            for number, (start, end) in enumerate(pairwise(self.starts))
            if bisect_left(ascending, start) < bisect_left(ascending, end)
        ]
        return numbers if rows is ascending else numbers[::-1]

    def _expect_shards(self, numbers: list[int]) -> None:
        """Open these, as far as their bytes fit the window."""
        ahead = 0
        for number in numbers:
            self._expect_shard(number)
            ahead += self.infos[number].bytes
            if ahead > AHEAD_BYTES:
                break

    def _expect_shard(self, number: int) -> None:
        if number not in self._open and number not in self._ahead:
            self._ahead.start([number], _opened, self.store, self.infos[number], self.manifest)

    def _expect_chunks(self, places: list[tuple[int, int]]) -> None:
        """Start fetching chunks of one shard that follow one another."""
        if places and not all(place in self._chunks or place in self._ahead for place in places):
            (number, first), (_, last) = places[0], places[-1]
            self._ahead.start(places, self[number].messages, first, last)


def _opened(store: Store, info: ShardInfo, manifest: Manifest) -> list[Shard]:
    return [open_shard(store, info, manifest)]
