"""Several datasets as one: their shards as they are, under one manifest."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from msgspec import structs

from logitstore.dataset.agree import Agreed, Described, agree
from logitstore.dataset.commit import (
    clean,
    first_number,
    id_at,
    is_published,
    make_manifest,
    shard_files,
    shard_path,
)
from logitstore.dataset.ids import repeated
from logitstore.dataset.output import (
    check_no_writers,
    check_output,
    locked,
    remove_empty,
    remove_everything_else,
    remove_staged,
    removing,
    stage_tokenizer_of,
    write_manifest,
)
from logitstore.dataset.parts import part_names, read_parts
from logitstore.dataset.rewrite import Progress
from logitstore.dataset.shards import open_shard, read_manifest
from logitstore.dataset.summary import add_totals, tally
from logitstore.dataset.tokenizer_files import merge_partial, place_tokenizer, staged
from logitstore.errors import CorruptDataError, DatasetExistsError, InvalidInputError
from logitstore.io import DurableFile, LocalStore, make_directory, sync_directory
from logitstore.io.store import local_path
from logitstore.schema import Manifest, ShardInfo, TokenizerInfo, Totals
from logitstore.schema.journal import PARTS_DIRECTORY, Part
from logitstore.schema.manifest import MANIFEST_NAME

_BLOCK: Final = 2**20
_NO_LINKS: Final = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
)
"""What file systems say that cannot link two files: of two devices, or without links."""
_ADVICE: Final = "fetch it with `logitstore pull`, and join it here"


@dataclass(frozen=True, slots=True)
class Joined:
    """What was joined.

    Attributes:
        manifest: of the dataset.
        notes: what the datasets do not agree on, so that the whole does not say it.
        linked: shards that are hard links to those of the inputs.
        copied: shards that were copied.
        unchanged: whether the dataset held all of it before.
    """

    manifest: Manifest
    notes: tuple[str, ...] = ()
    linked: int = 0
    copied: int = 0
    unchanged: bool = False


@dataclass(frozen=True, slots=True)
class _Dataset:
    """One of those that become one; `shards` are those of its shards that are taken."""

    store: LocalStore
    manifest: Manifest
    shards: tuple[ShardInfo, ...]

    @property
    def name(self) -> str:
        return self.store.name


@dataclass(slots=True)
class _Moved:
    """The inputs' shards in their places, as a manifest names them."""

    shards: list[ShardInfo] = field(default_factory=list)
    linked: int = 0
    copied: int = 0


def merge(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Joined:
    """Make one dataset of several. Shards are hard-linked where the file system can, else copied; nothing is encoded.

    Rows are in the order of splits' names as they first come, then of the datasets.

    Args:
        paths: directories of the datasets.
        output: directory of the new one.
        overwrite: replace what is there.
        progress: called with bytes of shards done and bytes in all.

    Raises:
        InvalidInputError: two datasets differ in what one has once, or have sequences of one id; the message names
            both. The output is an input. A path is a URL.
        DatasetExistsError: something is there.
        DatasetNotFoundError: a path holds none.
        CorruptDataError: a dataset is damaged.
    """
    if not paths:
        raise InvalidInputError("no datasets are given; name those that become one")
    root = local_path(output, "write to a directory, and publish it with `logitstore push`")
    inputs = [_open(path) for path in paths]
    old = check_output(root, [each.store for each in inputs], overwrite=overwrite)
    agreed, notes = _agree(inputs)
    _check_ids(inputs)
    made_root = not root.exists()
    try:
        with locked(root):
            with removing(root, old) as made:
                moved = _move(root, inputs, made, progress)
                tokenizer = _joined_tokenizer(root, inputs, old)
                splits = [name for each in inputs for name in each.manifest.splits]
                totals = add_totals(each.manifest.totals for each in inputs)
                manifest = make_manifest(agreed, _grouped(moved.shards), totals, tokenizer, splits)
                write_manifest(root, manifest, moved.shards, old)
            if overwrite:
                remove_everything_else(root, manifest)
    finally:
        remove_empty([root] if made_root else [])
    return Joined(manifest, notes, moved.linked, moved.copied)


def append(
    path: str | os.PathLike[str],
    others: Sequence[str | os.PathLike[str]],
    *,
    progress: Progress | None = None,
) -> Joined:
    """Add the sequences of other datasets to one, in place. Their shards are linked or copied as by `merge`.

    A reader beside it sees the dataset as it was, until all is there. Shards that it has already (with the same sha256)
    are not added again, so that this can be repeated after it was stopped.

    Args:
        path: directory of the dataset that grows.
        others: directories of those that are added.
        progress: called with bytes of shards done and bytes in all.

    Raises:
        InvalidInputError: as for `merge`.
        DatasetExistsError: another append is at work, or parts were begun that would replace the dataset.
        DatasetNotFoundError: a path holds none.
        CorruptDataError: a dataset is damaged.
    """
    root = local_path(path, "pull it with `logitstore pull`, append, and publish it with `logitstore push`")
    inputs = [_open(other) for other in others]
    for each in inputs:
        if each.store.root.resolve() == root.resolve():
            raise InvalidInputError(f"{each.name} is the dataset itself; name others that are added to it")
    read_manifest(LocalStore(root))  # a lock makes directories, and is for a dataset
    with locked(root):
        base = _open(root)
        _check_alone(root, base.manifest)
        _remove_left(root, base.manifest)
        inputs = _missing(base, inputs)
        if not any(each.shards for each in inputs):
            return Joined(base.manifest, unchanged=True)
        agreed, notes = _agree([base, *inputs])
        _check_ids([base, *inputs])
        with removing(root, base.manifest) as made:
            moved = _move(root, inputs, made, progress)
            tokenizer = base.manifest.tokenizer
            if tokenizer is None or tokenizer.digest is None or not tokenizer.files:
                tokenizer = _joined_tokenizer(root, [base, *inputs], base.manifest)
            splits = [name for each in (base, *inputs) for name in each.manifest.splits]
            totals = add_totals([base.manifest.totals, *map(_totals, inputs)])
            everything = _grouped((*base.shards, *moved.shards))
            manifest = make_manifest(agreed, everything, totals, tokenizer, splits)
            write_manifest(root, manifest, moved.shards, base.manifest)
    return Joined(manifest, notes, moved.linked, moved.copied)


def _open(path: str | os.PathLike[str]) -> _Dataset:
    store = LocalStore(local_path(path, _ADVICE))
    manifest = read_manifest(store)
    return _Dataset(store, manifest, manifest.shards)


def _check_alone(root: Path, manifest: Manifest) -> None:
    """Refuse a dataset that writers were told to replace."""
    check_no_writers(root)
    parts = part_names(root)
    states = read_parts(root)
    if parts and len(parts) == len(states) and all(is_published(state, manifest) for state in states):
        clean(root, manifest, states)  # stopped between its manifest and the removal of its journals
    elif parts:
        raise DatasetExistsError(
            f"{root}: {parts[0]} was begun, which is to replace the dataset; finish it (--resume) and `logitstore "
            f"commit` it, or remove {root / PARTS_DIRECTORY}"
        )


def _remove_left(root: Path, manifest: Manifest) -> None:
    """Remove what an append that was killed left."""
    named = {shard.path for shard in manifest.shards}
    for path in shard_files(root):
        stem = path.name.partition(".arrow")[0].rpartition("-")[0]
        if stem == path.parent.name and path.relative_to(root).as_posix() not in named:
            with contextlib.suppress(OSError):
                path.unlink()
    remove_staged(root)
    for path in root.glob(f".{MANIFEST_NAME}.*.partial"):
        with contextlib.suppress(OSError):
            path.unlink()


def _missing(base: _Dataset, others: Sequence[_Dataset]) -> list[_Dataset]:
    """The datasets with those of their shards alone that are not there yet."""
    have = {(shard.split, shard.sha256) for shard in base.shards}
    found = []
    for other in others:
        new = tuple(shard for shard in other.shards if (shard.split, shard.sha256) not in have)
        have |= {(shard.split, shard.sha256) for shard in new}
        found.append(replace(other, shards=new))
    return found


def _agree(inputs: Sequence[_Dataset]) -> tuple[Agreed, tuple[str, ...]]:
    """What all of them say together, and what they do not agree on.

    Raises:
        InvalidInputError: they cannot be one dataset.
    """
    agreed = agree([Described.of(each.name, each.manifest) for each in inputs])
    notes = list(agreed.notes)
    known = [info for each in inputs if (info := each.manifest.tokenizer) is not None and info.digest is not None]
    notes += [
        f"the tokenizer's {what.replace('_', ' ')} differs; the first dataset's is taken"
        for what in ("special_tokens", "chat_template")
        if len({getattr(info, what) for info in known}) > 1
    ]
    return agreed, tuple(notes)


def _check_ids(inputs: Sequence[_Dataset]) -> None:
    """Refuse two sequences of one id, and shards that are not those of their manifests.

    Raises:
        InvalidInputError: naming the id and both datasets.
        CorruptDataError: a shard is damaged.
    """
    shards = [(each, info) for each in inputs for info in each.shards]
    hashes = [open_shard(each.store, info, each.manifest).hashes for each, info in shards]
    for group in repeated(hashes):
        seen: dict[str, _Dataset] = {}
        for number, row in group:
            each, info = shards[number]
            sequence_id = id_at(each.store.root / info.path, row)
            if sequence_id in seen:
                raise InvalidInputError(
                    f"{seen[sequence_id].name} and {each.name} both have a sequence of the id {sequence_id!r}; ids "
                    f"are unique in a dataset: leave it out of one of them (`logitstore select`)"
                )
            seen[sequence_id] = each


def _move(root: Path, inputs: Sequence[_Dataset], made: list[Path], progress: Progress | None) -> _Moved:
    moved = _Moved()
    numbers: dict[str, int] = {}
    total, done = sum(info.bytes for each in inputs for info in each.shards), 0
    for each in inputs:
        for info in each.shards:
            part = Part(split=info.split)
            number = numbers.setdefault(info.split, first_number(root, part))
            numbers[info.split] += 1
            target = shard_path(root, part, number)
            make_directory(target.parent)
            if _link(each.store.root / info.path, target):
                moved.linked += 1
            else:
                for written in _copy(each.store.root / info.path, target, info):
                    if progress is not None:
                        progress(done + written, total)
                moved.copied += 1
            made.append(target)
            done += info.bytes
            moved.shards.append(structs.replace(info, path=target.relative_to(root).as_posix()))
            if progress is not None:
                progress(done, total)
    for split in numbers:
        sync_directory(root / "data" / split)
    return moved


def _link(source: Path, target: Path) -> bool:
    """A hard link, where the file system has such."""
    try:
        os.link(source.resolve(), target)
    except NotImplementedError:
        return False
    except FileExistsError:
        raise DatasetExistsError(f"{target} is there: another writer is at work; wait for it") from None
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    return True


def _copy(source: Path, target: Path, info: ShardInfo) -> Iterator[int]:
    """Make a copy, synced, that gets its name when its sha256 was found right; bytes so far, as it goes."""
    file = DurableFile(target)
    try:
        with file, source.open("rb") as given:
            while block := given.read(_BLOCK):
                file.write(block)
                if file.sync_is_due:
                    file.sync()
                yield file.size
            _check_sha256(source, file.sha256, info)
            file.publish()
    except BaseException:
        file.temporary.unlink(missing_ok=True)
        raise


def _check_sha256(path: Path, found: str, info: ShardInfo) -> None:
    if found != info.sha256:
        raise CorruptDataError(
            "the file's sha256 is not that of the manifest: its bytes were changed; fetch or copy it again",
            code="shard-sha256",
            path=str(path),
        )


def _joined_tokenizer(root: Path, inputs: Sequence[_Dataset], old: Manifest | None) -> TokenizerInfo | None:
    """The tokenizer of all, which agree on its identity; its files in their place."""
    infos = [
        stage_tokenizer_of(each.store, each.manifest.tokenizer, root)
        for each in inputs
        if each.manifest.tokenizer is not None
    ]
    known = list(dict.fromkeys(infos))
    if not known:
        return None
    with_files = [info for info in known if info.files] or known
    info = with_files[0]
    if info.digest is None and len(with_files) > 1:
        info = merge_partial(root, with_files)
    return place_tokenizer(root, info, staged(root, info), old)


def _totals(each: _Dataset) -> Totals:
    """Totals of the shards that are taken."""
    if each.shards == each.manifest.shards:
        return each.manifest.totals
    size = sum(info.bytes for info in each.shards)
    summary = tally(open_shard(each.store, info, each.manifest) for info in each.shards)
    return summary.totals(len(each.shards), size)


def _grouped(shards: Sequence[ShardInfo]) -> tuple[ShardInfo, ...]:
    """The shards of each split together, in their order."""
    splits: dict[str, list[ShardInfo]] = {}
    for shard in shards:
        splits.setdefault(shard.split, []).append(shard)
    return tuple(shard for some in splits.values() for shard in some)
