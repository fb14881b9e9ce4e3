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
_ZSTD_PIECE: Final = 2**11  # decompressed at once: a hostile piece of this size becomes 64 MiB at most
_LINE_LIMIT: Final = 2**30


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

    def open(self) -> io.BufferedReader:
        """A stream of the decompressed bytes, from the beginning.

        Reading it raises `SourceError` where compressed data are damaged or cut off.
        """
        if self.size is None:
            return self._standard_input()
        self._raw = self.path.open("rb")
        return io.BufferedReader(_Filled(self._raw, self.name), 2**20)

    @staticmethod
    def read(file: BinaryIO, size: int) -> bytes:
        """Up to that many bytes of a stream; fewer only at its end."""
        return file.read(size)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(number from 1, line without its end) of a text input; empty lines are left out.

        Raises:
            SourceError: compressed data are damaged or cut off, or a line is longer than 1 GiB.
        """
        with self.open() as file:
            number = 0
            while line := file.readline(_LINE_LIMIT):
                number += 1
                if len(line) == _LINE_LIMIT:
                    raise SourceError(f"{self.name}: line {number} is longer than {_LINE_LIMIT} bytes")
                if stripped := line.strip():
                    yield number, stripped

    def done(self) -> int:
        """Bytes of the file consumed so far, before decompression."""
        return self._raw.tell() if self._raw is not None and not self._raw.closed else self.size or 0

    def close(self) -> None:
        """Close the file; a stream that was not read to its end would keep it open."""
        if self._raw is not None:
            self._raw.close()

    def _standard_input(self) -> io.BufferedReader:
        if self._piped is None:
            self._piped = io.BufferedReader(_Filled(sys.stdin.buffer, self.name), HEAD_BYTES)
        return self._piped


class _Filled(io.RawIOBase):
    """A binary stream, decompressed when it is zstd, whose reads are short only at its end.

    Args:
        raw: the stream.
        name: for messages.
    """

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self._raw = raw
        self._name = name
        self._start = raw.read(len(_ZSTD_MAGIC))
        self._zstd = self._start == _ZSTD_MAGIC
        self._frame: Any = None
        self._output: bytes | memoryview = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        filled = 0
        while filled < len(buffer):
            part = memoryview(self._decompressed()) if self._zstd else self._plain(len(buffer) - filled)
            if not part:
                break
            taken = min(len(part), len(buffer) - filled)
            buffer[filled : filled + taken] = part[:taken]
            self._output = part[taken:]  # a view: what is left of a large piece is not copied again
            filled += taken
        return filled

    def _plain(self, size: int) -> bytes:
        part, self._start = self._start[:size], self._start[size:]
        return part or self._raw.read(size)

    def _decompressed(self) -> bytes | memoryview:
        """Some more output, empty at the end of the last frame."""
        part = self._output
        while not part:
            data, self._start = self._start, b""
            if not data:
                data = self._raw.read(_ZSTD_PIECE)
            if not data and (self._frame is None or self._frame.eof):
                return b""
            if not data:
                raise SourceError(f"{self._name}: the zstd data are cut off; fetch the file again")
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
            try:
                part = self._frame.decompress(data)
            except zstandard.ZstdError as error:
                raise SourceError(f"{self._name}: damaged zstd data ({error}); fetch the file again") from error
            self._start = self._frame.unused_data
        return part


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
