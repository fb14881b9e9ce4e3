"""Content: held in memory while small, in a file of a temporary folder once larger."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_NUMBERS = itertools.count()
_STEP = 1 << 18


@dataclass(frozen=True)
class Blob:
    """Bytes that do not change: in memory (`data`) or in a file (`path`)."""

    size: int
    data: bytes | None = None
    path: Path | None = None

    @classmethod
    def of(cls, data: bytes) -> Blob:
        return cls(size=len(data), data=data)

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        assert self.path is not None
        return self.path.read_bytes()


@dataclass(frozen=True)
class Slice:
    """The bytes start to stop of a blob."""

    blob: Blob
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, length: int) -> Slice:
        return Slice(self.blob, self.start, self.start + min(length, len(self)))

    def chunks(self, step: int = _STEP) -> Iterator[memoryview]:
        """The bytes in pieces of at most `step`, none of them a copy of the whole."""
        if self.blob.data is not None:
            view = memoryview(self.blob.data)[self.start : self.stop]
            for at in range(0, len(view), step):
                yield view[at : at + step]
            return
        assert self.blob.path is not None
        with self.blob.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            left = len(self)
            while left:
                chunk = file.read(min(step, left))
                if not chunk:
                    raise EOFError(f"{self.blob.path} is shorter than its blob")
                left -= len(chunk)
                yield memoryview(chunk)


class Spool:
    """Takes the bytes of a blob as they come, and hashes them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._small = bytearray()
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, chunk: bytes | memoryview) -> None:
        self._hash.update(chunk)
        self.size += len(chunk)
        if self._file is None and self.size > self._limit:
            self._path = self._folder / f"blob-{next(_NUMBERS)}"
            self._file = self._path.open("wb")
            self._file.write(self._small)
            self._small.clear()
        if self._file is None:
            self._small += chunk
        else:
            self._file.write(chunk)

    def finish(self) -> tuple[Blob, str]:
        """The blob and its SHA-256."""
        if self._file is None:
            blob = Blob.of(bytes(self._small))
        else:
            self._file.close()
            blob = Blob(size=self.size, path=self._path)
        return blob, self._hash.hexdigest()

    def discard(self) -> None:
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
