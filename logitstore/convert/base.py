"""What an importer is: how it recognises its input, and the sequences that it reads from it, one by one."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import zstandard

from logitstore.errors import SourceError
from logitstore.io import regular_size
from logitstore.tokenizer import Tokenizer

HEAD_BYTES: Final = 64 * 2**10
"""How much of a file an importer sees when it is asked whether it recognises it."""

_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_ZSTD_WINDOW: Final = 2**27  # what the zstd command itself accepts unasked; bounds memory on hostile input


class Input:
    """One input: a file, decompressed on the fly when it is zstd, or standard input.

    Args:
        path: a file, or `-` for standard input.

    Raises:
        SourceNotFoundError: no such file.
        CorruptDataError: not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = "standard input" if str(path) == "-" else str(path)
        self.size = None if str(path) == "-" else regular_size(path)
        self._raw: BinaryIO | None = None
        self._piped: io.BufferedReader | None = None

    def head(self) -> bytes:
        """The first 64 KiB, decompressed; fewer where there are fewer. A later `open` starts from the beginning."""
        if self.size is None:
            return self._standard_input().peek(HEAD_BYTES)[:HEAD_BYTES]
        with self.open() as file:
            return self.read(file, HEAD_BYTES)

    def open(self) -> BinaryIO:
        """A stream of the decompressed bytes, from the beginning."""
        if self.size is None:
            return self._standard_input()
        raw = self.path.open("rb")
        self._raw = raw
        magic = raw.read(4)
        raw.seek(0)
        return self._decompressed(raw) if magic == _ZSTD_MAGIC else raw

    def read(self, file: BinaryIO, size: int) -> bytes:
        """Up to that many bytes of a stream of this input; fewer only at its end.

        Raises:
            SourceError: the compressed data are damaged or cut off.
        """
        parts: list[bytes] = []
        while size > 0:
            try:
                part = file.read(size)
            except zstandard.ZstdError as error:
                raise SourceError(f"{self.name}: damaged zstd data ({error}); fetch the file again") from error
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(number from 1, line without its end) of a text input; empty lines are left out.

        Raises:
            SourceError: the compressed data are damaged or cut off.
        """
        with self.open() as file:
            reader = io.BufferedReader(_Raw(self, file), 2**20)
            for number, line in enumerate(reader, 1):
                if stripped := line.strip():
                    yield number, stripped

    def done(self) -> int:
        """Bytes of the file consumed so far, before decompression."""
        return self._raw.tell() if self._raw is not None and not self._raw.closed else self.size or 0

    def _standard_input(self) -> io.BufferedReader:
        if self._piped is None:
            raw: Any = sys.stdin.buffer
            head = raw.peek(4)[:4]
            stream = self._decompressed(raw) if head == _ZSTD_MAGIC else raw
            self._piped = io.BufferedReader(_Raw(self, stream), HEAD_BYTES)
        return self._piped

    @staticmethod
    def _decompressed(raw: BinaryIO) -> BinaryIO:
        reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        return reader.stream_reader(raw, read_across_frames=True, closefd=True)


class _Raw(io.RawIOBase):
    """Lets `io.BufferedReader` find lines in a stream that has only `read`."""

    def __init__(self, source: Input, file: BinaryIO) -> None:
        self._source = source
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(self._file, len(buffer))
        buffer[: len(data)] = data
        return len(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an importer is told.

    Attributes:
        tokenizer: the teacher's; None when it was not given.
        top_k: candidates to keep; None where it was not said.
    """

    tokenizer: Tokenizer | None = None
    top_k: int | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence: the method of `Writer` that takes it, and that method's arguments."""

    method: Literal["add", "add_logits", "add_draws"]
    arguments: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Import:
    """An opened input.

    Attributes:
        items: its sequences; reading them raises `SourceError` where the input is damaged.
        settings: arguments of `Writer` that the input determines or suggests; what the user says comes first.
        done: bytes of input consumed so far, for progress.
        total: bytes of input; None where that is not known.
        sequences: number of sequences; None where that is not known beforehand.
        notes: what was assumed, and what was left out; may grow while items are read. Each is one sentence.
        pieces: bytes of tokens by id, as replies carry them; may grow while items are read.
    """

    items: Iterator[Item]
    settings: dict[str, Any] = field(default_factory=dict)
    done: Callable[[], int] = lambda: 0
    total: int | None = None
    sequences: int | None = None
    notes: list[str] = field(default_factory=list)
    pieces: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Importer:
    """One foreign format.

    Attributes:
        name: what `--from` takes.
        description: one line for the help text.
        recognises: whether an input is of this format, by its name and head; cheap, and never raises.
        read: opens inputs of this format; several are one dataset, in the order given.
    """

    name: str
    description: str
    recognises: Callable[[Input], bool]
    read: Callable[[list[Input], Options], Import]
