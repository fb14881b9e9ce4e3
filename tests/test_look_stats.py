"""`stats`: every figure equals one computed anew from the decoded rows; samples, processes, oddities."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from look_reference import stats_of

import logitstore
from logitstore.look import collect as collecting
from logitstore.look import parts
from logitstore.look.stats import stats

CLOSE = {"rel": 1e-6, "abs": 1e-12}


def assert_spread(spread, values):
    values = np.array(values, np.float64)
    if len(values) == 0:
        assert spread is None
        return
    assert spread.n == len(values)
    assert spread.mean == pytest.approx(math.fsum(values) / len(values), **CLOSE)
    assert (spread.least, spread.greatest) == pytest.approx((values.min(), values.max()), **CLOSE)
    for percent, value in spread.percentiles.items():
        assert value == pytest.approx(np.percentile(values, int(percent)), rel=1e-6, abs=1e-7)
    assert sum(spread.histogram.counts) == len(values)
    edges = spread.histogram.edges
    for number in range(1, len(edges) - 1):  # but for values that rounding could put on either side of an edge
        near = np.abs(values - edges[number]) < 1e-6
        below = int(((values < edges[number]) & ~near).sum())
        assert below <= sum(spread.histogram.counts[:number]) <= below + int(near.sum())


def assert_figures(figures, dataset):
    expected = stats_of(dataset)
    n = len(dataset)
    assert figures.full
    assert (figures.sequences, figures.sequences_in_all) == (n, n)
    lengths = [len(s.tokens) for s in dataset]
    assert figures.positions == sum(lengths) == dataset.info.totals.positions
    assert figures.scored == len(expected["entropy"])
    assert figures.candidates == dataset.info.totals.candidates
    assert_spread(figures.length, lengths)
    for name in ("count", "coverage", "tail", "entropy"):
        assert_spread(getattr(figures, name), expected[name])
    teaching, ranks = figures.teaching, np.array(expected["rank"])
    assert teaching.positions == len(ranks)
    assert teaching.top_1 == (ranks == 1).mean()
    assert teaching.unranked == (ranks == 0).mean()
    assert teaching.outside == np.mean(expected["outside"])
    edges = np.array(teaching.ranks.edges)
    inside = (ranks >= edges[:-1, None]) & (ranks < edges[1:, None])
    assert list(teaching.ranks.counts) == inside.sum(axis=1).tolist()
    assert teaching.known == len(expected["surprise"]) / len(ranks)
    assert_spread(teaching.surprise, expected["surprise"])
    known = math.fsum(expected["surprise"]) / len(expected["surprise"])
    least = math.fsum(expected["floor"]) / len(ranks)
    assert teaching.cross_entropy_known == pytest.approx(known, **CLOSE)
    assert teaching.cross_entropy_at_least == pytest.approx(least, **CLOSE)
    assert teaching.perplexity_at_least == pytest.approx(math.exp(least), **CLOSE)
    if teaching.known == 1:
        assert teaching.cross_entropy == pytest.approx(known, **CLOSE)
        assert teaching.perplexity == pytest.approx(math.exp(known), **CLOSE)
    else:
        assert teaching.cross_entropy is teaching.perplexity is None
    means = [(mean, -row) for row, mean in enumerate(expected["mean_entropy"]) if mean is not None]
    long = [mean for mean in means if np.count_nonzero(dataset[-mean[1]].count) >= collecting.LONG]
    short = [mean for mean in means if mean not in long]
    chosen = [*sorted(long, reverse=True), *sorted(short, reverse=True)][:10]
    assert [(one.entropy, one.row) for one in figures.uncertain] == [(pytest.approx(mean, **CLOSE), -row) for mean, row in chosen]  # fmt: skip
    assert all(dataset[one.row].id == one.id for one in figures.uncertain)
    assert_bytes(figures, dataset)


def assert_bytes(figures, dataset):
    """Those of the columns are those of the cells in the Arrow file."""
    import pyarrow as pa

    sizes, messages = {}, 0
    for number, info in enumerate(dataset.info.shards):
        with pa.OSFile(str(dataset.path / info.path)) as file:
            for batch in pa.ipc.open_stream(file):
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    if pa.types.is_binary(column.type):
                        sizes[name] = sizes.get(name, 0) + sum(len(cell.as_py()) for cell in column)
        messages += int(dataset._shards[number].index["length"].sum())
    found = {column.name: column for column in figures.columns}
    for name, size in sizes.items():
        if size:
            assert found[name].bytes == size
            assert found[name].bytes_a_position == pytest.approx(size / figures.positions, **CLOSE)
            assert found[name].bits_a_candidate == pytest.approx(8 * size / figures.candidates, **CLOSE)
    assert sum(column.bytes for column in figures.columns) == messages
    assert figures.bytes == sum(os.path.getsize(dataset.path / info.path) for info in dataset.info.shards)  # noqa: PTH202


def test_of_a_rectangular_dataset(write):
    dataset = logitstore.open(write(sequences=30, positions=40, k=8))
    assert_figures(stats(dataset), dataset)


def test_entropy_stored_or_a_lower_bound(write):
    given = np.linspace(0, 5, 40)
    given[::3] = np.nan
    dataset = logitstore.open(write(sequences=4, positions=37, per_sequence=lambda i: {"entropy": given[: 37 + i]} if i % 2 else {}))  # fmt: skip
    figures = stats(dataset)
    assert_figures(figures, dataset)
    stored = sum(int((~np.isnan(s.entropy)).sum()) for s in dataset if s.entropy is not None)
    assert figures.entropies == {
        "stored": stored,
        "candidates and tail": figures.scored - stored,
        "draws": 0,
        "candidates": 0,
    }


@pytest.fixture
def ragged_path(tmp_path, rows, quiet):
    """Positions without candidates, few or many; targets stored where they are outside; short and empty sequences."""
    random = np.random.default_rng(3)
    path = tmp_path / "ragged"
    with logitstore.Writer(path, logit_width=1000, chunk_candidates=500) as writer:
        for number in range(60):
            n = int(random.choice([0, 1, 2, 5, 33]))
            tokens, ids, logprobs = rows(number, n, 12)
            count = random.choice([0, 1, 3, 12], n).astype(np.int64)
            kept = np.arange(12) < count[:, None]
            extra = {}
            if number % 3 == 0:
                extra = {"target_logprob": np.where(random.random(n) < 0.5, -7.5, np.nan), "target_rank": random.integers(13, 3000, n)}  # fmt: skip
                extra["target_rank"][random.random(n) < 0.3] = 0
            if number % 4 == 0:
                extra["loss_mask"] = random.integers(0, 2, n)
            tokens[1::2] = ids[: len(tokens[1::2]), 2] if n else tokens[1::2]
            writer.add(tokens, ids[kept], logprobs[kept], count=count, id=f"{number}", **extra)
    return path


def test_of_a_ragged_dataset(ragged_path):
    dataset = logitstore.open(ragged_path)
    assert len(list(dataset.parts())) > 3
    figures = stats(dataset)
    assert_figures(figures, dataset)
    masks = np.concatenate([s.loss_mask for s in dataset if s.loss_mask is not None])
    assert figures.trained == pytest.approx((masks == 1).mean())


@pytest.mark.parametrize("entropy", [True, False], ids=["stored entropy", "bound"])
def test_of_the_real_capture(shared, tmp_path, quiet, entropy):
    from logitstore.convert import convert

    source = shared("gemma3-270m-wikitext2-top128.npz")
    if not entropy:
        with np.load(source) as arrays:
            kept = {name: arrays[name] for name in ("tokens", "lengths", "ids", "logprobs")}
        source = tmp_path / "without.npz"
        np.savez(source, **kept)
    convert([source], tmp_path / "data", teacher="google/gemma-3-270m", logit_width=262_144, top_k=64)
    dataset = logitstore.open(tmp_path / "data")
    figures = stats(dataset)
    assert figures.positions == 40_269
    assert_figures(figures, dataset)
    assert_advice(figures, dataset)


def assert_advice(figures, dataset):
    """Costs, computed anew position by position; savings, by writing such a dataset."""
    width = dataset.info.logit_width
    rows = [row for first, end in figures.advice_rows for row in range(first, end)]
    sequences = [dataset[row] for row in rows]
    assert {one.setting for one in figures.advice} == {"top_k", "top_p", "resolution"}
    for one in figures.advice:
        kl, even, coverage, kept = [], [], [], []
        for s in sequences:
            for start, end, tail in zip(s.offsets[:-1], s.offsets[1:], s.tail, strict=True):
                given = s.logprobs[start:end].astype(np.float64)
                p, t = np.exp(given), math.exp(tail)
                n = len(p)
                q = p
                if one.setting == "top_k":
                    q = p[: int(one.value)]
                elif one.setting == "top_p":
                    q = p[: int(np.sum(np.cumsum(p) - p < one.value))]
                else:
                    steps = np.rint((given[0] - given) / one.value)
                    q = np.exp(
                        (np.float32(given[0]) - np.float32(one.value) * steps.astype(np.float32)).astype(np.float64)
                    )
                k, rest = len(q), t + p[len(q) :].sum()
                a, b = q / q.sum(), p[:k] / p.sum()
                kl.append((a * np.log(a / b)).sum())
                whole_p, whole_q = p.sum() + t, q.sum() + rest
                log_q = np.log(np.append(q, np.full(n - k, rest / (width - k))) / whole_q)
                among = (p / whole_p * (np.log(p / whole_p) - log_q)).sum()
                outside = (
                    t / whole_p * math.log(t / whole_p / (width - n) / (rest / (width - k) / whole_q)) if t else 0.0
                )
                even.append(among + outside)
                coverage.append(q.sum())
                kept.append(k)
        assert one.kl == pytest.approx(np.mean(kl), rel=1e-6)
        assert one.kl_even == pytest.approx(np.mean(even), rel=1e-6, abs=1e-9)
        assert one.coverage == pytest.approx(np.mean(coverage), rel=1e-6)
        assert one.candidates == pytest.approx(np.mean(kept), rel=1e-9)
        assert one.share == pytest.approx(one.saved / figures.bytes_a_position)


def test_savings_are_those_of_writing_less(shared, tmp_path, quiet):
    """From the given logprobs, not from the stored ones: as somebody would who captures again."""
    from logitstore.convert import convert

    source = shared("gemma3-270m-wikitext2-top128.npz")
    options = {"teacher": "t", "logit_width": 262_144}
    convert([source], tmp_path / "data", top_k=64, **options)
    dataset = logitstore.open(tmp_path / "data")
    figures = stats(dataset)
    for one in figures.advice:
        if (one.setting, one.value) not in [("top_k", 32), ("top_p", 0.95), ("resolution", 1 / 8)]:
            continue
        less = {"top_k": 64, one.setting: int(one.value) if one.setting == "top_k" else one.value}
        convert([source], tmp_path / "less", overwrite=True, **options, **less)
        now = logitstore.open(tmp_path / "less").info.totals
        assert figures.bytes_a_position - one.saved == pytest.approx(now.bytes / now.positions, rel=0.03)


def test_processes_give_the_same_figures(ragged_path):
    dataset = logitstore.open(ragged_path)
    seen = []
    assert stats(dataset, full=True, workers=2, progress=lambda *at: seen.append(at)) == stats(dataset)
    assert seen[-1] == (60, 60)


def test_a_sample_is_spread_and_says_so(write, monkeypatch):
    monkeypatch.setattr(parts, "SAMPLE_PARTS", 5)
    dataset = logitstore.open(write(sequences=200, positions=9, k=4, chunk_candidates=120, shard_bytes=4000))
    assert len(dataset.info.shards) > 5
    figures = stats(dataset)
    assert not figures.full
    assert 5 <= figures.sequences < 40
    assert figures.sequences_in_all == 200
    assert figures.positions_in_all == dataset.info.totals.positions
    assert stats(dataset) == figures
    drawn = parts.sampled_parts(dataset)
    assert len(drawn) == 5
    assert drawn[0].start < 80
    assert drawn[-1].start > 120
    assert set(map(str, drawn)) <= set(map(str, dataset.parts()))
    rows = [row for part in drawn for row in range(part.start, part.stop)]
    entropies = np.concatenate([stats_of(dataset[row : row + 1])["entropy"] for row in rows])
    assert figures.entropy.mean == pytest.approx(entropies.mean())
    assert stats(dataset, full=True).sequences == 200


def test_percentiles_of_very_many_positions_come_from_a_sample(write, monkeypatch):
    monkeypatch.setattr("logitstore.look.summaries.SAMPLE", 500)
    dataset = logitstore.open(write(sequences=100, positions=30, k=4))
    figures = stats(dataset, full=True)
    assert 250 < figures.entropy.percentiles_of <= 500 < figures.positions
    values = np.sort(stats_of(dataset)["entropy"])
    for percent, value in figures.entropy.percentiles.items():
        assert abs(np.searchsorted(values, value) / len(values) - int(percent) / 100) < 0.08
    assert figures.entropy.mean == pytest.approx(values.mean())


def test_a_view_is_what_is_looked_at(write):
    dataset = logitstore.open(write(sequences=20, positions=10, chunk_candidates=300))
    assert_spread(stats(dataset[4:9]).entropy, stats_of(dataset[4:9])["entropy"])
    assert_spread(stats(dataset[::-3]).entropy, stats_of(dataset[::-3])["entropy"])


def test_of_sampled_distributions(tmp_path, quiet):
    random = np.random.default_rng(0)
    with logitstore.Writer(tmp_path / "data", logit_width=100) as writer:
        for _ in range(3):
            draws = random.multinomial(50, np.full(10, 0.1), 20)
            writer.add_draws(random.integers(0, 13, 20), np.tile(np.arange(10), (20, 1)), draws, 50)
    dataset = logitstore.open(tmp_path / "data")
    figures = stats(dataset)
    assert figures.coverage is figures.tail is None
    expected = [-(p * np.log(p)).sum() for s in dataset for a, b in zip(s.offsets, s.offsets[1:], strict=False) for p in [s.draws[a:b] / 50]]  # fmt: skip
    assert_spread(figures.entropy, expected)
    assert figures.entropies["draws"] == 60
    assert figures.teaching.cross_entropy_known is None  # of what was drawn alone it would be too low
    assert figures.teaching.cross_entropy_at_least is None
    assert figures.advice == []


def test_of_logprobs_over_the_candidates_only(write):
    dataset = logitstore.open(write(normalised="candidates"))
    figures = stats(dataset)
    assert figures.coverage is figures.tail is None
    expected = []
    for s in dataset:
        for a, b in zip(s.offsets, s.offsets[1:], strict=False):
            p = np.exp(s.logprobs[a:b].astype(np.float64))
            p /= p.sum()
            expected.append(-(p * np.log(p)).sum())
    assert_spread(figures.entropy, expected)
    assert {one.kl_even for one in figures.advice} == {None} == {one.coverage for one in figures.advice}


def test_of_nothing(tmp_path, quiet):
    for name, sequences in (("none", []), ("empty", [[]]), ("unscored", [[1, 2, 3]])):
        with logitstore.Writer(tmp_path / name, logit_width=10) as writer:
            for tokens in sequences:
                writer.add(tokens, [], [], count=np.zeros(len(tokens), int))
        figures = stats(logitstore.open(tmp_path / name))
        assert figures.entropy is figures.coverage is figures.teaching is None
        assert figures.advice == figures.uncertain == []
        assert figures.sequences == len(sequences)
        done = run("stats", tmp_path / name)
        assert done.returncode == 0, done.stderr


def test_duplicates(tmp_path, rows, quiet):
    with logitstore.Writer(tmp_path / "data", logit_width=1000) as writer:
        for number in range(40):
            writer.add(*rows(number % 37 if number != 20 else 5, 20, 4))
    again = stats(logitstore.open(tmp_path / "data")).duplicates
    assert again.sequences == 4
    assert again.examples == [[0, 37], [1, 38], [2, 39], [5, 20]]


def test_the_encodings_are_kept_where_less_is_tried(tmp_path, rows, quiet):
    """As it is, encoded anew, takes what it takes in the file."""
    from logitstore.look.advice import SELECTED, Setting, tried

    ml_dtypes = pytest.importorskip("ml_dtypes")
    for values in ("grid", "float16", "float32", "bfloat16"):
        with logitstore.Writer(tmp_path / values, logit_width=1000, values=values) as writer:
            for number in range(5):
                tokens, ids, logprobs = rows(number, 50, 20)
                if values == "bfloat16":
                    logits = np.full((50, 1000), -30, np.float32)
                    np.put_along_axis(logits, ids, logprobs + 9, axis=1)
                    writer.add_logits(tokens, logits.astype(ml_dtypes.bfloat16).view(np.uint16))
                else:
                    writer.add(tokens, ids, logprobs)
        dataset = logitstore.open(tmp_path / values)
        sequences = list(dataset.select(SELECTED))
        now = tried(sequences, None, dataset.info)
        assert abs(now.bytes - dataset.stored().bytes) < 600, values  # but for the order of ties
        assert now.kl == pytest.approx(0, abs=1e-6)
        assert tried(sequences, Setting("top_k", 10.0), dataset.info).bytes < now.bytes


def test_a_sample_is_not_of_short_sequences_alone(tmp_path, quiet):
    """Chunks are drawn, not sequences: half of the positions are in few long ones."""
    with logitstore.Writer(tmp_path / "data", logit_width=1000, chunk_candidates=2000) as writer:
        for number in range(4040):
            n, k = (8, 4) if number < 4000 else (800, 4)
            p = [0.2, 0.2, 0.2, 0.2] if number < 4000 else [0.9, 0.03, 0.03, 0.03]
            writer.add(np.arange(n), np.tile(np.arange(k), (n, 1)), np.tile(np.log(np.array(p, np.float32)), (n, 1)))
    dataset = logitstore.open(tmp_path / "data")
    figures = stats(dataset)
    assert not figures.full
    assert figures.coverage.mean == pytest.approx(stats(dataset, full=True).coverage.mean, abs=0.06)


def test_few_known_positions_among_very_many(tmp_path, quiet, monkeypatch):
    monkeypatch.setattr("logitstore.look.summaries.SAMPLE", 100)
    with logitstore.Writer(tmp_path / "data", logit_width=10) as writer:
        for number in range(300):
            count = np.zeros(10, int)
            count[3] = number == 77
            writer.add(np.arange(10), [1] * int(count.sum()), np.full(int(count.sum()), -0.5, np.float32), count=count)
    figures = stats(logitstore.open(tmp_path / "data"), full=True)
    assert figures.entropy.n == figures.entropy.percentiles_of == 1


def test_impossible_numbers_are_left_out_and_said(write, monkeypatch):
    """Forged ones: the bytes have their digests."""
    from logitstore.look.compare import compare

    whole = logitstore.open(write("whole"))

    for value in (np.nan, np.inf, -np.inf, 5.0, 1e30):
        path = write("forged", overwrite=True, values="float32")
        dataset = logitstore.open(path)
        original = type(dataset)._decode

        def forged(self, number, chunk, places, value=value, original=original):
            for sequence in original(self, number, chunk, places):
                if "logprobs" in vars(sequence):
                    vars(sequence)["logprobs"][3 * 8] = value
                yield sequence

        with monkeypatch.context() as patched:
            patched.setattr(type(dataset), "_decode", forged)
            figures = stats(dataset)
            assert figures.impossible == len(dataset), value
            assert figures.scored == figures.positions - len(dataset)
            assert figures.coverage.greatest < 1.001
            found = compare(whole, dataset)
            assert found.positions == figures.scored
            assert any("impossible" in note for note in found.notes)


def test_of_whole_distributions(tmp_path, quiet):
    """Every token is a candidate: nothing is outside, whatever rounding says."""
    random = np.random.default_rng(0)
    with logitstore.Writer(tmp_path / "data", logit_width=32) as writer:
        for _ in range(10):
            logits = random.normal(0, 2, (20, 32))
            logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            writer.add(random.integers(0, 32, 20), np.tile(np.arange(32), (20, 1)), logprobs.astype(np.float32))
    figures = stats(logitstore.open(tmp_path / "data"))
    assert figures.advice
    assert all(one.kl_even is not None and 0 <= one.kl_even < 5 for one in figures.advice)


def test_a_users_column_may_be_called_framing(write):
    path = write(per_sequence=lambda i: {"framing": "x" * 1000})
    columns = [(one.name, one.bytes) for one in stats(logitstore.open(path)).columns if one.name == "framing"]
    assert len(columns) == 2
    assert columns[0][1] >= 6000


def run(*arguments):
    command = [sys.executable, "-m", "logitstore_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(write, tmp_path):
    path = write(sequences=20, positions=30, k=8)
    done = run("stats", path)
    assert done.returncode == 0, done.stderr
    for text in (
        "20 sequences, 790 positions",
        "coverage",
        "Entropy, nats",
        "#",
        "--top-k 4",
        "bits a candidate",
        "median",
    ):
        assert text in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    machine = run("stats", path, "--json", "--full", "--workers", "1")
    assert machine.returncode == 0, machine.stderr
    found = json.loads(machine.stdout)
    assert found["full"] is True
    assert found["entropy"]["mean"] == pytest.approx(np.mean(stats_of(logitstore.open(path))["entropy"]), rel=1e-6)
    page = tmp_path / "stats.html"
    first = run("stats", path, "--html", page)
    assert first.returncode == 0, first.stderr
    assert page.read_text().startswith("<!doctype html>")
    again = run("stats", path, "--html", page)
    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    assert run("stats", path, "--html", page, "--overwrite").returncode == 0


def test_a_damaged_chunk_is_one_error(write):
    path = write(sequences=20, positions=30)
    shard = next(path.glob("data/**/*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for workers in ("0", "2"):
        done = run("stats", path, "--full", "--workers", workers)
        assert done.returncode == 1
        assert "chunk 0" in done.stderr
        assert "Traceback" not in done.stderr
    assert run("stats", path.parent / "nowhere").returncode == 1
