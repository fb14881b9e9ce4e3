"""`trl`, out: a Parquet file with the columns that TRL's distillation trainers read (see `trl`, which reads it back).

All rows of a file have the same width. The rows are those of the completion: from the first position that has a
distribution or is trained on to the last but one, since the last predicts a token that is not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Export, Exporter
from logitstore.convert.beside import next_tokens
from logitstore.convert.export_rows import NEEDED, rectangle, width_of, write_table
from logitstore.convert.trl import OWN
from logitstore.dataset.reader import Dataset
from logitstore.encoding import ragged
from logitstore.shard.sequence import Sequence

_EXPORTED: Final = {
    "input_ids": (pa.int32(), 1),
    "completion_mask": (pa.int8(), 1),
    "topk_logprobs": (pa.float32(), 2),
    "topk_token_ids": (pa.int32(), 2),
    "actual_logprobs": (pa.float32(), 1),
}


def actual_logprobs(stored: Sequence) -> NDArray[np.float32]:
    """The logprob of tokens[t + 1] at each position t: the candidate's, else what is stored of it, else -inf."""
    count = stored.count.astype(np.int64)
    said = np.full(len(count), -np.inf, np.float32)
    if stored.target_logprob is not None:
        known = ~np.isnan(stored.target_logprob)
        said[known] = stored.target_logprob[known]
    row = ragged.rows(count)
    own = stored.ids == next_tokens(stored.tokens.astype(np.int64), np.arange(len(count)))[row]
    said[row[own]] = stored.logprobs[own]
    return said


def _write(dataset: Dataset, path: Path, options: Export) -> list[str]:
    lost = {"last": 0, "unknown": 0}
    k, notes = width_of(dataset, options.k)

    def columns_of(stored: Sequence) -> dict[str, NDArray[Any]]:
        ids, logprobs = rectangle(stored, k, -np.inf)
        ids[np.isneginf(logprobs)] = 0
        wanted = stored.count > 0
        mask = wanted if stored.loss_mask is None else stored.loss_mask != 0
        rows = slice(int(np.argmax(wanted | mask)) if (wanted | mask)[:-1].any() else max(0, len(mask) - 1), -1)
        actual = actual_logprobs(stored)[rows]
        lost["last"] += int(wanted[-1:].sum())
        lost["unknown"] += int((np.isneginf(actual) & wanted[rows]).sum())
        return {
            "input_ids": stored.tokens.astype(np.int32),
            "completion_mask": np.insert(mask[:-1], 0, values=False)[: len(mask)].astype(np.int8),
            "topk_logprobs": logprobs[rows],
            "topk_token_ids": ids[rows].astype(np.int32),
            "actual_logprobs": actual,
        }

    needed = (*NEEDED, "target_logprob")
    notes += write_table(dataset, path, options, _EXPORTED, columns_of, taken=OWN, needed=needed)
    if lost["last"]:
        notes.append(f"{lost['last']:,} sequences have a distribution at their last position, of a token that is not "
                     f"there; these were left out.")  # fmt: skip
    if lost["unknown"]:
        notes.append(f"At {lost['unknown']:,} positions the logprob of the real token is not known; actual_logprobs is "
                     f"-inf there.")  # fmt: skip
    return notes


EXPORTER: Final = Exporter(
    name="trl",
    description="TRL: a Parquet file with topk_logprobs, topk_token_ids and actual_logprobs of the completions",
    loses=(
        "the last position's distribution, tail, target_rank, logsumexp, entropy, draws, splits, teacher and "
        "tokenizer; a loss_mask that is unknown"
    ),
    write=_write,
)
