"""`split`, `select` and `repack`: what is not to be changed stays bit for bit, and what is changed is accounted for."""

import datetime as dt
import functools
import json
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from restructured import (
    ENCODINGS,
    LABELS,
    add,
    assert_same,
    check_valid,
    everything,
    files,
    make,
    ragged,
    same,
    small_tokenizer,
)
from restructured import run as in_process
from test_merge import killed  # noqa: F401 - a fixture

import logitstore
from logitstore.dataset.shards import Shards
from logitstore.io import LocalStore, MappedFile
from logitstore.shard.reader import Shard
from logitstore.shard.stored import stored_sequences

pytestmark = pytest.mark.usefixtures("quiet")


def messages(path):
    """The bytes of every chunk."""
    info = logitstore.open(path).info
    shards = Shards(LocalStore(path), info)
    return [m.to_pybytes() for n in range(len(info.shards)) for m in shards[n].messages(0, len(shards[n].index) - 1)]


def all_ids(path):
    return [s.id for s in logitstore.open(path)]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_stays_bit_for_bit(tmp_path, encoding):
    path = make(tmp_path / "d", encoding, column=lambda i: {"text": f"t{i}", "number": i})
    before = everything(path)
    assert len(before) == 12
    manifest = logitstore.repack(path, tmp_path / "small", shard_bytes=1)
    logitstore.repack(tmp_path / "small", tmp_path / "back")
    logitstore.select(path, tmp_path / "selected", all_ids(path), shard_bytes=1)
    logitstore.repack(path, tmp_path / "anew", top_k=1000) if encoding != "draws" else None
    logitstore.split(path, tmp_path / "parted", {"a": 0.5, "b": 0.5})
    old = logitstore.open(path).info
    for name in ("small", "back", "selected", "anew", "parted"):
        if not (tmp_path / name).exists():
            continue
        info = check_valid(tmp_path / name)
        assert info.totals.encodings == old.totals.encodings
        assert set(info.totals.encodings) <= {LABELS[encoding], "grid"}  # what has no candidates is `grid`
        assert (info.totals.columns, info.totals.highest_id) == (old.totals.columns, old.totals.highest_id)
        after = {s.id: s for s in everything(tmp_path / name)}
        for sequence in before:
            assert_same(sequence, after.pop(sequence.id))
        assert after == {}
    assert manifest.source.format == "logitstore"
    assert (manifest.source.name, manifest.source.revision) == ("d", old.dataset_digest)
    assert all_ids(tmp_path / "back") == all_ids(tmp_path / "selected") == all_ids(path)
    assert messages(tmp_path / "back") == messages(path)
    assert sorted(all_ids(tmp_path / "parted")) == sorted(all_ids(path))


def test_chunks_written_anew_are_the_same_bytes(tmp_path):
    """The chunks of one writer; not copied, but decoded and encoded."""
    path = make(tmp_path / "d", "grid", sequences=400, lengths=(30, 60), counts=(60, 64), column=lambda i: {"n": i})
    assert len(messages(path)) > 1
    logitstore.select(path, tmp_path / "e", all_ids(path))
    assert messages(tmp_path / "e") == messages(path)


shapes = st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=8)


@given(shapes=shapes, encoding=st.sampled_from(ENCODINGS), top_k=st.integers(1, 6), shard=st.sampled_from([1, 5000]))
@settings(max_examples=10)
def test_ragged_shapes(tmp_path_factory, shapes, encoding, top_k, shard):
    root = tmp_path_factory.mktemp("ragged")
    random = np.random.default_rng(len(shapes))
    with logitstore.Writer(root / "d", logit_width=50, teacher="t", chunk_candidates=7) as writer:
        for number, shape in enumerate(shapes):
            counts = np.array(shape, np.int64)
            tokens = random.integers(0, 50, len(counts))
            ids, logprobs = ragged(random, counts, 50)
            if encoding == "draws":
                sums = counts * 2
                writer.add_draws(tokens, ids, np.full(len(ids), 2), sums, count=counts, id=f"{number}")
            else:
                writer.add(tokens, ids, logprobs, count=counts, id=f"{number}")
    logitstore.repack(root / "d", root / "r", shard_bytes=shard)
    logitstore.select(root / "r", root / "s", [str(n) for n in range(len(shapes))], shard_bytes=shard)
    logitstore.split(root / "d", root / "p", {"a": 0.4, "b": 0.3, "c": 0.3}, seed=3)
    logitstore.merge([root / "p"], root / "m")
    for name in "rspm":
        after = {s.id: s for s in everything(root / name)}
        assert len(after) == len(shapes)
        for sequence in everything(root / "d"):
            assert_same(sequence, after[sequence.id])
    if encoding != "draws":
        logitstore.repack(root / "d", root / "k", top_k=top_k, resolution=1 / 8)
        check_valid(root / "k")
        for a, b in zip(everything(root / "d"), everything(root / "k"), strict=True):
            assert same(np.minimum(a.count, top_k), b.count)


def test_wide_ids_and_mixed_encodings(tmp_path):
    random = np.random.default_rng(1)
    with logitstore.Writer(tmp_path / "d", logit_width=262_144, teacher="t", values="float32") as writer:
        for i in range(6):
            add(writer, random, "float32", f"f{i}", width=262_144, counts=(3, 40))
    make(tmp_path / "e", "grid", logit_width=262_144, counts=(3, 40), prefix="g")
    logitstore.merge([tmp_path / "d", tmp_path / "e"], tmp_path / "m")
    before = everything(tmp_path / "m")
    assert set(check_valid(tmp_path / "m").totals.encodings) == {"float32", "grid"}
    logitstore.repack(tmp_path / "m", tmp_path / "r", resolution=1 / 4)
    assert check_valid(tmp_path / "r").totals.encodings == {"float32": 6, "grid": 12}
    for a, b in zip(before, everything(tmp_path / "r"), strict=True):
        assert_same(a, b, but=("logprobs",) if a.id.startswith("g") else ())


# users' columns


def test_users_columns_keep_their_types_and_what_python_cannot_hold(tmp_path):
    nanoseconds = pa.scalar(1_700_000_000_123_456_789, pa.timestamp("ns"))
    far = pa.scalar(2**60, pa.timestamp("s"))
    schema = pa.schema(
        [
            ("ns", pa.timestamp("ns")), ("far", pa.timestamp("s")), ("small", pa.int8()), ("words", pa.large_utf8()),
            ("map", pa.map_(pa.utf8(), pa.int32())), ("struct", pa.struct([("a", pa.float16()), ("b", pa.list_(pa.int8()))])),
            ("decimal", pa.decimal128(10, 2)), ("nothing", pa.null()), ("fixed", pa.list_(pa.int16(), 2)),
        ]
    )  # fmt: skip

    def arrays(path):
        info = logitstore.open(path).info
        shards = Shards(LocalStore(path), info)
        batches = [shards.chunk(n, c).batch for n in range(len(info.shards)) for c in range(len(shards[n].index))]
        return pa.Table.from_batches([batch.select([0, *range(14, 14 + len(schema))]) for batch in batches])

    # Written as Arrow, since Python's values cannot be given to a writer.
    from logitstore.dataset.origin import Origin
    from logitstore.dataset.part import PartWriter
    from logitstore.dataset.rewrite import KeptColumns
    from logitstore.dataset.settings import Settings
    from logitstore.schema.journal import Part

    make(tmp_path / "d", sequences=9)
    values = {
        "ns": [nanoseconds.as_py() if False else nanoseconds] * 9, "far": [far] * 9, "small": [-5] * 9, "words": ["x" * i for i in range(9)],
        "map": [[("k", i)] for i in range(9)], "struct": [{"a": np.float16(0.5), "b": [i, None]} for i in range(8)] + [None],
        "decimal": [None] * 9, "nothing": [None] * 9, "fixed": [[i, 2] for i in range(9)],
    }  # fmt: skip
    columns = {
        field.name: pa.array(values[field.name], field.type)
        if field.name not in ("ns", "far")
        else pa.array([values[field.name][0].value] * 9, pa.int64()).cast(field.type)
        for field in schema
    }
    info = logitstore.open(tmp_path / "d").info
    shards = Shards(LocalStore(tmp_path / "d"), info)
    plan = Settings.check(
        split="train", values="auto", resolution=1 / 32, temperature=1.0, normalised="vocabulary", logit_width=1000,
        chunk_candidates=60, shard_bytes=4000, cut=logitstore.dataset.settings.Cut(),
    )  # fmt: skip
    writer = PartWriter(tmp_path / "u", Part(split="train"), plan, Origin(), KeptColumns(list(schema)))
    for i, sequence in enumerate(stored_sequences(shards.chunk(0, 0), range(9))):
        sequence.columns.update({name: array.slice(i, 1) for name, array in columns.items()})
        writer.append(sequence, 10)
    writer.close()

    expected = arrays(tmp_path / "u")
    assert expected.schema.field("ns").type == pa.timestamp("ns")
    assert expected.column("ns").cast(pa.int64())[3].as_py() == 1_700_000_000_123_456_789
    ids = [f"s{i}" for i in (7, 1, 3, 8)]
    logitstore.select(tmp_path / "u", tmp_path / "s", ids)
    logitstore.repack(tmp_path / "u", tmp_path / "r", shard_bytes=1)
    logitstore.repack(tmp_path / "u", tmp_path / "k", top_k=2)
    logitstore.split(tmp_path / "u", tmp_path / "p", {"a": 1.0})
    for name in "srkp":
        manifest = check_valid(tmp_path / name)
        assert manifest.user_columns == {field.name: str(field.type) for field in schema}
        wanted = expected.take([1, 3, 7, 8]) if name == "s" else expected
        assert arrays(tmp_path / name).combine_chunks().equals(wanted.combine_chunks())


def test_python_values_of_users_columns(tmp_path):
    day = dt.date(2024, 5, 1)
    path = make(tmp_path / "d", column=lambda i: {"day": day, "list": [i, i + 1], "none": None if i else "x"})
    logitstore.split(path, tmp_path / "p", {"a": 0.5, "b": 0.5})
    for sequence in logitstore.open(tmp_path / "p"):
        i = int(sequence.id[1:])
        assert sequence.columns == {"day": day, "list": [i, i + 1], "none": None if i else "x"}


# split


def test_where_a_sequence_goes_depends_on_its_id_and_the_seed_alone(tmp_path):
    path = make(tmp_path / "d", sequences=300, lengths=(1, 3), counts=(1, 3))

    def parted(source, name, shares, **options):
        manifest = logitstore.split(source, tmp_path / name, shares, **options)
        assert list(manifest.splits) == list(shares)
        dataset = logitstore.open(tmp_path / name)
        return {s.id: split for split in shares for s in dataset.split(split)}

    shares = {"train": 0.8, "test": 0.1, "validation": 0.1}
    first = parted(path, "a", shares)
    sizes = [list(first.values()).count(split) for split in shares]
    assert 215 < sizes[0] < 265
    assert min(sizes[1:]) > 10
    assert parted(path, "b", shares, seed=1) != first
    logitstore.select(path, tmp_path / "few", [f"s{i}" for i in range(0, 300, 7)])
    few = parted(tmp_path / "few", "c", shares)
    assert few == {name: first[name] for name in few}
    assert parted(tmp_path / "a", "again", shares) == first  # in another order, from several splits
    assert all_ids(tmp_path / "a") == [*sorted(first, key=lambda s: (list(shares).index(first[s]), int(s[1:])))]


def test_a_split_that_nothing_falls_into_is_there(tmp_path):
    path = make(tmp_path / "d", sequences=2)
    manifest = logitstore.split(path, tmp_path / "p", {"a": 1 - 2**-40, "b": 2**-40})
    assert manifest.splits["b"].sequences == 0
    check_valid(tmp_path / "p")
    assert logitstore.repack(tmp_path / "p", tmp_path / "r", top_k=1).splits["b"].sequences == 0


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({}, "no shares"), ({"a": 0.5}, "sum to 0.5, not to 1"), ({"a": 0.5, "b": 0.6}, "sum to 1.1"),
        ({"a": 1.0, "b": 0.0}, "share of b is 0"), ({"a": float("nan")}, "share of a is nan"),
        ({"a/b": 1.0}, "split is 'a/b'"),
    ],
)  # fmt: skip
def test_shares_that_are_refused(tmp_path, shares, says):
    path = make(tmp_path / "d", sequences=2)
    with pytest.raises(logitstore.InvalidInputError, match=says):
        logitstore.split(path, tmp_path / "p", shares)
    assert not (tmp_path / "p").exists()
    with pytest.raises(logitstore.InvalidInputError, match="seed"):
        logitstore.split(path, tmp_path / "p", {"a": 1.0}, seed=2**64)


def test_shares_that_float_does_not_sum_to_1(tmp_path):
    path = make(tmp_path / "d", sequences=5)
    assert logitstore.split(path, tmp_path / "p", {str(i): 0.1 for i in range(10)}).totals.sequences == 5


# select


def test_select_in_the_order_of_the_dataset(tmp_path):
    path = make(tmp_path / "d", sequences=30, chunk_candidates=20, shard_bytes=5000)
    done = logitstore.select(path, tmp_path / "s", ["s20", "s3", "s3", "s29"])
    assert (done.missing, all_ids(tmp_path / "s")) == ((), ["s3", "s20", "s29"])
    check_valid(tmp_path / "s")
    for name in ("s3", "s29"):
        assert_same(logitstore.open(path).by_id(name), logitstore.open(tmp_path / "s").by_id(name), but=("logits",))


def test_ids_that_are_missing(tmp_path):
    path = make(tmp_path / "d")
    with pytest.raises(logitstore.SequenceNotFoundError, match=r"7 ids are not in .*'x0', 'x1', .*'x4', \.\.\."):
        logitstore.select(path, tmp_path / "s", ["s1", *(f"x{i}" for i in range(7))])
    with pytest.raises(logitstore.SequenceNotFoundError, match="this id is not in"):
        logitstore.select(path, tmp_path / "s", ["x"])
    assert not (tmp_path / "s").exists()
    done = logitstore.select(path, tmp_path / "s", ["x", "s1", "y"], missing_ok=True)
    assert (done.missing, all_ids(tmp_path / "s")) == (("x", "y"), ["s1"])
    done = logitstore.select(path, tmp_path / "none", ["x"], missing_ok=True)
    assert check_valid(tmp_path / "none").totals.sequences == 0
    assert logitstore.select(tmp_path / "none", tmp_path / "none2", []).manifest.totals.sequences == 0
    with pytest.raises(logitstore.InvalidInputError, match="is the string"):
        logitstore.select(path, tmp_path / "t", "s1")


def test_an_id_with_the_hash_of_another_is_missing(tmp_path, monkeypatch):
    path = make(tmp_path / "d")
    from logitstore.dataset import divide

    true = divide.id_hash
    monkeypatch.setattr(divide, "id_hash", lambda name: true("s4" if name == "other" else name))
    with pytest.raises(logitstore.SequenceNotFoundError, match="'other'"):
        logitstore.select(path, tmp_path / "s", ["s1", "other"])
    assert not (tmp_path / "s").exists()
    assert logitstore.select(path, tmp_path / "s", ["s1", "other"], missing_ok=True).missing == ("other",)
    assert all_ids(tmp_path / "s") == ["s1"]


# repack


def decoded_mass(sequence):
    rows = np.split(np.exp(sequence.logprobs.astype(np.float64)), sequence.offsets[1:-1])
    return np.array([row.sum() for row in rows])


@pytest.mark.parametrize("encoding", ["grid", "wide", "bfloat16", "float16", "float32"])
def test_top_k_leaves_what_it_keeps_and_accounts_for_what_it_drops(tmp_path, encoding):
    path = make(tmp_path / "d", encoding, sequences=20, counts=(0, 30), lengths=(1, 40), top_k=20)
    manifest = logitstore.repack(path, tmp_path / "k", top_k=4)
    assert manifest.sampling.top_k == 4
    check_valid(tmp_path / "k")
    found = 0
    for a, b in zip(everything(path), everything(tmp_path / "k"), strict=True):
        assert same(b.count, np.minimum(a.count, 4))
        for name in ("tokens", "logsumexp", "entropy", "loss_mask"):
            assert same(getattr(a, name), getattr(b, name))
        for t in range(len(a)):
            old, new = slice(a.offsets[t], a.offsets[t + 1]), slice(b.offsets[t], b.offsets[t + 1])
            ids, logprobs = a.ids[old], a.logprobs[old]
            assert same(ids[:4], b.ids[new])
            assert same(logprobs[:4], b.logprobs[new])
            dropped = np.exp(logprobs[4:], dtype=np.float64).sum()
            if len(ids) <= 4:
                assert same(a.tail[t : t + 1], b.tail[t : t + 1])
            else:
                # As near as the tail is stored, and one step where it was rounded before.
                assert abs(b.tail[t] - np.log(np.exp(a.tail[t], dtype=np.float64) + dropped)) < 1.6 / 32
            was = a.target_logprob[t] if a.target_logprob is not None else np.nan
            rank = a.target_rank[t] if a.target_rank is not None else 0
            at = np.flatnonzero(ids[4:] == a.tokens[t + 1]) + 4 if t + 1 < len(a) else []
            if len(at) and np.isnan(was):
                found += 1
                was, rank = logprobs[at[0]], at[0] + 1
            now = b.target_logprob[t] if b.target_logprob is not None else np.nan
            assert np.isnan(was) == np.isnan(now)
            assert np.isnan(was) or was == now
            assert (b.target_rank[t] if b.target_rank is not None else 0) == rank
    assert logitstore.repack(tmp_path / "k", tmp_path / "again", top_k=10).sampling.top_k == 4
    assert found or encoding != "grid"


def test_a_target_that_is_dropped_is_kept(tmp_path):
    with logitstore.Writer(tmp_path / "d", logit_width=10, min_k=3, top_k=3) as writer:
        writer.add([1, 2, 3, 4], [[5, 6, 2], [3, 6, 7], [5, 6, 8], [1, 2, 3]], np.log([[0.5, 0.3, 0.1]] * 4), id="a")
        writer.add([1, 2], [[5, 6, 2]] * 2, np.log([[0.5, 0.3, 0.1]] * 2), target_logprob=[np.nan, -3.5], id="b")
        writer.add(
            [1, 2],
            [[5, 6, 2]] * 2,
            np.log([[0.5, 0.3, 0.1]] * 2),
            target_logprob=[-2.25, -3.5],
            target_rank=[3, 7],
            id="c",
        )
    manifest = logitstore.repack(tmp_path / "d", tmp_path / "k", top_k=2)
    assert (manifest.sampling.top_k, manifest.sampling.min_k) == (2, 2)
    a, b, c = everything(tmp_path / "k")
    before = everything(tmp_path / "d")[0]
    assert a.target_logprob[0] == before.logprobs[2]
    assert np.isnan(a.target_logprob[1:]).all()  # kept among the candidates; not known; nothing follows
    assert a.target_rank.tolist() == [3, 0, 0, 0]
    assert (b.target_logprob.tolist(), b.target_rank.tolist()) == ([before.logprobs[2], -3.5], [3, 0])
    assert (c.target_logprob.tolist(), c.target_rank.tolist()) == ([-2.25, -3.5], [3, 7])
    assert abs(a.tail[0] - np.log(0.2)) < 0.02
    assert manifest.totals.columns == {"tail": 3, "target_logprob": 3, "target_rank": 3}
    check_valid(tmp_path / "k")


def test_a_tail_that_is_missing_or_nothing(tmp_path):
    lp = np.log([[0.6, 0.3, 0.1]] * 3)
    with logitstore.Writer(tmp_path / "d", logit_width=10) as writer:
        writer.add([1, 2, 3], [[5, 6, 7]] * 3, lp, tail=[np.nan, -np.inf, np.log(1e-6)])
    with logitstore.Writer(tmp_path / "c", logit_width=10, normalised="candidates") as writer:
        writer.add([1, 2, 7], [[5, 6, 7]] * 3, lp)
    logitstore.repack(tmp_path / "d", tmp_path / "k", top_k=2)
    (sequence,) = everything(tmp_path / "k")
    assert np.isnan(sequence.tail[0])
    assert np.abs(sequence.tail[1:] - np.log(0.1)).max() < 1 / 32  # the tail and the candidate were rounded
    logitstore.repack(tmp_path / "c", tmp_path / "l", top_k=2)
    (sequence,) = everything(tmp_path / "l")
    assert np.isnan(sequence.tail).all()
    assert sequence.target_rank.tolist() == [0, 3, 0]
    check_valid(tmp_path / "k"), check_valid(tmp_path / "l")


def test_a_coarser_grid(tmp_path):
    path = make(tmp_path / "d", sequences=30, counts=(0, 60), lengths=(1, 30))
    manifest = logitstore.repack(path, tmp_path / "r", resolution=1 / 8)
    assert manifest.sampling.resolution == 1 / 8
    check_valid(tmp_path / "r")
    for a, b in zip(everything(path), everything(tmp_path / "r"), strict=True):
        assert_same(a, b, but=("logprobs",))
        if len(a.ids):
            first = a.offsets[:-1][a.count > 0]
            assert same(a.logprobs[first], b.logprobs[first])
            assert np.abs(a.logprobs - b.logprobs).max() <= 1 / 16 + 1e-5
            steps = np.repeat(b.logprobs[first], b.count[b.count > 0]) - b.logprobs
            assert np.abs(steps * 8 - np.rint(steps * 8)).max() < 1e-3


@pytest.mark.parametrize("step", [1, 3])
def test_rounding_again_does_not_stray_further_than_once(tmp_path, step):
    """Every candidate just below a half: rounded to the even side alone, the sum would be 1.06, which is refused."""
    lp = np.zeros((1, 64), np.float64)
    lp[0, 1:] = -(step + 0.49 * (-1) ** (step // 2)) / 32
    lp -= np.log(np.exp(lp).sum())
    with logitstore.Writer(tmp_path / "d", logit_width=100) as writer:
        writer.add([1], np.arange(64)[None], lp)
    check_valid(tmp_path / "d")
    logitstore.repack(tmp_path / "d", tmp_path / "r", resolution=1 / 16)
    check_valid(tmp_path / "r")


@pytest.mark.parametrize("values", ["grid", "float32"])
def test_a_tail_that_was_rounded_twice_still_completes_the_rest_to_1(tmp_path, values):
    """Flat, steep and nearly tied distributions, with tails of all sizes; cut once and twice, and rounded."""
    random = np.random.default_rng(3)
    with logitstore.Writer(tmp_path / "d", logit_width=200, teacher="t", values=values) as writer:
        for _ in range(12):
            lp = -np.sort(random.exponential(random.choice([0.01, 0.1, 1, 3]), (20, 100)), axis=1)
            lp -= np.log(np.exp(lp).sum(axis=1, keepdims=True) * (1 + random.choice([0, 1e-3, 0.02, 0.3, 5], (20, 1))))
            ids = random.permuted(np.tile(np.arange(200), (20, 1)), axis=1)[:, :100]
            writer.add(random.integers(0, 200, 20), ids, lp)
    logitstore.repack(tmp_path / "d", tmp_path / "a", top_k=40)
    logitstore.repack(tmp_path / "a", tmp_path / "b", top_k=3)
    logitstore.repack(tmp_path / "d", tmp_path / "c", top_k=1, resolution=1 / 8)
    for name in "abc":
        check_valid(tmp_path / name)


def test_wide_gaps_that_become_narrow(tmp_path):
    make(tmp_path / "d", "wide", counts=(3, 5))
    encodings = {
        s.encodings[0] for s in [Shards(LocalStore(tmp_path / "d"), logitstore.open(tmp_path / "d").info).chunk(0, 0)]
    }
    assert encodings == {1}
    logitstore.repack(tmp_path / "d", tmp_path / "r", resolution=1 / 4, top_k=4)
    chunk = Shards(LocalStore(tmp_path / "r"), logitstore.open(tmp_path / "r").info).chunk(0, 0)
    assert set(chunk.encodings.tolist()) == {0}
    check_valid(tmp_path / "r")


def test_repacks_that_are_refused(tmp_path):
    path, drawn = make(tmp_path / "d"), make(tmp_path / "w", "draws")
    for options, says in (
        ({"resolution": 1 / 64}, "a finer one of 0.015625 would claim an accuracy"),
        ({"resolution": 0.3}, "power of two"), ({"top_k": 0}, "at least 1"), ({"shard_bytes": 0}, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(logitstore.InvalidInputError, match=says):
            logitstore.repack(path, tmp_path / "r", **options)
    with pytest.raises(logitstore.InvalidInputError, match="holds draws"):
        logitstore.repack(drawn, tmp_path / "r", top_k=3)
    assert logitstore.repack(drawn, tmp_path / "r", resolution=1 / 64).sampling.resolution == 1 / 64
    make(tmp_path / "f", "float32", counts=(1, 5))
    assert logitstore.repack(tmp_path / "f", tmp_path / "g", resolution=1 / 64).sampling.resolution == 1 / 64
    check_valid(tmp_path / "g")


# all of them


REWRITES = {
    "split": lambda path, out, **o: logitstore.split(path, out, {"a": 0.5, "b": 0.5}, **o),
    "select": lambda path, out, **o: logitstore.select(path, out, ["s1", "s0"], **o),
    "repack": lambda path, out, **o: logitstore.repack(path, out, top_k=1, **o),
    "reshard": logitstore.repack,
}


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_places_that_are_taken(tmp_path, rewrite):
    path = make(tmp_path / "d")
    other = make(tmp_path / "e", prefix="e", shard_bytes=1)
    before = (other / "logitstore.json").read_bytes()
    with pytest.raises(logitstore.DatasetExistsError, match="--overwrite"):
        rewrite(path, other)
    assert (other / "logitstore.json").read_bytes() == before
    (tmp_path / "link").symlink_to(path)
    for place in (path, tmp_path / "link", path / "data" / ".." / "x"):
        with pytest.raises(logitstore.InvalidInputError, match=r"is (in )?the dataset"):
            rewrite(path, place, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(logitstore.DatasetExistsError, match="is a file"):
        rewrite(path, tmp_path / "file", overwrite=True)
    with pytest.raises(logitstore.InvalidInputError, match="is a URL"):
        rewrite(path, "hf://datasets/a/b")
    rewrite(path, other, overwrite=True)
    check_valid(other)
    (tmp_path / "half" / "data" / "train").mkdir(parents=True)
    (tmp_path / "half" / "data" / "train" / "train-00000.arrow.partial").write_text("half")
    with pytest.raises(logitstore.DatasetExistsError, match="unfinished"):
        rewrite(path, tmp_path / "half")
    rewrite(path, tmp_path / "half", overwrite=True)
    check_valid(tmp_path / "half")
    with logitstore.Writer(tmp_path / "busy") as writer:
        with pytest.raises(logitstore.DatasetExistsError, match="writer is at work"):
            rewrite(path, tmp_path / "busy", overwrite=True)
        writer.add([1], [[2]], [[-1.0]])


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_a_damaged_dataset_leaves_nothing(tmp_path, rewrite):
    path = make(tmp_path / "d", sequences=30, chunk_candidates=20, shard_bytes=3000)
    shard = sorted((path / "data" / "train").iterdir())[0 if rewrite is REWRITES["select"] else -1]
    data = bytearray(shard.read_bytes())
    data[Shard(MappedFile(shard)).tail.schema_bytes + 500] ^= 1
    shard.write_bytes(data)
    old = make(tmp_path / "o", prefix="o")
    before = files(old)
    for place in (tmp_path / "out", old):
        with pytest.raises(logitstore.CorruptDataError) as caught:
            rewrite(path, place, overwrite=place == old)
        assert caught.value.path == str(shard)
    assert not (tmp_path / "out").exists()
    assert files(old) == before
    check_valid(old)


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_the_tokenizer_and_the_lineage_come_along(tmp_path, rewrite, tokenizer_directory):
    source = logitstore.Source(format="arrays", name="x", files=("a.npz",))
    path = make(
        tmp_path / "d", tokenizer=tokenizer_directory, source=source, lineage=(logitstore.Source(name="older"),)
    )
    rewrite(path, tmp_path / "out")
    old, new = logitstore.open(path), logitstore.open(tmp_path / "out")
    assert new.info.tokenizer == old.info.tokenizer
    assert new.tokenizer().digest == old.tokenizer().digest
    assert new.info.source == logitstore.Source(format="logitstore", name="d", revision=old.info.dataset_digest)
    assert new.info.lineage == (source, logitstore.Source(name="older"))
    assert new.info.teacher == old.info.teacher
    check_valid(tmp_path / "out")
    rewrite(path, tmp_path / "out", overwrite=True)
    check_valid(tmp_path / "out")
    (path / old.info.tokenizer.files[0].path).write_text("{}")
    with pytest.raises(logitstore.CorruptDataError, match="tokenizer"):
        rewrite(path, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.fixture
def tokenizer_directory(tmp_path):
    return small_tokenizer(tmp_path / "tok")


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_from_the_hub(tmp_path, hub, rewrite):
    path = make(tmp_path / "d", sequences=30, chunk_candidates=20, shard_bytes=3000)
    from logitstore.hub import push

    push(path, "me/d")
    rewrite("hf://datasets/me/d", tmp_path / "remote")
    rewrite(path, tmp_path / "local")
    check_valid(tmp_path / "remote")
    here, there = logitstore.open(tmp_path / "local").info, logitstore.open(tmp_path / "remote").info
    assert here.dataset_digest == there.dataset_digest
    assert there.source.name.startswith("hf://datasets/me/d")


@pytest.mark.parametrize("what", ["reshard", "repack", "split"])
def test_killed_ones_leave_nothing_that_looks_complete(tmp_path, killed, what):  # noqa: F811
    path = make(tmp_path / "d", sequences=30, chunk_candidates=20, tokenizer=small_tokenizer(tmp_path / "tok"))
    start = time.monotonic()
    killed(None, what, tmp_path / "whole", path)
    took = time.monotonic() - start
    whole = logitstore.open(tmp_path / "whole").info
    unfinished = 0
    for number in range(4):
        out = tmp_path / f"o{number}"
        killed(took * (number + 0.5) / 4, what, out, path)
        complete = True
        try:
            logitstore.open(out)
        except (logitstore.IncompleteDatasetError, logitstore.DatasetNotFoundError) as error:
            complete = False
            if isinstance(error, logitstore.IncompleteDatasetError):
                unfinished += 1
                with pytest.raises(logitstore.DatasetExistsError, match="unfinished"):
                    logitstore.repack(path, out)
            if what == "split":
                logitstore.split(path, out, {"a": 0.5, "b": 0.5}, overwrite=True)
            else:
                logitstore.repack(path, out, top_k=3 if what == "repack" else None, shard_bytes=1, overwrite=True)
        assert check_valid(out, killed=complete).dataset_digest == whole.dataset_digest
    assert unfinished


# the commands


@pytest.fixture
def run(monkeypatch, capsys):
    return functools.partial(in_process, monkeypatch, capsys)


def test_the_command_split(tmp_path, run):
    path = make(tmp_path / "d", sequences=40)
    out, err = run("split", path, tmp_path / "p", "--into", "train=2/3", "--into", "test=1/3", "--seed", 5)
    assert err == ""
    assert out.startswith(f"{tmp_path / 'p'}: 40 sequences, ")
    assert "\n  train: " in out
    totals = json.loads(run("split", path, tmp_path / "q", "--into", "a=1", "--json")[0])
    assert totals["splits"]["a"]["sequences"] == 40
    run("split", path, tmp_path / "r", "--into", "a=x", status=2)
    run("split", path, tmp_path / "r", status=2)
    run("split", path, tmp_path / "r", "--into", "a=0.5", "--into", "a=0.5", status=2)
    assert "not to 1" in run("split", path, tmp_path / "r", "--into", "a=0.5", status=1)[1]


def test_the_command_select(tmp_path, run):
    path = make(tmp_path / "d", column=lambda i: {})
    (tmp_path / "ids").write_text("s1\r\ns4\n\ns1\n", newline="")
    out, err = run("select", path, tmp_path / "s", "--ids", tmp_path / "ids", "--id", "s7")
    assert (out[: len(f"{tmp_path / 's'}: 3 seq")], err) == (f"{tmp_path / 's'}: 3 seq", "")
    assert all_ids(tmp_path / "s") == ["s1", "s4", "s7"]
    out, err = run("select", path, tmp_path / "t", "--ids", "-", stdin=b"s2\nnope\n", status=1)
    assert (out, "'nope'" in err, (tmp_path / "t").exists()) == ("", True, False)
    out, err = run(
        "select", path, tmp_path / "t", "--ids", "-", "--missing-ok", "--json", stdin=b"s2\nnope\n", status=3
    )
    assert json.loads(out)["missing"] == ["nope"]
    assert err == f"Note: 1 id is not in {path}: 'nope'\n"
    run("select", path, tmp_path / "u", status=2)
    assert "not UTF-8" in run("select", path, tmp_path / "u", "--ids", "-", stdin=b"\xff", status=1)[1]


def test_the_command_repack(tmp_path, run):
    path = make(tmp_path / "d", sequences=40, chunk_candidates=50)
    run("repack", path, tmp_path / "c", "--shard-size", "5kB")
    assert check_valid(tmp_path / "c").totals.shards > 1
    out, err = run("repack", path, tmp_path / "r", "--resolution", "1/16", "--top-k", 3)
    assert (err, "40 sequences" in out) == ("", True)
    info = check_valid(tmp_path / "r")
    assert (info.sampling.top_k, info.sampling.resolution) == (3, 1 / 16)
    assert "finer" in run("repack", path, tmp_path / "r", "--resolution", "1/64", "--overwrite", status=1)[1]
    assert json.loads(run("repack", path, tmp_path / "r", "--overwrite", "--json")[0])["totals"]["sequences"] == 40
