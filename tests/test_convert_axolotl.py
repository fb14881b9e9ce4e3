"""`axolotl`: its datasets in, raw and tokenised, and out."""

from __future__ import annotations

import copy
import json
import math
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.convert import Input, Options, convert, export, importers
from logitstore.convert.pool import parsed
from logitstore.errors import InvalidInputError, SourceError

pytestmark = pytest.mark.usefixtures("quiet")

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
V2 = {
    "messages": MESSAGES,
    "input_ids": [5, 865, 11],
    "logprobs": [[-0.1, -2.4], [-0.3, -1.9], [-0.7, -1.1]],
    "target_token_ids": [[865, 379], [11, 13], [2, 3]],
}
TOKENISED = {
    "input_ids": [7, 5, 865, 11],
    "labels": [-100, -100, 865, 11],
    "attention_mask": [1, 1, 1, 1],
    "position_ids": [0, 1, 2, 3],
    "target_logprobs": [[-1e9, -1e9], [math.log(0.75), math.log(0.25)], [math.log(0.5), math.log(0.5)], [-1e9, -1e9]],
    "target_token_ids": [[0, 1], [865, 379], [11, 13], [0, 0]],
    "target_mask": [[0, 0], [0, 0], [1, 1], [0, 0]],
}


def v1(*rows, **fields):
    """A row of v1; each of `rows` is a dictionary of id to logprob, or None."""
    listed = [
        None if row is None else [{"token": f"token_id:{i}", "logprob": value} for i, value in row.items()]
        for row in rows
    ]
    return {"messages": MESSAGES, "logprobs": listed} | fields


def lines(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def put(folder, *rows, name="in.jsonl"):
    path = Path(folder) / name
    if name.endswith(".jsonl"):
        path.write_bytes(lines(*rows))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        table = pa.Table.from_pylist(list(rows))
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    return path


def read(folder, *rows, name="in.jsonl", importer="axolotl", **options):
    done = convert(
        [put(folder, *rows, name=name)], Path(folder) / "out", importer=importer, values="float32", **options
    )
    return logitstore.open(Path(folder) / "out"), " ".join(done.notes)


def rows_of(sequence):
    """Candidates of each position, as {id: logprob}."""
    return [
        dict(zip(sequence.ids[a:b].tolist(), sequence.logprobs[a:b].tolist(), strict=True))
        for a, b in zip(sequence.offsets[:-1], sequence.offsets[1:], strict=True)
    ]


def same(sequence, expected):
    """Compare each position with what stands there by hand."""
    found = rows_of(sequence)
    assert [set(row) for row in found] == [set(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for token, value in wanted.items():
            assert row[token] == np.float32(value), token


def refused(folder, match, *rows, name="in.jsonl", error=SourceError, **options):
    with pytest.raises(error, match=match) as caught:
        read(folder, *rows, name=name, **options)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet", "in.arrow"])
def test_v2_predicts_the_next_token(tmp_path, name):
    dataset, notes = read(tmp_path, V2 | {"id": "a"}, V2 | {"id": "b"}, name=name, importer=None)
    assert [sequence.id for sequence in dataset] == ["a", "b"]
    for sequence in dataset:
        assert sequence.tokens.tolist() == [5, 865, 11]
        same(sequence, [{865: -0.1, 379: -2.4}, {11: -0.3, 13: -1.9}, {2: -0.7, 3: -1.1}])
        assert sequence.target_rank.tolist() == [1, 1, 0]
        assert sequence.target_logprob[:2].tolist() == [np.float32(-0.1), np.float32(-0.3)]
        assert sequence.loss_mask is None
        assert sequence.columns == {"messages": MESSAGES}
    assert "over the whole vocabulary" in notes
    assert dataset.info.normalised == "vocabulary"


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("null", [True, False])
def test_v1_lists_of_the_prompt_are_about_their_own_tokens(tmp_path, name, null):
    rows = ([None] if null else []) + [{865: -0.1, 379: -2.4}, {11: -0.3, 13: -1.9}]
    dataset, _ = read(tmp_path, v1(*rows, input_ids=[5, 865, 11]), name=name, importer=None)
    same(dataset[0], [{865: -0.1, 379: -2.4}, {11: -0.3, 13: -1.9}, {}])
    assert dataset[0].target_rank.tolist() == [1, 1, 0]


def test_shorter_lists_are_about_the_last_tokens(tmp_path):
    dataset, _ = read(tmp_path, v1({11: -0.3, 13: -1.9}, {2: -0.2}, input_ids=[5, 865, 11, 2]))
    same(dataset[0], [{}, {11: -0.3, 13: -1.9}, {2: -0.2}, {}])


def test_alignment_can_be_said(tmp_path):
    dataset, notes = read(tmp_path, v1({11: -0.3}, {2: -0.2}, input_ids=[5, 865, 11, 2]), alignment="next")
    same(dataset[0], [{}, {}, {11: -0.3}, {2: -0.2}])
    assert "predicts token i + 1" in notes
    row = V2 | {"logprobs": [[], *V2["logprobs"][:2]], "target_token_ids": [[], *V2["target_token_ids"][:2]]}
    (tmp_path / "b").mkdir()
    dataset, _ = read(tmp_path / "b", row, alignment="same")
    same(dataset[0], [{865: -0.1, 379: -2.4}, {11: -0.3, 13: -1.9}, {}])
    (tmp_path / "c").mkdir()
    refused(tmp_path / "c", "line 1: logprobs has a row for each.*row 0 is not null", V2, alignment="same")


def test_rows_off_by_one_are_found(tmp_path):
    random_ = np.random.default_rng(0)
    made = []
    for _ in range(20):
        tokens = random_.permutation(900)[:30].tolist()
        made.append(
            {"input_ids": tokens, "target_token_ids": [[t, 999] for t in tokens], "logprobs": [[-0.1, -3.0]] * 30}
        )
    refused(tmp_path, "off by -1.*--alignment", *made)


def test_the_real_token_beyond_the_best_is_a_target_alone(tmp_path):
    rows = [{865: -9.0, 379: -0.4, 2: -1.4}, {11: -0.3, 13: -1.9}, {3: -0.2, 4: -2.0}]
    dataset, _ = read(tmp_path, v1(*rows, input_ids=[5, 865, 11, 3]))
    same(dataset[0], [{379: -0.4, 2: -1.4}, {11: -0.3, 13: -1.9}, {3: -0.2, 4: -2.0}, {}])
    assert dataset[0].target_logprob[0] == np.float32(-9.0)
    assert dataset[0].target_rank.tolist() == [0, 1, 1, 0]


def test_tokens_from_another_file(tmp_path):
    tokens = tmp_path / "tokens.parquet"
    pq.write_table(pa.table({"input_ids": [[5, 865, 11], [5, 865, 12]]}), tokens)
    row = {name: V2[name] for name in ("messages", "logprobs", "target_token_ids")}
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        folder.mkdir()
        dataset, _ = read(folder, row, row, tokens=tokens, workers=workers)
        assert [sequence.tokens.tolist() for sequence in dataset] == [[5, 865, 11], [5, 865, 12]]
        same(dataset[1], [{865: -0.1, 379: -2.4}, {11: -0.3, 13: -1.9}, {2: -0.7, 3: -1.1}])
    (tmp_path / "t.jsonl").write_bytes(lines({"tokens": [5, 865, 11]}, {"tokens": "x"}))
    for count, says in [
        (1, "t.jsonl has more rows|t.jsonl, line 2"),
        (2, "t.jsonl, line 2: tokens is str"),
        (3, "line 2"),
    ]:
        with pytest.raises(SourceError, match=says):
            convert(
                [put(tmp_path, *[row] * count)], tmp_path / f"x{count}", importer="axolotl", tokens=tmp_path / "t.jsonl"
            )
    (tmp_path / "t.jsonl").write_bytes(lines({"tokens": [5, 865, 11]}))
    with pytest.raises(SourceError, match="ends after 1 rows"):
        convert([put(tmp_path, row, row)], tmp_path / "y", importer="axolotl", tokens=tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_bytes(lines({"ids": [5, 865, 11]}))
    with pytest.raises(SourceError, match="neither input_ids nor tokens"):
        convert([put(tmp_path, row)], tmp_path / "z", importer="axolotl", tokens=tmp_path / "t.jsonl")


def test_without_tokens_it_asks_for_them(tmp_path):
    refused(tmp_path, "line 1: there are no input_ids.*--tokens", v1({1: -0.1}))


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_tokenised_rows(tmp_path, name):
    row = TOKENISED | {"target_logprobs": [[-1e30, -1e30], *TOKENISED["target_logprobs"][1:]]}
    dataset, notes = read(tmp_path, row, name=name, importer=None)
    sequence = dataset[0]
    assert sequence.tokens.tolist() == [7, 5, 865, 11]
    same(sequence, [{}, {865: math.log(0.75), 379: math.log(0.25)}, {11: math.log(0.5), 13: math.log(0.5)}, {}])
    assert sequence.loss_mask.tolist() == [0, 1, 1, 0]  # of the labels of tokens 1, 2, 3, and none
    assert sequence.target_logprob is None
    assert dataset.info.normalised == "candidates"
    assert "kd_temperature" in notes
    assert "as the trainer uses it" in notes


def test_tokenised_rows_padded_on_the_left(tmp_path):
    row = copy.deepcopy(TOKENISED)
    row["target_logprobs"] = [
        [None, None],
        [None, None],
        [math.log(0.75), math.log(0.25)],
        [math.log(0.5), math.log(0.5)],
    ]
    row["target_token_ids"] = [[0, 1], [0, 1], [865, 379], [11, 13]]
    dataset, notes = read(tmp_path, row, alignment="same")
    same(dataset[0], [{}, {865: math.log(0.75), 379: math.log(0.25)}, {11: math.log(0.5), 13: math.log(0.5)}, {}])
    assert "2 rows hold null or NaN" in notes


def test_masked_pads_of_the_collator_are_left_out(tmp_path):
    row = copy.deepcopy(TOKENISED)
    row["target_logprobs"][2] = [0.0, -5.0]
    row["target_mask"][2] = [1, 0]
    dataset, _ = read(tmp_path, row)
    assert rows_of(dataset[0])[2] == {11: 0.0}
    assert rows_of(dataset[0])[1].keys() == {865, 379}  # masked as a whole: not trained on, but known


def test_clamped_logprobs_are_left_out(tmp_path):
    row = copy.deepcopy(V2)
    row["logprobs"][0][1] = -9999.0
    dataset, _ = read(tmp_path, row)
    assert rows_of(dataset[0])[0] == {865: np.float32(-0.1)}


def test_normalised_lists_are_asked_for(tmp_path):
    random_ = np.random.default_rng(0)
    values = np.log(random_.dirichlet([1, 1, 1], 300)).tolist()
    row = {"input_ids": list(range(300)), "logprobs": values, "target_token_ids": [[400, 401, 402]] * 300}
    with pytest.raises(SourceError, match=r"all 300 rows sum to 1.*--normalised candidates"):
        read(tmp_path, row)
    dataset, notes = read(tmp_path, row, normalised="candidates")
    assert dataset.info.normalised == "candidates"
    assert "vocabulary" not in notes


def test_several_inputs_and_columns_of_the_user(tmp_path):
    first = put(tmp_path, V2 | {"source": "x"}, name="a.jsonl")
    second = put(tmp_path, V2, V2 | {"more": 1}, name="b.jsonl")
    done = convert([first, second], tmp_path / "out", importer="axolotl")
    dataset = logitstore.open(tmp_path / "out")
    assert [sequence.id for sequence in dataset] == ["0", "1", "2"]
    assert [sequence.columns["source"] for sequence in dataset] == ["x", None, None]
    assert "Of 1 records, columns were left out" in " ".join(done.notes)


def changed(row, *path, to):
    made = copy.deepcopy(row)
    node = made
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = to
    return made


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (b"not json", "JSON"),
        (b"[1]", "no JSON object"),
        (b'{"input_ids": [1], "logprobs": [[NaN]]}', "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (changed(V2, "logprobs", to=None), "logprobs"),
        (changed(V2, "logprobs", 1, to=[-0.1]), "row 1"),
        (changed(V2, "logprobs", to=[[-0.1, -2.4]] * 4), "4 rows|target_token_ids has 3 rows"),
        (changed(V2, "logprobs", 1, 1, to="x"), "logprobs is no list of numbers"),
        (changed(V2, "target_token_ids", 1, 1, to=1.5), "target_token_ids"),
        (changed(V2, "target_token_ids", 1, 1, to=None), "target_token_ids holds null"),
        (changed(V2, "target_token_ids", 1, 1, to=11), "position 1: the id 11 stands there twice"),
        (changed(V2, "logprobs", 1, 1, to=0.5), "position 1: the logprob 0.5"),
        (changed(V2, "input_ids", to=[5, 865]), "3 rows for 2 tokens"),
        (changed(V2, "input_ids", to=[5, 865, 2**40]), "position 2: the token"),
        (changed(V2, "input_ids", to={"a": 1}), "input_ids"),
        (V2 | {"labels": [-100, 865]}, "labels has 2 entries for 3"),
        (V2 | {"labels": [-100, 11, 865]}, r"labels\[1\] is 11, but the token there is 865"),
        (TOKENISED, "convert them apart"),
        (v1({1: -0.1}, input_ids=[1, 2]) | {"logprobs": [[{"token": " x", "logprob": -0.1}]]}, "row 0: the token ' x'"),
        (v1({1: -0.1}, input_ids=[1, 2]) | {"logprobs": [[{"token": "token_id:x", "logprob": -0.1}]]}, "no token_id"),
        (v1({1: -0.1}, input_ids=[1, 2]) | {"logprobs": [[{"logprob": -0.1}]]}, "no token or no logprob"),
        (v1({1: -0.1}, input_ids=[1, 2]) | {"logprobs": [[None]]}, "no token or no logprob"),
        (v1({1: -0.1}, input_ids=[1, 2]) | {"logprobs": [3]}, "no lists of"),
        (v1({-1: -0.1}, input_ids=[1, 2]), "the id -1"),
    ],
)
def test_malformed_rows_are_refused(tmp_path, row, match):
    refused(tmp_path, f"line 2: .*({match})", V2, row, error=(SourceError, InvalidInputError))


def test_tokenised_masks_must_fit(tmp_path):
    refused(tmp_path, "row 1: target_mask has 1", changed(TOKENISED, "target_mask", 1, to=[1]))
    refused(tmp_path, "4 rows for 3 tokens", TOKENISED | {"input_ids": [1, 2, 3]})


def mutated(random_, row):
    """A row with some nodes replaced or left out."""
    made = copy.deepcopy(row)
    for _ in range(random_.randint(1, 3)):
        node, parent, key = made, None, None
        while isinstance(node, dict | list) and node and (parent is None or random_.random() < 0.7):
            parent, key = node, random_.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = parent[key]
        if random_.random() < 0.3:
            del parent[key]
        else:
            parent[key] = random_.choice([None, "x", -1, 0.5, 10**30, -1e300, [], {}, [[1]], True, -0.0, 2**31])
    return made


@pytest.mark.parametrize("row", [V2, TOKENISED, v1(None, {865: -0.1}, {11: -0.3, 13: -1.9}, input_ids=[5, 865, 11])])
def test_mutations_give_sequences_or_errors_of_ours(tmp_path, row):
    random_ = random.Random(0)
    importer = importers()["axolotl"]
    seen = set()
    for number in range(150):
        text = json.dumps(mutated(random_, row)).encode()
        text = text[: random_.randrange(len(text))] if number % 10 == 0 else text
        (tmp_path / "in.jsonl").write_bytes(lines(row) + text + b"\n")
        opened = importer.read([Input(tmp_path / "in.jsonl")], Options())
        try:
            with logitstore.Writer(
                tmp_path / str(number), values="float32", logit_width=2**20, **opened.settings
            ) as writer:
                for outcome in parsed(opened, 0):
                    seen.add(outcome.error is None)
                    for at, item in enumerate(outcome.items):
                        writer.add(**({"id": f"{outcome.number}#{at}"} | item.arguments))
        except InvalidInputError:
            seen.add("refused")
    assert seen >= {True, False}


NEIGHBOURS = {
    "vllm": {"choices": [{"prompt_logprobs": [None, {"1": {"logprob": -0.1, "rank": 1}}], "prompt_token_ids": [1, 2]}]},
    "chat": {"choices": [{"logprobs": {"content": [{"token": "token_id:1", "logprob": -0.1, "top_logprobs": []}]}}]},
    "trl": {"topk_logprobs": [[-0.1]], "topk_token_ids": [[1]], "actual_logprobs": [-0.1], "input_ids": [1, 2]},
    "trl reply": {"logprobs": [[[-0.1]]], "logprob_token_ids": [[[1]]]},
    "nemo": {
        "tokens": [1],
        "labels": [2],
        "topk_logits": [[0.0]],
        "topk_token_ids": [[1]],
        "log_sum_exp_logits": [0.1],
    },
    "distillkit": {"input_ids": [1], "compressed_logprobs": [[1]], "bytepacked_indices": [[1]]},
    "columns": {"input_ids": [1], "logprobs": [[-0.1]], "ids": [[1]]},
    "llamakd": {"inputs": [1], "targets": [[[-0.1], [1.0]]]},
}


def test_recognition(tmp_path):
    recognises = importers()["axolotl"].recognises
    for name in ("in.jsonl", "in.parquet", "in.arrow"):
        for row in (V2, TOKENISED, v1({1: -0.1}, {2: -0.2})):
            assert recognises(Input(put(tmp_path, row, name=name))), (name, row)
    for which, row in NEIGHBOURS.items():
        for name in ("in.jsonl", "in.parquet"):
            assert not recognises(Input(put(tmp_path, row, name=name))), which
    for data in (b"", b"\x28\xb5\x2f\xfd" + bytes(9), bytes(range(256)), b"PAR1xxxx"):
        (tmp_path / "x").write_bytes(data)
        assert not recognises(Input(tmp_path / "x"))


def test_the_bytes_are_the_same_with_workers(tmp_path):
    path = put(tmp_path, *[V2 | {"input_ids": [i, 865, 11]} for i in range(40)], name="in.parquet")
    for workers in (0, 2):
        convert([path], tmp_path / str(workers), importer="axolotl", workers=workers)
    shards = [next((tmp_path / str(workers)).glob("data/*/*.arrow")).read_bytes() for workers in (0, 2)]
    assert shards[0] == shards[1]


# Export


@st.composite
def datasets(draw):
    """Sequences as (tokens, rows of {id: logprob}, loss_mask or None)."""
    made = []
    masks = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(0, 6))
        tokens = draw(st.lists(st.integers(0, 40), min_size=length, max_size=length))
        rows = []
        for _ in range(length):
            values = draw(st.dictionaries(st.integers(0, 40), st.floats(-30, 0, width=32), max_size=6))
            shift = math.log(max(1.0, sum(map(math.exp, values.values())))) + 1e-3
            rows.append({token: float(np.float32(value - shift)) for token, value in values.items()})
        mask = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)) if masks else None
        made.append((tokens, rows, mask))
    return made


def store(path, sequences, **settings):
    with logitstore.Writer(path, values="float32", logit_width=1000, teacher="t", **settings) as writer:
        for number, (tokens, rows, mask) in enumerate(sequences):
            writer.add(
                np.array(tokens, np.int64),
                np.array([token for row in rows for token in row], np.int64),
                np.array([value for row in rows for value in row.values()], np.float32),
                count=np.array([len(row) for row in rows], np.int64),
                id=f"s{number}",
                loss_mask=None if mask is None else np.array(mask, np.int64),
                messages=[{"role": "user", "content": str(number)}],
            )
    return path


@settings(max_examples=40)
@given(datasets(), st.sampled_from(["vocabulary", "candidates"]))
def test_round_trip(sequences, normalised):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store(folder / "a", sequences, normalised=normalised, temperature=0.5)
        export(folder / "a", folder / "x.parquet", "axolotl")
        convert([folder / "x.parquet"], folder / "b", values="float32")
        before, after = logitstore.open(folder / "a"), logitstore.open(folder / "b")
        assert (after.info.normalised, after.info.temperature) == (normalised, 0.5)
        for old, new in zip(before, after, strict=True):
            assert (old.id, old.columns) == (new.id, new.columns)
            assert old.tokens.tolist() == new.tokens.tolist()
            assert rows_of(old) == rows_of(new)
            if len(old):
                expected = np.ones(len(old)) if old.loss_mask is None else old.loss_mask
                assert new.loss_mask.tolist() == [*expected[:-1].tolist(), 0]


def log_softmax(values):
    total = math.log(sum(math.exp(value) for value in values))
    return [pytest.approx(value - total, abs=1e-6) for value in values]


def test_what_is_written(tmp_path):
    rows = [{}, {3: -0.25, 0: -2.0, 7: -3.0}, {1: -0.5}, {}]
    store(tmp_path / "a", [([5, 6, 3, 1], rows, [0, 1, 1, 0]), ([8, 9], [{2: -1.0}, {4: -2.0}], [1, 1])])
    done = export(tmp_path / "a", tmp_path / "x.parquet", "axolotl")
    table = pq.read_table(tmp_path / "x.parquet")
    row, other = table.to_pylist()
    pad = np.float32(math.log(1e-30))
    assert list(row) == [
        "id", "input_ids", "attention_mask", "labels", "target_logprobs", "target_token_ids", "target_mask", "logprobs",
        "messages",
    ]  # fmt: skip
    assert (row["input_ids"], row["attention_mask"]) == ([5, 6, 3, 1], [1, 1, 1, 1])
    assert row["labels"] == [-100, -100, 3, 1]
    assert row["logprobs"] == [[pad] * 3, [-0.25, -2.0, -3.0], [-0.5, pad, pad], [pad] * 3]
    assert row["target_logprobs"] == [[pad] * 3, log_softmax([-0.25, -2.0, -3.0]), [0.0, pad, pad], [pad] * 3]
    assert row["target_token_ids"] == [[0, 1, 2], [3, 0, 7], [1, 0, 2], [0, 1, 2]]
    assert row["target_mask"] == [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert row["messages"] == [{"role": "user", "content": "0"}]
    # Nothing is known of the token behind the last one, so that row 1 of the other is masked.
    assert other["target_mask"] == [[1, 0, 0], [0, 0, 0]]
    assert other["target_token_ids"] == [[2, 0, 1], [4, 0, 1]]
    notes = " ".join(done.notes)
    assert "flat distribution" not in notes
    assert "at the temperature 1: set kd_temperature" in notes
    assert "sample_packing" in notes
    done = export(tmp_path / "a", tmp_path / "k.parquet", "axolotl", k=2)
    cut = pq.read_table(tmp_path / "k.parquet").to_pylist()[0]
    assert cut["logprobs"][1:3] == [[-0.25, -2.0], [-0.5, pad]]
    assert cut["target_logprobs"][1] == log_softmax([-0.25, -2.0])
    assert "Candidates beyond the best 2 of a position were left out." in done.notes


def collated(features):
    """What the trainer's collator does with the teacher's columns, and asks of them, in plain lists."""
    if not {"target_logprobs", "target_token_ids"} <= features[0].keys():
        raise ValueError("taken for rows without a teacher: no distillation at all")
    taken = {name: [f.pop(name) for f in features] for name in ("target_logprobs", "target_token_ids", "target_mask")}
    longest = max(map(len, taken["target_logprobs"]))
    k = max(len(row) for rows in taken["target_logprobs"] for row in rows)
    for name, fill in (("target_logprobs", -1e9), ("target_token_ids", 0), ("target_mask", 0)):
        for rows in taken[name]:
            rows += [[fill] * k for _ in range(longest - len(rows))]
            rows[:] = [row + [fill] * (k - len(row)) for row in rows]
    kinds = {"target_logprobs": np.float32, "target_token_ids": np.int64, "target_mask": np.int32}
    return {name: np.array(rows, kinds[name]) for name, rows in taken.items()}


def test_the_trainer_takes_it_as_it_stands(tmp_path):
    """Its wrapper lets tokenised tables be, its collator needs the teacher's columns, its loss must be right."""
    rows = [{}, {3: -0.25, 0: -2.0, 7: -99.0}, {1: -0.5}, {2: -0.75}, {}]
    store(tmp_path / "a", [([5, 6, 3, 1, 2], rows, [1, 1, 1, 0, 0]), ([5, 6], [{9: -1.0}, {}], [1, 1])])
    export(tmp_path / "a", tmp_path / "x.parquet", "axolotl")
    table = pq.read_table(tmp_path / "x.parquet")
    assert {"input_ids", "attention_mask", "labels"} <= set(table.column_names)
    features = table.to_pylist()
    for feature in features:
        lengths = {len(feature[name]) for name in ("input_ids", "labels", "attention_mask", "logprobs")}
        lengths |= {len(feature[name]) for name in ("target_logprobs", "target_token_ids", "target_mask")}
        assert lengths == {len(feature["input_ids"])}
        assert {
            len(row) for name in ("target_logprobs", "target_token_ids", "target_mask") for row in feature[name]
        } == {3}
    batch = collated(features)
    assert batch["target_logprobs"].shape == batch["target_token_ids"].shape == batch["target_mask"].shape == (2, 5, 3)
    valid = batch["target_mask"].astype(bool)
    assert np.argwhere(valid.any(axis=2)).tolist() == [[0, 1], [0, 2], [1, 0]]
    for row in np.argwhere(valid.any(axis=2)):
        assert np.exp(batch["target_logprobs"][tuple(row)][valid[tuple(row)]]).sum() == pytest.approx(1)
    student = np.full(batch["target_logprobs"].shape, math.log(1 / 1000), np.float32)
    teacher = batch["target_logprobs"][valid]
    losses = np.exp(teacher) * (teacher - student[valid])
    assert np.isfinite(losses).all()
    assert losses.sum() > 0


@pytest.mark.parametrize("both", [True, False])
def test_tables_of_the_trainer_alone_and_beside_logprobs(tmp_path, both):
    """What is left when the trainer or a user drops the logprobs reads as normalised over the candidates."""
    rows = [{3: -0.25, 0: -2.0}, {1: -0.5}, {}]
    store(tmp_path / "a", [([5, 3, 1], rows, None)], temperature=2.0)
    export(tmp_path / "a", tmp_path / "x.parquet", "axolotl")
    table = pq.read_table(tmp_path / "x.parquet")
    pq.write_table(table if both else table.drop_columns(["logprobs"]), tmp_path / "y.parquet")
    notes = " ".join(convert([tmp_path / "y.parquet"], tmp_path / "b", values="float32").notes)
    after = logitstore.open(tmp_path / "b")
    assert (after.info.normalised, after.info.temperature) == ("vocabulary" if both else "candidates", 2.0)
    assert ("these were taken" in notes) == both
    same(after[0], rows if both else [{3: after[0].logprobs[0], 0: after[0].logprobs[1]}, {1: 0.0}, {}])
    assert np.exp(after[0].logprobs[:2]).sum() == pytest.approx(math.exp(-0.25) + math.exp(-2) if both else 1)


def test_names_that_the_trainer_knows_are_left_out(tmp_path):
    with logitstore.Writer(tmp_path / "a", values="float32", logit_width=1000, teacher="t") as writer:
        writer.add([1, 2], [[2, 3], [4, 5]], [[-0.1, -90.0], [-0.2, -3.0]], labels="mine", position_ids=[1, 2])
    done = export(tmp_path / "a", tmp_path / "x.parquet", "axolotl")
    assert "The columns labels, position_ids are left out" in " ".join(done.notes)


def test_tables_that_say_different_things_are_not_one(tmp_path):
    for name, temperature in (("a", 1.0), ("b", 2.0)):
        store(tmp_path / name, [([5, 3], [{3: -0.25}, {}], None)], temperature=temperature)
        export(tmp_path / name, tmp_path / f"{name}.parquet", "axolotl")
    with pytest.raises(SourceError, match=r"says that temperature is 1\.0"):
        convert([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "c")


def test_row_groups_are_bounded(tmp_path, write):
    export(write(sequences=1500, positions=3, k=4), tmp_path / "x.parquet", "axolotl")
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [1024, 476]
    assert file.metadata.num_rows == 1500
