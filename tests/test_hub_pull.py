"""Fetching from the Hub: what comes back, revisions, parts, and directories that are not empty."""

import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.errors import (
    DatasetExistsError,
    DatasetNotFoundError,
    InvalidInputError,
    LogitStoreError,
    UnsupportedVersionError,
)

pytest.importorskip("huggingface_hub")

from hub import Fault
from pull_rows import (
    CARD,
    MANIFEST,
    REPO,
    assert_valid,
    assert_whole,
    content,
    sealed,
    shards_of,
    size_of,
    stored,
)

from logitstore.hub import pull, push
from logitstore.hub.pull import choose
from logitstore.schema import Split, parse_manifest

pytest_plugins = ["pull_rows"]  # its fixtures
pytestmark = pytest.mark.usefixtures("quiet")


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
