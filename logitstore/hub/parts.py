"""Files that are fetched in segments by several threads, and go on where a killed process was.

Until a file is whole, there are two in the working directory: `<sha256>.part` with its bytes, of the file's length from
the beginning, and `<sha256>.log`, which says for each segment how many of its bytes are there (u64, little-endian). A
buffer is written first and counted after, so that a killed process loses no more than its buffers. Whole and verified,
the bytes get the name `<sha256>`: names say what is in a file, and nothing of another dataset mixes in.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptDataError, RemoteError
from logitstore.io import sha256_file

SEGMENT: Final = 8 * 2**20
FETCHERS: Final = 8
BUFFER: Final = 2**18
ATTEMPTS: Final = 3
_COUNT: Final = np.dtype("<u8")
_STOP_SECONDS: Final = 1.0


class Fetch(Protocol):
    """Hands a range of a file to a sink, as long as it is wanted."""

    def __call__(
        self,
        path: str,
        offset: int,
        length: int,
        sink: Callable[[bytes], None],
        wanted: Callable[[], bool],
        /,
    ) -> None:
        """Raises what its source raises."""


@dataclass(frozen=True)
class Wanted:
    """A file to be fetched.

    Attributes:
        path: in the dataset.
        size: in bytes.
        sha256: of its bytes.
    """

    path: str
    size: int
    sha256: str

    def is_at(self, path: Path) -> bool:
        """Whether a file is this one."""
        return path.is_file() and path.stat().st_size == self.size and sha256_file(path) == self.sha256


class Parts:
    """One file on its way.

    Args:
        work: the working directory.
        file: what is wanted.
    """

    def __init__(self, work: Path, file: Wanted) -> None:
        self.file = file
        self.whole = work / file.sha256
        self._data = work / f"{file.sha256}.part"
        self._log = work / f"{file.sha256}.log"
        self.segments = -(-file.size // SEGMENT)
        self.attempts = 0
        self._left = 0
        self._lock = threading.Lock()

    @property
    def is_whole(self) -> bool:
        """Whether it was fetched before, and has not been damaged since."""
        return self.file.is_at(self.whole)

    @property
    def there(self) -> int:
        """Bytes that were fetched before."""
        counts = self._recorded()
        return 0 if counts is None else int(counts.sum())

    def _recorded(self) -> NDArray[np.uint64] | None:
        """What the log says; None where the two files are not both there, or not of this file."""
        try:
            log, size = self._log.read_bytes(), self._data.stat().st_size
        except FileNotFoundError:
            return None
        if len(log) != self.segments * _COUNT.itemsize or size != self.file.size:
            return None
        counts = np.frombuffer(log, _COUNT)
        fits = all(int(count) <= self.length(number) for number, count in enumerate(counts))
        return counts if fits else None

    def begin(self) -> int:
        """Make the two files, or find how far they are: bytes that are there."""
        counts = self._recorded()
        if counts is None:
            counts = np.zeros(self.segments, _COUNT)
            self._log.write_bytes(counts.tobytes())
            with self._data.open("wb") as data:
                data.truncate(self.file.size)
        self._counts = counts.copy()
        self._left = self.segments
        return int(counts.sum())

    def length(self, segment: int) -> int:
        """Bytes of a segment."""
        return min(SEGMENT, self.file.size - segment * SEGMENT)

    def fetch(self, segment: int, fetch: Fetch, got: Callable[[int], None], wanted: Callable[[], bool]) -> bool:
        """Fetch what is missing of a segment; whether it was the last one of the file."""
        have = int(self._counts[segment])
        start, length = segment * SEGMENT, self.length(segment)
        with self._data.open("rb+", buffering=0) as data, self._log.open("rb+", buffering=0) as log:
            data.seek(start + have)

            def take(part: bytes) -> None:
                nonlocal have
                if not wanted():
                    raise RemoteError("stopped")
                try:
                    view = memoryview(part)
                    while view:
                        view = view[data.write(view) :]
                    have += len(part)
                    log.seek(segment * _COUNT.itemsize)
                    log.write(have.to_bytes(_COUNT.itemsize, "little"))
                except OSError as error:  # a full disk does not say where
                    raise OSError(error.errno, error.strerror, str(self._data)) from error
                got(len(part))

            fetch(self.file.path, start + have, length - have, take, wanted)
            with self._lock:
                self._left -= 1
                return self._left == 0

    def finish(self, where: str) -> bool:
        """Verify the bytes and give them their name; False when they are damaged and must come again.

        Raises:
            CorruptDataError: they were damaged several times.
        """
        self.attempts += 1
        if sha256_file(self._data) != self.file.sha256:
            self._log.unlink(missing_ok=True)
            if self.attempts >= ATTEMPTS:
                raise CorruptDataError(
                    f"fetched {ATTEMPTS} times, its sha256 is never that of the manifest; what is stored there is "
                    f"damaged, ask its publisher",
                    code="shard-sha256",
                    path=where,
                )
            return False
        with self._data.open("rb+") as data:
            os.fsync(data.fileno())
        self._data.replace(self.whole)
        self._log.unlink(missing_ok=True)
        return True


def fetch_all(
    files: Iterable[Parts],
    fetch: Fetch,
    where: Callable[[str], str],
    got: Callable[[int], None],
) -> None:
    """Fetch files, several segments at a time, until each is whole.

    Args:
        files: those that are not whole.
        fetch: gives a range.
        where: full name of a file, for messages.
        got: told how many bytes came, from several threads; negative where they must come again.

    Raises:
        CorruptDataError: a file is damaged at its source.
        RemoteError: the source cannot be reached, or breaks off again and again.
        OSError: the disk is full, or refuses.
    """
    steps = _steps(files, got)
    again: list[_Step] = []
    with _Crew(lambda crew, step: _act(crew, step, fetch, where, got)) as crew:
        while True:
            while crew.running < 2 * FETCHERS and (step := again.pop() if again else next(steps, None)):
                crew.start(step)
            if not crew.running:
                return
            (parts, segment), outcome = crew.next()
            if segment >= 0:
                again += [(parts, -1)] if outcome else []
            elif not outcome:
                again += _begun(parts, got)


_Step = tuple[Parts, int]
"""A segment of a file; -1 to verify it when all are there."""


class _Crew:
    """Threads that take steps.

    They are not those of a pool: an interpreter that ends waits for such, and they may be waiting for a server. Nobody
    waits long for these: whoever comes late writes nothing any more.
    """

    def __init__(self, act: Callable[[_Crew, _Step], bool]) -> None:
        self._act = act
        self._stopped = threading.Event()
        self._todo: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_Step, bool | BaseException]] = queue.SimpleQueue()
        names = (f"logitstore-pull-{number}" for number in range(FETCHERS))
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        self.running = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopped.set()
        end = time.monotonic() + _STOP_SECONDS
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))

    def wanted(self) -> bool:
        """Whether what they do still is."""
        return not self._stopped.is_set() and threading.main_thread().is_alive()

    def start(self, step: _Step) -> None:
        """Have a step taken."""
        self._todo.put(step)
        if self.running < FETCHERS and self._threads[self.running].ident is None:
            self._threads[self.running].start()
        self.running += 1

    def next(self) -> tuple[_Step, bool]:
        """A step that was taken, and its outcome; what it raised is raised."""
        while True:
            try:
                step, outcome = self._done.get(timeout=0.5)  # on Windows, nothing interrupts a long wait
            except queue.Empty:
                continue
            self.running -= 1
            if isinstance(outcome, BaseException):
                raise outcome
            return step, outcome

    def _work(self) -> None:
        while (step := self._todo.get()) is not None and self.wanted():
            try:
                self._done.put((step, self._act(self, step)))
            except BaseException as error:  # noqa: BLE001 - raised where the outcome is taken
                self._done.put((step, error))


def _act(crew: _Crew, step: _Step, fetch: Fetch, where: Callable[[str], str], got: Callable[[int], None]) -> bool:
    parts, segment = step
    if segment < 0:
        return parts.finish(where(parts.file.path))
    return parts.fetch(segment, fetch, got, crew.wanted)


def _steps(files: Iterable[Parts], got: Callable[[int], None]) -> Iterator[_Step]:
    """The segments of all files in order."""
    for parts in files:
        yield from _begun(parts, got)


def _begun(parts: Parts, got: Callable[[int], None]) -> list[_Step]:
    had = parts.begin()
    got(had if parts.attempts == 0 else had - parts.file.size)
    return [(parts, segment) for segment in range(parts.segments)] or [(parts, -1)]
