"""The recovered dataset, made beside what it is made of, and checked before it takes its place."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import pyarrow as pa

from logitstore.checks import Finding, is_valid, validate
from logitstore.dataset.agree import Agreed
from logitstore.dataset.commit import make_manifest
from logitstore.dataset.summary import tally
from logitstore.dataset.tokenizer_files import place_tokenizer, stage_tokenizer, staged
from logitstore.errors import CorruptDataError
from logitstore.io import DurableFile, MappedFile, make_directory, sync_directory, write_atomic
from logitstore.recovery.evidence import TokenizerFiles
from logitstore.recovery.examine import Examined, Piece
from logitstore.recovery.repeats import Dropped, kept_rows, piece_message, read_piece
from logitstore.schema import Manifest, ShardInfo, TokenizerInfo, Totals, serialise_manifest
from logitstore.schema.journal import PARTS_DIRECTORY
from logitstore.schema.manifest import MANIFEST_NAME
from logitstore.shard.reader import Shard
from logitstore.shard.salvage import parse_schema
from logitstore.shard.stored import stored_sequences
from logitstore.shard.writer import ShardWriter
from logitstore.tokenizer import Tokenizer

_BLOCK: Final = 2**20
_SHOWN: Final = 3

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is, in bytes."""


@dataclass(frozen=True, slots=True)
class Staged:
    """The shards of the recovered dataset.

    Attributes:
        shards: as its manifest names them.
        left: paths of those that are in the directory already, under that name.
        new: those that were written anew.
    """

    shards: tuple[ShardInfo, ...]
    left: frozenset[str]
    new: int


def stage_shards(
    root: Path,
    stage: Path,
    files: Sequence[Examined],
    dropped: Dropped,
    names: Callable[[str], str],
    *,
    in_place: bool,
    progress: Progress,
) -> Staged:
    """Put the shards of the recovered dataset where they are checked: links where a file is whole, else new files.

    Args:
        root: what is recovered.
        stage: directory in which the dataset is made.
        files: what there is of it, in the order of the rows.
        dropped: rows that are left out.
        names: gives the path of the next new shard of a split.
        in_place: whole shards keep their names.
        progress: told how far it is.
    """
    shards: list[ShardInfo] = []
    left: set[str] = set()
    new, done, total = 0, 0, sum(piece.length for each in files for piece in each.pieces)
    for number, examined in enumerate(files):
        size = sum(piece.length for piece in examined.pieces)
        rows = {at: dropped.get((number, at)) for at in range(len(examined.pieces))}
        if examined.whole is not None and not any(rows.values()):
            stays = in_place and examined.file.path == examined.whole.path
            path = examined.whole.path if stays else names(examined.file.split)
            make_directory((stage / path).parent)
            _link(root / examined.file.path, stage / path, may_point=stays)
            shards.append(msgspec.structs.replace(examined.whole, path=path))
            left |= {path} if stays else set()
        elif any(kept_rows(piece, rows[at]) for at, piece in enumerate(examined.pieces)):
            path = names(examined.file.split)
            make_directory((stage / path).parent)
            shards.append(_write(root, stage, path, examined, rows))
            new += 1
        done += size
        progress("writing", done, total)
    return Staged(tuple(shards), frozenset(left), new)


def _write(root: Path, stage: Path, path: str, examined: Examined, rows: dict[int, set[int] | None]) -> ShardInfo:
    """A new shard of the chunks that are left, as they are; without those of their rows that are left out."""
    schema, _ = parse_schema(examined.schema)
    with ShardWriter(stage / path, schema) as writer:
        for at, piece in enumerate(examined.pieces):
            _append(root, writer, examined, piece, rows[at])
            if writer.sync_is_due:
                writer.sync()
        written = writer.seal()
        writer.publish()
    return ShardInfo(
        path=path,
        split=examined.file.split,
        bytes=written.bytes,
        sha256=written.sha256,
        tail_digest=written.tail_digest,
        sequences=written.sequences,
        positions=written.positions,
        candidates=written.candidates,
    )


def _append(root: Path, writer: ShardWriter, examined: Examined, piece: Piece, dropped: set[int] | None) -> None:
    if not dropped:
        message = piece_message(root, examined, piece)
        writer.append(message, piece.positions, piece.candidates, piece.hashes.tolist())
    elif rows := kept_rows(piece, dropped):
        chunk = read_piece(root, examined, piece)
        sequences = list(stored_sequences(chunk, rows))
        user = [pa.concat_arrays([each.columns[name] for each in sequences]) for name in chunk.user_names]
        writer.write(sequences, user)


def _link(source: Path, target: Path, *, may_point: bool) -> None:
    """A hard link; a symbolic one or a copy where the file system has none.

    Args:
        source: the file.
        target: its second name.
        may_point: whether a symbolic link will do, since the file stays where it is.
    """
    with contextlib.suppress(OSError, NotImplementedError):
        os.link(source.resolve(), target)
        sync_directory(target.parent)
        return
    if may_point:
        with contextlib.suppress(OSError, NotImplementedError):
            target.symlink_to(source.resolve())
            return
    with DurableFile(target) as file, source.open("rb") as given:
        while block := given.read(_BLOCK):
            file.write(block)
            if file.sync_is_due:
                file.sync()
        file.publish()


def stage_manifest(
    stage: Path,
    staged_shards: Staged,
    agreed: Agreed,
    tokenizer: TokenizerFiles | None,
    splits: Sequence[str],
    known: Totals | None,
) -> Manifest:
    """Write the tokenizer and the manifest of the recovered dataset.

    Args:
        stage: directory in which it is made.
        staged_shards: its shards.
        agreed: what it says of itself.
        tokenizer: its tokenizer.
        splits: names of its splits.
        known: its totals, where nothing was changed.
    """
    shards = staged_shards.shards
    info = None if tokenizer is None else _stage_tokenizer(stage, tokenizer)
    totals = known
    if totals is None:
        summary = tally(Shard(MappedFile(stage / each.path)) for each in shards)
        totals = summary.totals(len(shards), sum(each.bytes for each in shards))
    manifest = make_manifest(agreed, shards, totals, info, splits)
    write_atomic(stage / MANIFEST_NAME, serialise_manifest(manifest))
    return manifest


def _stage_tokenizer(stage: Path, tokenizer: TokenizerFiles) -> TokenizerInfo:
    info, folder = tokenizer.info, tokenizer.folder
    if folder is None:
        return msgspec.structs.replace(info, files=())
    if info.files:
        return place_tokenizer(stage, info, folder, None)
    info = stage_tokenizer(stage, Tokenizer.from_path(folder))
    placed = place_tokenizer(stage, info, staged(stage, info), None)
    shutil.rmtree(stage / PARTS_DIRECTORY)
    return placed


def check_staged(stage: Path, progress: Progress) -> None:
    """Check the recovered dataset to the last row.

    Raises:
        CorruptDataError: it is not valid.
    """
    found = validate(stage, deep=True, workers=0, progress=lambda done, total: progress("checking", done, total))
    if is_valid(found):
        return
    errors = [finding for finding in found if finding.severity == "error"]
    shown = "; ".join(_said(finding) for finding in errors[:_SHOWN])
    more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    raise CorruptDataError(
        f"what was saved is not a valid dataset, and nothing was changed: {shown}{more}. Undamaged chunks hold rows "
        f"that no writer writes",
        code=errors[0].code,
    )


def _said(finding: Finding) -> str:
    place = [finding.shard, None if finding.row is None else f"row {finding.row}"]
    return ": ".join([*(each for each in place if each is not None), f"{finding.code}: {finding.message}"])


def numbered(pattern: str, taken: set[str]) -> Callable[[str], str]:
    """Gives paths of new shards, numbered in each split.

    Args:
        pattern: of a path, with `split` and `number`.
        taken: paths that are there.
    """
    made: dict[str, Iterator[str]] = {}

    def of_split(split: str) -> Iterator[str]:
        number = 0
        while True:
            path = pattern.format(split=split, number=number)
            if path not in taken and f"{path}.partial" not in taken:
                yield path
            number += 1

    def name(split: str) -> str:
        return next(made.setdefault(split, of_split(split)))

    return name
