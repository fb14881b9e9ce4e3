"""How much a table may claim to hold: a few bytes of it can stand for gigabytes."""

from __future__ import annotations

from typing import Final

FREE_BYTES: Final = 2**26
"""What a table may always become in memory."""

BYTES_PER_BYTE: Final = 2**14
"""Above that, it may become so much for each byte of the file. Captures become about 10 times as large, and columns of
equal values beside them hardly change that."""

ROW_BYTES: Final = 2**10
"""What a row counts for, whatever it holds: it takes time."""

VALUE_BYTES: Final = 8
"""What a value counts for that takes nothing in the file, as null: Python has a reference to it."""


def check_claim(what: str, claimed: int, size: int) -> None:
    """Refuse what is out of all proportion to the file that it is in.

    Args:
        what: it is that is to be decoded.
        claimed: bytes that it becomes, with what was decoded before.
        size: of the file.

    Raises:
        ValueError: it is too much.
    """
    if claimed > max(FREE_BYTES, BYTES_PER_BYTE * size):
        claims = f"{what} would make {claimed:,} bytes of a file of {size:,}"
        raise ValueError(f"{claims}; where that is right, write the table without its columns of equal values")
