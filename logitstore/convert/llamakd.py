"""`llamakd`: the layout of the LlamaKD dataset, the best 32 of Llama-3.1-405B on FineWeb-Edu.

`inputs` [T] are tokens; `targets` [T, 2, K] holds in one array of floats the logprobs and the ids of the candidates.
Which of the two comes first is seen from the numbers: ids are whole and not negative, logprobs not above 0. Rows are
taken as the forward pass that made them gives them, row t predicting inputs[t + 1]; `--alignment` overrules that.
Texts are padded on the left, and the padding has rows too. `line_number` is kept as a column.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Alignment, Import, Importer, Item, Options, Record, Tally, ready
from logitstore.convert.beside import check_normalised, count_whole, row_of
from logitstore.convert.lines import first_line
from logitstore.convert.rows import Rows, without_zeros
from logitstore.convert.source import Input
from logitstore.convert.tables import TABLES, numbers, plain, present, read_tables, schema_of, table_kind
from logitstore.errors import LogitStoreError, SourceError
from logitstore.limits import PROBABILITY_SLACK

_TARGETS: Final = pa.list_(pa.list_(pa.list_(pa.float64())))
_JSON_TARGETS: Final = re.compile(rb'"targets"\s*:\s*\[\s*\[\s*\[\s*-?[0-9]')
_EXACT: Final = {"halffloat": 2**11, "float": 2**24, "double": 2**53}
"""Whole numbers below this are exact in these types of Arrow."""


_ALIGNED: Final = {
    "next": "Row t is taken to predict inputs[t + 1], as a forward pass gives it (--alignment same if it does not).",
    "same": "Row t is taken to be about inputs[t] itself, as --alignment says; row 0 is left out.",
}
_NORMALISED_NOTE: Final = "The logprobs are taken to be normalised over the whole vocabulary, at temperature 1."
_PADDED_NOTE: Final = "{n} sequences begin with one token again and again, perhaps padding; it and its rows are kept."


def _recognises(source: Input) -> bool:
    try:
        if table_kind(source) == "json":
            line = first_line(source)
            return line.startswith(b"{") and b'"inputs"' in line and bool(_JSON_TARGETS.search(line))
        schema = schema_of(source)
    except (LogitStoreError, OSError):
        return False
    if not {"inputs", "targets"} <= set(schema.names):
        return False
    kind = schema.field("targets").type
    for _ in range(3):
        kind = getattr(kind, "value_type", None)
    return kind is not None and bool(pa.types.is_floating(kind))


def _read(inputs: list[Input], options: Options) -> Import:
    alignment = options.alignment or "next"
    opened = read_tables(inputs, ready, columns=("inputs", "targets", "line_number"))
    opened.parse = _Parser(alignment)
    opened.settings["columns"] = pa.schema([("line_number", pa.int64())])
    opened.notes = [_ALIGNED[alignment]]
    if options.normalised is None:
        opened.check = check_normalised
    if options.normalised != "candidates":
        opened.notes.append(_NORMALISED_NOTE)
    return opened


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequence of a row."""

    alignment: Alignment

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        row = row_of(record.data)
        tokens = numbers(row, "inputs", np.int64)
        ids, logprobs = _split(*_cube(row))
        if len(ids) != len(tokens):
            raise SourceError(f"targets has {len(ids)} rows for {len(tokens)} inputs")
        tally.note(_PADDED_NOTE, int(len(tokens) > 1 and tokens[0] == tokens[1]))
        first = int(self.alignment == "same")
        ids, logprobs = ids[first:], logprobs[first:]
        rows = Rows(np.full(len(ids), ids.shape[1], np.int64), ids.ravel(), logprobs.ravel())
        rows = without_zeros(rows)
        count_whole(rows, tally)
        line = plain(row.get("line_number"))
        if line is not None and (isinstance(line, bool) or not isinstance(line, int) or abs(line) >= 2**63):
            raise SourceError(f"line_number is {line!r}; an integer is needed")
        yield Item("add", rows.arguments(tokens, slice(0, len(ids))) | {"line_number": line})


def _cube(row: Mapping[str, Any]) -> tuple[NDArray[np.float64], int]:
    """The targets, [T, 2, K], and below what whole numbers are exact in the type that they were stored in."""
    if not present(row, "targets"):
        raise SourceError("there is no targets in this row")
    value = row["targets"]
    try:
        cell = value if isinstance(value, pa.Scalar) else pa.scalar(value, _TARGETS)
        deepest = cell.type
        while hasattr(deepest, "value_type"):
            deepest = deepest.value_type
        rows = cell.cast(_TARGETS).values
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise SourceError(f"targets are no lists of 2 lists of numbers ({error})") from error
    pairs = rows.flatten()
    numbers_ = pairs.flatten()
    if rows.null_count or pairs.null_count or numbers_.null_count:
        raise SourceError("targets holds null; capture it again, or leave this row out")
    inner = np.asarray(pairs.value_lengths())
    wide = np.asarray(rows.value_lengths())
    if bool((wide != 2).any()):
        at = int(np.argmax(wide != 2))
        raise SourceError(f"targets, row {at} has {wide[at]} lists; 2 are needed, logprobs and ids")
    k = int(inner[0]) if len(inner) else 0
    if bool((inner != k).any()):
        at = int(np.argmax(inner != k))
        raise SourceError(f"targets, row {at // 2} has {inner[at]} numbers in a list where others have {k}")
    return np.asarray(numbers_).reshape(len(rows), 2, k), _EXACT.get(str(deepest), 2**53)


def _split(cube: NDArray[np.float64], exact: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(ids, logprobs), [T, K] each."""
    if np.isnan(cube).any():
        raise SourceError(f"targets, row {int(np.argwhere(np.isnan(cube))[0, 0])} holds NaN")
    are_ids = [bool(((half >= 0) & (half == np.floor(half))).all()) for half in (cube[:, 0], cube[:, 1])]
    are_logprobs = [bool((half <= PROBABILITY_SLACK).all()) for half in (cube[:, 0], cube[:, 1])]
    fitting = [place for place in (0, 1) if are_ids[place] and are_logprobs[1 - place]]
    if cube.size and len(fitting) != 1:
        which = "either" if fitting else "neither"
        raise SourceError(
            f"targets: {which} of the two lists could be the ids; one must hold whole numbers from 0, the other "
            f"logprobs, none above 0"
        )
    place = fitting[0] if fitting else 1
    ids = cube[:, place]
    if ids.size and ids.max() >= exact:
        at = int(np.argwhere(ids >= exact)[0, 0])
        raise SourceError(f"targets, row {at}: the id {ids.max():.0f} is not exact in its type, which ends at {exact}")
    with np.errstate(over="ignore"):  # what is below float32 has probability zero
        return ids.astype(np.int64), cube[:, 1 - place].astype(np.float32)


IMPORTER: Final = Importer(
    name="llamakd",
    description="LlamaKD: inputs, and targets with logprobs and ids in one array of floats",
    loses="nothing of the distributions; columns other than line_number",
    recognises=_recognises,
    read=_read,
    patterns=TABLES,
    options=("alignment",),
)
