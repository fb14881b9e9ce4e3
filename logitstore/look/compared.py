"""What one part of two datasets over the same sequences contributes to their comparison; parts are added."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from logitstore.dataset.reader import Dataset
from logitstore.errors import SequenceNotFoundError
from logitstore.look.calibration import Calibration
from logitstore.look.measures import COLUMNS, Measures, measure
from logitstore.look.pairs import Pair, pair
from logitstore.look.summaries import Collection, Moments, keys_of
from logitstore.shard.sequence import Sequence

Match = Literal["id", "row"]
"""How the sequences of two datasets are matched."""

DIFFERENCES: Final = 20
"""How many positions are listed where the two differ most."""

GROUPS: Final = 10_000
"""The most values of a column that figures are broken down by."""

SPREADS: Final = ("kl_ab", "kl_ba", "jsd")

EDGES: Final = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 1000.0)

_NONE: Final = Collection.of(np.empty(0, np.uint64), np.empty(0), EDGES)
_DIFFERENT: Final = 1e-9  # nats from which a position is worth listing


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over positions where both have a distribution; see `Pair`.

    Attributes:
        positions: how many.
        divergences: how many of them have known divergences, which the next six are summed over.
        kl_ab: nats.
        kl_ba: nats.
        jsd: nats.
        jsd_at_most: nats.
        shared_a: probability.
        shared_b: probability.
        agree: positions whose best candidate is the same.
        overlap: shared candidates over the smaller number of candidates.
        identical: positions.
    """

    positions: int = 0
    divergences: int = 0
    kl_ab: float = 0.0
    kl_ba: float = 0.0
    jsd: float = 0.0
    jsd_at_most: float = 0.0
    shared_a: float = 0.0
    shared_b: float = 0.0
    agree: int = 0
    overlap: float = 0.0
    identical: int = 0

    @classmethod
    def of(cls, found: Pair) -> Sums:
        """Of one sequence."""
        known = ~np.isnan(found.kl_ab)
        divergences = ("kl_ab", "kl_ba", "jsd", "jsd_at_most", "shared_a", "shared_b")
        return cls(
            positions=len(found.rows),
            divergences=int(known.sum()),
            **{name: float(getattr(found, name)[known].sum()) for name in divergences},
            agree=int(found.agree.sum()),
            overlap=float(found.overlap.sum()),
            identical=int(found.identical.sum()),
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Difference:
    """A position where the two differ: its place, divergences in nats, and (token, probability) of the best of each."""

    id: str
    row: int
    position: int
    jsd: float
    kl_ab: float
    kl_ba: float
    best_a: tuple[int, float]
    best_b: tuple[int, float]


@dataclass(frozen=True, slots=True)
class Compared:
    """Sums over some sequences of a; parts are added.

    Attributes:
        sequences: that both have, and that have a position where both have a distribution.
        matched: that both have.
        missing: that only a has.
        differing: whose tokens differ from some position on; what comes before is compared.
        first_differing: (id, position) of one of them.
        total: sums.
        groups: likewise by value of a column.
        impossible: positions left out, since numbers of one of them cannot be.
        moved: moments of |difference of logprobs| of the shared candidates.
        spreads: numbers of kl_ab, kl_ba and jsd.
        calibrations: of a and b, at positions where both have a distribution and there is a next token.
        entropies: moments of the entropies of a and b over the shared candidates and the rest, nats.
        differences: the largest, by jsd.
    """

    sequences: int = 0
    matched: int = 0
    missing: int = 0
    differing: int = 0
    first_differing: tuple[tuple[str, int], ...] = ()
    total: Sums = field(default_factory=Sums)
    groups: dict[str, Sums] = field(default_factory=dict)
    impossible: int = 0
    moved: Moments = field(default_factory=Moments)
    spreads: dict[str, Collection] = field(default_factory=lambda: dict.fromkeys(SPREADS, _NONE))
    calibrations: tuple[Calibration, Calibration] = field(default_factory=lambda: (Calibration(), Calibration()))
    entropies: tuple[Moments, Moments] = (Moments(), Moments())
    differences: list[Difference] = field(default_factory=list)

    def __add__(self, other: Compared) -> Compared:
        added: dict[str, Any] = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name not in ("groups", "spreads", "calibrations", "entropies")
        }
        for name in ("calibrations", "entropies"):
            pairs = zip(getattr(self, name), getattr(other, name), strict=True)
            added[name] = tuple(a + b for a, b in pairs)
        added["spreads"] = {key: self.spreads[key] + other.spreads[key] for key in SPREADS}
        keys = dict.fromkeys([*self.groups, *other.groups])
        added["groups"] = {key: self.groups.get(key, Sums()) + other.groups.get(key, Sums()) for key in keys}
        added["differences"] = heapq.nlargest(DIFFERENCES, added["differences"], key=lambda one: one.jsd)
        added["first_differing"] = added["first_differing"][:1]
        return Compared(**added)


@dataclass(frozen=True, slots=True)
class Task:
    """What does not change from part to part."""

    a: Dataset
    b: Dataset
    match: Match
    by: str | None


class _Comparing:
    """Arrays of a part, sequence by sequence."""

    def __init__(self) -> None:
        self.columns: dict[str, list[NDArray[Any]]] = {
            name: [] for name in (*SPREADS, "place", "confidence", "hit", "surprise", "entropy_a", "entropy_b")
        }
        self.sequences = self.impossible = 0
        self.moved = Moments()
        self.total = Sums()
        self.groups: dict[str, Sums] = {}
        self.differences: list[Difference] = []

    def add(self, a: Sequence, b: Sequence, row: int, group: str | None) -> None:
        """Compare two sequences of the same tokens."""
        measured = [measure(one) for one in (a, b)]
        self.impossible += int((measured[0].impossible | measured[1].impossible).sum())
        found = pair(a, b, *measured)
        if len(found.rows) == 0:
            return
        sums = Sums.of(found)
        self.sequences += 1
        self.total += sums
        if group is not None:
            self.groups[group] = self.groups.get(group, Sums()) + sums
        for name in (*SPREADS, "entropy_a", "entropy_b"):
            self.columns[name].append(getattr(found, name))
        self.moved += found.moved
        self.columns["place"].append((row << 24) + found.rows)  # a sequence has at most 2^24 positions
        self._judge(a, b, measured, found.rows)
        self.differences += _differences(a, b, found, row)
        if len(self.differences) > 4 * DIFFERENCES:
            self.differences = heapq.nlargest(DIFFERENCES, self.differences, key=lambda one: one.jsd)

    def _judge(self, a: Sequence, b: Sequence, measured: list[Measures], rows: NDArray[np.int64]) -> None:
        """The teachers against the real next tokens: arrays [2, ...]."""
        judged = rows[measured[0].has_target[rows]]
        exact = measured[0].target_is_exact[judged] & measured[1].target_is_exact[judged]
        surprise = [np.where(exact, -one.target_logprob[judged], np.nan) for one in measured]
        best = [one.probabilities[sequence.offsets[judged]] for one, sequence in zip(measured, (a, b), strict=True)]
        self.columns["confidence"].append(np.stack(best))
        self.columns["hit"].append(np.stack([one.target_rank[judged] == 1 for one in measured]))
        self.columns["surprise"].append(np.stack(surprise))

    def compared(self, **counts: Any) -> Compared:
        if not self.sequences:
            return Compared(**counts, impossible=self.impossible)
        columns = {name: np.concatenate(parts, axis=-1) for name, parts in self.columns.items()}
        judged = zip(columns["confidence"], columns["hit"], columns["surprise"], strict=True)
        first, second = (Calibration.of(*one) for one in judged)
        keys = keys_of(columns["place"])
        return Compared(
            sequences=self.sequences,
            **counts,
            total=self.total,
            groups=self.groups,
            impossible=self.impossible,
            moved=self.moved,
            spreads={name: Collection.of(keys, columns[name], EDGES) for name in SPREADS},
            calibrations=(first, second),
            entropies=(_known(columns["entropy_a"]), _known(columns["entropy_b"])),
            differences=heapq.nlargest(DIFFERENCES, self.differences, key=lambda one: one.jsd),
        )


def _known(values: NDArray[np.float64]) -> Moments:
    return Moments.of(values[~np.isnan(values)])


def _differences(a: Sequence, b: Sequence, found: Pair, row: int) -> Iterator[Difference]:
    """The positions of a sequence that may be among those that differ most."""
    known = np.flatnonzero(found.jsd > _DIFFERENT)
    for at in known[np.argsort(-found.jsd[known], kind="stable")[:DIFFERENCES]].tolist():
        position = int(found.rows[at])
        yield Difference(
            id=a.id,
            row=row,
            position=position,
            jsd=float(found.jsd[at]),
            kl_ab=float(found.kl_ab[at]),
            kl_ba=float(found.kl_ba[at]),
            best_a=_best(a, position),
            best_b=_best(b, position),
        )


def _best(sequence: Sequence, position: int) -> tuple[int, float]:
    at = int(sequence.offsets[position])
    return int(sequence.ids[at]), float(np.exp(sequence.logprobs[at], dtype=np.float64))


def compare_part(task: Task, part: slice) -> Compared:
    """Compare a part of a with what b has of it.

    Raises:
        CorruptDataError: a chunk's bytes are not what was written.
    """
    comparing = _Comparing()
    counts = {"matched": 0, "missing": 0, "differing": 0}
    first: tuple[tuple[str, int], ...] = ()
    names = (*COLUMNS, *([task.by] if task.by is not None else []))
    finder = _Finder(task.b, task.match)
    for row, a in enumerate(task.a.select(names)[part], part.start):
        b = finder.find(a.id, row)
        if b is None:
            counts["missing"] += 1
            continue
        counts["matched"] += 1
        alike = _alike(a.tokens, b.tokens)
        if alike < max(len(a), len(b)):
            counts["differing"] += 1
            first = first or ((a.id, alike),)
        group = None if task.by is None else _group(a.columns[task.by])
        comparing.add(_first(a, alike), _first(b, alike), row, group)
    return comparing.compared(**counts, first_differing=first)


class _Finder:
    """Finds b's sequence for each of a's: most often the one after the last one that was found."""

    def __init__(self, dataset: Dataset, match: Match) -> None:
        self.dataset = dataset.select(COLUMNS)
        self.ids = dataset.select([])
        self.match = match
        self.next: int | None = None

    def find(self, sequence_id: str, row: int) -> Sequence | None:
        """The sequence with this id, or, by row, at this one; None where there is none."""
        if self.match == "row":
            return self.dataset[row] if row < len(self.dataset) else None
        place = row if self.next is None else self.next
        if place >= len(self.ids) or self.ids[place].id != sequence_id:
            try:
                place = self.ids.row_of(sequence_id)
            except SequenceNotFoundError:
                return None
        self.next = place + 1
        return self.dataset[place]


def _alike(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> int:
    """How many tokens are the same from the start: up to there, the teachers saw the same text."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _first(sequence: Sequence, positions: int) -> Sequence:
    """The first positions of a sequence."""
    if positions == len(sequence):
        return sequence
    end = int(sequence.offsets[positions])
    cut: dict[str, Any] = dict(vars(sequence))
    ends = {"ids": end, "logprobs": end, "draws": end, "offsets": positions + 1}
    for name, value in cut.items():
        if isinstance(value, np.ndarray):
            cut[name] = value[: ends.get(name, positions)]
    return Sequence.of(cut)


def _group(value: Any) -> str:
    if value is None:
        return "(none)"
    return json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
