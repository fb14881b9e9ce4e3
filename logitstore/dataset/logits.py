"""Dense logits to candidates: the part of a model's output that is kept, and what is kept of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from logitstore.dataset.input import Candidates, as_array
from logitstore.encoding.ordinals import bfloat16_to_float32
from logitstore.errors import InvalidInputError

_BLOCK: Final = 2**22  # logits converted at once: bounds memory whatever T and V are


@dataclass(frozen=True, slots=True)
class Reduced:
    """What is kept of dense logits; everything over T positions.

    Attributes:
        candidates: best first, equal logits by id.
        tail: log of the probability that they do not cover, float64 [T].
        logsumexp: float32 [T].
        target_logprob: of tokens[t + 1], float32 [T], NaN where there is none.
        target_rank: its rank from 1 (equal logits rank by id), int64 [T], 0 where there is none.
    """

    candidates: Candidates
    tail: NDArray[np.float64]
    logsumexp: NDArray[np.float32]
    target_logprob: NDArray[np.float32]
    target_rank: NDArray[np.int64]


def reduce_logits(tokens: NDArray[np.uint32], logits: ArrayLike, top_k: int) -> Reduced:
    """Keep the best `top_k` logits of each position.

    Args:
        tokens: uint32 [T].
        logits: float32 or float16 [T, V], or bfloat16 as its bit patterns in uint16 [T, V]; -inf is probability zero.
        top_k: candidates kept.

    Raises:
        InvalidInputError: wrong dtype or shape; NaN, +inf, or a position of -inf alone.
    """
    array = as_array("logits", logits, "fu", "float32, float16, or bfloat16 given as uint16,")
    if array.dtype not in (np.float32, np.float16, np.uint16):
        raise InvalidInputError(f"logits has dtype {array.dtype}; float32, float16 or bfloat16 as uint16 are needed")
    if array.ndim != 2 or len(array) != len(tokens) or array.shape[1] == 0:
        raise InvalidInputError(f"logits has shape {list(array.shape)} for {len(tokens)} tokens; [T, V] is needed")
    targets = np.full(len(tokens), -1, np.int64)
    targets[:-1] = tokens[1:]
    targets[targets >= array.shape[1]] = -1  # input tokens may exceed the logit width
    step = max(1, _BLOCK // array.shape[1])
    rows: list[dict[str, Any]] = []
    for start in range(0, len(array), step):
        block = array[start : start + step]
        values = bfloat16_to_float32(block) if block.dtype == np.uint16 else block.astype(np.float32)
        _check_finite(values, start)
        rows += [_reduce_row(row, min(top_k, len(row)), targets[start + i]) for i, row in enumerate(values)]
    count = np.array([len(row["ids"]) for row in rows], np.uint32)
    candidates = Candidates(count, *(_join(rows, name, dtype) for name, dtype in _FLAT))
    return Reduced(
        candidates,
        np.array([row["tail"] for row in rows], np.float64),
        np.array([row["logsumexp"] for row in rows], np.float32),
        np.array([row["target_logprob"] for row in rows], np.float32),
        np.array([row["target_rank"] for row in rows], np.int64),
    )


_FLAT: Final = (("ids", np.int32), ("logprobs", np.float32), ("logits", np.float32))


def _join(rows: list[dict[str, Any]], name: str, dtype: type) -> NDArray[Any]:
    return np.concatenate([row[name] for row in rows] or [np.empty(0)]).astype(dtype)


def _check_finite(values: NDArray[np.float32], start: int) -> None:
    highest = values.max(axis=1)
    if not bool(np.isfinite(highest).all()):
        at = int(np.argmin(np.isfinite(highest)))
        raise InvalidInputError(f"position {start + at}: the highest logit is {highest[at]}")


def _reduce_row(logits: NDArray[np.float32], k: int, target: int) -> dict[str, Any]:
    threshold = np.partition(logits, len(logits) - k)[len(logits) - k]
    ids = np.flatnonzero((logits >= threshold) & (logits > -np.inf))
    # Stable: equal logits stay in the order of ids, and the cut comes after.
    ids = ids[np.argsort(-logits[ids], kind="stable")[:k]]
    kept = logits[ids]
    weights = np.exp(logits - kept[0])
    total = weights.sum(dtype=np.float64)
    logsumexp = np.float32(float(kept[0]) + np.log(total))
    rest = total - weights[ids].sum(dtype=np.float64)
    # The same weights in two sums: what is left below their rounding is nothing.
    tail = np.log(rest / total) if rest > total * 1e-15 * len(logits) else -np.inf
    rank, logprob = 0, np.float32(np.nan)
    if target >= 0:
        value = logits[target]
        rank = 1 + int((logits > value).sum()) + int((logits[:target] == value).sum())
        logprob = np.float32(value - logsumexp)
    return {
        "ids": ids,
        "logprobs": kept - logsumexp,
        "logits": kept,
        "tail": tail,
        "logsumexp": logsumexp,
        "target_logprob": logprob,
        "target_rank": rank,
    }
