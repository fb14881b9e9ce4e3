"""Which columns of a table an import by `columns` keeps as the users' own, and of what types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any, Final

import msgspec
import pyarrow as pa

from logitstore.convert.base import Import
from logitstore.shard.usertypes import plain as without_dictionaries

_PEEKED: Final = 8  # pieces of JSON lines, by whose values the users' columns get their types
_ROW: Final = msgspec.json.Decoder(dict[str, Any])


def joint(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of several tables; one whose type is not the same in all has none."""
    types: dict[str, pa.DataType] = {}
    for field in chain.from_iterable(schemas):
        kind = without_dictionaries(
            field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
        )
        types[field.name] = kind if types.get(field.name, kind) == kind else pa.null()
    return pa.schema(list(types.items()))


def peeked(opened: Import) -> pa.Schema:
    """The columns of JSON lines, by the first pieces, which are then read again."""
    first = list(islice(opened.pieces, _PEEKED))
    opened.pieces = chain(first, opened.pieces)
    values: dict[str, list[Any]] = {}
    for record in chain.from_iterable(piece.records() for piece in first):
        try:
            row = _ROW.decode(record.data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            continue  # it fails when its turn comes
        for name, value in row.items():
            values.setdefault(name, []).append(value if _is_simple(value) else {})
    return pa.schema([(name, _type_of(listed)) for name, listed in values.items()])


def _is_simple(value: Any) -> bool:
    """Whether a value is a scalar, a text, or a list of such."""
    return not isinstance(value, dict) and not (
        isinstance(value, list) and any(isinstance(each, dict | list) for each in value)
    )


def _type_of(values: list[Any]) -> pa.DataType:
    """The type of a JSON column; null where there is none that can be kept."""
    try:
        kind = pa.array(values).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.null()
    if pa.types.is_null(kind):
        return pa.utf8()  # text holds most of what may come later
    return pa.list_(pa.utf8()) if kind == pa.list_(pa.null()) else kind


def further(schema: pa.Schema, names: Mapping[str, str], taken: frozenset[str]) -> tuple[pa.Schema, list[str]]:
    """The further columns that are kept, and notes on those that are not."""
    others = [field for field in schema if field.name not in names.values()]
    ours = [field.name for field in others if field.name in taken or not field.name]
    kept = [field for field in others if field.name not in ours and _is_kept(field.type)]
    other = [field.name for field in others if field.name not in ours and field not in kept]
    notes = []
    if ours:
        notes.append(f"The columns {', '.join(ours)} were left out: the format itself uses these names.")
    if other:
        notes.append(f"The columns {', '.join(other)} were left out: only scalars, texts and plain lists are kept.")
    return pa.schema([(field.name, field.type) for field in kept]), notes


def _is_kept(kind: pa.DataType, *, inside: bool = False) -> bool:
    """Whether a column is kept: scalars, texts, and lists and structs of such; lists of lists are candidates mostly."""
    of = pa.types
    if of.is_list(kind) or of.is_large_list(kind) or of.is_fixed_size_list(kind):
        return not inside and _is_kept(kind.value_type, inside=not of.is_struct(kind.value_type))
    if of.is_struct(kind):
        return bool(kind.num_fields) and all(_is_kept(kind.field(i).type) for i in range(kind.num_fields))
    return not (of.is_null(kind) or of.is_nested(kind) or isinstance(kind, pa.BaseExtensionType | pa.RunEndEncodedType))
