"""What a recovery did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lost:
    """Sequences that could not be saved, or a file without which they were.

    Attributes:
        path: the file in the directory that was recovered.
        reason: what was wrong.
        sequences: how many; None where that cannot be known.
        chunk: number of their chunk in the file; None where that is not known, or it is more than one.
        row: row number in the file of the first of them; None where that is not known.
        ids: the id of each of them in order, None for one that is not known for certain; empty where none is.
    """

    path: str
    reason: str
    sequences: int | None = None
    chunk: int | None = None
    row: int | None = None
    ids: tuple[str | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery did.

    Attributes:
        path: directory of the dataset, which was checked to the last row.
        sequences: in it.
        lost: what could not be saved.
        shards_whole: shards that are taken as they were.
        shards_salvaged: shards that were written anew, of what others had left.
        unverified_chunks: chunks that no digest covers: their rows are possible, and nothing more is known.
        unverified_sequences: in those.
        duplicates: sequences that were there twice, and are kept once.
        notes: what whoever uses the dataset should know.
        kept: directory in which the damaged files are; None where nothing was moved.
        unchanged: whether nothing was wrong, so that nothing was done.
    """

    path: str
    sequences: int
    lost: tuple[Lost, ...] = ()
    shards_whole: int = 0
    shards_salvaged: int = 0
    unverified_chunks: int = 0
    unverified_sequences: int = 0
    duplicates: int = 0
    notes: tuple[str, ...] = ()
    kept: str | None = None
    unchanged: bool = False

    @property
    def lost_sequences(self) -> int:
        """How many sequences are lost, as far as that is known."""
        return sum(each.sequences or 0 for each in self.lost)

    @property
    def lost_is_known(self) -> bool:
        """Whether it is known how many sequences are lost."""
        return all(each.sequences is not None for each in self.lost)
