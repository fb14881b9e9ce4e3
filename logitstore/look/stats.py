"""The figures of a dataset: what its distributions are like, what they take, and what less would cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from logitstore.dataset.reader import Dataset
from logitstore.look.advice import POSITIONS, SELECTED, SEQUENCES, Advice, advise
from logitstore.look.collect import Collected, Targets, Uncertain, collect
from logitstore.look.measures import ENTROPIES
from logitstore.look.parts import all_parts, sampled_parts
from logitstore.look.summaries import Histogram, Spread
from logitstore.processes import each
from logitstore.shard.sequence import Sequence

_EXAMPLES: Final = 10  # groups of duplicates that are listed, and rows of each


@dataclass(frozen=True, slots=True)
class Teaching:
    """How well the teacher knew this text: the real next token at positions that have a distribution.

    Attributes:
        positions: such positions.
        top_1: share of them where it was the best candidate: the teacher's accuracy.
        ranks: histogram of its rank, where that is known.
        outside: share where it was not among the candidates.
        unranked: share where its rank is not known.
        known: share where its logprob is known: stored, or that of a candidate; the latter not where distributions
            are sampled or normalised over the candidates.
        cross_entropy: mean of -logprob, nats; None unless it is known everywhere.
        cross_entropy_at_least: the same where tokens outside the candidates count with the highest logprob that they
            can have, which is the last candidate's or the tail's; None where that is not known.
        cross_entropy_known: mean over the positions where it is known; too low, where the others are the surprising
            ones.
        perplexity: exp of the cross-entropy; None likewise.
        perplexity_at_least: likewise.
        surprise: spread of -logprob where it is known, nats.
    """

    positions: int
    top_1: float
    ranks: Histogram
    outside: float
    unranked: float
    known: float
    cross_entropy: float | None
    cross_entropy_at_least: float | None
    cross_entropy_known: float | None
    perplexity: float | None
    perplexity_at_least: float | None
    surprise: Spread | None


@dataclass(frozen=True, slots=True)
class Column:
    """What a column takes: bytes, and those over positions; bits over candidates."""

    name: str
    bytes: int
    bytes_a_position: float
    bits_a_candidate: float | None


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Sequences whose tokens are those of an earlier one.

    Attributes:
        sequences: how many.
        examples: rows of sequences that share their tokens, up to ten groups of up to ten.
    """

    sequences: int
    examples: list[list[int]]


@dataclass(frozen=True, slots=True)
class Stats:
    """The figures of a dataset, or of a sample of it.

    Attributes:
        full: whether every sequence was read.
        sequences: read.
        sequences_in_all: in the dataset, of which this may be a view.
        positions: read.
        positions_in_all: likewise in the dataset.
        scored: positions with a distribution.
        impossible: positions that hold impossible numbers, which are left out of the figures.
        trained: share of the positions with a known loss_mask where it is 1; None where there are none.
        candidates: in all that was read.
        length: positions of a sequence.
        count: candidates of a scored position.
        coverage: their probability together; None where that is not known.
        tail: stored probability of everything else; None likewise.
        entropy: nats.
        entropies: positions by where their entropy is from: `stored` is that of the whole vocabulary; `candidates and
            tail` takes the tail as one class, a lower bound; `draws` is an estimate from what was drawn; `candidates`
            knows of nothing else.
        teaching: the real next tokens; None where no position has one.
        bytes: of the shards, in the dataset.
        bytes_a_position: likewise.
        columns: what each takes in the chunks that were read; the last one is Arrow's framing and the token order.
        uncertain: sequences with the highest mean entropy, those of 16 scored positions and more first.
        duplicates: among what was read.
        advice: what less would cost and save.
        advice_rows: (first, end) of the rows that it was tried on.
    """

    full: bool
    sequences: int
    sequences_in_all: int
    positions: int
    positions_in_all: int
    scored: int
    impossible: int
    trained: float | None
    candidates: int
    length: Spread | None
    count: Spread | None
    coverage: Spread | None
    tail: Spread | None
    entropy: Spread | None
    entropies: dict[str, int]
    teaching: Teaching | None
    bytes: int
    bytes_a_position: float | None
    columns: list[Column]
    uncertain: list[Uncertain]
    duplicates: Duplicates
    advice: list[Advice]
    advice_rows: list[tuple[int, int]]


def stats(
    dataset: Dataset,
    *,
    full: bool = False,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Stats:
    """The figures of a dataset.

    Args:
        dataset: a dataset, or a view of some of its rows.
        full: read every sequence; otherwise at most 32 chunks, spread over it.
        workers: processes that read; 0: this one. The figures are the same.
        progress: called with (sequences read, sequences to be read).

    Raises:
        CorruptDataError: a chunk's bytes are not what was written.
        InvalidInputError: a worker was killed.
    """
    sample = sampled_parts(dataset)
    chosen = sum(part.stop - part.start for part in sample)
    full = full or chosen == len(dataset)
    wanted = len(dataset) if full else chosen
    parts = all_parts(dataset) if full else iter(sample)
    collected = collect(dataset, slice(0, 0))
    for one in each(collect, dataset, parts, workers):
        collected += one
        if progress is not None:
            progress(collected.sequences, wanted)
    advice, rows = _advice(dataset, sample)
    return _stats(dataset, collected, advice, rows, full=full)


def entropy_source(entropies: dict[str, int]) -> str:
    """Where the entropies of a dataset are from, in words: it decides what they can be compared with."""
    said = {
        ENTROPIES[0]: "of the whole vocabulary, as stored",
        ENTROPIES[1]: "of the candidates, and the tail as one class: a lower bound",
        ENTROPIES[2]: "of the draws: an estimate, too low on average",
        ENTROPIES[3]: "of the candidates alone: nothing else is known",
    }
    used = [(name, n) for name, n in entropies.items() if n]
    if len(used) == 1:
        return said[used[0][0]]
    return "; ".join(f"{said[name]}, at {n:,} positions" for name, n in used)


def _advice(dataset: Dataset, sample: list[slice]) -> tuple[list[Advice], list[tuple[int, int]]]:
    """What less would cost and save, from the beginnings of some chunks of the sample."""
    groups: list[list[Sequence]] = []
    rows: list[tuple[int, int]] = []
    positions, left = 0, SEQUENCES
    drawn = iter(np.random.default_rng(0).permutation(len(sample)).tolist())
    while positions < POSITIONS and left and (at := next(drawn, None)) is not None:
        group: list[Sequence] = []
        for sequence in dataset.select(SELECTED)[sample[at]][:left]:
            group.append(sequence)
            positions += len(sequence)
            if positions >= POSITIONS:
                break
        left -= len(group)
        rows.append((sample[at].start, sample[at].start + len(group)))
        groups.append(group)
    totals = dataset.info.totals
    advice = advise(groups, dataset.info, totals.bytes / totals.positions) if totals.positions else []
    return advice, sorted(rows) if advice else []


def _stats(
    dataset: Dataset, found: Collected, advice: list[Advice], rows: list[tuple[int, int]], *, full: bool
) -> Stats:
    totals = dataset.info.totals
    spreads = {name: Spread.of(metric) for name, metric in found.metrics.items()}
    return Stats(
        full=full,
        sequences=found.sequences,
        sequences_in_all=totals.sequences,
        positions=found.positions,
        positions_in_all=totals.positions,
        scored=found.scored,
        impossible=found.impossible,
        trained=found.trained / found.masked if found.masked else None,
        candidates=found.candidates,
        length=spreads["length"],
        count=spreads["count"],
        coverage=spreads["coverage"],
        tail=spreads["tail"],
        entropy=spreads["entropy"],
        entropies=found.entropies,
        teaching=_teaching(found.targets, found.ranks, spreads["surprise"]),
        bytes=totals.bytes,
        bytes_a_position=totals.bytes / totals.positions if totals.positions else None,
        columns=_columns(found),
        uncertain=found.uncertain,
        duplicates=_duplicates(found.hashes),
        advice=advice,
        advice_rows=rows,
    )


def _teaching(targets: Targets, ranks: Histogram, surprise: Spread | None) -> Teaching | None:
    n = targets.n
    if n == 0:
        return None
    exact = targets.surprise / n if targets.known == n else None
    least = None if math.isnan(targets.floor) else targets.floor / n
    return Teaching(
        positions=n,
        top_1=targets.top / n,
        ranks=ranks,
        outside=targets.outside / n,
        unranked=targets.unranked / n,
        known=targets.known / n,
        cross_entropy=exact,
        cross_entropy_at_least=least,
        cross_entropy_known=targets.surprise / targets.known if targets.known else None,
        perplexity=None if exact is None else _exp(exact),
        perplexity_at_least=None if least is None else _exp(least),
        surprise=surprise,
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _columns(found: Collected) -> list[Column]:
    stored = found.stored
    sizes = [(name, size) for name, size in stored.columns.items() if size]
    sizes.append(("framing", stored.bytes - sum(size for _, size in sizes)))
    return [
        Column(
            name=name,
            bytes=size,
            bytes_a_position=size / stored.positions if stored.positions else 0.0,
            bits_a_candidate=8 * size / stored.candidates if stored.candidates else None,
        )
        for name, size in sizes
    ]


def _duplicates(hashes: tuple[tuple[int, NDArray[np.uint64]], ...]) -> Duplicates:
    """Sequences whose tokens have the same 64-bit hash: of a million different ones, two do once in 37 million."""
    every = np.concatenate([some for _, some in hashes])
    rows = np.concatenate([np.arange(start, start + len(some)) for start, some in hashes])
    every, rows = every[every != 0], rows[every != 0]
    order = np.argsort(every, kind="stable")
    first = np.ones(len(every), np.bool_)
    first[1:] = np.diff(every[order]) != 0
    starts = np.flatnonzero(first)
    sizes = np.diff(np.append(starts, len(every)))
    shared = np.flatnonzero(sizes > 1)
    groups = [rows[order[starts[at] : starts[at] + min(sizes[at], _EXAMPLES)]].tolist() for at in shared]
    return Duplicates(int((sizes[shared] - 1).sum()), sorted(groups)[:_EXAMPLES])
