"""Index and tail of a shard (spec, "Index" and "Tail"): fixed records, little-endian.

```
schema message | chunk messages | end mark | id hashes | index | tail
```
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from logitstore.errors import CorruptDataError
from logitstore.limits import MESSAGE_BYTES, SCHEMA_BYTES, UNBACKED_VALUES, most_chunk_values
from logitstore.schema.version import FORMAT_VERSION, FormatVersion, check_version

MAGIC: Final = b"\x89LOGITS\n"
"""Last 8 bytes of every shard. The high bit and the line feed show what text transfers would damage."""

END_MARK: Final = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Arrow's end of stream: every stream reader stops here."""

INDEX_DTYPE: Final = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u8"),
        ("sequences", "<u4"),
        ("positions", "<u4"),
        ("candidates", "<u8"),
        ("digest", "V16"),
    ]
)
"""One chunk: where its message is, what it holds, and the xxh3-128 of the message's bytes."""

HASH_DTYPE: Final = np.dtype("<u8")

_TAIL: Final = struct.Struct("<6Q16s16s16sIHH")
_SEAL: Final = struct.Struct("<16s8s")  # the tail's own digest and the magic: their place and rule never change
TAIL_BYTES: Final = _TAIL.size + _SEAL.size
_VERSION: Final = struct.Struct("<IHH")  # ends the part that the tail's digest covers, in every version


def digest(data: Any) -> bytes:
    """xxh3-128, 16 bytes, big-endian as xxHash's canonical form is."""
    return xxhash.xxh3_128_digest(memoryview(data))


def id_hash(sequence_id: str) -> int:
    """xxh3-64 of an id's UTF-8 bytes."""
    return xxhash.xxh3_64_intdigest(sequence_id.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class Tail:
    """The last 128 bytes of a shard.

    Attributes:
        file_bytes: size of the whole file.
        schema_bytes: length of the schema message, which starts the file.
        chunks: number of chunks.
        sequences: number of sequences.
        positions: number of positions.
        candidates: number of candidates.
        schema_digest: xxh3-128 of the schema message.
        hashes_digest: xxh3-128 of the id hashes.
        index_digest: xxh3-128 of the index.
        version: format version of the file.
    """

    file_bytes: int
    schema_bytes: int
    chunks: int
    sequences: int
    positions: int
    candidates: int
    schema_digest: bytes
    hashes_digest: bytes
    index_digest: bytes
    version: FormatVersion = FORMAT_VERSION

    @property
    def index_offset(self) -> int:
        """Where the index starts."""
        return self.file_bytes - TAIL_BYTES - self.chunks * INDEX_DTYPE.itemsize

    @property
    def hashes_offset(self) -> int:
        """Where the id hashes start."""
        return self.index_offset - self.sequences * HASH_DTYPE.itemsize

    @property
    def chunks_end(self) -> int:
        """Where the last chunk message ends and the end mark starts."""
        return self.hashes_offset - len(END_MARK)


def write_tail(tail: Tail) -> bytes:
    """The tail's 128 bytes."""
    body = _TAIL.pack(
        tail.file_bytes,
        tail.schema_bytes,
        tail.chunks,
        tail.sequences,
        tail.positions,
        tail.candidates,
        tail.schema_digest,
        tail.hashes_digest,
        tail.index_digest,
        TAIL_BYTES,
        tail.version.major,
        tail.version.minor,
    )
    return body + _SEAL.pack(digest(body), MAGIC)


def read_tail(end: bytes, file_bytes: int) -> Tail:
    """The inverse of `write_tail`.

    Args:
        end: the last bytes of the file, 128 or more, or all of them.
        file_bytes: the file's size.

    Raises:
        CorruptDataError: magic, digest or numbers are wrong.
        UnsupportedVersionError: this release does not read this version.
    """
    smallest = _VERSION.size + _SEAL.size
    if len(end) < smallest or end[-len(MAGIC) :] != MAGIC:
        raise CorruptDataError("the file does not end with a shard's magic: cut off, or no shard", code="shard-tail")
    found, _ = _SEAL.unpack(end[-_SEAL.size :])
    length, major, minor = _VERSION.unpack(end[-smallest : -_SEAL.size])
    if not smallest <= length <= len(end) or digest(end[-length : -_SEAL.size]) != found:
        raise CorruptDataError("the tail's bytes do not have its digest", code="shard-tail")
    version = FormatVersion(major, minor)
    check_version(version)
    if length != TAIL_BYTES:
        raise CorruptDataError(f"a tail of {length} bytes, not {TAIL_BYTES}", code="shard-tail")
    fields = _TAIL.unpack(end[-TAIL_BYTES : -_SEAL.size])
    tail = replace(Tail(*fields[:9]), version=version)
    _check_tail(tail, file_bytes)
    return tail


def _check_tail(tail: Tail, file_bytes: int) -> None:
    if tail.file_bytes != file_bytes:
        raise CorruptDataError(
            f"the file has {file_bytes} bytes where its tail says {tail.file_bytes}", code="shard-size"
        )
    # Counts first: a corrupt one must not make the offsets computed from it meaningless.
    room = file_bytes - TAIL_BYTES - len(END_MARK)
    taken = tail.schema_bytes + tail.chunks * INDEX_DTYPE.itemsize + tail.sequences * HASH_DTYPE.itemsize
    if not 0 < tail.schema_bytes <= SCHEMA_BYTES or taken > room:
        raise CorruptDataError("the tail's lengths do not fit the file", code="shard-tail")
    if (tail.chunks == 0) != (tail.schema_bytes == tail.chunks_end):
        raise CorruptDataError("the tail's number of chunks does not fit the file", code="shard-tail")


def read_index(data: bytes, tail: Tail) -> NDArray[Any]:
    """The index records, checked against the tail and against each other.

    Args:
        data: the index's bytes.
        tail: the shard's tail.

    Returns:
        `INDEX_DTYPE` [chunks].

    Raises:
        CorruptDataError: digest, order or sums are wrong.
    """
    if digest(data) != tail.index_digest:
        raise CorruptDataError("the index's bytes do not have its digest", code="shard-index")
    index = np.frombuffer(data, INDEX_DTYPE)
    lengths = index["length"]
    if len(index) and (int(lengths.max()) > MESSAGE_BYTES or int(lengths.min()) == 0):
        raise CorruptDataError("the index has a chunk of an impossible length", code="shard-index")
    ends = tail.schema_bytes + np.cumsum(lengths, dtype=np.uint64)
    starts = np.concatenate([np.array([tail.schema_bytes], np.uint64), ends[:-1]])[: len(index)]
    last = int(ends[-1]) if len(index) else tail.schema_bytes
    if not np.array_equal(index["offset"], starts) or last != tail.chunks_end:
        raise CorruptDataError("the index's chunks do not follow one another to the end mark", code="shard-index")
    for field in ("sequences", "positions", "candidates"):
        # Values below 2^40 cannot overflow the sum of chunks that fit a file.
        if len(index) and int(index[field].max()) >= 2**40:
            raise CorruptDataError(f"the index has a chunk of too many {field}", code="shard-index")
        if int(index[field].sum(dtype=np.uint64)) != getattr(tail, field):
            raise CorruptDataError(f"the index's {field} do not sum to the tail's", code="shard-index")
    for entry in index[np.maximum(index["positions"], index["candidates"]) > UNBACKED_VALUES]:
        if max(int(entry["positions"]), int(entry["candidates"])) > most_chunk_values(int(entry["length"])):
            raise CorruptDataError("the index has a chunk of more values than its bytes can hold", code="shard-index")
    if len(index) and int(index["sequences"].min()) == 0:
        raise CorruptDataError("the index has a chunk without sequences", code="shard-index")
    return index
