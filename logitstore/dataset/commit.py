"""Making a dataset of the parts that writers have finished: one manifest, and then nothing else is left."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from logitstore._version import __version__
from logitstore.dataset.agree import Agreed, Described, agree
from logitstore.dataset.ids import repeated
from logitstore.dataset.parts import LOCK_NAME, State, is_begun, part_directory, part_names, read_part, shard_hashes
from logitstore.dataset.shards import open_shard, read_manifest
from logitstore.dataset.summary import Summary, add_totals
from logitstore.dataset.tokenizer_files import merge_partial, place_tokenizer, staged
from logitstore.errors import (
    DatasetExistsError,
    DatasetNotFoundError,
    IncompleteDatasetError,
    InvalidInputError,
)
from logitstore.io import LocalStore, MappedFile, write_atomic
from logitstore.io.lock import FileLock
from logitstore.io.store import local_path
from logitstore.schema import (
    FORMAT_VERSION,
    Manifest,
    ShardInfo,
    Split,
    TokenizerInfo,
    Totals,
    dataset_digest,
    parse_manifest,
    serialise_manifest,
)
from logitstore.schema.journal import PARTS_DIRECTORY, Part
from logitstore.schema.manifest import MANIFEST_NAME, TOKENIZER_DIRECTORY, sum_splits
from logitstore.shard.reader import Shard

DATA_DIRECTORY: Final = "data"
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})\.arrow(\.partial)?")
_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit did.

    Attributes:
        manifest: of the dataset.
        notes: what the parts do not agree on, so that the dataset does not say it.
        unchanged: whether the dataset was committed before.
    """

    manifest: Manifest
    notes: tuple[str, ...] = ()
    unchanged: bool = False


def commit(path: str | os.PathLike[str], *, overwrite: bool = False) -> Committed:
    """Join the finished parts in a directory into one dataset.

    Rows are in the order of splits' names, parts, and shards. Committing again does nothing.

    Args:
        path: directory of the dataset.
        overwrite: replace a dataset that is there.

    Raises:
        DatasetNotFoundError: nothing was begun there.
        IncompleteDatasetError: parts are missing or not finished; the message names them.
        DatasetExistsError: a dataset is there and `overwrite` is False, or a part is still being written.
        InvalidInputError: two parts have a sequence of one id, or differ in what one dataset has once.
        CorruptDataError: a shard is missing or damaged.
    """
    root = local_path(path, "commit in the directory, and publish it with `logitstore push`")
    parts = part_names(root)
    with contextlib.ExitStack() as stack:
        for part in parts:
            busy = f"{root}: {part} is still being written; commit when it is finished (`logitstore status`)"
            with contextlib.suppress(FileNotFoundError):  # another commit was faster
                stack.enter_context(FileLock(part_directory(root, part) / LOCK_NAME, busy))
        old = existing_manifest(root)
        states = [state for part in parts if (state := read_part(root, part)) is not None]
        if not states and old is not None:
            return Committed(old, unchanged=True)
        if not states:
            raise DatasetNotFoundError(f"{root}: no part was begun here")
        if old is not None and all(is_published(state, old) for state in states):
            clean(root, old, states)
            return Committed(old, unchanged=True)
        if old is not None and not overwrite and not all(state.plan.overwrite for state in states):
            raise DatasetExistsError(f"{root} holds a dataset; replace it with --overwrite (overwrite=True)")
        if unfinished := describe_unfinished(parts, states):
            raise IncompleteDatasetError(
                f"{root}: not all parts are finished ({len(unfinished)} are not): {'; '.join(unfinished[:_SHOWN])}"
                f"{'; ...' if len(unfinished) > _SHOWN else ''}. Finish them (--resume), or save what is there with "
                f"`logitstore recover`"
            )
        check_ids(root, states)
        return publish(root, states, old)


def describe_unfinished(parts: Sequence[Part], states: Sequence[State]) -> list[str]:
    """What keeps the parts of a directory from being committed, a line for each part."""
    done = {state.part for state in states if state.done is not None}
    begun = {state.part for state in states}
    found = []
    for split in dict.fromkeys(part.split for part in parts):
        for of in dict.fromkeys(part.of for part in parts if part.split == split):
            for number in range(of):
                part = Part(split=split, number=number, of=of)
                if part not in done:
                    found.append(f"{part} was {'stopped' if part in begun else 'never begun'}")
    return found


def publish(root: Path, states: Sequence[State], old: Manifest | None) -> Committed:
    """Write the tokenizer's files and then the manifest: from here on the dataset exists. The parts are removed.

    Args:
        root: directory of the dataset.
        states: of the parts, all finished, in the order of the rows.
        old: manifest of the dataset that is replaced.
    """
    agreed = agree([_described(state) for state in states])
    tokenizer = _tokenizer(root, [state.tokenizer for state in states])
    if tokenizer is not None:
        tokenizer = place_tokenizer(root, tokenizer, staged(root, tokenizer), old)
    shards = tuple(shard for state in states for shard in state.shards)
    totals = add_totals(Summary.of(state.sums).totals(len(state.shards), state.bytes) for state in states)
    splits = dict.fromkeys(state.part.split for state in states)
    manifest = make_manifest(agreed, shards, totals, tokenizer, splits)
    sent = {path for state in states for path in state.sent}
    for shard in shards:
        if shard.path not in sent:
            open_shard(LocalStore(root), shard, manifest)
    data = serialise_manifest(manifest)
    parse_manifest(data)  # what contradicts itself is found before anything is removed
    if existing_manifest(root) != old:
        raise DatasetExistsError(f"{root} was changed meanwhile, by another writer; nothing was committed, try again")
    write_atomic(root / MANIFEST_NAME, data)
    clean(root, manifest, states)
    return Committed(manifest, agreed.notes)


def make_manifest(
    agreed: Agreed,
    shards: tuple[ShardInfo, ...],
    totals: Totals,
    tokenizer: TokenizerInfo | None,
    splits: Iterable[str],
) -> Manifest:
    """The manifest of a dataset.

    Args:
        agreed: what it says of itself.
        shards: in the order of the rows, those of a split together.
        totals: of them.
        tokenizer: its files in their place.
        splits: names of the splits, also of those without shards.
    """
    sums = sum_splits(shards)
    return Manifest(
        version=str(FORMAT_VERSION),
        written_by=f"logitstore {__version__}",
        teacher=agreed.teacher,
        tokenizer=tokenizer,
        logit_width=agreed.first.logit_width,
        normalised=agreed.first.normalised,
        temperature=agreed.first.temperature,
        sampling=agreed.sampling,
        user_columns=agreed.user_columns,
        source=agreed.source,
        lineage=agreed.lineage,
        splits={name: sums.get(name, Split()) for name in dict.fromkeys([*sums, *splits])},
        totals=totals,
        dataset_digest=dataset_digest(shards, tokenizer),
        shards=shards,
    )


def existing_manifest(root: Path) -> Manifest | None:
    """The manifest of a directory; None where there is none.

    Raises:
        CorruptDataError: it is damaged.
        UnsupportedVersionError: this release cannot read it.
    """
    if not (root / MANIFEST_NAME).exists():
        return None
    return read_manifest(LocalStore(root))


def is_published(state: State, manifest: Manifest) -> bool:
    """Whether a part is in a manifest: its writer was stopped between the manifest and the removal of its journal."""
    if state.done is None or (state.plan.overwrite and not state.shards):
        return False
    there = {shard.path: shard for shard in manifest.shards}
    return all(there.get(shard.path) == shard for shard in state.shards)


def clean(root: Path, manifest: Manifest, states: Sequence[State]) -> None:
    """Remove what a dataset does not need when it is committed: journals, and what it replaced.

    What stays because it cannot be removed is named by `validate`.
    """
    everything = any(state.plan.overwrite for state in states)
    _clean_files(root, manifest, states, everything=everything)
    mine = [part_directory(root, state.part) for state in states]
    for directory in (root / PARTS_DIRECTORY).glob("*-of-*"):
        part = Part.of_directory(directory.name)
        if directory in mine or part is None or not is_begun(root, part):
            shutil.rmtree(directory, ignore_errors=True)
    if not part_names(root):
        for directory in (root / PARTS_DIRECTORY).glob("tokenizer-*"):
            shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        (root / PARTS_DIRECTORY).rmdir()


def _clean_files(root: Path, manifest: Manifest, states: Sequence[State], *, everything: bool) -> None:
    mine = {state.part for state in states}
    ours = {path for part in mine for path in part_files(root, part)}
    others = {path for part in part_names(root) if part not in mine for path in part_files(root, part)}
    old = [path for path in shard_files(root) if (everything and path not in others) or path in ours]
    tokenizer = sorted((root / TOKENIZER_DIRECTORY).rglob("*"), reverse=True) if everything else []
    remove_unnamed(root, manifest, [*old, *tokenizer, *root.glob(f".{MANIFEST_NAME}.*.partial")])


def remove_unnamed(root: Path, manifest: Manifest, paths: Iterable[Path]) -> None:
    """Remove those of some files that a manifest does not name, and empty directories.

    What stays because it cannot be removed is named by `validate`.
    """
    named = {file.path for file in manifest.files}
    for path in paths:
        if path.relative_to(root).as_posix() not in named:
            with contextlib.suppress(OSError):
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()


def check_ids(root: Path, states: Sequence[State]) -> None:
    """Refuse two sequences of one id.

    Raises:
        InvalidInputError: naming the id and both parts.
        CorruptDataError: a shard is damaged.
    """
    shards = [(state, info) for state in states for info in state.shards]
    hashes = [shard_hashes(root, state, info) for state, info in shards]
    for group in repeated(hashes):
        seen: dict[str, int] = {}
        for number, row in group:
            state, info = shards[number]
            sequence_id = f"row {row} of {info.path}" if info.path in state.sent else id_at(root / info.path, row)
            if sequence_id in seen or info.path in state.sent:
                first = shards[seen.get(sequence_id, group[0][0])][0]
                raise InvalidInputError(
                    f"{first.part} and {state.part} both have a sequence of the id {sequence_id!r}; ids are unique in "
                    f"a dataset: give each part other sequences, and write one of them anew (overwrite=True)"
                )
            seen[sequence_id] = number


def id_at(path: Path, row: int) -> str:
    """The id of a sequence of a shard."""
    shard = Shard(MappedFile(path))
    chunk, place = shard.locate(row)
    return shard.chunk(chunk).ids()[place]


def shard_files(root: Path) -> list[Path]:
    """Every file under `data/` that has a shard's name, complete or not."""
    return sorted(path for path in root.glob(f"{DATA_DIRECTORY}/*/*") if _SHARD.fullmatch(path.name))


def part_files(root: Path, part: Part) -> dict[Path, int]:
    """The shards of a part, complete or not, and their numbers."""
    paths = (root / DATA_DIRECTORY / part.split).glob(f"{part.stem}-*")
    found = ((path, _SHARD.fullmatch(path.name)) for path in paths)
    return {path: int(match["number"]) for path, match in found if match is not None and match["stem"] == part.stem}


def first_number(root: Path, part: Part) -> int:
    """The number of a part's first shard: above those of all files that are there."""
    return 1 + max(part_files(root, part).values(), default=-1)


def shard_path(root: Path, part: Part, number: int) -> Path:
    """Path of a shard of a part."""
    return root / DATA_DIRECTORY / part.split / f"{part.stem}-{number:05d}.arrow"


def _described(state: State) -> Described:
    plan = state.plan
    return Described(
        str(state.part),
        plan.normalised,
        plan.temperature,
        state.logit_width,
        plan.sampling,
        plan.teacher,
        state.tokenizer,
        state.user_columns,
        state.sums.encodings,
        plan.source,
        plan.lineage,
    )


def _tokenizer(root: Path, infos: Sequence[TokenizerInfo | None]) -> TokenizerInfo | None:
    """The tokenizer of all parts, which agree on its identity."""
    known = list(dict.fromkeys(info for info in infos if info is not None))
    if not known:
        return None
    if known[0].digest is None and len(known) > 1:
        return merge_partial(root, known)
    return known[0]
