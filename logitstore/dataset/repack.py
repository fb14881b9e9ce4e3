"""The same sequences in other shards, on a coarser grid, or with fewer candidates."""

from __future__ import annotations

import os

import numpy as np
from msgspec.structs import replace

from logitstore.dataset.recode import coarsen, keep_best
from logitstore.dataset.reshard import reshard
from logitstore.dataset.rewrite import SHARD_BYTES, Input, Output, Progress, rewrite
from logitstore.encoding.values import Encoding
from logitstore.errors import InvalidInputError
from logitstore.io.store import local_path
from logitstore.schema import Manifest, Sampling
from logitstore.shard.chunk import StoredSequence


def repack(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    shard_bytes: int | None = None,
    resolution: float | None = None,
    top_k: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a dataset anew. What is not to be changed stays exactly as it is stored, and so does every encoding.

    With neither `resolution` nor `top_k`, its chunks are copied as they are.

    Args:
        path: of the dataset; also a remote one.
        output: directory of the new dataset.
        shard_bytes: a shard closes at this many bytes; None is 256 MiB.
        resolution: nats a step of the grid, a power of two, no finer than the old one. Only sequences on the grid are
            rounded to it; the error of a logprob is then up to half of the old and half of the new one together.
        top_k: most candidates that are kept of a position. The tail grows by the others; where the token that follows
            is one of them, its logprob and rank are kept as `target_logprob` and `target_rank`.
        overwrite: replace what is there.
        progress: called with positions done and positions in all.

    Returns:
        The new manifest.

    Raises:
        InvalidInputError: a finer grid; a top_k of draws; a setting out of range; the output is the dataset itself.
        DatasetExistsError: something is there.
        CorruptDataError: the dataset is damaged.
    """
    given = Input.open(path)
    old = given.manifest.sampling
    sampling = _sampling(given, resolution, top_k)
    if sampling == old and top_k is None:
        root = local_path(output, "write to a directory, and publish it with `logitstore push`")
        size = SHARD_BYTES if shard_bytes is None else shard_bytes
        return reshard(given, root, size, overwrite=overwrite, progress=progress)

    def place(split: str, sequence: StoredSequence) -> tuple[str, StoredSequence]:
        if top_k is not None and sequence.values.encoding is Encoding.DRAWS:
            raise _draws(given)
        # Forged numbers may be infinite or NaN; they are for `validate` to report, not for numpy.
        with np.errstate(all="ignore"):
            sequence = coarsen(sequence, old.resolution, sampling.resolution)
            return split, sequence if top_k is None else keep_best(sequence, top_k, sampling.resolution)

    with Output(output, given, given.splits, sampling=sampling, shard_bytes=shard_bytes, overwrite=overwrite) as made:
        rewrite(given, made, given.runs(), place, progress, given.manifest.totals.positions)
        return made.commit()


def _sampling(given: Input, resolution: float | None, top_k: int | None) -> Sampling:
    """What the new manifest says was kept."""
    old, held = given.manifest.sampling, given.manifest.totals.encodings
    sampling = old
    if resolution is not None:
        if resolution < old.resolution and Encoding.GRID.label in held:
            raise InvalidInputError(
                f"{given.store.name} is on a grid of {old.resolution:g} nats, and a finer one of {resolution:g} would "
                f"claim an accuracy that its values no longer have; make it of the capture again for that"
            )
        sampling = replace(sampling, resolution=resolution)
    if top_k is not None:
        if top_k < 1:
            raise InvalidInputError(f"top_k is {top_k}; it is at least 1")
        if Encoding.DRAWS.label in held:
            raise _draws(given)
        fewer = top_k if old.top_k is None else min(top_k, old.top_k)
        sampling = replace(sampling, top_k=fewer, min_k=min(old.min_k, fewer))
    return sampling


def _draws(given: Input) -> InvalidInputError:
    return InvalidInputError(
        f"{given.store.name} holds draws of a sampled teacher, and the most frequent of them alone would be biased; "
        f"leave top_k out"
    )
