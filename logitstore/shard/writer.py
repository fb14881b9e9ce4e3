"""Writing one shard (spec, "Shard")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa

from logitstore.errors import InvalidInputError
from logitstore.io import DurableFile
from logitstore.limits import MESSAGE_BYTES
from logitstore.shard.chunk import StoredSequence, encode_chunk
from logitstore.shard.layout import (
    END_MARK,
    HASH_DTYPE,
    INDEX_DTYPE,
    TAIL_BYTES,
    Tail,
    digest,
    id_hash,
    write_tail,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType


ChunkEntry = tuple[int, int, int, int, int, bytes]
"""Of the index: offset, length, sequences, positions, candidates, digest."""


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What the manifest says of a shard: size in bytes, digests, sums."""

    path: Path
    bytes: int
    sha256: str
    tail_digest: str
    sequences: int
    positions: int
    candidates: int


class ShardWriter:
    """Appends chunks to a shard under its temporary name; `seal` completes it, and `publish` gives it its name.

    Args:
        path: the name that it will have.
        schema: of the shard.
        index: entries of chunks that are in the temporary file already; what is behind them is cut off.
        hashes: of the ids in these chunks.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        index: Iterable[ChunkEntry] = (),
        hashes: Iterable[int] = (),
    ) -> None:
        self.path = path
        self.schema = schema
        self._index = list(index)
        self._hashes = list(hashes)
        message = schema.serialize()
        self._schema_bytes = message.size
        self._schema_digest = digest(message)
        self._file = DurableFile(path, self._index[-1][0] + self._index[-1][1] if self._index else None)
        if not self._index:
            self._file.write(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return self._file.size

    @property
    def sync_is_due(self) -> bool:
        """Whether too much was written, or too long ago, that was not synced."""
        return self._file.sync_is_due

    def write(self, sequences: list[StoredSequence], user: list[pa.Array]) -> ChunkEntry:
        """Append one chunk.

        Raises:
            InvalidInputError: the message would be larger than the limit.
        """
        message = encode_chunk(sequences, self.schema, user)
        if message.size > MESSAGE_BYTES:
            raise InvalidInputError(
                f"{len(sequences)} sequences from {sequences[0].id!r} on make a chunk of {message.size} bytes, over "
                f"the limit of {MESSAGE_BYTES}: their own columns are too large; store those elsewhere"
            )
        positions, candidates = sum(len(s.tokens) for s in sequences), sum(len(s.ids) for s in sequences)
        return self.append(message, positions, candidates, [id_hash(s.id) for s in sequences])

    def append(self, message: pa.Buffer, positions: int, candidates: int, hashes: Sequence[int]) -> ChunkEntry:
        """Append the message of a chunk as it is.

        Args:
            message: it is of this shard's schema.
            positions: in it.
            candidates: in it.
            hashes: of the ids of its sequences.
        """
        entry = (self._file.size, message.size, len(hashes), positions, candidates, digest(message))
        self._file.write(message)
        self._index.append(entry)
        self._hashes += hashes
        return entry

    def sync(self) -> None:
        """Make all chunks so far durable."""
        self._file.sync()

    def seal(self) -> WrittenShard:
        """Write end mark, id hashes, index and tail, and sync: the shard is complete but for its name."""
        index = np.array(self._index, INDEX_DTYPE)
        hashes = np.array(self._hashes, HASH_DTYPE).tobytes()
        tail = Tail(
            file_bytes=0,
            schema_bytes=self._schema_bytes,
            chunks=len(index),
            sequences=int(index["sequences"].sum(dtype=np.uint64)),
            positions=int(index["positions"].sum(dtype=np.uint64)),
            candidates=int(index["candidates"].sum(dtype=np.uint64)),
            schema_digest=self._schema_digest,
            hashes_digest=digest(hashes),
            index_digest=digest(index.tobytes()),
        )
        rest = END_MARK + hashes + index.tobytes()
        tail = replace(tail, file_bytes=self._file.size + len(rest) + TAIL_BYTES)
        end = write_tail(tail)
        self._file.write(rest + end)
        self._file.sync()
        return WrittenShard(
            path=self.path,
            bytes=self._file.size,
            sha256=self._file.sha256,
            tail_digest=end[-24:-8].hex(),
            sequences=tail.sequences,
            positions=tail.positions,
            candidates=tail.candidates,
        )

    def publish(self) -> None:
        """Give the sealed shard its name."""
        self._file.publish()

    def close(self) -> None:
        """Close without finishing: what was written stays under the temporary name."""
        self._file.close()
