"""Where the files of a dataset are: a directory, or a place on the network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from logitstore.errors import InvalidInputError
from logitstore.io.files import MappedFile, read_limited
from logitstore.io.source import ByteSource
from logitstore.schema import ShardInfo
from logitstore.schema.manifest import FileInfo

URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")
"""How a URL begins; `C:` of Windows does not."""


class Store(Protocol):
    """The files of one dataset, by their paths in it. Stores pickle."""

    @property
    def name(self) -> str:
        """Directory or URL, for messages."""

    @property
    def remote(self) -> bool:
        """Whether a read takes a journey, so that it is worth asking ahead."""

    def where(self, path: str) -> str:
        """The full name of a file, for messages."""

    def small(self, path: str, limit: int) -> bytes:
        """The whole of a file of at most `limit` bytes.

        Raises:
            SourceNotFoundError: there is none.
            CorruptDataError: it is larger, or no regular file.
        """

    def shard(self, info: ShardInfo) -> ByteSource:
        """The bytes of a shard.

        Raises:
            SourceNotFoundError: there is none.
            CorruptDataError: it is no regular file.
        """

    def folder(self, name: str, files: Iterable[FileInfo]) -> Path:
        """A local directory that holds these files of a folder of the dataset; those of remote ones are verified.

        Raises:
            CorruptDataError: a remote file is missing, or not what the manifest describes.
        """

    def has_shards(self) -> bool:
        """Whether there are shards, complete or not, where a manifest is missing."""


@dataclass(frozen=True)
class LocalStore:
    """A directory."""

    root: Path
    remote = False

    @property
    def name(self) -> str:
        """The directory."""
        return str(self.root)

    def where(self, path: str) -> str:
        """Path of a file."""
        return str(self.root / path)

    def small(self, path: str, limit: int) -> bytes:
        """The whole of a file."""
        return read_limited(self.root / path, limit)

    def shard(self, info: ShardInfo) -> ByteSource:
        """A shard, mapped."""
        return MappedFile(self.root / info.path)

    def folder(self, name: str, files: Iterable[FileInfo]) -> Path:  # noqa: ARG002 - they are there
        """The directory itself: `validate` checks the files in it."""
        return self.root / name

    def has_shards(self) -> bool:
        """Whether there are files with a shard's name, or journals of writers."""
        return any(any(self.root.glob(pattern)) for pattern in ("data/*/*.arrow*", "parts/*/journal"))


@dataclass(frozen=True)
class PartialStore(LocalStore):
    """A directory some of whose shards are elsewhere alone.

    Attributes:
        beyond: where these are.
        absent: their paths.
    """

    beyond: Store
    absent: frozenset[str]

    def where(self, path: str) -> str:
        """Path of a file, or URL of one that is elsewhere."""
        return self.beyond.where(path) if path in self.absent else super().where(path)

    def shard(self, info: ShardInfo) -> ByteSource:
        """A shard, mapped or from elsewhere."""
        return self.beyond.shard(info) if info.path in self.absent else super().shard(info)


def local_path(place: str | os.PathLike[str], what: str) -> Path:
    """A path that is none of a URL, which would become a directory called `hf:`.

    Args:
        place: as it was given.
        what: what is done there, and what to do instead with a URL.

    Raises:
        InvalidInputError: a URL.
    """
    if isinstance(place, str) and URL.match(place):
        raise InvalidInputError(f"{place} is a URL; {what}")
    return Path(place)


def store_of(place: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Store:
    """The store at a path or URL; one on the Hub is asked for its revision, others are not touched yet.

    Args:
        place: directory, `hf://datasets/ns/name[@revision][/folder]`, or a URL that fsspec knows.
        options: `token` and `endpoint` for the Hub; what fsspec's file system takes for other URLs.

    Raises:
        InvalidInputError: options for a directory, or no place of a dataset.
        RemoteError: it cannot be reached, or refuses.
    """
    # Imported where used: the client of the Hub takes longer than all of this package.
    options = options or {}
    if not isinstance(place, str) or URL.match(place) is None:
        if options:
            raise InvalidInputError(f"storage_options are for URLs, and {os.fspath(place)!r} is a path")
        return LocalStore(Path(place))
    if place.startswith("hf://"):
        from logitstore.io.hub import HubStore  # noqa: PLC0415

        if unknown := sorted(set(options) - {"token", "endpoint"}):
            raise InvalidInputError(f"storage_options of the Hub are token and endpoint, not {', '.join(unknown)}")
        return HubStore.of(place, **options)
    from logitstore.io.fsspec import FsspecStore  # noqa: PLC0415

    return FsspecStore(place, dict(options))
