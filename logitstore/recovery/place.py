"""Putting the recovered dataset in its place: a new directory, or that of the damaged one.

In place, the manifest is the step that counts. Before it, the directory holds what it held, and new files that
nothing names; what was damaged is moved away after it. A list of the moves is written first, so that whoever comes
next can undo or finish what was begun.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from logitstore.dataset.parts import LOCK_NAME, part_directory, part_names
from logitstore.errors import CorruptDataError, DatasetExistsError, InvalidInputError
from logitstore.io import make_directory, sha256_file, sync_directory, write_atomic
from logitstore.io.lock import FileLock, is_locked
from logitstore.recovery.result import Recovered
from logitstore.schema.journal import PARTS_DIRECTORY
from logitstore.schema.manifest import MANIFEST_NAME, is_safe_path

STAGE_NAME: Final = ".recovering"
BEFORE_NAME: Final = "before-recovery"
_MOVES: Final = "moves.json"


class Moves(msgspec.Struct, frozen=True, kw_only=True):
    """What is done with a directory, once its dataset was checked.

    Attributes:
        manifest: sha256 of the new manifest.
        new: paths of the files that come.
        kept: paths of files that are replaced, and copied to where damaged ones are kept.
        moved: paths of those that are moved there.
        before: directory for them.
        result: what is said at the end.
    """

    manifest: str
    new: tuple[str, ...]
    kept: tuple[str, ...]
    moved: tuple[str, ...]
    before: str
    result: Recovered


@contextlib.contextmanager
def held(root: Path, *, changing: bool) -> Iterator[None]:
    """Keeps writers out while a directory is recovered.

    Args:
        root: the directory.
        changing: whether it is recovered in place.

    Raises:
        DatasetExistsError: one is at work.
    """
    with contextlib.ExitStack() as stack:
        if changing:
            make_directory(root / PARTS_DIRECTORY)
            stack.callback(_remove_empty, root / PARTS_DIRECTORY)
            busy = f"{root}: another `logitstore` command is changing it; wait for it"
            stack.enter_context(FileLock(root / PARTS_DIRECTORY / LOCK_NAME, busy))
        elif is_locked(root / PARTS_DIRECTORY / LOCK_NAME):
            raise DatasetExistsError(f"{root}: another `logitstore` command is changing it; wait for it")
        for part in part_names(root):
            path = part_directory(root, part) / LOCK_NAME
            busy = f"{root}: {part} is still being written; recover when its writer has ended (`logitstore status`)"
            there = path.exists()
            try:
                lock = FileLock(path, busy)
            except DatasetExistsError:
                raise
            except OSError:  # a directory that cannot be written to has no writers
                continue
            stack.callback(lock.forget if there else lock.release)
        yield


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def check_output(root: Path, output: Path) -> None:
    """Refuse a place where nothing should be made.

    Raises:
        InvalidInputError: it is in the directory that is recovered, or that is in it.
        DatasetExistsError: something is there.
    """
    there, here = output.resolve(), root.resolve()
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise InvalidInputError(f"{output} is {root}, or in it, or around it; choose another path, or use --in-place")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise DatasetExistsError(f"{output} is there already; choose another path")


@contextlib.contextmanager
def new_stage(output: Path) -> Iterator[Path]:
    """A directory beside a new one, which is removed again unless it was renamed."""
    make_directory(output.parent)
    stage = output.with_name(f".{output.name}{STAGE_NAME}")
    busy = f"{output} is being made by another `logitstore recover`; wait for it"
    with FileLock(stage.with_name(f"{stage.name}.lock"), busy):
        _remove(stage)
        stage.mkdir()
        try:
            yield stage
        finally:
            _remove(stage)


def install_new(stage: Path, output: Path) -> None:
    """Give the new dataset its name."""
    for directory in (path for path in stage.rglob("*") if path.is_dir()):
        sync_directory(directory)
    sync_directory(stage)
    if output.is_dir() and os.name == "nt":
        output.rmdir()
    stage.rename(output)
    sync_directory(output.parent)


@contextlib.contextmanager
def stage_inside(root: Path) -> Iterator[Path]:
    """A directory in that of the dataset, which is removed again, unless it is needed to finish what was begun."""
    stage = root / STAGE_NAME
    _remove(stage)
    stage.mkdir()
    try:
        yield stage
    finally:
        if not (stage / _MOVES).exists():
            _remove(stage)


def _remove(stage: Path) -> None:
    if stage.is_symlink() or stage.is_file():
        stage.unlink()
    elif stage.exists():
        shutil.rmtree(stage)


def before_directory(root: Path) -> str:
    """A name that is free for the directory of damaged files."""
    number, name = 1, BEFORE_NAME
    while os.path.lexists(root / name):
        number += 1
        name = f"{BEFORE_NAME}-{number}"
    return name


def install_inside(root: Path, moves: Moves) -> None:
    """Make the dataset that was checked that of the directory."""
    stage = root / STAGE_NAME
    write_atomic(stage / _MOVES, msgspec.json.encode(moves))
    for name in moves.kept:
        _keep(root, moves, name)
    for name in moves.new:
        make_directory((root / name).parent)
        (stage / name).replace(root / name)
        sync_directory((root / name).parent)
    if (root / MANIFEST_NAME).exists():
        _keep(root, moves, MANIFEST_NAME)
    (stage / MANIFEST_NAME).replace(root / MANIFEST_NAME)
    sync_directory(root)
    _finish(root, moves)


def take_up(root: Path) -> Recovered | None:
    """Finish a recovery that was stopped after its manifest was written, or undo one that was stopped before.

    Returns:
        What the finished one did; None where there was none.

    Raises:
        CorruptDataError: its list of moves is damaged.
    """
    stage = root / STAGE_NAME
    if not (stage / _MOVES).is_file():
        _remove(stage)
        return None
    moves = _read_moves(stage)
    manifest = root / MANIFEST_NAME
    if manifest.is_file() and sha256_file(manifest) == moves.manifest:
        _finish(root, moves)
        return moves.result
    _undo(root, moves)
    return None


def _read_moves(stage: Path) -> Moves:
    try:
        moves = msgspec.json.decode((stage / _MOVES).read_bytes(), type=Moves)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(stage) from error
    if not all(is_safe_path(name) for name in (*moves.new, *moves.kept, *moves.moved, moves.before)):
        raise _damaged(stage)
    return moves


def _damaged(stage: Path) -> CorruptDataError:
    return CorruptDataError(
        f"the list of moves of a recovery that was stopped is damaged; move {stage} away, and recover again",
        code="json",
        path=str(stage / _MOVES),
    )


def _undo(root: Path, moves: Moves) -> None:
    """Take back what was done before the manifest."""
    before = root / moves.before
    for name in moves.new:
        if name not in moves.kept:
            (root / name).unlink(missing_ok=True)
    for name in moves.kept:
        if (before / name).exists():
            (before / name).replace(root / name)
    (before / MANIFEST_NAME).unlink(missing_ok=True)
    for path in (*sorted(before.rglob("*"), reverse=True), before):
        _remove_empty(path)
    _remove(root / STAGE_NAME)


def _keep(root: Path, moves: Moves, name: str) -> None:
    """A second name, or a copy, of a file that is about to be replaced."""
    target = root / moves.before / name
    make_directory(target.parent)
    if target.exists():
        return
    try:
        os.link(root / name, target)
    except (OSError, NotImplementedError):
        shutil.copy2(root / name, target)
    sync_directory(target.parent)


def _finish(root: Path, moves: Moves) -> None:
    for name in moves.moved:
        source, target = root / name, root / moves.before / name
        if source.exists() or source.is_symlink():
            make_directory(target.parent)
            source.rename(target)
            sync_directory(target.parent)
            sync_directory(source.parent)
    for name in moves.moved:
        if name.startswith(f"{PARTS_DIRECTORY}/"):
            with contextlib.suppress(OSError):
                (root / moves.before / name / LOCK_NAME).unlink()
    _remove(root / STAGE_NAME)


def existing(root: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Those of some paths at which something is."""
    return tuple(name for name in dict.fromkeys(names) if os.path.lexists(root / name))
