"""What can be found in a shard that is not whole: tail, index, messages, and digests that vouch for them.

Everything here takes time and memory in proportion to the file at most, whatever is in it.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.errors import CorruptDataError, UnsupportedVersionError
from logitstore.io.source import Accept, Part
from logitstore.limits import MESSAGE_BYTES, SCHEMA_BYTES
from logitstore.schema.header import ShardHeader
from logitstore.shard.chunk import Chunk
from logitstore.shard.layout import (
    END_MARK,
    HASH_DTYPE,
    INDEX_DTYPE,
    MAGIC,
    TAIL_BYTES,
    Tail,
    digest,
    read_index,
    read_tail,
    write_tail,
)
from logitstore.shard.message import check_message
from logitstore.shard.reader import Shard
from logitstore.shard.scalars import numbers

_PREFIX: Final = struct.Struct("<iI")  # continuation mark, bytes of metadata
_PLACE: Final = struct.Struct("<QQ")  # how an entry of an index begins
_MARK: Final = b"\xff\xff\xff\xff"
_EIGHTS: Final = b"[" + b"".join(re.escape(bytes([n])) for n in range(0, 256, 8)) + b"]"
_START: Final = re.compile(_MARK + _EIGHTS + rb"..\x00...\x00", re.DOTALL)  # length and root of the metadata: < 2^24
_START_BYTES: Final = 12
_LEAST_METADATA: Final = 256  # 14 columns take several hundred bytes
_RECORD_BATCH: Final = 3

_MOST_TAILS: Final = 1000
_MOST_DOUBTFUL: Final = 10_000
_BLOCK: Final = 2**22


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes that look like a chunk message.

    Attributes:
        offset: where they are.
        length: how many.
        digest: xxh3-128 of them.
        bounded: whether what follows is where a message, the end mark or the end of the file would be: otherwise
            damage may begin before their end.
    """

    offset: int
    length: int
    digest: bytes
    bounded: bool


@dataclass(frozen=True, slots=True)
class FoundTail:
    """A tail whose own digest is right.

    Attributes:
        tail: what it says.
        end: where it ends in the file.
        digest: its digest, in hexadecimal.
    """

    tail: Tail
    end: int
    digest: str

    @property
    def shift(self) -> int:
        """By how much what is before it was moved, where bytes came or went."""
        return self.end - self.tail.file_bytes

    @property
    def index_offset(self) -> int:
        """Where the index should start."""
        return self.tail.index_offset + self.shift

    @property
    def hashes_offset(self) -> int:
        """Where the id hashes should start."""
        return self.tail.hashes_offset + self.shift


def find_tail(data: memoryview, expected: str | None = None) -> FoundTail | None:
    """The tail: at the end of the file, or before what was appended to it.

    Args:
        data: the file.
        expected: digest that it must have.

    Raises:
        UnsupportedVersionError: the file ends with the tail of a later version.
    """
    last = deque((found.end() for found in re.finditer(re.escape(MAGIC), data)), maxlen=_MOST_TAILS)
    for end in dict.fromkeys((len(data), *reversed(last))):
        bytes_ = bytes(data[max(0, end - TAIL_BYTES) : end])
        if len(bytes_) < TAIL_BYTES:
            continue
        try:
            tail = read_tail(bytes_, struct.unpack_from("<Q", bytes_)[0])
        except CorruptDataError:
            continue
        except UnsupportedVersionError:
            if end == len(data):
                raise
            continue
        found = FoundTail(tail, end, bytes_[-24:-8].hex())
        if expected is None or found.digest == expected:
            return found
    return None


def find_index(data: memoryview, found: FoundTail) -> NDArray[Any] | None:
    """The index before a tail, where it is undamaged."""
    start, stop = found.index_offset, found.end - TAIL_BYTES
    if start < 0:
        return None
    try:
        return read_index(bytes(data[start:stop]), found.tail)
    except CorruptDataError:
        return None


def find_hashes(data: memoryview, found: FoundTail) -> NDArray[np.uint64] | None:
    """The id hashes before an index, where they are undamaged."""
    start, stop = found.hashes_offset, found.index_offset
    if start < 0 or digest(data[start:stop]) != found.tail.hashes_digest:
        return None
    return np.frombuffer(data[start:stop], HASH_DTYPE).copy()


def first_message(data: memoryview) -> bytes:
    """What should be the schema message at the start of a file; empty where that cannot be."""
    if len(data) < _PREFIX.size:
        return b""
    mark, length = _PREFIX.unpack_from(data)
    return bytes(data[: 8 + length]) if mark == -1 and 8 + length <= min(len(data), SCHEMA_BYTES) else b""


def find_messages(data: memoryview) -> Iterator[Message]:
    """Everything that looks like a chunk message, by rising offset; some may overlap.

    A message whose end is where another one begins is believed to end there. Otherwise the next one is searched for
    from its beginning on: it may be its length that is damaged.
    """
    size, place = len(data), 0
    doubtful, budget = 0, size + _BLOCK
    while (match := _START.search(data, place)) is not None:
        place = match.start()
        length = _message_bytes(data, place)
        if length is None or place + length > size:
            place += 1
            continue
        bounded = _is_boundary(data, place + length)
        if not bounded:
            doubtful, budget = doubtful + 1, budget - length
            if doubtful > _MOST_DOUBTFUL or budget < 0:
                place += 1
                continue
        yield Message(place, length, digest(data[place : place + length]), bounded)
        place += length if bounded else 1


def find_digests(data: memoryview, start: int, digests: set[bytes]) -> set[bytes]:
    """Those digests that stand anywhere from here on: in an index, whole or not."""
    return {found for _, found in _find(data, start, digests)}


def find_contradicted(data: memoryview, start: int, messages: Iterable[Message]) -> set[int]:
    """Offsets of those messages of which an entry of an index, from here on, says another digest.

    An entry counts where the one behind it follows: what is left of an index may end within a digest.
    """
    by_place = {_PLACE.pack(message.offset, message.length): message for message in messages}
    found: set[int] = set()
    for at, key in _find(data, start, set(by_place)):
        message = by_place[key]
        said, following = bytes(data[at + 32 : at + 48]), bytes(data[at + 48 : at + 56])
        if following == struct.pack("<Q", message.offset + message.length) and said != message.digest:
            found.add(message.offset)
    return found


def _find(data: memoryview, start: int, keys: set[bytes]) -> Iterator[tuple[int, bytes]]:
    """Where any of some keys of 16 bytes stands, from a place on."""
    if not keys:
        return
    halves = np.unique(np.frombuffer(b"".join(each[:8] for each in keys), "<u8"))
    for begin in range(start, len(data), _BLOCK):
        block = data[begin : begin + _BLOCK + 24]  # one may stand across the border of two blocks
        for shift in range(min(8, len(block))):
            values = np.frombuffer(block, "<u8", (len(block) - shift) // 8, shift)
            nearest = np.minimum(np.searchsorted(halves, values), len(halves) - 1)
            for place in np.flatnonzero(halves[nearest] == values).tolist():
                at = shift + 8 * place
                if (each := bytes(block[at : at + 16])) in keys:
                    yield begin + at, each


def _message_bytes(data: memoryview, place: int) -> int | None:
    """The length of a record-batch message by its own words; None where there is none."""
    metadata_bytes = _PREFIX.unpack_from(data, place)[1]
    metadata = data[place + 8 : place + 8 + metadata_bytes]
    if not _LEAST_METADATA <= metadata_bytes == len(metadata):
        return None
    try:
        root = struct.unpack_from("<I", metadata)[0]
        kind, body = _field(metadata, root, 1), _field(metadata, root, 3)
        if kind is None or metadata[kind] != _RECORD_BATCH or body is None:
            return None
        body_bytes = int(struct.unpack_from("<q", metadata, body)[0])
    except (struct.error, IndexError):
        return None
    length = 8 + metadata_bytes + body_bytes
    return length if body_bytes >= 0 and length <= MESSAGE_BYTES else None


def _field(metadata: memoryview, table: int, number: int) -> int | None:
    places = table - int(struct.unpack_from("<i", metadata, table)[0])
    if places < 0:
        return None
    size = struct.unpack_from("<H", metadata, places)[0]
    offset = struct.unpack_from("<H", metadata, places + 4 + 2 * number)[0] if 6 + 2 * number <= size else 0
    return table + int(offset) if offset else None


def _is_boundary(data: memoryview, place: int) -> bool:
    rest = bytes(data[place : place + _START_BYTES])
    if rest[: len(END_MARK)] == END_MARK or _START.match(rest) is not None:
        return True
    return len(rest) < _START_BYTES and rest[:4] == _MARK[: len(rest)]


class Stitched:
    """Bytes in memory as if they were one file: a shard of one chunk can be made of any message."""

    path = "-"
    mapped = True

    def __init__(self, parts: Sequence[pa.Buffer]) -> None:
        self._parts = list(parts)
        self._starts = [0, *accumulate(part.size for part in parts)]
        self.size = self._starts[-1]
        self.opening = self._parts[-1].size

    def read(self, offset: int, length: int, accept: Accept | None = None) -> pa.Buffer:  # noqa: ARG002
        """Bytes of one part."""
        number = min(bisect_right(self._starts, offset), len(self._parts)) - 1
        return self._parts[number].slice(offset - self._starts[number], length)

    def read_together(self, parts: Sequence[Part]) -> list[pa.Buffer]:
        """Bytes of several parts."""
        return [self.read(*part) for part in parts]


def shard_of(schema: bytes, message: pa.Buffer | None = None, sequences: int = 0, positions: int = 0) -> Shard:
    """A shard of one chunk or none, so that it is read under all checks of a shard.

    Args:
        schema: its schema message.
        message: its chunk.
        sequences: in it.
        positions: in it.

    Raises:
        CorruptDataError: the schema is none of a shard.
        UnsupportedVersionError: this release cannot read it.
    """
    entries = [] if message is None else [(len(schema), message.size, sequences, positions, 0, digest(message))]
    index = np.array(entries, INDEX_DTYPE).tobytes()
    hashes = bytes(HASH_DTYPE.itemsize * sequences)
    tail = Tail(0, len(schema), len(entries), sequences, positions, 0, digest(schema), digest(hashes), digest(index))
    rest = END_MARK + hashes + index
    parts = [pa.py_buffer(schema), *([] if message is None else [message])]
    size = sum(part.size for part in parts) + len(rest) + TAIL_BYTES
    return Shard(Stitched([*parts, pa.py_buffer(rest + write_tail(replace(tail, file_bytes=size)))]))


def parse_schema(schema: bytes) -> tuple[pa.Schema, ShardHeader]:
    """Arrow schema and header of a schema message.

    Raises:
        CorruptDataError: it is none of a shard.
        UnsupportedVersionError: this release cannot read it.
    """
    if not schema or first_message(memoryview(schema)) != schema:
        raise CorruptDataError("the schema message is damaged", code="shard-schema")
    shard = shard_of(schema)
    return shard.schema, shard.header


def parse_chunk(schema: bytes, message: pa.Buffer) -> Chunk:
    """A chunk by itself.

    Args:
        schema: the schema message of its shard.
        message: its own.

    Raises:
        CorruptDataError: it is none of this schema.
    """
    check_message(message)
    try:
        batch = pa.ipc.read_record_batch(message, pa.ipc.read_schema(pa.py_buffer(schema)))
        batch.validate(full=True)  # before it is touched: a forged message can crash Arrow
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise CorruptDataError(f"the chunk's message is no record batch: {error}", code="chunk-message") from error
    if batch.num_rows == 0 or batch.column(1).null_count:
        raise CorruptDataError("the chunk has no sequences, or null as a length", code="chunk-message")
    positions = int(np.sum(numbers(batch.column(1), np.dtype(np.uint32)), dtype=np.uint64))
    if batch.num_rows * HASH_DTYPE.itemsize > 64 * message.size or positions >= 2**32:
        raise CorruptDataError("the chunk has more sequences or positions than it can hold", code="chunk-counts")
    return shard_of(schema, message, batch.num_rows, positions).chunk(0)


def parse_ids(schema: bytes, message: pa.Buffer) -> list[str]:
    """The ids of a damaged chunk, which nothing vouches for; none where they cannot be read.

    Args:
        schema: the schema message of its shard.
        message: its own.
    """
    try:
        check_message(message)
        stream = pa.py_buffer(schema + message.to_pybytes())  # only so can Arrow be told to leave other columns alone
        with pa.ipc.open_stream(stream, options=pa.ipc.IpcReadOptions(included_fields=[0])) as reader:
            batch = reader.read_next_batch()
        batch.validate(full=True)
        return [str(each) for each in batch.column(0).to_pylist()]
    except (CorruptDataError, pa.ArrowException, OSError, EOFError, ValueError):
        return []
