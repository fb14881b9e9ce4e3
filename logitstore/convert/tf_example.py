"""Messages of `tf.train.Example`: a dictionary of flat lists of numbers, read from their bytes.

The few fields of the wire format that such a message has are read here, numbers by numpy: the package protobuf would
make one Python object of each of them, and brings no definition of this message.

    Example{1: Features{1: repeated entry{1: name, 2: Feature{2: FloatList | 3: Int64List}}}}, both lists{1: values}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import SourceError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES: Final = 10
_FLOATS, _INTEGERS = 2, 3


def read_example(data: bytes) -> dict[str, NDArray[Any]]:
    """The lists of numbers of a message by name, int64 or float32; lists of bytes are left out.

    Raises:
        SourceError: it is cut off, or no such message.
    """
    found: dict[str, NDArray[Any]] = {}
    for features in _messages(data, 1):
        for entry in _messages(features, 1):
            names, values = list(_messages(entry, 1)), list(_messages(entry, 2))
            if len(names) != 1 or len(values) != 1:
                raise SourceError("a feature without a name or a value")
            try:
                name = bytes(names[0]).decode()
            except UnicodeDecodeError as error:
                raise SourceError(f"the name of a feature is no text ({error})") from error
            if name in found:
                raise SourceError(f"the feature {name} stands there twice")
            for number, kind, value in _fields(values[0]):
                if number in (_FLOATS, _INTEGERS) and kind == _BYTES:
                    found[name] = _numbers(value, floats=number == _FLOATS)
    return found


def _messages(data: bytes | memoryview, number: int) -> Iterator[memoryview]:
    """The fields of this number, which are messages or text."""
    for found, kind, value in _fields(data):
        if found == number:
            if kind != _BYTES:
                raise SourceError(f"the field {number} is of another type than in tf.train.Example")
            yield value


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(number, wire type, bytes) of each field."""
    view, at = memoryview(data), 0
    while at < len(view):
        tag, at = _varint(view, at)
        number, kind = tag >> 3, tag & 7
        size, start = 0, at
        if kind == _BYTES:
            size, start = _varint(view, at)
        elif kind == _VARINT:
            size = _varint(view, at)[1] - at
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise SourceError(f"no tf.train.Example: the wire type {kind}")
        at = start + size
        if number == 0 or at > len(view):
            raise SourceError("no whole tf.train.Example: a field is longer than the message")
        yield number, kind, view[start:at]


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """(number, where the next byte stands)."""
    value = 0
    for step, byte in enumerate(view[at : at + _VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * step)
        if byte < 0x80:
            return value, at + step + 1
    raise SourceError("no whole tf.train.Example: a number is cut off")


def _numbers(data: memoryview, *, floats: bool) -> NDArray[Any]:
    """The values of a list, packed as writers have them, or one by one as readers must take them too."""
    parts = []
    for number, kind, value in _fields(data):
        if number != 1:
            continue
        if floats and kind in (_BYTES, _FIXED32) and len(value) % 4 == 0:
            parts.append(np.frombuffer(value, "<f4"))
        elif not floats and kind in (_BYTES, _VARINT):
            parts.append(_varints(value))
        else:
            raise SourceError("a list of numbers holds something else")
    return np.concatenate(parts) if parts else np.empty(0, np.float32 if floats else np.int64)


def _varints(data: memoryview) -> NDArray[np.int64]:
    """All numbers of packed varints."""
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array < 0x80)
    if len(array) and (len(ends) == 0 or ends[-1] != len(array) - 1):
        raise SourceError("a list of integers is cut off")
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    length = ends - starts + 1
    if len(length) and int(length.max()) > _VARINT_BYTES:
        raise SourceError("an integer of more than 64 bits")
    values = np.zeros(len(ends), np.uint64)
    for step in range(int(length.max(initial=0))):
        longer = length > step
        part = (array[starts[longer] + step] & 0x7F).astype(np.uint64)
        values[longer] |= part << np.uint64(7 * step)
    return values.view(np.int64)
