"""Loading for training: one global sequence of batches on any number of ranks and workers, and exact resumption."""

import copy
import itertools
import json
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch.utils.data import DataLoader
from torch_rows import Rows, dealt, flat, stream

import logitstore
from logitstore.torch.loader import LogitLoader, StreamingLogits
from logitstore.torch.order import Order
from logitstore.torch.source import Mixture, Shuffled
from logitstore.torch.state import Plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 under torch 2.13
]


def simulated(workers, prefetch):
    """A stand-in for DataLoader.__iter__: workers in one process, which run ahead as real ones do."""

    def iterate(loader):
        batches = dealt([loader.dataset.stream(worker, workers) for worker in range(workers)], loader.batch_size)
        ahead = list(itertools.islice(batches, prefetch))
        while ahead:
            yield ahead.pop(0)
            ahead += itertools.islice(batches, 1)

    return iterate


def expected_batches(order, epochs, global_batch, *, drop_last, rounds):
    """The global batches of some iterations, one after the other, by lists."""
    batches = []
    for number in range(rounds):
        samples = [[order.row(number * epochs + e, p) for p in range(order.size)] for e in range(epochs)]
        runs = samples if drop_last else [[row for rows in samples for row in rows]]
        for run in runs:
            stop = len(run) - len(run) % global_batch if drop_last else len(run)
            batches += [run[i : min(i + global_batch, stop)] for i in range(0, stop, global_batch)]
    return batches


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


class Training(RuleBasedStateMachine):
    """Runs that are interrupted and resumed on other numbers of ranks and workers."""

    @initialize(
        size=st.integers(1, 60),
        global_batch=st.integers(1, 24),
        epochs=st.integers(1, 3),
        drop_last=st.booleans(),
        shuffle=st.sampled_from(["blocks", "full", "none"]),
        seed=st.integers(0, 2**32),
    )
    def begin(self, size, global_batch, epochs, drop_last, shuffle, seed):
        self.size, self.epochs, self.global_batch = size, epochs, global_batch
        self.drop_last = drop_last and size >= global_batch
        self.source = Shuffled(Rows(size), shuffle, block=5, window=3)
        order = Order(size, Rows.digest, seed, shuffle, block=5, window=3)
        self.seed = seed
        self.expected = expected_batches(order, epochs, global_batch, drop_last=self.drop_last, rounds=3)
        self.state = None
        self.used = self.used_when_saved = 0
        self.loaders = []

    def left(self):
        return len(self.expected) - self.used

    @rule(data=st.data(), workers=st.integers(1, 4), prefetch=st.integers(1, 6))
    def resume(self, data, workers, prefetch):
        world_size = data.draw(st.sampled_from(divisors(self.global_batch)))
        self.loaders = []
        for rank in range(world_size):
            stream = StreamingLogits(
                self.source,
                batch_size=self.global_batch // world_size,
                seed=self.seed,
                epochs=self.epochs,
                drop_last=self.drop_last,
                rank=rank,
                world_size=world_size,
            )
            loader = LogitLoader(stream)
            if self.state is not None:
                loader.load_state_dict(json.loads(self.state))
            self.loaders.append(loader)
        self.used = self.used_when_saved  # what came after is lost, as in a crash
        self.iterate = simulated(workers, prefetch)
        self.iterations = None
        self.have_had = [True] * world_size

    @precondition(lambda self: self.loaders and self.left() > 0)
    @rule(steps=st.integers(1, 12))
    def train(self, steps):
        for _ in range(min(steps, self.left())):
            with mock.patch.object(DataLoader, "__iter__", self.iterate):
                batches = self.step()
            assert [row for batch in batches for row in batch] == self.expected[self.used]
            sizes = [len(batch) for batch in batches]
            assert sizes == sorted(sizes, reverse=True)
            self.have_had = [len(batch) > 0 for batch in batches]  # of the last batch: ranks without wait for its end
            self.used += 1

    def step(self):
        """A batch of every rank, from their next iteration where this one is at its end."""
        if self.iterations is None:
            self.iterations = [iter(loader) for loader in self.loaders]
        batches = [next(iteration, []) for iteration in self.iterations]
        if not any(batches):
            self.iterations = [iter(loader) for loader in self.loaders]
            batches = [next(iteration, []) for iteration in self.iterations]
        return batches

    @precondition(lambda self: self.loaders)
    @rule()
    def save(self):
        states = [json.dumps(loader.state_dict()) for loader in self.loaders]
        self.state = states[0]
        assert all(state == self.state for state, has_had in zip(states, self.have_had, strict=True) if has_had)
        assert len(self.state) < 1024
        self.used_when_saved = self.used

    @precondition(lambda self: self.loaders and self.left() > 0)
    @rule(batches=st.integers(0, 5))
    def skip(self, batches):
        plan = Plan(self.size, self.epochs, self.global_batch, self.drop_last, self.loaders[0].state_dict()["position"])
        batches = min(batches, plan.batches(), self.left())
        for loader in self.loaders:
            loader.skip(batches)
        self.used += batches
        self.iterations = None


TestTraining = Training.TestCase
TestTraining.settings = settings(max_examples=100, stateful_step_count=20)


plans = st.builds(
    lambda samples, epochs, global_batch, drop_last, start: Plan(
        samples, epochs, min(global_batch, samples) if drop_last else global_batch, drop_last, start
    ),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 30),
    st.booleans(),
    st.integers(0, 200),
)


@given(plans)
def test_a_plan_is_its_batches(plan):
    batches = list(itertools.takewhile(bool, (plan.batch(number) for number in itertools.count())))
    assert len(batches) == plan.batches()
    positions = [position for batch in batches for position in batch]
    assert positions == sorted(set(positions))
    assert all(plan.start <= position < plan.end for position in positions)
    if plan.drop_last:
        assert all(len(batch) == plan.global_batch for batch in batches)
        assert all(batch[0] // plan.samples == batch[-1] // plan.samples for batch in batches)
    else:
        assert positions == list(range(plan.start, plan.end))
        assert all(len(batch) == plan.global_batch for batch in batches[:-1])
    assert [plan.after(number) for number in range(len(batches))] == [batch[0] for batch in batches]
    assert plan.after(len(batches)) == plan.end


@given(plans, st.integers(1, 40))
def test_a_plan_from_the_middle_is_the_rest_of_the_plan(plan, number):
    assume(number < plan.batches())
    rest = Plan(plan.samples, plan.epochs, plan.global_batch, plan.drop_last, plan.after(number))
    assert [rest.batch(i) for i in range(rest.batches())] == [plan.batch(i) for i in range(number, plan.batches())]


@given(plans, st.integers(1, 5), st.integers(1, 5))
def test_every_sample_goes_to_one_worker_of_one_rank(plan, workers, world_size):
    stream = {"epochs": plan.epochs, "drop_last": False, "world_size": world_size, "batch_size": 3}
    samples = []
    for rank in range(world_size):
        rows = StreamingLogits(Shuffled(Rows(plan.samples), "none"), rank=rank, **stream)
        mine = [row for worker in range(workers) for row in rows.stream(worker, workers)]
        assert len(mine) == len(rows)
        samples += mine
    assert sorted(samples) == sorted(list(range(plan.samples)) * plan.epochs)


def test_an_endless_stream_goes_on():
    rows = StreamingLogits(Rows(5), batch_size=2, epochs=None, seed=3)
    drawn = list(itertools.islice(rows, 50))
    assert all(sorted(drawn[i : i + 5]) == list(range(5)) for i in range(0, 50, 5))
    assert len({tuple(drawn[i : i + 5]) for i in range(0, 50, 5)}) > 5
    with pytest.raises(logitstore.InvalidTypeError, match="no length"):
        len(rows)


def test_worker_info_deals_out_the_batches(monkeypatch):
    rows = StreamingLogits(Rows(10), batch_size=2, shuffle="none")
    info = mock.Mock(id=1, num_workers=3)
    monkeypatch.setattr("logitstore.torch.loader.get_worker_info", lambda: info)
    assert list(rows) == [2, 3, 8, 9]


# -- LogitLoader


def test_a_loader_goes_on_where_it_was_left():
    order = Order(23, Rows.digest, 0, block=4, window=2)
    epochs = [[order.row(epoch, place) for place in range(23)] for epoch in range(3)]
    loader = LogitLoader(stream())
    assert len(loader) == 6
    assert flat(loader) == epochs[0]
    assert loader.state_dict()["epoch"] == 1
    begun = iter(loader)
    assert next(begun) + next(begun) == epochs[1][:8]
    assert loader.state_dict()["position"] == 31
    assert flat(loader) == epochs[1][8:]
    loader.set_epoch(1)
    assert flat(loader) == epochs[1]
    loader.set_epoch(2)
    loader.skip(3)
    loader.set_epoch(2)  # it is in that epoch already
    assert flat(loader) == epochs[2][12:]


def test_the_state_after_the_last_batch_is_the_next_epoch():
    for drop_last in (False, True):
        loader = LogitLoader(stream(drop_last=drop_last))
        batches = iter(loader)
        for _ in range(len(loader)):
            next(batches)
        assert loader.state_dict()["position"] == 23
        assert next(batches, None) is None
        assert loader.state_dict()["position"] == 23


def test_an_iteration_that_was_moved_under_way_is_refused():
    loader = LogitLoader(stream())
    old = iter(loader)
    next(old)
    new = iter(loader)
    with pytest.raises(logitstore.InvalidInputError, match="begin another"):
        next(old)
    assert loader.state_dict()["position"] == 4
    next(new)
    loader.skip(2)
    with pytest.raises(logitstore.InvalidInputError, match="begin another"):
        next(new)
    assert loader.state_dict()["position"] == 16


def test_what_contradicts_the_stream_is_refused():
    for options in ({"batch_size": 5}, {"shuffle": True}, {"drop_last": True}, {"in_order": False}):
        with pytest.raises(logitstore.InvalidInputError, match=next(iter(options))):
            LogitLoader(stream(), **options)
    with pytest.raises(logitstore.InvalidTypeError, match="wrap it"):
        LogitLoader(Rows(3))


def test_batches_are_collated():
    loader = LogitLoader(stream(), collate_fn=torch.tensor)
    assert torch.equal(torch.cat(list(loader)).sort().values, torch.arange(23))


@pytest.mark.parametrize(("context", "workers"), [(None, 0), ("fork", 2), ("spawn", 2)])
def test_real_workers_give_the_same_batches_and_resume(write, context, workers):
    path = write(sequences=30, positions=3, chunk_candidates=200)
    options = {"batch_size": 3, "seed": 8, "epochs": 2, "shuffle": "full", "world_size": 2}
    dataset = logitstore.open(path)
    order = Order(30, dataset.info.dataset_digest, 8, "full")
    ids = [dataset[order.row(*divmod(place, 30))].id for place in range(60)]
    loader = LogitLoader(
        StreamingLogits(path, rank=1, **options), num_workers=workers, multiprocessing_context=context, timeout=0
    )
    seen = []
    for batch in loader:
        seen.append([sequence.id for sequence in batch])
        assert all(np.array_equal(sequence.ids, dataset.by_id(sequence.id).ids) for sequence in batch)
        if len(seen) == 4:
            break
    assert seen == [ids[6 * b + 3 : 6 * b + 6] for b in range(4)]
    state = loader.state_dict()
    assert state["position"] == 24
    alone = LogitLoader(StreamingLogits(path, **{**options, "batch_size": 6, "world_size": None}))
    alone.load_state_dict(state)
    assert [[sequence.id for sequence in batch] for batch in alone] == [ids[6 * b : 6 * b + 6] for b in range(4, 10)]


def test_workers_that_live_on_see_every_epoch():
    order = Order(23, Rows.digest, 0, block=4, window=2)
    plain = stream()
    loader = DataLoader(plain, batch_size=4, collate_fn=list, num_workers=2, persistent_workers=True)
    counting = LogitLoader(stream(), num_workers=2, persistent_workers=True)
    for epoch in range(3):
        plain.set_epoch(epoch)
        expected = [order.row(epoch, place) for place in range(23)]
        assert flat(loader) == expected
        assert flat(counting) == expected


# -- states


def test_a_state_is_small_plain_and_comes_back():
    rows = stream()
    rows.skip(2)
    state = rows.state_dict()
    assert state == {"version": 1, "digest": "0" * 64 + ":blocks:4:2", "seed": 0, "epoch": 0, "position": 8}
    assert len(json.dumps(state)) < 200
    again = stream(batch_size=2, rank=1, world_size=2)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.state_dict() == state
    assert next(iter(again)) == list(stream())[10]


def test_states_that_do_not_fit_are_refused():
    rows = stream()
    state = rows.state_dict()
    for change, error, words in (
        ({"digest": "1" * 64}, logitstore.InvalidInputError, "another dataset"),
        ({"seed": 3}, logitstore.InvalidInputError, "give seed=3"),
        ({"epoch": 1}, logitstore.InvalidInputError, "was edited"),
        ({"version": 2}, logitstore.UnsupportedVersionError, "install a later logitstore"),
        ({"version": "x"}, logitstore.InvalidInputError, "no state of a loader"),
        ({"position": -1}, logitstore.InvalidInputError, "no state of a loader"),
        ({"position": 2**60}, logitstore.InvalidInputError, "no state of a loader"),
        ({"position": 1.5}, logitstore.InvalidInputError, "no state of a loader"),
    ):
        with pytest.raises(error, match=words):
            rows.load_state_dict({**state, **change})
    for other in ({}, None, [], {"_snapshot": {}}):
        with pytest.raises(logitstore.InvalidInputError, match="global_state"):
            rows.load_state_dict(other)
    with pytest.raises(logitstore.InvalidInputError, match="another dataset, view, mixture or kind of shuffling"):
        StreamingLogits(Rows(23), batch_size=4, shuffle="full").load_state_dict(state)
    assert rows.state_dict() == state


def test_fields_of_a_state_that_are_not_known_are_ignored():
    rows = stream()
    rows.load_state_dict({**rows.state_dict(), "note": 1})


def test_mixtures_resume_too():
    def mixture():
        return Mixture([Rows(7), Shuffled(Rows(30), "full")], [1, 2])

    expected = list(StreamingLogits(mixture(), batch_size=5, epochs=3))
    loader = LogitLoader(StreamingLogits(mixture(), batch_size=5, epochs=3))
    batches = iter(loader)
    seen = [next(batches) for _ in range(9)]
    again = LogitLoader(StreamingLogits(mixture(), batch_size=5, epochs=3))
    again.load_state_dict(loader.state_dict())
    assert flat(seen) + flat(again) == expected
    with pytest.raises(logitstore.InvalidInputError, match="another dataset"):
        StreamingLogits(Mixture([Rows(7), Rows(30)], [1, 1]), batch_size=5).load_state_dict(loader.state_dict())


# -- arguments


def test_numbers_that_cannot_be_used_are_refused():
    for options, words in (
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 24, "drop_last": True}, "no whole batch"),
        ({"batch_size": 12, "drop_last": True, "rank": 0, "world_size": 2}, "no whole batch"),
        ({"rank": 0}, "give both"),
        ({"rank": 2, "world_size": 2}, "give both"),
    ):
        with pytest.raises(logitstore.InvalidInputError, match=words):
            stream(**options)
    for options in ({"batch_size": 1.5}, {"seed": "0"}, {"epochs": 1.0}):
        with pytest.raises(logitstore.InvalidTypeError, match="give an integer"):
            stream(**options)
    for batches in (-1, 7):
        with pytest.raises(logitstore.InvalidInputError, match="6 are left"):
            stream().skip(batches)
    with pytest.raises(logitstore.InvalidInputError, match="count from 0"):
        stream().set_epoch(-1)


def test_ranks_are_those_of_torch_distributed(monkeypatch, tmp_path):
    rows = stream(batch_size=2)
    expected = list(rows)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        assert rows.rank_of_world() == (0, 1)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert rows.rank_of_world() == (1, 2)
        assert next(iter(rows)) == expected[2]
        for_a_worker = pickle.dumps(rows)
        assert stream(rank=3, world_size=4).rank_of_world() == (3, 4)
    finally:
        torch.distributed.destroy_process_group()
    assert pickle.loads(for_a_worker).rank_of_world() == (1, 2)
    assert rows.rank_of_world() == (0, 1)


def test_ranks_without_a_process_group_are_warned_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.warns(logitstore.LogitStoreWarning, match="every process gets all samples"):
        iter(stream())
    iter(stream(rank=0, world_size=8))


def test_streams_copy_and_pickle():
    rows = stream()
    rows.skip(1)
    for other in (copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))):
        assert list(other) == list(rows)
        other.skip(1)
        assert list(other) == list(rows)[4:]
