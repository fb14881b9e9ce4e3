"""A batch on its way from a worker: what goes in comes out, and blocks are used again, but never while they are read."""

import pickle
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import logitstore
from logitstore.torch import HFCollator, LogitLoader, StreamingLogits
from logitstore.torch.parcel import _BLOCKS, Packer, unpack

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
    parcels = [packer.pack(torch.tensor([number])) for number in range(3 * _BLOCKS)]
    assert len(packer._blocks) <= _BLOCKS
    assert [unpack(parcel.own()).item() for parcel in parcels] == list(range(3 * _BLOCKS))
    assert pickle.loads(pickle.dumps(packer))._blocks == []


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
