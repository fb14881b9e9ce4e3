"""The shard header: the JSON under the key `logitstore` of a shard's Arrow schema (spec, "Shard header")."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from logitstore.errors import CorruptDataError
from logitstore.limits import ID_LIMIT
from logitstore.schema.version import FORMAT_NAME, Features, check_readable

Normalised = Literal["vocabulary", "candidates"]
"""Over what the probabilities of a position sum to one."""

LogitWidth = Annotated[int, Meta(ge=1, le=ID_LIMIT)]
Temperature = Annotated[float, Meta(gt=0, le=1e6)]
Resolution = Annotated[float, Meta(ge=2.0**-20, le=1.0)]

HEADER_KEY: Final = b"logitstore"
"""Key of the header in the schema's metadata, and of a chunk's JSON in its message's metadata."""


class ShardHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is needed to decode a shard by itself.

    Attributes:
        format: always `logitstore`.
        version: format version, `major.minor`.
        features: feature flags.
        pco: pcodec format version of the cells.
        logit_width: candidate ids are below this; null when it was not known.
        normalised: over what the probabilities sum to one.
        temperature: at which the logprobs were taken.
        resolution: nats a step of the grid, a power of two.
    """

    format: Literal["logitstore"] = FORMAT_NAME
    version: str
    features: Features = Features()
    pco: str
    logit_width: LogitWidth | None
    normalised: Normalised
    temperature: Temperature
    resolution: Resolution


class ChunkInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON in a chunk message's metadata: the token order as a base64 cell, and its length."""

    order: str
    order_length: Annotated[int, Meta(ge=0, le=4096)]


def serialise_header(header: ShardHeader) -> bytes:
    """The header as JSON, always the same bytes for the same header."""
    return msgspec.json.encode(header)


def parse_header(data: bytes) -> ShardHeader:
    """The inverse of `serialise_header`.

    Raises:
        CorruptDataError: not a valid header.
        UnsupportedVersionError: this release cannot read it.
    """
    check_readable(data)
    try:
        header = msgspec.json.decode(data, type=ShardHeader)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptDataError(f"the shard header is not valid: {error}", code="shard-header") from error
    if not is_power_of_two(header.resolution):
        raise CorruptDataError(f"resolution {header.resolution} is no power of two", code="shard-header")
    return header


def parse_chunk_info(data: bytes) -> ChunkInfo:
    """The JSON of a chunk.

    Raises:
        CorruptDataError: it is not valid.
    """
    try:
        return msgspec.json.decode(data, type=ChunkInfo)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptDataError(f"the chunk's metadata is not valid: {error}", code="chunk-metadata") from error


def is_power_of_two(value: float) -> bool:
    """Whether multiplying by this number is exact in binary floating point."""
    return math.frexp(value)[0] == 0.5
