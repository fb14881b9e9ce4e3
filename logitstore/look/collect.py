"""What one part of a dataset contributes to its figures; parts are added, in any grouping, to the same figures."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from logitstore.dataset.reader import Dataset, Stored
from logitstore.encoding import ragged
from logitstore.look.measures import COLUMNS, ENTROPIES, Measures, entropy_without_stored, has_tail, joined, measure
from logitstore.look.summaries import Collection, Histogram, keys_of
from logitstore.shard.sequence import Sequence

METRICS: Final = ("entropy", "coverage", "tail", "count", "surprise")
"""What is known of a position: nats, probabilities, candidates, nats."""

_POWERS: Final = (0.0, *(float(2**n) for n in range(25)))
EDGES: Final[dict[str, tuple[float, ...]]] = {
    "entropy": tuple(n / 2 for n in range(27)),
    "coverage": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0),
    "tail": (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "count": _POWERS,
    "surprise": (*(float(n) for n in range(16)), 32.0),
    "length": _POWERS,
    "rank": (1.0, 2.0, 3.0, 6.0, 11.0, 21.0, 51.0, 101.0, 1001.0, 2.0**31),
}
"""Of the histograms."""

UNCERTAIN: Final = 10
"""How many of the most uncertain sequences are listed."""

LONG: Final = 16
"""Sequences with fewer distributions are listed only when there are too few others: one position says little."""

_BATCH: Final = 1024  # positions that numpy works on at once: short sequences are joined, and no cache is left

_SELECTED: Final = (*COLUMNS, "loss_mask")


@dataclass(frozen=True, slots=True)
class Targets:
    """The real next token at positions that have a distribution and a token after it.

    Attributes:
        n: such positions.
        top: how often its rank was 1.
        outside: how often it was not among the candidates.
        unranked: how often its rank is not known: outside, and not stored.
        known: how often its logprob is known.
        surprise: sum of -logprob where it is known, nats.
        floor: the same over all n, with the least that it can be where it is not known; NaN where that has no bound.
    """

    n: int = 0
    top: int = 0
    outside: int = 0
    unranked: int = 0
    known: int = 0
    surprise: float = 0.0
    floor: float = 0.0

    def __add__(self, other: Targets) -> Targets:
        return Targets(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Uncertain:
    """A sequence, its place in the dataset, and its mean entropy in nats over `scored` positions."""

    id: str
    row: int
    scored: int
    entropy: float


@dataclass(frozen=True, slots=True)
class Collected:
    """Sums over some sequences.

    Attributes:
        sequences: how many.
        positions: how many.
        scored: positions with a distribution.
        impossible: positions whose numbers cannot be; they are in no other figure.
        candidates: of all positions.
        trained: positions whose loss_mask is 1.
        masked: positions whose loss_mask is known.
        entropies: positions by where their entropy is from, `ENTROPIES`.
        metrics: numbers of `METRICS` and `length`.
        ranks: those of targets.
        targets: the real next tokens.
        hashes: (row, uint64 of the tokens of each sequence from there on); 0 of a sequence without tokens.
        uncertain: the most uncertain ones, most uncertain first.
        stored: what they take.
    """

    sequences: int
    positions: int
    scored: int
    impossible: int
    candidates: int
    trained: int
    masked: int
    entropies: dict[str, int]
    metrics: dict[str, Collection]
    ranks: Histogram
    targets: Targets
    hashes: tuple[tuple[int, NDArray[np.uint64]], ...]
    uncertain: list[Uncertain]
    stored: Stored

    def __add__(self, other: Collected) -> Collected:
        added: dict[str, Any] = {}
        for each in fields(self):
            a, b = getattr(self, each.name), getattr(other, each.name)
            added[each.name] = {key: a[key] + b[key] for key in a} if isinstance(a, dict) else a + b
        added["uncertain"] = _most_uncertain(added["uncertain"])
        return Collected(**added)


def _most_uncertain(sequences: list[Uncertain]) -> list[Uncertain]:
    return heapq.nlargest(UNCERTAIN, sequences, key=lambda one: (one.scored >= LONG, one.entropy, -one.row))


def collect(dataset: Dataset, part: slice) -> Collected:
    """The sums of a part of a dataset, by one pass over it.

    Raises:
        CorruptDataError: a chunk's bytes are not what was written.
    """
    figures = _Figures(part.start)
    for batch in _batches(dataset.select(_SELECTED)[part]):
        figures.add(batch)
    return figures.collected(dataset[part].stored())


def _batches(sequences: Iterable[Sequence]) -> Iterator[list[Sequence]]:
    """Sequences that follow one another, as many as make a batch; sampled ones apart from others."""
    batch: list[Sequence] = []
    positions = 0
    for sequence in sequences:
        if batch and (positions >= _BATCH or (batch[0].draws is None) != (sequence.draws is None)):
            yield batch
            batch, positions = [], 0
        batch.append(sequence)
        positions += len(sequence)
    if batch:
        yield batch


class _Figures:
    """Arrays of a part, batch by batch, and what has to be told sequence by sequence."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.row = start
        self.columns: dict[str, list[NDArray[Any]]] = {name: [] for name in (*METRICS, "rank", "place", "length")}
        self.hashes: list[int] = []
        self.uncertain: list[Uncertain] = []
        self.targets = Targets()
        self.trained = self.masked = self.impossible = self.candidates = 0
        self.entropies = dict.fromkeys(ENTROPIES, 0)

    def add(self, batch: list[Sequence]) -> None:
        lengths = np.array([len(sequence) for sequence in batch])
        both = joined(batch)
        measured = measure(both, lengths)
        outside = measured.has_target & (measured.target_place < 0)
        surprise = np.where(measured.target_is_exact, -measured.target_logprob, np.nan)
        self.targets += _targets(both, measured, surprise, outside)
        self._count(batch, both, measured)
        self._tell(batch, measured, lengths)
        rows = np.repeat(np.arange(self.row, self.row + len(batch)), lengths)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        for name, values in (
            ("entropy", measured.entropy),
            ("coverage", measured.coverage),
            ("tail", measured.tail),
            ("count", np.where(measured.scored, both.count, np.nan)),
            ("surprise", surprise),
            ("rank", measured.target_rank),
            ("place", (rows << 24) + within),  # a sequence has at most 2^24 positions
            ("length", lengths),
        ):
            self.columns[name].append(values)
        self.row += len(batch)

    def _count(self, batch: list[Sequence], both: Sequence, measured: Measures) -> None:
        for sequence in batch:
            if sequence.loss_mask is not None:
                self.trained += int((sequence.loss_mask == 1).sum())
                self.masked += int((sequence.loss_mask >= 0).sum())
        stored = int(measured.entropy_is_stored.sum())
        self.entropies["stored"] += stored
        self.entropies[entropy_without_stored(both)] += int((~np.isnan(measured.entropy)).sum()) - stored
        self.impossible += int(measured.impossible.sum())
        self.candidates += len(both.ids)

    def _tell(self, batch: list[Sequence], measured: Measures, lengths: NDArray[np.int64]) -> None:
        known = ~np.isnan(measured.entropy)
        scored = ragged.row_sums(known, lengths)
        sums = ragged.row_sums(np.where(known, measured.entropy, 0.0), lengths)
        for row, (sequence, n, total) in enumerate(zip(batch, scored.tolist(), sums.tolist(), strict=True), self.row):
            self.hashes.append(xxhash.xxh3_64_intdigest(sequence.tokens.tobytes()) if len(sequence) else 0)
            if n:
                self.uncertain.append(Uncertain(sequence.id, row, int(n), total / n))
        self.uncertain = _most_uncertain(self.uncertain)

    def collected(self, stored: Stored) -> Collected:
        columns = {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in self.columns.items()}
        lengths = columns["length"].astype(np.float64)
        rows = keys_of(np.arange(self.start, self.start + len(lengths)))
        keys, ranks = keys_of(columns["place"].astype(np.int64)), columns["rank"]
        return Collected(
            sequences=len(lengths),
            positions=int(lengths.sum()),
            scored=int((~np.isnan(columns["count"])).sum()),
            impossible=self.impossible,
            candidates=self.candidates,
            trained=self.trained,
            masked=self.masked,
            entropies=self.entropies,
            metrics={name: Collection.of(keys, columns[name], EDGES[name]) for name in METRICS}
            | {"length": Collection.of(rows, lengths, EDGES["length"])},
            ranks=Histogram.of(ranks[ranks > 0], EDGES["rank"]),
            targets=self.targets,
            hashes=((self.start, np.array(self.hashes, np.uint64)),),
            uncertain=self.uncertain,
            stored=stored,
        )


def _targets(
    sequence: Sequence, measured: Measures, surprise: NDArray[np.float64], outside: NDArray[np.bool_]
) -> Targets:
    known = ~np.isnan(surprise)
    floor = np.full(len(surprise), np.nan)
    if has_tail(sequence):
        # Outside the candidates, a token has at most the last one's probability, and at most the tail's.
        floor[sequence.count > 0] = -ragged.lasts(sequence.logprobs, sequence.count).astype(np.float64)
        with_tail = np.isfinite(sequence.tail)
        floor[with_tail] = np.maximum(floor[with_tail], -sequence.tail[with_tail])
    floor[known] = surprise[known]
    return Targets(
        n=int(measured.has_target.sum()),
        top=int((measured.has_target & (measured.target_rank == 1)).sum()),
        outside=int(outside.sum()),
        unranked=int((measured.has_target & (measured.target_rank == 0)).sum()),
        known=int(known.sum()),
        surprise=float(surprise[known].sum()),
        floor=float(floor[measured.has_target].sum()),
    )
