"""Arrow's values as Python and numpy have them: without pandas, which pyarrow imports where it is installed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def as_py(value: pa.Scalar) -> Any:
    """A value as Python has it.

    pyarrow's own `as_py` gives nanoseconds as pandas' types where pandas can be imported, and drops those of times of
    day; without pandas it refuses them. Here they are refused, unless microseconds hold them.

    Raises:
        ValueError: Python has no such value: nanoseconds, dates beyond year 9999 (also as `pa.ArrowInvalid`).
    """
    whole = _in_microseconds(value.type)
    return (value if whole == value.type else value.cast(whole)).as_py()


def as_python(value: pa.Scalar) -> Any:
    """A user's value as Python has it; as Arrow has it where Python cannot: nanoseconds, dates beyond year 9999."""
    try:
        return as_py(value)
    except (pa.ArrowException, ValueError, ArithmeticError, KeyError, TypeError, OSError):  # OSError: a time zone's
        return value


def numbers(column: pa.Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values of a column of numbers without nulls, not copied. pyarrow's `to_numpy` would import pandas.

    Args:
        column: validated, of the type that `dtype` says.
        dtype: of numpy.
    """
    if len(column) == 0:
        return np.empty(0, dtype)
    return np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * dtype.itemsize)


@functools.lru_cache(maxsize=256)
def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    """The type with microseconds wherever it has nanoseconds."""
    is_ = pa.types
    if getattr(kind, "unit", None) == "ns":
        in_time = pa.time64("us") if is_.is_time64(kind) else pa.duration("us")
        return pa.timestamp("us", kind.tz) if is_.is_timestamp(kind) else in_time
    if is_.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pa.struct([field.with_type(_in_microseconds(field.type)) for field in fields])
    if is_.is_map(kind):
        return pa.map_(_in_microseconds(kind.key_type), _in_microseconds(kind.item_type))
    if is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind):
        inner = kind.value_field.with_type(_in_microseconds(kind.value_type))
        small = pa.list_(inner, kind.list_size) if is_.is_fixed_size_list(kind) else pa.list_(inner)
        return pa.large_list(inner) if is_.is_large_list(kind) else small
    return kind
