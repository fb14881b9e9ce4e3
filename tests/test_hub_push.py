"""Publishing on the Hub: one commit, nothing sent twice, and whatever goes wrong, never half a dataset."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("huggingface_hub")

import huggingface_hub
from hub import Fault

import logitstore
from logitstore.errors import (
    CorruptDataError,
    DatasetExistsError,
    InvalidInputError,
    LogitStoreError,
    RemoteError,
)
from logitstore.hub import push
from logitstore.hub.card import BEGIN
from logitstore.tokenizer import Tokenizer
from logitstore_cli.main import main

pytestmark = [
    pytest.mark.usefixtures("quiet", "impatient"),
    # The client hands files to its HTTP library as `data=`, which httpx takes for a form.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

REPO = "me/x"
PLACE = f"hf://datasets/{REPO}"
TESTS = Path(__file__).parent
WRITING = (
    "/create",
    "/preupload/",
    "/commit/",
    "/objects/",
    "/lfs/",
    "/branch/",
    "/tag/",
    "/validate-yaml",
    "/settings",
)


@pytest.fixture
def impatient(monkeypatch):
    """The Hub's client asks again at once."""
    no_wait = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_wait)
    monkeypatch.setattr("logitstore.io.client.waiting", lambda status, headers: 0.0)
    huggingface_hub.utils.disable_progress_bars()


def overwrite(write, path, **settings):
    """Another version at the same place."""
    return write(path.name, overwrite=True, **settings)


def local_files(path):
    """What is to arrive as it is."""
    info = logitstore.open(path).info
    return {name: (path / name).read_bytes() for name in ["logitstore.json", *(file.path for file in info.files)]}


def content(place):
    """All of a dataset, as text."""
    digest = hashlib.sha256()
    for sequence in logitstore.open(place):
        digest.update(sequence.id.encode())
        for name in ("tokens", "count", "ids", "logprobs"):
            digest.update(np.ascontiguousarray(getattr(sequence, name)).tobytes())
    return digest.hexdigest()


def writing(hub):
    return [r for r in hub.requests if r.method in ("POST", "PUT", "DELETE") and any(w in r.path for w in WRITING)]


def uploads(hub):
    return [r for r in hub.requests if r.origin == "storage" and r.method == "PUT"]


def is_published(hub, path, revision="main"):
    """Whether all of a dataset is there, with no shard besides."""
    there = hub.files(REPO, revision)
    mine = local_files(path)
    shards = {name for name in there if name.startswith("data/")}
    return all(there.get(name) == data for name, data in mine.items()) and shards == {
        name for name in mine if name.startswith("data/")
    }


@pytest.fixture
def small(write):
    """A dataset of four shards."""
    return write("small", sequences=8, positions=40, k=8, shard_bytes=1, chunk_candidates=640)


@pytest.fixture
def many(write):
    """130 shards."""
    return lambda seed=0, **more: write(
        f"many-{seed}", sequences=130, positions=3, k=2, seed=seed, shard_bytes=1, **{"chunk_candidates": 2, **more}
    )


# What arrives


def test_a_new_repository_has_one_commit_of_everything(hub, write, tmp_path):
    path = write(sequences=30, positions=50, shard_bytes=5000, chunk_candidates=640)
    assert len(logitstore.open(path).info.shards) > 2
    pushed = push(path, REPO)
    there, mine = hub.files(REPO), local_files(path)
    assert {name: there[name] for name in mine} == mine
    assert set(there) == {*mine, "README.md", "preview/train.arrow", ".gitattributes"}
    first, initial = hub.commits(REPO)
    assert (first.parent, first.title) == (initial.sha, "Push a dataset with logitstore")
    assert pushed.commit == first.sha
    assert pushed.url == f"{hub.endpoint}/datasets/{REPO}"
    assert (pushed.files, pushed.unchanged) == (len(mine) + 2, False)
    assert pushed.bytes == sum(len(data) for name, data in there.items() if name != ".gitattributes")
    assert not hub.repos[REPO].private
    assert not hub.repos[REPO].tags
    assert list(hub.repos[REPO].branches) == ["main"]
    assert content(PLACE) == content(path)


def test_the_tokenizer_goes_along(hub, write, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    vocabulary = {f"w{i}": i for i in range(1000)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0")).save(str(folder / "tokenizer.json"))
    path = write(tokenizer=Tokenizer.from_path(folder))
    push(path, REPO)
    assert hub.files(REPO)["tokenizer/tokenizer.json"] == (path / "tokenizer/tokenizer.json").read_bytes()


def test_options_are_followed(hub, small):
    pushed = push(small, REPO, private=True, revision="dev", tag="v1", message="Hello", licence="cc-by-4.0")
    assert hub.repos[REPO].private
    assert hub.repos[REPO].tags == {"v1": pushed.commit}
    assert hub.commits(REPO, "dev")[0].title == "Hello"
    assert len(hub.commits(REPO, "dev")) == 2
    assert len(hub.commits(REPO)) == 1
    assert b"license: cc-by-4.0" in hub.files(REPO, "dev")["README.md"]
    assert push(small, REPO, private=True, revision="dev", tag="v1").unchanged
    assert content(f"{PLACE}@v1") == content(small)


@pytest.mark.parametrize("sequences", [0, 1])
def test_nearly_nothing_can_be_pushed(hub, write, sequences):
    path = write(sequences=sequences)
    push(path, REPO)
    assert is_published(hub, path)
    assert push(path, REPO).unchanged
    assert len(logitstore.open(PLACE)) == sequences


def test_links_and_relative_paths_are_followed(hub, small, tmp_path, monkeypatch):
    shard = next(small.glob("data/train/*.arrow"))
    elsewhere = shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(elsewhere)
    (tmp_path / "~").symlink_to(small)
    monkeypatch.chdir(tmp_path)
    push("~", REPO)
    assert is_published(hub, small)


# A second time


def test_a_second_push_does_nothing(hub, small):
    first = push(small, REPO)
    hub.clear_log()
    again = push(small, REPO)
    assert again == type(again)(REPO, first.url, first.commit, 0, 0, unchanged=True)
    assert len(hub.commits(REPO)) == 2
    assert writing(hub) == []


def test_only_what_changed_is_sent_and_what_is_old_goes(hub, write):
    path = write(sequences=8, positions=40, shard_bytes=1, chunk_candidates=300)
    push(path, REPO)
    old = local_files(path)
    hub.commit_files(REPO, {"notes.txt": b"mine", "data/train/notes.csv": b"mine", "preview/picture.png": b"mine"})
    hub.clear_log()
    shutil.rmtree(path)
    path = write(sequences=5, positions=40, shard_bytes=1, chunk_candidates=300)
    mine = local_files(path)
    assert set(old) > set(mine)
    same = {name for name in mine if mine[name] == old[name]}
    assert len(same) > 2
    pushed = push(path, REPO)
    there = hub.files(REPO)
    assert {name: there[name] for name in mine} == mine
    assert set(there) == {
        *mine, "README.md", "preview/train.arrow", ".gitattributes", "notes.txt", "data/train/notes.csv",
        "preview/picture.png",
    }  # fmt: skip
    sent = {hashlib.sha256(data).hexdigest() for name, data in there.items() if name.endswith(".arrow")}
    known = {hashlib.sha256(data).hexdigest() for data in old.values()}
    assert {r.path.rsplit("/", 1)[1] for r in uploads(hub)} <= sent - known
    assert len(hub.commits(REPO)) == 4
    assert pushed.files == len(there) - len(same) - 4


@pytest.mark.filterwarnings("ignore:Warnings while validating metadata:UserWarning")
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_people_wrote_into_the_card_stays(hub, small, write, newline):
    push(small, REPO)
    card = hub.files(REPO)["README.md"].decode().replace("\n", newline)
    text = f"Mine, before.{newline}{newline}{BEGIN}"
    card = card.replace(BEGIN, text).replace("---" + newline, f"---{newline}license: mit{newline}", 1) + "Mine, after."
    hub.commit_files(REPO, {"README.md": card.encode()})
    push(small, REPO)  # the section says whether a licence is stated
    assert text in hub.files(REPO)["README.md"].decode()
    assert push(small, REPO).unchanged
    overwrite(write, small, sequences=3)
    push(small, REPO)
    new = hub.files(REPO)["README.md"].decode()
    assert text in new
    assert new.endswith("Mine, after.")
    assert f"license: mit{newline}" in new
    assert "\r\n" in new or newline == "\n"


def test_a_card_in_the_dataset_is_the_start(hub, small):
    (small / "README.md").write_bytes(b"---\nlicense: mit\n---\r\nHello\r\n")
    push(small, REPO)
    assert b"Hello" in hub.files(REPO)["README.md"]
    assert push(small, REPO).unchanged


def test_a_card_that_is_no_text_is_refused(hub, small):
    (small / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInputError, match=r"README\.md: byte 0 is not UTF-8"):
        push(small, REPO)
    assert writing(hub) == []


def test_a_new_branch_starts_with_what_main_has(hub, small, write):
    push(small, REPO)
    hub.commit_files(REPO, {"README.md": b"Mine.\n" + hub.files(REPO)["README.md"], "notes.txt": b"mine"})
    before = hub.commits(REPO)
    overwrite(write, small, sequences=2)
    hub.clear_log()
    push(small, REPO, revision="v2/draft")
    assert is_published(hub, small, "v2/draft")
    assert {"notes.txt", "README.md"} < set(hub.files(REPO, "v2/draft"))
    assert b"Mine." in hub.files(REPO, "v2/draft")["README.md"]
    assert hub.commits(REPO) == before
    assert [c.sha for c in hub.commits(REPO, "v2/draft")[1:]] == [c.sha for c in before]
    assert not [r for r in hub.requests if r.path == "/api/repos/create"]


# What is refused


def test_what_is_not_valid_is_refused_before_anything_is_sent(hub, small):
    shard = sorted(small.glob("data/train/*.arrow"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(CorruptDataError, match=r"not valid.*`logitstore validate`"):
        push(small, REPO)
    shard.unlink()
    with pytest.raises(CorruptDataError, match="not valid"):
        push(small, REPO)
    with pytest.raises(CorruptDataError, match="the shard is missing"):
        push(small, REPO, check=False)
    assert REPO not in hub.repos or not hub.commits(REPO)[0].tree.keys() - {".gitattributes"}
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    shard.write_bytes(flipped)
    hub.repos.clear()
    hub.clear_log()
    with pytest.raises(CorruptDataError, match=r"(sha256 is not that of the manifest|digest|not what was written)"):
        push(small, REPO)
    assert writing(hub) == []
    with pytest.raises(CorruptDataError):
        push(small, REPO, check=False)
    assert [len(hub.commits(repo)) for repo in hub.repos] in ([], [1])


def test_a_chunk_that_the_preview_does_not_read_is_checked_by_its_sha256(hub, write):
    path = write(sequences=60, positions=30, k=4, chunk_candidates=200)
    shard = next(path.glob("data/train/*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptDataError, match=r"sha256 is not that of the manifest.*nothing was sent"):
        push(path, REPO)
    assert writing(hub) == []
    with pytest.raises(CorruptDataError, match="sha256 is not that of the manifest"):
        push(path, REPO, check=False)
    assert len(hub.commits(REPO)) == 1
    assert uploads(hub) == []


def test_checks_can_be_left_out(hub, small, monkeypatch):
    monkeypatch.setattr(sys.modules["logitstore.hub.push"], "validate", lambda path: pytest.fail("validated"))
    push(small, REPO, check=False)
    assert is_published(hub, small)


@pytest.mark.parametrize("changed", ["shard", "manifest"])
def test_a_dataset_that_changes_meanwhile_is_refused(hub, small, monkeypatch, changed):
    shard = max(small.glob("data/train/*.arrow"))
    if changed == "shard":
        upload = huggingface_hub.HfApi.preupload_lfs_files

        def after(*args, **kwargs):
            upload(*args, **kwargs)
            os.utime(shard, (1, 1))

        monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", after)
    else:
        module = sys.modules["logitstore.hub.push"]
        made = module.previews

        def meanwhile(dataset):
            found = made(dataset)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with logitstore.Writer(small, logit_width=1000, teacher="u", overwrite=True) as writer:
                    writer.add([1], [[2]], [[-0.5]])
            return found

        monkeypatch.setattr(module, "previews", meanwhile)
    with pytest.raises(CorruptDataError, match="changed while it was being pushed"):
        push(small, REPO)
    assert not [r for r in hub.requests if "/commit/" in r.path]


def test_a_tag_that_is_taken_is_refused_before_anything_is_sent(hub, small, write):
    push(small, REPO, tag="v1")
    overwrite(write, small, sequences=2)
    hub.clear_log()
    with pytest.raises(DatasetExistsError, match="a tag v1 already, of another version"):
        push(small, REPO, tag="v1")
    assert writing(hub) == []
    push(small, REPO)
    with pytest.raises(DatasetExistsError, match="a tag v1 already"):
        push(small, REPO, tag="v1")
    assert push(small, REPO, tag="v2").unchanged
    assert set(hub.repos[REPO].tags) == {"v1", "v2"}


def test_a_tag_that_somebody_else_makes_meanwhile_is_not_taken_for_ours(hub, small, monkeypatch):
    create = huggingface_hub.HfApi.create_tag

    def after(api, repo, **more):
        hub.repos[repo].tags["v1"] = hub.commits(repo)[-1].sha
        create(api, repo, **more)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_tag", after)
    with pytest.raises(DatasetExistsError, match="a tag v1 already"):
        push(small, REPO, tag="v1")


def test_what_is_public_does_not_become_private(hub, small):
    push(small, REPO)
    hub.clear_log()
    with pytest.raises(DatasetExistsError, match="is public, and --private does not change that"):
        push(small, REPO, private=True)
    assert writing(hub) == []
    hub.set_private(REPO)
    assert push(small, REPO).unchanged  # and what is private stays so
    assert hub.repos[REPO].private


def test_a_tag_or_a_commit_is_no_branch(hub, small, write):
    pushed = push(small, REPO, tag="v1")
    overwrite(write, small, sequences=2)
    hub.clear_log()
    for revision in ("v1", pushed.commit):
        with pytest.raises(InvalidInputError, match="is no branch"):
            push(small, REPO, revision=revision)
    assert writing(hub) == []


@pytest.mark.parametrize(
    "name", ["x", "me/x@main", "me/x/y", "a/b/c", "", "me/", "me/x y", "me/-x", "hf://models/me/x"]
)
def test_names_are_checked(hub, small, name):
    with pytest.raises(InvalidInputError):
        push(small, name)
    assert writing(hub) == []


def test_a_dataset_on_the_network_is_refused(hub, small):
    push(small, REPO)
    with pytest.raises(InvalidInputError, match="is no directory; fetch it"):
        push(PLACE, "me/y")


# Faults

ENDPOINTS = {
    "info": ("GET", "/api/datasets/me/x$"),
    "create": ("POST", "/api/repos/create"),
    "refs": ("GET", "/refs$"),
    "tree": ("GET", "/tree/"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "put": ("PUT", "/lfs/"),
    "verify": ("POST", "/objects/verify"),
    "yaml": ("POST", "/api/validate-yaml"),
    "commit": ("POST", "/commit/"),
    "tag": ("POST", "/tag/"),
}
FAULTS = {
    "429": {"kind": "status", "status": 429, "headers": {"RateLimit": '"api";r=0;t=2', "Retry-After": "2"}},
    "500": {"kind": "status", "status": 500, "headers": {"RateLimit": '"api";r=400;t=290'}},
    "503": {"kind": "status", "status": 503},
    "drop": {"kind": "drop"},
    "lost": {"kind": "lost-reply"},
}


def fault_at(hub, endpoint, fault, **more):
    method, path = ENDPOINTS[endpoint]
    return hub.fault(Fault(**{"method": method, "path": path, **FAULTS[fault], **more}))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_fault_is_survived(hub, small, endpoint, fault):
    armed = fault_at(hub, endpoint, fault)
    pushed = push(small, REPO, tag="v1")
    assert armed.hits == 1
    assert is_published(hub, small)
    assert [c.sha for c in hub.commits(REPO)][:1] == [pushed.commit]
    assert len(hub.commits(REPO)) == 2
    assert hub.repos[REPO].tags == {"v1": pushed.commit}
    assert len(uploads(hub)) <= len({r.path for r in uploads(hub)}) + 1


def test_a_fault_while_the_old_version_is_read_is_survived(hub, small):
    push(small, REPO)
    for path in ("/resolve/.*README", "/resolve/.*logitstore.json"):
        for fault in FAULTS.values():
            armed = hub.fault(Fault(**{"method": "GET", "path": path, **fault}))
            assert push(small, REPO).unchanged
            assert armed.hits == 1


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("fault", ["429", "503", "drop", "lost"])
def test_a_fault_without_end_is_one_error_and_no_half_dataset(hub, small, write, monkeypatch, endpoint, fault):
    before = None
    if endpoint != "create":
        push(small, REPO)
        before = content(PLACE)
        overwrite(write, small, sequences=5, seed=9)
    monkeypatch.setattr("logitstore.io.http.BACKOFF_SECONDS", 0.0)
    armed = fault_at(hub, endpoint, fault, times=None)
    done = False
    # What was performed is found afterwards; the tag and the repository are not looked up before they are asked for.
    if endpoint == "verify" or (fault == "lost" and endpoint in ("put", "commit")):
        push(small, REPO, tag="v1")
        done = True
    else:
        with pytest.raises(RemoteError) as caught:
            push(small, REPO, tag="v1")
        assert REPO in str(caught.value)
        assert ("429" if fault == "429" else "503" if fault == "503" else "cannot be reached") in str(caught.value)
    assert armed.hits > 1 or done
    hub.clear_faults()
    commits = hub.commits(REPO) if REPO in hub.repos else []
    if before is not None:
        assert len(commits) == (3 if endpoint == "tag" or done else 2)
        assert content(PLACE) == (content(small) if len(commits) == 3 else before)
    pushed = push(small, REPO, tag="v1")
    assert is_published(hub, small)
    assert pushed.unchanged == (len(commits) == 3)
    assert hub.repos[REPO].tags == {"v1": pushed.commit}
    assert content(PLACE) == content(small)


@pytest.mark.parametrize("seed", range(10))
def test_random_faults_end_well_or_clearly(hub, small, write, monkeypatch, seed):
    monkeypatch.setattr("logitstore.io.http.BACKOFF_SECONDS", 0.0)
    push(small, REPO)
    old = content(PLACE)
    overwrite(write, small, sequences=6, seed=seed + 20, shard_bytes=1, chunk_candidates=640)
    for number, fault in enumerate(FAULTS.values()):
        hub.fault(Fault(**fault, times=None, chance=0.04 + seed * 0.02, seed=100 * seed + number))
    hub.fault(Fault(kind="drop-body", times=None, chance=0.05, seed=seed, after=10))
    hub.fault(Fault(kind="truncate", times=None, chance=0.05, seed=seed + 1, after=10))
    hub.fault(Fault(kind="drop-upload", times=None, chance=0.05, seed=seed + 2, after=20))
    for _ in range(3):
        try:
            push(small, REPO)
            done = True
        except LogitStoreError as error:
            assert not isinstance(error, InvalidInputError)
            done = False
        assert len(hub.commits(REPO)) <= 3
        assert is_published(hub, small) if done else (is_published(hub, small) or len(hub.commits(REPO)) == 2)
    hub.clear_faults()
    assert content(PLACE) in (old, content(small))
    push(small, REPO)
    assert is_published(hub, small)
    assert len(hub.commits(REPO)) == 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "path", ["/refs$", "/tree/", "/preupload/", "/objects/batch", "/api/datasets/me/x$", "/commit/"]
)
def test_flipped_bits_in_answers_do_no_harm(hub, small, write, monkeypatch, path, seed):
    monkeypatch.setattr("logitstore.io.http.BACKOFF_SECONDS", 0.0)
    push(small, REPO)
    old = content(PLACE)
    overwrite(write, small, sequences=6, seed=20, shard_bytes=1, chunk_candidates=640)
    hub.fault(Fault(kind="flip", path=path, after=seed * 23 + 3, times=None, chance=0.7, seed=seed))
    try:
        push(small, REPO, revision="main")
    except LogitStoreError as error:
        assert "\n" not in str(error)
    hub.clear_faults()
    assert content(PLACE) in (old, content(small))
    push(small, REPO)
    assert is_published(hub, small)


def test_an_address_that_expired_is_asked_for_again(hub, small):
    hub.url_lifetime = 0
    monitor = hub.fault(Fault(kind="delay", path="/lfs/", method="PUT", seconds=0.01, times=None))
    with pytest.raises(RemoteError, match=r"storage refused \(403\)"):
        push(small, REPO)
    assert monitor.hits > 1
    hub.url_lifetime = 3600
    push(small, REPO)
    assert is_published(hub, small)


def test_large_shards_go_in_parts(hub, write):
    hub.multipart_above, hub.part_size = 20_000, 10_000
    path = write(sequences=60, positions=50)
    armed = fault_at(hub, "put", "drop", skip=1)
    lost = hub.fault(Fault(kind="lost-reply", path="/complete_multipart"))
    push(path, REPO)
    assert armed.hits == lost.hits == 1
    assert is_published(hub, path)


# Somebody else


def test_another_commit_in_between_is_not_lost(hub, small, write, monkeypatch):
    push(small, REPO)
    overwrite(write, small, sequences=5)
    upload = huggingface_hub.HfApi.preupload_lfs_files

    def meanwhile(*args, **kwargs):
        upload(*args, **kwargs)
        if len(hub.commits(REPO)) == 2:
            hub.commit_files(REPO, {"theirs.txt": b"theirs"})

    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", meanwhile)
    before = content(PLACE)
    with pytest.raises(RemoteError, match="somebody else changed main meanwhile; push again"):
        push(small, REPO)
    assert content(PLACE) == before
    push(small, REPO)
    assert is_published(hub, small)
    assert hub.files(REPO)["theirs.txt"] == b"theirs"


def test_a_repository_that_appears_meanwhile_is_not_taken_over(hub, small, monkeypatch):
    create = huggingface_hub.HfApi.create_repo

    def meanwhile(*args, **kwargs):
        hub.commit_files(REPO, {"README.md": b"theirs"})
        return create(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", meanwhile)
    with pytest.raises(RemoteError, match="somebody else made it meanwhile; push again"):
        push(small, REPO)
    assert hub.files(REPO)["README.md"] == b"theirs"


def test_private_holds_when_somebody_else_was_faster(hub, small, monkeypatch):
    create = huggingface_hub.HfApi.create_repo

    def meanwhile(*args, **kwargs):
        hub.create_repo(REPO)
        return create(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", meanwhile)
    with pytest.raises(DatasetExistsError, match="is public"):
        push(small, REPO, private=True)
    assert uploads(hub) == []


# Many files


def served(hub, sha):
    """What a reader of a commit gets: all of a dataset, or None and a clear error."""
    try:
        return content(f"{PLACE}@{sha}")
    except LogitStoreError:
        return None


def check_history(hub, allowed):
    """No commit gives wrong data; what each gives, oldest first."""
    found = [served(hub, commit.sha) for commit in reversed(hub.commits(REPO))]
    assert set(found) <= {None, *allowed}
    commits = hub.commits(REPO)
    for commit, parent in itertools.pairwise(commits):
        changed = [path for path, entry in commit.tree.items() if parent.tree.get(path) != entry]
        assert len(changed) <= 100
    return found


def test_more_than_100_files_go_in_several_commits(hub, many):
    path = many()
    assert len(logitstore.open(path).info.shards) == 130
    hub.clear_log()
    pushed = push(path, REPO)
    assert [c.title for c in hub.commits(REPO)] == [
        "Push a dataset with logitstore (part 2 of 2)", "Push a dataset with logitstore (part 1 of 2)", "initial commit",
    ]  # fmt: skip
    assert pushed.commit == hub.commits(REPO)[0].sha
    assert "logitstore.json" not in hub.commits(REPO)[1].tree
    assert check_history(hub, {content(path)}) == [None, None, content(path)]
    assert is_published(hub, path)
    assert len([r for r in hub.requests if "/preupload/" in r.path]) < 10  # not one a shard
    assert push(path, REPO).unchanged


def test_more_than_100_changed_files_never_mix_with_the_old_ones(hub, many):
    old = many(1)
    first = content(old)
    push(old, REPO)
    path = many(500)
    second = content(path)
    assert first != second
    push(path, REPO)
    found = check_history(hub, {first, second})
    assert found == [None, None, first, None, second]
    assert is_published(hub, path)


def test_new_files_come_before_the_old_ones_go(hub, write):
    old = write("one", sequences=2)
    push(old, REPO)
    path = write("two", sequences=130, positions=3, k=2, seed=7, shard_bytes=1, chunk_candidates=2)
    push(path, REPO)
    found = check_history(hub, {content(old), content(path)})
    assert found == [None, content(old), content(old), content(path)]
    assert is_published(hub, path)


def test_damaged_shards_under_an_unchanged_manifest_are_replaced(hub, many):
    path = many()
    push(path, REPO)
    good = {name: data for name, data in local_files(path).items() if name.startswith("data/")}
    hub.commit_files(REPO, {name: data + b"x" for name, data in good.items()})
    push(path, REPO)
    assert is_published(hub, path)
    assert served(hub, "main") == content(path)
    assert served(hub, hub.commits(REPO)[1].sha) is None


@pytest.mark.parametrize("fault", ["lost", "503"])
def test_a_push_of_many_that_stops_half_way_goes_on(hub, many, write, fault, monkeypatch):
    monkeypatch.setattr("logitstore.io.http.BACKOFF_SECONDS", 0.0)
    old = many(1)
    first = content(old)
    push(old, REPO)
    path = many(500)
    if fault == "lost":
        assert fault_at(hub, "commit", "lost", times=2)
    else:
        fault_at(hub, "commit", "503", skip=1, times=None)
        with pytest.raises(RemoteError):
            push(path, REPO)
        assert served(hub, "main") is None
        hub.clear_faults()
        # Another version, with fewer shards: nothing is left of the one that was not finished.
        path = write("few", sequences=3)
    push(path, REPO)
    assert is_published(hub, path)
    check_history(hub, {first, content(path)})


# Killed


@pytest.fixture
def served_apart():
    """A Hub in a process of its own: (its endpoint, a function that asks its control API)."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    process = subprocess.Popen(
        [sys.executable, "-m", "hub.serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    endpoint = json.loads(process.stdout.readline())["endpoint"]

    def ask(path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{endpoint}/_ctl/{path}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    yield endpoint, ask
    assert ask("errors") == []
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


def test_a_push_that_is_killed_goes_on(served_apart, small, monkeypatch, tmp_path):
    endpoint, ask = served_apart
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_test_me", "HF_HOME": str(tmp_path / "hf")}
    code = (
        "import sys, time, signal, os\n"
        "import huggingface_hub\n"
        "from logitstore.hub import push\n"
        "session = huggingface_hub.utils.get_session()\n"
        "left, send = [int(sys.argv[3])], type(session).send\n"
        "def counted(*args, **kwargs):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return send(*args, **kwargs)\n"
        "type(session).send = counted\n"
        "push(sys.argv[1], sys.argv[2])\n"
    )
    mine = local_files(small)
    for stop in (2, 5, 9, 14, 19, 1000):
        repo = f"me/x{stop}"
        done = subprocess.run(
            [sys.executable, "-c", code, str(small), repo, str(stop)],
            env=environment,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == (0 if stop == 1000 else -signal.SIGKILL), done.stderr.decode()
        push(small, repo, endpoint=endpoint, token="hf_test_me")
        commits = ask(f"commits?repo={repo}")
        assert len(commits) == 2
        assert {name: commits[0]["files"][name] for name in mine} == {name: len(data) for name, data in mine.items()}
        sent = [r["path"] for r in ask("log") if r["method"] == "PUT" and repo in r["path"] and r["status"] == 200]
        assert len(sent) == len(set(sent))  # what was there was not sent again
    huggingface_hub.close_session()


# What is told


def test_progress_grows_to_its_end(hub, small):
    seen = []
    push(small, REPO, progress=lambda *state: seen.append(state))
    for what in ("checking", "sending"):
        done = [state[1:] for state in seen if state[0] == what]
        assert done == sorted(done)
        assert {total for _, total in done} == {done[-1][0]}
    assert [what for what, *_ in seen] == sorted(what for what, *_ in seen)


def test_the_command(hub, small, write):
    def run(*arguments, status=0):
        done = CliRunner().invoke(main, ["push", *map(str, arguments)], catch_exceptions=True)
        assert done.exit_code == status, (done.output, done.exception)
        return done.stdout

    assert f"{hub.endpoint}/datasets/{REPO}: " in run(small, REPO, "--tag", "v1")
    assert "unchanged" in run(small, REPO)
    again = json.loads(run(small, REPO, "--json"))
    assert again == {
        "repo": REPO, "url": f"{hub.endpoint}/datasets/{REPO}", "commit": hub.commits(REPO)[0].sha, "files": 0,
        "bytes": 0, "unchanged": True,
    }  # fmt: skip
    overwrite(write, small, sequences=2)
    done = json.loads(run(small, REPO, "--json", "--message", "Hi", "--revision", "dev", "--no-validate"))
    assert done["commit"] == hub.commits(REPO, "dev")[0].sha
    assert done["files"] > 0
    assert hub.commits(REPO, "dev")[0].title == "Hi"
    assert "Example: logitstore push" in run("--help")
    run(small, status=2)
    run(small, REPO, "--unknown", status=2)
