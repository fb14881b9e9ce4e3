"""Reads that were started before they were asked for, in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

THREADS: Final = 32
"""Requests of a process that may be under way at once: their time is that of the network."""

LIMIT: Final = 256
"""Results that nobody took; the oldest is given up when there are more."""

_pools: dict[int, ThreadPoolExecutor] = {}


class Ahead:
    """Calls under way, each by a key, until somebody takes their results.

    Threads of a parent do not live on in a forked child, so that a child starts anew.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._futures: dict[Hashable, Future[Any]] = {}

    def _mine(self) -> dict[Hashable, Future[Any]]:
        if self._process != os.getpid():
            self._process, self._futures = os.getpid(), {}
        return self._futures

    def start(self, key: Hashable, call: Callable[..., Any], *args: Any) -> None:
        """Start a call, unless one with this key is there."""
        futures = self._mine()
        if key in futures:
            return
        while len(futures) >= LIMIT:
            self.forget([next(iter(futures))])
        futures[key] = _pool().submit(call, *args)

    def take(self, key: Hashable) -> Any:
        """The result of a call, when it is there; None where none was started. What it raised is raised."""
        future = self._mine().pop(key, None)
        return None if future is None or future.cancel() else future.result()

    def done(self, key: Hashable) -> Any:
        """The result of a call that has ended well; it can still be taken. Else None."""
        future = self._mine().get(key)
        ended = future is not None and future.done() and not future.cancelled() and future.exception() is None
        return future.result() if future is not None and ended else None

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Give calls up."""
        for key in keys:
            future = self._mine().pop(key, None)
            if future is not None:
                future.cancel()


def _pool() -> ThreadPoolExecutor:
    """The threads of this process."""
    process = os.getpid()
    if process not in _pools:
        _pools.clear()
        _pools[process] = ThreadPoolExecutor(THREADS, "logitstore")
    return _pools[process]
