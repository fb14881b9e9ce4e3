"""What a reader asks of the bytes of a file, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import pyarrow as pa

Accept = Callable[[pa.Buffer], bool]
"""Whether bytes are those that were written. What is not accepted is fetched again, and not kept."""


Part = tuple[int, int, Accept]
"""(offset, length, accept) of a part of a file."""


class ByteSource(Protocol):
    """Something whose bytes can be read in ranges: a mapped file, or a remote one."""

    @property
    def path(self) -> str:
        """Name for messages."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    @property
    def opening(self) -> int:
        """How many bytes at the end a reader should read first."""

    @property
    def mapped(self) -> bool:
        """Whether bytes that were read once stay the same, so that they need not be verified again."""

    def read(self, offset: int, length: int, accept: Accept | None = None) -> pa.Buffer:
        """These bytes; the caller has checked the range against `size`.

        Bytes that are not accepted may come back nevertheless, when asking again did not help.
        """

    def read_together(self, parts: Sequence[Part]) -> list[pa.Buffer]:
        """Several parts, given in order, that follow one another without gaps: as `read` of each, by fewer requests."""
