"""What the distributions of a sequence say, position by position, in float64.

Logprobs are natural logs; entropies are in nats. Row t predicts tokens[t + 1], the *target*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.shard.sequence import Sequence

COLUMNS: Final = ("tokens", "ids", "logprobs", "draws", "tail", "target_logprob", "target_rank", "entropy")
"""What has to be selected for `measure`."""


@dataclass(frozen=True, slots=True)
class Measures:
    """T positions; NaN (rank: 0) where something is unknown.

    Attributes:
        scored: bool [T], whether there is a distribution.
        probabilities: float64 [N] of the candidates, see `probabilities`.
        coverage: float64 [T], the probability that the candidates have together; NaN where that is not known: sampled
            distributions, and those normalised over the candidates.
        tail: float64 [T], the stored probability of everything else; NaN likewise.
        entropy: float64 [T]: the stored entropy, else that of the candidates and of the tail as one class,
            renormalised: a lower bound. NaN where there is no tail, unless there can be none: then it is that of the
            candidates alone.
        entropy_is_stored: bool [T].
        target_rank: int64 [T], rank of the target from 1, found among the candidates or stored; 0 where unknown.
        target_logprob: float64 [T], likewise.
        target_is_candidate: bool [T].
        has_target: bool [T]: a distribution, and a token after it.
    """

    scored: NDArray[np.bool_]
    probabilities: NDArray[np.float64]
    coverage: NDArray[np.float64]
    tail: NDArray[np.float64]
    entropy: NDArray[np.float64]
    entropy_is_stored: NDArray[np.bool_]
    target_rank: NDArray[np.int64]
    target_logprob: NDArray[np.float64]
    target_is_candidate: NDArray[np.bool_]
    has_target: NDArray[np.bool_]


def measure(sequence: Sequence, lengths: NDArray[Any] | None = None, *, stored_entropy: bool = True) -> Measures:
    """The measures of a sequence, which has `COLUMNS`.

    Args:
        sequence: one, or several joined.
        lengths: positions of each of several; None: it is one.
        stored_entropy: take the stored entropy where there is one.
    """
    count = sequence.count
    scored = count > 0
    has_tail = sequence.normalised == "vocabulary" and sequence.draws is None
    logprobs = normalised_logprobs(sequence)
    with np.errstate(all="ignore"):  # NaN and log 0 are what they should be; forged values may overflow
        probabilities = np.exp(logprobs)
        mass = ragged.row_sums(probabilities, count)
        tail = np.exp(sequence.tail, dtype=np.float64) if has_tail else np.full(len(count), np.nan)
        entropy = _entropy(probabilities, logprobs, count, mass, tail if has_tail else np.zeros(len(count)))
    entropy[~scored] = np.nan
    is_stored = np.zeros(len(count), np.bool_)
    if stored_entropy and sequence.entropy is not None:
        is_stored = scored & ~np.isnan(sequence.entropy)
        entropy[is_stored] = sequence.entropy[is_stored]
    following, has_following = _following(sequence.tokens, lengths)
    rank, target, found = _targets(sequence, logprobs, following)
    return Measures(
        scored=scored,
        probabilities=probabilities,
        coverage=np.where(scored, mass, np.nan) if has_tail else np.full(len(count), np.nan),
        tail=tail,
        entropy=entropy,
        entropy_is_stored=is_stored,
        target_rank=rank,
        target_logprob=target,
        target_is_candidate=found,
        has_target=scored & has_following,
    )


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


def normalised_logprobs(sequence: Sequence) -> NDArray[np.float64]:
    """Logprobs, float64 [N]; made to sum to one where only the ratios of the candidates are known."""
    logprobs = sequence.logprobs.astype(np.float64)
    if sequence.normalised != "candidates" or len(logprobs) == 0:
        return logprobs
    present = ragged.present(sequence.count)
    logprobs -= ragged.spread(ragged.heads(logprobs, present), present)  # the best is 0: no sum overflows
    return np.asarray(logprobs - ragged.spread(np.log(ragged.row_sums(np.exp(logprobs), present)), present))


def _entropy(
    probabilities: NDArray[np.float64],
    logprobs: NDArray[np.float64],
    count: NDArray[Any],
    mass: NDArray[np.float64],
    tail: NDArray[np.float64],
) -> NDArray[np.float64]:
    """-sum of p log p over candidates and tail, both divided by their sum."""
    total = mass + tail
    inside = ragged.row_sums(probabilities * logprobs, count)
    outside = np.where(tail == 0, 0.0, tail * np.log(tail))
    return np.asarray(np.log(total) - (inside + outside) / total)


def _following(tokens: NDArray[np.uint32], lengths: NDArray[Any] | None) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """(token after each position, -1 where the sequence ends; whether it does not end there)."""
    following = np.full(len(tokens), -1, np.int32)
    following[:-1] = tokens[1:].view(np.int32)
    if lengths is not None:
        following[np.cumsum(lengths[lengths > 0]) - 1] = -1
    return following, following >= 0


def _targets(
    sequence: Sequence, logprobs: NDArray[np.float64], following: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """(rank int64 [T], logprob float64 [T], whether from the candidates) of the target, else as stored."""
    count, length = sequence.count, len(sequence.count)
    rank, target = np.zeros(length, np.int64), np.full(length, np.nan)
    if sequence.target_rank is not None:
        rank[:] = sequence.target_rank
    if sequence.target_logprob is not None:
        target[:] = sequence.target_logprob
    if k := ragged.uniform(count):
        at = np.flatnonzero(sequence.ids.reshape(-1, k) == following[:, None])
        row, place = np.divmod(at, k)
    else:
        at = np.flatnonzero(sequence.ids == ragged.spread(following, count))
        row = np.searchsorted(sequence.offsets, at, side="right") - 1
        place = at - sequence.offsets[row]
    rank[row] = place + 1
    target[row] = logprobs[at]
    found = np.zeros(length, np.bool_)
    found[row] = True
    return rank, target, found
