"""The Hub's own origin: repositories, trees, commits, branches, tags and files."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from hub import access
from hub.answers import Answer, Call, Refusal, as_blob, as_bytes, as_json
from hub.repos import (
    REGULAR_LIMIT,
    Change,
    Commit,
    Entry,
    Repo,
    check_path,
    folder_info,
    is_lfs,
    lfs_pointer,
    listing,
    no_such_entry,
    no_such_revision,
)
from hub.routes import DATASET, Routes

if TYPE_CHECKING:
    from hub.server import Hub

routes = Routes()


def readable(hub: Hub, call: Call, repo: str) -> Repo:
    return access.check_read(hub.repos.get(repo), hub.users.of(call))


def writable(hub: Hub, call: Call, repo: str, what: str) -> Repo:
    user = hub.users.of(call)
    found = access.check_read(hub.repos.get(repo), user)
    access.check_namespace(found.namespace, user, what)
    return found


def paged(hub: Hub, call: Call, items: list[Any], size: int) -> Answer:
    """A page of a list, with a link to the next."""
    params = {name: values[0] for name, values in call.params.items()}
    try:
        start = int(params.pop("cursor", "0"))
        size = min(size, int(params.get("limit", size)))
    except ValueError as error:
        raise Refusal(400, "Invalid cursor or limit") from error
    headers = {}
    if start + size < len(items):
        url = f"{hub.endpoint}{call.path}?{urlencode({**params, 'cursor': start + size})}"
        headers["Link"] = f'<{url}>; rel="next"'
    return as_json(items[start : start + size], headers=headers)


# Users and repositories


@routes("GET", "/api/whoami-v2")
def whoami(hub: Hub, call: Call) -> Answer:
    user = hub.users.of(call)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": "admin"} for name in user.orgs]
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
    return as_json({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth})


def named(hub: Hub, call: Call, what: str) -> tuple[str, dict[str, Any]]:
    """The repository that a body names, once it is known that the user may write in its namespace."""
    body = call.json()
    user = hub.users.of(call)
    namespace = body.get("organization") or (user.name if user is not None else "")
    if body.get("type") != "dataset":
        raise Refusal(404, "Only datasets are served here")
    access.check_namespace(namespace, user, what)
    return f"{namespace}/{check_path(body.get('name'))}", body


@routes("POST", "/api/repos/create")
def create(hub: Hub, call: Call) -> Answer:
    repo, body = named(hub, call, "create a dataset")
    url = f"{hub.endpoint}/datasets/{repo}"
    with hub.lock:
        if repo in hub.repos:
            raise Refusal(409, "You already created this dataset repo", url=url)
        hub.create_repo(repo, private=bool(body.get("private")) or body.get("visibility") == "private")
    return as_json({"url": url, "name": repo, "id": repo})


@routes("DELETE", "/api/repos/delete")
def delete(hub: Hub, call: Call) -> Answer:
    repo, _ = named(hub, call, "delete a dataset")
    with hub.lock:
        if hub.repos.pop(repo, None) is None:
            raise access.no_such_repo(hub.users.of(call))
    return as_json({})


@routes("PUT", DATASET + "/settings")
def settings(hub: Hub, call: Call, repo: str) -> Answer:
    found, body = writable(hub, call, repo, "change settings"), call.json()
    with hub.lock:
        if "private" in body or "visibility" in body:
            found.private = bool(body.get("private")) or body.get("visibility") == "private"
        if "gated" in body:
            found.gated = bool(body["gated"])
    return as_json({"private": found.private})


@routes("GET", DATASET + "/auth-check")
def auth_check(hub: Hub, call: Call, repo: str) -> Answer:
    access.check_gate(readable(hub, call, repo), hub.users.of(call))
    return as_json({})


@routes("POST", "/api/validate-yaml")
def validate_yaml(_hub: Hub, call: Call) -> Answer:
    """Looks at the block's fences only: there is no YAML in the standard library."""
    content = call.json().get("content", "")
    if not content.startswith("---\n"):
        return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    if "\n---" not in content:
        return as_json({"errors": [{"message": "the metadata block is not closed"}], "warnings": []}, status=400)
    return as_json({"errors": [], "warnings": []})


def description(repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    siblings = []
    for path, entry in sorted(commit.tree.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.sha256 is not None:
                pointer = len(lfs_pointer(entry.sha256, entry.size))
                sibling["lfs"] = {"size": entry.size, "sha256": entry.sha256, "pointerSize": pointer}
        siblings.append(sibling)
    return {
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "createdAt": repo.created,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "usedStorage": repo.used,
        "siblings": siblings,
    }


@routes("GET", DATASET)
@routes("GET", DATASET + "/revision/(?P<revision>[^/]+)")
def info(hub: Hub, call: Call, repo: str, revision: str = "main") -> Answer:
    found = readable(hub, call, repo)
    value = description(found, found.resolve(revision), blobs=call.flag("blobs"))
    if wanted := call.params.get("expand"):
        value = {name: value[name] for name in ("id", *wanted) if name in value}
    return as_json(value)


# Trees


def with_last_commit(repo: Repo, commit: Commit, info: dict[str, Any]) -> dict[str, Any]:
    last = repo.last_change(commit, info["path"])
    return {**info, "lastCommit": {"id": last.sha, "title": last.title, "date": last.date}}


@routes("GET", DATASET + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
def tree(hub: Hub, call: Call, repo: str, revision: str, path: str) -> Answer:
    found = readable(hub, call, repo)
    commit = found.resolve(revision)
    items = listing(commit.tree, path.strip("/"), recursive=call.flag("recursive"))
    if items is None:
        raise no_such_entry(path, commit)
    if call.flag("expand"):
        items = [with_last_commit(found, commit, item) for item in items]
    return paged(hub, call, items, min(50, hub.page_size) if call.flag("expand") else hub.page_size)


@routes("POST", DATASET + "/paths-info/(?P<revision>[^/]+)")
def paths_info(hub: Hub, call: Call, repo: str, revision: str) -> Answer:
    found = readable(hub, call, repo)
    commit = found.resolve(revision)
    if "json" in call.headers.get("Content-Type", ""):
        body = call.json()
    else:
        form = Call("POST", "", call.body.read().decode(), {}, call.body, "")
        body = {"paths": form.params.get("paths", []), "expand": form.flag("expand")}
    items = []
    for path in body["paths"]:
        if path in commit.tree:
            items.append(commit.tree[path].info(path))
        elif any(name.startswith(f"{path}/") for name in commit.tree):
            items.append(folder_info(commit.tree, path))
    return as_json([with_last_commit(found, commit, item) for item in items] if body.get("expand") else items)


@routes("GET", DATASET + "/commits/(?P<revision>[^/]+)")
def commits(hub: Hub, call: Call, repo: str, revision: str) -> Answer:
    log = readable(hub, call, repo).log(revision)
    items = [
        {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in log
    ]
    return paged(hub, call, items, hub.page_size)


# Branches and tags


@routes("GET", DATASET + "/refs")
def refs(hub: Hub, call: Call, repo: str) -> Answer:
    found = readable(hub, call, repo)

    def of(kind: str, names: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in list(names.items())]

    return as_json(
        {
            "branches": of("heads", found.branches),
            "tags": of("tags", found.tags),
            "converts": [],
            "pullRequests": [],
        }
    )


@routes("POST", DATASET + "/branch/(?P<branch>[^/]+)")
def create_branch(hub: Hub, call: Call, repo: str, branch: str) -> Answer:
    found = writable(hub, call, repo, "create a branch")
    with hub.lock:
        commit = found.resolve(call.json().get("startingPoint") or "main")
        if branch in found.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        found.branches[branch] = commit.sha
    return as_json({})


@routes("DELETE", DATASET + "/branch/(?P<branch>[^/]+)")
def delete_branch(hub: Hub, call: Call, repo: str, branch: str) -> Answer:
    found = writable(hub, call, repo, "delete a branch")
    with hub.lock:
        if branch == "main":
            raise Refusal(403, "The main branch cannot be deleted")
        if found.branches.pop(branch, None) is None:
            raise no_such_revision(branch)
    return as_json({})


@routes("POST", DATASET + "/tag/(?P<revision>[^/]+)")
def create_tag(hub: Hub, call: Call, repo: str, revision: str) -> Answer:
    found = writable(hub, call, repo, "create a tag")
    tag = check_path(call.json().get("tag"))
    with hub.lock:
        commit = found.resolve(revision)
        if tag in found.tags:
            raise Refusal(409, f"Tag reference exists already: {tag}")
        found.tags[tag] = commit.sha
    return as_json({})


@routes("DELETE", DATASET + "/tag/(?P<tag>[^/]+)")
def delete_tag(hub: Hub, call: Call, repo: str, tag: str) -> Answer:
    found = writable(hub, call, repo, "delete a tag")
    with hub.lock:
        if found.tags.pop(tag, None) is None:
            raise no_such_revision(tag)
    return as_json({})


# Commits


@routes("POST", DATASET + "/preupload/(?P<revision>[^/]+)")
def preupload(hub: Hub, call: Call, repo: str, revision: str) -> Answer:
    found = writable(hub, call, repo, "upload")
    now_there = found.resolve(revision).tree
    files = []
    for file in call.json()["files"]:
        path, entry = check_path(file["path"]), now_there.get(file["path"])
        mode = "lfs" if is_lfs(path, file["size"], now_there) else "regular"
        value: dict[str, Any] = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if entry is not None:
            value["oid"] = entry.sha256 or entry.oid
        files.append(value)
    return as_json({"files": files})


def lfs_change(repo: Repo, value: Mapping[str, Any]) -> Change:
    blob = repo.lfs.get(value.get("oid", ""))
    if blob is None or value.get("size", blob.size) != blob.size:
        raise Refusal(
            400,
            "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
            f"Offending file: {value['path']}",
        )
    return Change(check_path(value["path"]), Entry.lfs(value["oid"], blob))


def change(repo: Repo, key: str, value: Mapping[str, Any]) -> Change:
    if key == "lfsFile":
        return lfs_change(repo, value)
    if key in {"deletedFile", "deletedFolder"}:
        return Change(check_path(value["path"].rstrip("/")))
    if key != "file":
        raise Refusal(400, f"Unknown key in commit: {key}")
    content = value["content"]
    data = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
    if len(data) > REGULAR_LIMIT:
        raise Refusal(400, f"Your push was rejected because {value['path']} is larger than 10 MB and not in LFS.")
    return Change(check_path(value["path"]), Entry.regular(data))


@routes("POST", DATASET + "/commit/(?P<revision>[^/]+)")
def commit(hub: Hub, call: Call, repo: str, revision: str) -> Answer:
    found = writable(hub, call, repo, "commit")
    user = hub.users.of(call)
    assert user is not None
    if call.flag("create_pr"):
        raise Refusal(400, "Pull requests are not served here")
    try:
        lines = [json.loads(line) for line in call.body.read().splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
    except (ValueError, KeyError, StopIteration) as error:
        raise Refusal(400, "The body is not a commit") from error
    changes = [change(found, line["key"], line["value"]) for line in lines if line["key"] != "header"]
    with hub.lock:
        head = found.branches.get(revision)
        if head is not None and header.get("parentCommit") not in {None, head}:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        done = found.commit(
            revision,
            changes,
            title=header.get("summary", ""),
            message=header.get("description", ""),
            author=user.name,
        )
    url = f"{hub.endpoint}/datasets/{repo}/commit/{done.sha}"
    return as_json({"success": True, "commitOid": done.sha, "commitUrl": url, "hookOutput": ""})


# Files


@routes("GET", "/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: Hub, call: Call, repo: str, revision: str, path: str) -> Answer:
    user = hub.users.of(call)
    found = access.check_read(hub.repos.get(repo), user)
    access.check_gate(found, user)
    commit = found.resolve(revision)
    entry = commit.tree.get(path)
    if entry is None:
        raise no_such_entry(path, commit)
    name = path.rsplit("/", 1)[-1]
    headers = {
        "X-Repo-Commit": commit.sha,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}",
    }
    if entry.sha256 is None:
        return as_blob(entry.blob, call.headers.get("Range"), {**headers, "ETag": f'"{entry.oid}"'})
    location = hub.storage + hub.signer.sign("GET", f"/lfs/{quote(repo)}/{entry.sha256}", hub.url_lifetime)
    headers |= {"Location": location, "X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
    return as_bytes(f"Found. Redirecting to {location}".encode(), "text/plain", status=302, headers=headers)
