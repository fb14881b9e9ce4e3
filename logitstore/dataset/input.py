"""What callers hand in, checked and brought into the format's order: pure functions, no I/O.

Candidates are sorted by the logprob given, equal ones by id; then cut; rounding comes later and changes no order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, InvalidTypeError
from logitstore.limits import (
    ID_LIMIT,
    PROBABILITY_SLACK,
    SEQUENCE_POSITIONS,
)
from logitstore.shard.chunk import UNKNOWN_MASK, UNKNOWN_RANK

FLOAT_COLUMNS: Final = ("target_logprob", "logsumexp", "entropy")


@dataclass(frozen=True, slots=True)
class Cut:
    """How many candidates of a position to keep: the smallest set that reaches `top_p`, from `min_k` to `top_k`."""

    top_k: int | None = None
    top_p: float | None = None
    min_k: int = 1

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise InvalidInputError(f"top_k is {self.top_k}; it is at least 1, or None to keep all candidates")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_p is {self.top_p}; it is above 0 and at most 1, or None")
        if self.min_k < 1 or (self.top_k is not None and self.min_k > self.top_k):
            raise InvalidInputError(f"min_k is {self.min_k}; it is at least 1 and at most top_k ({self.top_k})")


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of a sequence.

    Attributes:
        count: [T].
        ids: [N].
        logprobs: [N], nats.
        logits: [N] behind the logprobs, where known.
    """

    count: NDArray[np.uint32]
    ids: NDArray[Any]
    logprobs: NDArray[np.float32]
    logits: NDArray[np.float32] | None = None

    def keep(self, mask: NDArray[np.bool_]) -> Candidates:
        """Only those candidates."""
        if bool(mask.all()):
            return self
        count = ragged.row_sums(mask, self.count).astype(np.uint32)
        return Candidates(
            count, self.ids[mask], self.logprobs[mask], None if self.logits is None else self.logits[mask]
        )


def as_array(name: str, value: ArrayLike, kinds: str, what: str) -> NDArray[Any]:
    """A numpy array of one of these dtype kinds.

    Raises:
        InvalidTypeError: it is something else.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidTypeError(
            f"{name} cannot become one array ({error}); give ragged data flat, with count"
        ) from error
    if array.size == 0 and array.dtype == np.float64 and not isinstance(value, np.ndarray):
        array = array.astype(np.int64 if "f" not in kinds else np.float32)  # [] has no dtype of its own
    if array.dtype.kind not in kinds:
        raise InvalidTypeError(f"{name} has dtype {array.dtype}; {what} are needed")
    return array


def as_tokens(tokens: ArrayLike) -> NDArray[np.uint32]:
    """Input tokens, uint32 [T].

    Raises:
        InvalidInputError: wrong dtype, shape or range, or too many.
    """
    array = as_array("tokens", tokens, "iu", "integers")
    if array.ndim != 1:
        raise InvalidInputError(f"tokens has shape {list(array.shape)}; one sequence, [T], is needed")
    if len(array) > SEQUENCE_POSITIONS:
        raise InvalidInputError(f"{len(array)} positions, over the limit of {SEQUENCE_POSITIONS}: cut the sequence up")
    if len(array) and not (int(array.min()) >= 0 and int(array.max()) < ID_LIMIT):
        at = int(np.flatnonzero((array < 0) | (array >= ID_LIMIT))[0])
        raise InvalidInputError(f"position {at}: the token {array[at]} is not between 0 and {ID_LIMIT - 1}")
    return array.astype(np.uint32)


def as_ragged(
    ids: ArrayLike,
    values: ArrayLike,
    count: ArrayLike | None,
    positions: int,
    name: str,
    kinds: str,
    what: str,
) -> tuple[NDArray[np.uint32], NDArray[Any], NDArray[Any]]:
    """Candidates given as [T, k], or flat [N] with `count` [T].

    Returns:
        (count uint32 [T], ids [N], values [N]).

    Raises:
        InvalidInputError: dtypes, shapes and lengths do not fit each other.
    """
    id_array = as_array("ids", ids, "iu", "integers")
    array = as_array(name, values, kinds, what)
    if id_array.shape != array.shape:
        raise InvalidInputError(f"ids has shape {list(id_array.shape)} and {name} {list(array.shape)}")
    if array.ndim == 2 and count is None:
        if len(array) != positions:
            raise InvalidInputError(
                f"{name} has {len(array)} rows for {positions} tokens; row t predicts tokens[t + 1], and a position "
                f"without a distribution has count 0 (flat arrays with count=) or only -inf"
            )
        return np.full(positions, array.shape[1], np.uint32), id_array.ravel(), array.ravel()
    if array.ndim != 1 or count is None:
        raise InvalidInputError(
            f"{name} has shape {list(array.shape)}; [T, k] is needed, or flat [N] together with count [T]"
        )
    counts = as_array("count", count, "iu", "integers")
    if counts.shape != (positions,):
        raise InvalidInputError(f"count has shape {list(counts.shape)} for {positions} tokens")
    if positions and int(counts.min()) < 0:
        at = int(np.argmin(counts))
        raise InvalidInputError(f"position {at}: count is {counts[at]}")
    if int(counts.sum(dtype=np.int64)) != len(array):
        raise InvalidInputError(f"count sums to {counts.sum(dtype=np.int64)}, but {len(array)} candidates are given")
    return counts.astype(np.uint32), id_array, array


def order_candidates(
    count: NDArray[np.uint32], ids: NDArray[Any], logprobs: NDArray[Any], width: int | None
) -> Candidates:
    """Leave out those of probability zero, check the rest, and sort.

    Args:
        count: [T].
        ids: integers [N].
        logprobs: floats [N], nats.
        width: ids must be below it; None: below 2^31.

    Raises:
        InvalidInputError: naming position and value.
    """
    given = Candidates(count, ids, logprobs.astype(np.float32, copy=False))
    if len(ids) == 0:
        return given
    highest, lowest = float(given.logprobs.max()), float(given.logprobs.min())
    if np.isnan(highest):
        raise _at(given, np.isnan(given.logprobs), "is NaN")
    if highest > PROBABILITY_SLACK:
        raise _at(given, given.logprobs > PROBABILITY_SLACK, "is above 0: not a logprob (a logit, or a probability?)")
    if lowest == -np.inf:
        given = given.keep(given.logprobs > -np.inf)
    return sort_candidates(check_ids(given, width)) if len(given.ids) else given


def check_ids(given: Candidates, width: int | None) -> Candidates:
    """Refuse ids out of range, and an id twice at one position; the same candidates with ids of int32.

    Raises:
        InvalidInputError: naming position and id.
    """
    limit = ID_LIMIT if width is None else width
    if int(given.ids.min()) < 0 or int(given.ids.max()) >= limit:
        where = "below 2^31" if width is None else f"below the logit width {width}"
        raise _at(given, (given.ids < 0) | (given.ids >= limit), f"is not at least 0 and {where}", ids=True)
    given = replace(given, ids=given.ids.astype(np.int32, copy=False))
    if k := ragged.uniform(given.count):
        ordered = np.sort(given.ids.reshape(-1, k), axis=1)
        flat = ordered.ravel()
        if not bool((flat[1:] == flat[:-1]).any()):  # across the ends of rows too, but one pass over whole memory
            return given
        twice = ordered[:, 1:] == ordered[:, :-1]
        if bool(twice.any()):
            at = np.argwhere(twice)[0]
            raise InvalidInputError(f"position {at[0]}: the id {ordered[at[0], at[1]]} stands there twice")
        return given
    row = ragged.rows(given.count)
    place = np.lexsort((given.ids, row))
    twice = (np.diff(given.ids[place]) == 0) & (np.diff(row) == 0)
    if bool(twice.any()):
        at = np.flatnonzero(twice)[0]
        raise InvalidInputError(f"position {row[at]}: the id {given.ids[place][at]} stands there twice")
    return given


def sort_candidates(given: Candidates) -> Candidates:
    """Best first at each position, equal ones by id."""
    before, after = given.logprobs[:-1], given.logprobs[1:]
    suspect = np.flatnonzero(after >= before)  # few: where rows begin, and ties
    rises = (after[suspect] > before[suspect]) | (given.ids[suspect + 1] < given.ids[suspect])
    wrong = suspect[rises & ~ragged.are_firsts(suspect + 1, given.count)]
    if len(wrong) == 0:
        return given
    row = ragged.rows(given.count)
    # Engines sort already; only the positions that are not in order are sorted, most often for ties.
    mixed = np.zeros(len(given.count), np.bool_)
    mixed[row[wrong]] = True
    at = np.flatnonzero(mixed[row])
    place = np.arange(len(row))
    place[at] = at[np.lexsort((given.ids[at], -given.logprobs[at], row[at]))]
    return Candidates(given.count, given.ids[place], given.logprobs[place])


@dataclass(frozen=True, slots=True)
class Kept:
    """Candidates after cutting; the probability at each position of those kept, and of those given (float64 [T])."""

    candidates: Candidates
    mass: NDArray[np.float64]
    given_mass: NDArray[np.float64]


def cut_candidates(given: Candidates, cut: Cut) -> Kept:
    """Keep the best candidates.

    Raises:
        InvalidInputError: the probabilities at a position sum to more than 1 + 1e-4.
    """
    probability = np.exp(given.logprobs, dtype=np.float64)  # a small tail is what float32 would lose of a sum near 1
    sums = ragged.row_sums(probability, given.count)
    if len(sums) and float(sums.max()) > 1 + PROBABILITY_SLACK:
        at = int(np.argmax(sums))
        raise InvalidInputError(
            f"position {at}: the probabilities sum to {sums[at]:.6f}; logprobs normalised over the vocabulary "
            f"(or the candidates) sum to at most 1"
        )
    if cut.top_k is None and cut.top_p is None:
        return Kept(given, sums, sums)
    rank = ragged.ranks(given.count)
    mask = np.ones(len(rank), np.bool_) if cut.top_k is None else rank < cut.top_k
    if cut.top_p is not None:
        before = np.cumsum(probability) - probability
        before -= ragged.spread(ragged.heads(before, given.count), given.count[given.count > 0])
        mask &= (before < cut.top_p) | (rank < cut.min_k)
    kept = given.keep(mask)
    return Kept(kept, ragged.row_sums(probability[mask], kept.count), sums)


def tail_of(tail: ArrayLike | None, kept: Kept) -> NDArray[np.float64]:
    """Log of the probability that the kept candidates do not cover, float64 [T], NaN where there is none.

    Args:
        tail: as given by the caller for the candidates before cutting, or None to derive it.
        kept: the candidates kept.

    Raises:
        InvalidInputError: a given tail is above 0, or does not fit its candidates.
    """
    empty = kept.candidates.count == 0
    if tail is None:
        with np.errstate(divide="ignore"):
            derived = np.log1p(-np.minimum(kept.mass, 1.0))
        derived[empty] = np.nan
        return derived
    array = as_floats("tail", tail, len(empty)).astype(np.float64)
    over = np.exp(array) + kept.given_mass > 1 + PROBABILITY_SLACK
    if bool(over.any()):
        at = int(np.flatnonzero(over)[0])
        raise InvalidInputError(
            f"position {at}: the candidates' probability {kept.given_mass[at]:.6f} and the tail's "
            f"{np.exp(array[at]):.6f} sum to more than 1; the tail is the log of the probability that the candidates "
            f"do not cover"
        )
    array[empty] = np.nan
    with np.errstate(divide="ignore", invalid="ignore"):  # log 0 is what it should be
        return np.logaddexp(array, np.log(np.maximum(kept.given_mass - kept.mass, 0.0)))


def as_floats(name: str, values: ArrayLike, positions: int) -> NDArray[np.float32]:
    """One float a position, NaN where unknown: float32 [T].

    Raises:
        InvalidInputError: wrong dtype or length, or +inf.
    """
    array = as_array(name, values, "fiu", "floats")
    if array.shape != (positions,):
        raise InvalidInputError(
            f"{name} has shape {list(array.shape)} for {positions} tokens; one a position is needed"
        )
    array = array.astype(np.float32)
    if bool(np.isposinf(array).any()):
        raise InvalidInputError(f"position {int(np.argmax(np.isposinf(array)))}: {name} is infinite")
    return array


def as_ranks(ranks: ArrayLike, positions: int) -> NDArray[np.uint32]:
    """Ranks from 1, 0 or less where unknown, as they are stored.

    Raises:
        InvalidInputError: wrong dtype or length.
    """
    array = as_array("target_rank", ranks, "iu", "integers")
    if array.shape != (positions,):
        raise InvalidInputError(f"target_rank has shape {list(array.shape)} for {positions} tokens")
    return np.where((array <= 0) | (array >= UNKNOWN_RANK), UNKNOWN_RANK, array).astype(np.uint32)


def as_mask(mask: ArrayLike, positions: int) -> NDArray[np.uint16]:
    """1 where a row is trained on, 0 where not, -1 where unknown, as they are stored.

    Raises:
        InvalidInputError: wrong dtype, length or values.
    """
    array = as_array("loss_mask", mask, "biu", "integers or booleans")
    if array.shape != (positions,):
        raise InvalidInputError(f"loss_mask has shape {list(array.shape)} for {positions} tokens")
    array = array.astype(np.int64)
    if not bool(np.isin(array, (0, 1, -1)).all()):
        at = int(np.flatnonzero(~np.isin(array, (0, 1, -1)))[0])
        raise InvalidInputError(f"position {at}: loss_mask is {array[at]}; it is 0 or 1")
    return np.where(array < 0, UNKNOWN_MASK, array).astype(np.uint16)


def _at(given: Candidates, wrong: NDArray[np.bool_], says: str, *, ids: bool = False) -> InvalidInputError:
    at = int(np.flatnonzero(wrong)[0])
    position = int(np.searchsorted(ragged.offsets(given.count), at, side="right")) - 1
    what = f"the id {given.ids[at]}" if ids else f"the logprob {given.logprobs[at]} of the id {given.ids[at]}"
    return InvalidInputError(f"position {position}: {what} {says}")


@dataclass(frozen=True, slots=True)
class DrawnCandidates:
    """Candidates that were drawn: `count` uint32 [T], `ids` uint32 [N], `draws` uint32 [N], at least 1."""

    count: NDArray[np.uint32]
    ids: NDArray[np.uint32]
    draws: NDArray[np.uint32]


def order_draws(
    count: NDArray[np.uint32], ids: NDArray[Any], draws: NDArray[Any], n: int | ArrayLike, width: int | None
) -> DrawnCandidates:
    """Leave out what was never drawn, and check the rest.

    Args:
        count: [T].
        ids: integers [N].
        draws: integers [N].
        n: draws at each position, one number or [T].
        width: ids must be below it; None: below 2^31.

    Raises:
        InvalidInputError: naming position and value.
    """
    if len(draws) and int(draws.min()) < 0:
        raise InvalidInputError(f"a candidate has {int(draws.min())} draws")
    drawn = draws > 0
    given = Candidates(count, ids, draws.astype(np.float32)).keep(drawn)
    draws = draws[drawn].astype(np.int64)
    if len(draws):
        given = check_ids(given, width)
    totals = np.asarray(n)
    if totals.dtype.kind not in "iu" or totals.shape not in ((), count.shape):
        raise InvalidInputError("n is one integer, or one a position")
    sums = ragged.row_sums(draws, given.count)
    wrong = (sums != totals) & (given.count > 0)
    if bool(wrong.any()):
        at = int(np.flatnonzero(wrong)[0])
        said = int(np.broadcast_to(totals, count.shape)[at])
        raise InvalidInputError(f"position {at}: the draws sum to {int(sums[at])}, but n is {said}")
    if len(sums) and float(sums.max()) >= 2**31:
        raise InvalidInputError(f"position {int(np.argmax(sums))}: 2^31 draws or more")
    return DrawnCandidates(given.count, given.ids.astype(np.uint32), draws.astype(np.uint32))
