"""Users' columns: what is taken without asking Arrow, and what Arrow is asked about."""

import math

import numpy as np
import pyarrow as pa
import pytest

from logitstore.dataset import usercolumns
from logitstore.dataset.usercolumns import UserColumns
from logitstore.errors import InvalidInputError

KINDS = [pa.utf8(), pa.large_utf8(), pa.binary(), pa.int64(), pa.int32(), pa.float64(), pa.float32(), pa.bool_()]
VALUES = [
    None, "", "a", "\u00e9\u4e2d", "half \ud800", True, False, 0, -1, 2**31, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1,
    0.0, 1.5, math.inf, math.nan, b"a", [1], {"a": 1}, np.float64(1.5), np.int64(3), np.str_("x"), np.bool_(True),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_is_taken_without_asking_arrow_is_stored_as_it_is(kind, value):
    if not usercolumns._is_plainly(value, kind):
        return
    (found,) = pa.array([value], kind).to_pylist()
    assert type(found) is type(value)
    assert found == value or math.isnan(value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("a", pa.utf8()), (7, pa.int64()), (1.5, pa.float64()), (True, pa.bool_()), (None, pa.int32())],
)
def test_plain_values_are_not_put_to_arrow(monkeypatch, value, kind):
    """Most columns are such, and Arrow would take longer than all else of a short sequence."""
    columns = UserColumns(pa.schema([("a", kind)]))
    monkeypatch.setattr(usercolumns, "_as_array", None)
    columns.check({"a": value})


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("half \ud800", pa.utf8()),
        (2**63, pa.int64()),
        (True, pa.int64()),
        (1, pa.utf8()),
        (1.5, pa.int64()),
        ("1", pa.int64()),
        (2**31, pa.int32()),
        (b"\xff", pa.utf8()),
    ],
)
def test_values_of_another_type_are_refused(value, kind):
    with pytest.raises(InvalidInputError, match="column 'a'"):
        UserColumns(pa.schema([("a", kind)])).check({"a": value})
