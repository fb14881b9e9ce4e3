"""What an Arrow file or stream claims to hold, before Arrow decodes it and takes the memory on its word.

A compressed buffer says itself how large it becomes, the same bytes may be many buffers, and nulls take none at all.
The tables that are read here are those of Arrow's `Message.fbs` and `File.fbs`.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Final

from logitstore.convert.claims import ROW_BYTES, VALUE_BYTES, check_claim

_DICTIONARY: Final = 2
_BATCH: Final = 3
_TAIL_BYTES: Final = 10  # of a file: the footer's length and ARROW1
_START_BYTES: Final = 8  # of a message: continuation mark and the length of its metadata
_OLD_COMPRESSION: Final = b"ARROW:experimental_compression"  # a key of a message's metadata in Arrow 0.17
_BROKEN: Final = (struct.error, IndexError)


def check_arrow(path: Path, *, stream: bool) -> None:
    """Refuse a file that is out of all proportion to what it would become.

    Args:
        path: of the file, which Arrow has opened before.
        stream: whether it is a stream; a file has a footer.

    Raises:
        ValueError: it is such a one. What is damaged is left for Arrow to say.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        claimed = 0
        try:
            for start in _in_stream(data) if stream else _in_file(data):
                claimed += _claimed(data, start)
                check_claim(f"the message at byte {start}", claimed, len(data))
        except _BROKEN:
            return


def _in_stream(data: mmap.mmap) -> list[int]:
    """Where the messages of a stream start."""
    starts, at = [], 0
    while at + _START_BYTES <= len(data):
        mark, length = struct.unpack_from("<Ii", data, at)
        if mark != 0xFFFFFFFF or length <= 0:
            break
        starts.append(at)
        body = _field(data, _to(data, at + _START_BYTES), 3)
        at += _START_BYTES + length + (0 if body is None else max(0, struct.unpack_from("<q", data, body)[0]))
    return starts


def _in_file(data: mmap.mmap) -> list[int]:
    """Where the messages are that a file's footer names."""
    (length,) = struct.unpack_from("<i", data, len(data) - _TAIL_BYTES)
    footer = len(data) - _TAIL_BYTES - length
    table = _to(data, footer)
    blocks = (*_items(data, table, 2, 24), *_items(data, table, 3, 24))
    return [int(struct.unpack_from("<q", data, block)[0]) for block in blocks]


def _claimed(data: mmap.mmap, start: int) -> int:
    """Bytes that a message would become."""
    (mark,) = struct.unpack_from("<I", data, start)
    root = start + (_START_BYTES if mark == 0xFFFFFFFF else 4)  # before Arrow 0.15 there was no mark
    message = _to(data, root)
    kind, header = _field(data, message, 1), _field(data, message, 2)
    if kind is None or header is None or data[kind] not in (_DICTIONARY, _BATCH):
        return 0
    batch = _to(data, header)
    if data[kind] == _DICTIONARY:
        inner = _field(data, batch, 1)
        if inner is None:
            return 0
        batch = _to(data, inner)
    rows = _field(data, batch, 0)
    claimed = 0 if rows is None else ROW_BYTES * max(0, struct.unpack_from("<q", data, rows)[0])
    for node in _items(data, batch, 1, 16):
        claimed += VALUE_BYTES * max(0, struct.unpack_from("<q", data, node)[0])
    body = root + struct.unpack_from("<i", data, root - 4)[0]
    if _field(data, batch, 3) is None and _OLD_COMPRESSION not in data[root:body]:
        return claimed
    for buffer in _items(data, batch, 2, 16):
        offset, length = struct.unpack_from("<2q", data, buffer)
        if length > 0:
            claimed += max(0, struct.unpack_from("<q", data, body + offset)[0])
    return claimed


# Flatbuffers


def _to(data: mmap.mmap, place: int) -> int:
    """Where a reference leads."""
    return place + int(struct.unpack_from("<I", data, place)[0])


def _field(data: mmap.mmap, table: int, number: int) -> int | None:
    """Where a table's field is, or None when it has its default."""
    places = table - int(struct.unpack_from("<i", data, table)[0])
    size = struct.unpack_from("<H", data, places)[0]
    offset = struct.unpack_from("<H", data, places + 4 + 2 * number)[0] if 6 + 2 * number <= size else 0
    return table + int(offset) if offset else None


def _items(data: mmap.mmap, table: int, number: int, size: int) -> range:
    """Where the structs of a list are: not more than the file has room for."""
    field = _field(data, table, number)
    if field is None:
        return range(0)
    start = _to(data, field)
    count = struct.unpack_from("<I", data, start)[0]
    if start + 4 + count * size > len(data):
        raise IndexError("a list that is longer than the file")
    return range(start + 4, start + 4 + count * size, size)
