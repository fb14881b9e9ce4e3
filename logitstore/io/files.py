"""Bytes of files: mapped reading, and writing that survives a crash."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import pyarrow as pa

from logitstore.errors import CorruptDataError, DatasetExistsError, SourceNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
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
            # As bytes: a name need not be UTF-8.
            with pa.memory_map(os.fsencode(path)) as file:
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


def make_directory(path: Path) -> None:
    """Make a directory and those above it, durably; it may be there."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    sync_directory(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Create or replace a file so that after a crash it is the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def partial_path(path: Path) -> Path:
    """The name of a file while it is written."""
    return path.with_name(path.name + ".partial")


def _no_link(path: str, flags: int) -> int:
    """Nothing is written through a link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class GrowingFile:
    """A file that is only appended to; a context manager.

    Args:
        path: the file.
        keep: bytes of it that are kept where it is there, and the rest cut off; None makes a new one.

    Raises:
        DatasetExistsError: a new one is to be made, and it is there.
        OSError: the disk is full, say; the error names the file.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path = path
        try:
            mode = "xb" if keep is None else "r+b"
            self._file = open(path, mode, buffering=0, opener=_no_link)  # noqa: SIM115
        except FileExistsError:
            raise DatasetExistsError(
                f"{path} is there: another writer is at work, or one was stopped; wait for it, go on with it "
                f"(--resume), or overwrite the dataset (--overwrite)"
            ) from None
        self.size = 0
        self._synced = 0
        try:
            if keep is None:
                sync_directory(path.parent)  # a file without a name is lost, however well its bytes were synced
            else:
                self._file.truncate(keep)
                self.size = self._file.seek(keep)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        view = memoryview(data)
        written = 0
        with self._named():
            while written < len(view):
                written += self._file.write(view[written:])
        self.size += len(view)

    def sync(self) -> None:
        """Make all bytes so far durable."""
        if self._synced < self.size:
            with self._named():
                os.fsync(self._file.fileno())
            self._synced = self.size

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """A full disk does not say where."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Sync and close; does nothing when it is closed already."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()


class DurableFile:
    """A file that grows under a temporary name, and gets its name when it is complete.

    Use as a context manager: leaving it without `publish` leaves the temporary file, to be resumed or recovered.

    Args:
        path: the name that it will have.
        keep: bytes of the temporary file that are kept, where it is to be continued; None makes a new one.

    Raises:
        DatasetExistsError: another writer's temporary file is there.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path = path
        self.temporary = partial_path(path)
        self._hash = hashlib.sha256()
        self._file = GrowingFile(self.temporary, keep)
        if keep:
            with self.temporary.open("rb") as written:
                while block := written.read(2**20):
                    self._hash.update(block)
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._file.size

    @property
    def sha256(self) -> str:
        """Of all bytes so far, in hexadecimal."""
        return self._hash.hexdigest()

    @property
    def sync_is_due(self) -> bool:
        """Whether the bytes not yet synced are too many or too old."""
        return self._unsynced >= SYNC_BYTES or (
            self._unsynced > 0 and time.monotonic() - self._synced_at >= SYNC_SECONDS
        )

    def write(self, data: bytes | pa.Buffer) -> None:
        """Append."""
        view = memoryview(data)
        self._file.write(view)
        self._hash.update(view)
        self._unsynced += len(view)

    def sync(self) -> None:
        """Make all bytes so far durable."""
        self._file.sync()
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def publish(self) -> None:
        """Sync, close, and give the file its name."""
        self._file.close()
        self.temporary.replace(self.path)
        sync_directory(self.path.parent)

    def close(self) -> None:
        """Close without publishing; does nothing when it is closed already."""
        self._file.close()
