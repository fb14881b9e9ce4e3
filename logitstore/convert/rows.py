"""Rows as producers give them, made into what a `Writer` takes: pure functions on flat arrays.

R rows have `count` [R] candidates each, flat in `ids` [N] and `values` [N].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Tally
from logitstore.encoding import ragged
from logitstore.errors import SourceError
from logitstore.limits import PROBABILITY_SLACK, SEQUENCE_CANDIDATES

CLAMPED: Final = -9999.0
"""A logprob at or below this stands for probability zero: JSON has no -inf, and servers write this instead."""

SCALED_NOTE: Final = (
    "At {n} positions the probabilities do not sum to 1 as they should, by what rounding makes; they were scaled."
)
LOWERED_NOTE: Final = (
    "At {n} positions the tail and the candidates sum to a little over 1, by what rounding makes; the tail was lowered."
)

_TWICE_NOTE: Final = (
    "At {n} positions the actual token has another logprob beside the candidates than among them; the latter is kept."
)
_SAME, _SAME_SHARE = 0.02, 0.01  # how far two reports of one logprob may be apart: half precision rounds them
_LEAST_ROWS: Final = 4  # of which half tell that rows are wrong
_ROUNDED: Final = 1.065  # what a resolution of 1/8 makes of a sum of 1, and bfloat16 too; above it, rows are wrong


@dataclass(frozen=True, slots=True)
class Rows:
    """Distributions, row by row.

    Attributes:
        count: int64 [R].
        ids: int64 [N].
        logprobs: float32 [N], nats.
        target_logprob: float32 [R], logprob of the token that really stands there; NaN where unknown.
        target_rank: int64 [R], its rank from 1; 0 where unknown.
    """

    count: NDArray[np.int64]
    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    target_logprob: NDArray[np.float32] | None = None
    target_rank: NDArray[np.int64] | None = None

    def keep(self, mask: NDArray[np.bool_]) -> Rows:
        """Only those candidates, [N]."""
        if bool(mask.all()):
            return self
        count = ragged.row_sums(mask, self.count).astype(np.int64)
        return replace(self, count=count, ids=self.ids[mask], logprobs=self.logprobs[mask])

    def arguments(self, tokens: NDArray[Any], at: NDArray[np.int64] | slice) -> dict[str, Any]:
        """Arguments of `Writer.add`: these rows at some positions of a sequence, none at the others.

        Args:
            tokens: integers [T].
            at: the position of each row; row at t predicts tokens[t + 1].
        """
        found: dict[str, Any] = {"tokens": tokens, "ids": self.ids, "logprobs": self.logprobs}
        found["count"] = spread(self.count, at, len(tokens), 0)
        if self.target_logprob is not None:
            found["target_logprob"] = spread(self.target_logprob, at, len(tokens), np.nan)
        if self.target_rank is not None:
            found["target_rank"] = spread(self.target_rank, at, len(tokens), 0)
        return found


def spread(values: NDArray[Any], at: NDArray[np.int64] | slice, positions: int, fill: float) -> NDArray[Any]:
    """A column of that many positions with one value a row at the rows' positions, and `fill` elsewhere."""
    column = np.full(positions, fill, values.dtype)
    column[at] = values
    return column


def flat(rows: Sequence[Sequence[Any] | None], dtype: Any) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """(count [R], values [N]) of nested lists, whose values must fit the dtype; a row that is None is empty."""
    count = np.fromiter((0 if row is None else len(row) for row in rows), np.int64, len(rows))
    values = chain.from_iterable(row for row in rows if row is not None)
    return count, np.fromiter(values, dtype, int(count.sum()))


def same_shape(count: NDArray[np.int64], other: NDArray[np.int64], name: str, other_name: str) -> None:
    """Refuse rows of ids and of values that do not fit each other.

    Raises:
        SourceError: naming the row.
    """
    if len(count) != len(other):
        raise SourceError(f"{name} has {len(count)} rows, {other_name} {len(other)}")
    if bool((count != other).any()):
        at = int(np.argmax(count != other))
        raise SourceError(f"row {at}: {name} has {count[at]} candidates, {other_name} {other[at]}")


def without_zeros(rows: Rows, bound: float = CLAMPED) -> Rows:
    """Leave out the candidates at or below a bound, which stand for probability zero, or for nothing at all."""
    known = rows.target_logprob
    if known is not None:
        known = np.where(known <= bound, np.float32(np.nan), known)
    return replace(rows, target_logprob=known).keep(~(rows.logprobs <= bound))


def of_probabilities(probabilities: NDArray[Any]) -> NDArray[np.float32]:
    """Logs of probabilities; -inf of 0.

    Raises:
        SourceError: one is not from 0 to 1.
    """
    wrong = ~((probabilities >= 0) & (probabilities <= 1 + 1e-4))
    if bool(wrong.any()):
        raise SourceError(f"{probabilities[np.argmax(wrong)]} is no probability: they are from 0 to 1")
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.minimum(probabilities, 1.0, dtype=np.float64)), np.float32)


def over_candidates(count: NDArray[np.int64], logits: NDArray[Any]) -> NDArray[np.float32]:
    """Logprobs of raw logits, normalised over the candidates of each row alone: float32 [N].

    Raises:
        SourceError: a logit is NaN or infinite upwards.
    """
    values = logits.astype(np.float64)
    if bool((np.isnan(values) | np.isposinf(values)).any()):
        raise SourceError("a logit is NaN or infinite")
    present = ragged.present(count)
    starts = ragged.offsets(present)[:-1]
    if len(values) == 0:
        return values.astype(np.float32)
    best = np.maximum.reduceat(values, starts)
    if bool(np.isneginf(best).any()):
        raise SourceError("all logits of a row are -inf")
    values -= np.repeat(best, present)
    values -= np.repeat(np.log(np.add.reduceat(np.exp(values), starts)), present)
    with np.errstate(over="ignore"):  # of candidates that are 1e38 nats under the best: -inf, probability zero
        return values.astype(np.float32)


def listed_of(rows: Rows, tokens: NDArray[Any]) -> NDArray[np.float32]:
    """The logprob of one token a row among the row's candidates: float32 [R]; NaN where it is none."""
    row = ragged.rows(rows.count)
    own = rows.ids == tokens[row]
    level = np.full(len(rows.count), np.nan, np.float32)
    level[row[own]] = rows.logprobs[own]
    return level


def agreeing(rows: Rows, tokens: NDArray[Any], said: NDArray[Any], name: str, tally: Tally) -> NDArray[np.float32]:
    """The logprobs of the real tokens, where the producer says them twice: beside the candidates and among them.

    Args:
        rows: the candidates.
        tokens: the real tokens [R].
        said: their logprobs beside the candidates [R]; NaN where unknown.
        name: of that field.
        tally: counts where the two differ by more than rounding; those of the candidates are taken there.

    Raises:
        SourceError: they differ in most rows, so that rows are not where they should be.
    """
    listed = listed_of(rows, tokens)
    with np.errstate(over="ignore"):
        given = said.astype(np.float32)
    if bool(np.isnan(listed).all()):
        return given
    with np.errstate(invalid="ignore"):
        apart = np.abs(np.maximum(listed, CLAMPED) - np.maximum(given, CLAMPED))
    off = apart > _SAME + _SAME_SHARE * np.abs(listed)  # not where one is NaN
    both, wrong = int((~np.isnan(listed) & ~np.isnan(given)).sum()), int(off.sum())
    if both >= _LEAST_ROWS and 2 * wrong >= both:
        at = int(np.argmax(off))
        raise SourceError(
            f"{name}: row {at} gives the token {tokens[at]} the logprob {given[at]:.4g}, the candidates say "
            f"{listed[at]:.4g}, and so in {wrong} of {both} rows: they are not where they should be; capture it again"
        )
    tally.note(_TWICE_NOTE, wrong)
    return np.where(off, listed, given)


def is_next(rows: Rows, logprob: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether a token that is no candidate must be the best one behind them: no other has so much probability left.

    Args:
        rows: the candidates, normalised over the vocabulary.
        logprob: of that token [R]; NaN where unknown.
    """
    with np.errstate(over="ignore"):
        left = 1 - ragged.row_sums(np.exp(rows.logprobs, dtype=np.float64), rows.count)
        return np.asarray(2 * np.exp(logprob, dtype=np.float64) >= left + PROBABILITY_SLACK)


def bounded(sequences: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The sequences of one record, which may repeat its prompt many times: arguments of `Writer.add`.

    Raises:
        SourceError: together they are over the limit.
    """
    size = 0
    for number, found in enumerate(sequences):
        size += 2 * len(found["tokens"]) + len(found["ids"])  # a position takes more memory than a candidate
        if number and size > SEQUENCE_CANDIDATES:
            raise SourceError(
                f"choice {number}: the prompt and the candidates of all choices are over the limit of "
                f"{SEQUENCE_CANDIDATES} together; ask for fewer choices at once"
            )
        yield found


def ranks_of(rows: Rows, tokens: NDArray[Any]) -> NDArray[np.int64]:
    """The rank from 1 of one token a row among the row's candidates, by logprob and then id; 0 where it is none.

    Args:
        rows: the candidates, in any order.
        tokens: integers [R].
    """
    row = ragged.rows(rows.count)
    level = listed_of(rows, tokens)
    before = (rows.logprobs > level[row]) | ((rows.logprobs == level[row]) & (rows.ids < tokens[row]))
    ranks = 1 + np.bincount(row, before, minlength=len(rows.count)).astype(np.int64)
    return np.where(np.isfinite(level), ranks, 0)


def with_target(rows: Rows, tokens: NDArray[Any], logprob: NDArray[Any], rank: NDArray[Any] | None = None) -> Rows:
    """Rows whose producer says, beside the best candidates, the logprob of the token that really stands there.

    That token becomes a candidate where it belongs among them: its logprob is not below all of theirs, or its rank is
    the next one. Else only `target_logprob` and `target_rank` keep it, since candidates are ranks 1 to count without
    holes.

    Args:
        rows: the best candidates; a row may list the real token, or not.
        tokens: integers [R], the real tokens.
        logprob: floats [R], their logprobs; NaN where the producer gives none.
        rank: integers [R], their ranks from 1; 0 where unknown.
    """
    logprob = logprob.astype(np.float32)
    said = np.zeros(len(rows.count), np.int64) if rank is None else rank.astype(np.int64)
    row = ragged.rows(rows.count)
    listed = np.bincount(row, rows.ids == tokens[row], minlength=len(rows.count)) > 0
    lowest = np.full(len(rows.count), np.inf, np.float32)
    with np.errstate(invalid="ignore"):  # NaN, which the writer refuses
        np.minimum.at(lowest, row, rows.logprobs)
    belongs = (logprob >= lowest) | (said == rows.count + 1)
    added = ~listed & belongs & (logprob > CLAMPED)
    place = ragged.offsets(rows.count)[:-1][added]
    rows = replace(
        rows,
        count=rows.count + added,
        ids=np.insert(rows.ids, place, tokens[added]),
        logprobs=np.insert(rows.logprobs, place, logprob[added]),
    )
    within = ranks_of(rows, tokens)
    known = np.where(np.isneginf(logprob) | (logprob <= CLAMPED), np.float32(np.nan), logprob)
    return replace(rows, target_logprob=known, target_rank=np.where(within > 0, within, said))


def first_of_repeated(rows: Rows) -> Rows:
    """Leave out a candidate whose id stands before it in its row already."""
    row = ragged.rows(rows.count)
    order = np.lexsort((np.arange(len(row)), rows.ids, row))
    again = np.zeros(len(row), np.bool_)
    again[order[1:]] = (np.diff(rows.ids[order]) == 0) & (np.diff(row[order]) == 0)
    return rows.keep(~again)


def joined(parts: Iterable[Rows]) -> Rows:
    """Rows one after another; all have targets, or none."""
    listed = list(parts)
    targets = all(part.target_logprob is not None for part in listed)
    return Rows(
        np.concatenate([part.count for part in listed]),
        np.concatenate([part.ids for part in listed]),
        np.concatenate([part.logprobs for part in listed]),
        np.concatenate([part.target_logprob for part in listed]) if targets else None,
        np.concatenate([part.target_rank for part in listed]) if targets else None,
    )


def within_one(arguments: dict[str, Any], tally: Tally) -> dict[str, Any]:
    """Arguments of `Writer.add` whose sums are right, where rounding had brought them a little off.

    For what a lossy encoding has been through, an export of a dataset on a grid above all; never for what an engine
    says itself, where such a sum is a sign of wrong numbers. What the writer refuses anyway stays as it is.

    Args:
        arguments: `logprobs` [N] with `count` [T], or [T, k]; `tail` [T], or none.
        tally: counts the positions that were changed.
    """
    count, logprobs, tail = arguments.get("count"), arguments.get("logprobs"), arguments.get("tail")
    fits = logprobs is not None and logprobs.dtype.kind == "f" and logprobs.ndim == (2 if count is None else 1)
    if logprobs is None or not fits or not (tail is None or (tail.dtype.kind == "f" and tail.ndim == 1)):
        return arguments
    counts = np.full(len(logprobs), logprobs.shape[1]) if count is None else count
    flat_values = logprobs.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        mass = ragged.row_sums(np.exp(flat_values, dtype=np.float64), counts)
        rest = np.full(len(mass), np.nan) if tail is None else np.exp(tail, dtype=np.float64)
    total = mass + np.nan_to_num(rest, nan=0.0, posinf=np.inf)
    # A stored tail is rounded to 1/32 nat, by up to 1/64 of itself.
    off = np.where(np.isnan(rest), total > 1 + PROBABILITY_SLACK, np.abs(total - 1) > rest / 64 + PROBABILITY_SLACK)
    near = (counts > 0) & (total <= _ROUNDED) & (total >= 1 / _ROUNDED)
    near &= ragged.row_sums(flat_values > PROBABILITY_SLACK, counts) == 0  # no rounding: not a logprob at all
    scaled, lowered = near & off, near & ~off & (total > 1 + PROBABILITY_SLACK)
    if not bool((scaled | lowered).any()):
        return arguments
    tally.note(SCALED_NOTE, int(scaled.sum()))
    tally.note(LOWERED_NOTE, int(lowered.sum()))
    shift = np.where(scaled, np.log(np.where(scaled, total, 1.0)), 0.0).astype(np.float32)
    changed = {"logprobs": (flat_values - np.repeat(shift, counts)).astype(np.float32).reshape(logprobs.shape)}
    if tail is not None:
        with np.errstate(divide="ignore"):
            room = np.log(np.maximum(1 + PROBABILITY_SLACK / 2 - mass, 0.0))
        changed["tail"] = np.where(lowered, room, tail - shift).astype(np.float32)
    return arguments | changed
