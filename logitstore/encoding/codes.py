"""Codes: token ids as places in a chunk's token order (spec, "Token order and codes").

Ids are far from uniform, and which of them are frequent changes with the text: each chunk has its own order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptDataError
from logitstore.limits import ID_LIMIT, ORDER_LIMIT

_ID_BITS = 31

DENSE_LIMIT = 2**22
"""Ids below this are counted and looked up in tables of this length; others by sorting and searching."""


def token_order(ids: NDArray[np.intp]) -> NDArray[np.uint32]:
    """The ids that occur at least twice, most frequent first, ties by id, at most 4,096.

    Args:
        ids: from 0 to 2^31 - 1 [n].

    Returns:
        uint32 [M'], M' <= 4096.
    """
    if len(ids) and int(ids.max()) < DENSE_LIMIT:
        # Counting is several times as fast as sorting; vocabularies are below the limit.
        all_times = np.bincount(ids)
        ids = np.flatnonzero(all_times >= 2)
        times = all_times[ids]
    else:
        ids, times = np.unique(ids, return_counts=True)
        ids, times = ids[times >= 2], times[times >= 2]
    # Falling frequency and rising id in one number: sorting plain integers is several times as fast as by keys.
    keys = (-times.astype(np.int64) << _ID_BITS) | ids
    return (np.sort(keys)[:ORDER_LIMIT] & (ID_LIMIT - 1)).astype(np.uint32)


def encode_ids(ids: NDArray[np.intp], order: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ids as codes: an id's place in the order, or M' + id when it is not in it.

    Args:
        ids: from 0 to 2^31 - 1 [n].
        order: uint32 [M'], of these ids.

    Returns:
        uint32 [n].
    """
    places = np.uint32(len(order))
    if len(order) == 0:
        return ids.astype(np.uint32)
    highest = int(ids.max())
    if highest < DENSE_LIMIT:
        table = np.arange(len(order), len(order) + highest + 1, dtype=np.uint32)
        table[order] = np.arange(len(order), dtype=np.uint32)
        return table.take(ids)
    by_id = np.argsort(order).astype(np.uint32)
    ordered = order[by_id]
    found = np.minimum(np.searchsorted(ordered, ids), len(order) - 1)
    return np.where(ordered[found] == ids, by_id[found], ids.astype(np.uint32) + places)


def check_order(order: NDArray[np.uint32]) -> None:
    """Refuse an order that no writer makes.

    Raises:
        CorruptDataError: an id is out of range or stands twice.
    """
    if len(order) and int(order.max()) >= ID_LIMIT:
        raise CorruptDataError(f"the token order holds the id {int(order.max())}", code="order")
    if len(np.unique(order)) != len(order):
        raise CorruptDataError("the token order holds an id twice", code="order")
