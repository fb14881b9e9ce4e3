"""Encodings: property tests of round trips, shapes and error bounds."""

import contextlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from logitstore.encoding import decode, ragged
from logitstore.encoding.anchor import find_anchors
from logitstore.encoding.cells import PCO_VERSION, CellDecoder, can_decode, encode_cell
from logitstore.encoding.codes import DENSE_LIMIT, encode_ids, token_order
from logitstore.encoding.ordinals import bits_to_ordinals, ordinals_to_bits, round_to_bfloat16
from logitstore.encoding.values import (
    CELL_TYPES,
    Encoding,
    by_draws,
    decode_draw_codes,
    decode_draws,
    decode_logits,
    decode_values,
    encode_draws,
    encode_values,
)
from logitstore.errors import CorruptDataError, InvalidInputError

counts = st.lists(st.integers(0, 7), max_size=20).map(lambda c: np.array(c, np.uint32))
uniform_counts = st.tuples(st.integers(1, 7), st.integers(0, 20)).map(lambda c: np.full(c[1], c[0], np.uint32))
any_counts = counts | uniform_counts


@st.composite
def sorted_logprobs(draw, elements=None):
    """(logprobs float32 [N], non-increasing at each position, count)."""
    count = draw(any_counts)
    numbers = st.floats(-40, 0, width=32) if elements is None else elements
    flat = draw(hnp.arrays(np.float32, int(count.sum()), elements=numbers)) + np.float32(0)
    return flat[np.lexsort((-flat, ragged.rows(count)))], count


@given(hnp.arrays(st.sampled_from([np.uint16, np.uint32, np.float32]), st.integers(0, 600)))
def test_cells_round_trip_bit_for_bit(values):
    cell = encode_cell(values)
    decoded = CellDecoder().decode(cell, len(values), values.dtype)
    assert decoded.tobytes() == values.tobytes()
    assert (len(values) == 0) == (cell == b"")


@pytest.mark.parametrize("n", [0, 4, 6])
def test_a_cell_of_another_length_is_refused(n):
    cell = encode_cell(np.array([9, 8, 7, 6, 5], np.uint32) * 1000)
    with pytest.raises(CorruptDataError):
        CellDecoder().decode(cell, n, np.dtype(np.uint32))


def test_cells_cut_at_every_length_are_refused():
    values = np.arange(300, dtype=np.uint32) ** 2
    cell = encode_cell(values)
    for length in range(1, len(cell)):
        with pytest.raises(CorruptDataError):
            CellDecoder().decode(cell[:length], 300, values.dtype)
    with pytest.raises(CorruptDataError):
        CellDecoder().decode(cell + b"\0", 300, values.dtype)


@given(st.binary(min_size=1, max_size=60), st.integers(1, 2000), st.sampled_from([np.uint16, np.uint32, np.float32]))
def test_any_bytes_decode_to_something_or_one_error(cell, n, kind):
    with contextlib.suppress(CorruptDataError):
        assert len(CellDecoder().decode(cell, n, np.dtype(kind))) == n


def test_other_pcodec_modes_are_refused():
    with pytest.raises(CorruptDataError, match="mode"):
        CellDecoder().decode(b"\x03" + bytes(20), 5, np.dtype(np.uint32))


def test_pcodec_versions():
    assert can_decode(PCO_VERSION)
    assert not can_decode("250.0")
    for text in ("4", "x.y", "4.-1", "300.1"):
        with pytest.raises(CorruptDataError):
            can_decode(text)


@given(hnp.arrays(np.int64, st.integers(0, 200), elements=st.integers(0, 2**31 - 1) | st.integers(0, 20)))
def test_codes_round_trip(ids):
    order = token_order(ids)
    codes = encode_ids(ids, order)
    assert (decode.decode_ids(codes, order) == ids).all()
    assert codes.dtype == np.uint32


@given(hnp.arrays(np.int64, st.integers(0, 200), elements=st.integers(0, 30)), st.booleans())
def test_the_order_is_by_frequency_then_id(ids, high):
    if high:
        ids = ids + DENSE_LIMIT  # sorting and searching instead of tables
    order = token_order(ids).tolist()
    times = {i: int((ids == i).sum()) for i in set(ids.tolist())}
    assert order == sorted((i for i, n in times.items() if n >= 2), key=lambda i: (-times[i], i))
    assert (decode.decode_ids(encode_ids(ids, np.array(order, np.uint32)), np.array(order, np.uint32)) == ids).all()


def test_the_order_has_at_most_4096_ids():
    ids = np.repeat(np.arange(10_000), 2)
    order = token_order(ids)
    assert order.tolist() == list(range(4096))
    assert encode_ids(np.array([4096, 0]), order).tolist() == [8192, 0]


@given(any_counts, st.integers(0, 2**16))
def test_running_sums_undo_differences(count, seed):
    values = np.random.default_rng(seed).integers(0, 2**20, int(count.sum())).astype(np.uint32)
    values = values[np.lexsort((values, ragged.rows(count)))]
    steps = ragged.differences(values, count)
    first = ragged.spread(values[ragged.firsts(count)], count[count > 0])
    assert (first + ragged.running_sums(steps, count[count > 0]) == values).all()
    sums = [int(part.sum()) for part in np.split(values.astype(np.int64), np.cumsum(count)[:-1])] if len(count) else []
    assert ragged.row_sums(values, count).tolist() == sums


@given(sorted_logprobs(), st.sampled_from([1.0, 1 / 8, 1 / 32, 1 / 64]))
def test_grid_is_within_half_a_step_and_keeps_the_best_exact(given_values, resolution):
    logprobs, count = given_values
    values = encode_values(logprobs, count, "grid", resolution)
    assert (values.top.dtype, values.gaps.dtype) == CELL_TYPES[values.encoding]
    decoded = decode_values(values.encoding, values.top, values.gaps, count, resolution, None)
    assert decoded.dtype == np.float32
    first = ragged.firsts(count)
    assert (decoded[first] == logprobs[first]).all()
    slack = resolution / 2 + np.spacing(np.abs(decoded)) / 2
    assert (np.abs(decoded.astype(float) - logprobs) <= slack).all()
    assert (np.diff(decoded)[~first[1:]] <= 0).all()


@given(sorted_logprobs(st.floats(-60000, 0, width=16).map(np.float32)))
def test_float16_and_float32_are_exact(given_values):
    logprobs, count = given_values
    for name in ("float16", "float32"):
        values = encode_values(logprobs, count, name, 1 / 32)
        assert (decode_values(values.encoding, values.top, values.gaps, count, 1 / 32, None) == logprobs).all()


@given(sorted_logprobs(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=0)))
def test_float32_holds_every_number(given_values):
    logprobs, count = given_values
    values = encode_values(logprobs, count, "float32", 1 / 32)
    assert (decode_values(values.encoding, values.top, values.gaps, count, 1 / 32, None) == logprobs).all()


@st.composite
def bfloat16_logits(draw):
    count = draw(any_counts)
    bits = draw(hnp.arrays(np.uint16, int(count.sum())))
    logits = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    logits = np.where(np.isfinite(logits), logits, np.float32(0)) + np.float32(0)
    return logits[np.lexsort((-logits, ragged.rows(count)))], count


@given(bfloat16_logits())
def test_any_bfloat16_logits_come_back_exactly(given_values):
    logits, count = given_values
    logsumexp = np.zeros(len(count), np.float32)
    values = encode_values(logits, count, "auto", 1 / 32, logits=logits, logsumexp=logsumexp)
    if len(logits):
        assert values.encoding is Encoding.BFLOAT16
        assert (decode_logits(values.top, values.gaps, count) == logits).all()


@pytest.mark.parametrize(("scale", "shift"), [(4, 20), (2, 3), (6, -30), (0.5, 1), (12, 60)])
def test_anchors_find_the_logits_behind_float32_logprobs(scale, shift):
    random = np.random.default_rng(0)
    logits = (random.normal(shift, scale, (200, 40))).astype(ml_dtypes.bfloat16).astype(np.float64)
    logits = -np.sort(-logits, axis=1)
    logsumexp = np.log(np.exp(logits - logits.max()).sum(axis=1)) + logits.max() + random.uniform(0, 1, 200)
    logprobs = (logits - logsumexp[:, None].astype(np.float32)).astype(np.float32)
    count = np.full(200, 40, np.uint32)
    values = encode_values(logprobs.ravel(), count, "auto", 1 / 32)
    assert values.encoding is Encoding.BFLOAT16
    found = decode_logits(values.top, values.gaps, count).reshape(200, 40).astype(np.float64)
    assert (found - found[:, :1] == logits - logits[:, :1]).all()
    decoded = decode_values(values.encoding, values.top, values.gaps, count, 1 / 32, values.logsumexp)
    assert np.abs(decoded - logprobs.ravel()).max() < 2e-5


def test_logprobs_that_were_never_bfloat16_get_the_grid():
    random = np.random.default_rng(1)
    logprobs = -np.sort(random.uniform(0.1, 12, (50, 30))).astype(np.float32)
    count = np.full(50, 30, np.uint32)
    assert np.isnan(find_anchors(logprobs.ravel(), count)).all()
    assert encode_values(logprobs.ravel(), count, "auto", 1 / 32).encoding is Encoding.GRID
    with pytest.raises(InvalidInputError, match="bfloat16"):
        encode_values(logprobs.ravel(), count, "bfloat16", 1 / 32)


def test_few_candidates_are_no_evidence_of_bfloat16():
    logprobs, count = np.array([-1.0, -2.0, -0.5], np.float32), np.array([2, 1], np.uint32)
    assert encode_values(logprobs, count, "auto", 1 / 32).encoding is Encoding.GRID


def test_a_given_logsumexp_is_kept():
    logits = np.array([20.5, 19.0, 18.875, 3.5], np.float32)
    logsumexp = np.array([20.9], np.float32)
    values = encode_values(logits - logsumexp, np.array([4]), "auto", 1 / 32, logsumexp=logsumexp)
    assert values.encoding is Encoding.BFLOAT16
    assert values.logsumexp is logsumexp
    assert (decode_logits(values.top, values.gaps, np.array([4])) == logits).all()


def test_values_out_of_reach():
    far = np.array([-0.5, -3e6], np.float32)
    count = np.array([2], np.uint32)
    assert encode_values(far, count, "auto", 1 / 32).encoding is Encoding.FLOAT32
    with pytest.raises(InvalidInputError, match="float32"):
        encode_values(far, count, "grid", 1 / 32)
    with pytest.raises(InvalidInputError, match="float16"):
        encode_values(far, count, "float16", 1 / 32)
    near = np.array([-0.5, -4000.0], np.float32)
    assert encode_values(near, count, "grid", 1 / 32).encoding is Encoding.GRID_WIDE


@given(hnp.arrays(st.sampled_from([np.uint16, np.uint32]), st.integers(0, 100)))
def test_ordinals_are_in_the_order_of_the_numbers(bits):
    floats = bits.view(np.float16 if bits.dtype == np.uint16 else np.float32)
    bits = bits[~np.isnan(floats)]
    floats = floats[~np.isnan(floats)] + floats.dtype.type(0)  # no -0
    ordinals = bits_to_ordinals(bits)
    back = ordinals_to_bits(ordinals).view(floats.dtype)
    assert (back == floats).all()
    place = np.argsort(ordinals, kind="stable")
    assert (np.diff(floats[place]) >= 0).all() if np.isfinite(floats).all() else True


@given(hnp.arrays(np.float64, st.integers(0, 50), elements=st.floats(-300, 300, allow_subnormal=False)))
def test_rounding_to_bfloat16_gives_the_nearest(values):
    rounded = round_to_bfloat16(values)
    normal = np.abs(values) > 1e-30
    other = values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    near = np.abs(rounded - values) <= np.abs(other - values) * (1 + 1e-6)
    assert near[normal].all()


@st.composite
def drawn(draw):
    count = draw(counts)
    n = int(count.sum())
    ids = np.concatenate([draw(st.permutations(range(40)))[:c] for c in count.tolist()] or [[]]).astype(np.int64)
    return ids, draw(hnp.arrays(np.uint32, n, elements=st.integers(1, 100))), count


@given(drawn())
def test_draws_round_trip_sorted_by_draws_then_id(given_values):
    ids, draws, count = given_values
    order = token_order(ids)
    steps, top, gaps = encode_draws(encode_ids(ids, order), draws, count)
    assert top.tolist() == [int(n) for n in ragged.row_sums(draws, count) if n]
    times = decode_draws(top, gaps, count)
    decoded = decode.decode_ids(decode_draw_codes(steps, count), order)
    place = by_draws(decoded, times, count)
    expected = np.lexsort((ids, -draws.astype(np.int64), ragged.rows(count)))
    assert (decoded[place] == ids[expected]).all()
    assert (times[place] == draws[expected]).all()


@pytest.mark.parametrize(("top", "gaps"), [([5], [5]), ([5], [0]), ([2**31], [1]), ([1], [2**32 - 1])])
def test_impossible_draws_are_refused(top, gaps):
    with pytest.raises(CorruptDataError):
        decode_draws(np.array(top, np.uint32), np.array(gaps, np.uint32), np.array([2], np.uint32))
