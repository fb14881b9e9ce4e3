"""`maxtext`: ArrayRecord files of tf.train.Examples. The package array_record writes them here, as it does in MaxText."""

import builtins
import math
import struct

import ml_dtypes
import numpy as np
import pytest

import logitstore
from logitstore.convert import Input, convert, maxtext
from logitstore.convert.maxtext import IMPORTER
from logitstore.convert.tf_example import read_example

pytestmark = pytest.mark.usefixtures("quiet")


def varint(value):
    value &= 2**64 - 1
    found = b""
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def message(*fields):
    """The bytes of (number, bytes) fields."""
    return b"".join(varint(number << 3 | 2) + varint(len(data)) + data for number, data in fields)


def feature(values, packed=True):
    """A Feature of integers or floats, as TensorFlow serialises it; or with one field a value."""
    values = np.asarray(values).ravel()
    floats = values.dtype.kind == "f"
    each = [struct.pack("<f", v) if floats else varint(int(v)) for v in values]
    if packed:
        found = message((1, b"".join(each)))
    else:
        found = b"".join(varint(1 << 3 | (5 if floats else 0)) + value for value in each)
    return message((2 if floats else 3, found))


def example(features, packed=True):
    entries = [(1, message((1, name.encode()), (2, feature(values, packed)))) for name, values in features.items()]
    return message((1, message(*entries)))


def one(name, *values):
    """An Example of one feature, or what is like one."""
    return message((1, message((1, message((1, name), *((2, value) for value in values))))))


SAMPLE = {
    "inputs": [50, 7, 2, 4],
    "top_k_logits": np.array([[20, 19, 18], [7, 6, 5], [-1, -2, -3], [3, 2, 1]], np.float32),
    "top_k_indices": [[7, 9, 8], [2, 3, 1], [4, 5, 6], [9, 8, 7]],
    "sequence_hash": [-123456789],
}
PACKED = SAMPLE | {
    "inputs": [50, 7, 60, 4],
    "targets": [7, 2, 4, 9],
    "inputs_position": [0, 1, 0, 1],
    "inputs_segmentation": [1, 1, 2, 2],
    "targets_segmentation": [1, 1, 2, 2],
}


def write(path, *records):
    """An ArrayRecord file with MaxText's options."""
    module = pytest.importorskip("array_record.python.array_record_module", reason="array_record writes the fixtures")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record if isinstance(record, bytes) else example(record))
    writer.close()
    return path


def read(tmp_path, *records, **options):
    path = write(tmp_path / "teacher_top_k_part_00000_host_000.array_record", *records)
    return read_files(tmp_path, [path], **options)


def read_files(tmp_path, paths, **options):
    done = convert(paths, tmp_path / "out", **{"values": "float32", "importer": "maxtext"} | options)
    return logitstore.open(tmp_path / "out"), done.notes


LEVEL = math.log(1 + math.exp(-1) + math.exp(-2))


def test_every_row_is_where_the_forward_pass_had_it(tmp_path):
    dataset, notes = read(tmp_path, SAMPLE)
    (sequence,) = dataset
    assert sequence.tokens.tolist() == [50, 7, 2, 4]
    assert sequence.count.tolist() == [3, 3, 3, 3]
    assert sequence.ids.tolist() == [7, 9, 8, 2, 3, 1, 4, 5, 6, 9, 8, 7]
    assert sequence.logprobs.tolist() == pytest.approx([-LEVEL, -1 - LEVEL, -2 - LEVEL] * 4, abs=1e-6)
    assert dataset.info.normalised == "candidates"
    assert (sequence.id, set(sequence.columns.values())) == ("0", {None})
    assert any("normalised over the candidates alone" in note for note in notes)
    assert any("predicts targets[t]" in note for note in notes)


def test_documents_one_after_another_and_their_ends(tmp_path):
    dataset, notes = read(tmp_path, PACKED)
    (sequence,) = dataset
    assert sequence.tokens.tolist() == [50, 7, 60, 4, 9]  # the last row's target is behind them
    assert sequence.count.tolist() == [3, 3, 3, 3, 0]
    assert sequence.loss_mask.tolist() == [1, 0, 1, 1, 0]  # row 1 predicts 2, the end of its document, and not 60
    assert sequence.columns == {name: PACKED[name] for name in maxtext._OPTIONAL}
    assert any("In 1 of the positions" in note for note in notes)


def test_padding_and_prompts_are_not_trained_on(tmp_path):
    said = PACKED | {
        "inputs": [50, 7, 2, 0], "targets": [7, 2, 0, 0], "inputs_segmentation": [1, 1, 1, 0],
        "targets_segmentation": [0, 1, 0, 0],
    }  # fmt: skip
    dataset, notes = read(tmp_path, said)
    assert dataset[0].tokens.tolist() == [50, 7, 2]
    assert dataset[0].count.tolist() == [3, 3, 3]
    assert dataset[0].loss_mask.tolist() == [0, 1, 0]
    assert dataset[0].columns["targets"] == [7, 2, 0]
    assert any("In 1 of the samples there is padding" in note for note in notes)


def test_segmentation_without_targets(tmp_path):
    dataset, _ = read(tmp_path, SAMPLE | {"inputs_segmentation": [1, 1, 2, 2]})
    assert dataset[0].loss_mask.tolist() == [1, 0, 1, 1]
    dataset, _ = read(tmp_path, SAMPLE | {"targets_segmentation": [1, 0, 1, 1]}, overwrite=True)
    assert dataset[0].loss_mask.tolist() == [1, 0, 1, 1]


def long(positions=40, shift=0):
    random = np.random.default_rng(0)
    tokens = random.integers(0, 90, positions + 1)
    targets = np.roll(tokens, -shift)[1:] if shift else tokens[1:]
    best = tokens[1 - shift : positions + 1 - shift] if shift else tokens[1:]
    ids = np.stack([best, best + 100], 1)
    return {
        "inputs": tokens[:-1],
        "top_k_logits": np.full(ids.shape, [9, 8], np.float32),
        "top_k_indices": ids,
    }, targets


def test_rows_and_targets_shifted_by_one_are_refused(tmp_path):
    said, targets = long(80)
    read(tmp_path, said | {"targets": targets})
    with pytest.raises(logitstore.SourceError, match="record 0: targets is not inputs shifted by one"):
        read(tmp_path, said | {"targets": np.roll(targets, 1)}, overwrite=True)
    with pytest.raises(logitstore.SourceError, match="rows are off by -1"):
        read(tmp_path, long(80, shift=1)[0], overwrite=True)


def test_bfloat16_logits_stay_exact(tmp_path):
    random = np.random.default_rng(0)
    logits = -np.sort(-random.normal(0, 3, (60, 50)).astype(ml_dtypes.bfloat16).astype(np.float32), axis=1)
    ids = np.array([random.permutation(1000)[:50] for _ in range(60)])
    said = {"inputs": np.arange(60), "top_k_logits": logits, "top_k_indices": ids}
    dataset, _ = read(tmp_path, said, values=None)
    assert dataset.info.totals.encodings == {"bfloat16": 1}
    _, found = dataset[0].dense(50)
    assert found - found[:, :1] == pytest.approx(logits - logits[:, :1], abs=1e-5)


def test_several_inputs_workers_and_skipping(tmp_path):
    for part in range(2):
        for host in range(2):
            records = [SAMPLE | {"inputs": [part, host, i, 4]} for i in range(30)]
            write(tmp_path / f"teacher_top_k_part_{part:05d}_host_{host:03d}.array_record", *records, {"inputs": [1]})
    with pytest.raises(logitstore.SourceError, match=r"part_00000_host_000.array_record, record 30: .*top_k_indices"):
        read_files(tmp_path, [tmp_path])
    shards = []
    for workers in (0, 2):
        dataset, _ = read_files(tmp_path, [tmp_path], on_error="skip", workers=workers, overwrite=True)
        wanted = [[part, host, i] for part in range(2) for host in range(2) for i in range(30)]
        assert [s.tokens[:3].tolist() for s in dataset] == wanted
        shards.append(next((tmp_path / "out" / "data").rglob("*.arrow")).read_bytes())
    assert shards[0] == shards[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": None}, "no inputs among the features; there are sequence_hash"),
        ({"top_k_logits": None}, "no top_k_logits"),
        ({"top_k_logits": [1, 2, 3]}, "top_k_logits holds integers"),
        ({"top_k_indices": [1.0]}, "top_k_indices holds floats"),
        ({"top_k_indices": [1, 2]}, "top_k_indices has 2 numbers and top_k_logits 12 for 4 inputs"),
        ({"inputs": [1, 2, 3, 4, 5]}, "for 5 inputs"),
        ({"inputs": np.zeros(0, int)}, "for 0 inputs"),
        ({"targets": [1, 2]}, "targets has 2 numbers for 4 inputs"),
        ({"inputs_position": [0.5] * 4}, "inputs_position holds floats"),
        ({"inputs_position": [2**40] * 4}, "does not fit 32 bits"),
        ({"inputs_segmentation": [0] * 4}, "nothing but padding"),
        ({"top_k_logits": np.full(12, np.nan, np.float32)}, "row 0: the logit of the id"),
        ({"top_k_logits": np.full(12, np.inf, np.float32)}, "is inf"),
        ({"top_k_logits": np.full(12, -np.inf, np.float32)}, "all logits are -inf"),
        ({"top_k_indices": [1] * 12}, "the id 1 stands there twice"),
        ({"top_k_indices": [-1, 2, 3] * 4}, "is not at least 0"),
        ({"inputs": [-1, 2, 3, 4]}, "the token -1"),
    ],
)
def test_examples_that_cannot_be_are_refused(tmp_path, change, says):
    said = {name: value for name, value in (SAMPLE | change).items() if value is not None}
    with pytest.raises((logitstore.SourceError, logitstore.InvalidInputError), match=says) as caught:
        read(tmp_path, SAMPLE, said)
    assert "host_000.array_record, record 1" in str(caught.value)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (b"", "no inputs among the features; there are nothing"),
        (b"\x80\x04\x95", "a pickle"),
        (b"\x0a\x05ab", "longer than the message"),
        (b"\x0b\x00", "wire type 3"),
        (b"\x0a" + b"\xff" * 11, "a number is cut off"),
        (one(b"\xff", b""), "is no text"),
        (one(b"a"), "without a name or a value"),
        (one(b"a", feature([1])) * 2, "stands there twice"),
        (one(b"a", message((3, message((1, b"\x80"))))), "cut off"),
        (one(b"a", message((3, message((1, b"\xff" * 10 + b"\0"))))), "64 bits"),
        (one(b"a", message((2, message((1, b"abc"))))), "something else"),
        (varint(1 << 3), "cut off"),
        (varint(1 << 3) + b"\0", "of another type"),
    ],
)  # fmt: skip
def test_records_that_are_no_examples_are_refused(tmp_path, record, says):
    with pytest.raises(logitstore.SourceError, match=f"record 0: .*{says}"):
        read(tmp_path, record)


@pytest.mark.parametrize("packed", [True, False])
def test_numbers_are_read_as_they_were_written(packed):
    random = np.random.default_rng(0)
    values = [random.integers(-(2**63), 2**63 - 1, 50) >> shift for shift in range(0, 64, 7)]
    integers = np.concatenate([*values, [0, -1, 127, 128, 2**63 - 1, -(2**63)]])
    floats = np.array([0, -0.0, 1.5, np.inf, 1e-40, 3e38], np.float32)
    found = read_example(example({"i": integers, "f": floats, "e": np.zeros(0, int)}, packed))
    assert found["i"].tolist() == integers.tolist()
    assert found["f"].tolist() == floats.tolist()
    assert found["e"].tolist() == []


def test_mutated_records_give_items_or_an_error():
    from logitstore.convert import Record, Tally

    data = example(PACKED)
    random = np.random.default_rng(0)
    for number in range(3000):
        broken = bytearray(data)
        for _ in range(int(random.integers(1, 4))):
            broken[int(random.integers(len(broken)))] = int(random.integers(256))
        broken = broken[: int(random.integers(len(data)))] if number % 5 == 0 else broken
        try:
            list(maxtext._parse(Record("a", 0, bytes(broken)), Tally()))
        except (logitstore.SourceError, logitstore.InvalidInputError):
            continue


def test_damaged_files_give_the_data_or_an_error(tmp_path):
    path = write(tmp_path / "a.array_record", *[SAMPLE] * 20)
    data = path.read_bytes()
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    random = np.random.default_rng(0)
    for number in range(120):
        broken = bytearray(data)
        if number % 4:
            broken[int(random.choice(used))] ^= 1 << int(random.integers(8))
        else:
            broken = broken[: int(random.integers(len(data)))]
        path.write_bytes(broken)
        try:
            dataset, _ = read_files(tmp_path, [path], overwrite=True)
        except logitstore.SourceError as error:
            assert "a.array_record" in str(error)
            continue
        assert len(dataset) == 20
        assert all(s.tokens.tolist() == SAMPLE["inputs"] for s in dataset)


def test_without_the_package_it_says_which_extra_to_install(tmp_path, monkeypatch):
    def none(name):
        raise builtins.ImportError(name)

    path = tmp_path / "a.array_record"
    path.write_bytes(maxtext._SIGNATURE + bytes(100))
    monkeypatch.setattr(maxtext.importlib, "import_module", none)
    with pytest.raises(logitstore.MissingDependencyError, match=r"logitstore\[maxtext\]"):
        read_files(tmp_path, [path])


def test_other_files_are_refused(tmp_path):
    pytest.importorskip("array_record.python.array_record_module", reason="array_record reads the files")
    (tmp_path / "a.array_record").write_bytes(b"nothing")
    with pytest.raises(logitstore.SourceError, match=r"a\.array_record: no ArrayRecord file"):
        read_files(tmp_path, [tmp_path / "a.array_record"])


def test_recognition(tmp_path):
    assert IMPORTER.recognises(Input(write(tmp_path / "a.array_record", SAMPLE)))
    for name, data in {"b.array_record": b"", "c.npz": b"PK\x03\x04", "d.jsonl": b'{"inputs": []}\n'}.items():
        (tmp_path / name).write_bytes(data)
        assert not IMPORTER.recognises(Input(tmp_path / name))
