"""What all remote stores have in common: ranges that are verified, fetched again where they are damaged, and kept."""

from __future__ import annotations

import atexit
import hashlib
import itertools
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from logitstore.errors import CorruptDataError, SourceNotFoundError
from logitstore.io.cache import cache
from logitstore.io.files import OPENING_BYTES
from logitstore.io.source import Accept, Part
from logitstore.limits import CHUNK_CANDIDATES, CHUNK_POSITIONS, CHUNK_SEQUENCES
from logitstore.schema import ShardInfo
from logitstore.schema.manifest import FileInfo

ATTEMPTS: Final = 3
"""How often bytes are fetched that arrive damaged."""

_folders: dict[tuple[int, str, str, tuple[FileInfo, ...]], Path] = {}

_TAIL_BYTES: Final = 128  # these two as the specification has them: what reads shards is above this layer
_ENTRY_BYTES: Final = 48
_MOST_OPENING: Final = 2**22  # whatever a manifest says; what is missing is read by itself


@dataclass(frozen=True)
class RemoteStore(ABC):
    """Files that are read in ranges over a network."""

    remote = True

    @property
    @abstractmethod
    def name(self) -> str:
        """Its URL, for messages."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What the bytes that are kept belong to: nobody else's dataset may answer for this one."""

    @abstractmethod
    def where(self, path: str) -> str:
        """URL of a file, for messages."""

    @abstractmethod
    def fetch(self, path: str, offset: int, length: int, sink: Callable[[bytes], None]) -> None:
        """Hand a range of a file to `sink`, in order and whole.

        Raises:
            SourceNotFoundError: there is no such file.
            CorruptDataError: it is shorter.
            RemoteError: it cannot be had now.
        """

    @abstractmethod
    def small(self, path: str, limit: int) -> bytes:
        """The whole of a small file."""

    def shard(self, info: ShardInfo) -> RemoteFile:
        """A shard; nothing is asked yet."""
        return RemoteFile(self, info.path, info.bytes, info.sha256, opening_bytes(info))

    def folder(self, name: str, files: Iterable[FileInfo]) -> Path:
        """A temporary directory with these files, verified; it is there until the process ends."""
        files = tuple(files)
        key = (os.getpid(), self.identity, name, files)
        if key not in _folders:
            directory = Path(tempfile.mkdtemp(prefix="logitstore-folder-"))
            atexit.register(_remove, directory, os.getpid())
            for file in files:
                (directory / Path(file.path).name).write_bytes(self._whole(file))
            _folders[key] = directory
        return _folders[key]

    def _whole(self, file: FileInfo) -> pa.Buffer:
        source = RemoteFile(self, file.path, file.bytes, file.sha256, 0)
        data = source.read(0, file.bytes, lambda data: _sha256(data) == file.sha256)
        if _sha256(data) != file.sha256:
            raise CorruptDataError(
                "it is not the file that the manifest describes", code="tokenizer-file", path=source.path
            )
        return data

    def has_shards(self) -> bool:
        """Not known: a network's files are not listed."""
        return False


@dataclass(frozen=True)
class RemoteFile:
    """A file of a remote store, by ranges. What is accepted is kept in the cache, and looked for there first.

    Attributes:
        store: the store.
        name: path in it.
        size: in bytes, as the manifest says.
        sha256: of the file, as the manifest says.
        opening: how many bytes at the end to read first.
    """

    store: RemoteStore
    name: str
    size: int
    sha256: str
    opening: int
    mapped = False

    @property
    def path(self) -> str:
        """Its URL."""
        return self.store.where(self.name)

    def read(self, offset: int, length: int, accept: Accept | None = None) -> pa.Buffer:
        """These bytes: from the cache, else fetched, up to three times where they are not accepted.

        Raises:
            CorruptDataError: it is missing, or shorter.
            RemoteError: it cannot be had now.
        """
        if accept is None:
            return self._fetch(offset, length)
        data = self._kept(offset, length, accept)
        for _ in range(ATTEMPTS if data is None else 0):
            data = self._fetch(offset, length)
            if self._keep(offset, data, accept):
                break
        return data

    def read_together(self, parts: Sequence[Part]) -> list[pa.Buffer]:
        """Several parts that follow one another: what is not in the cache by one request for each stretch."""
        found = [self._kept(*part) for part in parts]
        for missing, stretch in itertools.groupby(range(len(parts)), lambda number: found[number] is None):
            if missing:
                numbers = list(stretch)
                start, (last, length, _) = parts[numbers[0]][0], parts[numbers[-1]]
                data = self._fetch(start, last + length - start)
                for number in numbers:
                    offset, length, accept = parts[number]
                    part = data.slice(offset - start, length)
                    found[number] = part if self._keep(offset, part, accept) else self.read(offset, length, accept)
        return found

    def _key(self, offset: int, length: int) -> str:
        return f"{self.store.identity} {self.sha256} {offset} {length}"

    def _kept(self, offset: int, length: int, accept: Accept) -> pa.Buffer | None:
        data = cache().get(self._key(offset, length))
        return data if data is not None and data.size == length and accept(data) else None

    def _keep(self, offset: int, data: pa.Buffer, accept: Accept) -> bool:
        good = accept(data)
        if good:
            cache().put(self._key(offset, data.size), data)
        return good

    def _fetch(self, offset: int, length: int) -> pa.Buffer:
        parts: list[bytes] = []
        try:
            self.store.fetch(self.name, offset, length, parts.append)
        except SourceNotFoundError:
            raise CorruptDataError(
                "the manifest names this file, and it is missing", code="shard-missing", path=self.path
            ) from None
        return pa.py_buffer(parts[0] if len(parts) == 1 else b"".join(parts))


def opening_bytes(info: ShardInfo) -> int:
    """How many bytes at the end of a shard hold its tail and, as a rule, its index; all of a small shard.

    Written by default settings, a chunk closes at one of three counts. Reading a little more than needed costs less
    than a second request, and at most a hundredth of the shard.
    """
    chunks = 2 + max(
        info.candidates // CHUNK_CANDIDATES, info.positions // CHUNK_POSITIONS, info.sequences // CHUNK_SEQUENCES
    )
    wanted = max(_TAIL_BYTES + _ENTRY_BYTES * (chunks + chunks // 4), min(OPENING_BYTES, info.bytes // 128))
    return info.bytes if info.bytes <= OPENING_BYTES else min(wanted, info.bytes, _MOST_OPENING)


def _sha256(data: pa.Buffer) -> str:
    return hashlib.sha256(data).hexdigest()


def _remove(directory: Path, process: int) -> None:
    if os.getpid() == process:  # not in a child that was forked
        shutil.rmtree(directory, ignore_errors=True)
