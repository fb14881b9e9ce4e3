"""`export`: a dataset in a trainer's own format."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import shutil
import stat
import tempfile
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

_NO_PLACE: Final = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_NAME_BYTES: Final = 200  # of a temporary name, which has a few more; systems allow 255


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
        overwrite: replace what is there: a file, or a directory in which there is an export of this format alone.
        progress: called with the number of sequences written so far.

    Returns:
        What was written, and what was lost.

    Raises:
        InvalidInputError: no exporter has this name, the format cannot hold this dataset, or nothing can be written at
            `output`: it is the dataset, holds it or lies inside it, or is a directory with other files than exports.
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
    told = Export(k=k, progress=progress or (lambda _: None))
    return Exported(to, len(dataset), tuple(_write(known[to], dataset, Path(output), told, overwrite=overwrite)))


def _write(exporter: Exporter, dataset: Dataset, target: Path, told: Export, *, overwrite: bool) -> list[str]:
    """Let the exporter write beside the target, and move what it wrote there; its notes."""
    _check_target(target, exporter, dataset.path, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidInputError(f"nothing can be written at {target}: {error.filename} is no directory") from error
    work = _work_directory(target)
    try:
        written = work / "new" / target.name
        written.parent.mkdir()
        notes = exporter.write(dataset, written, told)
        _sync(written)
        _check_target(target, exporter, dataset.path, overwrite=overwrite)  # of what came meanwhile
        _publish(written, target, work / "old")
    except BaseException:
        shutil.rmtree(work / "new", ignore_errors=True)
        with contextlib.suppress(OSError):
            work.rmdir()
        raise
    shutil.rmtree(work, ignore_errors=True)
    return notes


def _check_target(target: Path, exporter: Exporter, source: Path | str, *, overwrite: bool) -> None:
    """Refuse a place where nothing can be written, or where something would be lost that no export wrote.

    Raises:
        InvalidInputError: it is such a place.
        DatasetExistsError: something is there, and is not to be replaced.
    """
    if target.name in ("", ".."):
        raise InvalidInputError(f"{str(target)!r} is no name for a new file or directory; give one")
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        status = None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_PLACE:
            raise
        says = error.strerror if isinstance(error, OSError) else error
        raise InvalidInputError(f"nothing can be written at {str(target)!r}: {says}") from error
    _check_apart(target, source)
    if status is None:
        return
    if not overwrite:
        raise DatasetExistsError(f"{target} is there already; choose another path, or overwrite it")
    if stat.S_ISDIR(status.st_mode):
        if (other := _other_file(target, exporter.files)) is not None:
            raise InvalidInputError(
                f"{target} is a directory with {other.relative_to(target)} in it, which no export as {exporter.name} "
                f"writes; choose another path, or empty it yourself"
            )
    elif target.exists() and not target.is_file() and not target.is_dir():  # a device, a pipe, or a link to one
        raise InvalidInputError(f"{target} is no regular file; choose another path")


def _check_apart(target: Path, source: Path | str) -> None:
    """Refuse a place that is the dataset, holds it, or lies inside it."""
    dataset = Path(os.path.realpath(source))
    for place in (Path(os.path.realpath(target)), Path(os.path.realpath(target.parent)) / target.name):
        if place == dataset or place in dataset.parents or dataset in place.parents:
            where = "is" if place == dataset else "holds" if place in dataset.parents else "lies inside"
            raise InvalidInputError(f"{target} {where} the dataset {source} itself; choose another path")


def _other_file(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    """Something in a directory that none of the patterns fits; None where all is as an exporter writes it."""
    parts = [pattern.split("/") for pattern in patterns]
    for path in folder.rglob("*"):
        names = path.relative_to(folder).parts
        inner = path.is_dir()
        if path.is_symlink() or not any(
            (len(names) < len(pattern) if inner else path.is_file() and len(names) == len(pattern))
            and all(map(fnmatch.fnmatchcase, names, pattern))
            for pattern in parts
        ):
            return path
    return None


def _work_directory(target: Path) -> Path:
    """A new directory beside the target, of a name that no other run uses, and that is not too long."""
    name = os.fsencode(target.name)[:_NAME_BYTES].decode("utf-8", "ignore")
    return Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))


def _sync(written: Path) -> None:
    for file in [written, *written.rglob("*")] if written.is_dir() else [written]:
        if file.is_dir():
            sync_directory(file)
        else:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def _publish(written: Path, target: Path, old: Path) -> None:
    """Give what was written its name; a directory cannot be replaced in one step, so what was there moves to `old`."""
    is_directory = target.is_dir() and not target.is_symlink()
    if os.path.lexists(target) and (written.is_dir() or is_directory):
        target.rename(old)
        try:
            written.rename(target)
        except BaseException:
            if not os.path.lexists(target):
                old.rename(target)
            raise
    else:
        written.replace(target)
    sync_directory(target.parent)
