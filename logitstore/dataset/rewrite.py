"""Datasets made of the sequences of another, read and written chunk by chunk as they are stored."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import pyarrow as pa

from logitstore.dataset.commit import publish, shard_files
from logitstore.dataset.input import Cut
from logitstore.dataset.origin import Origin
from logitstore.dataset.output import check_output, remove_empty, remove_staged, stage_tokenizer_of
from logitstore.dataset.part import PartWriter
from logitstore.dataset.parts import part_directory
from logitstore.dataset.settings import Settings
from logitstore.dataset.shards import Shards, read_manifest
from logitstore.dataset.usercolumns import UserColumns
from logitstore.errors import CorruptDataError, InvalidInputError
from logitstore.io import LocalStore, Store
from logitstore.io.store import local_path, store_of
from logitstore.limits import CHUNK_CANDIDATES
from logitstore.schema import Manifest, Sampling, Source
from logitstore.schema.journal import PARTS_DIRECTORY, Part
from logitstore.schema.version import FORMAT_NAME
from logitstore.shard.chunk import StoredSequence
from logitstore.shard.stored import column_bytes, stored_sequences

SHARD_BYTES: Final = 256 * 2**20

Progress = Callable[[int, int], None]
"""Called with what is done and how much there is: positions, or bytes where files are copied."""

Run = tuple[int, int, Sequence[int] | None]
"""(shard, chunk, its rows that are taken) of a dataset that is read; None takes all rows."""


@dataclass(frozen=True, slots=True)
class Input:
    """A dataset that is read."""

    store: Store
    manifest: Manifest
    shards: Shards

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Input:
        """Open a dataset, also a remote one.

        Raises:
            DatasetNotFoundError: there is none.
            CorruptDataError: the manifest is damaged.
        """
        store = store_of(path)
        manifest = read_manifest(store)
        return cls(store, manifest, Shards(store, manifest))

    @property
    def as_source(self) -> Source:
        """It, as the source of what is made of it."""
        name = self.store.root.resolve().name if isinstance(self.store, LocalStore) else self.store.name
        return Source(format=FORMAT_NAME, name=name, revision=self.manifest.dataset_digest)

    @property
    def lineage(self) -> tuple[Source, ...]:
        """What it was made from, and so on."""
        own = self.manifest.source
        return (*(() if own is None else (own,)), *self.manifest.lineage)

    @property
    def splits(self) -> list[str]:
        """Names of its splits, in the order of their rows; then those without shards."""
        return list(dict.fromkeys([*(shard.split for shard in self.manifest.shards), *self.manifest.splits]))

    def user_fields(self) -> list[pa.Field]:
        """The users' columns: their types are told by the shards, the manifest only spells them."""
        return self.shards[0].user_fields if self.manifest.shards else []

    def runs(self) -> Iterator[Run]:
        """All of it, in order."""
        for number in range(len(self.manifest.shards)):
            for chunk in range(len(self.shards[number].index)):
                yield number, chunk, None

    def read(self, runs: Iterator[Run]) -> Iterator[tuple[str, list[StoredSequence]]]:
        """(split, sequences) of some runs in order; those of a remote dataset are fetched ahead.

        Raises:
            CorruptDataError: the bytes are not what was written.
        """
        fields: list[pa.Field] = []
        for number, place, rows in self.shards.in_order(runs, range(self.shards.starts[-1])):
            shard = self.shards[number]
            fields = fields or shard.user_fields
            if shard.user_fields != fields:
                raise CorruptDataError(
                    "its own columns are not those of the other shards", code="user-columns", path=shard.path
                )
            chunk = self.shards.chunk(number, place)
            try:
                sequences = list(stored_sequences(chunk, range(len(chunk)) if rows is None else rows))
            except CorruptDataError as error:
                raise error.at(path=shard.path, chunk=place, offset=int(shard.index["offset"][place])) from error
            yield self.manifest.shards[number].split, sequences


class KeptColumns(UserColumns):
    """Users' columns of sequences that were stored before: Arrow's arrays, since Python cannot hold all values.

    Args:
        fields: names and types.
    """

    def __init__(self, fields: list[pa.Field]) -> None:
        super().__init__(pa.schema(fields))
        self._names = [field.name for field in fields]

    def arrays(self, sequences: list[StoredSequence]) -> list[pa.Array]:
        """The columns of a chunk."""
        return [pa.concat_arrays([sequence.columns[name] for sequence in sequences]) for name in self._names]


class Output:
    """A dataset that is made of another: one part for each split, and the dataset when all is there.

    Leaving the block with an exception leaves nothing, and an older dataset at the same path as it was.

    Args:
        path: directory of the dataset.
        given: what it is made of.
        splits: names of the splits, in order.
        sampling: what its manifest says was kept.
        shard_bytes: a shard closes at this many bytes.
        overwrite: replace what is there.

    Raises:
        DatasetExistsError: something is there.
        InvalidInputError: it is what it is made of, or a setting is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        given: Input,
        splits: Sequence[str],
        *,
        sampling: Sampling | None = None,
        shard_bytes: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self._root = local_path(path, "write to a directory, and publish it with `logitstore push`")
        self._given = given
        self._old = check_output(self._root, [given.store], overwrite=overwrite)
        self._made_root = not self._root.exists()
        self._writers: dict[str, PartWriter] = {}
        manifest, sampling = given.manifest, sampling or given.manifest.sampling
        fields = given.user_fields()
        try:
            for split in splits:
                settings = Settings.check(
                    split=split,
                    values=sampling.values,
                    resolution=sampling.resolution,
                    temperature=manifest.temperature,
                    normalised=manifest.normalised,
                    logit_width=manifest.logit_width,
                    chunk_candidates=CHUNK_CANDIDATES,
                    shard_bytes=SHARD_BYTES if shard_bytes is None else shard_bytes,
                    cut=Cut(sampling.top_k, sampling.top_p, sampling.min_k),
                )
                origin = Origin(manifest.teacher, None, given.as_source, given.lineage)
                part, columns = Part(split=split), KeptColumns(fields)
                self._writers[split] = PartWriter(
                    self._root, part, settings, origin, columns, overwrite=overwrite, alone=False
                )
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._discard()

    def append(self, split: str, sequence: StoredSequence) -> None:
        """Take a sequence.

        Raises:
            InvalidInputError: its id was there before, or it is too large.
            OSError: the disk is full, say.
        """
        try:
            self._writers[split].append(sequence, column_bytes(sequence))
        except InvalidInputError as error:
            raise type(error)(f"sequence {sequence.id!r}: {error}") from error

    def sync_if_due(self) -> None:
        """Make chunks durable that were written too long ago, or too many."""
        for writer in self._writers.values():
            writer.sync_if_due()

    def commit(self) -> Manifest:
        """Write what is left; from here on the dataset exists.

        Raises:
            CorruptDataError: a file of the tokenizer is damaged.
            OSError: the disk is full, say.
        """
        tokenizer = self._given.manifest.tokenizer
        if tokenizer is not None:
            tokenizer = stage_tokenizer_of(self._given.store, tokenizer, self._root)
        states = [state for writer in self._writers.values() if (state := writer.finish(tokenizer)) is not None]
        manifest = publish(self._root, states, self._old).manifest
        for writer in self._writers.values():
            writer.release()
        return manifest

    def _discard(self) -> None:
        """Leave nothing of it: no command goes on with what is half done."""
        for writer in self._writers.values():
            writer.abort()
        named = set() if self._old is None else {shard.path for shard in self._old.shards}
        for split in self._writers:
            part = Part(split=split)
            shutil.rmtree(part_directory(self._root, part), ignore_errors=True)
            mine = [path for path in shard_files(self._root) if path.parent.name == split]
            for path in mine:
                stem = path.name.partition(".arrow")[0].rpartition("-")[0]
                if stem == part.stem and path.relative_to(self._root).as_posix() not in named:
                    with contextlib.suppress(OSError):
                        path.unlink()
            remove_empty([self._root / "data" / split])
        remove_staged(self._root)
        made = [self._root] if self._made_root else []
        remove_empty([self._root / "data", self._root / PARTS_DIRECTORY, *made])


def rewrite(
    given: Input,
    output: Output,
    runs: Iterator[Run],
    place: Callable[[str, StoredSequence], tuple[str, StoredSequence] | None],
    progress: Progress | None,
    total: int,
) -> None:
    """Read sequences, and write what becomes of each.

    Args:
        given: what is read.
        output: gets what is written.
        runs: what is read of it.
        place: from its split and a sequence to those it has in the output; None leaves it out.
        progress: called with positions read and `total`.
        total: positions that are read.
    """
    done = 0
    for split, sequences in given.read(runs):
        for sequence in sequences:
            done += len(sequence.tokens)
            if (placed := place(split, sequence)) is not None:
                output.append(*placed)
        output.sync_if_due()
        if progress is not None:
            progress(done, total)
