"""`columns`: any table with one sequence a row, whose columns the user names.

Parquet, Arrow files and streams, the directories of `datasets` (their `Array2D` too) and JSON lines. Candidates are
lists of lists ([T][k], ragged or not), one flat list with `count`, or one flat list of T times k. What a table does not
show is asked for: what the values are, and which token a row is about.

A `parquet` export says the latter two itself, in its metadata, and its normalisation and temperature too.

With `next`, row t predicts the token at t + 1: T rows, or T - 1 where the last position has none. With `same`, row t
is about the token at t: T rows, of which the first is left out, or T - 1 where that was done already. The columns with
one value a row are placed likewise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert import users
from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally, ValueKind, ready
from logitstore.convert.columns_kept import further, joint, peeked
from logitstore.convert.facts import facts_of
from logitstore.convert.rows import (
    CLAMPED,
    Rows,
    of_probabilities,
    over_candidates,
    same_shape,
    spread,
    within_one,
)
from logitstore.convert.source import Input
from logitstore.convert.tables import (
    TABLES,
    OfJson,
    any_numbers,
    numbers,
    plain,
    present,
    read_tables,
    schema_of,
    table_kind,
)
from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, SourceError
from logitstore.shard.chunk import RESERVED_NAMES

_VALUES: Final = {
    "logprob": ("logprobs", "values"),
    "logit": ("logits", "values", "logprobs"),
    "probability": ("probabilities", "values", "logprobs"),
    "draws": ("draws", "values", "logprobs"),
}
"""What the column of the values is called where the user does not say: the first of these that is there."""

_VALUE_NAMES: Final = frozenset(chain.from_iterable(_VALUES.values()))
_FLOATS: Final = ("tail", "target_logprob", "logsumexp", "entropy")
_POSITIONAL: Final = (*_FLOATS, "target_rank", "loss_mask")
_OPTIONAL: Final = ("count", "id", *_POSITIONAL)
_TAKEN: Final = RESERVED_NAMES | {"self", *_OPTIONAL}
"""Names that an argument of `Writer.add` or a column of the format has; `Writer.add_draws` has `n` besides."""

_FIRST_NOTE: Final = (
    "In {n} of the rows the distribution of the first token was left out: no token is before it that could predict it."
)
_MORE_NOTE: Final = "In {n} of the rows the column {name} was left out, since it is not in the first rows."
_OTHER_NOTE: Final = "In {n} of the rows the column {name} was left out, since its value is not {kind} as in the first."


def _resolve(given: Mapping[str, str], kind: str, available: Iterable[str]) -> dict[str, str]:
    """Our names, `values` for the column of the values, to those of the columns."""
    there = frozenset(available)
    says = f"the columns are {', '.join(sorted(there))}"
    names: tuple[str, ...] = ("tokens", "ids", *_OPTIONAL)
    found = {name: name for name in names if name in there}
    if value := next((name for name in _VALUES[kind] if name in there), None):
        found["values"] = value
    found |= given
    for name in ("tokens", "ids", "values"):
        if name not in found:
            raise SourceError(f"no column is known to be {name}: say which by --map {name}=...; {says}")
    for name, column in found.items():
        if column not in there:
            raise SourceError(f"there is no column {column!r} (--map {name}={column}); {says}")
    return found


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes a sequence of a row.

    Attributes:
        names: our names to those of the columns.
        kind: what the values are.
        same: whether row t is about the token at t.
        positional: the columns of one value a row that are read.
        user: names and types of the further columns that are kept.
        left: further columns that are known to be left out.
        json: whether a row's further columns must be held against these types.
    """

    names: Mapping[str, str]
    kind: ValueKind
    same: bool
    positional: tuple[str, ...]
    user: Mapping[str, pa.DataType]
    left: frozenset[str]
    json: bool

    def __call__(self, record: Record, tally: Tally) -> Iterable[Item]:
        row, names = record.data, self.names
        tokens = numbers(row, names["tokens"], np.int64)
        rows = self.candidates(row, len(tokens))
        if self.same and len(rows.count) == len(tokens) > 0:
            tally.note(_FIRST_NOTE, int(rows.count[0] > 0))
            first = int(rows.count[0])
            rows = Rows(rows.count[1:], rows.ids[first:], rows.logprobs[first:])
        count = spread(rows.count, slice(0, len(rows.count)), len(tokens), 0)
        arguments: dict[str, Any] = {"tokens": tokens, "count": count, "ids": rows.ids}
        if "id" in names and present(row, names["id"]):
            arguments["id"] = _id(plain(row[names["id"]]), names["id"])
        arguments |= {
            name: self.placed(row, name, len(tokens))
            for name in self.positional
            if name in names and present(row, names[name])
        }
        arguments |= self.users(row, tally)
        yield self.item(arguments, rows.logprobs, tally)

    def candidates(self, row: Mapping[str, Any], positions: int) -> Rows:
        """The row's candidates without those that stand for nothing, values as they are given."""
        names = self.names
        given = numbers(row, names["count"], np.int64) if "count" in names and present(row, names["count"]) else None
        dtype = {"draws": np.int64, "logprob": np.float32}.get(self.kind, np.float64)
        id_count, ids = any_numbers(row, names["ids"], np.int64)
        value_count, values = any_numbers(row, names["values"], dtype)
        if all(each is None or len(each) == 0 for each in (id_count, value_count)) and not len(ids) + len(values):
            id_count = value_count = None  # an empty list may be of either kind
        if (id_count is None) != (value_count is None):
            raise SourceError(f"one of {names['ids']} and {names['values']} is a list of lists, the other a flat list")
        if id_count is None or value_count is None:
            count = _flat_count(len(ids), len(values), given, positions, names)
        else:
            same_shape(id_count, value_count, names["ids"], names["values"])
            count = id_count
        self.fitting(len(count), positions, names["values"])
        rows = Rows(count, ids, of_probabilities(values) if self.kind == "probability" else values)
        if given is not None:
            rows = _cut(rows, given, names["count"])
        return rows.keep(rows.logprobs != 0 if self.kind == "draws" else ~(rows.logprobs <= CLAMPED))

    def fitting(self, rows: int, positions: int, name: str) -> None:
        """Refuse a number of rows that is neither that of the tokens nor one less."""
        if rows not in (positions, positions - 1):
            raise SourceError(
                f"{name} has {rows} rows for {positions} tokens; {positions} are needed, or {positions - 1} where the "
                f"{'first' if self.same else 'last'} is left out"
            )

    def placed(self, row: Mapping[str, Any], name: str, positions: int) -> NDArray[Any]:
        """A column of one value a row, at the positions that the rows belong to."""
        column = self.names[name]
        fill = 0.0 if name in ("target_rank", "loss_mask") else np.nan
        if name in _FLOATS:
            values = numbers(row, column, np.float32)
        else:
            values = numbers(row, column, np.int64, null=-1 if name == "loss_mask" else 0)
        self.fitting(len(values), positions, column)
        values = values[1:] if self.same and len(values) == positions else values
        if name in ("tail", "target_logprob"):  # JSON has no -inf
            zero = -np.inf if name == "tail" else np.nan
            values = np.where((values <= CLAMPED) & np.isfinite(values), np.float32(zero), values)
        return spread(values, slice(0, len(values)), positions, fill)

    def item(self, arguments: dict[str, Any], values: NDArray[Any], tally: Tally) -> Item:
        """The sequence, its values made into logprobs."""
        count = arguments["count"]
        if self.kind == "draws":
            return Item("add_draws", {**arguments, "draws": values, "n": _sums(count, values)})
        if self.kind == "logit":
            values = _logprobs(count, values, arguments, over="logsumexp" not in self.positional)
        return Item("add", within_one(arguments | {"logprobs": values}, tally))

    def users(self, row: Mapping[str, Any], tally: Tally) -> dict[str, Any]:
        """The further columns."""
        if not self.json:
            return {name: users.imported(row[name]) for name in self.user if name in row}
        kept: dict[str, Any] = dict.fromkeys(self.user)
        for name, value in row.items():
            if value is None or name in self.left or name in self.names.values():
                continue
            if name not in self.user:
                tally.note(_MORE_NOTE.replace("{name}", name))
            elif _fits(value, self.user[name]):
                kept[name] = value
            else:
                tally.note(_OTHER_NOTE.replace("{name}", name).replace("{kind}", str(self.user[name])))
        return kept


def _flat_count(
    ids: int, values: int, given: NDArray[np.int64] | None, positions: int, names: Mapping[str, str]
) -> NDArray[np.int64]:
    """The candidates of each row where they are one flat list."""
    if ids != values:
        raise SourceError(f"{names['ids']} has {ids} values, {names['values']} {values}")
    if given is None:
        if ids and (positions == 0 or ids % positions):
            raise SourceError(
                f"{names['ids']} is a flat list of {ids} candidates, which are not as many for each of {positions} "
                f"tokens; say which column has the count of each row by --map count=..."
            )
        return np.full(positions if ids else 0, ids // max(1, positions))
    if len(given) and int(given.min()) < 0:
        raise SourceError(f"row {int(np.argmin(given))}: {names['count']} is {int(given.min())}")
    total = sum(given.tolist())
    if total != ids:
        raise SourceError(f"{names['count']} sums to {total}, but {names['ids']} has {ids} candidates")
    return given


def _cut(rows: Rows, given: NDArray[np.int64], name: str) -> Rows:
    """Of lists that are filled up, the candidates that count."""
    if len(given) != len(rows.count):
        raise SourceError(f"{name} has {len(given)} values for {len(rows.count)} rows of candidates")
    wrong = (given < 0) | (given > rows.count)
    if bool(wrong.any()):
        at = int(np.argmax(wrong))
        raise SourceError(f"row {at}: {name} is {given[at]}, but there are {rows.count[at]} candidates")
    return rows.keep(ragged.ranks(rows.count) < np.repeat(given, rows.count))


def _sums(count: NDArray[np.int64], draws: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often was drawn at each position."""
    if len(draws) and not 0 <= int(draws.min()) <= int(draws.max()) < 2**31:
        raise SourceError(f"a candidate has {draws[(draws < 0) | (draws >= 2**31)][0]} draws")
    return ragged.row_sums(draws, count).astype(np.int64)


def _logprobs(
    count: NDArray[np.int64], logits: NDArray[Any], arguments: Mapping[str, Any], *, over: bool
) -> NDArray[np.float32]:
    """Logprobs of logits, normalised over the candidates, or by the logsumexp of their rows."""
    if over:
        return over_candidates(count, logits)
    if "logsumexp" not in arguments:
        raise SourceError("there is no logsumexp in this row, by which its logits could be normalised")
    missing = (count > 0) & ~np.isfinite(arguments["logsumexp"])
    if bool(missing.any()):
        raise SourceError(f"position {int(np.argmax(missing))}: there are logits, but no logsumexp")
    with np.errstate(over="ignore"):
        return np.asarray(logits - np.repeat(arguments["logsumexp"].astype(np.float64), count), np.float32)


def _id(value: Any, column: str) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise SourceError(f"{column} is {type(value).__name__}; the id of a sequence is a text or an integer")
    return str(value)


def _fits(value: Any, kind: pa.DataType) -> bool:
    """Whether a value of JSON can be stored as this type without loss."""
    try:
        pa.array([value], kind)
        pa.array([value]).cast(kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _read(inputs: list[Input], options: Options) -> Import:
    json = table_kind(inputs[0]) == "json"
    options, facts = (options, {}) if json else _with_facts(inputs, options)
    given = _check(options)
    kind = options.value_kind or "logprob"
    opened = read_tables(inputs, ready) if json else None
    schema = joint([schema_of(each) for each in inputs]) if opened is None else peeked(opened)
    try:
        # Where no line can be read at all, its own error is the one to show.
        names = _resolve(given, kind, schema.names or (*_VALUES[kind], "tokens", "ids", *given.values()))
    except SourceError as error:
        raise SourceError(f"{inputs[0].name}: {error}") from error
    over, positional, notes = _normalised(options, names)
    taken = _TAKEN | ({"n"} if kind == "draws" else set())
    user, left = further(schema, names, taken)
    parser = _Parser(
        names=names,
        kind=kind,
        same=options.alignment == "same",
        positional=positional,
        user={field.name: field.type for field in user},
        left=taken | (set(schema.names) - set(user.names)),
        json=json,
    )
    if opened is None:
        whole = read_tables(inputs, parser, columns=[*names.values(), *user.names])
    else:
        whole = replace(opened, parse=OfJson(parser))
    whole.settings = {"columns": user} | ({"normalised": "candidates"} if over else {})
    if "temperature" in facts:
        whole.settings["temperature"] = facts["temperature"]
    whole.notes = [*_said(options, names, over=over), *notes, *left]
    if facts:
        said = ", ".join(f"{name} {value}" for name, value in facts.items())
        whole.notes.insert(0, f"The metadata of the input, an export of logitstore, say: {said}.")
    return whole


def _with_facts(inputs: list[Input], options: Options) -> tuple[Options, dict[str, Any]]:
    """The options, with what the metadata of the inputs say where the user says nothing; and what was taken of these.

    They say it of the column `logprobs`: where another one is named, what its values are is left to ask for.
    """
    own = options.value_kind in (None, "logprob")
    own = own and all(options.map.get(name, "logprobs") == "logprobs" for name in _VALUE_NAMES)
    wanted = ("alignment", *(("value_kind", "normalised") if own else ()))
    unsaid = [name for name in wanted if getattr(options, name) is None]
    facts = facts_of(inputs, [*unsaid, "temperature"])
    return replace(options, **{name: facts[name] for name in unsaid if name in facts}), facts


def _check(options: Options) -> dict[str, str]:
    """What the user says of the columns' names, when all is said that must be.

    Raises:
        InvalidInputError: something is missing, or a name is not ours.
    """
    if options.value_kind is None:
        raise InvalidInputError(
            "a table does not say what its values are: say --value-kind logprob, logit, probability or draws"
        )
    if options.alignment is None:
        raise InvalidInputError(
            "a table does not say which token a row is about, and rows off by one teach nonsense: say --alignment next "
            "(row t predicts tokens[t + 1]) or same (row t is about tokens[t])"
        )
    given = dict(options.map)
    if len(said := sorted(_VALUE_NAMES & given.keys())) > 1:
        raise InvalidInputError(f"--map has {' and '.join(said)}; all are the one column of the values")
    if said:
        given["values"] = given.pop(said[0])
    known = ("tokens", "ids", "values", *_OPTIONAL)
    if unknown := sorted(given.keys() - set(known)):
        raise InvalidInputError(f"--map knows no {unknown[0]!r}; it takes {', '.join(known)}")
    return given


def _normalised(options: Options, names: Mapping[str, str]) -> tuple[bool, tuple[str, ...], list[str]]:
    """Whether the values are normalised over the candidates alone; the columns that are read then; notes."""
    kind, said = options.value_kind, options.normalised
    over = said == "candidates"
    if kind == "logit" and "logsumexp" not in names:
        if said == "vocabulary":
            raise InvalidInputError(
                "logits are normalised over the vocabulary by their logsumexp only: say its column by --map "
                "logsumexp=..., or --normalised candidates"
            )
        over = True
    left = set()
    if kind == "draws":
        left = {"tail", "logsumexp"}
    elif over:
        left = {"tail", "logsumexp"} | ({"target_logprob"} if kind == "logit" else set())
    if wrong := sorted(left & options.map.keys()):
        what = "draws" if kind == "draws" else "values that are normalised over the candidates"
        raise InvalidInputError(f"--map {wrong[0]}=...: there is no {wrong[0]} of {what}")
    read = tuple(name for name in _POSITIONAL if name not in left)
    unused = sorted(left & names.keys())
    notes = [f"The columns {', '.join(unused)} were left out: they do not go with these values."] if unused else []
    return over, read, notes


def _said(options: Options, names: Mapping[str, str], *, over: bool) -> list[str]:
    """What was assumed."""
    about = "predicts the token at t + 1" if options.alignment == "next" else "is about the token at t"
    columns = ", ".join(f"{name}={column}" for name, column in names.items())
    notes = [f"Row t {about}; columns: {columns}."]
    if options.value_kind == "logit":
        how = "over the candidates of each position alone" if over else "by the column of the logsumexp"
        return [*notes, f"Logits were normalised {how}, at the temperature recorded."]
    if options.normalised is None and options.value_kind != "draws":
        notes.append("Probabilities were taken to be normalised over the vocabulary; say --normalised if they are not.")
    return notes


IMPORTER: Final = Importer(
    name="columns",
    description="any Parquet, Arrow, JSON lines or datasets directory, its columns named by --map",
    loses="nested columns that were not named",
    recognises=lambda _source: False,
    read=_read,
    patterns=TABLES,
    options=("map", "value_kind", "alignment"),
)
