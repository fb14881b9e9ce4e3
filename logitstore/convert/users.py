"""Users' columns on their way out of a dataset and into one: their types, values, and what other formats can hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from logitstore.dataset.reader import Dataset
from logitstore.dataset.shards import open_shard
from logitstore.errors import InvalidInputError
from logitstore.shard.scalars import as_py

_ERRORS = (pa.ArrowException, TypeError, ValueError, OverflowError)


def types_of(dataset: Dataset) -> dict[str, pa.DataType]:
    """The users' columns that a view has, and their types, which the shards alone say in full."""
    info = dataset.info
    names = [name for name in info.user_columns if name in dataset.columns]
    found: dict[str, pa.DataType] = {}
    for shard in info.shards if names else ():
        found |= {each.name: each.type for each in open_shard(dataset.store, shard, info).user_fields}
        if found.keys() >= set(names):
            break
    return {name: found.get(name, pa.utf8()) for name in names}


def split_for_parquet(types: dict[str, pa.DataType]) -> tuple[dict[str, pa.DataType], list[str]]:
    """The columns that Parquet holds, and a note on those that it does not, as intervals of months."""
    held = {name: kind for name, kind in types.items() if _parquet_holds(kind)}
    left = [f"{name} ({kind})" for name, kind in types.items() if name not in held]
    return held, [f"The columns {', '.join(left)} were left out: Parquet has no such type."] if left else []


def _parquet_holds(kind: pa.DataType) -> bool:
    import pyarrow.parquet as pq  # noqa: PLC0415 - takes a while, and few need it

    try:
        pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([("column", kind)])).close()
    except _ERRORS:
        return False
    return True


def unwritten(table: pa.Table, error: pa.ArrowException) -> InvalidInputError:
    """The error for a table that Parquet did not take, naming the column: a value may be too large for its type."""
    import pyarrow.parquet as pq  # noqa: PLC0415 - takes a while, and few need it

    for name in table.schema.names:
        try:
            pq.write_table(table.select([name]), pa.BufferOutputStream())
        except _ERRORS as own:
            return InvalidInputError(f"Parquet cannot hold the values of the column {name!r} ({own}); leave it out")
    return InvalidInputError(f"Parquet cannot hold these sequences ({error})")


def array_of(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values of a column, as a reader hands them out.

    Raises:
        InvalidInputError: one is of another type.
    """
    try:
        array = pa.array([storable(value) for value in values], kind)
    except _ERRORS as error:
        raise InvalidInputError(f"the column {name!r} is not {kind} in every shard ({error})") from error
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def storable(value: Any) -> Any:
    """A value that Arrow takes for its type again, whatever Python can hold: times that it cannot become integers."""
    if not isinstance(value, pa.Scalar):
        return value
    if isinstance(value, pa.ExtensionScalar | pa.DictionaryScalar):
        return storable(value.value)
    try:
        return as_py(value)
    except (*_ERRORS, KeyError):
        return _parts(value, storable, lambda leaf: leaf.value)


def imported(value: Any) -> Any:
    """A cell of a table as the column of a sequence: an int above 2^63 would be of no Arrow type by itself."""
    found = storable(value)
    if isinstance(value, pa.UInt64Scalar) and found is not None:
        return np.uint64(found)
    if isinstance(found, list) and isinstance(value, pa.Scalar) and None not in found:
        inner = getattr(getattr(value.type, "storage_type", value.type), "value_type", None)
        return np.array(found, np.uint64) if inner == pa.uint64() else found
    return found


def json_of(value: Any) -> Any:
    """What JSON holds of a value that msgspec does not know: the texts of times that Python cannot hold."""
    if not isinstance(value, pa.Scalar):
        return str(value)
    try:
        return as_py(value)
    except (*_ERRORS, KeyError):
        return _parts(value, json_of, _text)


def _parts(value: pa.Scalar, each: Any, leaf: Any) -> Any:
    """A value taken apart as far as Python can go."""
    if isinstance(value, pa.StructScalar):
        return {name: each(part) for name, part in value.items()}
    if isinstance(value, pa.MapScalar):
        return [(each(entry["key"]), each(entry["value"])) for entry in value.values]
    if isinstance(value, pa.ListScalar):
        return [each(part) for part in value.values]
    return leaf(value)


def _text(value: pa.Scalar) -> str:
    try:
        text = str(value.cast(pa.string()).as_py())
    except pa.ArrowException:
        text = "<"
    return str(value.value) if text.startswith("<") else text  # as `<value out of range: ...>`


def size_of(value: Any) -> int:
    """About how many bytes a value takes in memory."""
    if isinstance(value, str | bytes):
        return len(value) + 4
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        head = value[:64]  # the first ones stand for all
        return len(value) * (sum(map(size_of, head)) // max(1, len(head)) + 1)
    return 8
