"""`logitstore.convert`: replies of Text Generation Inference."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import zstandard

import logitstore
from logitstore.convert import convert, tgi
from logitstore.convert.base import Input, Options
from logitstore.convert.pool import parsed
from logitstore.errors import SourceError

pytestmark = pytest.mark.usefixtures("quiet")


def token(number, logprob, text=None, **more):
    return {"id": number, "text": chr(97 + number % 26) if text is None else text, "logprob": logprob} | more


def top(*pairs):
    return [token(number, logprob, special=False) for number, logprob in pairs]


TOKENS = [token(5, -0.5, special=False), token(9, -4.0, special=False)]
TOP = [top((5, -0.5), (6, -1.5)), top((7, -0.25), (8, -2.0))]
PREFILL = [token(1, None, "<s>"), token(3, -8.25), token(4, -0.125)]


def details(**fields):
    made = {"finish_reason": "length", "generated_tokens": 2, "seed": None, "prefill": PREFILL, "tokens": TOKENS}
    return made | {"top_tokens": TOP, "best_of_sequences": None} | fields


def reply(**fields):
    return {"generated_text": " hi", "details": details(**fields)}


def lines(*records):
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)


def read(folder, *replies, **options):
    """(dataset, notes) of these replies."""
    (folder / "in.jsonl").write_bytes(lines(*replies))
    settings = {"values": "float32", "importer": "tgi", "overwrite": True}
    done = convert([folder / "in.jsonl"], folder / "out", **settings | options)
    return logitstore.open(folder / "out"), " ".join(done.notes)


def test_a_row_stands_before_the_token_that_it_is_about(tmp_path):
    dataset, notes = read(tmp_path, reply())
    sequence = dataset[0]
    assert sequence.id == "0"
    assert sequence.tokens.tolist() == [1, 3, 4, 5, 9]
    assert sequence.count.tolist() == [0, 0, 2, 2, 0]
    assert sequence.ids.tolist() == [5, 6, 7, 8]
    assert sequence.logprobs.tolist() == [-0.5, -1.5, -0.25, -2.0]
    assert sequence.target_logprob[:4].tolist() == [-8.25, -0.125, -0.5, -4.0]
    assert np.isnan(sequence.target_logprob[4])
    assert sequence.target_rank.tolist() == [0, 0, 1, 0, 0]
    assert sequence.loss_mask.tolist() == [0, 0, 1, 1, 0]
    assert sequence.columns == {"text": " hi"}
    assert dataset.info.normalised == "vocabulary"
    assert dataset.info.source.format == "tgi"
    assert dataset.tokenizer().pieces([1, 5]) == [b"<s>", b"f"]
    assert "behind the sampler's settings" in notes
    assert "placeholder" not in notes


def test_without_prefill_a_placeholder_stands_for_the_prompt(tmp_path):
    dataset, notes = read(tmp_path, reply(prefill=[]), reply())
    sequence = dataset[0]
    assert sequence.tokens.tolist() == [0, 5, 9]
    assert sequence.count.tolist() == [2, 2, 0]
    assert sequence.target_logprob[:2].tolist() == [-0.5, -4.0]
    assert sequence.loss_mask.tolist() == [0, 0, 0]
    assert "In 1 of the replies a placeholder" in notes
    assert "decoder_input_details" in notes


def test_other_sequences_and_lists_of_replies(tmp_path):
    other = details(tokens=TOKENS[1:], top_tokens=TOP[1:], generated_text="other")
    del other["best_of_sequences"]
    first = reply(best_of_sequences=[other])
    dataset, _ = read(tmp_path, [first, reply()], reply())
    assert [s.id for s in dataset] == ["0", "0#1", "0#2", "1"]
    assert [s.tokens.tolist() for s in dataset] == [[1, 3, 4, 5, 9], [1, 3, 4, 9], [1, 3, 4, 5, 9], [1, 3, 4, 5, 9]]
    assert [s.columns["text"] for s in dataset] == [" hi", "other", " hi", " hi"]
    assert dataset[1].ids.tolist() == [7, 8]


def test_rows_that_are_missing_beside_others_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"line 1: top_tokens, row 1 is empty and others are not.*missing"):
        read(tmp_path, reply(top_tokens=[TOP[0], []]))


def test_a_token_with_two_logprobs_is_counted_or_refused(tmp_path):
    tokens = [TOKENS[0]] * 4 + [token(5, -4.5)]
    dataset, notes = read(tmp_path, reply(tokens=tokens, top_tokens=[TOP[0]] * 5))
    assert dataset[0].target_logprob[6] == -0.5
    assert "At 1 positions the actual token has another logprob" in notes
    with pytest.raises(SourceError, match=r"tokens: row 2 gives the token 5 the logprob -4\.5.* 4 of 4 rows"):
        read(tmp_path, reply(tokens=tokens[4:] * 4, top_tokens=[TOP[0]] * 4))


def test_null_is_what_the_sampler_excluded(tmp_path):
    listed = [[*TOP[0], token(20, None)], [*TOP[1], token(21, -1e300), token(22, -9999.0)]]
    tokens = [TOKENS[0] | {"logprob": None}, TOKENS[1] | {"logprob": -1e300}]
    dataset, _ = read(tmp_path, reply(top_tokens=listed, tokens=tokens))
    assert dataset[0].ids.tolist() == [5, 6, 7, 8]
    assert np.isnan(dataset[0].target_logprob[2:]).all()
    assert dataset[0].target_rank.tolist() == [0, 0, 1, 0, 0]


def test_equal_ones_make_a_row_longer(tmp_path):
    dataset, _ = read(tmp_path, reply(top_tokens=[TOP[0], top((7, -1.5), (4, -1.5), (8, -1.5))]))
    assert dataset[0].count.tolist() == [0, 0, 2, 3, 0]
    assert dataset[0].ids.tolist() == [5, 6, 4, 7, 8]


def test_texts_that_are_no_bytes_are_not_kept(tmp_path):
    dataset, _ = read(tmp_path, reply(tokens=[TOKENS[0], token(9, -4.0, "\ufffd")]))
    assert dataset.tokenizer().token_bytes(9) is None


def changed(change):
    made = copy.deepcopy(reply())
    change(made["details"])
    return made


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (b'{"details": {', "no whole reply"),
        (b"[" * 100_000, "no whole list of replies"),
        (b"\xff", "no whole reply"),
        (b"3", "no whole reply"),
        ([1], "no whole list of replies"),
        ({"generated_text": "x"}, "no details; capture again"),
        ({"generated_text": "x", "details": None}, "no details; capture again"),
        ({"token": token(1, -0.5), "details": {"finish_reason": "length"}}, "missing required field `tokens`"),
        (reply(top_tokens=None), "2 tokens and 0 top_tokens"),
        (reply(top_tokens=TOP[:1]), "2 tokens and 1 top_tokens"),
        (reply(best_of_sequences=[details(top_tokens=[])]), "2 tokens and 0 top_tokens"),
        (changed(lambda d: d["tokens"][1].update(logprob=0.5)), r"the token 9 \('j'\) is 0.5, which is above 0"),
        (changed(lambda d: d["prefill"][1].update(logprob=0.5)), "the token 3 .* is 0.5, which is above 0"),
        (changed(lambda d: d["top_tokens"][1][0].update(logprob=0.9)), "the token 7 .* is 0.9, which is above 0"),
        (changed(lambda d: d["top_tokens"][1][0].update(logprob=-0.01)), "sum to 1.1"),
        (changed(lambda d: d["top_tokens"][1][0].update(id=8)), "the id 8 stands there twice"),
        (changed(lambda d: d["top_tokens"][1][0].pop("id")), r"missing required field `id` .*top_tokens\[1\]\[0\]"),
        (changed(lambda d: d["tokens"][1].update(id=-1)), ">= 0"),
        (changed(lambda d: d["tokens"][1].update(id=2**31)), "2147483647"),
        (changed(lambda d: d["tokens"][1].update(logprob="x")), r"\$.details.tokens\[1\].logprob"),
    ],
)
def test_lines_that_are_no_replies_are_refused(tmp_path, wrong, match):
    with pytest.raises((SourceError, logitstore.errors.InvalidInputError), match=f"in.jsonl, line 2: .*{match}"):
        read(tmp_path, reply(), wrong)


def mutated(value, rng):
    """A copy with some nodes replaced or left out."""
    if rng.random() < 0.04:
        return rng.choice((None, "x", 1, -1, 0.5, 2**70, -1e308, True, [], {}, [[]], {"id": 1}))
    if isinstance(value, dict):
        return {key: mutated(each, rng) for key, each in value.items() if rng.random() > 0.02}
    if isinstance(value, list):
        return [mutated(each, rng) for each in value if rng.random() > 0.02]
    return value


def test_whatever_a_line_holds_the_outcome_is_items_or_a_clear_error(tmp_path):
    rng = random.Random(5)
    sources = [reply(), reply(best_of_sequences=[details()]), [reply(), reply(prefill=[])]]
    made = []
    for _ in range(1500):
        text = json.dumps(mutated(rng.choice(sources), rng)).encode()
        made.append(text if rng.random() > 0.1 else text[: rng.randrange(len(text))] + b" x")
    (tmp_path / "in.jsonl").write_bytes(lines(*made))
    outcomes = list(parsed(tgi.IMPORTER.read([Input(tmp_path / "in.jsonl")], Options()), 0))
    assert len(outcomes) == len(made)
    assert 100 < sum(each.error is None for each in outcomes) < 1400
    for each in outcomes:
        for item in each.items:
            assert len(item.arguments["count"]) == len(item.arguments["tokens"])


def test_replies_are_recognised(tmp_path):
    for name, data, is_one in [
        ("reply", lines(reply()), True),
        ("list", lines([reply()]), True),
        ("compressed", zstandard.ZstdCompressor().compress(lines(reply())), True),
        ("without details", lines({"generated_text": "x", "details": None}), False),
        ("openai", lines({"choices": [{"logprobs": {"content": []}}], "usage": {"completion_tokens_details": {}}}), False),
        ("llama-server", lines({"content": "x", "completion_probabilities": []}), False),
        ("sglang", lines({"text": "x", "meta_info": {"output_top_logprobs": []}}), False),
        ("in a text", lines({"text": '"generated_text": "x", "details": {'}), False),
        ("empty", b"", False),
        ("binary", bytes(range(256)), False),
        ("damaged", b"\x28\xb5\x2f\xfd" + bytes(50), False),
    ]:  # fmt: skip
        (tmp_path / "in").write_bytes(data)
        assert tgi.IMPORTER.recognises(Input(tmp_path / "in")) is is_one, name


def test_several_files_and_workers_give_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*[reply()] * 5))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines(*[reply(prefill=[])] * 3)))
    seen = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        done = convert([tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"], out, importer="tgi", workers=workers)
        seen.append((done.notes, next(out.glob("data/*/*.arrow")).read_bytes()))
    assert seen[0] == seen[1]
    assert [len(s) for s in logitstore.open(out)] == [5] * 5 + [3] * 3
