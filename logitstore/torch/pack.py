"""Packing: sequences put together to packs of a fixed length, so that little of a batch is padding.

The plan of all packs is made once, from the lengths alone, and held in four arrays: 16 bytes a piece and 8 a pack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, InvalidTypeError, RowIndexError
from logitstore.limits import SEQUENCE_POSITIONS
from logitstore.shard.sequence import Sequence
from logitstore.torch.order import mix, order_key
from logitstore.torch.source import Samples, as_samples, expect, is_remote

Method = Literal["best-fit", "split"]

WINDOW: Final = 2**14
"""Consecutive samples that are packed among themselves."""

_ENCODED: Final = (
    "encoded sequences cannot be packed: the codes of each chunk mean other ids; pack sequences that are decoded "
    "(decode='cpu')"
)

_VERSION: Final = 1  # of the plan: a checkpoint's place means another pack where the plan changes

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)

_POSITIONAL: Final = ("tokens", "count", "tail", "target_logprob", "target_rank", "logsumexp", "entropy", "loss_mask")
_FLAT: Final = ("ids", "logprobs", "draws", "logits")
_UNKNOWN: Final[dict[str, tuple[Any, Any]]] = {
    "target_logprob": (np.float32, np.nan),
    "target_rank": (np.int64, 0),
    "logsumexp": (np.float32, np.nan),
    "entropy": (np.float32, np.nan),
    "loss_mask": (np.int8, -1),
}
"""What stands where one sequence of a pack has a column and another has not: type and value."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which pieces of which sequences stand in which pack.

    Attributes:
        row: int64 [pieces], row of the sequence.
        start: uint32 [pieces], its first position in the pack.
        stop: uint32 [pieces], the position after its last one.
        offsets: int64 [packs + 1]: the pieces of pack p are [offsets[p]:offsets[p + 1]].
    """

    row: NDArray[np.int64]
    start: NDArray[np.uint32]
    stop: NDArray[np.uint32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.offsets) - 1

    def lengths(self) -> NDArray[np.uint32]:
        """Positions of each pack."""
        ends = np.append(0, np.cumsum(self.stop - self.start, dtype=np.int64))
        return np.diff(ends[self.offsets]).astype(np.uint32)


class Packed:
    """Samples packed to a fixed length; it is `Samples` itself, a sample being a pack.

    A pack is a `Sequence` with the id `pack-<row>`, in which all arrays are put together and `columns` holds
    `position_ids` int32 [T], from 0 in each document, and `document_ids` int32 [T], from 0; the users' own columns are
    left out. The rows keep all that is known of them: that the last row of a document predicts a token that is not
    there is for the collator to see, from `document_ids`. Where sequences of a pack differ in having an optional
    column, it is unknown for those without; `draws` and `logits` are left out then.

    - `best-fit`: in each window of consecutive samples the longest sequence that fits is put into the open pack, and a
      new pack is opened when none fits (this is what first-fit decreasing gives: Johnson 1973, at most 11/9 of the
      fewest packs). Sequences longer than a pack are cut into pieces of its length and a rest. The packs of a window
      are put in an order of their own.
    - `split`: the sequences of each window are put into an order, all are joined, and cut every `length` tokens.

    Empty sequences are left out. The plan is a pure function of the lengths and these arguments.

    Args:
        samples: what is packed: path, `Dataset` or `Samples`.
        length: tokens of a pack; packs of `best-fit` and the last one of `split` may be shorter.
        method: `best-fit` keeps sequences whole, `split` leaves no padding.
        seed: of the order.
        drop_last: with `split`, leave out the last pack if it is shorter.
        window: consecutive samples that are packed and shuffled among themselves. Samples that are read together then
            lie together on the disk.

    Raises:
        InvalidInputError: a number is out of range, `drop_last` is asked of `best-fit`, or nothing is left.
        InvalidTypeError: the method is none of the two, or the samples are encoded (decode="device").
    """

    def __init__(
        self,
        samples: Any,
        length: int,
        method: Method = "best-fit",
        seed: int = 0,
        *,
        drop_last: bool = False,
        window: int = WINDOW,
    ) -> None:
        if method not in get_args(Method):
            raise InvalidTypeError(f"method={method!r}; give one of {', '.join(map(repr, get_args(Method)))}")
        if not 1 <= length <= SEQUENCE_POSITIONS:
            raise InvalidInputError(f"packs of {length} tokens; give a length from 1 to {SEQUENCE_POSITIONS}")
        if window < 1:
            raise InvalidInputError(f"a window of {window} samples; give a number from 1")
        if drop_last and method != "split":
            raise InvalidInputError("drop_last is for method='split': with 'best-fit' any pack may be short")
        samples = as_samples(samples)
        if getattr(samples, "decode", "cpu") != "cpu":
            raise InvalidTypeError(_ENCODED)
        self.samples = samples
        self.length = length
        self.tokenizer_digest = samples.tokenizer_digest
        self.logit_width = samples.logit_width
        self.highest_id: int | None = getattr(samples, "highest_id", None)
        self.normalised = samples.normalised
        self.temperature: float | None = getattr(samples, "temperature", None)
        self.remote = is_remote(samples)
        settings = f"{method}:{length}:{seed}:{window}:{int(drop_last)}"
        told = f"logitstore pack {_VERSION}:{samples.digest}:{settings}"
        self.digest = hashlib.sha256(told.encode()).hexdigest()
        key = order_key(samples.digest, seed, 0, f"pack {settings}")
        lengths = lengths_of(samples)
        if method == "split":
            self.plan = plan_split(lengths, length, key, window, drop_last=drop_last)
        else:
            self.plan = plan_best_fit(lengths, length, key, window)
        if not len(self.plan):
            raise InvalidInputError(
                f"{len(lengths)} sequences of {int(lengths.sum(dtype=np.int64))} tokens in all give no pack of "
                f"{length}; give more data, a smaller length, or drop_last=False"
            )

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.plan)

    def lengths(self) -> NDArray[np.uint32]:
        """uint32 [packs]: tokens of each pack."""
        return self.plan.lengths()

    @property
    def fill(self) -> float:
        """Tokens over places: 1 where no pack is short."""
        return float(self.lengths().sum(dtype=np.int64) / (len(self) * self.length))

    def expect(self, rows: Iterable[int]) -> None:
        """Start fetching packs that will be read soon."""
        pieces = [slice(*self.plan.offsets[row : row + 2].tolist()) for row in rows]
        expect(self.samples, [number for piece in pieces for number in self.plan.row[piece].tolist()])

    def __getitem__(self, row: int) -> Sequence:
        """A pack.

        Raises:
            RowIndexError: there is no such pack.
            InvalidTypeError: the samples are still encoded.
            CorruptDataError: a sequence's bytes are not what was written.
        """
        if not -len(self) <= row < len(self):
            raise RowIndexError(f"pack {row} of {len(self)}")
        row %= len(self)
        plan = self.plan
        pieces = slice(int(plan.offsets[row]), int(plan.offsets[row + 1]))
        spans = zip(plan.row[pieces].tolist(), plan.start[pieces].tolist(), plan.stop[pieces].tolist(), strict=True)
        return joined(f"pack-{row}", [cut(self.samples[number], start, stop) for number, start, stop in spans])


def lengths_of(samples: Samples) -> NDArray[np.uint32]:
    """uint32 [samples]: positions of each; from its method `lengths()` if it has one, else by reading every sample.

    Raises:
        InvalidInputError: `lengths()` gives another number of them.
    """
    known = getattr(samples, "lengths", None)
    if known is None:
        return np.fromiter((len(samples[row]) for row in range(len(samples))), np.uint32, len(samples))
    lengths = np.asarray(known(), np.uint32)
    if lengths.shape != (len(samples),):
        raise InvalidInputError(f"lengths() of {len(samples)} samples has the shape {list(lengths.shape)}")
    return lengths


def plan_best_fit(lengths: NDArray[np.uint32], length: int, key: int, window: int = WINDOW) -> Plan:
    """The plan of `best-fit`; see `Packed`.

    Args:
        lengths: of the sequences.
        length: of a pack.
        key: 64 bits, for the order of the packs.
        window: sequences that are packed among themselves.
    """
    row, start, size = _cut_up(lengths, length)
    bounds = np.searchsorted(row, np.arange(0, len(lengths) + window, window))
    pieces, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, (first, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        place, count = _fit(size[first:end], length)
        order = _shuffled(len(count), key, number)
        pieces.append(first + _reordered(place, count, order))
        counts.append(count[order])
    chosen = np.concatenate(pieces)
    return Plan(
        row=row[chosen],
        start=start[chosen],
        stop=start[chosen] + size[chosen],
        offsets=ragged.offsets(np.concatenate(counts)),
    )


def plan_split(
    lengths: NDArray[np.uint32], length: int, key: int, window: int = WINDOW, *, drop_last: bool = False
) -> Plan:
    """The plan of `split`; see `Packed`.

    Args:
        lengths: of the sequences.
        length: of a pack.
        key: 64 bits, for the order of the sequences.
        window: sequences that are put in an order among themselves.
        drop_last: whether the last pack is left out if it is shorter.
    """
    spans = enumerate(range(0, len(lengths), window))
    order = [first + _shuffled(min(window, len(lengths) - first), key, number) for number, first in spans]
    rows = np.concatenate([np.empty(0, np.int64), *order])
    rows = rows[lengths[rows] > 0]
    ends = np.cumsum(lengths[rows], dtype=np.int64)
    starts = ends - lengths[rows]
    total = int(ends[-1]) if len(ends) else 0
    end = total // length * length if drop_last else total
    edges = np.union1d(starts, np.arange(0, total, length))
    edges = np.append(edges[edges < end], end)
    begins = edges[:-1]
    which = np.searchsorted(starts, begins, side="right") - 1
    return Plan(
        row=rows[which],
        start=(begins - starts[which]).astype(np.uint32),
        stop=(edges[1:] - starts[which]).astype(np.uint32),
        offsets=np.append(np.searchsorted(begins, np.arange(0, end, length)), len(begins)),
    )


def _cut_up(
    lengths: NDArray[np.uint32], length: int
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]:
    """(row, start, size) of pieces that are no longer than a pack, in the order of the sequences."""
    pieces = (lengths.astype(np.int64) + length - 1) // length
    row = np.repeat(np.arange(len(lengths)), pieces)
    start = (np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * length
    size = np.minimum(lengths[row] - start, length)
    return row, start.astype(np.uint32), size.astype(np.uint32)


def _fit(size: NDArray[np.uint32], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(pieces in the order of their packs, pieces of each pack): each time the longest piece that fits.

    Packs that are alike are made together, so the time goes with the number of different lengths, not with that of the
    pieces: packs of one make-up are repeated until one of its lengths runs out.
    """
    left = np.bincount(size, minlength=1).tolist()
    below = [each if left[each] else max(0, each - 1) for each in range(len(left))]
    made: list[int] = []
    counts: list[int] = []
    while _longest(below, len(left) - 1):
        pack = _fill(left, below, length)
        times = min(left[each] // many for each, many in pack)
        for each, many in pack:
            left[each] -= times * many
            if not left[each]:
                below[each] = each - 1
        sizes = [each for each, many in pack for _ in range(many)]
        made += sizes * times
        counts += [len(sizes)] * times
    place = np.empty(len(size), np.int64)
    place[np.argsort(np.asarray(made, np.int64), kind="stable")] = np.argsort(size, kind="stable")
    return place, np.asarray(counts, np.int64)


def _fill(left: list[int], below: list[int], length: int) -> list[tuple[int, int]]:
    """(size, how often) of the pieces of the next pack, longest first."""
    pack = []
    free, limit = length, len(left) - 1
    while each := _longest(below, min(free, limit)):
        many = min(left[each], free // each)
        pack.append((each, many))
        free -= many * each
        limit = each - 1
    return pack


def _longest(below: list[int], limit: int) -> int:
    """The longest size up to this one that is left, 0 if none is; `below` leads there, and is shortened on the way."""
    while below[limit] != limit:
        below[limit] = below[below[limit]]
        limit = below[limit]
    return limit


def _shuffled(size: int, key: int, number: int) -> NDArray[np.int64]:
    """A permutation of [0, size): the order of splitmix64's values, the same on every machine and in every version."""
    values = np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN + np.uint64(mix((key + number) % 2**64))
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.argsort(values ^ values >> np.uint64(31), kind="stable")


def _reordered(place: NDArray[np.int64], count: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The runs of these counts, in another order."""
    starts = ragged.offsets(count)[order]
    return place[np.repeat(starts - ragged.offsets(count[order])[:-1], count[order]) + np.arange(len(place))]


def cut(sequence: Sequence, start: int, stop: int) -> Sequence:
    """The positions [start, stop) of a sequence, with all that is known of them.

    Args:
        sequence: the sequence.
        start: first position.
        stop: the position after the last one.

    Raises:
        InvalidTypeError: it is still encoded.
    """
    if type(sequence) is not Sequence:
        raise InvalidTypeError(_ENCODED)
    if start == 0 and stop == len(sequence):
        return sequence
    fields = dict(vars(sequence))
    if "offsets" in fields:
        first, end = int(sequence.offsets[start]), int(sequence.offsets[stop])
        fields["offsets"] = sequence.offsets[start : stop + 1] - first
        fields |= {name: fields[name][first:end] for name in _FLAT if fields.get(name) is not None}
    fields |= {name: fields[name][start:stop] for name in _POSITIONAL if fields.get(name) is not None}
    return Sequence.of(fields)


def joined(name: str, parts: list[Sequence]) -> Sequence:
    """One sequence of several, each a document in it; see `Packed`.

    Args:
        name: its id.
        parts: the documents, at least one.
    """
    shared = set.intersection(*(set(vars(part)) for part in parts))
    fields: dict[str, Any] = {"id": name, "normalised": vars(parts[0]).get("normalised", "vocabulary")}
    for column in (*_POSITIONAL, *_FLAT):
        if column in shared:
            fields[column] = _joined_column(column, parts)
    if "offsets" in shared:
        fields["offsets"] = ragged.offsets(fields["count"])
    lengths = [len(part) for part in parts]
    fields["columns"] = {
        "position_ids": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        "document_ids": np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
    }
    return Sequence.of(fields)


def _joined_column(column: str, parts: list[Sequence]) -> NDArray[Any] | None:
    """None where no part has it, or some have not and there is no value that says so."""
    values = [vars(part)[column] for part in parts]
    missing = [value is None for value in values]
    if all(missing) or (any(missing) and column not in _UNKNOWN):
        return None
    if any(missing):
        dtype, unknown = _UNKNOWN[column]
        values = [np.full(len(p), unknown, dtype) if v is None else v for p, v in zip(parts, values, strict=True)]
    return values[0] if len(values) == 1 else np.concatenate(values)
