"""Is a teacher right as often as it is sure? Its best candidate against the real next token."""

from __future__ import annotations

from dataclasses import dataclass
from operator import add
from typing import Final

import numpy as np
from numpy.typing import NDArray

BINS: Final = 10
"""Equal bins of the best candidate's probability: below 0.1, 0.2, ..."""

_NOTHING: Final = (0,) * BINS


@dataclass(frozen=True, slots=True)
class Calibration:
    """Sums by bins of the best candidate's probability.

    Attributes:
        n: positions.
        confidence: sum of those probabilities.
        hits: how often it was the real next token.
        known: positions where the logprob of the real next token is known.
        surprise: sum of -logprob there, nats.
    """

    n: tuple[int, ...] = _NOTHING
    confidence: tuple[float, ...] = _NOTHING
    hits: tuple[int, ...] = _NOTHING
    known: int = 0
    surprise: float = 0.0

    @classmethod
    def of(cls, confidence: NDArray[np.float64], hit: NDArray[np.bool_], surprise: NDArray[np.float64]) -> Calibration:
        """Of positions with a real next token: surprise is NaN where it is not known."""
        bins = np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)
        known = ~np.isnan(surprise)
        return cls(
            n=tuple(np.bincount(bins, minlength=BINS).tolist()),
            confidence=tuple(np.bincount(bins, confidence, minlength=BINS).tolist()),
            hits=tuple(np.bincount(bins[hit], minlength=BINS).tolist()),
            known=int(known.sum()),
            surprise=float(surprise[known].sum()),
        )

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(
            n=tuple(map(add, self.n, other.n)),
            confidence=tuple(map(add, self.confidence, other.confidence)),
            hits=tuple(map(add, self.hits, other.hits)),
            known=self.known + other.known,
            surprise=self.surprise + other.surprise,
        )

    @property
    def positions(self) -> int:
        """How many."""
        return sum(self.n)

    @property
    def accuracy(self) -> float | None:
        """Share of hits; None without positions."""
        return sum(self.hits) / self.positions if self.positions else None

    @property
    def error(self) -> float | None:
        """Expected calibration error (Naeini, Cooper, Hauskrecht 2015): mean |confidence - accuracy| of the bins."""
        if not self.positions:
            return None
        return sum(abs(c - h) for c, h in zip(self.confidence, self.hits, strict=True)) / self.positions
