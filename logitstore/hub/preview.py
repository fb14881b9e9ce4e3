"""A small readable sample of a dataset, for the Hub's viewer: one row a position, what the teacher expects after it.

The Hub's viewer and `datasets` use one builder for all configs of a repository, taken from the files of the first one.
The shards are Arrow streams, so the preview is an uncompressed Arrow stream too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.dataset.reader import Dataset
from logitstore.errors import InvalidInputError
from logitstore.shard.sequence import Sequence
from logitstore.text import ELLIPSIS, in_text, label, shortened, unknown, visible
from logitstore.tokenizer import Tokenizer

SCHEMA: Final = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("token", pa.string(), nullable=False),
        pa.field("next_token", pa.string()),
        pa.field("candidates", pa.list_(pa.string()), nullable=False),
        pa.field("probabilities", pa.list_(pa.float64()), nullable=False),
        pa.field("rest", pa.float64()),
    ]
)
"""Float64, since viewers print a rounded float32 with the digits that it does not have: 0.12300000339746475."""

_BYTES: Final = 200_000  # of rows; a preview is committed with every push
_TEXT: Final = 200  # characters of `text`
_ID: Final = 128  # characters of a sequence's id
_CONTEXT: Final = 1024  # bytes, and tokens, that are looked at for `text`: more than its characters can take
_DIGITS: Final = 5

_Row = dict[str, Any]


def previews(dataset: Dataset, **limits: int) -> dict[str, bytes]:
    """The previews of all splits that have something to show, by split.

    A split without a row is left out, because `datasets` refuses to load a config that names an empty one.

    Args:
        dataset: a dataset, or a view of one.
        limits: as for `preview`.

    Returns:
        Arrow streams, to be written as `preview/<split>.arrow`.

    Raises:
        InvalidInputError: the tokenizer's files are damaged, or a limit is below 1.
        CorruptDataError: a chunk's bytes are not what was written.
    """
    tokenizer = dataset.tokenizer()
    rows = {name: _rows(dataset.split(name), tokenizer, **limits) for name in dataset.splits}
    return {name: _stream(found) for name, found in rows.items() if found}


def preview(dataset: Dataset, split: str, *, sequences: int = 20, positions: int = 50, candidates: int = 5) -> bytes:
    """The first positions with a distribution of the first sequences of a split, for people to look at.

    Only the chunks of these sequences are read. Equal datasets give equal bytes. Where the rows would take over
    200 kB, each sequence has fewer of them.

    Args:
        dataset: a dataset, or a view of one.
        split: name of the split.
        sequences: at most so many.
        positions: of each at most so many.
        candidates: of each position the best ones, at most so many.

    Returns:
        An uncompressed Arrow stream of `SCHEMA`, with no rows when there is nothing to show. `text` is what stands
        before the prediction, null without a tokenizer; tokens are decimal ids then. `probabilities` are shares of
        the draws for sampled distributions, and shares of the stored candidates where the probabilities are
        normalised over these only. `rest` is the probability of all that is not listed; null where it is unknown.

    Raises:
        InvalidInputError: there is no such split, the tokenizer's files are damaged, or a limit is below 1.
        CorruptDataError: a chunk's bytes are not what was written.
    """
    view = dataset.split(split)
    limits = {"sequences": sequences, "positions": positions, "candidates": candidates}
    return _stream(_rows(view, dataset.tokenizer(), **limits))


def _stream(rows: list[_Row]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    return bytes(sink.getvalue())


def _rows(
    view: Dataset, tokenizer: Tokenizer | None, *, sequences: int = 20, positions: int = 50, candidates: int = 5
) -> list[_Row]:
    for name, limit in (("sequences", sequences), ("positions", positions), ("candidates", candidates)):
        if limit < 1:
            raise InvalidInputError(f"{name} is {limit}; a preview shows at least 1")
    chosen = view[:sequences].select(["tokens", "ids", "logprobs", "draws", "tail"])
    found = [list(_of_sequence(sequence, tokenizer, positions, candidates)) for sequence in chosen]
    # All sequences are shortened alike, so that the sample stays spread over them.
    while positions > 1 and sum(_size(row) for rows in found for row in rows) > _BYTES:
        positions //= 2
        found = [rows[:positions] for rows in found]
    return [row for rows in found for row in rows]


def _size(row: _Row) -> int:
    """Bytes of a row in the stream, about."""
    texts = (row["id"], row["text"] or "", row["token"], row["next_token"] or "", *row["candidates"])
    return sum(len(text.encode()) + 4 for text in texts) + 8 * len(row["probabilities"]) + 32


def _of_sequence(sequence: Sequence, tokenizer: Tokenizer | None, positions: int, candidates: int) -> Iterator[_Row]:
    shown = np.flatnonzero(sequence.count)[:positions].tolist()
    tokens = sequence.tokens.tolist() if shown else []
    texts = None if tokenizer is None or not shown else _Texts(tokenizer, tokens, shown[0])
    for at in shown:
        start, end = (int(n) for n in sequence.offsets[at : at + 2])
        probabilities, rest = _probabilities(sequence, at, start, end, candidates)
        yield {
            "id": shortened(visible(sequence.id[: _ID + 1]), _ID),
            "position": at,
            "text": None if texts is None else texts.until(at),
            "token": label(tokenizer, tokens[at]),
            "next_token": label(tokenizer, tokens[at + 1]) if at + 1 < len(tokens) else None,
            "candidates": [label(tokenizer, token) for token in sequence.ids[start:end][:candidates].tolist()],
            "probabilities": probabilities,
            "rest": rest,
        }


def _probabilities(sequence: Sequence, at: int, start: int, end: int, k: int) -> tuple[list[float], float | None]:
    """The best k probabilities of a position, and that of everything else."""
    logprobs = sequence.logprobs[start:end].astype(np.float64)
    if sequence.normalised == "candidates":  # of any level, perhaps not normalised at all: only ratios are known
        shares = np.exp(logprobs - logprobs.max())
        return _rounded(shares / shares.sum(), k), None
    values = np.exp(logprobs)
    tail = 0.0 if sequence.draws is not None else math.exp(float(sequence.tail[at]))  # all draws are stored
    rest = None if math.isnan(tail) else round(min(1.0, tail + float(values[k:].sum())), _DIGITS)
    return _rounded(values, k), rest


def _rounded(values: NDArray[np.float64], k: int) -> list[float]:
    return [round(value, _DIGITS) for value in values[:k].tolist()]


class _Texts:
    """The text up to each of ascending positions; the bytes of its last tokens are kept, not the whole of it."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[int], first: int) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._next = max(0, first - _CONTEXT)
        self._cut = self._next > 0
        self._bytes = b""

    def until(self, position: int) -> str:
        for token in self._tokens[self._next : position + 1]:
            piece = self._tokenizer.token_bytes(token)
            self._bytes += unknown(token).encode() if piece is None else piece
            self._cut |= len(self._bytes) > _CONTEXT
            self._bytes = self._bytes[-_CONTEXT:]
        self._next = position + 1
        # Bytes that were cut in the middle of a character are left of what is shown: 1024 bytes are 256 characters.
        parts = [in_text(character) for character in self._bytes.decode(errors="replace")[-_TEXT - 1 :]]
        if not self._cut and sum(map(len, parts)) <= _TEXT:
            return "".join(parts)
        length, kept = len(ELLIPSIS), []
        for part in reversed(parts):
            length += len(part)
            if length > _TEXT:
                break
            kept.append(part)
        return ELLIPSIS + "".join(reversed(kept))
