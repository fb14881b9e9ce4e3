"""`logitstore pull`: what arrives, what is refused, and what is left when something goes wrong."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.errors import (
    CorruptDataError,
    DatasetExistsError,
    DatasetNotFoundError,
    IncompleteDatasetError,
    InvalidInputError,
    LogitStoreError,
    RemoteAccessError,
    RemoteError,
    UnsupportedVersionError,
)

pytest.importorskip("huggingface_hub")

from hub import Fault

from logitstore.hub import parts, pull, push
from logitstore.hub.parts import Parts, Wanted, fetch_all
from logitstore.hub.pull import choose
from logitstore.schema import Split, Totals, dataset_digest, parse_manifest, serialise_manifest
from logitstore.schema.manifest import sum_splits

pytestmark = pytest.mark.usefixtures("quiet")

REPO = "me/x"
MODULE = sys.modules["logitstore.hub.pull"]  # the name is that of the function
MANIFEST = "logitstore.json"
CARD = b"---\nlicense: mit\n---\n# Logits\n"


def content(root, *, hidden=False):
    """Bytes of all files by path."""
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if hidden or not name.startswith(".pull/")}


def make(path, make_rows, sequences=40, *, split="train", seed=0, **options):
    tokenizer = path.parent / "teacher"
    tokenizer.mkdir(parents=True, exist_ok=True)
    vocab = {f"w{i}": i for i in range(1000)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    (tokenizer / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"made": path.parent.name}))
    settings = {"chunk_candidates": 2000, "shard_bytes": 9000, "tokenizer": tokenizer, **options}
    with logitstore.Writer(path, logit_width=1000, teacher="t", split=split, **settings) as writer:
        for i in range(sequences):
            columns = {"loss_mask": np.ones(30 + i, np.uint8)} if split == "test" and i % 2 else {}
            writer.add(*make_rows(seed + i, 30 + i, 8), id=f"{split}-{seed}-{i}", **columns)
    return path


def joined(path, *others):
    """Several datasets of one split each as one."""
    manifests = [parse_manifest((one / MANIFEST).read_bytes()) for one in others]
    for one in others:
        shutil.copytree(one, path, dirs_exist_ok=True)
    shards = tuple(info for manifest in manifests for info in manifest.shards)
    totals = [manifest.totals for manifest in manifests]
    summed = {
        name: sum(getattr(t, name) for t in totals)
        for name in ("shards", "sequences", "positions", "candidates", "bytes")
    }
    counted = {
        name: {key: sum(getattr(t, name).get(key, 0) for t in totals) for t in totals for key in getattr(t, name)}
        for name in ("encodings", "columns")
    }
    whole = msgspec.structs.replace(
        manifests[0],
        shards=shards,
        splits={**sum_splits(shards), **{name: Split() for m in manifests for name in m.splits if not m.shards}},
        totals=Totals(**summed, **counted, highest_id=max(t.highest_id or 0 for t in totals)),
        dataset_digest=dataset_digest(shards, manifests[0].tokenizer),
    )
    (path / MANIFEST).write_bytes(serialise_manifest(whole))
    return path


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A dataset of a train split of 10 shards or so, a test split, and an empty one, with a card."""
    from conftest import make_rows

    base = tmp_path_factory.mktemp("pull")
    train = make(base / "train", make_rows, sequences=40)
    test = make(base / "test", make_rows, sequences=9, split="test", seed=500, values="float32")
    empty = make(base / "empty", make_rows, sequences=0, split="dev")
    path = joined(base / "whole", train, test, empty)
    (path / "README.md").write_bytes(CARD)
    assert 6 <= len(logitstore.open(path).info.shards) <= 40
    assert not [f for f in logitstore.validate(path, deep=True) if f.severity == "error"]
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    from conftest import make_rows

    return make(tmp_path_factory.mktemp("other") / "o", make_rows, sequences=40, seed=9000)


@pytest.fixture
def files(local):
    return content(local)


@pytest.fixture
def there(hub, files):
    """The dataset on the Hub."""
    hub.commit_files(REPO, files)
    hub.clear_log()
    return files


@pytest.fixture
def breaks_off(hub, there, monkeypatch):
    """The storage breaks off after some answers, each time so early that nothing more can be had."""
    monkeypatch.setattr(MODULE, "BUFFER", 1024)
    hub.fault(Fault(kind="drop-body", after=700, origin="storage", skip=3, times=None))


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(parts, "SEGMENT", 4096)
    monkeypatch.setattr(MODULE, "BUFFER", 1024)


def stored(hub):
    """Bytes that the storage sent."""
    return sum(request.sent for request in hub.requests if request.origin == "storage" and request.status < 300)


def shards_of(files):
    return [name for name in files if name.endswith(".arrow")]


def size_of(files, *more):
    return sum(len(data) for name, data in files.items() if name not in (MANIFEST, "README.md", *more))


def assert_valid(root):
    assert [f for f in logitstore.validate(root, deep=True) if f.severity == "error" or "unreferenced" in f.code] == []


def assert_whole(root, files):
    assert content(root, hidden=True) == files
    assert_valid(root)


def assert_absent(root):
    """There is nothing that looks complete."""
    assert not (root / MANIFEST).exists()
    with pytest.raises((DatasetNotFoundError, IncompleteDatasetError)):
        logitstore.open(root)


def cli(monkeypatch, capfd, *arguments, status=0):
    from logitstore_cli.main import run

    monkeypatch.setattr(sys, "argv", ["logitstore", "pull", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run()
    out, err = capfd.readouterr()
    assert ended.value.code == status, (out, err)
    assert "Traceback" not in err
    assert "hf_" not in out + err
    return out, err


# Round trip


def test_what_was_pushed_comes_back_byte_by_byte(hub, local, tmp_path):
    done = push(local, REPO)
    hub.clear_log()
    root = tmp_path / "d"
    pulled = pull(REPO, root)
    got, given = content(root, hidden=True), content(local)
    assert got.pop("README.md") == hub.files(REPO)["README.md"]
    given.pop("README.md")
    assert got == given
    assert_valid(root)
    assert (pulled.path, pulled.commit, pulled.unchanged) == (root, done.commit, False)
    assert pulled.shards == len(shards_of(given))
    assert pulled.bytes == pulled.fetched == size_of(given)
    assert [s.id for s in logitstore.open(root)] == [s.id for s in logitstore.open(local)]
    paths = [r.path for r in hub.requests if "/resolve/" in r.path]
    assert {re.search(r"/resolve/([^/]+)/", path)[1] for path in paths} == {done.commit}
    assert len([r for r in hub.requests if "/api/" in r.path]) == 1


def test_a_second_pull_does_nothing(hub, there, tmp_path):
    pull(REPO, tmp_path / "d")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").rglob("*") if p.is_file()}
    hub.clear_log()
    seen = []
    again = pull(REPO, tmp_path / "d", progress=lambda *told: seen.append(told))
    assert (again.unchanged, again.fetched) == (True, 0)
    assert [r for r in hub.requests if r.origin == "storage"] == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "d").rglob("*") if p.is_file()} == stamps
    assert seen[-1] == (again.bytes, again.bytes)


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "tokenizer", "manifest", "manifest-missing"])
def test_what_is_damaged_is_repaired_and_nothing_else_fetched(hub, there, tmp_path, harm):
    root = tmp_path / "d"
    pull(REPO, root)
    name = {"tokenizer": "tokenizer/tokenizer.json"}.get(harm, MANIFEST if "manifest" in harm else shards_of(there)[3])
    if "missing" in harm:
        (root / name).unlink()
    else:
        data = bytearray((root / name).read_bytes())
        data[len(data) // 2] ^= 1
        (root / name).write_bytes(data[:-1] if harm == "cut" else data)
    hub.clear_log()
    pulled = pull(REPO, root)
    assert_whole(root, there)
    assert not pulled.unchanged
    assert pulled.fetched == (0 if "manifest" in harm else len(there[name]))
    assert stored(hub) == (len(there[name]) if name.endswith(".arrow") else 0)


def test_a_dataset_that_is_repaired_is_there_all_the_time(hub, there, tmp_path, monkeypatch):
    root = tmp_path / "d"
    pull(REPO, root)
    (root / shards_of(there)[0]).unlink()
    real, opened = Path.replace, []

    def watched(self, target):
        opened.append(len(logitstore.open(root)) if self.parent.name == ".pull" and self.suffix == "" else 0)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    pull(REPO, root)
    assert max(opened) == len(logitstore.open(root))


def test_the_card_of_the_directory_stays(hub, there, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "README.md").write_text("mine")
    pull(REPO, tmp_path / "d")
    assert (tmp_path / "d" / "README.md").read_text() == "mine"
    pull(REPO, tmp_path / "d", overwrite=True)
    assert (tmp_path / "d" / "README.md").read_bytes() == CARD


def test_a_repository_without_a_card(hub, files, tmp_path):
    del files["README.md"]
    hub.commit_files(REPO, files)
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", files)


def test_a_large_card_and_a_large_manifest_that_are_stored_beside_the_repository(hub, files, tmp_path):
    files[".gitattributes"] = b"*.md filter=lfs\n*.json filter=lfs\n*.arrow filter=lfs\n"
    hub.commit_files(REPO, {".gitattributes": files.pop(".gitattributes")})
    hub.commit_files(REPO, files)
    hub.fault(Fault(kind="flip", origin="storage", after=5, times=2))
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", files)


# Revisions


def test_branch_tag_and_commit(hub, files, other, tmp_path):
    first = hub.commit_files(REPO, files)
    hub.repos[REPO].tags["v1"] = first.sha
    hub.repos[REPO].branches["old/one"] = first.sha
    gone = [name for name in files if name not in content(other)]
    second = hub.commit_files(REPO, content(other), delete=gone)
    for number, revision in enumerate(("v1", "old%2Fone", first.sha)):
        pulled = pull(f"{REPO}@{revision}", tmp_path / str(number))
        assert pulled.commit == first.sha
        assert_whole(tmp_path / str(number), files)
    assert pull(f"hf://datasets/{REPO}", tmp_path / "main").commit == second.sha
    assert_whole(tmp_path / "main", content(other))
    for revision in ("nowhere", "0" * 40):
        with pytest.raises(DatasetNotFoundError, match="no such revision"):
            pull(f"{REPO}@{revision}", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("when", ["/api/datasets", f"/{MANIFEST}", r"0001\.arrow", "/lfs/"])
def test_a_push_meanwhile_does_not_mix(hub, there, other, tmp_path, when):
    """The second revision comes right before the answer to one of the requests."""
    head = hub.repos[REPO].branches["main"]
    delayed = hub.fault(Fault(kind="delay", path=when, seconds=0.3))

    def meanwhile():
        while not delayed.hits:
            time.sleep(0.005)
        hub.commit_files(REPO, content(other))

    thread = threading.Thread(target=meanwhile)
    thread.start()
    pulled = pull(REPO, tmp_path / "d")
    thread.join()
    assert len({re.search(r"/resolve/([^/]+)/", r.path)[1] for r in hub.requests if "/resolve/" in r.path}) == 1
    expected = {**there, **content(other)} if pulled.commit != head else there
    named = {file.path for file in parse_manifest((tmp_path / "d" / MANIFEST).read_bytes()).files}
    assert content(tmp_path / "d") == {name: expected[name] for name in {*named, MANIFEST, "README.md"}}


# Parts of a dataset


def test_one_split(hub, there, local, tmp_path):
    pulled = pull(REPO, tmp_path / "d", split="test")
    assert_valid(tmp_path / "d")
    whole, part = logitstore.open(local).info, logitstore.open(tmp_path / "d").info
    assert [s.id for s in logitstore.open(tmp_path / "d")] == [f"test-500-{i}" for i in range(9)]
    assert list(part.splits) == ["test"]
    assert part.splits["test"] == whole.splits["test"]
    assert part.totals.columns["loss_mask"] == 4
    assert list(part.totals.encodings) == ["float32"]
    assert part.teacher == whole.teacher
    assert (part.source.format, part.source.name) == ("logitstore", f"hf://datasets/{REPO}")
    assert part.source.revision == pulled.commit
    assert stored(hub) == pulled.fetched - size_of(there, *shards_of(there)) == part.totals.bytes
    hub.clear_log()
    again = pull(REPO, tmp_path / "d", split="test")
    assert again.unchanged
    assert stored(hub) == 0


def test_some_shards(hub, there, local, tmp_path):
    whole = logitstore.open(local).info
    pull(REPO, tmp_path / "d", shards="0, 2-3,3")
    assert_valid(tmp_path / "d")
    part = logitstore.open(tmp_path / "d").info
    assert part.shards == tuple(whole.shards[number] for number in (0, 2, 3))
    last = len(whole.shards) - 1
    pull(REPO, tmp_path / "e", split="test", shards="0")
    assert logitstore.open(tmp_path / "e").info.shards[0] in whole.shards[last - 5 :]
    assert_valid(tmp_path / "e")
    with pytest.raises(DatasetExistsError, match="another dataset"):
        pull(REPO, tmp_path / "d", shards="0")
    pull(REPO, tmp_path / "d", shards="0", overwrite=True)
    assert len(shards_of(content(tmp_path / "d"))) == 1
    assert_valid(tmp_path / "d")


def test_a_part_of_a_part(hub, there, local, tmp_path):
    pull(REPO, tmp_path / "one", shards="0-3")
    push(tmp_path / "one", "me/one")
    second = pull("me/one@main", tmp_path / "two", shards="1")
    assert_valid(tmp_path / "two")
    one, two = logitstore.open(tmp_path / "one").info, logitstore.open(tmp_path / "two").info
    assert (two.source.name, two.source.revision) == ("hf://datasets/me/one", second.commit)
    assert two.lineage == (one.source, *one.lineage)
    assert two.shards == one.shards[1:2]


def test_all_of_it_by_name_is_the_original(hub, there, tmp_path):
    last = len(shards_of(there)) - 1
    pull(REPO, tmp_path / "d", shards=f"0-{last}")
    assert_whole(tmp_path / "d", there)


def test_an_empty_split(hub, there, tmp_path):
    pull(REPO, tmp_path / "d", split="dev")
    assert_valid(tmp_path / "d")
    info = logitstore.open(tmp_path / "d").info
    assert (info.shards, dict(info.splits)) == ((), {"dev": Split()})
    assert info.totals.highest_id is None
    with pytest.raises(InvalidInputError, match="no shard 0 among 0"):
        pull(REPO, tmp_path / "e", split="dev", shards="0")


def test_a_dataset_in_a_folder(hub, files, tmp_path):
    hub.commit_files(REPO, {f"some/where/{name}": data for name, data in files.items()})
    pull(f"hf://datasets/{REPO}@main/some/where", tmp_path / "d")
    assert_whole(tmp_path / "d", files)
    pull(f"hf://datasets/{REPO}@main/some/where", tmp_path / "e", split="test")
    assert logitstore.open(tmp_path / "e").info.source.name == f"hf://datasets/{REPO}/some/where"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": "nope"}, "no split is called 'nope'; there are: train, test, dev"),
        ({"shards": ""}, "are no shards"),
        ({"shards": "1,"}, "are no shards"),
        ({"shards": "3-1"}, "are no shards"),
        ({"shards": "-1"}, "are no shards"),
        ({"shards": "a"}, "are no shards"),
        ({"shards": "1 2"}, "are no shards"),
        ({"shards": "9" * 5000}, "are no shards"),
        ({"shards": "0-999999999"}, "no shard 999999999 among"),
        ({"shards": "99"}, "no shard 99 among"),
    ],
)
def test_parts_that_are_not_there(hub, there, tmp_path, options, match):
    with pytest.raises(InvalidInputError, match=match):
        pull(REPO, tmp_path / "d", **options)
    assert not (tmp_path / "d").exists()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans(), st.sampled_from(["", " "])), min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranges_of_shards(local, ranges):
    manifest = parse_manifest((local / MANIFEST).read_bytes())
    texts, numbers = [], set()
    for one, two, single, space in ranges:
        first, last = min(one, two), max(one, two)
        last = first if single else last
        texts.append(f"{space}{first}{space}" if single else f"{first}{space}-{space}{last}{space}")
        numbers |= set(range(first, last + 1))
    assert choose(manifest, None, ",".join(texts)) == tuple(manifest.shards[number] for number in sorted(numbers))


@given(st.text(alphabet="0123456789-, ab٣", max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_shards_or_refused(local, text):
    manifest = parse_manifest((local / MANIFEST).read_bytes())
    try:
        chosen = choose(manifest, None, text)
    except InvalidInputError:
        return
    assert chosen
    assert set(re.findall(r"\d+", text)) <= {f"{n:0{w}d}" for n in range(len(manifest.shards)) for w in range(1, 13)}


# Directories


def test_another_dataset_is_kept(hub, there, other, tmp_path):
    root = tmp_path / "d"
    shutil.copytree(other, root)
    with pytest.raises(DatasetExistsError, match=r"holds another dataset.*--overwrite"):
        pull(REPO, root)
    assert content(root, hidden=True) == content(other)
    assert stored(hub) == 0


def test_a_dataset_of_a_later_version_is_kept(hub, there, tmp_path):
    root = tmp_path / "d"
    pull(REPO, root)
    (root / MANIFEST).write_bytes(sealed(there[MANIFEST], version="2.0"))
    before = content(root)
    with pytest.raises(UnsupportedVersionError, match="2"):
        pull(REPO, root)
    assert content(root) == before
    pull(REPO, root, overwrite=True)
    assert_whole(root, there)


@pytest.mark.parametrize(
    "name", ["data/train/train-00000.arrow.partial", "data/x/x-00000.arrow", "tokenizer/tokenizer.json"]
)
def test_files_of_another_are_kept(hub, there, tmp_path, name):
    root = tmp_path / "d"
    (root / name).parent.mkdir(parents=True)
    (root / name).write_bytes(b"not lost")
    with pytest.raises(DatasetExistsError, match=f"{name}.*--overwrite"):
        pull(REPO, root)
    assert content(root, hidden=True) == {name: b"not lost"}
    pull(REPO, root, overwrite=True)
    assert_whole(root, there)


def test_a_file_is_no_directory(hub, there, tmp_path):
    (tmp_path / "d").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(DatasetExistsError, match="is a file"):
            pull(REPO, tmp_path / "d", overwrite=overwrite)
    assert (tmp_path / "d").read_text() == "keep"


def test_overwriting_replaces(hub, there, other, tmp_path):
    root = tmp_path / "d"
    shutil.copytree(other, root)
    for name in ("notes.txt", "data/train/notes.txt"):
        (root / name).write_text("mine")
    pull(REPO, root, overwrite=True)
    got = content(root, hidden=True)
    assert got.pop("notes.txt") == got.pop("data/train/notes.txt") == b"mine"
    assert got == there
    assert_valid(root)


@pytest.mark.parametrize("path", ["/lfs/", "/README", "tokenizer"])
def test_the_old_one_is_whole_until_the_new_one_is_complete(hub, there, other, tmp_path, path):
    root = tmp_path / "d"
    shutil.copytree(other, root)
    armed = hub.fault(Fault(kind="status", status=500, path=path, times=None, skip=3 if path == "/lfs/" else 0))
    with pytest.raises(LogitStoreError):
        pull(REPO, root, overwrite=True)
    assert armed.hits
    assert content(root) == content(other)
    assert_valid(root)
    assert [s.id for s in logitstore.open(root)] == [s.id for s in logitstore.open(other)]
    hub.clear_faults()
    before = stored(hub)
    pull(REPO, root, overwrite=True)
    assert_whole(root, there)
    assert stored(hub) <= sum(len(there[name]) for name in shards_of(there))
    assert before or path == "tokenizer"


def test_two_at_once(hub, there, tmp_path):
    hub.bytes_per_second = 200_000
    outcomes = []

    def one():
        try:
            outcomes.append(pull(REPO, tmp_path / "d"))
        except DatasetExistsError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert_whole(tmp_path / "d", there)
    assert any(isinstance(outcome, DatasetExistsError) and "another pull" in str(outcome) for outcome in outcomes)
    assert sum(outcome.fetched for outcome in outcomes if not isinstance(outcome, Exception)) == size_of(there)


def test_many_one_after_another_at_once(hub, there, tmp_path):
    """They meet where one removes the working directory that the next one locks."""
    pull(REPO, tmp_path / "d")
    wrong = []

    def some():
        for _ in range(8):
            try:
                pull(REPO, tmp_path / "d")
            except DatasetExistsError:
                pass
            except Exception as error:  # noqa: BLE001 - all shall be seen
                wrong.append(error)

    threads = [threading.Thread(target=some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)


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


def sealed(manifest, **changes):
    """A manifest with other fields, whatever its parser says of them."""
    data = json.loads(manifest)
    del data["sha256"]
    data.update(changes)
    body = json.dumps(data, indent=1).encode().removesuffix(b"\n}")
    return body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


@pytest.mark.parametrize(
    "evil", ["../x", "/tmp/x", "data/../../x", "C:x", "a\\b", "data//x", "./x", "data/train/", "x\0"]
)
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


# Stopped in whatever way


class Crash(BaseException):
    """What is done after it is not done any more."""


class Fragile:
    """Lets so many calls that change names, or make them durable, succeed, and none after them."""

    def __init__(self, monkeypatch):
        self.left = None
        for owner, name in (
            *((Path, name) for name in ("replace", "unlink", "mkdir", "rmdir")),
            (os, "fsync"),
            (shutil, "copyfile"),
        ):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, real):
        def call(*args, **kwargs):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise Crash
            return real(*args, **kwargs)

        return call

    def crashes(self, steps, call):
        self.left = steps
        try:
            call()
        except Crash:
            return True
        finally:
            self.left = None
        return False


def check_one_of(root, *datasets):
    """Either there is no dataset, or it is one of these, whole."""
    try:
        logitstore.open(root)
    except (DatasetNotFoundError, IncompleteDatasetError):
        return
    assert not [f for f in logitstore.validate(root, deep=True) if f.severity == "error"]
    got = content(root)
    kept = [{name: data for name, data in files.items() if name != "README.md"} for files in datasets]
    assert {name: got.get(name) for name in kept[0]} == kept[0] or {name: got.get(name) for name in kept[1]} == kept[1]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_at_any_step(hub, there, other, tmp_path, monkeypatch, overwrite):
    pull(REPO, tmp_path / "part", shards="0-2")
    part = content(tmp_path / "part")
    assert len(shards_of(content(other))) > 3  # some names are replaced, others go
    hub.commit_files("me/part", part)
    fragile = Fragile(monkeypatch)
    for steps in range(200):
        root = tmp_path / str(steps)
        if overwrite:
            shutil.copytree(other, root)
        if not fragile.crashes(steps, lambda root=root: pull("me/part", root, overwrite=overwrite)):
            break
        check_one_of(root, content(other), part)
        pull("me/part", root, overwrite=overwrite)
        assert_whole(root, part)
        shutil.rmtree(root)
    assert 15 < steps < 199


@pytest.mark.parametrize(
    "harm", ["log cut", "log long", "log high", "log random", "part short", "part gone", "part random", "whole flipped"]
)
def test_what_a_stopped_pull_left_is_not_believed(hub, there, tmp_path, harm, breaks_off):
    with pytest.raises(RemoteError):
        pull(REPO, tmp_path / "d")
    hub.clear_faults()
    work = tmp_path / "d" / ".pull"
    assert list(work.glob("*.log"))
    for path in work.iterdir():
        data = bytearray(path.read_bytes())
        kind = path.suffix[1:] if path.suffix else "lock" if path.name == "lock" else "whole"
        if harm == "log cut" and kind == "log":
            path.write_bytes(data[:-3])
        elif harm == "log long" and kind == "log":
            path.write_bytes(data + bytes(8))
        elif harm == "log high" and kind == "log":
            path.write_bytes(data[:-8] + b"\xff" * 8)
        elif harm == "log random" and kind == "log":
            path.write_bytes((2000).to_bytes(8, "little") * (len(data) // 8))
        elif harm == "part short" and kind == "part":
            path.write_bytes(data[:-1])
        elif harm == "part gone" and kind == "part":
            path.unlink()
        elif harm == "part random" and kind == "part":
            path.write_bytes(os.urandom(len(data)))
        elif harm == "whole flipped" and kind == "whole":
            data[7] ^= 1
            path.write_bytes(data)
    (work / ("0" * 64)).write_bytes(b"of another")
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)


class Full:
    """A file on a disk that becomes full."""

    def __init__(self, file, room, error):
        self.file, self.room, self.error = file, room, error

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *exc):
        return self.file.__exit__(*exc)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.room:
            raise self.error
        self.room.pop()
        return self.file.write(data)


@pytest.mark.parametrize("step", ["write", "fsync", "manifest"])
def test_a_full_disk(hub, there, tmp_path, monkeypatch, capfd, step):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real, room = Path.open, [None] * 6

    def opened(self, *args, **kwargs):
        file = real(self, *args, **kwargs)
        return Full(file, room, full) if self.suffix == ".part" and kwargs.get("buffering") == 0 else file

    def fail(*args):
        raise full

    with monkeypatch.context() as patch:
        owner, name, fake = {
            "write": (Path, "open", opened),
            "fsync": (os, "fsync", fail),
            "manifest": (MODULE, "write_atomic", fail),
        }[step]
        patch.setattr(owner, name, fake)
        out, err = cli(monkeypatch, capfd, REPO, tmp_path / "d", status=1)
    assert out == ""
    assert err.startswith("Error: ")
    assert "No space left on device" in err
    assert step != "write" or f"{tmp_path}" in err
    assert_absent(tmp_path / "d")
    before = stored(hub)
    assert before
    cli(monkeypatch, capfd, REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)
    lost = 0 if step == "manifest" else parts.FETCHERS * 10_000  # what was on its way when the first one failed
    assert stored(hub) <= sum(len(there[name]) for name in shards_of(there)) + lost


def test_no_room_is_said_before(hub, there, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(InvalidInputError, match="bytes are to be fetched, and there is room for 1,000"):
        pull(REPO, tmp_path / "d")
    assert stored(hub) == 0
    assert_absent(tmp_path / "d")


def test_what_progress_raises_ends_it(hub, there, tmp_path):
    def report(done, total):
        if done > 20_000:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pull(REPO, tmp_path / "d", progress=report)
    assert_absent(tmp_path / "d")
    assert len([r for r in hub.requests if r.origin == "storage"]) < 3 * parts.FETCHERS
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)


def test_progress_goes_up(hub, there, tmp_path, small_segments):
    seen = []
    pull(REPO, tmp_path / "d", progress=lambda *told: seen.append(told))
    done = [told[0] for told in seen]
    assert done == sorted(done)
    assert seen[-1] == (size_of(there), size_of(there))
    assert {total for _, total in seen} == {size_of(there)}
    hub.fault(Fault(kind="flip", after=10, origin="storage"))
    seen.clear()
    pull(REPO, tmp_path / "e", progress=lambda *told: seen.append(told))
    falls = sum(after[0] < before[0] for before, after in itertools.pairwise(seen))
    assert falls == 1
    assert seen[-1] == (size_of(there), size_of(there))


# Files in parts, without a network


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(st.binary(max_size=200), min_size=1, max_size=6),
    st.integers(1, 70),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_any_files_in_any_segments(tmp_path_factory, files, segment, piece, random):
    work = tmp_path_factory.mktemp("work")
    made = {f"f{number}": data for number, data in enumerate(files)}
    left = [random.randrange(40)]

    def fetch(path, offset, length, sink, wanted):
        data = made[path]
        for start in range(offset, offset + length, piece):
            left[0] -= 1
            if left[0] == 0:
                raise RemoteError("broken off")
            part = data[start : min(start + piece, offset + length)]
            sink(bytes(len(part)) if left[0] == -7 else part)

    before = parts.SEGMENT
    parts.SEGMENT = segment
    try:
        for _ in range(8):
            wanted = {sha256(data): Parts(work, Wanted(name, len(data), sha256(data))) for name, data in made.items()}
            told = []
            try:
                fetch_all([one for one in wanted.values() if not one.is_whole], fetch, str, told.append)
            except RemoteError:
                continue
            break
        assert {path.name: path.read_bytes() for path in work.iterdir()} == {sha256(d): d for d in files}
    finally:
        parts.SEGMENT = before
        shutil.rmtree(work)


def test_positions_beyond_32_bits(tmp_path, monkeypatch):
    """A file of 5 GiB that is mostly a hole: offsets are right, and what is written is where it belongs."""
    size, ends = 5 * 2**30, b"the end"
    monkeypatch.setattr(parts, "SEGMENT", 2**31 + 2**20)
    asked = []

    def fetch(path, offset, length, sink, wanted):
        asked.append((offset, length))
        if offset + length == size:
            sink(ends)

    one = Parts(tmp_path, Wanted("f", size, "0" * 64))
    monkeypatch.setattr(Parts, "finish", lambda self, where: True)
    fetch_all([one], fetch, str, lambda number: None)
    segment = 2**31 + 2**20
    assert sorted(asked) == [(0, segment), (segment, segment), (2 * segment, size - 2 * segment)]
    with (tmp_path / f"{'0' * 64}.part").open("rb") as file:
        file.seek(2 * segment)
        assert file.read(len(ends)) == ends
    assert one.there == len(ends)


def test_memory_is_bounded(hub, tmp_path):
    """Of 48 MiB, no more than the buffers of the connections is held."""
    data = os.urandom(48 * 2**20)
    hub.commit_files(REPO, {"large.arrow": data})
    from logitstore.io.hub import HubStore

    store = HubStore.of(REPO)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        one = Parts(tmp_path, Wanted("large.arrow", len(data), sha256(data)))
        fetch_all([one], lambda *a: store.fetch(*a[:4], wanted=a[4], buffer=parts.BUFFER), str, lambda number: None)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert one.is_whole
    assert peak < 24 * 2**20  # the server's buffers in it, too


# The command


def test_the_command(hub, there, tmp_path, monkeypatch, capfd):
    out, err = cli(monkeypatch, capfd, REPO, tmp_path / "d")
    commit = hub.commits(REPO)[0].sha
    count = len(shards_of(there))
    assert re.fullmatch(rf".*/d: {count} shards, .* fetched, verified \(commit {commit[:12]}\)\n", out)
    assert err == ""
    out, err = cli(monkeypatch, capfd, REPO, tmp_path / "d")
    assert out == f"{tmp_path / 'd'}: unchanged, all of commit {commit[:12]} is there already, and verified\n"
    out, err = cli(monkeypatch, capfd, f"{REPO}@main", tmp_path / "e", "--split", "train", "--shards", "0-1", "--json")
    said = json.loads(out)
    assert said == {
        "path": str(tmp_path / "e"), "commit": commit, "shards": 2, "bytes": said["bytes"],
        "fetched": said["bytes"], "unchanged": False,
    }  # fmt: skip
    assert err == ""
    _, err = cli(monkeypatch, capfd, REPO, tmp_path / "e", status=1)
    assert "--overwrite" in err
    cli(monkeypatch, capfd, REPO, tmp_path / "e", "--overwrite")
    assert_whole(tmp_path / "e", there)


def test_the_command_s_errors(hub, there, tmp_path, monkeypatch, capfd):
    for arguments, match in (
        (("me/nowhere", "d"), "no such repository"),
        ((f"{REPO}@nope", "d"), "no such revision"),
        ((REPO, "d", "--split", "nope"), "there are: train, test, dev"),
        ((REPO, "d", "--shards", "x"), "0-9 or 0,2,5-7"),
        (("nonsense", "d"), "namespace/name"),
    ):
        out, err = cli(monkeypatch, capfd, *arguments, status=1)
        assert out == ""
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        assert match in err
    _, err = cli(monkeypatch, capfd, REPO, status=2)
    assert "DIRECTORY" in err
    out, _ = cli(monkeypatch, capfd, "--help")
    assert "Example: logitstore pull" in out


def test_private_gated_and_a_bad_token(hub, there, tmp_path, monkeypatch, capfd):
    hub.add_user("you", "hf_yours")
    monkeypatch.setenv("HF_TOKEN", "hf_yours")
    hub.set_private(REPO)
    _, err = cli(monkeypatch, capfd, REPO, tmp_path / "d", status=1)
    assert "your token does not see it" in err
    hub.set_private(REPO, False)
    hub.gate(REPO)
    _, err = cli(monkeypatch, capfd, REPO, tmp_path / "d", status=1)
    assert "gated; accept its terms" in err
    hub.grant(REPO, "you")
    cli(monkeypatch, capfd, REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    _, err = cli(monkeypatch, capfd, REPO, tmp_path / "e", status=1)
    assert "token" in err


INTERRUPTIBLE = (  # what a shell runs behind itself ignores SIGINT, and so do its children
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import logitstore_cli; logitstore_cli.run()"
)


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is of POSIX systems")
@pytest.mark.parametrize("slow", ["link", "answer"])
def test_control_c_ends_it_soon(hub, there, tmp_path, slow):
    if slow == "link":
        hub.bytes_per_second = 1000
    else:
        hub.fault(Fault(kind="delay", origin="storage", seconds=60, times=None))
    before = len(hub.faults.all())
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "pull", REPO, tmp_path / "d"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    work = tmp_path / "d" / ".pull"
    end = time.monotonic() + 60
    while len(list(work.glob("*.part"))) < 4 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - started
    assert (process.returncode, out, err.strip()) == (1, "", "Stopped.")
    assert took < 3
    assert_absent(tmp_path / "d")
    assert len(hub.faults.all()) == before
    hub.clear_faults()
    hub.bytes_per_second = None
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)
