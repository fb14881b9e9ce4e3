"""`nemo-aligner`: what NeMo-Aligner's `compute_topk_logits.py` writes, one JSON object a sample.

`topk_logits` and `topk_token_ids` are [T, K], best first; the best logit of the whole vocabulary was taken off all of
them, and `log_sum_exp_logits` [T] is over the whole vocabulary after that, so logprob = topk_logits -
log_sum_exp_logits. Rows are as a forward pass gives them: row t predicts `labels[t]`, which is tokens[t + 1]. The last
token of a sample stands only in `labels`; a batch is padded at its end, with loss_mask 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Export, Exporter, Import, Importer, Item, Options, Record, Tally, ready
from logitstore.convert.beside import first_record
from logitstore.convert.export_rows import NEEDED, rectangle, width_of
from logitstore.convert.lines import JSONL, decode, has_keys, read_lines
from logitstore.convert.rows import Rows, flat, same_shape, within_one
from logitstore.convert.source import Input
from logitstore.dataset.reader import Dataset
from logitstore.errors import SourceError
from logitstore.limits import ID_LIMIT
from logitstore.shard.sequence import Sequence

_PAD_LOGIT: Final = -1e9
"""What stands where a position has fewer candidates: JSON has no -inf."""

_NOTE: Final = "Row t predicts labels[t], the token behind token t; logprob = topk_logits - log_sum_exp_logits."
_OVER_NOTES: Final = {
    "vocabulary": "log_sum_exp_logits is taken to be over the whole vocabulary.",
    "candidates": "The lines say that log_sum_exp_logits is over the candidates alone.",
}
_PADDED_NOTE: Final = "{n} samples end in padding, which was left out."
_UNLABELLED_NOTE: Final = "{n} samples have no label for their last row, whose distribution is of an unknown token."

_Over = Literal["vocabulary", "candidates"]
_Temperature = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Id = Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]


class _Sample(msgspec.Struct, gc=False):
    tokens: list[_Id]
    topk_logits: list[list[float]]
    topk_token_ids: list[list[_Id]]
    log_sum_exp_logits: list[float]
    labels: list[int] | None = None
    loss_mask: list[float | bool] | None = None
    index: int | str | None = None
    id: str | int | None = None
    normalised: _Over = "vocabulary"
    temperature: _Temperature = 1.0


class _Flags(msgspec.Struct, gc=False):
    """What all samples of a file say, where it is not what NeMo-Aligner has."""

    normalised: _Over = "vocabulary"
    temperature: _Temperature = 1.0


_SAMPLE: Final = msgspec.json.Decoder(_Sample)
_FLAGS: Final = msgspec.json.Decoder(_Flags)
_WHAT: Final = "sample of NeMo-Aligner"


# Import


def _recognises(source: Input) -> bool:
    # topk_logits come behind the tokens, of which the head may hold no more than a part.
    return has_keys(source, "tokens", "topk_logits") or has_keys(source, "tokens", "labels", "loss_mask")


def _read(inputs: list[Input], _options: Options) -> Import:
    opened = read_lines(inputs, ready)
    flags = _Flags()
    try:
        flags = decode(_FLAGS, first_record(opened) or b"{}", _WHAT)
    except SourceError:
        opened.notes = []  # it fails when its turn comes
    opened.parse = _Parser(flags.normalised, flags.temperature)
    opened.settings = {"normalised": flags.normalised}
    if flags.temperature != 1:
        opened.settings["temperature"] = flags.temperature
    opened.notes = [_NOTE, _OVER_NOTES[flags.normalised]]
    return opened


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequence of a sample; all say the same of normalisation and temperature."""

    normalised: str
    temperature: float

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        sample = decode(_SAMPLE, record.data, _WHAT)
        for name in ("normalised", "temperature"):
            says, first = getattr(sample, name), getattr(self, name)
            if says != first:
                raise SourceError(f"{name} is {says}, in the first line it is {first}")
        rows = _rows(sample)
        tokens, size = _tokens(sample, tally)
        mask = _mask(sample)
        if size < len(rows.count):
            tally.note(_PADDED_NOTE)
            kept = int(rows.count[:size].sum())
            rows = Rows(rows.count[:size], rows.ids[:kept], rows.logprobs[:kept])
        found = rows.arguments(tokens, slice(0, size))
        if mask is not None:
            found["loss_mask"] = np.append(mask[:size], np.zeros(len(tokens) - size, np.bool_))
        known_as = sample.id if sample.id is not None else sample.index
        found = within_one(found, tally)
        yield Item("add", found if known_as is None else found | {"id": str(known_as)})


def _rows(sample: _Sample) -> Rows:
    count, logits = flat(sample.topk_logits, np.float64)
    other, ids = flat(sample.topk_token_ids, np.int64)
    same_shape(other, count, "topk_token_ids", "topk_logits")
    total = np.array(sample.log_sum_exp_logits, np.float64)
    for name, length in (("topk_logits", len(count)), ("log_sum_exp_logits", len(total))):
        if length != len(sample.tokens):
            raise SourceError(f"{name} has {length} rows for {len(sample.tokens)} tokens")
    kept = logits > _PAD_LOGIT
    with np.errstate(over="ignore"):
        logprobs = (logits - np.repeat(total, count)).astype(np.float32)
    return Rows(count, ids, logprobs).keep(kept)


def _tokens(sample: _Sample, tally: Tally) -> tuple[NDArray[np.int64], int]:
    """The tokens, with the last label behind them, and how many of the rows are theirs."""
    tokens = np.array(sample.tokens, np.int64)
    if sample.labels is None:
        return tokens, len(tokens)
    if len(sample.labels) != len(tokens):
        raise SourceError(f"labels has {len(sample.labels)} entries for {len(tokens)} tokens")
    try:
        labels = np.array(sample.labels, np.int64)
    except OverflowError as error:
        raise SourceError(f"labels holds what is no token ({error})") from error
    size = len(tokens)
    wrong = np.flatnonzero((labels[:-1] >= 0) & (labels[:-1] != tokens[1:]))
    if len(wrong):
        at = int(wrong[0])
        if not _only_padding_behind(sample, tokens, at):
            raise SourceError(
                f"labels[{at}] is {labels[at]}, but tokens[{at + 1}] is {tokens[at + 1]}: the rows are not where they "
                f"should be; row t must predict labels[t] = tokens[t + 1]"
            )
        size = at + 1
    if size == 0 or labels[size - 1] < 0:
        tally.note(_UNLABELLED_NOTE, int(size > 0))
        return tokens[:size], size
    return np.append(tokens[:size], labels[size - 1]), size


def _only_padding_behind(sample: _Sample, tokens: NDArray[np.int64], at: int) -> bool:
    """Whether nothing but one token, never trained on, stands behind this position."""
    mask = _mask(sample)
    return mask is not None and not mask[at + 1 :].any() and bool((tokens[at + 1 :] == tokens[-1]).all())


def _mask(sample: _Sample) -> NDArray[np.bool_] | None:
    if sample.loss_mask is None:
        return None
    if len(sample.loss_mask) != len(sample.tokens):
        raise SourceError(f"loss_mask has {len(sample.loss_mask)} entries for {len(sample.tokens)} tokens")
    mask = np.array(sample.loss_mask, np.float64)
    if bool(((mask < 0) | (mask > 1)).any()):
        at = int(np.argmax((mask < 0) | (mask > 1)))
        raise SourceError(f"loss_mask[{at}] is {mask[at]}; it is 0 or 1")
    return np.asarray(mask > 0)


IMPORTER: Final = Importer(
    name="nemo-aligner",
    description="NeMo-Aligner: JSON lines of compute_topk_logits.py, max-shifted logits and their logsumexp",
    loses="nothing of the distributions; further fields of the samples",
    recognises=_recognises,
    read=_read,
    patterns=JSONL,
)


# Export


def _write(dataset: Dataset, path: Path, options: Export) -> list[str]:
    k, cut = width_of(dataset, options.k)
    short, last, empty = 0, 0, 0
    encoder = msgspec.json.Encoder()
    flags = _flags(dataset)
    with path.open("wb") as file:
        for number, sequence in enumerate(dataset.select(NEEDED)):
            if len(sequence) < 2:
                short += 1
            else:
                file.write(encoder.encode(_sample_of(sequence, number, k) | flags) + b"\n")
                last += int(sequence.count[-1] > 0)
                empty += int(_trained_without(sequence).sum())
            options.progress(number + 1)
    notes = [
        f"{last:,} sequences have a distribution at their last position, where no label is known; these were left out.",
        f"{short:,} sequences have fewer than two tokens, so that they predict nothing; they were left out.",
        f"{empty:,} positions are trained on but have no distribution; their loss_mask is 0 now.",
    ]
    return [*cut, *(note for note, n in zip(notes, (last, short, empty), strict=True) if n)]


def _flags(dataset: Dataset) -> dict[str, Any]:
    """What NeMo-Aligner does not say of its own samples, and takes for granted."""
    info = dataset.info
    found: dict[str, Any] = {} if info.normalised == "vocabulary" else {"normalised": info.normalised}
    return found if info.temperature == 1 else found | {"temperature": info.temperature}


def _trained_without(sequence: Sequence) -> NDArray[np.bool_]:
    if sequence.loss_mask is None:
        return np.zeros(0, np.bool_)
    return np.asarray((sequence.loss_mask[:-1] == 1) & (sequence.count[:-1] == 0))


def _sample_of(sequence: Sequence, number: int, k: int) -> dict[str, Any]:
    ids, logprobs = rectangle(sequence, k, -np.inf)
    ids, values = ids[:-1], logprobs[:-1].astype(np.float64)  # the difference of two float32 is exact enough in these
    present = sequence.count[:-1] > 0
    best = np.where(present, values[:, 0], 0.0)
    logits = values - best[:, None]
    logits[np.isneginf(logits)] = _PAD_LOGIT
    trained = present if sequence.loss_mask is None else present & (sequence.loss_mask[:-1] != 0)
    return {
        "tokens": sequence.tokens[:-1].tolist(),
        "labels": sequence.tokens[1:].tolist(),
        "loss_mask": trained.astype(np.int64).tolist(),
        "topk_logits": logits.tolist(),
        "topk_token_ids": ids.tolist(),
        "log_sum_exp_logits": (-best + 0.0).tolist(),
        "index": number,
        "id": sequence.id,
    }


EXPORTER: Final = Exporter(
    name="nemo-aligner",
    description="NeMo-Aligner: JSON lines for its knowledge distillation",
    loses=(
        "the last position's distribution, tail, target, logsumexp, entropy, draws, users' columns, splits, teacher "
        "and tokenizer; an unknown loss_mask is 1"
    ),
    write=_write,
)
