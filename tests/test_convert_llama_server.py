"""`logitstore.convert`: replies of llama-server's /completion."""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.convert import convert, importers, llama_server
from logitstore.convert.base import Input, Options
from logitstore.convert.pool import parsed
from logitstore.errors import (
    IncompleteDatasetError,
    InvalidInputError,
    LogitStoreWarning,
    MissingDependencyError,
    SourceError,
)

DATA = Path(__file__).parents[1] / "../shared/data"
REAL = DATA / "llama-server-completion.jsonl"
GEMMA = DATA / "tokenizers/gemma3"
real = pytest.mark.skipif(not REAL.exists(), reason="the real capture is not here")
BOS = 0


def candidate(token, value, key="logprob", **more):
    return {"id": token, "token": "?", "bytes": [97 + token % 26], key: value} | more


def entry(token, value, top, key="logprob", **more):
    """What a reply says of a generated token; `top` are pairs of id and value."""
    listed = [candidate(other, level, key) for other, level in top]
    return candidate(token, value, key) | {"top_logprobs" if key == "logprob" else "top_probs": listed} | more


def reply(*entries, **fields):
    return {"content": "text", "prompt": "ab", "completion_probabilities": list(entries)} | fields


TOP = [(1, -0.5), (2, -1.5), (3, -2.5)]
PROBS = [(1, 0.5), (2, 0.25), (3, 0.25)]


def lines(*replies):
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in replies)


def convert_quietly(paths, out, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LogitStoreWarning)
        return convert(paths, out, **{"values": "float32", "importer": "llama-server"} | options)


def read(folder, *replies, name="in.jsonl", **options):
    """(dataset, notes) of these replies."""
    path = Path(folder) / name
    path.write_bytes(replies[0] if name.endswith(".zst") else lines(*replies))
    done = convert_quietly([path], Path(folder) / "out", **options)
    return logitstore.open(Path(folder) / "out"), done.notes


def one(folder, *entries, notes=(), options=None, **fields):
    """The sequence of one reply; `notes` are words that its notes have."""
    dataset, said = read(folder, reply(*entries, **fields), **(options or {}))
    text = " ".join(said)
    assert all(note in text for note in notes)
    return dataset[0]


def refused(folder, match, *replies, name="in.jsonl", **options):
    with pytest.raises(SourceError, match=match) as caught:
        read(folder, *replies, name=name, **options)
    assert name in str(caught.value)
    with pytest.raises((logitstore.DatasetNotFoundError, IncompleteDatasetError)):
        logitstore.open(Path(folder) / "out")


@pytest.fixture
def tokenizer(tmp_path):
    """A function that writes a tokenizer of single characters, BOS 0, a 1, b 2, ..., and returns its directory."""

    def make(*, adds_bos=True, spaced=False, merges=True):
        model = {"type": "BPE", "vocab": {"<bos>": 0} | {chr(96 + i): i for i in range(1, 27)}}
        model["vocab"] |= {"▁": 27, "é": 28}
        added = {"id": 0, "content": "<bos>", "special": True, "single_word": False}
        bos = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}] if adds_bos else []
        text = {"Sequence": {"id": "A", "type_id": 0}}
        processor = {
            "type": "TemplateProcessing",
            "single": [*bos, text],
            "pair": [*bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}} if adds_bos else {},
        }
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        before = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
        file = {
            "version": "1.0",
            "model": model | ({"merges": []} if merges else {}),
            "added_tokens": [added | {"lstrip": False, "rstrip": False, "normalized": False}],
            "normalizer": before if spaced else replace,
            "decoder": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            "post_processor": processor,
            "padding": {
                "strategy": {"Fixed": 32},
                "direction": "Right",
                "pad_id": 5,
                "pad_type_id": 0,
                "pad_token": "e",
            }
            | {"pad_to_multiple_of": None},
            "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        }
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"}), encoding="utf-8")
        return folder

    return make


def test_without_a_tokenizer_a_placeholder_stands_for_the_prompt(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(lines(reply(entry(2, -1.5, TOP), entry(9, -7.0, TOP[:2]), content="bj")))
    with pytest.warns(LogitStoreWarning, match="teacher, logit width, tokenizer's identity"):
        done = convert([tmp_path / "in.jsonl"], tmp_path / "out", values="float32")
    dataset = logitstore.open(tmp_path / "out")
    sequence = dataset[0]
    assert sequence.id == "0"
    assert sequence.tokens.tolist() == [0, 2, 9]
    assert sequence.count.tolist() == [3, 2, 0]
    assert sequence.ids.tolist() == [1, 2, 3, 1, 2]
    assert sequence.logprobs.tolist() == [-0.5, -1.5, -2.5, -0.5, -1.5]
    assert sequence.target_logprob[:2].tolist() == [-1.5, -7.0]
    assert math.isnan(sequence.target_logprob[2])
    assert sequence.target_rank.tolist() == [2, 0, 0]  # 9 is not among the candidates
    assert sequence.loss_mask.tolist() == [0, 0, 0]
    assert sequence.columns == {"prompt": "ab", "text": "bj"}
    assert dataset.tokenizer().pieces([1, 2, 3, 9]) == [b"b", b"c", b"d", b"j"]
    info = dataset.info
    assert (info.teacher, info.logit_width, info.normalised, info.temperature) == (None, None, "vocabulary", 1)
    assert info.source.format == done.importer == "llama-server"
    assert any("not to train on" in note for note in done.notes)
    assert any("temperature 1" in note for note in done.notes)
    assert all(note.endswith(".") for note in done.notes)


def test_with_the_tokenizer_the_prompt_is_there(tmp_path, tokenizer):
    path = tokenizer()
    sequence = one(
        tmp_path, entry(2, -1.5, TOP), entry(9, -7.0, TOP[:2]), prompt="<bos>abc", tokens_evaluated=4, tokens=[2, 9],
        options={"tokenizer": path},
    )  # fmt: skip
    assert sequence.tokens.tolist() == [BOS, 1, 2, 3, 2, 9]
    assert sequence.count.tolist() == [0, 0, 0, 3, 2, 0]
    assert sequence.loss_mask.tolist() == [0, 0, 0, 1, 1, 0]
    assert sequence.target_rank.tolist() == [0, 0, 0, 2, 0, 0]
    assert sequence.target_logprob[3:5].tolist() == [-1.5, -7.0]
    dataset = logitstore.open(tmp_path / "out")
    assert dataset.info.tokenizer.digest == logitstore.Tokenizer.from_path(path).digest
    assert dataset.info.logit_width is None


@pytest.mark.parametrize(
    ("adds_bos", "prompt", "evaluated", "tokens"),
    [
        (True, "<bos>ab", 3, [0, 1, 2]),
        (True, "<bos>ab", None, [0, 1, 2]),
        (True, "ab", 3, [0, 1, 2]),
        (True, "ab", None, [0, 1, 2]),
        (True, "ab", 2, [1, 2]),
        (False, "ab", 2, [1, 2]),
        (False, "ab", None, [1, 2]),
        (False, "ab", 3, [0, 1, 2]),
        (True, "", None, [0]),
        (True, "<bos><bos>a", 3, [0, 0, 1]),
        (True, "a<bos>", None, [0, 1, 0]),
        (True, "<bos> a", 3, [0, 27, 1]),
    ],
)
def test_prompts_are_encoded_as_the_engine_does(tmp_path, tokenizer, adds_bos, prompt, evaluated, tokens):
    options = {"tokenizer": tokenizer(adds_bos=adds_bos)}
    sequence = one(tmp_path, entry(2, -1.5, TOP), prompt=prompt, tokens_evaluated=evaluated, options=options)
    assert sequence.tokens.tolist() == [*tokens, 2]
    assert sequence.loss_mask.tolist() == [0] * (len(tokens) - 1) + [1, 0]


@pytest.mark.parametrize(
    ("prompt", "evaluated", "tokens"),
    [("<bos> ab", 4, [0, 27, 1, 2]), ("ab", 4, [0, 27, 1, 2]), ("<bos> a b", 5, [0, 27, 1, 27, 2])],
)
def test_a_space_that_the_tokenizer_puts_before_texts_is_not_put_there_twice(
    tmp_path, tokenizer, prompt, evaluated, tokens
):
    options = {"tokenizer": tokenizer(spaced=True)}
    sequence = one(tmp_path, entry(2, -1.5, TOP), prompt=prompt, tokens_evaluated=evaluated, options=options)
    assert sequence.tokens.tolist() == [*tokens, 2]


def test_a_prompt_of_another_length_gets_a_placeholder_and_is_counted(tmp_path, tokenizer):
    good = reply(entry(2, -1.5, TOP), prompt="ab", tokens_evaluated=3)
    wrong = reply(entry(2, -1.5, TOP), prompt="ab", tokens_evaluated=7)
    without = reply(entry(2, -1.5, TOP), prompt=None)
    empty = reply(entry(2, -1.5, TOP), prompt="", tokens_evaluated=0)
    dataset, notes = read(tmp_path, good, wrong, without, empty, tokenizer=tokenizer())
    assert [sequence.tokens.tolist() for sequence in dataset] == [[0, 1, 2, 2], [0, 2], [0, 2], [0, 2]]
    assert [sequence.loss_mask.tolist() for sequence in dataset] == [[0, 0, 1, 0], [0, 0], [0, 0], [0, 0]]
    assert all(sequence.count.sum() == 3 for sequence in dataset)
    assert dataset[2].columns["prompt"] is None
    assert sum("In 3 of the replies a placeholder" in note for note in notes) == 1


def test_a_partial_tokenizer_is_as_none(tmp_path):
    partial = logitstore.Tokenizer.from_pieces({0: b"<s>"})
    sequence = one(tmp_path, entry(2, -1.5, TOP), notes=["not to train on"], options={"tokenizer": partial})
    assert sequence.tokens.tolist() == [0, 2]
    assert sequence.loss_mask.tolist() == [0, 0]


def test_the_missing_package_is_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'logitstore\[tokenizers\]'"):
        read(tmp_path, reply(entry(2, -1.5, TOP)), tokenizer=tokenizer())
    assert not (tmp_path / "out").exists()
    read(tmp_path, reply(entry(2, -1.5, TOP)))


def test_a_tokenizer_that_the_package_cannot_read_is_named(tmp_path, tokenizer):
    with pytest.raises(InvalidInputError, match=r"tokenizer\.json: the package tokenizers cannot read it"):
        read(tmp_path, reply(entry(2, -1.5, TOP)), tokenizer=tokenizer(merges=False))


def entries_of(*ids):
    return [entry(token, -1.5, TOP) for token in ids]


@pytest.mark.parametrize(
    ("ids", "tokens", "rows"),
    [
        ([1, 2], [1, 2], [0, 1]),
        ([1, 2], [], [0, 1]),
        ([1, 2], None, [0, 1]),
        ([1, 2], [1, 2, 3], [0, 1]),  # a stop word's tokens have no entries
        ([1, 2], [1, 2, 2], [0, 1]),
        ([1, 2], [1, 3, 4, 2], [0, 3]),  # nor have those that end inside a character
        ([1, 2], [3, 1, 2], [1, 2]),
    ],
)
def test_tokens_without_an_entry_have_no_distribution(tmp_path, tokenizer, ids, tokens, rows):
    fields = {"prompt": "ab", "tokens_evaluated": 3, "options": {"tokenizer": tokenizer()}}
    sequence = one(tmp_path, *entries_of(*ids), tokens=tokens, **fields)
    generated = tokens or ids
    at = [2 + row for row in rows]
    assert sequence.tokens.tolist() == [0, 1, 2, *generated]
    assert np.flatnonzero(sequence.count).tolist() == at
    assert np.flatnonzero(sequence.loss_mask).tolist() == at
    assert np.flatnonzero(sequence.target_rank).tolist() == [2 + row for row in rows if generated[row] in (1, 2, 3)]
    assert sequence.tokens[1:][at].tolist() == ids


def test_entries_whose_place_is_not_certain_are_kept_without_context(tmp_path, tokenizer):
    options = {"tokenizer": tokenizer()}
    sequence = one(tmp_path, *entries_of(1, 2), tokens=[1, 3, 2, 2], notes=["In 1 of the replies"], options=options)
    assert sequence.tokens.tolist() == [0, 1, 2]
    assert sequence.count.tolist() == [3, 3, 0]
    assert sequence.loss_mask.tolist() == [0, 0, 0]


@pytest.mark.parametrize("tokens", [[1], [2, 1], [1, 3], [3, 4]])
def test_entries_that_are_not_the_generated_tokens_are_refused(tmp_path, tokens):
    refused(
        tmp_path, r"line 2: the token \d of entry \d", reply(*entries_of(1)), reply(*entries_of(1, 2), tokens=tokens)
    )


@pytest.mark.parametrize(
    ("content", "predicted", "known"),
    [
        ("ab", 2, True),
        ("ab", 3, True),  # a stop word followed
        ("a", 3, True),  # one that is a part of a token
        ("abé", 4, True),  # its end is missing only
        ("aéb", 3, False),
        (None, 3, False),
        (None, 2, True),
    ],
)
def test_missing_entries_are_found_by_the_text_where_tokens_are_not_given(
    tmp_path, tokenizer, content, predicted, known
):
    fields = {"content": content, "tokens_predicted": predicted, "options": {"tokenizer": tokenizer()}}
    sequence = one(tmp_path, *entries_of(1, 2), notes=[] if known else ["return_tokens"], **fields)
    assert sequence.loss_mask.tolist() == ([0, 0, 1, 1, 0] if known else [0, 0, 0])
    assert sequence.columns["text"] == content


def test_a_truncated_reply_is_noted(tmp_path, tokenizer):
    options = {"tokenizer": tokenizer()}
    one(tmp_path, entry(2, -1.5, TOP), truncated=True, notes=["In 1 of the replies the engine"], options=options)


def test_a_reply_without_tokens_is_a_sequence(tmp_path):
    dataset, _ = read(tmp_path, reply(), reply(entry(2, -1.5, TOP)))
    assert [sequence.tokens.tolist() for sequence in dataset] == [[0], [0, 2]]


def test_probabilities_after_the_samplers(tmp_path, tokenizer):
    top = [*PROBS, (7, 0.0)]
    dataset, notes = read(
        tmp_path, reply(entry(3, 0.25, top, "prob"), entry(8, 0.0, [(1, 1.0)], "prob")), tokenizer=tokenizer()
    )
    sequence = dataset[0]
    assert dataset.info.normalised == "candidates"
    assert sequence.count.tolist() == [0, 0, 3, 1, 0]
    assert sequence.ids.tolist() == [1, 2, 3, 1]
    assert sequence.logprobs == pytest.approx(np.log([0.5, 0.25, 0.25, 1]))
    assert np.isnan(sequence.tail).all()
    assert sequence.target_rank.tolist() == [0, 0, 3, 0, 0]  # equal ones by id
    assert sequence.target_logprob[2] == pytest.approx(math.log(0.25))
    assert np.isnan(sequence.target_logprob[[0, 1, 3, 4]]).all()
    assert any("after the samplers" in note for note in notes)
    assert not any("temperature 1" in note for note in notes)


def old(text, *top):
    """What a server before 2025 says of a generated token; `top` are pairs of text and probability."""
    return {"content": text, "probs": [{"tok_str": each, "prob": prob} for each, prob in top]}


def test_tokens_of_old_servers_are_found_by_their_texts(tmp_path, tokenizer):
    entries = [old("b", ("a", 0.5), ("b", 0.25), ("c", 0.25)), old("z", ("d", 0.75), ("Q", 0.125), ("\ufffd", 0.125))]
    sequence = one(
        tmp_path, *entries, prompt="ab", tokens_evaluated=3, options={"tokenizer": tokenizer()}, content="bz",
        notes=["after the samplers", "1 candidates are left to the tail, because the tokenizer has no",
               "1 candidates are left to the tail, because the replies do not"],
    )  # fmt: skip
    assert logitstore.open(tmp_path / "out").info.normalised == "candidates"
    assert sequence.tokens.tolist() == [BOS, 1, 2, 2, 26]
    assert sequence.count.tolist() == [0, 0, 3, 1, 0]
    assert sequence.ids.tolist() == [1, 2, 3, 4]
    assert sequence.logprobs == pytest.approx(np.log([0.5, 0.25, 0.25, 0.75]))
    assert sequence.target_rank.tolist() == [0, 0, 2, 0, 0]
    assert sequence.target_logprob[2] == pytest.approx(math.log(0.25))
    assert np.isnan(sequence.target_logprob[[0, 1, 3, 4]]).all()
    assert sequence.loss_mask.tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("unknown", ["byte: \\xe2", "\ufffd", "", "Q"])
def test_a_reply_of_an_old_server_ends_before_a_token_that_is_not_certain(tmp_path, tokenizer, unknown):
    entries = [old("b", ("b", 1.0)), old(unknown, (unknown, 0.5), ("c", 0.5)), old("d", ("d", 1.0))]
    options = {"tokenizer": tokenizer()}
    sequence = one(tmp_path, *entries, content="bxd", tokens_predicted=3, options=options, notes=["1 sequences end"])
    assert sequence.tokens.tolist()[-1:] == [2]
    assert sequence.ids.tolist() == [2]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (reply({"content": "b", "probs": [{"tok_str": "b", "prob": None}]}), r"\[0\]\.probs\[0\]\.prob"),
        (reply({"content": None, "probs": [{"tok_str": "b", "prob": 0.5}]}), r"\[0\]\.content"),
        (reply({"content": "b", "probs": [{"tok_str": 1, "prob": 0.5}]}), "tok_str"),
        (reply(old("b", ("b", 1.5))), "entry 0: the prob of the token 2"),
        (reply(old("b", ("b", -0.5))), "entry 0: the prob of the token 2"),
        (reply(entry(1, 0.5, PROBS), old("b", ("b", 1.0))), "no whole reply"),
        (b'{"completion_probabilities": [{"content": "b", "probs": [{"tok_str": "b"', "no whole reply"),
    ],
)
def test_wrong_replies_of_old_servers_are_refused(tmp_path, tokenizer, wrong, match):
    refused(tmp_path, f"line 2: .*{match}", reply(old("b", ("b", 1.0))), wrong, tokenizer=tokenizer())


def mutated(value, rng):
    """A copy with some nodes replaced or left out."""
    if rng.random() < 0.05:
        return rng.choice((None, "x", 1, -1, 0.5, 2**70, -1e308, True, [], {}, [[]], {"id": 1}, "\ufffd"))
    if isinstance(value, dict):
        return {key: mutated(each, rng) for key, each in value.items() if rng.random() > 0.03}
    if isinstance(value, list):
        return [mutated(each, rng) for each in value if rng.random() > 0.03]
    return value


def test_whatever_a_line_holds_the_outcome_is_items_or_a_clear_error(tmp_path, tokenizer):
    rng = random.Random(7)
    new = reply(*entries_of(1, 2), tokens=[1, 2], tokens_evaluated=3, tokens_predicted=2, truncated=False)
    before = reply(old("b", ("b", 0.5), ("c", 0.5)), old("d", ("e", 0.5)), tokens_evaluated=3)
    full = logitstore.Tokenizer.from_path(tokenizer())
    for source, options in ((new, Options()), (new, Options(tokenizer=full)), (before, Options(tokenizer=full))):
        made = [source, *(mutated(source, rng) for _ in range(500))]
        (tmp_path / "in.jsonl").write_bytes(lines(*made))
        outcomes = list(parsed(llama_server.IMPORTER.read([Input(tmp_path / "in.jsonl")], options), 0))
        assert len(outcomes) == len(made)
        assert 20 < sum(each.error is None for each in outcomes) < 480
        assert all(len(i.arguments["count"]) == len(i.arguments["tokens"]) for each in outcomes for i in each.items)


def test_probability_zero_is_left_out(tmp_path):
    top = [(1, -0.5), (2, -9999.0), (3, -3.4e38), (4, -1e4), (5, -9998)]
    sequence = one(tmp_path, entry(2, -9999.0, top), entry(5, -9998, top))
    assert sequence.ids.tolist() == [1, 5, 1, 5]
    assert sequence.target_rank.tolist() == [0, 2, 0]
    assert math.isnan(sequence.target_logprob[0])
    assert sequence.target_logprob[1] == -9998


def test_an_entry_may_have_no_number_of_its_own(tmp_path):
    bare = entry(2, -1.5, TOP)
    del bare["logprob"]
    sequence = one(tmp_path, bare, {"id": 4, "logprob": -3.0})
    assert sequence.count.tolist() == [3, 0, 0]
    assert sequence.target_rank.tolist() == [2, 0, 0]
    assert math.isnan(sequence.target_logprob[0])
    assert sequence.target_logprob[1] == -3.0


def test_drafted_tokens_have_no_distribution(tmp_path, tokenizer):
    """With a draft model the server does not look up those that it accepts: it says probability 1 and no candidates."""
    entries = [entry(2, -1.5, TOP), entry(3, 0.0, []), entry(4, -2.5, [])]
    options = {"tokenizer": tokenizer()}
    sequence = one(
        tmp_path, *entries, prompt="a", tokens_evaluated=2, content="bcd",
        notes=["At 2 positions the reply has no candidates"], options=options,
    )  # fmt: skip
    assert sequence.count.tolist()[1:] == [3, 0, 0, 0]
    assert sequence.loss_mask.tolist() == [0, 1, 0, 0, 0]
    assert math.isnan(sequence.target_logprob[2])
    assert sequence.target_logprob[3] == -2.5


def test_a_token_with_two_logprobs_is_counted_or_refused(tmp_path):
    twice = [entry(2, -1.5, TOP)] * 4 + [entry(2, -4.5, TOP)]
    sequence = one(tmp_path, *twice, notes=["At 1 positions the actual token has another logprob"])
    assert sequence.target_logprob[4] == -1.5
    (tmp_path / "b").mkdir()
    refused(tmp_path / "b", "row 0 gives the token 2 the logprob -4.5", reply(*[twice[4]] * 4))


def test_a_prompt_that_may_be_with_bos_or_without_is_counted(tmp_path, tokenizer):
    options = {"tokenizer": tokenizer()}
    dataset, notes = read(tmp_path, reply(*entries_of(2), prompt="a", tokens_evaluated=None), **options)
    assert dataset[0].tokens.tolist() == [0, 1, 2]
    assert any("In 1 of the replies the engine does not say how many tokens" in note for note in notes)


def broken(change):
    """A good reply whose second entry, or its second candidate, `change` changes."""
    made = reply(*entries_of(1, 2))
    change(made["completion_probabilities"][1])
    return made


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (b'{"completion_probabilities": [{"id": 1, "logprob"', "no whole reply"),
        (b"not json", "no whole reply"),
        (b"[]", "no whole reply"),
        (b"\xff\xfe", "no whole reply"),
        (b"[" * 100_000, "no whole reply"),
        (b'{"prompt": "\xff", "completion_probabilities": []}', "no whole reply"),
        (b'{"prompt": "\\ud800", "completion_probabilities": []}', "no whole reply"),
        ({"content": "x"}, "n_probs"),
        (reply(completion_probabilities=None), "n_probs"),
        (reply({"content": " I", "probs": [{"tok_str": " I", "prob": 0.5}]}), "ids are missing"),
        (reply(prompt=[1, 2]), r"Expected `str \| null`, got `array`"),
        (reply(tokens=[1.5]), "Expected `int`"),
        (reply(tokens=[-1]), ">= 0"),
        (broken(lambda e: e.pop("id")), r"missing required field `id` - at `\$.completion_probabilities\[1\]`"),
        (broken(lambda e: e.update(id=2**31)), "2147483647"),
        (broken(lambda e: e.update(id="2")), "Expected `int`"),
        (broken(lambda e: e.update(logprob=None)), r"null.*completion_probabilities\[1\]\.logprob"),
        (broken(lambda e: e.update(logprob=0.5)), "entry 1: the logprob of the token 2 is missing or cannot be: 0.5"),
        (broken(lambda e: e["top_logprobs"][1].update(logprob=None)), r"\[1\]\.top_logprobs\[1\]\.logprob"),
        (broken(lambda e: e["top_logprobs"][1].update(logprob="-1")), "Expected `float`"),
        (broken(lambda e: e["top_logprobs"][2].pop("logprob")), "entry 1: the logprob of the token 3 is missing"),
        (broken(lambda e: e["top_logprobs"][2].update(logprob=1.0)), "entry 1: the logprob of the token 3"),
        (broken(lambda e: e["top_logprobs"][2].update(id=9, bytes=[256])), "the bytes of the token 9"),
        (broken(lambda e: e["top_logprobs"][2].update(id=9, bytes="x")), "the bytes of the token 9"),
        (reply(entry(1, 0.5, PROBS, "prob")), "beside logprobs"),
        (broken(lambda e: e.update(prob=0.5)), "beside logprobs"),
    ],
)
def test_lines_that_are_no_replies_are_refused(tmp_path, wrong, match):
    refused(tmp_path, f"line 2: .*{match}", reply(*entries_of(1)), wrong)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (reply(entry(1, 0.5, [(1, 1.5)], "prob")), "entry 0: the prob of the token 1"),
        (reply(entry(1, 0.5, [(1, -0.5)], "prob")), "entry 0: the prob of the token 1"),
        (reply(entry(1, 7.0, PROBS, "prob")), "entry 0: the prob of the token 1"),
        (reply(entry(1, -0.5, TOP)), "beside logprobs"),
    ],
)
def test_probabilities_that_cannot_be_are_refused(tmp_path, wrong, match):
    refused(tmp_path, f"line 2: .*{match}", reply(entry(1, 0.5, PROBS, "prob")), wrong)


def test_an_old_first_line_is_refused_before_anything_is_written(tmp_path):
    refused(tmp_path, "line 1: the token ids are missing", reply({"probs": [{"tok_str": "a", "prob": 1}]}))
    assert not (tmp_path / "out").exists()


def test_every_cut_of_the_last_line_is_found(tmp_path):
    data = lines(reply(*entries_of(1)))
    path = tmp_path / "in.jsonl"
    for length in range(1, len(data) - 1):
        path.write_bytes(data + data[:length])
        opened = importers()["llama-server"].read([Input(path)], Options())
        first, second = parsed(opened, 0)
        assert first.error is None
        assert second.place == f"{path}, line 2"
        assert isinstance(second.error, SourceError)


def test_compressed_replies_cut_off_between_two_lines_are_refused(tmp_path):
    packer = zstandard.ZstdCompressor().compressobj()
    data = packer.compress(lines(reply(*entries_of(1)))) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    refused(tmp_path, "cut off", data, name="in.jsonl.zst")


def test_an_empty_input_has_nothing_to_convert(tmp_path):
    refused(tmp_path, "no sequences", b"", b"  ")


def test_bytes_of_tokens_are_kept_once_and_candidates_know_them_best(tmp_path):
    def with_bytes(made, piece):
        return made | {"bytes": piece}

    unsure = with_bytes(entry(9, -3.0, TOP), [9, 9])  # an entry's own bytes may be those of several tokens
    sure = entry(1, -0.5, [(9, -1.0), (1, -0.5)])
    sure["top_logprobs"][0]["bytes"] = [7]
    later = with_bytes(entry(9, -3.0, TOP), [8])
    silent = entry(11, -0.5, [(12, -1.0)], bytes=None)
    del silent["top_logprobs"][0]["bytes"]
    dataset, _ = read(tmp_path, reply(unsure, sure, later, silent, with_bytes(entry(10, -3.0, TOP), [5, 6])))
    known = dataset.tokenizer()
    assert known.pieces([9, 10, 1]) == [b"\x07", b"\x05\x06", b"b"]
    assert known.token_bytes(11) is None
    assert known.token_bytes(12) is None


def test_several_files_blank_lines_and_compression(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"
    first.write_bytes(b"\n" + lines(reply(*entries_of(1)), b"", reply(*entries_of(2)))[:-1])
    second.write_bytes(zstandard.ZstdCompressor().compress(lines(reply(*entries_of(3)))))
    seen = []
    convert_quietly([first, second], tmp_path / "out", importer=None, progress=lambda opened, _: seen.append(opened))
    dataset = logitstore.open(tmp_path / "out")
    assert [sequence.tokens.tolist() for sequence in dataset] == [[0, 1], [0, 2], [0, 3]]
    assert seen[-1].done() == seen[-1].total == first.stat().st_size + second.stat().st_size
    assert seen[-1].sequences is None
    second.write_bytes(lines(b"x"))
    with pytest.raises(SourceError, match=r"b\.jsonl\.zst, line 1"):
        convert_quietly([first, second], tmp_path / "other")
    assert convert_quietly([first, second], tmp_path / "limited", limit=2).summary.sequences == 2


def test_columns_may_be_empty_at_first(tmp_path):
    dataset, _ = read(tmp_path, reply(prompt=None, content=None), reply(content="x"), chunk_candidates=1)
    assert [sequence.columns["text"] for sequence in dataset] == [None, "x"]


def test_replies_are_recognised(tmp_path):
    long = reply(entry(1, -0.5, TOP), prompt="x" * 100_000)
    for name, data, is_one in [
        ("reply", lines(reply()), True),
        ("blank", b"\n \n" + lines(reply()), True),
        ("compact", b'{"completion_probabilities":[]}', True),
        ("cut by the head", lines({"tokens_predicted": 1} | long), True),
        ("token", lines(reply(entry(1, -0.5, TOP) | {"token": "choices"}, content="choices")), True),
        ("compressed", zstandard.ZstdCompressor().compress(lines(reply())), True),
        ("choices", lines({"choices": [], "completion_probabilities": []}), False),
        ("in a text", lines({"text": '"completion_probabilities": "choices":'}), False),
        ("second line", lines({}, reply()), False),
        ("array", lines([reply()]), False),
        ("empty", b"", False),
        ("binary", bytes(range(256)), False),
        ("damaged", b"\x28\xb5\x2f\xfd" + bytes(50), False),
    ]:
        (tmp_path / "in").write_bytes(data)
        assert llama_server.IMPORTER.recognises(Input(tmp_path / "in")) is is_one, name


@st.composite
def replies(draw):
    ids = st.integers(0, 30)
    value = st.one_of(st.sampled_from([-9999.0, -1.0, -2.0, 0.0]), st.floats(-30, 0, width=32))
    made = []
    for _ in range(draw(st.integers(0, 5))):
        top = draw(st.dictionaries(ids, value, max_size=6))
        shift = math.log(max(1.0, sum(map(math.exp, top.values())))) + 1e-3
        listed = [(token, float(np.float32(level - shift))) for token, level in top.items()]
        token = draw(ids)
        made.append(entry(token, dict(listed).get(token, draw(value)), listed))
    return made


@settings(max_examples=50, deadline=None)
@given(st.lists(replies(), min_size=1, max_size=3))
def test_every_reply_is_as_a_slow_reading_has_it(made):
    with tempfile.TemporaryDirectory() as folder:
        dataset, _ = read(folder, *(reply(*entries) for entries in made))
        assert len(dataset) == len(made)
        for sequence, entries in zip(dataset, made, strict=True):
            assert sequence.tokens.tolist() == [0, *(e["id"] for e in entries)]
            assert sequence.count[-1] == 0
            for t, said in enumerate(entries):
                levels = {c["id"]: c["logprob"] for c in said["top_logprobs"] if c["logprob"] > -9999}
                order = sorted(levels, key=lambda token: (-levels[token], token))
                part = slice(sequence.offsets[t], sequence.offsets[t + 1])
                assert sequence.ids[part].tolist() == order
                assert sequence.logprobs[part].tolist() == [levels[token] for token in order]
                assert sequence.target_rank[t] == (1 + order.index(said["id"]) if said["id"] in levels else 0)
                drafted = said["logprob"] == 0 and not said["top_logprobs"] and any(e["top_logprobs"] for e in entries)
                own = math.nan if drafted or said["logprob"] <= -9999 else said["logprob"]
                assert sequence.target_logprob[t] == own or math.isnan(own)


@real
def test_the_real_capture_without_its_tokenizer(tmp_path):
    convert_quietly([REAL], tmp_path / "out", importer=None)
    dataset = logitstore.open(tmp_path / "out")
    made = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    assert len(dataset) == len(made) == 12
    known = dataset.tokenizer()
    for sequence, said in zip(dataset, made, strict=True):
        entries = said["completion_probabilities"]
        assert sequence.tokens.tolist() == [0, *said["tokens"]]
        assert sequence.count.tolist() == [64] * len(entries) + [0]
        assert not sequence.loss_mask.any()
        ids, logprobs = sequence.dense(64)
        for t, e in enumerate(entries):
            assert sorted(ids[t].tolist()) == sorted(c["id"] for c in e["top_logprobs"])
            assert logprobs[t].tolist() == [np.float32(c["logprob"]) for c in e["top_logprobs"]]
            assert sequence.target_logprob[t] == np.float32(e["logprob"])
            assert ids[t][sequence.target_rank[t] - 1] == e["id"]
        assert sequence.columns == {"prompt": said["prompt"], "text": said["content"]}
        assert known.text(sequence.tokens[1:]).removesuffix("<eos>") == said["content"]


@real
@pytest.mark.skipif(not GEMMA.exists(), reason="the teacher's tokenizer is not here")
def test_the_real_capture_with_its_tokenizer(tmp_path):
    done = convert_quietly([REAL], tmp_path / "out", tokenizer=GEMMA)
    dataset = logitstore.open(tmp_path / "out")
    known = dataset.tokenizer()
    assert not any("placeholder" in note for note in done.notes)
    made = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    for sequence, said in zip(dataset, made, strict=True):
        prompt, generated = said["tokens_evaluated"], len(said["tokens"])
        assert len(sequence) == prompt + generated
        assert sequence.tokens[prompt:].tolist() == said["tokens"]
        assert known.text(sequence.tokens[:prompt]) == said["prompt"]
        rows = [0] * (prompt - 1) + [1] * generated + [0]
        assert sequence.loss_mask.tolist() == rows
        assert sequence.count.tolist() == [64 * row for row in rows]
    ends = dataset[9]
    assert (ends.tokens[-1], ends.target_rank[-2] > 0) == (1, True)  # the token that ended it has its row


@pytest.mark.parametrize("name", ["openai-chat.jsonl", "openai-completions.jsonl"])
@real
def test_openai_replies_are_not_recognised(name):
    assert not llama_server.IMPORTER.recognises(Input(DATA / name))
    assert llama_server.IMPORTER.recognises(Input(REAL))
