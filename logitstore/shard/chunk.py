"""A chunk: some sequences as one Arrow record-batch message, and back (spec, "Chunk messages")."""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from msgspec import json
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.encoding.cells import CellDecoder, encode_cell
from logitstore.encoding.codes import encode_ids, token_order
from logitstore.encoding.decode import decode_ids, id_table
from logitstore.encoding.values import (
    CELL_TYPES,
    Encoding,
    Values,
    by_draws,
    decode_draw_codes,
    decode_draws,
    decode_logits,
    decode_values,
    encode_draws,
    encode_values,
)
from logitstore.errors import CorruptDataError
from logitstore.limits import (
    ID_LIMIT,
    SEQUENCE_CANDIDATES,
    SEQUENCE_POSITIONS,
    TAIL_STEPS,
    UNBACKED_VALUES,
)
from logitstore.schema.header import HEADER_KEY, ChunkInfo, ShardHeader, parse_chunk_info
from logitstore.shard import bounds
from logitstore.shard.encoded import EncodedSequence, relative_codes, shifts, signed
from logitstore.shard.scalars import as_python, numbers
from logitstore.shard.sequence import Sequence

_TABLE_LIMIT: Final = 2**20  # above this width, a table of ids takes more memory than a chunk

_U16: Final = np.dtype(np.uint16)
_U32: Final = np.dtype(np.uint32)
_F32: Final = np.dtype(np.float32)

OPTIONAL_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "tail": _U16,
    "target_logprob": _F32,
    "target_rank": _U32,
    "logsumexp": _F32,
    "entropy": _F32,
    "loss_mask": _U16,
}
"""The optional cells and the types of their values: one a position, or an empty cell."""

NO_TAIL: Final = 0xFFFF
ZERO_TAIL: Final = 0xFFFE
UNKNOWN_RANK: Final = 0xFFFFFFFF
UNKNOWN_MASK: Final = 0xFFFF

_CELLS: Final = ("tokens", "count", "ids", "top", "gaps", *OPTIONAL_TYPES)

FORMAT_FIELDS: Final = (
    pa.field("id", pa.utf8(), nullable=False),
    pa.field("length", pa.uint32(), nullable=False),
    pa.field("encoding", pa.uint8(), nullable=False),
    *(pa.field(name, pa.binary(), nullable=False) for name in _CELLS),
)
"""The columns that every shard begins with; the user's follow."""

FORMAT_NAMES: Final = [f.name for f in FORMAT_FIELDS]

RESERVED_NAMES: Final = frozenset(FORMAT_NAMES) | {
    "logprobs",
    "draws",
    "logits",
    "offsets",
    "columns",
}
"""Names that a user's column cannot have."""


@dataclass(frozen=True, slots=True)
class StoredSequence:
    """A sequence ready to be written: checked, in order, cut, its values encoded.

    Attributes:
        id: its id.
        tokens: uint32 [T].
        count: uint32 [T].
        ids: uint32 [N], best first at each position; under `draws` in any order.
        values: encoded values; under `draws`, `gaps` are the draws [N] in the order of `ids`, and `top` is empty.
        optional: cells by name, `OPTIONAL_TYPES` [T], as they are stored.
        columns: the user's columns.
    """

    id: str
    tokens: NDArray[np.uint32]
    count: NDArray[np.uint32]
    ids: NDArray[np.uint32]
    values: Values
    optional: dict[str, NDArray[Any]] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)


def encode_tail(tail: NDArray[np.float64]) -> NDArray[np.uint16]:
    """round(-32 tail); the last value where there is none (NaN), the one before it where it is log 0."""
    with np.errstate(invalid="ignore"):
        steps = np.minimum(np.maximum(np.rint(tail * -TAIL_STEPS), 0), ZERO_TAIL - 1)
    steps[np.isneginf(tail)] = ZERO_TAIL
    steps[np.isnan(tail)] = NO_TAIL
    return steps.astype(np.uint16)


def decode_tail(steps: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The inverse of `encode_tail`, nats."""
    tail = steps.astype(np.float32) * np.float32(-1 / TAIL_STEPS)
    tail[steps == ZERO_TAIL] = -np.inf
    tail[steps == NO_TAIL] = np.nan
    return tail


def shard_schema(header: bytes, user_fields: list[pa.Field]) -> pa.Schema:
    """The Arrow schema of a shard, the header in its metadata."""
    return pa.schema([*FORMAT_FIELDS, *user_fields], metadata={HEADER_KEY: header})


def encode_chunk(sequences: list[StoredSequence], schema: pa.Schema, user: list[pa.Array]) -> pa.Buffer:
    """One chunk message.

    Args:
        sequences: what the chunk holds, at least one.
        schema: the shard's.
        user: the users' columns as arrays, in the order of the schema.

    Returns:
        The encapsulated message's bytes.

    Raises:
        InvalidInputError: readers would refuse it: too many values in too few bytes.
    """
    parts = [array for s in sequences for array in (s.ids, s.tokens)]
    ids = np.concatenate(parts, dtype=np.intp)
    order = token_order(ids)
    codes = np.split(encode_ids(ids, order), np.cumsum([len(part) for part in parts])[:-1])
    rows = [_encode_row(*each) for each in zip(sequences, codes[::2], codes[1::2], strict=True)]
    arrays = [
        pa.array([s.id for s in sequences], pa.utf8()),
        pa.array([len(s.tokens) for s in sequences], pa.uint32()),
        pa.array([int(s.values.encoding) for s in sequences], pa.uint8()),
        *(pa.array([row[name] for row in rows], pa.binary()) for name in _CELLS),
        *user,
    ]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    info = ChunkInfo(order=base64.b64encode(encode_cell(order)).decode(), order_length=len(order))
    metadata = json.encode(info)
    prefix = schema.serialize().size
    # Room for everything at once: a growing stream copies what it has again and again.
    buffer = pa.allocate_buffer(prefix + pa.ipc.get_record_batch_size(batch) + len(metadata) + 1024)
    sink = pa.FixedSizeBufferWriter(buffer)
    # Every writer begins with the schema message; only what follows it is the chunk.
    pa.ipc.new_stream(sink, schema).write_batch(batch, custom_metadata={HEADER_KEY: metadata})
    message = buffer.slice(prefix, sink.tell() - prefix)
    positions, candidates = sum(len(s.tokens) for s in sequences), sum(len(s.ids) for s in sequences)
    what = f"{len(sequences)} sequences from {sequences[0].id!r} on"
    bounds.check_message(what, positions, candidates, message.size, user)
    return message


def _encode_row(sequence: StoredSequence, ids: NDArray[np.uint32], tokens: NDArray[np.uint32]) -> dict[str, bytes]:
    top, gaps = sequence.values.top, sequence.values.gaps
    if sequence.values.encoding is Encoding.DRAWS:
        ids, top, gaps = encode_draws(ids, gaps, sequence.count)
    cells = {
        "tokens": tokens,
        "count": sequence.count,
        "ids": ids,
        "top": top,
        "gaps": gaps,
        **sequence.optional,
    }
    row = {name: encode_cell(cells[name]) if name in cells else b"" for name in _CELLS}
    bounds.check_row(sequence.id, len(tokens), len(ids), row)
    return row


class Chunk:
    """A chunk that was read and verified: sequences are decoded one by one, on request."""

    def __init__(self, batch: pa.RecordBatch, info: ChunkInfo, header: ShardHeader) -> None:
        self.batch = batch
        self.header = header
        self.order = _decode_order(info, header)
        self.lengths: NDArray[np.uint32] = numbers(batch.column(1), _U32)
        self.encodings: NDArray[np.uint8] = numbers(batch.column(2), np.dtype(np.uint8))
        self.cells = {name: batch.column(FORMAT_NAMES.index(name)) for name in _CELLS}
        self.user_names: list[str] = batch.schema.names[len(FORMAT_FIELDS) :]

    @functools.cached_property
    def order_is_below_the_width(self) -> bool:
        """Whether every id of the order can be a candidate's: it holds tokens too, which may be above the width."""
        return len(self.order) == 0 or int(self.order.max()) < self.id_limit

    @property
    def id_limit(self) -> int:
        """Ids of candidates are below this."""
        return self.header.logit_width or ID_LIMIT

    def __len__(self) -> int:
        """Number of sequences."""
        return int(self.batch.num_rows)

    def ids(self) -> list[str]:
        """The ids of its sequences."""
        return [str(value) for value in self.batch.column(0).to_pylist()]

    def bytes_by_column(self) -> dict[str, int]:
        """Bytes of the values of each column, the users' too: cells as they are stored."""
        names: list[str] = self.batch.schema.names
        return {name: _value_bytes(self.batch.column(number)) for number, name in enumerate(names)}

    def sequences(self, columns: frozenset[str]) -> Iterator[Sequence]:
        """All of its sequences in order."""
        for row in range(len(self)):
            yield self.sequence(row, columns)

    def encoding(self, row: int) -> Encoding:
        """The encoding of a sequence.

        Raises:
            CorruptDataError: an unknown one.
        """
        try:
            return Encoding(int(self.encodings[row]))
        except ValueError:
            raise CorruptDataError(f"the encoding {self.encodings[row]} does not exist", code="cell", row=row) from None

    def sequence(self, row: int, columns: frozenset[str], *, encoded: bool = False) -> Sequence:
        """One sequence with these columns (`SEQUENCE_COLUMNS` and users').

        Args:
            row: its row in the chunk.
            columns: what to decode.
            encoded: give an `EncodedSequence`; its candidates are there whatever the columns.

        Raises:
            CorruptDataError: its cells contradict each other.
        """
        try:
            # Forged numbers may be infinite or NaN; they are for `validate` to report, not for numpy.
            with np.errstate(all="ignore"):
                reader = _Row(self, row)
                return reader.encoded(columns) if encoded else reader.decode(columns)
        except CorruptDataError as error:
            raise error.at(row=row) from error


class _Row:
    """The decoding of one row: every number of values is known before the cell that holds them is touched."""

    def __init__(self, chunk: Chunk, row: int) -> None:
        self.chunk = chunk
        self.row = row
        self.decoder = CellDecoder(chunk.header.pco)
        self.encoding = chunk.encoding(row)
        self.length = int(chunk.lengths[row])
        if self.length > UNBACKED_VALUES:
            self.check_number(self.length, "positions", SEQUENCE_POSITIONS)

    def check_number(self, n: int, what: str, limit: int) -> None:
        """Refuse what so few bytes cannot stand for, before memory is taken on their word."""
        bounds.check_number(n, what, limit, sum(len(self.bytes(name)) for name in _CELLS))

    def cell(self, name: str, n: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        return self.decoder.decode(self.bytes(name), n, dtype)

    def bytes(self, name: str) -> bytes:
        cell: bytes = self.chunk.cells[name][self.row].as_py()
        return cell

    def optional(self, name: str) -> NDArray[Any] | None:
        if not self.bytes(name):
            return None
        return self.cell(name, self.length, OPTIONAL_TYPES[name])

    def decode(self, columns: frozenset[str]) -> Sequence:
        fields = self.plain(columns)
        if columns & {"count", "ids", "logprobs", "draws", "logits"}:
            fields |= self.candidates(columns)
        return Sequence.of(fields)

    def encoded(self, columns: frozenset[str]) -> EncodedSequence:
        if self.encoding is Encoding.DRAWS:
            candidates = self.candidates(frozenset(["ids", "logprobs", "draws"]))
            codes, logprobs = candidates.pop("ids"), candidates.pop("logprobs")
            values = encode_values(logprobs, candidates["count"], "float32", self.chunk.header.resolution)
            encoding, top, gaps = values.encoding, values.top, values.gaps
        else:
            candidates = self.counts()
            encoding, total = self.encoding, int(candidates["offsets"][-1])
            codes = self.encoded_ids(total)
            top, gaps = self.steps(candidates["count"], total)
            candidates["draws"] = None
        bfloat16 = encoding is Encoding.BFLOAT16
        shift = shifts(self.optional("logsumexp"), candidates["count"]) if bfloat16 else np.empty(0, np.float32)
        fields = {
            "encoding": encoding,
            "resolution": self.chunk.header.resolution,
            "order": self.chunk.order.view(np.int32),
            "codes": codes,
            "top": signed(top),
            "gaps": signed(gaps),
            "shift": shift,
        }
        return EncodedSequence.of(self.plain(columns) | candidates | fields)

    def plain(self, columns: frozenset[str]) -> dict[str, Any]:
        """Everything but the candidates."""
        fields: dict[str, Any] = {
            "id": self.chunk.batch.column(0)[self.row].as_py(),
            "normalised": self.chunk.header.normalised,
        }
        if "tokens" in columns:
            tokens = decode_ids(self.cell("tokens", self.length, _U32), self.chunk.order)
            fields["tokens"] = self.checked("tokens", tokens, ID_LIMIT)
        for name in OPTIONAL_TYPES:
            if name in columns:
                fields[name] = _DECODE_OPTIONAL[name](self.optional(name), self.length)
        names = self.chunk.user_names
        if user := [name for name in names if name in columns]:
            fields["columns"] = {name: as_python(self.chunk.batch.column(name)[self.row]) for name in user}
        elif not names:
            fields["columns"] = {}
        return fields

    def encoded_ids(self, total: int) -> NDArray[np.int32]:
        codes, limit = self.cell("ids", total, _U32), self.chunk.id_limit
        if not self.chunk.order_is_below_the_width:
            self.checked("ids", decode_ids(codes, self.chunk.order), limit)
        return relative_codes(codes, len(self.chunk.order), limit)

    def candidate_ids(self, codes: NDArray[np.uint32]) -> NDArray[np.int32]:
        limit = self.chunk.id_limit
        if limit > _TABLE_LIMIT:
            return self.checked("ids", decode_ids(codes, self.chunk.order), limit).view(np.int32)
        try:
            ids = id_table(self.chunk.order, limit).take(codes)
        except IndexError:
            raise CorruptDataError(f"a candidate's id is not below the logit width {limit}", code="id-range") from None
        if not self.chunk.order_is_below_the_width:
            self.checked("ids", ids.view(np.uint32), limit)
        return ids

    @staticmethod
    def checked(name: str, ids: NDArray[np.uint32], limit: int) -> NDArray[np.uint32]:
        if len(ids) and int(ids.max()) >= limit:
            raise CorruptDataError(f"the column {name} holds the id {int(ids.max())}, limit {limit}", code="id-range")
        return ids

    def counts(self) -> dict[str, Any]:
        count = self.cell("count", self.length, _U32)
        offsets = ragged.offsets(count)
        if (total := int(offsets[-1])) > UNBACKED_VALUES:
            self.check_number(total, "candidates", SEQUENCE_CANDIDATES)
        return {"count": count, "offsets": offsets}

    def candidates(self, columns: frozenset[str]) -> dict[str, Any]:
        fields = self.counts()
        count, total = fields["count"], int(fields["offsets"][-1])
        sampled = self.encoding is Encoding.DRAWS
        if columns & {"ids"} or (sampled and columns & {"logprobs", "draws"}):
            codes = self.cell("ids", total, _U32)
            codes = decode_draw_codes(codes, count) if sampled else codes
            fields["ids"] = self.candidate_ids(codes)
        if sampled:
            fields |= self.draws(fields, total)
        elif columns & {"logprobs", "draws", "logits"}:
            fields |= self.values(count, total, columns)
        return {name: value for name, value in fields.items() if name in columns or name in ("count", "offsets")}

    def draws(self, fields: dict[str, Any], total: int) -> dict[str, Any]:
        if "ids" not in fields:
            return {"logits": None}
        count = fields["count"]
        top, gaps = self.steps(count, total)
        draws = decode_draws(top, gaps, count)
        place = by_draws(fields["ids"], draws, count)
        draws = draws[place]
        return {
            "ids": fields["ids"][place],
            "draws": draws.astype(np.int32),
            "logprobs": np.log(draws / ragged.spread(top, count[count > 0])).astype(np.float32),
            "logits": None,
        }

    def steps(self, count: NDArray[np.uint32], total: int) -> tuple[NDArray[Any], NDArray[Any]]:
        present = int(np.count_nonzero(count))
        top_type, gap_type = CELL_TYPES[self.encoding]
        return self.cell("top", present, top_type), self.cell("gaps", total - present, gap_type)

    def values(self, count: NDArray[np.uint32], total: int, columns: frozenset[str]) -> dict[str, Any]:
        top, gaps = self.steps(count, total)
        fields: dict[str, Any] = {"draws": None}
        if "logprobs" in columns:
            logsumexp = self.optional("logsumexp") if self.encoding is Encoding.BFLOAT16 else None
            resolution = self.chunk.header.resolution
            fields["logprobs"] = decode_values(self.encoding, top, gaps, count, resolution, logsumexp)
        if "logits" in columns:
            bfloat16 = self.encoding is Encoding.BFLOAT16
            fields["logits"] = decode_logits(top, gaps, count) if bfloat16 else None
        return fields


def _value_bytes(column: pa.Array) -> int:
    if not pa.types.is_binary(column.type):
        return int(column.nbytes)
    ends = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, 4 * column.offset)
    return int(ends[-1]) - int(ends[0])


def _decode_tails(steps: NDArray[Any] | None, length: int) -> NDArray[np.float32]:
    return np.full(length, np.nan, np.float32) if steps is None else decode_tail(steps)


def _decode_ranks(ranks: NDArray[Any] | None, _length: int) -> NDArray[np.int64] | None:
    if ranks is None:
        return None
    if not ranks.all():
        raise CorruptDataError("target_rank holds 0; ranks are from 1", code="cell")
    return np.where(ranks == UNKNOWN_RANK, 0, ranks.astype(np.int64))


def _decode_mask(mask: NDArray[Any] | None, _length: int) -> NDArray[np.int8] | None:
    if mask is None:
        return None
    if not np.isin(mask, (0, 1, UNKNOWN_MASK)).all():
        raise CorruptDataError("loss_mask holds a value other than 0, 1 and unknown", code="cell")
    return mask.astype(np.int8)  # 65535 becomes -1


def _as_stored(values: NDArray[Any] | None, _length: int) -> NDArray[Any] | None:
    return values


_DECODE_OPTIONAL: Final = {
    "tail": _decode_tails,
    "target_logprob": _as_stored,
    "target_rank": _decode_ranks,
    "logsumexp": _as_stored,
    "entropy": _as_stored,
    "loss_mask": _decode_mask,
}


def _decode_order(info: ChunkInfo, header: ShardHeader) -> NDArray[np.uint32]:
    try:
        cell = base64.b64decode(info.order, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CorruptDataError("the token order is not base64", code="order") from error
    return CellDecoder(header.pco).decode(cell, info.order_length, _U32)


def read_batch(batch: pa.RecordBatch, metadata: bytes | None, header: ShardHeader) -> Chunk:
    """A chunk from its parsed message.

    Args:
        batch: what the message holds.
        metadata: its own metadata under `HEADER_KEY`.
        header: of the shard.

    Raises:
        CorruptDataError: its metadata are missing or wrong.
    """
    if metadata is None:
        raise CorruptDataError("the chunk's message has no metadata", code="chunk-metadata")
    return Chunk(batch, parse_chunk_info(metadata), header)
