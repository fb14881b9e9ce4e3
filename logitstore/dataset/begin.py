"""How a writer of a part begins: alone, and where nothing is in its way."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from logitstore.dataset.commit import part_files, shard_files
from logitstore.dataset.parts import LOCK_NAME, State, is_begun, part_names
from logitstore.dataset.summary import Summary
from logitstore.errors import DatasetExistsError
from logitstore.io import make_directory
from logitstore.io.lock import FileLock
from logitstore.schema import Manifest
from logitstore.schema.journal import Chunked, Part
from logitstore.shard.writer import ChunkEntry

_RESUME: Final = "go on with it (--resume, resume=True), or begin it anew (--overwrite, overwrite=True)"


def lock_part(directory: Path, busy: str) -> FileLock:
    """Make the directory of a part, and keep others out of it.

    Raises:
        DatasetExistsError: another writer is at work, as `busy` says.
    """
    while True:
        make_directory(directory)
        with contextlib.suppress(FileNotFoundError):  # another writer, which wrote nothing, removed it just now
            return FileLock(directory / LOCK_NAME, busy)


def refuse(root: Path, part: Part, old: Manifest | None, state: State | None, *, alone: bool) -> None:
    """Raise where anything is there that a writer would replace or contradict.

    Args:
        root: the dataset.
        part: the writer's.
        old: manifest of a dataset that is there.
        state: what an earlier writer of the part left.
        alone: whether this writer makes a dataset of what it writes.

    Raises:
        DatasetExistsError: naming it, and what to do.
    """
    if old is not None:
        raise DatasetExistsError(f"{root} holds a dataset; choose another path, or overwrite it (--overwrite)")
    if state is not None:
        raise DatasetExistsError(f"{root} holds an unfinished dataset: {part} was begun before; {_RESUME}")
    others = [other for other in part_names(root) if other != part and is_begun(root, other)]
    if alone and others:
        raise DatasetExistsError(
            f"{root} holds {others[0]}, which is not committed: a writer without part= makes a dataset of what it "
            f"writes alone; commit that first, give this a part of its own (part='0/2' ...), or choose another path"
        )
    others = [other for other in others if other.split == part.split and other.of != part.of]
    if others:
        raise DatasetExistsError(
            f"{root} holds {others[0]}: all parts of a split are of one number; give this one of {others[0].of}, or "
            f"choose another path"
        )
    mine = shard_files(root) if alone else list(part_files(root, part))
    if mine:
        raise DatasetExistsError(
            f"{root} holds an unfinished dataset ({mine[0].name}) without a journal; save what is there with "
            f"`logitstore recover`, or overwrite it (--overwrite)"
        )


def chunk_line(entry: ChunkEntry, last: str, summary: Summary) -> Chunked:
    """The journal's line of a chunk that was written; `last` is the id of its last sequence."""
    offset, length, sequences, positions, candidates, found = entry
    return Chunked(
        offset=offset,
        length=length,
        sequences=sequences,
        positions=positions,
        candidates=candidates,
        digest=found.hex(),
        last=last,
        sums=summary.sums(),
    )
