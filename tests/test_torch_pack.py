"""Packing: every token once, its rows with it, and little padding."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitstore
from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, InvalidTypeError, RowIndexError
from logitstore.shard.encoded import EncodedSequence
from logitstore.shard.sequence import Sequence
from logitstore.torch.collate import HFCollator
from logitstore.torch.pack import Packed, cut, joined, lengths_of, plan_best_fit, plan_split
from logitstore.torch.source import of_dataset


class Made:
    """Sequences of given lengths: tokens are numbered through, and row of token n has n % 4 candidates that say n."""

    digest = "made"
    tokenizer_digest = "t"
    logit_width = 10**6
    normalised = "vocabulary"

    def __init__(self, lengths, optional=None):
        self.sizes = list(lengths)
        self.starts = np.append(0, np.cumsum(self.sizes)).astype(np.int64)
        self.optional = optional

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, row):
        tokens = np.arange(self.starts[row], self.starts[row + 1])
        count = (tokens % 4).astype(np.uint32)
        return Sequence.of({
            "id": f"s{row}", "tokens": tokens.astype(np.uint32), "count": count, "offsets": ragged.offsets(count),
            "ids": np.repeat(tokens, count).astype(np.int32), "logprobs": -np.repeat(tokens, count).astype(np.float32),
            "draws": None, "logits": None, "tail": -tokens.astype(np.float32), "target_logprob": None,
            "target_rank": None, "logsumexp": None, "entropy": None, "loss_mask": None, "columns": {"user": 1},
        } | (self.optional(row) if self.optional else {}))  # fmt: skip


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)
methods = st.sampled_from(["best-fit", "split"])


@given(lengths, st.integers(1, 30), methods, st.integers(0, 5), st.integers(1, 20))
def test_every_token_appears_once_and_its_row_travels_with_it(lengths, length, method, seed, window):
    packed = Packed(Made(lengths), length, method, seed, window=window)
    packs = [packed[i] for i in range(len(packed))]
    tokens = np.concatenate([pack.tokens for pack in packs])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    assert packed.lengths().tolist() == [len(pack) for pack in packs]
    for pack in packs:
        assert 1 <= len(pack) <= length
        assert pack.count.tolist() == (pack.tokens % 4).tolist()
        assert pack.offsets.tolist() == ragged.offsets(pack.count).tolist()
        assert pack.ids.tolist() == np.repeat(pack.tokens, pack.count).tolist()
        assert (pack.logprobs == -pack.ids).all()
        assert (pack.tail == -pack.tokens.astype(np.float32)).all()
    if method == "split":
        assert all(len(pack) == length for pack in packs[:-1])


@given(lengths, st.integers(1, 30), methods, st.integers(0, 5))
def test_documents_are_numbered_and_their_positions_begin_anew(lengths, length, method, seed):
    samples = Made(lengths)
    packed = Packed(samples, length, method, seed)
    for i in range(len(packed)):
        pack = packed[i]
        documents, positions = pack.columns["document_ids"], pack.columns["position_ids"]
        assert documents.dtype == positions.dtype == np.int32
        assert documents[0] == 0
        assert np.isin(np.diff(documents), (0, 1)).all()
        for document in range(documents[-1] + 1):
            own = pack.tokens[documents == document].astype(int)
            assert (np.diff(own) == 1).all()
            assert positions[documents == document].tolist() == list(range(len(own)))
            assert len(set(np.searchsorted(samples.starts, own, side="right"))) == 1


@given(lengths, st.integers(1, 30), st.integers(1, 20))
def test_best_fit_cuts_only_what_is_too_long_and_leaves_no_two_packs_of_a_window_that_fit_together(
    lengths, length, window
):
    plan = plan_best_fit(np.array(lengths, np.uint32), length, 7, window)
    sizes = plan.stop.astype(int) - plan.start
    for row, start, size in zip(plan.row, plan.start, sizes, strict=True):
        assert start % length == 0
        assert size == min(length, lengths[row] - start)
    filled = plan.lengths()
    windows = plan.row[plan.offsets[:-1]] // window
    for number in set(windows.tolist()):
        fill = np.sort(filled[windows == number].astype(int))
        assert len(fill) < 2 or fill[0] + fill[1] > length


@given(lengths, st.integers(1, 30))
def test_best_fit_gives_as_many_packs_as_first_fit_decreasing(lengths, length):
    free = []
    for size in sorted((min(length, n - at) for n in lengths for at in range(0, n, length)), reverse=True):
        place = next((i for i, room in enumerate(free) if room >= size), None)
        if place is None:
            free.append(length - size)
        else:
            free[place] -= size
    plan = plan_best_fit(np.array(lengths, np.uint32), length, 7, 1000)
    assert sorted(plan.lengths().tolist()) == sorted(length - room for room in free)


def test_best_fit_fills_packs_of_real_looking_lengths():
    random = np.random.default_rng(0)
    sizes = np.clip(random.lognormal(6, 1, 20_000), 1, 9000).astype(np.uint32)
    plan = plan_best_fit(sizes, 2048, 1)
    assert plan.lengths().sum() / (len(plan) * 2048) > 0.99


def test_a_seed_is_another_order_and_the_same_seed_the_same():
    sizes = np.random.default_rng(0).integers(1, 30, 500)
    for method in ("best-fit", "split"):
        first, again, other = (Packed(Made(sizes), 64, method, seed) for seed in (1, 1, 2))
        assert first.digest == again.digest != other.digest
        assert first.plan.row.tolist() == again.plan.row.tolist() != other.plan.row.tolist()


def test_the_plan_stays_what_it_is():
    sizes = np.array([5, 3, 9, 1, 4, 0, 2, 7], np.uint32)
    best = plan_best_fit(sizes, 8, 12345, 4)
    assert best.row.tolist() == [0, 1, 2, 2, 3, 4, 6, 7]
    assert best.offsets.tolist() == [0, 2, 3, 5, 7, 8]
    split = plan_split(sizes, 8, 12345, 4)
    assert list(zip(split.row.tolist(), split.start.tolist(), split.stop.tolist(), strict=True)) == [
        (1, 0, 3),
        (0, 0, 5),
        (2, 0, 8),
        (2, 8, 9),
        (3, 0, 1),
        (6, 0, 2),
        (4, 0, 4),
        (7, 0, 7),
    ]
    assert split.offsets.tolist() == [0, 2, 3, 7, 8]


def test_windows_keep_near_samples_together():
    packed = Packed(Made([3] * 100), 12, window=10)
    for i in range(len(packed)):
        rows = packed.plan.row[packed.plan.offsets[i] : packed.plan.offsets[i + 1]]
        assert len(set((rows // 10).tolist())) == 1


def test_digest_changes_with_every_setting():
    packs = [
        Packed(Made([9, 9]), 4), Packed(Made([9, 9]), 5), Packed(Made([9, 9]), 4, "split"), Packed(Made([9, 9]), 4, seed=1),
        Packed(Made([9, 9]), 4, window=2), Packed(Made([9, 9]), 4, "split", drop_last=True),
    ]  # fmt: skip
    other = Made([9, 9])
    other.digest = "other"
    assert len({pack.digest for pack in [*packs, Packed(other, 4)]}) == 7


def test_drop_last_leaves_out_the_short_pack():
    kept, dropped = (Packed(Made([7, 6]), 4, "split", drop_last=drop) for drop in (False, True))
    assert kept.lengths().tolist() == [4, 4, 4, 1]
    assert dropped.lengths().tolist() == [4, 4, 4]
    assert (kept.fill, dropped.fill) == (13 / 16, 1)


@given(st.integers(0, 9), st.integers(0, 10))
def test_a_cut_sequence_is_a_sequence_of_its_own(start, size):
    whole = Made([3, 10, 5])[1]
    part = cut(whole, start, min(10, start + size))
    assert part.tokens.tolist() == whole.tokens[start : start + size].tolist()
    assert part.offsets.tolist() == ragged.offsets(part.count).tolist()
    assert part.ids.tolist() == np.repeat(part.tokens, part.count).tolist()
    assert (part.id, part.columns) == (whole.id, whole.columns)


def test_optional_columns_are_unknown_where_a_sequence_has_none():
    def optional(row):
        size = [2, 3][row]
        return {
            "target_logprob": np.full(size, -1.5, np.float32), "target_rank": np.full(size, 2),
            "loss_mask": np.zeros(size, np.int8), "draws": np.ones(1, np.int32),
        } if row == 0 else {}  # fmt: skip

    samples = Made([2, 3], optional)
    pack = joined("p", [cut(samples[0], 0, 2), cut(samples[1], 0, 3)])
    assert pack.loss_mask.tolist() == [0, 0, -1, -1, -1]
    assert pack.target_rank.tolist() == [2, 2, 0, 0, 0]
    assert np.isnan(pack.target_logprob).tolist() == [False, False, True, True, True]
    assert pack.draws is None
    assert pack.entropy is None


def test_a_column_that_was_not_selected_is_missing_in_the_pack_too(write):
    dataset = logitstore.open(write()).select(["tokens", "count"])
    pack = joined("p", [cut(dataset[0], 2, 5), dataset[1]])
    assert pack.tokens.tolist() == [*dataset[0].tokens[2:5].tolist(), *dataset[1].tokens.tolist()]
    with pytest.raises(logitstore.LogitStoreError, match="not selected"):
        _ = pack.ids


def test_packs_of_a_dataset_collate_and_labels_stop_at_documents(write):
    dataset = logitstore.open(write(sequences=6, positions=5, k=4))

    packed = Packed(of_dataset(dataset), 16)
    batch = HFCollator()([packed[i] for i in range(len(packed))])
    assert int(batch["attention_mask"].sum()) == sum(len(sequence) for sequence in dataset)
    assert batch["target_mask"].equal(batch["attention_mask"].bool())
    labels = (batch["labels"] != -100).sum()
    assert int(labels) == sum(len(sequence) - 1 for sequence in dataset)
    assert batch["target_next"][:, :-1].equal(batch["labels"][:, 1:])


def test_lengths_are_asked_for_where_samples_know_them():
    class Knows(Made):
        def lengths(self):
            return np.array(self.sizes)

        def __getitem__(self, row):
            raise AssertionError

    assert lengths_of(Knows([3, 4])).tolist() == [3, 4]
    assert lengths_of(Made([3, 4])).tolist() == [3, 4]
    wrong = Knows([3, 4])
    wrong.lengths = lambda: np.array([3])
    with pytest.raises(InvalidInputError, match="2 samples"):
        lengths_of(wrong)


def test_packs_are_samples():
    packed = pickle.loads(pickle.dumps(Packed(Made([5, 5]), 5)))
    assert (packed.tokenizer_digest, packed.logit_width, packed.normalised) == ("t", 10**6, "vocabulary")
    assert packed[-1].id == "pack-1"
    assert packed[0].columns.keys() == {"position_ids", "document_ids"}
    with pytest.raises(RowIndexError, match="pack 2 of 2"):
        packed[2]


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(InvalidTypeError, match="'best-fit', 'split'"):
        Packed(Made([3]), 4, "first-fit")
    with pytest.raises(InvalidInputError, match="length from 1"):
        Packed(Made([3]), 0)
    with pytest.raises(InvalidInputError, match="window"):
        Packed(Made([3]), 4, window=0)
    with pytest.raises(InvalidInputError, match="drop_last"):
        Packed(Made([3]), 4, drop_last=True)
    with pytest.raises(InvalidInputError, match="more data"):
        Packed(Made([3]), 4, "split", drop_last=True)
    with pytest.raises(InvalidInputError, match="no pack"):
        Packed(Made([0]), 4)


def test_sequences_that_are_still_encoded_are_refused():
    with pytest.raises(InvalidTypeError, match="decode='cpu'"):
        cut(EncodedSequence.of({"tokens": np.arange(3)}), 0, 2)


def test_what_is_packed_may_be_a_path_or_a_dataset(write):
    path = write(sequences=9)
    assert Packed(path, 32).digest == Packed(logitstore.open(path), 32).digest
