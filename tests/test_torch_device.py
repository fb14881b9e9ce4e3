"""Decoding on a device: encoded sequences, their batches, and the torch form of the decoder against the numpy form."""

import dataclasses
import multiprocessing
import pickle
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.encoding.values import Encoding, Values
from logitstore.io import MappedFile
from logitstore.schema import ShardHeader, serialise_header
from logitstore.shard.chunk import StoredSequence, shard_schema
from logitstore.shard.encoded import EncodedSequence
from logitstore.shard.reader import Shard
from logitstore.shard.sequence import DEFAULT_COLUMNS
from logitstore.shard.writer import ShardWriter
from logitstore.torch.collate import HFCollator
from logitstore.torch.device import EncodedBatch, decode_batch, encoded_batch, to_device
from logitstore.torch.loader import LogitLoader, StreamingLogits

ROOT = Path(__file__).parent.parent
VECTORS = ROOT / "spec" / "vectors" / "v1"
FIXTURE = ROOT / "tests" / "data" / "gemma3-270m-shakespeare-top64.npz"
WIDTH = 500

on_each_device = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)


def write(path, sequences, **settings):
    """A dataset of these calls of the writer: (method, arguments, keywords)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        with logitstore.Writer(path, **{"logit_width": WIDTH, "teacher": "t", **settings}) as writer:
            for method, arguments, keywords in sequences:
                getattr(writer, method)(*arguments, **keywords)
    return logitstore.open(path)


def grid(random, count):
    """A sequence with these counts: its tokens and ids are few, so that some of them are in the chunk's order."""
    count = np.asarray(count)
    ids = [random.permutation(np.concatenate([np.arange(40), random.integers(40, WIDTH, 1)]))[:n] for n in count]
    logprobs = [-np.cumsum(random.uniform(0, 0.5, n)) - np.log(n + 1) - 1 for n in count]
    flat = [np.concatenate([*part, np.empty(0)]) for part in (ids, logprobs)]
    tokens = random.integers(0, 40, len(count))
    return ("add", (tokens, flat[0].astype(np.int64), flat[1].astype(np.float32)), {"count": count})


def far(random, count, nats=1500):
    """The last candidate far below: 48,000 steps of 1/32, which no int16 holds."""
    method, (tokens, ids, logprobs), keywords = grid(random, count)
    ends = np.cumsum(keywords["count"])[keywords["count"] > 0]
    logprobs[ends - 1] -= np.float32(nats)
    return method, (tokens, ids, logprobs), keywords


def wide(random, count):
    """96,000 steps: more than 16 bits hold."""
    return far(random, count, 3000)


def bfloat16(random, count):
    method, (tokens, ids, logprobs), keywords = grid(random, count)
    logits = torch.from_numpy(logprobs + 2).bfloat16().float().numpy()
    lse = np.full(len(tokens), 4.7, np.float32)
    return method, (tokens, ids, logits - np.float32(4.7)), {**keywords, "logsumexp": lse}


def drawn(random, count):
    count = np.asarray(count)
    ids = np.concatenate([*(random.permutation(60)[:n] for n in count), np.empty(0)]).astype(np.int64)
    draws = random.integers(1, 9, len(ids))
    ends = np.cumsum(count)
    n = np.array([draws[end - k : end].sum() for end, k in zip(ends, count, strict=True)], np.int64)
    return "add_draws", (random.integers(0, 60, len(count)), ids, draws, n), {"count": count}


KINDS = {
    "grid": (grid, {"values": "grid"}),
    "grid of large gaps": (far, {"values": "grid"}),
    "wide grid": (wide, {"values": "grid"}),
    "bfloat16": (bfloat16, {"values": "bfloat16"}),
    "float16": (grid, {"values": "float16"}),
    "float32": (grid, {"values": "float32"}),
    "draws": (drawn, {}),
}
COUNTS = {
    "uniform": [[7] * 6, [7] * 6, [7] * 6],
    "uniform, of several lengths": [[7] * 6, [7] * 3, [7]],
    "without the last": [[7] * 5 + [0], [0, *[7] * 4, 0]],
    "ragged": [[3, 0, 8, 1, 40], [1], [0, 2, 2, 9]],
    "ragged and uniform": [[5, 5, 5], [3, 4], [6, 6, 6, 6]],
    "one candidate": [[1, 1, 1], [1]],
    "none": [[0, 0], [0]],
    "empty sequences": [[], [4, 4], []],
}


def dense(sequences, length, k):
    """What `Sequence.dense` says of each, padded: (ids int64 [B, T, k], logprobs float32 [B, T, k])."""
    ids = np.zeros((len(sequences), length, k), np.int64)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    for row, sequence in enumerate(sequences):
        for whole, part in zip((ids, logprobs), sequence.dense(k), strict=True):
            whole[row, : len(part)] = part[:length]
    return ids, logprobs


def check_equal(batch, sequences, k=None, device="cpu"):
    if k is not None:
        batch = dataclasses.replace(batch, k=k)
    decoded = decode_batch(batch, device)
    rows, length, most = batch.shape
    k = most if k is None else k
    ids, logprobs = dense(sequences, length, k)
    assert decoded["target_ids"].device.type == device
    assert decoded["target_ids"].shape == decoded["target_logprobs"].shape == (rows, length, k)
    assert (decoded["target_ids"].dtype, decoded["target_logprobs"].dtype) == (torch.int64, torch.float32)
    np.testing.assert_array_equal(decoded["target_ids"].cpu().numpy(), ids)
    found = decoded["target_logprobs"].cpu().numpy()
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(logprobs))
    both = np.isfinite(logprobs)
    np.testing.assert_array_max_ulp(found[both], logprobs[both], 1)


def read_both(dataset):
    """(its sequences encoded, and decoded)."""
    encoded = list(dataset.with_decoding("device"))
    assert all(isinstance(sequence, EncodedSequence) for sequence in encoded)
    return encoded, list(dataset)


@on_each_device
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_what_the_sequences_say(tmp_path, kind, counts, device):
    make, options = KINDS[kind]
    random = np.random.default_rng(len(counts))
    dataset = write(tmp_path / "d", [make(random, np.array(c, np.int64)) for c in COUNTS[counts]], **options)
    encoded, plain = read_both(dataset)
    batch = encoded_batch(encoded)
    assert batch.shape[:2] == (len(plain), max(len(s) for s in plain))
    for k in (None, 1, 3, 7, 50):
        check_equal(batch, plain, k, device)


def test_the_cases_cover_every_encoding(tmp_path):
    random = np.random.default_rng(0)
    found = set()
    for name, (make, options) in KINDS.items():
        dataset = write(tmp_path / name, [make(random, [5, 3])], **options)
        found.add(dataset._shards.chunk(0, 0).encoding(0))
    assert found == set(Encoding)


@on_each_device
@pytest.mark.parametrize("name", sorted(path.name for path in VECTORS.iterdir() if path.is_dir()))
def test_every_vector_of_the_specification(name, device):
    encoded, plain = read_both(logitstore.open(VECTORS / name))
    for one, sequence in zip(encoded, plain, strict=True):
        check_equal(encoded_batch([one]), [sequence], device=device)
    if encoded:
        check_equal(encoded_batch(encoded), plain, device=device)
        check_equal(encoded_batch(encoded), plain, k=2, device=device)


@on_each_device
def test_encodings_chunks_and_datasets_mix_in_a_batch(tmp_path, device):
    random = np.random.default_rng(1)
    encoded, plain = [], []
    for number, (name, (make, options)) in enumerate(KINDS.items()):
        calls = [make(random, random.integers(0, 9, 5)), make(random, [6] * 4)]
        both = read_both(write(tmp_path / name, calls, chunk_candidates=1, resolution=2.0**-number, **options))
        encoded += both[0]
        plain += both[1]
    assert len({sequence.order.tobytes() for sequence in encoded}) > 6
    order = random.permutation(len(plain))
    check_equal(encoded_batch([encoded[i] for i in order]), [plain[i] for i in order], device=device)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3),
    counts=st.lists(
        st.one_of(st.lists(st.integers(0, 12), max_size=6), st.integers(1, 12).map(lambda k: [k] * 4)),
        min_size=1,
        max_size=4,
    ),
    k=st.none() | st.integers(1, 14),
    length=st.none() | st.integers(1, 8),
    chunk=st.sampled_from([1, 40, 2**19]),
)
def test_any_batch_is_what_the_sequences_say(seed, kinds, counts, k, length, chunk):
    random = np.random.default_rng(seed)
    encoded, plain = [], []
    with tempfile.TemporaryDirectory() as path:
        for number, kind in enumerate(kinds):
            make, options = KINDS[kind]
            calls = [make(random, np.array(c, np.int64)) for c in counts]
            both = read_both(write(Path(path) / str(number), calls, chunk_candidates=chunk, **options))
            encoded += both[0]
            plain += both[1]
    check_equal(encoded_batch(encoded, length=length), plain, k)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_sequence_is_the_beginning_of_it(tmp_path, kind):
    make, options = KINDS[kind]
    call = make(np.random.default_rng(3), [4, 0, 2, 3])
    call[2]["loss_mask"] = [1, 0, 1, 1]
    encoded, plain = read_both(write(tmp_path / "d", [call], **options))
    cut = encoded[0].cut(3)
    for name in ("tokens", "count", "loss_mask"):
        assert getattr(cut, name).tolist() == getattr(plain[0], name)[:3].tolist()
    assert cut.offsets.tolist() == [0, 4, 4, 6]
    assert len(cut.codes) == 6
    assert cut.columns == {}
    assert encoded[0].cut(4) is encoded[0]
    check_equal(encoded_batch([cut]), plain)


def test_everything_but_the_candidates_is_as_it_is_in_a_sequence(write):
    dataset = logitstore.open(write(per_sequence=lambda i: {"loss_mask": [1] * (12 + i), "n": i, "entropy": None}))
    for one, sequence in zip(*read_both(dataset), strict=True):
        for name, value in vars(sequence).items():
            if name not in ("ids", "logprobs"):
                np.testing.assert_array_equal(getattr(one, name), value)
        assert len(one) == len(sequence)
    tokens = dataset.select(["tokens"]).with_decoding("device")[0]
    assert set(vars(tokens)) == {
        "id", "normalised", "tokens", "count", "offsets", "draws",
        "encoding", "resolution", "order", "codes", "top", "gaps", "shift",
    }  # fmt: skip
    with pytest.raises(logitstore.NotSelectedError, match="'tail' was not selected"):
        _ = tokens.tail


def test_views_keep_who_decodes(write):
    dataset = logitstore.open(write())
    device = dataset.with_decoding("device")
    for view in (device[1:3], device.split("train"), device.select(["tokens"]), pickle.loads(pickle.dumps(device))):
        assert isinstance(view[0], EncodedSequence)
        assert not isinstance(view.with_decoding("cpu")[0], EncodedSequence)
    assert isinstance(device.by_id("3"), EncodedSequence)
    assert all(isinstance(sequence, EncodedSequence) for chunk in device.chunks() for sequence in chunk)
    assert not isinstance(dataset[0], EncodedSequence)
    with pytest.raises(logitstore.InvalidInputError, match="decode is 'gpu'; it can be 'cpu' or 'device'"):
        dataset.with_decoding("gpu")


def test_encoded_candidates_are_refused_where_decoded_ones_are_needed(write):
    sequence = logitstore.open(write()).with_decoding("device")[0]
    for touch in (lambda: sequence.ids, lambda: sequence.logprobs, lambda: sequence.dense(8)):
        with pytest.raises(logitstore.NotSelectedError, match=r"still encoded: .*with_decoding\('cpu'\)"):
            touch()
    with pytest.raises(AttributeError, match="no attribute 'idz'"):
        _ = sequence.idz


def test_decoded_sequences_and_empty_batches_are_refused(write):
    dataset = logitstore.open(write())
    with pytest.raises(logitstore.InvalidTypeError, match=r"a Sequence is not encoded; .*with_decoding\('device'\)"):
        encoded_batch([dataset[0]])
    with pytest.raises(logitstore.InvalidInputError, match="no sequences"):
        encoded_batch([])
    with pytest.raises(logitstore.InvalidInputError, match="k is 0"):
        encoded_batch([dataset.with_decoding("device")[0]], k=0)
    with pytest.raises(logitstore.InvalidInputError, match="length of a batch is 0"):
        encoded_batch([dataset.with_decoding("device")[0]], length=0)


def size(batch, name):
    return sum(batch.array(group.slots[name]).nbytes for group in batch.groups)


def test_a_candidate_takes_six_bytes(write):
    dataset = logitstore.open(write(sequences=8, positions=128, k=64, values="grid"))
    batch = encoded_batch(list(dataset.with_decoding("device")))
    candidates = dataset.info.totals.candidates
    assert size(batch, "codes") == 4 * candidates
    assert size(batch, "gaps") == 2 * candidates * 63 // 64
    orders = batch.array(batch.orders).nbytes
    assert 5.9 < (batch.buffer.nbytes - orders) / candidates < 6.3
    decoded = decode_batch(batch)
    assert sum(tensor.nbytes for tensor in decoded.values()) >= 12 * candidates


def test_sequences_of_a_chunk_send_its_order_once(write):
    dataset = logitstore.open(write(sequences=6, positions=40, chunk_candidates=3 * 40 * 8)).with_decoding("device")
    lengths = [len(sequence.order) for sequence in dataset]
    assert min(lengths) > 0
    chunks = [len(chunk) for chunk in dataset.chunks()]
    assert len(chunks) > 1
    shuffled = [dataset[row] for row in (5, 0, 3, 1, 4, 2)]  # each read from its chunk anew
    once = sum({sequence.order.tobytes(): len(sequence.order) for sequence in shuffled}.values())
    assert encoded_batch(shuffled).array(encoded_batch(shuffled).orders).numel() == 1 + once
    assert once < sum(lengths)


def forged(path, rows, width):
    header = ShardHeader(
        version="1.0", pco="4.1", logit_width=width, normalised="vocabulary", temperature=1.0, resolution=1 / 32
    )
    writer = ShardWriter(path, shard_schema(serialise_header(header), []))
    writer.write(rows, [])
    writer.seal()
    writer.publish()
    return Shard(MappedFile(path)).chunk(0)


def stored(name, ids, values, count=None, **optional):
    count = np.array([len(ids)] if count is None else count, np.uint32)
    return StoredSequence(name, np.zeros(len(count), np.uint32), count, np.array(ids, np.uint32), values, optional)


BFLOAT16 = Values(Encoding.BFLOAT16, np.ones(1, np.uint16), np.ones(1, np.uint16))
GRID = Values(Encoding.GRID, np.full(1, -1, np.float32), np.full(1, 8, np.uint16))


@pytest.mark.parametrize("width", [10, None])
def test_codes_past_the_table_of_ids_are_refused_before_any_device(tmp_path, width):
    limit = width or 2**31
    rows = [stored("good", [1, 2], GRID), stored("often", [3, limit], GRID), stored("often again", [4, limit], GRID)]
    rows += [stored("once", [5, limit + 7], GRID), stored("negative", [6, 2**31 + 5], GRID)]
    rows += [stored("wraps into the order", [7, 2**32 - 5], GRID), stored("good again", [1, limit - 1], GRID)]
    chunk = forged(tmp_path / "s.arrow", rows, width)
    assert len(chunk.order) < 5
    for place, row in enumerate(rows):
        if row.id.startswith("good"):
            sequence = chunk.sequence(place, DEFAULT_COLUMNS, encoded=True)
            decoded = decode_batch(encoded_batch([sequence]))
            assert decoded["target_ids"].tolist() == [[row.ids.tolist()]]
        else:
            with pytest.raises(logitstore.CorruptDataError, match=r"holds the id \d+, limit") as caught:
                chunk.sequence(place, DEFAULT_COLUMNS, encoded=True)
            assert (caught.value.code, caught.value.row) == ("id-range", place)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (stored("count", [1, 2], GRID, [900]), "cell"),
        (stored("counts", [1, 2], GRID, [2**24 + 1]), "candidates, over the limit"),
        (stored("positions", [1, 2], GRID, [1, 1]), "cell"),
        (stored("gaps", [1, 2], Values(Encoding.GRID, GRID.top, np.arange(900, dtype=np.uint16))), "cell"),
        (stored("no logsumexp", [1, 2], BFLOAT16), "logsumexp"),
        (stored("NaN", [1, 2], BFLOAT16, logsumexp=np.full(1, np.nan, np.float32)), "logsumexp"),
        (stored("draws", [1, 2], Values(Encoding.DRAWS, np.empty(0, np.uint32), np.zeros(2, np.uint32))), "drawn 0 times"),
        (stored("drawn", [1, 99], Values(Encoding.DRAWS, np.empty(0, np.uint32), np.ones(2, np.uint32))), "holds the id|not below"),
    ],
    ids=lambda value: value.id if isinstance(value, StoredSequence) else "",
)  # fmt: skip
def test_forged_cells_are_refused_before_any_device(tmp_path, row, says):
    chunk = forged(tmp_path / "s.arrow", [row], 10)
    for encoded in (False, True):
        with pytest.raises(logitstore.CorruptDataError, match=says):
            chunk.sequence(0, DEFAULT_COLUMNS, encoded=encoded)


@pytest.mark.parametrize("resolution", [1 / 32, 2.0**-20])
@pytest.mark.parametrize("encoding", [Encoding.GRID_WIDE, Encoding.FLOAT32])
def test_sums_wrap_as_the_numpy_form_does(tmp_path, encoding, resolution):
    """Over several rows, sums of 32-bit gaps leave 32 bits in any float32 sequence."""
    top = np.full(3, -1, np.float32)
    values = Values(
        encoding, top if encoding is Encoding.GRID_WIDE else top.view(np.uint32), np.full(4, 2**31 - 9, np.uint32)
    )
    chunk = forged(tmp_path / "s.arrow", [stored("a", [1, 2, 3, 4, 5, 6, 7], values, [2, 3, 2])], 10)
    plain = chunk.sequence(0, DEFAULT_COLUMNS)
    check_equal(encoded_batch([chunk.sequence(0, DEFAULT_COLUMNS, encoded=True)]), [plain])


def test_a_corrupt_chunk_is_named(write):
    dataset = logitstore.open(write())
    shard = dataset.path / dataset.info.shards[0].path
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(logitstore.CorruptDataError) as caught:
        list(dataset.with_decoding("device"))
    assert (caught.value.path, caught.value.chunk) == (str(shard), 0)


def test_sequences_and_batches_pickle(tmp_path):
    call = bfloat16(np.random.default_rng(0), [3, 0, 2])
    encoded, plain = read_both(write(tmp_path / "d", [call], values="bfloat16"))
    again = pickle.loads(pickle.dumps(encoded))
    with pytest.raises(logitstore.NotSelectedError, match="still encoded"):
        _ = again[0].ids
    batch = pickle.loads(pickle.dumps(encoded_batch(again, {"extra": torch.arange(3)[None]})))
    check_equal(batch, plain)
    assert decode_batch(batch)["extra"].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_works_in_the_workers_of_a_loader(write, method):
    path = write(sequences=10, chunk_candidates=300)
    dataset = logitstore.open(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
        loader = torch.utils.data.DataLoader(
            dataset.with_decoding("device"),
            batch_size=4,
            num_workers=2,
            collate_fn=HFCollator(pad_to_multiple_of=19),
            multiprocessing_context=multiprocessing.get_context(method),
        )
        batches = list(loader)
    for number, batch in enumerate(batches):
        plain = list(dataset[4 * number : 4 * number + 4])
        check_equal(batch, plain)
        expected = HFCollator(pad_to_multiple_of=19)(plain)["input_ids"]
        assert torch.equal(decode_batch(batch)["input_ids"], expected)
        assert batch.shape[:2] == expected.shape
    assert number == 2


def test_equals_the_collator_that_takes_decoded_sequences(tmp_path):
    """Also where k cuts: then the tail takes what is left out."""
    random = np.random.default_rng(5)
    calls = [grid(random, [6, 3, 0, 9]), grid(random, [8, 8])]
    encoded, plain = read_both(write(tmp_path / "d", calls))
    for k in (None, 2, 8, 20):
        for options in ({}, {"pad_to_multiple_of": 4}, {"max_length": 3}):
            collate = HFCollator(k=k, **options)
            expected, found = collate(plain), decode_batch(collate(encoded))
            assert expected.keys() == found.keys()
            for name in expected.keys() - {"target_tail"}:
                assert torch.equal(found[name], expected[name])
            torch.testing.assert_close(found["target_tail"], expected["target_tail"], equal_nan=True)


@on_each_device
@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_decodes_where_it_is_told(tmp_path, workers, device):
    random = np.random.default_rng(6)
    write(tmp_path / "d", [grid(random, [6, 3, 0, 9][: 1 + row % 4]) for row in range(12)])

    def batches(**options):
        stream = StreamingLogits(tmp_path / "d", batch_size=4, seed=3, decode=options.pop("decode"))
        return list(LogitLoader(stream, collate_fn=HFCollator(k=5), num_workers=workers, **options))

    for expected, found, left in zip(
        batches(decode="cpu"), batches(decode="device", device=device), batches(decode="device"), strict=True
    ):
        for name, tensor in expected.items():
            assert (found[name].device.type, left[name].device.type) == (device, "cpu")
            torch.testing.assert_close(found[name].cpu(), tensor, equal_nan=True)
            torch.testing.assert_close(left[name], tensor, equal_nan=True)


def test_batches_of_any_make_go_to_a_device():
    pair = {"signal": {"ids": torch.arange(3), "vocab_size": 7}, "parts": [torch.ones(2)], "none": None}
    moved = to_device(pair, "meta")
    assert moved["signal"]["ids"].device.type == moved["parts"][0].device.type == "meta"
    assert (moved["signal"]["vocab_size"], moved["none"]) == (7, None)


@on_each_device
def test_a_batch_goes_to_the_device_in_one_piece(write, device):
    dataset = logitstore.open(write()).with_decoding("device")
    batch = to_device(encoded_batch(list(dataset), {"extra": torch.ones(6, 17)}), device)
    assert isinstance(batch, EncodedBatch)
    assert batch.buffer.device.type == batch.columns["extra"].device.type == device
    check_equal(batch, list(dataset.with_decoding("cpu")), device=device)


@on_each_device
def test_real_rows(tmp_path, device):
    with np.load(FIXTURE) as capture:
        tokens, ids, logprobs = (capture[name] for name in ("tokens", "ids", "logprobs"))
    calls = [("add", (tokens[a : a + 512], ids[a : a + 512], logprobs[a : a + 512]), {}) for a in range(0, 2048, 512)]
    for values in ("grid", "bfloat16", "float32"):
        try:
            dataset = write(tmp_path / values, calls, values=values, logit_width=262144)
        except logitstore.InvalidInputError:
            assert values == "bfloat16"
            continue
        encoded, plain = read_both(dataset)
        check_equal(encoded_batch(encoded), plain, device=device)
