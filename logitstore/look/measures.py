"""What the distributions of a sequence say, position by position, in float64.

Logprobs are natural logs; entropies are in nats. Row t predicts tokens[t + 1], the *target*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.limits import PROBABILITY_SLACK
from logitstore.shard.sequence import Sequence

COLUMNS: Final = ("tokens", "ids", "logprobs", "draws", "tail", "target_logprob", "target_rank", "entropy")
"""What has to be selected for `measure`."""

ENTROPIES: Final = ("stored", "candidates and tail", "draws", "candidates")
"""Where the entropy of a position is from: the whole vocabulary; the candidates, and the tail as one class, which is a
lower bound; the draws, which is an estimate; the candidates alone, of which only ratios are known."""

_MOST: Final = 2.0  # probabilities of one position sum to at most exp(1 / 2), by the coarsest grid


@dataclass(frozen=True, slots=True)
class Measures:
    """T positions; NaN (rank: 0) where something is unknown.

    Attributes:
        scored: bool [T], whether there is a distribution, and no number in it is impossible.
        impossible: bool [T]: a logprob that is no number or infinite, or probabilities that sum to over 2: what is
            forged. Nothing else is known of such a position.
        logprobs: float64 [N] of the candidates; made to sum to one where only their ratios are known.
        probabilities: float64 [N], likewise.
        coverage: float64 [T], the probability that the candidates have together; NaN where that is not known: sampled
            distributions, and those normalised over the candidates.
        tail: float64 [T], the stored probability of everything else; NaN likewise.
        entropy: float64 [T]: the stored entropy, else what `entropy_without_stored` says.
        entropy_is_stored: bool [T].
        target_place: int64 [T], place of the target among the candidates from 0; -1 where it is none.
        target_rank: int64 [T], rank of the target from 1: as stored, else by its place; 0 where unknown.
        target_logprob: float64 [T]: as stored, else that of the candidate.
        target_is_exact: bool [T]: the logprob is stored, or that of a candidate, and the distributions are neither
            sampled nor normalised over the candidates.
        has_target: bool [T]: a distribution, and a token after it.
    """

    scored: NDArray[np.bool_]
    impossible: NDArray[np.bool_]
    logprobs: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    coverage: NDArray[np.float64]
    tail: NDArray[np.float64]
    entropy: NDArray[np.float64]
    entropy_is_stored: NDArray[np.bool_]
    target_place: NDArray[np.int64]
    target_rank: NDArray[np.int64]
    target_logprob: NDArray[np.float64]
    target_is_exact: NDArray[np.bool_]
    has_target: NDArray[np.bool_]


def measure(sequence: Sequence, lengths: NDArray[Any] | None = None) -> Measures:
    """The measures of a sequence, which has `COLUMNS`.

    Args:
        sequence: one, or several joined.
        lengths: positions of each of several; None: it is one.
    """
    count = sequence.count
    with_tail = has_tail(sequence)
    logprobs = normalised_logprobs(sequence.logprobs, count, sequence.normalised)
    with np.errstate(all="ignore"):  # NaN and log 0 are what they should be; forged values may overflow
        probabilities = np.exp(logprobs)
        mass = ragged.row_sums(probabilities, count)
        inside = ragged.row_dots(probabilities, logprobs, count)
        impossible = ~(mass <= _MOST) | ~np.isfinite(inside)
        tail = np.exp(sequence.tail, dtype=np.float64) if with_tail else np.full(len(count), np.nan)
        entropy = _entropy(mass, inside, tail if with_tail else np.zeros(len(count)))
    impossible |= tail > _MOST
    scored = (count > 0) & ~impossible
    for values in (entropy, tail):
        values[~scored] = np.nan
    is_stored = np.zeros(len(count), np.bool_)
    if sequence.entropy is not None:
        is_stored = scored & np.isfinite(sequence.entropy) & (sequence.entropy >= 0)
        entropy[is_stored] = sequence.entropy[is_stored]
    following, has_following = _following(sequence.tokens, lengths)
    place, at = _places(sequence, following)
    rank = place + 1
    target = np.where(place >= 0, logprobs[at], np.nan) if len(logprobs) else np.full(len(count), np.nan)
    exact = np.full(len(count), with_tail) & (place >= 0)
    if sequence.target_rank is not None:
        rank = np.where(sequence.target_rank > 0, sequence.target_rank, rank)
    if sequence.target_logprob is not None:
        known = np.isfinite(sequence.target_logprob) & (sequence.target_logprob <= PROBABILITY_SLACK)
        target = np.where(known, sequence.target_logprob, target)
        exact |= known
    has_target = scored & has_following
    return Measures(
        scored=scored,
        impossible=impossible,
        logprobs=logprobs,
        probabilities=probabilities,
        coverage=np.where(scored, mass, np.nan) if with_tail else np.full(len(count), np.nan),
        tail=tail,
        entropy=entropy,
        entropy_is_stored=is_stored,
        target_place=np.where(has_target, place, -1),
        target_rank=np.where(has_target, rank, 0),
        target_logprob=np.where(has_target, target, np.nan),
        target_is_exact=exact & has_target,
        has_target=has_target,
    )


def has_tail(sequence: Sequence) -> bool:
    """Whether the probability outside the candidates is known: they are neither sampled nor all that was kept."""
    return sequence.normalised == "vocabulary" and sequence.draws is None


def entropy_without_stored(sequence: Sequence) -> str:
    """Where the entropy of a position is from that is not stored, one of `ENTROPIES`."""
    if sequence.draws is not None:
        return ENTROPIES[2]
    return ENTROPIES[1] if sequence.normalised == "vocabulary" else ENTROPIES[3]


def everything_else(sequence: Sequence, measured: Measures, listed: int) -> NDArray[np.float64]:
    """Probability, float64 [T], of all tokens but the best candidates listed and the target; NaN where unknown.

    That of the tail too, where there can be one; 0 where there is nothing else. A target that is not listed is shown on
    a line of its own; where its probability is not known, it is contained.
    """
    count = sequence.count
    unlisted = np.where(ragged.ranks(count) < listed, 0.0, measured.probabilities)
    rest = ragged.row_sums(unlisted, count)
    if has_tail(sequence):
        rest = rest + measured.tail
    inside = has_tail(sequence) | (measured.target_place >= 0)
    own_line = inside & ((measured.target_place < 0) | (measured.target_place >= listed))
    stored = np.exp(measured.target_logprob)
    stored[np.isnan(stored)] = 0.0
    own = np.where(own_line, stored, 0.0)
    among = own_line & (measured.target_place >= 0)  # what is stored beside may be of another kind
    own[among] = measured.probabilities[sequence.offsets[:-1][among] + measured.target_place[among]]
    rest = np.clip(rest - own, 0.0, 1.0)  # rounding: stored probabilities may add up to a little more than one
    nothing = count.astype(np.int64) - listed - (measured.target_place >= listed) <= 0
    if has_tail(sequence):
        nothing &= measured.tail == 0
    rest[nothing] = 0.0  # which rounding need not say
    rest[~measured.scored] = np.nan
    return np.asarray(rest)


def joined(sequences: list[Sequence]) -> Sequence:
    """Short sequences as one, for `measure`: numpy is slow on few numbers. They are sampled all, or none is.

    Optional columns that only some of them have are NaN (rank: 0) in the others.
    """
    if len(sequences) == 1:
        return sequences[0]
    fields: dict[str, Any] = {"id": sequences[0].id, "normalised": sequences[0].normalised}
    for name in ("tokens", "count", "ids", "logprobs", "tail"):
        fields[name] = np.concatenate([getattr(sequence, name) for sequence in sequences])
    for name, unknown in (("target_logprob", np.nan), ("target_rank", 0), ("entropy", np.nan), ("draws", None)):
        given = [getattr(sequence, name) for sequence in sequences]
        if all(values is None for values in given):
            fields[name] = None
        else:
            filled = [np.full(len(s), unknown) if v is None else v for s, v in zip(sequences, given, strict=True)]
            fields[name] = np.concatenate(filled)
    fields["offsets"] = ragged.offsets(fields["count"])
    return Sequence.of(fields)


def normalised_logprobs(logprobs: NDArray[np.float32], count: NDArray[Any], normalised: str) -> NDArray[np.float64]:
    """Logprobs, float64 [N]; made to sum to one where they are normalised over the candidates: only ratios are known.

    Args:
        logprobs: float32 [N].
        count: candidates of each position [T].
        normalised: `vocabulary` or `candidates`.
    """
    values = logprobs.astype(np.float64)
    if normalised != "candidates" or len(values) == 0:
        return values
    present = ragged.present(count)
    with np.errstate(all="ignore"):  # forged values may be infinite
        values -= ragged.spread(ragged.heads(values, present), present)  # the best is 0: no sum overflows
        return np.asarray(values - ragged.spread(np.log(ragged.row_sums(np.exp(values), present)), present))


def _entropy(mass: NDArray[np.float64], inside: NDArray[np.float64], tail: NDArray[np.float64]) -> NDArray[np.float64]:
    """-sum of p log p over candidates and tail, both divided by their sum.

    Args:
        mass: sum of the candidates' p [T].
        inside: sum of their p log p [T].
        tail: p of the tail [T].
    """
    total = mass + tail
    outside = np.where(tail == 0, 0.0, tail * np.log(tail))
    return np.asarray(np.log(total) - (inside + outside) / total)


def _following(tokens: NDArray[np.uint32], lengths: NDArray[Any] | None) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """(token after each position, -1 where the sequence ends; whether it does not end there)."""
    following = np.full(len(tokens), -1, np.int32)
    following[:-1] = tokens[1:].view(np.int32)
    if lengths is not None:
        following[np.cumsum(lengths[lengths > 0]) - 1] = -1
    return following, following >= 0


def _places(sequence: Sequence, following: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(place among the candidates, else -1; place in the flat arrays, else 0) of what follows each position: [T]."""
    count, length = sequence.count, len(sequence.count)
    if k := ragged.uniform(count):
        at = np.flatnonzero(sequence.ids.reshape(-1, k) == following[:, None])
        row, inside = np.divmod(at, k)
    else:
        at = np.flatnonzero(sequence.ids == ragged.spread(following, count))
        row = np.searchsorted(sequence.offsets, at, side="right") - 1
        inside = at - sequence.offsets[row]
    place, flat = np.full(length, -1, np.int64), np.zeros(length, np.int64)
    place[row], flat[row] = inside, at
    return place, flat
