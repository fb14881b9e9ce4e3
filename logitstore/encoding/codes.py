"""Codes: token ids as places in a chunk's token order (spec, "Token order and codes").

Ids are far from uniform, and which of them are frequent changes with the text: each chunk has its own order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import CorruptDataError
from logitstore.limits import ID_LIMIT, ORDER_LIMIT

_ID_BITS = 31

DENSE_LIMIT = 2**22
"""Ids below this are counted and looked up in tables of this length; others by sorting and searching."""


def token_order(*arrays: NDArray[Any]) -> NDArray[np.uint32]:
    """The ids that occur at least twice in the arrays, most frequent first, ties by id, at most 4,096.

    Args:
        arrays: non-negative integers below 2^31, any shape.

    Returns:
        uint32 [M'], M' <= 4096.
    """
    ids = np.concatenate([a.ravel() for a in arrays], dtype=np.intp) if arrays else np.empty(0, np.intp)
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


def id_encoder(order: NDArray[np.uint32], highest: int) -> Callable[[NDArray[Any]], NDArray[np.uint32]]:
    """The function that turns ids into codes: an id's place in the order, or M' + id when it is not in it.

    Args:
        order: uint32 [M'].
        highest: no id is above it.

    Returns:
        A function from integers in [0, highest] [n] to uint32 [n].
    """
    places = np.uint32(len(order))
    if highest < DENSE_LIMIT:
        table = np.arange(len(order), len(order) + highest + 1, dtype=np.uint32)
        table[order] = np.arange(len(order), dtype=np.uint32)
        return table.take
    if len(order) == 0:
        return lambda ids: ids.astype(np.uint32)
    by_id = np.argsort(order).astype(np.uint32)
    ordered = order[by_id]

    def search(ids: NDArray[Any]) -> NDArray[np.uint32]:
        found = np.minimum(np.searchsorted(ordered, ids), len(order) - 1)
        return np.where(ordered[found] == ids, by_id[found], ids.astype(np.uint32) + places)

    return search


def check_order(order: NDArray[np.uint32]) -> None:
    """Refuse an order that no writer makes.

    Raises:
        CorruptDataError: an id is out of range or stands twice.
    """
    if len(order) and int(order.max()) >= ID_LIMIT:
        raise CorruptDataError(f"the token order holds the id {int(order.max())}", code="order")
    if len(np.unique(order)) != len(order):
        raise CorruptDataError("the token order holds an id twice", code="order")
