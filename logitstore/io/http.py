"""Ranges of files over HTTP, asked for until they are whole.

By urllib3 and not by the session of huggingface_hub: the latter's client takes every 64 KB apart in Python, at three
times the cost, and holds up the threads that decode meanwhile. Proxies are those of the environment (`HTTPS_PROXY`,
`NO_PROXY`), certificates those that huggingface_hub's client trusts (`SSL_CERT_FILE`).
"""

from __future__ import annotations

import functools
import os
import random
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import urllib3
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # httpx's or httpx2's: base of their errors

from logitstore._version import __version__
from logitstore.errors import CorruptDataError, LogitStoreError, RemoteError
from logitstore.io.ending import ending

TRIES: Final = 6
"""So many answers in a row without anything new end a fetch."""

BACKOFF_SECONDS = 0.5
"""The first wait after a failure; each further one is twice as long, up to 8 seconds."""

_LONGEST_WAIT: Final = 300.0  # the Hub counts its requests over 5 minutes
_PROGRESS: Final = 2**20
_TRANSIENT: Final = frozenset((408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 524))
_EXPIRED: Final = frozenset((400, 401, 403, 404, 410))  # what storage answers to a URL that is no longer valid
_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_RESET: Final = re.compile(r"\bt=(\d+)")

_SMALLEST_READ: Final = 2**16
_CONNECTIONS: Final = 16

FAILURES: Final = (HTTPError, urllib3.exceptions.HTTPError, OSError, RuntimeError)
"""What requests of the Hub's client and ours fail with."""


@dataclass(frozen=True)
class Address:
    """Where to ask for a file.

    Attributes:
        url: may hold a signature: never shown.
        headers: may hold a token: never shown.
        lasting: whether asking for another address of the same file is useless.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False, default_factory=dict)
    lasting: bool = False


@dataclass
class _Range:
    """A range on its way: bytes [offset + done, offset + length) are still to come."""

    offset: int
    length: int
    sink: Callable[[bytes], None]
    name: str
    buffer: int
    done: int = 0
    refused: bool = False


def _program_lives() -> bool:
    return not ending.is_set()


def fetch(
    address: Callable[[bool], Address],
    offset: int,
    length: int,
    sink: Callable[[bytes], None],
    name: str,
    wanted: Callable[[], bool] = _program_lives,
    buffer: int = 2**23,
) -> None:
    """Fetch a range; what arrived is kept over dropped connections, and the rest asked for.

    Args:
        address: gives the address; with True another one, because the last one is no longer valid.
        offset: first byte.
        length: number of bytes; 0 asks nothing.
        sink: gets the bytes in order, exactly `length` of them, unless it fails.
        name: the file, for messages.
        wanted: whether it still is; asked while waiting.
        buffer: the most bytes that are handed to `sink` at once.

    Raises:
        RemoteError: it could not be had, though asked for again and again, or is not wanted any more.
        CorruptDataError: the file is shorter.
    """
    asked = _Range(offset, length, sink, name, buffer)
    failures, best, renew = 0, 0, False
    while asked.done < length:
        wait = 0.0
        if not wanted():
            raise RemoteError(f"{name}: stopped")
        try:
            where = address(renew)
            renew = False
            status, wait = _ask(where, asked)
            reason = f"status {status}" if status >= 300 else "a cut-off answer"
            if status in _EXPIRED:
                renew, wait = True, 0.01
                if where.lasting or failures >= TRIES // 2:
                    raise RemoteError(
                        f"{name}: refused with status {status}; check that it is still there and that your token may "
                        f"read it"
                    )
        except FAILURES as error:
            if asked.refused or isinstance(error, LogitStoreError):
                raise
            reason = type(error).__name__
        if asked.done >= best + _PROGRESS:
            best, failures = asked.done, 0
        if asked.done < length:
            failures += 1
            asked.buffer = max(_SMALLEST_READ, asked.buffer // 4)  # of a broken read nothing is kept
            if failures >= TRIES:
                raise RemoteError(
                    f"{name}: bytes {offset + asked.done} to {offset + length} could not be fetched ({reason}, "
                    f"{TRIES} times); try again later"
                )
            pause(wait or backoff(failures), wanted)


def _ask(where: Address, asked: _Range) -> tuple[int, float]:
    """One request: (status, seconds that the server wants us to wait)."""
    first, last = asked.offset + asked.done, asked.offset + asked.length - 1
    headers = {"User-Agent": f"logitstore/{__version__}", **where.headers}
    headers |= {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
    response = _pool(where.url).request(
        "GET",
        where.url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        preload_content=False,
        redirect=False,
        retries=False,
    )
    try:
        status = int(response.status)
        if status in _TRANSIENT or status in _EXPIRED:
            return status, waiting(status, response.headers)
        if status == 416:
            raise CorruptDataError(
                f"the file ends before byte {last}, where the manifest says more", code="shard-size", path=asked.name
            )
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        whole = status == 200 and first == 0 and response.headers.get("Content-Length") == str(asked.length)
        if not whole and (status != 206 or found is None or int(found[1]) != first):
            raise RemoteError(
                f"{asked.name}: its server does not answer with the range that was asked for ({status}); if it "
                f"gives none, fetch the dataset whole"
            )
        while left := asked.length - asked.done:
            part = response.read(min(left, asked.buffer), decode_content=False)
            if not part:
                break
            try:
                asked.sink(part)
            except Exception:
                asked.refused = True  # a full disk, say: not the network's
                raise
            asked.done += len(part)
        return status, 0.0
    finally:
        if response.length_remaining != 0:
            response.close()  # what is left in the connection is of no use to anybody
        response.release_conn()


def _pool(url: str) -> urllib3.PoolManager:
    """Connections of this process to where a URL, or the environment's proxy for it, is."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is not None and parts.hostname is not None and urllib.request.proxy_bypass(parts.hostname):
        proxy = None
    return _connections(os.getpid(), proxy)


@functools.lru_cache(maxsize=4)
def _connections(_process: int, proxy: str | None) -> urllib3.PoolManager:
    client = sys.modules[HTTPError.__module__.partition(".")[0]]
    settings: dict[str, Any] = {"maxsize": _CONNECTIONS, "ssl_context": client.create_ssl_context()}
    if proxy is None:
        return urllib3.PoolManager(**settings)
    where = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if where.username is not None:
        account = f"{unquote(where.username)}:{unquote(where.password or '')}"
        settings["proxy_headers"] = urllib3.make_headers(proxy_basic_auth=account)
    return urllib3.ProxyManager(f"{where.scheme}://{where.netloc.rpartition('@')[2]}", **settings)


def waiting(status: int, headers: Mapping[str, str]) -> float:
    """Seconds that a server asks for before the next request: `Retry-After`, or at 429 the reset of its `RateLimit`.

    Every answer of the Hub has the latter, also where its limits are not what was wrong.
    """
    text = headers.get("Retry-After", "")
    if not text.isdigit():
        found = _RESET.search(headers.get("RateLimit", "")) if status == 429 else None
        text = found[1] if found else ""
    return min(float(text) + 0.1, _LONGEST_WAIT) if text.isdigit() else 0.0


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures, scattered so that many readers do not come back at once."""
    return float(min(BACKOFF_SECONDS * 2 ** (failures - 1), 8.0) * random.uniform(0.75, 1.25))  # noqa: S311


def pause(seconds: float, wanted: Callable[[], bool] = _program_lives) -> None:
    """Wait, but not longer than anybody wants: an interpreter that ends waits for its threads.

    Raises:
        RemoteError: nobody does.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if not wanted():
            raise RemoteError("stopped")
        time.sleep(min(left, 0.25))


def is_http(url: str) -> bool:
    """Whether this is an address that can be asked."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and _port(parts) != 0 and url.isprintable()
    except ValueError:
        return False


def same_origin(one: str, other: str) -> bool:
    """Whether two URLs have scheme, host and port in common."""
    a, b = urlsplit(one), urlsplit(other)
    return (a.scheme, a.hostname, _port(a)) == (b.scheme, b.hostname, _port(b))


def _port(parts: Any) -> int | None:
    port: int | None = parts.port
    return port if port is not None else {"http": 80, "https": 443}.get(parts.scheme)
