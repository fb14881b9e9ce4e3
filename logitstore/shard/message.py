"""What Arrow does not let one ask of a message: its kind, its length, whether it is compressed, and its own metadata.

A compressed buffer says itself how long it is, and Arrow takes that much memory: 34 KB of zstd become 4 GB.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from logitstore.errors import CorruptDataError

_PREFIX: Final = struct.Struct("<iiI")  # continuation mark, bytes of metadata, place of the root table in them
_RECORD_BATCH: Final = 3


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
    except (struct.error, IndexError) as error:
        raise CorruptDataError(f"the chunk's message is no Arrow message: {error}", code="chunk-message") from error
    if 8 + metadata_bytes + body_bytes != len(view):
        raise CorruptDataError("the chunk's message has another length than the index says", code="chunk-message")
    if compression is not None:
        raise CorruptDataError("the chunk's message is compressed by Arrow", code="chunk-message")


def own_metadata(data: Any, key: bytes) -> bytes | None:
    """The value of a key in a message's own metadata (`custom_metadata` of `Message.fbs`), or None.

    Raises:
        CorruptDataError: it is no Arrow message.
    """
    view = memoryview(data).cast("B")
    try:
        entries = _field(view, 8 + _PREFIX.unpack_from(view)[2], 4)
        if entries is None:
            return None
        vector = entries + struct.unpack_from("<I", view, entries)[0]
        for number in range(struct.unpack_from("<I", view, vector)[0]):
            place = vector + 4 + 4 * number
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
