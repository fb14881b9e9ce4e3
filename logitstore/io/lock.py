"""Locks that die with the process that holds them."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
import weakref
from pathlib import Path
from typing import Any, Self

from logitstore.errors import DatasetExistsError, LogitStoreWarning

_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


class FileLock:
    """Keeps others out of what a file stands for; a context manager.

    The file is made, and removed by `release`. A process that dies frees it, whatever it left; on a file system
    without locks nobody is kept out.

    Args:
        path: the file; its directory exists.
        busy: what to say where another one holds it.

    Raises:
        DatasetExistsError: another one holds it.
    """

    def __init__(self, path: Path, busy: str) -> None:
        self.path = path
        self._descriptor: int | None = _locked(path, busy)
        _held.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.forget()

    def release(self) -> None:
        """Let others in; does nothing the second time."""
        if self._descriptor is not None:
            if os.name != "nt":  # there, an open file cannot be removed
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(self._descriptor), self.path.stat()):  # else it is another one's
                        self.path.unlink()
            self.forget()
            if os.name == "nt":
                with contextlib.suppress(OSError):
                    self.path.unlink()

    def forget(self) -> None:
        """Close the file and leave it where it is: a copy of the process does not hold what its parent holds."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock of this file; also for those who may only read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


def _locked(path: Path, busy: str) -> int:
    for patience in (0.1, 0.0):
        while (descriptor := os.open(path, os.O_RDWR | os.O_CREAT, 0o666)) >= 0:
            if not _lock(descriptor):
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            os.close(descriptor)  # whoever held it removed it just now
        os.close(descriptor)
        time.sleep(patience)  # who only looked whether it is held lets go at once
    raise DatasetExistsError(busy)


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    """Whether the file is ours now; also where the file system has no locks, with a warning."""
    try:
        if os.name == "nt":
            msvcrt: Any = __import__("msvcrt")
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl  # noqa: PLC0415 - not on Windows

            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if not shared:
            warnings.warn(
                f"this file system has no locks ({error.strerror}): nothing keeps two writers of one part apart",
                LogitStoreWarning,
                2,
            )
    return True


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
