"""What a Parquet file claims to hold, before Arrow decodes it and takes the memory on its word.

A page says itself how large it becomes and how many values it holds; a run of equal values is a few bytes however long
it is, and equal texts are stored once. Arrow decompresses a page whole, and decodes a row whole, which may be all of a
column of lists.

Arrow's own metadata are not asked: on damaged statistics they end the process (seen with pyarrow 26).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from logitstore.convert.claims import FREE_BYTES, ROW_BYTES, check_claim

_DEPTH: Final = 24  # of structs and lists: the format's own go to about 10
_LEVELS_BYTES: Final = 8  # of a value under a list: its repetition and definition, and offsets

# Numbers of Parquet's enumerations.
_WIDTHS: Final = (1, 4, 8, 12, 4, 8, 4)  # by physical type: BOOLEAN to BYTE_ARRAY, whose texts are counted apart
_BYTE_ARRAY: Final = 6
_FIXED_LEN_BYTE_ARRAY: Final = 7
_REPEATED: Final = 2
_DICTIONARY_PAGE: Final = 2
_EXPANDING: Final = (2, 7, 8)  # PLAIN_DICTIONARY, DELTA_BYTE_ARRAY, RLE_DICTIONARY
_DELTA_BYTE_ARRAY: Final = 7
_CODECS: Final = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_SCANNED: Final = 2**20  # entries of a dictionary; every vocabulary has fewer


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A column as it is stored.

    Attributes:
        top: the column of the table that it is of.
        kind: physical type.
        width: bytes of a value.
        repeated: whether it is under a list.
    """

    top: str
    kind: int
    width: int
    repeated: bool


class Claims:
    """What the row groups of a file claim together, as they are read one after another.

    Args:
        path: of the file, which Arrow has opened before.

    Raises:
        ValueError: its footer is damaged.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._claimed = 0
        try:
            (length,) = struct.unpack_from("<I", self._data, len(self._data) - 8)
            footer, _ = _struct(self._data, max(0, len(self._data) - 8 - length), 0)
            self._leaves = _leaves(footer[2])
            self._groups: list[dict[int, Any]] = footer[4]
        except _BROKEN as error:
            raise ValueError(f"the footer cannot be read: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._data.close()

    def check(self, number: int, columns: list[str]) -> None:
        """Refuse a row group that is out of all proportion to the file, with those that were read before it.

        Raises:
            ValueError: it is such a one, or it is damaged.
        """
        try:
            group = self._groups[number]
            rows = group[3]
            for leaf, chunk in zip(self._leaves, group[1], strict=True):
                if not any(leaf.top == name or leaf.top.startswith(f"{name}.") for name in columns):
                    continue
                values = chunk[3][5]
                if leaf.repeated:
                    self._claimed += values * (leaf.width + _LEVELS_BYTES)
                else:
                    rows = max(rows, values)
                self._pages(chunk[3], leaf)
            self._claimed += rows * ROW_BYTES
        except (*_BROKEN, pa.ArrowException) as error:
            raise ValueError(f"the pages of row group {number} cannot be read: {error}") from error
        check_claim(f"row group {number}", self._claimed, len(self._data))

    def _pages(self, chunk: dict[int, Any], leaf: _Leaf) -> None:
        """Add what the pages of a column claim; a text that is stored once may occur at every place."""
        at, left = min(chunk[9], chunk.get(11) or chunk[9]), chunk[5]
        longest = expanding = 0
        while left > 0:
            header, body = _struct(self._data, at, 0)
            kind, size, at = header[1], header[2], body + header[3]
            if at < body or size < 0:
                raise ValueError("a page is smaller than nothing")
            self._claimed += size
            page, encoding = header.get(5) or header.get(8), 0
            if page is not None:
                encoding = page[2 if 5 in header else 4]
                left -= page[1]
                expanding += page[1] if encoding in _EXPANDING else 0
                if page[1] < 0 or left < 0:
                    raise ValueError("the pages hold more values than the column has")
            if kind == _DICTIONARY_PAGE or encoding == _DELTA_BYTE_ARRAY:
                entries = header[7][1] if kind == _DICTIONARY_PAGE else None
                longest = max(longest, self._longest(chunk, leaf, size, entries, slice(body, at)))
        self._claimed += expanding * longest

    def _longest(self, chunk: dict[int, Any], leaf: _Leaf, size: int, entries: int | None, body: slice) -> int:
        """Bytes of the longest text in a page: exactly where it is a dictionary whose size alone would refuse it."""
        if leaf.kind != _BYTE_ARRAY:
            return leaf.width if leaf.kind == _FIXED_LEN_BYTE_ARRAY else 0
        if entries is None or entries > _SCANNED or chunk[5] * size <= FREE_BYTES or size > FREE_BYTES:
            return size
        data: Any = self._data[body]
        if chunk[4]:
            if chunk[4] not in _CODECS:
                return size
            data = pa.decompress(data, size, _CODECS[chunk[4]], asbytes=True)
        at = longest = 0
        for _ in range(entries):
            (length,) = struct.unpack_from("<I", data, at)
            longest, at = max(longest, length), at + 4 + length
        return min(longest, size)


_BROKEN: Final = (struct.error, IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError)


def _leaves(elements: list[dict[int, Any]]) -> list[_Leaf]:
    """The leaves of a schema, which is a tree in depth-first order."""
    leaves: list[_Leaf] = []
    open_: list[tuple[int, bool]] = [(elements[0].get(5, 0), False)]  # children that are to come, under a list
    top = ""
    for element in elements[1:]:
        while open_ and open_[-1][0] == 0:
            open_.pop()
        left, inside = open_.pop()
        open_.append((left - 1, inside))
        top = bytes(element[4]).decode() if len(open_) == 1 else top
        inside = inside or element.get(3) == _REPEATED
        if element.get(5):
            open_.append((element[5], inside))
            continue
        kind = element[1]
        width = element.get(2, 0) if kind == _FIXED_LEN_BYTE_ARRAY else _WIDTHS[kind]
        leaves.append(_Leaf(top, kind, width, inside))
    return leaves


# Thrift's compact protocol


def _struct(data: mmap.mmap, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """(fields by number, where it ends) of a struct."""
    if depth > _DEPTH:
        raise ValueError("too deep")
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        kind = head & 15
        if kind in (1, 2):
            fields[number] = kind == 1
        else:
            fields[number], at = _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: mmap.mmap, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 8:
        length, at = _varint(data, at)
        if length > len(data) - at:
            raise ValueError("a text is longer than the file")
        return data[at : at + length], at + length
    if kind in (9, 10):
        return _list(data, at, depth)
    if kind == 12:
        return _struct(data, at, depth + 1)
    if kind in (1, 2, 3):
        return data[at], at + 1
    if kind == 7:
        return data[at : at + 8], at + 8
    raise ValueError(f"no type {kind}")


def _list(data: mmap.mmap, at: int, depth: int) -> tuple[list[Any], int]:
    if depth > _DEPTH:
        raise ValueError("too deep")
    count, kind = data[at] >> 4, data[at] & 15
    at += 1
    if count == 15:
        count, at = _varint(data, at)
    values = []
    for _ in range(count):
        value, at = _value(data, at, kind, depth + 1)
        values.append(value)
    return values, at


def _integer(data: mmap.mmap, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
