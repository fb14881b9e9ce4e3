"""`easydistill`, `llamakd` and `tinker`."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import logitstore
from logitstore.convert import Input, Options, convert, importers
from logitstore.convert.pool import parsed
from logitstore.errors import InvalidInputError, SourceError

pytestmark = pytest.mark.usefixtures("quiet")

LN = {p: np.float32(math.log(p)) for p in (0.75, 0.5, 0.25, 0.125, 0.0625)}

EASY = [{"865": 0.5, "379": 0.25}, {"13": 0.125, "11": 0.75}, {"2": 0.5, "3": 0.0}]

LLAMA = {
    "inputs": [128000, 128000, 5, 865],
    "targets": [
        [[-1.5, -0.5], [7.0, 128000.0]],
        [[-0.25, -2.0], [5.0, 6.0]],
        [[-0.125, -3.0], [865.0, 379.0]],
        [[-0.75, -1.25], [11.0, 13.0]],
    ],
    "line_number": 42,
}

REPLY = {
    "prompt_token_ids": [5, 865, 11],
    "prompt_logprobs": [None, -0.125, -8.0],
    "topk_prompt_logprobs": [None, [[865, -0.125], [379, -2.5]], [[13, -0.375], [14, -1.75]]],
    "sequences": [{"tokens": [1], "logprobs": [-0.1], "stop_reason": "length"}],
    "type": "sample",
}
DATUM = {
    "tokens": [5, 865, 11],
    "target_tokens": [[865, 379], [11, 13], [2, 2]],
    "weights": [[0.0, 0.0], [0.75, 0.25], [1.0, 0.0]],
}
SDK_DATUM = {
    "model_input": {"chunks": [{"tokens": [5], "type": "encoded_text"}, {"tokens": [865, 11], "type": "encoded_text"}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [865, 379, 11, 13, 2, 2], "dtype": "int64", "shape": [3, 2]},
        "weights": {"data": [0.0, 0.0, 0.75, 0.25, 1.0, 0.0], "dtype": "float32", "shape": [3, 2]},
    },
}
RECORDS = {"easydistill": EASY, "llamakd": LLAMA, "tinker": REPLY}


def lines(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def put(folder, *rows, name="in.jsonl", schema=None):
    path = Path(folder) / name
    if name.endswith(".jsonl"):
        path.write_bytes(lines(*rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows), schema), path)
    return path


def read(which, folder, *rows, name="in.jsonl", schema=None, **options):
    path = put(folder, *rows, name=name, schema=schema)
    settings = {"importer": which, "values": "float32", "overwrite": True} | options
    done = convert([path], Path(folder) / "out", **settings)
    return logitstore.open(Path(folder) / "out"), " ".join(done.notes)


def rows_of(sequence):
    return [
        dict(zip(sequence.ids[a:b].tolist(), sequence.logprobs[a:b].tolist(), strict=True))
        for a, b in zip(sequence.offsets[:-1], sequence.offsets[1:], strict=True)
    ]


def refused(importer, folder, match, *rows, **options):
    with pytest.raises((SourceError, InvalidInputError), match=match):
        read(importer, folder, *rows, **options)


# EasyDistill


def test_easydistill_predicts_the_best_candidates(tmp_path):
    dataset, notes = read("easydistill", tmp_path, EASY, importer=None)
    sequence = dataset[0]
    assert sequence.tokens.tolist() == [0, 865, 11, 2]
    assert rows_of(sequence) == [{865: LN[0.5], 379: LN[0.25]}, {13: LN[0.125], 11: LN[0.75]}, {2: LN[0.5]}, {}]
    assert sequence.loss_mask.tolist() == [0, 0, 0, 0]
    assert "generation was greedy" in notes
    assert "The context is missing" in notes
    assert "At 1 positions the first candidate" in notes
    assert dataset.info.normalised == "vocabulary"


def test_easydistill_with_prompts(tmp_path):
    prompts = put(tmp_path, {"prompt_token_ids": [7, 8]}, {"prompt_token_ids": [9]}, name="p.jsonl")
    dataset, notes = read("easydistill", tmp_path, EASY, EASY, prompts=prompts)
    assert dataset[0].tokens.tolist() == [7, 8, 865, 11, 2]
    assert [len(row) for row in rows_of(dataset[0])] == [0, 2, 2, 1, 0]
    assert dataset[0].loss_mask.tolist() == [0, 1, 1, 1, 0]
    assert dataset[1].tokens.tolist() == [9, 865, 11, 2]
    assert "context" not in notes
    refused("easydistill", tmp_path, "ends after 2 rows", EASY, EASY, EASY, prompts=prompts)
    refused("easydistill", tmp_path, "more rows than there are records", EASY, prompts=prompts)
    refused(
        "easydistill",
        tmp_path,
        r"q.jsonl, line 1: there are no prompt_token_ids",
        EASY,
        prompts=put(tmp_path, {"a": 1}, name="q.jsonl"),
    )


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (b"{}", "no whole list"),
        (b"[null]", "no whole list"),
        (b"[" * 100_000, "no whole list"),
        (b"\xff", "no whole list"),
        ([{}], "position 0 has no candidates"),
        ([{"1": 0.5}, {}], "position 1 has no candidates"),
        ([{"x": 0.5}], "Expected `int`"),
        ([{"-1": 0.5}], ">= 0"),
        ([{str(2**31): 0.5}], "<= 2147483647"),
        ([{"1": None}], "null"),
        ([{"1": "0.5"}], "Expected `float`"),
        ([{"1": 1.5}], "1.5 is no probability"),
        ([{"1": -0.5}], "-0.5 is no probability"),
        ([{"1": 0.75, "2": 0.5}], "position 0: the probabilities sum to 1.25"),
        (b'[{"1": 1e999}]', "no whole list"),
        (b'[{"1": NaN}]', "no whole list"),
    ],
)
def test_easydistill_refuses_what_is_malformed(tmp_path, row, match):
    refused("easydistill", tmp_path, f"in.jsonl, line 2: .*{match}", EASY, row)


# LlamaKD


def test_llamakd_predicts_the_next_token(tmp_path):
    schema = pa.schema(
        [
            ("inputs", pa.list_(pa.int64())),
            ("targets", pa.list_(pa.list_(pa.list_(pa.float32())))),
            ("line_number", pa.int64()),
        ]
    )
    for name in ("in.jsonl", "in.parquet"):
        dataset, notes = read("llamakd", tmp_path, LLAMA, name=name, importer=None, schema=schema)
        sequence = dataset[0]
        assert sequence.tokens.tolist() == LLAMA["inputs"]
        assert rows_of(sequence) == [
            {7: -1.5, 128000: -0.5}, {5: -0.25, 6: -2.0}, {865: -0.125, 379: -3.0}, {11: -0.75, 13: -1.25},
        ]  # fmt: skip
        assert sequence.columns == {"line_number": 42}
        assert "1 sequences begin with one token again and again" in notes
        assert "inputs[t + 1]" in notes
        assert dataset.info.normalised == "vocabulary"


def test_llamakd_may_have_the_ids_first_or_rows_about_their_own_tokens(tmp_path):
    turned = LLAMA | {"targets": [pair[::-1] for pair in LLAMA["targets"]]}
    dataset, _ = read("llamakd", tmp_path, turned)
    assert rows_of(dataset[0])[2] == {865: -0.125, 379: -3.0}
    dataset, notes = read("llamakd", tmp_path, LLAMA, alignment="same")
    assert rows_of(dataset[0]) == [{5: -0.25, 6: -2.0}, {865: -0.125, 379: -3.0}, {11: -0.75, 13: -1.25}, {}]
    assert "row 0 is left out" in notes


def test_llamakd_of_normalised_candidates_asks(tmp_path):
    values = np.log(np.random.default_rng(0).dirichlet([1, 1, 1], 300))
    row = {"inputs": [9] * 300, "targets": [[row.tolist(), [1.0, 2.0, 3.0]] for row in values]}
    refused("llamakd", tmp_path, r"all 300 rows sum to 1.*--normalised", row)
    dataset, _ = read("llamakd", tmp_path, row, normalised="candidates")
    assert dataset.info.normalised == "candidates"


def targets(to, *path):
    made = copy.deepcopy(LLAMA)
    node = made["targets"]
    for step in path[:-1]:
        node = node[step]
    if path:
        node[path[-1]] = to
    else:
        made["targets"] = to
    return made


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (b"[]", "no JSON object"),
        (b"\xff", "JSON"),
        (b"[" * 100_000, "JSON"),
        (LLAMA | {"inputs": [1]}, "targets has 4 rows for 1 inputs"),
        (LLAMA | {"inputs": None}, "there is no inputs"),
        (LLAMA | {"line_number": "x"}, "line_number is 'x'"),
        (targets(None), "there is no targets"),
        (targets("x"), "no lists of 2 lists"),
        (targets([[1.0]] * 4), "no lists of 2 lists"),
        (targets([[-1.0, -2.0]], 1), "row 1 has 1 lists"),
        (targets([-1.0], 1, 0), "row 1 has 1 numbers"),
        (targets(None, 1, 0, 0), "null"),
        (targets(None, 1), "null"),
        (targets(5.5, 1, 1, 0), "neither of the two lists"),
        (targets(0.5, 1, 0, 0), "neither of the two lists"),
        (targets([[[0.0], [0.0]]] * 4), "either of the two lists"),
        (targets(-1.0, 1, 1, 0), "neither of the two lists"),
        (targets(5.0, 1, 1, 1), "position 1: the id 5 stands there twice"),
        (targets(2.0**53, 1, 1, 1), "not exact"),
        (targets(2.0**40, 1, 1, 1), "position 1: the id"),
    ],
)
def test_llamakd_refuses_what_is_malformed(tmp_path, row, match):
    refused("llamakd", tmp_path, f"in.jsonl, line 2: .*{match}", LLAMA, row)


@pytest.mark.parametrize(("kind", "highest"), [(pa.float16(), 2048.0), (pa.float32(), 2.0**24)])
def test_llamakd_ids_must_be_exact(tmp_path, kind, highest):
    schema = pa.schema([("inputs", pa.list_(pa.int64())), ("targets", pa.list_(pa.list_(pa.list_(kind))))])
    row = {
        "inputs": [1],
        "targets": [[np.array([-0.5, -1.5], kind.to_pandas_dtype()), np.array([highest, 1], kind.to_pandas_dtype())]],
    }
    refused("llamakd", tmp_path, "row 0: the id .* is not exact in its type", row, name="in.parquet", schema=schema)
    row["targets"][0][1] = np.array([highest - 1, 1], kind.to_pandas_dtype())
    dataset, _ = read("llamakd", tmp_path, row, name="in.parquet", schema=schema)
    assert rows_of(dataset[0]) == [{int(highest) - 1: -0.5, 1: -1.5}]


# Tinker


def test_tinker_replies_are_about_their_own_tokens(tmp_path):
    dataset, notes = read("tinker", tmp_path, REPLY | {"id": "r"})
    sequence = dataset[0]
    assert sequence.id == "r"
    assert sequence.tokens.tolist() == [5, 865, 11]
    assert rows_of(sequence) == [{865: -0.125, 379: -2.5}, {13: -0.375, 14: -1.75}, {}]
    assert sequence.target_logprob[:2].tolist() == [-0.125, -8.0]
    assert sequence.target_rank.tolist() == [1, 0, 0]
    assert "Row t of topk_prompt_logprobs is about token t" in notes


@pytest.mark.parametrize(
    "form", [{"tokens": [5, 865, 11]}, {"prompt": {"chunks": [{"tokens": [5, 865, 11]}]}}, {"prompt": [5, 865, 11]}]
)
def test_tinker_prompts_stand_beside_the_reply(tmp_path, form):
    row = {name: value for name, value in REPLY.items() if name != "prompt_token_ids"}
    dataset, _ = read("tinker", tmp_path, row | form)
    assert dataset[0].tokens.tolist() == [5, 865, 11]
    refused("tinker", tmp_path, r"in.jsonl, line 1: the tokens are missing.*--tokens", row)
    dataset, _ = read("tinker", tmp_path, row, tokens=put(tmp_path, {"input_ids": [5, 865, 11]}, name="t.jsonl"))
    assert rows_of(dataset[0])[0] == {865: -0.125, 379: -2.5}


def test_tinker_rows_off_by_one_contradict_the_logprobs(tmp_path):
    row = REPLY | {"prompt_token_ids": [4, 5, 865]}
    refused("tinker", tmp_path, "line 1: row 0: prompt_logprobs gives the token 5 the logprob -0.125", row)


def test_tinker_missing_rows_are_counted(tmp_path):
    row = REPLY | {"topk_prompt_logprobs": [None, None, REPLY["topk_prompt_logprobs"][2]], "prompt_logprobs": None}
    dataset, notes = read("tinker", tmp_path, row)
    assert [len(found) for found in rows_of(dataset[0])] == [0, 2, 0]
    assert "1 positions behind the first one are null" in notes


@pytest.mark.parametrize("datum", [DATUM, SDK_DATUM, DATUM | {"tokens": [5, 865, 11, 2]}])
def test_tinker_datums_predict_the_next_token(tmp_path, datum):
    dataset, notes = read("tinker", tmp_path, datum, importer=None)
    sequence = dataset[0]
    extra = [{}] * (len(datum.get("tokens", [1, 2, 3])) - 3)
    assert sequence.tokens[:3].tolist() == [5, 865, 11]
    assert rows_of(sequence) == [{}, {11: LN[0.75], 13: LN[0.25]}, {2: 0.0}, *extra]
    assert sequence.loss_mask.tolist() == [0, 1, 1, *[0] * len(extra)]
    assert dataset.info.normalised == "candidates"
    assert "normalised over the candidates" in notes


def test_tinker_weights_of_another_scale_are_normalised(tmp_path):
    dataset, notes = read("tinker", tmp_path, DATUM | {"weights": [[0.0, 0.0], [0.375, 0.125], [0.5, 0.0]]})
    assert rows_of(dataset[0]) == [{}, {11: LN[0.75], 13: LN[0.25]}, {2: 0.0}]
    assert "At 2 positions the weights do not sum to 1" in notes


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (b"not json", "no whole line"),
        (b"\xff", "no whole line"),
        (b"[" * 100_000, "no whole line"),
        ({}, "the tokens are missing"),
        ({"tokens": [1]}, "no topk_prompt_logprobs"),
        (DATUM, "convert them apart"),
        (REPLY | {"prompt_token_ids": [1]}, "topk_prompt_logprobs has 3 rows for 1 tokens"),
        (REPLY | {"prompt_logprobs": [None]}, "prompt_logprobs has 1 rows for 3 tokens"),
        (REPLY | {"prompt_logprobs": [None, 0.5, None]}, "row 1: 0.5 is no logprob|row 0: prompt_logprobs"),
        (REPLY | {"topk_prompt_logprobs": [[[1, -0.1]], None, None]}, "row 0 is not null"),
        (REPLY | {"topk_prompt_logprobs": [None, [[1]], None]}, "length"),
        (REPLY | {"topk_prompt_logprobs": [None, [[-1, -0.5]], None]}, ">= 0"),
        (REPLY | {"topk_prompt_logprobs": [None, [[1, None]], None]}, "null"),
        (
            REPLY | {"topk_prompt_logprobs": [None, [[1, 0.5]], None], "prompt_logprobs": None},
            "position 0: the logprob 0.5",
        ),
        (
            REPLY | {"topk_prompt_logprobs": [None, [[1, -1], [1, -2]], None], "prompt_logprobs": None},
            "stands there twice",
        ),
    ],
)
def test_tinker_refuses_malformed_replies(tmp_path, row, match):
    refused("tinker", tmp_path, f"in.jsonl, line 2: .*({match})", REPLY, row)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (REPLY, "convert them apart"),
        (DATUM | {"weights": [[1.0, 0.0]]}, "weights has 1 rows, target_tokens 3"),
        (DATUM | {"weights": [[1.0], [1.0, 0.0], [1.0, 0.0]]}, "row 0: weights has 1 candidates"),
        (DATUM | {"weights": [[-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]}, "-1.0 is no probability"),
        (DATUM | {"weights": [[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]]}, "2.0 is no probability"),
        (DATUM | {"tokens": [1]}, "target_tokens has 3 rows for 1 tokens"),
        (DATUM | {"target_tokens": [1, 2, 3]}, "target_tokens"),
        (DATUM | {"target_tokens": {"data": [1, 2], "shape": [2]}}, r"shape \[2\] and 2 values"),
        (DATUM | {"target_tokens": {"data": [1, 2], "shape": [2**20, 2**20]}}, "and 2 values"),
    ],
)
def test_tinker_refuses_malformed_datums(tmp_path, row, match):
    refused("tinker", tmp_path, f"in.jsonl, line 2: .*({match})", DATUM, row)


# All three


@pytest.mark.parametrize("importer", RECORDS)
def test_several_inputs_and_workers(tmp_path, importer):
    record = RECORDS[importer]
    paths = [put(tmp_path, *[record] * 10, name=f"{i}.jsonl") for i in range(2)]
    for workers in (0, 1):
        convert(paths, tmp_path / str(workers), importer=importer, workers=workers)
    assert [sequence.id for sequence in logitstore.open(tmp_path / "1")] == [str(i) for i in range(20)]
    shards = [next((tmp_path / str(workers)).glob("data/*/*.arrow")).read_bytes() for workers in (0, 1)]
    assert shards[0] == shards[1]


@pytest.mark.parametrize(("importer", "record"), [*RECORDS.items(), ("tinker", DATUM), ("tinker", SDK_DATUM)])
def test_mutations_give_sequences_or_errors_of_ours(tmp_path, importer, record):
    random_ = random.Random(0)
    seen = set()
    for number in range(150):
        made = copy.deepcopy(record)
        for _ in range(random_.randint(1, 2)):
            node, parent, key = made, None, None
            while isinstance(node, dict | list) and node and (parent is None or random_.random() < 0.7):
                parent, key = node, random_.choice(list(node) if isinstance(node, dict) else range(len(node)))
                node = parent[key]
            if random_.random() < 0.2:
                del parent[key]
            elif parent is not None:
                parent[key] = random_.choice([None, "x", -1, 0.5, 10**30, -1e300, 1e300, [], {}, [[1]], True, 2**31])
        text = json.dumps(made).encode()
        text = text[: random_.randrange(len(text))] if number % 10 == 0 else text
        (tmp_path / "in.jsonl").write_bytes(text + b"\n")
        opened = importers()[importer].read([Input(tmp_path / "in.jsonl")], Options())
        with logitstore.Writer(tmp_path / str(number), values="float32", **opened.settings) as writer:
            for outcome in parsed(opened, 0):
                seen.add(outcome.error is None)
                for item in outcome.items:
                    try:
                        writer.add(**item.arguments)
                    except InvalidInputError:
                        seen.add("refused")
    assert seen >= {True, False}


def test_recognition(tmp_path):
    neighbours = [
        {"choices": [{"prompt_logprobs": [None, {"1": {"logprob": -0.1}}]}]},
        [None, {"1": {"logprob": -0.1, "rank": 1}}],
        {"inputs": "text", "targets": "text"},
        {"topk_logprobs": [[-0.1]], "topk_token_ids": [[1]]},
        {"input_ids": [1], "logprobs": [[-0.1]], "target_token_ids": [[1]]},
        {"tokens": [1], "labels": [1], "topk_logits": [[0.0]], "topk_token_ids": [[1]], "log_sum_exp_logits": [0.1]},
        {"inputs": [1], "top_k_logits": [0.1], "top_k_indices": [1], "targets": [1]},
        {"meta_info": {"input_top_logprobs": [None]}},
        {"completion_probabilities": []},
    ]
    records = [("easydistill", EASY), ("llamakd", LLAMA), ("tinker", REPLY), ("tinker", DATUM), ("tinker", SDK_DATUM)]
    for own, row in [*records, *(("", row) for row in neighbours)]:
        path = put(tmp_path, row)
        for importer in RECORDS:
            assert importers()[importer].recognises(Input(path)) is (importer == own), (importer, row)
    table = pa.table({"inputs": [[1]], "targets": [[1]]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert not importers()["llamakd"].recognises(Input(tmp_path / "x.parquet"))
    for data in (b"", b"\x28\xb5\x2f\xfd" + bytes(9), b"PAR1xxxx"):
        (tmp_path / "x").write_bytes(data)
        assert not any(importers()[importer].recognises(Input(tmp_path / "x")) for importer in RECORDS)
