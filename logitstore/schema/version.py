"""Versions of the format and feature flags (spec, "Versions and features")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from logitstore.errors import CorruptDataError, UnsupportedVersionError

FORMAT_NAME: Final = "logitstore"


_SHOWN: Final = 100

_VERSION: Final = re.compile(r"(0|[1-9][0-9]{0,4})\.(0|[1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True, order=True)
class FormatVersion:
    """A format version `major.minor`.

    A reader refuses a higher major. A higher minor adds only what a reader may ignore; what it may not ignore is a
    required feature.
    """

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @classmethod
    def parse(cls, text: str) -> FormatVersion:
        """From text such as `"1.0"`.

        Raises:
            CorruptDataError: this is no version.
        """
        match = _VERSION.fullmatch(text)
        if match is None:
            raise CorruptDataError(f"{text!r} is no format version", code="version")
        return cls(int(match[1]), int(match[2]))

    def is_readable(self) -> bool:
        """Whether this release reads files of this version."""
        return 1 <= self.major <= FORMAT_VERSION.major


FORMAT_VERSION: Final = FormatVersion(1, 0)
"""What this release writes, and the highest that it reads."""

KNOWN_FEATURES: Final[frozenset[str]] = frozenset()
"""Required features that this release knows. Version 1.0 has none."""

Name = Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9._-]*$", max_length=64)]


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """Feature flags. A reader refuses a required one that it does not know, and ignores an optional one."""

    required: tuple[Name, ...] = ()
    optional: tuple[Name, ...] = ()


class _Preamble(msgspec.Struct, frozen=True):
    format: str
    version: str
    features: Features = Features()
    written_by: str = ""  # of manifests


def check_readable(data: bytes) -> None:
    """Check format name, version and required features of a manifest or header before the rest is parsed.

    Raises:
        CorruptDataError: these fields are missing or are not what they must be.
        UnsupportedVersionError: this release cannot read it.
    """
    try:
        data.decode()  # msgspec looks only at the text of fields that it knows
        preamble = msgspec.json.decode(data, type=_Preamble)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptDataError(f"not the JSON of a {FORMAT_NAME} file: {error}", code="json") from error
    if preamble.format != FORMAT_NAME:
        raise CorruptDataError(f"format is {preamble.format!r}, not {FORMAT_NAME!r}", code="json")
    check_version(FormatVersion.parse(preamble.version), preamble.written_by)
    unknown = sorted(set(preamble.features.required) - KNOWN_FEATURES)
    if unknown:
        raise UnsupportedVersionError(
            f"this needs the feature {unknown[0]!r} (format version {preamble.version}), which this release of "
            f"logitstore does not know; {_advice(preamble.written_by)}"
        )


def check_version(version: FormatVersion, writer: str = "") -> None:
    """Refuse a version that this release does not read.

    Args:
        version: of the file.
        writer: the program that wrote it, and its version, where the file says that.

    Raises:
        CorruptDataError: there is no such version.
        UnsupportedVersionError: with the release that reads it.
    """
    if version.major < 1:
        raise CorruptDataError(f"format version {version} was never released", code="version")
    if not version.is_readable():
        raise UnsupportedVersionError(
            f"format version {version}, but this release of logitstore reads up to {FORMAT_VERSION.major}.x; "
            f"{_advice(writer)}"
        )


def _advice(writer: str) -> str:
    if not writer:
        return "install a later release"
    return f"install the release that wrote it ({writer[:_SHOWN]}), or a later one"
