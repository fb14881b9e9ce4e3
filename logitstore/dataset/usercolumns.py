"""The users' columns: any Arrow type, declared or taken from the first chunk, then fixed."""

from __future__ import annotations

import copy
import sys
from typing import Any, Final

import numpy as np
import pyarrow as pa

from logitstore.errors import InvalidInputError
from logitstore.shard.chunk import RESERVED_NAMES, StoredSequence
from logitstore.shard.scalars import as_py
from logitstore.shard.usertypes import can_be_stored, plain

_TEXT, _INTEGER, _FLOAT, _TRUTH = pa.utf8(), pa.int64(), pa.float64(), pa.bool_()
_DECLARE: Final = "the type is that of the first chunk, unless declared with Writer(columns=pyarrow.schema(...))"


class UserColumns:
    """Names and types of a dataset's own columns, and their values as arrays.

    Args:
        declared: names and types; None takes them from the first chunk.

    Raises:
        InvalidInputError: a name that the format uses itself, or a type that cannot be stored.
    """

    def __init__(self, declared: pa.Schema | None) -> None:
        self._types: dict[str, pa.DataType] | None = None
        if declared is not None:
            for name in declared.names:
                _check_name(name)
            self._types = {field.name: _stored_type(field.name, field.type) for field in declared}

    def check(self, columns: dict[str, Any]) -> int:
        """Check the values of one sequence; about how many bytes they take.

        Raises:
            InvalidInputError: a name that cannot be used or was not declared, or a value of another type.
        """
        size = 0
        for name, value in columns.items():
            _check_name(name)
            size += _size(value)
            if self._types is None:
                continue
            if name not in self._types:
                raise InvalidInputError(
                    f"the column {name!r} was not there from the beginning; declare all columns with "
                    f"Writer(columns=pyarrow.schema(...))"
                )
            _check_value(name, value, self._types[name])
        return size

    def arrays(self, sequences: list[StoredSequence]) -> list[pa.Array]:
        """The columns of a chunk, in the order of `fields`; None where a sequence has no value.

        Raises:
            InvalidInputError: values without one common type.
        """
        if self._types is None:
            names = dict.fromkeys(name for sequence in sequences for name in sequence.columns)
            self._types = {name: _infer(name, sequences) for name in names}
        return [
            _as_array(name, [sequence.columns.get(name) for sequence in sequences], kind)
            for name, kind in self._types.items()
        ]

    def fields(self) -> list[pa.Field]:
        """Arrow fields of the columns."""
        return [pa.field(name, kind) for name, kind in (self._types or {}).items()]

    def resumed(self, fields: list[pa.Field]) -> UserColumns:
        """The columns of a writer that is gone on with.

        Args:
            fields: of its shards.

        Raises:
            InvalidInputError: others were declared.
        """
        if self._types is not None and self.fields() != fields:
            raise InvalidInputError(
                f"the columns declared are {self.types()}, and the shards that are there have {fields}"
            )
        return UserColumns(pa.schema(fields))

    def types(self) -> dict[str, str]:
        """Names and types, as the manifest says them."""
        return {name: str(kind) for name, kind in (self._types or {}).items()}


def own_values(columns: dict[str, Any]) -> dict[str, Any]:
    """A copy of the values: they are stored when the chunk closes, and the caller may have changed them by then.

    Raises:
        InvalidInputError: a value that cannot be copied, and so is no data.
    """
    try:
        return copy.deepcopy(columns)
    except (TypeError, copy.Error) as error:
        raise InvalidInputError(f"a value of the columns {', '.join(columns)} is no data ({error})") from error


def _check_name(name: str) -> None:
    if name in RESERVED_NAMES or not name:
        raise InvalidInputError(f"a column cannot be called {name!r}: the format uses this name; rename it")
    if not _is_unicode(name):
        raise InvalidInputError(f"a column cannot be called {name!r}: this is not valid Unicode; rename it")


def _infer(name: str, sequences: list[StoredSequence]) -> pa.DataType:
    values = [sequence.columns.get(name) for sequence in sequences]
    try:
        kind = pa.array(_plain_values(values)).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(
            f"sequences {sequences[0].id!r} to {sequences[-1].id!r}: the values of the column {name!r} have no common "
            f"Arrow type ({error}); declare it with Writer(columns=pyarrow.schema(...))"
        ) from error
    # A column of nothing but None says nothing about what comes later; text holds most of it.
    return pa.utf8() if pa.types.is_null(kind) else _stored_type(name, kind)


def _stored_type(name: str, kind: pa.DataType) -> pa.DataType:
    stored = plain(kind)
    if not can_be_stored(stored):
        raise InvalidInputError(
            f"the column {name!r} is of the type {kind}; unions, and extension types of dictionaries, views or runs, "
            f"cannot be stored: give plain values"
        )
    return stored


def _as_array(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        array = pa.array(_plain_values(values), kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(
            f"a value of the column {name!r} is not of its type {kind} ({error}); {_DECLARE}"
        ) from error
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _check_value(name: str, value: Any, kind: pa.DataType) -> None:
    """Refuse what cannot be stored as this type without loss: `pa.array` cuts 1.5 to 1 and drops unknown fields."""
    if _is_plainly(value, kind):
        return
    _as_array(name, [value], kind)
    try:
        natural = pa.array(_plain_values([value]))
        natural.cast(kind, safe=True)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return  # no cast to compare with, as for maps
    except (pa.ArrowInvalid, OverflowError) as error:
        raise InvalidInputError(
            f"a value of the column {name!r} does not fit its type {kind} ({error}); {_DECLARE}"
        ) from error
    if lost := _lost_fields(natural.type, kind):
        raise InvalidInputError(f"a value of the column {name!r} has the field {lost!r}, its type has not; {_DECLARE}")


def _is_plainly(value: Any, kind: pa.DataType) -> bool:
    """Whether a value fits its type beyond question: asking Arrow takes longer than all else of a short sequence."""
    if value is None:
        return True
    own = type(value)  # subclasses are Arrow's to judge
    if own is str:
        return bool(kind == _TEXT) and (value.isascii() or _is_unicode(value))
    if own is int:
        return bool(kind == _INTEGER) and -(2**63) <= value < 2**63
    return bool((own is float and kind == _FLOAT) or (own is bool and kind == _TRUTH))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lost_fields(natural: pa.DataType, kind: pa.DataType) -> str | None:
    """A field of a struct, at any depth, that the type does not have."""
    if pa.types.is_struct(natural) and pa.types.is_struct(kind):
        for i in range(natural.num_fields):
            field = natural.field(i)
            place = kind.get_field_index(field.name)
            if place < 0:
                return str(field.name)
            if lost := _lost_fields(field.type, kind.field(place).type):
                return lost
    if pa.types.is_list(natural) and hasattr(kind, "value_type"):
        return _lost_fields(natural.value_type, kind.value_type)
    return None


def _plain_values(values: list[Any]) -> list[Any]:
    """Values without numpy arrays of several dimensions and Arrow scalars, which `pa.array` does not take in lists."""
    return [
        as_py(value)
        if isinstance(value, pa.Scalar)
        else value.tolist()
        if isinstance(value, np.ndarray) and value.ndim != 1
        else value
        for value in values
    ]


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_size(item) + len(str(key)) for key, item in value.items())
    if isinstance(value, list | tuple):
        # The first items stand for all: measuring a long list must not cost more than storing it.
        head = value[:64]
        return len(value) * (sum(_size(item) for item in head) // max(1, len(head)) + 1)
    return sys.getsizeof(value) // 4
