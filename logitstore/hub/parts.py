"""Files that are fetched in segments by several threads, and go on where a killed process was.

Until a file is whole, there are two in the working directory: `<sha256>.part` with its bytes, of the file's length from
the beginning, and `<sha256>.log`, which says for each segment how many of its bytes are there (u64, little-endian). A
buffer is written first and counted after, so that a killed process loses no more than its buffers. Whole and verified,
the bytes get the name `<sha256>`: names say what is in a file, and nothing of another dataset mixes in.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from logitstore.errors import CorruptDataError, RemoteError
from logitstore.io import sha256_file

SEGMENT: Final = 8 * 2**20
FETCHERS: Final = 8
BUFFER: Final = 2**18
ATTEMPTS: Final = 3
_COUNT: Final = np.dtype("<u8")


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
        """Whether it was fetched and verified before."""
        return self.whole.is_file() and self.whole.stat().st_size == self.file.size

    def begin(self) -> int:
        """Make the two files, or find how far they are: bytes that are there."""
        log = self._log.read_bytes() if self._log.is_file() and self._data.is_file() else b""
        counts = np.frombuffer(log[: len(log) // 8 * 8], _COUNT)
        known = len(counts) == self.segments and self._data.stat().st_size == self.file.size
        if not known or any(int(count) > self.length(number) for number, count in enumerate(counts)):
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
                view = memoryview(part)
                while view:
                    view = view[data.write(view) :]
                have += len(part)
                log.seek(segment * _COUNT.itemsize)
                log.write(have.to_bytes(_COUNT.itemsize, "little"))
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
            self._log.unlink()
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
        with contextlib.suppress(FileNotFoundError):
            self._log.unlink()
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
    stopped = threading.Event()
    queue = _steps(files, got)
    again: list[tuple[Parts, int]] = []
    running: dict[Future[bool], tuple[Parts, int]] = {}

    def wanted() -> bool:
        return not stopped.is_set() and threading.main_thread().is_alive()

    with ThreadPoolExecutor(FETCHERS, "logitstore-pull") as pool:
        try:
            while True:
                while len(running) < 2 * FETCHERS and (step := again.pop() if again else next(queue, None)):
                    parts, segment = step
                    call = (
                        (parts.fetch, segment, fetch, got, wanted)
                        if segment >= 0
                        else (parts.finish, where(parts.file.path))
                    )
                    running[pool.submit(*call)] = step
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    parts, segment = running.pop(future)
                    if segment >= 0:
                        again += [(parts, -1)] if future.result() else []
                    elif not future.result():
                        again += _begun(parts, got)
        finally:
            stopped.set()
            for future in running:
                future.cancel()


def _steps(files: Iterable[Parts], got: Callable[[int], None]) -> Iterator[tuple[Parts, int]]:
    """The segments of all files in order; -1 stands for finishing a file that has none."""
    for parts in files:
        yield from _begun(parts, got)


def _begun(parts: Parts, got: Callable[[int], None]) -> list[tuple[Parts, int]]:
    had = parts.begin()
    got(had if parts.attempts == 0 else had - parts.file.size)
    return [(parts, segment) for segment in range(parts.segments)] or [(parts, -1)]
