"""`axolotl`: datasets for axolotl's distillation plugin, raw (v1, v2) and as its tokeniser leaves them.

v1 has what vLLM's server gave, `logprobs` as lists of `{"token": "token_id:865", "logprob": -0.1}`; v2 has `logprobs`
and `target_token_ids` as lists of lists. Tokenised rows have `target_logprobs`, `target_token_ids` and `target_mask`
beside `input_ids` and `labels`; their probabilities were normalised again, over the candidates alone.

Alignment: the trainer compares row i with the hidden state of token i, so a list as long as the tokens predicts the
next token. A shorter list, or one that begins with null, is what an engine gave: its rows are about the tokens
themselves, the last row about the last token. `--alignment` overrules both.

v1 and v2 hold `messages` and no tokens, and only the trainer's template makes tokens of messages. So files need
`input_ids` beside the logprobs, or `--tokens` with the tokens of each record.

The exporter writes tokenised rows, with the logprobs as they were in the dataset beside them: these are read then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from logitstore.convert import users
from logitstore.convert.base import Alignment, Import, Importer, Item, Options, Record, Tally, ready
from logitstore.convert.beside import (
    check_normalised,
    count_whole,
    first_row,
    id_of,
    next_tokens,
    paired,
    row_of,
    tokens_of,
)
from logitstore.convert.facts import settings_of
from logitstore.convert.lines import first_line, has_keys
from logitstore.convert.rows import Rows, same_shape, within_one, without_zeros
from logitstore.convert.source import Input
from logitstore.convert.tables import (
    TABLES,
    has_columns,
    numbers,
    present,
    ragged_numbers,
    read_tables,
    schema_of,
    table_kind,
)
from logitstore.convert.token_files import samples_of
from logitstore.convert.trl import split_actual, without_nan_rows
from logitstore.encoding import ragged
from logitstore.errors import LogitStoreError, SourceError
from logitstore.shard.chunk import RESERVED_NAMES

IGNORED: Final = -100
"""Label of a token that is not trained on."""

PAD_LOGPROB: Final = float(np.float32(np.log(1e-30)))
"""Logprob of a pad in exports: a trainer that takes exp and log in float32 makes -inf of -1e9, and a loss of NaN."""

_V1_TYPE: Final = pa.list_(pa.list_(pa.struct([("token", pa.utf8()), ("logprob", pa.float64())])))
OWN: Final = frozenset({
    "input_ids", "attention_mask", "position_ids", "labels", "logprobs", "target_token_ids", "target_logprobs",
    "target_mask", "length", "id",
})  # fmt: skip
"""Columns that mean something to the trainer, or here."""

_NEXT: Final = "row i predicts token i + 1, as the trainer uses it"
_SAME: Final = "row i is about its own token, the last row about the last one"
_RAW_NOTE: Final = (
    "A list of logprobs as long as the tokens predicts the next token; a shorter one, or one that begins with null, is "
    "about the tokens themselves, up to the last one."
)
_VOCABULARY_NOTE: Final = "The logprobs are taken to be normalised over the whole vocabulary, at temperature 1."
_EXPORT_NOTE: Final = "Beside target_logprobs stand the logprobs as they were before; these were taken."
_CANDIDATES_NOTE: Final = (
    "The trainer normalised target_logprobs over the candidates, and brought them to its kd_temperature; if that was "
    "not 1, give it with --temperature."
)
_EXTRA_NOTE: Final = "Of {n} records, columns were left out that the first record does not have."


# Import


def _recognises(source: Input) -> bool:
    if has_columns(source, "target_logprobs", "target_token_ids") or has_columns(
        source, "logprobs", "target_token_ids"
    ):
        return True
    try:
        if table_kind(source) != "json":
            return _is_v1(schema_of(source))
    except (LogitStoreError, OSError):
        return False
    own = has_keys(source, "messages", "logprobs") and not has_keys(source, "choices")
    return own and b'"token_id:' in first_line(source)


def _is_v1(schema: pa.Schema) -> bool:
    if "logprobs" not in schema.names:
        return False
    kind = schema.field("logprobs").type
    for _ in range(2):
        if not hasattr(kind, "value_type"):
            return False
        kind = kind.value_type
    return pa.types.is_struct(kind) and {"token", "logprob"} <= {kind.field(i).name for i in range(kind.num_fields)}


def _read(inputs: list[Input], options: Options) -> Import:
    opened = read_tables(inputs, ready)
    first = first_row(opened)
    exported = present(first, "target_logprobs") and present(first, "logprobs")
    tokenised = present(first, "target_logprobs") and not exported
    columns = tuple(name for name in first if name not in OWN and name not in RESERVED_NAMES)
    if options.tokens is not None:
        opened.pieces = paired(opened.pieces, samples_of(options.tokens), str(options.tokens))
    opened.parse = _Parser(tokenised, options.alignment, columns, options.tokens is not None)
    said = {"next": _NEXT, "same": _SAME}.get(options.alignment or ("next" if tokenised or exported else ""))
    opened.notes = [_RAW_NOTE if said is None else f"Taken as: {said}."]
    opened.settings = settings_of(inputs)
    if inputs and table_kind(inputs[0]) != "json":
        schema = schema_of(inputs[0])
        opened.settings["columns"] = pa.schema([schema.field(name).remove_metadata() for name in columns])
    if tokenised:
        opened.settings["normalised"] = "candidates"
    elif "normalised" not in opened.settings and options.normalised is None:
        opened.check = check_normalised
    if exported:
        opened.notes.append(_EXPORT_NOTE)
    elif tokenised:
        opened.notes.append(_CANDIDATES_NOTE)
    if not tokenised and "normalised" not in opened.settings and options.normalised != "candidates":
        opened.notes.append(_VOCABULARY_NOTE)
    return opened


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequence of a row.

    Attributes:
        tokenised: whether the rows are those that the trainer's tokeniser left.
        alignment: what the user said.
        columns: the users' columns.
        paired: whether the tokens stand beside the row.
    """

    tokenised: bool
    alignment: Alignment | None
    columns: tuple[str, ...]
    paired: bool

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        data, beside = record.data if self.paired else (record.data, None)
        row = row_of(data)
        if (present(row, "target_logprobs") and not present(row, "logprobs")) != self.tokenised:
            raise SourceError("tokenised rows (target_logprobs) and raw ones are in one input; convert them apart")
        tokens = tokens_of(row) if beside is None else beside
        if tokens is None:
            raise SourceError(
                "there are no input_ids in this row, and only the trainer's template makes tokens of messages; give "
                "a table or JSON lines with the input_ids of each record, in order, with --tokens"
            )
        rows, given, first = self._rows(row, len(tokens), tally)
        at = first + np.arange(len(rows.count))
        if not self.tokenised:
            rows = split_actual(rows, next_tokens(tokens, at), given)
            count_whole(rows, tally)
        found = rows.arguments(tokens, at)
        if (mask := self._mask(row, tokens)) is not None:
            found["loss_mask"] = mask
        extra = {name: users.imported(row.get(name)) for name in self.columns}
        if any(name not in self.columns and name not in OWN for name in row):
            tally.note(_EXTRA_NOTE)
        yield Item("add", extra | within_one(found, tally) | id_of(row))

    def _rows(self, row: Mapping[str, Any], positions: int, tally: Tally) -> tuple[Rows, NDArray[np.int64], int]:
        """The rows, without sentinels; the entries of each as it stands there; the position of the first row."""
        name = "target_logprobs" if self.tokenised else "logprobs"
        rows = _numbers(row, name)
        given = rows.count
        alignment = self._alignment(given, positions, exported=present(row, "target_logprobs"))
        if self.tokenised and present(row, "target_mask"):
            rows = rows.keep(_unpadded(row, rows.count))
        rows = without_zeros(without_nan_rows(rows, tally))
        rows = rows.keep(rows.logprobs != np.float32(PAD_LOGPROB))
        first = _first_position(rows.count, positions, name, alignment)
        if first < 0:
            return replace(rows, count=rows.count[1:]), given[1:], 0
        return rows, given, first

    def _alignment(self, count: NDArray[np.int64], positions: int, *, exported: bool) -> Alignment:
        if self.alignment is not None or self.tokenised or exported:
            return self.alignment or "next"
        return "same" if len(count) < positions or (len(count) > 0 and count[0] == 0) else "next"

    def _mask(self, row: Mapping[str, Any], tokens: NDArray[np.int64]) -> NDArray[np.int8] | None:
        """1 for the rows that predict a token with a label."""
        if not present(row, "labels"):
            return None
        labels = numbers(row, "labels", np.int64)
        if len(labels) != len(tokens):
            raise SourceError(f"labels has {len(labels)} entries for {len(tokens)} tokens")
        wrong = (labels != IGNORED) & (labels != tokens)
        if bool(wrong.any()):
            at = int(np.argmax(wrong))
            raise SourceError(f"labels[{at}] is {labels[at]}, but the token there is {tokens[at]}")
        return np.append(labels[1:] != IGNORED, np.zeros(min(1, len(labels)), np.bool_)).astype(np.int8)


def _first_position(count: NDArray[np.int64], positions: int, name: str, alignment: Alignment) -> int:
    """The position of the first row; -1 where that is about the first token, and empty."""
    first = positions - len(count) - (alignment == "same")
    if first < -1 or (first < 0 and alignment == "next"):
        raise SourceError(f"{name} has {len(count)} rows for {positions} tokens; it has at most as many")
    if first < 0 and len(count) and count[0] > 0:
        raise SourceError(
            f"{name} has a row for each of the {positions} tokens, and row 0 is not null: nothing stands before the "
            f"first token, so these rows predict the next one (--alignment next)"
        )
    return first if len(count) else 0


def _unpadded(row: Mapping[str, Any], count: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which candidates are no pads: masked ones in a row where others are not."""
    other, mask = ragged_numbers(row, "target_mask", np.int64)
    same_shape(other, count, "target_mask", "target_logprobs")
    some = ragged.row_sums(mask != 0, count) > 0
    return np.asarray((mask != 0) | ~some[ragged.rows(count)])


def _numbers(row: Mapping[str, Any], name: str) -> Rows:
    """The rows as they stand there."""
    if present(row, "target_token_ids"):
        count, values = ragged_numbers(row, name, np.float64)
        other, ids = ragged_numbers(row, "target_token_ids", np.int64)
        same_shape(other, count, "target_token_ids", name)
    else:
        count, ids, values = _objects(row.get(name))
    with np.errstate(over="ignore"):
        return Rows(count, ids, values.astype(np.float32))


def _objects(cell: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """(count, ids, logprobs) of v1's lists of {token, logprob}."""
    try:
        if not isinstance(cell, pa.Scalar):
            cell = pa.scalar(cell, _V1_TYPE)
        rows = cell.cast(_V1_TYPE).values if cell.is_valid else None
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise SourceError(f"logprobs are no lists of {{token, logprob}} ({error})") from error
    if rows is None:
        raise SourceError("there is no logprobs in this row")
    count = np.asarray(rows.value_lengths().fill_null(0)).astype(np.int64)
    entries = rows.flatten()
    tokens, values = entries.flatten()
    if tokens.null_count or values.null_count:
        raise SourceError("logprobs: an entry has no token or no logprob; capture it again")
    marked = np.asarray(pc.starts_with(tokens, "token_id:"))
    if not bool(marked.all()):
        at = int(np.argmin(marked))
        raise SourceError(
            f"logprobs, row {ragged.rows(count)[at]}: the token {tokens[at].as_py()!r} is no token_id:NUMBER; capture "
            f"again with return_tokens_as_token_ids"
        )
    try:
        ids = pc.utf8_slice_codeunits(tokens, 9).cast(pa.int64())
    except pa.ArrowException as error:
        raise SourceError(f"logprobs: a token is no token_id:NUMBER ({error})") from error
    return count, np.asarray(ids), np.asarray(values)


IMPORTER: Final = Importer(
    name="axolotl",
    description="axolotl: distillation datasets, raw (v1, v2, with input_ids or --tokens) and tokenised",
    loses="nothing of v1 and v2; tokenised ones have lost the tail",
    recognises=_recognises,
    read=_read,
    patterns=TABLES,
    options=("tokens", "alignment"),
)
