"""Several teachers: the mixture against dense distributions that are known in full."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitstore
from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, InvalidTypeError, LogitStoreWarning, NotSelectedError
from logitstore.shard.sequence import Sequence
from logitstore.torch.pack import Packed
from logitstore.torch.source import of_dataset
from logitstore.torch.teachers import Teachers, mixture

WIDTH = 12


class Made:
    """Samples of the sequences given."""

    tokenizer_digest = "t"
    normalised = "vocabulary"

    def __init__(self, sequences, digest="made", **attributes):
        self.sequences = sequences
        self.digest = digest
        self.logit_width = WIDTH
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.sequences)

    def __getitem__(self, row):
        return self.sequences[row]


def stored(full, counts, tokens=None, name="s", **fields):
    """The best candidates of full distributions [T, WIDTH], so many a position, as a reader hands them out."""
    count = np.array(counts, np.uint32)
    order = np.argsort(-full, axis=1, kind="stable")
    ids = np.concatenate([np.empty(0, np.int32), *(o[:n] for o, n in zip(order, counts, strict=True))])
    kept = full[ragged.rows(count), ids.astype(int)]
    with np.errstate(divide="ignore"):
        tail = np.where(count > 0, np.log(np.maximum(1 - ragged.row_sums(kept, count), 1e-300)), np.nan)
    return Sequence.of({
        "id": name, "tokens": np.arange(len(count), dtype=np.uint32) if tokens is None else np.array(tokens, np.uint32),
        "count": count, "offsets": ragged.offsets(count), "ids": ids.astype(np.int32),
        "logprobs": np.log(kept).astype(np.float32), "draws": None, "logits": None, "tail": tail.astype(np.float32),
        "target_logprob": None, "target_rank": None, "logsumexp": None, "entropy": None, "loss_mask": None,
        "columns": {},
    } | fields)  # fmt: skip


def distributions(seed, teachers, positions):
    return np.random.default_rng(seed).dirichlet(np.full(WIDTH, 0.5), (teachers, positions)).clip(1e-9, None)


@st.composite
def cases(draw, least=1):
    teachers, positions = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    counts = draw(
        st.lists(
            st.lists(st.integers(least, WIDTH), min_size=positions, max_size=positions),
            min_size=teachers,
            max_size=teachers,
        )
    )
    weights = draw(st.lists(st.floats(0.05, 5), min_size=teachers, max_size=teachers))
    full = distributions(draw(st.integers(0, 999)), teachers, positions)
    return full / full.sum(axis=2, keepdims=True), counts, weights


def rows_of(sequence):
    for t in range(len(sequence.count)):
        at = slice(sequence.offsets[t], sequence.offsets[t + 1])
        yield sequence.ids[at], np.exp(sequence.logprobs[at], dtype=float)


@given(cases(), st.none() | st.integers(1, WIDTH))
def test_the_true_mixture_lies_within_the_bounds(case, k):
    full, counts, weights = case
    teachers = Teachers([Made([stored(p, c)]) for p, c in zip(full, counts, strict=True)], weights, k=k)
    out = teachers[0]
    truth = np.einsum("i,itx->tx", np.array(weights) / sum(weights), full)
    slack, tail = out.columns["mixture_slack"], np.exp(out.tail, dtype=float)
    near = 1e-5
    for t, (ids, mass) in enumerate(rows_of(out)):
        union = {int(i) for p, c in zip(full, counts, strict=True) for i in np.argsort(-p[t], kind="stable")[: c[t]]}
        assert len(ids) == len(set(ids.tolist())) == min(len(union), k or WIDTH)
        assert set(ids.tolist()) <= union
        assert (np.diff(mass) <= 0).all()
        assert (mass <= truth[t, ids] + near).all()
        assert (truth[t, ids] <= mass + slack[t] + near).all()
        assert truth[t, ids].sum() <= mass.sum() + slack[t] + near  # the slack is for all candidates together
        outside = 1 - truth[t, ids].sum()
        assert tail[t] - slack[t] - near <= outside <= tail[t] + near
        assert mass.sum() + tail[t] == pytest.approx(1, abs=near)


@given(cases())
def test_candidates_that_all_teachers_stored_are_exact(case):
    full, counts, weights = case
    counts = [[WIDTH] * len(c) for c in counts]
    out = Teachers([Made([stored(p, c)]) for p, c in zip(full, counts, strict=True)], weights)[0]
    truth = np.einsum("i,itx->tx", np.array(weights) / sum(weights), full)
    for t, (ids, mass) in enumerate(rows_of(out)):
        assert mass == pytest.approx(truth[t, ids], rel=1e-4)
    assert (out.columns["mixture_slack"] < 1e-6).all()


@given(cases(least=0))
def test_positions_without_a_teacher(case):
    full, counts, weights = case
    samples = [Made([stored(p, c)]) for p, c in zip(full, counts, strict=True)]
    none, skip = (Teachers(samples, weights, missing=missing)[0] for missing in ("none", "skip"))
    present = np.array(counts) > 0
    assert (none.count > 0).tolist() == present.all(axis=0).tolist()
    assert (skip.count > 0).tolist() == present.any(axis=0).tolist()
    for out in (none, skip):
        assert np.isnan(out.tail).tolist() == (out.count == 0).tolist()
        assert np.isnan(out.columns["mixture_slack"]).tolist() == (out.count == 0).tolist()
    for t, (ids, mass) in enumerate(rows_of(skip)):
        share = np.array(weights) * present[:, t]
        if share.any():
            truth = share @ full[:, t] / share.sum()
            slack = skip.columns["mixture_slack"][t]
            assert ((mass <= truth[ids] + 1e-5) & (truth[ids] <= mass + slack + 1e-5)).all()
            assert mass.sum() + np.exp(skip.tail[t], dtype=float) == pytest.approx(1, abs=1e-5)


def test_the_slack_is_that_of_the_faintest_candidate_or_the_tail():
    one = np.array([[0.5, 0.3, 0.1, 0.1]])
    two = np.array([[0.0, 0.0, 0.6, 0.4]]) + 1e-12
    out = mixture([stored(one, [2]), stored(two, [1])], [0.5, 0.5])
    # Of teacher 0 candidate 2 is missing: at most 0.2, its tail. Of teacher 1 candidates 0 and 1: at most its tail, 0.4.
    assert out.columns["mixture_slack"][0] == pytest.approx(0.5 * 0.2 + 0.5 * 0.4)
    out = mixture([stored(one, [3]), stored(two, [1])], [0.5, 0.5])
    assert out.columns["mixture_slack"][0] == pytest.approx(0.5 * 0.4)
    flat = np.full((1, WIDTH), 1 / WIDTH)
    peak = flat[:, ::-1] * 0 + np.eye(WIDTH)[-1]
    out = mixture([stored(flat, [3]), stored(peak, [1])], [0.5, 0.5])
    assert out.columns["mixture_slack"][0] == pytest.approx(0.5 / WIDTH, abs=1e-6)


def test_a_tail_that_is_not_stored_is_what_the_candidates_leave():
    p = np.array([[0.5, 0.3, 0.2]])
    given_, missing = stored(p, [2]), stored(p, [2], tail=np.array([np.nan], np.float32))
    assert mixture([missing], [1]).tail == pytest.approx(given_.tail, abs=1e-5)


def test_target_logprobs_mix_and_are_unknown_where_one_is():
    p = np.array([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]])
    nan = np.nan
    one = stored(p, [1, 1, 1], target_logprob=np.log([0.5, 0.25, 0.5], dtype=np.float32))
    two = stored(p, [1, 1, 0], target_logprob=np.array([np.log(0.1), nan, nan], np.float32))
    out = mixture([one, two], [0.5, 0.5])
    assert out.target_logprob == pytest.approx(np.log([0.3, nan, nan]), nan_ok=True)
    skipped = mixture([one, two], [0.5, 0.5], missing="skip")
    assert skipped.target_logprob == pytest.approx(np.log([0.3, nan, 0.5]), nan_ok=True)
    assert mixture([stored(p, [1, 1, 1])], [1]).target_logprob is None


def test_a_position_is_trained_on_unless_one_teacher_says_no():
    p = np.full((4, 2), 0.5)
    masks = np.array([[1, 1, -1, -1], [1, 0, 0, -1], [-1, 1, -1, -1]], np.int8)
    out = mixture([stored(p, [1] * 4, loss_mask=mask) for mask in masks], [1 / 3] * 3)
    assert out.loss_mask.tolist() == [1, 0, 0, -1]
    assert mixture([stored(p, [1] * 4)], [1]).loss_mask is None


def test_what_a_mixture_does_not_determine_is_none_and_the_rest_stays():
    p = np.full((2, 2), 0.5)
    out = mixture(
        [stored(p, [1, 1], tokens=[5, 6], name="x", columns={"lang": "de"}, entropy=np.ones(2, np.float32))], [1]
    )
    assert (out.id, out.tokens.tolist(), out.columns["lang"]) == ("x", [5, 6], "de")
    assert (out.draws, out.logits, out.target_rank, out.logsumexp, out.entropy) == (None,) * 5
    assert [out.tokens.dtype, out.count.dtype, out.offsets.dtype, out.ids.dtype, out.logprobs.dtype, out.tail.dtype] == [
        np.uint32, np.uint32, np.int64, np.int32, np.float32, np.float32,
    ]  # fmt: skip


def test_other_sequences_are_named_with_the_first_position_that_differs():
    p = np.full((3, 2), 0.5)
    base = Made([stored(p, [1] * 3, tokens=[1, 2, 3])])
    with pytest.raises(InvalidInputError, match=r"row 0: teacher 0 has the sequence 's', teacher 1 has 'other'"):
        Teachers([base, Made([stored(p, [1] * 3, tokens=[1, 2, 3], name="other")])])[0]
    with pytest.raises(
        InvalidInputError, match=r"'s': at position 1 the token of teacher 0 is 2, that of teacher 1 is 9"
    ):
        Teachers([base, Made([stored(p, [1] * 3, tokens=[1, 9, 9])])])[0]
    with pytest.raises(InvalidInputError, match=r"3 tokens, teacher 1 has 2; .* up to position 2"):
        Teachers([base, Made([stored(p[:2], [1] * 2, tokens=[1, 2])])])[0]


def test_teachers_that_cannot_be_mixed_are_refused_with_the_reason():
    p = np.full((3, 2), 0.5)
    one = stored(p, [1] * 3)
    with pytest.raises(InvalidInputError, match=r"teacher 1 is normalised over its candidates.*over the vocabulary"):
        Teachers([Made([one]), Made([one], normalised="candidates")])
    with pytest.raises(InvalidInputError, match=r"different tokenizers \(t, u\)"):
        Teachers([Made([one]), Made([one], tokenizer_digest="u")])
    with pytest.raises(InvalidInputError, match="1, 2 sequences"):
        Teachers([Made([one]), Made([one, one])])
    with pytest.raises(InvalidInputError, match="at least one"):
        Teachers([])
    with pytest.raises(InvalidInputError, match="teacher 0 holds draws"):
        Teachers([Made([stored(p, [1] * 3, draws=np.ones(3, np.int32))])])[0]
    with pytest.warns(LogitStoreWarning, match="tokenizer of teacher 1 is not known"):
        Teachers([Made([one]), Made([one], tokenizer_digest=None)])


def test_wrong_arguments():
    one = Made([stored(np.full((1, 2), 0.5), [1])])
    for weights in ([1], [1, 0], [1, -1], [1, np.inf], [1, np.nan]):
        with pytest.raises(InvalidInputError, match="weights"):
            Teachers([one, one], weights)
    with pytest.raises(InvalidTypeError, match="'none', 'skip'"):
        Teachers([one], missing="renormalise")
    with pytest.raises(InvalidInputError, match="k is 0"):
        Teachers([one], k=0)


def test_digest_and_widths():
    one = Made([stored(np.full((1, 2), 0.5), [1])])
    other = Made(one.sequences, "other", logit_width=99)
    mixed = [
        Teachers([one, other]), Teachers([other, one]), Teachers([one, other], [2, 1]), Teachers([one, other], k=3),
        Teachers([one, other], missing="skip"),
    ]  # fmt: skip
    assert len({teachers.digest for teachers in mixed}) == 5
    assert Teachers([one, other], [3, 3]).digest == mixed[0].digest
    assert (mixed[0].logit_width, mixed[0].tokenizer_digest, mixed[0].normalised) == (99, "t", "vocabulary")
    assert Teachers([one, Made(one.sequences, logit_width=None)]).logit_width is None
    assert mixed[0].lengths().tolist() == [1]


@pytest.mark.filterwarnings("ignore:the tokenizer")
def test_teachers_of_datasets_can_be_packed(tmp_path, rows, quiet):
    samples = []
    for k in (3, 5):
        with logitstore.Writer(tmp_path / str(k), logit_width=1000) as writer:
            for seed in range(6):
                tokens, ids, logprobs = rows(seed, 10 + seed, 5)
                writer.add(tokens, ids[:, :k], logprobs[:, :k])
        samples.append(of_dataset(logitstore.open(tmp_path / str(k))))
    packed = Packed(Teachers(samples, [1, 3]), 32)
    packs = [packed[i] for i in range(len(packed))]
    tokens = np.concatenate([sequence.tokens for sequence in samples[0].dataset])
    assert sorted(np.concatenate([pack.tokens for pack in packs]).tolist()) == sorted(tokens.tolist())
    assert all((pack.count == 5).all() for pack in packs)  # the three of the one are among the five of the other


def test_a_column_that_was_not_selected_is_named(write):
    samples = of_dataset(logitstore.open(write()).select(["tokens", "ids"]))
    with pytest.raises(NotSelectedError):
        Teachers([samples])[0]


@pytest.mark.usefixtures("quiet")
def test_teachers_are_given_as_paths_and_their_temperatures_compared(write):
    one, other = write("one", values="float32"), write("other", values="float32", temperature=2.0)
    assert len(Teachers([one, logitstore.open(one)])) == 6
    with pytest.warns(logitstore.LogitStoreWarning, match=r"temperatures \(1\.0, 2\.0\)"):
        Teachers([one, other])
