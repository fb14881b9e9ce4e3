"""Calls to the Hub: what is worth asking again is, and every failure becomes one message that says what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import GitRefs, RepoFile
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.sha import git_hash

from logitstore._version import __version__
from logitstore.errors import (
    CorruptDataError,
    DatasetNotFoundError,
    InvalidInputError,
    LogitStoreError,
    RemoteAccessError,
    RemoteError,
    SourceNotFoundError,
)
from logitstore.io.http import FAILURES, TRIES, backoff, is_http, pause, waiting

T = TypeVar("T")

_SECRET: Final = re.compile(r"(?<=//)[^/@\s]*@|hf_[A-Za-z0-9_]{4,}|(?<=[?&])[^\s'\"]+|Bearer \S+")
_QUOTA: Final = re.compile(r"quota|storage|limit|billing|upgrade|payment", re.IGNORECASE)
_FEW: Final = 2  # calls of what the client itself tries six times
_FINAL: Final = (EntryNotFoundError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled)

ERRORS: Final = (*FAILURES, *_FINAL, ValueError, LookupError, TypeError, AttributeError, NameError)
"""What calls of huggingface_hub fail with; the last five where an answer of the Hub is not what it should be."""


class _Scrubbing(logging.Filter):
    """Takes what opens a door out of a message."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _SECRET.sub("...", record.getMessage()), ()
        return True


# The client warns of every failed request with its whole address, also where that is a signed one.
logging.getLogger("huggingface_hub.utils._http").addFilter(_Scrubbing())


@dataclass(frozen=True)
class Client:
    """An account on a Hub.

    Attributes:
        endpoint: origin of the Hub.
        token: None for that of `hf auth login` or `HF_TOKEN`, False for none.
    """

    endpoint: str
    token: str | bool | None = field(default=None, repr=False)

    @classmethod
    def of(cls, *, token: str | bool | None = None, endpoint: str | None = None) -> Client:
        """The Hub at an endpoint; None for that of `HF_ENDPOINT`, or huggingface.co.

        Raises:
            InvalidInputError: the endpoint is no URL.
        """
        endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        if not is_http(endpoint):
            raise InvalidInputError(f"{scrubbed(endpoint)!r} is no Hub's endpoint; write it as https://huggingface.co")
        return cls(endpoint, token)

    def api(self) -> HfApi:
        """The calls of huggingface_hub, for this account."""
        return HfApi(self.endpoint, token=self.token, library_name="logitstore", library_version=__version__)

    def headers(self) -> dict[str, str]:
        """What a request to this Hub, and to no other origin, carries."""
        headers = build_hf_headers(token=self.token, library_name="logitstore", library_version=__version__)
        return {str(name): str(value) for name, value in headers.items()}

    def signed_in(self) -> bool:
        """Whether there is a token at all; only the Hub knows what it is good for."""
        return any(name.lower() == "authorization" for name in self.headers())


def call(what: str, function: Callable[..., T], *args: Any, tries: int = TRIES, **kwargs: Any) -> T:
    """Call something of huggingface_hub, again where that may help.

    Args:
        what: what was wanted and where, for messages: `ns/name: cannot be created`.
        function: to call.
        args: its arguments.
        tries: the most calls; few for what asks again by itself.
        kwargs: its arguments.

    Raises:
        LogitStoreError: as `explained` says.
    """
    failures = 0
    while True:
        try:
            return function(*args, **kwargs)
        except ERRORS as error:
            failures += 1
            wait = patience(error, failures)
            meaning = explained(error, what)
        if wait is None or failures >= tries:
            # Not inside the handler: the client's errors hold requests and signed addresses, which no traceback,
            # whatever it is made with, is to show.
            raise meaning
        pause(wait)


@dataclass(frozen=True)
class Branch:
    """A branch of a dataset's repository, to be written to.

    Attributes:
        api: of the account.
        repo: `ns/name`.
        name: of the branch.
    """

    api: HfApi
    repo: str
    name: str

    def private(self) -> bool | None:
        """Whether the repository is; None where there is none that the token sees."""
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        try:
            info = call(self._unread, self.api.dataset_info, self.repo, expand=["private"], timeout=timeout)
        except DatasetNotFoundError:
            return None
        return bool(info.private)

    def create_repo(self, *, private: bool) -> None:
        """Make the repository; nothing where it is there."""

        def create() -> None:
            try:
                self.api.create_repo(self.repo, repo_type="dataset", private=private or None)
            except HfHubHTTPError as error:
                if error.response.status_code != 409:  # it is there: another push, or a reply that was lost
                    raise

        call(f"{self.repo}: cannot be made", create)

    def create(self, start: str) -> None:
        """Make the branch from a commit; nothing where it is there."""
        what = f"{self.repo}: the branch {self.name} cannot be made"
        more: dict[str, Any] = {"branch": self.name, "revision": start, "repo_type": "dataset", "exist_ok": True}
        call(what, self.api.create_branch, self.repo, **more)

    def head(self, name: str | None = None) -> str | None:
        """The commit that this branch, or another, is now; None where it is not there."""
        refs = self.refs()
        found = [*refs.branches, *(refs.pull_requests or [])]
        return next((ref.target_commit for ref in found if (name or self.name) in (ref.name, ref.ref)), None)

    def tagged(self, tag: str) -> str | None:
        """The commit that has this tag; None where there is no such tag."""
        return next((ref.target_commit for ref in self.refs().tags if ref.name == tag), None)

    def refs(self) -> GitRefs:
        """Branches and tags now."""
        with_requests = self.name.startswith("refs/pr/")
        return call(
            self._unread,
            self.api.list_repo_refs,
            self.repo,
            repo_type="dataset",
            include_pull_requests=with_requests,
        )

    def files(self, commit: str) -> dict[str, RepoFile]:
        """The files of a commit by path."""

        def listed() -> list[RepoFile]:
            tree = self.api.list_repo_tree(self.repo, recursive=True, revision=commit, repo_type="dataset")
            return [entry for entry in tree if isinstance(entry, RepoFile)]

        return {file.path: file for file in call(self._unread, listed, tries=_FEW)}

    def some(self, commit: str, paths: list[str]) -> dict[str, RepoFile]:
        """Those of these files that a commit has, by one request; for a hundred or so."""
        found = call(self._unread, self.api.get_paths_info, self.repo, paths, revision=commit, repo_type="dataset")
        return {file.path: file for file in found if isinstance(file, RepoFile)}

    def upload(self, additions: list[CommitOperationAdd]) -> None:
        """Send content ahead of its commit; does nothing for what is known to be there."""
        names = additions[0].path_in_repo + (f" and {len(additions) - 1} more" if len(additions) > 1 else "")
        call(
            f"{self.repo}: {names} cannot be sent",
            self.api.preupload_lfs_files,
            self.repo,
            additions,
            repo_type="dataset",
            revision=self.name,
            free_memory=False,
            tries=_FEW,
        )

    def commit(self, operations: list[Any], parent: str, message: str) -> str:
        """Make one commit on the parent that was seen; whether a lost reply was a success is looked up.

        Raises:
            RemoteError: somebody else pushed meanwhile, or the Hub cannot be reached.
        """
        what, failures = f"{self.repo}: the commit cannot be made", 0
        added = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        if added:
            self.upload(added)
        while True:
            try:
                made = self.api.create_commit(
                    self.repo,
                    operations,
                    commit_message=message,
                    repo_type="dataset",
                    revision=self.name,
                    parent_commit=parent,
                )
                return str(made.oid)
            except ERRORS as error:
                failures += 1
                wait = backoff(failures) if _collided(error) else patience(error, failures)
                meaning = explained(error, what)
            head = self.head()
            if head != parent:
                if head is not None and self.holds(head, operations):
                    return head
                raise RemoteError(f"{self.repo}: somebody else changed {self.name} meanwhile; push again")
            if wait is None or failures >= TRIES:
                raise meaning
            pause(wait)

    def holds(self, commit: str, operations: list[Any]) -> bool:
        """Whether a commit has all that these operations make."""
        files = self.files(commit)
        for operation in operations:
            there = files.get(operation.path_in_repo)
            if isinstance(operation, CommitOperationDelete):
                if there is not None:
                    return False
            elif there is None or there.size != operation.upload_info.size:
                return False
            elif there.lfs is not None:
                if there.lfs.sha256 != operation.upload_info.sha256.hex():
                    return False
            elif there.blob_id != _blob(operation):
                return False
        return True

    def tag(self, tag: str, commit: str) -> None:
        """Give a commit a tag; nothing where there is one of this name."""
        what = f"{self.repo}: the tag {tag} cannot be made"
        more: dict[str, Any] = {"tag": tag, "revision": commit, "repo_type": "dataset", "exist_ok": True}
        call(what, self.api.create_tag, self.repo, **more)

    @property
    def _unread(self) -> str:
        return f"{self.repo}: cannot be read"


def _blob(operation: CommitOperationAdd) -> str:
    with operation.as_file() as file:
        return git_hash(file.read())


def patience(error: Exception, failures: int) -> float | None:
    """Seconds after which a call may succeed; None where it would fail again."""
    error, uploading = _cause(error), isinstance(error, RuntimeError)
    if isinstance(error, (LogitStoreError, *_FINAL)) or _of_file(error) or _refused_card(error):
        return None
    if isinstance(error, HfHubHTTPError):
        status, headers = error.response.status_code, error.response.headers
        if status in (408, 425, 429) or status >= 500 or (uploading and _anonymous(error)):
            return waiting(status, headers) or backoff(failures)
        return None
    if _no_header(error) or _without_xet(error) or _refused_by_xet(error):
        return None
    return backoff(failures)


LOG_IN: Final = "no token is set; log in with `hf auth login`, or set HF_TOKEN"

_MEANINGS: Final[tuple[tuple[type[Exception], type[LogitStoreError], str], ...]] = (
    (
        GatedRepoError,
        RemoteAccessError,
        "the repository is gated; accept its terms on its page with the account of your token",
    ),
    (
        RepositoryNotFoundError,
        DatasetNotFoundError,
        "there is no such repository, or your token does not see it; check the name, and log in with `hf auth login`",
    ),
    (
        RevisionNotFoundError,
        DatasetNotFoundError,
        "there is no such revision; name a branch, a tag or a commit",
    ),
    (EntryNotFoundError, SourceNotFoundError, "there is no such file"),
    (LocalTokenNotFoundError, RemoteAccessError, LOG_IN),
    (HFValidationError, InvalidInputError, "this is no name of a repository; write it as namespace/name"),
    (OfflineModeIsEnabled, RemoteError, "HF_HUB_OFFLINE is set; unset it to reach the Hub"),
)
"""What errors of huggingface_hub mean, the more special ones first."""


def explained(error: Exception, what: str) -> LogitStoreError:
    """What a failure of huggingface_hub means, and what to do about it.

    Returns:
        DatasetNotFoundError, SourceNotFoundError, RemoteAccessError, InvalidInputError or RemoteError.
    """
    error, uploading = _cause(error), isinstance(error, RuntimeError)
    if isinstance(error, LogitStoreError):
        return error
    if _of_file(error):
        return CorruptDataError(f"cannot be read: {error.strerror}", code="file-kind", path=str(error.filename))
    found = next(((meaning, text) for kind, meaning, text in _MEANINGS if isinstance(error, kind)), None)
    if found is None and isinstance(error, HfHubHTTPError):
        found = _of_status(error, address=uploading and _anonymous(error))
    meaning, text = found or _of_others(error)
    return meaning(f"{what}: {text}")


_Meaning = tuple[type[LogitStoreError], str]


def _of_status(error: HfHubHTTPError, *, address: bool) -> _Meaning:
    """What a status means; that of a signed address, which carries no token, by itself."""
    status = error.response.status_code
    said = scrubbed(error.server_message or error.response.headers.get("X-Error-Message") or "")
    says = f": {said}" if said else ""
    kind: type[LogitStoreError] = RemoteError
    if status == 429:
        text = f"the Hub limits your requests (429){says}; wait some minutes and try again"
    elif status in (402, 413, 507) or (status == 403 and _QUOTA.search(said)):
        kind = RemoteAccessError
        text = f"no room{says}; free space, make the repository public, or change the plan"
    elif status >= 500:
        text = f"the Hub has a problem ({status}){says}; try again later"
    elif address:
        text = f"the Hub's storage refused ({status}){says}; try again later"
    elif status == 401:
        kind = RemoteAccessError
        text = LOG_IN if _anonymous(error) else f"the token is not valid{says}; log in again with `hf auth login`"
    elif status == 403:
        kind = RemoteAccessError
        text = f"your token has no right to do that{says}; use one with write access to this namespace"
    else:
        text = f"the Hub refused ({status}){says}"
    return kind, text


def _of_others(error: Exception) -> _Meaning:
    name, said = type(error).__name__, scrubbed(str(error))
    if _refused_card(error):
        return InvalidInputError, f"{said}; correct README.md and push again"
    if _no_header(error):
        return (
            RemoteAccessError,
            "the token is not valid: it holds odd characters; log in again with `hf auth login`",
        )
    if _without_xet(error):
        return RemoteError, "this Hub has no Xet storage; set HF_HUB_DISABLE_XET=1 and try again"
    if _refused_by_xet(error):
        return RemoteAccessError, "the Hub's storage refused the token; use one with write access"
    if isinstance(error, FAILURES):
        return RemoteError, f"the Hub cannot be reached ({name}); check the network and try again"
    return RemoteError, f"the Hub gave an answer that cannot be used ({name}: {said}); try again later"


def _cause(error: Exception) -> Exception:
    """What an upload failed with; the client raises RuntimeError from it."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _collided(error: Exception) -> bool:
    """Whether a commit was refused since another one was being made; where that changed the branch is looked up."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (409, 412)


def _anonymous(error: HfHubHTTPError) -> bool:
    return "Authorization" not in error.response.request.headers


def _of_file(error: Exception) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.filename is not None


def _refused_card(error: Exception) -> bool:
    """Whether the Hub said no to the metadata of a card, which it is shown before a commit."""
    return isinstance(error, ValueError) and "metadata in README.md" in str(error)


def _no_header(error: Exception) -> bool:
    """Whether a token cannot even be sent."""
    illegal = "Illegal header value" in str(error) and isinstance(error, HTTPError)
    return illegal or isinstance(error, UnicodeEncodeError)


def _without_xet(error: Exception) -> bool:
    text = str(error)
    return "xet-write-token" in text and "404" in text


def _refused_by_xet(error: Exception) -> bool:
    return isinstance(error, ConnectionError) and re.search(r"\b40[13]\b", str(error)) is not None


def scrubbed(text: str) -> str:
    """A server's text as one line, without what may be a token or the signature of an address."""
    return " ".join(_SECRET.sub("...", text).split())[:300]
