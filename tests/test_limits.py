"""What is too much for its bytes is refused before memory is taken, when it is read and when it is written."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import logitstore
from logitstore.limits import UNBACKED_VALUES, VALUES_PER_BYTE, most_chunk_values, most_values
from logitstore.shard.usertypes import can_be_stored, free_values, plain

pytestmark = pytest.mark.usefixtures("quiet")

ROOT = Path(__file__).parent.parent
BAD = ROOT / "spec" / "bad"


@pytest.fixture(scope="module")
def forge():
    sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
    try:
        import forge

        yield forge
    finally:
        sys.path.remove(str(ROOT / "tests" / "fuzz"))


def opened(data):
    from logitstore.shard.reader import Shard

    class Bytes:
        path, size, opening, mapped = "forged", len(data), len(data), True

        def read(self, offset, length, _accept=None):
            return pa.py_buffer(data).slice(offset, length)

    return Shard(Bytes())


def test_limits_follow_the_bytes():
    assert most_values(9) == UNBACKED_VALUES
    assert most_values(2**20) == VALUES_PER_BYTE * 2**20
    assert most_chunk_values(9) == 2 * UNBACKED_VALUES


# Sequences.


def add_constants(path, positions, candidates=0):
    with logitstore.Writer(path, teacher="t", logit_width=1000, values="grid") as writer:
        count = np.zeros(positions, np.int64)
        count[0] = candidates
        ids, logprobs = np.arange(candidates) % 1000, np.full(candidates, -30.0)
        writer.add(np.zeros(positions, np.int64), ids, logprobs, count=count, id="long")


def test_a_sequence_of_equal_values_is_written_up_to_the_limit(tmp_path):
    add_constants(tmp_path / "a", UNBACKED_VALUES)
    assert logitstore.open(tmp_path / "a").lengths().tolist() == [UNBACKED_VALUES]
    assert len(logitstore.open(tmp_path / "a")[0].tokens) == UNBACKED_VALUES
    with pytest.raises(logitstore.InvalidInputError, match=r"(?s)'long'.*split it"):
        add_constants(tmp_path / "b", UNBACKED_VALUES + 1)


def peak_of(code, *arguments):
    """MiB that a process of its own takes at most beyond what it has once all is imported."""
    before = (
        "import sys, pathlib, logitstore\n"
        "list(logitstore.open(sys.argv[-1])), logitstore.validate(sys.argv[-1], deep=True)\n"
        "def peak():\n    return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "pathlib.Path('/proc/self/clear_refs').write_text('5')\nbase = peak()\n"
    )
    good = ROOT / "spec" / "vectors" / "v1" / "coarse-grid"
    done = subprocess.run(
        [sys.executable, "-c", f"{before}{code}\nprint((peak() - base) // 1024)", *map(str, arguments), good],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


READ = """
for read in (list, lambda d: list(d.chunks()), lambda d: d.lengths(), lambda d: list(d.with_decoding('device')), len, repr):
    try:
        read(logitstore.open(sys.argv[1]))
    except logitstore.LogitStoreError:
        pass
logitstore.validate(sys.argv[1], deep=True)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are Linux's")
@pytest.mark.parametrize(
    "name",
    [
        "sequence-too-long",
        "sequence-longer-than-its-cells",
        "sequence-of-too-few-bytes",
        "candidates-of-too-few-bytes",
        "candidates-too-many",
        "chunk-values-of-no-bytes",
        "chunk-compressed",
        "manifest-of-too-many-sequences",
    ],
)
def test_forged_numbers_take_little_memory(name):
    assert peak_of(READ, BAD / name) < 256


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are Linux's")
def test_many_sequences_of_the_most_that_few_bytes_may_have(tmp_path, forge):
    """Twenty sequences of 2^20 positions in 3 KB: one is allowed, all of them in one chunk are not."""
    path = tmp_path / "data"
    add_constants(path, UNBACKED_VALUES)
    with logitstore.Writer(tmp_path / "small", teacher="t", logit_width=1000, values="grid") as writer:
        for _ in range(20):
            writer.add([0], [], [], count=[0])
    long, small = (next((p / "data/train").iterdir()).read_bytes() for p in (path, tmp_path / "small"))
    parts = [forge.Shard.of(data) for data in (long, small)]
    schema = pa.ipc.read_schema(pa.py_buffer(parts[0].schema))
    rows = [pa.ipc.read_record_batch(pa.py_buffer(part.messages[0]), schema).to_pylist() for part in parts]
    forged = parts[1]
    batch = pa.RecordBatch.from_pylist([rows[0][0] | {"id": str(i)} for i in range(20)], schema=schema)
    forged.messages = [forge.write_batch(batch, forge._info_of(parts[0].messages[0]))[1]]
    forged.counts = [[20, 20 * UNBACKED_VALUES, 0]]
    assert len(forged.seal()) < 6000
    with pytest.raises(logitstore.CorruptDataError, match="more values than its bytes can hold"):
        opened(forged.seal())


# The manifest's numbers.


def test_numbers_of_a_manifest_are_not_believed_before_the_shard_is_opened():
    dataset = logitstore.open(BAD / "manifest-of-too-many-sequences")
    assert len(dataset) == 2**50
    for read in (list, tuple, iter, lambda d: d.lengths(), lambda d: d[::2].lengths(), lambda d: list(d[5:])):
        with pytest.raises(logitstore.CorruptDataError, match="not the shard that the manifest names"):
            read(dataset)


def test_lengths_are_those_of_the_rows(write):
    dataset = logitstore.open(write(sequences=7, chunk_candidates=100))
    wanted = [len(sequence.tokens) for sequence in dataset]
    for part in (slice(None), slice(None, None, -1), slice(1, 6, 2), slice(3, 3), slice(6, 0, -3)):
        found = dataset[part].lengths()
        assert found.tolist() == wanted[part]
        assert found.dtype == np.uint32


# Users' columns.


KINDS = [
    (pa.list_view(pa.int8()), pa.list_(pa.int8()), [1, 2]),
    (pa.large_list_view(pa.list_view(pa.int8())), pa.large_list(pa.list_(pa.int8())), [[1], [2, 3]]),
    (pa.string_view(), pa.utf8(), "text"),
    (pa.list_(pa.binary_view()), pa.list_(pa.binary()), [b"bytes"]),
    (pa.run_end_encoded(pa.int32(), pa.int64()), pa.int64(), 7),
    (pa.struct([("a", pa.list_view(pa.dictionary(pa.int8(), pa.utf8())))]), pa.struct([("a", pa.list_(pa.utf8()))]), {"a": ["x"]}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "stored", "value"), KINDS, ids=[str(kind[0]) for kind in KINDS])
def test_views_and_runs_are_stored_as_plain_values(tmp_path, rows, given, stored, value):
    assert not can_be_stored(given)
    assert plain(given) == stored
    assert can_be_stored(stored)
    with logitstore.Writer(
        tmp_path / "data", teacher="t", logit_width=1000, columns=pa.schema([("note", given)])
    ) as writer:
        writer.add(*rows(0, 5, 4), note=value)
        writer.add(*rows(1, 5, 4))
    dataset = logitstore.open(tmp_path / "data")
    assert dataset.info.user_columns == {"note": str(stored)}
    assert [sequence.columns["note"] for sequence in dataset] == [value, None]


@pytest.mark.parametrize(
    "kind", [pa.sparse_union([pa.field("a", pa.int8())]), pa.dense_union([pa.field("a", pa.int8())])]
)
def test_unions_are_refused(tmp_path, kind):
    for declared in (kind, pa.list_(kind)):
        with pytest.raises(logitstore.InvalidInputError, match="unions"):
            logitstore.Writer(tmp_path / "data", teacher="t", columns=pa.schema([("note", declared)]))


def test_values_of_no_bytes_are_counted():
    empty = pa.StructArray.from_buffers(pa.struct([]), 5, [None])
    assert free_values(pa.nulls(3)) == 3
    assert free_values(empty) == 5
    assert free_values(pa.array([[None] * 4, [], None], pa.list_(pa.null()))) == 4
    assert free_values(pa.array([b"", b""], pa.binary(0))) == 2
    assert (
        free_values(pa.array([{"a": None, "b": [1]}], pa.struct([("a", pa.null()), ("b", pa.list_(pa.int8()))]))) == 1
    )
    assert free_values(pa.array([[("k", None)]], pa.map_(pa.utf8(), pa.null()))) == 1
    assert free_values(pa.array([1, 2])) == 0


def test_a_writer_refuses_values_of_no_bytes_that_readers_would_refuse(tmp_path, rows):
    kind = pa.schema([("note", pa.list_(pa.null()))])
    with logitstore.Writer(tmp_path / "few", teacher="t", logit_width=1000, columns=kind) as writer:
        writer.add(*rows(0, 5, 4), note=[None] * 3)
    assert logitstore.open(tmp_path / "few")[0].columns == {"note": [None] * 3}
    with (
        pytest.raises(logitstore.InvalidInputError, match="take no bytes"),
        logitstore.Writer(tmp_path / "many", teacher="t", logit_width=1000, columns=kind) as writer,
    ):
        writer.add(*rows(0, 5, 4), note=[None] * 100_000)


def shard_with(tmp_path, rows, forge, column, kind):
    """The parts of a shard whose only user's column is this array of one value."""
    with logitstore.Writer(tmp_path / "data", teacher="t", logit_width=1000) as writer:
        writer.add(*rows(0, 5, 4))
    shard = forge.Shard.of(next((tmp_path / "data/data/train").iterdir()).read_bytes())
    schema = pa.ipc.read_schema(pa.py_buffer(shard.schema))
    batch = pa.ipc.read_record_batch(pa.py_buffer(shard.messages[0]), schema)
    schema = schema.append(pa.field("note", kind))
    batch = pa.RecordBatch.from_arrays([*batch.columns, column], schema=schema)
    shard.schema, message = forge.write_batch(batch, forge._info_of(shard.messages[0]))
    shard.messages = [message]
    return shard


@pytest.mark.parametrize("zone", ["Europe", "right", "../..", "/etc/passwd", "nowhere", "+99:99", "x\u2028"])
def test_times_of_unknown_zones_are_given_as_arrow_has_them(tmp_path, rows, forge, zone):
    kind = pa.timestamp("us", zone)
    column = pa.array([1], pa.int64()).view(kind)
    shard = opened(shard_with(tmp_path, rows, forge, column, kind).seal())
    assert shard.chunk(0).sequence(0, frozenset(["note"])).columns["note"].value == 1


def test_numbers_that_python_does_not_hold_are_given_as_arrow_has_them(tmp_path, rows, forge):
    kind = pa.decimal128(38, -(2**31))
    column = pa.Array.from_buffers(kind, 1, [None, pa.py_buffer((7).to_bytes(16, "little"))])
    shard = opened(shard_with(tmp_path, rows, forge, column, kind).seal())
    assert isinstance(shard.chunk(0).sequence(0, frozenset(["note"])).columns["note"], pa.Scalar)


def test_columns_that_share_bytes_are_refused(tmp_path, rows, forge):
    kind = pa.struct([(str(i), pa.binary()) for i in range(9)])
    value = pa.array([{str(i): bytes([i]) * 1000 for i in range(9)}], kind)
    shard = shard_with(tmp_path, rows, forge, value, kind)
    assert opened(shard.seal()).chunk(0).sequence(0, frozenset(["note"])).columns["note"]["8"] == b"\x08" * 1000
    message = shard.messages[0]
    head = 8 + int.from_bytes(message[4:8], "little")
    at = [message.index(bytes([i]) * 1000) - head for i in range(1, 9)]
    for place in at[1:]:  # each names the bytes of the first, and theirs are cut off
        for before, size in ((0, 1000), (8, 8)):
            pair = struct.pack("<qq", place - before, size)
            assert message.count(pair) == 1
            message = message.replace(pair, struct.pack("<qq", at[0] - before, size))
    body = len(message) - head
    shard.messages = [message[: head + at[1]].replace(struct.pack("<q", body), struct.pack("<q", at[1]), 1)]
    with pytest.raises(logitstore.CorruptDataError, match="overlap"):
        opened(shard.seal()).chunk(0)


def test_a_schema_that_names_one_field_again_and_again_is_refused(tmp_path, rows, forge):
    """Arrow makes a field of its own of each, with all of its metadata: gigabytes of 64 KB."""
    from logitstore.shard.message import check_schema

    with logitstore.Writer(tmp_path / "data", teacher="t", logit_width=1000) as writer:
        writer.add(*rows(0, 5, 4))
    shard = forge.Shard.of(next((tmp_path / "data/data/train").iterdir()).read_bytes())
    schema = pa.ipc.read_schema(pa.py_buffer(shard.schema))
    for kind in (pa.int8(), pa.timestamp("us", "UTC"), pa.struct([("x", pa.list_(pa.map_(pa.utf8(), pa.int8())))])):
        fields = [pa.field(f"f{i}", kind, metadata={"k": "v" * 9 * (i == 299)}) for i in range(300)]
        message = pa.schema([*schema, *fields], metadata=schema.metadata).serialize().to_pybytes()
        check_schema(message)
    fields[-1] = pa.field("f", pa.int8(), metadata={"k": "v" * 30_000})
    message = bytearray(pa.schema([*schema, *fields], metadata=schema.metadata).serialize().to_pybytes())
    check_schema(bytes(message))
    (count,) = (i for i in range(8, len(message), 4) if message[i : i + 4] == struct.pack("<I", 314))
    places = range(count + 4, count + 4 + 4 * 314, 4)
    last = places[-1] + struct.unpack_from("<I", message, places[-1])[0]
    for place in places[14:-1]:
        struct.pack_into("<I", message, place, last - place)
    assert len(pa.ipc.read_schema(pa.py_buffer(bytes(message)))) == 314
    shard.schema = bytes(message)
    with pytest.raises(logitstore.CorruptDataError, match="again and again"):
        opened(shard.seal())


def test_a_message_of_many_keys_is_refused(tmp_path, rows, forge):
    with logitstore.Writer(tmp_path / "data", teacher="t", logit_width=1000) as writer:
        writer.add(*rows(0, 5, 4))
    shard = forge.Shard.of(next((tmp_path / "data/data/train").iterdir()).read_bytes())
    schema = pa.ipc.read_schema(pa.py_buffer(shard.schema))
    batch = pa.ipc.read_record_batch(pa.py_buffer(shard.messages[0]), schema)
    info = forge._info_of(shard.messages[0])
    for keys, refused in ((63, False), (64, True)):
        sink = pa.BufferOutputStream()
        metadata = {f"k{i}": "x" for i in range(keys)} | {"logitstore": info}
        pa.ipc.new_stream(sink, schema).write_batch(batch, custom_metadata=metadata)
        shard.messages = [sink.getvalue().to_pybytes()[schema.serialize().size :]]
        if not refused:
            assert len(opened(shard.seal()).chunk(0)) == 1
            continue
        with pytest.raises(logitstore.CorruptDataError, match="65 keys"):
            opened(shard.seal()).chunk(0)


def test_a_message_without_metadata_is_no_end_of_stream(forge):
    """Its length says that there is none, and what would be there is a record batch."""
    data = (ROOT / "spec/vectors/v1/coarse-grid/data/train/train-00000.arrow").read_bytes()
    shard = forge.Shard.of(data)
    message = bytearray(shard.messages[0])
    head = 8 + int.from_bytes(message[4:8], "little")
    body = (len(message) - head).to_bytes(8, "little")
    message = bytearray(bytes(message).replace(body, (len(message) - 8).to_bytes(8, "little"), 1))
    message[4:8] = bytes(4)
    shard.messages[0] = bytes(message)
    with pytest.raises(logitstore.CorruptDataError, match="no record batch"):
        opened(shard.seal()).chunk(0)


def test_a_program_s_own_types_may_fail(tmp_path, rows, forge):
    """An extension type runs code of whoever registered it when a schema names it."""

    class Failing(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.int64(), "logitstore.failing")

        def __arrow_ext_serialize__(self):
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, _storage, _data):
            raise ZeroDivisionError

    pa.register_extension_type(Failing())
    try:
        column = pa.ExtensionArray.from_storage(Failing(), pa.array([1]))
        shard = shard_with(tmp_path, rows, forge, column, Failing())
        with pytest.raises(logitstore.CorruptDataError, match="no Arrow schema"):
            opened(shard.seal())
    finally:
        pa.unregister_extension_type("logitstore.failing")


# Files.


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_directory_whose_name_is_not_utf_8(tmp_path, write):
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    place.mkdir()
    path = write(sequences=3).rename(place / "data")
    assert [sequence.id for sequence in logitstore.open(path)] == ["0", "1", "2"]
    assert logitstore.is_valid(logitstore.validate(path, deep=True))
    assert logitstore.open(path).lengths().tolist() == [12, 13, 14]
    for command in ("info", "head", "validate"):
        done = subprocess.run(
            [sys.executable, "-m", "logitstore_cli", command, path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_links_are_followed_for_reading(tmp_path, write):
    """As caches of the Hub have them."""
    path = write(sequences=3)
    (shard,) = logitstore.open(path).info.shards
    for name in (shard.path, "logitstore.json"):
        blob = tmp_path / f"blob-{name.replace('/', '-')}"
        (path / name).rename(blob)
        (path / name).symlink_to(blob)
    assert len(list(logitstore.open(path))) == 3
    assert logitstore.is_valid(logitstore.validate(path, deep=True))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
@pytest.mark.parametrize("name", ["logitstore.json", "shard", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_no_pipe_device_or_loop_is_opened(tmp_path, write, name, kind):
    path = write(sequences=1)
    place = path / (logitstore.open(path).info.shards[0].path if name == "shard" else name)
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero" if kind == "device" else place)
    with pytest.raises(logitstore.LogitStoreError):
        if name.startswith("tokenizer"):
            logitstore.Tokenizer.from_path(place.parent)
        else:
            list(logitstore.open(path))


# Tokenizers.


def tokenizer_of(folder, **fields):
    file = {"model": {"vocab": {"a": 0, "aa": 1}}} | fields
    (folder / "tokenizer.json").write_text(json.dumps(file))
    return logitstore.Tokenizer.from_path(folder)


def test_a_decoder_that_doubles_again_and_again_is_refused(tmp_path):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    steps = {"type": "Sequence", "decoders": [step] * 10}
    assert len(tokenizer_of(tmp_path, decoder=steps).token_bytes(0)) == 2**10
    steps = {"type": "Sequence", "decoders": [step] * 60}
    with pytest.raises(logitstore.InvalidInputError, match="token of over"):
        tokenizer_of(tmp_path, decoder=steps)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, '{"model":' * 10**5, '{"model": {"vocab": {"a": 1e999}}}', '{"model": {"vocab": {"a": %s}}}' % ("9" * 9000), '{"model": {"vocab": {"a": NaN}}}', "null"],
    ids=["lists", "objects", "infinite", "huge", "nan", "null"],
)  # fmt: skip
def test_odd_tokenizer_files_are_refused(tmp_path, text):
    for name in ("tokenizer.json", "partial_vocabulary.json"):
        (tmp_path / name).write_text(text)
        with pytest.raises(logitstore.InvalidInputError):
            logitstore.Tokenizer.from_path(tmp_path / name)


def test_a_file_over_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("logitstore.tokenizer.MAX_FILE", 10)
    with pytest.raises(logitstore.InvalidInputError, match="at most 10 bytes"):
        tokenizer_of(tmp_path)
