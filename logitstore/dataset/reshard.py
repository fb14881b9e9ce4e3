"""The chunks of a dataset in shards of another size: as they are, nothing is decoded or encoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pyarrow as pa
from msgspec import structs

from logitstore.dataset.agree import Described, agree
from logitstore.dataset.commit import first_number, make_manifest, shard_path
from logitstore.dataset.output import (
    check_output,
    locked,
    remove_empty,
    remove_everything_else,
    removing,
    stage_tokenizer_of,
    write_manifest,
)
from logitstore.dataset.rewrite import Input, Progress
from logitstore.dataset.tokenizer_files import place_tokenizer, staged
from logitstore.errors import InvalidInputError
from logitstore.io import make_directory
from logitstore.schema import Manifest, ShardInfo
from logitstore.schema.journal import Part
from logitstore.shard.reader import Shard
from logitstore.shard.writer import ShardWriter

_TOGETHER: Final = 32 * 2**20
"""Chunks of about so many bytes are read at once: those of a remote dataset by few requests."""


def reshard(given: Input, root: Path, shard_bytes: int, *, overwrite: bool, progress: Progress | None) -> Manifest:
    """Write a dataset with the same chunks in other shards.

    Args:
        given: the dataset.
        root: directory of the new one.
        shard_bytes: a shard closes at this many bytes.
        overwrite: replace what is there.
        progress: called with positions done and positions in all.

    Raises:
        InvalidInputError: the output is the dataset itself, or a shard would be empty.
        DatasetExistsError: something is there.
        CorruptDataError: the dataset is damaged.
    """
    if shard_bytes < 1:
        raise InvalidInputError(f"shard_bytes is {shard_bytes}; it is at least 1")
    old = check_output(root, [given.store], overwrite=overwrite)
    made_root = not root.exists()
    try:
        with locked(root):
            with removing(root, old) as made:
                shards = _write(given, root, shard_bytes, made, progress)
                tokenizer = given.manifest.tokenizer
                if tokenizer is not None:
                    tokenizer = stage_tokenizer_of(given.store, tokenizer, root)
                    tokenizer = place_tokenizer(root, tokenizer, staged(root, tokenizer), old)
                agreed = agree([Described.of(given.store.name, given.manifest)])
                agreed = replace(agreed, source=given.as_source, lineage=given.lineage)
                size = sum(shard.bytes for shard in shards)
                totals = structs.replace(given.manifest.totals, shards=len(shards), bytes=size)
                manifest = make_manifest(agreed, tuple(shards), totals, tokenizer, given.splits)
                write_manifest(root, manifest, shards, old)
            if overwrite:
                remove_everything_else(root, manifest)
    finally:
        remove_empty([root] if made_root else [])
    return manifest


def _write(given: Input, root: Path, shard_bytes: int, made: list[Path], progress: Progress | None) -> list[ShardInfo]:
    shards: list[ShardInfo] = []
    done, total = 0, given.manifest.totals.positions
    for split in given.splits:
        writer: ShardWriter | None = None
        number = first_number(root, Part(split=split))
        with contextlib.ExitStack() as stack:
            for shard, chunk, message in _messages(given, split):
                # One shard has one header, which says the versions of what wrote it too.
                if writer is not None and (writer.bytes >= shard_bytes or not _same(writer.schema, shard.schema)):
                    shards.append(_close(writer, root, split))
                    writer = None
                if writer is None:
                    path = shard_path(root, Part(split=split), number)
                    make_directory(path.parent)
                    writer = ShardWriter(path, shard.schema)
                    stack.callback(writer.close)
                    made += [path, path.with_name(f"{path.name}.partial")]
                    number += 1
                entry = shard.index[chunk]
                hashes = shard.hashes[shard.starts[chunk] : shard.starts[chunk + 1]].tolist()
                writer.append(message, int(entry["positions"]), int(entry["candidates"]), hashes)
                if writer.sync_is_due:
                    writer.sync()
                done += int(entry["positions"])
                if progress is not None:
                    progress(done, total)
            if writer is not None:
                shards.append(_close(writer, root, split))
    return shards


def _same(one: pa.Schema, other: pa.Schema) -> bool:
    return bool(one.equals(other, check_metadata=True))


def _messages(given: Input, split: str) -> Iterator[tuple[Shard, int, pa.Buffer]]:
    """(shard, chunk, its message) of a split, each verified."""
    for number, info in enumerate(given.manifest.shards):
        if info.split != split:
            continue
        shard = given.shards[number]
        lengths = shard.index["length"].tolist()
        first = 0
        while first < len(lengths):
            last, size = first, lengths[first]
            while last + 1 < len(lengths) and size + lengths[last + 1] <= _TOGETHER:
                last += 1
                size += lengths[last]
            for chunk, message in enumerate(shard.messages(first, last), first):
                shard.chunk(chunk, message)
                yield shard, chunk, message
            first = last + 1


def _close(writer: ShardWriter, root: Path, split: str) -> ShardInfo:
    written = writer.seal()
    writer.publish()
    return ShardInfo(
        path=written.path.relative_to(root).as_posix(),
        split=split,
        bytes=written.bytes,
        sha256=written.sha256,
        tail_digest=written.tail_digest,
        sequences=written.sequences,
        positions=written.positions,
        candidates=written.candidates,
    )
