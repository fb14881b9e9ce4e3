"""JSON lines: the pieces of every format that has one JSON object a line."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from logitstore.convert.base import Import, Parse, Record
from logitstore.convert.source import Input
from logitstore.errors import LogitStoreError, SourceError

JSONL: Final = ("*.jsonl", "*.jsonl.zst", "*.jsonl.gz", "*.ndjson", "*.ndjson.zst", "*.ndjson.gz")
"""Names of files of JSON lines."""

_NO_NUMBER: Final = re.compile(rb"[\[:,]\s*-?(NaN|Infinity)\b")
_PIECE_BYTES: Final = 2**20  # enough that handing it to another process costs little
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Lines:
    """Some lines of a file.

    Attributes:
        name: of the file.
        first: number of the first record in the whole input, from 0.
        lines: (number of the line from 1, its bytes).
    """

    name: str
    first: int
    lines: list[tuple[int, bytes]]

    def records(self) -> Iterator[Record]:
        """One record a line."""
        for at, (number, line) in enumerate(self.lines):
            yield Record(f"{self.name}, line {number}", self.first + at, line)


def read_lines(inputs: list[Input], parse: Parse, **fields: Any) -> Import:
    """An import of inputs with one record a line.

    Args:
        inputs: the inputs.
        parse: makes items of a record whose `data` is a line's bytes.
        **fields: further fields of `Import`.
    """
    return Import(pieces=_pieces(inputs), parse=parse, **progress(inputs), **fields)


def progress(inputs: list[Input]) -> dict[str, Any]:
    """The fields of `Import` that say how far its inputs are read."""
    sizes = [source.size for source in inputs]
    return {
        "done": lambda: sum(source.done() for source in inputs),
        "total": None if None in sizes else sum(size or 0 for size in sizes),
    }


def _pieces(inputs: list[Input]) -> Iterator[Lines]:
    first = 0
    for source in inputs:
        held: list[tuple[int, bytes]] = []
        size = 0
        for number, line in source.lines():
            if held and size + len(line) > _PIECE_BYTES:
                yield Lines(source.name, first, held)
                first, held, size = first + len(held), [], 0
            held.append((number, line))
            size += len(line)
        if held:
            yield Lines(source.name, first, held)
            first += len(held)


def first_line(source: Input) -> bytes:
    """The first line of an input as far as its head goes, for `recognises`; empty where it cannot be read."""
    try:
        head = source.head()
    except (LogitStoreError, OSError):
        return b""
    return head.removeprefix(BOM_UTF8).lstrip().split(b"\n", 1)[0]


def has_keys(source: Input, *keys: str) -> bool:
    """Whether the head of an input's first line is an object with all these keys, at any depth.

    Inside a text the quotes of a key would be escaped.
    """
    line = first_line(source)
    return line.startswith(b"{") and all(re.search(rb'"%s"\s*:' % key.encode(), line) for key in keys)


def decode(decoder: msgspec.json.Decoder[_T], line: bytes | msgspec.Raw, what: str) -> _T:
    """Parse JSON.

    Args:
        decoder: of the type that it has.
        line: the JSON.
        what: what it should be, for the message: `reply of /completion`.

    Raises:
        SourceError: it is something else; the message names the field.
    """
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise SourceError(f"no whole {what} ({error}); {_advice(bytes(line), str(error))}") from error


def _advice(line: bytes, says: str) -> str:
    """What to do about a line that is not the JSON that it should be."""
    if line.strip() == b"[" or says.endswith("got `array`"):  # elsewhere than at its root the message goes on
        return "a JSON array? Write one object a line (jq -c '.[]')"
    if says.startswith("JSON is malformed") and _NO_NUMBER.search(line):
        return "JSON has no NaN or Infinity, as Python writes them: write null"
    return "capture it again, or repair the line"
