"""The one decoder, numpy form: after pcodec, decoding is a gather, a running sum, and a multiply-add.

This form is the reference. Other devices' forms must equal it bit for bit in ids, and to one unit in the last place
of float32 in logprobs.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.encoding.ordinals import bfloat16_to_float32, ordinals_to_bits
from logitstore.limits import ORDER_LIMIT


def decode_ids(codes: NDArray[np.uint32], order: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Codes as ids: one gather from `concatenate([order, 0, 1, 2, …])`, without building that table.

    Args:
        codes: uint32 [n].
        order: uint32 [M'].

    Returns:
        uint32 [n]. Whether an id is in range is for the caller to check.
    """
    if len(order) == 0:
        return codes
    places = np.uint32(len(order))
    return np.where(codes < places, order.take(codes, mode="clip"), codes - places)


class _Tables(threading.local):
    """The table of a thread: only the order in it changes from chunk to chunk."""

    width = -1
    table: NDArray[np.int32] = np.empty(0, np.int32)


_tables = _Tables()


def id_table(order: NDArray[np.uint32], width: int) -> NDArray[np.int32]:
    """That table itself, for ids below the logit width: one gather a sequence.

    It is the thread's own, and holds until the thread's next call: the ids behind the order are written once.

    Args:
        order: uint32 [M'], M' at most `ORDER_LIMIT`.
        width: the logit width.

    Returns:
        int32 [M' + width], the id of each code.
    """
    if _tables.width != width:
        _tables.table = np.concatenate([np.zeros(ORDER_LIMIT, np.int32), np.arange(width, dtype=np.int32)])
        _tables.width = width
    table = _tables.table[ORDER_LIMIT - len(order) :]
    table[: len(order)] = order.view(np.int32)
    return table


def decode_grid(
    top: NDArray[np.float32], gaps: NDArray[Any], count: NDArray[Any], resolution: float
) -> NDArray[np.float32]:
    """Logprobs from the grid: `top - resolution * (running sum of gaps)`; one rounding to float32 each.

    Args:
        top: float32 [P], the best candidate's logprob at each position with candidates.
        gaps: uint16 or uint32 [N - P], steps from each candidate to the next.
        count: candidates of those positions [P].
        resolution: nats a step, a power of two.

    Returns:
        float32 [N].
    """
    logprobs = ragged.running_sums(gaps, count).view(np.int32).astype(np.float32)
    logprobs *= np.float32(-resolution)  # exact below 2^24 steps
    return _add_to_rows(logprobs, top, count)


def decode_ordinals(top: NDArray[Any], gaps: NDArray[Any], count: NDArray[Any]) -> NDArray[Any]:
    """Bit patterns from ordinals: `top - (running sum of gaps)`, then the inverse of the ordinal map.

    Args:
        top: uint16 or uint32 [P].
        gaps: uint16 or uint32 [N - P].
        count: candidates of those positions [P].

    Returns:
        Bit patterns of the type of `top` [N].
    """
    steps = ragged.running_sums(gaps, count)
    return ordinals_to_bits((ragged.spread(top.astype(np.uint32), count) - steps).astype(top.dtype))


def logits_to_logprobs(
    bits: NDArray[np.uint16], logsumexp: NDArray[np.float32], count: NDArray[Any]
) -> NDArray[np.float32]:
    """Logprobs from bfloat16 logits: `logit - logsumexp` in float32.

    Args:
        bits: bfloat16 bit patterns, uint16 [N].
        logsumexp: float32 [P].
        count: candidates of each position [P].

    Returns:
        float32 [N].
    """
    return _add_to_rows(bfloat16_to_float32(bits), -logsumexp, count)


def _add_to_rows(values: NDArray[np.float32], add: NDArray[np.float32], count: NDArray[Any]) -> NDArray[np.float32]:
    if k := ragged.uniform(count):
        matrix = values.reshape(-1, k)
        matrix += add[:, None]
    else:
        values += ragged.spread(add, count)
    return values
