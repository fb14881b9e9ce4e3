"""Everything that logitstore raises: one base class, and under it one class for each thing that can be done about it.

Each class also derives from the builtin that people would catch. A message says what is wrong, where, and what to do.
"""

from __future__ import annotations

from typing import Any


class LogitStoreError(Exception):
    """Base of all errors of this package."""


class InvalidInputError(LogitStoreError, ValueError):
    """What was given to a writer, a function or an importer cannot be stored as it is; the fault is the caller's."""


class InvalidTypeError(InvalidInputError, TypeError):
    """An argument has a type or dtype that cannot be used."""


class SourceError(LogitStoreError, ValueError):
    """A file to be imported is damaged, cut off, or not what its format says."""


class SourceNotFoundError(LogitStoreError, FileNotFoundError):
    """A file or directory to be read (a capture, a tokenizer) is not there."""


class UnsupportedVersionError(LogitStoreError, ValueError):
    """Written by a later version of the format, or with a required feature, that this release does not know."""


class DatasetNotFoundError(LogitStoreError, FileNotFoundError):
    """There is no dataset at this path."""


class IncompleteDatasetError(LogitStoreError, FileNotFoundError):
    """Shards are there but no manifest: the writer is still at work, or did not finish."""


class DatasetExistsError(LogitStoreError, FileExistsError):
    """Something is already there; nothing is overwritten unless asked for."""


class SequenceNotFoundError(LogitStoreError, KeyError):
    """No sequence has this id."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class RowIndexError(LogitStoreError, IndexError):
    """A row number outside the dataset."""


class NotSelectedError(LogitStoreError, AttributeError):
    """A column that `Dataset.select` left out."""


class MissingDependencyError(LogitStoreError, ImportError):
    """An optional package is needed for this; the message names the extra to install."""


class RemoteError(LogitStoreError, ConnectionError):
    """A server could not be reached, refused for now, or broke off again and again; it may work later."""


class RemoteAccessError(LogitStoreError, PermissionError):
    """A server wants another account, token, right or plan."""


class CorruptDataError(LogitStoreError, ValueError):
    """The bytes of a dataset are not what was written, or contradict each other.

    Attributes:
        reason: what is wrong, without the place.
        code: stable short name of the problem; `validate` reports it under the same name.
        path: file, or None where it is not known.
        chunk: number of the chunk in its shard, or None.
        offset: byte offset in the file, or None.
        row: row number inside the chunk, or None.
    """

    def __init__(
        self,
        reason: str,
        *,
        code: str = "corrupt",
        path: str | None = None,
        chunk: int | None = None,
        offset: int | None = None,
        row: int | None = None,
    ) -> None:
        self.reason = reason
        self.code = code
        self.path = path
        self.chunk = chunk
        self.offset = offset
        self.row = row
        super().__init__(reason)

    def __str__(self) -> str:
        place = [self.path] if self.path is not None else []
        place += [f"chunk {self.chunk}"] if self.chunk is not None else []
        place += [f"row {self.row}"] if self.row is not None else []
        place += [f"byte {self.offset}"] if self.offset is not None else []
        return ": ".join([", ".join(place), self.reason]) if place else self.reason

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_corrupt, (self.reason, self.code, self.path, self.chunk, self.offset, self.row)

    def at(
        self,
        *,
        path: str | None = None,
        chunk: int | None = None,
        offset: int | None = None,
        row: int | None = None,
    ) -> CorruptDataError:
        """The same error with those parts of its place filled in that it did not know."""
        return CorruptDataError(
            self.reason,
            code=self.code,
            path=self.path if self.path is not None else path,
            chunk=self.chunk if self.chunk is not None else chunk,
            offset=self.offset if self.offset is not None else offset,
            row=self.row if self.row is not None else row,
        )


def _rebuild_corrupt(
    reason: str, code: str, path: str | None, chunk: int | None, offset: int | None, row: int | None
) -> CorruptDataError:
    return CorruptDataError(reason, code=code, path=path, chunk=chunk, offset=offset, row=row)


class LogitStoreWarning(UserWarning):
    """Something that is allowed but that people should know of, such as a dataset without a known teacher."""
