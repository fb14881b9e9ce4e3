"""Stored sequences on a coarser grid, or with fewer candidates: from what is stored, without rounding it twice."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.encoding.values import Encoding, Values, decode_values
from logitstore.limits import PROBABILITY_SLACK
from logitstore.shard.chunk import UNKNOWN_RANK, ZERO_TAIL, StoredSequence, decode_tail, encode_tail

_GRIDS: Final = (Encoding.GRID, Encoding.GRID_WIDE)


def coarsen(sequence: StoredSequence, before: float, after: float) -> StoredSequence:
    """The sequence on a coarser grid; one that is not on the grid stays as it is.

    Steps under the best are rounded, halves to even. Where the sum of a position's probabilities would stray further
    from 1 than rounding once can make it, its halves are rounded the other way.

    Args:
        sequence: as it is stored.
        before: its resolution, nats a step.
        after: the coarser one.
    """
    values, count = sequence.values, sequence.count
    if values.encoding not in _GRIDS or len(sequence.ids) == 0 or before == after:
        return sequence
    counts = ragged.present(count)
    steps = ragged.running_sums(values.gaps, counts).astype(np.float64)
    steps *= before / after  # exact: powers of two
    rounded = np.rint(steps)
    halves = np.abs(steps - rounded) == 0.5
    if halves.any():
        logprobs = ragged.spread(values.top, counts) - rounded * after
        mass = ragged.row_sums(np.exp(logprobs), counts)
        tail = _tail(sequence)[count > 0]
        stray = mass + np.where(np.isnan(tail), 0.0, np.exp(tail)) - 1
        limit = math.expm1(after / 2)
        over, under = stray > limit, (stray < -limit) & ~np.isnan(tail)
        for wrong, rounding in ((over, np.ceil), (under, np.floor)):
            at = halves & ragged.spread(wrong, counts)
            rounded[at] = rounding(steps[at])
    gaps = ragged.differences(rounded, counts)
    return replace(sequence, values=_on_grid(values.top, gaps))


def keep_best(sequence: StoredSequence, k: int, resolution: float) -> StoredSequence:
    """The sequence with at most k candidates at each position; those that stay are not touched.

    The tail grows by the probability of the others. Where one of them is the token that follows, its logprob and rank
    are kept in the columns for that, unless they are there already.

    Args:
        sequence: as it is stored, not one of draws.
        k: at least 1.
        resolution: nats a step of the grid.
    """
    values, count = sequence.values, sequence.count
    cut = count > k
    if not cut.any():
        return sequence
    logprobs = decode_values(values.encoding, values.top, values.gaps, count, resolution, values.logsumexp)
    stays = ragged.ranks(count) < k
    kept = np.minimum(count, k).astype(np.uint32)
    gaps = values.gaps[stays[~ragged.firsts(count)]]
    cut_values = _on_grid(values.top, gaps) if values.encoding in _GRIDS else replace(values, gaps=gaps)
    optional = dict(sequence.optional)
    if "tail" in optional:
        rounding = math.expm1(resolution / 2) if values.encoding in _GRIDS else 0.0
        mass = np.exp(logprobs, dtype=np.float64)
        dropped = ragged.row_sums(np.where(stays, 0.0, mass), count)
        grown = _grown_tail(_tail(sequence), dropped, ragged.row_sums(mass, count) - dropped, rounding)
        optional["tail"] = np.where(cut, grown, optional["tail"]).astype(np.uint16)
    optional |= _dropped_targets(sequence, stays, logprobs)
    return replace(sequence, count=kept, ids=sequence.ids[stays], values=cut_values, optional=optional)


def _on_grid(top: NDArray[np.float32], gaps: NDArray[Any]) -> Values:
    """As a writer stores them: wide only where they have to be."""
    wide = len(gaps) > 0 and int(gaps.max()) > 0xFFFF
    return Values(Encoding.GRID_WIDE if wide else Encoding.GRID, top, gaps.astype(np.uint32 if wide else np.uint16))


def _tail(sequence: StoredSequence) -> NDArray[np.float64]:
    """[T], NaN where there is none."""
    if "tail" not in sequence.optional:
        return np.full(len(sequence.count), np.nan)
    return decode_tail(sequence.optional["tail"]).astype(np.float64)


def _grown_tail(
    tail: NDArray[np.float64], dropped: NDArray[np.float64], kept: NDArray[np.float64], rounding: float
) -> NDArray[np.uint16]:
    """The tail and what was dropped, as it is stored; a step aside where it would not complete the rest to 1.

    The tail was rounded before: rounded twice, it might stray further than once.

    Args:
        tail: [T], nats, NaN where there is none.
        dropped: [T], probability of the candidates that go.
        kept: [T], and of those that stay.
        rounding: how far the grid may have moved their sum.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = encode_tail(np.logaddexp(tail, np.log(dropped)))
    share = np.exp(decode_tail(steps), dtype=np.float64)
    stray = kept + share - 1
    slack = rounding + share / 60 + PROBABILITY_SLACK
    moved = steps.astype(np.int64) + (stray > slack) - (stray < -slack)
    numbers = (steps < ZERO_TAIL - 1) & (moved >= 0) & (moved < ZERO_TAIL)
    return np.where(numbers, moved, steps).astype(np.uint16)


def _dropped_targets(
    sequence: StoredSequence, stays: NDArray[np.bool_], logprobs: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """Logprob and rank of the tokens that follow, where they are among the candidates that go."""
    count = sequence.count
    following = np.empty(len(count), np.uint32)
    following[:-1] = sequence.tokens[1:]
    targets = ~stays & (sequence.ids == ragged.spread(following, count))
    targets[int(count[:-1].sum(dtype=np.int64)) :] = False  # nothing follows the last position
    at = np.flatnonzero(targets)
    if len(at) == 0:
        return {}
    ends = ragged.offsets(count)
    position = np.searchsorted(ends, at, side="right") - 1
    logprob = sequence.optional.get("target_logprob", np.full(len(count), np.nan, np.float32)).copy()
    rank = sequence.optional.get("target_rank", np.full(len(count), UNKNOWN_RANK, np.uint32)).copy()
    logprob[position] = np.where(np.isnan(logprob[position]), logprobs[at], logprob[position])
    place = (at - ends[position] + 1).astype(np.uint32)
    rank[position] = np.where(rank[position] == UNKNOWN_RANK, place, rank[position])
    return {"target_logprob": logprob, "target_rank": rank}
