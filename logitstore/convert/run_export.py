"""`export`: a dataset in a trainer's own format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from logitstore.convert.base import Export, Exporter
from logitstore.convert.run import load_plugins
from logitstore.dataset.reader import Dataset
from logitstore.dataset.reader import open as open_dataset
from logitstore.errors import DatasetExistsError, InvalidInputError
from logitstore.io import sync_directory

GROUP: Final = "logitstore.exporters"
"""Entry-point group of exporters."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did: the exporter's name, the number of sequences, and what was lost."""

    exporter: str
    sequences: int
    notes: tuple[str, ...]


def exporters() -> dict[str, Exporter]:
    """All exporters by name, this package's and plugins'; one that cannot be loaded is left out with a warning."""
    return load_plugins(GROUP)


def export(
    dataset: Dataset | str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str,
    *,
    k: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Exported:
    """Write a dataset, or a view of one, in another format.

    Args:
        dataset: the dataset, or its path.
        output: the file or directory to write; it appears when it is complete.
        to: name of the format.
        k: most candidates of a position; None keeps all.
        overwrite: replace what is there.
        progress: called with the number of sequences written so far.

    Returns:
        What was written, and what was lost.

    Raises:
        InvalidInputError: no exporter has this name, or the format cannot hold this dataset.
        DatasetExistsError: something is at `output` already.
        CorruptDataError: the dataset is damaged.
    """
    known = exporters()
    if to not in known:
        raise InvalidInputError(f"no exporter is called {to!r}; there are: {', '.join(known)}")
    if k is not None and k < 1:
        raise InvalidInputError(f"k is {k}; a position keeps at least 1 candidate, or None for all")
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(dataset)
    target = Path(output)
    if target.exists() and not overwrite:
        raise DatasetExistsError(f"{target} is there already; choose another path, or overwrite it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.unfinished")
    _remove(temporary)
    try:
        notes = known[to].write(dataset, temporary, Export(k=k, progress=progress or (lambda _: None)))
        _publish(temporary, target)
    except BaseException:
        _remove(temporary)
        raise
    return Exported(to, len(dataset), tuple(notes))


def _publish(temporary: Path, target: Path) -> None:
    """Sync what was written and give it its name; what had that name is deleted after it was replaced."""
    for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
        if file.is_dir():
            sync_directory(file)
        else:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
    old = target.with_name(f".{target.name}.replaced")
    _remove(old)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync_directory(target.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
