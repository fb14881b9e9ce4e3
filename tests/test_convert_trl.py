"""`trl`: columns of its trainers and replies of its server in, columns out."""

from __future__ import annotations

import copy
import json
import math
import random
import tempfile
from base64 import b64encode
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

INF = math.inf
PROMPT, COMPLETION = [5, 6], [865, 11, 2]
COLUMNS = {
    "prompt_ids": PROMPT,
    "completion_ids": COMPLETION,
    "topk_logprobs": [[-0.125, -2.5], [-0.375, -1.75], [-0.75, -1.0]],
    "topk_token_ids": [[865, 379], [13, 14], [2, 3]],
    "actual_logprobs": [-0.125, -8.0, -0.75],
}
EXPECTED = [{}, {865: -0.125, 379: -2.5}, {13: -0.375, 14: -1.75}, {2: -0.75, 3: -1.0}, {}]
REQUEST = {"sequences": [[5, 6, 865, 11, 2], [7, 8]], "prompt_lengths": [2, 1], "top_logprobs": 2, "temperature": 1.0}
REPLY = {
    "logprobs": [[[-0.125, -2.5], [-0.375, -1.75, -8.0], [-0.75, -1.0]], [[-0.25, -3.0]]],
    "logprob_token_ids": [[[865, 379], [13, 14, 11], [2, 3]], [[8, 9]]],
}


def packed(values, dtype):
    return b64encode(np.array(values, dtype).tobytes()).decode()


BINARY = {
    "logprobs_b64": packed(
        [[[-0.125, -2.5], [-0.375, -1.75], [-0.75, -1.0]], [[-0.25, -3.0], [-INF, -INF], [-INF, -INF]]], "<f4"
    ),
    "token_ids_b64": packed([[[865, 379], [13, 14], [2, 3]], [[8, 9], [0, 0], [0, 0]]], "<i4"),
    "actual_logprobs_b64": packed([[[-0.125], [-8.0], [-0.75]], [[-0.25], [-INF], [-INF]]], "<f4"),
    "actual_token_ids_b64": packed([[[865], [11], [2]], [[8], [0], [0]]], "<i4"),
    "shape": [2, 3, 2],
    "completion_lengths": [3, 1],
}


def lines(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def put(folder, *rows, name="in.jsonl"):
    path = Path(folder) / name
    if name.endswith(".jsonl"):
        path.write_bytes(lines(*rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def read(folder, *rows, name="in.jsonl", **options):
    path = put(folder, *rows, name=name)
    done = convert([path], Path(folder) / "out", **({"importer": "trl", "values": "float32"} | options))
    return logitstore.open(Path(folder) / "out"), " ".join(done.notes)


def rows_of(sequence):
    return [
        dict(zip(sequence.ids[a:b].tolist(), sequence.logprobs[a:b].tolist(), strict=True))
        for a, b in zip(sequence.offsets[:-1], sequence.offsets[1:], strict=True)
    ]


def check_first(sequence):
    assert sequence.tokens.tolist() == PROMPT + COMPLETION
    assert rows_of(sequence) == EXPECTED  # the first row stands at the prompt's last position
    known = sequence.target_logprob.tolist()
    assert known[1:4] == [-0.125, -8.0, -0.75]
    assert [math.isnan(value) for value in known] == [True, False, False, False, True]
    assert sequence.target_rank.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("form", ["prompt and completion", "input_ids", "columns of one", "padded"])
def test_columns(tmp_path, name, form):
    row = copy.deepcopy(COLUMNS) | {"source": "s"}
    if form == "input_ids":
        del row["prompt_ids"], row["completion_ids"]
        row |= {"input_ids": PROMPT + COMPLETION, "completion_mask": [0, 0, 1, 0, 1]}
    elif form == "columns of one":
        row |= {"actual_logprobs": [[-0.125], [-8.0], [-0.75]], "actual_token_ids": [[865], [11], [2]]}
    elif form == "padded":
        row["topk_logprobs"].append([-9999.0, -9999.0])
        row["topk_token_ids"].append([0, 0])
        row["actual_logprobs"].append(-1e30)
    dataset, notes = read(tmp_path, row, name=name, importer=None)
    check_first(dataset[0])
    assert dataset[0].columns == {"source": "s"}
    assert (dataset[0].loss_mask is None) == (form != "input_ids")
    if form == "input_ids":
        assert dataset[0].loss_mask.tolist() == [0, 1, 0, 1, 0]
    assert "at the position before it" in notes


def test_pads_in_tables_are_minus_infinity(tmp_path):
    row = copy.deepcopy(COLUMNS) | {"completion_mask": [1, 1, 0]}
    row["topk_logprobs"][0][1] = -INF
    row["topk_token_ids"][0][1] = 0
    row["actual_logprobs"][1] = -INF
    dataset, _ = read(tmp_path, row, name="in.parquet")
    assert rows_of(dataset[0])[1] == {865: -0.125}
    assert math.isnan(dataset[0].target_logprob[2])
    assert dataset[0].loss_mask.tolist() == [0, 1, 1, 0, 0]


def test_rows_off_by_one_contradict_the_real_tokens(tmp_path):
    for tokens, says in [
        ([865, 11, 2, 4], "row 0: actual_logprobs gives the token 11 the logprob -0.125"),
        ([5, 865, 2, 11], "row 2: actual_logprobs gives the token 11"),
    ]:
        row = COLUMNS | {"prompt_ids": tokens[:1], "completion_ids": tokens[1:]}
        with pytest.raises(SourceError, match=f"line 1: {says}"):
            read(tmp_path, row)
    with pytest.raises(SourceError, match="row 1: actual_token_ids says 12, but the token is 11"):
        read(tmp_path, COLUMNS | {"actual_token_ids": [865, 12, 2]})


def test_without_a_prompt_a_placeholder_stands_for_it(tmp_path):
    row = {name: COLUMNS[name] for name in COLUMNS if name != "prompt_ids"}
    dataset, notes = read(tmp_path, row)
    assert dataset[0].tokens.tolist() == [0, *COMPLETION]
    assert rows_of(dataset[0]) == EXPECTED[1:]
    assert dataset[0].loss_mask.tolist() == [0, 0, 0, 0]
    assert "In 1 sequences a placeholder stands for the prompt" in notes


@pytest.mark.parametrize("reply", [REPLY, BINARY])
@pytest.mark.parametrize("beside", [True, False])
def test_replies(tmp_path, reply, beside):
    options = {}
    if beside:
        options["prompts"] = put(tmp_path, REQUEST, REQUEST, name="requests.jsonl")
    else:
        reply = reply | REQUEST
    dataset, _ = read(tmp_path, reply, reply, importer=None, **options)
    assert [sequence.id for sequence in dataset] == ["0", "0#1", "1", "1#1"]
    check_first(dataset[2])
    assert dataset[1].tokens.tolist() == [7, 8]
    assert rows_of(dataset[1]) == [{8: -0.25, 9: -3.0}, {}]
    assert dataset[1].target_rank.tolist() == [1, 0]


def test_binary_replies_know_the_completion(tmp_path):
    dataset, notes = read(tmp_path, BINARY)
    assert [sequence.tokens.tolist() for sequence in dataset] == [[0, 865, 11, 2], [0, 8]]
    assert rows_of(dataset[1]) == [{8: -0.25, 9: -3.0}, {}]
    assert not dataset[0].loss_mask.any()
    assert "In 2 sequences a placeholder" in notes


def test_generated_replies_hold_their_tokens(tmp_path):
    dataset, _ = read(tmp_path, REPLY | {"prompt_ids": [[5, 6]], "completion_ids": [COMPLETION, [8]], "id": "r"})
    check_first(dataset[0])
    assert [sequence.id for sequence in dataset] == ["r", "r#1"]
    assert dataset[1].tokens.tolist() == [5, 6, 8]


def test_missing_rows_and_nulls(tmp_path):
    reply = copy.deepcopy(REPLY | REQUEST)
    reply["logprobs"][0][0], reply["logprob_token_ids"][0][0] = [], []
    reply["logprobs"][1][0][0] = None
    dataset, notes = read(tmp_path, reply)
    assert rows_of(dataset[0]) == [{}, {}, *EXPECTED[2:]]
    assert rows_of(dataset[1]) == [{}, {}]
    assert "1 rows hold null or NaN" in notes


def test_the_temperature_of_the_request(tmp_path):
    dataset, _ = read(tmp_path, REPLY | REQUEST | {"temperature": 2.0})
    assert dataset.info.temperature == 2.0
    with pytest.raises(SourceError, match=r"line 2: temperature is 2.0, in the first request 1.0"):
        read(tmp_path, REPLY | REQUEST, REPLY | REQUEST | {"temperature": 2.0}, overwrite=True)


def test_a_first_token_without_a_prompt(tmp_path):
    reply = REPLY | {"sequences": [[865, 11, 2], [8]], "prompt_lengths": [0, 0]}
    with pytest.raises(SourceError, match="row 0 is the distribution of the first token"):
        read(tmp_path, reply)
    reply = copy.deepcopy(reply)
    for name in ("logprobs", "logprob_token_ids"):
        reply[name][0][0], reply[name][1][0] = [], []
    dataset, _ = read(tmp_path, reply)
    assert rows_of(dataset[0]) == EXPECTED[2:]
    assert dataset[0].target_logprob[:2].tolist() == [-8.0, -0.75]


def test_several_inputs(tmp_path):
    for i in range(2):
        put(tmp_path, COLUMNS | {"id": i}, name=f"{i}.parquet")
    convert([tmp_path / "0.parquet", tmp_path / "1.parquet"], tmp_path / "out")
    assert [sequence.id for sequence in logitstore.open(tmp_path / "out")] == ["0", "1"]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (b"not json", "JSON"),
        (b"[1]", "no JSON object"),
        (b"\xff", "JSON"),
        (b"[" * 100_000, "JSON"),
        ({}, "no list logprobs"),
        (REPLY, "sequence 0: its tokens are missing.*--prompts"),
        (REPLY | REQUEST | {"logprobs": [[]]}, "logprobs has 1 sequences, logprob_token_ids 2"),
        (REPLY | REQUEST | {"logprobs": [[[-1.0]], [[-1.0]]]}, "sequence 0: logprob_token_ids has 3 rows"),
        (REPLY | REQUEST | {"logprobs": [[3], [3]]}, "sequence 0: logprobs"),
        (REPLY | REQUEST | {"prompt_lengths": [9, 1]}, "prompt_lengths does not fit"),
        (REPLY | REQUEST | {"prompt_lengths": [3, 1]}, "row 2 is of no token: there are 2"),
        (REPLY | REQUEST | {"sequences": [[1]]}, "sequences has 1 entries for 2"),
        (REPLY | {"prompt_ids": [[1]] * 3, "completion_ids": [[1]]}, "3 prompt_ids for 2 completions"),
        (BINARY | {"shape": [2, 3]}, "shape is"),
        (BINARY | {"shape": [2, 3, 3]}, "logprobs_b64 has 48 bytes"),
        (BINARY | {"shape": [2, -3, 2]}, "shape is"),
        (BINARY | {"shape": [2, 2**62, 2**62]}, "shape is"),
        (BINARY | {"completion_lengths": [4, 1]}, "completion_lengths"),
        (BINARY | {"logprobs_b64": "?"}, "no base64"),
        (BINARY | {"token_ids_b64": None}, "no text token_ids_b64"),
        (BINARY | {"actual_token_ids_b64": None}, "no tokens"),
        (COLUMNS | {"topk_token_ids": [[1, 2]]}, "topk_token_ids has 1 rows, topk_logprobs 3"),
        (COLUMNS | {"topk_token_ids": [[1, 2], [1], [1, 2]]}, "row 1: topk_token_ids has 1"),
        (COLUMNS | {"topk_token_ids": [[1, 2], [1, 2.5], [1, 2]]}, "topk_token_ids"),
        (COLUMNS | {"topk_logprobs": [[-0.1, 0.5], [-1, -2], [-1, -2]], "actual_logprobs": None}, "the logprob 0.5"),
        (COLUMNS | {"actual_logprobs": [-0.125]}, "actual_logprobs has 1 entries"),
        (COLUMNS | {"actual_logprobs": [-0.125, 0.5, -0.75]}, "row 1: 0.5 is no logprob"),
        (COLUMNS | {"completion_ids": [865, 11]}, "row 2 is of no token|row 2"),
        (COLUMNS | {"prompt_ids": "x"}, "prompt_ids"),
        (COLUMNS | {"prompt_ids": []}, "row 0 is the distribution of the first token"),
        (COLUMNS | {"completion_mask": [1]}, "completion_mask has 1 entries for 3"),
        ({name: COLUMNS[name] for name in ("topk_logprobs", "topk_token_ids")}, "tokens are missing"),
        ({"topk_logprobs": [[-1.0]] * 3, "topk_token_ids": [[1]] * 3, "input_ids": [1]}, "3 rows for 1 tokens"),
    ],
)
def test_malformed_records_are_refused(tmp_path, row, match):
    with pytest.raises((SourceError, InvalidInputError), match=f"in.jsonl, line 2: .*({match})"):
        read(tmp_path, COLUMNS, row)


@pytest.mark.parametrize("row", [COLUMNS, REPLY | REQUEST, BINARY | REQUEST])
def test_mutations_give_sequences_or_errors_of_ours(tmp_path, row):
    random_ = random.Random(0)
    importer = importers()["trl"]
    seen = set()
    for number in range(150):
        made = copy.deepcopy(row)
        for _ in range(random_.randint(1, 2)):
            node, parent, key = made, None, None
            while isinstance(node, dict | list) and node and (parent is None or random_.random() < 0.7):
                parent, key = node, random_.choice(list(node) if isinstance(node, dict) else range(len(node)))
                node = parent[key]
            parent[key] = random_.choice([None, "x", "eA==", -1, 0.5, 10**30, -1e300, [], {}, [[1]], True, 2**31])
        text = json.dumps(made).encode()
        text = text[: random_.randrange(len(text))] if number % 10 == 0 else text
        (tmp_path / "in.jsonl").write_bytes(text + b"\n")
        opened = importer.read([Input(tmp_path / "in.jsonl")], Options())
        opened.settings.pop("temperature", None)
        with logitstore.Writer(tmp_path / str(number), values="float32", **opened.settings) as writer:
            for outcome in parsed(opened, 0):
                seen.add(outcome.error is None)
                for at, item in enumerate(outcome.items):
                    try:
                        writer.add(**({"id": str(at)} | item.arguments))
                    except InvalidInputError:
                        seen.add("refused")
    assert seen >= {True, False}


def test_recognition(tmp_path):
    recognises = importers()["trl"].recognises
    for row, own in [
        (COLUMNS, True),
        (REPLY, True),
        (BINARY, True),
        (REPLY | REQUEST, True),
        ({"input_ids": [1], "logprobs": [[-0.1]], "target_token_ids": [[1]]}, False),
        ({"choices": [{"logprobs": {}, "logprob_token_ids": [1]}]}, False),
        ({"tokens": [1], "labels": [2], "topk_logits": [[0.0]], "topk_token_ids": [[1]]}, False),
        ({"topk_prompt_logprobs": [None], "prompt_logprobs": [None]}, False),
        ({"meta_info": {"input_top_logprobs": [None]}}, False),
        ({"inputs": [1], "targets": [[[-0.1], [1.0]]]}, False),
    ]:
        assert recognises(Input(put(tmp_path, row))) is own, row
    assert recognises(Input(put(tmp_path, COLUMNS, name="x.parquet")))
    assert not recognises(Input(put(tmp_path, {"input_ids": [1], "logprobs": [[-0.1]]}, name="x.parquet")))


def test_the_bytes_are_the_same_with_workers(tmp_path):
    put(tmp_path, *[REPLY] * 20)
    put(tmp_path, *[REQUEST] * 20, name="requests.jsonl")
    for workers in (0, 2):
        convert([tmp_path / "in.jsonl"], tmp_path / str(workers), prompts=tmp_path / "requests.jsonl", workers=workers)
    shards = [next((tmp_path / str(workers)).glob("data/*/*.arrow")).read_bytes() for workers in (0, 2)]
    assert shards[0] == shards[1]


# Export


@st.composite
def sequences(draw):
    """Sequences as (tokens, rows of {id: logprob}, loss_mask or None)."""
    made = []
    masks = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(0, 6))
        tokens = draw(st.lists(st.integers(0, 40), min_size=length, max_size=length))
        rows = []
        for _ in range(length):
            values = draw(st.dictionaries(st.integers(0, 40), st.floats(-50, 0, width=32), max_size=6))
            shift = math.log(max(1.0, sum(map(math.exp, values.values())))) + 1e-3
            rows.append({token: float(np.float32(value - shift)) for token, value in values.items()})
        mask = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)) if masks else None
        made.append((tokens, rows, mask))
    return made


def store(path, made, **settings):
    with logitstore.Writer(path, values="float32", logit_width=1000, teacher="t", **settings) as writer:
        for number, (tokens, rows, mask) in enumerate(made):
            following = [*tokens[1:], -1][: len(tokens)]
            writer.add(
                np.array(tokens, np.int64),
                np.array([token for row in rows for token in row], np.int64),
                np.array([value for row in rows for value in row.values()], np.float32),
                count=np.array([len(row) for row in rows], np.int64),
                id=f"s{number}",
                loss_mask=None if mask is None else np.array(mask, np.int64),
                target_logprob=np.array(
                    [
                        row.get(token, -60.0) if row and token >= 0 else math.nan
                        for row, token in zip(rows, following, strict=True)
                    ],
                    np.float32,
                ),
                text=str(number),
            )
    return path


@settings(max_examples=40)
@given(sequences(), st.sampled_from(["vocabulary", "candidates"]))
def test_round_trip(made, normalised):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store(folder / "a", made, normalised=normalised, temperature=0.5)
        export(folder / "a", folder / "x.parquet", "trl")
        convert([folder / "x.parquet"], folder / "b", values="float32")
        before, after = logitstore.open(folder / "a"), logitstore.open(folder / "b")
        assert (after.info.normalised, after.info.temperature) == (normalised, 0.5)
        for old, new in zip(before, after, strict=True):
            assert (old.id, old.columns) == (new.id, new.columns)
            assert old.tokens.tolist() == new.tokens.tolist()
            if len(old):
                assert rows_of(new) == [*rows_of(old)[:-1], {}]
                np.testing.assert_array_equal(new.target_logprob, old.target_logprob)
                wanted = old.count > 0 if old.loss_mask is None else old.loss_mask
                assert new.loss_mask.tolist() == [*wanted[:-1].tolist(), 0]


def test_what_is_written(tmp_path):
    rows = [{}, {3: -0.25, 7: -3.0}, {2: -0.5}, {9: -1.0}]
    store(tmp_path / "a", [([5, 6, 3, 1], rows, [0, 1, 0, 1])])
    done = export(tmp_path / "a", tmp_path / "x.parquet", "trl")
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == [
        {
            "id": "s0",
            "input_ids": [5, 6, 3, 1],
            "completion_mask": [0, 0, 1, 0],
            "topk_logprobs": [[-0.25, -3.0], [-0.5, -INF]],
            "topk_token_ids": [[3, 7], [2, 0]],
            "actual_logprobs": [-0.25, -60.0],
            "text": "0",
        }
    ]
    assert "1 sequences have a distribution at their last position" in " ".join(done.notes)


def test_real_tokens_that_are_not_known_are_noted(tmp_path):
    with logitstore.Writer(tmp_path / "a", values="float32", logit_width=1000, teacher="t") as writer:
        writer.add([1, 2], [[3], [4]], [[-0.5], [-0.5]])
    done = export(tmp_path / "a", tmp_path / "x.parquet", "trl")
    assert pq.read_table(tmp_path / "x.parquet")["actual_logprobs"].to_pylist() == [[-INF]]
    assert "At 1 positions the logprob of the real token is not known" in " ".join(done.notes)


def test_all_rows_of_a_file_are_as_wide_as_its_widest(tmp_path):
    made = [([5, 6], [{3: -0.25, 7: -3.0, 8: -4.0}, {}], None), ([5, 6], [{2: -0.5}, {}], None)]
    store(tmp_path / "a", made)
    export(tmp_path / "a", tmp_path / "x.parquet", "trl")
    assert pq.read_table(tmp_path / "x.parquet")["topk_token_ids"].to_pylist() == [[[3, 7, 8]], [[2, 0, 0]]]
    done = export(tmp_path / "a", tmp_path / "k.parquet", "trl", k=2)
    assert pq.read_table(tmp_path / "k.parquet")["topk_token_ids"].to_pylist() == [[[3, 7]], [[2, 0]]]
    assert "Candidates beyond the best 2 of a position were left out." in done.notes


def test_a_users_temperature_is_no_temperature_of_a_request(tmp_path):
    with logitstore.Writer(tmp_path / "a", values="float32", logit_width=1000, teacher="t", temperature=2.0) as writer:
        for number in range(2):
            writer.add([1, 2], [[3], [4]], [[-0.5], [-0.5]], temperature=0.5 + number, prompt_ids="mine")
    done = export(tmp_path / "a", tmp_path / "x.parquet", "trl")
    assert "The columns prompt_ids are left out" in " ".join(done.notes)
    notes = convert([tmp_path / "x.parquet"], tmp_path / "b").notes
    dataset = logitstore.open(tmp_path / "b")
    assert dataset.info.temperature == 2.0
    assert [sequence.columns["temperature"] for sequence in dataset] == [0.5, 1.5]
    assert "those that the file's metadata say" in notes[0]
