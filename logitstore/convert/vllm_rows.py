"""What vLLM, TensorRT-LLM and SGLang have in common: rows about tokens, with the actual token among the candidates.

Pure functions on flat arrays. A row may list the actual token besides the best candidates; it becomes a candidate only
where it belongs among them, else `target_logprob` and `target_rank` keep it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Options, Tally
from logitstore.convert.rows import Rows, agreeing, joined, over_candidates, with_target, without_zeros
from logitstore.dataset.writer import Writer
from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, SourceError
from logitstore.limits import PROBABILITY_SLACK

Kind = Literal["logprob", "logit"]
"""What the values are; logits are normalised over the candidates of their row."""

CONTEXT_NOTE: Final = (
    "In {n} of the sequences a placeholder stands for prompt tokens that the reply does not hold, and loss_mask is 0: "
    "they are fit to look at, not to train on; capture with return_token_ids."
)
LOGIT_NOTE: Final = "Values are taken for logits, and normalised over the candidates of their row alone."

_HIGHEST: Final = float(np.finfo(np.float32).max)
_STRUCTURE: Final = re.compile(rb'"([^"\\]*(?:\\.[^"\\]*)*)(?:"(\s*:)?|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Listed:
    """Rows as an engine lists them.

    Attributes:
        count: int64 [R].
        ids: int64 [N].
        values: float64 [N]; -inf where the producer says null.
        ranks: int64 [N], from 1; 0 where unknown.
    """

    count: NDArray[np.int64]
    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    ranks: NDArray[np.int64]

    def rows(self, mask: NDArray[np.bool_]) -> Rows:
        """Only those candidates, [N], and no target yet."""
        kept = ragged.row_sums(mask, self.count).astype(np.int64)
        return Rows(kept, self.ids[mask], _single(self.values[mask]))

    def since(self, row: int) -> Listed:
        """Without the rows before this one."""
        at = int(self.count[:row].sum())
        return Listed(self.count[row:], self.ids[at:], self.values[at:], self.ranks[at:])


def of_dicts(rows: Sequence[Mapping[int, Any] | None], name: str) -> Listed:
    """Rows of dictionaries from token id to an object with `logprob` and `rank`; None is an empty row.

    Raises:
        SourceError: they are something else.
    """
    try:
        present = [row for row in rows if row]
        count = np.fromiter((len(row) if row else 0 for row in rows), np.int64, len(rows))
        entries = [*chain.from_iterable(row.values() for row in present)]
        said = map(attrgetter("logprob"), entries)
        ranks = map(attrgetter("rank"), entries)
        return Listed(
            count,
            np.fromiter(chain.from_iterable(present), np.int64, len(entries)),
            np.fromiter((-np.inf if value is None else value for value in said), np.float64, len(entries)),
            np.fromiter((rank or 0 for rank in ranks), np.int64, len(entries)),
        )
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        says = f"{name} is not a list of dictionaries from token id to logprob and rank"
        raise SourceError(f"{says} ({error}); give what the engine gave") from error


def of_flat(columns: Any, name: str) -> Listed:
    """Rows of vLLM's flat form, whose columns are lists or arrays; no object is made per token.

    Args:
        columns: has `start_indices`, `end_indices`, `token_ids`, `logprobs` and `ranks`.
        name: for messages.

    Raises:
        SourceError: the columns do not fit each other.
    """
    starts, ends, ids = (_column(columns, each, name) for each in ("start_indices", "end_indices", "token_ids"))
    values = _column(columns, "logprobs", name, np.float64)
    unknown = getattr(columns, "ranks", None) is None
    ranks = np.zeros(len(ids), np.int64) if unknown else _column(columns, "ranks", name, missing=0)
    if not len(values) == len(ranks) == len(ids):
        says = f"{len(ids)} token_ids, {len(values)} logprobs and {len(ranks)} ranks"
        raise SourceError(f"{name} has {says}; they belong together one by one")
    whole = np.array_equal(starts, np.r_[0, ends][:-1]) and (ends[-1] if len(ends) else 0) == len(ids)
    if not whole or bool((ends < starts).any()):
        raise SourceError(f"{name}: start_indices and end_indices do not cut its {len(ids)} candidates into rows")
    return Listed(ends - starts, ids, values, ranks)


def _column(columns: Any, field: str, name: str, dtype: type[Any] = np.int64, missing: Any = None) -> NDArray[Any]:
    """One column of the flat form; None in it becomes `missing`, or -inf of floats."""
    kinds, what = ("iu", "integers") if dtype is np.int64 else ("iuf", "numbers")
    missing = -np.inf if dtype is np.float64 else missing
    try:
        array = np.asarray(getattr(columns, field, None))
        if array.dtype == object and array.ndim == 1:
            array = np.fromiter((missing if value is None else value for value in array), dtype, len(array))
    except (TypeError, ValueError, OverflowError) as error:
        raise SourceError(f"{name}.{field} is no list of {what} ({error})") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise SourceError(f"{name}.{field} is no list of {what}")
    return array.astype(dtype)


def _single(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # far below the bound of probability zero
        return values.astype(np.float32)


def listed(logprobs: Any, name: str) -> Listed:
    """The rows of vLLM's `logprobs` or `prompt_logprobs`, in whichever of its forms."""
    return of_flat(logprobs, name) if hasattr(logprobs, "start_indices") else of_dicts(logprobs, name)


def integers(tokens: Any, name: str) -> NDArray[np.int64]:
    """Token ids of the engine, int64 [T]; None is none.

    Raises:
        SourceError: they are something else.
    """
    try:
        array = np.asarray([] if tokens is None else tokens)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{name} is no list of token ids ({error})") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise SourceError(f"{name} is no list of token ids")
    return array.astype(np.int64)


def check_values(said: Listed, name: str, kind: Kind, first: int = 0) -> None:
    """Refuse rows whose values cannot be.

    Args:
        said: the rows.
        name: of the field.
        kind: what its values should be.
        first: number that the producer gives the first of these rows.

    Raises:
        SourceError: a value is NaN, or above 0 and no logit, or all of a row are missing.
    """
    wrong = ~(said.values <= (_HIGHEST if kind == "logit" else PROBABILITY_SLACK))
    if bool(wrong.any()):
        at = int(np.argmax(wrong))
        says = f"the token {said.ids[at]} has {said.values[at]}, which is no {kind}"
        place = f"{name}, row {first + int(ragged.rows(said.count)[at])}"
        raise SourceError(f"{place}: {says}{_advice(said.values[at])}")
    there = ragged.row_sums(said.values > -np.inf, said.count)
    if bool(((there == 0) & (said.count > 0)).any()):
        at = int(np.argmax((there == 0) & (said.count > 0)))
        raise SourceError(f"{name}, row {first + at}: none of its {said.count[at]} candidates has a {kind}")


def _advice(value: float) -> str:
    return "; if these are raw logits, say --value-kind logit" if 0 < value < _HIGHEST else "; capture it again"


def check_filled(there: NDArray[np.bool_], name: str) -> None:
    """Refuse rows that are missing beside others.

    Args:
        there: whether each row says something, [R].
        name: of the field.

    Raises:
        SourceError: some do and some do not.
    """
    if bool(there.any()) and not bool(there.all()):
        at = int(np.argmin(there))
        raise SourceError(f"{name}: row {at} is empty and others are not, so rows are missing; capture it again")


def check_order(said: Listed, name: str) -> None:
    """Refuse rows whose first candidate need not be the actual token, since their keys were sorted.

    Behind the actual token vLLM lists the best ones in order, with their ranks from 1 on.

    Args:
        said: the rows; `count` is 0 only in front.
        name: of the field.

    Raises:
        SourceError: they are in another order.
    """
    rest = ~ragged.firsts(said.count)
    count = np.maximum(said.count - 1, 0)
    rank, most = said.ranks[rest], ragged.spread(said.count, count)
    behind = np.diff(ragged.rows(count)) == 0  # whether the next one is of the same row
    values = said.values[rest]
    wrong = bool((behind & (np.diff(values) > 0)).any()) or bool((rank > most).any())
    wrong |= bool((behind & (np.diff(rank) <= 0) & (rank[1:] > 0)).any())
    filled = said.count[said.count > 0]
    beyond = filled > min(filled.tolist(), default=0)  # more than the best ones: the actual token is none of them
    own = ragged.heads(said.ranks, said.count)
    wrong |= bool((beyond & (own > 0) & (own < filled)).any())
    if wrong:
        raise SourceError(
            f"{name}: behind the first candidate of a row they are not in the order of their ranks, so that it is not "
            f"certain which is the actual token: the keys were sorted; capture with return_token_ids, or do not sort"
        )


def own_first(
    said: Listed, tokens: NDArray[np.int64], name: str, kind: Kind, first: int = 0, tally: Tally | None = None
) -> Rows:
    """Rows of which each begins with the actual token, as vLLM's do.

    Args:
        said: the rows, none of them empty.
        tokens: the actual tokens, one a row.
        name: of the field.
        kind: what its values are.
        first: number that the producer gives the first of these rows.
        tally: counts actual tokens that stand twice with different values.

    Raises:
        SourceError: a row begins with another token, so that rows are not where they should be.
    """
    check_values(said, name, kind, first)
    heads = ragged.heads(said.ids, said.count)
    if bool((heads != tokens).any()):
        at = int(np.argmax(heads != tokens))
        says = f"its first candidate is {heads[at]}, but the token there is {tokens[at]}"
        raise SourceError(
            f"{name}, row {first + at}: {says}; vLLM puts the actual token first: the rows are off, or were sorted"
        )
    own, rank = ragged.heads(said.values, said.count), ragged.heads(said.ranks, said.count)
    rest = said.rows(~ragged.firsts(said.count))
    own = said_once(rest, tokens, own, name, kind, Tally() if tally is None else tally)
    return finished(rest, tokens, own, rank, name, kind)


def own_anywhere(said: Listed, tokens: NDArray[np.int64], name: str, kind: Kind) -> Rows:
    """Rows of which each lists the actual token somewhere, or not at all.

    A candidate whose rank is beyond the number of candidates stands alone behind a hole, and is left out.

    Args:
        said: the rows.
        tokens: the actual tokens, one a row; -1 where unknown.
        name: of the field.
        kind: what its values are.
    """
    check_values(said, name, kind)
    row = ragged.rows(said.count)
    mine = said.ids == tokens[row]
    own, rank = np.full(len(said.count), np.nan), np.zeros(len(said.count), np.int64)
    own[row[mine]], rank[row[mine]] = said.values[mine], said.ranks[mine]
    return finished(said.rows(~mine & (said.ranks <= said.count[row])), tokens, own, rank, name, kind)


def finished(
    rest: Rows, tokens: NDArray[np.int64], own: NDArray[Any], rank: NDArray[np.int64] | None, name: str, kind: Kind
) -> Rows:
    """Rows with their targets, without candidates of probability zero, as logprobs.

    Args:
        rest: the candidates; in the flat form of vLLM the actual token may be among them again.
        tokens: the actual tokens [R].
        own: their values [R]; NaN where unknown.
        rank: their ranks [R]; 0 where unknown.
        name: of the field.
        kind: what the values are.

    Raises:
        SourceError: the value of an actual token is above 0, and no logit.
    """
    _check_own(tokens, own, name, kind)
    rows = without_zeros(with_target(rest, tokens, _single(own), rank))
    if kind == "logprob" or rows.target_logprob is None:
        return rows
    logprobs = over_candidates(rows.count, rows.logprobs)
    shift = np.full(len(rows.count), np.nan, np.float32)
    shift[rows.count > 0] = ragged.heads(rows.logprobs, rows.count) - ragged.heads(logprobs, rows.count)
    return replace(rows, logprobs=logprobs, target_logprob=rows.target_logprob - shift)


def _check_own(tokens: NDArray[np.int64], own: NDArray[Any], name: str, kind: Kind) -> None:
    if bool((own > (_HIGHEST if kind == "logit" else PROBABILITY_SLACK)).any()):
        at = int(np.nanargmax(own))
        raise SourceError(f"{name}: the token {tokens[at]} has {own[at]}, which is no {kind}{_advice(own[at])}")


def said_once(
    rows: Rows, tokens: NDArray[np.int64], own: NDArray[Any], name: str, kind: Kind, tally: Tally
) -> NDArray[np.float32]:
    """The values of the actual tokens, which may stand among the candidates a second time.

    Args:
        rows: the candidates.
        tokens: the actual tokens [R].
        own: their values [R]; NaN where unknown.
        name: of the field.
        kind: what its values are.
        tally: counts where the two differ.

    Raises:
        SourceError: the value of an actual token cannot be, or most differ from those among the candidates.
    """
    _check_own(tokens, own, name, kind)
    return agreeing(rows, tokens, own, name, tally)


def targets_only(tokens: NDArray[np.int64], own: NDArray[Any], name: str, kind: Kind) -> Rows:
    """Rows of which only the actual token's value is known; a logit alone says nothing.

    Args:
        tokens: the actual tokens [R].
        own: their values [R]; NaN where unknown.
        name: of the field.
        kind: what the values are.
    """
    none = Rows(np.zeros(len(own), np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    return finished(none, tokens, own, None, name, kind)


def numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    """Floats, NaN for None."""
    return np.fromiter((np.nan if value is None else value for value in values), np.float64, len(values))


_NOTHING: Final = targets_only(np.empty(0, np.int64), np.empty(0), "", "logprob")


def arguments(tokens: NDArray[np.int64], parts: Sequence[tuple[int, Rows]], *, trained: bool = True) -> dict[str, Any]:
    """Arguments of `Writer.add`.

    Args:
        tokens: the whole sequence.
        parts: rows, and the position of the first of them.
        trained: False where its context is not known: its loss_mask is 0.
    """
    parts = parts or [(0, _NOTHING)]
    at = np.concatenate([np.arange(first, first + len(rows.count)) for first, rows in parts])
    found = joined([rows for _, rows in parts]).arguments(tokens, at)
    return found if trained else found | {"loss_mask": np.zeros(len(tokens), np.int8)}


def kind_of(options: Options) -> Kind:
    """What the values are.

    Raises:
        InvalidInputError: the format cannot have this kind.
    """
    if options.value_kind in (None, "logprob"):
        return "logprob"
    if options.value_kind == "logit":
        return "logit"
    raise InvalidInputError(f"value_kind is {options.value_kind!r}; this format has 'logprob' or 'logit'")


def kind_for(writer: Writer, kind: str) -> Kind:
    """What the values are that a writer is to be given.

    Raises:
        InvalidInputError: there is no such kind, or the dataset would say something else of them.
    """
    found = kind_of(Options(value_kind=kind))  # type: ignore[arg-type] # it looks
    if found == "logit" and writer.settings.normalised != "candidates":
        says = "logits of some candidates are normalised over these alone"
        raise InvalidInputError(f"{says}; make the writer with normalised='candidates'")
    return found


def settings_of(kind: Kind) -> dict[str, Any]:
    """The arguments of `Writer` that follow from what the values are."""
    return {"normalised": "candidates"} if kind == "logit" else {}


def keys_at(head: bytes) -> set[tuple[int, bytes]]:
    """The keys of the objects in the beginning of a JSON text, each with its depth from 1; for `recognises`."""
    depth = 0
    found = set()
    for match in _STRUCTURE.finditer(head):
        first = match[0][:1]
        if first == b'"':
            if match[2] is not None:
                found.add((depth, match[1]))
        else:
            depth += 1 if first in b"[{" else -1
    return found
