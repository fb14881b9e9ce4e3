"""`mlx-dwq`: the targets that `mlx_lm.quant.dwq --target-dir` writes, one safetensors file a batch.

`{train|valid}/{i:010d}.safetensors` has `logits` [B, T, K] (raw, float16, bfloat16 or float32) and `indices` [B, T, K],
in no order. The model saw `batch[:, :-1]`, so row t predicts token t + 1. Shorter samples of a batch are padded at
their end. The files hold neither tokens nor lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally
from logitstore.convert.raw_logits import CANDIDATES_NOTE, rows_of_logits
from logitstore.convert.safetensors_file import Mapped, open_safetensors, tensor_shapes
from logitstore.convert.source import Input
from logitstore.convert.token_files import Sample, TokenFile, needed
from logitstore.errors import SourceError

_ORDER_NOTE: Final = (
    "Tokens were taken batch by batch, row by row; row t predicts token t + 1. The files hold no tokens, so nothing "
    "but the frame's statistics can tell whether these are the ones."
)
_PADDED_NOTE: Final = "In {n} of the samples there are rows behind the last token; these are padding, and left out."


@dataclass(frozen=True, slots=True)
class _Captured:
    """One sample: its rows [R, K] up to its last token, how many the file has, and its tokens."""

    logits: NDArray[Any]
    ids: NDArray[Any]
    rows: int
    tokens: NDArray[np.int64]


def _recognises(source: Input) -> bool:
    shapes = tensor_shapes(source)
    return shapes == {"logits": 3, "indices": 3}


def _read(inputs: list[Input], options: Options) -> Import:
    tokens = needed(options, "a capture of mlx-lm's DWQ")
    done = [0]
    return Import(
        pieces=_samples(inputs, tokens, done),
        parse=_parse,
        settings={"normalised": "candidates"},
        done=lambda: done[0],
        total=sum(source.size or 0 for source in inputs),
        notes=[CANDIDATES_NOTE, _ORDER_NOTE],
        check=tokens.notes,
    )


def _samples(inputs: list[Input], tokens: TokenFile, done: list[int]) -> Iterator[Sample]:
    number = itertools.count()
    for source in inputs:
        logits, ids = _tensors(source)
        for row in range(len(ids)):
            own = tokens.take()
            kept = np.s_[row, : len(own)]
            data = _Captured(logits.floats(kept), np.asarray(ids[kept]), ids.shape[1], own)
            yield Sample(f"{source.name}, row {row}", next(number), data)
        done[0] += source.size or 0
    tokens.finish()


def _tensors(source: Input) -> tuple[Mapped, NDArray[Any]]:
    tensors = open_safetensors(source)
    for name in ("logits", "indices"):
        if name not in tensors:
            raise SourceError(f"{source.name}: there is no tensor {name!r}; there are {sorted(tensors)}")
    logits, ids = tensors["logits"], tensors["indices"].values
    if not logits.is_float or ids.dtype.kind not in "iu" or ids.ndim != 3 or logits.values.shape != ids.shape:
        raise SourceError(
            f"{source.name}: logits are {logits.values.dtype} {list(logits.values.shape)}, indices {ids.dtype} "
            f"{list(ids.shape)}; floats and integers [batch, length, candidates] are needed"
        )
    return logits, ids


def _parse(record: Record, tally: Tally) -> Iterator[Item]:
    sample: _Captured = record.data
    length = len(sample.tokens)
    if not 1 <= length <= sample.rows + 1:
        raise SourceError(
            f"its tokens are {length} and its rows {sample.rows}; there must be from 1 to one more than rows: give the "
            f"tokens as the model saw them, cut off at the same length"
        )
    if length < sample.rows:
        tally.note(_PADDED_NOTE)
    rows = rows_of_logits(sample.ids, sample.logits)
    yield Item("add", rows.arguments(sample.tokens, slice(0, len(sample.logits))))


IMPORTER: Final = Importer(
    name="mlx-dwq",
    description="mlx-lm: targets of dwq --target-dir, with the tokens from --tokens",
    loses="the level of the raw logits; rows of padding",
    recognises=_recognises,
    read=_read,
    patterns=("*.safetensors",),
    options=("tokens",),
)
