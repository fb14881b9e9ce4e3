"""The place where a dataset is to be made of others."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from logitstore.dataset.commit import DATA_DIRECTORY, existing_manifest, remove_unnamed, shard_files
from logitstore.dataset.parts import LOCK_NAME, part_directory, part_names
from logitstore.dataset.shards import open_shard
from logitstore.dataset.tokenizer_files import staged
from logitstore.errors import CorruptDataError, DatasetExistsError, InvalidInputError
from logitstore.io import LocalStore, Store, make_directory, write_atomic
from logitstore.io.lock import FileLock, is_locked
from logitstore.schema import Manifest, ShardInfo, TokenizerInfo, serialise_manifest
from logitstore.schema.journal import PARTS_DIRECTORY
from logitstore.schema.manifest import MANIFEST_NAME, TOKENIZER_DIRECTORY

_TRIES: Final = 5


def check_output(root: Path, inputs: Iterable[Store], *, overwrite: bool) -> Manifest | None:
    """Refuse a place where nothing should be made.

    Args:
        root: directory of the dataset that is to be made.
        inputs: what it is made of.
        overwrite: whether what is there may be replaced.

    Returns:
        The manifest of the dataset that is replaced.

    Raises:
        InvalidInputError: it is one of the inputs, or in one.
        DatasetExistsError: something is there, or a writer is at work.
        CorruptDataError: the manifest there is damaged.
    """
    for store in inputs:
        if isinstance(store, LocalStore) and root.resolve().is_relative_to(store.root.resolve()):
            what = "is" if root.resolve() == store.root.resolve() else "is in"
            raise InvalidInputError(f"{root} {what} the dataset {store.name}, which is read; choose another path")
    if root.exists() and not root.is_dir():
        raise DatasetExistsError(f"{root} is a file; a dataset is a directory")
    old = existing_manifest(root)
    if old is not None and not overwrite:
        raise DatasetExistsError(f"{root} holds a dataset; choose another path, or overwrite it (--overwrite)")
    if not overwrite and (part_names(root) or shard_files(root)):
        raise DatasetExistsError(
            f"{root} holds an unfinished dataset; choose another path, or overwrite it (--overwrite)"
        )
    check_no_writers(root)
    return old


def check_no_writers(root: Path) -> None:
    """Refuse a directory in which a writer is at work.

    Raises:
        DatasetExistsError: naming its part.
    """
    for part in part_names(root):
        if is_locked(part_directory(root, part) / LOCK_NAME):
            raise DatasetExistsError(f"{root}: another writer is at work on {part}; wait for it")


def stage_tokenizer_of(store: Store, info: TokenizerInfo, root: Path) -> TokenizerInfo:
    """Copy the tokenizer's files of a dataset to where `place_tokenizer` takes them from, as they are.

    Args:
        store: the dataset.
        info: its tokenizer.
        root: the dataset that is to be made.

    Returns:
        The tokenizer, its files named as in a new dataset.

    Raises:
        CorruptDataError: a file is missing, or not the one that the manifest describes.
    """
    names = [file.path.rpartition("/")[2] for file in info.files]
    files = [replace(file, path=f"{TOKENIZER_DIRECTORY}/{name}") for file, name in zip(info.files, names, strict=True)]
    copied = replace(info, files=tuple(sorted(files, key=lambda file: file.path)))
    folder = store.folder(info.folder, info.files) if info.files else root
    for file, name in zip(info.files, names, strict=True):
        path = store.root / file.path if isinstance(store, LocalStore) else folder / name
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise CorruptDataError(
                "it is missing, or not the file that the manifest describes; copy it again from the source",
                code="tokenizer-file",
                path=store.where(file.path),
            )
        make_directory(staged(root, copied))
        write_atomic(staged(root, copied) / name, data)
    return copied


def remove_everything_else(root: Path, manifest: Manifest) -> None:
    """Remove shards, tokenizer files and journals that a dataset which replaced another does not name."""
    tokenizer = sorted((root / TOKENIZER_DIRECTORY).rglob("*"), reverse=True)
    remove_unnamed(root, manifest, [*shard_files(root), *tokenizer])
    for part in part_names(root):
        shutil.rmtree(part_directory(root, part), ignore_errors=True)


def remove_staged(root: Path) -> None:
    """Remove what is beside the parts of a dataset, and their directory where it is empty then."""
    for directory in (root / PARTS_DIRECTORY).glob("tokenizer-*"):
        shutil.rmtree(directory, ignore_errors=True)
    remove_empty([root / PARTS_DIRECTORY])


def remove_empty(directories: Iterable[Path]) -> None:
    """Remove these directories, but for those that hold something."""
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps others out of a dataset; leaves nothing beside its parts."""
    try:
        with _lock(root):
            try:
                yield
            finally:
                remove_staged(root)
    finally:
        remove_empty([root / PARTS_DIRECTORY])


def _lock(root: Path) -> FileLock:
    busy = f"{root}: another `logitstore` command is changing it; wait for it"
    for _ in range(_TRIES):
        make_directory(root / PARTS_DIRECTORY)
        with contextlib.suppress(FileNotFoundError):  # whoever held it removed the directory just now
            return FileLock(root / PARTS_DIRECTORY / LOCK_NAME, busy)
    raise DatasetExistsError(busy)


@contextlib.contextmanager
def removing(root: Path, old: Manifest | None) -> Iterator[list[Path]]:
    """Takes the names of new files, and removes them where the block fails before it made them a dataset.

    Args:
        root: the dataset.
        old: its manifest as it was before.
    """
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        current = old
        with contextlib.suppress(Exception):
            current = existing_manifest(root)
        if current == old:  # else it is the manifest with them
            for path in made:
                with contextlib.suppress(OSError):
                    path.unlink()
            remove_empty([*root.glob(f"{DATA_DIRECTORY}/*"), root / DATA_DIRECTORY])
        raise


def write_manifest(root: Path, manifest: Manifest, shards: Iterable[ShardInfo], old: Manifest | None) -> None:
    """Write the manifest, unless another one was written meanwhile: from here on the dataset is that.

    Args:
        root: directory of the dataset.
        manifest: of it.
        shards: those of it that are new.
        old: its manifest as it was before.

    Raises:
        DatasetExistsError: another one was written.
        CorruptDataError: a new shard is missing or damaged.
    """
    _check_unchanged(root, old)  # else its writer may have removed the shards
    for shard in shards:
        open_shard(LocalStore(root), shard, manifest)
    _check_unchanged(root, old)
    write_atomic(root / MANIFEST_NAME, serialise_manifest(manifest))


def _check_unchanged(root: Path, old: Manifest | None) -> None:
    if existing_manifest(root) != old:
        raise DatasetExistsError(f"{root} was changed meanwhile, by another writer; do this again")
