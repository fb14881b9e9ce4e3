"""The log of requests."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One request as it was answered.

    `status` is 0 if the connection was closed without an answer. `sent` and `received` count bytes of bodies.
    `time` is time.time() at its arrival.
    """

    origin: str
    method: str
    path: str
    query: str
    authorization: bool
    range: str | None
    status: int
    sent: int
    received: int
    time: float


@dataclass
class Record:
    """A request whose answer is still on its way: `sent` grows."""

    origin: str
    method: str
    path: str
    query: str
    authorization: bool
    range: str | None
    time: float
    received: int = 0
    status: int = 0
    sent: int = 0

    def freeze(self) -> Request:
        return Request(**vars(self))


class Journal:
    """Requests in the order in which they were answered.

    A request is noted before the first byte of its answer leaves, so that a client that has its answer finds the
    request in the log.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[Record] = []

    def note(self, record: Record) -> None:
        with self._lock:
            self._records.append(record)

    def requests(self) -> list[Request]:
        with self._lock:
            return [record.freeze() for record in self._records]

    def clear(self) -> None:
        with self._lock:
            self._records.clear()
