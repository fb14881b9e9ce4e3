"""The ids that a dataset has so far: 8 bytes each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitstore.shard.layout import id_hash

_RECENT = 2**16


class IdSet:
    """A growing set of sequence ids, kept as their 64-bit hashes.

    Two of a hundred million different ids share a hash once in some three thousand datasets; such an id is refused
    as repeated.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._runs: list[NDArray[np.uint64]] = []  # sorted, each less than half as long as the one before

    def add(self, sequence_id: str) -> bool:
        """Add an id; False when it was there already."""
        value = id_hash(sequence_id)
        if value in self._recent or any(_holds(run, value) for run in self._runs):
            return False
        self._recent.add(value)
        if len(self._recent) >= _RECENT:
            self._merge()
        return True

    def _merge(self) -> None:
        run = np.sort(np.fromiter(self._recent, np.uint64, len(self._recent)))
        self._recent = set()
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        self._runs.append(run)


def _holds(run: NDArray[np.uint64], value: int) -> bool:
    place = int(np.searchsorted(run, np.uint64(value)))
    return place < len(run) and int(run[place]) == value
