"""`export --to npz` and `safetensors`, and back by the importer `arrays`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

import logitstore
from logitstore.convert import convert, export, exporters
from logitstore.convert.arrays import IMPORTER
from logitstore.convert.source import Input

pytestmark = pytest.mark.usefixtures("quiet")

WIDTH = 60
KINDS = ("npz", "safetensors")
OPTIONAL = ("target_logprob", "target_rank", "logsumexp", "entropy", "loss_mask")


@st.composite
def sequences(draw, rectangle=False):
    """The arguments of some calls of `Writer.add`."""
    made = []
    k = draw(st.integers(1, 5))
    for number in range(draw(st.integers(1, 5))):
        random = np.random.default_rng(draw(st.integers(0, 2**32)))
        positions = draw(st.integers(0, 7))
        count = np.full(positions, k) if rectangle else random.integers(0, k + 1, positions)
        keep = np.arange(k) < count[:, None]
        ids = random.permuted(np.tile(np.arange(WIDTH), (positions, 1)), axis=1)[:, :k]
        logprobs = random.normal(0, 2, (positions, k))
        logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True) * random.uniform(1, 3, (positions, 1)))
        fields = {
            "target_logprob": np.where(random.random(positions) < 0.3, np.nan, -random.exponential(2, positions)),
            "target_rank": random.integers(0, 90, positions),
            "logsumexp": random.normal(9, 3, positions),
            "entropy": random.exponential(1, positions),
            "loss_mask": random.integers(-1, 2, positions),
        }
        chosen = draw(st.sets(st.sampled_from(OPTIONAL)))
        made.append(
            {"tokens": random.integers(0, WIDTH, positions), "count": count, "ids": ids[keep]}
            | {"logprobs": logprobs[keep].astype(np.float32), "id": f"s{number}"}
            | {name: fields[name] for name in OPTIONAL if name in chosen}
        )
    return made


def write(path, made, **settings):
    with logitstore.Writer(path, **{"logit_width": WIDTH, "values": "float32", "teacher": "t"} | settings) as writer:
        for arguments in made:
            writer.add(**arguments)
    return logitstore.open(path)


def known(values, unknown):
    """A column as a reader may have it; one that says nothing at all is none."""
    if values is None:
        return None
    listed = [None if value == unknown or math.isnan(value) else value for value in values.tolist()]
    return None if all(value is None for value in listed) else listed


def same(one, other, ids=False, tolerance=0.0):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert not ids or a.id == b.id
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.count.tolist() == b.count.tolist()
        for start, end in zip(a.offsets[:-1], a.offsets[1:], strict=True):
            left = sorted(zip((-a.logprobs[start:end]).tolist(), a.ids[start:end].tolist(), strict=True))
            right = sorted(zip((-b.logprobs[start:end]).tolist(), b.ids[start:end].tolist(), strict=True))
            if tolerance:
                assert sorted(i for _, i in left) == sorted(i for _, i in right)
                assert np.allclose([v for v, _ in left], [v for v, _ in right], atol=tolerance)
            else:
                assert left == right
        step = 1 / 32 + tolerance
        masses = np.array(
            [np.exp(a.logprobs[s:e], dtype=float).sum() for s, e in zip(a.offsets, a.offsets[1:], strict=False)]
        )
        full = ~np.isnan(a.tail) & (
            (masses > 0.97) | np.isneginf(a.tail)
        )  # what is left of a sum near 1 is mostly rounding
        assert np.isnan(a.tail).tolist() == np.isnan(b.tail).tolist()
        near = ~(np.isnan(a.tail) | full)
        assert (np.abs(a.tail[near] - b.tail[near]) <= step + 1e-6).all()
        assert (np.exp(b.tail[full]) <= 0.031 + np.exp(a.tail[full])).all()
        for name in OPTIONAL:
            unknown = {"target_rank": 0, "loss_mask": -1}.get(name, np.nan)
            assert known(getattr(a, name), unknown) == known(getattr(b, name), unknown), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rectangle", [False, True])
@pytest.mark.parametrize("normalised", ["vocabulary", "candidates"])
def test_what_is_exported_comes_back(kind, rectangle, normalised):
    @settings(max_examples=40)
    @given(sequences(rectangle))
    def check(made):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            dataset = write(path / "a", made, normalised=normalised, temperature=0.5)
            done = export(dataset, path / f"out.{kind}", kind)
            assert all(note.endswith(".") for note in done.notes)
            convert([path / f"out.{kind}"], path / "b", values="float32")
            again = logitstore.open(path / "b")
            assert (again.info.normalised, again.info.temperature) == (normalised, 0.5)
            assert [s.id for s in again] == [str(n) for n in range(len(made))]
            same(dataset, again)
            assert logitstore.is_valid(logitstore.validate(path / "b", deep=True))

    check()


def test_the_arrays_are_those_of_the_sequences(tmp_path):
    """Position by position, by numpy and safetensors themselves."""
    made = [
        {"tokens": [5, 6, 7], "ids": [1, 2, 3, 4], "logprobs": [-0.5, -1.5, -0.25, -2.5], "count": [2, 2, 0]},
        {"tokens": [], "ids": [], "logprobs": [], "count": np.zeros(0, int)},
        {"tokens": [8], "ids": [9], "logprobs": [-0.125], "count": [1], "target_rank": [4], "loss_mask": [1]},
    ]
    write(tmp_path / "a", made)
    wanted = {
        "lengths": [3, 0, 1],
        "tokens": [5, 6, 7, 8],
        "count": [2, 2, 0, 1],
        "ids": [1, 2, 3, 4, 9],
        "logprobs": [-0.5, -1.5, -0.25, -2.5, -0.125],
        "target_rank": [0, 0, 0, 4],
        "loss_mask": [-1, -1, -1, 1],
    }
    for kind in KINDS:
        export(tmp_path / "a", tmp_path / f"out.{kind}", kind)
    arrays = load_file(tmp_path / "out.safetensors")
    with np.load(tmp_path / "out.npz") as file:
        assert str(file["normalised"]) == "vocabulary"
        assert float(file["temperature"]) == 1
        for found in ({name: file[name] for name in file.files}, arrays):
            assert {name: found[name].tolist() for name in wanted} == wanted
            assert not set(found) - set(wanted) - {"tail", "normalised", "temperature"}
            tail = found["tail"]
            assert np.isnan(tail[2])
            assert tail[0] == pytest.approx(np.log(1 - np.exp(-0.5) - np.exp(-1.5)), abs=1 / 64)
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        facts = file.metadata()
    assert facts["alignment"] == "next"
    assert json.loads(facts["teacher"])["name"] == "t"
    assert facts["dataset_digest"] == logitstore.open(tmp_path / "a").info.dataset_digest


def test_a_rectangle_is_written_as_one(tmp_path, rows):
    with logitstore.Writer(tmp_path / "a", logit_width=1000, values="float32") as writer:
        for seed in range(3):
            writer.add(*rows(seed, 4 + seed, 6))
    export(tmp_path / "a", tmp_path / "all.npz", "npz")
    export(tmp_path / "a", tmp_path / "best.npz", "npz", k=4)
    with np.load(tmp_path / "all.npz") as whole, np.load(tmp_path / "best.npz") as best:
        assert "count" not in whole
        assert whole["ids"].shape == whole["logprobs"].shape == (15, 6)
        assert (whole["ids"] == np.concatenate([rows(seed, 4 + seed, 6)[1] for seed in range(3)])).all()
        assert best["ids"].tolist() == whole["ids"][:, :4].tolist()
        assert best["logprobs"].tolist() == whole["logprobs"][:, :4].tolist()
        left = np.exp(whole["tail"]) + np.exp(whole["logprobs"][:, 4:]).sum(axis=1)
        assert np.allclose(best["tail"], np.log(left), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_counted(tmp_path, write, kind):
    path = write(sequences=6, per_sequence=lambda i: {"entropy": np.ones(12 + i)} if i < 2 else {})
    seen = []
    done = export(logitstore.open(path)[4:1:-1], tmp_path / f"v.{kind}", kind, progress=seen.append)
    assert (done.sequences, seen) == (3, [1, 2, 3])
    convert([tmp_path / f"v.{kind}"], tmp_path / "b", values="float32")
    again = logitstore.open(tmp_path / "b")
    assert [len(s) for s in again] == [16, 15, 14]
    assert [s.tokens.tolist() for s in again] == [s.tokens.tolist() for s in logitstore.open(path)[4:1:-1]]
    assert again[0].entropy is None  # those that have it are not in the view


@pytest.mark.parametrize("kind", KINDS)
def test_draws_become_logprobs(tmp_path, kind):
    with logitstore.Writer(tmp_path / "a", logit_width=WIDTH) as writer:
        writer.add_draws([1, 2, 3], [7, 8, 9], [30, 10, 5], [40, 5, 0], count=[2, 1, 0], target_logprob=[-1.0] * 3)
    done = export(tmp_path / "a", tmp_path / f"a.{kind}", kind)
    text = " ".join(done.notes)
    assert "Draws were made into logprobs, normalised over the candidates" in text
    assert "target_logprob was left out" in text
    convert([tmp_path / f"a.{kind}"], tmp_path / "b", values="float32")
    again = logitstore.open(tmp_path / "b")
    assert again.info.normalised == "candidates"
    assert again[0].ids.tolist() == [7, 8, 9]
    assert np.allclose(np.exp(again[0].logprobs), [0.75, 0.25, 1])
    assert again[0].target_logprob is None


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_and_other_sequences_together(tmp_path, kind):
    with logitstore.Writer(tmp_path / "a", logit_width=WIDTH, values="float32") as writer:
        writer.add_draws([1, 2], [7, 8], [30, 10], [40, 0], count=[2, 0])
        writer.add([1, 2], [5], [-0.5], count=[1, 0])
    done = export(tmp_path / "a", tmp_path / f"a.{kind}", kind)
    assert "they have no tail" in " ".join(done.notes)
    convert([tmp_path / f"a.{kind}"], tmp_path / "b", values="float32")
    again = logitstore.open(tmp_path / "b")
    assert np.allclose(np.exp(again[0].logprobs), [0.75, 0.25])
    assert np.isnan(again[0].tail).all()
    assert again[1].tail[0] == pytest.approx(np.log(1 - np.exp(-0.5)), abs=1 / 64)


@pytest.mark.parametrize("values", ["grid", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_rounded_values_come_back_but_for_rounding(tmp_path, kind, values):
    """Sums a little over 1, as every encoding may have them, are brought down and counted."""
    random = np.random.default_rng(0)
    with logitstore.Writer(tmp_path / "a", logit_width=300, values=values, top_k=8) as writer:
        for _ in range(4):
            logits = random.normal(0, 1.5, (60, 300)).astype(np.float32)
            writer.add_logits(random.integers(0, 300, 60), (logits.view(np.uint32) >> 16).astype(np.uint16))
    export(tmp_path / "a", tmp_path / f"a.{kind}", kind)
    done = convert([tmp_path / f"a.{kind}"], tmp_path / "b", values="float32")
    one, other = logitstore.open(tmp_path / "a"), logitstore.open(tmp_path / "b")
    same(one, other, tolerance=0.03)
    off = 0
    for s in one:
        rest = np.exp(s.tail, dtype=float)
        total = np.exp(s.logprobs, dtype=float).reshape(60, 8).sum(axis=1) + rest
        off += int(((total > 1.0001) | (total < 1 - rest / 64 - 1e-4)).sum())
    assert off > 0
    counted = sum(int(note.split()[1].replace(",", "")) for note in done.notes if note.startswith("At "))
    assert counted == off


def test_what_is_lost_is_said(tmp_path, write):
    path = write(per_sequence=lambda i: {"text": f"t{i}", "id": f"name {i}"})
    for kind in KINDS:
        notes = " ".join(export(path, tmp_path / f"out.{kind}", kind).notes)
        assert "Ids of sequences were left out" in notes
        assert "The columns text were left out" in notes
    assert all(word in exporters()["npz"].loses for word in ("ids", "columns", "draws", "teacher"))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_at_all_is_a_whole_file(tmp_path, write, kind):
    export(logitstore.open(write())[:0], tmp_path / f"out.{kind}", kind)
    arrays = load_file(tmp_path / "out.safetensors") if kind == "safetensors" else np.load(tmp_path / "out.npz")
    assert arrays["lengths"].shape == arrays["tokens"].shape == arrays["ids"].shape == (0,)


def test_tensors_are_aligned_and_in_order(tmp_path, write):
    path = write(per_sequence=lambda i: {"loss_mask": np.ones(12 + i, int), "target_rank": np.ones(12 + i, int)})
    export(path, tmp_path / "a.safetensors", "safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    end = 0
    for entry in [entry for name, entry in header.items() if name != "__metadata__"]:
        start, stop = entry["data_offsets"]
        assert start == end
        assert start % {"I64": 8, "I32": 4, "F32": 4, "I8": 1}[entry["dtype"]] == 0
        end = stop
    assert len(data) == 8 + length + end


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded(tmp_path, kind):
    """60 MB of candidates, and far less in memory."""
    with logitstore.Writer(tmp_path / "a", logit_width=2**17) as writer:
        ids = np.arange(64)[None, :] + np.arange(512)[:, None]
        logprobs = np.linspace(-3, -9, 64)[None, :] + np.zeros((512, 1))
        for _ in range(240):
            writer.add(np.arange(512), ids, logprobs.astype(np.float32))
    assert logitstore.open(tmp_path / "a").info.totals.candidates * 8 > 60e6
    code = (
        "import sys, resource, logitstore\n"
        "from logitstore.convert import export, exporters\n"
        "exporters()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "export(sys.argv[1], sys.argv[2], sys.argv[3])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a", tmp_path / "out", kind], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "out").stat().st_size > 60e6
    assert int(done.stdout) < 25_000  # KiB


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_of_the_kind_are_not_taken_for_ours(tmp_path, write, kind):
    export(write(), tmp_path / f"a.{kind}", kind)
    assert IMPORTER.recognises(Input(tmp_path / f"a.{kind}"))
    if kind == "npz":
        np.savez(tmp_path / "b.npz", tokens=np.zeros(3), logits=np.zeros((3, 2)))
    else:
        header = json.dumps({"0": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
        (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert not IMPORTER.recognises(Input(tmp_path / f"b.{kind}"))
    (tmp_path / f"c.{kind}").write_bytes((tmp_path / f"a.{kind}").read_bytes()[:100])
    assert IMPORTER.recognises(Input(tmp_path / f"c.{kind}")) in (True, False)


def npz(path, **changes):
    arrays = {
        "tokens": np.arange(4), "lengths": np.array([3, 1]), "count": np.array([1, 1, 1, 1]),
        "ids": np.arange(4), "logprobs": np.full(4, -1, np.float32),
    }  # fmt: skip
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": np.array([1, 1, -1, 1])}, "count does not fit the 4 candidates"),
        ({"count": np.array([1, 1, 1, 2])}, "count does not fit the 4 candidates"),
        ({"count": np.array([1, 1, 0, 1])}, "count sums to 3, but 4 ids are there"),
        ({"count": np.array(["a"] * 4)}, "count are not non-negative integers"),
        ({"count": np.array([1.0] * 4)}, "count are not non-negative integers"),
        ({"lengths": np.array([3.0, 1.0])}, "lengths are not non-negative integers"),
        ({"lengths": np.array([5, -1])}, "lengths"),
        ({"lengths": np.array([2**40, 1])}, "a sequence of 1099511627776 positions"),
        ({"lengths": np.array([3, 2])}, "lengths sum to 5 or more, but there are 4 tokens"),
        ({"logprobs": np.zeros((4, 1), np.float32)}, "logprobs has shape"),
        ({"logprobs": np.zeros(5, np.float32)}, "logprobs has shape"),
        ({"normalised": np.array("nothing")}, "normalised is 'nothing'"),
        ({"normalised": np.array([1, 2])}, "normalised is None"),
        ({"temperature": np.array(-1.0)}, "temperature is -1.0"),
        ({"count": None}, "logprobs has shape"),
        ({"count": None, "ids": np.zeros((4, 1, 1), int), "logprobs": np.zeros((4, 1, 1), np.float32)}, "has shape"),
        ({"tail": np.zeros((4, 2), np.float32)}, "tail has shape"),
        ({"logprobs": np.full(4, 0.05, np.float32)}, "is above 0: not a logprob"),
        ({"tail": np.full(4, -0.3, np.float32)}, "sum to more than 1"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(tmp_path, changes, says):
    path = npz(tmp_path / "a.npz", **changes)
    with pytest.raises(logitstore.LogitStoreError, match=says) as caught:
        convert([path], tmp_path / "out")
    assert "a.npz" in str(caught.value)


def test_arrays_beside_logits_are_left_out_and_said(tmp_path):
    logits = np.zeros((4, 9), np.float32)
    path = npz(tmp_path / "a.npz", count=None, ids=None, logprobs=None, logits=logits, tail=np.zeros(4, np.float32))
    assert "tail were left out: they follow from the logits" in convert([path], tmp_path / "out").notes[0]


def test_files_that_say_different_settings_are_refused(tmp_path):
    paths = [npz(tmp_path / f"{t}.npz", temperature=np.array(t)) for t in (1.0, 2.0)]
    with pytest.raises(logitstore.SourceError, match=r"2\.0"):
        convert(paths, tmp_path / "out")
    convert(paths[1:], tmp_path / "two")
    assert logitstore.open(tmp_path / "two").info.temperature == 2
    convert(paths[1:], tmp_path / "three", temperature=3.0)
    assert logitstore.open(tmp_path / "three").info.temperature == 3


def test_bfloat16_columns_are_read_as_numbers(tmp_path):
    """Their bit patterns are integers that a column of floats would take."""
    tensors = {
        "tokens": ("I32", np.arange(2, dtype=np.int32)),
        "lengths": ("I64", np.array([2])),
        "ids": ("I32", np.array([[1], [2]], np.int32)),
        "logprobs": ("F32", np.full((2, 1), -0.5, np.float32)),
        "entropy": ("BF16", (np.array([1.5, 2.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)),
    }
    header, data = {}, b""
    for name, (dtype, values) in tensors.items():
        span = [len(data), len(data) + values.nbytes]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": span}
        data += values.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    convert([tmp_path / "a.safetensors"], tmp_path / "out")
    assert logitstore.open(tmp_path / "out")[0].entropy.tolist() == [1.5, 2.0]


def test_an_encrypted_archive_is_an_error(tmp_path):
    path = npz(tmp_path / "a.npz")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        central = archive.start_dir
    data[central + 8] |= 1  # the flag of the first member in the directory
    data[6] |= 1
    path.write_bytes(data)
    with pytest.raises(logitstore.SourceError, match="not a whole npz"):
        convert([path], tmp_path / "out", importer="arrays")
