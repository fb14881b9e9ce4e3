"""Faults that a test asks for."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

REQUEST_KINDS = frozenset({"status", "drop", "drop-upload", "lost-reply", "delay"})
BODY_KINDS = frozenset({"drop-body", "truncate", "flip"})


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with which requests.

    Kinds that hit a request:
        status: answered with `status` and `headers`, not performed.
        drop: read, not performed, and the connection closed before any byte of an answer.
        drop-upload: `after` bytes of the request's body are read, then the connection is closed.
        lost-reply: performed, then the connection is closed without an answer.
        delay: answered `seconds` later; other faults may hit it as well.

    Kinds that hit an answer; only one of status 2xx whose body is longer than `after` counts as matching:
        drop-body: its headers and `after` bytes of the body are sent, then the connection is closed.
        truncate: the body ends after `after` bytes and Content-Length says so; Content-Range still claims all.
        flip: the lowest bit of the body's byte number `after` is flipped.

    Args:
        kind: One of the above.
        origin: "hub", "storage" or None for both.
        method: Such as "GET"; None for any.
        path: Regular expression searched in the path, without the query.
        times: How many matching requests are hit; None for all.
        skip: How many matching requests pass first.
        status: For "status".
        headers: For "status".
        after: Bytes, see above.
        seconds: For "delay".
        chance: Probability that a matching request is hit (after `skip`).
        seed: Of the random numbers behind `chance`.
        reset: Close with a TCP reset instead of an orderly end. Data on its way may be lost with it.
    """

    kind: str
    origin: str | None = None
    method: str | None = None
    path: str = ""
    times: int | None = 1
    skip: int = 0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int = 0
    seconds: float = 0.0
    chance: float = 1.0
    seed: int = 0
    reset: bool = False

    def __post_init__(self) -> None:
        if self.kind not in REQUEST_KINDS | BODY_KINDS:
            raise ValueError(f"unknown kind of fault {self.kind!r}")
        if self.origin not in {None, "hub", "storage"}:
            raise ValueError(f"unknown origin {self.origin!r}")


class Armed:
    """A fault at work. `hits` says how many requests it has hit, `seen` how many have matched."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.hits = 0
        self.seen = 0
        self._path = re.compile(fault.path)
        self._random = random.Random(fault.seed)

    def matches(self, origin: str, method: str, path: str) -> bool:
        fault = self.fault
        return (
            fault.origin in {None, origin}
            and fault.method in {None, method}
            and (fault.times is None or self.hits < fault.times)
            and self._path.search(path) is not None
        )

    def strike(self) -> bool:
        """Counts a matching request; whether it is hit."""
        self.seen += 1
        if self.seen <= self.fault.skip or (self.fault.chance < 1 and self._random.random() >= self.fault.chance):
            return False
        self.hits += 1
        return True


class Faults:
    """All faults at work. Of several that match, the first asked for goes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: list[Armed] = []

    def add(self, fault: Fault) -> Armed:
        armed = Armed(fault)
        with self._lock:
            self._armed.append(armed)
        return armed

    def clear(self) -> None:
        with self._lock:
            self._armed.clear()

    def all(self) -> list[Armed]:
        with self._lock:
            return list(self._armed)

    def of_request(self, origin: str, method: str, path: str) -> tuple[Fault | None, float]:
        """The fault that hits a request, if any, and for how long the answer is delayed."""
        delay = 0.0
        with self._lock:
            for armed in self._armed:
                kind = armed.fault.kind
                if kind in REQUEST_KINDS and armed.matches(origin, method, path) and armed.strike():
                    if kind != "delay":
                        return armed.fault, delay
                    delay += armed.fault.seconds
        return None, delay

    def of_body(self, origin: str, method: str, path: str, length: int) -> Fault | None:
        """The fault that hits an answer of that many bytes, if any."""
        with self._lock:
            for armed in self._armed:
                fault = armed.fault
                if (
                    fault.kind in BODY_KINDS
                    and fault.after < length
                    and armed.matches(origin, method, path)
                    and armed.strike()
                ):
                    return fault
        return None
