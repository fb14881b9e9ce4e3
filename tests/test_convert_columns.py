"""`convert --from columns`: tables whose columns the user names."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import logitstore
from logitstore.convert import convert
from logitstore.convert.columns import IMPORTER
from logitstore.convert.source import Input
from logitstore.errors import InvalidInputError, SourceError

pytestmark = pytest.mark.usefixtures("quiet")

MAP = {"tokens": "input_ids", "ids": "token_ids", "logprobs": "top"}

# P(a | context) of the candidates of each row, by token: what a row is about is told by its ids.
ROW = {
    "input_ids": [3, 4, 5, 6],
    "token_ids": [[40, 4], [50, 5], [60, 6], [70, 7]],
    "top": [[-0.5, -1.5], [-0.25, -2.5], [-1.0, -1.25], [-0.75, -3.0]],
}


def write(folder, *rows, name="in.jsonl", schema=None):
    path = folder / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(list(rows), schema), path)
    elif name.endswith("arrow"):
        table = pa.Table.from_pylist(list(rows), schema)
        new = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder, *rows, name="in.jsonl", schema=None, **options):
    """(dataset, notes) of these rows."""
    path = write(folder, *rows, name=name, schema=schema)
    options = {"map": MAP, "value_kind": "logprob", "alignment": "next", "values": "float32"} | options
    done = convert([path], folder / "out", importer="columns", overwrite=True, **options)
    return logitstore.open(folder / "out"), done.notes


def refused(folder, match, *rows, error=SourceError, **options):
    with pytest.raises(error, match=match) as caught:
        read(folder, *rows, **options)
    return str(caught.value)


def positions(sequence):
    """{id: logprob} of each position."""
    spans = zip(sequence.offsets[:-1], sequence.offsets[1:], strict=True)
    return [dict(zip(sequence.ids[a:b].tolist(), sequence.logprobs[a:b].tolist(), strict=True)) for a, b in spans]


NEXT = [{40: -0.5, 4: -1.5}, {50: -0.25, 5: -2.5}, {60: -1.0, 6: -1.25}, {70: -0.75, 7: -3.0}]


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet", "in.arrow", "stream.arrow"])
class TestAlignment:
    def test_next(self, tmp_path, name):
        dataset, notes = read(tmp_path, ROW, name=name)
        assert dataset[0].tokens.tolist() == [3, 4, 5, 6]
        assert positions(dataset[0]) == NEXT
        assert "Row t predicts the token at t + 1" in notes[0]
        assert "tokens=input_ids, ids=token_ids, values=top" in notes[0]
        assert "normalised over the vocabulary" in notes[1]

    def test_next_without_the_last_row(self, tmp_path, name):
        row = ROW | {"token_ids": ROW["token_ids"][:3], "top": ROW["top"][:3]}
        dataset, _ = read(tmp_path, row, name=name)
        assert positions(dataset[0]) == [*NEXT[:3], {}]

    def test_same(self, tmp_path, name):
        row = ROW | {"token_ids": [None, [40, 4], [50, 5], [60, 6]], "top": [[], *ROW["top"][:3]]}
        dataset, notes = read(tmp_path, row, name=name, alignment="same")
        assert positions(dataset[0]) == [*NEXT[:3], {}]
        assert not any("first token" in note for note in notes)
        assert "is about the token at t" in notes[0]

    def test_same_without_the_first_row(self, tmp_path, name):
        row = ROW | {"token_ids": ROW["token_ids"][:3], "top": ROW["top"][:3]}
        dataset, _ = read(tmp_path, row, name=name, alignment="same")
        assert positions(dataset[0]) == [*NEXT[:3], {}]

    def test_a_first_row_that_says_something_is_dropped_and_counted(self, tmp_path, name):
        dataset, notes = read(tmp_path, ROW, ROW, name=name, alignment="same")
        assert positions(dataset[1]) == [*NEXT[1:], {}]
        assert any("In 2 of the rows the distribution of the first token was left out" in note for note in notes)


def test_columns_of_one_value_a_row_move_with_the_rows(tmp_path):
    row = ROW | {
        "tail": [-1, -3, -2, -4],
        "target_logprob": [None, -1.5, -2.5, -1.25],
        "target_rank": [None, 2, 3, 4],
        "logsumexp": [9, 8, 7, 6],
        "entropy": [0.5, 1.5, 2.5],
        "loss_mask": [0, 1, None, 1],
    }
    dataset, _ = read(tmp_path, row, alignment="same")
    sequence = dataset[0]
    assert positions(sequence) == [*NEXT[1:], {}]
    assert sequence.target_logprob[:3].tolist() == [-1.5, -2.5, -1.25]
    assert sequence.target_rank.tolist() == [2, 3, 4, 0]
    assert sequence.logsumexp[:3].tolist() == [8, 7, 6]
    assert sequence.entropy[:3].tolist() == [0.5, 1.5, 2.5]  # without the first row
    assert sequence.loss_mask.tolist() == [1, -1, 1, 0]
    assert math.isnan(sequence.target_logprob[3])
    dataset, _ = read(tmp_path, row | {"tail": [-9999, -3, -2, None]})
    assert dataset[0].target_rank.tolist() == [0, 2, 3, 4]
    assert dataset[0].entropy[:3].tolist() == [0.5, 1.5, 2.5]
    assert math.isnan(dataset[0].entropy[3])
    assert np.isneginf(dataset[0].tail[0])
    assert dataset[0].loss_mask.tolist() == [0, 1, -1, 1]


def test_booleans_and_integers_are_masks(tmp_path):
    dataset, _ = read(tmp_path, ROW | {"train": [True, False, True, False]}, map=MAP | {"loss_mask": "train"})
    assert dataset[0].loss_mask.tolist() == [1, 0, 1, 0]


FLAT = {"input_ids": [3, 4, 5], "token_ids": [40, 4, 50, 5, 60, 6], "top": [-0.5, -1.5, -0.25, -2.5, -1.0, -1.25]}


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (None, NEXT[:3]),
        ([2, 2, 2], NEXT[:3]),
        ([3, 0, 3], [{40: -1.5, 4: -2.5, 50: -1.25}, {}, {5: -3.5, 60: -1.0, 6: -1.25}]),
        ([3, 3], [{40: -1.5, 4: -2.5, 50: -1.25}, {5: -3.5, 60: -1.0, 6: -1.25}, {}]),
    ],
)
def test_flat_lists(tmp_path, name, count, wanted):
    row = FLAT if count is None else FLAT | {"n_of": count}
    if count and count[0] == 3:
        row = row | {"top": [-1.5, -2.5, -1.25, -3.5, -1.0, -1.25]}
    dataset, _ = read(tmp_path, row, name=name, map=MAP | ({} if count is None else {"count": "n_of"}))
    assert positions(dataset[0]) == wanted


def test_lists_that_are_filled_up_are_cut_by_their_count(tmp_path):
    dataset, _ = read(tmp_path, ROW | {"count": [1, 2, 0, 2]})
    assert positions(dataset[0]) == [{40: -0.5}, NEXT[1], {}, NEXT[3]]
    refused(tmp_path, "line 1: row 1: count is 3, but there are 2 candidates", ROW | {"count": [1, 3, 0, 2]})
    refused(tmp_path, "count has 3 values for 4 rows", ROW | {"count": [1, 2, 0]})


def test_fixed_sizes_and_large_lists(tmp_path):
    for outer in (pa.list_, pa.large_list, lambda kind: pa.list_(kind, 4)):
        for inner in (pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)):
            types = {
                "input_ids": pa.list_(pa.uint32()),
                "token_ids": outer(inner(pa.int16())),
                "top": outer(inner(pa.float64())),
            }
            schema = pa.schema(types)
            for name in ("in.parquet", "in.arrow"):
                dataset, _ = read(tmp_path, ROW, ROW, name=name, schema=schema)
                assert [positions(s) for s in dataset] == [NEXT, NEXT]


def test_padding_is_no_candidate(tmp_path):
    row = ROW | {"top": [[-0.5, -9999.0], [-0.25, -1e9], [None, None], [-0.75, -3.0]]}
    refused(tmp_path, "is NaN", row, error=InvalidInputError)
    dataset, _ = read(tmp_path, row | {"top": [[-0.5, -9999.0], [-0.25, -1e9], [-1e9, -1e9], [-0.75, -3.0]]})
    assert positions(dataset[0]) == [{40: -0.5}, {50: -0.25}, {}, NEXT[3]]
    values = [[-0.5, -math.inf], [-0.25, -9999.5], [-math.inf, -math.inf], [-0.75, -3.0]]
    dataset, _ = read(
        tmp_path, row | {"top": values, "token_ids": [[40, -1], [50, 50], [0, 0], [70, 7]]}, name="in.parquet"
    )
    assert positions(dataset[0]) == [{40: -0.5}, {50: -0.25}, {}, NEXT[3]]


def test_probabilities(tmp_path):
    row = ROW | {"top": [[0.5, 0.25], [1.0, 0.0], [0.125, 0.0625], [0.5, 0.5]]}
    dataset, _ = read(tmp_path, row, value_kind="probability")
    found = positions(dataset[0])
    assert found[0] == pytest.approx({40: math.log(0.5), 4: math.log(0.25)})
    assert found[1] == {50: 0.0}
    assert dataset[0].tail[0] == pytest.approx(math.log(0.25), abs=1 / 64)
    refused(tmp_path, "line 1: 1.5 is no probability", row | {"top": [[1.5, 0]] * 4}, value_kind="probability")
    refused(tmp_path, "nan is no probability", row | {"top": [[None, 0.5]] * 4}, value_kind="probability")
    refused(tmp_path, "not a logprob", row, error=InvalidInputError)  # they are none


def test_logits_over_the_candidates(tmp_path):
    row = ROW | {"top": [[2.0, 1.0], [5.0, 5.0], [-1e9, -1e9], [3.0, -1e9]]}
    row |= {"tail": [0, 0, 0, 0], "target_logprob": [0, 0, 0, 0]}
    dataset, notes = read(tmp_path, row, value_kind="logit")
    assert dataset.info.normalised == "candidates"
    total = math.log(math.exp(2) + math.e)
    found = positions(dataset[0])
    assert found[0] == pytest.approx({40: 2 - total, 4: 1 - total})
    assert found[1] == pytest.approx({50: math.log(0.5), 5: math.log(0.5)})
    assert found[2:] == [{}, {70: 0}]
    assert dataset[0].target_logprob is None
    assert any("over the candidates of each position alone" in note for note in notes)
    assert any("tail, target_logprob were left out" in note for note in notes)
    says = "logits are normalised over the vocabulary by their logsumexp only"
    refused(tmp_path, says, row, value_kind="logit", normalised="vocabulary", error=InvalidInputError)
    says = "there is no tail of values that are normalised"
    refused(tmp_path, says, row, value_kind="logit", map=MAP | {"tail": "tail"}, error=InvalidInputError)
    refused(tmp_path, "a logit is NaN", row | {"top": [[None, 1.0]] * 4}, value_kind="logit")


@pytest.mark.parametrize("alignment", ["next", "same"])
@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_logits_by_their_logsumexp(tmp_path, name, alignment):
    row = ROW | {"top": [[2.0, 1.0], [5.0, 4.0], [3.0, 2.0], [1.0, 0.5]], "lse": [3.0, 6.0, 4.0, 2.0]}
    options = {"value_kind": "logit", "map": MAP | {"logsumexp": "lse"}, "alignment": alignment, "name": name}
    dataset, notes = read(tmp_path, row, **options)
    assert dataset.info.normalised == "vocabulary"
    wanted = [{40: -1.0, 4: -2.0}, {50: -1.0, 5: -2.0}, {60: -1.0, 6: -2.0}, {70: -1.0, 7: -1.5}]
    shifted = wanted if alignment == "next" else [*wanted[1:], {}]
    assert positions(dataset[0]) == shifted
    known = dataset[0].logsumexp.tolist()
    assert known[:3] == ([3, 6, 4] if alignment == "next" else [6, 4, 2])
    assert any("by the column of the logsumexp" in note for note in notes)
    refused(
        tmp_path, "position [01]: there are logits, but no logsumexp", row | {"lse": [3.0, None, 4.0, 2.0]}, **options
    )
    refused(tmp_path, "there is no logsumexp in this row", row, row | {"lse": None}, **options)
    refused(tmp_path, "not a logprob", row | {"lse": [1.0] * 4}, error=InvalidInputError, **options)


def test_draws(tmp_path):
    row = ROW | {"top": [[30, 10], [5, 0], [0, 0], [1, 2]], "tail": [0] * 4, "n": 7}
    dataset, notes = read(tmp_path, row, value_kind="draws")
    assert dataset[0].draws.tolist() == [30, 10, 5, 2, 1]
    assert dataset[0].ids.tolist() == [40, 4, 50, 7, 70]
    assert dataset[0].count.tolist() == [2, 1, 0, 2]
    assert dataset[0].columns == {}
    assert any("tail were left out" in note for note in notes)
    assert any("The columns n were left out: the format itself uses" in note for note in notes)
    refused(tmp_path, "-1 draws", row | {"top": [[-1, 1]] * 4}, value_kind="draws")
    refused(tmp_path, "integers are needed", row | {"top": [[0.5, 1]] * 4}, value_kind="draws")
    refused(tmp_path, "draws", row | {"top": [[2**62, 1]] * 4}, value_kind="draws")


def test_normalised_over_the_candidates(tmp_path):
    dataset, notes = read(tmp_path, ROW | {"target_logprob": [-1] * 4, "tail": [-1] * 4}, normalised="candidates")
    assert dataset.info.normalised == "candidates"
    assert dataset[0].target_logprob.tolist() == [-1] * 4
    assert np.isnan(dataset[0].tail).all()
    assert not any("taken to be normalised" in note for note in notes)
    assert any("tail were left out" in note for note in notes)


def test_temperature_is_recorded(tmp_path):
    assert read(tmp_path, ROW, temperature=2.0)[0].info.temperature == 2


def test_sums_that_rounding_made_are_brought_to_1(tmp_path):
    half = math.log(0.505)
    row = ROW | {"top": [[half, half], [-0.25, -2.5], [-1.0, -1.25], [-0.75, -3.0]], "tail": [None, -1.9, None, -1.0]}
    dataset, notes = read(tmp_path, row)
    assert positions(dataset[0])[0] == pytest.approx({40: math.log(0.5), 4: math.log(0.5)})
    total = math.exp(-0.25) + math.exp(-2.5) + math.exp(-1.9)
    assert positions(dataset[0])[1] == pytest.approx({50: -0.25 - math.log(total), 5: -2.5 - math.log(total)}, abs=1e-5)
    assert positions(dataset[0])[2:] == NEXT[2:]
    assert any("At 2 positions the probabilities do not sum to 1" in note for note in notes)
    row["tail"] = [None, -1.9653, None, -1.0]  # off by less than a tail's own rounding
    dataset, notes = read(tmp_path, row)
    assert positions(dataset[0])[1:] == NEXT[1:]
    assert any("At 1 positions the tail" in note for note in notes)
    refused(tmp_path, "sum to 1.09", ROW | {"top": [[-0.6, -0.6]] * 4}, error=InvalidInputError)
    refused(tmp_path, "is above 0: not a logprob", ROW | {"top": [[0.02, -9.0]] * 4}, error=InvalidInputError)


def test_users_columns_of_a_table(tmp_path):
    types = {
        "input_ids": pa.list_(pa.int64()),
        "token_ids": pa.list_(pa.list_(pa.int64())),
        "top": pa.list_(pa.list_(pa.float32())),
        "text": pa.string(),
        "tags": pa.list_(pa.string()),
        "score": pa.float32(),
        "kind": pa.dictionary(pa.int8(), pa.string()),
        "big": pa.uint64(),
        "bigs": pa.list_(pa.uint64()),
        "messages": pa.list_(pa.struct([("role", pa.string()), ("n", pa.list_(pa.int8()))])),
        "length": pa.int64(),
        "self": pa.int8(),
        "other": pa.list_(pa.list_(pa.float32())),
        "no": pa.null(),
    }
    schema = pa.schema(types)
    row = ROW | {"text": "a", "tags": [], "score": 0.5, "kind": "x", "length": 4, "other": [[1.0]], "big": 2**64 - 1}
    row |= {"bigs": [2**64 - 1, 0], "messages": [{"role": "user", "n": [1]}], "self": 1}
    for name in ("in.parquet", "in.arrow"):
        dataset, notes = read(tmp_path, row, ROW, name=name, schema=schema)
        assert dataset[0].columns == {
            "text": "a", "tags": [], "score": 0.5, "kind": "x", "big": 2**64 - 1,
            "bigs": [2**64 - 1, 0], "messages": [{"role": "user", "n": [1]}],
        }  # fmt: skip
        assert set(dataset[1].columns.values()) == {None}
        assert dataset.info.user_columns["tags"].startswith("list<")
        assert any("The columns length, self were left out: the format itself uses these names." in n for n in notes)
        assert any("The columns other, no were left out: only scalars" in note for note in notes)


def test_users_columns_of_lines(tmp_path):
    rows = [ROW | {"text": "a", "n": 1, "tags": [], "deep": {"a": 1}, "rows": [[1]], "length": 3, "none": None}]
    rows += [ROW | {"text": None, "n": 2.5, "tags": ["x"], "late": 1}, ROW | {"text": "c", "mixed": 5}]
    dataset, notes = read(tmp_path, *rows, ROW | {"mixed": "x"})
    assert [s.columns for s in dataset] == [
        {"text": "a", "n": 1.0, "tags": [], "none": None, "late": None},
        {"text": None, "n": 2.5, "tags": ["x"], "none": None, "late": 1},
        {"text": "c", "n": None, "tags": None, "none": None, "late": None},
        {"text": None, "n": None, "tags": None, "none": None, "late": None},
    ]
    text = " ".join(notes)
    assert "The columns length were left out: the format itself" in text
    assert "The columns deep, rows, mixed were left out: only scalars" in text


def test_lines_beyond_the_first_must_fit_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("logitstore.convert.lines._PIECE_BYTES", 10)  # each line a piece
    monkeypatch.setattr("logitstore.convert.columns_kept._PEEKED", 1)
    rows = [
        ROW | {"text": "a", "n": 1, "x": 0.5},
        ROW | {"text": 5, "n": 1.5, "x": 1, "late": 1},
        ROW | {"text": "b", "n": 2},
    ]
    dataset, notes = read(tmp_path, *rows)
    assert [s.columns for s in dataset] == [
        {"text": "a", "n": 1, "x": 0.5},
        {"text": None, "n": None, "x": 1.0},
        {"text": "b", "n": 2, "x": None},
    ]
    assert any("In 1 of the rows the column late was left out" in note for note in notes)
    assert any("In 1 of the rows the column n was left out, since its value is not int64" in note for note in notes)
    assert any("In 1 of the rows the column text was left out" in note for note in notes)


def test_ids(tmp_path):
    dataset, _ = read(tmp_path, ROW | {"id": "a"}, ROW | {"id": 7}, ROW, ROW | {"id": None})
    assert [s.id for s in dataset] == ["a", "7", "2", "3"]
    dataset, _ = read(tmp_path, ROW | {"id": "a", "uuid": "b"}, map=MAP | {"id": "uuid"})
    assert (dataset[0].id, dataset[0].columns) == ("b", {})
    refused(tmp_path, "line 1: id is list", ROW | {"id": ["a"]})


def test_names_that_are_ours_need_no_map(tmp_path):
    row = {"tokens": ROW["input_ids"], "ids": ROW["token_ids"], "logprobs": ROW["top"], "values": [[0.0]]}
    dataset, _ = read(tmp_path, row, map={})
    assert positions(dataset[0]) == NEXT
    names = {"logit": "logits", "probability": "probabilities", "draws": "draws"}
    values = {"logit": [[2, 1]] * 4, "probability": [[0.5, 0.1]] * 4, "draws": [[2, 1]] * 4}
    for kind, name in names.items():
        dataset, notes = read(tmp_path, row | {name: values[kind]}, map={}, value_kind=kind)
        assert f"values={name}" in notes[0]
        assert positions(dataset[0])[0][40] > positions(dataset[0])[0][4]


def test_several_inputs(tmp_path):
    paths = [
        write(tmp_path, ROW | {"a": 1, "b": 1}, name="1.parquet"),
        write(tmp_path, ROW | {"a": 2, "b": "x", "c": "y"}, name="2.arrow"),
    ]
    done = convert(paths, tmp_path / "out", importer="columns", map=MAP, value_kind="logprob", alignment="next")
    dataset = logitstore.open(tmp_path / "out")
    assert [s.columns for s in dataset] == [{"a": 1, "c": None}, {"a": 2, "c": "y"}]
    assert any("The columns b were left out" in note for note in done.notes)
    paths.append(write(tmp_path, ROW))
    with pytest.raises(SourceError, match="Parquet or Arrow"):
        convert(paths, tmp_path / "no", importer="columns", map=MAP, value_kind="logprob", alignment="next")


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_workers_change_nothing(tmp_path, name):
    rows = [ROW | {"text": f"t{i}", "kind": "k"} for i in range(300)]
    schema = None
    if name != "in.jsonl":
        schema = pa.Table.from_pylist(rows).schema
        schema = schema.set(schema.get_field_index("kind"), pa.field("kind", pa.dictionary(pa.int32(), pa.string())))
    digests = {read(tmp_path, *rows, name=name, schema=schema, workers=n)[0].info.dataset_digest for n in (0, 2)}
    assert len(digests) == 1


def test_what_must_be_said(tmp_path):
    says = {"value_kind": "say --value-kind", "alignment": "say --alignment"}
    for option, match in says.items():
        refused(tmp_path, match, ROW, error=InvalidInputError, **{option: None})
    says = "--map has logprobs and values"
    refused(tmp_path, says, ROW, error=InvalidInputError, map=MAP | {"values": "top"})
    refused(tmp_path, "--map knows no 'tokenz'", ROW, error=InvalidInputError, map={"tokenz": "input_ids"})
    options = {"value_kind": "draws", "map": MAP | {"tail": "tail"}}
    refused(tmp_path, "there is no tail of draws", ROW | {"tail": [0] * 4}, error=InvalidInputError, **options)


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_columns_that_are_not_there(tmp_path, name):
    text = refused(tmp_path, "no column is known to be ids", ROW, name=name, map={"tokens": "input_ids"})
    assert name in text
    assert "input_ids, token_ids, top" in text
    refused(tmp_path, r"there is no column 'lost' \(--map tail=lost\)", ROW, name=name, map=MAP | {"tail": "lost"})


CASES = [
    ({"input_ids": None}, "there is no input_ids"),
    ({"input_ids": "abc"}, "input_ids is (str|string)"),
    ({"input_ids": [1.5, 2.5, 3.5, 4.5]}, "input_ids holds double; integers are needed"),
    ({"input_ids": ["a"] * 4}, "input_ids holds string"),
    ({"input_ids": [1, None, 3, 4]}, "input_ids holds null"),
    ({"input_ids": [[1]] * 4}, "input_ids holds list"),
    ({"input_ids": {"a": 1}}, "input_ids is (dict|struct)"),
    ({"token_ids": None}, "there is no token_ids"),
    ({"token_ids": [[40, 4]] * 3}, "token_ids has 3 rows, top 4"),
    ({"token_ids": [[40, 4], [50], [60, 6], [70, 7]]}, "row 1: token_ids has 1 candidates, top 2"),
    ({"token_ids": [[40, None]] * 4}, "token_ids holds null"),
    ({"token_ids": [[0.5, 1.5]] * 4}, "token_ids holds double"),
    ({"token_ids": [1, 2, 3, 4]}, "one of token_ids and top is a list of lists"),
    ({"token_ids": [1, 2, 3], "top": [-1.0, -1.0, -1.0]}, "a flat list of 3 candidates"),
    ({"token_ids": [1, 2, 3, 4], "top": [-1.0, -1.0, -1.0]}, "token_ids has 4 values, top 3"),
    ({"token_ids": [1, 2], "top": [-1.0, -1.0], "count": [1, 0, 0, 2]}, "count sums to 3, but token_ids has 2"),
    ({"token_ids": [1, 2], "top": [-1.0, -1.0], "count": [3, -1, 0, 0]}, "row 1: count is -1"),
    ({"token_ids": [1, 2], "top": [-1.0, -1.0], "count": [2]}, "top has 1 rows for 4 tokens; 4 are needed, or 3"),
    ({"token_ids": [], "top": []}, "top has 0 rows for 4 tokens"),
    ({"token_ids": [[1]] * 5, "top": [[-1.0]] * 5}, "top has 5 rows for 4 tokens; 4 are needed, or 3 where the last"),
    ({"token_ids": [[1]] * 2, "top": [[-1.0]] * 2}, "top has 2 rows for 4 tokens"),
    ({"top": [["a", "b"]] * 4}, "top holds string; numbers are needed"),
    ({"top": [[True, False]] * 4}, "top holds bool"),
    ({"top": [[{"a": 1}, {"a": 1}]] * 4}, "top holds struct"),
    ({"entropy": [1.0] * 2}, "entropy has 2 rows for 4 tokens"),
    ({"entropy": [[1.0]] * 4}, "entropy holds list"),
    ({"entropy": 5}, "entropy is int"),
    ({"target_rank": [0.5] * 4}, "target_rank holds double"),
    ({"count": 5}, "count is int"),
]


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize(("change", "says"), CASES)
def test_rows_that_are_wrong_are_named(tmp_path, name, change, says):
    text = refused(tmp_path, says, ROW | change, name=name)
    assert f"{name}, {'line 1' if name == 'in.jsonl' else 'row 0'}:" in text


def test_an_error_names_the_row(tmp_path):
    assert "in.parquet, row 1:" in refused(tmp_path, "top 3", ROW, ROW | {"top": ROW["top"][:3]}, name="in.parquet")
    path = write(tmp_path, ROW, ROW | {"input_ids": []}, ROW)
    options = {"map": MAP, "value_kind": "logprob", "alignment": "next"}
    done = convert([path], tmp_path / "skip", importer="columns", on_error="skip", **options)
    assert (done.skipped, done.summary.sequences) == (1, 2)
    assert "line 2" in done.failures[0]
    off = {"input_ids": [1, 5, 6, 7] * 30, "token_ids": [[1], [5], [6], [7]] * 30, "top": [[-0.1]] * 120}
    refused(tmp_path, "the rows are off by -1", *[off] * 5)


def test_it_is_never_recognised(tmp_path):
    path = write(tmp_path, ROW, name="in.parquet")
    assert IMPORTER.recognises(Input(path)) is False


WRONG = [None, "x", 1, -1, 1.5, [], {}, [[]], [None], True, 2**70, -(2**70), 1e300, {"a": [1]}, [[[1]]], ["\u2028"]]


def mutated(row, rng):
    """A row in which one node is something else, or gone."""
    row = copy.deepcopy(row)
    node, path = row, []
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append(key)
        inner = node[key]
        if not isinstance(inner, list | dict) or not inner or rng.random() < 0.3:
            break
        node = inner
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(WRONG)
    return row


@pytest.mark.parametrize("kind", ["logprob", "logit", "probability", "draws"])
def test_mutated_rows_are_read_or_refused(tmp_path, kind):
    rng = random.Random(0)
    values = {"logprob": ROW["top"], "logit": ROW["top"], "probability": [[0.5, 0.25]] * 4, "draws": [[3, 1]] * 4}
    whole = ROW | {"top": values[kind], "entropy": [1.0] * 4, "loss_mask": [1, 0, 1, 0], "text": "a", "id": "x"}
    read_ones = 0
    for _ in range(250):
        text = json.dumps(mutated(whole, rng))
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))]
        path = tmp_path / "in.jsonl"
        path.write_text(text + "\n" + json.dumps(whole | {"id": "y"}) + "\n")
        options = {"map": MAP, "value_kind": kind, "alignment": rng.choice(["next", "same"])}
        try:
            convert([path], tmp_path / "out", importer="columns", overwrite=True, **options)
            read_ones += 1
        except (SourceError, InvalidInputError):  # and nothing else
            continue
    assert 0 < read_ones < 250


@pytest.mark.parametrize("data", [b"one line", b"many"])
def test_json_lines_on_standard_input(tmp_path, data):
    row = json.dumps({"tokens": [1, 2], "ids": [[2], []], "logprobs": [[-0.5], []], "word": "x"}).encode() + b"\n"
    lines = row if data == b"one line" else row * 30_000
    command = [sys.executable, "-m", "logitstore_cli", "convert", "-", tmp_path / "out", "--from", "columns"]
    options = ["--value-kind", "logprob", "--alignment", "next"]
    subprocess.run([*command, *options], input=lines, capture_output=True, check=True)
    dataset = logitstore.open(tmp_path / "out")
    assert len(dataset) == lines.count(b"\n")
    assert dataset[-1].columns == {"word": "x"}
