"""`llama-kld`: what `llama-perplexity --kl-divergence-base` writes, plain or under zstd.

Little-endian: magic `_logits_`, int32 n_ctx, n_vocab and n_chunk, int32 [n_chunk * n_ctx] tokens, and then, window by
window, one row for each position of the second half that has a next token in its window: float32 scale, float32
lowest logprob, uint16 q of every token, and one uint16 of padding where n_vocab is odd. A logprob is
`scale * q + lowest`; q = 0 stands for that or anything below it. The file names neither model nor tokenizer.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Ready
from logitstore.convert.lines import progress
from logitstore.convert.source import Input
from logitstore.errors import InvalidInputError, LogitStoreError, SourceError
from logitstore.limits import PROBABILITY_SLACK, SEQUENCE_CANDIDATES, SEQUENCE_POSITIONS

DEFAULT_TOP_K: Final = 128
"""Candidates that are kept of a row unless the user says otherwise."""

_MAGIC: Final = b"_logits_"
_HEADER: Final = struct.Struct("<8s3i")
_VOCABULARY_LIMIT: Final = 2**22  # 16 times the largest there are; a row is then 8 MiB
_TOKENS_LIMIT: Final = 2**26  # all tokens of a file are held: 256 MiB; rows for as many would take terabytes
_BLOCK_BYTES: Final = 2**22  # rows are read in such blocks,
_BLOCK_ROWS: Final = 2**14  # but of small vocabularies no more than this, which fits the sort key of `_best`
_PIECE: Final = 2**20
_STEP_LIMIT: Final = 1e-3  # nats; four times the step of 16 nats in 65,535

_FLOOR_NOTE: Final = (
    "Logprobs come in 65,535 steps down to 16 nats under the best; a candidate at that floor has only a bound, so it "
    "is left out and stays in the tail, which is what the kept candidates leave of 1."
)
_HALVES_NOTE: Final = "Only the second half of each window has distributions; the first has none, and loss_mask 0."
_BOS_NOTE: Final = (
    "Where the vocabulary adds BOS, the model saw BOS in place of the first token of each window, but the file, and "
    "so the dataset, has the text's own token there."
)


@dataclass(frozen=True, slots=True)
class _Header:
    """Tokens of a window, tokens of the vocabulary, windows; and the sizes that follow from them."""

    n_ctx: int
    n_vocab: int
    n_chunk: int

    @property
    def first(self) -> int:
        """The position in a window of its first row."""
        return self.n_ctx // 2

    @property
    def rows(self) -> int:
        """Rows of a window."""
        return self.n_ctx - 1 - self.first

    @property
    def row_bytes(self) -> int:
        """Size of a row: scale and lowest logprob, the values, padding."""
        return 2 * (4 + self.n_vocab + self.n_vocab % 2)

    @property
    def rows_at(self) -> int:
        """Offset of the first row in bytes."""
        return _HEADER.size + 4 * self.n_chunk * self.n_ctx

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.rows_at + self.row_bytes * self.rows * self.n_chunk


def _recognises(source: Input) -> bool:
    try:
        return source.head().startswith(_MAGIC)
    except (LogitStoreError, OSError):
        return False


def _read(inputs: list[Input], options: Options) -> Import:
    headers = [_read_header(source) for source in inputs]
    top_k = options.top_k or DEFAULT_TOP_K
    for source, header in zip(inputs, headers, strict=True):
        if header.n_vocab != headers[0].n_vocab:
            raise SourceError(
                f"{source.name}: its vocabulary has {header.n_vocab} tokens, that of {inputs[0].name} "
                f"{headers[0].n_vocab}; convert captures of different models into different datasets"
            )
        if (candidates := header.rows * min(top_k, header.n_vocab)) > SEQUENCE_CANDIDATES:
            raise InvalidInputError(
                f"{source.name}: a window would have {candidates} candidates, over the limit of "
                f"{SEQUENCE_CANDIDATES}; give a smaller top_k"
            )

    def pieces() -> Iterator[Ready]:
        number = itertools.count()
        for source, header in zip(inputs, headers, strict=True):
            for window, item in enumerate(_windows(source, header, top_k)):
                yield Ready(f"{source.name}, window {window}", next(number), item)

    return Import(
        pieces=pieces(),
        settings={"top_k": top_k, "logit_width": headers[0].n_vocab},
        **progress(inputs),
        sequences=sum(header.n_chunk for header in headers),
        notes=[_FLOOR_NOTE, _HALVES_NOTE, _BOS_NOTE],
    )


def _read_header(source: Input) -> _Header:
    """The header, checked; of a plain file also the file's size.

    Raises:
        SourceError: it is not of this format, damaged, cut off, or too long.
    """
    head = source.head()[: _HEADER.size]
    if len(head) < _HEADER.size and _MAGIC.startswith(head[: len(_MAGIC)]):
        raise SourceError(f"{source.name}: cut off inside its header; copy the file again")
    if not head.startswith(_MAGIC):
        raise SourceError(f"{source.name}: no file of --kl-divergence-base, it does not begin with {_MAGIC.decode()}")
    header = _Header(*_HEADER.unpack(head)[1:])
    sane = 2 <= header.n_ctx <= SEQUENCE_POSITIONS and 1 <= header.n_vocab <= _VOCABULARY_LIMIT
    if not (sane and 0 <= header.n_chunk <= _TOKENS_LIMIT // header.n_ctx):
        raise SourceError(
            f"{source.name}: its header is damaged: n_ctx {header.n_ctx}, n_vocab {header.n_vocab}, n_chunk "
            f"{header.n_chunk} (n_ctx is from 2 to {SEQUENCE_POSITIONS}, n_vocab from 1 to {_VOCABULARY_LIMIT}, "
            f"and {_TOKENS_LIMIT} tokens are the most in all); copy the file again"
        )
    if source.size is not None and _is_plain(source):
        if source.size < header.size:
            raise _cut_off(source, header, max(0, source.size - header.rows_at) // header.row_bytes)
        if source.size > header.size:
            raise _too_long(source)
    return header


def _is_plain(source: Input) -> bool:
    with source.path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _cut_off(source: Input, header: _Header, there: int) -> SourceError:
    """The error for a file that has only so many whole rows."""
    total = header.rows * header.n_chunk
    says = f"{total - there} of {total} rows are missing"
    if total > 0:
        says += f", from row {there % header.rows} of window {there // header.rows} on"
    return SourceError(f"{source.name}: cut off: {says}; copy the file again, or let llama-perplexity finish")


def _too_long(source: Input) -> SourceError:
    says = "there are bytes behind its last row, so its header or its rows are damaged"
    return SourceError(f"{source.name}: {says}; copy the file again")


def _windows(source: Input, header: _Header, top_k: int) -> Iterator[Item]:
    with source.open() as file:
        source.read(file, _HEADER.size)
        tokens = _read_tokens(source, file, header)
        for window in range(header.n_chunk):
            inside = tokens[window * header.n_ctx : (window + 1) * header.n_ctx]
            yield Item("add", _read_window(source, file, header, window, inside, top_k))
        if source.read(file, 1):
            raise _too_long(source)


def _read_tokens(source: Input, file: BinaryIO, header: _Header) -> NDArray[np.int32]:
    """The tokens of all windows; piece by piece, since the header of a compressed file may promise too many."""
    total = header.n_chunk * header.n_ctx
    parts = [np.empty(0, np.int32)]
    for start in range(0, total, _PIECE):
        size = 4 * min(_PIECE, total - start)
        data = source.read(file, size)
        if len(data) < size:
            raise _cut_off(source, header, 0)
        part = np.frombuffer(data, "<i4")
        wrong = (part < 0) | (part >= header.n_vocab)
        if bool(wrong.any()):
            at = int(np.argmax(wrong))
            window, position = divmod(start + at, header.n_ctx)
            raise SourceError(
                f"{source.name}: window {window}, position {position}: the token {part[at]} is not in the vocabulary "
                f"of {header.n_vocab}; copy the file again"
            )
        parts.append(part)
    return np.concatenate(parts)


def _read_window(
    source: Input, file: BinaryIO, header: _Header, window: int, tokens: NDArray[np.int32], top_k: int
) -> dict[str, Any]:
    """The arguments of `Writer.add` for the next window of a stream."""
    block = min(_BLOCK_ROWS, max(1, _BLOCK_BYTES // header.row_bytes))
    parts = []
    for start in range(0, max(1, header.rows), block):
        n = min(block, header.rows - start)
        data = source.read(file, n * header.row_bytes)
        if len(data) < n * header.row_bytes:
            raise _cut_off(source, header, window * header.rows + start + len(data) // header.row_bytes)
        units = np.frombuffer(data, "<u2").reshape(n, header.row_bytes // 2)
        following = tokens[header.first + start + 1 :][:n]
        place = (f"{source.name}: window {window}", start)
        parts.append(_reduce(units[:, : 4 + header.n_vocab], following, top_k, place))
    count, target_logprob, target_rank, ids, logprobs = map(np.concatenate, zip(*parts, strict=True))
    around = (header.first, 1)  # the rows stand at the positions from `first` on, all but the last
    return {
        "tokens": tokens,
        "ids": ids,
        "logprobs": logprobs,
        "count": np.pad(count, around),
        "target_logprob": np.pad(target_logprob, around, constant_values=np.nan),
        "target_rank": np.pad(target_rank, around),
        "loss_mask": np.pad(np.ones(header.rows, np.int8), around),
    }


def _reduce(
    units: NDArray[np.uint16], following: NDArray[np.int32], top_k: int, place: tuple[str, int]
) -> tuple[NDArray[Any], ...]:
    """The best candidates of some rows without their padding, and what the rows say of the tokens that follow.

    Returns:
        (count [n], target_logprob [n], target_rank [n], ids [N], logprobs [N]).

    Raises:
        SourceError: naming the row whose numbers cannot be; `place` is file and window, and the first row's number.
    """
    scale, lowest = np.ascontiguousarray(units[:, :4]).view("<f4").T
    q = units[:, 4:]
    _refuse(~(np.isfinite(scale) & (scale >= 0)), place, "its scale is negative or not finite")
    _refuse(~np.isfinite(lowest), place, "its lowest logprob is not finite")
    # Scale 0 is a row whose logprobs are all equal, and then q = 0 is their value and no floor.
    floor = (scale > 0).astype(np.uint16)
    row, ids = _best(q, floor, top_k)
    count = np.bincount(row, minlength=len(q))
    _refuse(count == 0, place, "none of its values is above the floor")
    target_q = q[np.arange(len(q)), following]
    with np.errstate(over="ignore"):  # of a damaged scale; the sums tell
        logprobs = scale[row] * q[row, ids].astype(np.float32) + lowest[row]
        target_logprob = scale * target_q.astype(np.float32) + lowest
        sums = np.bincount(row, np.exp(logprobs, dtype=np.float64), minlength=len(q))
    # Rounding to whole q can bring a sum over 1 by half a step; the writer would refuse what is then too much.
    rounding = np.minimum(scale, _STEP_LIMIT).astype(np.float64)
    _refuse(sums > 1 + PROBABILITY_SLACK + rounding, place, "its best candidates' probabilities sum to more than 1")
    excess = np.where(sums > 1 + PROBABILITY_SLACK / 2, np.log(np.maximum(sums, 1)), 0).astype(np.float32)
    known = target_q >= floor
    target_logprob = np.where(known, target_logprob - excess, np.float32(np.nan))
    target_rank = np.where(known, _ranks(q, following, target_q), 0)
    return count, target_logprob, target_rank, ids, logprobs - excess[row]


def _refuse(wrong: NDArray[np.bool_], place: tuple[str, int], says: str) -> None:
    if bool(wrong.any()):
        where, first = place
        raise SourceError(f"{where}, row {first + int(np.argmax(wrong))}: {says}; copy the file again")


def _best(q: NDArray[np.uint16], floor: NDArray[np.uint16], k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row [N], id [N]) of the k highest values of each row, none under its floor; by value descending, then id."""
    width = q.shape[1]
    k = min(k, width)
    # A row is split into groups. The k-th highest of their maxima is no higher than the row's k-th value, and few
    # values reach it: a hundred times faster than to partition the rows.
    size = max(1, width // (8 * k))
    groups = width // size
    highest = q[:, : size * groups].reshape(len(q), size, groups).max(axis=1)
    bound = np.maximum(np.partition(highest, groups - k, axis=1)[:, groups - k], floor)
    row, ids = np.divmod(np.flatnonzero(q >= bound[:, None]), width)
    key = np.sort(row << 48 | (0xFFFF - q[row, ids].astype(np.int64)) << 32 | ids)
    row, ids = key >> 48, key & 0xFFFFFFFF
    count = np.bincount(row, minlength=len(q))
    rank = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    return row[rank < k], ids[rank < k]


def _ranks(q: NDArray[np.uint16], ids: NDArray[np.int32], values: NDArray[np.uint16]) -> NDArray[np.int64]:
    """The rank from 1 of one id in each row; of equal values the lower id comes first."""
    before = (
        np.count_nonzero(row[:token] >= value) + np.count_nonzero(row[token:] > value)
        for row, token, value in zip(q, ids, values, strict=True)
    )
    return 1 + np.fromiter(before, np.int64, len(q))


IMPORTER: Final = Importer(
    name="llama-kld",
    description="llama.cpp: a file of llama-perplexity --kl-divergence-base (or --save-all-logits)",
    loses="candidates at the floor of 16 nats under the best; the first half of each window has no distributions",
    recognises=_recognises,
    read=_read,
    patterns=("*.kld", "*.kld.zst", "*.kld.gz"),
)
