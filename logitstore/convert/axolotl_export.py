"""`axolotl`, out: a Parquet file of rows as axolotl's tokeniser leaves them (see `axolotl`, which reads it back).

A table with `input_ids`, `attention_mask` and `labels` is taken for tokenised, whatever else it holds, so the columns
that the collator takes must be there: `target_logprobs`, `target_token_ids` and `target_mask`, a row for each token
and as many candidates in each. Row i predicts token i + 1. `target_logprobs` are normalised over the candidates, as
its tokeniser does that, and stay at the temperature of the dataset. `target_mask` is 0 for pads, and in rows that have
no distribution or whose next token has no label.

`logprobs` are those of the dataset. The trainer drops what it does not know, unless it packs samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.axolotl import IGNORED, OWN, PAD_LOGPROB
from logitstore.convert.base import Export, Exporter
from logitstore.convert.export_rows import rectangle, width_of, write_table
from logitstore.convert.export_tables import cut
from logitstore.convert.rows import over_candidates
from logitstore.dataset.reader import Dataset
from logitstore.shard.sequence import Sequence

_EXPORTED: Final = {
    "input_ids": (pa.int32(), 1),
    "attention_mask": (pa.int8(), 1),
    "labels": (pa.int32(), 1),
    "target_logprobs": (pa.float32(), 2),
    "target_token_ids": (pa.int32(), 2),
    "target_mask": (pa.int8(), 2),
    "logprobs": (pa.float32(), 2),
}
_PACKING_NOTE: Final = (
    "The column logprobs is there to be read back. With sample_packing the trainer gives every list to the model: "
    "leave that column out then, and further ones of lists."
)


def _write(dataset: Dataset, path: Path, options: Export) -> list[str]:
    k, notes = width_of(dataset, options.k)
    notes += write_table(dataset, path, options, _EXPORTED, lambda stored: _columns(stored, k), taken=OWN)
    temperature = dataset.info.temperature
    return [*notes, f"target_logprobs are at the temperature {temperature:g}: set kd_temperature to it.", _PACKING_NOTE]


def _columns(stored: Sequence, k: int) -> dict[str, NDArray[Any]]:
    """The columns of a sequence, all candidates [T, k]."""
    kept = cut(stored, k)
    ids, logprobs = rectangle(kept, k, PAD_LOGPROB)
    tokens = stored.tokens.astype(np.int32)
    labels = tokens.copy()
    if stored.loss_mask is not None:
        labels[1:][stored.loss_mask[:-1] == 0] = IGNORED
    labels[:1] = IGNORED  # no row predicts the first token
    listed = np.arange(k) < kept.count[:, None]
    target = np.full(logprobs.shape, PAD_LOGPROB, np.float32)
    target[listed] = over_candidates(kept.count.astype(np.int64), kept.logprobs)
    trained = np.append(labels[1:], np.full(min(1, len(labels)), IGNORED, np.int32)) != IGNORED
    return {
        "input_ids": tokens,
        "attention_mask": np.ones(len(tokens), np.int8),
        "labels": labels,
        "target_logprobs": target,
        "target_token_ids": ids.astype(np.int32),
        "target_mask": (listed & trained[:, None]).astype(np.int8),
        "logprobs": logprobs,
    }


EXPORTER: Final = Exporter(
    name="axolotl",
    description="axolotl: a Parquet dataset for its distillation plugin, tokenised, next-token aligned",
    loses=(
        "tail, target, logsumexp, entropy, draws, splits, teacher and tokenizer; a loss_mask that is unknown, and that "
        "of the last position"
    ),
    write=_write,
)
