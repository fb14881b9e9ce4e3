"""Sequence ids that are there twice: found by their hashes, and then compared themselves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, groupby
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.checks.findings import LISTED, Findings
from logitstore.checks.parts import ChunkIds, Task
from logitstore.dataset.shards import open_shard
from logitstore.errors import CorruptDataError
from logitstore.io import LocalStore

_BLOCK: Final = 2**18

_COMPARED: Final = 2**16
"""Beyond so many, ids of one hash count as one id: only a forger makes them differ."""


def check_repeated(task: Task, ids: list[ChunkIds], findings: Findings) -> None:
    """Report each sequence whose id another one before it has.

    Takes some 20 bytes a sequence while it works, and a chunk.

    Args:
        task: the dataset.
        ids: of all chunks that could be read, in order; emptied, since the hashes are kept once.
        findings: get the first ones by their ids; what is beyond them is counted.
    """
    where = [(each.shard, each.chunk, each.row, each.places) for each in ids]
    ends = list(accumulate(len(each.hashes) for each in ids))
    hashes = np.concatenate([np.empty(0, np.uint64), *(each.hashes for each in ids)])
    ids.clear()
    values, left = _twice(hashes)
    known: dict[int, set[str | None]] = {}
    listed = done = 0
    for entries, firsts in _later(hashes, values) if left else ():
        wanted = np.union1d(entries, firsts)
        names = _ids(task, [_place(int(entry), where, ends) for entry in wanted])
        named = dict(zip(wanted.tolist(), names, strict=True))
        for entry, first in zip(entries.tolist(), firsts.tolist(), strict=True):
            before = known.setdefault(first, {named[first]})
            name = named[entry]
            if name in before and name is not None:
                listed += 1
                shard, chunk, start, place = _place(entry, where, ends)
                findings.add(
                    "duplicate-sequence-id",
                    f"the id {name!r} was there before; ids are unique in a dataset",
                    shard=task.manifest.shards[shard].path, chunk=chunk, row=start + place,
                )  # fmt: skip
            before.add(name)
        done += len(entries)
        if listed >= LISTED or done >= _COMPARED:
            break
    if left > done:
        findings.add_unlisted("duplicate-sequence-id", "error", left - done)


def _twice(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], int]:
    """The values that are there more than once, ascending: uint64 [v]; and how many entries are not a value's first."""
    in_order = np.sort(hashes)
    same = in_order[1:] == in_order[:-1]
    starts = same.copy()
    starts[1:] &= ~same[:-1]
    return in_order[1:][starts], int(np.count_nonzero(same))


def _later(hashes: NDArray[np.uint64], values: NDArray[np.uint64]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Entries whose hash is there before, in order, at most `LISTED` at a time, and the first entry of the same hash.

    Args:
        hashes: uint64 [n].
        values: uint64 [v], those that are there more than once, ascending.
    """
    firsts = np.full(len(values), -1, np.int64)
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[start : start + _BLOCK]
        value = np.minimum(np.searchsorted(values, block), len(values) - 1)
        entries = np.flatnonzero(values[value] == block)
        value, entries = value[entries], start + entries
        new, at = np.unique(value, return_index=True)
        unseen = firsts[new] < 0
        firsts[new[unseen]] = entries[at[unseen]]
        later = firsts[value] != entries
        entries, first = entries[later], firsts[value[later]]
        for some in range(0, len(entries), LISTED):
            yield entries[some : some + LISTED], first[some : some + LISTED]


_Place = tuple[int, int, int, int]
"""(shard, chunk, row in the dataset of its first sequence, row in the chunk) of a sequence."""


def _place(entry: int, where: list[tuple[int, int, int, NDArray[np.int64] | None]], ends: list[int]) -> _Place:
    number = bisect_right(ends, entry)
    shard, chunk, row, places = where[number]
    at = entry - (ends[number - 1] if number else 0)
    return shard, chunk, row, at if places is None else int(places[at])


def _ids(task: Task, places: list[_Place]) -> list[str | None]:
    """The ids themselves, read again; None where the file has changed since. Places in order: a chunk is read once."""
    found: list[str | None] = []
    for number, in_shard in groupby(places, lambda place: place[0]):
        rows = list(in_shard)
        try:
            shard = open_shard(LocalStore(task.root), task.manifest.shards[number], task.manifest)
            names: list[str | None] = []
            for chunk, in_chunk in groupby(rows, lambda place: place[1]):
                ids = shard.chunk(chunk).batch.column(0)
                names += [ids[place].as_py() for *_, place in in_chunk]
        except CorruptDataError:
            names = [None] * len(rows)
        found += names
    return found
