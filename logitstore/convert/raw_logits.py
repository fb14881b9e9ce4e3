"""Raw logits of the best candidates alone: without the logsumexp over the vocabulary, only their ratios are known."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.convert.rows import Rows, over_candidates
from logitstore.errors import SourceError
from logitstore.limits import ID_LIMIT

CANDIDATES_NOTE: Final = (
    "The capture has raw logits of the best candidates and no logsumexp, so probabilities are normalised over the "
    "candidates alone: their ratios are right, what the rest of the vocabulary had is not known."
)


def rows_of_logits(ids: NDArray[Any], logits: NDArray[Any]) -> Rows:
    """Rows of as many candidates each, in any order.

    Args:
        ids: integers [R, K].
        logits: floats [R, K]; -inf is probability zero.

    Raises:
        SourceError: a logit is NaN or infinite upwards, or a row has nothing but -inf; naming the row.
    """
    ids, values = best_first(ids.astype(np.int64), logits.astype(np.float32))
    wrong = ~(values < np.inf)
    if bool(wrong.any()):
        row, rank = np.argwhere(wrong)[0]
        raise SourceError(f"row {row}: the logit of the id {ids[row, rank]} is {values[row, rank]}; capture it again")
    empty = ~(values > -np.inf).any(axis=1)
    if bool(empty.any()):
        raise SourceError(f"row {int(np.argmax(empty))}: all logits are -inf; capture it again")
    count = np.full(len(values), values.shape[1], np.int64)
    return Rows(count, ids.ravel(), over_candidates(count, values.ravel()))


def best_first(ids: NDArray[np.int64], values: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The candidates of each row, [R, K] both, highest first and equal ones by id.

    The writer sorts too, but one row at a time looks like another to it; here rows have one length, and one number
    stands for value and id. Rows with an id that is none stay as they are, since the writer refuses them.
    """
    if ids.size == 0 or int(ids.min()) < 0 or int(ids.max()) >= ID_LIMIT:
        return ids, values
    bits = np.ascontiguousarray(values).view(np.uint32)
    flip = np.where(bits >> 31, np.uint32(0), np.uint32(0x7FFFFFFF))  # the order of numbers, from the highest on
    key = ((bits ^ flip).astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64)
    key.sort(axis=1)
    bits = (key >> np.uint64(32)).astype(np.uint32)
    bits ^= np.where(bits >> 31, np.uint32(0), np.uint32(0x7FFFFFFF))
    return (key & np.uint64(0xFFFFFFFF)).astype(np.int64), bits.view(np.float32)
