"""Writing one shard (spec, "Shard")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

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
    from types import TracebackType


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
    """Appends chunks to a shard under its temporary name; `finish` completes it and gives it its name."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self._file = DurableFile(path)
        self._index: list[tuple[Any, ...]] = []
        self._hashes: list[int] = []
        message = schema.serialize()
        self._schema_bytes = message.size
        self._schema_digest = digest(message)
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

    def write(self, sequences: list[StoredSequence], user: list[pa.Array]) -> None:
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
        self._index.append(
            (
                self._file.size,
                message.size,
                len(sequences),
                sum(len(s.tokens) for s in sequences),
                sum(len(s.ids) for s in sequences),
                digest(message),
            )
        )
        self._hashes += [id_hash(s.id) for s in sequences]
        self._file.write(message)

    def sync_if_due(self) -> None:
        """Sync chunks that were written but not synced for too long."""
        self._file.sync_if_due()

    def finish(self) -> WrittenShard:
        """Write end mark, id hashes, index and tail, and publish the file."""
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
        self._file.publish()
        return WrittenShard(
            path=self.path,
            bytes=self._file.size,
            sha256=self._file.sha256,
            tail_digest=end[-24:-8].hex(),
            sequences=tail.sequences,
            positions=tail.positions,
            candidates=tail.candidates,
        )

    def close(self) -> None:
        """Close without finishing: what was written stays under the temporary name."""
        self._file.close()
