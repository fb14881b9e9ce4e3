"""`logitstore.convert`: replies of OpenAI's API and of servers like it."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import zstandard

import logitstore
from logitstore.convert import convert, openai
from logitstore.convert.base import Input, Options
from logitstore.convert.pool import parsed
from logitstore.errors import InvalidInputError, MissingDependencyError, SourceError

pytestmark = pytest.mark.usefixtures("quiet")
BOS, SPACE, E_ACUTE, BYTE_A, BYTE_C3, AB, END = 0, 27, 28, 29, 30, 31, 32
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}{% generation %}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}z{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    """A function that writes a tokenizer and returns its directory: a 1 ... z 26; `a` is spelled by two tokens."""

    def make(template=TEMPLATE, *, adds_bos=True):
        vocabulary = {"<bos>": BOS} | {chr(96 + i): i for i in range(1, 27)}
        vocabulary |= {"▁": SPACE, "é": E_ACUTE, "<0x61>": BYTE_A, "<0xC3>": BYTE_C3, "ab": AB}
        added = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        bos = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}] if adds_bos else []
        text = {"Sequence": {"id": "A", "type_id": 0}}
        file = {
            "version": "1.0",
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "byte_fallback": True},
            "added_tokens": [added | {"id": BOS, "content": "<bos>"}, added | {"id": END, "content": "<end>"}],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [*bos, text],
                "pair": [*bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}} if adds_bos else {},
            },
        }
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
        config = {"bos_token": "<bos>", "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make


def token(text, logprob, **more):
    return {"token": text, "bytes": list(text.encode()), "logprob": logprob} | more


def entry(text, logprob, top, **more):
    """What a reply says of a generated token; `top` are pairs of text and logprob."""
    return token(text, logprob) | {"top_logprobs": [token(*each) for each in top]} | more


def with_id(text, logprob, number, top):
    """The same as llama-server gives it; `top` are texts, logprobs and ids."""
    return entry(text, logprob, [], id=number) | {"top_logprobs": [token(t, p, id=i) for t, p, i in top]}


def chat(*entries, text="bd", **fields):
    """A chat's reply."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": {"content": list(entries), "refusal": None}}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice]} | fields


def completion(tokens, levels, top, **fields):
    logprobs = {"tokens": tokens, "token_logprobs": levels, "top_logprobs": top, "text_offset": [0] * len(tokens)}
    choice = {"index": 0, "text": "".join(tokens), "logprobs": logprobs}
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice]} | fields


B = entry("b", -0.5, [("b", -0.5), ("c", -1.5)])
D = entry("d", -3.0, [("e", -0.25), ("f", -2.0)])  # not among its candidates
GOOD = chat(B, D)
IDS = [with_id("b", -1.5, 102, [("a", -0.5, 101), ("b", -1.5, 102)]), with_id("d", -3.0, 104, [("c", -0.25, 103)])]


def lines(*records):
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)


def read(folder, *replies, prompts=None, **options):
    """(dataset, notes) of these replies."""
    (folder / "in.jsonl").write_bytes(lines(*replies))
    if prompts is not None:
        (folder / "prompts.jsonl").write_bytes(lines(*prompts))
        options["prompts"] = folder / "prompts.jsonl"
    settings = {"values": "float32", "importer": "openai", "overwrite": True}
    done = convert([folder / "in.jsonl"], folder / "out", **settings | options)
    return logitstore.open(folder / "out"), " ".join(done.notes)


def refused(folder, match, *replies, error=SourceError, **options):
    with pytest.raises(error, match=match):
        read(folder, *replies, **options)


def rows(sequence):
    """Each position's candidates as a dict."""
    return [
        dict(zip(sequence.ids[a:b].tolist(), sequence.logprobs[a:b].tolist(), strict=True))
        for a, b in itertools.pairwise(sequence.offsets)
    ]


def test_replies_with_ids_need_no_tokenizer(tmp_path):
    dataset, notes = read(tmp_path, chat(*IDS))
    sequence = dataset[0]
    assert sequence.id == "chatcmpl-1"
    assert sequence.tokens.tolist() == [0, 102, 104]
    assert rows(sequence) == [{101: -0.5, 102: -1.5}, {103: -0.25}, {}]
    assert sequence.target_logprob[:2].tolist() == [-1.5, -3.0]
    assert sequence.target_rank.tolist() == [2, 0, 0]
    assert sequence.loss_mask.tolist() == [0, 0, 0]
    assert sequence.columns == {"prompt": None, "text": "bd"}
    assert dataset.tokenizer().pieces([101, 102, 103, 104]) == [b"a", b"b", b"c", b"d"]
    info = dataset.info
    assert (info.normalised, info.temperature, info.source.format) == ("vocabulary", 1, "openai")
    assert "In 1 of the replies a placeholder stands for the prompt" in notes
    assert "--prompts" in notes
    assert "temperature 1" in notes


def test_bytes_are_found_in_the_vocabulary_and_rows_stand_before_their_tokens(tmp_path, tokenizer):
    dataset, notes = read(tmp_path, GOOD, tokenizer=tokenizer(), prompts=[{"prompt": "xy"}])
    sequence = dataset[0]
    assert sequence.tokens.tolist() == [BOS, 24, 25, 2, 4]
    assert rows(sequence) == [{}, {}, {2: -0.5, 3: -1.5}, {5: -0.25, 6: -2.0}, {}]
    assert sequence.target_logprob[2:4].tolist() == [-0.5, -3.0]
    assert sequence.target_rank.tolist() == [0, 0, 1, 0, 0]
    assert sequence.loss_mask.tolist() == [0, 0, 1, 1, 0]
    assert sequence.columns == {"prompt": "xy", "text": "bd"}
    assert "placeholder" not in notes


def test_completions_are_four_lists(tmp_path, tokenizer):
    made = completion(["b", "d"], [-0.5, -3.0], [{"b": -0.5, "c": -1.5}, {"e": -0.25}])
    dataset, _ = read(tmp_path, made, tokenizer=tokenizer(), prompts=[{"prompt": "xy"}])
    sequence = dataset[0]
    assert sequence.tokens.tolist() == [BOS, 24, 25, 2, 4]
    assert rows(sequence) == [{}, {}, {2: -0.5, 3: -1.5}, {5: -0.25}, {}]
    assert sequence.target_logprob[2:4].tolist() == [-0.5, -3.0]
    assert sequence.columns["text"] == "bd"


def test_an_echo_holds_its_prompt(tmp_path, tokenizer):
    made = completion(["x", "y", "b"], [None, -0.125, -0.5], [None, {"y": -0.125, "z": -3.0}, {"b": -0.5}])
    for prompts in (None, [{"prompt": "xy"}]):
        dataset, notes = read(tmp_path, made, tokenizer=tokenizer(), prompts=prompts)
        sequence = dataset[0]
        assert sequence.tokens.tolist() == [24, 25, 2]
        assert rows(sequence) == [{25: -0.125, 26: -3.0}, {2: -0.5}, {}]
        assert sequence.target_logprob[:2].tolist() == [-0.125, -0.5]
        assert sequence.loss_mask.tolist() == [1, 1, 0]
        assert "placeholder" not in notes


def test_completions_of_llama_server_have_content(tmp_path):
    made = {
        "id": "x",
        "choices": [{"index": 0, "text": "bd", "logprobs": {"content": IDS}}],
        "object": "text_completion",
    }
    dataset, _ = read(tmp_path, made)
    assert dataset[0].tokens.tolist() == [0, 102, 104]
    assert dataset[0].columns["text"] == "bd"


def response(*before, **fields):
    part = {"type": "output_text", "text": "bd", "logprobs": [B, D], "annotations": []}
    message = {"type": "message", "id": "msg", "role": "assistant", "content": [part]}
    return {"id": "resp_1", "object": "response", "error": None, "output": [*before, message]} | fields


def test_responses(tmp_path, tokenizer):
    made = response(usage={"input_tokens": 3, "output_tokens": 2})
    request = {"input": "y", "instructions": "x"}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    dataset, _ = read(tmp_path, made, tokenizer=tokenizer(template), prompts=[request])
    assert dataset[0].tokens.tolist() == [BOS, 24, 25, 2, 4]  # the server counts three, so BOS is put before
    assert rows(dataset[0])[2:] == [{2: -0.5, 3: -1.5}, {5: -0.25, 6: -2.0}, {}]
    listed = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "xy"}]}]}
    dataset, _ = read(tmp_path, made, tokenizer=tokenizer(template), prompts=[listed])
    assert dataset[0].tokens.tolist() == [BOS, 24, 25, 2, 4]
    assert dataset[0].columns == {"prompt": "xy", "text": "bd"}


def test_what_stands_hidden_before_an_answer_leaves_no_context(tmp_path, tokenizer):
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "?"}]}
    spent = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 7}}
    for made in (response(thought), chat(B, D, usage=spent)):
        dataset, notes = read(tmp_path, made, tokenizer=tokenizer(), prompts=[{"prompt": "xy"}])
        assert dataset[0].tokens.tolist() == [BOS, 2, 4]
        assert not dataset[0].loss_mask.any()
        assert "thoughts or calls of tools" in notes
    all_there = {"completion_tokens": 2, "completion_tokens_details": {"reasoning_tokens": 1}}
    dataset, _ = read(tmp_path, chat(B, D, usage=all_there), tokenizer=tokenizer(), prompts=[{"prompt": "xy"}])
    assert dataset[0].loss_mask.tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("text", "generated", "known"),
    [
        ("bd", 2, True),
        ("bd", 3, True),
        ("b", 3, True),
        ("bxd", 3, False),
        (None, 3, False),
        ("", 3, False),
        ("bxd", 2, False),
        (None, 2, True),
        (" bd", 2, True),
        ("d", 2, True),
    ],
)
def test_missing_rows_are_found_by_the_text(tmp_path, tokenizer, text, generated, known):
    made = chat(B, D, text=text, usage={"completion_tokens": generated})
    dataset, notes = read(tmp_path, made, tokenizer=tokenizer(), prompts=[{"prompt": "xy"}])
    assert dataset[0].loss_mask.any() == known
    assert ("not certain which" in notes) == (not known and generated == 3)
    assert ("the tokens do not spell the text" in notes) == (text == "bxd")


def test_texts_are_compared_whatever_is_known(tmp_path, tokenizer):
    lossy = chat(B, D, text="b d")  # a decoder took the space
    dataset, notes = read(tmp_path, lossy, GOOD | {"id": "y"}, tokenizer=tokenizer())
    assert "In 1 of the choices loss_mask is 0, because the tokens do not spell the text" in notes
    made = completion(["x", "y", "b"], [None, -0.125, -0.5], [None, {"y": -0.125}, {"b": -0.5}])
    made["choices"][0]["text"] = "x yb"
    dataset, notes = read(tmp_path, made, tokenizer=tokenizer())
    assert not dataset[0].loss_mask.any()
    end = entry("<end>", -0.5, [("<end>", -0.5)])
    for text in ("bd", "b<end>d", "b<end>d<end>"):
        made = chat(B, end, D, end, text=text)
        dataset, notes = read(tmp_path, made, tokenizer=tokenizer(), prompts=[{"prompt": "x"}])
        assert dataset[0].loss_mask.any()
        assert "spell" not in notes


def test_replies_of_the_batch_api(tmp_path, tokenizer):
    def wrapped(name, reply):
        return {
            "id": f"batch_{name}",
            "custom_id": name,
            "response": {"status_code": 200, "body": reply},
            "error": None,
        }

    def asked(name, prompt):
        return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt}}

    dataset, _ = read(
        tmp_path, wrapped("two", GOOD), wrapped("one", chat(D, text="d")), tokenizer=tokenizer(),
        prompts=[asked("one", "x"), asked("unused", "z"), asked("two", "y")],
    )  # fmt: skip
    assert [s.id for s in dataset] == ["two", "one"]
    assert [s.tokens.tolist() for s in dataset] == [[BOS, 25, 2, 4], [BOS, 24, 4]]
    refused(
        tmp_path, r"line 2: no request in .*prompts.jsonl has the id", wrapped("two", GOOD), wrapped("one", GOOD),
        tokenizer=tokenizer(), prompts=[asked("two", "y")],
    )  # fmt: skip


def test_further_choices_are_further_sequences(tmp_path, tokenizer):
    made = chat(B)
    other = copy.deepcopy(made["choices"][0]) | {"index": 1}
    other["logprobs"]["content"] = [D]
    made["choices"].append(other)
    dataset, _ = read(tmp_path, made, GOOD | {"id": "x"}, tokenizer=tokenizer(), prompts=[{"prompt": "x"}] * 2)
    assert [s.id for s in dataset] == ["chatcmpl-1", "chatcmpl-1#1", "x"]
    assert [s.tokens.tolist() for s in dataset] == [[BOS, 24, 2], [BOS, 24, 4], [BOS, 24, 2, 4]]
    for name in ("chatcmpl-1", None, ""):
        dataset, _ = read(tmp_path, made | {"id": name}, GOOD, tokenizer=tokenizer())
        assert [s.id for s in dataset] == ["0", "0#1", "1"]


def test_a_reply_without_an_id_among_others_gets_its_number(tmp_path):
    many = [chat(*IDS * 800, id=f"x{at}") for at in range(8)]  # more than are looked at beforehand
    dataset, _ = read(tmp_path, *many, chat(*IDS, id=None))
    assert [s.id for s in dataset] == [*(f"x{at}" for at in range(8)), "8"]


def test_long_prompts_do_not_pile_up(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(lines(*(chat(*IDS, id=str(at)) for at in range(20))))
    (tmp_path / "prompts.jsonl").write_bytes(lines(*({"prompt": [7], "user": "x" * 2**19} for at in range(20))))
    opened = openai.IMPORTER.read([Input(tmp_path / "in.jsonl")], Options(prompts=tmp_path / "prompts.jsonl"))
    pieces = [list(piece.records()) for piece in opened.pieces]
    assert len(pieces) > 5
    assert [record.number for piece in pieces for record in piece] == list(range(20))


def test_what_cannot_be_found_is_left_to_the_tail_and_never_a_wrong_id(tmp_path, tokenizer):
    top = [
        token("b", math.log(0.25)),
        token("a", math.log(0.125)),  # two tokens have these bytes
        token("xyz", math.log(0.125)),  # none has
        token("c", math.log(0.0625)) | {"bytes": None},
        token("\ufffd", math.log(0.0625)),
        token("", math.log(0.0625)),
        token("e", math.log(0.03125)),  # twice: a decoder took the space of one
        token("e", math.log(0.015625)),
        token("?", math.log(0.0078125)) | {"bytes": [0xC3]},  # part of a character, with its byte
        token("<end>", math.log(0.00390625)) | {"bytes": None},  # special, by its name
    ]
    made = chat(entry("b", math.log(0.25), []) | {"top_logprobs": top}, text="b")
    dataset, notes = read(tmp_path, made, tokenizer=tokenizer(), prompts=[{"prompt": "x"}])
    found = rows(dataset[0])[1]
    assert list(found) == [2, BYTE_C3, END]
    assert list(found.values()) == pytest.approx(np.log([0.25, 0.0078125, 0.00390625]))
    assert math.exp(dataset[0].tail[1]) == pytest.approx(1 - 0.26171875, abs=0.02)
    assert "3 candidates are left to the tail, because the replies do not say" in notes
    assert "1 candidates are left to the tail, because the tokenizer has no" in notes
    assert "3 candidates are left to the tail, because more than one" in notes
    assert "end before" not in notes


def test_texts_of_completions_may_spell_bytes(tmp_path, tokenizer):
    top = {"bytes:\\xc3": -0.5, "bytes:\\xc3\\xa9": -1.5, "bytes:a\\xff": -2.5, "\ufffd": -3.5, "bytes:": -4.5}
    dataset, notes = read(tmp_path, completion(["bytes:\\xc3\\xa9"], [-1.5], [top]), tokenizer=tokenizer())
    assert dataset[0].tokens.tolist() == [BOS, E_ACUTE]
    assert rows(dataset[0])[0] == {BYTE_C3: -0.5, E_ACUTE: -1.5}
    assert "2 candidates are left to the tail, because the tokenizer has no" in notes
    assert "1 candidates are left to the tail, because the replies do not" in notes


@pytest.mark.parametrize(
    "unknown",
    [
        entry("\ufffd", -0.5, [("e", -0.25)]),
        entry("b", -0.5, [("e", -0.25)], bytes=None),
        entry("xyz", -0.5, [("e", -0.25)]),
        entry("f", -0.5, [("e", -0.25), ("f", -2.5), ("f", -2.5)]),
    ],
)
def test_a_sequence_ends_before_a_token_that_is_not_certain(tmp_path, tokenizer, unknown):
    dataset, notes = read(tmp_path, chat(B, unknown, D), tokenizer=tokenizer(), prompts=[{"prompt": "x"}])
    sequence = dataset[0]
    assert sequence.tokens.tolist() == [BOS, 24, 2]
    assert rows(sequence) == [{}, {2: -0.5, 3: -1.5}, {5: -0.25}]  # its own row is known still
    assert math.isnan(sequence.target_logprob[2])
    assert sequence.target_rank[2] == 0
    assert sequence.loss_mask.tolist() == [0, 1, 1]
    assert "1 sequences end before" in notes


def test_of_several_tokens_the_one_that_the_tokenizer_makes_of_the_text_is_the_target_only(tmp_path, tokenizer):
    a = entry("a", -0.5, [("a", -0.5), ("c", -1.5)])
    dataset, notes = read(tmp_path, chat(D, a, D, text="dad"), tokenizer=tokenizer(), prompts=[{"prompt": "x"}])
    sequence = dataset[0]
    assert sequence.tokens.tolist() == [BOS, 24, 4, 1, 4]
    assert rows(sequence)[2] == {3: -1.5}
    assert sequence.target_logprob[2] == -0.5
    assert sequence.target_rank[2] == 0
    assert "1 generated tokens have the bytes of several" in notes
    # The tokenizer would not make two tokens of `ab`: it is not certain which this one is.
    dataset, notes = read(tmp_path, chat(D, a, B, text="dab"), tokenizer=tokenizer(), prompts=[{"prompt": "x"}])
    assert dataset[0].tokens.tolist() == [BOS, 24, 4]
    assert "1 sequences end before" in notes


def test_another_tokenizer_is_refused(tmp_path, tokenizer):
    wrong = chat(*[entry("b", -0.5, [("b", -0.5), ("Q", -1.5)])] * 30)
    refused(tmp_path, "30 of the 60 candidates are no tokens of this tokenizer", wrong, tokenizer=tokenizer())
    right = chat(*[entry("b", -0.5, [("b", -0.5), ("c", -1.5)])] * 300)
    read(tmp_path, right, wrong | {"id": "x"}, tokenizer=tokenizer())


def test_probability_zero_is_left_out(tmp_path):
    top = [("a", -0.5, 101), ("b", -9999.0, 102), ("c", -1e300, 103), ("e", -9998.0, 105)]
    dataset, _ = read(tmp_path, chat(with_id("b", -9999.0, 102, top), with_id("f", -9999.0, 106, top)))
    assert rows(dataset[0])[0] == {101: -0.5, 105: -9998.0}
    assert np.isnan(dataset[0].target_logprob).all()
    assert dataset[0].target_rank.tolist() == [0, 0, 0]


def test_fewer_candidates_than_asked_for_and_the_own_token_among_them(tmp_path):
    made = chat(with_id("b", -0.25, 102, [("a", -2.0, 101)]), with_id("d", -3.0, 104, []))
    dataset, _ = read(tmp_path, made)
    assert rows(dataset[0]) == [{102: -0.25, 101: -2.0}, {}, {}]  # it is better than the one that is listed
    assert dataset[0].target_rank.tolist() == [1, 0, 0]
    assert dataset[0].target_logprob[1] == -3.0


def test_positions_without_candidates_beside_others_are_not_trained_on(tmp_path, tokenizer):
    made = chat(B, entry("d", -3.0, []), entry("e", 0.0, []), B, text="bdeb")
    dataset, notes = read(tmp_path, made, tokenizer=tokenizer(), prompts=[{"prompt": "x"}])
    assert dataset[0].count.tolist() == [0, 2, 0, 0, 2, 0]
    assert dataset[0].loss_mask.tolist() == [0, 1, 0, 0, 1, 0]
    assert dataset[0].target_logprob[2] == -3.0
    assert math.isnan(dataset[0].target_logprob[3])  # a drafted token is said to have probability 1
    assert "At 2 positions the reply has no candidates" in notes


def test_a_generated_token_in_front_of_better_ones_is_the_target_only(tmp_path, tokenizer):
    """vLLM's chat gives the first k of the generated token and the best ones behind it."""
    far = entry("b", -7.75, [("b", -7.75), ("c", -0.5), ("d", -1.5)])
    second = entry("b", -1.0, [("b", -1.0), ("c", -0.75), ("d", -3.0)])
    third = entry("b", math.log(0.25), [("b", math.log(0.25)), ("c", math.log(0.375)), ("d", math.log(0.3125))])
    dataset, notes = read(tmp_path, chat(far, second, third), tokenizer=tokenizer())
    assert [list(row) for row in rows(dataset[0])] == [[3, 4], [3, 2, 4], [3, 4, 2], []]
    assert dataset[0].target_logprob[0] == -7.75
    assert dataset[0].target_rank.tolist() == [0, 2, 3, 0]
    assert "At 1 positions the generated token stands in front of better" in notes
    alone = [entry("b", level, [("b", level)]) for level in (-0.5, -0.75)]
    dataset, notes = read(tmp_path, chat(*alone), tokenizer=tokenizer())
    assert [list(row) for row in rows(dataset[0])] == [[2], [], []]
    assert "At 1 positions" in notes
    other = entry("b", -0.75, [("c", -0.75)])  # with top_logprobs=1 elsewhere the best one is listed
    dataset, _ = read(tmp_path, chat(*alone, other), tokenizer=tokenizer())
    assert [list(row) for row in rows(dataset[0])][:2] == [[2], [2]]


def test_a_token_with_two_logprobs_is_counted_or_refused(tmp_path, tokenizer):
    wrong = entry("b", -4.5, [("b", -0.5), ("c", -1.5)])
    dataset, notes = read(tmp_path, chat(B, B, B, wrong, text="bbbb"), tokenizer=tokenizer())
    assert dataset[0].target_logprob[3] == -0.5
    assert "At 1 positions the actual token has another logprob" in notes
    refused(tmp_path, "row 2 gives the token 2 the logprob -4.5", chat(B, B, wrong, wrong), tokenizer=tokenizer())


def test_ids_of_the_reply_are_used(tmp_path, tokenizer):
    a = entry("a", -0.5, [("a", -0.5), ("c", -1.5)])  # two tokens have these bytes
    made = chat(a, D, text="ad", prompt_token_ids=[24, 25])
    made["choices"][0]["token_ids"] = [BYTE_A, 4]
    dataset, notes = read(tmp_path, made, tokenizer=tokenizer())
    assert dataset[0].tokens.tolist() == [24, 25, BYTE_A, 4]
    assert rows(dataset[0])[1] == {BYTE_A: -0.5, 3: -1.5}
    assert dataset[0].target_rank.tolist() == [0, 1, 0, 0]
    assert dataset[0].loss_mask.tolist() == [0, 1, 1, 0]
    assert "placeholder" not in notes
    made["choices"][0] |= {"token_ids": [BYTE_A, 5], "prompt_token_ids": [7]}  # its text is of another
    dataset, notes = read(tmp_path, made, tokenizer=tokenizer())
    assert dataset[0].tokens.tolist() == [7, BYTE_A, 5]
    assert rows(dataset[0])[1] == {}
    assert "At 1 positions the generated token's id and its text" in notes
    made["choices"][0]["token_ids"] = [4]
    refused(tmp_path, "1 token_ids and logprobs of 2 tokens", made, tokenizer=tokenizer())
    other = chat(D, D, D, D, text="dddd")
    other["choices"][0]["token_ids"] = [4, 4, 9, 9]
    refused(tmp_path, "token 2: its id in token_ids is 9, .*the token 4, .*2 of 4", other, tokenizer=tokenizer())
    echo = completion(["x", "b"], [None, -0.5], [None, {"b": -0.5}], prompt_token_ids=[24])
    echo["choices"][0]["token_ids"] = [2]
    assert read(tmp_path, echo, tokenizer=tokenizer())[0][0].tokens.tolist() == [24, 2]


def test_rows_of_a_prompt_are_not_dropped(tmp_path, tokenizer):
    """They may stand behind what recognition sees."""
    scored = {"prompt_logprobs": [None, {"2": {"logprob": -0.1, "rank": 1}}]}
    inside = copy.deepcopy(GOOD)
    inside["choices"][0] |= scored
    for made in (
        GOOD | scored,
        inside,
        listed(tokens=["token_id:1", "token_id:2"]),
        chat(entry("token_id:1", -0.5, [])),
    ):
        refused(tmp_path, "reply of vLLM; say --from vllm", made, tokenizer=tokenizer())
    read(tmp_path, GOOD | {"prompt_logprobs": None}, tokenizer=tokenizer())


@pytest.mark.parametrize("first", ["\ufffd", "xyz"])
def test_an_echo_whose_first_token_is_not_certain_is_refused(tmp_path, tokenizer, first):
    made = completion([first, "b"], [None, -0.5], [None, {"b": -0.5}])
    refused(tmp_path, "line 1: it is not certain which token the first one is", made, tokenizer=tokenizer())


def test_replies_without_an_answer_are_counted(tmp_path, tokenizer):
    refused_ = {"id": "z", "output": [{"type": "message", "content": [{"type": "refusal", "refusal": "no"}]}]}
    dataset, notes = read(tmp_path, GOOD, refused_, tokenizer=tokenizer())
    assert len(dataset) == 1
    assert "1 replies were left out, since they have no answer" in notes
    refused(tmp_path, "line 2: choices is empty", GOOD, {"id": "y", "choices": []}, tokenizer=tokenizer())


def test_choices_that_repeat_a_long_prompt_too_often_are_refused(tmp_path, monkeypatch):
    made = chat(*IDS)
    made["choices"] *= 30
    options = {"prompts": [{"prompt": list(range(100))}]}
    read(tmp_path, made, **options)
    monkeypatch.setattr("logitstore.convert.rows.SEQUENCE_CANDIDATES", 5000)
    refused(tmp_path, "line 1: choice 24: .*over the limit of 5000 together", made, **options)


def test_refusals_are_noted(tmp_path):
    made = chat(*IDS, text=None)
    made["choices"][0]["logprobs"] = {"content": None, "refusal": IDS[:1]}
    made["choices"][0]["message"]["refusal"] = "b"
    both = chat(*IDS) | {"id": "y"}
    both["choices"][0]["logprobs"]["refusal"] = IDS
    dataset, notes = read(tmp_path, made, both)
    assert [s.tokens.tolist() for s in dataset] == [[0, 102], [0, 102, 104]]
    assert dataset[0].columns["text"] == "b"
    assert "In 1 of the choices the model refused" in notes
    assert "were left out" in notes


@pytest.mark.parametrize(
    ("request_", "evaluated", "tokens"),
    [
        ({"prompt": "xy"}, None, [0, 24, 25]),
        ({"prompt": ["xy"]}, None, [0, 24, 25]),
        ({"prompt": "xy"}, 2, [24, 25]),
        ({"prompt": "<bos>xy"}, 3, [0, 24, 25]),
        ({"prompt": [7, 8, 9]}, None, [7, 8, 9]),
        ({"prompt": [7, 8, 9]}, 3, [7, 8, 9]),
        ({"prompt": [7, 8, 9]}, 5, None),
        ({"prompt_token_ids": [7, 8, 9]}, 2, None),
        ({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}, None, [0, 24]),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}], "continue_final_message": True}, None, [0, 24, 2]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, None, [0, 24, 26]),
        ({"prompt_token_ids": [7, 8]}, None, [7, 8]),
        ({"prompt": "q", "prompt_token_ids": [7, 8]}, None, [7, 8]),
        ({"messages": [{"role": "user", "content": "x"}]}, None, [0, 24, 26]),
        ({"messages": [{"role": "user", "content": "x"}]}, 3, [0, 24, 26]),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"add_generation_prompt": False}}, None, [0, 24]),
        ({"body": {"prompt": "xy"}}, None, [0, 24, 25]),
        ({"prompt": "xy"}, 7, None),
        ({"messages": [{"role": "user", "content": "x"}]}, 7, None),
    ],
)  # fmt: skip
def test_prompts_come_from_the_requests(tmp_path, tokenizer, request_, evaluated, tokens):
    made = chat(B, D, usage={"prompt_tokens": evaluated, "completion_tokens": 2})
    dataset, notes = read(tmp_path, made, tokenizer=tokenizer(), prompts=[request_])
    sequence = dataset[0]
    assert sequence.tokens.tolist() == [*(tokens or [BOS]), 2, 4]
    assert sequence.loss_mask.any() == (tokens is not None)
    assert ("as many tokens of the prompt as the engine evaluated" in notes) == (tokens is None)


def test_prompts_as_ids_need_no_tokenizer(tmp_path):
    dataset, notes = read(tmp_path, chat(*IDS), prompts=[{"prompt": [7, 8]}])
    assert dataset[0].tokens.tolist() == [7, 8, 102, 104]
    assert dataset[0].loss_mask.tolist() == [0, 1, 1, 0]
    dataset, notes = read(tmp_path, chat(*IDS), prompts=[{"prompt": "xy"}])
    assert dataset[0].tokens.tolist() == [0, 102, 104]
    assert dataset[0].columns["prompt"] == "xy"
    assert "encoding it needs the teacher's tokenizer" in notes


def test_requests_are_found_by_id_or_in_order(tmp_path, tokenizer):
    first, second = GOOD | {"id": "p"}, GOOD | {"id": "q"}
    options = {"tokenizer": tokenizer()}
    named = [{"id": "q", "prompt": "y"}, {"id": "p", "prompt": "x"}]
    dataset, _ = read(tmp_path, first, second, prompts=named, **options)
    assert [s.columns["prompt"] for s in dataset] == ["x", "y"]
    others = [{"id": 1, "prompt": "y"}, {"id": 2, "prompt": "x"}]
    dataset, _ = read(tmp_path, first, second, prompts=others, **options)
    assert [s.columns["prompt"] for s in dataset] == ["y", "x"]
    for prompts, match in [
        (named[:1], "no request in|fewer requests"),
        (others[:1], "fewer requests than replies: 1"),
        ([*others, {"id": 3, "prompt": "z"}], "more requests than the 2 replies"),
        ([*named, named[0]], "line 3: line 1 has the same id 'q'"),
        ([*named, {"prompt": "z"}], "line 3: this request has no id"),
        ([], "fewer requests"),
    ]:
        refused(tmp_path, match, first, second, prompts=prompts, **options)


def batch(name, reply):
    return {"custom_id": name, "response": {"body": reply}}


def test_damaged_replies_do_not_change_how_requests_are_found(tmp_path, tokenizer):
    words = {"q0": "x", "q1": "y", "q2": "z"}
    asked = [{"custom_id": name, "body": {"prompt": word}} for name, word in words.items()]
    broken = b'{"custom_id": "q2", dam'
    options = {"tokenizer": tokenizer(), "on_error": "skip"}
    for replies, prompts in [
        ([broken, batch("q0", GOOD), batch("q1", GOOD)], asked),
        ([batch("q1", GOOD), broken, batch("q0", GOOD)], asked),
        ([batch("q1", GOOD), batch("q0", GOOD)], [b'{"custom_id": "q2", dam', *asked[:2]]),
        ([broken, GOOD | {"id": "q1"}, GOOD | {"id": "q0"}], [{"id": k, "prompt": v} for k, v in words.items()]),
        (
            [GOOD | {"id": None}, GOOD | {"id": "q1"}, GOOD | {"id": "q0"}],
            [{"id": k, "prompt": v} for k, v in words.items()],
        ),
    ]:
        dataset, _ = read(tmp_path, *replies, prompts=prompts, **options)
        named = {s.columns["prompt"] for s in dataset}
        assert named == {"x", "y"}
        if replies[0] != GOOD | {"id": None}:
            assert {s.id: s.columns["prompt"] for s in dataset} == {"q0": "x", "q1": "y"}
    long = b'{"custom_id": "q2", ' + b" " * 2**20 + b"dam"  # all that the first piece has
    dataset, _ = read(tmp_path, long, batch("q1", GOOD), batch("q0", GOOD), prompts=asked, **options)
    assert [s.columns["prompt"] for s in dataset] == ["y", "x"]


def test_a_prompt_that_may_be_with_bos_or_without_is_counted(tmp_path, tokenizer):
    made = chat(B, D)
    _, notes = read(tmp_path, made, tokenizer=tokenizer(), prompts=[{"prompt": "x"}])
    assert "In 1 of the replies the engine does not say how many tokens" in notes
    made["usage"] = {"prompt_tokens": 2, "completion_tokens": 2}
    assert "does not say" not in read(tmp_path, made, tokenizer=tokenizer(), prompts=[{"prompt": "x"}])[1]


@pytest.mark.parametrize(("last", "text"), [("b", "xb"), ("b ", "xb "), (" b", "xyb"), ("b", "xbz")])
def test_an_answer_may_go_on_with_the_last_message(tmp_path, tokenizer, last, text):
    template = "{{ messages[0].content }}{% if text %}{{ text }}{% else %}{{ messages[1].content }}{% endif %}<end>"
    request = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": last}],
        "continue_final_message": True,
        "chat_template_kwargs": {"text": text[1:]},
    }
    dataset, _ = read(tmp_path, GOOD, tokenizer=tokenizer(template), prompts=[request])
    assert dataset[0].columns["prompt"] == text.removesuffix("z")
    both = request | {"add_generation_prompt": True}
    refused(tmp_path, "exclude each other", GOOD, tokenizer=tokenizer(template), prompts=[both])
    gone = request | {"chat_template_kwargs": {"text": "y"}}
    refused(tmp_path, "does not show the last message", GOOD, tokenizer=tokenizer(template), prompts=[gone])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of its input is no text"),
        ({"prompt": ["x", "y"]}, "its prompt is several texts"),
        ({"prompt": [[1], [2]]}, "no whole prompt"),
        ({"prompt": [-1]}, "no whole prompt"),
        ({"prompt": []}, "its prompt has no tokens"),
        ({"prompt": [2**31]}, "no whole prompt"),
        ({"prompt": [1.5]}, "no whole prompt"),
        ({"model": "x"}, "it has no prompt, messages, input"),
        ({"messages": "x"}, r"no whole request .*\$.messages"),
        ({"messages": [1]}, "no whole request"),
        ({"messages": [{"role": "user", "content": "stop"}]}, "does not take its messages .*not so"),
        ({"messages": [{"role": "user", "content": "climb"}]}, "does not take its messages"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "no text"),
        (b"[" * 100_000, "no whole request"),
        (b"\xff", "no whole request"),
    ],
)
def test_wrong_requests_are_refused(tmp_path, tokenizer, wrong, match):
    template = (
        "{% for m in messages %}{% if m.content == 'stop' %}{{ raise_exception('not so') }}{% endif %}"
        "{% if m.content == 'climb' %}{{ ''.__class__.__mro__ }}{{ m.__class__.__base__.__subclasses__() }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    match = rf"in.jsonl, line 2: its request \(.*prompts.jsonl, line 2\): .*{match}"
    refused(tmp_path, match, GOOD, GOOD | {"id": "x"}, tokenizer=tokenizer(template), prompts=[{"prompt": "x"}, wrong])


def test_templates_get_what_they_are_written_for(tmp_path, tokenizer):
    template = (
        "{{ bos_token }}{{ strftime_now('%Y') | replace('2023', 'y') }}{%- for m in messages -%}\n"
        "{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}{{ (tools | tojson) | length }}"
    )
    template = template.replace(
        "{{ (tools | tojson) | length }}", "{{ 'q' if (tools | tojson) == '[{\"é\": 1}]' else 'r' }}"
    )
    request = {"messages": [{"role": "user", "content": "x"}] * 2, "tools": [{"é": 1}]}
    made = chat(B, D, created=1700000000)
    dataset, notes = read(tmp_path, made, tokenizer=tokenizer(template), prompts=[request])
    assert dataset[0].columns["prompt"] == "<bos>yxq"
    assert dataset[0].tokens.tolist() == [0, 25, 24, 17, 2, 4]
    assert "In 1 of the prompts the chat template writes the date" in notes
    refused(
        tmp_path, "the time of the reply", chat(B, D, created=1e300), tokenizer=tokenizer(template), prompts=[request]
    )
    refused(tmp_path, "no chat template", made, tokenizer=tokenizer(None), prompts=[request])


def test_the_missing_package_is_named(tmp_path, tokenizer, monkeypatch):
    folder = tokenizer()
    request = {"messages": [{"role": "user", "content": "x"}]}
    monkeypatch.setitem(sys.modules, "jinja2", None)
    refused(tmp_path, "jinja2", GOOD, tokenizer=folder, prompts=[request], error=MissingDependencyError)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(tmp_path, "tokenizers", GOOD, tokenizer=folder, error=MissingDependencyError)


def changed(change):
    made = copy.deepcopy(GOOD)
    change(made["choices"][0]["logprobs"]["content"][1])
    return made


def listed(**fields):
    made = completion(["b", "d"], [-0.5, -3.0], [{"b": -0.5}, {"e": -0.25}])
    made["choices"][0]["logprobs"] |= fields
    return made


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (b'{"choices": [{"logprobs"', "no whole reply"),
        (b"[]", "no whole reply"),
        (b"\xff\xfe", "no whole reply"),
        (b"[" * 100_000, "no whole reply"),
        (b'{"choices": ' + b"[" * 100_000, "no whole reply"),
        (b'{"x": ' + b"[" * 100_000, "no whole reply"),
        (b'{"choices": [], "id": "\\ud800"}', "no whole reply"),
        ({"error": {"message": "quota"}}, "the request failed: .*quota"),
        ({"custom_id": "a", "response": None, "error": {"code": "expired"}}, "the request failed: .*expired"),
        ({"custom_id": "a", "response": {"body": {"error": {"code": "late"}}}}, "the request failed: .*late"),
        ({"custom_id": "a", "response": {"body": [1]}}, "reply in response.body"),
        ({"id": "x"}, "neither choices nor output"),
        (chat() | {"choices": [{"message": {"content": "x"}, "logprobs": None}]}, "choice 0 has no logprobs"),
        (chat() | {"choices": [{"delta": {"content": "x"}, "logprobs": {"content": []}}]}, "streamed"),
        (chat() | {"choices": [{"logprobs": {}}]}, "hold no content"),
        (chat() | {"choices": [{"logprobs": [1]}]}, r"Expected `object \| null`, got `array`"),
        (response() | {"output": [{"type": "message", "content": [{"type": "output_text", "text": "x"}]}]}, "output 0 has no logprobs"),
        (chat(entry("b", -0.5, [])), "no top_logprobs"),
        (changed(lambda e: e.update(logprob=None)), r"content\[1\]\.logprob"),
        (changed(lambda e: e.update(logprob=0.5)), "token 1: the logprob of 'd' is 0.5, which is above 0"),
        (changed(lambda e: e["top_logprobs"][1].update(logprob=0.9)), "token 1: the logprob of 'f' is 0.9"),
        (changed(lambda e: e["top_logprobs"][1].pop("logprob")), "token 1: the logprob of 'f' is missing"),
        (changed(lambda e: e["top_logprobs"][1].update(logprob="-1")), "Expected `float`"),
        (changed(lambda e: e["top_logprobs"][1].update(id=-4)), ">= 0"),
        (changed(lambda e: e["top_logprobs"][1].update(id=2**31)), "2147483647"),
        (changed(lambda e: e["top_logprobs"][1].update(bytes=[256])), "the bytes of the token 'f'"),
        (changed(lambda e: e["top_logprobs"][1].update(bytes="f")), "the bytes of the token 'f'"),
        (changed(lambda e: e.update(bytes={"a": 1})), "the bytes of the token 'd'"),
        (changed(lambda e: e.update(token=None)), r"content\[1\]\.token"),
        (changed(lambda e: e.update(top_logprobs=[token("e", -0.1), token("f", -0.1)])), "sum to 1.8"),
        (listed(token_logprobs=None), "no token_logprobs"),
        (listed(top_logprobs=None), "no top_logprobs"),
        (listed(top_logprobs=[{}, {}]), "top_logprobs are empty"),
        (listed(token_logprobs=[-0.5]), "2 tokens and 1 token_logprobs"),
        (listed(top_logprobs=[{"b": -0.5}]), "2 tokens and 1 top_logprobs"),
        (listed(token_logprobs=[-0.5, None]), r"token_logprobs\[1\] is null, so a row is missing"),
        (listed(token_logprobs=[None, None]), r"token_logprobs\[1\] is null, so a row is missing"),
        (listed(top_logprobs=[None, {"e": -1}]), r"top_logprobs\[0\] is null, so a row is missing"),
        (listed(top_logprobs=[{"b": None}, {}]), r"top_logprobs\[0\]"),
        (listed(top_logprobs=[{"b": 0.5}, {}]), "token 0: the logprob of 'b' is 0.5"),
    ],
)  # fmt: skip
def test_lines_that_are_no_replies_are_refused(tmp_path, tokenizer, wrong, match):
    refused(
        tmp_path, f"in.jsonl, line 2: .*{match}", GOOD, wrong, tokenizer=tokenizer(),
        error=(SourceError, InvalidInputError),
    )  # fmt: skip


def test_without_ids_the_tokenizer_is_asked_for(tmp_path):
    partial = logitstore.Tokenizer.from_pieces({2: b"b"})  # another token may have the same bytes
    for made in (GOOD, completion(["b"], [-0.5], [{"b": -0.5}])):
        for given in (None, partial):
            refused(tmp_path, "line 1: .*no ids; give the teacher's", made, tokenizer=given, error=InvalidInputError)


def test_a_record_that_cannot_be_read_may_be_skipped(tmp_path):
    replies = [chat(*IDS, id=str(at)) for at in range(3)]
    (tmp_path / "in.jsonl").write_bytes(lines(replies[0], {"error": "x"}, replies[1], replies[2]))
    (tmp_path / "prompts.jsonl").write_bytes(lines(*({"prompt": [at]} for at in range(4))))
    done = convert(
        [tmp_path / "in.jsonl"],
        tmp_path / "out",
        importer="openai",
        on_error="skip",
        prompts=tmp_path / "prompts.jsonl",
    )
    assert done.skipped == 1
    assert [s.tokens[0] for s in logitstore.open(tmp_path / "out")] == [0, 2, 3]


def mutated(value, rng):
    """A copy with some nodes replaced or left out."""
    if rng.random() < 0.06:
        junk = (None, "x", 1, -1, 0.5, 2**70, -1e308, True, [], {}, [[]], {"token": 1}, "\ufffd", [300], {"a": None})
        return rng.choice(junk)
    if isinstance(value, dict):
        return {key: mutated(each, rng) for key, each in value.items() if rng.random() > 0.03}
    if isinstance(value, list):
        return [mutated(each, rng) for each in value if rng.random() > 0.03]
    return value


def test_whatever_a_line_holds_the_outcome_is_items_or_a_clear_error(tmp_path, tokenizer):
    rng = random.Random(3)
    wrapped = {"custom_id": "a", "response": {"body": GOOD}, "error": None}
    legacy = completion(["x", "y", "b"], [None, -0.125, -0.5], [None, {"y": -0.125, "z": -3.0}, {"b": -0.5}])
    sources = [GOOD, chat(*IDS), wrapped, legacy, response(), listed()]
    requests = [{"prompt": "xy"}, {"messages": [{"role": "user", "content": "x"}], "tools": []}, {"input": "x"}]
    made, asked = [], []
    for _ in range(1500):
        text = json.dumps(mutated(rng.choice(sources), rng)).encode()
        made.append(text if rng.random() > 0.1 else text[: rng.randrange(len(text))] + b" x")
        text = json.dumps(mutated(rng.choice(requests), rng)).encode()
        asked.append(text if rng.random() > 0.1 else text[: rng.randrange(len(text))] + b" x")
    (tmp_path / "in.jsonl").write_bytes(lines(*made))
    (tmp_path / "prompts.jsonl").write_bytes(lines(*asked))
    full = logitstore.Tokenizer.from_path(tokenizer())
    for options in (Options(), Options(tokenizer=full), Options(tokenizer=full, prompts=tmp_path / "prompts.jsonl")):
        outcomes = list(parsed(openai.IMPORTER.read([Input(tmp_path / "in.jsonl")], options), 0))
        assert len(outcomes) == len(made)
        assert any(each.error for each in outcomes)
        assert any(each.items for each in outcomes)
        for each in outcomes:
            for item in each.items:
                assert len(item.arguments["count"]) == len(item.arguments["tokens"])
                assert (item.arguments["tokens"] >= 0).all()


def test_replies_are_recognised(tmp_path):
    chunk = chat(*IDS)
    for name, data, is_one in [
        ("chat", lines(GOOD), True),
        ("completions", lines(listed()), True),
        ("response", lines(response()), True),
        ("batch", lines({"custom_id": "a", "response": {"body": GOOD}}), True),
        ("llama-server's", lines(chunk), True),
        ("long", lines(chat(*IDS * 1000)), True),
        ("compressed", zstandard.ZstdCompressor().compress(lines(GOOD)), True),
        ("without logprobs", lines({"choices": [{"text": "x", "logprobs": None}]}), False),
        ("vllm's usual chat", lines(GOOD | {"prompt_logprobs": None, "prompt_token_ids": None, "kv_transfer_params": None}), True),
        ("vllm's chat with ids", lines(GOOD | {"prompt_logprobs": None, "prompt_token_ids": [1, 2]}), True),
        ("vllm", lines(GOOD | {"prompt_logprobs": [None, {"2": {"logprob": -0.1}}]}), False),
        ("vllm's ids", lines(listed(tokens=["token_id:1", "token_id:2"])), False),
        ("vllm's prompt", lines({"choices": [{"index": 0, "text": " x", "prompt_logprobs": [None], "token_ids": [865], "logprobs": {"tokens": [" x"]}}]}), False),
        ("sglang", lines({"text": "x", "meta_info": {"output_token_logprobs": [[-0.1, 865, None]]}}), False),
        ("llama-server", lines({"content": "x", "completion_probabilities": [{"id": 1, "top_logprobs": []}]}), False),
        ("tgi", lines({"generated_text": "x", "details": {"tokens": [], "top_tokens": []}}), False),
        ("trl", lines({"logprobs": [[-0.1]], "logprob_token_ids": [[1]]}), False),
        ("in a text", lines({"text": '"choices": "logprobs": {'}), False),
        ("empty", b"", False),
        ("binary", bytes(range(256)), False),
        ("damaged", b"\x28\xb5\x2f\xfd" + bytes(50), False),
    ]:  # fmt: skip
        (tmp_path / "in").write_bytes(data)
        assert openai.IMPORTER.recognises(Input(tmp_path / "in")) is is_one, name


def test_several_files_and_workers_give_the_same(tmp_path, tokenizer):
    options = {
        "importer": "openai",
        "values": "float32",
        "tokenizer": tokenizer(),
        "prompts": tmp_path / "prompts.jsonl",
    }
    replies = [GOOD | {"id": str(at)} for at in range(40)]
    (tmp_path / "a.jsonl").write_bytes(lines(*replies[:25]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines(*replies[25:])))
    (tmp_path / "prompts.jsonl").write_bytes(lines(*({"prompt": "xyab"[: 1 + at % 4]} for at in range(40))))
    seen = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        done = convert([tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"], out, workers=workers, **options)
        seen.append((done.notes, next(out.glob("data/*/*.arrow")).read_bytes()))
    assert seen[0] == seen[1]
    assert [s.tokens.tolist()[:-2] for s in logitstore.open(out)] == [
        [0, *{"x": [24], "xy": [24, 25], "xya": [24, 25, 1], "xyab": [24, 25, 31]}["xyab"[: 1 + at % 4]]]
        for at in range(40)
    ]


def choice_of(reply):
    choice = reply["choices"][0]
    return choice["logprobs"]["content"], choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("name", ["openai-chat.jsonl", "openai-completions.jsonl"])
@pytest.mark.parametrize("full", [False, True])
def test_the_real_captures(tmp_path, shared, name, full):
    path = shared(name)
    options = {"tokenizer": shared("tokenizers/gemma3")} if full else {}
    convert([path], tmp_path / "out", values="float32", **{"importer": "openai"} | options)
    dataset = logitstore.open(tmp_path / "out")
    made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert openai.IMPORTER.recognises(Input(path))
    assert [s.id for s in dataset] == [reply["id"] for reply in made]
    known = dataset.tokenizer()
    for sequence, reply in zip(dataset, made, strict=True):
        said, text = choice_of(reply)
        assert sequence.tokens.tolist() == [2 if full else 0, *(e["id"] for e in said)]
        assert sequence.count.tolist() == [20] * len(said) + [0]
        for found, e in zip(rows(sequence)[:-1], said, strict=True):
            assert found == pytest.approx({c["id"]: c["logprob"] for c in e["top_logprobs"]}, abs=1e-5)
        assert sequence.target_logprob[:-1] == pytest.approx([e["logprob"] for e in said], abs=1e-5)
        listed_at = [[c["id"] for c in e["top_logprobs"]] for e in said]
        assert sequence.target_rank.tolist() == [
            1 + ids.index(e["id"]) if e["id"] in ids else 0 for ids, e in zip(listed_at, said, strict=True)
        ] + [0]
        assert known.text(sequence.tokens[1:]).removesuffix("<eos>") == sequence.columns["text"] == text


def test_the_real_completions_with_their_prompts_and_without_ids(tmp_path, shared):
    path, others = shared("openai-completions.jsonl"), shared("llama-server-completion.jsonl")
    made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [json.loads(line)["prompt"].removeprefix("<bos>") for line in others.read_text("utf-8").splitlines()]
    bare = copy.deepcopy(made)
    for reply in bare:
        for each in choice_of(reply)[0]:
            del each["id"]
            for candidate in each["top_logprobs"]:
                del candidate["id"]
    options = {"tokenizer": shared("tokenizers/gemma3"), "prompts": [{"prompt": prompt} for prompt in prompts]}
    known = logitstore.Tokenizer.from_path(options["tokenizer"])
    for replies in (made, bare):
        dataset, notes = read(tmp_path, *replies, **options)
        assert "placeholder" not in notes
        for sequence, reply, prompt in zip(dataset, made, prompts, strict=True):
            said, _ = choice_of(reply)
            before = reply["usage"]["prompt_tokens"]
            assert known.text(sequence.tokens[:before]) == "<bos>" + prompt
            tokens = sequence.tokens[before:].tolist()
            assert tokens == [e["id"] for e in said][: len(tokens)]
            assert len(tokens) >= len(said) - (replies is bare)  # the end has no bytes
            assert sequence.loss_mask.tolist()[before - 1 :][: len(said)] == [1] * len(said)
            for found, e in zip(rows(sequence)[before - 1 :], said, strict=False):
                said_of = {c["id"]: np.float32(c["logprob"]) for c in e["top_logprobs"]}
                unsure = {
                    c["id"]
                    for c in e["top_logprobs"]
                    if len(known.id_of(bytes(c["bytes"]))) != 1 or bytes(c["bytes"]) == "\ufffd".encode()
                }
                kept = said_of.keys() - (unsure if replies is bare else set())
                assert found == {each: said_of[each] for each in kept}
            assert sequence.target_logprob[before - 1 :][: len(tokens)] == pytest.approx(
                [e["logprob"] for e in said][: len(tokens)], abs=1e-5
            )


def test_the_real_chats_with_their_messages(tmp_path, shared):
    path, others = shared("openai-chat.jsonl"), shared("llama-server-completion.jsonl")
    prompts = [json.loads(line)["prompt"].removeprefix("<bos>") for line in others.read_text("utf-8").splitlines()]
    template = (  # the one that the server falls back to
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    gemma = replace(logitstore.Tokenizer.from_path(shared("tokenizers/gemma3")), chat_template=template)
    requests = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    dataset, notes = read(tmp_path, *path.read_bytes().splitlines(), tokenizer=gemma, prompts=requests)
    assert "placeholder" not in notes
    made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for sequence, reply, prompt in zip(dataset, made, prompts, strict=True):
        before = reply["usage"]["prompt_tokens"]  # as the server counted them
        text = f"<bos><|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        assert gemma.text(sequence.tokens[:before]) == text
        assert sequence.tokens[before:].tolist() == [e["id"] for e in choice_of(reply)[0]]
        assert sequence.loss_mask.sum() == len(sequence) - before
