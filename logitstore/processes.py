"""Work on many things, in this process or in several: what comes out is the same, in the same order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from logitstore.errors import InvalidInputError

_AHEAD: Final = 2  # things that each worker has waiting: bounds memory, and keeps it busy

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


def cores() -> int:
    """How many processes can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(work: Callable[[Any, _Given], _Made], state: Any, given: Iterable[_Given], workers: int) -> Generator[_Made]:
    """`work(state, one)` of each thing given, in order.

    Args:
        work: a function of a module.
        state: sent once to each process.
        given: asked for as it is needed, a few ahead.
        workers: processes; 0: this one does it.

    Raises:
        InvalidInputError: a process was killed; else what `work` raises.
    """
    if workers == 0:
        for one in given:
            yield work(state, one)
        return
    # Spawned, not forked: a copy of a process with threads, as Arrow's, may wait for ever for a lock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work, state))
    waiting: deque[Future[Any]] = deque()
    try:
        for one in given:
            with _uninterrupted():
                waiting.append(pool.submit(_work, one))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InvalidInputError(
            f"a worker ended before its time, perhaps for want of memory ({error}); go on with fewer --workers"
        ) from error
    except BaseException:
        with _uninterrupted():
            if os.name == "posix":  # elsewhere this would end a process while it sends, and leave us waiting
                for process in list((pool._processes or {}).values()):
                    process.terminate()
        raise
    finally:
        with _uninterrupted():
            pool.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait, and keeps it from processes that begin meanwhile: they inherit the mask."""
    masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    first = threading.current_thread() is threading.main_thread()  # the only one that Ctrl-C interrupts
    came: list[int] = []
    if masks:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if first:  # the signal may come to another thread, and would interrupt this one all the same
        before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        if first:
            signal.signal(signal.SIGINT, before)
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(signal.SIGINT)


class _Stopped(Exception):  # noqa: N818 - an order rather than an error
    """What is under way in a worker is not wanted any more."""


class _Worker:
    """What a worker does, again and again, until it is told to stop."""

    def __init__(self, work: Callable[[Any, Any], Any], state: Any) -> None:
        self.work, self.state = work, state
        self.busy = self.stopped = False
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, _number: int, _frame: Any) -> None:
        """Leave the work at once; but not while a result is being sent, whose rest would be waited for."""
        self.stopped = True
        if self.busy:
            raise _Stopped

    def __call__(self, one: Any) -> Any:
        self.busy = True
        try:
            if self.stopped:
                raise _Stopped
            return self.work(self.state, one)
        finally:
            self.busy = False


_worker: Callable[[Any], Any] | None = None


def _begin(work: Callable[[Any, Any], Any], state: Any) -> None:
    global _worker  # noqa: PLW0603 - sent once to a worker, not with each thing: it may be large
    _worker = _Worker(work, state)


def _work(one: Any) -> Any:
    if _worker is None:
        raise InvalidInputError("a worker was not told what to do")
    return _worker(one)
