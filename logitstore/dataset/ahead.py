"""Reads that were started before they were asked for, in threads."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Final

from logitstore.io.ending import ending

THREADS: Final = 16
"""Requests of a process that may be under way at once: their time is that of the network."""

LIMIT: Final = 1024
"""Results that nobody took; the oldest is given up when there are more."""

_END_SECONDS: Final = 1.0


class Ahead:
    """Calls under way, until somebody takes their results: a call gives several, one for each of its keys.

    Threads of a parent do not live on in a forked child, so that a child starts anew. A call must not wait for another
    one's result: all threads might.
    """

    def __init__(self) -> None:
        self._fresh()

    def _fresh(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._futures: dict[Hashable, tuple[Future[Any], int]] = {}

    def _mine(self) -> dict[Hashable, tuple[Future[Any], int]]:
        if self._process != os.getpid():
            self._fresh()
        return self._futures

    def __contains__(self, key: Hashable) -> bool:
        return key in self._mine()

    def __len__(self) -> int:
        """Results that nobody took."""
        return len(self._mine())

    def start(self, keys: Sequence[Hashable], call: Callable[..., Sequence[Any]], *args: Any) -> None:
        """Start a call that gives a result for each key."""
        futures = self._mine()
        future: Future[Any] = Future()
        given_up: list[Future[Any]] = []
        with self._lock:
            while len(futures) >= LIMIT:
                given_up.append(futures.pop(next(iter(futures)))[0])
            futures.update((key, (future, number)) for number, key in enumerate(keys))
        for other in given_up:
            other.cancel()
        _crews.setdefault(os.getpid(), _Crew()).start(future, call, args)

    def take(self, key: Hashable) -> Any:
        """A result, when it is there; None where no call was started, or it failed: ask anew then.

        What was asked for ahead and failed may work now; and who does not ask for it should not hear of it. A call that
        is under way is waited for, and what it raises is raised.
        """
        future, number = self._pop(key)
        if future is None or (future.done() and (future.cancelled() or future.exception() is not None)):
            return None
        try:
            return future.result()[number]
        except CancelledError:  # another thread gave up the group that it belongs to
            return None

    def done(self, key: Hashable) -> Any:
        """The result of a call that has ended well; it can still be taken. Else None."""
        future, number = self._mine().get(key, (None, 0))
        if future is None or not future.done() or future.cancelled() or future.exception() is not None:
            return None
        return future.result()[number]

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Give results up, and calls that have not begun."""
        for key in keys:
            future, _ = self._pop(key)
            if future is not None:
                future.cancel()

    def _pop(self, key: Hashable) -> tuple[Future[Any] | None, int]:
        futures = self._mine()
        with self._lock:
            return futures.pop(key, (None, 0))


class _Crew:
    """Daemon threads that make calls; started when they are needed."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.busy: set[int] = set()

    def start(self, future: Future[Any], call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Have a call made, and its future told."""
        self._todo.put((future, call, args))
        if len(self._threads) < THREADS:
            thread = threading.Thread(target=self._work, name="logitstore-ahead", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        own = threading.get_ident()
        while True:
            future, call, args = self._todo.get()
            if ending.is_set() or not future.set_running_or_notify_cancel():
                continue
            self.busy.add(own)
            try:
                future.set_result(call(*args))
            except BaseException as error:  # noqa: BLE001 - raised where the result is taken
                future.set_exception(error)
            finally:
                self.busy.discard(own)
            del future, call, args  # not kept alive until the next call


_crews: dict[int, _Crew] = {}
"""The threads of each process: its own, and in a forked child its parents', which are not there."""


def _end() -> None:
    """Tell the threads that the program ends, and give them a moment to come out of foreign code."""
    ending.set()
    crew, end = _crews.get(os.getpid()), time.monotonic() + _END_SECONDS
    while crew is not None and crew.busy and time.monotonic() < end:
        time.sleep(0.01)


atexit.register(_end)
