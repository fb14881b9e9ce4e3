"""Reading a dataset on the Hub where it is: what is asked for, what is kept, and that nothing damaged gets through."""

import multiprocessing
import os
import pickle
import socket
import threading

import numpy as np
import pytest
from hub import Fault
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.hub import pull, push
from logitstore.io.hub import HubPlace

pytestmark = pytest.mark.usefixtures("quiet")

PLACE = "hf://datasets/me/x"


def same(one, other):
    assert one.id == other.id
    for name in ("tokens", "count", "ids", "logprobs", "tail"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def all_same(remote, local):
    assert len(remote) == len(local)
    for one, other in zip(remote, local, strict=True):
        same(one, other)


@pytest.fixture
def published(hub, rows, tmp_path):
    """A function that writes a dataset, publishes it as me/x, and forgets the requests."""

    def make(sequences=60, positions=40, k=8, **settings):
        path = tmp_path / "published"
        with logitstore.Writer(path, **{"logit_width": 1000, "teacher": "t", **settings}) as writer:
            for i in range(sequences):
                writer.add(*rows(i, positions + i % 7, k))
        push(path, "me/x")
        hub.clear_log()
        return path

    return make


@pytest.fixture
def many(published):
    """Some 200 shards of five chunks each, too large to be read at once."""
    path = published(sequences=1000, positions=60, k=100, chunk_candidates=5000, shard_bytes=68_000)
    shards = logitstore.open(path).info.shards
    assert 150 <= len(shards) <= 250
    assert min(shard.bytes for shard in shards[:-1]) > 2**16
    return path


@pytest.fixture
def large(published):
    """4 MB in some shards."""
    path = published(sequences=700, positions=60, k=64, chunk_candidates=2**14, shard_bytes=2**20)
    assert logitstore.open(path).info.totals.bytes > 3e6
    return path


# What is asked for


def test_one_sequence_of_many_shards(hub, many):
    """Revision, manifest, address, tail with index, schema, chunk; not two chunks' bytes."""
    local = logitstore.open(many)
    remote = logitstore.open(PLACE)
    assert [request.path.split("/")[-1] for request in hub.requests] == ["main", "logitstore.json"]
    same(remote[777], local[777])
    asked = hub.requests
    assert len(asked) == 6, [f"{request.method} {request.path}" for request in asked]
    number, place = local._shards.locate(777)
    chunk = int(local._shards[number].index["length"][local._shards[number].locate(place)[0]])
    assert sum(request.sent for request in asked if request.origin == "storage") < 3 * chunk


def test_iterating_fetches_the_shards_and_hardly_more(hub, large):
    all_same(logitstore.open(PLACE), logitstore.open(large))
    sent = sum(request.sent for request in hub.requests)
    assert sent <= 1.02 * logitstore.open(large).info.totals.bytes


def test_small_shards_are_fetched_once(hub, published):
    path = published(sequences=60, chunk_candidates=1500, shard_bytes=12_000)
    totals = logitstore.open(path).info.totals
    all_same(logitstore.open(PLACE), logitstore.open(path))
    storage = [request for request in hub.requests if request.origin == "storage"]
    assert len(storage) == totals.shards
    assert sum(request.sent for request in storage) == totals.bytes


def test_nothing_is_fetched_twice(hub, published):
    """Neither within a process nor in another one, thanks to the cache."""
    path = published()
    remote = logitstore.open(PLACE)
    all_same(remote, logitstore.open(path))
    hub.clear_log()
    all_same(remote, logitstore.open(path))
    all_same(logitstore.open(PLACE), logitstore.open(path))
    assert [request.origin for request in hub.requests] == ["hub", "hub"]  # revision and manifest of the second


def test_looking_at_one_sequence_does_not_fetch_the_rest(hub, large):
    iterator = iter(logitstore.open(PLACE))
    next(iterator)
    iterator.close()
    assert sum(request.sent for request in hub.requests) < logitstore.open(large).info.totals.bytes / 2


def test_a_slice_asks_for_its_own_shards_alone(hub, many):
    local = logitstore.open(many)
    all_same(logitstore.open(PLACE)[100:103], local[100:103])
    first, last = local._shards.locate(100)[0], local._shards.locate(102)[0]
    asked = {request.path.split("/")[-1] for request in hub.requests if "/resolve/" in request.path}
    paths = {info.path.split("/")[-1] for info in local.info.shards[first : last + 1]}
    assert asked - {"logitstore.json"} == paths


@pytest.mark.parametrize("size", ["0", "1KiB", "100MiB"])
@pytest.mark.parametrize("step", [1, -1, 7])
def test_views(monkeypatch, published, size, step):
    monkeypatch.setenv("LOGITSTORE_CACHE_SIZE", size)
    path = published(sequences=100, chunk_candidates=1500, shard_bytes=12_000)
    local, remote = logitstore.open(path), logitstore.open(PLACE)
    all_same(remote[::step], local[::step])
    all_same(remote.split("train")[5:50:step], local.split("train")[5:50:step])
    assert [sequence.id for chunk in remote[::step].chunks() for sequence in chunk] == [s.id for s in local[::step]]
    np.testing.assert_array_equal(remote[::step].lengths(), local[::step].lengths())
    same(remote.by_id(local[61].id), local[61])
    with pytest.raises(logitstore.SequenceNotFoundError, match="hf://datasets/me/x"):
        remote.by_id("nobody")
    with pytest.raises(logitstore.RowIndexError):
        remote[100]


def test_what_is_expected_is_there_when_it_is_asked_for(hub, published):
    path = published(sequences=100, chunk_candidates=1500, shard_bytes=12_000)
    local, remote = logitstore.open(path), logitstore.open(PLACE)
    order = np.random.default_rng(0).permutation(100).tolist()
    for at, row in enumerate(order):
        remote.expect(order[at : at + 16])
        same(remote[row], local[row])
    storage = [request for request in hub.requests if request.origin == "storage"]
    assert len(storage) == len({(request.path, request.range) for request in storage})
    with pytest.raises(logitstore.RowIndexError):
        remote.expect([100])
    local.expect([100])  # does nothing


# Revisions and places


def test_a_revision_is_resolved_once(hub, write, published):
    path = published()
    push(path, "me/x", tag="v1")
    remote = logitstore.open(PLACE)
    newer = write("newer", sequences=5, seed=99)
    push(newer, "me/x")
    all_same(remote, logitstore.open(path))
    all_same(logitstore.open(f"{PLACE}@v1"), logitstore.open(path))
    all_same(logitstore.open(PLACE), logitstore.open(newer))
    commit = hub.commits("me/x", "v1")[0].sha
    hub.clear_log()
    opened = logitstore.open(f"{PLACE}@{commit}")
    assert [request.path.split("/")[-1] for request in hub.requests] == ["logitstore.json"]
    all_same(opened, logitstore.open(path))
    assert repr(opened).startswith(f"Dataset('{PLACE}@{commit}', ")
    assert opened.path == f"{PLACE}@{commit}"


def test_a_folder_of_a_repository(hub, write):
    path = write()
    files = {f"runs/a/{p.relative_to(path).as_posix()}": p.read_bytes() for p in path.rglob("*") if p.is_file()}
    hub.commit_files("me/y", files)
    all_same(logitstore.open("hf://datasets/me/y/runs/a"), logitstore.open(path))
    all_same(logitstore.open("hf://datasets/me/y@main/runs/a/"), logitstore.open(path))
    with pytest.raises(logitstore.DatasetNotFoundError, match=r"no logitstore dataset: there is no logitstore\.json"):
        logitstore.open("hf://datasets/me/y")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hf://datasets/a/b", HubPlace("a/b")),
        ("hf://datasets/a/b@v1", HubPlace("a/b", "v1")),
        ("hf://datasets/a/b@v1/c/d/", HubPlace("a/b", "v1", "c/d/")),
        ("hf://datasets/a/b@x%2Fy", HubPlace("a/b", "x/y")),
        ("hf://datasets/a/b@refs/pr/3", HubPlace("a/b", "refs/pr/3")),
        ("hf://datasets/a/b@refs/pr/3/c", HubPlace("a/b", "refs/pr/3", "c/")),
        ("hf://datasets/a/b@refs/convert/parquet", HubPlace("a/b", "refs/convert/parquet")),
        ("a/b", HubPlace("a/b")),
        ("a/b@v1", HubPlace("a/b", "v1")),
        ("datasets/a/b@v1", HubPlace("a/b", "v1")),
    ],
)
def test_places(text, place):
    assert HubPlace.parse(text) == place
    if text.startswith("hf://"):
        assert HubPlace.parse(place.url()) == place


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a/b/c",
        "/a",
        "a/",
        "a/b@",
        "@v1",
        "hf://a/b",
        "hf://models/a/b",
        "hf://datasets/a",
        "hf://datasets/a/b@",
    ],
)
def test_what_is_no_place(text):
    with pytest.raises(logitstore.InvalidInputError, match="no dataset on the Hub"):
        HubPlace.parse(text)


def test_options_are_for_urls(write):
    with pytest.raises(logitstore.InvalidInputError, match="storage_options are for URLs"):
        logitstore.open(write(), storage_options={"token": "x"})


def test_a_token_and_an_endpoint_can_be_given(hub, published, monkeypatch):
    path = published()
    hub.set_private("me/x")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}",
    )
    opened = logitstore.open(PLACE, storage_options={"token": hub.token, "endpoint": hub.endpoint})
    all_same(pickle.loads(pickle.dumps(opened)), logitstore.open(path))
    assert hub.token not in repr(opened._store)
    with pytest.raises(logitstore.DatasetNotFoundError, match="no such repository"):
        logitstore.open(PLACE, storage_options={"token": False, "endpoint": hub.endpoint})


# Processes and threads


def _ids(dataset, queue):
    queue.put([sequence.id for sequence in dataset])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_other_processes(published, method):
    path = published()
    remote = logitstore.open(PLACE)
    assert len(list(remote[:3])) == 3  # threads and connections exist before the fork
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_ids, args=(remote, queue))
    process.start()
    assert queue.get(timeout=60) == [sequence.id for sequence in logitstore.open(path)]
    process.join(60)
    assert process.exitcode == 0


def test_threads(published):
    path = published(sequences=100, chunk_candidates=1500, shard_bytes=12_000)
    local, remote = logitstore.open(path), logitstore.open(PLACE)
    failures = []

    def read(seed):
        try:
            for row in np.random.default_rng(seed).permutation(100)[:40].tolist():
                same(remote[row], local[row])
            all_same(remote[seed * 10 :], local[seed * 10 :])
        except Exception as error:  # noqa: BLE001 - looked at below
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# The tokenizer


def test_the_tokenizer(hub, write, tmp_path):
    tokenizer = logitstore.Tokenizer.from_pieces({i: f"t{i} ".encode() for i in range(1000)})
    path = write(tokenizer=tokenizer)
    push(path, "me/x")
    fetched = logitstore.open(PLACE).tokenizer()
    assert list(fetched.items()) == list(tokenizer.items())
    assert all(file.is_file() for file in fetched.files)
    hub.clear_log()
    logitstore.open(PLACE).tokenizer()
    assert [request.origin for request in hub.requests] == ["hub", "hub"]


# Faults

KINDS = [
    {"kind": "status", "status": 429, "headers": {"Retry-After": "0"}},
    {"kind": "status", "status": 500},
    {"kind": "status", "status": 503},
    {"kind": "drop"},
    {"kind": "drop-body", "after": 300},
    {"kind": "drop-body", "after": 300, "reset": True},
    {"kind": "truncate", "after": 300},
    {"kind": "flip", "after": 150},
    {"kind": "lost-reply"},
    {"kind": "delay", "seconds": 0.2},
]


def named(fault):
    return "-".join(str(value) for key, value in fault.items() if key in ("kind", "status", "reset"))


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("fault", KINDS, ids=named)
@pytest.mark.parametrize("origin", ["hub", "storage"])
def test_a_fault_is_survived(hub, published, origin, fault, skip):
    path = published(sequences=40, k=32, chunk_candidates=6000, shard_bytes=80_000)
    hub.fault(Fault(origin=origin, skip=skip, **fault))
    all_same(logitstore.open(PLACE), logitstore.open(path))


@pytest.mark.parametrize("fault", [kind for kind in KINDS if kind["kind"] != "delay"], ids=named)
@pytest.mark.parametrize("origin", ["hub", "storage"])
def test_a_fault_that_stays_is_an_error(hub, published, origin, fault):
    """What was read before is right; then one clear error, and nothing damaged in the cache."""
    path = published(sequences=80, k=32, chunk_candidates=6000, shard_bytes=80_000)
    local = logitstore.open(path)
    hub.fault(Fault(origin=origin, times=None, skip=2, **fault))
    read = 0
    try:
        for one, other in zip(logitstore.open(PLACE), local, strict=True):
            same(one, other)
            read += 1
    except (logitstore.RemoteError, logitstore.CorruptDataError) as error:
        assert "hf://datasets/me/x" in str(error)
        assert read < 80
    else:
        assert fault["kind"] in ("drop-body", "truncate", "flip")  # large answers alone, whose bytes come in the end
    hub.clear_faults()
    all_same(logitstore.open(PLACE), local)


@pytest.mark.parametrize("seed", range(8))
def test_random_faults(hub, published, seed):
    path = published(sequences=80, k=32, chunk_candidates=6000, shard_bytes=80_000)
    local = logitstore.open(path)
    for number, fault in enumerate(KINDS):
        hub.fault(Fault(times=None, chance=0.03, seed=100 * seed + number, **fault))
    for _ in range(3):
        try:
            all_same(logitstore.open(PLACE), local)
        except (logitstore.RemoteError, logitstore.CorruptDataError):
            continue
    hub.clear_faults()
    all_same(logitstore.open(PLACE), local)


def test_addresses_that_expire_are_asked_for_again(hub, published):
    path = published(sequences=100, k=32, chunk_candidates=6000, shard_bytes=80_000)
    local, remote = logitstore.open(path), logitstore.open(PLACE)
    for row in range(0, 100, 9):
        same(remote[row], local[row])
        hub.expire_urls()
    all_same(remote, local)


def test_storage_that_refuses_every_address(hub, published):
    published()
    remote = logitstore.open(PLACE)
    hub.fault(Fault(origin="storage", kind="status", status=403, times=None))
    with pytest.raises(logitstore.RemoteError, match=r"hf://datasets/me/x/data/train/train-00000\.arrow: refused.*403"):
        remote[0]


def test_damage_in_storage_is_found_and_named(hub, published):
    """What the Hub itself holds is damaged: asked for three times, then an error with its place."""
    path = published(sequences=40, chunk_candidates=1500)
    (info,) = logitstore.open(path).info.shards
    data = bytearray((path / info.path).read_bytes())
    index = logitstore.open(path)._shards[0].index
    data[int(index["offset"][3]) + 99] ^= 4
    hub.commit_files("me/x", {info.path: bytes(data)})
    remote, local = logitstore.open(PLACE), logitstore.open(path)
    bad = range(*logitstore.open(path)._shards[0].starts[3:5])
    for row in range(40):
        if row in bad:
            with pytest.raises(
                logitstore.CorruptDataError, match=r"hf://.*00000\.arrow, chunk 3, byte \d+: the chunk's"
            ):
                remote[row]
        else:
            same(remote[row], local[row])
    with pytest.raises(logitstore.CorruptDataError, match="chunk 3"):
        list(remote)


@pytest.mark.parametrize("change", ["missing", "shorter", "another"])
def test_a_shard_that_is_not_the_manifests(hub, published, write, change):
    path = published(sequences=40)
    (info,) = logitstore.open(path).info.shards
    data = (path / info.path).read_bytes()
    other = (write("other", sequences=40, seed=7) / info.path).read_bytes()
    changed = {"shorter": data[:-1000], "another": other}
    files = {} if change == "missing" else {info.path: changed[change]}
    hub.commit_files("me/x", files, delete=[info.path] if change == "missing" else [])
    with pytest.raises(logitstore.CorruptDataError, match=r"hf://datasets/me/x/data/train/train-00000\.arrow"):
        logitstore.open(PLACE)[0]


def test_a_manifest_that_is_damaged_on_the_hub(hub, published):
    path = published()
    data = (path / "logitstore.json").read_bytes()
    hub.commit_files("me/x", {"logitstore.json": data.replace(b'"vocabulary"', b'"candidates"')})
    with pytest.raises(logitstore.CorruptDataError, match=r"hf://datasets/me/x/logitstore\.json: the manifest's bytes"):
        logitstore.open(PLACE)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1), skip=st.integers(0, 8), times=st.integers(1, 2))
def test_a_bit_flipped_anywhere(hub_with_data, at, skip, times):
    hub, local = hub_with_data
    hub.clear_faults()
    os.environ["LOGITSTORE_CACHE_SIZE"] = "0"
    try:
        hub.fault(Fault(origin="storage", kind="flip", after=int(at * 4000), skip=skip, times=times))
        all_same(logitstore.open(PLACE), local)
    finally:
        del os.environ["LOGITSTORE_CACHE_SIZE"]


@pytest.fixture
def hub_with_data(hub, published):
    return hub, logitstore.open(published(sequences=60, k=32, chunk_candidates=6000, shard_bytes=80_000))


# Elsewhere


def test_urls_are_not_taken_for_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(logitstore.InvalidInputError, match="is a URL; write to a directory"):
        logitstore.Writer(PLACE)
    with pytest.raises(logitstore.InvalidInputError, match="is a URL; validate what `logitstore pull` fetches"):
        logitstore.validate(PLACE)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_asked_of_anybody_else(hub, write, tmp_path, monkeypatch):
    """Every connection of push, pull and reading goes to the Hub or to its storage."""
    seen = set()
    connect = socket.socket.connect

    def watched(self, address):
        seen.add(address[1] if isinstance(address, tuple) else address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    path = write(sequences=30)
    push(path, "me/x", tag="v1")
    pull("me/x@v1", tmp_path / "back")
    all_same(logitstore.open(PLACE), logitstore.open(path))
    assert seen == {int(url.rsplit(":", 1)[1]) for url in (hub.endpoint, hub.storage)}


def test_looking_for_an_id_asks_several_shards_at_once(hub, many):
    local, remote = logitstore.open(many), logitstore.open(PLACE)
    same(remote.by_id(local[3].id), local[3])
    assert len({request.path for request in hub.requests if request.origin == "storage"}) < 40
    same(remote.by_id(local[-1].id), local[-1])
    with pytest.raises(logitstore.SequenceNotFoundError):
        remote[:5].by_id(local[-1].id)


def test_figures_of_a_remote_dataset_are_those_of_a_local_one(hub, large):
    from dataclasses import replace

    from logitstore.look.compare import compare
    from logitstore.look.stats import stats

    local, remote = logitstore.open(large), logitstore.open(PLACE)
    sent = sum(request.sent for request in hub.requests)
    assert stats(remote, full=True) == stats(local, full=True)
    assert sum(request.sent for request in hub.requests) - sent <= 1.02 * local.info.totals.bytes  # each chunk once
    found, expected = compare(remote, local), compare(local, local)
    assert replace(found, a=expected.a) == expected


def test_a_sample_of_a_remote_dataset_fetches_its_chunks_alone(hub, many):
    from logitstore.look import parts
    from logitstore.look.stats import stats

    remote = logitstore.open(PLACE)
    figures = stats(remote)
    assert 0 < figures.sequences <= 40 * parts.SAMPLE_PARTS
    assert not figures.full
    assert len([request for request in hub.requests if request.origin == "storage"]) <= 6 * parts.SAMPLE_PARTS
