"""The limits of format version 1, as the specification states them (spec/README.md, "Limits")."""

from __future__ import annotations

ID_LIMIT = 2**31
"""Token ids are below this: they fit a signed 32-bit integer, the only kind that torch indexes with."""

ORDER_LIMIT = 4096
"""The most ids in a chunk's token order."""

SEQUENCE_CANDIDATES = 2**24
"""The most candidates of one sequence: pcodec's largest page."""

SEQUENCE_POSITIONS = 2**24
"""The most positions of one sequence: likewise."""

UNBACKED_VALUES = 2**20
"""A sequence may have so many positions, and candidates, however few bytes its cells take."""

VALUES_PER_BYTE = 256
"""Above that, it has at most so many for each byte of its cells: 9 bytes of equal values could claim 2^24."""

SEQUENCE_ID_BYTES = 2**20
"""The longest id of a sequence that is written, in characters: it stands in the journal too."""

CHUNK_CANDIDATES = 2**19
"""A chunk closes at this many candidates, unless the writer is told another number."""

CHUNK_POSITIONS = 2**16
"""A chunk closes at this many positions."""

CHUNK_SEQUENCES = 2**16
"""A chunk closes at this many sequences: empty ones have neither positions nor candidates."""

CHUNK_COLUMN_BYTES = 2**26
"""A chunk closes when the users' columns hold about this many bytes."""

MESSAGE_BYTES = 2**31 - 1
"""The largest chunk message: Arrow's 32-bit offsets end here."""

SCHEMA_BYTES = 2**24
"""The largest schema message."""

MANIFEST_BYTES = 2**28
"""The largest manifest."""

GRID_STEPS = 2**24
"""Steps under the best candidate that the grid can count: float32 holds every integer below this."""

TAIL_STEPS = 32
"""Steps of the stored tail in one nat."""

PROBABILITY_SLACK = 1e-4
"""How far the probabilities at one position may sum above 1, for rounding in the engine that made them."""


def most_values(stored: int) -> int:
    """The most positions, and the most candidates, that a sequence may have.

    Args:
        stored: bytes of its cells.
    """
    return max(UNBACKED_VALUES, VALUES_PER_BYTE * stored)


def most_chunk_values(stored: int) -> int:
    """The most positions, and the most candidates, that a chunk may have.

    Args:
        stored: bytes of its message. Sequences that may be stored fit: a chunk is closed before it has half of these.
    """
    return 2 * most_values(stored)
