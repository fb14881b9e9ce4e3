"""`mlx-dwq`: the targets of mlx-lm's dwq, with the tokens from a file."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import logitstore
from logitstore.convert import Input, convert
from logitstore.convert.mlx_dwq import IMPORTER
from logitstore.convert.raw_logits import best_first

pytestmark = pytest.mark.usefixtures("quiet")


def targets(seed=0, rows=2, length=4, k=6, dtype=np.float32):
    """Logits and ids of a batch, in no order, as argpartition leaves them."""
    random = np.random.default_rng(seed)
    ids = random.permuted(np.tile(np.arange(100), (rows, length, 1)), axis=2)[..., :k].astype(np.uint32)
    return {"logits": (random.normal(0, 3, (rows, length, k)) + 20).astype(dtype), "indices": ids}


def save(folder, *batches):
    """The files of one split, as mlx-lm names them; bfloat16 is written by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, tensors in enumerate(batches):
        save_bfloat16(folder / f"{number:010d}.safetensors", tensors)
    return folder


def save_bfloat16(path, tensors):
    header, data = {}, b""
    for name, values in tensors.items():
        kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32", "int64": "I64"}[
            values.dtype.name
        ]
        header[name] = {"dtype": kind, "shape": list(values.shape)}
        header[name]["data_offsets"] = [len(data), len(data) + values.nbytes]
        data += values.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read(tmp_path, paths, samples, **options):
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in samples))
    done = convert(paths, tmp_path / "out", importer="mlx-dwq", tokens=path, **{"values": "float32"} | options)
    return logitstore.open(tmp_path / "out"), done.notes


def test_every_row_is_where_the_forward_pass_had_it(tmp_path):
    logits = np.array([[[20, 18, 19], [5, 7, 6], [-1, -2, -3]]], np.float16)
    ids = np.array([[[7, 8, 9], [1, 2, 3], [4, 5, 6]]], np.uint32)
    save_file({"logits": logits, "indices": ids}, tmp_path / "0000000000.safetensors")
    dataset, notes = read(tmp_path, [tmp_path / "0000000000.safetensors"], [[50, 7, 2, 4]])
    (sequence,) = dataset
    level = math.log(1 + math.exp(-1) + math.exp(-2))
    assert sequence.tokens.tolist() == [50, 7, 2, 4]
    assert sequence.count.tolist() == [3, 3, 3, 0]
    assert sequence.ids.tolist() == [7, 9, 8, 2, 3, 1, 4, 5, 6]
    assert sequence.logprobs.tolist() == pytest.approx([-level, -1 - level, -2 - level] * 3, abs=1e-6)
    assert dataset.info.normalised == "candidates"
    assert any("normalised over the candidates alone" in note for note in notes)
    assert any("row t predicts token t + 1" in note for note in notes)


def test_rows_shifted_by_one_are_refused(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 90, (4, 61))
    for shift in (1, 0):
        ids = np.stack([tokens[:, shift : 60 + shift], tokens[:, shift : 60 + shift] + 100], 2).astype(np.uint32)
        save(tmp_path / "train", {"logits": np.full(ids.shape, [9, 8], np.float32), "indices": ids})
        if shift:
            read(tmp_path, [tmp_path / "train"], tokens.tolist(), overwrite=True)
        else:
            with pytest.raises(logitstore.SourceError, match="rows are off by -1"):
                read(tmp_path, [tmp_path / "train"], tokens.tolist(), overwrite=True)


def test_padding_is_left_out_and_batches_come_in_order(tmp_path):
    batches = [targets(i) for i in range(11)]  # the eleventh behind the tenth, and not behind the first
    samples = [[i, 1, 2, 3, 4] for i in range(22)]
    samples[1] = [1, 1]
    samples[3] = [3, 1, 2, 3]
    dataset, notes = read(tmp_path, [save(tmp_path / "train", *batches)], samples)
    assert len(dataset) == 22
    for number, sequence in enumerate(dataset):
        own = samples[number]
        assert sequence.tokens.tolist() == own
        rows = min(4, len(own))
        assert sequence.count.tolist() == [6] * rows + [0] * (len(own) - rows)
        logits = batches[number // 2]["logits"][number % 2].astype(np.float64)
        ids = batches[number // 2]["indices"][number % 2]
        found_ids, found = sequence.dense(6)
        for t in range(rows):
            order = np.argsort(-logits[t])
            assert found_ids[t].tolist() == ids[t][order].tolist()
            assert found[t] == pytest.approx(logits[t][order] - np.log(np.exp(logits[t]).sum()), abs=1e-5)
    assert any("In 1 of the samples" in note for note in notes)


def test_bfloat16_logits_stay_exact(tmp_path):
    made = targets(dtype=ml_dtypes.bfloat16, rows=1, length=40, k=60)
    dataset, _ = read(tmp_path, [save(tmp_path / "t", made)], [list(range(41))], values=None)
    assert dataset.info.totals.encodings == {"bfloat16": 1}
    logits = made["logits"][0].astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")
    gaps = np.take_along_axis(logits, order, 1) - logits.max(1, keepdims=True)
    _, found = dataset[0].dense(60)
    assert found[:40] - found[:40, :1] == pytest.approx(gaps, abs=1e-5)


def test_a_directory_with_both_splits_must_say_which(tmp_path):
    save(tmp_path / "d" / "train", targets())
    save(tmp_path / "d" / "valid", targets())
    with pytest.raises(logitstore.InvalidInputError, match="name one of"):
        read(tmp_path, [tmp_path / "d"], [[1, 2]] * 2)
    assert len(read(tmp_path, [tmp_path / "d" / "valid"], [[1, 2]] * 2)[0]) == 2


def test_several_inputs_workers_and_skipping(tmp_path):
    paths = sorted(save(tmp_path / "t", targets(0), targets(1)).iterdir())
    samples = [[1, 2, 3], [1] * 9, [4, 5, 6, 7, 8], [9, 8]]
    with pytest.raises(logitstore.SourceError, match=r"0000000000.safetensors, row 1: its tokens are 9 and its rows 4"):
        read(tmp_path, paths, samples)
    shards = []
    for workers in (0, 2):
        dataset, _ = read(tmp_path, paths, samples, on_error="skip", workers=workers, overwrite=True)
        assert [s.id for s in dataset] == ["0", "2", "3"]
        shards.append(next((tmp_path / "out" / "data").rglob("*.arrow")).read_bytes())
    assert shards[0] == shards[1]


def test_tokens_are_needed_and_must_be_enough(tmp_path):
    folder = save(tmp_path / "t", targets())
    with pytest.raises(logitstore.InvalidInputError, match="--tokens FILE"):
        convert([folder], tmp_path / "out", importer="mlx-dwq")
    with pytest.raises(logitstore.SourceError, match="has 1 samples, fewer"):
        read(tmp_path, [folder], [[1, 2]])
    assert any("more samples" in note for note in read(tmp_path, [folder], [[1, 2]] * 3, overwrite=True)[1])


def test_candidates_are_sorted_as_the_writer_sorts_them():
    random = np.random.default_rng(0)
    values = random.choice(np.array([0.0, -0.0, 1e-45, -1e-45, -np.inf, 2.5, -2.5, 3e38, -3e38], np.float32), (50, 9))
    ids = random.permuted(np.tile(np.array([*range(8), 2**31 - 1]), (50, 1)), axis=1)
    found_ids, found = best_first(ids, values)
    for t in range(50):
        order = sorted(range(9), key=lambda j: (-values[t, j], -math.copysign(1, values[t, j]), ids[t, j]))
        assert found_ids[t].tolist() == ids[t, order].tolist()
        assert found[t].tobytes() == values[t, order].tobytes()


GOOD = targets()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"indices": None}, "there is no tensor 'indices'"),
        ({"logits": None}, "there is no tensor 'logits'"),
        ({"indices": GOOD["indices"][:, 1:]}, r"0000000000.safetensors: logits are float32 \[2, 4, 6\]"),
        ({"indices": GOOD["logits"]}, "indices float32"),
        ({"logits": GOOD["indices"]}, "logits are uint32"),
        ({"logits": np.where(np.arange(6) == 3, np.nan, GOOD["logits"])}, "row 0: row 0: the logit of the id"),
        ({"logits": np.where(np.arange(6) == 3, np.inf, GOOD["logits"])}, "is inf"),
        ({"logits": np.full_like(GOOD["logits"], -np.inf)}, "row 0: all logits are -inf"),
        ({"indices": np.zeros_like(GOOD["indices"])}, "the id 0 stands there twice"),
        ({"indices": GOOD["indices"].astype(np.int64) - 50}, "is not at least 0"),
    ],
)
def test_tensors_that_cannot_be_are_refused(tmp_path, change, says):
    made = {name: values for name, values in (GOOD | change).items() if values is not None}
    made = {name: v.astype(np.float32) if v.dtype == np.float64 else v for name, v in made.items()}
    save_file(made, tmp_path / "0000000000.safetensors")
    with pytest.raises((logitstore.SourceError, logitstore.InvalidInputError), match=says) as caught:
        read(tmp_path, [tmp_path / "0000000000.safetensors"], [[1, 2, 3]] * 2)
    assert "0000000000.safetensors" in str(caught.value)


def test_mutated_files_give_data_or_an_error(tmp_path):
    path = tmp_path / "0000000000.safetensors"
    save_file(targets(), path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    random = np.random.default_rng(0)
    for number in range(400):
        broken = bytearray(data)
        if number % 4:
            broken[int(random.integers(header))] = int(random.integers(256))
        else:
            broken = broken[: int(random.integers(len(data)))]
        path.write_bytes(broken)
        IMPORTER.recognises(Input(path))
        try:
            read(tmp_path, [path], [[1, 2, 3]] * 2, overwrite=True)
        except (logitstore.SourceError, logitstore.InvalidInputError):
            continue


@pytest.mark.parametrize(
    "entry",
    [
        None, 3, "x", [], {}, {"dtype": "F32"}, {"dtype": 1, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F8", "shape": [1], "data_offsets": [0, 4]}, {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]}, {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 2**72]},
    ],
)  # fmt: skip
def test_headers_of_other_shapes_are_refused(tmp_path, entry):
    text = json.dumps({"logits": entry, "indices": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    IMPORTER.recognises(Input(path))
    with pytest.raises(logitstore.SourceError, match=r"a\.safetensors"):
        read(tmp_path, [path], [[1]])


def test_recognition(tmp_path):
    path = save(tmp_path / "t", targets()) / "0000000000.safetensors"
    assert IMPORTER.recognises(Input(path))
    others = {
        "tokens": np.zeros(3, int), "lengths": np.array([3]), "logprobs": np.zeros((3, 2), np.float32),
        "ids": np.zeros((3, 2), int),
    }  # fmt: skip
    for name, tensors in {
        "arrays": others,
        "model_diff": {"logits": np.zeros((1, 2, 3), np.float32)},
        "exllama": {"token_ids": np.zeros((1, 2), int), "logits": np.zeros((1, 2, 3), np.float32)},
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert not IMPORTER.recognises(Input(tmp_path / f"{name}.safetensors"))
    np.savez(tmp_path / "a.npz", **targets())
    (tmp_path / "b.safetensors").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b'{"logits": [], "indices": []}\n')
    for name in ("a.npz", "b.safetensors", "c.jsonl"):
        assert not IMPORTER.recognises(Input(tmp_path / name))
