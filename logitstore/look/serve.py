"""A server on loopback that pages through a dataset: the page, and its sequences one at a time as JSON.

It reads nothing but the dataset's sequences: no file is served. Names other than its own are refused in `Host`, so that
a page of another site cannot make a browser read from it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import msgspec

from logitstore.dataset.reader import Dataset
from logitstore.errors import InvalidInputError, LogitStoreError, RowIndexError, SequenceNotFoundError
from logitstore.look.page import CANDIDATES, POSITIONS, Viewed, page_html, policy

ADDRESS: Final = "127.0.0.1"

_LISTED: Final = 200  # rows of a list at most
_CANDIDATES_SENT: Final = 2_000_000  # of one sequence at most, whatever the numbers asked for
_IDLE_SECONDS: Final = 60.0  # a connection that asks for nothing is closed
_NUMBER: Final = re.compile(r"[0-9]{1,15}")
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Server(ThreadingHTTPServer):
    """Serves one dataset, and perhaps another beside it, until `shutdown`; close it with `server_close`.

    Args:
        dataset: the dataset.
        port: on 127.0.0.1; 0 takes any that is free.
        other: another dataset over the same sequences.
        candidates: how many of each position are listed.
        positions: how many of a sequence are sent at a time.

    Raises:
        InvalidInputError: the port cannot be had, or the datasets cannot be compared.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    allow_reuse_address = os.name != "nt"  # there it would share the port with another server

    def __init__(
        self,
        dataset: Dataset,
        port: int = 0,
        *,
        other: Dataset | None = None,
        candidates: int = CANDIDATES,
        positions: int = POSITIONS,
    ) -> None:
        self.viewed = Viewed(dataset, other, candidates=candidates)
        self.positions = max(1, min(positions, _CANDIDATES_SENT // candidates))
        data = {"served": True, **self.viewed.meta(), "window": self.positions}
        self.page = page_html(data).encode()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no number from 0 to 65535"
            raise InvalidInputError(
                f"port {port} of {ADDRESS} cannot be had: {reason}; choose another one, or 0 for any that is free"
            ) from error

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def hosts(self) -> set[str]:
        """What a browser that means this server says in `Host`."""
        names = (ADDRESS, "localhost")
        return {f"{name}:{self.server_port}" for name in names} | (set(names) if self.server_port == 80 else set())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that went away: that is no fault."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(
    dataset: Dataset,
    port: int = 0,
    *,
    ready: Callable[[str], object] = lambda url: None,  # noqa: ARG005
    **options: Any,
) -> None:
    """Serve a dataset on loopback until the process is interrupted.

    Args:
        dataset: the dataset.
        port: on 127.0.0.1; 0 takes any that is free.
        ready: called with the address once it can be asked.
        options: as for `Server`, which also says what is raised.
    """
    with Server(dataset, port, **options) as server:
        try:
            ready(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            return


class _Problem(Exception):  # noqa: N818 - an answer rather than a failure
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        self.status = status
        super().__init__(message)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS

    def do_GET(self) -> None:
        if self.headers.get("Content-Length") or self.headers.get("Transfer-Encoding"):
            self.close_connection = True  # a body that nobody reads must not pass for the next request
        try:
            kind, body = self._answer()
            self._send(HTTPStatus.OK, kind, body)
        except _Problem as problem:
            self._fail(problem.status, str(problem))
        except (RowIndexError, SequenceNotFoundError) as error:
            self._fail(HTTPStatus.NOT_FOUND, str(error))
        except InvalidInputError as error:
            self._fail(HTTPStatus.BAD_REQUEST, str(error))
        except LogitStoreError as error:
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    do_HEAD = do_GET  # noqa: N815 - as http.server names them

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """What http.server itself finds wrong with a request, in our own form."""
        unknown = code == HTTPStatus.NOT_IMPLEMENTED
        status = HTTPStatus.METHOD_NOT_ALLOWED if unknown else HTTPStatus(code)
        self.close_connection = True
        self._fail(status, "only GET and HEAD are answered" if unknown else status.phrase)

    def version_string(self) -> str:
        """The server's name, without that of its language."""
        return "logitstore"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: the terminal is the user's."""

    def _answer(self) -> tuple[str, bytes]:
        if self.headers.get("Host", "").lower() not in self.server.hosts():
            self.close_connection = True
            raise _Problem(HTTPStatus.MISDIRECTED_REQUEST, f"this server answers to {self.server.url} only")
        try:
            url = urlsplit(self.path)
        except ValueError as error:
            raise _Problem(HTTPStatus.BAD_REQUEST, "the address cannot be read") from error
        if url.path == "/":
            return "text/html; charset=utf-8", self.server.page
        routes = {"/api/rows": self._rows, "/api/row": self._row, "/api/sequence": self._sequence}
        if url.path not in routes:
            raise _Problem(HTTPStatus.NOT_FOUND, "there is nothing here")
        return "application/json", msgspec.json.encode(routes[url.path](_parameters(url.query)))

    def _rows(self, given: dict[str, str]) -> dict[str, Any]:
        dataset = self.server.viewed.split(given.get("split"))
        start = _number(given, "start", 0)
        limit = min(_LISTED, _number(given, "limit", 50))
        view = dataset[start : start + limit].select([])
        lengths = view.lengths().tolist() if len(view) else []
        rows = [
            {"row": start + i, "id": sequence.id, "positions": length}
            for i, (sequence, length) in enumerate(zip(view, lengths, strict=True))
        ]
        return {"total": len(dataset), "rows": rows}

    def _row(self, given: dict[str, str]) -> dict[str, Any]:
        if "id" not in given:
            raise _Problem(HTTPStatus.BAD_REQUEST, "the parameter id is missing")
        return {"row": self.server.viewed.split(given.get("split")).row_of(given["id"])}

    def _sequence(self, given: dict[str, str]) -> dict[str, Any]:
        viewed = self.server.viewed
        row, start = _number(given, "row", None), _number(given, "start", 0)
        dataset = viewed.split(given.get("split"))
        sequence, tokens = dataset[row], viewed.tokens()
        last = max(0, len(sequence) - 1)
        start = min(start, last - last % self.server.positions)  # beyond the end: the last part
        data = viewed.sequence(sequence, row, tokens, start, self.server.positions)
        return {"sequence": data, "tokens": tokens.as_data()}

    def _fail(self, status: HTTPStatus, message: str) -> None:
        self._send(status, "application/json", json.dumps({"error": message}).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy(served=True))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _parameters(query: str) -> dict[str, str]:
    try:
        given = parse_qs(query, keep_blank_values=True, errors="strict", max_num_fields=8)
    except ValueError as error:  # UnicodeDecodeError is one
        raise _Problem(HTTPStatus.BAD_REQUEST, f"the parameters cannot be read: {error}") from error
    return {name: values[-1] for name, values in given.items()}


def _number(given: dict[str, str], name: str, default: int | None) -> int:
    text = given.get(name, "" if default is None else str(default))
    if not _NUMBER.fullmatch(text):
        raise _Problem(HTTPStatus.BAD_REQUEST, f"{name} has to be a whole number from 0")
    return int(text)
