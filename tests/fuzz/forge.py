"""A forger of shards: takes them apart, changes anything in them, and gives them digests that are right again."""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa

from logitstore.shard.chunk import FORMAT_FIELDS
from logitstore.shard.layout import END_MARK, HASH_DTYPE, INDEX_DTYPE, TAIL_BYTES, digest, read_tail

KEY = b"logitstore"
BROKEN = (
    pa.ArrowException,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    EOFError,
)
"""What a part that was changed before may end in when it is to be changed again."""

COUNTS = ("sequences", "positions", "candidates")
CELLS = range(3, len(FORMAT_FIELDS))
NUMBERS = sorted({0, 1, 2, 3, 7, 8, 9, 16, 100, 255, 256, 4096, 4097, 65535, 2**16, 2**20, 2**20 + 1, 2**24, 2**24 + 1}
                 | {2**n + d for n in (31, 32, 40, 53, 62, 63, 64) for d in (-1, 0)} - {2**64})  # fmt: skip
TEXTS = [b"", b"null", b"NaN", b"1e999", b"-1", b"9" * 400, b"1.5", b"true", b'"\\ud800"', b"[" * 2000, b'{"a":' * 1500, b"\xff", b"\x00", b'"4.1"', b'"9.9"', b'"255.255"', b'"2.0"', b"[]", b"{}", b'"' + b"A" * 300 + b'"']  # fmt: skip


def change_bytes(random, data: bytes, times: int = 0) -> bytes:
    """Some bytes changed, put in, left out or repeated."""
    out = bytearray(data)
    for _ in range(times or int(random.choice([1, 1, 1, 2, 4, 16]))):
        if not out:
            return bytes(out)
        at, kind = int(random.integers(len(out))), int(random.integers(10))
        if kind < 3:
            out[at] ^= 1 << int(random.integers(8))
        elif kind < 5:
            out[at] = int(random.choice([0, 1, 2, 4, 8, 127, 128, 254, 255, int(random.integers(256))]))
        elif kind < 8:  # a number, where numbers are
            size = int(random.choice([2, 4, 8]))
            at = at // size * size
            number = NUMBERS[int(random.integers(len(NUMBERS)))] % 2 ** (8 * size)
            out[at : at + size] = number.to_bytes(size, "little")[: len(out) - at]
        elif kind == 8:
            length = int(random.choice([1, 4, 8, 64]))
            other = int(random.integers(len(out)))
            out[at : at + length] = out[other : other + length]
        else:
            del out[at : at + int(random.choice([1, 2, 4, 8]))]
    return bytes(out)


def change_text(random, data: bytes) -> bytes:
    """A JSON text with a value changed to something odd, or a key twice; else some bytes changed."""
    kind = int(random.integers(4))
    marks = [i for i, byte in enumerate(data) if byte in b":,[{"]
    if kind == 0 or not marks:
        return change_bytes(random, data)
    at = marks[int(random.integers(len(marks)))] + 1
    end = min((e for e in (data.find(b, at + 1) for b in (b",", b"}", b"]")) if e > 0), default=len(data))
    text = (
        TEXTS[int(random.integers(len(TEXTS)))]
        if kind < 3
        else str(NUMBERS[int(random.integers(len(NUMBERS)))]).encode()
    )
    return data[:at] + text + data[end:]


@dataclass
class Shard:
    """The parts of a shard, as bytes; what is None is made to fit."""

    schema: bytes
    messages: list[bytes]
    hashes: bytes
    counts: list[list[int]]
    index: dict = field(default_factory=dict)
    tail: dict = field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes) -> Shard:
        tail = read_tail(data[-TAIL_BYTES:], len(data))
        index = np.frombuffer(
            data[tail.index_offset : tail.index_offset + tail.chunks * INDEX_DTYPE.itemsize], INDEX_DTYPE
        )
        return cls(
            data[: tail.schema_bytes],
            [data[int(e["offset"]) : int(e["offset"] + e["length"])] for e in index],
            data[tail.hashes_offset : tail.index_offset],
            [[int(e[name]) for name in COUNTS] for e in index],
        )

    def seal(self) -> bytes:
        offset, entries = len(self.schema), []
        for message, count in zip(self.messages, self.counts, strict=True):
            entries.append(
                (
                    offset,
                    len(message),
                    *(c % 2**bits for c, bits in zip(count, (32, 32, 64), strict=True)),
                    digest(message),
                )
            )
            offset += len(message)
        index = np.array(entries, INDEX_DTYPE)
        for (place, name), value in self.index.items():
            index[name][place % len(index)] = value % 2 ** (8 * index[name].itemsize)
        rest = END_MARK + self.hashes + index.tobytes()
        sums = [int(index[name].sum(dtype=np.uint64)) for name in COUNTS]
        numbers = [offset + len(rest) + TAIL_BYTES, len(self.schema), len(index), *sums]
        for place, value in self.tail.items():
            numbers[place] = value
        body = struct.pack("<6Q", *numbers) + digest(self.schema) + digest(self.hashes) + digest(index.tobytes())
        body += struct.pack("<IHH", TAIL_BYTES, 1, 0)
        return self.schema + b"".join(self.messages) + rest + body + digest(body) + b"\x89LOGITS\n"


def reseal(data: bytes) -> bytes:
    """The same bytes with digests that are right, as far as their numbers let one find what they cover."""
    out = bytearray(data)
    size = len(out)
    if size < TAIL_BYTES:
        return data
    _, schema, chunks, sequences = struct.unpack_from("<4Q", out, size - TAIL_BYTES)
    index_at = size - TAIL_BYTES - chunks * INDEX_DTYPE.itemsize
    hashes_at = index_at - sequences * HASH_DTYPE.itemsize
    if index_at >= 0 and hashes_at >= 0 and schema <= size:
        for at in range(index_at, size - TAIL_BYTES, INDEX_DTYPE.itemsize):
            offset, length = struct.unpack_from("<2Q", out, at)
            if offset + length <= size:
                out[at + 32 : at + 48] = digest(bytes(out[offset : offset + length]))
        for place, part in ((48, out[:schema]), (64, out[hashes_at:index_at]), (80, out[index_at : size - TAIL_BYTES])):
            out[size - TAIL_BYTES + place : size - TAIL_BYTES + place + 16] = digest(bytes(part))
    out[-24:-8] = digest(bytes(out[-TAIL_BYTES:-24]))
    return bytes(out)


def cell_places(message: bytes, schema: pa.Schema) -> list[tuple[int, int, int, int]]:
    """(column, row, start, end) of each cell in a message."""
    batch = pa.ipc.read_record_batch(pa.py_buffer(message), schema)
    base, places = pa.py_buffer(message).address, []
    for column in CELLS:
        _, ends, values = batch.column(column).buffers()
        if values is None:
            continue
        ends = np.frombuffer(ends, np.int32)[: batch.num_rows + 1].tolist()
        start = values.address - base
        cells = [(column, row, start + a, start + b) for row, (a, b) in enumerate(pairwise(ends)) if 0 <= a < b]
        places += [cell for cell in cells if cell[3] <= len(message)]  # ends that were changed before say anything
    return places


def write_batch(batch: pa.RecordBatch, info: bytes | None) -> tuple[bytes, bytes]:
    """(schema message, chunk message)."""
    batch.validate(full=True)  # Arrow's writer ends the process over some broken ones
    if pa.ipc.get_record_batch_size(batch) > 2**16:
        raise ValueError("few bytes are what is wanted")
    sink = pa.BufferOutputStream()
    pa.ipc.new_stream(sink, batch.schema).write_batch(batch, custom_metadata=None if info is None else {KEY: info})
    schema = batch.schema.serialize().to_pybytes()
    if sink.tell() > 2**17:
        raise ValueError("few bytes are what is wanted")
    return schema, sink.getvalue().to_pybytes()[len(schema) :]


def bombs(random, rows: int) -> tuple[pa.DataType, pa.Array]:
    """A column of values that few bytes could make many of, or that Python has no words for."""
    big = int(random.choice([5, 1000, 2**20, 2**28, 2**31 - 1]))
    offsets = pa.py_buffer(np.array([0, *[big] * rows], np.int32))

    def listed(child):
        return pa.Array.from_buffers(pa.list_(child.type), rows, [None, offsets], children=[child])

    def nothing(kind, n):
        children = (
            [pa.Array.from_buffers(kind.value_type, 0, [None, pa.py_buffer(b"")])]
            if pa.types.is_fixed_size_list(kind)
            else None
        )
        return pa.Array.from_buffers(
            kind, n, [None] * kind.num_buffers if kind.num_buffers < 2 else [None, pa.py_buffer(b"")], children=children
        )

    def number(kind, value, width):
        return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(value.to_bytes(width, "little") * rows)])

    zone = str(
        random.choice(
            ["UTC", "+99:99", "Europe", "../..", "/etc/passwd", "x\u2028", "America/", "right", "posixrules", ""]
        )
    )
    makers = [
        lambda: listed(pa.nulls(big)),
        lambda: listed(nothing(pa.struct([]), big)),
        lambda: listed(nothing(pa.binary(0), big)),
        lambda: listed(nothing(pa.list_(pa.int8(), 0), big)),
        lambda: listed(listed(pa.nulls(big)).slice(0, 0)) if big == 5 else listed(pa.nulls(big)),
        lambda: pa.array([[1, 2]] * rows, pa.list_view(pa.int8())),
        lambda: pa.array([["a"]] * rows, pa.list_(pa.string_view())),
        lambda: pa.array([1] * rows, pa.run_end_encoded(pa.int32(), pa.int8())),
        lambda: pa.UnionArray.from_sparse(pa.array([0] * rows, pa.int8()), [pa.array([1] * rows)]),
        lambda: pa.UnionArray.from_dense(pa.array([0] * rows, pa.int8()), pa.array([0] * rows, pa.int32()), [pa.array([[1] * 9])]),
        lambda: number(pa.timestamp(str(random.choice(["s", "us", "ns"])), zone), 2 ** int(random.integers(64)), 8),
        lambda: number(pa.date64(), 2 ** int(random.integers(64)), 8),
        lambda: number(pa.duration("ns"), 2 ** int(random.integers(64)), 8),
        lambda: number(pa.month_day_nano_interval(), 2 ** int(random.integers(128)), 16),
        lambda: number(pa.decimal128(38, int(random.choice([0, 38, -400, 2**30, -(2**31)]))), 2 ** int(random.integers(120)), 16),
        lambda: pa.StructArray.from_arrays([pa.array([1] * rows), pa.array(["a"] * rows)], ["x", "x"]),
        lambda: pa.array([[("k", [1])]] * rows, pa.map_(pa.utf8(), pa.list_(pa.int8()))),
        lambda: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * rows, pa.binary(16))),
        lambda: pa.ExtensionArray.from_storage(pa.json_(pa.utf8()), pa.array(["[" * 3000] * rows)),
        lambda: pa.array([[[True] * 3]] * rows, pa.list_(pa.list_(pa.bool_(), 3))),
        lambda: pa.array([{"a": {"b": [None, "x"]}}] * rows),
    ]  # fmt: skip
    array = makers[int(random.integers(len(makers)))]()
    return array.type, array


def with_column(random, shard: Shard) -> None:
    """Give a shard of one chunk a user's column that is a bomb."""
    schema = pa.ipc.read_schema(pa.py_buffer(shard.schema))
    batch = pa.ipc.read_record_batch(pa.py_buffer(shard.messages[0]), schema)
    info = pa.ipc.read_message(pa.py_buffer(shard.messages[0]))
    kind, array = bombs(random, batch.num_rows)
    metadata = info.metadata.get(KEY) if isinstance(info.metadata, dict) else None
    metadata = metadata or _info_of(shard.messages[0])
    fields = [*schema, pa.field("bomb", kind)]
    made = pa.RecordBatch.from_arrays([*batch.columns, array], schema=pa.schema(fields, metadata=schema.metadata))
    shard.schema, message = write_batch(made, metadata)
    shard.messages, shard.counts = [message], shard.counts[:1]
    shard.hashes = shard.hashes[: 8 * batch.num_rows]


def _info_of(message: bytes) -> bytes:
    start = message.index(b'{"order"')
    return message[start : message.index(b"}", start) + 1]


def with_json(random, shard: Shard) -> None:
    """Change the header or the first chunk's JSON as text, which may get another length."""
    schema = pa.ipc.read_schema(pa.py_buffer(shard.schema))
    if int(random.integers(2)) or not shard.messages:
        header = change_text(random, schema.metadata[KEY])
        shard.schema = schema.with_metadata({KEY: header}).serialize().to_pybytes()
        return
    batch = pa.ipc.read_record_batch(pa.py_buffer(shard.messages[0]), schema)
    info = _info_of(shard.messages[0])
    if int(random.integers(2)):
        fields = json.loads(info)
        cell = change_bytes(random, base64.b64decode(fields["order"]) or b"\0")
        info = json.dumps(fields | {"order": base64.b64encode(cell).decode()}).encode()
    else:
        info = change_text(random, info)
    shard.messages[0] = write_batch(batch, info)[1]


def forge(random, data: bytes) -> bytes:
    """One forged shard of a good one, of much the same size; in a part of them, digests are wrong as well."""
    forged = _forge(random, data)
    return forged if len(forged) < 2**17 else change_bytes(random, data)


def _forge(random, data: bytes) -> bytes:
    if int(random.integers(8)) == 0:
        return change_bytes(random, data)
    if int(random.integers(4)) == 0:
        return reseal(change_bytes(random, data))
    shard = Shard.of(data)
    if not shard.messages:
        _if_it_can_be(with_json, random, shard)
        return shard.seal()
    if int(random.integers(4)) == 0:
        _if_it_can_be(with_column, random, shard)
    schema = pa.ipc.read_schema(pa.py_buffer(shard.schema))
    for _ in range(int(random.choice([1, 1, 2, 3]))):
        if int(random.integers(10)) < 7:
            _change_message(random, shard, schema)
        else:
            _change_numbers(random, shard)
    if int(random.integers(6)) == 0:
        _if_it_can_be(with_json, random, shard)
    return shard.seal()


def _change_message(random, shard: Shard, schema: pa.Schema) -> None:
    number, kind = int(random.integers(len(shard.messages))), int(random.integers(7))
    message = shard.messages[number]
    head = 8 + int.from_bytes(message[4:8], "little")
    if kind == 0:
        shard.schema = change_bytes(random, shard.schema)
    elif kind == 1:
        shard.messages[number] = change_bytes(random, message[:head], 1) + message[head:]
    elif kind == 2:
        shard.messages[number] = message[:head] + change_bytes(random, message[head:])
    elif kind == 3:
        shard.messages[number], shard.counts[number][1] = _with_lengths(random, message, schema)
    else:
        shard.messages[number] = _with_cell(random, message, schema)


def _change_numbers(random, shard: Shard) -> None:
    kind, value = int(random.integers(3)), NUMBERS[int(random.integers(len(NUMBERS)))]
    if kind == 0:
        shard.counts[int(random.integers(len(shard.counts)))][int(random.integers(3))] = value
    elif kind == 1:
        shard.index[int(random.integers(9)), INDEX_DTYPE.names[int(random.integers(5))]] = value
        if int(random.integers(2)):
            shard.tail[int(random.integers(6))] = NUMBERS[int(random.integers(len(NUMBERS)))] % 2**64
    else:
        shard.hashes = change_bytes(random, shard.hashes, 1)


def _if_it_can_be(change, random, shard: Shard) -> None:
    """Change a shard that may be broken already."""
    with contextlib.suppress(*BROKEN):
        change(random, shard)


def _places(message: bytes, schema: pa.Schema) -> list:
    try:
        return cell_places(message, schema)
    except BROKEN:
        return []  # it was changed before


def _with_cell(random, message: bytes, schema: pa.Schema) -> bytes:
    places = _places(message, schema)
    if not places:
        return change_bytes(random, message)
    _, _, start, end = places[int(random.integers(len(places)))]
    changed = change_bytes(random, message[start:end])[: end - start].ljust(end - start, b"\0")
    if int(random.integers(3)):
        changed = b"\0" + changed[1:]  # the mode that the format uses
    return message[:start] + changed + message[end:]


def _with_lengths(random, message: bytes, schema: pa.Schema) -> tuple[bytes, int]:
    """Another number of positions, which the index says as well."""
    try:
        lengths = pa.ipc.read_record_batch(pa.py_buffer(message), schema).column(1)
        start, n = lengths.buffers()[1].address - pa.py_buffer(message).address, len(lengths)
        values = np.frombuffer(message, np.uint32, n, start).copy()
    except BROKEN:
        return change_bytes(random, message), 0
    if not n:
        return message, 0
    values[int(random.integers(n))] = NUMBERS[int(random.integers(len(NUMBERS)))] % 2**32
    return message[:start] + values.tobytes() + message[start + 4 * n :], int(values.sum(dtype=np.uint64))
