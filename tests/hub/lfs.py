"""Git LFS: the batch API on the Hub's origin, and the storage itself."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hub.answers import Answer, Call, Refusal, StorageRefusal, as_blob, as_json
from hub.api import routes as hub_routes
from hub.api import writable
from hub.blobs import Blob, Slice
from hub.repos import Repo
from hub.routes import Routes

if TYPE_CHECKING:
    from hub.server import Hub

routes = Routes()
"""Those of the storage."""

_OBJECTS = r"/datasets/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects"
_FILE = "/lfs/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
_JSON = {"Content-Type": "application/vnd.git-lfs+json"}


@dataclass
class Upload:
    """A file that comes in parts."""

    repo: Repo
    oid: str
    size: int
    part_size: int
    parts: dict[int, tuple[Blob, str]] = field(default_factory=dict)
    """Content and ETag by number, from 1."""

    def length(self, part: int) -> int:
        return max(0, min(self.part_size, self.size - (part - 1) * self.part_size))


# The Hub's origin


def parts_action(hub: Hub, repo: Repo, path: str, oid: str, size: int) -> dict[str, Any]:
    name = secrets.token_hex(8)
    with hub.lock:
        hub.uploads[name] = Upload(repo, oid, size, hub.part_size)
    header = {"chunk_size": str(hub.part_size)}
    for part in range(1, -(-size // hub.part_size) + 1):
        url = hub.signer.sign("PUT", path, hub.url_lifetime, uploadId=name, partNumber=str(part))
        header[f"{part:05}"] = hub.storage + url
    done = hub.signer.sign("POST", "/api/complete_multipart", hub.url_lifetime, uploadId=name)
    return {"href": hub.endpoint + done, "header": header}


def upload_action(hub: Hub, repo: Repo, file: dict[str, Any], *, multipart: bool) -> dict[str, Any]:
    oid, size = file["oid"], file["size"]
    if oid in repo.lfs:
        return {"oid": oid, "size": size}
    path = f"/lfs/{quote(repo.id)}/{oid}"
    if multipart and size > hub.multipart_above:
        upload = parts_action(hub, repo, path, oid, size)
    else:
        upload = {"href": hub.storage + hub.signer.sign("PUT", path, hub.url_lifetime, size=str(size))}
    verify = {"href": f"{hub.endpoint}/datasets/{repo.id}.git/info/lfs/objects/verify"}
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


@hub_routes("POST", _OBJECTS + "/batch")
def batch(hub: Hub, call: Call, repo: str) -> Answer:
    found, body = writable(hub, call, repo, "upload"), call.json()
    if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
        raise Refusal(400, "Only uploads are served here")
    new = {file["oid"]: file["size"] for file in body["objects"] if file["oid"] not in found.lfs}
    if hub.quota_bytes is not None and hub.used() + sum(new.values()) > hub.quota_bytes:
        raise Refusal(
            403,
            "Private repository storage limit reached, please upgrade your plan to increase your private storage limit.",
        )
    multipart = "multipart" in body.get("transfers", ["basic"])
    objects = [upload_action(hub, found, file, multipart=multipart) for file in body["objects"]]
    in_parts = any("header" in file.get("actions", {}).get("upload", {}) for file in objects)
    return as_json({"transfer": "multipart" if in_parts else "basic", "objects": objects}, headers=_JSON)


@hub_routes("POST", _OBJECTS + "/verify")
def verify(hub: Hub, call: Call, repo: str) -> Answer:
    found, body = writable(hub, call, repo, "upload"), call.json()
    blob = found.lfs.get(body.get("oid"))
    if blob is None or blob.size != body.get("size"):
        raise Refusal(404, "The file was not uploaded")
    return as_json({}, headers=_JSON)


@hub_routes("POST", "/api/complete_multipart")
def complete(hub: Hub, call: Call) -> Answer:
    hub.signer.check("POST", call)
    body, upload = call.json(), hub.uploads.get(call.param("uploadId"))
    if upload is None or body.get("oid") != upload.oid:
        raise Refusal(404, "No such upload")
    if upload.oid in upload.repo.lfs:
        return as_json({"success": True})  # the reply to the first time was lost
    count = -(-upload.size // upload.part_size)
    expected = [{"partNumber": part, "etag": upload.parts.get(part, (None, None))[1]} for part in range(1, count + 1)]
    if body.get("parts") != expected:
        raise Refusal(400, "The parts are not those that were uploaded")
    spool = hub.spool()
    for part in range(1, count + 1):
        blob = upload.parts[part][0]
        for chunk in Slice(blob, 0, blob.size).chunks():
            spool.write(chunk)
    joined, sha256 = spool.finish()
    if sha256 != upload.oid or joined.size != upload.size:
        spool.discard()
        raise Refusal(400, "The content does not have the announced SHA-256")
    with hub.lock:
        upload.repo.lfs[upload.oid] = joined
        parts, upload.parts = upload.parts, {}
    for blob, _ in parts.values():
        hub.forget(blob)
    return as_json({"success": True})


# The storage


def check_call(hub: Hub, verb: str, call: Call) -> None:
    if call.headers.get("Authorization") is not None:
        raise StorageRefusal(400, "Only one auth mechanism allowed", code="InvalidArgument")
    hub.signer.check(verb, call)


@routes("GET", _FILE)
def download(hub: Hub, call: Call, repo: str, oid: str) -> Answer:
    check_call(hub, "GET", call)
    found = hub.repos.get(repo)
    if found is None or oid not in found.lfs:
        raise StorageRefusal(404, "The specified key does not exist.", code="NoSuchKey")
    return as_blob(found.lfs[oid], call.headers.get("Range"), {"ETag": f'"{oid}"'})


@routes("PUT", _FILE)
def upload(hub: Hub, call: Call, repo: str, oid: str) -> Answer:
    check_call(hub, "PUT", call)
    etag = {"ETag": f'"{call.sha256[:32]}"'}
    if name := call.param("uploadId"):
        return upload_part(hub, call, name, etag)
    found = hub.repos.get(repo)
    if found is None:
        raise StorageRefusal(404, "The specified bucket does not exist.", code="NoSuchBucket")
    if call.sha256 != oid or call.body.size != int(call.param("size")):
        raise StorageRefusal(400, "The content does not have the announced SHA-256", code="BadDigest")
    with hub.lock:
        kept = found.lfs.setdefault(oid, call.body)
    if kept is not call.body:
        hub.forget(call.body)
    return Answer(200, etag)


def upload_part(hub: Hub, call: Call, name: str, etag: dict[str, str]) -> Answer:
    part, parts = int(call.param("partNumber")), hub.uploads.get(name)
    if parts is None:
        raise StorageRefusal(404, "The specified upload does not exist.", code="NoSuchUpload")
    if call.body.size != parts.length(part):
        raise StorageRefusal(400, "The part does not have the announced size", code="IncompleteBody")
    with hub.lock:
        before = parts.parts.get(part)
        parts.parts[part] = (call.body, etag["ETag"])
    if before is not None:
        hub.forget(before[0])
    return Answer(200, etag)
