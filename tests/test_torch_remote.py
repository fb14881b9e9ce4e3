"""Training on a dataset on the Hub: the same batches as from a disk, workers and resuming included."""

import time

import numpy as np
import pytest

import logitstore
from logitstore.hub import push

pytest.importorskip("torch", reason="the loader needs torch")

from logitstore.torch import LogitDataset, LogitLoader, Mixture, Packed, StreamingLogits, Teachers

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")]

PLACE = "hf://datasets/me/x"


@pytest.fixture
def path(hub, write):
    made = write(sequences=90, positions=20, k=16, chunk_candidates=3000, shard_bytes=60_000)
    push(made, "me/x")
    hub.clear_log()
    return made


def ids(loader):
    return [[sequence.id for sequence in batch] for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", ["blocks", "full"])
def test_streaming(hub, path, workers, shuffle):
    settings = {"batch_size": 4, "seed": 3, "shuffle": shuffle, "epochs": 2}
    local = ids(LogitLoader(StreamingLogits(path, **settings)))
    remote = LogitLoader(StreamingLogits(PLACE, **settings), num_workers=workers)
    assert ids(remote) == local
    sent = sum(request.sent for request in hub.requests if request.origin == "storage")
    assert sent < 1.2 * max(1, workers) * logitstore.open(path).info.totals.bytes  # two epochs, through the cache


def test_a_state_of_either_resumes_the_other(path):
    settings = {"batch_size": 4, "seed": 3}
    whole = ids(LogitLoader(StreamingLogits(path, **settings)))
    remote = LogitLoader(StreamingLogits(PLACE, **settings))
    iterator = iter(remote)
    assert [[s.id for s in next(iterator)] for _ in range(5)] == whole[:5]
    local = LogitLoader(StreamingLogits(path, **settings))
    local.load_state_dict(remote.state_dict())
    assert ids(local) == whole[5:]


def test_what_is_made_of_it(path):
    for make in (
        lambda place: Mixture([place, path], [1, 2]),
        lambda place: Packed(place, 64),
        lambda place: Packed(place, 64, "split"),
        lambda place: Teachers([place, path]),
    ):
        batches = [
            [
                (s.id, s.tokens.tolist(), s.ids.tolist())
                for batch in LogitLoader(StreamingLogits(made, batch_size=3))
                for s in batch
            ]
            for made in (make(path), make(PLACE))
        ]
        assert batches[0] == batches[1]


def test_map_style(hub, path):
    from torch.utils.data import DataLoader

    remote = DataLoader(LogitDataset(PLACE), batch_size=8, shuffle=False, collate_fn=list)
    local = logitstore.open(path)
    for one, other in zip((s for batch in remote for s in batch), local, strict=True):
        assert one.id == other.id
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_samples_are_fetched_before_their_turn(hub, write):
    """When two batches of 4 samples are there, the chunks of the 60 that follow have been asked for."""
    path = write(sequences=90, positions=20, k=32, chunk_candidates=3000, shard_bytes=80_000)
    push(path, "me/x")
    hub.clear_log()
    order = [name for batch in ids(LogitLoader(StreamingLogits(path, batch_size=4, shuffle="full"))) for name in batch]
    local = logitstore.open(path)
    row_of = {sequence.id: row for row, sequence in enumerate(local)}

    def chunk(name):
        number, place = local._shards.locate(row_of[name])
        return number, local._shards[number].locate(place)[0]

    wanted = {chunk(name) for name in order[:64]}
    assert len(wanted) > len({chunk(name) for name in order[:4]}) + 5
    iterator = iter(LogitLoader(StreamingLogits(PLACE, batch_size=4, shuffle="full")))
    next(iterator)
    next(iterator)
    deadline = time.monotonic() + 30
    while True:
        asked = len({(r.path, r.range) for r in hub.requests if r.origin == "storage"})
        if asked >= len(wanted):
            break
        assert time.monotonic() < deadline, (asked, len(wanted))
        time.sleep(0.02)


def test_another_dataset_at_the_place_is_refused(path, write):
    loader = LogitLoader(StreamingLogits(PLACE, batch_size=4))
    next(iter(loader))
    state = loader.state_dict()
    push(write("newer", sequences=30, seed=50), "me/x")
    with pytest.raises(logitstore.InvalidInputError, match="another dataset"):
        LogitLoader(StreamingLogits(PLACE, batch_size=4)).load_state_dict(state)
