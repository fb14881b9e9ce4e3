"""The checks of one part of a dataset: a shard, or some chunks of a large one. A process can do any of them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from logitstore.checks.findings import Findings, Found
from logitstore.checks.quick import check_shard
from logitstore.checks.rows import check_sequence
from logitstore.dataset.alignment import Alignment
from logitstore.dataset.shards import open_shard
from logitstore.encoding.codes import check_order
from logitstore.errors import CorruptDataError, LogitStoreError, UnsupportedVersionError
from logitstore.io import LocalStore, regular_size, sha256_file
from logitstore.schema import Manifest
from logitstore.shard.chunk import OPTIONAL_TYPES, Chunk
from logitstore.shard.layout import id_hash
from logitstore.shard.reader import Shard
from logitstore.shard.sequence import DEFAULT_COLUMNS, Sequence

PART_BYTES: Final = 8 * 2**20
"""Chunks of about so many bytes are a part: some tenths of a second of work, and little memory."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is the same for all parts.

    Attributes:
        root: directory of the dataset.
        manifest: its manifest.
        deep: read every byte and check every row.
    """

    root: Path
    manifest: Manifest
    deep: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a dataset.

    Attributes:
        shard: its number in the manifest.
        row: row number in the dataset of the shard's first sequence.
        start: the chunks that begin at this byte of the file or later,
        stop: and before this one, belong to it.
        first: whether it begins a shard: what concerns the shard as a whole is checked with it.
    """

    shard: int
    row: int
    start: int
    stop: int
    first: bool = False


@dataclass(frozen=True, slots=True)
class Sums:
    """What only the whole shows, summed.

    Attributes:
        whole: whether everything could be read.
        encodings: sequences under each encoding.
        optional: sequences that have each optional column.
        highest_id: highest candidate id; -1 where there is none.
        highest_token: highest token; -1 where there is none.
        alignment: where the best candidates are the tokens.
    """

    whole: bool = True
    encodings: Counter[str] = field(default_factory=Counter)
    optional: Counter[str] = field(default_factory=Counter)
    highest_id: int = -1
    highest_token: int = -1
    alignment: Alignment = field(default_factory=Alignment)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.whole and other.whole,
            self.encodings + other.encodings,
            self.optional + other.optional,
            max(self.highest_id, other.highest_id),
            max(self.highest_token, other.highest_token),
            Alignment(self.alignment.hits + other.alignment.hits, self.alignment.scored + other.alignment.scored),
        )


@dataclass(frozen=True, slots=True)
class ChunkIds:
    """The ids of a chunk that could be read.

    Attributes:
        shard: number of its shard in the manifest.
        chunk: its number in the shard.
        row: row number in the dataset of its first sequence.
        places: int64 [n], rows in the chunk of the sequences that could be read; None where all could.
        hashes: uint64 [n], hashes of their ids.
    """

    shard: int
    chunk: int
    row: int
    places: NDArray[np.int64] | None
    hashes: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Checked:
    """What the checks of a part gave.

    Attributes:
        bytes: size of the part.
        found: its findings.
        sums: its sums.
        ids: the ids of its chunks.
    """

    bytes: int
    found: Found
    sums: Sums
    ids: tuple[ChunkIds, ...] = ()


def parts_of(task: Task) -> Iterator[Part]:
    """The parts of a dataset, in order; the same however many processes work on them."""
    row = 0
    for number, info in enumerate(task.manifest.shards):
        if task.deep and info.bytes > 2 * PART_BYTES and _has_size(task.root / info.path, info.bytes):
            yield Part(number, row, start=0, stop=0, first=True)
            for start in range(0, info.bytes, PART_BYTES):
                yield Part(number, row, start, min(start + PART_BYTES, info.bytes))
        else:
            yield Part(number, row, start=0, stop=info.bytes, first=True)
        row += info.sequences


def _has_size(path: Path, size: int) -> bool:
    """A manifest's number alone is not believed: it would be that of the parts."""
    try:
        return regular_size(path) == size
    except LogitStoreError:
        return False


def check_part(task: Task, part: Part) -> Checked:
    """Check a part."""
    findings = Findings()
    info = task.manifest.shards[part.shard]
    shard = _opened(task, part, findings)
    if shard is None:
        return Checked(part.stop - part.start, findings.found() if part.first else Found(), Sums(whole=False))
    if part.first:
        check_shard(shard, info, task.manifest, findings)
    if not task.deep:
        return Checked(part.stop - part.start, findings.found(), Sums())
    if part.first and sha256_file(task.root / info.path) != info.sha256:
        findings.add(
            "shard-sha256",
            "the file's sha256 is not that of the manifest: its bytes were changed; fetch or copy it again",
            shard=info.path,
        )
    reading = _Reading(task, part, shard, findings)
    offsets = shard.index["offset"]
    for number in np.flatnonzero((offsets >= part.start) & (offsets < part.stop)).tolist():
        reading.chunk(number)
    return Checked(part.stop - part.start, findings.found(), reading.sums(), tuple(reading.ids))


def _opened(task: Task, part: Part, findings: Findings) -> Shard | None:
    info = task.manifest.shards[part.shard]
    try:
        return open_shard(LocalStore(task.root), info, task.manifest)
    except CorruptDataError as error:
        findings.add_corrupt(error, task.root)
    except UnsupportedVersionError as error:
        findings.add("version", str(error), shard=info.path)
    return None


class _Reading:
    """Goes through chunks once and keeps the sums."""

    def __init__(self, task: Task, part: Part, shard: Shard, findings: Findings) -> None:
        self.root = task.root
        self.path = task.manifest.shards[part.shard].path
        self.part = part
        self.shard = shard
        self.findings = findings
        self.columns = DEFAULT_COLUMNS | frozenset(task.manifest.user_columns)
        self.ids: list[ChunkIds] = []
        self.whole = True
        self.encodings: Counter[str] = Counter()
        self.optional: Counter[str] = Counter()
        self.highest_id = -1
        self.highest_token = -1
        self.alignment = Alignment()
        self.hashes: NDArray[np.uint64] | None = None
        with contextlib.suppress(CorruptDataError):  # reported once for the shard
            self.hashes = shard.hashes

    def sums(self) -> Sums:
        """The sums so far."""
        return Sums(self.whole, self.encodings, self.optional, self.highest_id, self.highest_token, self.alignment)

    def chunk(self, number: int) -> None:
        """Check one chunk."""
        shard, first = self.shard, self.shard.starts[number]
        start = self.part.row + first
        try:
            chunk = shard.chunk(number)
            check_order(chunk.order)
        except CorruptDataError as error:
            self.whole = False
            self.findings.add_corrupt(error.at(path=shard.path), self.root, chunk=number)
            return
        candidates, places, hashes = 0, [], []
        for place in range(len(chunk)):
            row = start + place
            sequence = self._sequence(chunk, number, place, row)
            if sequence is None:
                continue
            candidates += len(sequence.ids)
            places.append(place)
            hashes.append(self._hash(sequence, number, first + place, row))
            check_sequence(sequence, chunk, place, self.findings, shard=self.path, chunk_number=number, row=row)
        whole = len(places) == len(chunk)
        if whole and candidates != int(shard.index["candidates"][number]):
            self.findings.add(
                "chunk-counts",
                f"the chunk holds {candidates} candidates, the index says {shard.index['candidates'][number]}",
                shard=self.path,
                chunk=number,
            )
        kept = None if whole else np.array(places, np.int64)
        self.ids.append(ChunkIds(self.part.shard, number, start, kept, np.array(hashes, np.uint64)))

    def _sequence(self, chunk: Chunk, number: int, place: int, row: int) -> Sequence | None:
        try:
            sequence = chunk.sequence(place, self.columns)
            self.encodings[chunk.encoding(place).label] += 1
        except CorruptDataError as error:
            self.whole = False
            self.findings.add_corrupt(error.at(path=self.shard.path), self.root, chunk=number, row=row)
            return None
        for name in OPTIONAL_TYPES:
            if chunk.batch.column(name)[place].as_buffer().size:
                self.optional[name] += 1
        if len(sequence.ids):
            self.highest_id = max(self.highest_id, int(sequence.ids.max()))
        if len(sequence.tokens):
            self.highest_token = max(self.highest_token, int(sequence.tokens.max()))
        self.alignment.add(sequence.tokens, sequence.count, sequence.offsets, sequence.ids)
        return sequence

    def _hash(self, sequence: Sequence, number: int, in_shard: int, row: int) -> int:
        value = id_hash(sequence.id)
        if self.hashes is not None and int(self.hashes[in_shard]) != value:
            self.findings.add(
                "shard-hashes",
                f"the hash of the id {sequence.id!r} is wrong: look-up by id does not find it",
                shard=self.path, chunk=number, row=row,
            )  # fmt: skip
        return value
