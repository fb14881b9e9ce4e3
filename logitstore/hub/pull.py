"""Fetching a dataset from the Hub: verified, resumed where a killed process was, complete or not there at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

import msgspec

from logitstore.checks import is_valid, validate
from logitstore.dataset.shards import open_shard, read_manifest
from logitstore.dataset.summary import tally
from logitstore.errors import (
    CorruptDataError,
    DatasetExistsError,
    DatasetNotFoundError,
    IncompleteDatasetError,
    InvalidInputError,
    LogitStoreError,
    SourceNotFoundError,
)
from logitstore.hub.parts import BUFFER, Parts, Wanted, fetch_all
from logitstore.io import LocalStore, MappedFile, sync_directory, write_atomic
from logitstore.io.hub import HubStore
from logitstore.limits import MANIFEST_BYTES
from logitstore.schema import (
    Manifest,
    ShardInfo,
    Source,
    Split,
    Totals,
    dataset_digest,
    parse_manifest,
    serialise_manifest,
)
from logitstore.schema.manifest import MANIFEST_NAME, sum_splits

WORK_DIRECTORY: Final = ".pull"
CARD_NAME: Final = "README.md"
_CARD_BYTES: Final = 2**22
_LOCK: Final = "lock"
_RANGE: Final = re.compile(r"([0-9]{1,9})(?: *- *([0-9]{1,9}))?")
_SHARDS: Final = "data/*/*.arrow*"

Progress = Callable[[int, int], None]
"""Told bytes that are there, and bytes in all."""


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Attributes:
        path: directory of the dataset.
        commit: the revision, resolved.
        shards: number of shards.
        bytes: size of the files of the dataset.
        fetched: bytes that came over the network for them.
        unchanged: whether all of it was there before.
    """

    path: Path
    commit: str
    shards: int
    bytes: int
    fetched: int
    unchanged: bool


def pull(
    repo: str,
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    shards: str | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch a dataset from the Hub into a directory.

    The revision is resolved once. Every file is verified against the manifest before it gets its name, and the manifest
    comes last. A pull that was stopped, in whatever way, goes on where it was when it is called again. Of a dataset
    that is there already, files are checked, and those missing or damaged are fetched.

    Args:
        repo: `ns/name`, `ns/name@revision`, or `hf://datasets/ns/name@revision`.
        path: directory of the dataset to be.
        split: this split alone.
        shards: some shards of it alone, by their numbers in the manifest: `0-9`, `0,2,5-7`. A part of a dataset is a
            dataset with a manifest of its own, which says what it is a part of.
        overwrite: replace another dataset that is there, once the new one is complete.
        token: of the Hub; None for that of `hf auth login` or `HF_TOKEN`.
        endpoint: of the Hub; None for `HF_ENDPOINT` or huggingface.co.
        progress: told of the bytes that are there, and of those in all.

    Raises:
        InvalidInputError: no such split or shard.
        DatasetNotFoundError: there is no such repository, revision, or no dataset in it.
        DatasetExistsError: something else is there, or another pull is at work.
        CorruptDataError: what the Hub stores is damaged.
        RemoteError: it cannot be reached, or breaks off again and again.
        RemoteAccessError: another token is needed.
    """
    store = HubStore.of(repo, token=token, endpoint=endpoint)
    whole = read_manifest(store)
    chosen = choose(whole, split, shards)
    root = Path(path)
    _check_target(root, chosen, whole, overwrite=overwrite)
    work = root / WORK_DIRECTORY
    with _alone(root, work):
        _check_target(root, chosen, whole, overwrite=overwrite)  # again: another pull may have ended meanwhile
        fetching = _Fetching(root, work, store, progress)
        paths = {info.path for info in chosen}
        named = [file for file in whole.files if not isinstance(file, ShardInfo) or file.path in paths]
        files = [Wanted(file.path, file.bytes, file.sha256) for file in named]
        missing = fetching.missing(files)
        fetching.run(missing)
        fresh = {file.path for file in missing}
        data = _manifest_bytes(
            store, whole, chosen, split, lambda info: work / info.sha256 if info.path in fresh else root / info.path
        )
        unchanged = not missing and _same(root / MANIFEST_NAME, data)
        old = _old(root, overwrite=overwrite)
        if overwrite or not (root / CARD_NAME).exists():
            _write_card(store, root, work)
        if not unchanged:
            _place(root, work, files, missing, data)
        _validated(root, placed=not unchanged)
        for name in old - {file.path for file in files}:
            with contextlib.suppress(OSError):  # a file that stays is unreferenced; `validate` names it
                (root / name).unlink()
        _clear(work)
    size = sum(file.size for file in files)
    return Pulled(root, store.commit, len(chosen), size, fetching.fetched, unchanged)


def choose(manifest: Manifest, split: str | None, shards: str | None) -> tuple[ShardInfo, ...]:
    """Some of the shards of a manifest.

    Args:
        manifest: of the whole.
        split: name of a split; None for all.
        shards: numbers among the shards of the split, from 0; None for all.

    Raises:
        InvalidInputError: there is no such split or shard.
    """
    if split is not None and split not in manifest.splits:
        raise InvalidInputError(f"no split is called {split!r}; there are: {', '.join(manifest.splits)}")
    infos = [info for info in manifest.shards if split in (None, info.split)]
    if shards is None:
        return tuple(infos)
    numbers: set[int] = set()
    for part in shards.split(","):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found is not None else (1, 0)
        if first > last:
            raise InvalidInputError(f"{shards!r} are no shards; write numbers and ranges as 0-9 or 0,2,5-7")
        if last >= len(infos):
            numbered = f"; they are numbered from 0 to {len(infos) - 1}" if infos else ""
            raise InvalidInputError(f"there is no shard {last} among {len(infos)}{numbered}")
        numbers.update(range(first, last + 1))
    return tuple(infos[number] for number in sorted(numbers))


def _check_target(root: Path, chosen: tuple[ShardInfo, ...], whole: Manifest, *, overwrite: bool) -> None:
    """Refuse a directory whose data would be lost."""
    if root.exists() and not root.is_dir():
        raise DatasetExistsError(f"{root} is a file; a dataset is a directory")
    if overwrite:
        return
    try:
        there = read_manifest(LocalStore(root))
    except (DatasetNotFoundError, IncompleteDatasetError, CorruptDataError):
        there = None
    expected = dataset_digest(chosen, whole.tokenizer)
    if there is not None and there.dataset_digest != expected:
        raise DatasetExistsError(f"{root} holds another dataset; choose another path, or overwrite it (--overwrite)")
    tokenizer = whole.tokenizer.files if whole.tokenizer is not None else ()
    sizes = {file.path: file.bytes for file in tokenizer} | {info.path: info.bytes for info in chosen}
    present = [*root.glob(_SHARDS), *(path for file in tokenizer if (path := root / file.path).exists())]
    for path in sorted(present) if there is None else ():
        name = path.relative_to(root).as_posix()
        if sizes.get(name) != path.stat().st_size:
            raise DatasetExistsError(
                f"{root} holds files of another dataset ({name}); choose another path, or overwrite it (--overwrite)"
            )


@contextlib.contextmanager
def _alone(root: Path, work: Path) -> Iterator[None]:
    """Make the working directory, and keep other pulls out of it."""
    if os.name == "nt":
        work.mkdir(parents=True, exist_ok=True)
        yield
        return
    import fcntl  # noqa: PLC0415 - not on Windows

    while True:
        work.mkdir(parents=True, exist_ok=True)
        path = work / _LOCK
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
            lock = stack.enter_context(path.open("wb"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DatasetExistsError(f"another pull is at work in {root}; wait for it") from None
            except OSError:  # some network file systems have no locks
                pass
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):  # else another pull has just removed it
                held = stack.pop_all()
                break
    with held:
        yield


def _clear(work: Path) -> None:
    """Remove the working directory, the lock last: whoever locks a new one finds nothing that is being removed."""
    with contextlib.suppress(OSError):
        for path in sorted(work.iterdir(), key=lambda path: path.name == _LOCK):
            path.unlink()
        work.rmdir()


class _Fetching:
    """Fetches the files that are missing, and counts."""

    def __init__(self, root: Path, work: Path, store: HubStore, progress: Progress | None) -> None:
        self.root = root
        self.work = work
        self.store = store
        self.progress = progress
        self.fetched = 0
        self._there = 0
        self._total = 0
        self._counting = threading.Lock()

    def missing(self, files: list[Wanted]) -> list[Wanted]:
        """Files that are not there, or not as they should be."""
        self._total = sum(file.size for file in files)
        missing = []
        for file in files:
            if file.is_at(self.root / file.path):
                self._got(file.size)
            else:
                missing.append(file)
        return missing

    def run(self, files: list[Wanted]) -> None:
        """Fetch files into the working directory."""
        parts = {file.sha256: Parts(self.work, file) for file in files}  # equal ones once
        left = [each for each in parts.values() if not each.is_whole]
        self._got(sum(file.size for file in files) - sum(each.file.size for each in left))
        room = shutil.disk_usage(self.work).free
        needed = sum(each.file.size - each.there for each in left)
        if needed > room:
            raise InvalidInputError(f"{self.root}: {needed:,} bytes are to be fetched, and there is room for {room:,}")
        fetch_all(left, self._fetch, self.store.where, self._got)

    def _fetch(self, path: str, offset: int, length: int, sink: Any, wanted: Any) -> None:
        def take(part: bytes) -> None:
            sink(part)
            with self._counting:
                self.fetched += len(part)

        try:
            self.store.fetch(path, offset, length, take, wanted=wanted, buffer=BUFFER)
        except SourceNotFoundError:
            raise CorruptDataError(
                "its manifest names this file, but it is not there: its publisher's push may be under way, or failed",
                code="shard-missing",
                path=self.store.where(path),
            ) from None

    def _got(self, number: int) -> None:
        with self._counting:
            self._there += number
            if self.progress is not None:
                self.progress(self._there, self._total)


def _manifest_bytes(
    store: HubStore,
    whole: Manifest,
    chosen: tuple[ShardInfo, ...],
    split: str | None,
    find: Callable[[ShardInfo], Path],
) -> bytes:
    """The manifest as it is at its source; of a part, one of its own."""
    if chosen == whole.shards:
        data = store.small(MANIFEST_NAME, MANIFEST_BYTES)
        if parse_manifest(data) != whole:
            raise CorruptDataError("it came damaged", code="manifest", path=store.where(MANIFEST_NAME))
        return data
    files = _Elsewhere(Path(), find)
    summary = tally(open_shard(files, info, whole) for info in chosen)
    own = Source(format="logitstore", name=replace(store.place, revision=None).url(), revision=store.commit)
    part = msgspec.structs.replace(
        whole,
        source=own,
        lineage=(*((whole.source,) if whole.source is not None else ()), *whole.lineage),
        splits=sum_splits(chosen) or {name: Split() for name in whole.splits if name == split},
        totals=Totals(
            shards=len(chosen),
            sequences=summary.sequences,
            positions=summary.positions,
            candidates=summary.candidates,
            bytes=summary.bytes,
            highest_id=summary.highest_id if summary.highest_id >= 0 else None,
            encodings=summary.encodings,
            columns=summary.columns,
        ),
        dataset_digest=dataset_digest(chosen, whole.tokenizer),
        shards=chosen,
    )
    return serialise_manifest(part)


@dataclass(frozen=True)
class _Elsewhere(LocalStore):
    """Shards that do not have their own paths yet."""

    find: Callable[[ShardInfo], Path]

    def shard(self, info: ShardInfo) -> MappedFile:
        """A shard, mapped."""
        return MappedFile(self.find(info))


def _same(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _place(root: Path, work: Path, files: list[Wanted], missing: list[Wanted], manifest: bytes) -> None:
    """Give what was fetched its names, and then the manifest: from here on the dataset exists."""
    there = root / MANIFEST_NAME
    if not _same(there, manifest) and any((root / file.path).exists() for file in missing):
        there.unlink(missing_ok=True)  # a dataset whose files are being replaced is not whole until the new manifest
        sync_directory(root)
    left = Counter(file.sha256 for file in missing)
    for file in missing:
        left[file.sha256] -= 1
        source, target = work / file.sha256, root / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        (_copied(source, work / "copy") if left[file.sha256] else source).replace(target)
    for directory in sorted({root / parent for file in files for parent in PurePosixPath(file.path).parents}):
        sync_directory(directory)
    _put(root, work, MANIFEST_NAME, manifest)


def _copied(source: Path, target: Path) -> Path:
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    return target


def _put(root: Path, work: Path, name: str, data: bytes) -> None:
    """Create or replace a file of the dataset; a killed process leaves what it began in the working directory."""
    write_atomic(work / name, data)
    (work / name).replace(root / name)
    sync_directory(root)


def _old(root: Path, *, overwrite: bool) -> set[str]:
    """Files of a dataset that is there, as its manifest says; to be overwritten, all that look like one's."""
    found = [*root.glob(_SHARDS), *root.glob("tokenizer/*")] if overwrite else []
    names = {path.relative_to(root).as_posix() for path in found}
    with contextlib.suppress(LogitStoreError):
        names |= {file.path for file in read_manifest(LocalStore(root)).files}
    return names


def _validated(root: Path, *, placed: bool) -> None:
    """Check the dataset; one that was placed and is not valid shall not look as if it were.

    Raises:
        CorruptDataError: it is not valid.
    """
    findings = [finding for finding in validate(root) if finding.severity == "error"]
    if is_valid(findings):
        return
    if placed:
        (root / MANIFEST_NAME).unlink(missing_ok=True)
    raise CorruptDataError(
        f"what was fetched is not valid: {findings[0].message}", code=findings[0].code, path=str(root)
    )


def _write_card(store: HubStore, root: Path, work: Path) -> None:
    with contextlib.suppress(SourceNotFoundError):
        _put(root, work, CARD_NAME, store.small(CARD_NAME, _CARD_BYTES))
