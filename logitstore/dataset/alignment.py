"""Are rows where they should be? The best candidate of row t is often the token that follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SHIFTS: Final = (0, 1, 2)
"""Row t predicts tokens[t + 1]; 0 and 2 are what rows off by one predict."""


@dataclass(slots=True)
class Alignment:
    """Counts how often the best candidate of row t is tokens[t + shift].

    Attributes:
        hits: int64, one for each of `SHIFTS`.
        scored: rows that were looked at.
    """

    hits: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SHIFTS), np.int64))
    scored: int = 0

    def add(self, tokens: NDArray[Any], count: NDArray[Any], offsets: NDArray[np.int64], ids: NDArray[Any]) -> None:
        """Count one sequence: tokens and count [T], offsets [T + 1], ids [N], best first."""
        rows = np.flatnonzero(count)
        rows = rows[rows + SHIFTS[-1] < len(tokens)]
        best = ids[offsets[rows]]
        self.hits += [int((tokens[rows + shift] == best).sum()) for shift in SHIFTS]
        self.scored += len(rows)

    def problem(self) -> str | None:
        """What is wrong; None where nothing seems to be.

        When it is another token instead, twice as often, and by five standard deviations of the difference, rows are
        off.
        """
        right = int(self.hits[1])
        for shift, hits in zip(SHIFTS, self.hits.tolist(), strict=True):
            if shift != 1 and hits > 2 * right and hits - right > 5 * (hits + right + 1) ** 0.5:
                return (
                    f"the best candidate of row t is tokens[t + {shift}] at {hits} of {self.scored} positions, but "
                    f"tokens[t + 1] only at {right}: the rows are off by {shift - 1:+d}; row t must predict "
                    f"tokens[t + 1]"
                )
        return None
