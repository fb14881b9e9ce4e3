"""The journal of a part, read as far as it is undamaged: each line has a digest of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.dataset.parts import part_directory
from logitstore.errors import CorruptDataError, SourceNotFoundError
from logitstore.io import regular_size
from logitstore.schema import ShardInfo, TokenizerInfo
from logitstore.schema.journal import (
    JOURNAL_NAME,
    LINE_BYTES,
    Chunked,
    Closed,
    Done,
    Line,
    Opened,
    Part,
    Plan,
    Sent,
    Synced,
    decode_line,
)
from logitstore.shard.layout import INDEX_DTYPE
from logitstore.shard.writer import ChunkEntry


@dataclass(slots=True)
class JournalShard:
    """What a journal says of a shard.

    Attributes:
        path: in the dataset.
        schema: its schema message; empty where that line is damaged.
        entries: its chunks, `INDEX_DTYPE`; they may be a part of them where the journal is damaged.
        info: what the manifest was to say of it; None where it is not complete.
        place: where it is now, where it is no longer here.
    """

    path: str
    schema: bytes = b""
    entries: NDArray[Any] = field(default_factory=lambda: np.empty(0, INDEX_DTYPE))
    info: ShardInfo | None = None
    place: str | None = None


@dataclass(slots=True)
class PartJournal:
    """What is known of a part.

    Attributes:
        part: which.
        plan: all that its writer was told; None where that line is lost.
        shards: in order.
        tokenizer: its tokenizer, as far as it is known.
        done: whether the part is complete.
        damaged: whether a line in the midst of others is damaged: a last one that is not whole was never synced.
        stray: digests of chunks of which it is not known in which shard they are.
    """

    part: Part
    plan: Plan | None = None
    shards: list[JournalShard] = field(default_factory=list)
    tokenizer: TokenizerInfo | None = None
    done: bool = False
    damaged: bool = False
    stray: set[bytes] = field(default_factory=set)


def read_journal(root: Path, part: Part) -> PartJournal:
    """All that the undamaged lines of a journal say; nothing where there is none.

    Raises:
        UnsupportedVersionError: a later release wrote it.
    """
    reading = _Reading(PartJournal(part))
    for line in _lines(part_directory(root, part) / JOURNAL_NAME):
        if line is None:
            reading.close()
            reading.found.damaged = True
        elif isinstance(line, Chunked):
            reading.chunk(line)
        else:
            reading.line(line)
    reading.close()
    found = reading.found
    found.shards = list(reading.by_path.values())
    if found.plan is not None and found.plan.part != part:
        found.plan, found.damaged = None, True
    return found


class _Reading:
    """Gathers the lines of a journal."""

    def __init__(self, found: PartJournal) -> None:
        self.found = found
        self.by_path: dict[str, JournalShard] = {}
        self._opened: JournalShard | None = None
        self._entries: list[ChunkEntry] = []

    def chunk(self, line: Chunked) -> None:
        """A chunk; of the shard that was opened last, unless a line before it is lost."""
        digest = bytes.fromhex(line.digest)
        sizes = (line.offset, line.length, line.sequences, line.positions, line.candidates)
        if self._opened is None or max(line.sequences, line.positions) >= 2**32:
            self.found.stray.add(digest)
        else:
            self._entries.append((*sizes, digest))

    def line(self, line: Plan | Opened | Synced | Closed | Sent | Done) -> None:
        """Any other line."""
        if isinstance(line, Synced):
            return
        if isinstance(line, Plan):
            self.found.plan, self.found.tokenizer = line, line.tokenizer
        elif isinstance(line, Done):
            self.found.done, self.found.tokenizer = True, line.tokenizer
        elif isinstance(line, Sent):
            self._shard(line.path).place = line.place
        elif isinstance(line, Closed):
            self.close()
            self._shard(line.info.path).info = line.info
        else:
            self.close()
            self._opened = self._shard(line.path)
            self._opened.schema = line.schema

    def close(self) -> None:
        """No more chunks of this shard: what follows may be of one whose line is lost."""
        if self._opened is not None and self._entries:
            self._opened.entries = np.concatenate([self._opened.entries, np.array(self._entries, INDEX_DTYPE)])
        self._entries.clear()
        self._opened = None

    def _shard(self, path: str) -> JournalShard:
        return self.by_path.setdefault(path, JournalShard(path))


def _lines(path: Path) -> Iterator[Line | None]:
    """The lines; None for one that is damaged and not the last."""
    try:
        regular_size(path)
    except (SourceNotFoundError, CorruptDataError):
        return
    whole, first = True, True
    with path.open("rb") as file:
        while data := file.readline(LINE_BYTES):
            line = _line(data, first=first)
            first = False
            if not whole and line is not None:
                yield None
            whole = line is not None
            if line is not None:
                yield line


def _line(data: bytes, *, first: bool) -> Line | None:
    for as_first in (first, not first):
        try:
            return decode_line(data, first=as_first)
        except CorruptDataError:
            continue
    return None
