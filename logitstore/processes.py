"""Work on many things, in this process or in several: what comes out is the same, in the same order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
            waiting.append(pool.submit(_work, one))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InvalidInputError(
            f"a worker ended before its time, perhaps for want of memory ({error}); go on with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_task: tuple[Callable[[Any, Any], Any], Any] | None = None


def _begin(work: Callable[[Any, Any], Any], state: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    global _task  # noqa: PLW0603 - sent once to a worker, not with each thing: it may be large
    _task = work, state


def _work(one: Any) -> Any:
    if _task is None:
        raise InvalidInputError("a worker was not told what to do")
    work, state = _task
    return work(state, one)
