"""A dataset on the Hub: its revision is resolved once, and its files are read in ranges."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, unquote

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import get_session, hf_raise_for_status

from logitstore.errors import CorruptDataError, DatasetNotFoundError, InvalidInputError, RemoteError
from logitstore.io.client import Client, call
from logitstore.io.http import Address, fetch, is_http, same_origin
from logitstore.io.remote import RemoteStore

ADDRESS_SECONDS: Final = 45 * 60.0
"""Signed addresses are valid for an hour; they are renewed before."""

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SPECIAL: Final = re.compile(r"(refs/(?:pr|convert)/[^/]+)(?:/(.*))?")


@dataclass(frozen=True)
class HubPlace:
    """A dataset on the Hub.

    Attributes:
        repo: `ns/name`.
        revision: branch, tag or commit; None for the main branch.
        folder: where in the repository, `` or ending with `/`.
    """

    repo: str
    revision: str | None = None
    folder: str = ""

    @classmethod
    def parse(cls, text: str) -> HubPlace:
        """From `ns/name[@revision]`, also as `hf://datasets/ns/name[@revision][/folder]`.

        A slash in a revision is written as %2F, but for `refs/pr/N` and `refs/convert/NAME`.

        Raises:
            InvalidInputError: it is neither.
        """
        url = text.startswith("hf://")
        rest = text.removeprefix("hf://datasets/") if url else text.removeprefix("datasets/")
        parts = rest.split("/", 1)
        if len(parts) == 2 and not rest.startswith("hf://"):
            name, _, inner = parts[1].partition("/")
            name, at, revision = name.partition("@")
            if at and revision == "refs" and (special := _SPECIAL.fullmatch(f"refs/{inner}")):
                revision, inner = special[1], special[2] or ""
            if parts[0] and name and (revision or not at) and "@" not in parts[0] and (url or not inner):
                folder = inner.strip("/")
                return cls(f"{parts[0]}/{name}", unquote(revision) or None, folder + "/" if folder else "")
        raise InvalidInputError(
            f"{text!r} is no dataset on the Hub; write namespace/name, namespace/name@revision, or "
            f"hf://datasets/namespace/name@revision"
        )

    def url(self, revision: str | None = None) -> str:
        """As it is given to `logitstore.open`."""
        revision = revision or self.revision
        at = f"@{quote(revision, safe='')}" if revision else ""
        return f"hf://datasets/{self.repo}{at}{'/' + self.folder.rstrip('/') if self.folder else ''}"


@dataclass(frozen=True)
class _Known:
    address: Address
    size: int | None
    etag: str | None
    until: float


@dataclass(frozen=True)
class HubStore(RemoteStore):
    """The files of a dataset at one commit of a repository.

    Attributes:
        place: as it was asked for.
        commit: the revision, resolved.
        client: the account.
    """

    place: HubPlace
    commit: str
    client: Client
    _known: dict[str, _Known] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, text: str, *, token: str | bool | None = None, endpoint: str | None = None) -> HubStore:
        """Resolve a revision, by one request, or none where it is a commit.

        Raises:
            InvalidInputError: not a dataset's name.
            DatasetNotFoundError: there is no such repository or revision, or the token does not see it.
            RemoteAccessError: the Hub wants another token.
            RemoteError: it cannot be reached.
        """
        place, client = HubPlace.parse(text), Client.of(token=token, endpoint=endpoint)
        return cls(place, resolve(place, client), client)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}  # signed addresses are not for other processes

    @property
    def name(self) -> str:
        """Its URL, as it was asked for."""
        return self.place.url()

    @property
    def identity(self) -> str:
        """Repository and Hub, whatever the commit: files that two commits share are kept once."""
        return f"{self.client.endpoint}/datasets/{self.place.repo}/{self.place.folder}"

    def where(self, path: str) -> str:
        """URL of a file."""
        return f"{self.name}/{path}"

    def fetch(
        self,
        path: str,
        offset: int,
        length: int,
        sink: Callable[[bytes], None],
        **how: Any,
    ) -> None:
        """Hand a range of a file to `sink`; `how` is told to `logitstore.io.http.fetch`."""

        def address(renew: bool) -> Address:  # noqa: FBT001 - the one thing to say
            return self._known_file(path, renew=renew).address

        fetch(address, offset, length, sink, self.where(path), **how)

    def small(self, path: str, limit: int) -> bytes:
        """The whole of a small file: one request, as a rule, because the Hub itself holds it."""
        return call(f"{self.where(path)}: cannot be read", self._get, path, limit)

    def _get(self, path: str, limit: int) -> bytes:
        headers = {**self.client.headers(), "Accept-Encoding": "identity"}
        data = bytearray()
        with get_session().stream(
            "GET", self._url(path), headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=False
        ) as response:
            if response.is_redirect:  # stored beside the repository, as large files are
                known = self._known_file(path, renew=True)
                if known.size is None or known.size > limit:
                    raise self._too_large(path, limit)
                self.fetch(path, 0, known.size, data.extend)
                etag = known.etag
            else:
                if response.status_code >= 400:
                    response.read()
                hf_raise_for_status(response)
                for part in response.iter_raw():
                    data += part
                    if len(data) > limit:
                        raise self._too_large(path, limit)
                etag = response.headers.get("ETag")
        if not _has_etag(bytes(data), etag):
            raise ConnectionError("an answer that was damaged or cut off")
        return bytes(data)

    def _too_large(self, path: str, limit: int) -> CorruptDataError:
        return CorruptDataError(f"more than the limit of {limit} bytes", code="file-size", path=self.where(path))

    def _url(self, path: str) -> str:
        return hf_hub_url(
            self.place.repo,
            self.place.folder + path,
            repo_type="dataset",
            revision=self.commit,
            endpoint=self.client.endpoint,
        )

    def _known_file(self, path: str, *, renew: bool) -> _Known:
        known = self._known.get(path)
        if known is None or renew or time.monotonic() > known.until:
            known = self._known[path] = self._ask(path)
        return known

    def _ask(self, path: str) -> _Known:
        url = self._url(path)
        found = call(
            f"{self.where(path)}: cannot be read",
            get_hf_file_metadata,
            url,
            token=self.client.token,
            endpoint=self.client.endpoint,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        if not is_http(found.location):
            raise RemoteError(f"{self.where(path)}: the Hub gave an address that cannot be used; try again later")
        own = same_origin(found.location, self.client.endpoint)
        address = Address(found.location, self.client.headers() if own else {}, lasting=own)
        return _Known(address, found.size, found.etag, time.monotonic() + ADDRESS_SECONDS)


def _has_etag(data: bytes, etag: str | None) -> bool:
    """Whether bytes are those of an ETag of the Hub: git's sha1 of a blob, or the sha256 of a large file."""
    etag = (etag or "").removeprefix("W/").strip('"')
    if _COMMIT.fullmatch(etag):
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == etag
    return len(etag) != 64 or hashlib.sha256(data).hexdigest() == etag


def resolve(place: HubPlace, client: Client) -> str:
    """The commit that a revision is now.

    Raises:
        DatasetNotFoundError: there is no such repository or revision, or the token does not see it.
        RemoteAccessError: the Hub wants another token.
        RemoteError: it cannot be reached.
    """
    if place.revision is not None and _COMMIT.fullmatch(place.revision):
        return place.revision
    info = call(
        f"{place.url()}: cannot be read",
        client.api().dataset_info,
        place.repo,
        revision=place.revision or constants.DEFAULT_REVISION,
        expand=["sha"],
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )
    if info.sha is None:
        raise DatasetNotFoundError(f"{place.url()}: the Hub names no commit; the repository is empty")
    return info.sha
