"""Sequences of a dataset apart: into splits by the hash of their ids, or some of them by their ids."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np
import xxhash

from logitstore.dataset.rewrite import Input, Output, Progress, Run, rewrite
from logitstore.errors import InvalidInputError, SequenceNotFoundError
from logitstore.schema import Manifest
from logitstore.shard.chunk import StoredSequence
from logitstore.shard.layout import id_hash

_WHOLE: Final = 2**64
_NAMED: Final = 5


def split(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Make a dataset with other splits: each sequence goes to one by a hash of its id and the seed.

    Where a sequence goes depends on nothing else: not on its place, nor on the other sequences. Its values are written
    as they are stored.

    Args:
        path: of the dataset; also a remote one. Its own splits are put together.
        output: directory of the new dataset.
        shares: of each split, in this order; they sum to 1.
        seed: another one shares them out otherwise; from 0 to 2^64 - 1.
        shard_bytes: a shard closes at this many bytes; None is 256 MiB.
        overwrite: replace what is there.
        progress: called with positions done and positions in all.

    Returns:
        The new manifest.

    Raises:
        InvalidInputError: shares that are none, or do not sum to 1; a name that no split can have.
        DatasetExistsError: something is there.
        CorruptDataError: the dataset is damaged.
    """
    names, bounds = list(shares), _bounds(shares)
    if not 0 <= seed < _WHOLE:
        raise InvalidInputError(f"seed is {seed}; it is from 0 to 2^64 - 1")

    def place(_split: str, sequence: StoredSequence) -> tuple[str, StoredSequence]:
        value = xxhash.xxh3_64_intdigest(sequence.id.encode(), seed)
        return names[bisect_right(bounds, value)], sequence

    given = Input.open(path)
    with Output(output, given, names, shard_bytes=shard_bytes, overwrite=overwrite) as made:
        rewrite(given, made, given.runs(), place, progress, given.manifest.totals.positions)
        return made.commit()


def _bounds(shares: Mapping[str, float]) -> list[int]:
    """Where the hashes of each split but the last end."""
    if not shares:
        raise InvalidInputError("no shares are given; name splits and what goes to each: train=0.9 validation=0.1")
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise InvalidInputError(f"the share of {name} is {share}; it is above 0 and at most 1")
    total = math.fsum(shares.values())
    if abs(total - 1) > 1e-9:
        raise InvalidInputError(
            f"the shares sum to {total:.9g}, not to 1: every sequence goes somewhere; give what is left to a split of "
            f"its own"
        )
    return [min(_WHOLE, round(end * _WHOLE)) for end in accumulate(shares.values())][:-1]


@dataclass(frozen=True, slots=True)
class Selected:
    """What was selected.

    Attributes:
        manifest: of the new dataset.
        missing: ids that are not in the old one.
    """

    manifest: Manifest
    missing: tuple[str, ...] = ()


def select(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    ids: Iterable[str],
    *,
    missing_ok: bool = False,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Selected:
    """Make a dataset of the sequences with these ids, in the order of the dataset. Values are written as stored.

    Args:
        path: of the dataset; also a remote one.
        output: directory of the new dataset; it has the same splits.
        ids: of the sequences, in any order; one that is there twice counts once.
        missing_ok: leave out ids that are not in the dataset.
        shard_bytes: a shard closes at this many bytes; None is 256 MiB.
        overwrite: replace what is there.
        progress: called with positions done and positions in the chunks that are read.

    Raises:
        SequenceNotFoundError: ids that are not in the dataset, unless `missing_ok`; nothing is written.
        InvalidInputError: the output is the dataset itself.
        DatasetExistsError: something is there.
        CorruptDataError: the dataset is damaged.
    """
    if isinstance(ids, str):
        raise InvalidInputError(f"ids is the string {ids!r}; give several ids, or [{ids!r}]")
    wanted = dict.fromkeys(ids)
    given = Input.open(path)
    runs, missing = _find(given, wanted)
    if missing and not missing_ok:
        raise _not_found(given, missing)
    taken: set[str] = set()

    def place(split_name: str, sequence: StoredSequence) -> tuple[str, StoredSequence] | None:
        if sequence.id not in wanted:
            return None  # another id has the same hash
        taken.add(sequence.id)
        return split_name, sequence

    total = sum(int(given.shards[number].index["positions"][chunk]) for number, chunk, _ in runs)
    with Output(output, given, given.splits, shard_bytes=shard_bytes, overwrite=overwrite) as made:
        rewrite(given, made, iter(runs), place, progress, total)
        missing = [name for name in wanted if name not in taken]
        if missing and not missing_ok:
            raise _not_found(given, missing)
        return Selected(made.commit(), tuple(missing))


def _find(given: Input, wanted: Mapping[str, None]) -> tuple[list[Run], list[str]]:
    """(which rows of which chunks have one of the ids' hashes, ids whose hashes are nowhere)."""
    hashes = np.sort(np.array([id_hash(name) for name in wanted], np.uint64))
    seen = np.zeros(len(hashes), np.bool_)
    runs: list[Run] = []
    for number in range(len(given.manifest.shards) if len(hashes) else 0):
        shard = given.shards[number]
        place = np.minimum(np.searchsorted(hashes, shard.hashes), len(hashes) - 1)
        rows = np.flatnonzero(hashes[place] == shard.hashes)
        seen[place[rows]] = True
        chunks = np.searchsorted(shard.starts, rows, side="right") - 1
        runs += [
            (number, chunk, (rows[chunks == chunk] - shard.starts[chunk]).tolist())
            for chunk in np.unique(chunks).tolist()
        ]
    found = set(hashes[seen].tolist())
    return runs, [name for name in wanted if id_hash(name) not in found]


def _not_found(given: Input, missing: list[str]) -> SequenceNotFoundError:
    named = ", ".join(repr(name) for name in missing[:_NAMED])
    more = ", ..." if len(missing) > _NAMED else ""
    what = "this id is" if len(missing) == 1 else f"{len(missing)} ids are"
    return SequenceNotFoundError(
        f"{what} not in {given.store.name}: {named}{more}; leave out what is missing (--missing-ok, missing_ok=True)"
    )
