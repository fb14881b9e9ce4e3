"""The Arrow types of users' columns, and how many values a few bytes may stand for (spec, "Schema message")."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

_is = pa.types

FREE_VALUES_PER_BYTE = 8
"""So many values that take no bytes of their own may a message hold for each of its bytes: bits take as few."""


def plain(kind: pa.DataType) -> pa.DataType:  # noqa: PLR0911 - one line for each nested type
    """The type that values of this one are stored as: without dictionaries, runs and views at any depth.

    A stream's dictionaries would have to be read before any chunk. Views may overlap and runs are as long as they say:
    a few bytes of either could stand for gigabytes.
    """
    if _is.is_dictionary(kind) or _is.is_run_end_encoded(kind):
        return plain(kind.value_type)
    if _is.is_string_view(kind):
        return pa.utf8()
    if _is.is_binary_view(kind):
        return pa.binary()
    if _is.is_struct(kind):
        return pa.struct([kind.field(i).with_type(plain(kind.field(i).type)) for i in range(kind.num_fields)])
    if _is.is_map(kind):
        return pa.map_(plain(kind.key_type), plain(kind.item_type))
    if _is.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(plain(kind.value_type)), kind.list_size)
    if _is.is_large_list(kind) or _is.is_large_list_view(kind):
        return pa.large_list(kind.value_field.with_type(plain(kind.value_type)))
    if _is.is_list(kind) or _is.is_list_view(kind):
        return pa.list_(kind.value_field.with_type(plain(kind.value_type)))
    return kind


def can_be_stored(kind: pa.DataType) -> bool:
    """Whether a user's column may be of this type: no dictionary, run-end encoding, view or union at any depth."""
    refused = (
        _is.is_dictionary,
        _is.is_run_end_encoded,
        _is.is_string_view,
        _is.is_binary_view,
        _is.is_list_view,
        _is.is_large_list_view,
        _is.is_union,  # a dense one may name the same value again and again
    )
    return not any(is_one(kind) for is_one in refused) and all(map(can_be_stored, _inner_types(kind)))


def free_values(array: pa.Array) -> int:
    """How many values in an array, at any depth, take no bytes: null, structs and lists of nothing, no bytes.

    Nothing but their number bounds what they become in Python: 2^31 of them take as much of a message as one.
    """
    kind = array.type
    size = kind.list_size if _is.is_fixed_size_list(kind) else None
    width = kind.byte_width if _is.is_fixed_size_binary(kind) else None
    nothing = _is.is_null(kind) or (_is.is_struct(kind) and kind.num_fields == 0) or size == 0 or width == 0
    return len(array) * nothing + sum(map(free_values, _inner(array)))


def _inner_types(kind: pa.DataType) -> list[pa.DataType]:
    if isinstance(kind, pa.BaseExtensionType):
        return [kind.storage_type]
    return [kind.field(i).type for i in range(kind.num_fields)]


def _inner(array: pa.Array) -> Iterator[pa.Array]:
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        yield array.storage
    elif _is.is_struct(kind):
        yield from (array.field(i) for i in range(kind.num_fields))
    elif _is.is_map(kind):
        yield from (array.keys, array.items)
    elif _is.is_nested(kind):
        yield array.values
