"""Dense logits of some positions of a sequence, made into what `Writer.add` takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.convert.rows import spread
from logitstore.dataset.logits import Reduced, reduce_logits
from logitstore.errors import InvalidInputError, SourceError

_BLOCK: Final = 2**22  # logits that are reduced at once


def rows_of_dense(tokens: NDArray[np.int64], first: int, logits: NDArray[Any], top_k: int) -> dict[str, Any]:
    """Arguments of `Writer.add`: logprobs over the vocabulary, with tail, logsumexp and target, of some positions.

    Args:
        tokens: integers [T].
        first: the position of the first row; row at t predicts tokens[t + 1].
        logits: floats [R, V], or bfloat16 as its bit patterns in uint16.
        top_k: candidates that are kept.

    Raises:
        SourceError: the logits are of another kind, or the highest of a row is NaN or infinite.
    """
    if logits.ndim != 2 or (logits.size == 0 and len(logits)):
        raise SourceError(f"logits are {logits.dtype} {list(logits.shape)}; [rows, vocabulary] are needed")
    step = max(1, _BLOCK // max(1, logits.shape[1]))
    parts = [_none(top_k)]
    for start in range(0, len(logits), step):
        block = logits[start : start + step]
        block = block.astype(np.float32) if block.dtype == np.float64 else block
        following = tokens[first + start : first + start + len(block) + 1].astype(np.uint32)
        rows = len(block)
        if len(following) > rows:  # a row of the last token, which is there for the target of the one before
            block = np.concatenate((block, block[-1:]))
        parts.append(_reduce(following, block, top_k, start, rows))
    at = slice(first, first + len(logits))

    def column(name: str, fill: float) -> NDArray[Any]:
        return spread(np.concatenate([getattr(part, name) for part in parts]), at, len(tokens), fill)

    return {
        "tokens": tokens,
        "ids": np.concatenate([part.candidates.ids for part in parts]),
        "logprobs": np.concatenate([part.candidates.logprobs for part in parts]),
        "count": spread(np.concatenate([part.candidates.count for part in parts]), at, len(tokens), 0),
        "target_rank": column("target_rank", 0),
        **{name: column(name, np.nan) for name in ("tail", "logsumexp", "target_logprob")},
    }


def _none(top_k: int) -> Reduced:
    """No rows, of the types that rows have."""
    return reduce_logits(np.empty(0, np.uint32), np.empty((0, 1), np.float32), top_k)


def _reduce(tokens: NDArray[np.uint32], logits: NDArray[Any], top_k: int, start: int, rows: int) -> Reduced:
    """The first rows of a block, reduced."""
    highest = logits.max(axis=1) if logits.dtype.kind == "f" else np.zeros(1)
    if not bool(np.isfinite(highest).all()):
        at = int(np.argmin(np.isfinite(highest)))
        raise SourceError(f"logits, row {start + at}: the highest is {highest[at]}; capture it again")
    try:
        reduced = reduce_logits(tokens, logits, top_k)
    except InvalidInputError as error:
        raise SourceError(f"logits, rows from {start}: {error}") from error
    given = reduced.candidates
    kept = int(given.count[:rows].sum(dtype=np.int64))
    candidates = replace(given, count=given.count[:rows], ids=given.ids[:kept], logprobs=given.logprobs[:kept])
    names = ("tail", "logsumexp", "target_logprob", "target_rank")
    return replace(reduced, candidates=candidates, **{name: getattr(reduced, name)[:rows] for name in names})
