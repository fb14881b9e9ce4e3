"""`logitstore.convert.vllm`: objects, dumps of them, and replies of the server."""

from __future__ import annotations

import json
import math
import random
from collections.abc import MutableSequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pytest

import logitstore
from logitstore.convert import convert, vllm, vllm_rows
from logitstore.convert import rows as rows_module
from logitstore.convert.base import Input, Options, Record, Tally
from logitstore.convert.pool import parsed
from logitstore.errors import InvalidInputError, SourceError

pytestmark = pytest.mark.usefixtures("quiet")


# What vLLM's own classes look like: vllm/logprobs.py and vllm/outputs.py.
@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs(MutableSequence):
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def __len__(self):
        return len(self.start_indices)

    def _refuse(self, *_):
        raise AssertionError("a dictionary was made")

    __getitem__ = __setitem__ = __delitem__ = insert = __iter__ = _refuse

    def add(self, *entries):
        """A row: (id, logprob, rank), the actual token first, and again where it is among the best."""
        self.start_indices.append(len(self.token_ids))
        for token, logprob, rank in entries:
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self.ranks.append(rank)
            self.decoded_tokens.append(None)
        self.end_indices.append(len(self.token_ids))
        return self


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: object = None
    index: int = 0
    text: str = ""


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int] | None
    prompt_logprobs: object
    outputs: list[CompletionOutput]
    prompt: str | None = None


# The prompt is 10 11 12, and 13 14 are generated. Of each row: the actual token with its rank, then the best two.
ROWS = [
    [(11, -0.5, 1), (50, -1.5, 2)],  # about 11: the best
    [(12, -7.0, 412), (51, -1.0, 1), (52, -2.0, 2)],  # about 12: far behind
    [(13, -2.0, 2), (53, -0.75, 1)],  # about 13: the second
    [(14, -3.0, 3), (54, -0.25, 1), (55, -2.5, 2)],  # about 14: the third, next to the best two
]
TOKENS = [10, 11, 12, 13, 14]
IDS = [[11, 50], [51, 52], [53, 13], [54, 55, 14], []]
LOGPROBS = [[-0.5, -1.5], [-1.0, -2.0], [-0.75, -2.0], [-0.25, -2.5, -3.0], []]
TARGETS, RANKS = [-0.5, -7.0, -2.0, -3.0], [1, 412, 2, 3, 0]


def as_dict(row):
    return {token: Logprob(logprob, rank, "x") for token, logprob, rank in row}


def as_flat(row):
    """The same row as `append_fast` has it: rank 1 and 2 follow, the actual token among them again."""
    own = row[0]
    return [own, *sorted([each for each in row if each[2] <= 2], key=lambda each: each[2])]


def dict_output(**fields):
    made = {
        "request_id": "r",
        "prompt_token_ids": [10, 11, 12],
        "prompt_logprobs": [None, as_dict(ROWS[0]), as_dict(ROWS[1])],
        "outputs": [CompletionOutput([13, 14], [as_dict(ROWS[2]), as_dict(ROWS[3])], text="out")],
    }
    return RequestOutput(**(made | fields))


def flat_output():
    prompt = FlatLogprobs().add().add(*as_flat(ROWS[0])).add(*as_flat(ROWS[1]))
    output = FlatLogprobs().add(*as_flat(ROWS[2])).add(*as_flat(ROWS[3]))
    return dict_output(prompt_logprobs=prompt, outputs=[CompletionOutput([13, 14], output, text="out")])


def array_output():
    made = flat_output()
    for flat in (made.prompt_logprobs, made.outputs[0].logprobs):
        for name in ("start_indices", "end_indices", "token_ids", "ranks"):
            setattr(flat, name, np.array(getattr(flat, name), np.int32))
        flat.logprobs = np.array(flat.logprobs, np.float32)
    return made


def added(tmp_path, *outputs, settings=None, **arguments):
    with logitstore.Writer(tmp_path / "out", values="float32", **(settings or {})) as writer:
        for output in outputs:
            vllm.add(writer, output, **arguments)
    return logitstore.open(tmp_path / "out")


def converted(tmp_path, *records, **options):
    """(dataset, notes) of these records as JSON lines."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
    done = convert([path], tmp_path / "out", **({"importer": "vllm", "values": "float32"} | options))
    return logitstore.open(tmp_path / "out"), " ".join(done.notes)


def row(sequence, t):
    part = slice(sequence.offsets[t], sequence.offsets[t + 1])
    return sequence.ids[part].tolist(), sequence.logprobs[part].tolist()


def check(sequence, tokens=TOKENS, start=0):
    """Position by position against the tables above, from some position on."""
    assert sequence.tokens.tolist() == tokens
    rows = [row(sequence, t) for t in range(len(tokens))]
    assert rows[start:] == [*zip(IDS, LOGPROBS, strict=True)][start:]
    assert sequence.target_logprob[start:-1].tolist() == TARGETS[start:]
    assert math.isnan(sequence.target_logprob[-1])
    assert sequence.target_rank.tolist()[start:] == RANKS[start:]


@pytest.mark.parametrize("make", [dict_output, flat_output, array_output])
def test_each_row_predicts_the_token_that_follows(tmp_path, make):
    (sequence,) = added(tmp_path, make(), note="n")
    check(sequence)
    assert sequence.id == "r"
    assert sequence.columns == {"note": "n"}
    assert sequence.loss_mask is None


def test_rows_of_one_side_only(tmp_path):
    only_prompt = dict_output(outputs=[CompletionOutput([13, 14])])
    only_output = dict_output(prompt_logprobs=None)
    bare = dict_output(outputs=[])
    first, second, third = added_each(tmp_path, only_prompt, only_output, bare)
    assert first.tokens.tolist() == second.tokens.tolist() == TOKENS
    assert first.count.tolist() == [2, 2, 0, 0, 0]
    assert second.count.tolist() == [0, 0, 2, 3, 0]
    assert (row(second, 2), row(second, 3)) == ((IDS[2], LOGPROBS[2]), (IDS[3], LOGPROBS[3]))
    assert (third.tokens.tolist(), third.count.tolist()) == ([10, 11, 12], [2, 2, 0])


def added_each(tmp_path, *outputs):
    with logitstore.Writer(tmp_path / "out", values="float32") as writer:
        for number, output in enumerate(outputs):
            vllm.add(writer, output, id=f"s{number}")
    return list(logitstore.open(tmp_path / "out"))


def test_several_completions_are_several_sequences(tmp_path):
    other = CompletionOutput([15], FlatLogprobs().add((15, -0.125, 1), (15, -0.125, 1)))
    output = dict_output(outputs=[*dict_output().outputs, other, CompletionOutput([], [])])
    dataset = added(tmp_path, output)
    assert [sequence.id for sequence in dataset] == ["r", "r#1", "r#2"]
    assert [sequence.tokens.tolist() for sequence in dataset] == [TOKENS, [10, 11, 12, 15], [10, 11, 12]]
    assert row(dataset[1], 2) == ([15], [-0.125])
    check(dataset[0])


def test_ids_are_the_requests_unless_given(tmp_path):
    dataset = added_each(tmp_path, dict_output(), dict_output())
    assert [sequence.id for sequence in dataset] == ["s0", "s1"]
    with pytest.raises(InvalidInputError, match="added before"):
        added(tmp_path / "b", dict_output(), dict_output())


@pytest.mark.parametrize("make", [dict_output, flat_output])
def test_probability_zero_is_no_candidate(tmp_path, make):
    output = make()
    if make is dict_output:
        output.prompt_logprobs[2] = as_dict([(12, -math.inf, 412), (51, -1.0, 1), (52, -9999.0, 2)])
    else:
        output.prompt_logprobs.logprobs[3:] = [-9999.0, -1.0, -math.inf]
    (sequence,) = added(tmp_path, output)
    assert row(sequence, 1) == ([51], [-1.0])
    assert math.isnan(sequence.target_logprob[1])
    assert sequence.target_rank[1] == 412


def test_a_tie_at_the_end_stays_a_candidate(tmp_path):
    """vLLM counts equal logprobs before the actual token, so its rank may be beyond the best."""
    output = flat_output()
    output.prompt_logprobs = FlatLogprobs().add().add((11, -1.5, 3), (50, -0.5, 1), (11, -1.5, 2)).add((12, -1.0, 1))
    (sequence,) = added(tmp_path, output)
    assert row(sequence, 0) == ([50, 11], [-0.5, -1.5])
    assert row(sequence, 1) == ([12], [-1.0])  # prompt_logprobs=0 gives the actual token alone
    assert sequence.target_rank.tolist()[:2] == [2, 1]


def test_the_actual_token_alone_is_the_target(tmp_path):
    output = dict_output(prompt_logprobs=[None, {11: Logprob(-4.0, 9)}, {12: Logprob(-5.0)}])
    (sequence,) = added(tmp_path, output)
    assert sequence.count.tolist()[:2] == [0, 0]
    assert sequence.target_logprob.tolist()[:2] == [-4.0, -5.0]
    assert sequence.target_rank.tolist()[:2] == [9, 0]


def test_logits_are_normalised_over_the_candidates(tmp_path):
    logits = [None, as_dict([(11, 3.0, 1), (50, 2.0, 2)]), as_dict([(12, -7.0, 412), (51, 1.0, 1), (52, 1.0, 2)])]
    output = dict_output(prompt_logprobs=logits, outputs=[])
    with logitstore.Writer(tmp_path / "a") as writer, pytest.raises(InvalidInputError, match="normalised='candidates'"):
        vllm.add(writer, output, value_kind="logit")
    with logitstore.Writer(tmp_path / "b") as writer, pytest.raises(SourceError, match=r"row 1: .* 3\.0.*value-kind"):
        vllm.add(writer, output)
    (sequence,) = added(tmp_path, output, settings={"normalised": "candidates"}, value_kind="logit")
    whole = math.log(math.exp(3) + math.exp(2))
    assert row(sequence, 0) == ([11, 50], pytest.approx([3 - whole, 2 - whole]))
    assert row(sequence, 1) == ([51, 52], pytest.approx([math.log(0.5)] * 2))
    assert sequence.target_logprob[:2].tolist() == pytest.approx([3 - whole, -7 - (1 + math.log(2))])
    with logitstore.Writer(tmp_path / "c") as writer, pytest.raises(InvalidInputError, match="'draws'"):
        vllm.add(writer, output, value_kind="draws")


def flat(**columns):
    made = FlatLogprobs().add().add(*as_flat(ROWS[0])).add(*as_flat(ROWS[1]))
    for name, values in columns.items():
        setattr(made, name, values)
    return made


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prompt_logprobs": [None, as_dict(ROWS[0])]}, "prompt_logprobs has 2 rows for 3 tokens"),
        ({"prompt_logprobs": []}, "prompt_logprobs has 0 rows"),
        ({"prompt_logprobs": [as_dict(ROWS[0]), as_dict(ROWS[1]), None]}, "row 0: there is one"),
        ({"prompt_logprobs": [None, None, as_dict(ROWS[1])]}, "rows 1 to 1 are missing.*enable_prefix_caching=False"),
        ({"prompt_logprobs": [None, None, {}]}, "rows 1 to 2 are missing"),
        ({"prompt_logprobs": flat().add()}, "4 rows for 3 tokens"),
        ({"prompt_logprobs": FlatLogprobs().add().add().add(*ROWS[1])}, "rows 1 to 1 are missing"),
        ({"prompt_logprobs": [None, as_dict(ROWS[1]), as_dict(ROWS[0])]}, "row 1: its first candidate is 12.* is 11"),
        ({"prompt_token_ids": [9, 10, 11]}, "row 1: its first candidate is 11, but the token there is 10"),
        ({"prompt_token_ids": []}, "no prompt_token_ids"),
        ({"prompt_token_ids": None}, "no prompt_token_ids"),
        ({"prompt_token_ids": ["a"]}, "prompt_token_ids is no list of token ids"),
        ({"prompt_logprobs": None, "outputs": [CompletionOutput([13])]}, "there are no logprobs"),
        ({"prompt_logprobs": [None, [(11, -0.5)], {}]}, "prompt_logprobs is not a list of dictionaries"),
        ({"prompt_logprobs": [None, {11: -0.5}, {12: -1.0}]}, "prompt_logprobs is not a list of dictionaries"),
        ({"prompt_logprobs": 7}, "prompt_logprobs is not a list of dictionaries"),
        ({"prompt_logprobs": [None, as_dict([(11, math.nan, 1)]), as_dict(ROWS[1])]}, "row 1: the token 11 has nan"),
        ({"prompt_logprobs": [None, as_dict([(11, 0.5, 1)]), as_dict(ROWS[1])]}, r"row 1: the token 11 has 0\.5"),
        ({"prompt_logprobs": [None, as_dict([(11, -math.inf, 1)]), as_dict(ROWS[1])]}, "row 1: none of its 1"),
        ({"outputs": [CompletionOutput([13], dict_output().outputs[0].logprobs)]}, r"outputs\[0\].logprobs has 2 rows"),
        ({"outputs": [CompletionOutput([13, 15], dict_output().outputs[0].logprobs)]}, r"outputs\[0\].*row 1.* 14"),
        ({"outputs": [CompletionOutput([13, 14], [None, {}])]}, "rows 0 to 1 are missing"),
        ({"prompt_logprobs": flat(end_indices=[0, 3, 5])}, "do not cut its 6 candidates"),
        ({"prompt_logprobs": flat(start_indices=[0, 0, 2])}, "do not cut"),
        ({"prompt_logprobs": flat(start_indices=[0, 0])}, "do not cut"),
        ({"prompt_logprobs": flat(start_indices=[0, 4, 3], end_indices=[4, 3, 6])}, "do not cut"),
        ({"prompt_logprobs": flat(ranks=[1])}, "6 token_ids, 6 logprobs and 1 ranks"),
        ({"prompt_logprobs": flat(logprobs=["a"] * 6)}, r"prompt_logprobs\.logprobs is no list of numbers"),
        ({"prompt_logprobs": flat(token_ids=[11, None, 1, 1, 1, 1])}, r"prompt_logprobs\.token_ids"),
        ({"prompt_logprobs": flat(token_ids=[1.5] * 6)}, r"prompt_logprobs\.token_ids"),
        ({"prompt_logprobs": flat(token_ids=None)}, r"prompt_logprobs\.token_ids"),
    ],
)
def test_objects_that_cannot_be_are_refused(tmp_path, fields, match):
    with logitstore.Writer(tmp_path / "out") as writer:
        with pytest.raises(SourceError, match=match):
            vllm.add(writer, dict_output(**fields))
        assert writer.summary.sequences == 0
        writer.add([1], [], [], count=[0])


def test_flat_columns_without_ranks(tmp_path):
    for number, ranks in enumerate((None, [None] * 6)):
        (sequence,) = added(tmp_path / str(number), dict_output(prompt_logprobs=flat(ranks=ranks)))
        assert [row(sequence, t) for t in range(2)] == [(IDS[0], LOGPROBS[0]), (IDS[1], LOGPROBS[1])]
        assert sequence.target_rank.tolist()[:2] == [1, 0]


# Dumps


@pytest.mark.parametrize("make", [dict_output, flat_output])
def test_dumps_are_read_as_the_objects_are(tmp_path, make):
    dataset, notes = converted(tmp_path, asdict_of(make()), importer=None)
    check(dataset[0])
    assert dataset[0].id == "r"
    assert dataset[0].columns == {"prompt": None, "text": "out"}
    assert dataset.info.source.format == "vllm"
    assert "about the token of its own place" in notes
    assert "temperature 1" in notes


def asdict_of(output):
    """`dataclasses.asdict` would copy the flat form by its constructor and not by iterating; so do we."""
    return asdict(output)


def test_counters_are_no_ids(tmp_path):
    """Each process counts from 0 again, so that several files would have the same."""
    made = asdict_of(dict_output(request_id="7", outputs=[CompletionOutput([13]), CompletionOutput([14])]))
    dataset, _ = converted(tmp_path, made, made | {"request_id": ""})
    assert [sequence.id for sequence in dataset] == ["0", "0#1", "1", "1#1"]


def test_null_is_probability_zero(tmp_path):
    made = asdict_of(dict_output())
    made["prompt_logprobs"][1][50]["logprob"] = None
    dataset, _ = converted(tmp_path, made)
    assert row(dataset[0], 0) == ([11], [-0.5])


def test_logits_by_option(tmp_path):
    made = asdict_of(dict_output(outputs=[]))
    made["prompt_logprobs"][1]["11"] = made["prompt_logprobs"][1].pop(11) | {"logprob": 4.0}
    made["prompt_logprobs"][1] = dict(reversed(made["prompt_logprobs"][1].items()))
    with pytest.raises(SourceError, match=r"in\.jsonl, line 1: prompt_logprobs, row 1: .*--value-kind logit"):
        converted(tmp_path, made)
    dataset, notes = converted(tmp_path, made, value_kind="logit", overwrite=True)
    assert dataset.info.normalised == "candidates"
    assert "normalised over the candidates" in notes
    assert np.exp(row(dataset[0], 0)[1]).sum() == pytest.approx(1)
    with pytest.raises(InvalidInputError, match="probability"):
        converted(tmp_path, made, value_kind="probability", overwrite=True)


# Replies of the server


def said(row):
    return {str(token): {"logprob": logprob, "rank": rank, "decoded_token": "x"} for token, logprob, rank in row}


def token_id(token):
    return f"token_id:{token}"


def legacy(*rows, name=token_id):
    return {
        "text_offset": [0] * len(rows),
        "tokens": [name(made[0][0]) for made in rows],
        "token_logprobs": [made[0][1] for made in rows],
        "top_logprobs": [{name(token): logprob for token, logprob, _ in made} for made in rows],
    }


def content(*rows, name=token_id):
    def candidate(token, logprob, _):
        return {"token": name(token), "logprob": logprob, "bytes": None}

    return {"content": [candidate(*made[0]) | {"top_logprobs": [candidate(*each) for each in made]} for made in rows]}


PROMPT = [None, said(ROWS[0]), said(ROWS[1])]


def completion(**fields):
    choice = {
        "index": 0,
        "text": " x",
        "prompt_logprobs": PROMPT,
        "prompt_token_ids": [10, 11, 12],
        "token_ids": [13, 14],
        "logprobs": legacy(*ROWS[2:]),
    }
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice | fields]}


def chat(**fields):
    choice = {"index": 0, "message": {"role": "assistant", "content": " x"}, "logprobs": content(*ROWS[2:])}
    whole = {"prompt_logprobs": PROMPT, "prompt_token_ids": [10, 11, 12]}
    choice |= {"token_ids": [13, 14]}
    return {"id": "chatcmpl-1", "choices": [choice | fields], **whole}


def check_served(sequence):
    """The server does not say ranks, so a last actual token may be beyond the best ones: it is the target only."""
    assert sequence.tokens.tolist() == TOKENS
    assert [row(sequence, t) for t in range(5)] == [
        ([11, 50], [-0.5, -1.5]),
        ([51, 52], [-1.0, -2.0]),
        ([53], [-0.75]),
        ([54, 55], [-0.25, -2.5]),
        ([], []),
    ]
    assert sequence.target_logprob[:4].tolist() == [-0.5, -7.0, -2.0, -3.0]
    assert sequence.target_rank.tolist() == [1, 412, 0, 0, 0]


@pytest.mark.parametrize(("made", "name"), [(completion(), "cmpl-1"), (chat(), "chatcmpl-1")])
def test_replies_are_read(tmp_path, made, name):
    dataset, notes = converted(tmp_path, made, importer=None)
    check_served(dataset[0])
    assert dataset[0].id == name
    assert dataset[0].columns == {"prompt": None, "text": " x"}
    assert dataset[0].loss_mask is None
    assert "placeholder" not in notes


def test_a_token_below_its_rows_others_is_a_candidate_only_where_it_must_be_the_next(tmp_path):
    """The first k of the list are those with the actual token in front, whatever its rank."""
    sure = [(13, math.log(0.2), 3), (53, math.log(0.5), 1), (56, math.log(0.25), 2)]  # 0.05 are left to others
    dataset, notes = converted(tmp_path, completion(logprobs=legacy(sure, ROWS[3])))
    assert row(dataset[0], 2)[0] == [53, 56, 13]
    assert dataset[0].target_rank.tolist()[2:] == [3, 0, 0]
    assert "At 1 positions the generated token stands below the other candidates" in notes
    alone = content([(13, math.log(0.6), 1)], [(14, math.log(0.4), 1)])  # top_logprobs=1 gives it alone
    dataset, notes = converted(tmp_path, chat(logprobs=alone), overwrite=True)
    assert [row(dataset[0], t)[0] for t in (2, 3)] == [[13], []]
    assert dataset[0].target_logprob[2:4].tolist() == pytest.approx([math.log(0.6), math.log(0.4)])
    assert dataset[0].target_rank.tolist()[2:] == [1, 0, 0]
    assert "At 1 positions" in notes


def test_a_token_with_two_logprobs_is_counted_or_refused(tmp_path):
    rows = [[(13, -2.0, 2), (53, -0.75, 1)]] * 7 + [[(13, -0.5, 1), (53, -1.5, 2)]]
    made = legacy(*rows)
    made["token_logprobs"][-1] = -4.5
    found = completion(logprobs=made, token_ids=[13] * 8)
    dataset, notes = converted(tmp_path, found)
    assert dataset[0].target_logprob[-2] == -0.5
    assert "At 1 positions the actual token has another logprob" in notes
    rounded = changed(found, *C, "logprobs", "token_logprobs", -1, value=-0.49)
    assert "another logprob" not in converted(tmp_path, rounded, overwrite=True)[1]
    made["token_logprobs"][:4] = [-9.0] * 4
    with pytest.raises(
        SourceError, match=r"line 1: .*logprobs: row 0 gives the token 13 the logprob -9, .*-2, .*5 of 8"
    ):
        converted(tmp_path, completion(logprobs=made, token_ids=[13] * 8), overwrite=True)
    flat_form = flat(logprobs=[-5.0, -0.5, -1.5, -7.0, -1.0, -2.0])
    (sequence,) = added(tmp_path / "b", dict_output(prompt_logprobs=flat_form))
    assert sequence.target_logprob[0] == -0.5


def test_sorted_keys_do_not_make_other_tokens(tmp_path):
    """`json.dumps(sort_keys=True)` and `jq -S` sort the candidates by their ids' texts."""
    fits = completion(prompt_token_ids=None)
    converted(tmp_path, fits)
    for order, rows in [
        (sorted, [ROWS[0], [(52, -7.0, 412), (51, -1.0, 1), (53, -2.0, 2)]]),  # the best one first
        (sorted, [ROWS[0], [(53, -7.0, 412), (51, -1.0, 1), (52, -2.0, 2)]]),
        (sorted, [[(11, -0.5, 1)], [(60, -7.0, 412), (51, -1.0, 1)]]),  # k = 1
        (sorted, [[(11, -0.5, 1)], [(60, -2.0, 2), (51, -1.0, 1)]]),
        (list, [[(11, -0.5, 1), (50, -1.5, 3), (51, -2.5, 2)], ROWS[1]]),
    ]:
        prompt = [None, *(dict(order(said(made).items())) for made in rows)]
        with pytest.raises(
            SourceError, match=r"prompt_logprobs: behind the first .* keys were sorted; .*return_token_ids"
        ):
            converted(tmp_path, completion(prompt_token_ids=None, prompt_logprobs=prompt), overwrite=True)


def test_choices_share_the_rows_of_their_prompt(tmp_path, monkeypatch):
    calls = []
    kept = vllm._prompt_rows
    monkeypatch.setattr(vllm, "_prompt_rows", lambda *given: calls.append(1) or kept(*given))
    made = chat() | {"choices": chat()["choices"] * 5}
    dataset, _ = converted(tmp_path, made)
    assert len(calls) == 1
    for sequence in dataset:
        check_served(sequence)


def test_choices_that_repeat_a_long_prompt_too_often_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "SEQUENCE_CANDIDATES", 100)
    made = chat() | {"choices": chat()["choices"] * 6}
    with pytest.raises(SourceError, match=r"line 1: choice 5: .*over the limit of 100 together"):
        converted(tmp_path, made)
    converted(tmp_path, chat() | {"choices": chat()["choices"] * 5}, overwrite=True)


@pytest.mark.parametrize("made", [completion(token_ids=None), chat(token_ids=None)])
def test_generated_tokens_are_known_by_their_candidates(tmp_path, made):
    dataset, _ = converted(tmp_path, made)
    check_served(dataset[0])


def test_an_actual_token_in_the_middle_is_a_candidate(tmp_path):
    made = legacy([(13, -1.0, 2), (53, -0.75, 1), (56, -3.0, 3)], [(14, -0.25, 1), (55, -2.5, 2)])
    dataset, _ = converted(tmp_path, completion(logprobs=made))
    assert row(dataset[0], 2) == ([53, 13, 56], [-0.75, -1.0, -3.0])
    assert row(dataset[0], 3) == ([14, 55], [-0.25, -2.5])
    assert dataset[0].target_rank.tolist()[2:] == [2, 1, 0]


def test_clamped_logprobs_are_probability_zero(tmp_path):
    made = completion(
        prompt_logprobs=[None, said(ROWS[0]), said([(12, -9999.0, 412), (51, -1.0, 1), (52, -9999.0, 2)])],
        logprobs=legacy([(13, -9999.0, 9), (53, -0.75, 1), (56, -9999.0, 3)], ROWS[3]),
    )
    dataset, _ = converted(tmp_path, made)
    assert [row(dataset[0], t)[0] for t in (1, 2)] == [[51], [53]]
    assert np.isnan(dataset[0].target_logprob[[1, 2, 4]]).all()


def test_several_choices_have_their_own_prompts_or_one(tmp_path):
    first, second = completion(), completion(prompt_token_ids=[20, 11, 12], token_ids=None, logprobs=None)
    made = first | {"choices": first["choices"] + second["choices"]}
    dataset, notes = converted(tmp_path, made, chat() | {"choices": chat()["choices"] * 2})
    assert [sequence.id for sequence in dataset] == ["cmpl-1", "cmpl-1#1", "chatcmpl-1", "chatcmpl-1#1"]
    assert dataset[1].tokens.tolist() == [20, 11, 12]
    assert "In 1 of the sequences the generated tokens are left out" in notes
    for number in (0, 2, 3):
        check_served(dataset[number])


def text(token):
    return f" {token}"


@pytest.mark.parametrize("make", [completion, chat])
def test_texts_are_no_candidates(tmp_path, make):
    said = (legacy if make is completion else content)(*ROWS[2:], name=text)
    dataset, notes = converted(tmp_path, make(logprobs=said), make(logprobs=said, token_ids=None) | {"id": "b"})
    assert dataset[0].tokens.tolist() == TOKENS
    assert dataset[0].count.tolist() == [2, 2, 0, 0, 0]
    assert dataset[0].target_logprob[:4].tolist() == TARGETS
    assert dataset[1].tokens.tolist() == [10, 11, 12]
    assert "In 1 of the sequences the generated tokens have no candidates" in notes
    assert "return_tokens_as_token_ids" in notes
    assert "In 1 of the sequences the generated tokens are left out" in notes


def test_echo_says_the_prompt_before_the_output(tmp_path):
    """Under `echo` the legacy lists begin with the prompt, whose first token has no logprob."""
    every = legacy([(10, None, 1)], *ROWS)
    every["top_logprobs"][0] = None
    known = completion(prompt_logprobs=None, logprobs=every)
    unknown = completion(prompt_logprobs=None, logprobs=every, prompt_token_ids=None, token_ids=None) | {"id": "b"}
    texts = every | {"tokens": [" a"] * 5, "top_logprobs": [None] + [{" a": -1.0}] * 4}
    dataset, notes = converted(tmp_path, known, unknown, completion(logprobs=texts) | {"id": "c"})
    for sequence in (dataset[0], dataset[1]):
        assert sequence.tokens.tolist() == TOKENS
        assert [row(sequence, t)[0] for t in range(5)] == [[11, 50], [51, 52], [53], [54, 55], []]
        assert sequence.target_logprob[:4].tolist() == TARGETS
        assert sequence.loss_mask is None
    assert dataset[2].target_logprob[:4].tolist() == TARGETS
    assert "placeholder" not in notes


def test_without_the_prompts_ids_a_placeholder_stands_for_it(tmp_path):
    alone = completion(prompt_logprobs=None, prompt_token_ids=None)
    scored = completion(prompt_token_ids=None) | {"id": "b"}
    dataset, notes = converted(tmp_path, alone, scored)
    assert dataset[0].tokens.tolist() == [0, 13, 14]
    assert [row(dataset[0], t)[0] for t in range(3)] == [[53], [54, 55], []]
    assert dataset[0].loss_mask.tolist() == [0, 0, 0]
    assert dataset[1].tokens.tolist() == [0, 11, 12, 13, 14]  # rows begin with the actual tokens
    assert row(dataset[1], 0) == ([11, 50], [-0.5, -1.5])
    assert dataset[1].loss_mask.tolist() == [0] * 5
    assert "In 2 of the sequences a placeholder" in notes


@pytest.mark.parametrize("adds", [True, False])
def test_the_tokenizers_bos_is_the_first_token_where_it_adds_one(adds):
    parser = vllm._Parser("logprob", 2, adds)
    tally = Tally()
    made = completion(prompt_token_ids=None)
    (item,) = parser(Record("x", 0, json.dumps(made).encode()), tally)
    assert item.arguments["tokens"].tolist() == [2, 11, 12, 13, 14]
    assert ("loss_mask" in item.arguments) is not adds
    assert bool([note for note in tally.notes if "BOS" in note]) is adds
    assert bool([note for note in tally.notes if "placeholder" in note]) is not adds


@pytest.mark.parametrize(("name", "adds"), [("gemma3", True), ("llama3", False)])
def test_whether_the_tokenizer_adds_bos_is_its_own_say(tmp_path, shared, name, adds):
    tokenizer = logitstore.Tokenizer.from_path(shared(f"tokenizers/{name}"))
    assert tokenizer.adds_bos is adds
    dataset, notes = converted(tmp_path, completion(prompt_token_ids=None), tokenizer=tokenizer)
    assert dataset[0].tokens[0] == tokenizer.bos_id
    assert (dataset[0].loss_mask is None) is adds
    assert ("placeholder" in notes) is not adds


def changed(made, *path, value):
    copy = json.loads(json.dumps(made))
    node = copy
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return copy


C = ("choices", 0)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (b'{"choices": [', "no whole reply of vLLM"),
        (b"[]", "no whole reply"),
        (b"\xff", "no whole reply"),
        (b"[" * 100_000, "no whole reply"),
        (b'{"outputs": [], "prompt_token_ids": [1], "prompt_logprobs": [{"1": {"logprob": NaN}}]}', "malformed"),
        ({}, "no prompt_token_ids, and no choices"),
        ({"object": "error", "message": "too long"}, "no prompt_token_ids"),
        ({"choices": []}, "choices is empty"),
        (completion(prompt_logprobs=None, logprobs=None), r"choices\[0\]: there are no logprobs"),
        (completion(prompt_logprobs=None, logprobs=legacy(*ROWS[2:], name=text)), "candidates are texts"),
        (completion(prompt_logprobs=PROMPT[1:]), r"choices\[0\]: prompt_logprobs, row 0"),
        (completion(prompt_logprobs=PROMPT[:2]), "2 rows for 3 tokens"),
        (completion(prompt_logprobs=[None, None, PROMPT[2]]), "rows 1 to 1 are missing.*enable_prefix_caching"),
        (completion(prompt_logprobs=[None, None, PROMPT[2]], prompt_token_ids=None), "rows 1 to 1 are missing"),
        (completion(prompt_logprobs=[None, PROMPT[2], PROMPT[1]]), "row 1: its first candidate is 12"),
        (completion(token_ids=[13, 15]), "differ from number 1"),
        (completion(token_ids=[13]), "2 tokens, token_ids 1"),
        (completion(logprobs=legacy(*ROWS[1:], name=text)), "logprobs has 3 tokens, token_ids 2"),
        (changed(completion(), *C, "logprobs", "token_logprobs", value=[-1.0]), "2 tokens, 1 token_logprobs"),
        (changed(completion(), *C, "logprobs", "top_logprobs", value=[{}]), "and 1 top_logprobs"),
        (changed(completion(), *C, "logprobs", "tokens", 1, value=" x"), "some are texts"),
        (changed(completion(), *C, "logprobs", "tokens", 1, value="14"), "some are texts"),
        (changed(completion(), *C, "logprobs", "tokens", 1, value="token_id:" + "9" * 30), "no `token_id:`"),
        (changed(completion(), *C, "logprobs", "tokens", 1, value="token_id: 3"), "no `token_id:`"),
        (changed(completion(), *C, "logprobs", "tokens", 1, value="token_id:1_0"), "no `token_id:`"),
        (changed(completion(), *C, "logprobs", "tokens", 1, value="token_id:\u0663"), "no `token_id:`"),
        (changed(completion(), *C, "logprobs", "tokens", 1, value="token_id:-5"), "no `token_id:`"),
        (changed(completion(), *C, "logprobs", "tokens", 1, value="token_id:"), "no `token_id:`"),
        (changed(completion(), *C, "logprobs", "top_logprobs", 1, value=None), "top_logprobs: row 1 is empty"),
        (changed(completion(), *C, "logprobs", "top_logprobs", 0, value={}), "top_logprobs: row 0 is empty"),
        (changed(chat(), *C, "logprobs", "content", 1, "top_logprobs", value=[]), "top_logprobs: row 1 is empty"),
        (changed(completion(), *C, "logprobs", "token_logprobs", 1, value=None), "token_logprobs: row 1 is empty"),
        (chat(delta={"content": "x"}), "a piece of a streamed reply"),
        (changed(completion(), *C, "logprobs", "top_logprobs", 1, value={"token_id:x": -1.0}), "no `token_id:`"),
        (changed(completion(), *C, "logprobs", "top_logprobs", 1, value={"token_id:5": 1.0}), r"row 1: .* 1\.0"),
        (changed(chat(), *C, "logprobs", "content", 0, "logprob", value=0.5), r"the token 13 has 0\.5"),
        (changed(chat(), "prompt_logprobs", 1, value={"x": {"logprob": -1}}), r"Expected `int`.*prompt_logprobs"),
        (changed(chat(), "prompt_logprobs", 1, value={"-1": {"logprob": -1}}), "Expected `int` >= 0"),
        (changed(chat(), "prompt_logprobs", 1, value={"11": {"logprob": "-1"}}), "Expected `float"),
        (changed(chat(), "prompt_logprobs", 1, value={"11": {"logprob": None}}), "row 1: none of its 1 candidates"),
        (changed(chat(), "prompt_logprobs", 1, value={"11": {"rank": 1}}), "missing required field `logprob`"),
        (changed(chat(), "prompt_logprobs", value=7), "Expected"),
        (changed(chat(), "prompt_token_ids", value=[1.5]), "Expected `int`"),
        (changed(chat(), "prompt_token_ids", value=[10, 11, 2**31]), "Expected `int`"),
    ],
)
def test_records_that_cannot_be_are_refused(tmp_path, wrong, match):
    with pytest.raises(SourceError, match=rf"in\.jsonl, line 2: .*{match}"):
        converted(tmp_path, completion(), wrong)


def test_skipped_records_are_counted(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(completion()) + "\n{}\n" + json.dumps(chat()) + "\n")
    done = convert([path], tmp_path / "out", on_error="skip")
    assert (done.summary.sequences, done.skipped) == (2, 1)
    assert "line 2" in done.failures[0]


def test_several_files_and_workers_give_the_same_bytes(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(json.dumps(completion() | {"id": f"a{i}"}) + "\n" for i in range(20)))
    second.write_text("".join(json.dumps(asdict_of(flat_output()) | {"request_id": str(i)}) + "\n" for i in range(20)))
    for workers in (0, 2):
        done = convert([first, second], tmp_path / f"out{workers}", importer="vllm", workers=workers)
        assert done.summary.sequences == 40
    shards = [next((tmp_path / f"out{workers}").glob("data/*/*.arrow")).read_bytes() for workers in (0, 2)]
    assert shards[0] == shards[1]
    assert len(shards[0]) > 1000


VALUES = [
    None,
    "x",
    "token_id:7",
    "",
    -1,
    0,
    1.5,
    1e300,
    -1e300,
    2**40,
    10**30,
    True,
    [],
    {},
    [None],
    {"11": {"logprob": -1}},
]


def mutated(made, chance):
    """A copy in which some nodes are something else, or are gone."""
    if chance.random() < 0.03:
        return chance.choice(VALUES)
    if isinstance(made, dict):
        return {key: mutated(value, chance) for key, value in made.items() if chance.random() > 0.02}
    if isinstance(made, list):
        return [mutated(value, chance) for value in made if chance.random() > 0.02]
    return made


@pytest.mark.parametrize("make", [completion, chat, lambda: asdict_of(dict_output()), lambda: asdict_of(flat_output())])
@pytest.mark.parametrize("kind", ["logprob", "logit"])
def test_whatever_a_record_is_it_is_read_or_refused(tmp_path, make, kind):
    chance = random.Random(7)
    made = json.loads(json.dumps(make()))
    parser = vllm._Parser(kind, None, False)
    read = 0
    settings = vllm_rows.settings_of(kind)
    with logitstore.Writer(tmp_path / "out", **settings) as writer:
        for number in range(600):
            line = json.dumps(mutated(made, chance)).encode()
            line = line[: chance.randrange(len(line))] if number % 10 == 0 else line
            try:
                for item in parser(Record("x", number, line), Tally()):
                    writer.add(**item.arguments | {"id": f"{number}-{read}"})
                    read += 1
            except (SourceError, InvalidInputError):
                continue
    assert read > 20


def test_every_cut_of_a_line_is_found(tmp_path):
    line = json.dumps(completion()).encode()
    path = tmp_path / "in.jsonl"
    for length in range(1, len(line), 7):
        path.write_bytes(line[:length])
        (outcome,) = parsed(vllm.IMPORTER.read([Input(path)], Options()), 0)
        assert isinstance(outcome.error, SourceError)


NEIGHBOURS = {
    "openai chat": {"choices": [{"logprobs": content(*ROWS[2:], name=text)}]},
    "openai completions": {"choices": [{"text": "x", "logprobs": legacy(*ROWS[2:], name=text)}]},
    "server without": {"choices": [{"text": "x", "prompt_logprobs": None, "token_ids": None}], "prompt_logprobs": None},
    "sglang": {"text": "x", "meta_info": {"input_token_logprobs": [[None, 1, None]]}},
    "tgi": {"generated_text": "x", "details": {"prefill": [], "tokens": []}},
    "llama-server": {"completion_probabilities": [], "tokens": []},
    "tensorrt-llm": {"prompt_token_ids": [1], "outputs": [{"token_ids": [1], "prompt_logprobs": [], "logprobs": []}]},
    "axolotl": {"messages": [], "logprobs": [[{"token": "token_id:865", "logprob": -0.1}]]},
    "tinker": {"topk_prompt_logprobs": [], "prompt_logprobs": [None, -1.0]},
    "text": {"text": '"prompt_logprobs": [1], "request_id": "choices": "token_id:1"'},
    "easydistill": [{"12": 0.5}],
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_are_not_recognised(tmp_path, name):
    (tmp_path / "in.jsonl").write_text(json.dumps(NEIGHBOURS[name]) + "\n")
    assert not vllm.IMPORTER.recognises(Input(tmp_path / "in.jsonl"))


@pytest.mark.parametrize("made", [completion(), chat(), completion(prompt_logprobs=None), asdict_of(flat_output())])
def test_its_own_are_recognised(tmp_path, made):
    (tmp_path / "in.jsonl").write_text(json.dumps(made) + "\n")
    assert vllm.IMPORTER.recognises(Input(tmp_path / "in.jsonl"))
    (tmp_path / "in.jsonl").write_text(json.dumps(made | {"prompt_logprobs": PROMPT * 5000}) + "\n")
    assert vllm.IMPORTER.recognises(Input(tmp_path / "in.jsonl"))


@pytest.mark.parametrize("data", [b"", b"\xff\x00" * 99, b"{" * 70_000, b'{"' + b'\\"' * 40_000, b"[1]", b"}}}"])
def test_recognition_never_fails(tmp_path, data):
    (tmp_path / "in.jsonl").write_bytes(data)
    assert not vllm.IMPORTER.recognises(Input(tmp_path / "in.jsonl"))
