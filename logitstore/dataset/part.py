"""Writing one part of a dataset: chunks and shards as sequences come, and a journal to go on from."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from logitstore._version import __version__
from logitstore.dataset.begin import chunk_line, lock_part, refuse
from logitstore.dataset.commit import (
    clean,
    existing_manifest,
    first_number,
    is_published,
    publish,
    shard_path,
)
from logitstore.dataset.ids import IdSet
from logitstore.dataset.input import Candidates
from logitstore.dataset.origin import Origin, Sink
from logitstore.dataset.parts import (
    Journal,
    State,
    arrow_schema,
    hashes_path,
    pack_hashes,
    part_directory,
    read_part,
    shard_hashes,
    user_fields,
)
from logitstore.dataset.resume import (
    check_known,
    check_same,
    check_siblings,
    plan_of,
    remove_unknown,
    settle,
    whole_chunks,
)
from logitstore.dataset.settings import Settings
from logitstore.dataset.shards import open_shard
from logitstore.dataset.summary import Summary
from logitstore.dataset.tokenizer_files import describe_tokenizer, stage_tokenizer
from logitstore.dataset.usercolumns import UserColumns
from logitstore.encoding import ragged
from logitstore.errors import CorruptDataError, DatasetExistsError, InvalidInputError
from logitstore.io import LocalStore, MappedFile, make_directory, write_atomic
from logitstore.limits import CHUNK_COLUMN_BYTES, CHUNK_POSITIONS, CHUNK_SEQUENCES, SEQUENCE_CANDIDATES
from logitstore.schema import FORMAT_VERSION, Manifest, ShardInfo, TokenizerInfo
from logitstore.schema.journal import (
    JOURNAL_NAME,
    PARTS_DIRECTORY,
    Closed,
    Done,
    Opened,
    Part,
    Plan,
    Sent,
    Synced,
    encode_line,
)
from logitstore.shard.chunk import StoredSequence, shard_schema
from logitstore.shard.reader import Shard
from logitstore.shard.writer import ShardWriter, WrittenShard


class PartWriter:
    """Takes sequences that are ready to be stored, in order.

    Args:
        root: directory of the dataset.
        part: which part of it; the only one is committed by `close`.
        settings: of the writer.
        origin: of the distributions.
        columns: the users' columns.
        overwrite: replace what is there, when this is complete.
        resume: go on where an earlier writer of this part stopped.
        sink: takes complete shards away; None leaves them here.
        alone: whether `close` makes a dataset of what it writes; None: where it is the only part.

    Attributes:
        summary: what was written, by earlier writers too.
        given: sequences that this writer was given, those that were there before included.
        finished: whether the part was complete before, so that it takes no new sequences.

    Raises:
        DatasetExistsError: something is there, or another writer is at work.
        InvalidInputError: the part was begun with other settings.
        CorruptDataError: what is to be gone on with is damaged.
    """

    def __init__(
        self,
        root: Path,
        part: Part,
        settings: Settings,
        origin: Origin,
        columns: UserColumns,
        *,
        overwrite: bool = False,
        resume: bool = False,
        sink: Sink | None = None,
        alone: bool | None = None,
    ) -> None:
        self.part = part
        self.settings = settings
        self.origin = origin
        self.columns = columns
        self.summary = Summary()
        self.given = 0
        self.finished = False
        self.closed = False
        self._root = root
        self._directory = part_directory(root, part)
        self._overwrite = overwrite
        self._sink = sink
        self._alone = part.of == 1 if alone is None else alone
        self._dataset: Manifest | None = None  # the one that is complete, until its ids are asked for
        self._before = IdSet()
        self._ids = IdSet()
        self._open: list[StoredSequence] = []
        self._open_size = (0, 0, 0)  # candidates, positions, bytes of users' columns
        self._journal: Journal | None = None
        self._shard: ShardWriter | None = None
        self._failure: BaseException | None = None
        self._process = os.getpid()
        try:
            encode_line(self.plan(0))
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                f"teacher, source or lineage hold text that is not valid Unicode: {error}"
            ) from error
        if root.exists() and not root.is_dir():
            raise DatasetExistsError(f"{root} is a file; a dataset is a directory")
        self._made_root = not root.exists()
        self._lock = lock_part(self._directory, f"{root}: another writer is at work on {part}; wait for it")
        try:
            self._next = self._begin(resume=resume)
        except BaseException:
            self.abort()
            raise

    def _begin(self, *, resume: bool) -> int:
        """Find what is there, and take it up; the number of the next shard."""
        old, state = existing_manifest(self._root), read_part(self._root, self.part)
        check_siblings(self._root, self.plan(0))
        if resume and old is not None and state is None and (self._directory / JOURNAL_NAME).exists():
            raise DatasetExistsError(
                f"{self._root}: the dataset was to be overwritten, and nothing of the new one is there; begin it anew "
                f"(--overwrite)"
            )
        if resume and old is not None and (state is None or is_published(state, old)):
            if state is not None:
                clean(self._root, old, [state])
            self._take_dataset(old)
        elif resume and state is not None:
            return self._take_part(state)
        elif not self._overwrite:
            refuse(self._root, self.part, old, state, alone=self._alone)
        self._next = first_number(self._root, self.part)
        if self._overwrite:
            self._begun()  # so that resuming knows of it, whatever happens before the first chunk
        return self._next

    def _take_dataset(self, manifest: Manifest) -> None:
        """The dataset is complete: nothing is written any more."""
        if self.part.split not in manifest.splits:
            raise DatasetExistsError(
                f"{self._root} holds a dataset without the split {self.part.split}; write that to another path, and "
                f"join it with `logitstore append`"
            )
        now = self.plan(0)
        check_same(self._root, plan_of(manifest, now), now)
        self.summary = Summary.of_totals(manifest.totals)
        self.finished = True
        self._dataset = manifest

    def _was_there(self, sequence_id: str) -> bool:
        if self._dataset is not None:
            store, manifest, self._dataset = LocalStore(self._root), self._dataset, None
            for info in manifest.shards:
                self._before.take(open_shard(store, info, manifest).hashes)
        return sequence_id in self._before

    def _take_part(self, state: State) -> int:
        """Go on where an earlier writer stopped; the number of the next shard."""
        check_same(self._root, state.plan, self.plan(state.plan.first))
        if self.settings.logit_width is None:
            self.settings = replace(self.settings, logit_width=state.logit_width)
        self._overwrite = state.plan.overwrite
        check_known(self._root, state)
        for info in state.shards:
            settle(self._root, state, info)
            self._before.take(shard_hashes(self._root, state, info))
            if self._sink is not None and info.path not in state.sent:
                self._sink.take(self._root / info.path, info)
        if state.schema:
            self.columns = self.columns.resumed(user_fields(state.schema))
        self.finished = state.done is not None
        entries, hashes = whole_chunks(self._root, state)
        last = state.chunks[len(entries) - 1].sums if entries else state.before if state.opened else state.sums
        self.summary = Summary.of(last)
        self.summary.bytes = sum(info.bytes for info in state.shards)
        self._before.take(np.array(hashes, np.uint64))
        self._journal = Journal(self._directory, state.end if state.opened is None else state.ends[len(entries)])
        if state.opened is not None and entries:
            schema = arrow_schema(state.schema)
            self._shard = ShardWriter(self._root / state.opened.path, schema, entries, hashes)
            self._finish_full_shard()
        remove_unknown(self._root, state, keep=bool(entries))
        return state.plan.first + len(state.shards) + bool(entries)

    def plan(self, first: int) -> Plan:
        """The first line of the journal.

        Args:
            first: number of the first shard.
        """
        tokenizer = self.origin.tokenizer
        return Plan(
            version=str(FORMAT_VERSION),
            written_by=f"logitstore {__version__}",
            part=self.part,
            overwrite=self._overwrite,
            first=first,
            sampling=self.settings.sampling(),
            normalised=self.settings.normalised,
            temperature=self.settings.temperature,
            logit_width=self.settings.logit_width,
            chunk_candidates=self.settings.chunk_candidates,
            shard_bytes=self.settings.shard_bytes,
            teacher=self.origin.teacher,
            tokenizer=None if tokenizer is None else describe_tokenizer(tokenizer, ()),
            source=self.origin.source,
            lineage=self.origin.lineage,
            fingerprint=self.origin.fingerprint,
        )

    @property
    def begun(self) -> bool:
        """Whether there are chunks, whose header is fixed."""
        return self._journal is not None and (self._shard is not None or self.summary.sequences > 0)

    def numbered(self, number: int) -> str:
        """The id of a sequence by its running number: that among those of all parts."""
        return str(self.part.number + self.part.of * number)

    def __contains__(self, sequence_id: str) -> bool:
        """Whether a sequence was written, by this writer or an earlier one of the part."""
        return self._was_there(sequence_id) or sequence_id in self._ids

    def had(self, sequence_id: str) -> bool:
        """Whether an earlier writer wrote this sequence, so that it is not to be added.

        Raises:
            InvalidInputError: it was given to this one before; or the part was finished without it.
        """
        if self._was_there(sequence_id):
            self._new(sequence_id)
            self.given += 1
            return True
        if self.finished:
            raise InvalidInputError(
                "this is not in the dataset, which is finished; write further sequences to a dataset of their own, and "
                "join it with `logitstore append`"
            )
        return False

    def _new(self, sequence_id: str) -> None:
        if not self._ids.add(sequence_id):
            raise InvalidInputError(
                "this id was added before; ids are unique in a dataset: rename one, or leave ids out"
            )

    def append(self, sequence: StoredSequence, column_bytes: int, given: Candidates | None = None) -> None:
        """Take a sequence; chunks and shards are written as they fill.

        Args:
            sequence: ready to be stored.
            column_bytes: about how much the users' columns take.
            given: the candidates before rounding, to measure what that costs.

        Raises:
            InvalidInputError: the id was there before, or it is too large.
            OSError: the disk is full, say.
        """
        if len(sequence.ids) > SEQUENCE_CANDIDATES:
            raise InvalidInputError(
                f"{len(sequence.ids)} candidates, over the limit of {SEQUENCE_CANDIDATES}: cut the sequence up, or use "
                f"top_k"
            )
        self._check_process()
        self._new(sequence.id)
        try:
            self._take(sequence, column_bytes, given)
        except BaseException as error:  # what was half taken, as by Ctrl-C, is not committed
            self._failure = error
            self.abort()
            raise

    def _take(self, sequence: StoredSequence, column_bytes: int, given: Candidates | None) -> None:
        size = (len(sequence.ids), len(sequence.tokens), column_bytes)
        limits = (self.settings.chunk_candidates, CHUNK_POSITIONS, CHUNK_COLUMN_BYTES)
        if self._open and any(a + b > c for a, b, c in zip(self._open_size, size, limits, strict=True)):
            self._flush()
        self._open.append(sequence)
        a, b, c = self._open_size
        self._open_size = (a + size[0], b + size[1], c + size[2])
        self._count(sequence, given)
        full = any(a >= b for a, b in zip(self._open_size, limits, strict=True))
        if full or len(self._open) >= CHUNK_SEQUENCES:
            self._flush()

    def _count(self, sequence: StoredSequence, given: Candidates | None) -> None:
        self.given += 1
        columns = [name for name, cells in sequence.optional.items() if len(cells)]
        self.summary.count(len(sequence.tokens), sequence.ids, sequence.values, columns)
        if given is not None:
            self.summary.measure(given, sequence.values, self.settings.resolution)
            self.summary.alignment.add(sequence.tokens, given.count, ragged.offsets(given.count), given.ids)

    def sync_if_due(self) -> None:
        """Make chunks durable that were written too long ago, or too many."""
        if self._shard is not None and self._journal is not None and self._shard.sync_is_due:
            self._shard.sync()
            self._journal.write(Synced(bytes=self._shard.bytes))
            self._journal.sync()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise InvalidInputError("this writer is that of another process, of which this one is a copy; use it there")

    def _flush(self) -> None:
        """Write the open chunk; close the shard when it is large enough.

        A chunk that was not written whole ends the writing: what would come behind it could not be read.
        """
        if not self._open:
            return
        user = self.columns.arrays(self._open)
        journal = self._begun()
        if self._shard is None:
            schema = shard_schema(self.settings.header(), self.columns.fields())
            path = shard_path(self._root, self.part, self._next)
            make_directory(path.parent)
            journal.write(Opened(path=self._relative(path), schema=schema.serialize().to_pybytes()))
            self._shard = ShardWriter(path, schema)
            self._next += 1
        entry = self._shard.write(self._open, user)
        journal.write(chunk_line(entry, self._open[-1].id, self.summary))
        self._open, self._open_size = [], (0, 0, 0)
        self.sync_if_due()
        self._finish_full_shard()

    def _begun(self) -> Journal:
        """The journal, its first line written."""
        if self._journal is None:
            tokenizer = self.origin.tokenizer
            info = None if tokenizer is None else stage_tokenizer(self._root, tokenizer)
            self._journal = Journal(self._directory)
            self._journal.write(msgspec.structs.replace(self.plan(self._next), tokenizer=info))
            self._journal.sync()
        return self._journal

    def _finish_full_shard(self) -> None:
        if self._shard is not None and self._shard.bytes >= self.settings.shard_bytes:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._shard is not None and self._journal is not None:
            written = self._shard.seal()
            info = self._info(written)
            self._journal.write(Closed(info=info))
            self._journal.sync()
            self._shard.publish()
            self.summary.bytes += written.bytes
            self._shard = None
            if self._sink is not None:
                self._sink.take(written.path, info)
                self._let_go(wait=False)

    def _let_go(self, *, wait: bool) -> None:
        """Remove the shards that have arrived elsewhere; the hashes of their ids stay."""
        if self._sink is None or self._journal is None:
            return
        for name, place in self._sink.arrived(wait=wait):
            path = self._root / name
            write_atomic(hashes_path(self._directory, name), pack_hashes(Shard(MappedFile(path)).hashes))
            self._journal.write(Sent(path=name, place=place))
            self._journal.sync()
            path.unlink()

    def _info(self, shard: WrittenShard) -> ShardInfo:
        return ShardInfo(
            path=self._relative(shard.path),
            split=self.part.split,
            bytes=shard.bytes,
            sha256=shard.sha256,
            tail_digest=shard.tail_digest,
            sequences=shard.sequences,
            positions=shard.positions,
            candidates=shard.candidates,
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def close(self) -> Manifest | None:
        """Write what is left, and end the part; its manifest where it is the only one.

        Raises:
            InvalidInputError: a user's column cannot be stored, or writing failed before.
            OSError: the disk is full, say.
        """
        if self._failure is not None:
            raise InvalidInputError(f"nothing was committed, since writing failed before: {self._failure}")
        if self.closed:
            return None
        self._check_process()
        try:
            state = self.finish()
            manifest = None
            if state is not None and self._alone:
                manifest = self._publish(state)
        except BaseException as error:
            self._failure = error
            self.abort()
            raise
        self.release()
        return manifest

    def _publish(self, state: State) -> Manifest:
        old = existing_manifest(self._root)
        if old is not None and not self._overwrite and not is_published(state, old):
            raise DatasetExistsError(
                f"{self._root}: another writer made a dataset here meanwhile; what was written stays in parts/ and "
                f"data/, and can replace that one (`logitstore commit --overwrite`)"
            )
        return publish(self._root, [state], old).manifest

    def finish(self, tokenizer: TokenizerInfo | None = None) -> State | None:
        """Write what is left, and end the part, which stays locked; None where the dataset was complete before.

        Args:
            tokenizer: one whose files are staged already; None stages that of the origin.

        Raises:
            InvalidInputError: a user's column cannot be stored.
            OSError: the disk is full, say.
        """
        self._flush()
        self._finish_shard()
        if self.finished and self._journal is None:
            return None
        journal = self._begun()
        self._let_go(wait=True)
        if not self.finished:
            if tokenizer is None and self.origin.tokenizer is not None:
                tokenizer = stage_tokenizer(self._root, self.origin.tokenizer)
            journal.write(Done(tokenizer=tokenizer))
        journal.close()
        state = read_part(self._root, self.part)
        if state is None or state.done is None or state.sums.sequences != self.summary.sequences:
            raise CorruptDataError(
                "the journal is damaged, or was changed meanwhile; save what was written with `logitstore recover`",
                code="journal",
                path=str(self._directory / JOURNAL_NAME),
            )
        return state

    def abort(self) -> None:
        """Stop: complete chunks stay, to be gone on with; in a copy of the process nothing is done."""
        if self._process != os.getpid():
            return
        for each in (self._shard, self._journal):
            if each is not None:
                with contextlib.suppress(OSError):  # what ended the writing is the error to show
                    each.close()
        self._shard = None
        self.release()

    def release(self) -> None:
        """Let others write; leave no empty directory."""
        self.closed = True
        if self._sink is not None:
            self._sink.close()
        self._lock.release()
        if self._journal is None:
            made = (self._root,) if self._made_root else ()
            for directory in (self._directory, self._root / PARTS_DIRECTORY, *made):
                with contextlib.suppress(OSError):
                    directory.rmdir()
