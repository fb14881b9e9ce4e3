"""Sequences of a chunk as they are stored, to be written again: values are not decoded, and so never rounded twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.encoding.cells import CellDecoder
from logitstore.encoding.values import CELL_TYPES, Encoding, Values
from logitstore.errors import CorruptDataError
from logitstore.shard.chunk import OPTIONAL_TYPES, UNKNOWN_MASK, Chunk, StoredSequence

_PLAIN: Final = frozenset(["tokens", "ids"])
_DRAWN: Final = frozenset(["tokens", "ids", "draws"])


def stored_sequences(chunk: Chunk, rows: Sequence[int]) -> Iterator[StoredSequence]:
    """Some of a chunk's sequences, ready to be written.

    Args:
        chunk: read and verified.
        rows: which, by their rows in it.

    Returns:
        Sequences whose `columns` are Arrow arrays of one value each, of their own memory unless all rows are taken.

    Raises:
        CorruptDataError: the cells of one contradict each other.
    """
    columns = {name: _picked(chunk.batch.column(name), rows) for name in chunk.user_names}
    for number, row in enumerate(rows):
        try:
            yield _stored(chunk, row, {name: values.slice(number, 1) for name, values in columns.items()})
        except CorruptDataError as error:
            raise error.at(row=row) from error


def column_bytes(sequence: StoredSequence) -> int:
    """About how many bytes the users' columns of such a sequence take."""
    return sum(int(array.nbytes) for array in sequence.columns.values())


def _picked(column: pa.Array, rows: Sequence[int]) -> pa.Array:
    """These values; a copy, since a slice would keep the memory of the whole chunk for as long as it is there."""
    if len(rows) == len(column) or len(rows) == 0:
        return column
    return pa.concat_arrays([column.slice(row, 1) for row in rows])


def _stored(chunk: Chunk, row: int, columns: dict[str, pa.Array]) -> StoredSequence:
    encoding = chunk.encoding(row)
    drawn = encoding is Encoding.DRAWS
    sequence = chunk.sequence(row, _DRAWN if drawn else _PLAIN)
    decoder = CellDecoder(chunk.header.pco)
    optional: dict[str, NDArray[Any]] = {}
    for name, dtype in OPTIONAL_TYPES.items():
        if cell := chunk.cells[name][row].as_py():
            optional[name] = decoder.decode(cell, len(sequence.count), dtype)
    _check_optional(optional)
    if drawn and sequence.draws is not None:
        values = Values(encoding, np.empty(0, np.uint32), sequence.draws.view(np.uint32))
    else:
        present, total = int(np.count_nonzero(sequence.count)), int(sequence.offsets[-1])
        top_type, gap_type = CELL_TYPES[encoding]
        top = decoder.decode(chunk.cells["top"][row].as_py(), present, top_type)
        gaps = decoder.decode(chunk.cells["gaps"][row].as_py(), total - present, gap_type)
        logsumexp = optional.get("logsumexp") if encoding is Encoding.BFLOAT16 else None
        if encoding is Encoding.BFLOAT16 and present:
            _check_logsumexp(logsumexp, sequence.count)
        values = Values(encoding, top, gaps, logsumexp)
    ids = sequence.ids.view(np.uint32)
    return StoredSequence(sequence.id, sequence.tokens, sequence.count, ids, values, optional, columns)


def _check_optional(optional: dict[str, NDArray[Any]]) -> None:
    """Refuse what readers of these columns refuse."""
    if "target_rank" in optional and not optional["target_rank"].all():
        raise CorruptDataError("target_rank holds 0; ranks are from 1", code="cell")
    if "loss_mask" in optional and not np.isin(optional["loss_mask"], (0, 1, UNKNOWN_MASK)).all():
        raise CorruptDataError("loss_mask holds a value other than 0, 1 and unknown", code="cell")


def _check_logsumexp(logsumexp: NDArray[np.float32] | None, count: NDArray[np.uint32]) -> None:
    if logsumexp is None or not bool(np.isfinite(logsumexp[count > 0]).all()):
        raise CorruptDataError("bfloat16 logits without their logsumexp", code="cell")
