"""Reading one shard: every byte is checked against its digest before a parser sees it (spec, "Reading")."""

from __future__ import annotations

import functools
from bisect import bisect_right
from itertools import accumulate
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.encoding.cells import can_decode
from logitstore.errors import CorruptDataError, UnsupportedVersionError
from logitstore.io import ByteSource
from logitstore.io.source import Part
from logitstore.schema.header import HEADER_KEY, ShardHeader, parse_header
from logitstore.shard.chunk import FORMAT_FIELDS, RESERVED_NAMES, Chunk, read_batch
from logitstore.shard.layout import (
    END_MARK,
    HASH_DTYPE,
    INDEX_DTYPE,
    TAIL_BYTES,
    digest,
    id_hash,
    read_index,
    read_tail,
)
from logitstore.shard.message import check_message, check_schema, own_metadata
from logitstore.shard.scalars import numbers
from logitstore.shard.usertypes import FREE_VALUES_PER_BYTE, can_be_stored, free_values

_SMALL_SCHEMA: Final = 4096  # whatever stands in so few bytes is at most some 100 MB when it is read


class Shard:
    """A shard whose tail, index and schema have been verified; chunks are verified when first touched.

    Args:
        source: its bytes.

    Raises:
        CorruptDataError: it is not a whole, undamaged shard.
        UnsupportedVersionError: this release cannot read it.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._verified: set[int] = set()
        try:
            self._open()
        except CorruptDataError as error:
            raise error.at(path=source.path) from error
        except UnsupportedVersionError as error:
            raise UnsupportedVersionError(f"{source.path}: {error}") from error

    def _open(self) -> None:
        size, length = self._source.size, self._source.opening
        end = self._source.read(size - length, length, lambda end: _ends_a_shard(end, size))
        self.tail = read_tail(end.slice(max(0, length - TAIL_BYTES)).to_pybytes(), size)
        self.tail_digest = end.slice(length - 24, 16).to_pybytes().hex()
        self._end = end
        index = self._read(self.tail.index_offset, self.tail.chunks * INDEX_DTYPE.itemsize, self.tail.index_digest)
        self.index = read_index(index.to_pybytes(), self.tail)
        self.starts = [0, *accumulate(self.index["sequences"].tolist())]
        self.schema, self.header = self._read_schema(self._read(0, self.tail.schema_bytes, self.tail.schema_digest))
        if length < size:
            self._end = pa.py_buffer(b"")  # only a shard that is in it as a whole is read from there further on

    def _read(self, offset: int, length: int, expected: bytes) -> pa.Buffer:
        """Bytes that should have this digest, which the caller still checks: from what was read first, or anew."""
        start = offset - (self._source.size - self._end.size)
        if 0 <= start <= self._end.size - length:
            part = self._end.slice(start, length)
            if self._source.mapped or digest(part) == expected:
                return part
        return self._source.read(offset, length, functools.partial(_has_digest, expected))

    def _read_schema(self, message: pa.Buffer) -> tuple[pa.Schema, ShardHeader]:
        if digest(message) != self.tail.schema_digest:
            raise CorruptDataError("the schema message's bytes do not have its digest", code="shard-schema", offset=0)
        if message.size > _SMALL_SCHEMA:
            check_schema(message)
        try:
            schema = pa.ipc.read_schema(message)
            _check_schema(schema)
        except CorruptDataError:
            raise
        except Exception as error:  # extension types that a program registered run code of their own
            raise CorruptDataError(f"the schema message is no Arrow schema: {error}", code="shard-schema") from error
        header = parse_header(schema.metadata[HEADER_KEY])
        if not can_decode(header.pco):
            raise UnsupportedVersionError(
                f"its cells are of pcodec format version {header.pco}, which the installed pcodec does not read; "
                f"install a later one"
            )
        return schema, header

    @property
    def path(self) -> str:
        """Its file, for messages."""
        return self._source.path

    @property
    def user_fields(self) -> list[pa.Field]:
        """The users' columns."""
        return [self.schema.field(number) for number in range(len(FORMAT_FIELDS), len(self.schema))]

    def __len__(self) -> int:
        """Number of sequences."""
        return self.tail.sequences

    def chunk(self, number: int, message: pa.Buffer | None = None) -> Chunk:
        """A chunk, verified against its digest when it is first touched.

        Args:
            number: which.
            message: its bytes, where they are at hand; see `messages`.

        Raises:
            CorruptDataError: its bytes are not what was written, or contradict the index.
        """
        try:
            return self._read_chunk(number, message)
        except CorruptDataError as error:
            raise error.at(path=self.path, chunk=number, offset=int(self.index["offset"][number])) from error

    def messages(self, first: int, last: int) -> list[pa.Buffer]:
        """The bytes of the chunks from `first` to `last`, for `chunk`."""
        if self._end.size:
            entries = self.index[first : last + 1]
            return [self._read(int(e["offset"]), int(e["length"]), e["digest"].tobytes()) for e in entries]
        parts: list[Part] = []
        for entry in self.index[first : last + 1]:
            expected = entry["digest"].tobytes()
            parts.append((int(entry["offset"]), int(entry["length"]), functools.partial(_has_digest, expected)))
        return self._source.read_together(parts)

    def _read_chunk(self, number: int, message: pa.Buffer | None) -> Chunk:
        entry = self.index[number]
        offset, length = int(entry["offset"]), int(entry["length"])
        verified = self._source.mapped and number in self._verified
        if message is None:
            message = self._read(offset, length, entry["digest"].tobytes())
        if not verified:
            if digest(message) != entry["digest"].tobytes():
                raise CorruptDataError("the chunk's bytes do not have the digest of the index", code="chunk-digest")
            check_message(message)
        try:
            batch = pa.ipc.read_record_batch(message, self.schema)
            if not verified:
                # A digest does not stop a forger, and a forged message can crash Arrow when it is touched before this.
                batch.validate(full=True)
        except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
            raise CorruptDataError(f"the chunk's message is no record batch: {error}", code="chunk-message") from error
        if not verified:
            _check_batch(batch, entry)
        chunk = read_batch(batch, own_metadata(message, HEADER_KEY), self.header)
        self._verified.add(number)
        return chunk

    def locate(self, row: int) -> tuple[int, int]:
        """(chunk, row in the chunk) of a row of the shard."""
        number = bisect_right(self.starts, row) - 1
        return number, row - self.starts[number]

    @functools.cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """xxh3-64 of every sequence id, verified.

        Raises:
            CorruptDataError: the bytes are not what was written.
        """
        length = self.tail.sequences * HASH_DTYPE.itemsize
        data = self._read(self.tail.hashes_offset, length, self.tail.hashes_digest)
        if digest(data) != self.tail.hashes_digest:
            raise CorruptDataError(
                "the id hashes' bytes do not have their digest",
                code="shard-hashes",
                path=self.path,
                offset=self.tail.hashes_offset,
            )
        return np.frombuffer(data, HASH_DTYPE)

    def find(self, sequence_id: str) -> int | None:
        """The row of a sequence, or None."""
        for row in np.flatnonzero(self.hashes == np.uint64(id_hash(sequence_id))):
            number, place = self.locate(int(row))
            if self.chunk(number).ids()[place] == sequence_id:
                return int(row)
        return None

    def check_end_mark(self) -> None:
        """Refuse a shard where foreign Arrow readers would not stop.

        Raises:
            CorruptDataError: the end mark is damaged.
        """
        if self._source.read(self.tail.chunks_end, len(END_MARK)).to_pybytes() != END_MARK:
            raise CorruptDataError(
                "Arrow's end mark is damaged",
                code="shard-end-mark",
                path=self.path,
                offset=self.tail.chunks_end,
            )


def _has_digest(expected: bytes, data: pa.Buffer) -> bool:
    return digest(data) == expected


def _ends_a_shard(end: pa.Buffer, size: int) -> bool:
    """Whether bytes end with an undamaged tail, and the index before it, where it is among them, is undamaged."""
    try:
        tail = read_tail(end.slice(max(0, end.size - TAIL_BYTES)).to_pybytes(), size)
    except UnsupportedVersionError:
        return True
    except CorruptDataError:
        return False
    start, length = tail.index_offset - (size - end.size), tail.chunks * INDEX_DTYPE.itemsize
    return start < 0 or digest(end.slice(start, length)) == tail.index_digest


def _check_schema(schema: pa.Schema) -> None:
    """Refuse a schema that is not a shard's; Arrow itself raises where names are not UTF-8."""
    names = schema.names
    if HEADER_KEY not in (schema.metadata or {}):
        raise CorruptDataError("the schema has no logitstore header", code="shard-schema")
    for number, expected in enumerate(FORMAT_FIELDS):
        if number >= len(schema) or schema.field(number) != expected:
            raise CorruptDataError(f"column {number} of the schema is not {expected}", code="shard-schema")
    if len(set(names)) != len(names):
        raise CorruptDataError("the schema names a column twice", code="shard-schema")
    for field in list(schema)[len(FORMAT_FIELDS) :]:
        if field.name in RESERVED_NAMES or not field.name or not can_be_stored(field.type):
            raise CorruptDataError(
                f"the user's column {field.name!r} ({field.type}) has a name or type that it cannot have",
                code="shard-schema",
            )


def _check_batch(batch: pa.RecordBatch, entry: Any) -> None:
    size = int(entry["length"])
    user = [batch.column(number) for number in range(len(FORMAT_FIELDS), batch.num_columns)]
    if sum(column.nbytes for column in user) > size:
        # Columns and their parts that share bytes, in a schema with many of them, would become gigabytes in Python.
        raise CorruptDataError("the buffers of the users' columns overlap", code="chunk-message")
    if sum(map(free_values, user)) > FREE_VALUES_PER_BYTE * size:
        raise CorruptDataError("the users' columns have more values of no bytes than is allowed", code="chunk-message")
    if batch.num_rows != int(entry["sequences"]):
        raise CorruptDataError("the chunk has another number of sequences than the index says", code="chunk-counts")
    if any(batch.column(number).null_count for number in range(len(FORMAT_FIELDS))):
        raise CorruptDataError("the chunk has a null in a column of the format", code="chunk-message")
    if int(np.sum(numbers(batch.column(1), np.dtype(np.uint32)), dtype=np.uint64)) != int(entry["positions"]):
        raise CorruptDataError("the chunk has another number of positions than the index says", code="chunk-counts")
