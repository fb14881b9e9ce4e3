"""`export --to parquet` and `jsonl`, and back by the importer `columns`."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.convert import convert, export
from logitstore.convert.export_rows import rectangle
from logitstore.convert.export_tables import cut
from logitstore.errors import InvalidInputError, SourceError

pytestmark = pytest.mark.usefixtures("quiet")

WIDTH = 60
KINDS = ("parquet", "jsonl")
OPTIONAL = ("target_logprob", "target_rank", "logsumexp", "entropy", "loss_mask")
COLUMNS = pa.schema([("text", pa.string()), ("n", pa.int64()), ("tags", pa.list_(pa.string()))])


@st.composite
def sequences(draw):
    """The arguments of some calls of `Writer.add`."""
    made = []
    for number in range(draw(st.integers(1, 5))):
        random = np.random.default_rng(draw(st.integers(0, 2**32)))
        positions = draw(st.integers(0, 7))
        k = draw(st.integers(1, 5))
        count = random.integers(0, k + 1, positions)
        keep = np.arange(k) < count[:, None]
        logprobs = random.normal(0, 2, (positions, k))
        logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True) * random.uniform(1, 3, (positions, 1)))
        fields = {
            "target_logprob": np.where(random.random(positions) < 0.3, np.nan, -random.exponential(2, positions)),
            "target_rank": random.integers(0, 90, positions),
            "logsumexp": random.normal(9, 3, positions),
            "entropy": random.exponential(1, positions),
            "loss_mask": random.integers(-1, 2, positions),
            "text": draw(st.text(st.characters(codec="utf-8"), max_size=5)),
            "n": draw(st.integers(-(2**63), 2**63 - 1)),
            "tags": draw(st.lists(st.sampled_from(["a", "", "c"]), max_size=2)),
        }
        chosen = draw(st.sets(st.sampled_from(list(fields))))
        made.append(
            {"tokens": random.integers(0, WIDTH, positions), "count": count, "id": draw(st.just(f"s{number}"))}
            | {"ids": random.permuted(np.tile(np.arange(WIDTH), (positions, 1)), axis=1)[:, :k][keep]}
            | {"logprobs": logprobs[keep].astype(np.float32)}
            | {name: value for name, value in fields.items() if name in chosen}
        )
    return made


def write_all(path, made, **options):
    options = {"logit_width": WIDTH, "values": "float32", "columns": COLUMNS, "teacher": "t"} | options
    with logitstore.Writer(path, **options) as writer:
        for arguments in made:
            writer.add(**arguments)
    return logitstore.open(path)


def back(path, out, **options):
    options = {"value_kind": "logprob", "alignment": "next", "values": "float32", "normalised": "vocabulary"} | options
    notes = convert([path], out, importer="columns", **options).notes
    return logitstore.open(out), notes


def listed(values):
    """NaN as text, which equals itself."""
    return None if values is None else [str(v) for v in values.tolist()]


def pairs(sequence, at):
    part = slice(sequence.offsets[at], sequence.offsets[at + 1])
    return sorted(zip((-sequence.logprobs[part]).tolist(), sequence.ids[part].tolist(), strict=True))


def is_same(a, b, columns=True):
    assert (a.id, a.tokens.tolist(), a.count.tolist()) == (b.id, b.tokens.tolist(), b.count.tolist())
    for at in range(len(a)):
        assert pairs(a, at) == pairs(b, at)
        mass = np.exp(a.logprobs[a.offsets[at] : a.offsets[at + 1]], dtype=float).sum()
        if mass < 0.95 and not np.isnan(a.tail[at]):  # what is left of a sum near 1 is mostly rounding
            assert b.tail[at] == a.tail[at] or abs(a.tail[at] - b.tail[at]) <= 1 / 32 + 1e-6
    assert np.isnan(a.tail).tolist() == np.isnan(b.tail).tolist()
    for name in OPTIONAL:
        assert listed(getattr(a, name)) == listed(getattr(b, name)), name
    assert not columns or a.columns == b.columns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalised", ["vocabulary", "candidates"])
def test_what_is_exported_comes_back(kind, normalised):
    @settings(max_examples=40)
    @given(sequences())
    def check(made):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            dataset = write_all(path / "a", made, normalised=normalised)
            export(dataset, path / f"out.{kind}", kind)
            # Over the candidates alone there is no logsumexp of the vocabulary to keep.
            options = {"map": {"values": "logprobs"}, "normalised": normalised}
            again, _ = back(path / f"out.{kind}", path / "b", **options)
            assert len(again) == len(dataset)
            for one, other in zip(dataset, again, strict=True):
                if normalised == "candidates":
                    one.__dict__["logsumexp"] = None
                is_same(one, other)
            assert again.info.normalised == normalised
            assert logitstore.is_valid(logitstore.validate(path / "b", deep=True))

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_draws_come_back(tmp_path, kind):
    with logitstore.Writer(tmp_path / "a", logit_width=WIDTH) as writer:
        writer.add_draws([1, 2, 3], [7, 8, 9], [30, 10, 5], [40, 5, 0], count=[2, 1, 0], target_logprob=[-1.0] * 3)
        writer.add_draws([4], [1], [5], 5, count=[1], entropy=[0.5])
    export(tmp_path / "a", tmp_path / f"out.{kind}", kind)
    again, _ = back(tmp_path / f"out.{kind}", tmp_path / "b", value_kind="draws", normalised=None)
    for one, other in zip(logitstore.open(tmp_path / "a"), again, strict=True):
        assert one.draws.tolist() == other.draws.tolist()
        is_same(one, other)
    assert again.info.totals.encodings == {"draws": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_and_other_sequences_together_come_back_as_logprobs(tmp_path, kind):
    with logitstore.Writer(tmp_path / "a", logit_width=WIDTH, values="float32") as writer:
        writer.add_draws([1, 2], [7, 8], [30, 10], [40, 0], count=[2, 0])
        writer.add([1, 2], [5], [-0.5], count=[1, 0])
    export(tmp_path / "a", tmp_path / f"out.{kind}", kind)
    again, _ = back(tmp_path / f"out.{kind}", tmp_path / "b")
    assert np.allclose(np.exp(again[0].logprobs), [0.75, 0.25])
    assert again[1].logprobs.tolist() == [-0.5]


SMALL = [
    {"tokens": [5, 6, 7], "ids": [1, 2, 3], "logprobs": [-0.5, -1.5, -0.25], "count": [2, 1, 0], "text": "a", "n": 1},
    {"tokens": [], "ids": [], "logprobs": [], "count": np.zeros(0, int)},
    {"tokens": [8], "ids": [9], "logprobs": [0.0], "count": [1], "target_rank": [4], "loss_mask": [1], "tags": []},
    {"tokens": [8], "ids": [9], "logprobs": [-0.1], "count": [1], "target_rank": [0], "loss_mask": [-1]},
]


def test_the_lines_are_those_of_the_sequences(tmp_path):
    write_all(tmp_path / "a", SMALL)
    done = export(tmp_path / "a", tmp_path / "out.jsonl", "jsonl")
    text = (tmp_path / "out.jsonl").read_text().splitlines()
    first, empty, best, unknown = map(json.loads, text)
    assert list(first) == ["id", "tokens", "ids", "logprobs", "tail", "target_rank", "loss_mask", "text", "n", "tags"]
    assert first["tokens"] == [5, 6, 7]
    assert first["ids"] == [[1, 2], [3], []]
    assert first["logprobs"] == [[-0.5, -1.5], [-0.25], []]
    assert first["tail"][2] is None
    assert (first["target_rank"], first["loss_mask"], first["text"]) == (None, None, "a")
    assert (empty["tokens"], empty["ids"], empty["tail"]) == ([], [], [])
    assert best["tail"] == [-9999]  # nothing is left
    assert (best["target_rank"], best["loss_mask"], best["tags"]) == ([4], [1], [])
    assert (unknown["target_rank"], unknown["loss_mask"]) == ([None], [None])
    assert '"logprobs":[[-0.1]]' in text[3]  # and not -0.10000000149011612
    assert any("--normalised vocabulary" in note for note in done.notes)
    assert any("text, n, tags" in note for note in done.notes)
    again, _ = back(tmp_path / "out.jsonl", tmp_path / "b")
    assert np.isneginf(again[2].tail[0])


def test_the_table_is_that_of_the_sequences(tmp_path):
    write_all(tmp_path / "a", SMALL, temperature=0.5)
    done = export(tmp_path / "a", tmp_path / "out.parquet", "parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert {name: str(kind) for name, kind in zip(table.schema.names, table.schema.types, strict=True)} == {
        "id": "string",
        "tokens": "list<element: uint32>",
        "ids": "list<element: list<element: int32>>",
        "logprobs": "list<element: list<element: float>>",
        "tail": "list<element: float>",
        "target_rank": "list<element: int64>",
        "loss_mask": "list<element: int8>",
        "text": "string",
        "n": "int64",
        "tags": "list<element: string>",
    }
    assert table["tokens"].to_pylist() == [[5, 6, 7], [], [8], [8]]
    assert table["ids"].to_pylist() == [[[1, 2], [3], []], [], [[9]], [[9]]]
    assert table["logprobs"].to_pylist()[0] == [[-0.5, -1.5], [-0.25], []]
    assert table["loss_mask"].to_pylist() == [None, None, [1], [-1]]
    assert table["tags"].to_pylist() == [None, None, [], None]
    facts = json.loads(table.schema.metadata[b"logitstore"])
    assert (facts["alignment"], facts["normalised"], facts["temperature"]) == ("next", "vocabulary", 0.5)
    assert facts["teacher"]["name"] == "t"
    assert "metadata" in done.notes[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 50])
def test_fewer_candidates(tmp_path, write, kind, k):
    """What the writer would have kept of the same sequences."""
    path = write(values="float32")
    done = export(path, tmp_path / f"out.{kind}", kind, k=k)
    assert any(f"the best {k} of a position" in note for note in done.notes)
    again, _ = back(tmp_path / f"out.{kind}", tmp_path / "b")
    for one, other in zip(logitstore.open(write("cut", values="float32", top_k=k)), again, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist()
        assert np.abs(one.tail - other.tail).max() <= 1 / 32 + 1e-6
    sequence = logitstore.open(path)[0]
    assert cut(sequence, None) is sequence
    assert cut(sequence, 8) is sequence
    assert len(sequence.ids) == 12 * 8  # it stays as it was


def test_a_directory_has_a_file_for_each_split(tmp_path, write, monkeypatch):
    path = write(sequences=40, positions=40, values="float32", per_sequence=lambda i: {"id": f"s{i}"})
    monkeypatch.setattr("logitstore.convert.export_tables._GROUP_BYTES", 2000)
    monkeypatch.setattr("logitstore.convert.export_tables._FILE_BYTES", 20_000)
    seen = []
    export(path, tmp_path / "hub", "parquet", progress=seen.append)
    assert seen == list(range(1, 41))
    files = sorted(file.name for file in (tmp_path / "hub" / "data").iterdir())
    assert len(files) > 1
    assert files == [f"train-{n:05d}-of-{len(files):05d}.parquet" for n in range(len(files))]
    found = [each for name in files for each in pq.read_table(tmp_path / "hub" / "data" / name)["id"].to_pylist()]
    assert found == [f"s{i}" for i in range(40)]
    again, _ = back(tmp_path / "hub", tmp_path / "b")
    for one, other in zip(logitstore.open(path), again, strict=True):
        assert pairs(one, 3) == pairs(other, 3)


def test_nothing_at_all_is_a_whole_table(tmp_path, write):
    path = write()
    export(logitstore.open(path)[:0], tmp_path / "none.parquet", "parquet")
    export(logitstore.open(path)[:0], tmp_path / "none", "parquet")
    export(logitstore.open(path)[:0], tmp_path / "none.jsonl", "jsonl")
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0
    assert pq.read_table(tmp_path / "none" / "data" / "train-00000-of-00001.parquet").schema.names[:2] == [
        "id",
        "tokens",
    ]
    assert (tmp_path / "none.jsonl").read_bytes() == b""


def test_a_view_of_rows_and_columns(tmp_path, write):
    path = write(per_sequence=lambda i: {"text": f"t{i}", "more": i, "entropy": np.ones(12 + i)})
    view = logitstore.open(path)[4:1:-1].select(["tokens", "text"])
    export(view, tmp_path / "v.parquet", "parquet")
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.schema.names == ["id", "tokens", "ids", "logprobs", "text"]
    assert table["text"].to_pylist() == ["t4", "t3", "t2"]


@pytest.mark.parametrize(("suffix", "opened"), [("zst", zstandard.open), ("gz", gzip.open)])
def test_lines_are_compressed_where_the_name_says_so(tmp_path, write, suffix, opened):
    path = write()
    export(path, tmp_path / f"out.jsonl.{suffix}", "jsonl")
    with opened(tmp_path / f"out.jsonl.{suffix}", "rb") as file:
        assert len(file.read().splitlines()) == 6
    again, _ = back(tmp_path / f"out.jsonl.{suffix}", tmp_path / "b")
    assert len(again) == 6


def test_users_columns_keep_their_types(tmp_path):
    types = {
        "when": (pa.timestamp("ns"), [dt.datetime(2020, 1, 2, 3, 4, 5), None]),  # noqa: DTZ001
        "raw": (pa.binary(), [b"\x00\xff", b""]),
        "deep": (pa.struct([("a", pa.list_(pa.int8())), ("b", pa.string())]), [{"a": [1], "b": None}, None]),
        "fixed": (pa.list_(pa.float64(), 2), [[0.5, float("inf")], None]),
        "large": (pa.uint64(), [2**64 - 1, 0]),
        "messages": (pa.list_(pa.struct([("role", pa.string())])), [[{"role": "user"}], []]),
    }
    schema = pa.schema([(name, kind) for name, (kind, _) in types.items()])
    made = [
        {"tokens": [1], "ids": [[1]], "logprobs": [[-0.5]]}
        | {name: np.uint64(values[i]) if name == "large" else values[i] for name, (_, values) in types.items()}
        for i in range(2)
    ]
    write_all(tmp_path / "a", made, columns=schema)
    export(tmp_path / "a", tmp_path / "out.parquet", "parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    for name, (kind, values) in types.items():
        assert table.schema.field(name).type.equals(kind) or pa.types.is_list(kind)
        assert [None if v is None else v for v in table[name].to_pylist()] == values
    again, notes = back(tmp_path / "out.parquet", tmp_path / "b")
    assert [s.columns for s in again] == [s.columns for s in logitstore.open(tmp_path / "a")]
    assert not any("left out" in note for note in notes)
    export(tmp_path / "a", tmp_path / "out.jsonl", "jsonl")
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first["deep"] == {"a": [1], "b": None}
    assert first["large"] == 2**64 - 1


def test_row_groups_are_small_enough_for_the_hub(tmp_path):
    """60 MB of candidates: row groups far below 100 MB, page indexes and checksums, and never whole in memory."""
    with logitstore.Writer(tmp_path / "a", logit_width=2**17) as writer:
        random = np.random.default_rng(0)
        for _ in range(240):
            ids = np.arange(64)[None, :] + random.integers(0, 10**5, (512, 1))
            writer.add(np.arange(512), ids, np.linspace(-3, -9, 64)[None, :] + random.uniform(-1, 0, (512, 1)))
    code = (
        "import sys, resource, logitstore, pyarrow.parquet\n"
        "from logitstore.convert import export, exporters\n"
        "exporters()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "export(sys.argv[1], sys.argv[2], sys.argv[3])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    used = {}
    for kind in KINDS:
        run = [sys.executable, "-c", code, tmp_path / "a", tmp_path / f"out.{kind}", kind]
        used[kind] = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert used["jsonl"] < 40_000  # KiB
    assert used["parquet"] < 150_000
    file = pq.ParquetFile(tmp_path / "out.parquet")
    groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
    assert max(group.total_byte_size for group in groups) < 40e6
    assert sum(group.total_byte_size for group in groups) > 30e6
    assert all(group.column(2).has_offset_index for group in groups)
    assert {group.column(2).compression for group in groups} == {"ZSTD"}
    assert sum(group.num_rows for group in groups) == 240


VIEW = ["tokens", "ids", "logprobs"]


@pytest.mark.parametrize("to", ["parquet", "jsonl", "axolotl", "trl", "nemo-aligner", "distillkit"])
@pytest.mark.parametrize("columns", [VIEW, ["tokens"], ["count"]])
def test_views_of_some_columns_are_exported(tmp_path, write, to, columns):
    path = write(per_sequence=lambda i: {"text": str(i), "loss_mask": np.ones(12 + i, int)})
    whole, view = (tmp_path / name / "out.parquet" for name in ("whole", "view"))
    export(path, whole, to)
    export(logitstore.open(path).select(columns), view, to)
    sizes = [
        len(file.read_bytes()) for out in (whole, view) for file in sorted([out, *out.rglob("*")]) if file.is_file()
    ]
    assert all(sizes)
    if to in ("axolotl", "trl", "parquet"):
        one, other = pq.read_table(whole), pq.read_table(view)
        assert "text" not in other.column_names
        assert other.equals(one.select(other.column_names))
    elif to == "nemo-aligner":
        assert whole.read_bytes() == view.read_bytes()


@pytest.mark.parametrize("to", ["parquet", "axolotl", "trl", "distillkit"])
def test_damage_to_a_page_is_found(tmp_path, write, to):
    export(write(), tmp_path / "out.parquet", to)
    path = tmp_path / "out.parquet" / "data_0.parquet" if to == "distillkit" else tmp_path / "out.parquet"
    pq.read_table(path, page_checksum_verification=True)
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(1)
    data[column.data_page_offset + column.total_compressed_size - 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


@pytest.mark.parametrize("normalised", ["vocabulary", "candidates"])
def test_what_the_table_says_of_itself_need_not_be_said(tmp_path, normalised):
    write_all(tmp_path / "a", SMALL, normalised=normalised, temperature=0.5)
    export(tmp_path / "a", tmp_path / "hub", "parquet")
    notes = convert([tmp_path / "hub"], tmp_path / "b", importer="columns").notes
    info = logitstore.open(tmp_path / "b").info
    assert (info.normalised, info.temperature) == (normalised, 0.5)
    assert f"alignment next, value_kind logprob, normalised {normalised}, temperature 0.5" in notes[0]
    assert not any("say --normalised" in note for note in notes)
    notes = convert([tmp_path / "hub"], tmp_path / "c", importer="columns", alignment="same", temperature=2.0).notes
    assert logitstore.open(tmp_path / "c").info.temperature == 2.0
    assert any("is about the token at t" in note for note in notes)
    with pytest.raises(InvalidInputError, match="say --value-kind"):  # it says nothing of another column
        convert([tmp_path / "hub"], tmp_path / "d", importer="columns", map={"values": "tail"})
    for value in ("null", "[1]", '{"alignment": "up"}', '{"temperature": -1}', "{", "\xff"):
        table = pq.read_table(next((tmp_path / "hub").rglob("*.parquet")))
        pq.write_table(table.replace_schema_metadata({"logitstore": value.encode("latin-1")}), tmp_path / "x.parquet")
        with pytest.raises(InvalidInputError, match="say --value-kind"):
            convert([tmp_path / "x.parquet"], tmp_path / "e", importer="columns")


def test_tables_that_say_different_things_are_not_one(tmp_path):
    for name, said in (("a", {}), ("b", {"normalised": "candidates"}), ("c", {"temperature": 2.0})):
        write_all(tmp_path / name, SMALL, **said)
        export(tmp_path / name, tmp_path / f"{name}.parquet", "parquet")
    paths = [tmp_path / f"{name}.parquet" for name in "abc"]
    with pytest.raises(SourceError, match=r"a.parquet says that normalised is vocabulary, .*b.parquet that it is cand"):
        convert(paths[:2], tmp_path / "x", importer="columns")
    with pytest.raises(SourceError, match=r"says that temperature is 1\.0"):
        convert([paths[0], paths[2]], tmp_path / "x", importer="columns")
    plain = pq.read_table(paths[0]).replace_schema_metadata(None)
    pq.write_table(plain, tmp_path / "plain.parquet")
    with pytest.raises(InvalidInputError, match="say --value-kind"):
        convert([paths[0], tmp_path / "plain.parquet"], tmp_path / "x", importer="columns")


ODD = {
    "when": (pa.timestamp("ns"), 1577934245000000001),
    "clock": (pa.time64("ns"), 1),
    "span": (pa.duration("ns"), 1),
    "far": (pa.timestamp("ms"), 2**61),
    "deep": (pa.struct([("a", pa.timestamp("ns"))]), {"a": 1}),
    "many": (pa.list_(pa.timestamp("ns")), [1, None]),
    "map": (pa.map_(pa.string(), pa.timestamp("ns")), [("k", 1)]),
    "months": (pa.month_day_nano_interval(), pa.MonthDayNano([1, 2, 3])),
    "large": (pa.uint64(), np.uint64(2**64 - 1)),
}


def write_odd(path):
    schema = pa.schema([(name, kind) for name, (kind, _) in ODD.items()])
    values = {name: value for name, (_, value) in ODD.items()}
    row = {"tokens": [1, 2], "ids": [[1], [2]], "logprobs": [[-0.5], [-0.5]]}
    return write_all(path, [row | values, row], columns=schema)


@pytest.mark.parametrize("to", ["parquet", "axolotl", "trl"])
def test_values_that_python_cannot_hold_are_kept(tmp_path, to):
    write_odd(tmp_path / "a")
    done = export(tmp_path / "a", tmp_path / "x.parquet", to)
    table = pq.read_table(tmp_path / "x.parquet")
    assert any("months (month_day_nano_interval) were left out" in note for note in done.notes)
    for name, (kind, value) in ODD.items():
        if name != "months":
            expected = pa.array([int(value) if name == "large" else value, None], kind)
            assert table[name].combine_chunks().cast(expected.type).equals(expected), name
    convert([tmp_path / "x.parquet"], tmp_path / "b", importer="columns" if to == "parquet" else to)
    again = logitstore.open(tmp_path / "b")[0].columns
    assert (again["when"].value, again["clock"].value, again["span"].value) == (1577934245000000001, 1, 1)
    assert again["far"].value == 2**61
    assert again["deep"]["a"].value == again["many"][0].value == 1
    assert again["large"] == 2**64 - 1


def test_json_holds_texts_of_them(tmp_path):
    write_odd(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "x.jsonl", "jsonl")
    first, second = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    epoch = "1970-01-01 00:00:00.000000001"
    assert {name: first[name] for name in ODD} == {
        "when": "2020-01-02 03:04:05.000000001",
        "clock": "00:00:00.000000001",
        "span": "1",
        "far": str(2**61),
        "deep": {"a": epoch},
        "many": [epoch, None],
        "map": [["k", epoch]],
        "months": [1, 2, 3],
        "large": 2**64 - 1,
    }
    assert {second[name] for name in ODD} == {None}


@pytest.mark.parametrize("to", ["parquet", "axolotl"])
def test_values_that_parquet_cannot_hold_are_named(tmp_path, to):
    row = {"tokens": [1], "ids": [[1]], "logprobs": [[-0.5]], "seconds": 2**60, "fine": 1}
    write_all(tmp_path / "a", [row], columns=pa.schema([("fine", pa.int8()), ("seconds", pa.timestamp("s"))]))
    with pytest.raises(InvalidInputError, match="the values of the column 'seconds'"):
        export(tmp_path / "a", tmp_path / "x.parquet", to)


def test_what_json_makes_of_users_columns_is_said(tmp_path):
    made = [{"tokens": [1], "ids": [[1]], "logprobs": [[-0.5]], "x": math.nan, "y": b"ab", "z": dt.timedelta(1)}]
    schema = pa.schema([("x", pa.float64()), ("y", pa.binary()), ("z", pa.duration("us"))])
    write_all(tmp_path / "a", made, columns=schema)
    done = export(tmp_path / "a", tmp_path / "x.jsonl", "jsonl")
    row = json.loads((tmp_path / "x.jsonl").read_text())
    assert (row["x"], row["y"], row["z"]) == (None, "YWI=", "P1D")
    assert (
        "NaN and infinities become null, bytes base64, and dates, times, durations and decimals text" in done.notes[1]
    )


@pytest.mark.parametrize(
    ("name", "is_file"), [("x.parquet", True), ("X.PARQUET", True), ("my.data", False), ("v1.2", False), ("x", False)]
)
def test_the_suffix_alone_says_whether_it_is_one_file(tmp_path, write, name, is_file):
    export(write(), tmp_path / name, "parquet")
    assert (tmp_path / name).is_file() == is_file


def test_users_columns_count_in_row_groups(tmp_path, write, monkeypatch):
    monkeypatch.setattr("logitstore.convert.export_rows._GROUP_BYTES", 40_000)
    path = write(sequences=8, positions=2, k=2, per_sequence=lambda i: {"text": "x" * 15_000})
    export(path, tmp_path / "x.parquet", "axolotl")
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [2, 2, 2, 2]


@pytest.mark.parametrize("to", ["axolotl", "trl", "nemo-aligner", "distillkit"])
def test_one_wide_position_does_not_fill_the_memory(tmp_path, to):
    """120,000 positions padded to 3,000 candidates would be gigabytes."""
    positions, wide = 120_000, 3000
    count = np.ones(positions, np.int64)
    count[7] = wide
    ids = np.zeros(int(count.sum()), np.int64)
    ids[7 : 7 + wide] = np.arange(wide)
    with logitstore.Writer(tmp_path / "a", logit_width=wide) as writer:
        writer.add(np.ones(positions, np.int64), ids, np.full(len(ids), -9.0, np.float32), count=count, id="long")
    with pytest.raises(InvalidInputError, match=r"'long': 120000 positions of 3000 candidates each.*smaller k"):
        export(tmp_path / "a", tmp_path / "out", to)
    done = export(tmp_path / "a", tmp_path / "out", to, k=2)
    assert "beyond the best 2" in " ".join(done.notes)


def test_rectangles_are_filled_in_blocks(write, monkeypatch):
    random = np.random.default_rng(0)
    count = random.integers(0, 6, 50)
    sequence = logitstore.open(write(positions=50, k=6))[0]
    keep = np.arange(6) < count[:, None]
    ids = sequence.ids.reshape(50, 6) % 7 + np.arange(6) * 7
    ids[:, 0] = random.integers(0, 6, 50)
    fields = {"id": "s", "tokens": sequence.tokens, "count": count.astype(np.uint32)}
    fields |= {"ids": ids[keep].astype(np.int32), "logprobs": sequence.logprobs[keep.ravel()]}
    fields["offsets"] = np.concatenate([[0], np.cumsum(count)])
    one = logitstore.Sequence.of(fields)
    whole = rectangle(one, 6, -9.0)
    monkeypatch.setattr("logitstore.convert.export_rows._BLOCK", 13)
    for a, b in zip(whole, rectangle(one, 6, -9.0), strict=True):
        assert a.tolist() == b.tolist()
    for at in range(50):
        assert whole[0][at, : count[at]].tolist() == ids[at, : count[at]].tolist()
        free = [i for i in range(12) if i not in ids[at, : count[at]]]
        assert whole[0][at, count[at] :].tolist() == free[: 6 - count[at]]
