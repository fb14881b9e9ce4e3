"""The order of samples: a permutation of every epoch, computed on demand, that never changes."""

import collections
import math
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitstore
from logitstore.torch.order import Order, Permutation, mix, order_key
from logitstore.torch.source import Mixture, Samples, Shuffled, Source, apportion, as_source, check_student, of_dataset

# Fixed for ever: checkpoints of runs that use an order must go on in the same one.
PERMUTATION_10 = [2, 6, 4, 8, 5, 7, 0, 9, 3, 1]
PERMUTATION_BILLION = [883581229, 996065678, 762716854, 224917981]
KEY_ZERO = 6306375277838072150
KEY_OTHER = 16407074468674733444
ORDER_BLOCKS = [172, 2303, 9768, 4013, 892, 2506, 9551, 7418]
ORDER_FULL = [955, 3775, 3996, 6600, 8938, 8964, 4646, 8069]
MIXTURE_DIGEST = "mixture:14c1cd5ea88275894ec44aca91bced4d"
MIXTURE_PLACES = [(1, 333), (1, 181), (1, 325), (1, 261), (0, 179), (1, 157)]


class Rows:
    """Samples that are their own row numbers."""

    def __init__(self, size, digest="rows", tokenizer_digest="f" * 64, logit_width=None, normalised="vocabulary"):
        self.size = size
        self.digest = digest
        self.tokenizer_digest = tokenizer_digest
        self.logit_width = logit_width
        self.normalised = normalised

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        return self.digest, row


sizes = st.integers(1, 2000)
keys = st.integers(0, 2**64 - 1)
shuffles = st.sampled_from(["blocks", "full", "none"])


def test_mix_is_that_of_splitmix64():
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # its first output from the seed 0


def test_permutation_golden_values():
    assert [Permutation(10, 1)(i) for i in range(10)] == PERMUTATION_10
    assert [Permutation(10**9, 2**63 + 5)(i) for i in (0, 1, 2, 10**9 - 1)] == PERMUTATION_BILLION


def test_key_golden_values():
    assert order_key("d", 0, 0, "blocks") == KEY_ZERO
    assert order_key("d", -1, 7, "window 3") == KEY_OTHER


@pytest.mark.parametrize(("shuffle", "expected"), [("blocks", ORDER_BLOCKS), ("full", ORDER_FULL)])
def test_order_golden_values(shuffle, expected):
    order = Order(10_000, "0123456789abcdef", 17, shuffle)
    assert [order.row(3, place) for place in (0, 1, 2, 4095, 4096, 8191, 9000, 9999)] == expected


@given(sizes, keys)
def test_permutation_is_one_and_inverse_undoes_it(size, key):
    permutation = Permutation(size, key)
    image = [permutation(value) for value in range(size)]
    assert sorted(image) == list(range(size))
    assert [permutation.inverse(value) for value in image] == list(range(size))


@given(sizes, st.integers(0, 5), st.integers(0, 3), shuffles, st.integers(1, 40), st.integers(1, 20))
def test_every_sample_appears_once_an_epoch(size, seed, epoch, shuffle, block, window):
    order = Order(size, "d", seed, shuffle, block=block, window=window)
    assert sorted(order.row(epoch, place) for place in range(size)) == list(range(size))


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 6), st.integers(0, 1000))
def test_a_window_holds_whole_blocks_and_nothing_else(blocks, block, window, seed):
    size = max(1, blocks * block - seed % block)
    order = Order(size, "d", seed, block=block, window=window)
    rows = [order.row(0, place) for place in range(size)]
    block_sizes = collections.Counter(row // block for row in range(size))
    while rows:
        inside = collections.Counter()
        while rows and (len(inside) < window or rows[0] // block in inside):
            inside[rows.pop(0) // block] += 1
            if len(inside) == window and sum(inside.values()) == sum(block_sizes[number] for number in inside):
                break
        assert inside == {number: block_sizes[number] for number in inside}


def test_the_short_last_block_does_not_stay_at_the_end():
    places = set()
    for seed in range(40):
        order = Order(1030, "d", seed, block=256, window=1)
        rows = [order.row(0, place) for place in range(1030)]
        places.add(rows.index(1029) // 256)
    assert len(places) == 5


@pytest.mark.parametrize("shuffle", ["blocks", "full"])
def test_another_digest_seed_or_epoch_is_another_order(shuffle):
    def rows(digest, seed, epoch):
        return tuple(Order(1000, digest, seed, shuffle).row(epoch, place) for place in range(50))

    orders = {rows(digest, seed, epoch) for digest in "ab" for seed in (0, 1, -1) for epoch in (0, 1, 2)}
    assert len(orders) == 18


@pytest.mark.parametrize(("shuffle", "limit"), [("blocks", 0.06), ("full", 0.03)])
def test_places_and_rows_do_not_correlate(shuffle, limit):
    size = 20_000
    rows = np.array([Order(size, "d", 1, shuffle).row(0, place) for place in range(size)])
    within = rows[:4096]
    assert abs(np.corrcoef(np.arange(4096), within)[0, 1]) < limit
    assert abs(np.corrcoef(within[:-1], within[1:])[0, 1]) < limit
    assert np.mean(np.abs(np.diff(within)) == 1) < 0.002  # neighbours do not stay neighbours


def test_shuffled_batches_mix_many_blocks():
    order = Order(100_000, "d", 5)
    blocks = [len({order.row(0, batch * 32 + i) // 256 for i in range(32)}) for batch in range(100)]
    assert min(blocks) >= 8
    assert np.mean(blocks) > 12  # 13.97 is expected of 32 draws from 16 blocks


def test_first_places_of_small_sizes_are_evenly_taken():
    for size in (2, 3, 5, 7):
        times = collections.Counter(Order(size, "d", seed, "full").row(0, 0) for seed in range(3000))
        spread = sum((times[row] - 3000 / size) ** 2 / (3000 / size) for row in range(size))
        assert spread < size - 1 + 6 * math.sqrt(2 * size)


def test_a_billion_samples_take_no_memory():
    tracemalloc.start()
    for shuffle in ("blocks", "full"):
        order = Order(10**9, "d", 0, shuffle)
        rows = {order.row(epoch, place) for epoch in (0, 1) for place in range(0, 10**9, 10**7)}
        assert all(0 <= row < 10**9 for row in rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_an_order_that_cannot_be_is_refused():
    with pytest.raises(logitstore.InvalidInputError, match="no samples"):
        Order(0, "d", 0)
    with pytest.raises(logitstore.InvalidTypeError, match="'blocks', 'full', 'none'"):
        Order(1, "d", 0, "random")
    with pytest.raises(logitstore.InvalidInputError, match="from 1 on"):
        Order(1, "d", 0, block=0)
    for value in (-1, 10, 12, 16):
        for move in (Permutation(10, 1), Permutation(10, 1).inverse):
            with pytest.raises(logitstore.InvalidInputError, match="not in the range"):
                move(value)
    for epoch, place in ((-1, 0), (0, -1), (0, 3)):
        with pytest.raises(logitstore.InvalidInputError, match="order of 3 samples"):
            Order(3, "d", 0).row(epoch, place)


def test_shuffled_follows_its_order_and_names_its_rule():
    samples = Rows(50, "abc")
    assert isinstance(samples, Samples)
    for shuffle, digest in (("blocks", "abc:blocks:8:2"), ("full", "abc:full"), ("none", "abc:none")):
        source = Shuffled(samples, shuffle, block=8, window=2)
        assert isinstance(source, Source)
        assert source.digest == digest
        order = Order(50, "abc", 4, shuffle, block=8, window=2)
        assert [source.at(4, 1, p) for p in range(50)] == [("abc", order.row(1, p)) for p in range(50)]


def test_rows_of_a_dataset_as_samples(write):
    dataset = logitstore.open(write(sequences=9))
    samples = of_dataset(dataset)
    assert len(samples) == 9
    assert samples[4].id == dataset[4].id
    assert samples.digest == dataset.info.dataset_digest
    assert (samples.tokenizer_digest, samples.logit_width, samples.normalised) == (None, 1000, "vocabulary")
    assert of_dataset(dataset[:]).digest == samples.digest
    views = [dataset[2:8], dataset[::2], dataset[::-1], dataset[:1], dataset[1:2]]
    assert len({of_dataset(view).digest for view in views} | {samples.digest}) == 6
    assert samples.lengths().tolist() == [len(sequence) for sequence in dataset]
    view = of_dataset(dataset[::-2].select(["tokens"]))
    assert view[0].id == dataset[8].id
    with pytest.raises(logitstore.NotSelectedError):
        _ = view[0].ids
    assert type(of_dataset(dataset.with_decoding("device"))[0]) is type(dataset.with_decoding("device")[0])


def test_rows_come_out_the_same_when_few_chunks_are_remembered(write, monkeypatch):
    dataset = logitstore.open(write(sequences=40, chunk_candidates=300))
    monkeypatch.setattr("logitstore.torch.source._CHUNKS", 3)
    samples = of_dataset(dataset)
    source = Shuffled(samples, "full")
    for place in range(80):
        got = source.at(0, *divmod(place, 40))
        assert np.array_equal(got.ids, dataset.by_id(got.id).ids)
        assert len(samples.dataset._shards._chunks) <= 3


def test_what_is_no_source_is_refused(write):
    with pytest.raises(logitstore.InvalidTypeError, match="list is neither"):
        as_source([1, 2])
    with pytest.raises(logitstore.InvalidInputError, match="give them to it"):
        as_source(Shuffled(Rows(3)), "full")
    with pytest.raises(logitstore.InvalidInputError, match="use its select and with_decoding before"):
        as_source(Rows(3), columns=["tokens"])
    with pytest.raises(logitstore.InvalidInputError, match="no samples"):
        as_source(logitstore.open(write())[:0])


weights = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=6).map(tuple)


@given(weights, st.integers(-20, 20))
def test_apportioned_numbers_follow_the_weights_at_any_scale(given_weights, power):
    counts = apportion(given_weights)
    block = sum(counts)
    assert block >= 1024
    assert block & (block - 1) == 0
    assert min(counts) >= 1
    for count, weight in zip(counts, given_weights, strict=True):
        assert abs(count - block * weight / math.fsum(given_weights)) < 1 + 1e-6
    assert apportion(tuple(weight * 2.0**power for weight in given_weights)) == counts


def test_apportioning_golden_values():
    assert apportion((1, 1, 1)) == (342, 341, 341)
    assert apportion((3,)) == (1024,)
    assert apportion((1, 1e-5)) == (65535, 1)


@pytest.mark.parametrize("bad", [(0, 1), (-1.0,), (float("nan"),), (float("inf"), 1), (1, 1e-30), ("x",)])
def test_weights_that_cannot_be_used_are_refused(bad):
    with pytest.raises(logitstore.InvalidInputError, match="weights"):
        apportion(bad)


def test_a_mixture_has_its_proportions_in_every_block():
    mixture = Mixture([Rows(300, "a"), Rows(5000, "b"), Rows(40, "c")], [5, 4, 1])
    assert mixture.counts == (512, 410, 102)
    assert len(mixture) == 5340
    drawn = [mixture.at(9, *divmod(place, len(mixture))) for place in range(1024 * 12)]
    for block in range(12):
        times = collections.Counter(name for name, _ in drawn[block * 1024 : (block + 1) * 1024])
        assert tuple(times[name] for name in "abc") == (512, 410, 102)
    early = collections.Counter(name for name, _ in drawn[:256])
    assert 90 < early["a"] < 170  # mixed within a block, not one source after the other


def test_sources_of_a_mixture_go_through_their_own_epochs():
    mixture = Mixture([Rows(100, "a"), Rows(1000, "b")], [1, 1], epoch_samples=77)
    assert len(mixture) == 77
    drawn = [mixture.at(0, *divmod(place, 77)) for place in range(2048)]
    from_a = [row for name, row in drawn if name == "a"]
    assert len(from_a) == 1024
    times = collections.Counter(from_a)
    assert set(times) == set(range(100))
    assert min(times.values()) >= 10
    assert max(times.values()) <= 11
    places = [mixture.locate(0, *divmod(place, 77)) for place in range(2048)]
    assert sorted(places) == [(source, number) for source in (0, 1) for number in range(1024)]


def test_mixture_golden_values_and_digest():
    mixture = Mixture([Rows(100, "a"), Rows(1000, "b")], [1, 3])
    assert mixture.digest == MIXTURE_DIGEST
    assert [mixture.locate(5, 0, place) for place in range(6)] == MIXTURE_PLACES
    assert Mixture([Rows(100, "a"), Rows(1000, "b")], [10, 30.0]).digest == mixture.digest
    others = [
        Mixture([Rows(100, "a"), Rows(1000, "b")], [1, 2]),
        Mixture([Rows(100, "a"), Rows(1000, "c")], [1, 3]),
        Mixture([Rows(1000, "b"), Rows(100, "a")], [3, 1]),
        Mixture([Rows(100, "a"), Rows(1000, "b")], [1, 3], epoch_samples=10),
        Mixture([Shuffled(Rows(100, "a"), "full"), Rows(1000, "b")], [1, 3]),
    ]
    assert len({other.digest for other in others} | {mixture.digest}) == 6
    assert mixture.locate(5, 3, 7) != mixture.locate(6, 3, 7)


def test_mixtures_of_mixtures():
    inner = Mixture([Rows(10, "a"), Rows(20, "b")], [1, 1])
    outer = Mixture([inner, Rows(30, "c")], [2, 1])
    times = collections.Counter(outer.at(0, *divmod(place, len(outer)))[0] for place in range(1024))
    assert times["c"] == 341
    assert abs(times["a"] - times["b"]) < 100


def test_sources_of_different_tokenizers_are_not_mixed():
    with pytest.raises(logitstore.InvalidInputError, match=r"source 0: a+, source 2: b+"):
        Mixture([Rows(5, "x", "a" * 64), Rows(5, "y", "a" * 64), Rows(5, "z", "b" * 64)], [1, 1, 1])


def test_unknown_tokenizers_are_mixed_with_one_warning():
    with pytest.warns(logitstore.LogitStoreWarning, match=r"unknown \(1, 2\)") as caught:
        mixture = Mixture([Rows(5, "x", "a" * 64), Rows(5, "y", None), Rows(5, "z", None)], [1, 1, 1])
    assert len(caught) == 1
    assert mixture.tokenizer_digest == "a" * 64


def test_a_mixture_says_what_its_sources_have_in_common():
    mixture = Mixture([Rows(5, "x", logit_width=100), Rows(5, "y", logit_width=200)], [1, 1])
    assert (mixture.logit_width, mixture.highest_id, mixture.normalised) == (200, 199, "vocabulary")
    mixture = Mixture([Rows(5, "x", logit_width=100), Rows(5, "y", normalised="candidates")], [1, 1])
    assert (mixture.logit_width, mixture.highest_id, mixture.normalised) == (None, 99, "candidates")


def test_mixtures_that_cannot_be_are_refused():
    for sources, given_weights in (([], []), ([Rows(5)], [1, 2])):
        with pytest.raises(logitstore.InvalidInputError, match="one weight a source"):
            Mixture(sources, given_weights)
    with pytest.raises(logitstore.InvalidInputError, match="epoch_samples=0"):
        Mixture([Rows(5)], [1], epoch_samples=0)


def test_a_wrong_tokenizer_is_refused():
    samples = Rows(5, tokenizer_digest="a" * 64)
    check_student(samples, "a" * 64, None)
    with pytest.raises(logitstore.InvalidInputError, match="with the teacher's tokenizer"):
        check_student(samples, "b" * 64, None)
    tokenizer = logitstore.Tokenizer.from_pieces({0: b"a"})
    with pytest.raises(logitstore.InvalidInputError, match=r"tokenizer\.json"):
        check_student(samples, tokenizer, None)
    for wrong in ("gemma", 5, "A" * 64):
        with pytest.raises(logitstore.InvalidTypeError, match="from_path"):
            check_student(samples, wrong, None)
    with pytest.warns(logitstore.LogitStoreWarning, match="cannot be checked"):
        check_student(Rows(5, tokenizer_digest=None), "b" * 64, None)


def test_too_small_a_vocabulary_is_refused():
    samples = Rows(5, logit_width=1000)
    check_student(samples, None, 1000)
    with pytest.raises(logitstore.InvalidInputError, match=r"go up to 999; resize its embeddings to 1000"):
        check_student(samples, None, 999)
    samples.highest_id = 700  # the ids that occur count, not the padded width
    check_student(samples, None, 701)
    with pytest.raises(logitstore.InvalidInputError, match="go up to 700"):
        check_student(samples, None, 700)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_student(Rows(5), None, 3)  # nothing is known
