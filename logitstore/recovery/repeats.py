"""Sequences that are there twice among what is saved: one of them is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from logitstore.dataset.ids import repeated
from logitstore.io import MappedFile
from logitstore.recovery.examine import Examined, Piece
from logitstore.recovery.result import Lost
from logitstore.shard.chunk import Chunk
from logitstore.shard.salvage import parse_chunk
from logitstore.shard.sequence import SEQUENCE_COLUMNS

_REMEMBERED: Final = 8

Dropped = dict[tuple[int, int], set[int]]
"""Rows of a chunk that are left out, by (file, chunk among its pieces)."""


@dataclass(slots=True)
class Repeats:
    """What is left out since it is there twice.

    Attributes:
        dropped: the rows.
        same: how many of them are the same as those that are kept.
        lost: those that are not.
    """

    dropped: Dropped = field(default_factory=dict)
    same: int = 0
    lost: list[Lost] = field(default_factory=list)


def find_repeats(root: Path, files: Sequence[Examined]) -> Repeats:
    """Find sequences of one id; the first one is kept."""
    found = Repeats()
    chunks = _Chunks(root, files)
    places: list[tuple[int, int]] = []
    seen: set[bytes] = set()
    for number, examined in enumerate(files):
        for at, piece in enumerate(examined.pieces):
            if piece.digest in seen:  # the same bytes, in a file and in what was left of its beginning
                found.dropped[number, at] = set(range(len(piece.hashes)))
                found.same += len(piece.hashes)
            else:
                seen.add(piece.digest)
                places.append((number, at))
    hashes = [files[number].pieces[at].hashes for number, at in places]
    for group in repeated(hashes):
        kept: dict[str, tuple[tuple[int, int], int]] = {}
        for where, row in group:
            place = places[where]
            name = chunks.at(place).ids()[row]
            if name not in kept:
                kept[name] = place, row
                continue
            found.dropped.setdefault(place, set()).add(row)
            if _same(chunks, kept[name], (place, row)):
                found.same += 1
            else:
                path = files[place[0]].file.path
                reason = "another sequence of this id came before, and was kept"
                found.lost.append(Lost(path, reason, 1, place[1], None, (name,)))
    return found


def kept_rows(piece: Piece, dropped: set[int] | None) -> list[int]:
    """Rows of a chunk that are not left out."""
    return [row for row in range(len(piece.hashes)) if dropped is None or row not in dropped]


class _Chunks:
    """Chunks of several files; the last ones are remembered."""

    def __init__(self, root: Path, files: Sequence[Examined]) -> None:
        self._root = root
        self._files = files
        self._read: OrderedDict[tuple[int, int], Chunk] = OrderedDict()

    def at(self, place: tuple[int, int]) -> Chunk:
        """A chunk by its file and its number among the pieces of that."""
        if place not in self._read:
            examined = self._files[place[0]]
            self._read[place] = read_piece(self._root, examined, examined.pieces[place[1]])
            if len(self._read) > _REMEMBERED:
                self._read.popitem(last=False)
        return self._read[place]


def piece_message(root: Path, examined: Examined, piece: Piece) -> pa.Buffer:
    """The bytes of a chunk."""
    return MappedFile(root / examined.file.path).read(piece.offset, piece.length)


def read_piece(root: Path, examined: Examined, piece: Piece) -> Chunk:
    """A chunk of a file."""
    return parse_chunk(examined.schema, piece_message(root, examined, piece))


def _same(chunks: _Chunks, one: tuple[tuple[int, int], int], two: tuple[tuple[int, int], int]) -> bool:
    first, second = (vars(chunks.at(p).sequence(row, _columns(chunks.at(p)))) for p, row in (one, two))
    return first.keys() == second.keys() and all(_equal(value, second[name]) for name, value in first.items())


def _columns(chunk: Chunk) -> frozenset[str]:
    return frozenset(SEQUENCE_COLUMNS) | frozenset(chunk.user_names)


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        return one.dtype == two.dtype and one.tobytes() == two.tobytes()
    return type(one) is type(two) and (one == two or repr(one) == repr(two))
