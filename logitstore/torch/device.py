"""Decoding on a device: the torch form of `logitstore.encoding.decode`, for batches of sequences at once.

Workers hand over what pcodec gives, codes and gaps: about 6 bytes a candidate, where int64 ids and float32 logprobs
take 12. One tensor of bytes holds all of it, so a batch is one pinned block and one copy to the device, where a gather,
a running sum and a multiply-add finish it. Whole numbers are int16 and int32: torch hardly computes with unsigned ones.
Sums wrap as the unsigned sums of the numpy form do. Ids equal that form's bit for bit, logprobs to one unit in the last
place of float32.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.encoding.values import Encoding
from logitstore.errors import InvalidInputError, InvalidTypeError
from logitstore.shard.encoded import EncodedSequence
from logitstore.shard.sequence import Sequence
from logitstore.torch.parcel import Parcel, replaced

_ALIGNMENT: Final = 16  # bytes; a view of a buffer needs its own type's alignment, and copies are faster with more

_TORCH_TYPES: Final = {
    np.dtype(np.int16): torch.int16,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}

_FLOATS: Final = {
    Encoding.BFLOAT16: torch.bfloat16,
    Encoding.FLOAT16: torch.float16,
    Encoding.FLOAT32: torch.float32,
}


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an array stands in the buffer of a batch: bytes from `start` to `end`, of this type."""

    start: int
    end: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences of a batch that are decoded together: P positions with candidates, N candidates.

    Attributes:
        encoding: how their values are encoded.
        resolution: nats a step of the grid.
        k: candidates of every position, 0 where positions differ.
        slots: by name. `codes` int32 [N], `top` [P], `gaps` [N - P], `shift` [P] under bfloat16: as in
            `EncodedSequence`. `place` int32 [P]: row times T plus position. `end` int32 [P]: where the order of the
            position's chunk ends among the orders. `count` int32 [P] where positions differ.
    """

    encoding: Encoding
    resolution: float
    k: int
    slots: Mapping[str, Slot]


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """A batch of encoded sequences: B rows of up to T positions, of up to K candidates.

    Attributes:
        buffer: uint8 [bytes], everything that the groups need.
        orders: where the token orders stand in it, int32: one 0, then each distinct order once.
        groups: what is decoded together.
        shape: (B, T, K).
        k: candidates of each position that are wanted, whatever K is.
        columns: other tensors of the batch; `decode_batch` hands them on.
    """

    buffer: torch.Tensor
    orders: Slot
    groups: tuple[Group, ...]
    shape: tuple[int, int, int]
    k: int
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    def array(self, slot: Slot) -> torch.Tensor:
        """An array of the buffer, as a view."""
        return self.buffer[slot.start : slot.end].view(slot.dtype)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> EncodedBatch:
        """The batch on a device: one copy, and one for each other column."""
        return self.replaced(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> EncodedBatch:
        """The batch in pinned memory; a DataLoader with `pin_memory=True` calls this."""
        return self.replaced(torch.Tensor, lambda tensor: tensor.pin_memory())

    def replaced(self, kind: Any, change: Callable[[Any], Any]) -> EncodedBatch:
        """The batch with every tensor changed, or what stands in its place; see `parcel.replaced`."""
        buffer, columns = replaced((self.buffer, self.columns), kind, change)
        return dataclasses.replace(self, buffer=buffer, columns=columns)


class _Buffer:
    """Arrays that are to stand one after another in a buffer; each is copied once, when all are known."""

    def __init__(self) -> None:
        self.parts: list[tuple[Slot, list[NDArray[Any]]]] = []
        self.size = 0

    def add(self, parts: list[NDArray[Any]]) -> Slot:
        """Room for the concatenation of arrays of one type."""
        end = self.size + sum(part.nbytes for part in parts)
        slot = Slot(self.size, end, _TORCH_TYPES[parts[0].dtype])
        self.parts.append((slot, parts))
        self.size = -(-end // _ALIGNMENT) * _ALIGNMENT
        return slot

    def tensor(self) -> torch.Tensor:
        """The buffer, uint8."""
        buffer = torch.empty(self.size, dtype=torch.uint8, device="cpu")
        for slot, parts in self.parts:
            np.concatenate(parts, out=buffer[slot.start : slot.end].view(slot.dtype).numpy())
        return buffer


def encoded_batch(
    sequences: SequenceOf[Sequence],
    columns: Mapping[str, torch.Tensor] | None = None,
    *,
    length: int | None = None,
    k: int | None = None,
) -> EncodedBatch:
    """Collate encoded sequences for `decode_batch`.

    Args:
        sequences: of `Dataset.with_decoding("device")`; of any encodings, chunks and datasets.
        columns: other tensors of the batch, such as `input_ids`, which travel with it.
        length: T; longer sequences are cut. None: the positions of the longest one, at least 1.
        k: candidates of each position; None: the most that a position of the batch has, at least 1.

    Returns:
        The batch, on the CPU.

    Raises:
        InvalidInputError: there is no sequence, or the length or k is below 1.
        InvalidTypeError: one is not encoded.
    """
    if not sequences:
        raise InvalidInputError("a batch of no sequences; give the collator at least one")
    if length is None:
        length = max(1, *(len(sequence) for sequence in sequences))
    if length < 1:
        raise InvalidInputError(f"the length of a batch is {length}; it is a number of positions from 1")
    if k is not None and k < 1:
        raise InvalidInputError(f"k is {k}; it is a number of candidates from 1")
    encoded = [_as_encoded(sequence).cut(length) for sequence in sequences]
    orders, ends = _distinct_orders([sequence.order for sequence in encoded])
    alike = defaultdict(list)
    for row, (sequence, end) in enumerate(zip(encoded, ends, strict=True)):
        if len(sequence.codes):
            uniform = ragged.uniform(ragged.present(sequence.count))
            alike[sequence.encoding, sequence.resolution, uniform].append(_member(sequence, row * length, end))
    buffer = _Buffer()
    slot = buffer.add(orders)
    groups = tuple(Group(*key, slots=_add_group(buffer, members, key[2])) for key, members in alike.items())
    most = max(1, *(int(sequence.count.max(initial=0)) for sequence in encoded))
    shape = len(encoded), length, most
    return EncodedBatch(buffer.tensor(), slot, groups, shape, most if k is None else k, dict(columns or {}))


def _as_encoded(sequence: Sequence) -> EncodedSequence:
    if not isinstance(sequence, EncodedSequence):
        raise InvalidTypeError(
            f"a {type(sequence).__name__} is not encoded; read the dataset through Dataset.with_decoding('device')"
        )
    return sequence


def _distinct_orders(orders: list[NDArray[np.int32]]) -> tuple[list[NDArray[np.int32]], list[int]]:
    """(each order once, behind a 0 that is there when all are empty; where each sequence's order ends)."""
    distinct = [np.zeros(1, np.int32)]
    found: dict[bytes, int] = {}
    size = 1
    ends = []
    for order in orders:
        key = order.tobytes()  # chunks are read more than once, so one order may be several arrays
        if key not in found:
            distinct.append(order)
            size += len(order)
            found[key] = size
        ends.append(found[key])
    return distinct, ends


def _member(sequence: EncodedSequence, first: int, end: int) -> dict[str, NDArray[Any]]:
    """What a sequence gives to its group; its first position stands at `first`, its order ends at `end`."""
    at = np.flatnonzero(sequence.count)
    return {
        "codes": sequence.codes,
        "top": sequence.top,
        "gaps": sequence.gaps,
        "shift": sequence.shift,
        "place": (at + first).astype(np.int32),
        "end": np.full(len(at), end, np.int32),
        "count": sequence.count[at].view(np.int32),
    }


def _add_group(buffer: _Buffer, members: list[dict[str, NDArray[Any]]], k: int) -> dict[str, Slot]:
    names = members[0].keys() - ({"count"} if k else set())
    return {name: buffer.add([member[name] for member in members]) for name in sorted(names)}


def to_device(batch: Any, device: torch.device | str) -> Any:
    """A batch on a device, whatever its collator made. To CUDA, copies go through pinned memory and do not block.

    Args:
        batch: tensors and encoded batches, also in mappings and lists; anything else stays as it is.
        device: where to.
    """
    device = torch.device(device)

    def move(value: Any) -> Any:
        elsewhere = isinstance(value, torch.Tensor) and (
            value.device.type != "cpu" or value.layout is not torch.strided
        )
        if device.type != "cuda" or elsewhere:  # only dense tensors on the CPU can be pinned
            return value.to(device)
        return value.pin_memory().to(device, non_blocking=True)

    return replaced(batch, (torch.Tensor, EncodedBatch, Parcel), move)


def decode_batch(batch: EncodedBatch, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
    """The candidates of a batch as rectangles, decoded where the batch is or on a device that it is copied to.

    Equal to `Sequence.dense` of each sequence, one below the other: with o the batch's orders, e the end of the
    position's order among them, c a code, g the gaps, r the resolution,
    id = c if c >= 0 else o[e + c], and under the grid logprob = top - r * (g[1] + ... + g[rank - 1]).

    Args:
        batch: from `encoded_batch`.
        device: where to decode; None: where the batch is.

    Returns:
        The batch's columns, and `target_ids` int64 [B, T, k], 0 where there is no candidate, and `target_logprobs`
        float32 [B, T, k], nats, -inf where there is none. A column `target_tail` gains what k leaves out.
    """
    if device is not None:
        batch = to_device(batch, device)
    rows, length, most = batch.shape
    k = batch.k
    columns = dict(batch.columns)
    cut = "target_tail" in columns and k < most
    ids, logprobs = (each.view(rows, length, -1) for each in _rectangles(batch, rows * length, most if cut else k))
    if cut:
        columns["target_tail"] = torch.logaddexp(columns["target_tail"], logprobs[..., k:].logsumexp(-1))
        ids, logprobs = ids[..., :k].contiguous(), logprobs[..., :k].contiguous()
    return {**columns, "target_ids": ids, "target_logprobs": logprobs}


def _rectangles(batch: EncodedBatch, positions: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [positions, k], logprobs float32 [positions, k])."""
    if len(batch.groups) == 1 and k <= batch.groups[0].k and _positions(batch.groups[0]) == positions:
        return _decode_uniform(batch, batch.groups[0], k)  # they are the rectangles
    # One more for candidates past k: they are written there; to pick out the others would wait for the device.
    size, device = positions * k + 1, batch.buffer.device
    ids = torch.zeros(size, dtype=torch.int64, device=device)
    logprobs = torch.full((size,), -torch.inf, device=device)
    for group in batch.groups:
        if group.k:
            wide = min(k, group.k)
            place = batch.array(group.slots["place"]).long()
            for whole, part in zip((ids, logprobs), _decode_uniform(batch, group, wide), strict=True):
                whole[:-1].view(positions, k)[:, :wide].index_copy_(0, place, part)
        else:
            at, *decoded = _decode_ragged(batch, group, k, size - 1)
            for whole, part in zip((ids, logprobs), decoded, strict=True):
                whole.index_copy_(0, at, part)
    return ids[:-1].view(positions, k), logprobs[:-1].view(positions, k)


def _positions(group: Group) -> int:
    place = group.slots["place"]
    return (place.end - place.start) // 4


def _decode_uniform(batch: EncodedBatch, group: Group, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [P, k], logprobs float32 [P, k]) of a group with at least k candidates a position."""
    arrays = {name: batch.array(slot) for name, slot in group.slots.items()}
    codes = arrays["codes"].view(-1, group.k)[:, :k]
    gaps = _widened(arrays["gaps"], group).view(len(codes), group.k - 1)[:, : k - 1]
    sums = gaps.new_zeros(len(codes), k)
    torch.cumsum(gaps, 1, dtype=gaps.dtype, out=sums[:, 1:])
    ids = _decode_ids(codes, batch.array(batch.orders), arrays["end"][:, None])
    shift = arrays["shift"][:, None] if len(arrays["shift"]) else None
    return ids, _decode_values(group, arrays["top"][:, None], sums, shift)


def _decode_ragged(
    batch: EncodedBatch, group: Group, k: int, nowhere: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(where each candidate goes: place * k + rank, or `nowhere` past k; ids int64 [N]; logprobs float32 [N])."""
    arrays = {name: batch.array(slot) for name, slot in group.slots.items()}
    codes, count = arrays["codes"], arrays["count"].long()
    position = torch.arange(len(count), device=codes.device)
    row = torch.repeat_interleave(position, count, output_size=len(codes))
    starts = count.cumsum(0) - count
    rank = torch.arange(len(codes), device=codes.device) - starts.index_select(0, row)
    gaps = _widened(arrays["gaps"], group)
    # Sums over all rows, behind a 0. A row has one gap less than candidates, so its sums begin that many places early.
    running = torch.cat([gaps.new_zeros(1), gaps.cumsum(0, dtype=gaps.dtype)])
    before = starts - position
    sums = running.index_select(0, before.index_select(0, row) + rank) - running[before].index_select(0, row)
    ids = _decode_ids(codes, batch.array(batch.orders), arrays["end"].index_select(0, row))
    shift = arrays["shift"].index_select(0, row) if len(arrays["shift"]) else None
    values = _decode_values(group, arrays["top"].index_select(0, row), sums, shift)
    at = torch.where(rank < k, arrays["place"].long().index_select(0, row) * k + rank, nowhere)
    return at, ids, values


def _widened(gaps: torch.Tensor, group: Group) -> torch.Tensor:
    """The gaps of the 16-bit grid as the numbers that they are. Sums of ordinals need not be more than their type."""
    return gaps.int() & 0xFFFF if group.encoding is Encoding.GRID else gaps


def _decode_ids(codes: torch.Tensor, orders: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Ids, int64, of codes int32 [..., n]; `ends` spreads over them."""
    place = codes.clamp(max=-1) + ends
    ordered = orders.index_select(0, place.flatten()).view_as(codes)
    return torch.where(codes < 0, ordered, codes).long()


def _decode_values(group: Group, top: torch.Tensor, sums: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """Logprobs, float32, from what is at the top of each position and the sums of the gaps below it."""
    if group.encoding in (Encoding.GRID, Encoding.GRID_WIDE):
        return torch.add(top, sums.float(), alpha=-group.resolution)
    ordinals = top - sums
    # The sign bit of an ordinal is set where the number is not negative.
    bits = torch.where(ordinals < 0, ordinals & torch.iinfo(ordinals.dtype).max, ~ordinals)
    values = bits.view(_FLOATS[group.encoding]).float()
    return values if shift is None else values - shift
