"""The text of a batch: its tokens, masks and documents, padded, without the candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.errors import InvalidInputError, InvalidTypeError
from logitstore.shard.sequence import Sequence as Stored

UNKNOWN: Final = -100
"""`target_next` where the next token is not known."""


@dataclass(frozen=True, slots=True)
class Text:
    """A batch without its candidates; everything is [B, T].

    Attributes:
        lengths: positions of each sequence that are in the batch, [B].
        tokens: int64, input tokens.
        inside: bool, no padding.
        following: int64, tokens[t + 1], UNKNOWN where there is none or it is of another document.
        count: int64, candidates of each position; 0 on padding.
        trained: bool, the row is trained on.
        scored: bool, likewise, and has a distribution.
        places: int64, position in the document.
        documents: int64, number of the document, -1 on padding; None where no sample is packed.
    """

    lengths: list[int]
    tokens: NDArray[np.int64]
    inside: NDArray[np.bool_]
    following: NDArray[np.int64]
    count: NDArray[np.int64]
    trained: NDArray[np.bool_]
    scored: NDArray[np.bool_]
    places: NDArray[np.int64]
    documents: NDArray[np.int64] | None


def text_of(sequences: Sequence[Stored], max_length: int | None, multiple: int | None, pad_id: int) -> Text:
    """The text of a batch, padded on the right.

    Args:
        sequences: at least one.
        max_length: longer sequences are cut to so many positions.
        multiple: T is a multiple of this.
        pad_id: token of padding.

    Raises:
        InvalidInputError: there are no sequences, or a column of packed samples is something else.
        InvalidTypeError: they are no sequences.
    """
    if not sequences:
        raise InvalidInputError("a batch of no sequences; give the collator at least one")
    for sequence in sequences:
        if not isinstance(sequence, Stored):
            raise InvalidTypeError(f"the collator was given a {type(sequence).__name__}; it takes logitstore sequences")
    lengths = [min(len(sequence), max_length or len(sequence)) for sequence in sequences]
    width = max(1, *lengths)
    width += -width % (multiple or 1)
    wide = _padded(sequences, lengths, width, _tokens, UNKNOWN)  # one column more: the token behind a cut
    inside = np.arange(width) < np.asarray(lengths)[:, None]
    following = wide[:, 1:].copy()
    documents = None
    if packed := any("document_ids" in _columns(sequence) for sequence in sequences):
        wide_documents = _padded(sequences, lengths, width, _documents, -1)
        following[wide_documents[:, 1:] != wide_documents[:, :-1]] = UNKNOWN
        documents = np.where(inside, wide_documents[:, :-1], -1)
    places = _padded(sequences, lengths, width, _positions, 0)[:, :-1] if packed else np.arange(width)
    count = np.where(inside, _padded(sequences, lengths, width, _counts, 0)[:, :-1], 0)
    trained = inside & (_padded(sequences, lengths, width, _masks, 0)[:, :-1] != 0)
    return Text(
        lengths=lengths,
        tokens=np.where(inside, wide[:, :-1], pad_id),
        inside=inside,
        following=np.where(inside, following, UNKNOWN),
        count=count,
        trained=trained,
        scored=trained & (count > 0),
        places=np.where(inside, places, 0),
        documents=documents,
    )


def _padded(
    sequences: Sequence[Stored], lengths: list[int], width: int, values: Callable[[Stored], Any], pad: int
) -> NDArray[np.int64]:
    """int64 [B, width + 1]: a column of each sequence, with one value more than its positions where it has one."""
    out = np.full((len(sequences), width + 1), pad, np.int64)
    for row, sequence, length in zip(out, sequences, lengths, strict=True):
        kept = min(length + 1, len(sequence))
        row[:kept] = values(sequence)[:kept]
    return out


def _tokens(sequence: Stored) -> NDArray[np.uint32]:
    return sequence.tokens


def _counts(sequence: Stored) -> NDArray[np.uint32]:
    return sequence.count


def _masks(sequence: Stored) -> NDArray[np.int8]:
    return np.ones(len(sequence), np.int8) if sequence.loss_mask is None else sequence.loss_mask


def _documents(sequence: Stored) -> NDArray[Any]:
    return _numbers(sequence, "document_ids", np.zeros(len(sequence), np.int32))


def _positions(sequence: Stored) -> NDArray[Any]:
    return _numbers(sequence, "position_ids", np.arange(len(sequence)))


def _numbers(sequence: Stored, name: str, otherwise: NDArray[Any]) -> NDArray[Any]:
    """A column of packed samples, which a user's column of that name is taken for."""
    given = np.asarray(_columns(sequence).get(name, otherwise))
    if given.dtype.kind not in "iu" or given.shape != (len(sequence),):
        raise InvalidInputError(
            f"sequence {vars(sequence).get('id', '?')!r}: the column {name} belongs to packed samples, and is a whole "
            f"number for each of the {len(sequence)} positions; this is something else. Select the columns without it"
        )
    return given


def _columns(sequence: Stored) -> dict[str, Any]:
    columns: dict[str, Any] = vars(sequence).get("columns", {})  # absent where the user selected none of theirs
    return columns


def why_empty(sequences: Sequence[Stored], max_length: int | None) -> str:
    """What to say, and what to do, where no position of a batch has a distribution that is trained on."""
    names = ", ".join(repr(vars(each).get("id", "?")) for each in sequences[:3]) + (
        ", ..." if len(sequences) > 3 else ""
    )
    start = f"no position of this batch of {len(sequences)} ({names}) has a distribution that is trained on: "
    end = " A batch may be without any where allow_empty=True."
    if not any(each.count.any() for each in sequences):
        return (
            f"{start}the teacher was not recorded at any position of these sequences. Look at the dataset's counts, "
            f"and choose the sequences that have distributions.{end}"
        )
    if not any((each.count[_masks(each) != 0] > 0).any() for each in sequences):
        return (
            f"{start}where there are distributions, loss_mask is 0. The teacher was recorded for other positions (the "
            f"prompts?) than those that are trained on; capture the trained ones, or write another loss_mask.{end}"
        )
    return f"{start}those that are come after the first {max_length} positions. Give a larger max_length.{end}"
