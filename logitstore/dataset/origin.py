"""What a writer is told besides its settings: where distributions come from, and where shards go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from logitstore.schema import ShardInfo, Source, Teacher
from logitstore.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Origin:
    """Where distributions come from; what is not known is None.

    `fingerprint`: what else must be the same for a writer to be gone on with, by name.
    """

    teacher: Teacher | None = None
    tokenizer: Tokenizer | None = None
    source: Source | None = None
    lineage: tuple[Source, ...] = ()
    fingerprint: dict[str, str] = field(default_factory=dict)


class Sink(Protocol):
    """Takes complete shards to another place while writing goes on; they are removed here when they have arrived."""

    def take(self, path: Path, info: ShardInfo) -> None:
        """Begin to take a shard away; returns at once."""

    def arrived(self, *, wait: bool) -> Iterable[tuple[str, str]]:
        """(path in the dataset, where it is now) of each shard that has arrived since; waits for all when told to."""

    def close(self) -> None:
        """Stop; what has not arrived stays here."""
