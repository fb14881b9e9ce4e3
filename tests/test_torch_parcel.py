"""A batch on its way from a worker: what goes in comes out, and blocks are used again, but never while they are read."""

import pickle
import warnings
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import logitstore
from logitstore.torch import HFCollator, LogitLoader, StreamingLogits
from logitstore.torch.parcel import Packer, unpack

DTYPES = [torch.int64, torch.float32, torch.bool, torch.bfloat16, torch.uint8, torch.float64, torch.complex64]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensors = st.builds(lambda shape, dtype: torch.ones(shape).cumsum(0).to(dtype), shapes, st.sampled_from(DTYPES))


class Pair(NamedTuple):
    first: object
    second: object


@dataclass
class Made:
    inner: object


def passed_on(packer, batch):
    return unpack(packer.pack(batch).own())


@given(batch=st.dictionaries(st.text(max_size=3), tensors | st.lists(tensors, max_size=3) | st.integers() | st.none()))
def test_what_goes_in_comes_out(batch):
    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    found = passed_on(Packer(), batch)
    assert list(found) == list(batch)
    assert all(equal(value, found[name]) for name, value in batch.items())


def test_structures_and_strides():
    once = torch.arange(24).view(2, 3, 4)
    batch = (Pair({"a": once, "b": [once.transpose(0, 2)]}, "x"), once[:, 1], Made(once))
    parcel = Packer().pack(batch)
    assert parcel.size == 448
    found = unpack(parcel.own())
    assert type(found[0]) is Pair
    assert found[0].second == "x"
    assert torch.equal(found[0].first["a"], once)
    assert torch.equal(found[0].first["b"][0], once.transpose(0, 2))
    assert torch.equal(found[1], once[:, 1])
    assert found[2] is batch[2]  # of a type that says nothing of itself: as without packing


def test_without_tensors_and_with_what_cannot_be_packed():
    assert passed_on(Packer(), ["text", 3]) == ["text", 3]
    sparse = torch.eye(3).to_sparse()
    needs = torch.ones(2, requires_grad=True)
    found = passed_on(Packer(), [sparse, needs])
    assert torch.equal(found[0].to_dense(), torch.eye(3))
    assert found[1].tolist() == [1, 1]


def test_a_block_is_used_again_once_it_was_copied_and_not_before():
    packer = Packer()
    first = packer.pack(torch.full((100,), 1))
    second = packer.pack(torch.full((100,), 2))
    assert first.block.data_ptr() != second.block.data_ptr()
    assert unpack(first.own()).tolist() == [1] * 100
    third = packer.pack(torch.full((90,), 3))
    assert third.block.data_ptr() == first.block.data_ptr()
    assert unpack(second.own()).tolist() == [2] * 100
    larger = packer.pack(torch.full((1000,), 4))
    assert unpack(larger.own()).tolist() == [4] * 1000
    assert unpack(third.own()).tolist() == [3] * 90


def test_blocks_that_nobody_frees_are_forgotten():
    packer = Packer()
    parcels = [packer.pack(torch.tensor([number])) for number in range(20)]
    assert len(packer._blocks) == packer.most
    assert [unpack(parcel.own()).item() for parcel in parcels] == list(range(20))
    assert pickle.loads(pickle.dumps(packer))._blocks == []


def test_a_change_in_place_is_of_one_tensor_alone():
    weight = torch.ones(3, requires_grad=True)
    found = passed_on(Packer(), {"a": torch.arange(3.0), "b": torch.ones(3)})
    loss = (weight * found["a"]).sum()
    found["b"].mul_(2)
    loss.backward()
    assert weight.grad.tolist() == [0, 1, 2]


def test_mappings_keep_their_types():
    class Named(dict):
        pass

    batch = [UserDict(a=torch.ones(2)), OrderedDict(b=torch.ones(1)), Named(c=torch.ones(1))]
    found = passed_on(Packer(), batch)
    assert [type(each) for each in found] == [UserDict, OrderedDict, Named]
    assert found[0]["a"].tolist() == [1, 1]
    assert batch[0]["a"].tolist() == [1, 1]
    expanded = torch.ones(1, 4).expand(1000, 4)
    assert Packer().pack(expanded).size == 0


@pytest.mark.parametrize("persistent", [False, True])
def test_batches_of_all_sizes_keep_their_values(tmp_path, persistent):
    """Batches are kept while workers go on writing into their blocks; iterations are broken off."""
    random = np.random.default_rng(0)
    with warnings.catch_warnings(), logitstore.Writer(tmp_path / "d", teacher="t", logit_width=99) as writer:
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        for number in range(60):
            length = int(random.integers(1, 200))
            ids = np.stack([random.permutation(99)[:9] for _ in range(length)])
            logprobs = np.tile(-np.arange(3, 12, dtype=np.float32), (length, 1))
            writer.add(random.integers(0, 99, length), ids, logprobs, id=str(number))
    dataset = logitstore.open(tmp_path / "d")
    collate = HFCollator()

    def loader(workers):
        stream = StreamingLogits(dataset, batch_size=3, seed=1)
        return LogitLoader(
            stream, collate_fn=collate, num_workers=workers, persistent_workers=persistent and workers > 0
        )

    expected = list(loader(0))
    for decode in ("cpu", "device"):
        stream = StreamingLogits(dataset, batch_size=3, seed=1, decode=decode)
        loaded = LogitLoader(stream, collate_fn=collate, num_workers=2, persistent_workers=persistent)
        found = []
        while len(found) < len(expected):
            for batch in loaded:
                found.append(batch)
                if len(found) % 7 == 3:
                    break
        for ours, theirs in zip(found, expected, strict=True):
            for name, tensor in theirs.items():
                torch.testing.assert_close(ours[name], tensor, equal_nan=True)


def make_stream(write, **options):
    return StreamingLogits(write(sequences=20), batch_size=4, shuffle="none", **options)


def rows_of(sequences):
    return torch.tensor([int(sequence.id) for sequence in sequences])


@pytest.mark.parametrize("persistent", [False, True])
def test_an_older_iterator_takes_nothing_from_a_newer_one(write, persistent):
    loader = LogitLoader(make_stream(write), collate_fn=rows_of, num_workers=1, persistent_workers=persistent)
    older = iter(loader)
    assert next(older).tolist() == [0, 1, 2, 3]
    newer = iter(loader)
    begun = next(newer).tolist()
    with pytest.raises(logitstore.InvalidInputError, match="begin another"):
        next(older)
    assert begun + next(newer).tolist() == list(range(4, 12))
    assert loader.state_dict()["position"] == 12


def test_a_batch_that_could_not_be_placed_was_not_handed_out(write, monkeypatch):
    loader = LogitLoader(make_stream(write), collate_fn=rows_of)
    batches = iter(loader)
    next(batches)
    monkeypatch.setattr(loader, "_placed", lambda batch: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        next(batches)
    assert loader.state_dict()["position"] == 4


def test_what_makes_a_loader_of_its_own_gets_the_collate_function(write):
    loader = LogitLoader(make_stream(write), collate_fn=rows_of, num_workers=1)
    next(iter(loader))
    assert loader.collate_fn is rows_of


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts file descriptors in /proc")
def test_breaking_off_again_and_again_keeps_few_blocks(write):
    """A worker's blocks of batches that nobody took are not free, and not kept."""
    loader = LogitLoader(make_stream(write), collate_fn=rows_of, num_workers=1, persistent_workers=True)
    counts = []
    for _ in range(40):
        loader.set_epoch(1)
        loader.set_epoch(0)
        assert next(iter(loader)).tolist() == [0, 1, 2, 3]
        counts.append(len(list(Path(f"/proc/{loader._iterator._workers[0].pid}/fd").iterdir())))
    assert max(counts[20:]) <= max(counts[:20]) + 3
