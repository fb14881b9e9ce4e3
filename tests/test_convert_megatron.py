"""`megatron`: tars of Megatron-LM, with the tokens from a file; and files of torch.save, read without torch."""

import hashlib
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from safetensors.numpy import save_file

import logitstore
from logitstore.convert import Input, convert, importers
from logitstore.convert.megatron import IMPORTER
from logitstore.convert.torch_file import read_torch

pytestmark = pytest.mark.usefixtures("quiet")

IDENTIFIERS = {
    "seed": 1234,
    "sequence_length": 4,
    "train_samples": 1000000,
    "blend": {"kind": "blend", "blend": [[1.0, "mydata_text_document"]]},
}
SAVER = {"k": 3, "p": 0.95, "min_k": 1, "save_dtype": "fp16"}
MASKED = 131071


def meta(identifiers=IDENTIFIERS, saver=SAVER, **more):
    text = json.dumps(identifiers, sort_keys=False, separators=(",", ":"))
    said = {"hash": hashlib.md5(text.encode()).hexdigest(), "identifiers": identifiers, "saver": saver} | more
    return json.dumps(said, separators=(",", ":")).encode()


def packed(ids):
    """The low bits and the high bit of ids, as Megatron-LM has them."""
    return (ids & 0xFFFF).to(torch.uint16), (ids >> 16).to(torch.bool)


def saved(batches):
    """The bytes of an iteration; `batches` are pairs of values and ids [S, B, K]."""
    halves = [packed(ids) for _, ids in batches]
    buffer = io.BytesIO()
    torch.save(
        {
            "values": [values for values, _ in batches],
            "indices_low": [low for low, _ in halves],
            "bit_17": [high for _, high in halves],
        },
        buffer,
    )
    return buffer.getvalue()


def tar(path, members):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def capture(path, iterations, first=0, says=None):
    """A tar of iterations, each a list of (values, ids)."""
    members = [
        (f"{first + number}.pt.zst", zstandard.ZstdCompressor(level=3).compress(saved(batches)))
        for number, batches in enumerate(iterations)
    ]
    return tar(path, [("_meta.json", says or meta()), *members])


def batch(seed, positions=4, rows=2, k=3, dtype=torch.float16):
    """Values and ids of a microbatch; ids on both sides of 2^16."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.rand((positions, rows, 40), generator=random).argsort(-1)[..., :k] + 65516
    values = torch.log_softmax(torch.randn((positions, rows, k + 1), generator=random), -1)[..., :k]
    return values.sort(-1, descending=True).values.to(dtype), ids


def read(tmp_path, paths, tokens, **options):
    if not hasattr(tokens, "suffix"):
        np.save(tmp_path / "tokens.npy", np.asarray(tokens))
        tokens = tmp_path / "tokens.npy"
    done = convert(paths, tmp_path / "out", tokens=tokens, **{"values": "float32", "importer": "megatron"} | options)
    return logitstore.open(tmp_path / "out"), done.notes


def refused(tmp_path, match, paths, tokens=None, error=logitstore.SourceError):
    with pytest.raises(error, match=match):
        read(tmp_path, paths, np.zeros((2, 4), int) if tokens is None else tokens)
    assert not (tmp_path / "out" / "logitstore.json").exists()


def test_every_row_is_where_the_forward_pass_had_it(tmp_path):
    values = torch.tensor([[[-0.25, -2.0]], [[-0.5, -1.5]], [[-0.75, -1.0]]], dtype=torch.float16)
    ids = torch.tensor([[[11, 65535]], [[12, 65536]], [[13, 131070]]])
    says = meta(IDENTIFIERS | {"sequence_length": 3})
    path = capture(tmp_path / "cp0_dp0__0.tar", [[(values, ids)]], says=says)
    dataset, notes = read(tmp_path, [path], [[10, 11, 12, 13]])  # one more than rows: the last target
    (sequence,) = dataset
    assert sequence.tokens.tolist() == [10, 11, 12, 13]
    assert sequence.count.tolist() == [2, 2, 2, 0]
    assert sequence.ids.tolist() == [11, 65535, 12, 65536, 13, 131070]
    assert sequence.logprobs.tolist() == [-0.25, -2.0, -0.5, -1.5, -0.75, -1.0]
    assert sequence.id == "0"
    assert dataset.info.normalised == "vocabulary"
    assert any("predicts the token after position s" in note for note in notes)
    assert any("order of Megatron's sampler" in note for note in notes)


def test_rows_shifted_by_one_are_refused(tmp_path):
    positions = 60
    tokens = torch.randint(0, 1000, (positions + 1, 4), generator=torch.Generator().manual_seed(0))
    for shift, fits in ((1, True), (0, False)):
        ids = torch.stack([tokens[shift : positions + shift], tokens[shift : positions + shift] + 1000], -1)
        values = torch.tensor([-0.25, -2.0], dtype=torch.float16).expand(positions, 4, 2).contiguous()
        says = meta(IDENTIFIERS | {"sequence_length": positions})
        path = capture(tmp_path / "cp0_dp0__0.tar", [[(values, ids)]], says=says)
        if fits:
            read(tmp_path, [path], tokens.T, overwrite=True)
        else:
            with pytest.raises(logitstore.SourceError, match="rows are off by -1"):
                read(tmp_path, [path], tokens.T, overwrite=True)


def test_as_many_tokens_as_rows_keep_the_last_row(tmp_path):
    path = capture(tmp_path / "cp0_dp0__0.tar", [[batch(0, rows=1)]])
    dataset, _ = read(tmp_path, [path], [[1, 2, 3, 4]])
    assert dataset[0].count.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("sentinel", [-1e3, -1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masked_entries_are_left_out(tmp_path, sentinel, dtype):
    values, ids = batch(0, rows=1, dtype=dtype)
    values[1, 0, 1:] = sentinel
    ids[1, 0, 1:] = -1
    path = capture(tmp_path / "cp0_dp0__0.tar", [[(values, ids)]])
    dataset, _ = read(tmp_path, [path], [[1, 2, 3, 4]])
    assert dataset[0].count.tolist() == [3, 1, 3, 3]
    assert MASKED not in dataset[0].ids
    kept = values[values > -999].float()
    assert dataset[0].logprobs.tolist() == kept.tolist()


def test_iterations_microbatches_and_batches_come_in_the_order_of_the_sampler(tmp_path):
    iterations = [[batch(10 * i + m) for m in range(2)] for i in range(3)]
    path = capture(tmp_path / "cp0_dp0__9.tar", iterations, first=7)
    tokens = np.arange(12 * 5).reshape(12, 5)
    dataset, _ = read(tmp_path, [path], tokens)
    wanted = [(values[:, b].float(), ids[:, b]) for batches in iterations for values, ids in batches for b in range(2)]
    assert len(dataset) == 12
    for sequence, (values, ids), own in zip(dataset, wanted, tokens, strict=True):
        assert sequence.tokens.tolist() == own.tolist()
        found_ids, found = sequence.dense(3)
        for s in range(4):
            order = sorted(range(3), key=lambda j: (-values[s, j], ids[s, j]))
            assert found_ids[s].tolist() == [ids[s, j] for j in order]
            assert found[s].tolist() == [values[s, j] for j in order]


def test_ranks_are_read_side_by_side(tmp_path):
    """A microbatch of the sampler is split over the data-parallel ranks; the files come in any order."""
    paths = []
    for last in (1, 3):
        for rank in (1, 0):
            iterations = [[batch(100 * rank + 10 * i + m, rows=1) for m in range(2)] for i in (last - 1, last)]
            paths.append(capture(tmp_path / f"cp0_dp{rank}__{last}.tar", iterations, first=last - 1))
    dataset, _ = read(tmp_path, paths[::-1], np.arange(16 * 4).reshape(16, 4))
    seeds = [100 * rank + 10 * i + m for i in range(4) for m in range(2) for rank in range(2)]
    for sequence, seed in zip(dataset, seeds, strict=True):
        assert set(sequence.ids.tolist()) == set(batch(seed, rows=1)[1].ravel().tolist())


def test_several_inputs_of_one_rank(tmp_path):
    for first in (10, 9):
        capture(tmp_path / f"cp0_dp0__{first}.tar", [[batch(first, rows=1)]], first=first)
    dataset, _ = read(tmp_path, [tmp_path], [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert [s.tokens[0] for s in dataset] == [1, 5]
    assert set(dataset[0].ids.tolist()) == set(batch(9, rows=1)[1].ravel().tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_one_by_rounding_are_scaled_and_counted(tmp_path, dtype):
    values = torch.full((4, 1, 2), float(np.log(0.5)), dtype=dtype)
    step = 2.0**-11 if dtype is torch.float16 else 2.0**-8
    values += step if float(values[0, 0, 0]) < np.log(0.5) else 0
    assert float(values[0, 0].double().exp().sum()) > 1 + 1e-4
    path = capture(tmp_path / "cp0_dp0__0.tar", [[(values, torch.tensor([5, 6]).expand(4, 1, 2))]])
    dataset, notes = read(tmp_path, [path], [[1, 2, 3, 4]])
    assert dataset[0].logprobs.tolist() == pytest.approx([np.log(0.5)] * 8, abs=1e-6)
    assert any("In 4 of the positions" in note for note in notes)


def test_more_tokens_than_samples_are_said(tmp_path):
    path = capture(tmp_path / "cp0_dp0__0.tar", [[batch(0)]])
    _, notes = read(tmp_path, [path], np.zeros((5, 4), int))
    assert any("more samples than the capture: its first 2" in note for note in notes)
    _, notes = read(tmp_path, [path], np.zeros((2, 4), int), overwrite=True)
    assert not any("more samples" in note for note in notes)


SAMPLES = [[1, 2, 3, 4], [5, 6, 7, 8, 9]]


def token_file(folder, kind):
    padded = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    path = folder / f"tokens.{kind}"
    if kind == "npy":
        np.save(path, padded)
    elif kind == "npz":
        np.savez(path, input_ids=padded.astype(np.uint16), other=padded)
    elif kind == "safetensors":
        save_file({f"tensor.{i}": padded[i : i + 1] for i in range(2)}, path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"input_ids": row, "x": None}) + "\n" for row in SAMPLES))
    elif kind == "parquet":
        pq.write_table(pa.table({"tokens": pa.array(SAMPLES, pa.list_(pa.int32())), "x": [1, 2]}), path)
    return path


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "jsonl", "parquet"])
def test_tokens_come_from_any_of_these(tmp_path, kind):
    path = capture(tmp_path / "cp0_dp0__0.tar", [[batch(0)]])
    dataset, _ = read(tmp_path, [path], token_file(tmp_path, kind))
    ragged = kind in ("jsonl", "parquet")
    assert [s.tokens.tolist() for s in dataset] == [[1, 2, 3, 4], [5, 6, 7, 8, 9] if ragged else [5, 6, 7, 8]]


def test_flat_tokens_with_lengths(tmp_path):
    path = capture(tmp_path / "cp0_dp0__0.tar", [[batch(0)]])
    np.savez_compressed(tmp_path / "t.npz", tokens=np.arange(9), lengths=np.array([4, 5]))
    dataset, _ = read(tmp_path, [path], tmp_path / "t.npz")
    assert [s.tokens.tolist() for s in dataset] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    np.savez(tmp_path / "t.npz", tokens=np.arange(10), lengths=np.array([4, 5]))
    refused(tmp_path / "2", "lengths do not sum", [path], tmp_path / "t.npz")


def as_npy(path, array):
    with path.open("wb") as file:
        np.save(file, array)


def as_npz(path, **arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.write_bytes(b""), "fewer than the capture"),
        (lambda p: p.write_bytes(b"PK\x03\x04 nothing"), "cannot be read as tokens"),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\xff"), "cannot be read as tokens"),
        (lambda p: p.write_bytes(b"[1, 2]\n"), "line 1: no JSON object"),
        (lambda p: p.write_bytes(b'{"ids": [1]}\n'), "line 1: there is neither input_ids nor tokens"),
        (lambda p: p.write_bytes(b'{"tokens": [1, null, 2, 3]}\n'), "line 1: tokens holds null"),
        (lambda p: p.write_bytes(b'{"tokens": ["a"]}\n'), "line 1: tokens"),
        (lambda p: as_npy(p, np.zeros((2, 4))), "tokens are float64"),
        (lambda p: as_npy(p, np.zeros(8, int)), "of 1 dimensions"),
        (lambda p: as_npy(p, np.array([{}], object)), "cannot be read as tokens"),
        (lambda p: as_npz(p, a=np.zeros(2), b=np.zeros(2)), "no array `tokens`"),
        (lambda p: as_npy(p, np.zeros((1, 4), int)), "has 1 samples, fewer than the capture"),
        (lambda p: as_npy(p, np.zeros((2, 6), int)), "its tokens are 6 and its rows 4"),
        (lambda p: as_npy(p, np.zeros((2, 3), int)), "microbatch 0, row 0: its tokens are 3"),
        (lambda p: as_npy(p, np.full((2, 4), -1)), "the token -1"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tmp_path, make, says):
    path = capture(tmp_path / "cp0_dp0__0.tar", [[batch(0)]])
    make(tmp_path / "t")
    refused(tmp_path, says, [path], tmp_path / "t", logitstore.LogitStoreError)


def test_without_tokens_it_says_that_they_are_needed(tmp_path):
    path = capture(tmp_path / "cp0_dp0__0.tar", [[batch(0)]])
    with pytest.raises(logitstore.InvalidInputError, match=r"holds no tokens.*--tokens FILE"):
        convert([path], tmp_path / "out")


def test_a_sample_that_does_not_fit_can_be_skipped(tmp_path):
    path = capture(tmp_path / "cp0_dp0__0.tar", [[batch(0)]])
    (tmp_path / "t.jsonl").write_text('{"tokens": [1, 2]}\n{"tokens": [1, 2, 3, 4]}\n')
    done = convert([path], tmp_path / "out", tokens=tmp_path / "t.jsonl", on_error="skip")
    assert (done.skipped, done.summary.sequences) == (1, 1)
    assert logitstore.open(tmp_path / "out")[0].id == "1"


def test_compressed_tars_and_workers_give_the_same(tmp_path):
    iterations = [[batch(10 * i + m) for m in range(2)] for i in range(2)]
    path = capture(tmp_path / "cp0_dp0__1.tar", iterations)
    squeezed = tmp_path / "z" / "cp0_dp0__1.tar.zst"
    squeezed.parent.mkdir()
    squeezed.write_bytes(zstandard.compress(path.read_bytes()))
    np.save(tmp_path / "t.npy", np.zeros((8, 4), int))
    for name, source, workers in (("a", path, 0), ("b", squeezed, 2)):
        convert([source], tmp_path / name, tokens=tmp_path / "t.npy", workers=workers)
    shard = "data/train/train-00000.arrow"
    assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()


def payload(data):
    return [("_meta.json", meta()), ("0.pt.zst", data)]


def packed_save(tree):
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return zstandard.compress(buffer.getvalue())


GOOD_VALUES, GOOD_IDS = batch(0)
LOW, HIGH = packed(GOOD_IDS)
GOOD = {"values": [GOOD_VALUES], "indices_low": [LOW], "bit_17": [HIGH]}


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([], "no whole tar|cut off"),
        ([("0.pt.zst", b"")], "_meta.json does not come first"),
        ([("_meta.json", b"{")], "_meta.json: not what Megatron-LM writes"),
        ([("_meta.json", b"[1]")], "_meta.json: not what"),
        ([("_meta.json", b"[" * 100000)], "_meta.json: not what"),
        ([("_meta.json", b'{"identifiers": 3}')], "_meta.json: not what"),
        ([("_meta.json", b" " * 2**21)], "over the limit"),
        ([("_meta.json", meta(hash="0" * 32))], "hash is '0000.*but the identifiers give"),
        ([("_meta.json", meta())], "cut off"),
        ([("_meta.json", meta()), ("1.pt.zst", packed_save(GOOD))], "its name says iteration 0, but it ends with 1"),
        (payload(b"nothing"), "iteration 0: damaged zstd data"),
        (payload(zstandard.compress(b"nothing")), "iteration 0: no file of torch.save"),
        (payload(zstandard.compress(bytes(2**27))), "decompresses to more than"),
        (payload(packed_save([GOOD_VALUES])), "no list of tensors 'values'"),
        (payload(packed_save(GOOD | {"bit_17": HIGH})), "no list of tensors 'bit_17'"),
        (payload(packed_save(GOOD | {"bit_17": []})), "not of as many microbatches"),
        (payload(packed_save(GOOD | {"bit_17": [LOW]})), "microbatch 0: .* are float16, uint16 and uint16"),
        (payload(packed_save(GOOD | {"values": [GOOD_VALUES[1:]]})), r"have the shapes \(3, 2, 3\)"),
        (payload(packed_save({k: [t[0][1:]] for k, t in GOOD.items()})), "sequence_length is 4"),
        (payload(packed_save({k: [torch.cat([t[0]] * 2, -1)] for k, t in GOOD.items()})), "the saver's k is 3"),
        ([*payload(packed_save(GOOD)), ("0.pt.zst", packed_save(GOOD))], "iteration 0 comes behind 0"),
    ],
)
def test_other_tars_are_refused(tmp_path, members, says):
    path = tar(tmp_path / "cp0_dp0__0.tar", members)
    refused(tmp_path, says, [path])
    with pytest.raises(logitstore.SourceError) as caught:
        read(tmp_path, [path], np.zeros((4, 4), int), overwrite=True, importer="megatron")
    assert path.name in str(caught.value)


def test_values_that_cannot_be_are_refused_with_their_place(tmp_path):
    for value, says in ((float("nan"), "nan"), (0.5, "above 0"), (-0.01, "sum to")):
        values, ids = batch(0)
        values[2, 1, :2] = value
        path = capture(tmp_path / "cp0_dp0__0.tar", [[(values, ids)]])
        refused(tmp_path, f"iteration 0, microbatch 0, row 1: .*position 2.*{says}", [path], None, ValueError)
    values, ids = batch(0)
    ids[1, 0, 1] = ids[1, 0, 0]
    path = capture(tmp_path / "cp0_dp0__0.tar", [[(values, ids)]])
    refused(tmp_path, "position 1: the id .* stands there twice", [path], None, ValueError)


def test_sets_of_files_that_do_not_fit_are_refused(tmp_path):
    one = capture(tmp_path / "cp0_dp0__0.tar", [[batch(0)]])
    context = capture(tmp_path / "cp1_dp0__0.tar", [[batch(0)]])
    refused(tmp_path, "context parallelism", [one, context])
    other = capture(tmp_path / "cp0_dp1__1.tar", [[batch(0)]], first=1)
    refused(tmp_path, "give the files of all ranks", [one, other])
    refused(tmp_path, "must be named", [one, tar(tmp_path / "x.tar", payload(b""))])
    rank = capture(tmp_path / "cp0_dp1__0.tar", [[batch(0), batch(1)]])
    refused(tmp_path, "numbers of microbatches", [one, rank])
    changed = capture(tmp_path / "cp0_dp0__1.tar", [[batch(0)]], first=1, says=meta(IDENTIFIERS | {"seed": 1}))
    refused(tmp_path, "its hash in _meta.json is another", [one, changed], np.zeros((4, 4), int))
    (tmp_path / "b").mkdir()
    again = capture(tmp_path / "b" / "cp0_dp0__0.tar", [[batch(0)]])
    refused(tmp_path, "a second file", [one, again])


def test_names_that_say_too_much_end_within_bounds(tmp_path):
    """A tar can say that a name has any length; it stays unread where it is longer than names are."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**26
    (tmp_path / "cp0_dp0__0.tar.zst").write_bytes(zstandard.compress(info.tobuf() + bytes(2**26 + 10240)))
    with pytest.raises(logitstore.SourceError, match="more headers"):
        read(tmp_path, [tmp_path / "cp0_dp0__0.tar.zst"], np.zeros((2, 4), int), importer="megatron")


def test_files_cut_anywhere_and_damaged_bytes(tmp_path):
    path = capture(tmp_path / "cp0_dp0__1.tar", [[batch(0)], [batch(1)]])
    data = path.read_bytes()
    wanted = list(read(tmp_path, [path], np.zeros((4, 4), int))[0])
    random = np.random.default_rng(0)
    used = data.rstrip(b"\0")
    for number in range(300):
        broken = bytearray(data)
        if number % 3:
            broken[int(random.integers(len(used)))] ^= 1 << int(random.integers(8))
        else:
            broken = broken[: int(random.integers(len(used)))]
        path.write_bytes(broken)
        try:
            dataset, _ = read(tmp_path, [path], np.zeros((4, 4), int), overwrite=True, importer="megatron")
        except (logitstore.SourceError, logitstore.InvalidInputError):
            continue
        assert [s.ids.tolist() for s in dataset] == [s.ids.tolist() for s in wanted]


def test_pickles_are_walked_and_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    for tree in (Evil(), {"values": [Evil()]}, {"values": [np.float64(1)]}):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(tree, 2))
        with pytest.raises(logitstore.SourceError, match=r"no file of torch\.save"):
            read_torch(buffer)


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # of a mutated name
def test_mutated_pickles_give_tensors_or_an_error(capsys):
    buffer = io.BytesIO(saved([batch(0)]))
    with zipfile.ZipFile(buffer) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    random = np.random.default_rng(1)
    tried = 0
    for _ in range(3000):
        broken = bytearray(members[name])
        for _ in range(int(random.integers(1, 4))):
            broken[int(random.integers(len(broken)))] = int(random.integers(256))
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for other, data in members.items():
                archive.writestr(other, bytes(broken) if other == name else data)
        try:
            found = read_torch(buffer)
            lists = found.values() if isinstance(found, dict) else []
            for tensor in [t for each in lists if isinstance(each, list) for t in each if hasattr(t, "read")]:
                assert tensor.read().nbytes <= 4096
                tried += 1
        except logitstore.SourceError:
            continue
    assert tried > 100
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "bool"],
)
def test_tensors_are_read_as_torch_reads_them(dtype):
    made = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    tensors = [made, made.transpose(0, 2), made[1:, ::2], made[0, 0, 0], made[:0], made[..., -1]]
    buffer = io.BytesIO()
    torch.save({"a": tensors, "b": ({"c": 1, "d": None}, 2.5, True, "text", -7)}, buffer)
    found = read_torch(buffer)
    assert found["b"] == ({"c": 1, "d": None}, 2.5, True, "text", -7)
    for tensor, wanted in zip(found["a"], tensors, strict=True):
        assert tensor.read().shape == tuple(wanted.shape)
        assert tensor.read().tolist() == wanted.tolist()


def test_recognition(tmp_path):
    path = capture(tmp_path / "cp0_dp0__0.tar", [[batch(0)]])
    assert IMPORTER.recognises(Input(path))
    assert importers()["megatron"] is IMPORTER or importers()["megatron"].name == "megatron"
    others = {"a.tar": tar(tmp_path / "a.tar", [("x.json", b"{}")]).read_bytes()}
    others |= {"b.jsonl": b'{"hash": "_meta.json"}\n', "c.zst": b"\x28\xb5\x2f\xfd\x00", "d": b""}
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
        assert not IMPORTER.recognises(Input(tmp_path / name))
