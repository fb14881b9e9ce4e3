"""The loader's state inside torchdata's StatefulDataLoader, and as one for any number of ranks and workers."""

import itertools
import json

import pytest
from torch_rows import dealt, flat, stream

import logitstore
from logitstore.torch.loader import LogitLoader
from logitstore.torch.state import State, StreamState, global_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 under torch 2.13
]


@pytest.fixture
def stateful():
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    return module.StatefulDataLoader


@pytest.mark.parametrize(("workers", "every"), [(0, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 11])
def test_stateful_dataloader_resumes(stateful, workers, every, steps):
    expected = list(dealt([stream(epochs=2)], 4))
    assert len(expected) == 12
    options = {"batch_size": 4, "collate_fn": list, "num_workers": workers, "snapshot_every_n_steps": every}
    loader = stateful(stream(epochs=2), **options)
    batches = iter(loader)
    assert [next(batches) for _ in range(steps)] == expected[:steps]
    state = json.loads(json.dumps(loader.state_dict(), default=str))
    del batches, loader

    again = stateful(stream(epochs=2), **options)
    again.load_state_dict(state)
    assert list(again) == expected[steps:]

    ours = global_state(state)
    assert ours["position"] == steps * 4
    halves = []
    for rank in range(2):
        half = LogitLoader(stream(batch_size=2, epochs=2, rank=rank, world_size=2))
        half.load_state_dict(ours)
        halves.append(list(half))
    joined = [flat(parts) for parts in itertools.zip_longest(*halves, fillvalue=[])]
    assert joined == expected[steps:]


def test_stateful_dataloader_at_the_end_is_the_next_epoch(stateful):
    for workers in (0, 2):
        loader = stateful(stream(), batch_size=4, collate_fn=list, num_workers=workers)
        assert len(list(loader)) == 6
        assert global_state(loader.state_dict())["position"] == 23


def test_stateful_dataloader_resumes_twice(stateful):
    expected = list(dealt([stream()], 4))
    state, seen = None, []
    for steps in (1, 2, 1):
        loader = stateful(stream(), batch_size=4, collate_fn=list, num_workers=2)
        if state is not None:
            loader.load_state_dict(state)
        batches = iter(loader)
        seen += [next(batches) for _ in range(steps)]
        state = loader.state_dict()
        del batches, loader
    assert seen == expected[:4]
    assert global_state(state)["position"] == 16


def test_stateful_dataloader_with_another_batch_size_is_refused(stateful):
    batches = iter(stateful(stream(), batch_size=3, collate_fn=list))
    loader = stateful(stream(), batch_size=3, collate_fn=list)
    next(iter(loader))
    with pytest.raises(logitstore.InvalidInputError, match="batch_size is not that of StreamingLogits, 4"):
        loader.state_dict()
    assert next(batches)


def test_a_workers_state_is_not_taken_for_another_plan():
    one = stream().stream(0, 2)
    next(one), next(one), next(one), next(one)
    state = one.state_dict()
    assert StreamState.from_dict(state).batches == 1
    other = stream().stream(1, 2)
    other.load_state_dict(state)
    assert list(other) == list(stream().stream(1, 2))[4:]
    for wrong in (stream(batch_size=2), stream(seed=1), stream(size=22), stream(epochs=2), stream(drop_last=True)):
        with pytest.raises(logitstore.InvalidInputError, match="global_state"):
            wrong.stream(0, 2).load_state_dict(state)
    with pytest.raises(logitstore.InvalidInputError, match="global_state"):
        stream().stream(0, 3).load_state_dict(state)
    for broken in ({}, {**state, "batches": -1}, {**state, "plan": {}}, {**state, "logitstore_stream": 2}, None):
        with pytest.raises(logitstore.InvalidInputError, match="no state of a worker"):
            one.load_state_dict(broken)


def test_what_is_no_stateful_state_is_refused():
    for foreign in ({}, None, {"_snapshot": {"_worker_snapshots": {}}}, State(digest="d", seed=0, epoch=0, position=0)):
        with pytest.raises(logitstore.InvalidInputError, match="no state of a StatefulDataLoader"):
            global_state(foreign)
    states = [s.stream(0, 2).state_dict() for s in (stream(), stream(seed=1))]
    with pytest.raises(logitstore.InvalidInputError, match="no state of a StatefulDataLoader"):
        global_state({"a": {"b": states[0]}, "c": states[1]})
