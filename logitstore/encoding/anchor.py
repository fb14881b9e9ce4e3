"""The search for the bfloat16 logits behind float32 logprobs (spec, "bfloat16").

A model that computes logits in bfloat16 gives logprobs whose differences are differences of bfloat16 numbers.
An *anchor* of a position is a bfloat16 number x, taken as the best candidate's logit, such that every
x + (logprob[j] - logprob[0]) is bfloat16 too, within two units in the last place of the float32 logprob.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.encoding.ordinals import round_to_bfloat16

_ULPS: Final = 2.0
_EXPONENTS: Final = range(7, -5, -1)  # anchors from 256 down to 1/16: the best logits of language models and beyond
_FRACTIONS: Final = (
    1.0,
    0.5,
    0.02,
    0.25,
    0.75,
    0.05,
    0.12,
)  # ranks that are tried first; the last tells most
_EVIDENCE: Final = 4  # fewer candidates than this fit some anchor by chance
_BATCH: Final = 2048  # positions searched at once, which bounds memory


def slack(logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
    """How far a difference of logprobs may be off for rounding: two units in the last place, float64 [N]."""
    return _ULPS * np.spacing(np.abs(logprobs)).astype(np.float64)


class _Position:
    """The float64 differences to the best logprob of some positions, and how far each may be off."""

    def __init__(self, logprobs: NDArray[np.float32], count: NDArray[Any]) -> None:
        self.count = count.astype(np.int64)
        self.start = ragged.offsets(count)[:-1]
        self.difference = logprobs.astype(np.float64)
        self.difference -= ragged.spread(self.difference[self.start], count)
        self.slack = slack(logprobs)

    def fits(self, at: NDArray[np.int64], anchors: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether the candidates at these flat indexes are bfloat16 when their best logit is the anchor."""
        logits = self.difference[at] + anchors
        return np.asarray(np.abs(round_to_bfloat16(logits) - logits) <= self.slack[at])

    def probe(self, row: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
        """The flat index of one candidate of each row, by its relative rank."""
        rank = np.minimum(np.ceil((self.count[row] - 1) * fraction), self.count[row] - 1)
        return np.asarray(self.start[row] + rank.astype(np.int64))

    def all_fit(self, row: NDArray[np.int64], anchors: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether all candidates of these rows fit."""
        count = self.count[row]
        at = ragged.ranks(count) + ragged.spread(self.start[row], count)
        fits = self.fits(at, ragged.spread(anchors, count))
        return np.logical_and.reduceat(fits, ragged.offsets(count)[:-1])


def _possible(position: _Position, row: NDArray[np.int64], exponent: int) -> NDArray[np.bool_]:
    """Rows that an anchor in [2^e, 2^(e+1)) can fit at all, by a test without anchors.

    A candidate within 2^(e-1) of the best has a logit of at least 2^(e-1), and so both logits, and their
    difference, are multiples of the spacing of bfloat16 there, 2^(e-8).
    """
    possible = np.ones(len(row), np.bool_)
    spacing = 2.0 ** (exponent - 8)
    for fraction in _FRACTIONS:
        at = position.probe(row, fraction)
        difference = position.difference[at]
        off = np.abs(difference - np.rint(difference / spacing) * spacing)
        possible &= (off <= position.slack[at]) | (np.abs(difference) > 2.0 ** (exponent - 1))
    return possible


def _search_binade(
    position: _Position, row: NDArray[np.int64], anchors: NDArray[np.float64], found: NDArray[np.float64]
) -> None:
    """Fill in the first of these anchors that fits each row."""
    at = position.probe(row, _FRACTIONS[0])
    pair, which = np.nonzero(position.fits(at[:, None], anchors[None, :]))
    for fraction in _FRACTIONS[1:]:
        keep = position.fits(position.probe(row[pair], fraction), anchors[which])
        pair, which = pair[keep], which[keep]
    while len(pair):
        head = np.flatnonzero(np.concatenate([[True], pair[1:] != pair[:-1]]))
        heads = row[pair[head]]
        fits = position.all_fit(heads, anchors[which[head]])
        found[heads[fits]] = anchors[which[head][fits]]
        keep = np.isnan(found[row[pair]])
        keep[head] = False
        pair, which = pair[keep], which[keep]


def _search(logprobs: NDArray[np.float32], count: NDArray[Any]) -> NDArray[np.float64]:
    position = _Position(logprobs, count)
    found = np.full(len(count), np.nan)
    todo = np.arange(len(count))
    # From large to small: the coarsest grid that fits gives the smallest gaps.
    for exponent in _EXPONENTS:
        row = todo[_possible(position, todo, exponent)]
        anchors = 2.0**exponent * (1 + np.arange(127, -1, -1) / 128)
        for signed in (anchors, -anchors):
            row = row[np.isnan(found[row])]
            if len(row):
                _search_binade(position, row, signed, found)
        todo = todo[np.isnan(found[todo])]
        if len(todo) == 0:
            break
    return found


def find_anchors(logprobs: NDArray[np.float32], count: NDArray[Any]) -> NDArray[np.float64]:
    """An anchor for each position.

    Args:
        logprobs: float32 [N], finite, best first at each position.
        count: candidates of each position [P], all at least 1.

    Returns:
        float64 [P]: the best candidate's logit, NaN where none fits.
    """
    ends = ragged.offsets(count)
    return np.concatenate(
        [
            _search(logprobs[ends[a] : ends[min(a + _BATCH, len(count))]], count[a : a + _BATCH])
            for a in range(0, len(count), _BATCH)
        ]
        or [np.empty(0)]
    )


def is_likely(logprobs: NDArray[np.float32], count: NDArray[Any]) -> bool:
    """Whether a few of the positions all have anchors: a quick no for logprobs that were never bfloat16.

    Args:
        logprobs: as for `find_anchors`.
        count: as for `find_anchors`.
    """
    telling = np.flatnonzero(count >= _EVIDENCE)
    if len(telling) == 0:
        return False
    sample = telling[np.linspace(0, len(telling) - 1, min(8, len(telling))).astype(np.int64)]
    starts = ragged.offsets(count)[:-1]
    values = np.concatenate([logprobs[starts[row] : starts[row] + count[row]] for row in sample])
    return not bool(np.isnan(_search(values, count[sample])).any())
