"""`logitstore.convert.sglang`: replies of /generate."""

from __future__ import annotations

import base64
import json
import math
import random

import numpy as np
import pytest

import logitstore
from logitstore.convert import convert, sglang
from logitstore.convert.base import Input, Options, Record, Tally
from logitstore.convert.pool import parsed
from logitstore.errors import InvalidInputError, SourceError

pytestmark = pytest.mark.usefixtures("quiet")


def triples(*pairs):
    return [[logprob, token, None] for logprob, token in pairs]


# The input is 10 11 12, and 13 14 are generated. The best two of each place; actual tokens beside them.
INPUT = [(None, 10), (-0.5, 11), (-7.0, 12)]
OUTPUT = [(-2.0, 13), (-0.25, 14)]
INPUT_TOP = [None, [(-0.5, 11), (-1.5, 50)], [(-1.0, 51), (-2.0, 52)]]
OUTPUT_TOP = [[(-0.75, 53), (-2.0, 13)], [(-0.25, 14), (-2.5, 55)]]
TOKENS = [10, 11, 12, 13, 14]
IDS = [[11, 50], [51, 52], [53, 13], [14, 55], []]
LOGPROBS = [[-0.5, -1.5], [-1.0, -2.0], [-0.75, -2.0], [-0.25, -2.5], []]
TARGETS, RANKS = [-0.5, -7.0, -2.0, -0.25], [1, 0, 2, 1, 0]


def nested(rows):
    return [None if row is None else triples(*row) for row in rows]


def own():
    return {
        "id": "r",
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "input_token_logprobs": triples(*INPUT),
        "output_token_logprobs": triples(*OUTPUT),
    }


def flat(side, rows, *, counts_all=False, packed=False, dtypes=("float32", "int32")):
    """The flat form of a side; `counts_all` counts the rows in front in the shape too."""
    prefix = sum(row is None for row in rows)
    covered = [row for row in rows if row is not None]
    values = [logprob for row in covered for logprob, _ in row]
    ids = [token for row in covered for _, token in row]
    name = f"{side}_top_logprobs"
    found = {f"{name}_shape": [len(rows) if counts_all else len(covered), 2], f"{name}_null_prefix": prefix}
    if not packed:
        return found | {f"{name}_val_flat": values, f"{name}_idx_flat": ids}
    for field, column, dtype in (("val", values, dtypes[0]), ("idx", ids, dtypes[1])):
        data = np.array(column, np.dtype(dtype).newbyteorder("<")).tobytes()
        found[f"{name}_{field}_flat_b64"] = base64.b64encode(data).decode()
        found[f"{name}_{field}_flat_b64_dtype"] = dtype
    return found


def reply(**meta):
    made = own() | {"input_top_logprobs": nested(INPUT_TOP), "output_top_logprobs": nested(OUTPUT_TOP)}
    return {"text": " x", "output_ids": [13, 14], "meta_info": made | meta}


def flat_reply(**form):
    made = own() | flat("input", INPUT_TOP, **form) | flat("output", OUTPUT_TOP, **form)
    return {"text": " x", "output_ids": [13, 14], "meta_info": made}


def converted(tmp_path, *records, **options):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
    done = convert([path], tmp_path / "out", **({"importer": "sglang", "values": "float32"} | options))
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


FORMS = {
    "nested": reply(),
    "flat": flat_reply(),
    "flat, all rows counted": flat_reply(counts_all=True),
    "base64": flat_reply(packed=True),
    "base64, all rows counted": flat_reply(packed=True, counts_all=True),
    "base64, wide": flat_reply(packed=True, dtypes=("float64", "int64")),
    "base64, narrow": flat_reply(packed=True, dtypes=("float16", "uint32")),
    "flat input alone": {
        "meta_info": own() | flat("input", INPUT_TOP) | {"output_top_logprobs": nested(OUTPUT_TOP)},
        "text": " x",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_each_row_predicts_the_token_that_follows(tmp_path, form):
    dataset, notes = converted(tmp_path, FORMS[form], importer=None)
    check(dataset[0])
    assert dataset[0].id == "r"
    assert dataset[0].columns == {"text": " x"}
    assert dataset[0].loss_mask is None
    assert dataset.info.source.format == "sglang"
    assert "about the token of its own place" in notes
    assert "SGLANG_RETURN_ORIGINAL_LOGPROB" in notes
    assert "In 1" not in notes


def test_the_dtypes_are_float32_and_int32_unless_said(tmp_path):
    made = flat_reply(packed=True)
    for side in ("input", "output"):
        for field in ("val", "idx"):
            del made["meta_info"][f"{side}_top_logprobs_{field}_flat_b64_dtype"]
    check(converted(tmp_path, made)[0][0])


def test_a_list_of_replies_is_a_line(tmp_path):
    other = reply(id="s")
    dataset, _ = converted(tmp_path, [reply(), other, reply()], reply(id=None), [reply(id=None)] * 2, importer=None)
    assert [sequence.id for sequence in dataset] == ["r", "s", "r#1", "1", "2", "2#1"]
    for sequence in dataset:
        check(sequence)


@pytest.mark.parametrize("side", ["input", "output"])
def test_rows_of_one_side_only(tmp_path, side):
    absent = {"input_top_logprobs": [None] * 3, "output_top_logprobs": nested(OUTPUT_TOP)}
    if side == "input":
        absent = {"input_top_logprobs": nested(INPUT_TOP), "output_top_logprobs": []}
    dataset, _ = converted(tmp_path, reply(**absent))
    assert dataset[0].count.tolist() == ([2, 2, 0, 0, 0] if side == "input" else [0, 0, 2, 2, 0])
    assert dataset[0].target_logprob[:4].tolist() == TARGETS


def test_actual_tokens_alone_are_targets(tmp_path):
    dataset, notes = converted(tmp_path, {"meta_info": own()})
    assert dataset[0].count.tolist() == [0] * 5
    assert dataset[0].target_logprob[:4].tolist() == TARGETS
    assert "In 1 of the replies there are no candidates" in notes


def late(start, **fields):
    """A reply with `logprob_start_len`: its first token has no logprob, whatever stands before."""
    tokens = [[None, INPUT[start][1], None], *triples(*INPUT[start + 1 :])]
    meta = {"input_token_logprobs": tokens, "input_top_logprobs": [None, *nested(INPUT_TOP[start + 1 :])]}
    return reply(**meta) | fields


def test_rows_before_the_start_are_missing(tmp_path):
    known = {"input_ids": [10, 11, 12]}
    dataset, notes = converted(tmp_path, late(1, **known), late(2, prompt_token_ids=[10, 11, 12]) | reply_id("b"))
    for sequence, counts in zip(dataset, ([0, 2, 2, 2, 0], [0, 0, 2, 2, 0]), strict=True):
        assert sequence.tokens.tolist() == TOKENS
        assert sequence.count.tolist() == counts
        assert [row(sequence, t)[0] for t in (2, 3)] == IDS[2:4]
        assert sequence.loss_mask is None
    assert row(dataset[0], 1) == (IDS[1], LOGPROBS[1])
    assert "In 2 of the replies the first tokens of the input have no distributions" in notes


def reply_id(name):
    made = late(2)
    return {"meta_info": made["meta_info"] | {"id": name}}


def test_input_that_the_reply_does_not_hold_becomes_a_placeholder(tmp_path):
    without = reply(input_token_logprobs=[], input_top_logprobs=[], id="b")
    unsure = reply(prompt_tokens=None, id="c")
    dataset, notes = converted(tmp_path, late(1), without, unsure)
    assert dataset[0].tokens.tolist() == [0, 11, 12, 13, 14]
    assert [row(dataset[0], t)[0] for t in range(5)] == [[], [51, 52], [53, 13], [14, 55], []]
    assert dataset[0].loss_mask.tolist() == [0] * 5
    assert dataset[1].tokens.tolist() == [0, 13, 14]
    assert [row(dataset[1], t)[0] for t in range(3)] == [[53, 13], [14, 55], []]
    assert dataset[1].loss_mask.tolist() == [0] * 3
    check(dataset[2])
    assert "In 2 of the replies a placeholder" in notes
    assert "logprob_start_len=0" in notes
    assert "In 1 of the replies the tokens of the input are taken to be the whole input" in notes


def test_the_placeholder_is_the_tokenizers_bos():
    parser = sglang._Parser(2)
    (item,) = parser(Record("x", 0, json.dumps(late(1)).encode()), Tally())
    assert item.arguments["tokens"].tolist() == [2, 11, 12, 13, 14]


def test_probability_zero_is_no_candidate(tmp_path):
    rows = [[(-0.75, 53), (None, 13)], [(-0.25, 14), (-9999.0, 55)]]
    packed = flat("output", [[(-0.75, 53), (-math.inf, 13)], [(-0.25, 14), (-1e9, 55)]], packed=True)
    for number, fields in enumerate([{"output_top_logprobs": nested(rows)}, packed]):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = reply(output_token_logprobs=triples((-9999.0, 13), (-0.25, 14)), **fields)
        dataset, _ = converted(folder, made)
        assert [row(dataset[0], t)[0] for t in (2, 3)] == [[53], [14]]
        assert math.isnan(dataset[0].target_logprob[2])


def test_a_token_with_two_logprobs_is_counted_or_refused(tmp_path):
    made = {
        "output_token_logprobs": triples(*[(-0.25, 14)] * 4, (-4.5, 14)),
        "output_top_logprobs": nested(OUTPUT_TOP[1:] * 5),
    }
    dataset, notes = converted(tmp_path, reply(**made) | {"output_ids": None})
    assert dataset[0].target_logprob[6] == -0.25
    assert "At 1 positions the actual token has another logprob" in notes
    made["output_token_logprobs"] = triples(*[(-4.5, 14)] * 5)
    with pytest.raises(SourceError, match=r"meta_info\.output_token_logprobs: row 0 gives the token 14 .*5 of 5 rows"):
        converted(tmp_path, reply(**made) | {"output_ids": None}, overwrite=True)


def test_logprobs_of_named_ids_are_left_out(tmp_path):
    named = reply(input_token_ids_logprobs=[None, triples((-3.1, 9642))], output_token_ids_logprobs=[])
    dataset, notes = converted(tmp_path, named, reply(id="b", input_token_ids_logprobs=[]))
    check(dataset[0])
    assert "In 1 of the replies the logprobs of ids that the request named" in notes


def test_output_ids_may_end_earlier_or_later(tmp_path):
    longer, shorter = reply() | {"output_ids": [13, 14, 15]}, reply(id="b") | {"output_ids": [13]}
    dataset, _ = converted(tmp_path, longer, shorter)
    assert [sequence.tokens.tolist() for sequence in dataset] == [[*TOKENS, 15], TOKENS]
    assert dataset[0].count.tolist() == [2, 2, 2, 2, 0, 0]
    bare = {"output_ids": [13, 14], "meta_info": own() | flat("output", OUTPUT_TOP) | {"output_token_logprobs": None}}
    (sequence,) = converted(tmp_path, bare, overwrite=True)[0]
    assert sequence.tokens.tolist() == TOKENS
    assert [row(sequence, t)[0] for t in (2, 3)] == IDS[2:4]


FLAT, PACKED = flat_reply(), flat_reply(packed=True)


def changed(made, **meta):
    return made | {"meta_info": made["meta_info"] | meta}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (b'{"meta_info": {', "no whole reply of /generate"),
        (b"7", "no whole reply"),
        (b"[7]", "no whole list of replies"),
        (b"[]", "list of replies is empty"),
        (b"\xff", "no whole reply"),
        (b"[" * 100_000, "no whole list"),
        ({"error": {"message": "x"}}, "missing required field `meta_info`"),
        ({"meta_info": {}}, "there are no logprobs; capture with return_logprob"),
        (reply(input_top_logprobs=nested(INPUT_TOP)[1:]), "input_top_logprobs has 2 rows for 3 tokens"),
        (reply(output_top_logprobs=nested(OUTPUT_TOP) * 2), "output_top_logprobs has 4 rows for 2 tokens"),
        (reply(input_top_logprobs=[None, INPUT_TOP[1] and triples(*INPUT_TOP[1]), None]), "row 2 is missing.*radix"),
        (reply(output_top_logprobs=[triples(*OUTPUT_TOP[0]), []]), "output_top_logprobs: row 1 is missing"),
        (reply(output_token_logprobs=[[-2.0, 13], [None, 14]]), "output_token_logprobs: row 1 is missing"),
        (reply(input_token_logprobs=triples((-1.0, 10), *INPUT[1:])), "row 0 of the input has logprobs"),
        (reply(input_top_logprobs=nested(OUTPUT_TOP[:1] + INPUT_TOP[1:])), "row 0 of the input has logprobs"),
        (reply() | {"output_ids": [13, 15]}, "about the token 14 at row 1, where output_ids has 15"),
        (reply() | {"input_ids": [10, 11, 13]}, "are not the last of the input's"),
        (reply() | {"input_ids": [12]}, "are not the last of the input's"),
        ([reply(), reply() | {"output_ids": [14]}], "reply 1: meta_info.output_token_logprobs"),
        (reply(output_top_logprobs=[triples((0.5, 53)), triples((-0.25, 14))]), r"row 0: the token 53 has 0\.5"),
        (reply(output_token_logprobs=triples((0.75, 13), (-1.0, 14))), r"the token 13 has 0\.75"),
        (reply(output_top_logprobs=[triples((None, 53)), triples((-0.25, 14))]), "row 0: none of its 1"),
        (reply(output_top_logprobs=[triples((-1.0, 2**31)), []]), "Expected `int`"),
        (reply(output_top_logprobs=[[["x", 1, None]], []]), "Expected `float"),
        (reply(output_top_logprobs=[[[-1.0]], []]), "Expected `array` of at least length 2"),
        (changed(FLAT, input_top_logprobs_shape=[3, 3]), r"4 values and 4 ids do not fill the shape \[3, 3\]"),
        (changed(FLAT, input_top_logprobs_shape=[0, 2]), "do not fill the shape"),
        (changed(FLAT, input_top_logprobs_null_prefix=0), "input_top_logprobs has 2 rows for 3 tokens"),
        (changed(FLAT, input_top_logprobs_null_prefix=2**30), "rows for 3 tokens"),
        (changed(FLAT, input_top_logprobs_null_prefix=2**31), "Expected `int`"),
        (changed(FLAT, input_top_logprobs_shape=None), "_shape belong together"),
        (changed(FLAT, input_top_logprobs_idx_flat=None), "_idx_flat and _shape belong together"),
        (changed(FLAT, input_top_logprobs_idx_flat=[1]), "4 values and 1 ids"),
        (changed(FLAT, input_top_logprobs_val_flat=[0.0] * 4), None),
        (changed(PACKED, input_top_logprobs_val_flat_b64="AA"), "val_flat_b64 is no base64"),
        (changed(PACKED, input_top_logprobs_val_flat_b64="\u00e9"), "val_flat_b64 is no base64"),
        (changed(PACKED, input_top_logprobs_val_flat_b64="AAAA"), "3 bytes, no multiple of 4"),
        (changed(PACKED, input_top_logprobs_val_flat_b64_dtype="float64"), "2 values and 4 ids"),
        (changed(PACKED, input_top_logprobs_val_flat_b64_dtype="object"), "Invalid enum value 'object'"),
        (
            changed(PACKED, input_top_logprobs_val_flat_b64=base64.b64encode(b"\0\0\xc0\x7f" * 4).decode()),
            "row 1: the token 11 has nan",
        ),
    ],
)
def test_records_that_cannot_be_are_refused(tmp_path, wrong, match):
    error, says = (SourceError, match) if match else (InvalidInputError, "sum to 2")
    with pytest.raises(error, match=rf"in\.jsonl, line 2: .*{says}"):
        converted(tmp_path, reply(id="first"), wrong)


def test_skipped_records_are_counted(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(reply()) + "\n{}\n")
    done = convert([path], tmp_path / "out", importer="sglang", on_error="skip")
    assert (done.summary.sequences, done.skipped) == (1, 1)


VALUES = [None, "x", "AAAA", -1, 0, 1.5, 1e300, -1e300, 2**30, 10**30, True, [], {}, [None], [[-1.0, 5, None]]]


def mutated(made, chance):
    if chance.random() < 0.03:
        return chance.choice(VALUES)
    if isinstance(made, dict):
        return {key: mutated(value, chance) for key, value in made.items() if chance.random() > 0.02}
    if isinstance(made, list):
        return [mutated(value, chance) for value in made if chance.random() > 0.02]
    return made


@pytest.mark.parametrize("form", [*FORMS, "late"])
def test_whatever_a_record_is_it_is_read_or_refused(tmp_path, form):
    chance = random.Random(7)
    made = FORMS.get(form) or late(1, input_ids=[10, 11, 12])
    read = 0
    with logitstore.Writer(tmp_path / "out") as writer:
        for number in range(400):
            line = json.dumps(mutated(made, chance)).encode()
            line = line[: chance.randrange(len(line))] if number % 10 == 0 else line
            try:
                for item in sglang._Parser(0)(Record("x", number, line), Tally()):
                    writer.add(**item.arguments | {"id": f"{number}-{read}"})
                    read += 1
            except (SourceError, InvalidInputError):
                continue
    assert read > 10


def test_every_cut_of_a_line_is_found(tmp_path):
    line = json.dumps(reply()).encode()
    path = tmp_path / "in.jsonl"
    for length in range(1, len(line), 7):
        path.write_bytes(line[:length])
        (outcome,) = parsed(sglang.IMPORTER.read([Input(path)], Options()), 0)
        assert isinstance(outcome.error, SourceError)


@pytest.mark.parametrize(
    ("data", "own"),
    [
        (json.dumps(reply()), True),
        (json.dumps([reply()]), True),
        (json.dumps(flat_reply(packed=True)), True),
        (json.dumps({"text": '"meta_info": "input_top_logprobs"'}), False),
        (json.dumps({"meta_info": {"id": "x"}}), False),
        (json.dumps({"choices": [{"logprobs": None}]}), False),
        (json.dumps({"prompt_token_ids": [1], "prompt_logprobs": [None], "outputs": []}), False),
        (json.dumps({"generated_text": "x", "details": {"tokens": []}}), False),
        (json.dumps({"completion_probabilities": []}), False),
        ("", False),
        ("\x00" * 100, False),
    ],
)
def test_recognition(tmp_path, data, own):
    (tmp_path / "in.jsonl").write_text(data + "\n")
    assert sglang.IMPORTER.recognises(Input(tmp_path / "in.jsonl")) is own


def test_several_files_and_workers_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(reply(id=f"{name}{i}")) + "\n" for i in range(20)))
    for workers in (0, 2):
        files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        done = convert(files, tmp_path / f"out{workers}", importer="sglang", workers=workers)
        assert done.summary.sequences == 40
    shards = [next((tmp_path / f"out{workers}").glob("data/*/*.arrow")).read_bytes() for workers in (0, 2)]
    assert shards[0] == shards[1]
