"""Sums, samples and histograms of numbers that come part by part: each is added to another one of its kind.

Parts can be made by several processes. Memory does not grow with the numbers: percentiles are those of all numbers up
to a quarter of a million of them, and of a random half, quarter, ... of them beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SAMPLE: Final = 2**18
"""Percentiles are exact up to so many numbers; beyond, their rank is off by some 0.1 %."""

PERCENTILES: Final = (5, 25, 50, 75, 95)


@dataclass(frozen=True, slots=True)
class Moments:
    """How many numbers, their sum, the least and the greatest."""

    n: int = 0
    sum: float = 0.0
    least: float = np.inf
    greatest: float = -np.inf

    @classmethod
    def of(cls, values: NDArray[Any]) -> Moments:
        """Of numbers [n]."""
        if len(values) == 0:
            return cls()
        return cls(len(values), float(values.sum(dtype=np.float64)), float(values.min()), float(values.max()))

    def __add__(self, other: Moments) -> Moments:
        least, greatest = min(self.least, other.least), max(self.greatest, other.greatest)
        return Moments(self.n + other.n, self.sum + other.sum, least, greatest)

    @property
    def mean(self) -> float | None:
        """None of no numbers."""
        return self.sum / self.n if self.n else None


@dataclass(frozen=True, slots=True)
class Sample:
    """A random sample of numbers, the same whatever order they come in and whatever parts they come in.

    Kept are the numbers whose random key is under a limit, which is halved until at most `SAMPLE` are left.

    Attributes:
        limit: keys are below 2^limit.
        keys: uint64 [n].
        values: float32 [n].
    """

    limit: int = 64
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    values: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    @classmethod
    def of(cls, keys: NDArray[np.uint64], values: NDArray[Any]) -> Sample:
        """Of numbers [n] and their keys, see `keys_of`."""
        return cls(64, keys, values.astype(np.float32))._fitted()

    def __add__(self, other: Sample) -> Sample:
        limit = min(self.limit, other.limit)
        parts = [part._below(limit) for part in (self, other)]
        keys, values = (np.concatenate([getattr(part, name) for part in parts]) for name in ("keys", "values"))
        return Sample(limit, keys, values)._fitted()

    def _below(self, limit: int) -> Sample:
        if limit == self.limit:
            return self
        kept = self.keys < np.uint64(2**limit)
        return Sample(limit, self.keys[kept], self.values[kept])

    def _fitted(self) -> Sample:
        sample = self
        while len(sample.keys) > SAMPLE:
            sample = sample._below(sample.limit - 1)
        return sample


def keys_of(places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Random keys from places in the dataset: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    keys = places.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many numbers are in each bin.

    Attributes:
        edges: n + 1 ascending; a bin holds what is at least its lower edge and below its upper one, the last one its
            upper edge too.
        counts: n.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: NDArray[Any], edges: tuple[float, ...]) -> Histogram:
        """Of numbers; what is outside the edges goes into the outermost bins."""
        inside = np.searchsorted(edges[1:-1], values, side="right")
        return cls(edges, tuple(np.bincount(inside, minlength=len(edges) - 1).tolist()))

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.edges, tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))


@dataclass(frozen=True, slots=True)
class Collection:
    """Numbers of one kind: what `Spread` is made of."""

    moments: Moments
    sample: Sample
    histogram: Histogram

    @classmethod
    def of(cls, keys: NDArray[np.uint64], values: NDArray[Any], edges: tuple[float, ...]) -> Collection:
        """Of numbers [n] and their keys; NaN is left out.

        Args:
            keys: uint64 [n], see `keys_of`.
            values: [n].
            edges: of the histogram.
        """
        known = ~np.isnan(values)
        if not known.all():
            keys, values = keys[known], values[known]
        return cls(Moments.of(values), Sample.of(keys, values), Histogram.of(values, edges))

    def __add__(self, other: Collection) -> Collection:
        return Collection(self.moments + other.moments, self.sample + other.sample, self.histogram + other.histogram)


@dataclass(frozen=True, slots=True)
class Spread:
    """How numbers are spread.

    Attributes:
        n: how many.
        mean: of all of them.
        least: likewise.
        greatest: likewise.
        percentiles: by percent, interpolated linearly.
        percentiles_of: how many numbers percentiles are from: all, or a random sample where there are many.
        histogram: of all of them.
    """

    n: int
    mean: float
    least: float
    greatest: float
    percentiles: dict[str, float]
    percentiles_of: int
    histogram: Histogram

    @classmethod
    def of(cls, found: Collection) -> Spread | None:
        """From what was collected; None of no numbers."""
        moments, values = found.moments, found.sample.values.astype(np.float64)
        if moments.n == 0:
            return None
        at = np.percentile(values, PERCENTILES).tolist() if len(values) else []
        percentiles = {str(percent): value for percent, value in zip(PERCENTILES, at, strict=False)}
        mean = moments.sum / moments.n
        return cls(moments.n, mean, moments.least, moments.greatest, percentiles, len(values), found.histogram)
