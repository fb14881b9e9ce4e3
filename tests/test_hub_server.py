"""The stand-in of the Hub, with the genuine client."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from hub import Fault, Hub  # noqa: E402
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi  # noqa: E402
from huggingface_hub.errors import (  # noqa: E402
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session  # noqa: E402

# The client hands files to its HTTP library as `data=`, which httpx takes for a form.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/data"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def client(monkeypatch, tmp_path):
    """The client without Xet, with a cache of its own, and without waiting between tries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    huggingface_hub.utils.disable_progress_bars()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
        huggingface_hub.close_session()
    assert hub.errors == []
    assert not [r for r in hub.requests if r.origin == "storage" and r.authorization]


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def as_user(hub, token):
    return HfApi(endpoint=hub.endpoint, token=token)


def random(size, seed=0):
    return b"".join(hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(-(-size // 32)))[:size]


def add(api, files, **more):
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    more.setdefault("commit_message", "add")
    return api.create_commit(REPO, operations, repo_type="dataset", **more)


def seen(hub, method, path):
    return [r for r in hub.requests if r.method == method and path in r.path]


def download(api, path, **more):
    return Path(api.hf_hub_download(REPO, path, repo_type="dataset", **more)).read_bytes()


def signed(hub, path):
    """Where the storage gives out a file."""
    url = f"{hub.endpoint}/datasets/{REPO}/resolve/main/{path}"
    return (
        get_session()
        .head(url, headers={"Authorization": f"Bearer {hub.token}"}, follow_redirects=False)
        .headers["Location"]
    )


# Repositories and commits


def test_repositories_are_created_and_deleted(hub, api):
    assert api.whoami()["name"] == "me"
    url = api.create_repo(REPO, repo_type="dataset")
    assert url == f"{hub.endpoint}/datasets/{REPO}"
    assert api.create_repo(REPO, repo_type="dataset", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo(REPO, repo_type="dataset")
    assert error.value.response.status_code == 409
    assert list(hub.files(REPO)) == [".gitattributes"]
    assert [c.title for c in hub.commits(REPO)] == ["initial commit"]
    api.delete_repo(REPO, repo_type="dataset")
    api.delete_repo(REPO, repo_type="dataset", missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO, repo_type="dataset")
    with pytest.raises(HfHubHTTPError, match="404"):
        api.create_repo("me/model")


def test_files_are_uploaded_ahead_and_committed_at_once(hub, api):
    api.create_repo(REPO, repo_type="dataset")
    shard = CommitOperationAdd("data/0.arrow", random(50_000))
    api.preupload_lfs_files(REPO, [shard], repo_type="dataset")
    assert len(hub.commits(REPO)) == 1
    card = CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n# Data\n")
    hub.clear_log()
    done = api.create_commit(REPO, [shard, card], repo_type="dataset", commit_message="one", commit_description="two")
    assert [(r.method, r.path) for r in hub.requests] == [
        ("POST", "/api/validate-yaml"),
        ("POST", f"/api/datasets/{REPO}/preupload/main"),
        ("POST", f"/api/datasets/{REPO}/commit/main"),
    ]
    commit = hub.commits(REPO)[0]
    assert (commit.sha, commit.title, commit.message, commit.author) == (done.oid, "one", "two", "me")
    files = hub.files(REPO)
    assert files["data/0.arrow"] == random(50_000)
    assert files["README.md"] == b"---\nlicense: mit\n---\n# Data\n"
    assert commit.tree["data/0.arrow"].sha256 == hashlib.sha256(random(50_000)).hexdigest()
    assert commit.tree["README.md"].sha256 is None

    # The same once more: nothing is sent, and no commit made.
    hub.clear_log()
    assert add(api, {"data/0.arrow": random(50_000)}).oid == done.oid
    assert [r.path for r in hub.requests if r.origin == "storage"] == []
    assert len(hub.commits(REPO)) == 2


def test_large_files_go_to_lfs_whatever_their_name(hub, api):
    hub.create_repo(REPO)
    add(api, {"small.txt": b"s", "large.txt": bytes(10_000_001), "empty.arrow": b""})
    tree = hub.commits(REPO)[0].tree
    assert tree["large.txt"].sha256 is not None
    assert tree["small.txt"].sha256 is None
    assert tree["empty.arrow"].sha256 is None
    assert hub.files(REPO)["empty.arrow"] == b""


def test_a_commit_is_refused_if_its_parent_is_not_the_head(hub, api):
    first = hub.commit_files(REPO, {"a.txt": b"1"})
    add(api, {"b.txt": b"2"}, parent_commit=first.sha)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        add(api, {"c.txt": b"3"}, parent_commit=first.sha)
    assert error.value.response.status_code == 412
    assert "c.txt" not in hub.files(REPO)


def test_a_commit_of_a_file_that_was_never_uploaded_is_refused(hub, api):
    hub.create_repo(REPO)
    operation = CommitOperationAdd("x.arrow", b"never sent")
    operation._upload_mode, operation._is_uploaded, operation._should_ignore = "lfs", True, False
    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        api.create_commit(REPO, [operation], repo_type="dataset", commit_message="m")


def test_files_are_deleted_and_copied(hub, api):
    hub.commit_files(REPO, {"a/1.txt": b"1", "a/2.arrow": b"2", "b/3.txt": b"3"})
    api.create_commit(
        REPO,
        [
            CommitOperationCopy("a/2.arrow", "c/2.arrow"),
            CommitOperationDelete("a/", is_folder=True),
            CommitOperationDelete("b/3.txt"),
        ],
        repo_type="dataset",
        commit_message="m",
    )
    assert sorted(hub.files(REPO)) == [".gitattributes", "c/2.arrow"]
    with pytest.raises(HfHubHTTPError, match="does not exist"):
        api.delete_file("none", REPO, repo_type="dataset")


def test_a_folder_is_uploaded(hub, api, tmp_path):
    hub.create_repo(REPO)
    for name in ["a.arrow", "sub/b.arrow", "c.json"]:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "folder", repo_type="dataset")
    files = hub.files(REPO)
    del files[".gitattributes"]
    assert files == {name: name.encode() for name in ["a.arrow", "sub/b.arrow", "c.json"]}


def test_xet_is_not_served(hub):
    hub.create_repo(REPO)
    response = get_session().get(f"{hub.endpoint}/api/datasets/{REPO}/xet-write-token/main")
    assert response.status_code == 404


# Trees, branches, tags


def test_trees_come_in_pages(hub, api):
    hub.page_size = 4
    hub.commit_files(REPO, {f"d{i}/{j}.txt": b"x" for i in range(3) for j in range(3)})
    hub.clear_log()
    assert len(api.list_repo_files(REPO, repo_type="dataset")) == 10
    assert len(seen(hub, "GET", "/tree/main")) == 4  # 10 files and 3 folders
    top = list(api.list_repo_tree(REPO, repo_type="dataset"))
    assert [type(item).__name__ for item in top] == ["RepoFile", "RepoFolder", "RepoFolder", "RepoFolder"]
    inside = api.list_repo_tree(REPO, "d1", repo_type="dataset", expand=True)
    assert [(item.path, item.last_commit.title) for item in inside] == [(f"d1/{j}.txt", "Add files") for j in range(3)]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "none", repo_type="dataset"))


def test_what_is_at_paths(hub, api):
    hub.commit_files(REPO, {"a/1.arrow": b"one", "a/2.txt": b"two"})
    arrow, text, folder = api.get_paths_info(REPO, ["a/1.arrow", "a/2.txt", "a", "none"], repo_type="dataset")
    assert (arrow.size, arrow.lfs.sha256, arrow.xet_hash) == (3, hashlib.sha256(b"one").hexdigest(), None)
    assert text.blob_id == hashlib.sha1(b"blob 3\0two").hexdigest()
    assert folder.path == "a"
    info = api.dataset_info(REPO, files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings if s.rfilename != ".gitattributes"} == {
        "a/1.arrow": 3,
        "a/2.txt": 3,
    }
    assert info.sha == hub.commits(REPO)[0].sha


def test_branches_and_tags(hub, api):
    first = hub.commit_files(REPO, {"a.txt": b"1"})
    api.create_branch(REPO, branch="work/one", repo_type="dataset")
    api.create_branch(REPO, branch="work/one", repo_type="dataset", exist_ok=True)
    add(api, {"a.txt": b"2"}, revision="work/one")
    api.create_tag(REPO, tag="v1", repo_type="dataset", revision=first.sha)
    api.create_tag(REPO, tag="v1", repo_type="dataset", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="work/one", repo_type="dataset")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1", repo_type="dataset")
    assert download(api, "a.txt", revision="work/one") == b"2"
    assert download(api, "a.txt", revision="v1") == b"1"
    assert download(api, "a.txt", revision=first.sha) == b"1"
    refs = api.list_repo_refs(REPO, repo_type="dataset")
    assert {b.name: b.target_commit for b in refs.branches} == {
        "main": first.sha,
        "work/one": hub.commits(REPO, "work/one")[0].sha,
    }
    assert [(t.ref, t.target_commit) for t in refs.tags] == [("refs/tags/v1", first.sha)]
    commits = api.list_repo_commits(REPO, repo_type="dataset", revision="work/one")
    assert [c.title for c in commits] == ["add", "Add files", "initial commit"]
    api.delete_tag(REPO, tag="v1", repo_type="dataset")
    api.delete_branch(REPO, branch="work/one", repo_type="dataset")
    for revision in ["v1", "work/one", "0" * 40]:
        with pytest.raises(RevisionNotFoundError):
            api.dataset_info(REPO, revision=revision)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_branch(REPO, branch="main", repo_type="dataset")


# Files


def test_files_are_downloaded(hub, api, tmp_path):
    commit = hub.commit_files(REPO, {"a.txt": b"text", "data/b.arrow": random(3 * MIB), "none.txt": b""})
    hub.clear_log()
    assert download(api, "data/b.arrow") == random(3 * MIB)
    head, get = hub.requests
    assert (head.origin, head.method, head.status, head.authorization) == ("hub", "HEAD", 302, True)
    assert (get.origin, get.method, get.status, get.authorization) == ("storage", "GET", 200, False)
    assert get.sent == 3 * MIB
    folder = Path(api.snapshot_download(REPO, repo_type="dataset", local_dir=tmp_path / "copy"))
    assert {name: (folder / name).read_bytes() for name in hub.files(REPO)} == hub.files(REPO)
    metadata = huggingface_hub.get_hf_file_metadata(
        f"{hub.endpoint}/datasets/{REPO}/resolve/main/data/b.arrow", token=hub.token
    )
    assert metadata.commit_hash == commit.sha
    assert metadata.etag == hashlib.sha256(random(3 * MIB)).hexdigest()
    assert metadata.size == 3 * MIB
    assert metadata.location.startswith(f"{hub.storage}/lfs/{REPO}/{metadata.etag}?")
    assert metadata.xet_file_data is None
    with pytest.raises(RemoteEntryNotFoundError):
        download(api, "c.txt")
    with pytest.raises(RevisionNotFoundError):
        download(api, "a.txt", revision="none")


@pytest.mark.parametrize("name", ["a.txt", "a.arrow"])
@pytest.mark.parametrize("size", [1000, 2 * MIB])
def test_ranges(hub, name, size):
    data = random(size)
    hub.commit_files(REPO, {name: data})
    session = get_session()
    url = signed(hub, name) if name.endswith("arrow") else f"{hub.endpoint}/datasets/{REPO}/resolve/main/{name}"
    for wanted, part in {
        "bytes=0-9": data[:10],
        "bytes=990-": data[990:],
        "bytes=-7": data[-7:],
        f"bytes=5-{size * 2}": data[5:],
    }.items():
        answer = session.get(url, headers={"Range": wanted})
        assert (answer.status_code, answer.content) == (206, part)
        start = len(data) - len(part) if wanted != "bytes=0-9" else 0
        assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{size}"
    beyond = session.get(url, headers={"Range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
    for ignored in ["bytes=0-1,3-4", "lines=1-2", "bytes=-", "bytes=5-2"]:
        answer = session.get(url, headers={"Range": ignored})
        assert (answer.status_code, answer.content) == (200, data)
    head = session.head(url)
    assert (head.status_code, head.headers["Content-Length"], head.content) == (200, str(size), b"")
    assert next(r.range for r in hub.requests if r.status == 206) == "bytes=0-9"


def test_signed_urls_expire(hub):
    hub.commit_files(REPO, {"a.arrow": b"data"})
    session, url = get_session(), signed(hub, "a.arrow")
    assert session.get(url).content == b"data"
    assert session.get(url.replace("Signature=", "Signature=0")).status_code == 403
    assert session.put(url, content=b"data").status_code == 403
    hub.expire_urls()
    assert session.get(url).status_code == 403
    assert session.get(signed(hub, "a.arrow")).content == b"data"
    hub.url_lifetime = 0
    refused = session.get(signed(hub, "a.arrow"))
    assert refused.status_code == 403
    assert "expired" in refused.text


def test_the_storage_refuses_tokens(hub):
    hub.commit_files(REPO, {"a.arrow": b"data"})
    refused = get_session().get(signed(hub, "a.arrow"), headers={"Authorization": f"Bearer {hub.token}"})
    assert refused.status_code == 400
    assert hub.requests[-1].authorization
    hub.clear_log()


# Uploads


@pytest.mark.parametrize("size", [2 * MIB, 3 * MIB + 1])
def test_large_files_are_uploaded_in_parts(hub, api, size):
    hub.multipart_above = hub.part_size = MIB
    hub.create_repo(REPO)
    add(api, {"a.arrow": random(size)})
    assert hub.files(REPO)["a.arrow"] == random(size)
    parts = [r for r in seen(hub, "PUT", "/lfs/") if "partNumber" in r.query]
    assert sum(r.received for r in parts) == size
    assert len(parts) == -(-size // MIB)
    assert len(seen(hub, "POST", "/api/complete_multipart")) == 1
    assert download(api, "a.arrow") == random(size)


def batch(hub, data, **fields):
    file = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    answer = get_session().post(
        f"{hub.endpoint}/datasets/{REPO}.git/info/lfs/objects/batch",
        json={"operation": "upload", "transfers": ["basic", "multipart"], "objects": [file], **fields},
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    return answer.json()["objects"][0]


def test_uploads_must_be_what_was_announced(hub):
    hub.create_repo(REPO)
    session, url = get_session(), batch(hub, b"data")["actions"]["upload"]["href"]
    assert session.put(url, content=b"dato").status_code == 400
    assert session.put(url, content=b"data and more").status_code == 400
    assert "actions" in batch(hub, b"data")
    assert session.put(url, content=iter([b"da", b"ta"])).status_code == 200  # chunked
    assert "actions" not in batch(hub, b"data")

    hub.multipart_above = hub.part_size = 3
    action = batch(hub, b"other")["actions"]["upload"]
    assert session.put(action["header"]["00002"], content=b"too long").status_code == 400
    parts = []
    for number, content in [(1, b"oth"), (2, b"ro")]:
        answer = session.put(action["header"][f"{number:05}"], content=content)
        parts.append({"partNumber": number, "etag": answer.headers["ETag"]})
    body = {"oid": hashlib.sha256(b"other").hexdigest(), "parts": parts}
    assert session.post(action["href"], json=body).status_code == 400
    parts[1]["etag"] = session.put(action["header"]["00002"], content=b"er").headers["ETag"]
    assert session.post(action["href"], json=body).status_code == 200
    assert "actions" not in batch(hub, b"other")


def test_uploads_beyond_the_quota_are_refused(hub, api):
    hub.create_repo(REPO)
    hub.quota_bytes = 1000
    add(api, {"a.arrow": random(600)})
    with pytest.raises(HfHubHTTPError, match="storage limit reached") as error:
        add(api, {"b.arrow": random(500, 1)})
    assert error.value.response.status_code == 403
    add(api, {"b.txt": random(500, 1)})


# Who may do what


def test_private_repositories_are_seen_by_their_owners_only(hub, api):
    hub.commit_files(REPO, {"a.txt": b"a", "b.arrow": b"b"})
    hub.add_user("you", "hf_you")
    hub.add_user("mine", "hf_mine", orgs=["me"])
    you, anonymous = as_user(hub, "hf_you"), as_user(hub, False)
    assert you.dataset_info(REPO).private is False
    hub.set_private(REPO)
    for other, status in [(you, 404), (anonymous, 401)]:
        for look in [
            lambda other=other: other.dataset_info(REPO),
            lambda other=other: other.list_repo_files(REPO, repo_type="dataset"),
            lambda other=other: huggingface_hub.get_hf_file_metadata(
                f"{hub.endpoint}/datasets/{REPO}/resolve/main/b.arrow", token=other.token
            ),
            lambda other=other: add(other, {"c.txt": b""}),
            lambda other=other: other.dataset_info("me/none"),
        ]:
            with pytest.raises(RepositoryNotFoundError) as error:
                look()
            assert error.value.response.status_code == status
    for allowed in (api, as_user(hub, "hf_mine")):
        assert allowed.dataset_info(REPO).private is True
        assert download(allowed, "b.arrow") == b"b"


def test_a_token_that_nobody_has_is_refused(hub):
    hub.commit_files(REPO, {"a.txt": b"a"})
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as error:
        as_user(hub, "hf_wrong").dataset_info(REPO)
    assert not isinstance(error.value, RepositoryNotFoundError)
    assert error.value.response.status_code == 401


def test_writing_takes_the_right_to(hub):
    hub.commit_files(REPO, {"a.txt": b"a"})
    hub.add_user("me", "hf_reader", role="read")
    hub.add_user("you", "hf_you")
    for token, status in [("hf_reader", 403), ("hf_you", 403), (False, 401)]:
        other = as_user(hub, token)
        for write in [
            lambda other=other: add(other, {"c.txt": b"c"}),
            lambda other=other: other.create_repo("me/other", repo_type="dataset"),
            lambda other=other: other.delete_repo(REPO, repo_type="dataset"),
            lambda other=other: other.create_tag(REPO, tag="v1", repo_type="dataset"),
            lambda other=other: other.create_branch(REPO, branch="b", repo_type="dataset"),
        ]:
            with pytest.raises(HfHubHTTPError) as error:
                write()
            assert error.value.response.status_code == status
        assert download(other, "a.txt") == b"a"
    assert len(hub.commits(REPO)) == 2


def test_gated_repositories_show_their_metadata_only(hub, api):
    hub.commit_files(REPO, {"a.txt": b"a"})
    hub.add_user("you", "hf_you")
    hub.gate(REPO)
    for token, status in [("hf_you", 403), (False, 401)]:
        other = as_user(hub, token)
        assert other.list_repo_files(REPO, repo_type="dataset") == [".gitattributes", "a.txt"]
        with pytest.raises(GatedRepoError) as error:
            download(other, "a.txt")
        assert error.value.response.status_code == status
        with pytest.raises(GatedRepoError):
            other.auth_check(REPO, repo_type="dataset")
    assert download(api, "a.txt") == b"a"
    hub.grant(REPO, "you")
    assert download(as_user(hub, "hf_you"), "a.txt") == b"a"


# Faults


def test_a_lost_reply_leaves_the_commit_made(hub, api):
    hub.create_repo(REPO)
    lost = hub.fault(Fault(kind="lost-reply", method="POST", path="/commit/"))
    with pytest.raises(Exception, match="Server disconnected without sending a response") as error:
        add(api, {"a.txt": b"a"})
    assert type(error.value).__name__ == "RemoteProtocolError"
    assert lost.hits == 1
    assert hub.files(REPO)["a.txt"] == b"a"
    assert [r.status for r in seen(hub, "POST", "/commit/")] == [0]
    add(api, {"a.txt": b"a"})
    assert len(hub.commits(REPO)) == 2


@pytest.mark.parametrize("kind", ["drop", "drop-upload"])
@pytest.mark.parametrize("reset", [False, True])
def test_an_upload_that_breaks_off_is_sent_again(hub, api, kind, reset):
    hub.create_repo(REPO)
    fault = hub.fault(Fault(kind=kind, origin="storage", method="PUT", after=100_000, times=2, reset=reset))
    add(api, {"a.arrow": random(3 * MIB)})
    assert hub.files(REPO)["a.arrow"] == random(3 * MIB)
    assert fault.hits == 2
    received = [(r.status, r.received) for r in seen(hub, "PUT", "/lfs/")]
    first = 100_000 if kind == "drop-upload" else 3 * MIB
    assert received == [(0, first), (0, first), (200, 3 * MIB)]


@pytest.mark.parametrize("headers", [{"RateLimit": '"api";r=0;t=1'}, {"Retry-After": "1"}])
def test_statuses_with_headers(hub, api, headers):
    hub.create_repo(REPO)
    hub.fault(Fault(kind="status", status=429, headers=headers, path="/preupload/"))
    add(api, {"a.txt": b"a"})  # the client tries again by itself here
    assert [r.status for r in seen(hub, "POST", "/preupload/")] == [429, 200]
    hub.fault(Fault(kind="status", status=429, headers=headers, path="/commit/"))
    with pytest.raises(HfHubHTTPError, match="429 Too Many Requests") as error:
        add(api, {"b.txt": b"b"})  # and does not here
    assert headers.items() <= {k: error.value.response.headers[k] for k in headers}.items()
    for status in (500, 503):
        hub.fault(Fault(kind="status", status=status, path="/commit/"))
        with pytest.raises(HfHubHTTPError, match=str(status)):
            add(api, {"b.txt": b"b"})
    assert len(hub.commits(REPO)) == 2


def test_a_download_that_breaks_off_goes_on(hub, api):
    hub.commit_files(REPO, {"a.arrow": random(MIB)})
    hub.fault(Fault(kind="drop-body", origin="storage", after=300_000))
    hub.fault(Fault(kind="drop", origin="storage", skip=1))
    assert download(api, "a.arrow") == random(MIB)
    storage = [r for r in hub.requests if r.origin == "storage"]
    assert [(r.status, r.sent) for r in storage][:2] == [(200, 300_000), (0, 0)]
    assert storage[-1].status in {200, 206}


def test_silently_shortened_bodies(hub, api):
    hub.commit_files(REPO, {"a.arrow": random(1000)})
    hub.fault(Fault(kind="truncate", origin="storage", after=40, times=2))
    answer = get_session().get(signed(hub, "a.arrow"), headers={"Range": "bytes=100-199"})
    assert answer.content == random(1000)[100:140]
    assert answer.headers["Content-Length"] == "40"
    assert answer.headers["Content-Range"] == "bytes 100-199/1000"
    with pytest.raises(OSError, match="Consistency check failed"):
        download(api, "a.arrow")
    assert download(api, "a.arrow") == random(1000)


@pytest.mark.parametrize("size", [1000, 2 * MIB])
def test_flipped_bits(hub, api, size):
    data = random(size)
    hub.commit_files(REPO, {"a.arrow": data})
    fault = hub.fault(Fault(kind="flip", origin="storage", after=size - 10))
    got = download(api, "a.arrow")  # the client does not notice
    assert [i for i in range(size) if got[i] != data[i]] == [size - 10]
    assert fault.hits == 1
    answer = get_session().get(signed(hub, "a.arrow"), headers={"Range": "bytes=0-99"})
    assert answer.content == data[:100]


def test_which_requests_a_fault_hits(hub):
    hub.commit_files(REPO, {"a.arrow": random(1000)})
    session, url = get_session(), signed(hub, "a.arrow")

    def statuses(count):
        return [session.get(url).status_code for _ in range(count)]

    hub.fault(Fault(kind="status", status=503, origin="storage", method="GET", path=r"/lfs/me/.*", skip=1, times=2))
    assert statuses(5) == [200, 503, 503, 200, 200]
    hub.fault(Fault(kind="status", status=503, origin="hub", times=None))
    hub.fault(Fault(kind="status", status=503, method="PUT", times=None))
    hub.fault(Fault(kind="status", status=503, path="/other", times=None))
    hub.fault(Fault(kind="flip", after=1000, times=None))
    assert statuses(2) == [200, 200]
    hub.clear_faults()
    hub.fault(Fault(kind="status", status=503, chance=0.3, times=None, seed=1))
    first = statuses(50)
    assert 5 < first.count(503) < 25
    hub.clear_faults()
    hub.fault(Fault(kind="status", status=503, chance=0.3, times=None, seed=1))
    assert statuses(50) == first
    with pytest.raises(ValueError, match="unknown kind"):
        Fault(kind="none")


def test_delays(hub, api):
    hub.commit_files(REPO, {"a.arrow": random(50_000)})
    url = signed(hub, "a.arrow")

    def seconds():
        start = time.monotonic()
        assert get_session().get(url).content == random(50_000)
        return time.monotonic() - start

    assert seconds() < 0.15
    hub.fault(Fault(kind="delay", seconds=0.2))
    assert seconds() >= 0.2
    hub.latency = 0.2
    assert seconds() >= 0.2
    hub.latency, hub.bytes_per_second = 0, 250_000
    assert seconds() >= 0.19


def test_the_end_of_the_block_ends_delays():
    with Hub(latency=60) as hub:
        connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc)
        connection.request("GET", "/api/whoami-v2")
    connection.close()
    assert hub.errors == []


# As a process


def test_in_a_process_of_its_own(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-m", "hub.serve", "--token", "hf_t", "--latency-ms", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        cwd=tmp_path,
    ) as process:
        urls = json.loads(process.stdout.readline())
        api = HfApi(endpoint=urls["endpoint"], token="hf_t")
        session, control = get_session(), urls["endpoint"] + "/_ctl"
        api.create_repo(REPO, repo_type="dataset")
        add(api, {"a.arrow": random(100)})
        assert session.get(f"{control}/settings").json()["latency"] == 0.001
        assert session.post(f"{control}/settings", json={"latency": 0, "page_size": 10}).json()["page_size"] == 10
        assert session.post(f"{control}/settings", json={"none": 0}).status_code == 400
        session.post(f"{control}/faults", json={"kind": "status", "status": 503, "path": "/commit/"})
        with pytest.raises(HfHubHTTPError, match="503"):
            add(api, {"b.arrow": random(100, 1)})
        assert session.get(f"{control}/faults").json()[0]["hits"] == 1
        session.delete(f"{control}/faults")
        assert session.get(f"{control}/faults").json() == []
        assert session.post(f"{control}/faults", json={"kind": "none"}).status_code == 400
        session.post(f"{control}/user", json={"name": "you", "token": "hf_you"})
        session.post(f"{control}/gate", json={"repo": REPO})
        you = HfApi(endpoint=urls["endpoint"], token="hf_you")
        with pytest.raises(GatedRepoError):
            download(you, "a.arrow")
        session.post(f"{control}/grant", json={"repo": REPO, "user": "you"})
        assert download(you, "a.arrow") == random(100)
        session.post(f"{control}/private", json={"repo": REPO})
        with pytest.raises(RepositoryNotFoundError):
            you.dataset_info(REPO)
        session.post(f"{control}/expire")
        commits = session.get(f"{control}/commits", params={"repo": REPO}).json()
        assert commits[0]["files"]["a.arrow"] == 100
        log = session.get(f"{control}/log").json()
        assert [r["status"] for r in log if "/commit/" in r["path"]] == [200, 503]
        assert not [r for r in log if "_ctl" in r["path"]]
        session.delete(f"{control}/log")
        assert session.get(f"{control}/log").json() == []
        assert session.get(f"{control}/errors").json() == []
        huggingface_hub.close_session()
        process.stdin.close()
        assert process.wait(timeout=20) == 0
