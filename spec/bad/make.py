"""Writes broken datasets that are not there yet; never one that is.

`python spec/bad/make.py` makes, for each function below, a dataset `NAME/` that README.md describes. Some are good
datasets that were damaged. The others are forged: sealed again with digests that are right, so that only the check
of what the bytes mean finds what is wrong.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

import logitstore
from logitstore.encoding.cells import CellDecoder, encode_cell
from logitstore.encoding.ordinals import bits_to_ordinals
from logitstore.encoding.values import Encoding
from logitstore.schema import FormatVersion
from logitstore.shard.chunk import OPTIONAL_TYPES
from logitstore.shard.layout import (
    END_MARK,
    HASH_DTYPE,
    INDEX_DTYPE,
    TAIL_BYTES,
    Tail,
    digest,
    id_hash,
    read_tail,
    write_tail,
)

HERE = Path(__file__).parent
MANIFEST: Final = "logitstore.json"
SHARD: Final = "data/train/train-00000.arrow"
KEY: Final = b"logitstore"
COUNTS: Final = ("sequences", "positions", "candidates")
U16, U32, F32 = np.uint16, np.uint32, np.float32

Case = Callable[[Path], None]
Fields = dict[str, Any]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register a case under its function's name."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


# Good datasets.


def rows(seed: int, positions: int, k: int, width: int = 1000) -> tuple[Any, Any, Any]:
    """(tokens, ids, logprobs) with falling logprobs and some mass left, the same on every machine."""
    state = np.random.Generator(np.random.PCG64(seed))
    ids = np.stack([state.permutation(width)[:k] for _ in range(positions)])
    steps = state.integers(1, 2**12, (positions, k)).astype(np.float64) / 2**10
    logprobs = -0.25 - math.log(k) / 2 - np.cumsum(steps, axis=1) / 2
    logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True)) + 0.0625
    return state.integers(0, width, positions), ids, logprobs.astype(np.float32)


def good(path: Path, columns: Fields | None = None, **settings: Any) -> None:
    """Three sequences of 5 positions with 4 candidates each; their ids are 0, 1 and 2."""
    with logitstore.Writer(path, **{"teacher": "t", "logit_width": 1000, "values": "grid", **settings}) as writer:
        for seed in range(3):
            writer.add(*rows(seed, 5, 4), **(columns or {}))


def good_empty(path: Path) -> None:
    with logitstore.Writer(path, teacher="t", logit_width=1000):
        pass


def good_draws(path: Path) -> None:
    with logitstore.Writer(path, teacher="t", logit_width=1000) as writer:
        for seed in range(3):
            tokens, ids, _ = rows(seed, 5, 4)
            writer.add_draws(tokens, ids, np.full(ids.shape, [9, 6, 4, 1]), 20)


def good_bfloat16(path: Path) -> None:
    with logitstore.Writer(path, teacher="t", logit_width=1000, values="bfloat16") as writer:
        for seed in range(3):
            tokens, ids, logprobs = rows(seed, 5, 4)
            logits = np.round(logprobs * 4) / 4
            lse = np.log(np.exp(logits).sum(axis=1)) + 0.5
            writer.add(tokens, ids, logits - lse[:, None], logsumexp=lse)


def good_with_tokenizer(path: Path, tokens: int = 1000) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = {f"{i:x}.": i for i in range(tokens)}
        Path(scratch, "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}), encoding="utf-8")
        with logitstore.Writer(path, teacher="t", logit_width=50, values="grid", tokenizer=scratch) as writer:
            for seed in range(3):
                writer.add(*rows(seed, 5, 4, 50))


# Damage.


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of a byte, counted from the end where `at` is negative."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def tail_of(path: Path) -> Tail:
    """The tail of a shard."""
    data = path.read_bytes()
    return read_tail(data, len(data))


# Forgery: a manifest and a shard, sealed again.


def write_manifest(path: Path, body: bytes) -> None:
    """Write a manifest of these bytes and their seal."""
    seal = hashlib.sha256(body).hexdigest().encode()
    (path / MANIFEST).write_bytes(body + b',\n "sha256": "' + seal + b'"\n}\n')


def seal_manifest(path: Path, change: Callable[[Fields], None] = lambda _: None) -> None:
    """Bring a manifest up to date with the shards' files, change its fields, and seal it."""
    fields = json.loads((path / MANIFEST).read_bytes())
    del fields["sha256"]
    for shard in fields["shards"]:
        data = (path / shard["path"]).read_bytes()
        sequences, positions, candidates = np.frombuffer(data[-TAIL_BYTES + 24 :][:24], "<u8").tolist()
        shard |= {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "tail_digest": data[-24:-8].hex(),
            "sequences": sequences,
            "positions": positions,
            "candidates": candidates,
        }
    sum_up(fields)
    change(fields)
    write_manifest(path, json.dumps(fields).removesuffix("}").encode())


def sum_up(fields: Fields) -> None:
    """Set a manifest's sums and dataset digest to those of its shards."""
    splits: dict[str, Fields] = {}
    for shard in fields["shards"]:
        split = splits.setdefault(shard["split"], dict.fromkeys(("shards", *COUNTS, "bytes"), 0))
        split["shards"] += 1
        for name in (*COUNTS, "bytes"):
            split[name] += shard[name]
    fields["splits"] = splits
    for name in ("shards", *COUNTS, "bytes"):
        fields["totals"][name] = sum(split[name] for split in splits.values())
    lines = [(fields["tokenizer"] or {}).get("digest") or "-"]
    lines += [f"{shard['split']} {shard['sequences']} {shard['sha256']}" for shard in fields["shards"]]
    fields["dataset_digest"] = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def seal_shard(
    schema: bytes,
    messages: list[bytes],
    counts: list[tuple[int, int, int]],
    hashes: list[int],
    *,
    change_index: Callable[[NDArray[Any]], None] = lambda _: None,
    tail: Fields | None = None,
) -> bytes:
    """A shard of these messages with an index and a tail that fit them.

    Args:
        schema: schema message.
        messages: chunk messages.
        counts: of each chunk, the sequences, positions and candidates that the index says.
        hashes: id hashes.
        change_index: changes the index before it is sealed.
        tail: fields of the tail that shall have other values.

    Returns:
        The bytes of the file.
    """
    offsets = len(schema) + np.cumsum([0, *map(len, messages)])[:-1]
    index = np.array(
        [
            (offset, len(message), *count, digest(message))
            for offset, message, count in zip(offsets, messages, counts, strict=True)
        ],
        INDEX_DTYPE,
    )
    change_index(index)
    hash_bytes = np.array(hashes, HASH_DTYPE).tobytes()
    rest = END_MARK + hash_bytes + index.tobytes()
    fields = {
        "file_bytes": len(schema) + sum(map(len, messages)) + len(rest) + TAIL_BYTES,
        "schema_bytes": len(schema),
        "chunks": len(index),
        **{name: int(index[name].sum(dtype=np.uint64)) for name in COUNTS},
        "schema_digest": digest(schema),
        "hashes_digest": digest(hash_bytes),
        "index_digest": digest(index.tobytes()),
    }
    return schema + b"".join(messages) + rest + write_tail(Tail(**{**fields, **(tail or {})}))


class Forgery:
    """The first shard of a dataset, taken apart to be changed; `seal` puts it together again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = (path / SHARD).read_bytes()
        tail = read_tail(data, len(data))
        index = np.frombuffer(data[tail.index_offset :][: tail.chunks * INDEX_DTYPE.itemsize], INDEX_DTYPE)
        stream = pa.ipc.open_stream(data)
        self.schema: pa.Schema = stream.schema
        self.candidates: list[int] = index["candidates"].tolist()
        self.chunks: list[list[Fields]] = []
        self.metadata: list[Fields] = []
        for _ in index:
            batch, metadata = stream.read_next_batch_with_custom_metadata()
            self.chunks.append(batch.to_pylist())
            self.metadata.append(json.loads(metadata[KEY]))
        self.hashes = [id_hash(row["id"]) for row in self.rows]

    @property
    def rows(self) -> list[Fields]:
        """The rows of all chunks."""
        return [row for chunk in self.chunks for row in chunk]

    def change_header(self, **fields: Any) -> None:
        """Change fields of the header."""
        header = json.loads(self.schema.metadata[KEY]) | fields
        self.schema = self.schema.with_metadata({KEY: json.dumps(header).encode()})

    def get(self, name: str, kind: Any, n: int, row: int = 0) -> NDArray[Any]:
        """The n values of a cell."""
        return CellDecoder().decode(self.rows[row][name], n, np.dtype(kind))

    def put(self, name: str, kind: Any, values: ArrayLike, row: int = 0) -> None:
        """Set a cell to these values."""
        self.rows[row][name] = encode_cell(np.array(values, kind))

    def change(self, name: str, kind: Any, n: int, at: int | slice, value: Any, row: int = 0) -> None:
        """Set one or some of the n values of a cell."""
        values = self.get(name, kind, n, row)
        values[at] = value
        self.put(name, kind, values, row)

    def message(self, number: int, compression: str | None = None) -> bytes:
        """The message of a chunk."""
        arrays = [pa.array([row[field.name] for row in self.chunks[number]], field.type) for field in self.schema]
        schema = pa.schema([field.with_nullable(nullable=True) for field in self.schema], self.schema.metadata)
        metadata = {KEY: json.dumps(self.metadata[number]).encode()} if self.metadata[number] else None
        return serialise(pa.RecordBatch.from_arrays(arrays, schema=schema), metadata, compression)

    def seal(
        self,
        *,
        schema: bytes | None = None,
        messages: list[bytes] | None = None,
        counts: list[tuple[int, int, int]] | None = None,
        change_manifest: Callable[[Fields], None] = lambda _: None,
        **forged: Any,
    ) -> None:
        """Write the shard and the manifest; what is not given is made from the rows."""
        if messages is None:
            messages = [self.message(number) for number in range(len(self.chunks))]
        if counts is None:
            counts = [
                (len(chunk), sum(row["length"] for row in chunk), candidates)
                for chunk, candidates in zip(self.chunks, self.candidates, strict=True)
            ]
        schema = self.schema.serialize().to_pybytes() if schema is None else schema
        (self.path / SHARD).write_bytes(seal_shard(schema, messages, counts, self.hashes, **forged))

        def change(fields: Fields) -> None:
            known = [Encoding(row["encoding"]).label for row in self.rows if row["encoding"] in iter(Encoding)]
            fields["totals"]["encodings"] = dict(Counter(known))
            fields["totals"]["columns"] = dict(Counter(n for row in self.rows for n in OPTIONAL_TYPES if row.get(n)))
            change_manifest(fields)

        seal_manifest(self.path, change)


def serialise(batch: pa.RecordBatch, metadata: dict[bytes, bytes] | None, compression: str | None = None) -> bytes:
    """The message of one record batch."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    # Every writer begins with the schema message; only what follows it is wanted.
    pa.ipc.new_stream(sink, batch.schema, options=options).write_batch(batch, custom_metadata=metadata)
    return sink.getvalue().to_pybytes()[batch.schema.serialize().size :]


# The dataset as a whole.


@case
def no_dataset(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("No dataset here.\n", encoding="utf-8")


@case
def manifest_missing(path: Path) -> None:
    good(path)
    (path / MANIFEST).unlink()


@case
def manifest_bit_flip(path: Path) -> None:
    good_empty(path)
    flip(path / MANIFEST, (path / MANIFEST).read_bytes().index(b'"temperature": 1.0') + 15)


@case
def manifest_cut_off(path: Path) -> None:
    good_empty(path)
    (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes()[:600])


@case
def manifest_edited(path: Path) -> None:
    good_empty(path)
    text = (path / MANIFEST).read_bytes()
    (path / MANIFEST).write_bytes(text.replace(b'"name": "t"', b'"name": "another teacher"'))


@case
def manifest_not_json(path: Path) -> None:
    good_empty(path)
    write_manifest(path, (path / MANIFEST).read_bytes()[:600])


@case
def manifest_of_another_format(path: Path) -> None:
    good_empty(path)
    seal_manifest(path, lambda fields: fields.update(format="logitstorage"))


@case
def manifest_later_version(path: Path) -> None:
    good_empty(path)
    seal_manifest(path, lambda fields: fields.update(version="2.0"))


@case
def manifest_unknown_feature(path: Path) -> None:
    good_empty(path)
    seal_manifest(path, lambda fields: fields.update(features={"required": ["soft-labels"], "optional": []}))


@case
def manifest_path_outside(path: Path) -> None:
    good(path)
    seal_manifest(path, lambda fields: fields["shards"][0].update(path="../x"))


@case
def manifest_path_absolute(path: Path) -> None:
    good(path)
    seal_manifest(path, lambda fields: fields["shards"][0].update(path="/etc/hostname"))


@case
def manifest_path_twice(path: Path) -> None:
    good(path)

    def change(fields: Fields) -> None:
        fields["shards"] *= 2
        sum_up(fields)

    seal_manifest(path, change)


@case
def manifest_sums_wrong(path: Path) -> None:
    good(path)
    seal_manifest(path, lambda fields: fields["totals"].update(positions=14))


@case
def manifest_dataset_digest_wrong(path: Path) -> None:
    good(path)
    seal_manifest(path, lambda fields: fields.update(dataset_digest="0" * 64))


@case
def manifest_of_too_many_sequences(path: Path) -> None:
    good(path)

    def change(fields: Fields) -> None:
        fields["shards"][0]["sequences"] = 2**50
        sum_up(fields)

    seal_manifest(path, change)


@case
def totals_highest_id_outside(path: Path) -> None:
    good(path)
    seal_manifest(path, lambda fields: fields["totals"].update(highest_id=1000))


@case
def totals_highest_id_wrong(path: Path) -> None:
    good(path)
    seal_manifest(path, lambda fields: fields["totals"].update(highest_id=10))


@case
def totals_encodings_wrong(path: Path) -> None:
    good(path)
    seal_manifest(path, lambda fields: fields["totals"].update(encodings={"grid": 2, "draws": 1}))


@case
def shard_not_in_manifest(path: Path) -> None:
    good(path)
    data = (path / SHARD).read_bytes()
    (path / "data/train/train-00001.arrow.partial").write_bytes(data[:500])


@case
def teacher_unknown(path: Path) -> None:
    good(path, teacher=None)


@case
def logit_width_unknown(path: Path) -> None:
    good(path, logit_width=None)


@case
def tokenizer_partial(path: Path) -> None:
    good(path, tokenizer=logitstore.Tokenizer.from_pieces({i: b"a%d" % i for i in range(5)}))


@case
def tokenizer_file_changed(path: Path) -> None:
    good_with_tokenizer(path, 50)
    flip(path / "tokenizer/tokenizer.json", 30)


@case
def tokenizer_file_missing(path: Path) -> None:
    good_with_tokenizer(path, 50)
    shutil.rmtree(path / "tokenizer")


@case
def tokenizer_file_damaged_at_the_source(path: Path) -> None:
    good_with_tokenizer(path, 50)
    file = path / "tokenizer/tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])
    seal_manifest(path, lambda fields: describe_tokenizer(path, fields))


@case
def tokenizer_identity_wrong(path: Path) -> None:
    good_with_tokenizer(path, 50)
    file = path / "tokenizer/tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b'"7."', b'"blue"'))
    seal_manifest(path, lambda fields: describe_tokenizer(path, fields))


@case
def tokenizer_too_small(path: Path) -> None:
    good_with_tokenizer(path, 40)


def describe_tokenizer(path: Path, fields: Fields) -> None:
    """Set what a manifest says of the tokenizer's files to what they are."""
    for file in fields["tokenizer"]["files"]:
        data = (path / file["path"]).read_bytes()
        file |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@case
def rows_late(path: Path) -> None:
    aligned(path, 0)


@case
def rows_early(path: Path) -> None:
    aligned(path, 2)


def aligned(path: Path, shift: int) -> None:
    """250 positions at which the best candidate is mostly tokens[t + shift]."""
    state = np.random.Generator(np.random.PCG64(1))
    tokens = state.integers(0, 100, 250)
    best = np.where(state.random(250) < 0.6, np.roll(tokens, -shift), state.integers(0, 100, 250))
    with logitstore.Writer(path, teacher="t", logit_width=200, values="grid") as writer:
        writer.add(tokens, np.stack([best, best + 100], axis=1), np.tile([-0.5, -1.25], (250, 1)))


# A shard.


@case
def shard_missing(path: Path) -> None:
    good(path)
    (path / SHARD).unlink()


@case
def shard_is_a_directory(path: Path) -> None:
    good(path)
    (path / SHARD).unlink()
    (path / SHARD).mkdir()
    (path / SHARD / "notes.txt").write_text("A directory, not a shard.\n", encoding="utf-8")


@case
def shard_cut_off(path: Path) -> None:
    good(path)
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-1])


@case
def shard_appended_to(path: Path) -> None:
    good(path)
    (path / SHARD).write_bytes((path / SHARD).read_bytes() + b"\n")


@case
def shard_size_in_tail_wrong(path: Path) -> None:
    good(path)
    Forgery(path).seal(tail={"file_bytes": 2**62})


@case
def shard_of_another_dataset(path: Path) -> None:
    good(path)
    other = path.with_name("other")
    with logitstore.Writer(other, teacher="t", logit_width=1000, values="grid") as writer:
        for seed, name in enumerate("abc"):
            writer.add(*rows(seed, 5, 4), id=name)
    (other / SHARD).replace(path / SHARD)  # it has the same size


@case
def shard_sha256_wrong(path: Path) -> None:
    good(path)

    def change(fields: Fields) -> None:
        fields["shards"][0]["sha256"] = "0" * 64
        sum_up(fields)

    seal_manifest(path, change)


@case
def tail_bit_flip(path: Path) -> None:
    good(path)
    flip(path / SHARD, -TAIL_BYTES + 24)


@case
def tail_magic_damaged(path: Path) -> None:
    good(path)
    flip(path / SHARD, -8, 7)


@case
def tail_later_version(path: Path) -> None:
    good(path)
    Forgery(path).seal(tail={"version": FormatVersion(2, 0)})


@case
def tail_too_many_chunks(path: Path) -> None:
    good(path)
    Forgery(path).seal(tail={"chunks": 2**60})


@case
def index_bit_flip(path: Path) -> None:
    good(path)
    flip(path / SHARD, tail_of(path / SHARD).index_offset + 16)


@case
def index_chunks_overlap(path: Path) -> None:
    good(path, chunk_candidates=1)

    def change(index: NDArray[Any]) -> None:
        index[1] = index[0]

    Forgery(path).seal(change_index=change)


@case
def index_chunk_too_long(path: Path) -> None:
    good(path)

    def change(index: NDArray[Any]) -> None:
        index["length"] = 2**40

    Forgery(path).seal(change_index=change)


@case
def index_sums_wrong(path: Path) -> None:
    good(path)
    Forgery(path).seal(tail={"candidates": 59})


@case
def end_mark_damaged(path: Path) -> None:
    good(path)
    flip(path / SHARD, tail_of(path / SHARD).chunks_end + 5)


@case
def id_hashes_bit_flip(path: Path) -> None:
    good(path)
    flip(path / SHARD, tail_of(path / SHARD).hashes_offset)


@case
def id_hash_wrong(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.hashes[0] ^= 1
    forgery.seal()


@case
def schema_bit_flip(path: Path) -> None:
    good(path)
    flip(path / SHARD, (path / SHARD).read_bytes().index(b"logsumexp"))


@case
def schema_no_arrow(path: Path) -> None:
    good(path)
    Forgery(path).seal(schema=bytes(range(256)))


@case
def schema_column_missing(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.schema = forgery.schema.remove(forgery.schema.get_field_index("entropy"))
    for row in forgery.rows:
        del row["entropy"]
    forgery.seal()


@case
def schema_column_twice(path: Path) -> None:
    good(path, {"note": "n"})
    forgery = Forgery(path)
    forgery.schema = forgery.schema.append(forgery.schema.field("note"))
    forgery.seal()


@case
def schema_column_with_a_reserved_name(path: Path) -> None:
    good(path, {"note": "n"})
    forgery = Forgery(path)
    forgery.schema = forgery.schema.set(14, pa.field("logprobs", pa.utf8()))
    for row in forgery.rows:
        row["logprobs"] = row.pop("note")
    forgery.seal(change_manifest=lambda fields: fields.update(user_columns={"logprobs": "string"}))


@case
def schema_column_of_a_dictionary(path: Path) -> None:
    good(path, {"note": "n"})
    forgery = Forgery(path)
    kind = pa.dictionary(pa.int8(), pa.utf8())
    forgery.schema = forgery.schema.set(14, pa.field("note", kind))
    forgery.seal(change_manifest=lambda fields: fields.update(user_columns={"note": str(kind)}))


@case
def schema_name_no_utf8(path: Path) -> None:
    good(path, {"note": "n"})
    forgery = Forgery(path)
    forgery.seal(schema=forgery.schema.serialize().to_pybytes().replace(b"note", b"no\xffe"))


@case
def schema_without_header(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.schema = forgery.schema.with_metadata({"pandas": "{}"})
    forgery.seal()


@case
def header_no_json(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.schema = forgery.schema.with_metadata({KEY: b'{"format": "logitstore"'})
    forgery.seal()


@case
def header_temperature_of_another(path: Path) -> None:
    good(path)
    seal_manifest(path, lambda fields: fields.update(temperature=0.5))


@case
def header_resolution_no_power_of_two(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change_header(resolution=0.03)
    forgery.seal()


@case
def header_later_pcodec(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change_header(pco="200.0")
    forgery.seal()


@case
def header_pcodec_no_version(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change_header(pco="9" * 5000 + ".1")
    forgery.seal()


@case
def schema_column_of_list_views(path: Path) -> None:
    """Views may overlap, and each level of them multiplies what the one below it holds."""
    good(path, {"note": [1, 2]})
    forgery = Forgery(path)
    kind = pa.list_view(pa.int64())
    forgery.schema = forgery.schema.set(14, pa.field("note", kind))
    forgery.seal(change_manifest=lambda fields: fields.update(user_columns={"note": str(kind)}))


@case
def user_columns_of_another_type(path: Path) -> None:
    good(path, {"note": "n"})
    seal_manifest(path, lambda fields: fields.update(user_columns={"note": "int64"}))


# A chunk.


@case
def chunk_bit_flip(path: Path) -> None:
    good(path)
    flip(path / SHARD, tail_of(path / SHARD).chunks_end - 20)


@case
def chunk_no_message(path: Path) -> None:
    good(path)
    Forgery(path).seal(messages=[bytes(range(256))])


@case
def chunk_end_of_stream(path: Path) -> None:
    good(path)
    Forgery(path).seal(messages=[END_MARK])


@case
def chunk_two_messages(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.seal(messages=[forgery.message(0) * 2])


@case
def chunk_compressed(path: Path) -> None:
    """4 MB of one letter in 1 KB."""
    good(path, {"note": "n"})
    forgery = Forgery(path)
    forgery.rows[0]["note"] = "x" * 2**22
    forgery.seal(messages=[forgery.message(0, "zstd")])


@case
def chunk_column_null(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.rows[1]["entropy"] = None
    forgery.seal()


@case
def chunk_id_no_utf8(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.seal(messages=[forgery.message(0).replace(b"012", b"01\xff")])


@case
def chunk_metadata_missing(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.metadata[0] = {}
    forgery.seal()


@case
def chunk_metadata_wrong(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.metadata[0]["order_length"] = -1
    forgery.seal()


@case
def chunk_sequences_wrong(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.hashes.append(id_hash("3"))
    forgery.seal(counts=[(4, 15, 60)])


@case
def chunk_positions_wrong(path: Path) -> None:
    good(path)
    Forgery(path).seal(counts=[(3, 16, 60)])


@case
def chunk_candidates_wrong(path: Path) -> None:
    good(path)
    Forgery(path).seal(counts=[(3, 15, 61)])


@case
def chunk_candidates_more(path: Path) -> None:
    good(path)
    Forgery(path).seal(counts=[(3, 15, 59)])


@case
def chunk_values_of_no_bytes(path: Path) -> None:
    """A list of 2^31 - 1 nulls in a few bytes."""
    good(path, {"note": [1]})
    forgery = Forgery(path)
    kind = pa.list_(pa.null())
    offsets = pa.py_buffer(np.array([0, 2**31 - 1, 2**31 - 1, 2**31 - 1], np.int32))
    nulls = pa.Array.from_buffers(kind, 3, [None, offsets], children=[pa.nulls(2**31 - 1)])
    forgery.schema = forgery.schema.set(14, pa.field("note", kind))
    batch = pa.RecordBatch.from_pylist([row | {"note": None} for row in forgery.rows], schema=forgery.schema)
    metadata = {KEY: json.dumps(forgery.metadata[0]).encode()}
    forgery.seal(
        messages=[serialise(batch.set_column(14, "note", nulls), metadata)],
        change_manifest=lambda fields: fields.update(user_columns={"note": str(kind)}),
    )


@case
def order_id_twice(path: Path) -> None:
    good_with_order(path, lambda order: order.__setitem__(1, order[0]))


@case
def order_id_outside(path: Path) -> None:
    good_with_order(path, lambda order: order.__setitem__(-1, 2**31))


def good_with_order(path: Path, change: Callable[[NDArray[Any]], None]) -> None:
    """Forge the token order of a chunk."""
    good(path)
    forgery = Forgery(path)
    info = forgery.metadata[0]
    order = CellDecoder().decode(base64.b64decode(info["order"]), info["order_length"], np.dtype(U32))
    change(order)
    info["order"] = base64.b64encode(encode_cell(order)).decode()
    forgery.seal()


# A sequence.


@case
def sequence_id_twice(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.rows[2]["id"] = "0"
    forgery.hashes[2] = forgery.hashes[0]
    forgery.seal()


@case
def encoding_unknown(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.rows[1]["encoding"] = 9
    forgery.seal()


@case
def sequence_too_long(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.rows[0]["length"] = 2**24 + 1
    forgery.seal()


@case
def sequence_longer_than_its_cells(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.rows[0]["length"] = 2**24
    forgery.seal()


@case
def sequence_of_too_few_bytes(path: Path) -> None:
    """Equal values take 9 bytes, however many they are."""
    good(path)
    forgery = Forgery(path)
    n = 2**20 + 1
    forgery.rows[0].update(length=n, tail=b"", ids=b"", top=b"", gaps=b"")
    forgery.put("tokens", U32, np.zeros(n))
    forgery.put("count", U32, np.zeros(n))
    forgery.candidates = [40]
    forgery.seal()


@case
def candidates_of_too_few_bytes(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    n = 2**20 + 1
    forgery.rows[0].update(length=1, tail=b"")
    forgery.put("tokens", U32, [0])
    forgery.put("count", U32, [n])
    forgery.put("ids", U32, np.zeros(n))
    forgery.put("top", F32, [-9.0])
    forgery.put("gaps", U16, np.zeros(n - 1))
    forgery.candidates = [n + 40]
    forgery.seal()


@case
def candidates_too_many(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.put("count", U32, [2**32 - 1] * 5)
    forgery.seal()


def forge_cell(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of a cell of the first sequence."""
    good(path)
    forgery = Forgery(path)
    forgery.rows[0][name] = change(forgery.rows[0][name])
    forgery.seal()


@case
def cell_cut_off(path: Path) -> None:
    forge_cell(path, "ids", lambda cell: cell[:-1])


@case
def cell_appended_to(path: Path) -> None:
    forge_cell(path, "gaps", lambda cell: cell + b"\0")


@case
def cell_garbage(path: Path) -> None:
    forge_cell(path, "tokens", lambda cell: bytes([0, *np.random.Generator(np.random.PCG64(1)).bytes(len(cell))]))


@case
def cell_of_another_mode(path: Path) -> None:
    forge_cell(path, "tokens", lambda cell: bytes([cell[0] | 1, *cell[1:]]))


@case
def cell_of_another_length(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.put("tokens", U32, forgery.get("tokens", U32, 5)[:3])
    forgery.seal()


@case
def candidate_outside_logit_width(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change("ids", U32, 20, 19, 1000 + forgery.metadata[0]["order_length"])
    forgery.seal()


@case
def token_outside_limit(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change("tokens", U32, 5, 4, 2**31 + forgery.metadata[0]["order_length"])
    forgery.seal()


@case
def candidate_twice(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change("ids", U32, 20, 6, forgery.get("ids", U32, 20)[4])
    forgery.seal()


@case
def logprob_nan(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change("top", F32, 5, 2, np.nan)
    forgery.seal()


@case
def logprob_infinite(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change("top", F32, 5, 2, -np.inf)
    forgery.change("tail", U16, 5, 2, 0xFFFF)
    forgery.seal()


@case
def logprob_above_zero(path: Path) -> None:
    good(path, values="float32")
    forgery = Forgery(path)
    forgery.change("top", U32, 5, 2, bits_to_ordinals(np.array([3e38], F32).view(U32))[0])
    forgery.change("tail", U16, 5, 2, 0xFFFF)
    forgery.seal()


@case
def logprobs_increase(path: Path) -> None:
    """The gap wraps around: the ordinals rise."""
    good(path, values="float32")
    forgery = Forgery(path)
    ordinals = bits_to_ordinals(np.array([-3, -2, -4, -5], F32).view(U32))
    forgery.change("top", U32, 5, 0, ordinals[0])
    forgery.change("gaps", U32, 15, slice(0, 3), ordinals[:-1] - ordinals[1:])
    forgery.change("tail", U16, 5, 0, 0xFFFF)
    forgery.seal()


@case
def steps_over_the_limit(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.rows[0]["encoding"] = Encoding.GRID_WIDE
    forgery.put("gaps", U32, forgery.get("gaps", U16, 15))
    forgery.change("gaps", U32, 15, 2, 2**24)
    forgery.change("tail", U16, 5, 0, 0xFFFF)
    forgery.seal()


@case
def probabilities_sum_to_two(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change("top", F32, 5, 3, -0.0625)
    forgery.change("gaps", U16, 15, 9, 0)
    forgery.change("tail", U16, 5, 3, 0xFFFF)
    forgery.seal()


@case
def tail_wrong(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change("tail", U16, 5, 1, 16)
    forgery.seal()


@case
def tail_of_candidates(path: Path) -> None:
    good(path)
    forgery = Forgery(path)
    forgery.change_header(normalised="candidates")
    forgery.seal(change_manifest=lambda fields: fields.update(normalised="candidates"))


@case
def tail_of_draws(path: Path) -> None:
    good_draws(path)
    forgery = Forgery(path)
    forgery.put("tail", U16, [0xFFFE] * 5)
    forgery.seal()


@case
def tail_without_candidates(path: Path) -> None:
    with logitstore.Writer(path, teacher="t", logit_width=10, values="grid") as writer:
        writer.add([1, 2], [3], [-0.5], count=[0, 1])
    forgery = Forgery(path)
    forgery.change("tail", U16, 2, 0, 32)
    forgery.seal()


@case
def bfloat16_without_logsumexp(path: Path) -> None:
    good_bfloat16(path)
    forgery = Forgery(path)
    forgery.rows[0]["logsumexp"] = b""
    forgery.seal()


@case
def bfloat16_logsumexp_nan(path: Path) -> None:
    good_bfloat16(path)
    forgery = Forgery(path)
    forgery.change("logsumexp", F32, 5, 4, np.nan)
    forgery.seal()


@case
def bfloat16_logit_infinite(path: Path) -> None:
    good_bfloat16(path)
    forgery = Forgery(path)
    forgery.change("top", U16, 5, 4, 0xFF80)
    forgery.change("tail", U16, 5, 4, 0xFFFF)
    forgery.seal()


@case
def draws_zero(path: Path) -> None:
    good_draws(path)
    forgery = Forgery(path)
    forgery.change("gaps", U32, 15, 7, 0)
    forgery.seal()


@case
def draws_of_the_others_too_many(path: Path) -> None:
    """The first candidate has what the others leave of all: nothing."""
    good_draws(path)
    forgery = Forgery(path)
    forgery.change("top", U32, 5, 2, forgery.get("gaps", U32, 15)[6:9].sum())
    forgery.seal()


@case
def loss_mask_of_seven(path: Path) -> None:
    good(path, {"loss_mask": [0, 0, 1, 1, 1]})
    forgery = Forgery(path)
    forgery.put("loss_mask", U16, [0, 0, 7, 1, 1])
    forgery.seal()


@case
def entropy_impossible(path: Path) -> None:
    good(path, {"entropy": [1.0] * 5})
    forgery = Forgery(path)
    forgery.put("entropy", F32, [1, 1, -1, np.nan, 1])
    forgery.seal()


@case
def target_rank_of_another_token(path: Path) -> None:
    good(path, {"target_rank": [1, 2, 0, 900, 0]})


def main() -> None:
    """Write the datasets that are missing."""
    warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
    for name, function in CASES.items():
        if (HERE / name).exists():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            function(path)
            shutil.copytree(path, HERE / name)
        print(f"made {name}")


if __name__ == "__main__":
    main()
