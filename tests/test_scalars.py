"""Arrow's values as Python has them: nanoseconds are kept or refused, never dropped, with pandas and without."""

import datetime as dt
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from logitstore.shard.scalars import as_py, numbers

NANOSECONDS = [pa.timestamp("ns"), pa.timestamp("ns", "UTC"), pa.duration("ns"), pa.time64("ns")]


def nested(kind, value):
    plain = pa.array([value], pa.int64()).cast(kind)
    lists = pa.ListArray.from_arrays(pa.array([0, 1]), plain)
    return [
        plain[0],
        lists[0],
        pa.StructArray.from_arrays([lists, plain], ["a", "b"])[0],
        lists.cast(pa.large_list(kind))[0],
    ]


@pytest.mark.parametrize("kind", NANOSECONDS, ids=str)
def test_nanoseconds(kind):
    for value in nested(kind, 1001):
        with pytest.raises(ValueError, match="lose data"):
            as_py(value)
    for value in nested(kind, 3000):
        found = as_py(value)
        while isinstance(found, (list, dict)):
            found = found[0] if isinstance(found, list) else found["b"]
        assert type(found).__module__ == "datetime"
        assert getattr(found, "microsecond", None) == 3 or found == dt.timedelta(microseconds=3)


@pytest.mark.parametrize("value", [None, 3, "text", [1, None], {"a": [2.5]}, True, b"bytes", dt.date(2020, 1, 2)])
def test_everything_else_is_as_arrow_gives_it(value):
    assert as_py(pa.scalar(value)) == value


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "float32"])
def test_numbers_of_slices_are_those_of_arrow(dtype):
    column = pa.array(np.arange(20), dtype)
    for part in (column, column[3:], column[3:9], column[4:4], pa.array([], dtype)):
        found = numbers(part, np.dtype(dtype))
        assert found.dtype == dtype
        assert found.tolist() == part.to_pylist()


def test_reading_does_without_pandas(write):
    """Also where it is installed: pyarrow would import it."""
    code = f"""
import sys, logitstore
assert logitstore.open({str(write())!r})[0].ids.size
sys.exit("pandas" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
