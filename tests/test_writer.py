"""Writing: round trips over any shapes, and what is refused."""

import warnings

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitstore
from logitstore.encoding import ragged

pytestmark = pytest.mark.usefixtures("quiet")


def write_one(path, *arguments, method="add", settings=None, **more):
    with logitstore.Writer(path, **(settings or {})) as writer:
        getattr(writer, method)(*arguments, **more)
    return logitstore.open(path)[0]


@st.composite
def sequences(draw):
    """Ragged sequences with unsorted candidates, zero probabilities and ties."""
    made = []
    for _ in range(draw(st.integers(0, 4))):
        count = np.array(draw(st.lists(st.integers(0, 6), max_size=8)), np.int64)
        random = np.random.default_rng(draw(st.integers(0, 2**32)))
        ids = np.concatenate([random.permutation(50)[:c] for c in count] or [np.empty(0, int)])
        raw = random.choice([-0.5, -1.0, -1.5, -4.0, -30.0, -np.inf], int(count.sum()))
        logprobs = raw - np.repeat(np.log(np.maximum(ragged.row_sums(np.exp(raw), count), 1e-30)), count) - 0.25
        tokens = random.integers(0, 60, len(count))
        made.append((tokens, ids, logprobs.astype(np.float32), count))
    return made


def reference(ids, logprobs, count):
    """The candidates that are kept, position by position: sorted by logprob, then id."""
    rows, at = [], 0
    for c in count:
        pairs = sorted(
            (-lp, i) for lp, i in zip(logprobs[at : at + c].tolist(), ids[at : at + c].tolist(), strict=True)
        )
        rows.append([(i, -lp) for lp, i in pairs if lp < np.inf])
        at += c
    return rows


@given(
    sequences(),
    st.sampled_from(["auto", "grid", "float32"]),
    st.integers(1, 30),
    st.integers(200, 5000),
)
def test_what_is_written_is_read(tmp_path_factory, given_sequences, values, chunk_candidates, shard_bytes):
    path = tmp_path_factory.mktemp("any") / "data"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        with logitstore.Writer(
            path, values=values, chunk_candidates=chunk_candidates, shard_bytes=shard_bytes
        ) as writer:
            for tokens, ids, logprobs, count in given_sequences:
                writer.add(tokens, ids, logprobs, count=count)
    dataset = logitstore.open(path)
    assert len(dataset) == len(given_sequences)
    for i, (tokens, ids, logprobs, count) in enumerate(given_sequences):
        sequence = dataset[i]
        rows = reference(ids, logprobs, count)
        assert sequence.id == str(i)
        assert sequence.tokens.tolist() == tokens.tolist()
        assert sequence.count.tolist() == [len(row) for row in rows]
        assert sequence.ids.tolist() == [i for row in rows for i, _ in row]
        exact = np.array([lp for row in rows for _, lp in row])
        slack = 1 / 64 + 1e-6 if values != "float32" else 0
        assert (np.abs(sequence.logprobs - exact) <= slack).all()
        for t, row in enumerate(rows):
            if not row:
                assert np.isnan(sequence.tail[t])
            else:
                rest = 1 - sum(np.exp(lp) for _, lp in row)
                assert abs(np.exp(sequence.tail[t]) - rest) <= abs(rest) / 60 + 1e-6
    assert logitstore.is_valid(logitstore.validate(path, deep=True))
    assert [s.id for s in dataset] == [str(i) for i in range(len(dataset))]


def test_equal_input_gives_equal_bytes(write):
    a, b = write("a"), write("b", overwrite=True)
    files = [sorted(p.relative_to(r) for p in r.rglob("*") if p.is_file()) for r in (a, b)]
    assert files[0] == files[1]
    for name in files[0]:
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_types_of_a_sequence(tmp_path, rows):
    sequence = write_one(tmp_path / "d", *rows(0, 5, 4), loss_mask=[True] * 5, entropy=[1.0] * 5, target_rank=[1] * 5)
    kinds = {name: value.dtype.name for name, value in vars(sequence).items() if isinstance(value, np.ndarray)}
    assert kinds == {
        "tokens": "uint32", "count": "uint32", "offsets": "int64", "ids": "int32", "logprobs": "float32",
        "tail": "float32", "entropy": "float32", "target_rank": "int64", "loss_mask": "int8",
    }  # fmt: skip
    assert sequence.draws is sequence.target_logprob is sequence.logsumexp is None


def test_dense(tmp_path):
    sequence = write_one(tmp_path / "d", [1, 2, 3], [5, 6, 7], np.log([0.5, 0.25, 0.9]), count=[2, 0, 1])
    for k in (1, 2, 3):
        ids, logprobs = sequence.dense(k, fill_id=-7)
        assert (ids.dtype, logprobs.dtype, ids.shape) == (np.int64, np.float32, (3, k))
        assert ids[:, 0].tolist() == [5, -7, 7]
        assert np.isneginf(logprobs[1]).all()
    ids, _ = sequence.dense(2)
    assert ids.tolist() == [[5, 6], [0, 0], [7, 0]]
    assert sequence.dense(0)[0].shape == (3, 0)


def test_cutting_adds_to_the_tail(tmp_path):
    p = [[0.5, 0.2, 0.1, 0.05], [0.9, 0.04, 0.03, 0.01]]
    ids = [[1, 2, 3, 4], [5, 6, 7, 8]]

    def tail(**settings):
        sequence = write_one(tmp_path / str(len(list(tmp_path.iterdir()))), [0, 0], ids, np.log(p), settings=settings)
        return sequence.count.tolist(), np.exp(sequence.tail).round(2).tolist()

    assert tail() == ([4, 4], pytest.approx([0.15, 0.02], abs=0.006))
    assert tail(top_k=2) == ([2, 2], pytest.approx([0.3, 0.06], abs=0.006))
    assert tail(top_p=0.69) == ([2, 1], pytest.approx([0.3, 0.1], abs=0.006))
    assert tail(top_p=0.69, min_k=3) == ([3, 3], pytest.approx([0.2, 0.03], abs=0.006))
    assert tail(top_p=0.99, top_k=3) == ([3, 3], pytest.approx([0.2, 0.03], abs=0.006))
    sequence = write_one(tmp_path / "given", [0, 0], ids, np.log(p), tail=[np.log(0.15), np.nan], settings={"top_k": 2})
    assert np.exp(sequence.tail[0]) == pytest.approx(0.3, rel=1 / 60)
    assert np.isnan(sequence.tail[1])


def test_equal_logprobs_are_cut_by_id(tmp_path):
    sequence = write_one(tmp_path / "d", [0], [[9, 3, 7, 1]], [[-2.0, -2, -2, -2]], settings={"top_k": 2})
    assert sequence.ids.tolist() == [1, 3]


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_dense_logits_agree_with_log_softmax_in_float64(tmp_path, kind):
    random = np.random.default_rng(3)
    logits = random.normal(2, 5, (9, 700)).astype(np.float32)
    logits[2, 5:90] = -np.inf
    given_logits = logits
    if kind == "float16":
        given_logits = logits = logits.astype(np.float16)
    if kind == "bfloat16":
        logits = logits.astype(ml_dtypes.bfloat16)
        given_logits = logits.view(np.uint16)
    exact = logits.astype(np.float64)
    logsumexp = np.log(np.exp(exact).sum(axis=1))
    tokens = random.integers(0, 700, 9)
    sequence = write_one(
        tmp_path / "d", tokens, given_logits, method="add_logits", settings={"values": "auto" if kind == "bfloat16" else "float32", "top_k": 50}
    )  # fmt: skip
    ids, logprobs = sequence.dense(50)
    order = np.lexsort((np.broadcast_to(np.arange(700), exact.shape), -exact), axis=1)
    assert (ids == order[:, :50]).all()
    reference_logprobs = exact - logsumexp[:, None]
    assert np.abs(logprobs - np.take_along_axis(reference_logprobs, ids, 1)).max() < 1e-5
    assert sequence.logsumexp == pytest.approx(logsumexp, abs=1e-5)
    rest = 1 - np.exp(np.take_along_axis(reference_logprobs, ids, 1)).sum(axis=1)
    assert np.exp(sequence.tail) == pytest.approx(rest, rel=1 / 60)
    following = tokens[1:]
    assert sequence.target_logprob[:-1] == pytest.approx(reference_logprobs[np.arange(8), following], abs=1e-5)
    ranks = [int(np.flatnonzero(order[t] == following[t])[0]) + 1 for t in range(8)]
    assert sequence.target_rank.tolist() == [*ranks, 0]
    assert np.isnan(sequence.target_logprob[-1])
    info = logitstore.open(tmp_path / "d").info
    assert info.logit_width == 700
    if kind == "bfloat16":
        assert info.totals.encodings == {"bfloat16": 1}
        stored = logitstore.open(tmp_path / "d").select(["logits"])[0].logits.reshape(9, 50)
        assert (stored == np.take_along_axis(exact, ids, 1)).all()


def test_dense_logits_default_to_128_candidates(tmp_path):
    logits = np.random.default_rng(0).normal(0, 2, (3, 500)).astype(np.float32)
    assert write_one(tmp_path / "d", [1, 2, 3], logits, method="add_logits").count.tolist() == [128] * 3


def test_logits_below_their_rounding_keep_their_order(tmp_path):
    """Two tiny bfloat16 logits have one float32 logprob; their order is that of the logits, not of the ids."""
    logits = np.array([[1e-12, 2e-12, 3e-12, 5.0]], ml_dtypes.bfloat16)
    sequence = write_one(tmp_path / "d", [0], logits.view(np.uint16), method="add_logits")
    assert sequence.ids.tolist() == [3, 2, 1, 0]
    assert logitstore.is_valid(logitstore.validate(tmp_path / "d", deep=True))


def test_draws(tmp_path):
    sequence = write_one(
        tmp_path / "d", [1, 2, 3], [[4, 9, 2], [7, 1, 1], [0, 0, 0]], [[10, 30, 10], [50, 0, 0], [0, 0, 0]], 50, method="add_draws"
    )  # fmt: skip
    assert sequence.count.tolist() == [3, 1, 0]
    assert sequence.ids.tolist() == [9, 2, 4, 7]
    assert sequence.draws.tolist() == [30, 10, 10, 50]
    assert sequence.logprobs == pytest.approx(np.log([0.6, 0.2, 0.2, 1.0]))
    assert np.isnan(sequence.tail).all()


A = np.log([[0.5, 0.25], [0.5, 0.25]])
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("arguments", "more", "says"),
    [
        (([1, 2], [[1, 2], [3, 3]], A), {}, "position 1: the id 3 stands there twice"),
        (([1, 2], [1, 2, 3, 3], A.ravel()), {"count": [1, 3]}, "position 1: the id 3 stands there twice"),
        (([1, 2], [[1, 2], [3, 10]], A), {}, "position 1: the id 10 is not at least 0 and below the logit width 10"),
        (([1, 2], [[1, -2], [3, 4]], A), {}, "position 0: the id -2"),
        (([1, 2], [[1, 2], [3, 4]], [[-1, -2], [NAN, -2]]), {}, "position 1: the logprob nan of the id 3 is NaN"),
        (([1, 2], [[1, 2], [3, 4]], [[-1, 2.5], [-1, -2]]), {}, "position 0: the logprob 2.5 of the id 2 is above 0"),
        (([1, 2], [[1, 2], [3, 4]], [[-1, -2], [-0.1, -0.2]]), {}, "position 1: the probabilities sum to 1.7"),
        (([1, 2], [[1, 2], [3, 4], [5, 6]], [[-1.0, -2]] * 3), {}, "logprobs has 3 rows for 2 tokens"),
        (([1, 2], [[1, 2]], A), {}, r"ids has shape \[1, 2\] and logprobs \[2, 2\]"),
        (([1, 2], [1, 2, 3], [-1.0, -2, -3]), {}, "count"),
        (([1, 2], [1, 2, 3], [-1.0, -2, -3]), {"count": [1, 1]}, "count sums to 2, but 3"),
        (([1, 2], [1, 2, 3], [-1.0, -2, -3]), {"count": [4, -1]}, "position 1: count is -1"),
        (([1, 2], [[1], [2, 3]], [[-1], [-2, -3]]), {}, "cannot become one array"),
        (([1, -2], [[1, 2], [3, 4]], A), {}, "position 1: the token -2"),
        (([1.0, 2], [[1, 2], [3, 4]], A), {}, "tokens has dtype float64"),
        (([[1, 2]], [[1, 2], [3, 4]], A), {}, "tokens has shape"),
        (([1, 2], [[1.0, 2], [3, 4]], A), {}, "ids has dtype float64"),
        (([1, 2], [[1, 2], [3, 4]], [[-1, -2], [-3, -4]]), {}, "logprobs has dtype int64"),
        (([1, 2], [[1, 2], [3, 4]], A), {"tail": [-2.0, -0.1]}, "position 1: the candidates' probability"),
        (([1, 2], [[1, 2], [3, 4]], A), {"tail": [-1.0]}, r"tail has shape \[1\]"),
        (([1, 2], [[1, 2], [3, 4]], A), {"entropy": [1.0, INF]}, "position 1: entropy is infinite"),
        (([1, 2], [[1, 2], [3, 4]], A), {"loss_mask": [1, 2]}, "position 1: loss_mask is 2"),
        (([1, 2], [[1, 2], [3, 4]], A), {"target_rank": [1.5, 2]}, "target_rank has dtype float64"),
        (([1, 2], [[1, 2], [3, 4]], A), {"id": 7}, "the id 7 is no string"),
        (([1, 2], [[1, 2], [3, 4]], A), {"id": "\ud800"}, "not valid Unicode"),
        (([1, 2], [[1, 2], [3, 4]], A), {"id": "first"}, "this id was added before"),
        (([1, 2], [[1, 2], [3, 4]], A), {"tokens_": [1], "ids_": object()}, "no common Arrow type"),
        (([1, 2], [[1, 2], [3, 4]], A), {"what": (i for i in ())}, "is no data"),
        (([1, 2], [[1, 2], [3, 4]], A), {"logits": 1}, "the format uses this name"),
    ],
)
def test_bad_input_is_refused_by_sequence_position_and_value(tmp_path, arguments, more, says):
    path = tmp_path / "d"
    with pytest.raises(logitstore.InvalidInputError, match=says), logitstore.Writer(path, logit_width=10) as writer:
        writer.add([1], [[1]], [[-0.5]], id="first")
        try:
            writer.add(*arguments, **more)
        except logitstore.InvalidInputError as error:
            assert "sequence " in str(error) or "the id" in str(error)
            raise
    with pytest.raises(FileNotFoundError):
        logitstore.open(path)


def test_an_error_caught_leaves_the_writer_usable(tmp_path):
    with logitstore.Writer(tmp_path / "d", logit_width=10) as writer:
        with pytest.raises(logitstore.InvalidInputError):
            writer.add([1], [[1, 1]], [[-1.0, -2.0]], id="x")
        writer.add([1], [[1, 2]], [[-1.0, -2.0]], id="x")
    assert [s.id for s in logitstore.open(tmp_path / "d")] == ["x"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([1], [[1, 2]], [[30, 19]], 50), "position 0: the draws sum to 49, but n is 50"),
        (([1], [[1, 2]], [[51, -1]], 50), "-1 draws"),
        (([1], [[1, 1]], [[25, 25]], 50), "stands there twice"),
        (([1], [[1, 2]], [[25.0, 25]], 50), "draws has dtype float64"),
        (([1], [[1, 2]], [[25, 25]], "50"), "n is one integer"),
    ],
)
def test_bad_draws_are_refused(tmp_path, arguments, says):
    with (
        pytest.raises(logitstore.InvalidInputError, match=says),
        logitstore.Writer(tmp_path / "d", logit_width=10) as writer,
    ):
        writer.add_draws(*arguments)


@pytest.mark.parametrize(
    ("logits", "says"),
    [
        (np.zeros((2, 5), np.float64), "float64"),
        (np.zeros((3, 5), np.float32), r"shape \[3, 5\] for 2 tokens"),
        (np.array([[0, 1], [NAN, 1]], np.float32), "position 1: the highest logit is nan"),
        (np.array([[0, INF], [0, 1]], np.float32), "position 0: the highest logit is inf"),
        (np.full((2, 5), -INF, np.float32), "position 0: the highest logit is -inf"),
    ],
)
def test_bad_logits_are_refused(tmp_path, logits, says):
    with pytest.raises(logitstore.InvalidInputError, match=says), logitstore.Writer(tmp_path / "d") as writer:
        writer.add_logits([1, 2], logits)


@pytest.mark.parametrize(
    "setting",
    [
        {"values": "int8"}, {"resolution": 0.03}, {"resolution": 2.0}, {"resolution": 0}, {"top_k": 0}, {"top_p": 0},
        {"top_p": 1.5}, {"min_k": 0}, {"min_k": 5, "top_k": 4}, {"temperature": 0}, {"normalised": "no"}, {"split": "a/b"},
        {"split": ".."}, {"logit_width": 0}, {"chunk_candidates": 0}, {"shard_bytes": 0}, {"teacher": {"size": 3}},
        {"columns": pa.schema([("ids", pa.int8())])},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(tmp_path, setting):
    with pytest.raises(logitstore.InvalidInputError):
        logitstore.Writer(tmp_path / "d", **setting)
    assert not (tmp_path / "d").exists()


def test_no_tail_where_only_ratios_are_known(tmp_path):
    settings = {"normalised": "candidates"}
    assert np.isnan(write_one(tmp_path / "d", [1], [[1, 2]], [[-0.5, -1.5]], settings=settings).tail).all()
    with (
        pytest.raises(logitstore.InvalidInputError, match="there is none"),
        logitstore.Writer(tmp_path / "e", **settings) as writer,
    ):
        writer.add([1], [[1, 2]], [[-0.5, -1.5]], tail=[-1.0])


def test_unknown_teacher_tokenizer_and_width_are_null_with_a_warning(tmp_path):
    with (
        pytest.warns(logitstore.LogitStoreWarning, match="teacher, tokenizer, logit width"),
        logitstore.Writer(tmp_path / "d") as writer,
    ):
        writer.add([1], [[8, 2]], [[-0.5, -1.5]])
    info = logitstore.open(tmp_path / "d").info
    assert info.teacher is info.tokenizer is info.logit_width is None
    assert info.totals.highest_id == 8


def test_user_columns(tmp_path):
    table = {
        "text": ["a", None, "ç"], "n": [1, 2, None], "list": [[1.5], [], None], "meta": [{"a": [1]}, None, {"a": []}],
        "blob": [b"\0", b"", None], "vector": [np.arange(3), np.arange(0), None],
    }  # fmt: skip
    with logitstore.Writer(tmp_path / "d", chunk_candidates=1) as writer:
        for i in range(3):
            given_values = {name: values[i] for name, values in table.items() if values[i] is not None}
            writer.add([1], [[1]], [[-0.5]], **given_values)
    dataset = logitstore.open(tmp_path / "d")
    for i in range(3):
        for name, values in table.items():
            expected = values[i].tolist() if isinstance(values[i], np.ndarray) else values[i]
            assert dataset[i].columns[name] == expected
    assert dataset.info.user_columns["meta"] == "struct<a: list<item: int64>>"
    assert dataset.select(["text"])[2].columns == {"text": "ç"}


def test_user_columns_keep_the_type_of_the_first_chunk(tmp_path):
    with logitstore.Writer(tmp_path / "d", chunk_candidates=1) as writer:
        writer.add([1], [[1]], [[-0.5]], n=1)
        writer.add([1], [[1]], [[-0.5]])
        with pytest.raises(logitstore.InvalidInputError, match="not fit its type int64"):
            writer.add([1], [[1]], [[-0.5]], n=1.5)
        with pytest.raises(logitstore.InvalidInputError, match="not of its type int64"):
            writer.add([1], [[1]], [[-0.5]], n="one")
        with pytest.raises(logitstore.InvalidInputError, match="was not there from the beginning"):
            writer.add([1], [[1]], [[-0.5]], m=1)
    assert [s.columns["n"] for s in logitstore.open(tmp_path / "d")] == [1, None]


def test_fields_that_the_type_of_a_column_does_not_have_are_refused(tmp_path):
    kinds = pa.schema([("meta", pa.struct([("a", pa.list_(pa.struct([("b", pa.int8())])))]))])
    with logitstore.Writer(tmp_path / "d", columns=kinds) as writer:
        writer.add([1], [[1]], [[-0.5]], meta={"a": [{"b": 1}, {}]})
        with pytest.raises(logitstore.InvalidInputError, match="the field 'c'"):
            writer.add([1], [[1]], [[-0.5]], meta={"a": [{"c": 1}]})
        with pytest.raises(logitstore.InvalidInputError, match="not of its type"):
            writer.add([1], [[1]], [[-0.5]], meta={"a": [{"b": 1000}]})


def test_many_empty_sequences_are_cut_into_chunks(tmp_path):
    with logitstore.Writer(tmp_path / "d", logit_width=5) as writer:
        for _ in range(70_000):
            writer.add([], [], [], count=[])
    dataset = logitstore.open(tmp_path / "d")
    assert len(dataset) == 70_000
    assert dataset[69_999].id == "69999"
    assert [len(chunk) for chunk in dataset.chunks()] == [65_536, 4_464]


def test_a_repeated_id_is_found_among_many():
    from logitstore.dataset.ids import IdSet

    ids = IdSet()
    assert all(ids.add(str(i)) for i in range(200_000))
    assert not any(ids.add(str(i)) for i in range(0, 200_000, 997))
    assert ids.add("new")


def test_a_sequence_over_the_limit_is_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr("logitstore.dataset.part.SEQUENCE_CANDIDATES", 3)
    with logitstore.Writer(tmp_path / "d", logit_width=10) as writer:
        with pytest.raises(logitstore.InvalidInputError, match="cut the sequence up"):
            writer.add([1, 2], [[1, 2], [3, 4]], A)
        writer.add([1], [[1, 2]], A[:1])


def test_a_writer_cannot_be_used_after_its_block(tmp_path):
    with logitstore.Writer(tmp_path / "d") as writer:
        pass
    with pytest.raises(logitstore.InvalidInputError, match="closed"):
        writer.add([1], [[1]], [[-0.5]])


def test_the_summary_measures_what_rounding_cost(tmp_path, rows):
    tokens, ids, logprobs = rows(5, 40, 16)
    with logitstore.Writer(tmp_path / "d", values="grid", resolution=1 / 8) as writer:
        writer.add(tokens, ids, logprobs)
    decoded = logitstore.open(tmp_path / "d")[0].logprobs.reshape(40, 16).astype(float)
    p = np.exp(logprobs.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(decoded)
    q /= q.sum(axis=1, keepdims=True)
    assert writer.summary.mean_kl == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-3)
    assert writer.summary.max_error == pytest.approx(np.abs(decoded - logprobs).max(), abs=1e-5)
    assert writer.summary.bytes == logitstore.open(tmp_path / "d").info.totals.bytes


def test_buffers_and_values_can_be_used_again(tmp_path):
    tokens, ids, logprobs = np.array([1, 2], np.uint32), np.array([[1], [2]], np.int32), np.zeros((2, 1), np.float32)
    vector, tags, floats = np.zeros(2), ["a"], np.zeros(2, np.float32)
    with logitstore.Writer(tmp_path / "d", logit_width=10, values="grid") as writer:
        for i in range(3):
            tokens[:], ids[:], logprobs[:], vector[:], tags[0], floats[:] = i, i, -1.0 - i, i, str(i), i
            writer.add(tokens, ids, logprobs, entropy=floats, vector=vector, tags=tags)
    for i, sequence in enumerate(logitstore.open(tmp_path / "d")):
        assert sequence.tokens.tolist() == sequence.ids.tolist() == [i, i]
        assert sequence.logprobs.tolist() == [-1.0 - i] * 2
        assert sequence.entropy.tolist() == [i, i]
        assert sequence.columns == {"vector": [i, i], "tags": [str(i)]}


def test_all_shards_say_one_logit_width(tmp_path):
    with logitstore.Writer(tmp_path / "d", shard_bytes=1, chunk_candidates=1) as writer:
        writer.add([1], [[1]], [[-0.5]])
        writer.add_logits([1], np.zeros((1, 50), np.float32))
    dataset = logitstore.open(tmp_path / "d")
    assert [len(s.ids) for s in dataset] == [1, 50]
    assert dataset.info.logit_width is None


def test_logits_that_are_refused_say_no_width(tmp_path):
    with logitstore.Writer(tmp_path / "d") as writer:
        with pytest.raises(logitstore.InvalidInputError):
            writer.add_logits([1, 2], np.zeros((50, 2), np.float32))
        writer.add_logits([1, 2], np.zeros((2, 50), np.float32))
    assert logitstore.open(tmp_path / "d").info.logit_width == 50


def test_a_small_tail_beside_several_large_candidates_is_kept(tmp_path):
    """Three candidates of a third each, and 1e-6 left: sums in float32 would put the tail off."""
    third = np.float32(np.log((1 - 1e-6) / 3))
    sequence = write_one(tmp_path / "d", [1, 2], [[1, 2, 3]] * 2, np.full((2, 3), third))
    exact = np.log1p(-3 * np.exp(np.float64(third)))
    assert np.abs(sequence.tail - exact).max() <= 1 / 64


@pytest.mark.parametrize("settings", [{"teacher": "\ud800"}, {"source": logitstore.Source(files=("\udcff.jsonl",))}])
def test_text_that_is_not_unicode_is_refused_before_a_week_of_work(tmp_path, settings):
    with pytest.raises(logitstore.InvalidInputError, match="not valid Unicode"):
        logitstore.Writer(tmp_path / "d", **settings)
    assert not (tmp_path / "d").exists()


def test_a_columns_name_that_is_not_unicode_is_refused(tmp_path):
    with (
        pytest.raises(logitstore.InvalidInputError, match="not valid Unicode; rename"),
        logitstore.Writer(tmp_path / "d") as writer,
    ):
        writer.add([1], [[1]], [[-1.0]], **{"a\udcff": 1})
