"""`logitstore.convert`: DistillKit's files, in and out."""

from __future__ import annotations

import json
import math
import random
import struct
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.convert import convert, distillkit, distillkit_export, export, importers
from logitstore.convert import distillkit_codec as codec
from logitstore.convert.base import Input, Tally
from logitstore.errors import (
    DatasetNotFoundError,
    IncompleteDatasetError,
    InvalidInputError,
    LogitStoreWarning,
    SourceError,
)

CUT = Path(__file__).parent / "data" / "distillkit"
SETS = ("exact_f16-k32", "legacy-k64", "qwen235b-k64", "rec_norm-k64", "residual-k64")
FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}

SCHEMA = {
    "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
    "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
    "packed_indices": pa.list_(pa.list_(pa.uint64())),
    "exact_values": pa.list_(pa.list_(pa.float32())),
    "coeffs": pa.list_(pa.list_(pa.float32())),
    "input_ids": pa.list_(pa.uint64()),
    "token_ids": pa.list_(pa.list_(pa.int64())),
    "top_values": pa.list_(pa.list_(pa.float64())),
    "attention_mask": pa.list_(pa.int64()),
    "labels": pa.list_(pa.int64()),
}
SMALL = {"d": 100, "k": 3, "exact_k": 3, "residual_bins": [], "delta_encoding": False}  # ids of 7 bits
ROWS = [[(7, -0.5), (99, -1.5), (0, -3.0)], [(8, -1.0), (1, -2.0), (2, -2.5)], [(9, -0.25), (5, -2.25), (6, -4.0)]]
TOKENS = [4, 7, 8, 9]


# An independent codec, one number at a time: streams of bits are big integers, dtypes are those of ml_dtypes and numpy.


def slow_pack(integers, bits):
    size = (len(integers) * bits + 7) // 8
    whole = 0
    for integer in integers:
        whole = (whole << bits) | integer
    return (whole << (8 * size - bits * len(integers))).to_bytes(size, "big")


def slow_unpack(data, bits, n):
    whole = int.from_bytes(data, "big")
    return [(whole >> (8 * len(data) - bits * (at + 1))) & ((1 << bits) - 1) for at in range(n)]


def slow_values(c, data):
    """The values of one position."""
    exact, term = FLOATS[c["exact_dtype"]], FLOATS[c["term_dtype"]]
    at = 0

    def take(kind):
        nonlocal at
        size = np.dtype(kind).itemsize
        at += size
        return np.frombuffer(data[at - size : at], kind)[0]

    def promoted(*kinds):
        kinds = {np.dtype(kind) for kind in kinds}
        return kinds.pop().type if len(kinds) == 1 else np.float64 if np.dtype(np.float64) in kinds else np.float32

    values = [take(exact) for _ in range(c["exact_k"])]
    coefficients = [take(term) for _ in c["polynomial_terms"]]
    residuals = []
    for each in c["residual_bins"]:
        scale = take(FLOATS[each["scale_dtype"]])
        bits, n = each["element_bits"], each["num_elements"]
        size = (bits * n + 7) // 8
        for q in slow_unpack(data[at : at + size], bits, n):
            wide = np.float32(2 * q - 1 if bits == 1 else q - 2 ** (bits - 1))
            residuals.append(exact(promoted(np.float32, type(scale))(wide) * promoted(np.float32, type(scale))(scale)))
        at += size
    assert at == len(data)
    count = c["k"] - c["exact_k"]
    residuals += [exact(0)] * (count - len(residuals))
    for t, residual in enumerate(residuals):
        if not c["polynomial_terms"]:
            values.append(residual)
            continue
        point = term(t)
        if c["normalize_t"]:
            step = term(1 / max(1, count - 1))
            point = (
                term(0) if count == 1 else term(step * t) if t < count // 2 else term(1 - term(step * (count - 1 - t)))
            )
        products = [
            slow_term(point, e, term) * coefficient
            for e, coefficient in zip(c["polynomial_terms"], coefficients, strict=True)
        ]
        total = term(sum(float(term(product)) for product in products))
        kind = promoted(term, exact)
        values.append(kind(kind(total) + kind(residual)))
    if c["delta_encoding"]:
        sums = np.cumsum(np.array([np.float32(value) for value in values], np.float64))
        values = [exact(np.float32(value)) for value in sums]
    return [float(value) for value in values]


def slow_term(point, e, kind):
    if e == "sqrt":
        return kind(np.sqrt(np.float64(point)))
    if e == "exp":
        return kind(np.exp(np.float64(point)))
    if e == 3:
        return kind(kind(point * point) * point)
    return kind(np.float64(point) ** e)


def columns(rows, d=100, tokens=TOKENS):
    """A sequence in the present layout with every value as it is."""
    bits = max(1, math.ceil(math.log2(d)))
    return {
        "input_ids": list(tokens),
        "compressed_logprobs": [list(struct.pack(f"<{len(row)}f", *(value for _, value in row))) for row in rows],
        "bytepacked_indices": [list(slow_pack([token for token, _ in row], bits)) for row in rows],
    }


def raw(rows, tokens=TOKENS):
    return {
        "input_ids": list(tokens),
        "token_ids": [[token for token, _ in row] for row in rows],
        "top_values": [[value for _, value in row] for row in rows],
    }


def put(folder, *sequences, config=SMALL, name="data_0.parquet"):
    """Write sequences, and the settings beside them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(column, SCHEMA[column]) for column in sequences[0]])
    pq.write_table(pa.Table.from_pylist(list(sequences), schema=schema), folder / name)
    if config is not None:
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def read(source, out, **options):
    """(dataset, notes) of a conversion."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LogitStoreWarning)
        done = convert([source], out, **{"values": "float32", "importer": "distillkit"} | options)
    return logitstore.open(out), " ".join(done.notes)


def refused(folder, match, *sequences, config=SMALL, error=SourceError, **options):
    put(folder, *sequences, config=config)
    with pytest.raises(error, match=match) as caught:
        read(folder, folder / "out", **options)
    assert "data_0.parquet" in str(caught.value) or "compression_config.yaml" in str(caught.value)
    with pytest.raises((DatasetNotFoundError, IncompleteDatasetError)):
        logitstore.open(folder / "out")


def candidates(sequence, t):
    start, end = sequence.offsets[t : t + 2]
    return list(zip(sequence.ids[start:end].tolist(), sequence.logprobs[start:end].tolist(), strict=True))


def agrees(source, out, rows_of):
    """Whether every row of a real set stands at its own position, as its own decoder gives it."""
    expected = np.load(source / "expected.npz")
    tolerance = 2e-2 if "bfloat16" in (source / "compression_config.yaml").read_text() else 1e-3
    dataset, notes = read(source, out)
    first = 0
    for sequence, rows in zip(dataset, rows_of(expected), strict=True):
        assert sequence.count[rows:].tolist() == [0] * (len(sequence) - rows)
        wanted = expected["ids"][first : first + rows]
        found = sequence.ids.reshape(wanted.shape)  # in another order: the codec's is no order of values
        order, own = np.argsort(wanted, axis=1), np.argsort(found, axis=1)
        assert (np.take_along_axis(found, own, 1) == np.take_along_axis(wanted, order, 1)).all()
        values = np.take_along_axis(sequence.logprobs.reshape(wanted.shape), own, 1)
        truth = np.take_along_axis(expected["logprobs"][first : first + rows], order, 1)
        assert np.abs(values - truth).max() < tolerance
        first += rows
    assert first == len(expected["ids"])
    return dataset, notes


@pytest.mark.parametrize("name", SETS)
def test_cuts_of_real_sets_read_as_its_own_decoder_reads_them(name, tmp_path):
    dataset, notes = agrees(CUT / name, tmp_path / "out", lambda expected: expected["rows"].tolist())
    assert [len(sequence) for sequence in dataset] == [14, 7]
    assert dataset.info.logit_width == 262145
    assert (
        f"Settings: {codec.describe(codec.parse_settings((CUT / name / 'compression_config.yaml').read_bytes(), ''))}"
        in notes
    )
    assert "Of 20 rows" in notes


@pytest.mark.parametrize("name", SETS)
def test_real_sets_read_as_its_own_decoder_reads_them(name, tmp_path, shared):
    source = shared(f"distillkit/{name}")
    dataset, notes = agrees(source, tmp_path / "out", lambda expected: expected["lengths"].tolist())
    hits = Counter()
    for sequence in dataset:
        best = sequence.ids[sequence.offsets[:-1]]
        for shift in (0, 1, 2):
            hits[shift] += int((best[: len(best) - 2] == sequence.tokens[shift : len(best) - 2 + shift]).sum())
    assert hits[1] > 3 * max(hits[0], hits[2])
    assert ("Of 1,376 rows, 1,357 were out of order" in notes) == (name == "residual-k64")


def test_rows_stand_where_they_predict_the_next_token(tmp_path):
    dataset, notes = read(put(tmp_path / "in", columns(ROWS)), tmp_path / "out")
    sequence = dataset[0]
    assert sequence.tokens.tolist() == TOKENS  # the pad token at the end too
    assert [candidates(sequence, t) for t in range(4)] == [*ROWS, []]
    assert dataset.info.logit_width == 100
    assert dataset.info.normalised == "vocabulary"
    assert "Row i was taken as the distribution of input_ids[i + 1]" in notes
    assert "Of 3 rows, 0 were out of order and sorted, 0 summed to over 1 and were scaled, and 0 were left out" in notes
    assert "d 100, k 3, exact_k 3, exact_dtype float32" in notes


def test_there_may_be_a_row_for_each_token_or_fewer_but_not_more(tmp_path):
    fewer, full, none = columns(ROWS[:2]), columns(ROWS, tokens=TOKENS[:3]), columns([], tokens=[5])
    dataset, notes = read(put(tmp_path / "in", fewer, full, none), tmp_path / "out")
    assert [s.count.tolist() for s in dataset] == [[3, 3, 0, 0], [3, 3, 3], [0]]
    assert "In 1 of the sequences more than the last position has no row" in notes
    refused(tmp_path / "more", "row 0: compressed_logprobs has 3 rows for 2 input_ids", columns(ROWS, tokens=[1, 2]))


@pytest.mark.parametrize("bits", range(1, 65))
def test_integers_of_any_width_are_unpacked_and_packed(bits):
    source = random.Random(bits)
    for n in (1, 2, 7, 8, 9, 33):
        rows = [[source.choice([0, 2**bits - 1, source.getrandbits(bits)]) for _ in range(n)] for _ in range(3)]
        data = np.array([list(slow_pack(row, bits)) for row in rows], np.uint8)
        assert data.shape[1] == codec.packed_bytes(n, bits)
        assert codec.unpack(data, bits, n).tolist() == rows
        assert codec.pack(np.array(rows, np.uint64), bits).tolist() == data.tolist()


@pytest.mark.parametrize("power", [1, 4, 12, 15, 17, 18, 20])
def test_bits_of_an_id(power):
    assert codec.id_bits(2**power) == power
    assert codec.id_bits(2**power - 1) == max(power, 0) - (power == 1)
    assert codec.id_bits(2**power + 1) == power + 1


def test_bits_of_an_id_are_too_few_where_distillkit_has_too_few():
    assert codec.id_bits(2**21 + 1) == 21  # log2 in float32 is 21


DTYPES = st.sampled_from(sorted(FLOATS))


@st.composite
def codecs(draw):
    k = draw(st.integers(1, 24))
    exact_k = draw(st.integers(0, k))
    left = k - exact_k
    bins = []
    while left and draw(st.booleans()):
        n = draw(st.integers(1, left))
        left -= n
        bins.append({"scale_dtype": draw(DTYPES), "element_bits": draw(st.integers(1, 64)), "num_elements": n})
    terms = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, "sqrt", "exp"]), max_size=5)) if exact_k < k else []
    return {
        "d": draw(st.sampled_from([2, 3, 255, 256, 257, 50257, 151936, 262144, 262145])),
        "k": k,
        "exact_k": exact_k,
        "exact_dtype": draw(DTYPES),
        "polynomial_terms": terms or ([0] if exact_k < k and not bins else []),
        "term_dtype": draw(DTYPES),
        "residual_bins": bins,
        "delta_encoding": draw(st.booleans()),
        "error_diffusion": draw(st.booleans()),
        "normalize_t": draw(st.booleans()),
    }


def random_row(c, source):
    """Bytes of one position: floats of ordinary size, and any integers."""
    data = b""
    kinds = [c["exact_dtype"]] * c["exact_k"] + [c["term_dtype"]] * len(c["polynomial_terms"])
    data += b"".join(FLOATS[kind](source.gauss(0, 1)).tobytes() for kind in kinds)
    for each in c["residual_bins"]:
        data += FLOATS[each["scale_dtype"]](source.gauss(0, 1)).tobytes()
        data += source.randbytes((each["element_bits"] * each["num_elements"] + 7) // 8)
    return data


@given(codecs(), st.integers(0, 2**32))
def test_every_option_of_the_codec_is_decoded_as_one_number_at_a_time(c, seed):
    source = random.Random(seed)
    parsed = codec.parse_settings(yaml.safe_dump(c).encode(), "settings")
    bits = max(1, math.ceil(math.log2(c["d"])))
    ids = [[source.randrange(c["d"]) for _ in range(c["k"])] for _ in range(3)]
    stored = [random_row(c, source) for _ in range(3)]
    assert len(stored[0]) == parsed.value_bytes
    data = np.array([list(row) for row in stored], np.uint8).reshape(3, -1)
    found_ids, found = codec.decode(parsed, data, np.array([list(slow_pack(row, bits)) for row in ids], np.uint8))
    assert found_ids.tolist() == ids
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        wanted = np.array([slow_values(c, row) for row in stored]).astype(np.float32)
    # One step of the coarsest dtype where a sum is rounded the other way; sums of large terms cancel.
    lossy = {"float16": 2e-3, "bfloat16": 1.6e-2}
    step = max(lossy.get(c["term_dtype"], 2e-6), lossy.get(c["exact_dtype"], 2e-6) if c["delta_encoding"] else 2e-6)
    scale = np.nanmax(np.where(np.isfinite(wanted), np.abs(wanted), 0), initial=1)
    np.testing.assert_allclose(found, wanted, rtol=step, atol=step * scale)


def legacy(ids, exact, coefficients, tokens=(1, 2), bits=7):
    each = 64 // bits
    words = [
        [sum(token << (bits * at) for at, token in enumerate(row[i : i + each])) for i in range(0, len(row), each)]
        for row in ids
    ]
    return {"input_ids": list(tokens), "packed_indices": words, "exact_values": exact, "coeffs": coefficients}


def test_the_legacy_codec(tmp_path):
    config = {"k": 12, "exact_k": 10, "vocab_size": 100, "polynomial_degree": 2, "with_sqrt_term": True}
    ids = list(range(99, 87, -1))  # nine to a word, and three
    exact = [-2.0 - i / 4 for i in range(10)]
    row = legacy([ids], [exact], [[-4.0, 1.0, -2.0, -0.5]])
    dataset, notes = read(put(tmp_path / "in", row, config=config), tmp_path / "out")
    # -4 + 1/a - 2/a^2 - sqrt(a)/2 at a = 1 and 2
    wanted = [*exact, -5.5, -4.0 - math.sqrt(2) / 2]
    assert dataset.info.logit_width == 100
    found = dict(candidates(dataset[0], 0))
    assert found == pytest.approx(dict(zip(ids, wanted, strict=True)), abs=1e-6)
    assert "polynomial_degree 2, invert_polynomial true, with_sqrt_term true" in notes
    upright = config | {"invert_polynomial": False, "with_sqrt_term": False}
    row = legacy([ids], [exact], [[-5.0, 0.5, -0.25]])  # -5 + a/2 - a^2/4
    dataset, _ = read(put(tmp_path / "upright", row, config=upright), tmp_path / "upright-out")
    assert sorted(found[1] for found in candidates(dataset[0], 0))[:2] == [-5.0, -4.75]


def test_a_legacy_set_of_exact_values_alone_has_no_coefficients(tmp_path):
    config = {"k": 3, "exact_k": 3, "vocab_size": 100, "polynomial_degree": 0}
    row = legacy([[5, 6, 7]], [[-1.0, -2.0, -3.0]], [[]])
    assert candidates(read(put(tmp_path / "in", row, config=config), tmp_path / "out")[0][0], 0) == [
        (5, -1),
        (6, -2),
        (7, -3),
    ]


def test_legacy_values_that_are_logits_are_asked_for(tmp_path):
    config = {"k": 3, "exact_k": 3, "vocab_size": 100, "polynomial_degree": 0}
    row = legacy([[5, 6, 7]] * 2, [[9.0, 8.0, 2.0], [3.0, 3.5, -1.0]], [[], []], tokens=[1, 2, 3])
    refused(
        tmp_path / "in",
        "2 of 2 rows have values above 0: these are logits .*--value-kind logit.*vocab_size 100",
        row,
        config=config,
    )
    dataset, notes = read(tmp_path / "in", tmp_path / "out", value_kind="logit")
    assert dataset.info.normalised == "candidates"
    total = math.exp(9) + math.exp(8) + math.exp(2)
    wanted = {token: logit - math.log(total) for token, logit in ((5, 9), (6, 8), (7, 2))}
    assert dict(candidates(dataset[0], 0)) == pytest.approx(wanted)
    assert "normalised over the candidates" in notes
    assert "Of 2 rows, 1 were out of order" in notes


def test_raw_rows(tmp_path):
    rows = [ROWS[0], ROWS[1][:1], ROWS[2][:2]]
    put(tmp_path / "in", raw(rows), config=None)
    with pytest.raises(
        InvalidInputError, match="nothing says whether top_values are raw logits or logprobs; give --value-kind"
    ):
        read(tmp_path / "in", tmp_path / "out")
    with pytest.raises(InvalidInputError, match="no values of the kind draws"):
        read(tmp_path / "in", tmp_path / "out", value_kind="draws")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL))
    with pytest.raises(InvalidInputError, match="not compressed; leave --codec-config out"):
        read(tmp_path / "in", tmp_path / "out", value_kind="logit", codec_config=tmp_path / "c.yaml")
    with pytest.raises(InvalidInputError, match="--normalised candidates"):
        read(tmp_path / "in", tmp_path / "out", value_kind="logit", normalised="vocabulary")
    dataset, _ = read(tmp_path / "in", tmp_path / "out", value_kind="logprob")
    assert [candidates(dataset[0], t) for t in range(4)] == [*rows, []]
    assert dataset.info.logit_width is None
    dataset, _ = read(tmp_path / "in", tmp_path / "logits", value_kind="logit")
    assert candidates(dataset[0], 1) == [(8, 0.0)]
    assert dataset.info.normalised == "candidates"


def test_raw_logits_taken_for_logprobs_are_refused(tmp_path):
    rows = [[(1, 11.74), (2, 9.5)], [(3, 14.0), (4, 2.0)]]
    refused(
        tmp_path / "in",
        "2 of 2 rows have values above 0: these are logits",
        raw(rows),
        config=None,
        value_kind="logprob",
    )


def test_probabilities_are_not_taken_for_logprobs(tmp_path):
    refused(
        tmp_path / "in", "2 of 2 rows", raw([[(1, 0.5), (2, 0.25)], [(3, 0.75)]]), config=None, value_kind="logprob"
    )


def test_raw_rows_must_fit_each_other(tmp_path):
    row = raw(ROWS) | {"top_values": [[-1.0, -2.0, -3.0], [-1.0], [-1.0, -2.0, -3.0]]}
    refused(
        tmp_path / "in",
        "row 0: row 1: token_ids has 3 candidates, top_values 1",
        row,
        config=None,
        value_kind="logprob",
    )


# What the codec does to rows.


def test_rows_are_sorted_scaled_and_left_out_and_counted(tmp_path):
    over = math.log(0.505)  # two of them sum to 1.01
    rows = [
        [(1, -2.0), (2, -1.0), (3, -3.0)],  # out of order
        [(4, over), (5, over), (6, -50.0)],  # scaled
        [(7, math.log(0.53)), (8, math.log(0.5)), (9, -50.0)],  # 1.03: left out
        [(1, 0.01), (2, -50.0), (3, -60.0)],  # sums to 1.01, but is above 0
        [(1, 5e-5), (2, -60.0), (3, -70.0)],  # above 0 by rounding
        [(1, -1.0), (2, float("nan")), (3, -3.0)],
        *[ROWS[0]] * 4,
    ]
    dataset, notes = read(put(tmp_path / "in", columns(rows, tokens=range(10))), tmp_path / "out")
    sequence = dataset[0]
    assert sequence.count.tolist() == [3, 3, 0, 0, 3, 0, 3, 3, 3, 3]
    assert candidates(sequence, 0) == [(2, -1.0), (1, -2.0), (3, -3.0)]
    scaled = candidates(sequence, 1)
    assert scaled[0][1] == pytest.approx(math.log(0.5), abs=1e-6)
    assert sum(math.exp(value) for _, value in scaled) <= 1 + 1e-6
    assert candidates(sequence, 4)[0] == (1, pytest.approx(0, abs=1e-6))
    assert candidates(sequence, 6) == ROWS[0]
    assert (
        "Of 10 rows, 1 were out of order and sorted, 2 summed to over 1 and were scaled, and 3 were left out" in notes
    )


def test_ranks_that_the_engine_did_not_give_hold_any_id(tmp_path):
    rows = [
        [(7, -0.5), (9, -1.5), (9, -math.inf)],
        [(8, -0.5), (127, -10000.0), (127, -9999.0)],  # 127 is not below d
        [(127, -math.inf)] * 3,
        [(5, math.nan), (5, -1.0), (127, -2.0)],  # what a curve makes of -inf
        ROWS[0],
        ROWS[1],
    ]
    dataset, notes = read(put(tmp_path / "in", columns(rows, tokens=range(7))), tmp_path / "out")
    found = [candidates(dataset[0], t) for t in range(6)]
    assert found == [[(7, -0.5), (9, -1.5)], [(8, -0.5)], [], [], ROWS[0], ROWS[1]]
    assert "Of 5 rows" in notes  # a row of nothing is none
    assert "1 were left out" in notes


# Wrong settings.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"exact_k": 2, "polynomial_terms": [0, 1]},
            "row 0: row 0: compressed_logprobs has 12 bytes, but by the settings it has 16",
        ),
        (
            {"exact_dtype": "float16"},
            "compressed_logprobs has 12 bytes, but by the settings it has 6: these are not the settings",
        ),
        ({"d": 2000}, "bytepacked_indices has 3 bytes, but by the settings it has 5"),
        ({"d": 99}, "row 0: row 0: the id 99 is not at least 0 and below 99"),
        (
            {"delta_encoding": True, "k": 4, "exact_k": 4},
            "compressed_logprobs has 12 bytes, but by the settings it has 16",
        ),
    ],
)
def test_settings_that_the_rows_contradict_are_refused(change, match, tmp_path):
    refused(tmp_path, match, columns(ROWS), config=SMALL | change)


def test_an_id_twice_in_a_row_is_refused(tmp_path):
    refused(
        tmp_path,
        "row 1: row 2: the id 5 stands there twice",
        columns(ROWS),
        columns([*ROWS[:2], [(5, -1.0), (6, -2.0), (5, -3.0)]]),
    )
    ragged = raw([ROWS[0], [(5, -1.0), (5, -3.0)]])
    refused(tmp_path / "raw", "row 0: row 1: the id 5 stands there twice", ragged, config=None, value_kind="logprob")


def test_a_third_of_rows_may_sum_to_too_much_and_no_more(tmp_path):
    wrong = [(1, -0.5), (2, -0.6), (3, -0.7)]
    read(put(tmp_path / "in", columns([ROWS[0], ROWS[1], wrong], tokens=range(4))), tmp_path / "out")
    rows = [*ROWS, wrong, wrong]
    refused(
        tmp_path / "more",
        r"2 of 5 rows sum to over 1.02.*the settings are not those of the capture \(d 100",
        columns(rows, tokens=range(6)),
    )


def test_differences_read_as_values_are_refused(tmp_path):
    steps = [[(7, -0.5), (99, -1.0), (0, -1.5)], [(8, -1.0), (1, -1.0), (2, -0.5)], [(9, -0.25), (5, -2.0), (6, -1.75)]]
    put(tmp_path / "in", columns(steps), config=SMALL | {"delta_encoding": True})
    dataset, _ = read(tmp_path / "in", tmp_path / "out")
    assert [candidates(dataset[0], t) for t in range(3)] == ROWS
    steps = columns([[(1, -0.5), (2, -1.0), (3, -0.25)]] * 3)
    refused(tmp_path / "values", r"3 of 3 rows sum to over 1\.02.*delta_encoding false", steps)


def test_the_whole_is_judged_on_the_way_once_there_are_rows_enough():
    def judge(final, **counts):
        return distillkit._check(
            "x.parquet", codec.Codec(d=9, k=1, exact_k=1), Tally(counts=Counter(counts)), final, judged=True
        )

    assert judge(False, rows=999, over=999) == []
    assert judge(False, rows=3000, over=1000) == []
    for final, rows in ((False, 1000), (True, 2)):
        with pytest.raises(SourceError, match=r"x\.parquet: .* rows sum to over 1\.02"):
            judge(final, rows=rows, over=rows // 2)
    assert len(judge(True, rows=3, over=1)) == 1
    assert len(judge(True)) == 1


# Settings.


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no settings"),
        ("[1, 2]", "no settings"),
        ("d: 1: 2", "no YAML"),
        ("\t", "no YAML|no settings"),
        ("a: !!python/object:os.system {}", "no YAML"),
        ("a: !!timestamp x", "no YAML"),
        ("a: !!bool x", "no YAML"),
        ("a: !!int ''", "no YAML"),
        ("? [1]\n: 2", "no YAML"),
        ("[" * 20000, "no YAML"),
        ("\x00", "no YAML"),
        ("#" * 70000, "over 65536 bytes"),
        ("d: 100\nk: 3", "missing required field `exact_k`"),
        ("d: 100\nk: 3\nexact_k: 4", "exact_k is 4, over k"),
        ("d: 100\nk: 3\nexact_k: 2", "nothing says the values behind exact_k"),
        ("d: 1\nk: 3\nexact_k: 3", "`int` >= 2 - at `\\$.d`"),
        ("d: x\nk: 3\nexact_k: 3", "Expected `int`, got `str` - at `\\$.d`"),
        ("d: 100\nk: 3\nexact_k: 3\ntemperature: 1", "unknown field `temperature`"),
        ("d: 100\nk: 3\nexact_k: 3\nexact_dtype: int8", "Invalid enum value 'int8'"),
        ("d: 100\nk: 3\nexact_k: 2\npolynomial_terms: [cos]", "Invalid enum value 'cos'"),
        ("d: 100\nk: 3\nexact_k: 2\npolynomial_terms: [1.5]", "got `float`"),
        (
            "d: 100\nk: 3\nexact_k: 2\nresidual_bins: [{scale_dtype: float16, element_bits: 65, num_elements: 1}]",
            "<= 64",
        ),
        (
            "d: 100\nk: 3\nexact_k: 2\nresidual_bins: [{scale_dtype: float16, element_bits: 2, num_elements: 2}]",
            "2 elements for 1 values",
        ),
        ("d: 100\nk: 3\nexact_k: 3\ndelta_encoding: 1", "Expected `bool`"),
        ("vocab_size: 100\nk: 3\nexact_k: 3", "missing required field `polynomial_degree`"),
        ("vocab_size: 100\nk: 3\nexact_k: 4\npolynomial_degree: 1", "exact_k is 4, over k"),
        (
            "vocab_size: 100\nk: 3\nexact_k: 3\npolynomial_degree: 1",
            "settings of the legacy codec, but the files are of the present one",
        ),
    ],
)
def test_malformed_settings_are_refused(text, match, tmp_path):
    put(tmp_path / "in", columns(ROWS), config=None)
    (tmp_path / "in" / "compression_config.yaml").write_text(text)
    with pytest.raises(SourceError, match=match) as caught:
        read(tmp_path / "in", tmp_path / "out")
    assert "compression_config.yaml" in str(caught.value)


def test_settings_are_needed_and_found_beside_the_files_or_above_or_where_they_are_named(tmp_path):
    put(tmp_path / "set/data", columns(ROWS), config=None)
    with pytest.raises(InvalidInputError, match=r"there is no compression_config.yaml beside it.*give --codec-config"):
        read(tmp_path / "set/data", tmp_path / "out")
    (tmp_path / "set/compression_config.yaml").write_text(yaml.safe_dump(SMALL))
    assert read(tmp_path / "set/data", tmp_path / "out")[0][0].count.tolist() == [3, 3, 3, 0]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(SMALL | {"d": 120}))
    assert read(tmp_path / "set", tmp_path / "named", codec_config=tmp_path / "other.yaml")[0].info.logit_width == 120
    with pytest.raises(InvalidInputError, match=r"gone\.yaml: the settings cannot be read"):
        read(tmp_path / "set", tmp_path / "gone", codec_config=tmp_path / "gone.yaml")


def test_directories_with_different_settings_are_not_one_dataset(tmp_path, quiet):
    put(tmp_path / "a", columns(ROWS))
    put(tmp_path / "b", columns(ROWS), config=SMALL | {"d": 128})
    with pytest.raises(SourceError, match="say different settings"):
        convert([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    put(tmp_path / "b", columns(ROWS))
    assert convert([tmp_path / "a", tmp_path / "b"], tmp_path / "out").summary.sequences == 2


# Files.


def test_files_come_in_natural_order_and_any_number_of_processes_gives_the_same(tmp_path, quiet):
    for number in (0, 2, 10):
        put(tmp_path / "in", columns(ROWS, tokens=[number, 7, 8, 9]), columns(ROWS), name=f"data_{number}.parquet")
    dataset, notes = read(tmp_path / "in", tmp_path / "out")
    assert [sequence.tokens[0] for sequence in dataset] == [0, 4, 2, 4, 10, 4]
    assert [sequence.id for sequence in dataset] == ["0", "1", "2", "3", "4", "5"]
    _, same = read(tmp_path / "in", tmp_path / "again", workers=2)
    assert same == notes
    for one, other in zip(
        sorted((tmp_path / "out").rglob("*.arrow")), sorted((tmp_path / "again").rglob("*.arrow")), strict=True
    ):
        assert one.read_bytes() == other.read_bytes()


def test_what_datasets_saves_and_packs_is_read(tmp_path):
    row = columns(ROWS, tokens=[7, 8, 9]) | {"attention_mask": [1, 1, 2], "labels": [7, -100, 9]}
    table = pa.Table.from_pylist([row], schema=pa.schema([(name, SCHEMA[name]) for name in row]))
    folder = tmp_path / "saved"
    folder.mkdir()
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(SMALL))
    dataset, notes = read(folder, tmp_path / "out", importer=None)
    sequence = dataset[0]
    assert [candidates(sequence, t) for t in range(3)] == ROWS
    assert sequence.columns == {"attention_mask": [1, 1, 2]}
    assert sequence.loss_mask.tolist() == [1, 0, 1]
    assert "attention_mask is kept as a column" in notes
    assert "In 1 of the sequences loss_mask is 0 where `labels` is negative" in notes


def test_labels_that_mask_nothing_are_no_loss_mask(tmp_path):
    dataset, _ = read(put(tmp_path / "in", columns(ROWS) | {"labels": [4, 7, 8, -100]}), tmp_path / "out")
    assert dataset[0].loss_mask is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"input_ids": None}, "there is no input_ids in this row"),
        ({"compressed_logprobs": None}, "there is no compressed_logprobs"),
        ({"bytepacked_indices": [[1, 2, 3]]}, "bytepacked_indices has 1 rows, compressed_logprobs 3"),
        ({"bytepacked_indices": [[1, 2, 3], None, [1, 2, 3]]}, "row 1: bytepacked_indices has 0 bytes"),
        ({"bytepacked_indices": [[1, 2, 3], [1, 2], [1, 2, 3]]}, "row 1: bytepacked_indices has 2 bytes"),
        ({"compressed_logprobs": [[1] * 12, [1] * 11 + [None], [1] * 12]}, "compressed_logprobs holds null"),
        ({"labels": [1, 2]}, "labels has 2 numbers for 4 input_ids"),
        ({"attention_mask": [1]}, "attention_mask has 1 numbers for 4 input_ids"),
        ({"attention_mask": [1, None, 1, 1]}, "attention_mask holds null"),
        ({"input_ids": [1, 2**40, 3, 4]}, "position 1: the token"),
    ],
)
def test_malformed_rows_are_refused_with_file_row_and_field(change, match, tmp_path):
    full = columns(ROWS) | {"labels": TOKENS, "attention_mask": [1, 1, 1, 1]}
    refused(tmp_path, f"row 1: .*{match}", full, full | change, error=(SourceError, InvalidInputError))


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("bytepacked_indices", pa.list_(pa.list_(pa.int64())), [[[300, 1, 2]] * 3]),
        ("bytepacked_indices", pa.list_(pa.list_(pa.string())), [[["a", "b", "c"]] * 3]),
        ("compressed_logprobs", pa.list_(pa.uint8()), [[1, 2, 3]]),
        ("compressed_logprobs", pa.binary(), [b"abc"]),
        ("input_ids", pa.string(), ["abc"]),
        ("input_ids", pa.list_(pa.float32()), [[1.0, 2.0]]),
    ],
)
def test_columns_of_other_types_are_refused(name, kind, values, tmp_path):
    row = columns(ROWS)
    arrays = {column: pa.array([row[column]], SCHEMA[column]) for column in row} | {name: pa.array(values, kind)}
    pq.write_table(pa.table(arrays), tmp_path / "data_0.parquet")
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(SMALL))
    with pytest.raises(SourceError, match=f"row 0: .*{name}"):
        read(tmp_path, tmp_path / "out")


def test_on_error_skip_leaves_a_malformed_row_out(tmp_path, quiet):
    put(tmp_path / "in", columns(ROWS), columns(ROWS) | {"bytepacked_indices": [[1]]}, columns(ROWS))
    done = convert([tmp_path / "in"], tmp_path / "out", on_error="skip")
    assert (done.summary.sequences, done.skipped) == (2, 1)
    assert "row 1" in done.failures[0]


def test_damage_to_any_node_of_a_row_gives_sequences_or_an_error(tmp_path, quiet):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(SMALL))
    odd = [None, "x", -1, 0, 1e308, 2**70, [], {}, [[]], [1], True, 0.5]
    source = random.Random(0)
    outcomes = Counter()
    for number in range(150):
        kind, row = source.choice([("logprob", columns(ROWS)), ("logprob", raw(ROWS)), ("logit", raw(ROWS))])
        row = json.loads(json.dumps(row | {"labels": TOKENS, "attention_mask": [1, 1, 1, 1]}))
        where, key = row, source.choice(list(row))
        while isinstance(where[key], list) and where[key] and source.random() < 0.7:
            where, key = where[key], source.randrange(len(where[key]))
        if source.random() < 0.2:
            del where[key]
        else:
            where[key] = source.choice(odd)
        text = json.dumps(row)
        path = tmp_path / "in.jsonl"
        path.write_text(text[: source.randrange(len(text))] if number % 10 == 0 else text)
        given = {"codec_config": config} if "token_ids" not in row and "top_values" not in row else {}
        try:
            convert([path], tmp_path / f"out{number}", importer="distillkit", value_kind=kind, **given)
            outcomes["read"] += 1
        except (SourceError, InvalidInputError) as error:
            outcomes[type(error).__name__] += 1
    assert outcomes["read"] > 5
    assert outcomes["SourceError"] > 50


def test_a_table_that_is_cut_off_is_refused(tmp_path):
    put(tmp_path, columns(ROWS))
    path = tmp_path / "data_0.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"data_0\.parquet"):
        read(tmp_path, tmp_path / "out")


def test_its_layouts_are_recognised_and_no_others(tmp_path):
    recognises = importers()["distillkit"].recognises
    own = [columns(ROWS), raw(ROWS), legacy([[1, 2]], [[-1.0]], [[1.0]])]
    for number, row in enumerate(own):
        put(tmp_path / str(number), row, config=None)
        assert recognises(Input(tmp_path / str(number) / "data_0.parquet"))
    foreign = [
        {"input_ids": [1], "labels": [1], "target_token_ids": [[1]], "target_logprobs": [[-1.0]], "target_mask": [[1]]},
        {"input_ids": [1], "topk_logprobs": [[-1.0]], "topk_token_ids": [[1]], "actual_logprobs": [-1.0]},
        {"inputs": [1, 2], "targets": [[[-1.0], [1.0]]], "line_number": 1},
        {"row_id": 1, "response_token_len": 1, "teacher_topk_ids": [[1]], "teacher_topk_logprobs": [[-1.0]]},
        {"input_ids": [1], "token_ids": [[1]], "logprobs": [[-1.0]]},
        {"token_ids": [[1]], "top_values": [[-1.0]]},
        {"tokens": [1], "topk_logits": [[0.0]], "topk_token_ids": [[1]], "log_sum_exp_logits": [1.0]},
    ]
    for number, row in enumerate(foreign):
        path = tmp_path / f"foreign{number}.parquet"
        pq.write_table(pa.Table.from_pylist([row]), path)
        assert not recognises(Input(path))
        path.with_suffix(".jsonl").write_text(json.dumps(row))
        assert not recognises(Input(path.with_suffix(".jsonl")))
    (tmp_path / "rubbish.parquet").write_bytes(b"PAR1 and then nothing")
    assert not recognises(Input(tmp_path / "rubbish.parquet"))
    pq.write_table(pa.table({"input_ids": [1]}), tmp_path / "other.parquet")
    with pytest.raises(SourceError, match="the columns input_ids and compressed_logprobs"):
        read(tmp_path / "other.parquet", tmp_path / "out")


# Export.


def exported(path, c=None):
    """Sequences of an exported directory, read one number at a time: (tokens, labels, rows of (id, value))."""
    config = yaml.safe_load((path / "compression_config.yaml").read_text())
    assert c is None or config == c
    bits = max(1, math.ceil(math.log2(config["d"])))
    for file in sorted(path.glob("*.parquet"), key=lambda file: int(file.stem.split("_")[1])):
        for row in pq.read_table(file).to_pylist():
            rows = []
            for values, ids in zip(row["compressed_logprobs"], row["bytepacked_indices"], strict=True):
                unpacked = slow_unpack(bytes(ids), bits, config["k"])
                assert max(unpacked) < config["d"]
                assert len(set(unpacked)) == config["k"]
                rows.append(list(zip(unpacked, slow_values(config, bytes(values)), strict=True)))
            assert len(rows) == len(row["input_ids"]) == len(row["labels"])
            yield row["input_ids"], row["labels"], rows


def exact(d, k):
    return {
        "d": d, "k": k, "exact_k": k, "exact_dtype": "float32", "polynomial_terms": [], "term_dtype": "float32",
        "residual_bins": [], "delta_encoding": False, "error_diffusion": False, "normalize_t": False,
    }  # fmt: skip


def make(path, *sequences, **options):
    """A dataset; each sequence is (tokens, rows of (id, logprob), further arguments)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LogitStoreWarning)
        with logitstore.Writer(path, **{"values": "float32", "logit_width": 100} | options) as writer:
            for tokens, rows, more in sequences:
                flat = [pair for row in rows for pair in row]
                ids, values = (
                    np.array([pair[0] for pair in flat], np.int64),
                    np.array([pair[1] for pair in flat], np.float32),
                )
                writer.add(
                    np.array(tokens, np.int64),
                    ids,
                    values,
                    count=np.array([len(row) for row in rows], np.int64),
                    **more,
                )
    return path


def test_export_gives_rows_that_predict_the_next_token_and_pads_what_is_ragged(tmp_path):
    rows = [ROWS[0], [(1, -0.5)], [], [(0, -1.0), (2, -2.0)]]
    data = make(tmp_path / "data", (TOKENS, rows, {"id": "first", "loss_mask": np.array([1, 0, 1, 1])}))
    done = export(data, tmp_path / "out", "distillkit")
    ((tokens, labels, found),) = exported(tmp_path / "out", exact(100, 3))
    assert tokens == TOKENS
    assert labels == [4, -100, -100, 9]
    assert found[0] == ROWS[0]
    assert found[1] == [(1, -0.5), (0, -10000.0), (2, -10000.0)]
    assert found[2] == [(0, -10000.0), (1, -10000.0), (2, -10000.0)]
    assert found[3] == [(0, -1.0), (2, -2.0), (1, -10000.0)]
    text = " ".join(done.notes)
    assert "2 positions have fewer than 3 candidates" in text
    assert "1 positions have no distribution" in text
    again, _ = read(tmp_path / "out", tmp_path / "again", importer=None)
    assert again[0].id == "first"
    assert [candidates(again[0], t) for t in range(4)] == rows
    assert again[0].loss_mask.tolist() == [1, 0, 0, 1]


def test_no_loss_of_an_exported_row_is_infinite(tmp_path):
    data = make(tmp_path / "data", ([1, 2, 3], [ROWS[0], [(5, -0.1)], []], {}))
    export(data, tmp_path / "out", "distillkit")
    ((_, labels, rows),) = exported(tmp_path / "out")
    student = np.log(np.full(100, 1 / 100))
    for row, label in zip(rows, labels, strict=True):
        ids, teacher = np.array([r[0] for r in row]), np.array([r[1] for r in row], np.float32)
        best = teacher.max()
        renormalised = teacher - (np.log(np.exp(teacher - best).sum()) + best)
        losses = [np.exp(values) * (values - student[ids]) for values in (teacher, renormalised)]
        assert np.isfinite(losses).all()
        assert label >= 0 or np.exp(teacher).sum() == 0


def test_export_keeps_the_best_k(tmp_path):
    data = make(tmp_path / "data", (TOKENS, [*ROWS, []], {}))
    done = export(data, tmp_path / "out", "distillkit", k=2)
    ((_, _, rows),) = exported(tmp_path / "out", exact(100, 2))
    assert rows[:3] == [row[:2] for row in ROWS]
    assert any("3 candidates beyond the best 2" in note for note in done.notes)
    export(data, tmp_path / "wide", "distillkit", k=50)  # no wider than it need be
    assert yaml.safe_load((tmp_path / "wide/compression_config.yaml").read_text())["k"] == 3


@pytest.mark.parametrize(
    ("width", "highest", "d"), [(None, 7, 8), (None, 0, 2), (128, 7, 128), (None, 2**21, 2**22), (2**21 + 1, 5, 2**22)]
)
def test_the_width_of_an_export_fits_every_id(width, highest, d, tmp_path):
    data = make(tmp_path / "data", ([1], [[(highest, -0.5)]], {}), logit_width=width)
    export(data, tmp_path / "out", "distillkit")
    ((_, _, rows),) = exported(tmp_path / "out", exact(d, 1))
    assert rows == [[(highest, -0.5)]]


def test_export_says_what_only_the_dataset_knows(tmp_path):
    data = make(tmp_path / "data", ([1], [[(3, -0.5)]], {}), normalised="candidates", temperature=2.0)
    text = " ".join(export(data, tmp_path / "out", "distillkit").notes)
    assert "normalised over the candidates stands in the metadata of the files alone" in text
    assert "The temperature 2.0 stands in the metadata of the files alone" in text
    again, _ = read(tmp_path / "out", tmp_path / "again")
    assert (again.info.normalised, again.info.temperature) == ("candidates", 2.0)


def test_rows_that_sum_to_one_ask_what_they_are_normalised_over(tmp_path):
    half = math.log(0.5)
    row = raw([[(1, half), (2, half)]] * 300, tokens=[1] * 301)
    path = put(tmp_path / "in", row, config=None)
    with pytest.raises(SourceError, match=r"all 300 rows sum to 1.*--normalised candidates"):
        read(path, tmp_path / "out", value_kind="logprob")
    dataset, _ = read(path, tmp_path / "out", value_kind="logprob", normalised="candidates")
    assert dataset.info.normalised == "candidates"


def test_draws_are_exported_as_logprobs(tmp_path, quiet):
    with logitstore.Writer(tmp_path / "data", logit_width=100) as writer:
        writer.add_draws([1, 2], [[5, 6], [7, 8]], [[3, 1], [2, 2]], 4)
    export(tmp_path / "data", tmp_path / "out", "distillkit")
    ((_, _, rows),) = exported(tmp_path / "out")
    assert dict(rows[0]) == pytest.approx({5: math.log(0.75), 6: math.log(0.25)})


def test_exported_files_and_row_groups_are_bounded(tmp_path, write, monkeypatch):
    data = write(sequences=12, positions=20, k=8)
    sequence = 25 * (8 * 4 + 10 + 16)  # 10 bits an id
    monkeypatch.setattr(distillkit_export, "_GROUP_BYTES", 3 * sequence)
    monkeypatch.setattr(distillkit_export, "_FILE_BYTES", 6 * sequence)
    export(data, tmp_path / "out", "distillkit")
    files = sorted((tmp_path / "out").glob("data_*.parquet"))
    assert len(files) > 1
    groups = [
        [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] for file in map(pq.ParquetFile, files)
    ]
    assert max(map(len, groups)) > 1
    assert max(map(max, groups)) <= 4
    assert sum(map(sum, groups)) == 12
    dataset, _ = read(tmp_path / "out", tmp_path / "again")
    assert [s.id for s in dataset] == [s.id for s in logitstore.open(data)]


def test_a_sequence_that_padding_makes_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("logitstore.convert.export_rows.SLOTS", 11)
    data = make(tmp_path / "data", (TOKENS, [*ROWS, []], {"id": "long"}))
    with pytest.raises(InvalidInputError, match=r"'long': 4 positions of 3 candidates each.*smaller k"):
        export(data, tmp_path / "out", "distillkit")
    assert not (tmp_path / "out").exists()
    export(data, tmp_path / "out", "distillkit", k=2)


def test_an_empty_dataset_is_an_empty_table(tmp_path):
    export(make(tmp_path / "data"), tmp_path / "out", "distillkit")
    assert pq.read_table(tmp_path / "out" / "data_0.parquet").num_rows == 0


def test_progress_is_told(tmp_path, write):
    seen = []
    export(write(sequences=3), tmp_path / "out", "distillkit", progress=seen.append)
    assert seen == [1, 2, 3]


@st.composite
def datasets(draw):
    """(logit width or None, sequences) of ragged shapes."""
    width = draw(st.sampled_from([2, 3, 31, 32, 33, 127, 128, 129, 50257, 131071, 131073, 262143, 262144, 262145]))
    known = draw(st.booleans())
    seed = draw(st.integers(0, 2**32))
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4))
    masked = draw(st.booleans())
    source = np.random.default_rng(seed)
    sequences = []
    for number, counts in enumerate(shapes):
        rows = []
        for count in counts:
            low = source.random() < 0.5  # ids among which padding has to find its place
            ids = source.choice(min(width, 12) if low else width, min(count, 12, width), replace=False)
            logits = -np.sort(-source.normal(0, 3, len(ids)))
            values = logits - np.log(np.exp(logits).sum()) - 0.0625 if len(ids) else logits
            rows.append(list(zip(ids.tolist(), values.astype(np.float32).tolist(), strict=True)))
        more = {"id": f"sequence {number} é"}
        if masked:
            more["loss_mask"] = source.integers(0, 2, len(rows))
        sequences.append((source.integers(0, 2**31 - 1, len(rows)), rows, more))
    return width if known else None, sequences


@settings(max_examples=60)
@given(datasets(), st.one_of(st.none(), st.integers(1, 10)))
def test_what_is_exported_is_imported_again(case, k):
    width, sequences = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = logitstore.open(make(folder / "data", *sequences, logit_width=width))
        export(data, folder / "out", "distillkit", k=k)
        again, _ = read(folder / "out", folder / "again")
        slow = list(exported(folder / "out"))
        widest = max((int(s.count.max(initial=0)) for s in data), default=0)
        assert again.info.logit_width == yaml.safe_load((folder / "out/compression_config.yaml").read_text())["d"]
        assert width is None or again.info.logit_width == max(width, 2)
        for before, after, (tokens, labels, rows) in zip(data, again, slow, strict=True):
            assert (before.id, before.tokens.tolist()) == (after.id, after.tokens.tolist())
            assert tokens == before.tokens.tolist()
            for t in range(len(before)):
                kept = candidates(before, t)[: widest if k is None else k]
                assert candidates(after, t) == kept
                assert [pair for pair in rows[t] if pair[1] > -9999] == kept
            mask = before.count > 0
            if before.loss_mask is not None:
                mask &= before.loss_mask == 1
            assert [label >= 0 for label in labels] == mask.tolist()
            if after.loss_mask is not None:
                assert after.loss_mask.tolist() == mask.tolist()
            else:
                assert mask.tolist() == (before.count > 0).tolist()
