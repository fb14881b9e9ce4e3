"""`logitstore.convert.tensorrt_llm`: objects of the LLM API, with logprobs or logits, and dumps of them."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass, field

import numpy as np
import pytest
import torch

import logitstore
from logitstore.convert import convert, tensorrt_llm
from logitstore.convert.base import Input, Record, Tally
from logitstore.errors import InvalidInputError, SourceError

pytestmark = pytest.mark.usefixtures("quiet")


# What the LLM API's own classes look like: tensorrt_llm/executor/result.py.
@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    index: int = 0
    text: str = ""
    token_ids: list[int] | None = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list | None = field(default_factory=list)
    prompt_logprobs: list | None = field(default_factory=list)
    generation_logits: object = None


@dataclass
class RequestOutput:
    request_id: int
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt: str | None = None
    context_logits: object = None


def as_dict(*row):
    return {token: Logprob(logprob, rank) for token, logprob, rank in row}


# The prompt is 10 11 12, and 13 14 are generated. Best two first; the token that follows last, where it is not one.
PROMPT = [
    as_dict((11, -0.5, 1), (50, -1.5, 2)),  # row 0 is about 11
    as_dict((51, -1.0, 1), (52, -2.0, 2), (12, -7.0, 412)),  # row 1 is about 12
    as_dict((53, -0.75, 1), (13, -2.0, 2)),  # row 2, the last of the prompt, is about the first generated token
]
OUTPUT = [PROMPT[2], as_dict((54, -0.25, 1), (55, -2.5, 2), (14, -3.0, 3))]
TOKENS = [10, 11, 12, 13, 14]
IDS = [[11, 50], [51, 52], [53, 13], [54, 55, 14], []]
LOGPROBS = [[-0.5, -1.5], [-1.0, -2.0], [-0.75, -2.0], [-0.25, -2.5, -3.0], []]
TARGETS, RANKS = [-0.5, -7.0, -2.0, -3.0], [1, 412, 2, 3, 0]


def output(*, context_logits=None, **fields):
    made = {"text": "out", "token_ids": [13, 14], "logprobs": OUTPUT, "prompt_logprobs": PROMPT}
    completion = CompletionOutput(**(made | fields))
    return RequestOutput(3, [10, 11, 12], [completion], context_logits=context_logits)


def added(tmp_path, *outputs, settings=None, **arguments):
    with logitstore.Writer(tmp_path / "out", **({"values": "float32"} | (settings or {}))) as writer:
        for each in outputs:
            tensorrt_llm.add(writer, each, **arguments)
    return logitstore.open(tmp_path / "out")


def converted(tmp_path, *records, **options):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
    done = convert([path], tmp_path / "out", **({"importer": "tensorrt-llm", "values": "float32"} | options))
    return logitstore.open(tmp_path / "out"), " ".join(done.notes)


def row(sequence, t):
    part = slice(sequence.offsets[t], sequence.offsets[t + 1])
    return sequence.ids[part].tolist(), sequence.logprobs[part].tolist()


def check(sequence):
    assert sequence.tokens.tolist() == TOKENS
    assert [row(sequence, t) for t in range(5)] == [*zip(IDS, LOGPROBS, strict=True)]
    assert sequence.target_logprob[:4].tolist() == TARGETS
    assert math.isnan(sequence.target_logprob[4])
    assert sequence.target_rank.tolist() == RANKS


def test_each_row_predicts_the_token_that_follows(tmp_path):
    dataset = added(tmp_path, output(), note="n")
    check(dataset[0])
    assert dataset[0].id == "3"
    assert dataset[0].columns == {"note": "n"}


def test_the_prompts_last_row_is_about_the_first_generated_token(tmp_path):
    """It is kept where the generated tokens have no rows, or a smaller one."""
    for number, fields in enumerate([{"logprobs": []}, {"logprobs": None}, {"logprobs": [-9.0, -3.0]}]):
        (sequence,) = added(tmp_path / str(number), output(**fields))
        assert [row(sequence, t)[0] for t in range(5)] == [*IDS[:3], [], []]
        assert sequence.target_logprob[:3].tolist() == TARGETS[:3]
        assert sequence.target_logprob[3] == -3.0 or number < 2


def test_generated_rows_alone(tmp_path):
    (sequence,) = added(tmp_path, output(prompt_logprobs=[]))
    assert [row(sequence, t)[0] for t in range(5)] == [[], [], *IDS[2:]]
    assert sequence.target_rank.tolist() == [0, 0, *RANKS[2:]]


def test_the_simple_format_has_the_targets_only(tmp_path):
    (sequence,) = added(tmp_path, output(logprobs=[-2.0, -3.0], prompt_logprobs=[-0.5, -7.0, -2.0]))
    assert sequence.count.tolist() == [0] * 5
    assert sequence.target_logprob[:4].tolist() == TARGETS
    assert math.isnan(sequence.target_logprob[4])


def test_earlier_releases_do_not_give_the_token_that_follows(tmp_path):
    """Or, for a while, they gave the one before instead, which stands behind a hole in the ranks."""
    without = as_dict((51, -1.0, 1), (52, -2.0, 2))
    before = as_dict((51, -1.0, 1), (52, -2.0, 2), (11, -9.0, 600))
    for number, changed in enumerate((without, before)):
        made = output(prompt_logprobs=[PROMPT[0], changed, PROMPT[2]])
        (sequence,) = added(tmp_path / str(number), made)
        assert row(sequence, 1) == ([51, 52], [-1.0, -2.0])
        assert math.isnan(sequence.target_logprob[1])
        assert sequence.target_rank[1] == 0
        assert row(sequence, 0) == ([11, 50], [-0.5, -1.5])


def test_none_first_means_rows_about_their_own_tokens(tmp_path):
    (sequence,) = added(tmp_path, output(prompt_logprobs=[None, *PROMPT[:2]]))
    check(sequence)


def test_rows_of_a_stop_word_that_was_taken_away(tmp_path):
    more = [*OUTPUT, as_dict((60, -0.5, 1), (61, -1.0, 2)), as_dict((62, -0.5, 1))]
    (sequence,) = added(tmp_path, output(logprobs=more))
    assert [row(sequence, t)[0] for t in range(5)] == [*IDS[:4], [60, 61]]
    assert sequence.target_rank.tolist() == RANKS


def test_several_completions_are_several_sequences(tmp_path):
    made = output()
    made.outputs.append(CompletionOutput(token_ids=[15], logprobs=[as_dict((15, -0.125, 1))]))
    dataset = added(tmp_path, made, id="x")
    assert [sequence.id for sequence in dataset] == ["x", "x#1"]
    check(dataset[0])
    assert dataset[1].tokens.tolist() == [10, 11, 12, 15]
    assert row(dataset[1], 1) == ([51, 52], [-1.0, -2.0])
    assert row(dataset[1], 2)[0] == [53, 13]  # more candidates than the other's one


def logits(rows, width=40, seed=0):
    return np.random.default_rng(seed).normal(0, 4, (rows, width)).astype(np.float32)


def expected(dense, tokens, t, k):
    """(ids, logprobs, target logprob, target rank) of a row of logits, the slow way."""
    exact = dense.astype(np.float64)
    logprobs = exact - np.log(np.exp(exact).sum())
    order = sorted(range(len(dense)), key=lambda token: (-dense[token], token))
    target = tokens[t + 1]
    return order[:k], logprobs[order[:k]], logprobs[target], order.index(target) + 1


@pytest.mark.parametrize("kind", ["numpy", "torch", "bfloat16", "three dimensions", "lists"])
def test_logits_are_reduced_where_there_are_no_logprobs(tmp_path, kind):
    context, made = logits(3), logits(2, seed=1)
    if kind == "bfloat16":
        context, made = (torch.tensor(each).bfloat16() for each in (context, made))
        dense = [*context.float().numpy(), *made.float().numpy()]
    else:
        dense = [*context, *made]
        wrap = {"torch": torch.tensor, "three dimensions": lambda each: each[None], "lists": np.ndarray.tolist}
        context, made = (wrap.get(kind, np.asarray)(each) for each in (context, made))
    tokens = [10, 11, 12, 13, 14]
    done = output(logprobs=[], prompt_logprobs=[], generation_logits=made, context_logits=context)
    (sequence,) = added(tmp_path, done, settings={"top_k": 5})
    assert sequence.tokens.tolist() == tokens
    assert sequence.count.tolist() == [5, 5, 5, 5, 0]
    for t, source in enumerate((0, 1, 3, 4)):  # the context's last row is the first one of the generation
        ids, logprobs, target, rank = expected(dense[source], tokens, t, 5)
        assert row(sequence, t) == (ids, pytest.approx(logprobs, abs=1e-5))
        assert sequence.target_logprob[t] == pytest.approx(target, abs=1e-5)
        assert sequence.target_rank[t] == rank
        assert np.exp(sequence.tail[t]) == pytest.approx(1 - np.exp(logprobs).sum(), rel=0.05)
        assert sequence.logsumexp[t] == pytest.approx(np.log(np.exp(dense[source].astype(np.float64)).sum()), abs=1e-4)


def test_logits_of_one_side(tmp_path):
    context, made = logits(3), logits(4, seed=1)
    only_context = output(logprobs=None, prompt_logprobs=None, context_logits=context)
    only_output = output(logprobs=None, prompt_logprobs=None, generation_logits=made)
    nothing = output(token_ids=[], logprobs=None, prompt_logprobs=None, context_logits=context)
    for number, (done, counts) in enumerate(
        [(only_context, [40, 40, 40, 0, 0]), (only_output, [0, 0, 40, 40, 0]), (nothing, [40, 40, 40])]
    ):
        (sequence,) = added(tmp_path / str(number), done)
        assert sequence.count.tolist() == counts
        assert row(sequence, 2)[0][0] == int((made[0] if number == 1 else context[2]).argmax())
        assert (sequence.target_rank[2] == 0) == (number == 2)


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (output(logprobs=[], prompt_logprobs=[]), "there are no logprobs"),
        (output(logprobs=None, prompt_logprobs=None, token_ids=[], generation_logits=logits(1)), "no logprobs"),
        (output(prompt_logprobs=PROMPT[:2]), "prompt_logprobs has 2 rows for 3 tokens"),
        (output(logprobs=OUTPUT[:1]), "logprobs has 1 rows for 2 generated tokens"),
        (output(prompt_logprobs=[PROMPT[0], None, PROMPT[2]]), "prompt_logprobs: row 1 is missing"),
        (output(logprobs=[OUTPUT[0], -1.0]), "numbers and dictionaries"),
        (output(logprobs=[-1.0, math.nan]), "row 1 is NaN"),
        (output(logprobs=[-1.0, 0.5]), r"the token 14 has 0\.5"),
        (output(logprobs=[OUTPUT[0], as_dict((14, math.nan, 1))]), "row 1: the token 14 has nan"),
        (output(logprobs=[OUTPUT[0], as_dict((14, 3.0, 1))]), r"row 1: the token 14 has 3\.0"),
        (output(logprobs=[OUTPUT[0], "x"]), "logprobs is not a list of dictionaries"),
        (output(token_ids=["x"]), r"outputs\[0\]\.token_ids is no list"),
        (output(logprobs=[], prompt_logprobs=[], context_logits=logits(2)), r"context_logits has shape \[2, 40\]"),
        (
            output(logprobs=[], prompt_logprobs=[], generation_logits=logits(1)),
            r"generation_logits has shape \[1, 40\]",
        ),
        (output(logprobs=[], prompt_logprobs=[], context_logits=[[1.0], [1.0, 2.0]]), "context_logits is no array"),
        (RequestOutput(0, [], [CompletionOutput()]), "no prompt_token_ids"),
        (RequestOutput(0, [1], []), "no outputs"),
    ],
)
def test_objects_that_cannot_be_are_refused(tmp_path, made, match):
    with logitstore.Writer(tmp_path / "out") as writer, pytest.raises(SourceError, match=match):
        tensorrt_llm.add(writer, made)


def dump(**fields):
    return asdict(output(**fields))


def test_dumps_are_read_as_the_objects_are(tmp_path):
    dataset, notes = converted(tmp_path, dump(), dump() | {"request_id": "a"}, importer=None)
    check(dataset[0])
    check(dataset[1])
    assert [sequence.id for sequence in dataset] == ["0", "a"]  # 3 is a counter of the process
    assert dataset[0].columns == {"prompt": None, "text": "out"}
    assert "about the token after its own place" in notes


def test_dumped_numbers_and_none_first(tmp_path):
    simple = dump(logprobs=[-2.0, -3], prompt_logprobs=[-0.5, -7, -2.0])
    shifted = dump(prompt_logprobs=[None, *PROMPT[:2]])
    dataset, _ = converted(tmp_path, simple, shifted)
    assert dataset[0].target_logprob[:4].tolist() == TARGETS
    check(dataset[1])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (b'{"outputs": [', "no whole dump"),
        (b"[]", "no whole dump"),
        ({}, "missing required field `outputs`"),
        ({"outputs": []}, "no prompt_token_ids"),
        ({"outputs": [], "prompt_token_ids": [1]}, "no outputs"),
        (dump(logprobs=None, prompt_logprobs=None), "there are no logprobs"),
        (dump(logprobs=None, prompt_logprobs=None, context_logits=[[1.0]]), r"tensorrt_llm\.add"),
        (dump(logprobs=None, prompt_logprobs=None, generation_logits=[[1.0]]), r"tensorrt_llm\.add"),
        (dump(prompt_logprobs=PROMPT[:1]), "prompt_logprobs has 1 rows"),
        (dump() | {"prompt_token_ids": ["x"]}, "Expected `int`"),
    ],
)
def test_records_that_cannot_be_are_refused(tmp_path, wrong, match):
    with pytest.raises(SourceError, match=rf"in\.jsonl, line 2: .*{match}"):
        converted(tmp_path, dump(), wrong)


def test_rows_off_by_one_are_found_by_the_whole(tmp_path):
    """No row says which token it is about, so that many of them are looked at."""
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 1000, 102)]
    best = [{str(token): {"logprob": -0.5, "rank": 1}} for token in tokens[:101]]
    made = {"prompt_token_ids": tokens[:101], "outputs": [{"token_ids": tokens[101:], "prompt_logprobs": best}]}
    with pytest.raises(SourceError, match=r"off by -1"):
        converted(tmp_path, made)
    made["outputs"][0]["prompt_logprobs"] = [*best[1:], {"7": {"logprob": -0.5, "rank": 1}}]
    dataset, _ = converted(tmp_path, made, overwrite=True)
    assert dataset[0].ids.tolist() == [*tokens[1:101], 7]


VALUES = [None, "x", -1, 0, 1.5, 1e300, -1e300, 2**40, 10**30, True, [], {}, [None], {"11": {"logprob": -1}}]


def mutated(made, chance):
    if chance.random() < 0.03:
        return chance.choice(VALUES)
    if isinstance(made, dict):
        return {key: mutated(value, chance) for key, value in made.items() if chance.random() > 0.02}
    if isinstance(made, list):
        return [mutated(value, chance) for value in made if chance.random() > 0.02]
    return made


@pytest.mark.parametrize("fields", [{}, {"logprobs": [-2.0, -3.0], "prompt_logprobs": [-0.5, -7.0, -2.0]}])
def test_whatever_a_record_is_it_is_read_or_refused(tmp_path, fields):
    chance = random.Random(7)
    made = json.loads(json.dumps(dump(**fields)))
    read = 0
    with logitstore.Writer(tmp_path / "out") as writer:
        for number in range(800):
            line = json.dumps(mutated(made, chance)).encode()
            line = line[: chance.randrange(len(line))] if number % 10 == 0 else line
            try:
                for item in tensorrt_llm._Parser()(Record("x", number, line), Tally()):
                    writer.add(**item.arguments | {"id": f"{number}-{read}"})
                    read += 1
            except (SourceError, InvalidInputError):
                continue
    assert read > 20


@pytest.mark.parametrize(
    ("made", "own"),
    [
        (dump(), True),
        (dump(logprobs=None, prompt_logprobs=None), True),
        ({"request_id": "1", "prompt_token_ids": [1], "prompt_logprobs": None, "outputs": [{"logprobs": []}]}, False),
        ({"choices": [{"prompt_logprobs": [None]}]}, False),
        ({"meta_info": {"input_token_logprobs": []}}, False),
        ({"text": '"outputs": [{"prompt_logprobs": 1}]'}, False),
        ([dump()], False),
    ],
)
def test_recognition(tmp_path, made, own):
    (tmp_path / "in.jsonl").write_text(json.dumps(made) + "\n")
    assert tensorrt_llm.IMPORTER.recognises(Input(tmp_path / "in.jsonl")) is own


def test_several_files_and_workers_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(dump() | {"request_id": f"{name}{i}"}) + "\n" for i in range(20)))
    for workers in (0, 2):
        files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        done = convert(files, tmp_path / f"out{workers}", importer="tensorrt-llm", workers=workers)
        assert done.summary.sequences == 40
    shards = [next((tmp_path / f"out{workers}").glob("data/*/*.arrow")).read_bytes() for workers in (0, 2)]
    assert shards[0] == shards[1]
