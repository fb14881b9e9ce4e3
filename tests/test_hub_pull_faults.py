"""Fetching from the Hub when the network or the Hub is wrong."""

import hashlib
import json
import re
import threading

import msgspec
import numpy as np
import pytest

from logitstore.errors import (
    CorruptDataError,
    DatasetNotFoundError,
    InvalidInputError,
    LogitStoreError,
    RemoteAccessError,
    RemoteError,
)

pytest.importorskip("huggingface_hub")

from hub import Fault
from pull_rows import (
    CARD,
    MANIFEST,
    REPO,
    assert_absent,
    assert_whole,
    content,
    sealed,
    shards_of,
    size_of,
    stored,
)

from logitstore.hub import parts, pull
from logitstore.schema import dataset_digest, parse_manifest, serialise_manifest
from logitstore.schema.manifest import sum_splits

pytest_plugins = ["pull_rows"]  # its fixtures
pytestmark = pytest.mark.usefixtures("quiet")


# Faults, one at a time


FAULTS = [
    *({"kind": "status", "status": status, "times": 2} for status in (408, 429, 500, 502, 503, 504)),
    {"kind": "status", "status": 429, "headers": {"RateLimit": '"api";r=0;t=0'}},
    {"kind": "status", "status": 503, "headers": {"Retry-After": "0"}},
    {"kind": "drop", "times": 3},
    {"kind": "drop", "times": 2, "reset": True},
    *({"kind": "drop-body", "after": after, "times": 2} for after in (0, 1, 40, 3000)),
    {"kind": "drop-body", "after": 1000, "reset": True},
    *({"kind": "truncate", "after": after, "times": 2} for after in (0, 40, 3000)),
    *({"kind": "flip", "after": after, "times": 1} for after in (0, 40, 900, 3000)),
    {"kind": "delay", "seconds": 0.3},
]
WHERE = {
    "revision": {"origin": "hub", "path": "/api/datasets"},
    "manifest": {"origin": "hub", "path": MANIFEST},
    "manifest again": {"origin": "hub", "path": MANIFEST, "skip": 1},
    "card": {"origin": "hub", "path": "README"},
    "tokenizer": {"origin": "hub", "path": r"tokenizer\.json"},
    "address": {"origin": "hub", "path": r"\.arrow"},
    "data": {"origin": "storage"},
    "late data": {"origin": "storage", "skip": 5},
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(str(v) for v in fault.values()))
def test_a_fault_is_survived(hub, there, tmp_path, where, fault):
    answers_in_json = where == "revision" and fault["kind"] in ("flip", "truncate")
    if answers_in_json:
        pytest.skip("the client takes what JSON says")
    armed = hub.fault(Fault(**{**fault, **WHERE[where]}))
    pulled = pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)
    body = fault["kind"] in ("drop-body", "truncate", "flip")
    short = where in ("revision", "address") or (where == "card" and fault.get("after", 0) > len(CARD))
    assert armed.hits or (body and short)
    assert pulled.fetched >= size_of(there)


@pytest.mark.parametrize("kind", ["truncate", "flip"])
@pytest.mark.parametrize("after", range(0, 60, 9))
def test_a_damaged_answer_about_the_revision_is_a_clear_error_or_harmless(hub, there, tmp_path, kind, after):
    armed = hub.fault(Fault(kind=kind, path="/api/datasets", after=after, times=None))
    try:
        pull(REPO, tmp_path / "d")
    except LogitStoreError:
        assert_absent(tmp_path / "d")
    else:
        assert_whole(tmp_path / "d", there)
    assert armed.seen
    hub.clear_faults()
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)


def test_addresses_that_expire(hub, there, tmp_path, small_segments, monkeypatch):
    monkeypatch.setattr(parts, "FETCHERS", 1)
    hub.bytes_per_second = 100_000
    stopped = threading.Event()

    def expire():
        while not stopped.wait(0.1):
            hub.expire_urls()

    thread = threading.Thread(target=expire)
    thread.start()
    try:
        pull(REPO, tmp_path / "d")
    finally:
        stopped.set()
        thread.join()
    assert_whole(tmp_path / "d", there)
    assert [r for r in hub.requests if r.status == 403]


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        ({"kind": "status", "status": 403, "origin": "storage"}, RemoteError, "refused with status 403"),
        ({"kind": "status", "status": 404, "origin": "storage"}, RemoteError, "refused with status 404"),
        ({"kind": "status", "status": 500, "origin": "storage"}, RemoteError, "status 500"),
        ({"kind": "drop", "origin": "storage"}, RemoteError, "try again later"),
        ({"kind": "drop-body", "after": 100, "origin": "storage", "skip": 4}, RemoteError, "could not be fetched"),
        ({"kind": "truncate", "after": 0, "origin": "storage"}, RemoteError, "cut-off"),
        ({"kind": "flip", "after": 100, "origin": "storage"}, CorruptDataError, r"\.arrow: fetched 3 times, its sha256"),
        ({"kind": "flip", "after": 100, "path": r"tokenizer\.json"}, CorruptDataError, "tokenizer.json: fetched 3 times"),
        ({"kind": "flip", "after": 100, "path": MANIFEST}, RemoteError, MANIFEST),
        ({"kind": "flip", "after": 10, "path": "README"}, RemoteError, "README"),
        ({"kind": "status", "status": 500, "path": "README"}, RemoteError, "the Hub has a problem"),
        ({"kind": "status", "status": 401, "path": r"\.arrow"}, RemoteAccessError, "token"),
        ({"kind": "status", "status": 403, "path": r"\.arrow"}, RemoteAccessError, "right"),
        ({"kind": "status", "status": 429, "path": "/api/datasets"}, RemoteError, "limits your requests"),
        ({"kind": "status", "status": 503, "path": MANIFEST, "skip": 1}, RemoteError, "the Hub has a problem"),
    ],
)  # fmt: skip
def test_a_fault_that_stays_is_a_clear_error(hub, there, tmp_path, fault, error, match):
    hub.fault(Fault(times=None, **fault))
    with pytest.raises(error, match=match) as raised:
        pull(REPO, tmp_path / "d")
    assert "Signature" not in str(raised.value)
    assert hub.token not in str(raised.value)
    assert_absent(tmp_path / "d")
    hub.clear_faults()
    hub.clear_log()
    kept = sum(
        len(data) for name, data in content(tmp_path / "d", hidden=True).items() if re.search(r"/[0-9a-f]{64}$", name)
    )
    pulled = pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)
    assert pulled.fetched <= size_of(there) - kept


@pytest.mark.parametrize("seed", range(10))
def test_faults_at_random(hub, there, tmp_path, seed, small_segments):
    random = np.random.default_rng(seed)
    chance = [0.03, 0.1, 0.4][seed % 3]
    kinds = (
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 429},
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 403, "origin": "storage"},
        {"kind": "drop"},
        {"kind": "drop", "reset": True},
        {"kind": "drop-body", "after": int(random.integers(2000))},
        {"kind": "truncate", "after": int(random.integers(2000)), "path": "resolve|lfs"},
        {"kind": "flip", "after": int(random.integers(2000)), "path": "resolve|lfs"},
        {"kind": "delay", "seconds": 0.02},
    )
    for number, kind in enumerate(kinds):
        hub.fault(Fault(**kind, times=None, chance=chance * random.uniform(0, 0.5), seed=seed * 100 + number))
    for _ in range(20):
        try:
            pull(REPO, tmp_path / "d")
            break
        except LogitStoreError:
            assert_absent(tmp_path / "d")
    else:
        hub.clear_faults()
        pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)


def test_what_came_before_a_failure_does_not_come_again(hub, there, tmp_path, breaks_off):
    with pytest.raises(RemoteError, match="could not be fetched"):
        pull(REPO, tmp_path / "d")
    first = stored(hub)
    assert first > 4000
    hub.clear_faults()
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)
    total = sum(len(there[name]) for name in shards_of(there))
    assert list((tmp_path / "d").rglob("*.part")) == []
    assert total <= stored(hub) <= total + parts.FETCHERS * 1500
    assert stored(hub) - first < total - 4000


# What the Hub stores is wrong


def test_a_shard_that_is_damaged_there(hub, files, tmp_path):
    name = shards_of(files)[2]
    bad = bytearray(files[name])
    bad[len(bad) // 2] ^= 1
    hub.commit_files(REPO, {**files, name: bytes(bad)})
    with pytest.raises(CorruptDataError, match=f"{name}: fetched 3 times.*its publisher") as raised:
        pull(REPO, tmp_path / "d")
    assert raised.value.code == "shard-sha256"
    assert_absent(tmp_path / "d")
    oid = hashlib.sha256(bad).hexdigest()
    assert len([r for r in hub.requests if oid in r.path]) == 3
    hub.commit_files(REPO, {name: files[name]})
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", files)


@pytest.mark.parametrize("harm", ["shorter", "longer", "empty"])
@pytest.mark.parametrize("which", ["shard", "tokenizer"])
def test_a_file_of_another_size_there(hub, files, tmp_path, harm, which):
    name = shards_of(files)[2] if which == "shard" else "tokenizer/tokenizer.json"
    data = {"shorter": files[name][:-10], "longer": files[name] + b"more", "empty": b""}[harm]
    hub.commit_files(REPO, {**files, name: data})
    if harm == "longer":  # its beginning is what the manifest says
        pull(REPO, tmp_path / "d")
        assert_whole(tmp_path / "d", files)
        return
    with pytest.raises(LogitStoreError, match=name):
        pull(REPO, tmp_path / "d")
    assert_absent(tmp_path / "d")


@pytest.mark.parametrize("name", ["data/train/train-00001.arrow", "tokenizer/tokenizer.json"])
def test_a_file_that_is_missing_there(hub, files, tmp_path, name):
    del files[name]
    hub.commit_files(REPO, files)
    with pytest.raises(CorruptDataError, match=f"{name}: its manifest names this file, but it is not there"):
        pull(REPO, tmp_path / "d")
    assert_absent(tmp_path / "d")


def test_no_dataset_there(hub, files, tmp_path):
    with pytest.raises(DatasetNotFoundError, match="no such repository"):
        pull("me/nowhere", tmp_path / "d")
    hub.create_repo("me/empty")
    with pytest.raises(DatasetNotFoundError, match="no logitstore dataset"):
        pull("me/empty", tmp_path / "d")
    hub.commit_files(REPO, {**files, MANIFEST: files[MANIFEST].replace(b'"positions"', b'"positi0ns"', 1)})
    with pytest.raises(CorruptDataError, match=MANIFEST):
        pull(REPO, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    for name in ("x", "a/b/c", "me/x@", "hf://models/x"):
        with pytest.raises(InvalidInputError):
            pull(name, tmp_path / "d")


@pytest.mark.parametrize("evil", ["../x", "/x", "data/../../x", "C:x", "a\\b", "data//x", "./x", "data/train/", "x\0"])
def test_paths_that_lead_outside(hub, files, tmp_path, evil):
    shards = json.loads(files[MANIFEST])["shards"]
    shards[0]["path"] = evil
    hub.commit_files(REPO, {**files, MANIFEST: sealed(files[MANIFEST], shards=shards)})
    with pytest.raises(CorruptDataError, match="outside the dataset"):
        pull(REPO, tmp_path / "d" / "e")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("evil", [MANIFEST, ".pull/lock", ".pull/x", "README.md/x"])
def test_names_that_we_use_ourselves(hub, files, tmp_path, evil):
    tokenizer = json.loads(files[MANIFEST])["tokenizer"]
    taken = files["tokenizer/tokenizer.json"]
    tokenizer["files"][0].update(path=evil, bytes=len(taken), sha256=hashlib.sha256(taken).hexdigest())
    manifest = sealed(files[MANIFEST], tokenizer=tokenizer)
    there = {**files, evil: taken, MANIFEST: manifest}
    if evil.startswith("README"):
        del there["README.md"]
    hub.commit_files(REPO, there)
    with pytest.raises((LogitStoreError, OSError)):
        pull(REPO, tmp_path / "d")
    assert not (tmp_path / "d" / MANIFEST).exists()


def test_a_dataset_that_is_not_valid_there(hub, files, tmp_path):
    """All bytes are as its manifest says, but the totals are not those of the shards' headers."""
    manifest = sealed(files[MANIFEST], user_columns={"x": "string"})
    hub.commit_files(REPO, {**files, MANIFEST: manifest})
    with pytest.raises(CorruptDataError, match="not valid"):
        pull(REPO, tmp_path / "d")
    assert_absent(tmp_path / "d")


def test_two_shards_of_equal_bytes(hub, files, other, tmp_path, small_segments):
    """Fetched once, and there twice; sequences are then doubled, which is not a matter of bytes."""
    manifest = parse_manifest((other / MANIFEST).read_bytes())
    first = manifest.shards[0]
    twin = msgspec.structs.replace(first, path="data/test/test-00000.arrow", split="test")
    shards = (first, twin)
    changed = {name: 2 * getattr(first, name) for name in ("sequences", "positions", "candidates", "bytes")}
    double = msgspec.structs.replace(
        manifest,
        shards=shards,
        splits=sum_splits(shards),
        totals=msgspec.structs.replace(manifest.totals, shards=2, **changed),
        dataset_digest=dataset_digest(shards, manifest.tokenizer),
    )
    data = content(other)[first.path]
    there = {name: data for name, data in content(other).items() if "tokenizer/" in name}
    there |= {MANIFEST: serialise_manifest(double), first.path: data, twin.path: data}
    hub.commit_files(REPO, there)
    seen = []
    pull(REPO, tmp_path / "d", progress=lambda *told: seen.append(told))
    assert content(tmp_path / "d", hidden=True) == there
    assert stored(hub) == len(data)
    assert seen[-1][0] == seen[-1][1] == size_of(there)
