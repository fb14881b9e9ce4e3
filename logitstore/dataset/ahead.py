"""Reads that were started before they were asked for, in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

THREADS: Final = 16
"""Requests of a process that may be under way at once: their time is that of the network."""

LIMIT: Final = 1024
"""Results that nobody took; the oldest is given up when there are more."""

_pools: dict[int, ThreadPoolExecutor] = {}


class Ahead:
    """Calls under way, until somebody takes their results: a call gives several, one for each of its keys.

    Threads of a parent do not live on in a forked child, so that a child starts anew.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._futures: dict[Hashable, tuple[Future[Any], int]] = {}

    def _mine(self) -> dict[Hashable, tuple[Future[Any], int]]:
        if self._process != os.getpid():
            self._process, self._futures = os.getpid(), {}
        return self._futures

    def __contains__(self, key: Hashable) -> bool:
        return key in self._mine()

    def start(self, keys: Sequence[Hashable], call: Callable[..., Sequence[Any]], *args: Any) -> None:
        """Start a call that gives a result for each key."""
        futures = self._mine()
        while len(futures) >= LIMIT:
            self.forget([next(iter(futures))])
        future = _pool().submit(call, *args)
        futures.update((key, (future, number)) for number, key in enumerate(keys))

    def take(self, key: Hashable) -> Any:
        """A result, when it is there; None where no call was started. What the call raised is raised."""
        future, number = self._mine().pop(key, (None, 0))
        return None if future is None or future.cancelled() else future.result()[number]

    def done(self, key: Hashable) -> Any:
        """The result of a call that has ended well; it can still be taken. Else None."""
        future, number = self._mine().get(key, (None, 0))
        if future is None or not future.done() or future.cancelled() or future.exception() is not None:
            return None
        return future.result()[number]

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Give results up, and calls that have not begun."""
        for key in keys:
            future, _ = self._mine().pop(key, (None, 0))
            if future is not None:
                future.cancel()


def _pool() -> ThreadPoolExecutor:
    """The threads of this process."""
    process = os.getpid()
    if process not in _pools:
        _pools.clear()
        _pools[process] = ThreadPoolExecutor(THREADS, "logitstore")
    return _pools[process]
