"""`compare`: every figure equals one computed anew from the decoded rows; what cannot be compared is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from look_reference import compared, stats_of

import logitstore
from logitstore.errors import InvalidInputError
from logitstore.look.compare import compare
from logitstore.look.measures import measure
from logitstore.look.pairs import pair
from logitstore.shard.sequence import Sequence
from logitstore.tokenizer import Tokenizer

CLOSE = {"rel": 1e-6, "abs": 1e-12}
MEANS = ("kl_ab", "kl_ba", "jsd", "jsd_at_most", "agree", "overlap", "shared_a", "shared_b")


def assert_means(means, found):
    assert means.positions == len(found)
    for name in MEANS:
        assert getattr(means, name) == pytest.approx(math.fsum(one[name] for one in found) / len(found), **CLOSE), name
    assert means.identical == sum(one["identical"] for one in found)


def assert_figures(figures, a, b, by=None):
    """Against a position by position computation over sequences of the same ids."""
    others = {s.id: s for s in b}
    found, groups = [], {}
    for row, s in enumerate(a):
        if s.id in others:
            own = [one | {"row": row, "id": s.id} for one in compared(s, others[s.id])]
            found += own
            if by is not None:
                groups.setdefault(s.columns[by], []).extend(own)
    assert_means(figures.means, found)
    for name in ("kl_ab", "kl_ba", "jsd"):
        values = np.array([one[name] for one in found])
        spread = getattr(figures, name)
        assert (spread.mean, spread.least, spread.greatest) == pytest.approx((values.mean(), values.min(), values.max()), **CLOSE)  # fmt: skip
        for percent, value in spread.percentiles.items():
            assert value == pytest.approx(np.percentile(values, int(percent)), **CLOSE)
        assert sum(spread.histogram.counts) == len(values)
    moved = [value for one in found for value in one["moved"]]
    assert figures.logprobs_moved == pytest.approx(math.fsum(moved) / len(moved), **CLOSE)
    assert figures.logprobs_moved_at_most == pytest.approx(max(moved), **CLOSE)
    for side, name in ((figures.a, "entropy_a"), (figures.b, "entropy_b")):
        assert side.entropy == pytest.approx(math.fsum(one[name] for one in found) / len(found), **CLOSE)
    assert set(figures.groups) == set(groups)
    for name, means in figures.groups.items():
        assert_means(means, groups[name])
    worst = sorted(found, key=lambda one: -one["jsd"])[:20]
    assert [one.jsd for one in figures.differences] == [pytest.approx(one["jsd"], **CLOSE) for one in worst]
    for one in figures.differences:
        (expected,) = (other for other in found if (other["row"], other["position"]) == (one.row, one.position))
        assert one.id == expected["id"]
        assert (one.kl_ab, one.kl_ba) == pytest.approx((expected["kl_ab"], expected["kl_ba"]), **CLOSE)
        for best, said in ((one.best_a, expected["best_a"]), (one.best_b, expected["best_b"])):
            assert best[0] == said[0]
            assert best[1] == pytest.approx(said[1], **CLOSE)
    assert_calibration(figures, a, b, others)


def assert_calibration(figures, a, b, others):
    for side, dataset in ((figures.a, a), (figures.b, b)):
        n, confidence, hits = np.zeros(10), np.zeros(10), np.zeros(10)
        for s in dataset:
            one = s if dataset is b else others.get(s.id)
            first = next((x for x in a if x.id == s.id), None) if dataset is b else s
            if one is None or first is None:
                continue
            for t in range(len(s.tokens) - 1):
                if first.count[t] and one.count[t]:
                    at = s.offsets[t]
                    p = math.exp(float(s.logprobs[at]))
                    place = min(int(p * 10), 9)
                    n[place] += 1
                    confidence[place] += p
                    hits[place] += s.ids[at] == s.tokens[t + 1]
        assert list(side.calibration.n) == n.tolist()
        assert list(side.calibration.hits) == hits.tolist()
        assert side.calibration.confidence == pytest.approx(confidence.tolist(), **CLOSE)
        assert side.accuracy == pytest.approx(hits.sum() / n.sum(), **CLOSE)
        assert side.calibration_error == pytest.approx(np.abs(confidence - hits).sum() / n.sum(), **CLOSE)


def two_teachers(tmp_path, rows, sequences=12, positions=25, k=9, k_b=6, **settings):
    """The same texts; the second one's logprobs are moved a little, and cut to fewer candidates."""
    random = np.random.default_rng(1)
    for name, width, scale in (("a", k, 0.0), ("b", k_b, 0.4)):
        with logitstore.Writer(
            tmp_path / name, logit_width=1000, top_k=width, chunk_candidates=400, **settings
        ) as writer:
            for number in range(sequences):
                tokens, ids, logprobs = rows(number, positions, k)
                tokens[1:] = ids[:-1, number % 3]
                values = logprobs + random.normal(0, scale, logprobs.shape)
                values -= np.log(np.exp(values).sum(axis=1, keepdims=True)) + 0.1
                count = np.where(random.random(positions) < 0.1, 0, k)
                kept = np.arange(k) < count[:, None]
                writer.add(tokens, ids[kept], values[kept].astype(np.float32), count=count, id=f"s{number}", kind=f"k{number % 3}")  # fmt: skip
    return logitstore.open(tmp_path / "a"), logitstore.open(tmp_path / "b")


def test_of_two_teachers(tmp_path, rows, quiet):
    a, b = two_teachers(tmp_path, rows)
    figures = compare(a, b, by="kind")
    assert_figures(figures, a, b, by="kind")
    assert (figures.sequences, figures.only_a, figures.only_b, figures.differing) == (12, 0, 0, 0)
    assert 0 < figures.means.jsd < figures.means.jsd_at_most < math.log(2)
    assert compare(a, b, by="kind", workers=2) == figures
    back = compare(b, a, by="kind")
    assert back.means.kl_ab == pytest.approx(figures.means.kl_ba)
    assert back.means.jsd == pytest.approx(figures.means.jsd)


def test_of_the_real_capture(shared, tmp_path, quiet):
    """Two encodings, and two widths, of the same teacher."""
    from logitstore.convert import convert

    source = shared("gemma3-270m-wikitext2-top128.npz")
    options = {"teacher": "t", "logit_width": 262_144}
    convert([source], tmp_path / "a", top_k=64, **options)
    convert([source], tmp_path / "b", top_k=48, resolution=1 / 8, **options)
    a, b = logitstore.open(tmp_path / "a"), logitstore.open(tmp_path / "b")
    figures = compare(a, b)
    assert figures.positions == 40_269
    assert_figures(figures, a, b)
    assert figures.means.overlap == 1


def test_of_a_dataset_with_itself(write):
    dataset = logitstore.open(write())
    figures = compare(dataset, dataset)
    assert figures.means.identical == figures.positions
    assert (figures.means.kl_ab, figures.means.agree, figures.means.overlap) == (0, 1, 1)
    assert figures.logprobs_moved_at_most == 0
    assert figures.means.jsd == pytest.approx(0, abs=1e-15)


@settings(max_examples=150)
@given(st.data())
def test_bounds_hold_whatever_the_rests_are(data):
    """Two whole distributions over 30 tokens, of which each side keeps its best few: the truth is within the bounds."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scale = data.draw(st.floats(0.01, 4))
    whole = random.normal(0, scale, (2, 30))
    whole -= np.log(np.exp(whole).sum(axis=1, keepdims=True))
    p, q = np.exp(whole)
    m = (p + q) / 2
    kl_ab, kl_ba = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    jsd = ((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2
    a, b = (sequence_of(log, data.draw(st.integers(1, 30))) for log in whole)
    found = pair(a, b, measure(a), measure(b))
    slack = 1e-5
    assert found.kl_ab[0] + slack >= 0
    assert found.kl_ab[0] <= kl_ab + slack
    assert found.kl_ba[0] <= kl_ba + slack
    assert found.jsd[0] - slack <= jsd <= found.jsd_at_most[0] + slack


def sequence_of(logprobs, k):
    best = np.argsort(-logprobs, kind="stable")[:k]
    with np.errstate(divide="ignore"):
        tail = np.log(max(0.0, 1 - np.exp(logprobs[best]).sum()))
    return Sequence.of(
        {
            "id": "x",
            "tokens": np.zeros(1, np.uint32),
            "count": np.array([k], np.uint32),
            "offsets": np.array([0, k]),
            "ids": best.astype(np.int32),
            "logprobs": logprobs[best].astype(np.float32),
            "draws": None,
            "tail": np.array([tail], np.float32),
            "target_logprob": None,
            "target_rank": None,
            "entropy": None,
            "normalised": "vocabulary",
        }
    )


def test_a_tail_of_zero_makes_no_divergence_infinite(tmp_path, quiet):
    for name, p in (("a", [0.5, 0.5]), ("b", [0.5, 0.25])):
        with logitstore.Writer(tmp_path / name, logit_width=10, values="float32") as writer:
            writer.add([1], [[3, 4]], np.log(np.array([p], np.float32)))
    figures = compare(logitstore.open(tmp_path / "a"), logitstore.open(tmp_path / "b"))
    assert 0 < figures.means.kl_ab < 1
    assert 1 < figures.means.kl_ba < 5


def test_missing_reordered_and_differing_sequences(tmp_path, rows, quiet):
    order = {"a": [0, 1, 2, 3, 4, 5], "b": [7, 5, 3, 0, 2]}
    for name, numbers in order.items():
        with logitstore.Writer(tmp_path / name, logit_width=1000) as writer:
            for number in numbers:
                tokens, ids, logprobs = rows(number, 20, 5)
                if (name, number) == ("b", 3):
                    tokens[8] += 1
                length = 15 if (name, number) == ("b", 2) else 20
                writer.add(tokens[:length], ids[:length], logprobs[:length], id=f"s{number}")
    figures = compare(logitstore.open(tmp_path / "a"), logitstore.open(tmp_path / "b"))
    assert (figures.sequences, figures.only_a, figures.only_b, figures.differing) == (4, 2, 1, 2)
    assert figures.first_differing == ("s2", 15)
    assert figures.positions == 20 + 20 + 15 + 8
    assert figures.means.identical == figures.positions
    assert figures.a.calibration.positions == 19 + 19 + 14 + 7


def test_by_row_where_ids_were_lost(tmp_path, rows, quiet):
    for name in ("a", "b"):
        with logitstore.Writer(tmp_path / name, logit_width=1000) as writer:
            for number in range(4):
                writer.add(*rows(number, 20, 5), id=f"{name}{number}")
    a, b = logitstore.open(tmp_path / "a"), logitstore.open(tmp_path / "b")
    with pytest.raises(InvalidInputError, match="--match row"):
        compare(a, b)
    assert compare(a, b, match="row").means.identical == 80
    assert compare(a, b[:3], match="row").only_a == 1
    with pytest.raises(InvalidInputError, match="differ from the start"):
        compare(a, b[::-1][:1], match="row")


def tokenizer_at(folder, letter):
    """A vocabulary of 1,000 words of its own."""
    folder.mkdir()
    model = {"type": "WordLevel", "unk_token": f"{letter}0", "vocab": {f"{letter}{i}": i for i in range(1000)}}
    decoder = {"type": "Metaspace", "replacement": "_"}
    file = {"version": "1.0", "added_tokens": [], "model": model, "decoder": decoder}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    return folder


def test_other_tokenizers_are_refused(tmp_path, rows, quiet):
    for name, letter in (("a", "v"), ("b", "w"), ("c", "v")):
        tokenizer = tokenizer_at(tmp_path / f"tokenizer-{name}", letter)
        with logitstore.Writer(tmp_path / name, logit_width=1000, tokenizer=tokenizer) as writer:
            writer.add(*rows(1, 5, 3), id="x")
    with pytest.raises(InvalidInputError, match="tokenizers differ"):
        compare(logitstore.open(tmp_path / "a"), logitstore.open(tmp_path / "b"))
    done = run("compare", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 1
    assert "tokenizers differ" in done.stderr
    assert compare(logitstore.open(tmp_path / "a"), logitstore.open(tmp_path / "c")).notes == []


def test_an_unknown_tokenizer_and_other_settings_are_said(write):
    figures = compare(logitstore.open(write("a")), logitstore.open(write("b", temperature=0.5)))
    assert len(figures.notes) == 2
    assert "tokenizer is unknown" in figures.notes[0]
    assert figures.notes[1] == "temperature differs: 1.0 and 0.5"


@pytest.mark.parametrize("kind", ["candidates", "draws"])
def test_without_a_tail_agreement_is_known_and_divergence_is_not(tmp_path, write, quiet, kind):
    if kind == "candidates":
        other = write("other", normalised="candidates")
    else:
        other = tmp_path / "other"
        with logitstore.Writer(other, logit_width=1000) as writer:
            for s in logitstore.open(write("plain")):
                draws = np.maximum(1, np.exp(s.logprobs + 9).astype(int))
                writer.add_draws(s.tokens, s.ids, draws, np.add.reduceat(draws, s.offsets[:-1]), count=s.count, id=s.id)
    figures = compare(logitstore.open(write("data")), logitstore.open(other))
    assert figures.means.kl_ab is figures.means.jsd is figures.jsd is None
    assert figures.means.agree > 0.9
    assert figures.means.overlap == 1
    assert any("KL and JSD are unknown" in note for note in figures.notes)
    assert run("compare", tmp_path / "data", other).returncode == 0


def test_breakdown_by_a_column(tmp_path, write):
    a = write("a", per_sequence=lambda i: {"domain": {"name": ["x", "y"][i % 2]}, "number": i})
    b = logitstore.open(write("b"))
    with pytest.raises(InvalidInputError, match="no column 'nothing' of its own; it has: 'domain', 'number'"):
        compare(logitstore.open(a), b, by="nothing")
    figures = compare(logitstore.open(a), b, by="domain")
    assert set(figures.groups) == {'{"name": "x"}', '{"name": "y"}'}
    assert set(compare(logitstore.open(a), b, by="number").groups) == {str(i) for i in range(6)}


def test_a_column_of_too_many_values_is_refused(write, monkeypatch):
    monkeypatch.setattr("logitstore.look.compare.GROUPS", 3)
    a = logitstore.open(write("a", per_sequence=lambda i: {"number": i}))
    with pytest.raises(InvalidInputError, match="over 3 values"):
        compare(a, a, by="number")


def run(*arguments):
    command = [sys.executable, "-m", "logitstore_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(tmp_path, rows, quiet):
    pieces = {number: f" w{number}".encode() for number in range(1000)} | {7: b"<script>\x1b[31m"}
    a, b = two_teachers(tmp_path, rows, tokenizer=Tokenizer.from_pieces(pieces))
    done = run("compare", a.path, b.path, "--by", "kind")
    assert done.returncode == 0, done.stderr
    for text in (
        "best candidate is the same",
        "KL(A ‖ B) >=",
        "Where they differ most",
        "k1",
        "calibration error",
        "' w",
    ):
        assert text in done.stdout
    assert "\x1b" not in done.stdout
    assert "a tokenizer is unknown" in done.stderr  # a partial vocabulary has no identity
    found = json.loads(run("compare", a.path, b.path, "--json").stdout)
    assert found["means"]["jsd"] == pytest.approx(compare(a, b).means.jsd)
    assert len(found["differences"]) == 20
    help_text = run("compare", "--help").stdout
    assert "Example: logitstore compare" in help_text


def test_figures_of_each_side_are_those_of_stats(tmp_path, rows, quiet):
    a, _ = two_teachers(tmp_path, rows)
    figures = compare(a, a)
    expected = stats_of(a)
    assert figures.a.entropy == pytest.approx(np.mean(expected["entropy"]))
    assert figures.differences == []
    assert figures.a.cross_entropy == pytest.approx(np.mean(expected["surprise"]))
