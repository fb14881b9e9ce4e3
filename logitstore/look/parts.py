"""A dataset in parts of some chunks, and a sample of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
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
    """Whole chunks, at most `SAMPLE_PARTS`, spread over a dataset at random; the same each time.

    One place is drawn from each of equally long stretches, and stands for its chunk.
    """
    if len(dataset) == 0:
        return []
    edges = np.linspace(0, len(dataset), SAMPLE_PARTS + 1).astype(np.int64)
    drawn = np.random.default_rng(0).integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))
    parts = {(part.start, part.stop): part for place in drawn.tolist() for part in [dataset.part_of(place)]}
    return [parts[place] for place in sorted(parts)]
