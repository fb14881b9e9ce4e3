"""`convert` from npz and safetensors, and what every importer shares."""

import io
import json
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zstandard
from safetensors.numpy import save_file

import logitstore
from logitstore.convert import Importer, Input, convert, importers
from logitstore.convert.run import open_inputs

ROOT = Path(__file__).parent.parent
FIXTURE = Path(__file__).parent / "data" / "gemma3-270m-shakespeare-top64.npz"

pytestmark = pytest.mark.usefixtures("quiet")


def capture(k=4, ragged=False, seed=0):
    random = np.random.default_rng(seed)
    lengths = np.array([5, 0, 7])
    logprobs = (-np.cumsum(random.uniform(0.1, 1, (12, k)), axis=1) - 1).astype(np.float32)
    ids = random.permuted(np.tile(np.arange(50), (12, 1)), axis=1)[:, :k].astype(np.int32)
    arrays = {"tokens": random.integers(0, 50, 12), "lengths": lengths, "ids": ids, "logprobs": logprobs}
    if ragged:
        count = random.integers(0, k + 1, 12)
        keep = np.arange(k) < count[:, None]
        arrays |= {"count": count, "ids": ids[keep], "logprobs": logprobs[keep]}
    return arrays


def check(path, arrays):
    dataset = logitstore.open(path)
    assert [len(s) for s in dataset] == arrays["lengths"].tolist()
    assert np.concatenate([s.tokens for s in dataset]).tolist() == arrays["tokens"].tolist()
    assert np.concatenate([s.ids for s in dataset]).tolist() == arrays["ids"].ravel().tolist()
    decoded = np.concatenate([s.logprobs for s in dataset])
    assert np.abs(decoded - arrays["logprobs"].ravel().astype(np.float32)).max() <= 1 / 64 + 1e-6
    return dataset


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", ["npz", "compressed npz", "safetensors"])
def test_arrays(tmp_path, kind, ragged):
    arrays = capture(ragged=ragged)
    arrays["entropy"] = np.linspace(0, 2, 12).astype(np.float32)
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.npz")
    if kind == "safetensors":
        save_file(arrays, path)
    else:
        (np.savez_compressed if kind.startswith("c") else np.savez)(path, **arrays)
    done = convert([path], tmp_path / "d")
    assert done.importer == "arrays"
    dataset = check(tmp_path / "d", arrays)
    assert np.concatenate([s.entropy for s in dataset if len(s)]) == pytest.approx(arrays["entropy"])


def test_several_inputs_become_one_dataset(tmp_path):
    for i in range(2):
        np.savez(tmp_path / f"{i}.npz", **capture(seed=i))
    convert([tmp_path / "0.npz", tmp_path / "1.npz"], tmp_path / "d")
    dataset = logitstore.open(tmp_path / "d")
    assert [s.id for s in dataset] == [str(i) for i in range(6)]
    assert dataset[3].tokens.tolist() == capture(seed=1)["tokens"][:5].tolist()


def test_bfloat16_and_dense_logits(tmp_path):
    logits = np.random.default_rng(0).normal(0, 3, (12, 90)).astype(ml_dtypes.bfloat16)
    arrays = {"tokens": np.arange(12), "lengths": np.array([12]), "logits": logits.view(np.uint16)}
    np.savez(tmp_path / "a.npz", **arrays)
    convert([tmp_path / "a.npz"], tmp_path / "d", top_k=10)
    dataset = logitstore.open(tmp_path / "d")
    assert dataset.info.totals.encodings == {"bfloat16": 1}
    assert dataset.info.logit_width == 90
    best = np.sort(logits.astype(np.float32), axis=1)[:, ::-1][:, :10]
    assert (dataset.select(["logits"])[0].logits.reshape(12, 10) == best).all()


def test_bfloat16_logprobs_of_a_safetensors_file(tmp_path):
    arrays = capture()
    halves = arrays["logprobs"].astype(ml_dtypes.bfloat16)
    header, data = {}, b""
    for name, values in {**arrays, "logprobs": halves.view(np.uint16)}.items():
        kind = {"int64": "I64", "int32": "I32", "uint16": "BF16"}[values.dtype.name]
        header[name] = {
            "dtype": kind,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + values.nbytes],
        }
        data += values.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    convert([tmp_path / "a.safetensors"], tmp_path / "d")
    check(tmp_path / "d", {**arrays, "logprobs": halves})


def test_unknown_arrays_are_left_out_and_said(tmp_path):
    np.savez(tmp_path / "a.npz", **capture(), mystery=np.zeros(3))
    done = convert([tmp_path / "a.npz"], tmp_path / "d")
    assert "mystery" in done.notes[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ids": None}, "no array 'ids'"),
        ({"lengths": np.array([5, 6])}, "lengths sum to 11, but there are 12 tokens"),
        ({"lengths": np.array([13, -1])}, "non-negative"),
        ({"tokens": np.zeros((12, 1), int)}, "one dimension"),
        ({"logprobs": np.zeros((11, 4), np.float32)}, "logprobs has shape"),
        ({"entropy": np.zeros(3, np.float32)}, "entropy has shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, change, says):
    arrays = {name: value for name, value in {**capture(), **change}.items() if value is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(logitstore.SourceError, match=says):
        convert([tmp_path / "a.npz"], tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_files_cut_anywhere_are_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez_compressed(path, **capture())
    else:
        save_file(capture(), path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(logitstore.LogitStoreError):
            convert([path], tmp_path / "d", importer="arrays")
        assert not (tmp_path / "d" / "logitstore.json").exists()


def test_damaged_bytes_give_the_data_or_an_error(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **capture())
    data = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(data)
        broken[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        path.write_bytes(broken)
        try:
            convert([path], tmp_path / "d", importer="arrays", overwrite=True)
        except logitstore.LogitStoreError:
            continue
        check(tmp_path / "d", capture())


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **{**capture(), "tokens": np.array([{}] * 12, object)})
    with pytest.raises(logitstore.SourceError, match="Python objects"):
        convert([tmp_path / "a.npz"], tmp_path / "d")


def test_an_input_without_sequences_is_an_error(tmp_path):
    arrays = {"tokens": np.zeros(0, int), "lengths": np.zeros(0, int), "ids": np.zeros((0, 2), int)}
    np.savez(tmp_path / "a.npz", **arrays, logprobs=np.zeros((0, 2), np.float32))
    with pytest.raises(logitstore.SourceError, match="no sequences"):
        convert([tmp_path / "a.npz"], tmp_path / "d")


def test_bad_values_name_the_sequence(tmp_path):
    arrays = capture()
    arrays["logprobs"][6, 0] = np.nan
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(logitstore.InvalidInputError, match="sequence '2': position 1: the logprob nan"):
        convert([tmp_path / "a.npz"], tmp_path / "d")


def test_progress_and_limit(tmp_path):
    np.savez(tmp_path / "a.npz", **capture())
    seen = []
    done = convert(
        [tmp_path / "a.npz"], tmp_path / "d", limit=2,
        progress=lambda opened, summary: seen.append((opened.done(), opened.total, summary.sequences)),
    )  # fmt: skip
    assert [n for *_, n in seen] == [1, 2]
    assert seen[0][0] < seen[0][1]
    assert done.summary.sequences == 2


def test_importers_come_from_entry_points(monkeypatch):
    assert {"arrays", "llama-kld", "llama-server"} <= set(importers())
    assert all(isinstance(one, Importer) and one.name == name for name, one in importers().items())

    class Broken:
        name, value = "broken", "nowhere:IMPORTER"

        def load(self):
            raise ImportError("no module")

    monkeypatch.setattr("logitstore.convert.run.entry_points", lambda group: [Broken()])
    monkeypatch.setattr("logitstore.convert.run._loaded", {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert importers() == {}
    assert "'broken'" in str(caught[0].message)


def test_an_input_that_two_importers_recognise_must_be_named(monkeypatch):
    one = importers()["arrays"]
    monkeypatch.setattr("logitstore.convert.run.importers", lambda: {"a": one, "b": one})
    with pytest.raises(logitstore.InvalidInputError, match="say which with --from"):
        open_inputs([FIXTURE], None)


def test_zstd_inputs_are_decompressed(tmp_path):
    text = b"".join(b"line %d\n" % i for i in range(50_000))
    two = zstandard.compress(text[:1000]) + zstandard.compress(text[1000:])  # frames follow one another
    for name, data in (("a", text), ("a.zst", zstandard.compress(text)), ("b.zst", two)):
        (tmp_path / name).write_bytes(data)
        source = Input(tmp_path / name)
        assert source.head() == text[: 64 * 1024]
        assert b"\n".join(line for _, line in source.lines()) + b"\n" == text
        assert source.done() == len(data)
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(text)
    for data in (
        checked[:-20],
        checked[:-1],
        checked[:40] + b"x" + checked[41:],
        two[:-2],
        two + b"\0",
        checked + b"no",
    ):
        (tmp_path / "c.zst").write_bytes(data)
        with pytest.raises(logitstore.SourceError, match="zstd"):
            list(Input(tmp_path / "c.zst").lines())


def test_a_bomb_is_read_in_bounded_memory(tmp_path):
    """256 MiB of zeros in some 8 KB."""
    (tmp_path / "bomb.zst").write_bytes(zstandard.compress(bytes(2**28)))
    source = Input(tmp_path / "bomb.zst")
    assert source.head() == bytes(64 * 1024)
    with source.open() as file:
        assert sum(len(part) for part in iter(lambda: file.read(2**20), b"")) == 2**28


def test_standard_input(monkeypatch):
    class Piped:
        def __init__(self, data):
            self.buffer = io.BufferedReader(io.BytesIO(data))

    for data in (b"one\ntwo\n", zstandard.compress(b"one\ntwo\n")):
        monkeypatch.setattr(sys, "stdin", Piped(data))
        source = Input(Path("-"))
        assert source.head() == b"one\ntwo\n"
        assert list(source.lines()) == [(1, b"one"), (2, b"two")]


def test_the_shakespeare_fixture_keeps_its_bounds(tmp_path):
    """A real capture in the public domain: 2,096 positions of Gemma 3 270M, k = 64."""
    done = convert([FIXTURE], tmp_path / "d", values="grid", logit_width=262_144)
    assert done.summary.positions == 2096
    assert done.summary.max_error <= 1 / 64 + 1e-6
    assert done.summary.mean_kl < 3e-5
    arrays = np.load(FIXTURE)
    dataset = logitstore.open(tmp_path / "d")
    ids = np.concatenate([s.dense(64)[0] for s in dataset])
    assert (ids == arrays["ids"]).all()
    assert logitstore.is_valid(logitstore.validate(tmp_path / "d", deep=True))
