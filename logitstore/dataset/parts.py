"""What writers that have not been committed left in a dataset's directory: journals, and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.errors import CorruptDataError, SourceNotFoundError, UnsupportedVersionError
from logitstore.io import GrowingFile, MappedFile, regular_size
from logitstore.io.lock import is_locked
from logitstore.schema import ShardHeader, ShardInfo, TokenizerInfo, parse_header
from logitstore.schema.header import HEADER_KEY
from logitstore.schema.journal import (
    JOURNAL_NAME,
    LINE_BYTES,
    PARTS_DIRECTORY,
    Chunked,
    Closed,
    Done,
    Line,
    Opened,
    Part,
    Plan,
    Sent,
    Sums,
    Synced,
    decode_line,
    encode_line,
)
from logitstore.shard.chunk import FORMAT_FIELDS, FORMAT_NAMES
from logitstore.shard.layout import HASH_DTYPE, digest
from logitstore.shard.reader import Shard

LOCK_NAME: Final = "lock"

NOTHING: Final = Sums(
    sequences=0, positions=0, candidates=0, encodings={}, columns={}, highest_id=-1,
    max_error=0.0, kl_sum=0.0, kl_positions=0, hits=(0, 0, 0), scored=0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class State:
    """How far a part is, by its journal.

    Attributes:
        plan: what its writer was told.
        shards: those that are complete.
        schema: schema message of the last shard; empty before the first.
        sent: places of complete shards that are no longer here, by path.
        opened: the shard that is not complete.
        chunks: the chunks of that one.
        sums: of all chunks.
        last: id of the last sequence.
        done: whether, and with which tokenizer, the part is complete.
        end: bytes of the journal.
        ends: of the journal before the shard that is not complete, and behind each of its chunks.
        before: sums before that shard.
        synced: bytes of that shard that are known to be on the disk.
    """

    plan: Plan
    shards: tuple[ShardInfo, ...] = ()
    schema: bytes = b""
    sent: dict[str, str] = field(default_factory=dict)
    opened: Opened | None = None
    chunks: tuple[Chunked, ...] = ()
    sums: Sums = NOTHING
    last: str | None = None
    done: Done | None = None
    end: int = 0
    ends: tuple[int, ...] = ()
    before: Sums = NOTHING
    synced: int = 0

    @property
    def part(self) -> Part:
        """Which part."""
        return self.plan.part

    @property
    def tokenizer(self) -> TokenizerInfo | None:
        """Its tokenizer, as far as it is known."""
        return self.plan.tokenizer if self.done is None else self.done.tokenizer

    @property
    def logit_width(self) -> int | None:
        """The width that its shards say; it may not have been known when the part was begun."""
        return header_of(self.schema).logit_width if self.schema else self.plan.logit_width

    @property
    def user_columns(self) -> dict[str, str] | None:
        """Names and types of the users' columns; None where there is no shard yet."""
        return {field.name: str(field.type) for field in user_fields(self.schema)} if self.schema else None

    @property
    def bytes(self) -> int:
        """Bytes of complete shards and chunks."""
        return sum(shard.bytes for shard in self.shards) + sum(chunk.length for chunk in self.chunks)


def arrow_schema(message: bytes) -> pa.Schema:
    """The schema of a shard from its message.

    Raises:
        CorruptDataError: it is none.
    """
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(message))
        names = schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptDataError(f"the journal's schema is none: {error}", code="journal") from error
    if names[: len(FORMAT_FIELDS)] != FORMAT_NAMES or HEADER_KEY not in (schema.metadata or {}):
        raise CorruptDataError("the journal's schema is not that of a shard", code="journal")
    return schema


def header_of(message: bytes) -> ShardHeader:
    """The header of a shard from its schema message.

    Raises:
        CorruptDataError: it is none.
    """
    return parse_header(arrow_schema(message).metadata[HEADER_KEY])


def user_fields(message: bytes) -> list[pa.Field]:
    """The users' columns of a schema message.

    Raises:
        CorruptDataError: it is none.
    """
    return list(arrow_schema(message))[len(FORMAT_FIELDS) :]


def part_directory(root: Path, part: Part) -> Path:
    """Where a part has its journal and its lock."""
    return root / PARTS_DIRECTORY / part.name


def part_names(root: Path) -> list[Part]:
    """The parts that have a directory, in order."""
    found = (Part.of_directory(path.name) for path in (root / PARTS_DIRECTORY).glob("*-of-*") if path.is_dir())
    return sorted(part for part in found if part is not None)


def is_begun(root: Path, part: Part) -> bool:
    """Whether a part has a journal, or a writer at work that may begin one."""
    directory = part_directory(root, part)
    return (directory / JOURNAL_NAME).exists() or is_locked(directory / LOCK_NAME)


def read_parts(root: Path) -> list[State]:
    """The state of each part that was begun, in order.

    Raises:
        CorruptDataError: a journal is none.
        UnsupportedVersionError: a later release wrote one.
    """
    states = (read_part(root, part) for part in part_names(root))
    return [state for state in states if state is not None]


def read_part(root: Path, part: Part) -> State | None:
    """The state of a part; None where it was not begun, or nothing of it was synced.

    Raises:
        CorruptDataError: the journal is none, or of another part.
        UnsupportedVersionError: a later release wrote it.
    """
    path = part_directory(root, part) / JOURNAL_NAME
    try:
        return _gather(_lines(path), part)
    except CorruptDataError as error:
        raise error.at(path=str(path)) from error
    except UnsupportedVersionError as error:
        raise UnsupportedVersionError(f"{path}: {error}") from error


def _gather(lines: Iterator[tuple[Line, int]], part: Part) -> State | None:
    state: State | None = None
    shards: list[ShardInfo] = []
    chunks: list[Chunked] = []
    ends: list[int] = []
    for line, end in lines:
        if isinstance(line, Chunked) and state is not None and state.opened is not None:
            chunks.append(line)
            ends.append(end)
            continue
        if state is not None and chunks:
            state = replace(state, sums=chunks[-1].sums, last=chunks[-1].last, end=max(state.end, ends[-1]))
        if isinstance(line, Opened):
            chunks, ends = [], [state.end if state is not None else 0]
        if isinstance(line, Closed):
            shards.append(line.info)
        state = _after(state, line, end)
        if state.opened is None:
            chunks, ends = [], []
    if state is None:
        return None
    if state.part != part:
        raise CorruptDataError(f"this is the journal of {state.part}", code="journal")
    if chunks:
        state = replace(state, sums=chunks[-1].sums, last=chunks[-1].last, end=max(state.end, ends[-1]))
    return replace(state, shards=tuple(shards), chunks=tuple(chunks), ends=tuple(ends))


def _after(state: State | None, line: Line, end: int) -> State:
    """The state after one more line; chunks and shards are gathered by the caller."""
    if isinstance(line, Plan):
        return State(line, end=end)
    if state is None:
        raise CorruptDataError("the journal does not begin with a plan", code="journal")
    if isinstance(line, Opened):
        _check_own(state, line.path)
        return replace(state, opened=line, schema=line.schema, before=state.sums, synced=0, end=end)
    if isinstance(line, Synced):
        return replace(state, synced=line.bytes, end=end)
    if isinstance(line, Closed):
        if state.opened is None or line.info.path != state.opened.path:
            raise CorruptDataError("the journal closes another shard than it opened", code="journal")
        return replace(state, opened=None, end=end)
    if isinstance(line, Sent):
        _check_own(state, line.path)
        return replace(state, sent={**state.sent, line.path: line.place}, end=end)
    if isinstance(line, Done):
        return replace(state, done=line, end=end)
    raise CorruptDataError("the journal has a chunk outside a shard", code="journal")


def _check_own(state: State, path: str) -> None:
    if not state.part.owns(path):
        raise CorruptDataError(f"the journal of {state.part} names {path!r}, which is no shard of it", code="journal")


def read_plan(root: Path, part: Part) -> Plan | None:
    """What the writer of a part was told; None where it was not begun.

    Raises:
        CorruptDataError: the journal is none.
        UnsupportedVersionError: a later release wrote it.
    """
    for line, _ in _lines(part_directory(root, part) / JOURNAL_NAME):
        return line if isinstance(line, Plan) else None
    return None


def _lines(path: Path) -> Iterator[tuple[Line, int]]:
    """The lines up to the first that is not whole, each with where it ends: what follows was not synced."""
    try:
        regular_size(path)
    except SourceNotFoundError:
        return
    with path.open("rb") as file:
        end = 0
        while data := file.readline(LINE_BYTES):
            line = decode_line(data, first=end == 0)
            if line is None:
                return
            end += len(data)
            yield line, end


class Journal:
    """Appends lines to the journal of a part.

    Args:
        directory: of the part.
        keep: bytes of it that are kept; None makes a new one.
    """

    def __init__(self, directory: Path, keep: int | None = None) -> None:
        path = directory / JOURNAL_NAME
        if keep is None:
            path.unlink(missing_ok=True)
        self._file = GrowingFile(path, keep)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._file.size

    def write(self, line: Line) -> None:
        """Append a line.

        Raises:
            InvalidInputError: it is too long.
        """
        self._file.write(encode_line(line))

    def sync(self) -> None:
        """Make all lines so far durable."""
        self._file.sync()

    def close(self) -> None:
        """Sync and close."""
        self._file.close()


def hashes_path(directory: Path, shard: str) -> Path:
    """Where the id hashes of a shard are kept that is no longer here."""
    return directory / f"{shard.rpartition('/')[2]}.ids"


def pack_hashes(hashes: NDArray[np.uint64]) -> bytes:
    """The hashes as they are kept: their xxh3-128, and they."""
    data = hashes.astype(HASH_DTYPE).tobytes()
    return digest(data) + data


def shard_hashes(root: Path, state: State, info: ShardInfo) -> NDArray[np.uint64]:
    """xxh3-64 of the ids of a complete shard, here or sent.

    Raises:
        CorruptDataError: it is missing, damaged or another.
        SourceNotFoundError: it is missing.
    """
    if info.path not in state.sent:
        shard = Shard(MappedFile(root / info.path))
        if shard.tail_digest != info.tail_digest:
            raise CorruptDataError(
                "this is not the shard that the journal names", code="shard-other", path=str(root / info.path)
            )
        return shard.hashes
    path = hashes_path(part_directory(root, state.part), info.path)
    data = path.read_bytes()
    if len(data) != info.sequences * HASH_DTYPE.itemsize + 16 or digest(data[16:]) != data[:16]:
        raise CorruptDataError("these are not the hashes of its shard's ids", code="shard-hashes", path=str(path))
    return np.frombuffer(data, HASH_DTYPE, offset=16)
