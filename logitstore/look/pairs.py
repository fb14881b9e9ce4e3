"""How far two teachers' distributions at the same positions are apart, in float64; natural logs, nats.

Both are taken over the candidates that they share and one class for everything else, *the rest*: candidates that only
one of them has, and the tail. That makes KL and JSD lower bounds (the log-sum inequality); JSD has an upper bound too,
where the rests have nothing in common; KL has none, since a token's probability in the other tail may be as small as
one likes. They are bounds for the distributions as they are stored: a tail is stored to 1/64 nat, and a grid's values
to half a step, which alone may make up 1e-5 nats, and where a tail holds much, 1e-3.

Each distribution is divided by the sum of its candidates and tail, which rounding moves from 1. A tail of zero counts
as 2^-24: the sum of float32 probabilities does not tell less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.look.measures import Measures, has_tail
from logitstore.look.summaries import Moments
from logitstore.shard.sequence import Sequence

LEAST_TAIL: Final = 2.0**-24
"""The probability that a tail counts with at least."""

_NOTHING: Final = 1e-15
_WITH_REST: Final = ("kl_ab", "kl_ba", "jsd", "jsd_at_most", "shared_a", "shared_b", "entropy_a", "entropy_b")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sequences' distributions at R rows, where both have one; NaN where a divergence is not known.

    Attributes:
        rows: int64 [R], positions.
        kl_ab: float64 [R], lower bound of KL(a ‖ b).
        kl_ba: float64 [R], lower bound of KL(b ‖ a).
        jsd: float64 [R], lower bound of the Jensen-Shannon divergence.
        jsd_at_most: float64 [R], its upper bound.
        agree: bool [R], whether the best candidates are the same token.
        overlap: float64 [R], shared candidates over the smaller number of candidates.
        shared_a: float64 [R], a's probability of the shared candidates; NaN where only ratios are known.
        shared_b: float64 [R], b's.
        entropy_a: float64 [R], of a over the shared candidates and the rest; NaN where there is no rest.
        entropy_b: float64 [R], of b.
        identical: bool [R], the same candidates with the same logprobs.
        moved: |logprob in a - logprob in b| of the shared candidates.
    """

    rows: NDArray[np.int64]
    kl_ab: NDArray[np.float64]
    kl_ba: NDArray[np.float64]
    jsd: NDArray[np.float64]
    jsd_at_most: NDArray[np.float64]
    agree: NDArray[np.bool_]
    overlap: NDArray[np.float64]
    shared_a: NDArray[np.float64]
    shared_b: NDArray[np.float64]
    entropy_a: NDArray[np.float64]
    entropy_b: NDArray[np.float64]
    identical: NDArray[np.bool_]
    moved: Moments


def pair(a: Sequence, b: Sequence, of_a: Measures, of_b: Measures) -> Pair:
    """Compare two sequences of the same tokens, at the positions where both have a distribution of possible numbers.

    Args:
        a: the first.
        b: the second.
        of_a: its measures.
        of_b: likewise.
    """
    rows = np.flatnonzero(of_a.scored & of_b.scored)
    at_a, at_b = _shared(a, b)
    at = ragged.rows(a.count)[at_a]  # the position of each shared candidate

    def at_rows(weights: NDArray[Any] | None = None) -> NDArray[Any]:
        return np.bincount(at, weights, minlength=len(a.count))[rows]

    count_a, count_b, n = a.count[rows].astype(np.int64), b.count[rows].astype(np.int64), at_rows()
    with np.errstate(all="ignore"):  # what is forged is in none of the rows
        moved = np.abs(of_a.logprobs[at_a] - of_b.logprobs[at_b])
        known: dict[str, NDArray[np.float64]] = dict.fromkeys(_WITH_REST, np.full(len(rows), np.nan))
        if has_tail(a) and has_tail(b):
            known = _divergences(_Side.of(a, of_a, at_a, at), _Side.of(b, of_b, at_b, at), at, rows)
    wanted = (of_a.scored & of_b.scored)[at]
    return Pair(
        rows=rows,
        **known,
        agree=a.ids[a.offsets[rows]] == b.ids[b.offsets[rows]],
        overlap=n / np.minimum(count_a, count_b),
        identical=(at_rows(moved == 0) == count_a) & (n == count_b),
        moved=Moments.of(moved[wanted]),
    )


def _shared(a: Sequence, b: Sequence) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the candidates are that both have at the same position: (in a, in b), in the order of a."""
    keys_a = (ragged.rows(a.count) << 31) | a.ids
    keys_b = (ragged.rows(b.count) << 31) | b.ids
    if len(keys_a) == len(keys_b) and bool((keys_a == keys_b).all()):
        every = np.arange(len(keys_a))
        return every, every
    if len(keys_b) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    order = np.argsort(keys_b)
    ordered = keys_b[order]
    place = np.minimum(np.searchsorted(ordered, keys_a), len(ordered) - 1)
    found = np.flatnonzero(ordered[place] == keys_a)
    return found, order[place[found]]


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two: log p [M] of the shared candidates, and the probabilities [T] of those and of the rest."""

    log_p: NDArray[np.float64]
    shared: NDArray[np.float64]
    rest: NDArray[np.float64]

    @classmethod
    def of(cls, sequence: Sequence, measured: Measures, shared: NDArray[np.int64], at: NDArray[np.int64]) -> _Side:
        tail = np.maximum(np.exp(sequence.tail, dtype=np.float64), LEAST_TAIL)
        p = measured.probabilities
        whole = ragged.row_sums(p, sequence.count) + tail
        alone = p.copy()
        alone[shared] = 0.0
        inside = np.bincount(at, p[shared], minlength=len(sequence.count))
        # Not 1 - shared: near 1, that would keep few digits.
        return cls(
            log_p=measured.logprobs[shared] - np.log(whole)[at],
            shared=inside / whole,
            rest=(ragged.row_sums(alone, sequence.count) + tail) / whole,
        )


def _divergences(p: _Side, q: _Side, at: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Those of `_WITH_REST` at these rows."""
    shared_p, shared_q = np.exp(p.log_p), np.exp(q.log_p)
    log_mean = np.log((shared_p + shared_q) / 2)
    rest_p, rest_q = p.rest[rows], q.rest[rows]
    rest_mean = (rest_p + rest_q) / 2

    def inside(weights: NDArray[np.float64]) -> NDArray[Any]:
        return np.bincount(at, weights, minlength=len(p.rest))[rows]

    kl_pq = inside(shared_p * (p.log_p - q.log_p)) + rest_p * np.log(rest_p / rest_q)
    kl_qp = inside(shared_q * (q.log_p - p.log_p)) + rest_q * np.log(rest_q / rest_p)
    among = inside(shared_p * (p.log_p - log_mean) + shared_q * (q.log_p - log_mean)) / 2
    rest = (rest_p * np.log(rest_p / rest_mean) + rest_q * np.log(rest_q / rest_mean)) / 2
    return {
        "kl_ab": _from_zero(kl_pq),
        "kl_ba": _from_zero(kl_qp),
        "jsd": _from_zero(among + rest),
        "jsd_at_most": among + rest_mean * np.log(2),
        "shared_a": p.shared[rows],
        "shared_b": q.shared[rows],
        "entropy_a": -inside(shared_p * p.log_p) - rest_p * np.log(rest_p),
        "entropy_b": -inside(shared_q * q.log_p) - rest_q * np.log(rest_q),
    }


def _from_zero(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A divergence without what float64 leaves of nothing."""
    return np.where(values < _NOTHING, 0.0, values)  # NaN stays
