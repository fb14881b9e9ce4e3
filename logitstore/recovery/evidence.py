"""What a directory says of its dataset: by its manifest, or by journals, or by its files alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.dataset.agree import Described
from logitstore.dataset.commit import part_files, shard_files
from logitstore.dataset.parts import part_directory, part_names
from logitstore.dataset.tokenizer_files import describe_tokenizer, staged
from logitstore.errors import CorruptDataError, DatasetNotFoundError, LogitStoreError
from logitstore.io import read_limited
from logitstore.limits import MANIFEST_BYTES
from logitstore.recovery.journals import JournalShard, PartJournal, read_journal
from logitstore.recovery.result import Lost
from logitstore.schema import Manifest, Sampling, ShardInfo, Source, Teacher, TokenizerInfo, parse_manifest
from logitstore.schema.journal import PARTS_DIRECTORY, Plan
from logitstore.schema.manifest import MANIFEST_NAME, TOKENIZER_DIRECTORY, SplitName
from logitstore.shard.layout import INDEX_DTYPE
from logitstore.tokenizer import Tokenizer


def _no_entries() -> NDArray[Any]:
    return np.empty(0, INDEX_DTYPE)


@dataclass(frozen=True, slots=True, eq=False)
class File:
    """A file that may hold sequences.

    Attributes:
        path: in the directory, as it is there.
        split: its split.
        info: what the manifest or a journal says of it as a whole; None where it was not complete.
        schema: its schema message, where a journal has it; else empty.
        entries: its chunks, where a journal has them, `INDEX_DTYPE`.
        digests: further digests of chunks that may be in it.
        complete: whether it should end with an index.
    """

    path: str
    split: str
    info: ShardInfo | None = None
    schema: bytes = b""
    entries: NDArray[Any] = field(default_factory=_no_entries)
    digests: frozenset[bytes] = frozenset()
    complete: bool = True


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer.

    Attributes:
        info: its identity; without files where nothing has described them yet.
        folder: where its files are; None where they are damaged or missing.
    """

    info: TokenizerInfo
    folder: Path | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a directory says of its dataset.

    Attributes:
        root: the directory.
        manifest: where it is undamaged.
        files: those with sequences, in the order of the rows.
        described: what each part says of itself, as far as that is known: by the manifest, or by plans.
        tokenizers: of the parts.
        splits: names of the splits.
        lost: what is known to be lost before a file was looked at.
        notes: what people should know.
        moved: directories and files of writers, which a dataset that is complete does not need.
    """

    root: Path
    manifest: Manifest | None
    files: tuple[File, ...]
    described: tuple[Described, ...] = ()
    tokenizers: tuple[TokenizerFiles, ...] = ()
    splits: tuple[str, ...] = ()
    lost: tuple[Lost, ...] = ()
    notes: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()


def find_evidence(root: Path) -> Evidence:
    """Look at what is there, without opening a shard.

    Raises:
        DatasetNotFoundError: nothing of a dataset is there.
        UnsupportedVersionError: a later release wrote it.
    """
    damaged = False
    if (root / MANIFEST_NAME).is_file():
        try:
            return _of_manifest(root, parse_manifest(read_limited(root / MANIFEST_NAME, MANIFEST_BYTES)))
        except CorruptDataError:
            damaged = True
    parts = part_names(root)
    if not parts and not shard_files(root):
        raise DatasetNotFoundError(f"{root}: there are no shards and no parts of a dataset to be recovered")
    journals = [read_journal(root, part) for part in parts]
    found = _of_journals(root, journals)
    if not damaged:
        return found
    return _with_damaged_manifest(root, found)


def _of_manifest(root: Path, manifest: Manifest) -> Evidence:
    files = tuple(File(info.path, info.split, info) for info in manifest.shards)
    tokenizers: tuple[TokenizerFiles, ...] = ()
    if manifest.tokenizer is not None:
        tokenizers = (_checked(manifest.tokenizer, root / manifest.tokenizer.folder),)
    notes, moved = [], []
    for part in part_names(root):
        journal = read_journal(root, part)
        there = {info.path: info for info in manifest.shards}
        if journal.done and journal.shards and all(there.get(each.path) == each.info for each in journal.shards):
            moved.append(part_directory(root, part).relative_to(root).as_posix())
        elif journal.plan is not None:
            notes.append(f"{part}, which was begun to replace the dataset, is left as it is")
    return Evidence(
        root,
        manifest,
        files,
        (Described.of(MANIFEST_NAME, manifest),),
        tokenizers,
        tuple(manifest.splits),
        notes=tuple(notes),
        moved=tuple(moved),
    )


def _of_journals(root: Path, journals: list[PartJournal]) -> Evidence:
    """Files in the order of splits, parts and shards; then those that no journal names."""
    named: set[str] = set()
    by_split: dict[str, list[File]] = {journal.part.split: [] for journal in journals}
    lost: list[Lost] = []
    notes: list[str] = []
    for journal in journals:
        files, missing = _of_part(root, journal)
        known = {each.path for each in journal.shards}
        named |= {name for path in known for name in (path, f"{path}.partial")}
        by_split[journal.part.split] += files
        lost += missing
        notes += _journal_notes(journal)
    replaced = any(journal.plan is not None and journal.plan.overwrite for journal in journals)
    others = [path for path in _in_order(root) if path not in named]
    if others and replaced:
        notes.append(
            f"files that no journal names were left out: {len(others)}, the first {others[0]}; they may be of the "
            f"dataset that was to be replaced"
        )
        others = []
    for path in others:
        split = path.split("/")[1]
        if not _is_split(split):
            lost.append(Lost(path, f"{split!r} is no name of a split"))
            continue
        stray = frozenset(each for journal in journals if journal.part.split == split for each in journal.stray)
        by_split.setdefault(split, []).append(
            File(path, split, digests=stray, complete=not path.endswith(".partial"))
        )  # fmt: skip
    if others and any(journal.plan is not None for journal in journals):
        notes.append(f"files that no journal names were taken too: {len(others)}, the first {others[0]}")
    tokenizers = [
        _checked(journal.tokenizer, staged(root, journal.tokenizer))
        for journal in journals
        if journal.tokenizer is not None
    ]
    directory = root / TOKENIZER_DIRECTORY
    if not tokenizers and directory.is_dir():
        tokenizers = _of_folder(directory, notes)
    elif not tokenizers and not any(journal.plan is not None for journal in journals):
        for folder in sorted((root / PARTS_DIRECTORY).glob("tokenizer-*")):
            tokenizers += _of_folder(folder, notes)
    moved = [part_directory(root, journal.part) for journal in journals] + sorted(
        (root / PARTS_DIRECTORY).glob("tokenizer-*")
    )
    return Evidence(
        root,
        None,
        tuple(file for split in sorted(by_split) for file in by_split[split]),
        tuple(_described(journal.plan, journal) for journal in journals if journal.plan is not None),
        tuple(dict.fromkeys(tokenizers)),
        tuple(sorted(by_split)),
        tuple(lost),
        tuple(notes),
        tuple(path.relative_to(root).as_posix() for path in moved),
    )


def _of_part(root: Path, journal: PartJournal) -> tuple[list[File], list[Lost]]:
    files: list[File] = []
    lost: list[Lost] = []
    split, stray = journal.part.split, frozenset(journal.stray)
    for shard in journal.shards:
        there = [path for path in (shard.path, f"{shard.path}.partial") if (root / path).exists()]
        if not there:
            lost.append(_absent(shard))
        files += [
            File(path, split, shard.info, shard.schema, shard.entries, stray, complete=shard.info is not None)
            for path in there
        ]
    known = {file.path for file in files} | {shard.path for shard in journal.shards}
    if journal.damaged or journal.plan is None:
        # The line that says that a shard was begun may be among those that are damaged.
        paths = {path.relative_to(root).as_posix(): path for path in part_files(root, journal.part)}
        for name in sorted(set(paths) - known, key=_key):
            files.append(File(name, split, digests=stray, complete=not name.endswith(".partial")))
        files.sort(key=lambda file: _key(file.path))
    return files, lost


def _absent(shard: JournalShard) -> Lost:
    counts = [shard.info.sequences] if shard.info is not None else shard.entries["sequences"].tolist()
    where = "the file is missing"
    if shard.place is not None:
        where = f"it is at {shard.place} and no longer here: fetch it from there and recover again"
    return Lost(shard.path, where, sum(counts) if counts else None, row=0 if counts else None)


def _journal_notes(journal: PartJournal) -> list[str]:
    part = journal.part
    if journal.plan is None:
        return [f"{part} has no journal that says what its writer was told; files are taken by their names"]
    notes = [f"the journal of {part} is damaged; what its other lines say was taken"] if journal.damaged else []
    if not journal.done:
        notes.append(
            f"{part} was not finished; sequences that its writer had not yet written to the file are not in it"
        )
    return notes


def _in_order(root: Path) -> list[str]:
    """The files with shards' names; one that is not complete after the one that is."""
    return sorted((path.relative_to(root).as_posix() for path in shard_files(root)), key=_key)


def _key(path: str) -> tuple[str, bool]:
    return path.removesuffix(".partial"), path.endswith(".partial")


def _is_split(name: str) -> bool:
    try:
        msgspec.convert(name, SplitName)
    except msgspec.ValidationError:
        return False
    return True


def _described(plan: Plan, journal: PartJournal) -> Described:
    return Described(
        str(plan.part), plan.normalised, plan.temperature, plan.logit_width, plan.sampling, plan.teacher,
        journal.tokenizer, None, {}, plan.source, plan.lineage,
    )  # fmt: skip


def _checked(info: TokenizerInfo, folder: Path) -> TokenizerFiles:
    """A tokenizer; its files are lost where one of them is not what it should be."""
    for file in info.files:
        path = folder / file.path.rpartition("/")[2]
        try:
            if hashlib.sha256(read_limited(path, file.bytes)).hexdigest() != file.sha256:
                return TokenizerFiles(info, None)
        except (LogitStoreError, OSError):
            return TokenizerFiles(info, None)
    return TokenizerFiles(info, folder)


def _of_folder(folder: Path, notes: list[str]) -> list[TokenizerFiles]:
    """The tokenizer whose files are in a folder, or in the only one below it."""
    below = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    for place in (folder, *below):
        try:
            return [TokenizerFiles(describe_tokenizer(Tokenizer.from_path(place), ()), place)]
        except (LogitStoreError, OSError):
            continue
    notes.append(f"the files in {folder.name}/ are no tokenizer that can be read; say it with --tokenizer")
    return []


class _Words(msgspec.Struct):
    """What is taken of a damaged manifest: words, in which a flipped bit shows, and no numbers."""

    teacher: Teacher | None = None
    source: Source | None = None
    lineage: tuple[Source, ...] = ()


def _with_damaged_manifest(root: Path, found: Evidence) -> Evidence:
    """Take teacher and source of a manifest that was damaged or edited, where nobody else says them."""
    notes = [*found.notes, f"{MANIFEST_NAME} is damaged, and was taken for lost"]
    try:
        data = read_limited(root / MANIFEST_NAME, MANIFEST_BYTES)
        words = msgspec.json.decode(data, type=_Words)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LogitStoreError, OSError):
        return replace(found, notes=tuple(notes))
    if found.described or (words.teacher is None and words.source is None):
        return replace(found, notes=tuple(notes))
    name = "unknown" if words.teacher is None else repr(words.teacher.name)
    notes[-1] = (
        f"{MANIFEST_NAME} is damaged or was edited; only what it says of the teacher ({name}) and the source was taken "
        f"from it: check that"
    )
    nothing = Described(
        MANIFEST_NAME, "vocabulary", 1.0, None, Sampling(values="auto", resolution=1.0), words.teacher,
        None, None, {}, words.source, words.lineage,
    )  # fmt: skip
    return replace(found, described=(nothing,), notes=tuple(notes))


def read_tokenizer(path: str | Path) -> TokenizerFiles:
    """A tokenizer that was named.

    Raises:
        SourceNotFoundError: there is none.
        InvalidInputError: it cannot be read.
    """
    tokenizer = Tokenizer.from_path(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return TokenizerFiles(describe_tokenizer(tokenizer, ()), folder)
