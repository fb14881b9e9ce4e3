"""`trl`: columns that TRL's distillation trainers read, and replies of `trl vllm-serve`, one a line.

Columns: `topk_logprobs` and `topk_token_ids`, [R, K], padded with -inf and 0, and `actual_logprobs` [R] or [R, 1].
Replies of `/get_sequence_logprobs/`: `logprobs` and `logprob_token_ids`, [B, R, K], or the same as base64 of float32
and int32 with `shape` and `completion_lengths`; those of `/generate/` hold `prompt_ids` and `completion_ids` too.

Alignment: the rows are of the completion alone. Row j is the distribution of completion token j, so it predicts that
token from the position before it; the first one stands at the prompt's last position. Replies of
`/get_sequence_logprobs/` hold no tokens: those of the request, `sequences` and `prompt_lengths`, stand in the same
object, or come with `--prompts`, the requests one a line. Where no prompt is known a placeholder stands for it.
"""

from __future__ import annotations

import binascii
import sys
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert import users
from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally, ready
from logitstore.convert.beside import check_actual, first_row, id_of, paired, row_of, rows_beside
from logitstore.convert.facts import settings_of
from logitstore.convert.lines import has_keys
from logitstore.convert.rows import Rows, same_shape, with_target, within_one, without_zeros
from logitstore.convert.source import Input
from logitstore.convert.tables import (
    TABLES,
    has_columns,
    numbers,
    plain,
    present,
    ragged_numbers,
    read_tables,
    schema_of,
    table_kind,
)
from logitstore.encoding import ragged
from logitstore.errors import LogitStoreError, SourceError
from logitstore.limits import PROBABILITY_SLACK
from logitstore.shard.chunk import RESERVED_NAMES

OWN: Final = frozenset({
    "topk_logprobs", "topk_token_ids", "actual_logprobs", "actual_token_ids", "input_ids", "attention_mask", "labels",
    "prompt_ids", "completion_ids", "prompt_mask", "completion_mask", "id",
})  # fmt: skip
"""Columns that mean something to the trainers, or here."""

_ALIGNED: Final = "Row j is the distribution of completion token j, at the position before it"
_NOTE: Final = (
    f"{_ALIGNED}; logprobs are taken to be normalised over the whole vocabulary, at the temperature of the request (1 "
    f"where it is not known)."
)
_SAID_NOTE: Final = f"{_ALIGNED}; normalisation and temperature are those that the file's metadata say."
_WITHOUT_NOTE: Final = (
    "In {n} sequences a placeholder stands for the prompt and loss_mask is 0, since no prompt is known: they are fit "
    "to look at, not to train on; give the requests with --prompts."
)
_NAN_NOTE: Final = "{n} rows hold null or NaN where logprobs should be, and have no distribution."


# Import


def _recognises(source: Input) -> bool:
    if has_columns(source, "topk_logprobs", "topk_token_ids"):
        return True
    try:
        if table_kind(source) != "json" or has_keys(source, "choices"):
            return False
    except (LogitStoreError, OSError):
        return False
    return has_keys(source, "logprobs", "logprob_token_ids") or has_keys(source, "logprobs_b64", "token_ids_b64")


def _read(inputs: list[Input], options: Options) -> Import:
    opened = read_tables(inputs, ready)
    first = first_row(opened)
    columns = present(first, "topk_logprobs")
    names = tuple(name for name in first if name not in OWN and name not in RESERVED_NAMES) if columns else ()
    request: Mapping[str, Any] = first
    if options.prompts is not None:
        request = next(rows_beside(options.prompts, dict), {})
        opened.pieces = paired(opened.pieces, rows_beside(options.prompts, dict), str(options.prompts))
    said = settings_of(inputs)
    temperature = None if "temperature" in said else _temperature(request)
    opened.settings = said if temperature is None else said | {"temperature": temperature}
    opened.notes = [_SAID_NOTE if said else _NOTE]
    if inputs and table_kind(inputs[0]) != "json":
        schema = schema_of(inputs[0])
        opened.settings["columns"] = pa.schema([schema.field(name).remove_metadata() for name in names])
    bos = options.tokenizer.bos_id if options.tokenizer is not None else None
    asked = None if "temperature" in said else temperature or 1.0
    opened.parse = _Parser(bos or 0, names, options.prompts is not None, asked)
    return opened


def _temperature(request: Mapping[str, Any]) -> float | None:
    """The temperature that a request asked for; None where it says nothing of one."""
    value = plain(request.get("temperature"))
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
        return float(value)
    return None


@dataclass(frozen=True, slots=True)
class _Completion:
    """Some rows, and the tokens of their sequence as far as they are known.

    Attributes:
        rows: one for each completion token; some more may be padding.
        tokens: the completion, with the prompt before it.
        start: the number of prompt tokens; None where no prompt is known, and `tokens` is the completion.
    """

    rows: Rows
    tokens: NDArray[np.int64]
    start: int | None


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequences of a row or a reply.

    Attributes:
        placeholder: the token that stands for a prompt.
        columns: the users' columns.
        paired: whether a request stands beside each record.
        temperature: what the first request asked for; None where that is known otherwise.
    """

    placeholder: int
    columns: tuple[str, ...]
    paired: bool
    temperature: float | None

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        data, beside = record.data if self.paired else (record.data, {})
        row = row_of(data)
        request = {**row, **beside}
        if self.temperature is not None and (_temperature(request) or 1.0) != self.temperature:
            raise SourceError(
                f"temperature is {_temperature(request) or 1.0}, in the first request {self.temperature}; convert the "
                f"two into different datasets"
            )
        columns = present(row, "topk_logprobs")
        parts = [_of_columns(row, request, tally)] if columns else list(_of_reply(row, request, tally))
        for number, part in enumerate(parts):
            name = id_of(row)
            if number and name:
                name = {"id": f"{name['id']}#{number}"}
            extra = {name: users.imported(row.get(name)) for name in self.columns}
            found = self._arguments(part, row if len(parts) == 1 else {}, tally)
            yield Item("add", extra | within_one(found, tally) | name)

    def _arguments(self, part: _Completion, row: Mapping[str, Any], tally: Tally) -> dict[str, Any]:
        rows = without_zeros(part.rows)
        tokens, start = part.tokens, part.start
        known = start is not None
        if start is None:
            tokens, start = np.insert(tokens, 0, self.placeholder), 1
            tally.note(_WITHOUT_NOTE)
        length = len(tokens) - start
        if rows.count[length:].any():
            raise SourceError(
                f"row {length + int(np.argmax(rows.count[length:] > 0))} is of no token: there are {length}"
            )
        rows = _cut(rows, length)
        if start == 0 and length:
            if rows.count[0]:
                raise SourceError("row 0 is the distribution of the first token, before which there is no prompt")
            rows, start = _cut(replace(rows, count=rows.count[1:]), length - 1, 1), 1
        at = start - 1 + np.arange(len(rows.count))
        found = rows.arguments(tokens, at)
        if not known:
            return found | {"loss_mask": np.zeros(len(tokens), np.int8)}
        if (mask := _mask(row, len(tokens), at)) is not None:
            found["loss_mask"] = mask
        return found


def _cut(rows: Rows, length: int, first: int = 0) -> Rows:
    """The rows up to this length; those behind it are empty. The targets lie `first` behind the counts."""
    target, rank = rows.target_logprob, rows.target_rank
    return replace(
        rows,
        count=np.append(rows.count[:length], np.zeros(max(0, length - len(rows.count)), np.int64)),
        target_logprob=None if target is None else _filled(target[first:], length, np.nan),
        target_rank=None if rank is None else _filled(rank[first:], length, 0),
    )


def _filled(values: NDArray[Any], length: int, fill: float) -> NDArray[Any]:
    found = np.full(length, fill, values.dtype)
    found[: len(values)] = values[:length]
    return found


def _mask(row: Mapping[str, Any], positions: int, at: NDArray[np.int64]) -> NDArray[np.int8] | None:
    """What `completion_mask` says of each position: it has an entry for each token, or for each of the completion."""
    if not present(row, "completion_mask"):
        return None
    given = numbers(row, "completion_mask", np.int64) != 0
    mask = np.zeros(positions, np.int8)
    if len(given) == positions:
        mask[:-1] = given[1:]
    elif len(given) >= len(at):
        mask[at] = given[: len(at)]
    else:
        raise SourceError(f"completion_mask has {len(given)} entries for {len(at)} completion tokens")
    return mask


def without_nan_rows(rows: Rows, tally: Tally) -> Rows:
    """Rows without the candidates of rows that hold a NaN, which are counted."""
    nan = np.isnan(rows.logprobs)
    if not bool(nan.any()):
        return rows
    some = ragged.row_sums(nan, rows.count) > 0
    tally.note(_NAN_NOTE, int(some.sum()))
    return rows.keep(~some[ragged.rows(rows.count)])


def split_actual(rows: Rows, actual: NDArray[np.int64], given: NDArray[np.int64]) -> Rows:
    """Rows of an engine that adds the real token to the best k where it is none of them.

    Candidates are ranks 1 to count, so such a token is kept as the target alone. It shows in lists of k and k + 1
    entries; in others nothing was added, or it does not show.

    Args:
        rows: the candidates.
        actual: the real tokens [R]; -1 where not known.
        given: entries of each row as the engine listed them [R], pads and probabilities of zero too.
    """
    k = int(given[given > 0].min(initial=np.iinfo(np.int64).max - 1))
    row = ragged.rows(rows.count)
    own = rows.ids == actual[row]
    lowest = np.full(len(rows.count), np.inf, np.float32)  # of the others
    np.minimum.at(lowest, row[~own], rows.logprobs[~own])
    said = np.full(len(rows.count), np.nan, np.float32)
    said[row[own]] = rows.logprobs[own]
    added = bool((given <= k + 1).all())
    extra = own & (given[row] == k + 1) & (rows.logprobs < lowest[row]) & added
    return with_target(rows.keep(~extra), actual, said)


def with_actual(rows: Rows, actual: NDArray[np.int64], said: NDArray[np.float32]) -> Rows:
    """Rows with the real tokens' logprobs that stand in `actual_logprobs`, where they do not contradict each other."""
    said = np.where(np.isneginf(said), np.float32(np.nan), said)
    if bool((said > PROBABILITY_SLACK).any()):
        at = int(np.argmax(said > PROBABILITY_SLACK))
        raise SourceError(f"actual_logprobs, row {at}: {said[at]} is no logprob")
    check_actual(rows, actual, said, "actual_logprobs")
    return with_target(rows, actual, said)


def _of_columns(row: Mapping[str, Any], request: Mapping[str, Any], tally: Tally) -> _Completion:
    count, values = ragged_numbers(row, "topk_logprobs", np.float64)
    other, ids = ragged_numbers(row, "topk_token_ids", np.int64)
    same_shape(other, count, "topk_token_ids", "topk_logprobs")
    rows = without_nan_rows(Rows(count, ids, _float32(values)), tally)
    tokens, start = _tokens_of_columns(row, request, len(count))
    if not present(row, "actual_logprobs"):
        return _Completion(rows, tokens, start)
    said = _column(row, "actual_logprobs", len(count), np.float64)
    actual = _filled(tokens[start or 0 :], len(count), -1)
    if present(row, "actual_token_ids"):
        given = _column(row, "actual_token_ids", len(count), np.int64)
        wrong = (given != actual) & (actual >= 0) & np.isfinite(said)
        if bool(wrong.any()):
            at = int(np.argmax(wrong))
            raise SourceError(f"row {at}: actual_token_ids says {given[at]}, but the token is {actual[at]}")
    return _Completion(with_actual(without_zeros(rows, -np.inf), actual, _float32(said)), tokens, start)


def _tokens_of_columns(
    row: Mapping[str, Any], request: Mapping[str, Any], length: int
) -> tuple[NDArray[np.int64], int | None]:
    """(tokens, number of prompt tokens)."""
    if present(request, "prompt_ids") and present(request, "completion_ids"):
        prompt = numbers(request, "prompt_ids", np.int64)
        return np.append(prompt, numbers(request, "completion_ids", np.int64)), len(prompt)
    if present(request, "input_ids"):
        tokens = numbers(request, "input_ids", np.int64)
        if length > len(tokens):
            raise SourceError(f"topk_logprobs has {length} rows for {len(tokens)} tokens")
        return tokens, len(tokens) - length
    for name in ("completion_ids", "actual_token_ids"):
        if present(row, name):
            return _column(row, name, None, np.int64), None
    raise SourceError("the tokens are missing: there are no input_ids, no prompt_ids and completion_ids in this row")


def _column(row: Mapping[str, Any], name: str, length: int | None, dtype: Any) -> NDArray[Any]:
    """A column [R] or [R, 1]."""
    try:
        values = numbers(row, name, dtype)
    except SourceError:
        count, values = ragged_numbers(row, name, dtype)
        if bool((count != 1).any()):
            raise
    if length is not None and len(values) != length:
        raise SourceError(f"{name} has {len(values)} entries, topk_logprobs {length} rows")
    return values


def _of_reply(row: Mapping[str, Any], request: Mapping[str, Any], tally: Tally) -> Iterator[_Completion]:
    if present(row, "logprobs_b64"):
        yield from _of_binary(row, request, tally)
        return
    logprobs, ids = _nested(row, "logprobs"), _nested(row, "logprob_token_ids")
    if len(logprobs) != len(ids):
        raise SourceError(f"logprobs has {len(logprobs)} sequences, logprob_token_ids {len(ids)}")
    for number, (values, names) in enumerate(zip(logprobs, ids, strict=True)):
        part = {"logprobs": values, "logprob_token_ids": names}
        try:
            yield _of_lists(part, _tokens_of_reply(request, number, len(logprobs)), tally)
        except SourceError as error:
            raise SourceError(f"sequence {number}: {error}") from error


def _of_lists(part: Mapping[str, Any], found: tuple[NDArray[np.int64], int] | None, tally: Tally) -> _Completion:
    """One sequence of a reply in JSON."""
    if found is None:
        raise SourceError(
            "its tokens are missing: put the sequences and prompt_lengths of the request into the same object, or give "
            "the requests, one a line, with --prompts"
        )
    count, values = ragged_numbers(part, "logprobs", np.float64)
    other, ids = ragged_numbers(part, "logprob_token_ids", np.int64)
    same_shape(other, count, "logprob_token_ids", "logprobs")
    tokens, start = found
    actual = _filled(tokens[start:], len(count), -1)
    rows = without_nan_rows(Rows(count, ids, _float32(values)), tally)
    return _Completion(split_actual(rows, actual, count), tokens, start)


def _tokens_of_reply(request: Mapping[str, Any], number: int, sequences: int) -> tuple[NDArray[np.int64], int] | None:
    """(tokens, number of prompt tokens) of one sequence of a reply; None where they are not known."""
    if present(request, "sequences") and present(request, "prompt_lengths"):
        lengths = numbers(request, "prompt_lengths", np.int64)
        tokens = _one(_nested(request, "sequences"), number, sequences, "sequences")
        if len(lengths) != sequences or not 0 <= lengths[number] <= len(tokens):
            raise SourceError(f"prompt_lengths does not fit the {sequences} sequences")
        return tokens, int(lengths[number])
    if present(request, "prompt_ids") and present(request, "completion_ids"):
        prompts = _nested(request, "prompt_ids")
        if not prompts or sequences % len(prompts):
            raise SourceError(f"there are {len(prompts)} prompt_ids for {sequences} completions")
        prompt = _one(prompts, number * len(prompts) // sequences, len(prompts), "prompt_ids")
        completion = _one(_nested(request, "completion_ids"), number, sequences, "completion_ids")
        return np.append(prompt, completion), len(prompt)
    return None


def _nested(row: Mapping[str, Any], name: str) -> list[Any]:
    value = plain(row.get(name))
    if not isinstance(value, list):
        raise SourceError(f"there is no list {name} in this object")
    return value


def _one(values: list[Any], number: int, sequences: int, name: str) -> NDArray[np.int64]:
    if len(values) != sequences:
        raise SourceError(f"{name} has {len(values)} entries for {sequences} sequences")
    return numbers({name: values[number]}, name, np.int64)


def _of_binary(row: Mapping[str, Any], request: Mapping[str, Any], tally: Tally) -> Iterator[_Completion]:
    shape = numbers(row, "shape", np.int64)
    lengths = numbers(row, "completion_lengths", np.int64)
    if len(shape) != 3 or bool((shape < 0).any()) or bool((shape > 2**31).any()):
        raise SourceError(f"shape is {shape.tolist()}; [sequences, positions, candidates] is needed")
    batch, positions, k = map(int, shape)
    if len(lengths) != batch or bool(((lengths < 0) | (lengths > positions)).any()):
        raise SourceError(f"completion_lengths {lengths.tolist()} do not fit the shape {shape.tolist()}")
    values = _unpacked(row, "logprobs_b64", np.dtype("<f4"), (batch, positions, k))
    ids = _unpacked(row, "token_ids_b64", np.dtype("<i4"), (batch, positions, k))
    said = actual = None
    if present(row, "actual_logprobs_b64") and present(row, "actual_token_ids_b64"):
        said = _unpacked(row, "actual_logprobs_b64", np.dtype("<f4"), (batch, positions, 1))
        actual = _unpacked(row, "actual_token_ids_b64", np.dtype("<i4"), (batch, positions, 1))
    for number, length in enumerate(lengths.tolist()):
        rows = Rows(
            np.full(length, k, np.int64), ids[number, :length].ravel().astype(np.int64), values[number, :length].ravel()
        )
        rows = without_zeros(without_nan_rows(rows, tally), -np.inf)
        found = _tokens_of_reply(request, number, batch)
        if found is None and actual is None:
            raise SourceError("there are no tokens: neither actual_token_ids_b64, nor a request with --prompts")
        tokens, start = found if found is not None else (actual[number, :length, 0].astype(np.int64), None)  # type: ignore[index]
        if said is not None:
            own = _filled(tokens[start or 0 :], length, -1)
            rows = with_actual(rows, own, said[number, :length, 0])
        yield _Completion(rows, tokens, start)


def _unpacked(row: Mapping[str, Any], name: str, dtype: np.dtype[Any], shape: tuple[int, int, int]) -> NDArray[Any]:
    text = plain(row.get(name))
    if not isinstance(text, str):
        raise SourceError(f"there is no text {name} in this object")
    try:
        data = b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SourceError(f"{name} is no base64 ({error})") from error
    if len(data) != dtype.itemsize * shape[0] * shape[1] * shape[2]:
        raise SourceError(f"{name} has {len(data)} bytes; the shape {list(shape)} does not give that")
    return np.frombuffer(data, dtype).reshape(shape)


def _float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


IMPORTER: Final = Importer(
    name="trl",
    description="TRL: topk_logprobs and actual_logprobs columns, and replies of trl vllm-serve, one a line",
    loses="nothing of the distributions",
    recognises=_recognises,
    read=_read,
    patterns=TABLES,
    options=("prompts",),
)
