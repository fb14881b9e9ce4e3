"""Collators: a list of sequences -> the padded tensors of a batch, in the layout that a trainer wants.

Each is a frozen dataclass that is called with the list, so it pickles and serves as `collate_fn` of a DataLoader. B
sequences, padded on the right to T positions; K candidates a position, best first, the width of the widest position
unless `k` says another. Row t always predicts tokens[t + 1], as row t of a model's logits does: nothing is shifted.

A row is trained on when its `loss_mask` is not 0: 1, unknown (-1) and not stored all mean that it is. In packed samples
(`document_ids` among the sequence's columns) the last row of a document predicts a token that is not there: its
distribution is used, the token behind it, of another document, is no label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from logitstore.convert.export_rows import rectangle
from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError
from logitstore.shard.encoded import EncodedSequence
from logitstore.shard.sequence import Sequence as Stored
from logitstore.torch.device import EncodedBatch, encoded_batch
from logitstore.torch.text import UNKNOWN, Text, text_of, why_empty

FAINT_LOGPROB: Final = float(np.float32(np.log(1e-30)))
"""Logprob of pads where -inf or -1e9 would make the trainer's loss NaN: it multiplies exp of it by it."""

MEGATRON_LOGPROB: Final = -1e3
MEGATRON_ID: Final = -1
"""How Megatron-LM marks that a candidate is missing."""

Batch = dict[str, Any]
Dense = Callable[[Stored, int, float], tuple[NDArray[np.int64], NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class _Collator:
    """What all collators are told.

    Attributes:
        k: candidates of a position; those beyond are left out, and their mass goes to the tail. None: as many as the
            widest position of the batch has.
        pad_id: input token of padding.
        pad_to_multiple_of: T is a multiple of this.
        max_length: longer sequences are cut to so many positions. The last row keeps its distribution, and
            `target_next` the token behind it, though that is no input any more.
        ignore_index: label of tokens that are not trained on, below 0.
        allow_empty: whether a batch may be without any distribution to train on; otherwise that is an error.
    """

    k: int | None = None
    pad_id: int = 0
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    ignore_index: int = -100
    allow_empty: bool = False

    def __post_init__(self) -> None:
        for name in ("k", "pad_to_multiple_of", "max_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidInputError(f"{name} is {value!r}; a whole number from 1 is needed, or None")
        if self.ignore_index >= 0:
            raise InvalidInputError(f"ignore_index is {self.ignore_index}, which a token may have; give one below 0")

    def __call__(self, sequences: Sequence[Stored]) -> Batch | EncodedBatch:
        """The batch.

        Raises:
            InvalidInputError: there are no sequences, or none has a distribution that is trained on.
            InvalidTypeError: they are no sequences.
            NotSelectedError: a column that is needed was not selected.
        """
        text = text_of(sequences, self.max_length, self.pad_to_multiple_of, self.pad_id)
        if not self.allow_empty and not text.scored.any():
            raise InvalidInputError(why_empty(sequences, self.max_length))
        return self._batch(sequences, text)

    def _batch(self, sequences: Sequence[Stored], text: Text) -> Batch | EncodedBatch:
        raise NotImplementedError

    def _width(self, text: Text) -> int:
        return self.k or max(1, int(text.count.max()))

    def _labels(self, text: Text, trained: NDArray[np.bool_]) -> NDArray[np.int64]:
        """int64 [B, T]: labels[t] is tokens[t] where row t - 1 is one of these and knows its next token."""
        labels = np.full(text.tokens.shape, self.ignore_index, np.int64)
        wanted = trained[:, :-1] & (text.following[:, :-1] != UNKNOWN) & text.inside[:, 1:]
        labels[:, 1:][wanted] = text.tokens[:, 1:][wanted]
        return labels


@dataclass(frozen=True, kw_only=True)
class HFCollator(_Collator):
    """Batches for Hugging Face models and the losses of `logitstore.torch.losses`.

    Called with sequences it gives a dict of: `input_ids`, `attention_mask` and `labels` int64 [B, T] (labels[t] is
    tokens[t], which the model shifts itself; `ignore_index` on padding, where row t - 1 is not trained on, and at the
    first token of each document, which no row predicts); `target_ids` int64 [B, T, K], 0 where there is no candidate;
    `target_logprobs` float32 [B, T, K], nats, -inf there; `target_tail` float32 [B, T], log of the mass outside these,
    NaN where it is not known, and inf where there is no such: where they are normalised over the candidates;
    `target_mask` bool [B, T], row t has a distribution and is trained on; `target_next` int64 [B, T], tokens[t + 1],
    -100 where that is not known; and, for packed samples, `position_ids` and `document_ids` int64 [B, T], 0 and -1 on
    padding.

    `attention_mask` is 1 on all of a packed sample. `DistillationTrainer` keeps its documents apart; in a loop of your
    own, call a model of transformers without `attention_mask` and with `position_ids` and `use_cache=False`, or give it
    a mask [B, 1, T, T] of `document_ids[:, None, :, None] == document_ids[:, None, None, :]` under the diagonal.

    Of encoded sequences (`decode="device"`) it makes an `EncodedBatch`, which `decode_batch` turns into the same dict.
    """

    def _batch(self, sequences: Sequence[Stored], text: Text) -> Batch | EncodedBatch:
        encoded = isinstance(sequences[0], EncodedSequence)
        k = self._width(text)
        batch: dict[str, NDArray[Any]] = {
            "input_ids": text.tokens,
            "attention_mask": text.inside.astype(np.int64),
            "labels": self._labels(text, text.trained),
            "target_tail": _tails(sequences, text, None if encoded else k),
            "target_mask": text.scored,
            "target_next": text.following,
        }
        if text.documents is not None:
            batch |= {"position_ids": text.places, "document_ids": text.documents}
        if encoded:
            return encoded_batch(sequences, _tensors(batch), length=text.tokens.shape[1], k=k)
        ids, logprobs = _candidates(sequences, text, k, 0, -np.inf)
        return _tensors(batch) | {"target_ids": ids, "target_logprobs": logprobs}


@dataclass(frozen=True, kw_only=True)
class AxolotlCollator(_Collator):
    """Batches as axolotl's knowledge distillation trainer takes them.

    `input_ids`, `attention_mask`, `labels` and `position_ids` int64 [B, T] (the attention mask numbers the documents of
    packed samples from 1, as its multipack does); `target_logprobs` float32 [B, T, K], `target_token_ids` int64
    [B, T, K] and `target_mask` int32 [B, T, K], 1 for the candidates of rows that are trained on.

    Pads are log(1e-30) and not the -1e9 of axolotl's own collator: its trainer takes exp and log again, which makes
    -inf of -1e9 and NaN of the loss. Fainter candidates are raised to it for the same reason. The logprobs are as they
    are stored, normalised over the vocabulary; the trainer's `kd_normalize_topk` normalises them over the candidates.
    """

    def _batch(self, sequences: Sequence[Stored], text: Text) -> Batch:
        k = self._width(text)
        ids, logprobs = _candidates(sequences, text, k, 0, FAINT_LOGPROB)
        mask = (np.arange(k) < text.count[:, :, None]) & text.scored[:, :, None]
        documents = 0 if text.documents is None else text.documents
        batch = {
            "input_ids": text.tokens,
            "attention_mask": np.where(text.inside, documents + np.int64(1), 0),
            "labels": self._labels(text, text.trained),
            "position_ids": text.places,
            "target_mask": mask.astype(np.int32),
        }
        return _tensors(batch) | {"target_token_ids": ids, "target_logprobs": logprobs.clamp_(min=FAINT_LOGPROB)}


@dataclass(frozen=True, kw_only=True)
class TRLCollator(_Collator):
    """Batches with what TRL's distillation trainers get from a teacher server.

    `input_ids`, `attention_mask` and `labels` int64 [B, T], labels being the tokens that have a distribution and are
    trained on; `topk_logprobs` float32 [B, C, K], -inf where there is no candidate, `topk_token_ids` int64 [B, C, K], 0
    there, and `actual_logprobs` float32 [B, C], of the tokens that stand there, -inf where not known. Column j is about
    the token input_ids[:, T - C + j]: C begins at the earliest label of the batch. So does the trainer's own prompt
    length where the labels of each sequence run to its end.
    """

    def _batch(self, sequences: Sequence[Stored], text: Text) -> Batch:
        ids, logprobs = _candidates(sequences, text, self._width(text), 0, -np.inf)
        labels = self._labels(text, text.scored)
        about = (labels != self.ignore_index).any(axis=0)
        start = max(1, int(np.argmax(about))) if about.any() else 1
        rows = slice(start - 1, text.tokens.shape[1] - 1)
        outside = torch.from_numpy(~text.scored)
        actual = np.where(text.scored, _actual(sequences, text), np.float32(-np.inf))
        batch = {
            "input_ids": text.tokens,
            "attention_mask": text.inside.astype(np.int64),
            "labels": labels,
            "actual_logprobs": np.ascontiguousarray(actual[:, rows]),
        }
        ids[outside] = 0
        logprobs[outside] = -torch.inf
        return _tensors(batch) | {
            "topk_logprobs": logprobs[:, rows].contiguous(),
            "topk_token_ids": ids[:, rows].contiguous(),
        }


@dataclass(frozen=True, kw_only=True)
class DistillKitCollator(_Collator):
    """Batches for DistillKit's losses.

    `input_ids`, `attention_mask` and `labels` int64 [B, T] (labels are the tokens with a distribution), and `signal`:
    the fields of DistillKit's `SparseSignal`, made by `SparseSignal(**batch["signal"])`: `sparse_ids` int64 [B, T, K],
    `sparse_values` float32 [B, T, K], `log_values` True, `generation_temperature`, `vocab_size`, `hidden_states` None.
    `mask` bool [B, T] is the mask that its losses take: the rows with a distribution that is trained on.

    Its losses have no mask of candidates. So pads have the logprob log(1e-30), since 0 * -inf is NaN there, and ids
    that are no candidates of the position, since what the student gives to an id twice would be counted twice.

    Attributes:
        vocab_size: logit width of the student.
        generation_temperature: temperature at which the logprobs were taken.

    Raises:
        InvalidInputError: when called: a candidate's id is not below `vocab_size`, or there are more candidates.
    """

    vocab_size: int
    generation_temperature: float = 1.0

    def _batch(self, sequences: Sequence[Stored], text: Text) -> Batch:
        k = self._width(text)
        if k > self.vocab_size:
            raise InvalidInputError(f"{k} candidates a position, but vocab_size is {self.vocab_size}; give a smaller k")
        ids, logprobs = _candidates(sequences, text, k, np.arange(k), FAINT_LOGPROB, dense=rectangle)
        if int(ids.max()) >= self.vocab_size:
            raise InvalidInputError(
                f"there is a candidate with the id {int(ids.max())}, vocab_size is {self.vocab_size}: the student's "
                "logits are too narrow for this teacher; use a student with the teacher's tokenizer"
            )
        batch = {
            "input_ids": text.tokens,
            "attention_mask": text.inside.astype(np.int64),
            "labels": self._labels(text, text.scored),
            "mask": text.scored,
        }
        signal = {
            "sparse_ids": ids,
            "sparse_values": logprobs,
            "log_values": True,
            "generation_temperature": self.generation_temperature,
            "hidden_states": None,
            "vocab_size": self.vocab_size,
        }
        return _tensors(batch) | {"signal": signal}


@dataclass(frozen=True, kw_only=True)
class MegatronCollator(_Collator):
    """Batches for Megatron-LM: its own text tensors, and the teacher's as `topk_kl_div` takes them.

    `tokens`, `labels` and `position_ids` int64 [B, T], labels already shifted (labels[t] is tokens[t + 1], 0 where not
    known) and `loss_mask` float32 [B, T]; `values` float32 [T, B, K] and `indices` int64 [T, B, K], -1000 and -1 where
    there is no candidate. Its one loss mask serves both losses, so it is 1 only where both have their target: a row
    that is trained on, with a distribution and a known next token.
    """

    def _batch(self, sequences: Sequence[Stored], text: Text) -> Batch:
        ids, logprobs = _candidates(
            sequences, text, self._width(text), MEGATRON_ID, MEGATRON_LOGPROB, batch_first=False
        )
        known = text.following != UNKNOWN
        batch = {
            "tokens": text.tokens,
            "labels": np.where(known, text.following, 0),
            "loss_mask": (text.scored & known).astype(np.float32),
            "position_ids": text.places,
        }
        return _tensors(batch) | {"values": logprobs.transpose(0, 1), "indices": ids.transpose(0, 1)}


hf, axolotl, trl = HFCollator, AxolotlCollator, TRLCollator
distillkit, megatron = DistillKitCollator, MegatronCollator


def _candidates(
    sequences: Sequence[Stored],
    text: Text,
    k: int,
    pad_id: Any,
    pad_logprob: float,
    *,
    dense: Dense | None = None,
    batch_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [B, T, k], logprobs float32 [B, T, k]): the tensors are allocated once, and rows copied into them.

    Args:
        sequences: the sequences.
        text: the rest of the batch.
        k: width.
        pad_id: ids where there is no candidate: a number, or k of them.
        pad_logprob: the logprob there.
        dense: how positions without k candidates are filled up, if not with pad_id.
        batch_first: whether the memory is laid out as [B, T, k], or as [T, B, k].
    """
    batch, width = text.tokens.shape
    shape = (batch, width, k) if batch_first else (width, batch, k)
    ids, logprobs = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float32)
    if not batch_first:
        ids, logprobs = ids.transpose(0, 1), logprobs.transpose(0, 1)
    for sequence, length, its_ids, its_logprobs in zip(
        sequences, text.lengths, ids.numpy(), logprobs.numpy(), strict=True
    ):
        its_ids[length:] = pad_id
        its_logprobs[length:] = pad_logprob
        count = sequence.count[:length]
        if uniform := ragged.uniform(count):
            both = min(uniform, k)
            flat = slice(0, length * uniform)
            its_ids[:length, :both] = sequence.ids[flat].reshape(length, uniform)[:, :both]
            its_logprobs[:length, :both] = sequence.logprobs[flat].reshape(length, uniform)[:, :both]
        if dense is not None and uniform < k:
            filled = dense(sequence, k, pad_logprob)
            its_ids[:length], its_logprobs[:length] = filled[0][:length], filled[1][:length]
        elif uniform:
            its_ids[:length, uniform:] = np.broadcast_to(pad_id, k)[uniform:]
            its_logprobs[:length, uniform:] = pad_logprob
        else:
            _scatter(sequence, count, (its_ids[:length], its_logprobs[:length]), pad_id, pad_logprob)
    return ids, logprobs


def _scatter(
    sequence: Stored, count: NDArray[Any], out: tuple[NDArray[Any], NDArray[Any]], pad_id: Any, pad_logprob: float
) -> None:
    """Write ragged candidates into rectangles [positions, k]."""
    k = out[0].shape[1]
    listed = np.arange(k) < count[:, None]
    total = int(count.sum(dtype=np.int64))
    kept: Any = slice(0, total) if len(count) == 0 or int(count.max()) <= k else ragged.ranks(count) < k
    for rectangular, flat, pad in zip(out, (sequence.ids, sequence.logprobs), (pad_id, pad_logprob), strict=True):
        rectangular[:] = pad
        rectangular[listed] = flat[:total][kept]


def _tails(sequences: Sequence[Stored], text: Text, k: int | None) -> NDArray[np.float32]:
    """float32 [B, T]: log of the mass outside the best k candidates, or outside all; NaN where it is not known."""
    tails = np.full(text.tokens.shape, np.nan, np.float32)
    for row, sequence, length in zip(tails, sequences, text.lengths, strict=True):
        row[:length] = sequence.tail[:length]
        if vars(sequence).get("normalised") == "candidates":
            row[:length] = np.inf
        if k is None:
            continue
        count = sequence.count[:length]
        wide = (count > k) & (row[:length] < np.inf)
        if wide.any():
            mass = ragged.row_sums(np.exp(_beyond(sequence, count, k)), np.maximum(count.astype(np.int64) - k, 0))
            with np.errstate(divide="ignore"):  # fainter than float32 is no mass
                row[:length][wide] = np.logaddexp(row[:length][wide], np.log(mass[wide]))
    return tails


def _beyond(sequence: Stored, count: NDArray[Any], k: int) -> NDArray[np.float32]:
    """The logprobs of the candidates after the best k, flat."""
    flat = sequence.logprobs[: int(count.sum(dtype=np.int64))]
    if uniform := ragged.uniform(count):
        return flat.reshape(-1, uniform)[:, k:].ravel()
    return flat[ragged.ranks(count) >= k]


def _actual(sequences: Sequence[Stored], text: Text) -> NDArray[np.float32]:
    """float32 [B, T]: logprob of the next token, as a candidate or as the stored target; -inf where not known."""
    actual = np.full(text.tokens.shape, -np.inf, np.float32)
    for row, sequence, length, following in zip(actual, sequences, text.lengths, text.following, strict=True):
        if sequence.target_logprob is not None:
            row[:length] = np.nan_to_num(sequence.target_logprob[:length], nan=-np.inf, neginf=-np.inf)
        count = sequence.count[:length]
        at = ragged.rows(count)
        own = sequence.ids[: len(at)] == following[at]
        row[at[own]] = sequence.logprobs[: len(at)][own]
        row[following == UNKNOWN] = -np.inf
    return actual


def _tensors(arrays: dict[str, NDArray[Any]]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
