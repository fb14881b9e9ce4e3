"""What captures are read from: files, decompressed on the fly, standard input, directories and globs."""

from __future__ import annotations

import glob
import io
import lzma
import re
import struct
import sys
import tokenize
import zipfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import zstandard

from logitstore.errors import InvalidInputError, SourceError, SourceNotFoundError
from logitstore.io import regular_size

HEAD_BYTES: Final = 64 * 2**10
"""How much of a file an importer sees when it is asked whether it recognises it."""

LINE_LIMIT: Final = 2**28
"""The longest line of a text input in bytes: 30,000 positions of 128 candidates, as the wordiest server writes them."""

BROKEN_ARCHIVE: Final = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError, KeyError, TypeError,
    IndexError, AttributeError, OverflowError, RuntimeError, MemoryError, SyntaxError, tokenize.TokenError,
)  # fmt: skip
"""What `zipfile` and numpy raise for an archive of arrays that is damaged or forged: numpy parses headers as Python."""

_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_GZIP_MAGIC: Final = b"\x1f\x8b\x08"
_ZSTD_WINDOW: Final = 2**27  # what the zstd command itself accepts unasked; bounds memory on hostile input
_ZSTD_PIECE: Final = 2**11  # decompressed at once: a hostile piece of this size becomes 64 MiB at most
_GZIP_PIECE: Final = 2**16  # deflate stops where it is told to, whatever the input
_GZIP_OUTPUT: Final = 2**20


class Input:
    """One input: a file, decompressed on the fly when it is zstd or gzip, or standard input.

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
        with self._decompressed(self.path.open("rb")) as file:
            return file.read(HEAD_BYTES)

    def open(self) -> io.BufferedReader:
        """A stream of the decompressed bytes, from the beginning.

        Reading it raises `SourceError` where compressed data are damaged or cut off.
        """
        if self.size is None:
            return self._standard_input()
        self._raw = self.path.open("rb")
        return self._decompressed(self._raw)

    @staticmethod
    def read(file: BinaryIO, size: int) -> bytes:
        """Up to that many bytes of a stream; fewer only at its end."""
        return file.read(size)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(number from 1, line without its end) of a text input; empty lines are left out.

        Raises:
            SourceError: compressed data are damaged or cut off, or a line is longer than `LINE_LIMIT`.
        """
        with self.open() as file:
            number = 0
            while line := file.readline(LINE_LIMIT):
                number += 1
                if len(line) == LINE_LIMIT:
                    raise SourceError(
                        f"{self.name}: line {number} is longer than {LINE_LIMIT} bytes; put one record on a line, "
                        f"and cut sequences up that are longer"
                    )
                if number == 1:
                    line = line.removeprefix(BOM_UTF8)  # some editors begin files with it
                if stripped := line.strip():
                    yield number, stripped

    def done(self) -> int:
        """Bytes of the file consumed so far, before decompression."""
        if self._raw is None:
            return 0
        return (self.size or 0) if self._raw.closed else self._raw.tell()

    def close(self) -> None:
        """Close the file; a stream that was not read to its end would keep it open."""
        if self._raw is not None:
            self._raw.close()

    def _decompressed(self, raw: BinaryIO) -> io.BufferedReader:
        return io.BufferedReader(_Filled(raw, self.name), 2**20)

    def _standard_input(self) -> io.BufferedReader:
        if self._piped is None:
            self._piped = io.BufferedReader(_Filled(sys.stdin.buffer, self.name), HEAD_BYTES)
        return self._piped


def expand(paths: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """The files that these paths stand for: globs and directories become their files, in natural order.

    Args:
        paths: files, `-`, globs, directories.
        patterns: names of the files that are taken of a directory.

    Raises:
        SourceNotFoundError: nothing is there.
        InvalidInputError: a directory has fitting files in several directories, such as splits.
    """
    return [file for path in paths for file in _expand(path, patterns)]


def _expand(path: Path, patterns: Sequence[str]) -> list[Path]:
    if path.is_dir():
        return _inside(path, patterns)
    if glob.has_magic(str(path)) and not path.exists():
        if found := sorted(map(Path, glob.glob(str(path), recursive=True)), key=natural):  # noqa: PTH207 - absolute ones too
            return [file for each in found for file in (_inside(each, patterns) if each.is_dir() else [each])]
        raise SourceNotFoundError(f"{path}: no file has such a name; check the pattern")
    return [path]


def _inside(directory: Path, patterns: Sequence[str]) -> list[Path]:
    places = [directory, *sorted((each for each in directory.iterdir() if each.is_dir()), key=natural)]
    found = [files for place in places if (files := _fitting(place, patterns))]
    if not found:
        what = " or ".join(patterns) or "files of this format"
        raise SourceNotFoundError(f"{directory}: there is no {what} in this directory; name the files")
    if len(found) > 1 and found[0][0].parent != directory:
        which = ", ".join(str(files[0].parent) for files in found)
        raise InvalidInputError(f"{directory}: fitting files are in several directories; name one of: {which}")
    return found[0]


def _fitting(directory: Path, patterns: Sequence[str]) -> list[Path]:
    """Files with such names; those that begin with `cache-`, `.` or `_` are what `datasets` and Spark leave behind."""
    files = {file for pattern in patterns for file in directory.glob(pattern) if file.is_file()}
    if any(file.name == "indices.arrow" for file in files):
        raise InvalidInputError(
            f"{directory}: the rows are chosen by indices.arrow; save the result of flatten_indices()"
        )
    return sorted((file for file in files if not file.name.startswith(("cache-", ".", "_"))), key=natural)


def natural(path: Path) -> list[tuple[int, str]]:
    """Sort key by which `data_10` comes after `data_9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", str(path))]


class _Filled(io.RawIOBase):
    """A binary stream, decompressed when it is zstd or gzip, whose reads are short only at its end.

    Args:
        raw: the stream.
        name: for messages.
    """

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self._raw = raw
        self._start = raw.read(len(_ZSTD_MAGIC))
        self._output: bytes | memoryview = b""
        self._decompressor: _Zstd | _Gzip | None = None
        if self._start == _ZSTD_MAGIC:
            self._decompressor = _Zstd(raw, name, self._start)
        elif self._start.startswith(_GZIP_MAGIC):
            self._decompressor = _Gzip(raw, name, self._start)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        filled = 0
        while filled < len(buffer):
            part = memoryview(self._more(len(buffer) - filled))
            if not part:
                break
            taken = min(len(part), len(buffer) - filled)
            buffer[filled : filled + taken] = part[:taken]
            self._output = part[taken:]  # a view: what is left of a large piece is not copied again
            filled += taken
        return filled

    def _more(self, size: int) -> bytes | memoryview:
        if self._decompressor is not None:
            return self._output or self._decompressor.more()
        part, self._start = self._start[:size], self._start[size:]
        return part or self._raw.read(size)


class _Zstd:
    """The frames of a zstd stream, decompressed one after another."""

    def __init__(self, raw: BinaryIO, name: str, start: bytes) -> None:
        self._raw, self._name, self._start = raw, name, start
        self._frame: Any = None

    def more(self) -> bytes:
        """Some more output, empty at the end of the last frame."""
        part = b""
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


class _Gzip:
    """The members of a gzip stream, decompressed one after another."""

    def __init__(self, raw: BinaryIO, name: str, start: bytes) -> None:
        self._raw, self._name, self._start = raw, name, start
        self._member = zlib.decompressobj(wbits=31)

    def more(self) -> bytes:
        """Some more output, at most 1 MiB; empty at the end of the last member."""
        part = b""
        while not part:
            data, self._start = self._start, b""
            if not data:
                data = self._raw.read(_GZIP_PIECE)
            if self._member.eof:
                data = data.lstrip(b"\0")  # members may be padded with zeros
                if not data and not (data := self._raw.read(_GZIP_PIECE).lstrip(b"\0")):
                    return b""
                self._member = zlib.decompressobj(wbits=31)
            if not data:
                raise SourceError(f"{self._name}: the gzip data are cut off; fetch the file again")
            try:
                part = self._member.decompress(data, _GZIP_OUTPUT)
            except zlib.error as error:
                raise SourceError(f"{self._name}: damaged gzip data ({error}); fetch the file again") from error
            self._start = self._member.unconsumed_tail or self._member.unused_data
        return part
