"""Replacing the damaged files of a dataset by those of a copy of it, in a directory or on a network."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol

from logitstore.checks.workers import workers_for
from logitstore.dataset.shards import read_manifest
from logitstore.errors import (
    CorruptDataError,
    DatasetNotFoundError,
    IncompleteDatasetError,
    InvalidInputError,
    LogitStoreError,
    RemoteAccessError,
    RemoteError,
)
from logitstore.hub.parts import BUFFER, Fetch, Parts, Wanted, fetch_all
from logitstore.io import LocalStore, Store, regular_size, sync_directory, write_atomic
from logitstore.io.hub import HubStore
from logitstore.io.lock import FileLock
from logitstore.io.remote import RemoteStore
from logitstore.io.store import local_path, store_of
from logitstore.limits import MANIFEST_BYTES
from logitstore.processes import each
from logitstore.schema import Manifest, parse_manifest
from logitstore.schema.journal import PARTS_DIRECTORY
from logitstore.schema.manifest import MANIFEST_NAME

DAMAGED: Final = ".damaged"
"""Is put behind the name of a damaged manifest that is kept."""

_PIECE: Final = 4 * 2**20
"""File systems of fsspec give a range at once: as much as a thread may hold."""

WORK_DIRECTORY: Final = ".repair"
LOCK_NAME: Final = ".repair.lock"

_PARTIAL: Final = "data/*/*.arrow.partial"


@dataclass(frozen=True, slots=True)
class NotRepaired:
    """A file that stays damaged or missing.

    Attributes:
        path: in the dataset.
        reason: why, and where.
    """

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair did.

    Attributes:
        repaired: paths in the dataset of the files that were replaced, in the order of the manifest; the manifest last.
        not_repaired: files that are damaged or missing, and stay so.
        bytes: size of what was repaired.
    """

    repaired: tuple[str, ...]
    not_repaired: tuple[NotRepaired, ...]
    bytes: int


class Told(Protocol):
    """Is told of each file when it is done: why it was not repaired, None where it was."""

    def __call__(self, path: str, reason: str | None, /) -> None:
        """Called in the process and thread of `repair`."""


def repair(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    told: Told = lambda _path, _reason: None,
) -> Repaired:
    """Replace shards and tokenizer files that are missing, or whose bytes are not those of the manifest.

    What to put there is found in the source's manifest by its sha256, whatever its path is there. It is fetched to a
    directory `.repair` beside its place and verified; then it replaces the damaged file, or the link to one, by a
    rename: nothing is written into a file that is there, which may be another dataset's too. What the source does not
    have, or has damaged too, stays as it is.

    Where the manifest itself is missing or damaged, the source's is taken, and comes last; the damaged one is kept as
    `logitstore.json.damaged`. A repair that was stopped goes on with the files that are left when it is called again.

    Args:
        path: directory of the dataset.
        source: of a copy of it, or of a dataset that has its files: a directory, `hf://datasets/ns/name[@revision]`,
            or a URL that fsspec knows.
        storage_options: for URLs: `token` and `endpoint` of the Hub, or what fsspec's file system takes.
        workers: processes that look for damage, as those of `logitstore.validate`.
        progress: called with (bytes looked at or fetched, bytes in all).
        told: told of each file that is damaged or missing when it is done.

    Raises:
        InvalidInputError: the dataset is a URL or its own source; or its manifest is gone, and the source is no copy.
        DatasetNotFoundError: there is no dataset, or the source is none.
        DatasetExistsError: another repair is at work.
        IncompleteDatasetError: its writer has not finished, or the source's.
        CorruptDataError: the source's manifest is damaged.
        UnsupportedVersionError: this release cannot read one of them.
        RemoteError: the source cannot be reached. What was repaired by then stays so.
        RemoteAccessError: another token is needed.
    """
    root = local_path(path, "repair what `logitstore pull` fetches")
    store = store_of(source, storage_options)
    if isinstance(store, LocalStore) and _same(root, store.root):
        raise InvalidInputError(f"{store.root} is the dataset that is to be repaired; give a copy of it")
    theirs = read_manifest(store)
    own = _own_manifest(root)
    manifest, data = own, b""
    if manifest is None:
        _check_same_dataset(root, theirs, store)
        manifest, data = theirs, _manifest_bytes(store, theirs)
    files = [Wanted(file.path, file.bytes, file.sha256) for file in manifest.files]
    total = sum(file.size for file in files)
    damaged = list(_damaged(root, files, workers_for(total, workers), lambda done: progress(done, total)))
    done = total - sum(file.size for file in damaged)
    if own is not None and not damaged:
        return Repaired((), (), 0)
    repaired: list[Wanted] = []
    left: list[NotRepaired] = []
    if (root / LOCK_NAME).is_symlink():  # it would be made where that leads
        (root / LOCK_NAME).unlink()
    with FileLock(root / LOCK_NAME, f"another repair is at work in {root}; wait for it"):
        for file in damaged:
            reason = _repair(root, file, store, theirs)
            told(file.path, reason)
            if reason is None:
                repaired.append(file)
            else:
                left.append(NotRepaired(file.path, reason))
            done += file.size
            progress(done, total)
        if own is None:
            _place_manifest(root / MANIFEST_NAME, data)
            told(MANIFEST_NAME, None)
    names = [file.path for file in repaired] + ([MANIFEST_NAME] if own is None else [])
    return Repaired(tuple(names), tuple(left), sum(file.size for file in repaired) + len(data))


def _damaged(root: Path, files: list[Wanted], workers: int, whole: Callable[[int], None]) -> Iterator[Wanted]:
    """Files that are missing or damaged; `whole` is told how many bytes are not."""
    done = 0
    with contextlib.closing(each(is_whole, root, files, workers)) as found:
        for file, good in zip(files, found, strict=True):
            if good:
                done += file.size
                whole(done)
            else:
                yield file


def is_whole(root: Path, file: Wanted) -> bool:
    """Whether a file of the dataset is there, and is the one that the manifest names."""
    try:
        return file.is_at(root / file.path)
    except OSError:  # a disk that does not give it
        return False


def _same(root: Path, other: Path) -> bool:
    try:
        return root.samefile(other)
    except OSError:
        return False


def _own_manifest(root: Path) -> Manifest | None:
    """The dataset's manifest; None where it is damaged, or missing where shards are.

    Raises:
        DatasetNotFoundError: there is nothing.
        IncompleteDatasetError: a writer is at work, or was stopped.
        UnsupportedVersionError: this release cannot read it.
    """
    try:
        return read_manifest(LocalStore(root))
    except CorruptDataError:
        return None
    except IncompleteDatasetError:
        if (root / PARTS_DIRECTORY).exists() or any(root.glob(_PARTIAL)):
            raise  # a writer is at work, or can go on
        return None
    except DatasetNotFoundError as error:
        raise DatasetNotFoundError(f"{error}; `logitstore pull` or a copy gives a whole one") from None


def _manifest_bytes(store: Store, manifest: Manifest) -> bytes:
    data = store.small(MANIFEST_NAME, MANIFEST_BYTES)
    if parse_manifest(data) != manifest:
        raise CorruptDataError("it came damaged", code="manifest", path=store.where(MANIFEST_NAME))
    return data


def _check_same_dataset(root: Path, theirs: Manifest, store: Store) -> None:
    """Without its manifest, a dataset may be any; another one's shards have the same names, and shall not be lost."""
    shards = [info for info in theirs.shards if (root / info.path).exists()]
    if shards and not any(_has_size(root / info.path, info.bytes) for info in shards):
        raise InvalidInputError(
            f"{root} has no readable manifest, and none of its shards has the size of that in {store.name}: this seems "
            f"to be another dataset, and nothing was changed; move it away and fetch a whole one"
        )


def _has_size(path: Path, size: int) -> bool:
    try:
        return regular_size(path) == size
    except LogitStoreError:
        return False


def _place_manifest(path: Path, data: bytes) -> None:
    """Put the source's manifest in its place; a damaged one is kept."""
    if path.exists() or path.is_symlink():
        kept, number = path.with_name(path.name + DAMAGED), 1
        while kept.exists() or kept.is_symlink():  # of an earlier repair
            number += 1
            kept = path.with_name(f"{path.name}{DAMAGED}-{number}")
        path.rename(kept)
    write_atomic(path, data)


def _repair(root: Path, file: Wanted, store: Store, theirs: Manifest) -> str | None:
    """Fetch a file and give it its name; why that was not possible, None where it was."""
    named = [other.path for other in theirs.files if (other.sha256, other.bytes) == (file.sha256, file.size)]
    if not named:
        return f"{store.name} has no file with its sha256"
    target = root / file.path
    if not target.parent.resolve().is_relative_to(root.resolve()):
        return f"{target.parent} is a link out of the dataset, where nothing is written"
    reasons: list[str] = []
    for name in named:
        try:
            _replace(target, Wanted(name, file.size, file.sha256), store)
            for parent in PurePosixPath(file.path).parents:
                sync_directory(root / parent)
        except (RemoteError, RemoteAccessError):  # OSErrors too, but no fault of this file
            raise
        except LogitStoreError as error:
            reasons.append(str(error))
        except OSError as error:
            reasons.append(f"{error.filename or target}: {error.strerror or error}")
        else:
            return None
    return "; ".join(reasons)


def _replace(target: Path, file: Wanted, store: Store) -> None:
    """Fetch a file of the source beside its place, and rename it when it is verified and synced.

    Raises:
        InvalidInputError: there is no room for it.
        CorruptDataError: it is damaged at its source.
        SourceNotFoundError: it is missing there.
        OSError: the disk is full, or refuses.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(target.parent).free
    if file.size > room:
        raise InvalidInputError(f"{target}: it takes {file.size:,} bytes, and there is room for {room:,}")
    with _directory_beside(target) as work:
        parts = Parts(work, file)
        fetch_all([parts], _fetch_from(store), store.where, lambda _: None)
        parts.whole.replace(target)


@contextlib.contextmanager
def _directory_beside(target: Path) -> Iterator[Path]:
    """A new working directory in the same file system."""
    work = target.parent / WORK_DIRECTORY
    _remove(work)  # a killed repair's; nothing in it is trusted, it may be links
    work.mkdir()
    try:
        yield work
    finally:
        with contextlib.suppress(OSError):
            _remove(work)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fetch_from(store: Store) -> Fetch:
    """How ranges of files of a store are had, some of them at once and a little of each in memory."""
    if isinstance(store, HubStore):
        return lambda path, offset, length, sink, wanted: store.fetch(
            path, offset, length, sink, wanted=wanted, buffer=BUFFER
        )
    if not isinstance(store, RemoteStore):
        return lambda path, offset, length, sink, _wanted: _read(Path(store.where(path)), offset, length, sink)

    def fetch(path: str, offset: int, length: int, sink: Callable[[bytes], None], _wanted: Any, /) -> None:
        for start in range(offset, offset + length, _PIECE):
            store.fetch(path, start, min(_PIECE, offset + length - start), sink)

    return fetch


def _read(path: Path, offset: int, length: int, sink: Callable[[bytes], None]) -> None:
    """Hand a range of a local file to `sink`.

    Raises:
        CorruptDataError: it is shorter, cannot be read, or is no regular file.
        SourceNotFoundError: there is none.
    """
    if regular_size(path) < offset + length:
        raise CorruptDataError("the file is shorter than the manifest says", code="shard-size", path=str(path))
    end = offset + length
    while offset < end:
        data = _piece(path, offset, min(BUFFER, end - offset))
        sink(data)
        offset += len(data)


def _piece(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise CorruptDataError(f"cannot be read: {error.strerror}", code="file-kind", path=str(path)) from error
    if not data:
        raise CorruptDataError("the file became shorter", code="shard-size", path=str(path))
    return data
