"""Ragged rows: flat arrays with one count a row, and the few operations on them that everything else needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def uniform(count: NDArray[Any]) -> int:
    """The count that all rows share, or 0 when there are no rows, empty rows or different counts."""
    if len(count) == 0 or count[0] == 0:
        return 0
    k = int(count[0])
    return k if bool((count == k).all()) else 0


def offsets(count: NDArray[Any]) -> NDArray[np.int64]:
    """Where each row starts, and after them where the last one ends: int64 [rows + 1]."""
    ends = np.zeros(len(count) + 1, np.int64)
    np.cumsum(count, dtype=np.int64, out=ends[1:])
    return ends


def rows(count: NDArray[Any]) -> NDArray[np.int64]:
    """The row that each value belongs to: int64 [sum of counts]."""
    return np.repeat(np.arange(len(count)), count)


def firsts(count: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values are the first of their row: bool [sum of counts]."""
    ends = offsets(count)
    mask = np.zeros(int(ends[-1]), np.bool_)
    mask[ends[:-1][count > 0]] = True
    return mask


def present(count: NDArray[Any]) -> NDArray[Any]:
    """The counts of the rows that are not empty."""
    return count if len(count) and count.min() > 0 else count[count > 0]


def are_firsts(at: NDArray[np.int64], count: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of these flat indexes are those of a row's first value."""
    if k := uniform(count):
        return np.asarray(at % k == 0)
    return firsts(count)[at]


def heads(values: NDArray[Any], count: NDArray[Any]) -> NDArray[Any]:
    """The first value of each row that is not empty, as an array of its own."""
    if k := uniform(count):
        return values[::k].copy()
    return np.asarray(values[offsets(count)[:-1][count > 0]])


def lasts(values: NDArray[Any], count: NDArray[Any]) -> NDArray[Any]:
    """The last value of each row that is not empty."""
    if k := uniform(count):
        return values[k - 1 :: k]
    return np.asarray(values[offsets(count)[1:][count > 0] - 1])


def spread(values: NDArray[Any], count: NDArray[Any]) -> NDArray[Any]:
    """One value a row, repeated for each value of that row: [sum of counts]."""
    return np.repeat(values, count)


def row_sums(values: NDArray[Any], count: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of each row, 0 for empty ones: float64 [rows]."""
    if k := uniform(count):
        return np.asarray(values.reshape(-1, k).sum(axis=1, dtype=np.float64))
    sums = np.zeros(len(count))
    present = count > 0
    if present.any():
        sums[present] = np.add.reduceat(values, offsets(count)[:-1][present], dtype=np.float64)
    return sums


def row_dots(a: NDArray[np.float64], b: NDArray[np.float64], count: NDArray[Any]) -> NDArray[np.float64]:
    """The sum of the products of each row, 0 for empty ones: float64 [rows]."""
    if k := uniform(count):
        return np.asarray(np.einsum("ij,ij->i", a.reshape(-1, k), b.reshape(-1, k)))
    return row_sums(a * b, count)


def ranks(count: NDArray[Any]) -> NDArray[np.int64]:
    """The place of each value in its row, from 0: int64 [sum of counts]."""
    ends = offsets(count)
    return np.arange(int(ends[-1])) - np.repeat(ends[:-1], count)


def differences(values: NDArray[Any], count: NDArray[Any]) -> NDArray[Any]:
    """Each value minus the one before it in its row: [sum of counts - non-empty rows]."""
    if k := uniform(count):
        return np.diff(values.reshape(-1, k), axis=1).ravel()
    return np.diff(values)[~firsts(count)[1:]]


def running_sums(steps: NDArray[Any], count: NDArray[Any]) -> NDArray[np.uint32]:
    """The sums that undo `differences`, from 0 at the first value of each row, modulo 2^32.

    Args:
        steps: unsigned integers [sum of counts - non-empty rows].
        count: values of each row.

    Returns:
        uint32 [sum of counts].
    """
    if k := uniform(count):
        matrix = np.empty((len(count), k), np.uint32)
        matrix[:, 0] = 0
        np.cumsum(steps.reshape(len(count), k - 1), axis=1, dtype=np.uint32, out=matrix[:, 1:])
        return matrix.ravel()
    sums = np.zeros(len(steps) + 1, np.uint32)
    np.cumsum(steps, dtype=np.uint32, out=sums[1:])
    present = count[count > 0]
    row = rows(present)
    starts = offsets(present)[:-1] - np.arange(len(present))
    return np.asarray(sums[np.arange(len(row)) - row] - sums[starts][row])
