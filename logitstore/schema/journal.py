"""The journal of a part: what a writer has done so far, line by line (spec, "Unfinished datasets").

Each line is the xxh3-64 of a JSON object in 16 hexadecimal digits, a space, and the object. Lines are only appended.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import msgspec
import xxhash
from msgspec import Meta

from logitstore.errors import CorruptDataError, InvalidInputError, UnsupportedVersionError
from logitstore.schema.header import LogitWidth, Normalised, Temperature
from logitstore.schema.manifest import (
    Count,
    RelativePath,
    Sampling,
    ShardInfo,
    Source,
    SplitName,
    Teacher,
    TokenizerInfo,
    Xxh3,
    is_safe_path,
)
from logitstore.schema.version import FormatVersion, check_version

PARTS_DIRECTORY: Final = "parts"
"""Directory of a dataset that holds what its writers need until it is committed."""

JOURNAL_NAME: Final = "journal"

MOST_PARTS: Final = 100_000

_PART: Final = re.compile(r"(0|[1-9][0-9]*)/([1-9][0-9]*)")
_DIRECTORY: Final = re.compile(r"(?P<split>.+)-(?P<number>[0-9]{5})-of-(?P<of>[0-9]{5,6})")
_SUM_DIGITS: Final = 16


class Part(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One of the writers of a split.

    Attributes:
        split: the split.
        number: from 0.
        of: how many there are.
    """

    split: SplitName
    number: Annotated[int, Meta(ge=0, lt=MOST_PARTS)] = 0
    of: Annotated[int, Meta(ge=1, le=MOST_PARTS)] = 1

    @classmethod
    def parse(cls, split: str, text: str | None) -> Part:
        """From text such as `3/16`; None is the only one.

        Raises:
            InvalidInputError: this is no part.
        """
        if text is None:
            return cls(split=split)
        match = _PART.fullmatch(text)
        if match is None or not (int(match[1]) < int(match[2]) <= MOST_PARTS):
            raise InvalidInputError(
                f"part is {text!r}; it is a number from 0 and how many there are: '0/16' to '15/16', at most "
                f"{MOST_PARTS} parts"
            )
        return cls(split=split, number=int(match[1]), of=int(match[2]))

    @classmethod
    def of_directory(cls, name: str) -> Part | None:
        """The inverse of `name`; None where it is no part's."""
        match = _DIRECTORY.fullmatch(name)
        if match is None or not int(match["number"]) < int(match["of"]) <= MOST_PARTS:
            return None
        part = cls(split=match["split"], number=int(match["number"]), of=int(match["of"]))
        return part if part.name == name else None

    def owns(self, path: str) -> bool:
        """Whether a path in a dataset is one of its shards."""
        return (
            re.fullmatch(rf"data/{re.escape(self.split)}/{re.escape(self.stem)}-[0-9]{{5,}}\.arrow", path) is not None
        )

    @property
    def name(self) -> str:
        """Name of its directory under `parts/`."""
        return f"{self.split}-{self.number:05d}-of-{self.of:05d}"

    @property
    def stem(self) -> str:
        """How its shards' names begin: a dataset of one writer has the short ones."""
        return self.split if self.of == 1 else self.name

    def __str__(self) -> str:
        return f"part {self.number}/{self.of} of {self.split}"


class Plan(msgspec.Struct, frozen=True, kw_only=True, tag="plan", tag_field="line"):
    """The first line: all that a writer was told.

    Attributes:
        version: format version.
        written_by: program and version.
        part: which.
        overwrite: whether the dataset that is there is to be replaced.
        first: number of the first shard.
        sampling: as in the manifest; so are the others.
        chunk_candidates: a chunk closes at this many candidates.
        shard_bytes: a shard closes at this many bytes.
        fingerprint: what else has to be the same when it is gone on with, by name.
    """

    version: str
    written_by: str
    part: Part
    overwrite: bool
    first: Count
    sampling: Sampling
    normalised: Normalised
    temperature: Temperature
    logit_width: LogitWidth | None
    chunk_candidates: Annotated[int, Meta(ge=1)]
    shard_bytes: Annotated[int, Meta(ge=1)]
    teacher: Teacher | None
    tokenizer: TokenizerInfo | None
    source: Source | None
    lineage: tuple[Source, ...] = ()
    fingerprint: dict[str, str] = {}


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag="shard-opened", tag_field="line"):
    """A shard was begun; the lines of its chunks follow.

    Attributes:
        path: that it will have, relative to the dataset; until then it has `.partial` behind it.
        schema: its schema message.
    """

    path: RelativePath
    schema: bytes


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """What a part holds up to a chunk, and what rounding cost; see `logitstore.dataset.summary.Summary`.

    A float that is not finite is null, as JSON has it.
    """

    sequences: Count
    positions: Count
    candidates: Count
    encodings: dict[str, Count]
    columns: dict[str, Count]
    highest_id: int
    max_error: float | None
    kl_sum: float | None
    kl_positions: Count
    hits: Annotated[tuple[Count, ...], Meta(min_length=3, max_length=3)]
    scored: Count


class Chunked(msgspec.Struct, frozen=True, kw_only=True, tag="chunk", tag_field="line"):
    """A chunk was written to the shard that was opened last.

    Attributes:
        offset: of its message; so are the others as in the index.
        digest: xxh3-128 of the message.
        last: id of its last sequence.
        sums: of the part, up to here.
    """

    offset: Count
    length: Count
    sequences: Count
    positions: Count
    candidates: Count
    digest: Xxh3
    last: str
    sums: Sums


class Synced(msgspec.Struct, frozen=True, kw_only=True, tag="synced", tag_field="line"):
    """So many bytes of the shard that was opened last are on the disk."""

    bytes: Count


class Closed(msgspec.Struct, frozen=True, kw_only=True, tag="shard", tag_field="line"):
    """The shard that was opened last is complete; written before it gets its name."""

    info: ShardInfo


class Sent(msgspec.Struct, frozen=True, kw_only=True, tag="sent", tag_field="line"):
    """A shard is at this place, and no longer here."""

    path: RelativePath
    place: str


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done", tag_field="line"):
    """The part is complete; its tokenizer may have grown since the plan."""

    tokenizer: TokenizerInfo | None


Line = Plan | Opened | Chunked | Synced | Closed | Sent | Done

LINE_BYTES: Final = 2**25
"""The longest line: a schema message at its limit, in base64."""


def encode_line(line: Line) -> bytes:
    """A line of the journal.

    Raises:
        InvalidInputError: it is too long to be read again.
    """
    body = msgspec.json.encode(line)
    if len(body) > LINE_BYTES - 2 * _SUM_DIGITS:
        raise InvalidInputError(
            f"what is told the writer takes {len(body)} bytes; source, lineage and the like are too long"
        )
    return xxhash.xxh3_64_hexdigest(body).encode() + b" " + body + b"\n"


def decode_line(data: bytes, *, first: bool) -> Line | None:
    """The inverse of `encode_line`; None where it is not whole.

    Raises:
        CorruptDataError: a whole line is none of a journal.
        UnsupportedVersionError: a later release wrote it.
    """
    found, body = data[:_SUM_DIGITS], data[_SUM_DIGITS + 1 : -1]
    if data[-1:] != b"\n" or found != xxhash.xxh3_64_hexdigest(body).encode():
        return None
    return _decode(body, first=first)


def _decode(body: bytes, *, first: bool) -> Line:
    try:
        if first:
            said = msgspec.json.decode(body, type=_Versioned)
            check_version(FormatVersion.parse(said.version), said.written_by)
        line: Line = msgspec.json.decode(body, type=Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptDataError(f"this is no line of a journal: {error}", code="journal") from error
    except UnsupportedVersionError as error:
        raise UnsupportedVersionError(f"the journal is of {error}") from error
    if first != isinstance(line, Plan):
        raise CorruptDataError("a journal begins with its plan, and has only one", code="journal")
    path: Any = getattr(line, "path", None) or getattr(getattr(line, "info", None), "path", None)
    if path is not None and not is_safe_path(path):
        raise CorruptDataError(f"the journal names {path!r}, a path outside the dataset", code="journal")
    return line


class _Versioned(msgspec.Struct):
    version: str
    written_by: str = ""
