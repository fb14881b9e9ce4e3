"""A dataset in parts of some chunks, and a sample of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, islice
from typing import Final

import numpy as np

from logitstore.dataset.reader import Dataset

TOGETHER: Final = 16
"""Chunks that are worked on as one part: enough for numpy and for processes, few enough for memory."""

SAMPLE_PARTS: Final = 32
"""Chunks of a sample."""


def all_parts(dataset: Dataset) -> Iterator[slice]:
    """The places of a dataset in parts of some chunks each, in the order of the file."""
    parts = dataset.parts()
    while group := list(islice(parts, TOGETHER)):
        yield slice(min(part.start for part in group), max(part.stop for part in group))


def sampled_parts(dataset: Dataset) -> list[slice]:
    """Whole chunks, at most `SAMPLE_PARTS`, drawn at random from as many shards; the same each time.

    Each chunk is as likely as another one, whatever it holds: chunks are of about equal size, sequences are not.
    """
    parts = [part for stretch in _stretches(dataset) for part in _within(dataset, stretch)]
    return sorted((parts[at] for at in _spread(len(parts))), key=lambda part: part.start)


def _stretches(dataset: Dataset) -> list[slice]:
    """The rows of some shards; those of the whole, where it is a view."""
    shards = dataset.info.shards
    if len(dataset) != sum(shard.sequences for shard in shards):
        return [slice(0, len(dataset))]
    starts = [0, *accumulate(shard.sequences for shard in shards)]
    return [slice(starts[at], starts[at + 1]) for at in _spread(len(shards))]


def _within(dataset: Dataset, stretch: slice) -> Iterator[slice]:
    for part in dataset[stretch].parts():
        yield slice(stretch.start + part.start, stretch.start + part.stop)


def _spread(n: int) -> list[int]:
    """At most `SAMPLE_PARTS` of n numbers: one drawn from each of equally long stretches."""
    if n <= SAMPLE_PARTS:
        return list(range(n))
    edges = np.linspace(0, n, SAMPLE_PARTS + 1).astype(np.int64)
    drawn: list[int] = np.random.default_rng(0).integers(edges[:-1], edges[1:]).tolist()
    return drawn
