"""`nemo-aligner`: its JSON lines in and out."""

from __future__ import annotations

import copy
import json
import math
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.convert import Input, Options, convert, export, importers
from logitstore.convert.pool import parsed
from logitstore.errors import InvalidInputError, SourceError

pytestmark = pytest.mark.usefixtures("quiet")

SAMPLE = {
    "tokens": [5, 865, 11],
    "labels": [865, 11, 2],
    "loss_mask": [0.0, 1.0, 1.0],
    "topk_logits": [[0.0, -1.5], [0.0, -0.25], [0.0, -3.0]],
    "topk_token_ids": [[865, 379], [13, 11], [2, 3]],
    "log_sum_exp_logits": [0.5, 1.25, 0.125],
    "index": 17,
}
EXPECTED = [{865: -0.5, 379: -2.0}, {13: -1.25, 11: -1.5}, {2: -0.125, 3: -3.125}, {}]


def lines(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def read(folder, *rows, **options):
    path = Path(folder) / "in.jsonl"
    path.write_bytes(lines(*rows))
    done = convert([path], Path(folder) / "out", importer="nemo-aligner", values="float32", **options)
    return logitstore.open(Path(folder) / "out"), " ".join(done.notes)


def rows_of(sequence):
    return [
        dict(zip(sequence.ids[a:b].tolist(), sequence.logprobs[a:b].tolist(), strict=True))
        for a, b in zip(sequence.offsets[:-1], sequence.offsets[1:], strict=True)
    ]


def test_rows_predict_the_labels(tmp_path):
    dataset, notes = read(tmp_path, SAMPLE)
    sequence = dataset[0]
    assert sequence.id == "17"
    assert sequence.tokens.tolist() == [5, 865, 11, 2]  # the last one is the last label
    assert rows_of(sequence) == EXPECTED
    assert sequence.loss_mask.tolist() == [0, 1, 1, 0]
    assert dataset.info.normalised == "vocabulary"
    assert "Row t predicts labels[t]" in notes
    assert "over the whole vocabulary" in notes


@pytest.mark.parametrize("labels", [None, [865, 11, -100]])
def test_without_a_last_label_the_last_row_is_kept(tmp_path, labels):
    dataset, notes = read(tmp_path, SAMPLE | {"labels": labels})
    assert dataset[0].tokens.tolist() == [5, 865, 11]
    assert rows_of(dataset[0]) == EXPECTED[:3]
    assert ("no label for their last row" in notes) == (labels is not None)


def test_labels_off_by_one_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"in.jsonl, line 1: labels\[0\] is 5, but tokens\[1\] is 865"):
        read(tmp_path, SAMPLE | {"labels": [5, 865, 11]})


def test_padding_is_left_out(tmp_path):
    padded = SAMPLE | {
        "tokens": [5, 865, 0, 0],
        "labels": [865, 11, 0, 0],
        "loss_mask": [0, 1, 0, 0],
        "topk_logits": [*SAMPLE["topk_logits"], [0.0, -1.0]],
        "topk_token_ids": [*SAMPLE["topk_token_ids"], [1, 2]],
        "log_sum_exp_logits": [0.5, 1.25, 0.125, 1.0],
    }
    dataset, notes = read(tmp_path, padded)
    assert dataset[0].tokens.tolist() == [5, 865, 11]
    assert rows_of(dataset[0]) == [*EXPECTED[:2], {}]
    assert dataset[0].loss_mask.tolist() == [0, 1, 0]
    assert "1 samples end in padding" in notes
    for wrong in ({"loss_mask": [0, 1, 1, 0]}, {"tokens": [5, 865, 0, 1]}, {"loss_mask": None}):
        (tmp_path / "x.jsonl").write_bytes(lines(padded | wrong))
        with pytest.raises(SourceError, match=r"labels\[1\] is 11, but tokens\[2\] is 0"):
            convert([tmp_path / "x.jsonl"], tmp_path / "y", importer="nemo-aligner")


def test_pads_candidates_and_flags(tmp_path):
    row = copy.deepcopy(SAMPLE) | {"normalised": "candidates", "id": "mine"}
    row["topk_logits"][0][1] = -1e9
    dataset, notes = read(tmp_path, row)
    assert dataset[0].id == "mine"
    assert rows_of(dataset[0])[0] == {865: -0.5}
    assert dataset.info.normalised == "candidates"
    assert "over the candidates alone" in notes


def test_lines_must_agree(tmp_path):
    with pytest.raises(SourceError, match="line 2: normalised is candidates, in the first line it is vocabulary"):
        read(tmp_path, SAMPLE, SAMPLE | {"normalised": "candidates", "index": 1})


def test_several_inputs(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jsonl").write_bytes(lines(SAMPLE | {"index": 2 * i}, SAMPLE | {"index": 2 * i + 1}))
    convert([tmp_path / "0.jsonl", tmp_path / "1.jsonl"], tmp_path / "out")
    assert [sequence.id for sequence in logitstore.open(tmp_path / "out")] == ["0", "1", "2", "3"]


def changed(*path, to):
    made = copy.deepcopy(SAMPLE)
    node = made
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = to
    return made


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (b"not json", "no whole sample"),
        (b"[]", "no whole sample"),
        (b"\xff", "no whole sample"),
        (b"[" * 100_000, "no whole sample"),
        (changed("tokens", to=[5, 865]), "topk_logits has 3 rows for 2 tokens"),
        (changed("log_sum_exp_logits", to=[0.5]), "log_sum_exp_logits has 1 rows"),
        (changed("topk_token_ids", 1, to=[13]), "row 1: topk_token_ids has 1 candidates"),
        (changed("topk_token_ids", to=[]), "topk_token_ids has 0 rows"),
        (changed("topk_logits", 1, 1, to=None), r"null.*topk_logits\[1\]\[1\]"),
        (changed("topk_token_ids", 1, 1, to=2.5), "Expected `int`"),
        (changed("topk_token_ids", 1, 1, to=-1), ">= 0"),
        (changed("topk_token_ids", 1, 1, to=13), "position 1: the id 13 stands there twice"),
        (changed("log_sum_exp_logits", 1, to=-2.0), "position 1: the logprob 2"),
        (changed("topk_logits", 1, to=[0.0, 1.1]), "position 1: the probabilities sum to"),
        (changed("labels", to=[865]), "labels has 1 entries for 3"),
        (changed("labels", 1, to=2**70), "labels"),
        (changed("loss_mask", to=[1]), "loss_mask has 1 entries"),
        (changed("loss_mask", 1, to=3), r"loss_mask\[1\] is 3"),
        (changed("index", to=17), "this id was added before"),
        (changed("normalised", to="x"), "normalised"),
        (changed("temperature", to=2.0), "temperature is 2.0, in the first line it is 1.0"),
        (changed("temperature", to=0), "temperature"),
        (changed("temperature", to=None), "temperature"),
    ],
)
def test_malformed_samples_are_refused(tmp_path, row, match):
    if isinstance(row, dict) and "this id" not in match:
        row["index"] = 18
    with pytest.raises((SourceError, InvalidInputError), match=f"in.jsonl, line 2: .*{match}"):
        read(tmp_path, SAMPLE, row)


def test_mutations_give_sequences_or_errors_of_ours(tmp_path):
    random_ = random.Random(0)
    importer = importers()["nemo-aligner"]
    seen = set()
    for number in range(200):
        made = copy.deepcopy(SAMPLE)
        for _ in range(random_.randint(1, 2)):
            node, parent, key = made, None, None
            while isinstance(node, dict | list) and node and (parent is None or random_.random() < 0.7):
                parent, key = node, random_.choice(list(node) if isinstance(node, dict) else range(len(node)))
                node = parent[key]
            parent[key] = random_.choice([None, "x", -1, 0.5, 10**30, -1e300, 1e300, [], {}, [[1]], True, 2**31])
        text = json.dumps(made).encode()
        text = text[: random_.randrange(len(text))] if number % 10 == 0 else text
        (tmp_path / "in.jsonl").write_bytes(text + b"\n")
        opened = importer.read([Input(tmp_path / "in.jsonl")], Options())
        with logitstore.Writer(tmp_path / str(number), values="float32", **opened.settings) as writer:
            for outcome in parsed(opened, 0):
                seen.add(outcome.error is None)
                for item in outcome.items:
                    try:
                        writer.add(**item.arguments)
                    except InvalidInputError:
                        seen.add("refused")
    assert seen == {True, False, "refused"}


def test_recognition(tmp_path):
    recognises = importers()["nemo-aligner"].recognises
    long = SAMPLE | {"tokens": [1] * 5000, "labels": [1] * 5000, "loss_mask": [0] * 5000}
    for row, own in [
        (SAMPLE, True),
        (long, True),
        ({"topk_logprobs": [[-0.1]], "topk_token_ids": [[1]], "actual_logprobs": [-0.1]}, False),
        ({"tokens": [1], "prompt_logprobs": [None], "topk_prompt_logprobs": [None]}, False),
        ({"input_ids": [1], "logprobs": [[-0.1]], "target_token_ids": [[1]], "labels": [1]}, False),
        ({"choices": []}, False),
        ([{"1": 0.5}], False),
    ]:
        (tmp_path / "x").write_bytes(lines(row))
        assert recognises(Input(tmp_path / "x")) is own, row


def test_the_bytes_are_the_same_with_workers(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(lines(*[SAMPLE | {"index": i} for i in range(40)]))
    for workers in (0, 2):
        convert([tmp_path / "in.jsonl"], tmp_path / str(workers), workers=workers)
    shards = [next((tmp_path / str(workers)).glob("data/*/*.arrow")).read_bytes() for workers in (0, 2)]
    assert shards[0] == shards[1]


# Export


@st.composite
def sequences(draw):
    """Sequences as (tokens, rows of {id: logprob}, loss_mask or None), two tokens or more."""
    made = []
    masks = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(2, 6))
        tokens = draw(st.lists(st.integers(0, 40), min_size=length, max_size=length))
        rows = []
        for _ in range(length):
            values = draw(st.dictionaries(st.integers(0, 40), st.floats(-50, 0, width=32), max_size=6))
            shift = math.log(max(1.0, sum(map(math.exp, values.values())))) + draw(st.sampled_from([1e-3, 2.0]))
            rows.append({token: float(np.float32(value - shift)) for token, value in values.items()})
        mask = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)) if masks else None
        made.append((tokens, rows, mask))
    return made


def store(path, made, **settings):
    with logitstore.Writer(path, values="float32", logit_width=1000, teacher="t", **settings) as writer:
        for number, (tokens, rows, mask) in enumerate(made):
            writer.add(
                np.array(tokens, np.int64),
                np.array([token for row in rows for token in row], np.int64),
                np.array([value for row in rows for value in row.values()], np.float32),
                count=np.array([len(row) for row in rows], np.int64),
                id=f"s{number}",
                loss_mask=None if mask is None else np.array(mask, np.int64),
            )
    return path


@settings(max_examples=40)
@given(sequences(), st.sampled_from(["vocabulary", "candidates"]))
def test_round_trip(made, normalised):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store(folder / "a", made, normalised=normalised, temperature=0.5)
        export(folder / "a", folder / "x.jsonl", "nemo-aligner")
        convert([folder / "x.jsonl"], folder / "b", values="float32")
        before, after = logitstore.open(folder / "a"), logitstore.open(folder / "b")
        assert (after.info.normalised, after.info.temperature) == (normalised, 0.5)
        for old, new in zip(before, after, strict=True):
            assert old.id == new.id
            assert old.tokens.tolist() == new.tokens.tolist()
            assert rows_of(new) == [*rows_of(old)[:-1], {}]  # to the last bit
            wanted = np.ones(len(old)) if old.loss_mask is None else old.loss_mask
            assert new.loss_mask.tolist() == [*((wanted != 0) & (old.count > 0))[:-1].tolist(), 0]


def test_what_is_written(tmp_path):
    rows = [{}, {3: -0.25, 0: -2.0, 7: -3.0}, {1: -0.5}, {9: -1.0}]
    store(tmp_path / "a", [([5, 6, 3, 1], rows, [1, 1, 0, 1]), ([4], [{}], [0])])
    done = export(tmp_path / "a", tmp_path / "x.jsonl", "nemo-aligner")
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_bytes().splitlines()] == [
        {
            "tokens": [5, 6, 3],
            "labels": [6, 3, 1],
            "loss_mask": [0, 1, 0],
            "topk_logits": [[-1e9, -1e9, -1e9], [0.0, -1.75, -2.75], [0.0, -1e9, -1e9]],
            "topk_token_ids": [[0, 1, 2], [3, 0, 7], [1, 0, 2]],
            "log_sum_exp_logits": [0.0, 0.25, 0.5],
            "index": 0,
            "id": "s0",
        }
    ]
    notes = " ".join(done.notes)
    assert "1 sequences have a distribution at their last position" in notes
    assert "1 sequences have fewer than two tokens" in notes
    assert "1 positions are trained on but have no distribution" in notes
    export(tmp_path / "a", tmp_path / "k.jsonl", "nemo-aligner", k=2)
    assert json.loads((tmp_path / "k.jsonl").read_bytes().splitlines()[0])["topk_token_ids"][1] == [3, 0]


def test_all_rows_of_a_file_are_as_wide_as_its_widest(tmp_path):
    made = [([5, 6], [{3: -0.25, 7: -3.0, 8: -4.0}, {}], None), ([5, 6], [{2: -0.5}, {}], None)]
    store(tmp_path / "a", made)
    export(tmp_path / "a", tmp_path / "x.jsonl", "nemo-aligner")
    listed = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [row["topk_token_ids"] for row in listed] == [[[3, 7, 8]], [[2, 0, 1]]]
    assert listed[1]["topk_logits"] == [[0.0, -1e9, -1e9]]
    done = export(tmp_path / "a", tmp_path / "k.jsonl", "nemo-aligner", k=2)
    listed = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert [row["topk_token_ids"] for row in listed] == [[[3, 7]], [[2, 0]]]
    assert "Candidates beyond the best 2 of a position were left out." in done.notes
    assert "temperature" not in listed[0]
