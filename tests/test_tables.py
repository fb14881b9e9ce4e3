"""Tables row by row: Parquet, Arrow files and streams, `datasets` directories, JSON lines; whole, odd and damaged."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitstore.convert import tables
from logitstore.convert.base import Item
from logitstore.convert.lines import Lines
from logitstore.convert.source import Input
from logitstore.convert.tables import (
    any_numbers,
    has_columns,
    numbers,
    plain,
    present,
    ragged_numbers,
    read_tables,
    schema_of,
    table_kind,
)
from logitstore.errors import SourceError

ARROW = ("parquet", "file", "stream")


def write(path, table, kind, **options):
    if kind == "parquet":
        pq.write_table(table, path, **options)
        return path
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, **options)
    return path


def nothing(_record, _tally):
    return ()


def records(*paths, **options):
    opened = read_tables([Input(path) for path in paths], nothing, **options)
    found = [record for piece in opened.pieces for record in piece.records()]
    assert opened.done() == opened.total
    return found


def cell(values, kind=None):
    """One row whose column `a` is this, as Arrow and as JSON have it."""
    return {"a": pa.array([values], kind)[0]}


SMALL = pa.table({"a": [[1, 2], [], None, [3]], "b": ["x", None, "y", ""]})


@pytest.mark.parametrize("kind", ARROW)
def test_rows_have_places_numbers_and_values(tmp_path, kind):
    paths = [write(tmp_path / f"{n}.x", SMALL, kind) for n in range(2)]
    found = records(*paths)
    assert [record.number for record in found] == list(range(8))
    assert found[5].place == f"{paths[1]}, row 1"
    assert [plain(record.data["a"]) for record in found[:4]] == [[1, 2], [], None, [3]]
    assert [present(record.data, "b") for record in found[:4]] == [True, False, True, True]
    assert not present(found[0].data, "nowhere")
    assert table_kind(Input(paths[0])) == ("parquet" if kind == "parquet" else f"arrow {kind}")
    assert schema_of(Input(paths[0])).names == ["a", "b"]


def test_a_directory_of_datasets(tmp_path):
    """What `save_to_disk` leaves: streams, numbered, beside JSON files."""
    for number in range(11):
        part = pa.table({"a": [[number]]})
        write(tmp_path / f"data-{number:05d}-of-00011.arrow", part, "stream")
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    write(tmp_path / "cache-1234.arrow", SMALL, "stream")
    from logitstore.convert.source import expand

    paths = expand([tmp_path], tables.TABLES)
    assert [plain(record.data["a"]) for record in records(*paths)] == [[n] for n in range(11)]


def test_several_kinds_together_but_no_lines(tmp_path):
    paths = [write(tmp_path / f"{kind}.x", SMALL, kind) for kind in ARROW]
    assert len(records(*paths)) == 12
    (tmp_path / "a.jsonl").write_text('{"a": [1]}\n')
    with pytest.raises(SourceError, match="JSON lines and Arrow tables in one input"):
        records(*paths, tmp_path / "a.jsonl")
    opened = read_tables([Input(tmp_path / "a.jsonl")], nothing)
    assert isinstance(next(iter(opened.pieces)), Lines)


def test_rows_of_lines(tmp_path):
    def parse(record, _tally):
        return (Item("add", {"tokens": numbers(record.data, "a", np.int64)}),)

    (tmp_path / "a.jsonl").write_text('{"a": [1, 2]}\n\n[1]\n"a"\n{"a"\n')
    opened = read_tables([Input(tmp_path / "a.jsonl")], parse)
    lines = [record for piece in opened.pieces for record in piece.records()]
    assert opened.parse(lines[0], None)[0].arguments["tokens"].tolist() == [1, 2]
    for line in lines[1:3]:
        with pytest.raises(SourceError, match="no JSON object"):
            opened.parse(line, None)
    with pytest.raises(SourceError, match="no whole JSON object"):
        opened.parse(lines[3], None)


@pytest.mark.parametrize("kind", ARROW)
def test_columns_are_looked_up(tmp_path, kind):
    path = write(tmp_path / "a", SMALL, kind)
    assert has_columns(Input(path), "a", "b")
    assert not has_columns(Input(path), "a", "c")
    path.write_bytes(path.read_bytes()[:12])
    assert not has_columns(Input(path), "a")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    assert has_columns(Input(tmp_path / "a.jsonl"), "a")
    assert not has_columns(Input(tmp_path / "a.jsonl"), "b")
    with pytest.raises(SourceError, match="no Parquet or Arrow table"):
        schema_of(Input(tmp_path / "a.jsonl"))


def test_only_some_columns_of_parquet_are_read(tmp_path):
    path = write(tmp_path / "a", SMALL.append_column("a.b", SMALL["b"]), "parquet")
    assert [list(record.data) for record in records(path, columns=["a", "c"])] == [["a"]] * 4
    assert [list(record.data) for record in records(path, columns=["a.b"])] == [["a.b"]] * 4


@pytest.mark.parametrize("kind", ARROW)
def test_tables_without_rows(tmp_path, kind):
    assert records(write(tmp_path / "a", SMALL[:0], kind)) == []


@pytest.mark.parametrize("kind", ARROW)
def test_a_name_that_stands_twice_is_refused(tmp_path, kind):
    two = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    path = write(tmp_path / "a", two, kind)
    with pytest.raises(SourceError, match="two columns are called 'a'"):
        records(path)


def test_a_table_compressed_as_a_whole_is_refused(tmp_path):
    import zstandard

    path = write(tmp_path / "a.parquet", SMALL, "parquet")
    path.write_bytes(zstandard.compress(path.read_bytes()))
    with pytest.raises(SourceError, match="decompress the file first"):
        records(path)


# Memory

PEAK = """
import resource, sys
from logitstore.convert.source import Input
from logitstore.convert.tables import read_tables
import pyarrow, pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = 0
for piece in read_tables([Input(__import__("pathlib").Path(sys.argv[1]))], None).pieces:
    rows += piece.batch.num_rows
    assert piece.batch.num_rows == 1 or piece.batch.nbytes < 16e6, piece.batch.nbytes
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak(path):
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    rows, kib = map(int, done.stdout.split())
    return rows, kib


@pytest.mark.parametrize("equal", [False, True])
def test_a_large_row_group_is_read_in_parts(tmp_path, equal):
    """One group of 120 MB, whose values may be all equal: then it is next to nothing in the file."""
    random = np.random.default_rng(0)
    values = np.zeros(30_000_000, np.float32) if equal else random.random(30_000_000, np.float32)
    inner = pa.FixedSizeListArray.from_arrays(pa.array(values), 50).cast(pa.list_(pa.float32()))
    table = pa.table({"a": pa.ListArray.from_arrays(np.arange(0, 600_001, 200, dtype=np.int32), inner)})
    path = write(tmp_path / "a", table, "parquet", row_group_size=10**6)
    assert pq.ParquetFile(path).num_row_groups == 1
    rows, kib = peak(path)
    assert rows == 3000
    assert kib < 60_000


def test_a_group_whose_rows_are_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_ROW_BYTES", 1000)
    path = write(tmp_path / "a", pa.table({"a": [list(range(10_000))]}), "parquet")
    with pytest.raises(SourceError, match=r"row group 0 says that its rows have [0-9,]{6} bytes each"):
        records(path)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_large_batch_is_cut_into_small_pieces(tmp_path, kind):
    values = np.random.default_rng(0).random(15_000_000, np.float32)
    table = pa.table(
        {"a": pa.ListArray.from_arrays(np.arange(0, 15_000_001, 10_000, dtype=np.int32), pa.array(values))}
    )
    path = write(tmp_path / "a", table, kind, max_chunksize=10**6)
    opened = read_tables([Input(path)], nothing)
    seen, rows = [], 0
    for piece in opened.pieces:
        seen.append(opened.done())
        assert piece.batch.nbytes <= 2**22
        rows += piece.batch.num_rows
    assert rows == 1500
    assert len(seen) > 10


def test_pickled_pieces_hold_their_own_rows_alone(tmp_path):
    many = pa.array([f"value {i}" for i in range(20_000)]).dictionary_encode()
    lists = pa.array([[i] * 10 for i in range(20_000)])
    nested = pa.ListArray.from_arrays(np.arange(20_001, dtype=np.int32), pa.array([1, 2] * 10_000).dictionary_encode())
    table = pa.table({"a": many, "b": lists, "c": nested})
    opened = read_tables([Input(write(tmp_path / "a", table, "file"))], nothing)
    pieces = list(opened.pieces)
    assert len(pieces) > 10
    for piece in pieces:
        data = pickle.dumps(piece)
        assert len(data) < 200_000
        again = pickle.loads(data)
        assert (again.name, again.first, again.row) == (piece.name, piece.first, piece.row)
        one, other = next(iter(piece.records())), next(iter(again.records()))
        assert {name: plain(value) for name, value in one.data.items()} == {
            name: plain(value) for name, value in other.data.items()
        }


# Values


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int32()),
        pa.large_list(pa.uint8()),
        pa.list_(pa.int64(), 3),
        pa.list_view(pa.int16()),
        pa.large_list_view(pa.int16()),
        pa.list_(pa.dictionary(pa.int8(), pa.int64())),
    ],
    ids=str,
)
def test_numbers_of_every_kind_of_list(kind):
    found = numbers(cell([1, 2, 3], kind), "a", np.int64)
    assert found.dtype == np.int64
    assert found.tolist() == [1, 2, 3]
    assert numbers(cell([1, 2, 3], kind), "a", np.float32).tolist() == [1, 2, 3]
    assert any_numbers(cell([1, 2, 3], kind), "a", np.int64)[0] is None


@pytest.mark.parametrize("outer", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 3), pa.list_view])
@pytest.mark.parametrize("inner", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2), pa.list_view])
def test_ragged_numbers_of_every_kind_of_list(outer, inner):
    kind = outer(inner(pa.float32()))
    column = pa.array([[[9, 9]] * 3, [[1, 2], None, [3, 4]]], kind)
    for array in (column[1:], pa.concat_arrays([column, column])[1:2]):
        count, values = ragged_numbers({"a": array[0]}, "a", np.float64)
        assert count.tolist() == [2, 0, 2]
        assert values.tolist() == [1, 2, 3, 4]


def test_lists_of_json():
    count, values = ragged_numbers({"a": [[1, 2.5], None, [], [3]]}, "a", np.float64)
    assert (count.tolist(), values.tolist()) == ([2, 0, 0, 1], [1, 2.5, 3])
    for empty in ([], [None, None], [[], None]):
        count, values = ragged_numbers({"a": empty}, "a", np.int64)
        assert (count.tolist(), values.tolist()) == ([0] * len(empty), [])
    assert any_numbers({"a": [1, 2]}, "a", np.int64)[1].tolist() == [1, 2]


def test_null_and_nan():
    for row in (cell([1, None, 3], pa.list_(pa.int32())), {"a": [1, None, 3]}):
        assert np.isnan(numbers(row, "a", np.float32)).tolist() == [False, True, False]
        assert numbers(row, "a", np.int64, null=-1).tolist() == [1, -1, 3]
        with pytest.raises(SourceError, match="a holds null"):
            numbers(row, "a", np.int64)
    for row in (cell([[1.0, None]], pa.list_(pa.list_(pa.float64()))), {"a": [[1.0, None]]}):
        assert np.isnan(ragged_numbers(row, "a", np.float32)[1]).tolist() == [False, True]
    assert numbers(cell([None, None], pa.list_(pa.null())), "a", np.int64, null=0).tolist() == [0, 0]
    for row in (cell(None, pa.list_(pa.int64())), {"a": None}, {}):
        with pytest.raises(SourceError, match="there is no a in this row"):
            numbers(row, "a", np.int64)


def test_booleans_are_integers_and_no_floats():
    for row in (cell([True, False]), {"a": [True, False]}):
        assert numbers(row, "a", np.int8).tolist() == [1, 0]
        with pytest.raises(SourceError, match="a holds bool; numbers are needed"):
            numbers(row, "a", np.float32)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([1.5], None), ([2.0], pa.list_(pa.float16())), (["1"], None), ([b"1"], None), ([{"b": 1}], None),
        ([[1]], None), ("12", None), (b"12", None), (12, None), (True, None), (1.5, None), ({"b": [1]}, None),
        ([2**40], None), ([-(2**40)], None), ([2**64 - 1], pa.list_(pa.uint64())), ([1], pa.list_(pa.decimal128(5))),
        ([0], pa.list_(pa.timestamp("s"))), ([("a", 1)], pa.map_(pa.string(), pa.int64())),
    ],
)  # fmt: skip
def test_what_is_no_list_of_integers_is_refused(value, kind):
    with pytest.raises(SourceError, match=r"^a"):
        numbers(cell(value, kind), "a", np.int32)
    if (
        kind is None
        and b"" not in (value, *(value[:0] if isinstance(value, bytes) else ()))
        and not isinstance(value, bytes)
    ):
        with pytest.raises(SourceError, match=r"^a"):
            numbers({"a": value}, "a", np.int32)


@pytest.mark.parametrize(
    "value", [[2**63], [-(2**63) - 1], [2**70], [1, "a"], [[1], 2], [1, [2]], [{}, 1], [True, 2], [["a"]], [[[[1]]]]]
)
def test_json_of_other_shapes_is_refused(value):
    with pytest.raises(SourceError, match=r"^a"):
        ragged_numbers({"a": value}, "a", np.int64)


def test_large_numbers():
    assert numbers({"a": [2**62]}, "a", np.int64).tolist() == [2**62]
    assert numbers(cell([2**31], pa.list_(pa.uint32())), "a", np.int64).tolist() == [2**31]
    assert np.isinf(numbers({"a": [1e300]}, "a", np.float32)).all()
    assert numbers({"a": [1e300]}, "a", np.float64).tolist() == [1e300]
    deep = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(SourceError, match=r"^a"):
        ragged_numbers({"a": deep}, "a", np.int64)


class Array2D(pa.ExtensionType):
    """As `datasets` stores its arrays: lists of lists under an extension's name. Not by its name: where `datasets` is
    imported (TRL does so), it has registered that already."""

    def __init__(self):
        super().__init__(pa.list_(pa.list_(pa.float32())), "logitstore.tests.Array2D")

    def __arrow_ext_serialize__(self):
        return json.dumps([[2, 2], "float32"]).encode()

    @classmethod
    def __arrow_ext_deserialize__(cls, _storage, _serialized):
        return cls()


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("kind", ARROW)
def test_arrays_of_datasets(tmp_path, kind, registered):
    array = Array2D()
    storage = pa.array([[[1, 2], [3, 4]], None], array.storage_type)
    path = write(tmp_path / "a", pa.table({"a": pa.ExtensionArray.from_storage(array, storage)}), kind)
    if registered:
        pa.register_extension_type(array)
    try:
        found = records(path)
        again = pickle.loads(pickle.dumps(next(read_tables([Input(path)], nothing).pieces)))
        for row in (found[0].data, next(iter(again.records())).data):
            count, values = ragged_numbers(row, "a", np.float32)
            assert (count.tolist(), values.tolist()) == ([2, 2], [1, 2, 3, 4])
        assert not present(found[1].data, "a")
    finally:
        if registered:
            pa.unregister_extension_type(array.extension_name)


@pytest.mark.parametrize("kind", ARROW)
def test_columns_by_dictionary(tmp_path, kind):
    table = pa.table({"a": pa.array(["x", "y", None, "x"]).dictionary_encode(), "b": SMALL["a"]})
    found = records(write(tmp_path / "a", table, kind))
    assert [plain(record.data["a"]) for record in found] == ["x", "y", None, "x"]
    assert [present(record.data, "a") for record in found] == [True, True, False, True]


def test_values_that_python_has_none_for():
    assert plain("a") == "a"
    assert plain(pa.scalar(None)) is None
    with pytest.raises(SourceError, match=r"a value of the type timestamp\[s\] cannot be read"):
        plain(pa.scalar(2**60, pa.timestamp("s")))


# Damage


@pytest.mark.parametrize("kind", ARROW)
def test_tables_cut_anywhere_are_refused(tmp_path, kind):
    path = write(
        tmp_path / "a", pa.concat_tables([SMALL] * 20), kind, **({} if kind == "parquet" else {"max_chunksize": 8})
    )
    data = path.read_bytes()
    assert len(records(path)) == 80
    for length in [*range(4, len(data), max(1, len(data) // 400)), *range(len(data) - 20, len(data))]:
        path.write_bytes(data[:length])
        with pytest.raises(SourceError):
            if table_kind(Input(path)) == "json":
                raise SourceError("not even its head is there")
            records(path)


def test_a_stream_without_its_end_mark_was_cut_off(tmp_path):
    path = write(tmp_path / "a", SMALL, "stream")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SourceError, match=r"row 4 \(the stream's end mark is missing"):
        records(path)


def test_what_stands_behind_a_stream_is_not_read(tmp_path):
    """As the index of our own shards."""
    path = write(tmp_path / "a", SMALL, "stream")
    path.write_bytes(path.read_bytes() + b"index" * 100)
    opened = read_tables([Input(path)], nothing)
    assert sum(piece.batch.num_rows for piece in opened.pieces) == 4


def test_checksums_of_pages_are_looked_at(tmp_path):
    table = pa.table({"a": np.arange(1000)})
    path = write(tmp_path / "a", table, "parquet", write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = data.find(np.arange(500, 510).tobytes())
    assert at > 0
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match="damaged behind row 0"):
        records(path)


FLIPS = """
import sys, numpy as np
from pathlib import Path
from logitstore.convert.source import Input
from logitstore.convert.tables import any_numbers, has_columns, plain, read_tables, table_kind
from logitstore.errors import LogitStoreError

path, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
data = path.read_bytes()
refused = 0
for seed in range(first, last):
    random = np.random.default_rng(seed)
    broken = bytearray(data)
    for _ in range(int(random.integers(1, 4))):
        broken[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    target = path.with_name(f"flipped{first}")
    target.write_bytes(broken)
    try:
        has_columns(Input(target), "a")
        if table_kind(Input(target)) == "json":
            continue
        for piece in read_tables([Input(target)], None).pieces:
            for record in piece.records():
                for name in record.data:
                    try:
                        any_numbers(record.data, name, np.int64)
                    except LogitStoreError:
                        plain(record.data[name])
    except LogitStoreError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("kind", ARROW)
def test_flipped_bits_end_in_rows_or_an_error(tmp_path, kind):
    """In a process of its own, since a forged table could end it."""
    random = np.random.default_rng(0)
    table = pa.table(
        {
            "a": [random.integers(0, 99, random.integers(0, 6)).tolist() for _ in range(40)],
            "b": pa.array(["x", None, "long text", ""] * 10).dictionary_encode(),
            "c": [[[0.5], None], [], None, [[1.5, 2.5]]] * 10,
        }
    )
    path = write(tmp_path / "a", table, kind)
    done = subprocess.run([sys.executable, "-c", FLIPS, path, "0", "600"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 20


@pytest.mark.parametrize("data", [b"", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"PAR1" + bytes(90) + b"PAR1"])
def test_heads_alone(tmp_path, data):
    path = Path(tmp_path / "a")
    path.write_bytes(data)
    assert not has_columns(Input(path), "a")
    with pytest.raises(SourceError):
        schema_of(Input(path))
