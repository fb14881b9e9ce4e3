"""How many values so few bytes may stand for (spec, "Limits"): asked before memory is taken, and before writing."""

from __future__ import annotations

import pyarrow as pa

from logitstore.errors import CorruptDataError, InvalidInputError
from logitstore.limits import UNBACKED_VALUES, most_chunk_values, most_values
from logitstore.shard.usertypes import FREE_VALUES_PER_BYTE, free_values


def check_number(n: int, what: str, limit: int, stored: int) -> None:
    """Check a number that a sequence claims, when it is read.

    Args:
        n: its positions or candidates.
        what: which of them.
        limit: whatever its bytes.
        stored: bytes of its cells.

    Raises:
        CorruptDataError: it is over a limit.
    """
    if n > limit:
        raise CorruptDataError(f"a sequence of {n} {what}, over the limit", code="cell")
    if n > most_values(stored):
        raise CorruptDataError(f"a sequence of {n} {what} in {stored} bytes, over the limit", code="cell")


def check_row(sequence_id: str, positions: int, candidates: int, cells: dict[str, bytes]) -> None:
    """Check a sequence that is written.

    Raises:
        InvalidInputError: readers would refuse it.
    """
    most = max(positions, candidates)
    if most > UNBACKED_VALUES and most > most_values(stored := sum(map(len, cells.values()))):
        raise InvalidInputError(
            f"sequence {sequence_id!r}: {positions} positions and {candidates} candidates take {stored} bytes, and "
            f"readers refuse more than {most_values(stored)} in so few bytes as forged; split it into shorter ones"
        )


def check_message(what: str, positions: int, candidates: int, size: int, user: list[pa.Array]) -> None:
    """Check a chunk that is written.

    Args:
        what: names its sequences.
        positions: in all.
        candidates: in all.
        size: bytes of the message.
        user: the users' columns.

    Raises:
        InvalidInputError: readers would refuse it.
    """
    if max(positions, candidates) > most_chunk_values(size):
        raise InvalidInputError(
            f"{what} have {positions} positions and {candidates} candidates in {size} bytes, and readers refuse more "
            f"than {most_chunk_values(size)} in so few bytes as forged; write smaller chunks"
        )
    if (free := sum(map(free_values, user))) > FREE_VALUES_PER_BYTE * size:
        raise InvalidInputError(
            f"{what} have {free} values that take no bytes (null, or structs and lists of nothing) in columns of "
            f"their own, more than readers allow; leave them out"
        )
