"""Bytes of files: mapped reading, and writing that survives a crash."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import pyarrow as pa

from logitstore.errors import CorruptDataError, DatasetExistsError, SourceNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from logitstore.io.source import Accept, Part

OPENING_BYTES: Final = 64 * 2**10
"""One read of this many bytes at the end opens a typical shard."""

SYNC_BYTES: Final = 64 * 2**20
"""Written bytes are synced to the disk at the latest after this many."""

SYNC_SECONDS: Final = 10.0
"""Written bytes are synced at the latest after this many seconds of writing."""


class MappedFile:
    """A file in memory by `mmap`: reading copies nothing, and no file descriptor is held.

    Raises:
        CorruptDataError: not a regular file.
        SourceNotFoundError: no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        if regular_size(path) == 0:
            self._buffer = pa.py_buffer(b"")
        else:
            with pa.memory_map(self.path) as file:
                self._buffer = file.read_buffer()  # keeps the mapping alive without the descriptor
        self.size = self._buffer.size
        self.opening = min(OPENING_BYTES, self.size)
        self.mapped = True

    def read(self, offset: int, length: int, accept: Accept | None = None) -> pa.Buffer:  # noqa: ARG002
        """These bytes, without a copy; reading them again would not change them."""
        return self._buffer.slice(offset, length)

    def read_together(self, parts: Sequence[Part]) -> list[pa.Buffer]:
        """Several parts, without a copy."""
        return [self.read(*part) for part in parts]


def regular_size(path: Path) -> int:
    """Size of a regular file in bytes.

    Raises:
        CorruptDataError: a directory, device or pipe.
        SourceNotFoundError: no such file.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceNotFoundError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # a name too long, a loop of links, no permission, a zero byte
        raise CorruptDataError(f"cannot be read: {error}", code="file-kind", path=str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        raise CorruptDataError("not a regular file", code="file-kind", path=str(path))
    return status.st_size


def read_limited(path: Path, limit: int) -> bytes:
    """The whole of a small file.

    Raises:
        CorruptDataError: it is larger than the limit, or no regular file.
        SourceNotFoundError: no such file.
    """
    size = regular_size(path)
    if size > limit:
        raise CorruptDataError(f"{size} bytes, more than the limit of {limit}", code="file-size", path=str(path))
    return path.read_bytes()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (a rename is not, until this)."""
    if os.name == "nt":  # Windows has no way to open a directory for this
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Create or replace a file so that after a crash it is the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


class DurableFile:
    """A file that grows under a temporary name, is synced in groups, and gets its name when it is complete.

    Use as a context manager: leaving it without `publish` leaves the temporary file for `logitstore recover`.

    Raises:
        DatasetExistsError: another writer's temporary file is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(path.name + ".partial")
        try:
            self._file = self.temporary.open("xb", buffering=0)
        except FileExistsError:
            raise DatasetExistsError(
                f"{self.temporary} is there: another writer is at work, or one was stopped; wait for it, or overwrite "
                f"the dataset (--overwrite)"
            ) from None
        self._hash = hashlib.sha256()
        self._unsynced = 0
        self._synced_at = time.monotonic()
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def sha256(self) -> str:
        """Of all bytes so far, in hexadecimal."""
        return self._hash.hexdigest()

    def write(self, data: bytes | pa.Buffer) -> None:
        """Append, and sync when enough bytes or seconds have gathered."""
        view = memoryview(data)
        written = 0
        while written < len(view):
            written += self._file.write(view[written:])
        self._hash.update(view)
        self.size += len(view)
        self._unsynced += len(view)
        self.sync_if_due()

    def sync_if_due(self) -> None:
        """Sync when the bytes not yet synced are too many or too old."""
        if self._unsynced >= SYNC_BYTES or (self._unsynced and time.monotonic() - self._synced_at >= SYNC_SECONDS):
            self.sync()

    def sync(self) -> None:
        """Make all bytes so far durable."""
        os.fsync(self._file.fileno())
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def publish(self) -> None:
        """Sync, close, and give the file its name."""
        self.sync()
        self._file.close()
        self.temporary.replace(self.path)
        sync_directory(self.path.parent)

    def close(self) -> None:
        """Close without publishing; does nothing when it is closed already."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()
