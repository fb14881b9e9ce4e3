"""What Arrow does not let one ask of a message: its kind, its length, whether it is compressed, and its own metadata.

A compressed buffer says itself how long it is, and Arrow takes that much memory: 34 KB of zstd become 4 GB. A part of a
message may stand in it once and be named often, and Arrow copies it as often.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Any, Final

from logitstore.errors import CorruptDataError

_PREFIX: Final = struct.Struct("<iiI")  # continuation mark, bytes of metadata, place of the root table in them
_RECORD_BATCH: Final = 3
_METADATA_KEYS: Final = 64
_WITH_LENGTHS: Final = (10, 14)  # timestamps have a zone, unions a list of numbers


def check_message(data: Any) -> None:
    """Refuse anything but one record batch that is not compressed (Arrow's `Message.fbs`).

    Raises:
        CorruptDataError: something else, or another length.
    """
    view = memoryview(data).cast("B")
    try:
        mark, metadata_bytes, root = _PREFIX.unpack_from(view)
        message = 8 + root
        kind, header, body = (_field(view, message, number) for number in (1, 2, 3))
        if mark != -1 or kind is None or view[kind] != _RECORD_BATCH or header is None:
            raise CorruptDataError("the chunk's message is no record batch", code="chunk-message")
        body_bytes = 0 if body is None else struct.unpack_from("<q", view, body)[0]
        compression = _field(view, header + struct.unpack_from("<I", view, header)[0], 3)
        keys = len(_list(view, message, 4))
    except (struct.error, IndexError) as error:
        raise CorruptDataError(f"the chunk's message is no Arrow message: {error}", code="chunk-message") from error
    if 8 + metadata_bytes + body_bytes != len(view):
        raise CorruptDataError("the chunk's message has another length than the index says", code="chunk-message")
    if keys > _METADATA_KEYS:
        # They may all be the same bytes of the message, and Arrow copies each.
        raise CorruptDataError(f"the chunk's message has {keys} keys in its metadata", code="chunk-message")
    if compression is not None:
        raise CorruptDataError("the chunk's message is compressed by Arrow", code="chunk-message")


def check_schema(data: Any) -> None:
    """Refuse a schema whose parts are named so often that they would become more than its bytes.

    Raises:
        CorruptDataError: it is such a one, or no Arrow message.
    """
    view = memoryview(data).cast("B")
    left = len(view)
    try:
        header = _field(view, 8 + _PREFIX.unpack_from(view)[2], 2)
        if header is None:
            return
        schema = header + struct.unpack_from("<I", view, header)[0]
        left -= _metadata_bytes(view, schema, 2, left)
        stack = [*_tables(view, schema, 1)]
        while stack and left >= 0:
            table = stack.pop()
            left -= 4 + _length(view, table, 0) + _metadata_bytes(view, table, 6, left)
            kind, inner = _field(view, table, 2), _field(view, table, 3)
            if kind is not None and inner is not None and view[kind] in _WITH_LENGTHS:
                left -= _length(view, inner + struct.unpack_from("<I", view, inner)[0], 1)
            children = _tables(view, table, 5)
            left -= len(children)
            if left >= 0:
                stack += children
    except (struct.error, IndexError) as error:
        raise CorruptDataError(f"the schema message is no Arrow message: {error}", code="shard-schema") from error
    if left < 0:
        raise CorruptDataError("the schema message names the same parts again and again", code="shard-schema")


def _metadata_bytes(view: memoryview, table: int, number: int, most: int) -> int:
    """Bytes of the keys and values of a table's metadata; where they are more than `most`, some number above that."""
    total = 0
    for entry in _tables(view, table, number):
        total += 4 + _length(view, entry, 0) + _length(view, entry, 1)
        if total > most:
            break
    return total


def _tables(view: memoryview, table: int, number: int) -> Collection[int]:
    """The tables in a field that is a list of them: not more than the message has room for."""
    places = _list(view, table, number)
    if len(places) > len(view) // 4:
        raise IndexError("a list that is longer than the message")
    return [place + struct.unpack_from("<I", view, place)[0] for place in places]


def _list(view: memoryview, table: int, number: int) -> range:
    """Where the references in a field that is a list of them are."""
    field = _field(view, table, number)
    if field is None:
        return range(0)
    start = field + struct.unpack_from("<I", view, field)[0]
    return range(start + 4, start + 4 + 4 * struct.unpack_from("<I", view, start)[0], 4)


def _length(view: memoryview, table: int, number: int) -> int:
    """Length of a field that is a text or a list; 0 where there is none."""
    field = _field(view, table, number)
    if field is None:
        return 0
    return int(struct.unpack_from("<I", view, field + struct.unpack_from("<I", view, field)[0])[0])


def own_metadata(data: Any, key: bytes) -> bytes | None:
    """The value of a key in a message's own metadata (`custom_metadata` of `Message.fbs`), or None.

    Raises:
        CorruptDataError: it is no Arrow message.
    """
    view = memoryview(data).cast("B")
    try:
        for place in _list(view, 8 + _PREFIX.unpack_from(view)[2], 4):
            table = place + struct.unpack_from("<I", view, place)[0]
            if _string(view, table, 0) == key:
                return _string(view, table, 1)
    except (struct.error, IndexError) as error:
        raise CorruptDataError(f"the chunk's message is no Arrow message: {error}", code="chunk-message") from error
    return None


def _string(view: memoryview, table: int, number: int) -> bytes | None:
    field = _field(view, table, number)
    if field is None:
        return None
    start = field + struct.unpack_from("<I", view, field)[0]
    length = struct.unpack_from("<I", view, start)[0]
    return bytes(view[start + 4 : start + 4 + length])


def _field(view: memoryview, table: int, number: int) -> int | None:
    """Where a table's field is, or None when it has its default."""
    places = table - int(struct.unpack_from("<i", view, table)[0])
    size = struct.unpack_from("<H", view, places)[0]
    offset = struct.unpack_from("<H", view, places + 4 + 2 * number)[0] if 6 + 2 * number <= size else 0
    return table + int(offset) if offset else None
