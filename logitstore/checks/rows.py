"""The checks of one decoded sequence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.checks.findings import Findings
from logitstore.encoding import ragged
from logitstore.encoding.values import Encoding
from logitstore.limits import GRID_STEPS, PROBABILITY_SLACK
from logitstore.shard.chunk import Chunk
from logitstore.shard.sequence import Sequence


def check_sequence(
    sequence: Sequence,
    chunk: Chunk,
    place: int,
    findings: Findings,
    *,
    shard: str,
    chunk_number: int,
    row: int,
) -> None:
    """Report the first position of each kind of problem in a sequence."""
    encoding = chunk.encoding(place)
    rounding = _rounding(encoding, chunk.header.resolution)
    # Forged values may be infinite or NaN: they are reported, not warned of by numpy.
    with np.errstate(all="ignore"):
        checks = [
            *_values(sequence),
            *_steps(sequence, encoding, chunk.header.resolution),
            *_ids(sequence),
            *_optional(sequence),
            *_target(sequence),
        ]
        sums = ragged.row_sums(np.exp(sequence.logprobs, dtype=np.float64), sequence.count)
        checks += _sums(sums, rounding)
        checks += _tail(sequence, sums, rounding, vocabulary=chunk.header.normalised == "vocabulary")
    for code, wrong, message in checks:
        if bool(wrong.any()):
            position = int(np.argmax(wrong))
            more = int(wrong.sum()) - 1
            findings.add(
                code,
                f"{message(position)}{f' (and at {more} more positions)' if more else ''}",
                "warning" if code == "target" else "error",
                shard=shard,
                chunk=chunk_number,
                row=row,
                position=position,
            )


Check = tuple[str, NDArray[np.bool_], Any]


def _any_in_row(mask: NDArray[np.bool_], count: NDArray[Any]) -> NDArray[np.bool_]:
    return ragged.row_sums(mask, count) > 0


def _values(sequence: Sequence) -> list[Check]:
    logprobs, count = sequence.logprobs, sequence.count
    bad = ~np.isfinite(logprobs) | (logprobs > PROBABILITY_SLACK)
    rise = np.zeros(len(logprobs), np.bool_)
    if len(logprobs):
        rise[1:] = (np.diff(logprobs) > 0) & ~ragged.firsts(count)[1:]
    return [
        ("value-range", _any_in_row(bad, count), lambda _: "a logprob is NaN, infinite or above 0"),
        ("value-order", _any_in_row(rise, count), lambda _: "logprobs increase; they are best first"),
    ]


def _steps(sequence: Sequence, encoding: Encoding, resolution: float) -> list[Check]:
    if encoding is not Encoding.GRID_WIDE or not len(sequence.ids):
        return []
    best = ragged.spread(ragged.heads(sequence.logprobs, sequence.count), sequence.count[sequence.count > 0])
    over = best.astype(np.float64) - sequence.logprobs >= GRID_STEPS * resolution
    reason = "a candidate is 2^24 steps or more under the best"
    return [("value-range", _any_in_row(over, sequence.count), lambda _: reason)]


def _ids(sequence: Sequence) -> list[Check]:
    row = ragged.rows(sequence.count)
    place = np.lexsort((sequence.ids, row))
    ids = sequence.ids[place]
    twice = np.zeros(len(ids), np.bool_)
    if len(ids):
        twice[1:] = (np.diff(ids) == 0) & (np.diff(row) == 0)
    return [("duplicate-id", _any_in_row(twice, sequence.count), lambda _: "an id stands twice")]


def _rounding(encoding: Encoding, resolution: float) -> float:
    """By which factor rounding may have raised a sum of probabilities."""
    if encoding in (Encoding.GRID, Encoding.GRID_WIDE):
        return math.exp(resolution / 2)
    # float16 rounds a logprob by up to 2^-12 of itself, and p |log p| summed is the entropy, below 21 nats.
    return 1 + 21 * 2**-12 if encoding is Encoding.FLOAT16 else 1.0


def _sums(sums: NDArray[np.float64], rounding: float) -> list[Check]:
    over = sums > rounding + PROBABILITY_SLACK
    return [("probability-sum", over, lambda t: f"the probabilities sum to {sums[t]:.6f}")]


def _tail(sequence: Sequence, sums: NDArray[np.float64], rounding: float, *, vocabulary: bool) -> list[Check]:
    tail = sequence.tail.astype(np.float64)
    present = ~np.isnan(tail)
    if not vocabulary or sequence.draws is not None:
        reason = "there is a tail where the probabilities are normalised over the candidates, or sampled"
        return [("tail-range", present, lambda _: reason)]
    mass = sums + np.exp(tail)
    # The tail is rounded to 1/32 nat: by up to 1/64, 1.6 % of itself.
    slack = (rounding - 1) + np.exp(np.where(present, tail, 0.0)) / 60 + PROBABILITY_SLACK
    stray = present & (sequence.count == 0)
    off = present & ~stray & (np.abs(mass - 1) > slack)
    return [
        ("tail-range", stray, lambda _: "there is a tail where there are no candidates"),
        ("tail-mismatch", off, lambda t: f"candidates and tail sum to {mass[t]:.6f}, not to 1"),
    ]


def _optional(sequence: Sequence) -> list[Check]:
    checks: list[Check] = []
    for name, low, high in (("target_logprob", -np.inf, PROBABILITY_SLACK), ("entropy", 0.0, 22.0)):
        values: NDArray[np.float32] | None = getattr(sequence, name)
        if values is not None:
            wrong = ~np.isnan(values) & ~((values >= low) & (values <= high))
            checks.append(("optional-range", wrong, lambda t, n=name, v=values: f"{n} is {v[t]}"))
    return checks


def _target(sequence: Sequence) -> list[Check]:
    rank = sequence.target_rank
    if rank is None or len(rank) < 2 or len(sequence.ids) == 0:
        return []
    stored = (rank > 0) & (rank <= sequence.count)
    stored[-1] = False
    at = np.minimum(sequence.offsets[:-1] + np.maximum(rank - 1, 0), len(sequence.ids) - 1)
    following = np.append(sequence.tokens[1:], 0)
    wrong = stored & (sequence.ids[at] != following)
    return [
        (
            "target",
            wrong,
            lambda t: f"the candidate of rank {rank[t]} is {sequence.ids[at[t]]}, not the next token {following[t]}",
        )
    ]
