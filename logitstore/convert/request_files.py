"""Files of requests, and which request a reply answers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import msgspec

from logitstore.convert.base import Piece, Record
from logitstore.convert.source import Input
from logitstore.errors import InvalidInputError, SourceError

_PIECE_BYTES: Final = 2**20  # of requests that are handed on together


class Asked(NamedTuple):
    """A reply and the request that it answers.

    Attributes:
        reply: its line.
        place: where the request stands; empty where requests are not given.
        request: its line; None where there is none.
    """

    reply: bytes
    place: str = ""
    request: bytes | None = None


class _Named(msgspec.Struct, gc=False):
    custom_id: str | None = None
    id: str | int | None = None


_NAMED: Final = msgspec.json.Decoder(_Named)


class Key(NamedTuple):
    """What a request or a reply is called.

    Attributes:
        name: its `custom_id` or `id`; None where it has none.
        given: whether the user gave it that name.
        readable: whether the line could be read.
    """

    name: str | None
    given: bool = False
    readable: bool = True


def key_of(line: bytes) -> Key:
    """What a request or a reply is called."""
    try:
        named = _NAMED.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return Key(None, readable=False)  # it fails when its turn comes
    return Key(named.custom_id or (None if named.id in {None, ""} else str(named.id)), named.custom_id is not None)


@dataclass(frozen=True, slots=True)
class _Answered:
    """A piece whose records have their requests."""

    answered: list[Record]

    def records(self) -> Iterator[Record]:
        yield from self.answered


def with_requests(pieces: Iterator[Piece], path: Path | None) -> Iterator[Piece]:
    """Pieces of lines whose records' data become `Asked`.

    Requests are found by `custom_id` or `id` where all have one, and one of the first replies has one that the user
    gave or that is among the requests'; also where none of the first replies can be read. Else they are taken in order.

    Args:
        pieces: of replies, one a line.
        path: the file of requests; None where there is none.

    Raises:
        SourceError: there are fewer requests than replies, or more, or two have the same id.
    """
    if path is None:
        for piece in pieces:
            yield _Answered([replace(record, data=Asked(record.data)) for record in piece.records()])
        return
    source = Input(path)
    if source.size is None:
        raise InvalidInputError("the requests are read twice, so they cannot come from standard input; give a file")
    try:
        with tempfile.TemporaryFile() as held:
            first = next(pieces, None)
            if first is None:
                return
            find = _finder(source, held, (record.data for record in first.records()))
            for piece in chain([first], pieces):
                yield from _answered(piece, find)
            if isinstance(find, _InOrder):
                find.end()
    finally:
        source.close()


def _answered(piece: Piece, find: _ById | _InOrder) -> Iterator[Piece]:
    """A piece with its requests; several where short answers have long prompts."""
    answered: list[Record] = []
    size = 0
    for record in piece.records():
        asked = find(record.data)
        answered.append(replace(record, data=asked))
        size += len(asked.request or b"")
        if size > _PIECE_BYTES:
            yield _Answered(answered)
            answered, size = [], 0
    if answered:
        yield _Answered(answered)


def _finder(source: Input, held: BinaryIO, replies: Iterable[bytes]) -> _ById | _InOrder:
    keys = [key for line in replies if (key := key_of(line)).readable]
    index = None
    if not keys or any(key.name is not None for key in keys):
        index = _index(source, held)
    if index is not None and keys and not any(key.given or key.name in index for key in keys):
        index = None
    return _InOrder(source.name, source.lines()) if index is None else _ById(source.name, held, index)


def _index(source: Input, held: BinaryIO) -> dict[str, tuple[int, int, int]] | None:
    """Number, start and length by id of the requests, which are copied into a file; None where they have no ids."""
    found: dict[str, tuple[int, int, int]] = {}
    at = 0
    for number, line in source.lines():
        key = key_of(line)
        if not key.readable:
            continue  # no reply finds it
        if key.name is None:
            if not found:
                return None
            raise SourceError(f"{source.name}, line {number}: this request has no id, those before it have")
        if key.name in found:
            before = found[key.name][0]
            says = f"line {before} has the same id {key.name!r}; make ids unique"
            raise SourceError(f"{source.name}, line {number}: {says}")
        found[key.name] = (number, at, len(line))
        held.write(line)
        at += len(line)
    return found or None


@dataclass(slots=True)
class _ById:
    """Finds the request of a reply by its id."""

    name: str
    held: BinaryIO
    index: dict[str, tuple[int, int, int]]

    def __call__(self, reply: bytes) -> Asked:
        found = self.index.get(key_of(reply).name or "")
        if found is None:
            return Asked(reply, self.name)
        number, start, length = found
        self.held.seek(start)
        return Asked(reply, f"{self.name}, line {number}", self.held.read(length))


@dataclass(slots=True)
class _InOrder:
    """Takes the next request for each reply."""

    name: str
    lines: Iterator[tuple[int, bytes]]
    replies: int = 0

    def __call__(self, reply: bytes) -> Asked:
        number, line = next(self.lines, (0, b""))
        if not number:
            raise SourceError(f"{self.name}: there are fewer requests than replies: {self.replies}; give one for each")
        self.replies += 1
        return Asked(reply, f"{self.name}, line {number}", line)

    def end(self) -> None:
        """Refuse requests without a reply."""
        if next(self.lines, None) is not None:
            raise SourceError(
                f"{self.name}: there are more requests than the {self.replies} replies, so it is not certain which "
                f"belong together; give both the same ids (custom_id), or only the requests that were answered"
            )
