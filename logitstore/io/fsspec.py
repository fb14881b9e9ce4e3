"""Datasets in any file system that fsspec knows: `s3://`, `gs://`, `https://` and others."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import fsspec

from logitstore.errors import (
    CorruptDataError,
    InvalidInputError,
    LogitStoreError,
    MissingDependencyError,
    RemoteAccessError,
    RemoteError,
    SourceNotFoundError,
)
from logitstore.io.client import scrubbed
from logitstore.io.http import backoff, pause
from logitstore.io.remote import RemoteStore

TRIES: Final = 4
"""So many failures of one read end it. Most file systems try again by themselves before."""


@dataclass(frozen=True)
class FsspecStore(RemoteStore):
    """The files of a dataset under a URL.

    Attributes:
        url: of the directory.
        options: what fsspec's file system takes: credentials, endpoints.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    _opened: dict[int, tuple[Any, str]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    @property
    def name(self) -> str:
        """Its URL, without what may be a signature or a password."""
        return re.sub(r"//[^/@]*@", "//", self.url.partition("?")[0]).rstrip("/")

    @property
    def identity(self) -> str:
        """Its URL."""
        return self.url

    def where(self, path: str) -> str:
        """URL of a file."""
        return f"{self.name}/{path}"

    def fetch(self, path: str, offset: int, length: int, sink: Callable[[bytes], None]) -> None:
        """Hand a range of a file to `sink`."""
        if not length:
            return
        data = self._attempt(path, lambda system, full: system.cat_file(full, start=offset, end=offset + length))
        if len(data) != length:
            raise CorruptDataError(
                f"{len(data)} bytes came where {length} from byte {offset} on were asked for: the file is shorter",
                code="shard-size",
                path=self.where(path),
            )
        sink(data)

    def small(self, path: str, limit: int) -> bytes:
        """The whole of a small file."""
        # As a range: asking for a file's size first would take a request more, and hide what goes wrong from some.
        data = self._attempt(path, lambda system, full: system.cat_file(full, start=0, end=limit + 1))
        if len(data) > limit:
            raise CorruptDataError(f"more than the limit of {limit} bytes", code="file-size", path=self.where(path))
        return data

    def _attempt(self, path: str, ask: Callable[[Any, str], bytes]) -> bytes:
        system, root = self._system()
        where, failures = self.where(path), 0
        while True:
            try:
                return bytes(ask(system, f"{root.rstrip('/')}/{path}"))
            except LogitStoreError:
                raise
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                meaning: LogitStoreError = SourceNotFoundError(f"{where}: no such file")
                failures = TRIES
            except PermissionError as error:
                meaning = RemoteAccessError(f"{where}: no access ({scrubbed(str(error))})")
                failures = TRIES
            except Exception as error:  # noqa: BLE001 - each file system raises what its client raises
                failures += 1
                meaning = RemoteError(
                    f"{where}: cannot be read ({type(error).__name__}: {scrubbed(str(error))}); check address, "
                    f"credentials and network"
                )
            if failures >= TRIES:
                raise meaning  # outside the handler: others' errors may hold addresses that no traceback is to show
            pause(backoff(failures))

    def _system(self) -> tuple[Any, str]:
        """The file system and the root in it; anew in each process, since its threads do not survive a fork."""
        opened = self._opened.get(os.getpid())
        if opened is None:
            try:
                opened = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, **self.options)
            except ImportError as error:
                raise MissingDependencyError(f"{self.name}: {error}; install that package beside logitstore") from error
            except (ValueError, TypeError) as error:
                raise InvalidInputError(f"{self.name}: {scrubbed(str(error))}") from None
            self._opened.clear()
            self._opened[os.getpid()] = opened
        return opened
