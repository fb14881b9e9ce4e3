"""The ids that a dataset has so far: 8 bytes each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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

    def __contains__(self, sequence_id: str) -> bool:
        """Whether an id is there."""
        return self._has(id_hash(sequence_id))

    def add(self, sequence_id: str) -> bool:
        """Add an id; False when it was there already."""
        value = id_hash(sequence_id)
        if self._has(value):
            return False
        self._recent.add(value)
        if len(self._recent) >= _RECENT:
            self._merge()
        return True

    def take(self, hashes: NDArray[np.uint64]) -> None:
        """Add many ids by their hashes."""
        if len(hashes):
            self._keep(np.sort(hashes))

    def _has(self, value: int) -> bool:
        return value in self._recent or any(_holds(run, value) for run in self._runs)

    def _merge(self) -> None:
        recent, self._recent = self._recent, set()
        self._keep(np.sort(np.fromiter(recent, np.uint64, len(recent))))

    def _keep(self, run: NDArray[np.uint64]) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        self._runs.append(run)


def repeated(hashes: Sequence[NDArray[np.uint64]]) -> Iterator[list[tuple[int, int]]]:
    """Groups of places whose ids may be equal, since their hashes are.

    Args:
        hashes: of several shards.

    Returns:
        (shard, row in it) of each place of a group.
    """
    if not hashes:
        return
    every = np.sort(np.concatenate(hashes))
    twice = np.unique(every[1:][every[1:] == every[:-1]])
    if len(twice) == 0:
        return
    groups: dict[int, list[tuple[int, int]]] = {}
    for shard, some in enumerate(hashes):
        for row in np.flatnonzero(np.isin(some, twice)).tolist():
            groups.setdefault(int(some[row]), []).append((shard, row))
    yield from groups.values()


def _holds(run: NDArray[np.uint64], value: int) -> bool:
    place = int(np.searchsorted(run, np.uint64(value)))
    return place < len(run) and int(run[place]) == value
