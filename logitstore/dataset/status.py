"""How far the writers of a dataset are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from logitstore.dataset.commit import existing_manifest
from logitstore.dataset.parts import LOCK_NAME, State, part_directory, part_names, read_part
from logitstore.errors import DatasetNotFoundError
from logitstore.io import LocalStore
from logitstore.io.lock import is_locked
from logitstore.io.store import local_path
from logitstore.schema import Manifest
from logitstore.schema.journal import Part

Progress = Literal["finished", "writing", "stopped", "missing"]


@dataclass(frozen=True, slots=True)
class PartStatus:
    """How far one part is.

    Attributes:
        split: of which split.
        number: of the part, from 0.
        of: how many there are.
        state: `finished`; `writing`, by a process that is alive; `stopped` before it was finished; `missing` where it
            was never begun.
        shards: that are complete.
        sequences: in complete chunks.
        positions: likewise.
        candidates: likewise.
        bytes: of complete shards and chunks.
        last: id of the last sequence; None before the first chunk.
        sent: shards that are on the Hub, and no longer here.
    """

    split: str
    number: int
    of: int
    state: Progress
    shards: int = 0
    sequences: int = 0
    positions: int = 0
    candidates: int = 0
    bytes: int = 0
    last: str | None = None
    sent: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """What is in the directory of a dataset.

    Attributes:
        manifest: of the dataset that is there; None where none was committed.
        parts: those that were begun and not committed, and the others of their splits.
    """

    manifest: Manifest | None
    parts: tuple[PartStatus, ...]


def status(path: str | os.PathLike[str]) -> Status:
    """How far the writers of a dataset are; only manifest and journals are read.

    Args:
        path: directory of the dataset.

    Raises:
        DatasetNotFoundError: nothing is there.
        CorruptDataError: manifest or a journal is damaged.
    """
    root = local_path(path, "the parts of a dataset are in the directory where they are written")
    manifest = existing_manifest(root)
    begun = part_names(root)
    if manifest is None and not begun and not LocalStore(root).has_shards():
        raise DatasetNotFoundError(f"{root} is no logitstore dataset, and no part of one was begun there")
    splits = dict.fromkeys((part.split, part.of) for part in begun)
    every = [Part(split=split, number=number, of=of) for split, of in splits for number in range(of)]
    return Status(manifest, tuple(_part(root, part) for part in every))


def _part(root: Path, part: Part) -> PartStatus:
    state = read_part(root, part)
    writing = is_locked(part_directory(root, part) / LOCK_NAME)
    if state is None:
        return PartStatus(part.split, part.number, part.of, "writing" if writing else "missing")
    return PartStatus(
        split=part.split,
        number=part.number,
        of=part.of,
        state=_progress(state, writing=writing),
        shards=len(state.shards),
        sequences=state.sums.sequences,
        positions=state.sums.positions,
        candidates=state.sums.candidates,
        bytes=state.bytes,
        last=state.last,
        sent=len(state.sent),
    )


def _progress(state: State, *, writing: bool) -> Progress:
    if state.done is not None:
        return "finished"
    return "writing" if writing else "stopped"
