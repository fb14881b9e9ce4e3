"""Ranges of remote files on the local disk: bounded, shared by processes, the least recently used one goes.

An item is put there whole and verified, by renaming; whoever reads it verifies it again. Losing any of it costs only
time, so nothing is synced, and a disk that refuses turns keeping off for the process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Final

import pyarrow as pa

from logitstore.errors import InvalidInputError, LogitStoreWarning
from logitstore.units import parse_size

DIRECTORY_VARIABLE: Final = "LOGITSTORE_CACHE"
SIZE_VARIABLE: Final = "LOGITSTORE_CACHE_SIZE"
DEFAULT_SIZE: Final = 10 * 2**30

_STALE_SECONDS: Final = 3600.0  # an unfinished item of this age was left by a process that was killed
_SUFFIX: Final = ".partial"


class Cache:
    """Items of bytes by key.

    Args:
        root: directory, made when it is needed.
        limit: most bytes kept; 0 keeps nothing.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self.limit = limit
        self._held: int | None = None  # bytes there at the last look, and what was added since
        self._added = 0
        self._writing = 0  # bytes that threads of this process are about to add
        self._lock = threading.Lock()

    def get(self, key: str) -> pa.Buffer | None:
        """An item, or None; it counts as used now."""
        if not self.limit:
            return None
        _, path = self._place(key)
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - as in put
                data = file.readall()
        except OSError:  # not there, or another process has just dropped it
            return None
        with contextlib.suppress(OSError):  # of a directory that may only be read
            os.utime(path)
        return pa.py_buffer(data)

    def put(self, key: str, data: pa.Buffer) -> None:
        """Keep an item, which has been verified; room is made first."""
        if not self.limit or data.size > self.limit:
            return
        # Plain paths and names of our own: thousands of items a minute, while other threads wait for Python.
        directory, path = self._place(key)
        unfinished = f"{path}.{os.getpid()}-{threading.get_ident()}{_SUFFIX}"
        self._make_room(data.size)
        try:
            os.makedirs(directory, exist_ok=True)  # noqa: PTH103
            try:
                with open(unfinished, "wb", buffering=0) as file:  # noqa: PTH123
                    view = memoryview(data)
                    while view:  # a full disk takes less than it is given, and then nothing
                        view = view[file.write(view) :]
                os.replace(unfinished, path)  # noqa: PTH105
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished)  # noqa: PTH108
                raise
        except FileNotFoundError:  # somebody empties the directory meanwhile
            return
        except OSError as error:
            self.limit = 0
            message = (
                f"{self.root}: fetched data cannot be kept there ({error.strerror or error}), so what is read again is "
                f"fetched again; name another directory in {DIRECTORY_VARIABLE}"
            )
            warnings.warn(message, LogitStoreWarning, stacklevel=2)
        finally:
            with self._lock:
                self._writing -= data.size

    def _place(self, key: str) -> tuple[str, str]:
        """Directory and path of an item."""
        name = hashlib.sha256(key.encode()).hexdigest()
        directory = f"{self.root}{os.sep}{name[:2]}"
        return directory, f"{directory}{os.sep}{name}"

    def _make_room(self, size: int) -> None:
        """Drop what was used longest ago until the limit holds with `size` bytes more.

        Other processes write there too: the directory is looked at again after each sixteenth of the limit.
        """
        with self._lock:
            self._added += size
            self._writing += size
            if self._held is not None and self._held + self._added <= self.limit and self._added <= self.limit // 16:
                return
            items = sorted(self._items())
            held = sum(item[1] for item in items)
            for _, length, path in items:
                if held + self._writing <= self.limit:
                    break
                with contextlib.suppress(OSError):
                    path.unlink()
                held -= length
            self._held, self._added = held, self._writing

    def _items(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of each item; unfinished ones that nobody finishes any more are removed."""
        items, now = [], time.time()
        for path in self.root.glob("??/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.suffix != _SUFFIX:
                    items.append((status.st_mtime, status.st_size, path))
                elif now - status.st_mtime > _STALE_SECONDS:
                    path.unlink()
        return items


def cache() -> Cache:
    """The cache that the environment describes: `LOGITSTORE_CACHE` and `LOGITSTORE_CACHE_SIZE`.

    Raises:
        InvalidInputError: the size is none.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - may not exist
    directory = os.environ.get(DIRECTORY_VARIABLE) or os.path.join(home, "logitstore")  # noqa: PTH118
    return _cache(directory, os.environ.get(SIZE_VARIABLE, ""), os.getpid())


@functools.lru_cache(maxsize=8)
def _cache(directory: str, size: str, _process: int) -> Cache:
    limit = parse_size(size) if size else DEFAULT_SIZE
    if limit is None:
        raise InvalidInputError(f"{SIZE_VARIABLE} is {size!r}, which is no size; write it as 10GiB, or 0 for none")
    return Cache(Path(directory), limit)
