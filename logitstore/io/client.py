"""Calls to the Hub: what is worth asking again is, and every failure becomes one message that says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from logitstore._version import __version__
from logitstore.errors import (
    DatasetNotFoundError,
    InvalidInputError,
    LogitStoreError,
    RemoteAccessError,
    RemoteError,
    SourceNotFoundError,
)
from logitstore.io.http import FAILURES, TRIES, backoff, pause, waiting

T = TypeVar("T")

_SECRET: Final = re.compile(r"hf_[A-Za-z0-9_]{4,}|(?<=[?&])[^\s'\"]+|Bearer \S+")
_QUOTA: Final = re.compile(r"quota|storage|limit|billing|upgrade|payment", re.IGNORECASE)
_FINAL: Final = (EntryNotFoundError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled)


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
        """The Hub at an endpoint; None for that of `HF_ENDPOINT`, or huggingface.co."""
        return cls((endpoint or constants.ENDPOINT).rstrip("/"), token)

    def api(self) -> HfApi:
        """The calls of huggingface_hub, for this account."""
        return HfApi(self.endpoint, token=self.token, library_name="logitstore", library_version=__version__)

    def headers(self) -> dict[str, str]:
        """What a request to this Hub, and to no other origin, carries."""
        headers = build_hf_headers(token=self.token, library_name="logitstore", library_version=__version__)
        return {str(name): str(value) for name, value in headers.items()}


def call(what: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call something of huggingface_hub, again where that may help.

    Args:
        what: what was wanted and where, for messages: `ns/name: cannot be created`.
        function: to call.
        args: its arguments.
        kwargs: its arguments.

    Raises:
        LogitStoreError: as `explained` says.
    """
    failures = 0
    while True:
        try:
            return function(*args, **kwargs)
        except (*FAILURES, *_FINAL) as error:
            failures += 1
            wait = patience(error, failures)
            if wait is None or failures >= TRIES:
                # The client's own errors hold requests and signed addresses, which no traceback is to show.
                raise explained(error, what) from None
        pause(wait)


def patience(error: Exception, failures: int) -> float | None:
    """Seconds after which a call may succeed; None where it would fail again."""
    if isinstance(error, (LogitStoreError, PermissionError, FileNotFoundError, *_FINAL)):
        return None
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status not in (408, 425, 429) and status < 500:
            return None
        return waiting(error.response.headers) or backoff(failures)
    return None if _without_xet(error) or _refused_by_xet(error) else backoff(failures)


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
    (
        LocalTokenNotFoundError,
        RemoteAccessError,
        "no token is set; log in with `hf auth login`, or set HF_TOKEN",
    ),
    (HFValidationError, InvalidInputError, "this is no name of a repository; write it as namespace/name"),
    (OfflineModeIsEnabled, RemoteError, "HF_HUB_OFFLINE is set; unset it to reach the Hub"),
)
"""What errors of huggingface_hub mean, the more special ones first."""


def explained(error: Exception, what: str) -> LogitStoreError:
    """What a failure of huggingface_hub means, and what to do about it.

    Returns:
        DatasetNotFoundError, SourceNotFoundError, RemoteAccessError, InvalidInputError or RemoteError.
    """
    if isinstance(error, LogitStoreError):
        return error
    for kind, meaning, text in _MEANINGS:
        if isinstance(error, kind):
            return meaning(f"{what}: {text}")
    if isinstance(error, HfHubHTTPError):
        return _of_status(error, what)
    if _without_xet(error):
        return RemoteError(f"{what}: this Hub has no Xet storage; set HF_HUB_DISABLE_XET=1 and try again")
    if _refused_by_xet(error):
        return RemoteAccessError(f"{what}: the Hub's storage refused the token; use one with write access")
    return RemoteError(f"{what}: the Hub cannot be reached ({type(error).__name__}); check the network and try again")


def _of_status(error: HfHubHTTPError, what: str) -> LogitStoreError:
    status = error.response.status_code
    said = scrubbed(error.server_message or error.response.headers.get("X-Error-Message") or "")
    says = f": {said}" if said else ""
    if status in (402, 413, 507) or (status == 403 and _QUOTA.search(said)):
        return RemoteAccessError(f"{what}: no room{says}; free space, make the repository public, or change the plan")
    if status == 401:
        return RemoteAccessError(f"{what}: the token is not valid{says}; log in again with `hf auth login`")
    if status == 403:
        return RemoteAccessError(
            f"{what}: your token has no right to do that{says}; use one with write access to this namespace"
        )
    if status == 429:
        return RemoteError(f"{what}: the Hub limits your requests (429){says}; wait some minutes and try again")
    if status >= 500:
        return RemoteError(f"{what}: the Hub has a problem ({status}){says}; try again later")
    return RemoteError(f"{what}: the Hub refused ({status}){says}")


def _without_xet(error: Exception) -> bool:
    text = str(error)
    return "xet-write-token" in text and "404" in text


def _refused_by_xet(error: Exception) -> bool:
    return isinstance(error, ConnectionError) and re.search(r"\b40[13]\b", str(error)) is not None


def scrubbed(text: str) -> str:
    """A server's text as one line, without what may be a token or the signature of an address."""
    return " ".join(_SECRET.sub("...", text).split())[:300]
