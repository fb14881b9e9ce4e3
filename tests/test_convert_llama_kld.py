"""`logitstore.convert`: files of llama-perplexity --kl-divergence-base."""

from __future__ import annotations

import contextlib
import math
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.convert import convert, importers, llama_kld
from logitstore.convert.base import Input, Options
from logitstore.errors import (
    IncompleteDatasetError,
    InvalidInputError,
    LogitStoreWarning,
    SourceError,
)

REAL = Path(__file__).parents[1] / "../shared/data/gemma3-270m.kld.zst"
STEP = float(np.float32(16 / 65535))
real = pytest.mark.skipif(not REAL.exists(), reason="the real capture is not here")


def lowest(q, scale=STEP, short=1e-5):
    """The lowest logprob with which a row sums to a little less than 1."""
    return -math.log(sum(math.exp(scale * value) for value in q)) - short


def row(q, scale=STEP, low=None):
    low = lowest(q, scale) if low is None else low
    padding = [0xABCD] if len(q) % 2 else []
    return struct.pack("<ff", scale, low) + np.array([*q, *padding], "<u2").tobytes()


def content(windows, n_vocab, rows, *, n_ctx=None, n_chunk=None, magic=b"_logits_"):
    """A file's bytes; `windows` are lists of tokens, `rows` bytes by window."""
    n_ctx = len(windows[0]) if n_ctx is None else n_ctx
    n_chunk = len(windows) if n_chunk is None else n_chunk
    tokens = np.array([token for window in windows for token in window], "<i4").tobytes()
    return magic + struct.pack("<3i", n_ctx, n_vocab, n_chunk) + tokens + b"".join(part for w in rows for part in w)


def small(**changes):
    """Two windows of 6 tokens with 2 rows each, 5 tokens in the vocabulary: the rows are at 3 and 4."""
    rows = [
        [row([0, 65535, 100, 60000, 100]), row([65535, 0, 0, 65535, 1])],
        [row([5, 4, 3, 2, 65535]), row([0, 0, 65535, 0, 0])],
    ]
    return content([[0, 1, 2, 3, 4, 0], [4, 3, 2, 1, 0, 2]], 5, rows, **changes)


def read(data, folder, name="in.kld", **options):
    """The dataset of these bytes, which are a file of that name in that folder."""
    path = Path(folder) / name
    path.write_bytes(data)
    convert_quietly([path], Path(folder) / "out", **options)
    return logitstore.open(Path(folder) / "out")


def convert_quietly(paths, out, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LogitStoreWarning)
        return convert(paths, out, **{"values": "float32", "importer": "llama-kld"} | options)


def squeeze(data):
    return zstandard.ZstdCompressor().compress(data)


def refused(data, folder, match, name="in.kld", **options):
    """These bytes are a `SourceError` that names the file, and leave no dataset."""
    with pytest.raises(SourceError, match=match) as caught:
        read(data, folder, name, **options)
    assert name in str(caught.value)
    with pytest.raises((logitstore.DatasetNotFoundError, IncompleteDatasetError)):
        logitstore.open(Path(folder) / "out")


def expected(q, scale, low, top_k, target):
    """What a row keeps, and what it says of its target: value by value."""
    able = [i for i, value in enumerate(q) if value > 0 or scale == 0]
    ordered = sorted(able, key=lambda i: (-q[i], i))
    scale, low = np.float32(scale), np.float32(low)
    logprobs = {i: scale * np.float32(q[i]) + low for i in able}
    ids = ordered[:top_k]
    kept = sum(math.exp(float(logprobs[i])) for i in ids)
    tail = math.log(1 - kept)
    rank = 1 + ordered.index(target) if target in able else 0
    return ids, [logprobs[i] for i in ids], tail, logprobs.get(target, math.nan), rank


def check_row(sequence, t, q, scale, low, top_k, target):
    ids, logprobs, tail, target_logprob, rank = expected(q, scale, low, top_k, target)
    part = slice(sequence.offsets[t], sequence.offsets[t + 1])
    assert sequence.ids[part].tolist() == ids
    assert sequence.logprobs[part].tolist() == logprobs
    assert abs(sequence.tail[t] - tail) <= 1 / 64 + 1e-4
    assert np.float32(sequence.target_logprob[t]) == target_logprob or math.isnan(target_logprob)
    assert math.isnan(sequence.target_logprob[t]) == math.isnan(target_logprob)
    assert sequence.target_rank[t] == rank
    assert sequence.loss_mask[t] == 1


def test_second_halves_have_rows_and_first_halves_none(tmp_path):
    dataset = read(small(), tmp_path)
    first, second = dataset
    assert [first.id, second.id] == ["0", "1"]
    assert first.tokens.tolist() == [0, 1, 2, 3, 4, 0]
    assert first.count.tolist() == [0, 0, 0, 4, 3, 0]
    assert first.loss_mask.tolist() == [0, 0, 0, 1, 1, 0]
    assert first.ids.tolist() == [1, 3, 2, 4, 0, 3, 4]  # equal values by id; 0 is at the floor
    assert first.target_rank.tolist() == [0, 0, 0, 4, 1, 0]
    assert second.target_rank.tolist() == [0, 0, 0, 2, 1, 0]
    assert np.isnan(first.target_logprob[[0, 1, 2, 5]]).all()
    assert np.isnan(first.tail[[0, 1, 2, 5]]).all()
    assert (dataset.info.logit_width, dataset.info.sampling.top_k) == (5, 128)
    assert dataset.info.source.format == "llama-kld"
    assert dataset.info.teacher is None


@st.composite
def captures(draw):
    n_ctx = draw(st.integers(3, 9))
    n_vocab = draw(st.integers(1, 9))
    n_chunk = draw(st.integers(1, 3))
    token = st.integers(0, n_vocab - 1)
    windows = draw(st.lists(st.lists(token, min_size=n_ctx, max_size=n_ctx), min_size=n_chunk, max_size=n_chunk))
    value = st.one_of(st.sampled_from([0, 1, 65534, 65535]), st.integers(0, 65535))
    scale = st.one_of(st.just(STEP), st.just(0.0), st.floats(2**-20, STEP, width=32))
    rows = []
    for _ in range(n_chunk * (n_ctx - 1 - n_ctx // 2)):
        step = draw(scale)
        q = draw(st.lists(value, min_size=n_vocab, max_size=n_vocab).filter(any)) if step else [0] * n_vocab
        rows.append((q, step, lowest(q, step)))
    return n_vocab, windows, rows, draw(st.integers(1, 10)), draw(st.booleans()), draw(st.sampled_from([1, 30, 2**22]))


@settings(max_examples=60, deadline=None)
@given(captures())
def test_every_row_is_as_a_slow_reading_has_it(capture):
    n_vocab, windows, rows, top_k, compressed, block = capture
    per_window = len(rows) // len(windows)
    parts = [[row(*rows[w * per_window + j]) for j in range(per_window)] for w in range(len(windows))]
    data = content(windows, n_vocab, parts)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_kld, "_BLOCK_BYTES", block)
        dataset = read(squeeze(data) if compressed else data, folder, top_k=top_k)
        assert len(dataset) == len(windows)
        for w, sequence in enumerate(dataset):
            assert sequence.tokens.tolist() == windows[w]
            first = len(windows[w]) // 2
            assert sequence.count[:first].sum() == sequence.count[-1] == 0
            for j in range(per_window):
                target = windows[w][first + j + 1]
                check_row(sequence, first + j, *rows[w * per_window + j], top_k, target)


@pytest.mark.parametrize("top_k", [1, 7, 300, 4000])
def test_a_wide_vocabulary_full_of_ties_is_cut_right(tmp_path, top_k):
    generator = np.random.default_rng(top_k)
    n_vocab = 4001
    rows = [generator.integers(0, high, n_vocab).tolist() for high in (2, 5, 300, 65536, 65536, 3)]
    rows[3][:] = [0] * 4000 + [9]  # one candidate only
    windows = [generator.integers(0, n_vocab, 14).tolist()]
    dataset = read(content(windows, n_vocab, [[row(q) for q in rows]]), tmp_path, top_k=top_k)
    for j, q in enumerate(rows):
        check_row(dataset[0], 7 + j, q, STEP, lowest(q), top_k, windows[0][8 + j])


def test_128_candidates_are_kept_unless_said(tmp_path):
    q = list(range(1, 201))
    dataset = read(content([[0, 1, 2]], 200, [[row(q)]]), tmp_path)
    assert dataset[0].count.tolist() == [0, 128, 0]
    assert dataset[0].ids.tolist() == list(range(199, 71, -1))
    assert dataset[0].target_rank.tolist() == [0, 198, 0]  # beyond those kept


def test_a_row_of_equal_logprobs_has_candidates(tmp_path):
    dataset = read(content([[0, 1, 2]], 4, [[row([0] * 4, 0.0, math.log(1 / 4))]]), tmp_path, top_k=3)
    assert dataset[0].ids.tolist() == [0, 1, 2]
    assert dataset[0].logprobs.tolist() == [np.float32(math.log(1 / 4))] * 3
    assert dataset[0].target_rank.tolist() == [0, 3, 0]


def test_rounding_over_1_is_brought_back(tmp_path):
    q = [65535, 65535, 65535]
    over = 1.0001 + 0.5e-4  # more than the writer takes, within half a step
    dataset = read(content([[0, 1, 2]], 3, [[row(q, STEP, math.log(over / 3) - 16)]]), tmp_path)
    logprobs = dataset[0].logprobs
    assert np.exp(logprobs.astype(float)).sum() == pytest.approx(1, abs=1e-6)
    assert logprobs == pytest.approx(math.log(1 / 3), abs=STEP)
    assert dataset[0].target_logprob[1] == logprobs[2]


def test_windows_of_two_tokens_have_no_rows(tmp_path):
    dataset = read(content([[0, 1], [1, 1]], 3, []), tmp_path)
    assert [sequence.tokens.tolist() for sequence in dataset] == [[0, 1], [1, 1]]
    assert dataset[1].count.tolist() == dataset[1].loss_mask.tolist() == [0, 0]


def test_a_file_without_windows_has_nothing_to_convert(tmp_path):
    refused(content([], 5, [], n_ctx=4), tmp_path, "no sequences")


def test_several_files_are_one_dataset(tmp_path):
    first, second = tmp_path / "a.kld", tmp_path / "b.kld.zst"
    first.write_bytes(small())
    second.write_bytes(squeeze(content([[1, 1, 1]], 5, [[row([9, 8, 7, 6, 5])]])))
    seen = []
    convert_quietly([first, second], tmp_path / "out", progress=lambda opened, _: seen.append(opened))
    assert [len(sequence) for sequence in logitstore.open(tmp_path / "out")] == [6, 6, 3]
    assert seen[-1].done() == seen[-1].total == first.stat().st_size + second.stat().st_size
    assert seen[-1].sequences == 3


def test_files_of_different_vocabularies_are_refused(tmp_path):
    (tmp_path / "a.kld").write_bytes(small())
    (tmp_path / "b.kld").write_bytes(content([[0, 0, 0]], 4, [[row([9, 8, 7, 6])]]))
    with pytest.raises(SourceError, match=r"b\.kld: its vocabulary has 4 tokens, that of .*a\.kld 5"):
        convert_quietly([tmp_path / "a.kld", tmp_path / "b.kld"], tmp_path / "out")


def test_progress_limit_and_notes(tmp_path):
    path = tmp_path / "in.kld"
    path.write_bytes(small())
    opened = importers()["llama-kld"].read([Input(path)], Options(top_k=2))
    assert (opened.total, opened.done(), opened.sequences) == (path.stat().st_size, 0, 2)
    assert opened.settings == {"top_k": 2, "logit_width": 5}
    next(opened.pieces)
    assert 0 < opened.done() <= opened.total
    done = convert_quietly([path], tmp_path / "out", limit=1)
    assert done.summary.sequences == 1
    text = " ".join(done.notes)
    assert "floor" in text
    assert "second half" in text
    assert "BOS" in text
    assert all(note.endswith(".") for note in done.notes)


def test_too_many_candidates_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_kld, "SEQUENCE_CANDIDATES", 9)
    with pytest.raises(InvalidInputError, match=r"10 candidates.*top_k"):
        read(small(), tmp_path)
    assert len(read(small(), tmp_path, top_k=4)) == 2


@pytest.mark.parametrize("top_k", [0, -1])
def test_a_top_k_below_1_is_refused(tmp_path, top_k):
    with pytest.raises(InvalidInputError, match="top_k is"):
        read(small(), tmp_path, top_k=top_k)


def test_files_are_recognised(tmp_path):
    known = llama_kld.IMPORTER.recognises
    for name, data, is_one in [
        ("plain", small(), True),
        ("zst", squeeze(small()), True),
        ("short", b"_logits", False),
        ("empty", b"", False),
        ("text", b'{"_logits_": 1}\n', False),
        ("damaged", b"\x28\xb5\x2f\xfd" + bytes(50), False),
        ("other", squeeze(b"something else"), False),
    ]:
        (tmp_path / name).write_bytes(data)
        assert known(Input(tmp_path / name)) is is_one, name
    convert_quietly([tmp_path / "plain"], tmp_path / "out", importer=None)


def test_every_cut_of_a_plain_file_is_found_before_anything_is_written(tmp_path):
    data = small()
    for length in range(len(data)):
        refused(data[:length], tmp_path, "cut off")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [True, False], ids=["cut, then compressed", "compressed, then cut"])
def test_every_cut_of_a_compressed_file_is_found(tmp_path, whole):
    data = small()
    for length in range(len(data) if whole else len(squeeze(data))):
        cut = squeeze(data[:length]) if whole else squeeze(data)[:length]
        refused(cut, tmp_path, "cut off|damaged|begin", "in.kld.zst", overwrite=True)


def test_a_cut_says_what_is_missing(tmp_path):
    data = small()
    size = 8 + 2 * 6
    refused(data[:-1], tmp_path, "1 of 4 rows are missing, from row 1 of window 1 on")
    refused(data[: -2 * size - 3], tmp_path, "3 of 4 rows are missing, from row 1 of window 0 on")
    refused(squeeze(data[: -size - 3]), tmp_path, "2 of 4 rows are missing, from row 0 of window 1 on")
    refused(data[:30], tmp_path, "4 of 4 rows are missing, from row 0 of window 0 on")
    refused(squeeze(data[:30]), tmp_path, "4 of 4 rows are missing, from row 0 of window 0 on")
    refused(data[:19], tmp_path, "inside its header")
    refused(content([[0, 1]], 3, [])[:-1], tmp_path, "0 of 0 rows are missing")


@pytest.mark.parametrize("pack", [bytes, squeeze], ids=["plain", "compressed"])
def test_bytes_behind_the_last_row_are_refused(tmp_path, pack):
    refused(pack(small() + b"\0"), tmp_path, "bytes behind its last row")


@pytest.mark.parametrize("pack", [bytes, squeeze], ids=["plain", "compressed"])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"magic": b"_logitz_"}, "does not begin with _logits_"),
        ({"n_ctx": 1}, "n_ctx 1"),
        ({"n_ctx": 0}, "n_ctx 0"),
        ({"n_ctx": -6}, "n_ctx -6"),
        ({"n_ctx": 2**31 - 1}, "header is damaged"),
        ({"n_ctx": 2**20}, "cut off"),
        ({"n_chunk": -1}, "n_chunk -1"),
        ({"n_chunk": 2**31 - 1}, "header is damaged"),
        ({"n_chunk": 2**23}, "cut off"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, pack, changes, match):
    refused(pack(small(**{"n_chunk": 1} | changes)), tmp_path, match)


@pytest.mark.parametrize("pack", [bytes, squeeze], ids=["plain", "compressed"])
@pytest.mark.parametrize("n_vocab", [0, -5, 2**22 + 1, 2**31 - 1])
def test_a_damaged_vocabulary_is_refused(tmp_path, pack, n_vocab):
    refused(pack(content([[0, 0, 0]], n_vocab, [[row([1])]])), tmp_path, f"header is damaged.*n_vocab {n_vocab}, ")


@pytest.mark.parametrize("token", [-1, 5, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path, token):
    rows = [[row([5, 4, 3, 2, 1])]] * 2
    data = content([[0, 1, 2], [0, token, 2]], 5, rows)
    refused(data, tmp_path, f"window 1, position 1: the token {token} ")


@pytest.mark.parametrize(
    ("scale", "low", "match"),
    [
        (math.nan, -1.0, "scale is negative or not finite"),
        (math.inf, -1.0, "scale is negative or not finite"),
        (-STEP, -1.0, "scale is negative or not finite"),
        (STEP, math.nan, "lowest logprob is not finite"),
        (STEP, -math.inf, "lowest logprob is not finite"),
        (STEP, 0.0, "sum to more than 1"),
        (1e38, -1.0, "sum to more than 1"),
        (0.0, -1.0, "sum to more than 1"),
        (0.0, 0.0, "sum to more than 1"),
    ],
)
def test_a_row_of_impossible_numbers_is_refused(tmp_path, scale, low, match):
    good = row([1, 2, 3, 4])
    data = content([[0, 1, 2, 3, 0, 1]] * 2, 4, [[good, good], [good, row([1, 2, 3, 4], scale, low)]])
    refused(data, tmp_path, f"window 1, row 1: .*{match}")


def test_a_row_at_the_floor_throughout_is_refused(tmp_path):
    refused(content([[0, 1, 2]], 3, [[row([0, 0, 0], STEP, -1.5)]]), tmp_path, "window 0, row 0: none of its values")


def test_no_changed_byte_is_another_kind_of_error(tmp_path):
    data = small()
    for at in range(len(data)):
        for flip in (0x01, 0x80):
            changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            (tmp_path / "in.kld").write_bytes(changed)
            with contextlib.suppress(SourceError):
                opened = importers()["llama-kld"].read([Input(tmp_path / "in.kld")], Options())
                assert len(list(opened.pieces)) == opened.sequences


@real
def test_the_real_capture_is_as_numpy_reads_it(tmp_path):
    with pytest.warns(LogitStoreWarning, match="teacher, tokenizer"):
        convert([REAL], tmp_path / "out", values="float32", top_k=200)
    data = zstandard.ZstdDecompressor().stream_reader(REAL.read_bytes()).read(2**25)
    n_ctx, n_vocab, n_chunk = struct.unpack_from("<3i", data, 8)
    assert (n_ctx, n_vocab, n_chunk) == (32, 262144, 2)
    tokens = np.frombuffer(data, "<i4", n_ctx * n_chunk, 20).reshape(n_chunk, n_ctx)
    units = np.frombuffer(data, "<u2", offset=20 + 4 * n_ctx * n_chunk).reshape(n_chunk, 15, n_vocab + 4)
    dataset = logitstore.open(tmp_path / "out")
    assert len(dataset) == n_chunk
    assert dataset.info.logit_width == n_vocab
    for window, sequence in enumerate(dataset):
        assert sequence.tokens.tolist() == tokens[window].tolist()
        assert sequence.count.tolist() == [0] * 16 + [200] * 15 + [0]
        for j in range(15):
            scale, low = units[window, j, :4].copy().view("<f4")
            q = units[window, j, 4:]
            order = np.lexsort((np.arange(n_vocab), -q.astype(int)))
            part = slice(sequence.offsets[16 + j], sequence.offsets[17 + j])
            assert sequence.ids[part].tolist() == order[:200].tolist()
            logprobs = scale * q.astype(np.float32) + low
            assert sequence.logprobs[part].tolist() == logprobs[order[:200]].tolist()
            kept = np.exp(logprobs[order[:200]].astype(float)).sum()
            assert abs(sequence.tail[16 + j] - np.log1p(-kept)) <= 1 / 64
            target = tokens[window, 17 + j]
            assert sequence.target_logprob[16 + j] == logprobs[target]
            assert order[sequence.target_rank[16 + j] - 1] == target
