"""A batch on its way from a worker: all of its tensors in one block of shared memory, which is used again.

A tensor that a worker hands over costs a file of its own, a connection for its descriptor, a mapping, and a page fault
for each 4 KB on either side: for a batch of eight tensors more time than decoding it takes. A block costs one
connection; its pages are there already when it is used again. The receiver copies it into memory of its own, pinned
where a device is to have it, and then says by the last byte that the block is free.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

_ALIGNMENT: Final = 64  # bytes; views need their type's own alignment, and vector instructions like a cache line's


@dataclass(frozen=True, slots=True)
class Part:
    """Where a tensor stands in the block: its bytes from `start` on, contiguous."""

    start: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of the block."""
        return block[self.start : self.start + self.size].view(self.dtype).view(self.shape)


@dataclass(frozen=True, eq=False)
class Parcel:
    """A packed batch.

    Attributes:
        block: uint8, all tensors.
        size: bytes of it that are used.
        rest: the batch, with a `Part` in place of each tensor.
        shared: the block is the worker's, which waits for it; else it is nobody else's.
    """

    block: torch.Tensor
    size: int
    rest: Any
    shared: bool = True

    def own(self, *, pinned: bool = False) -> Parcel:
        """The parcel in memory of its own, on the CPU; the worker's block is free afterwards.

        Args:
            pinned: whether it is to be pinned memory.
        """
        block = self.block
        if self.shared:
            block = torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned, device="cpu").copy_(block[: self.size])
            self.block[-1] = 0
        return replace(self, block=block.pin_memory() if pinned else block, shared=False)

    def pin_memory(self) -> Parcel:
        """The parcel in pinned memory; a DataLoader with `pin_memory=True` calls this."""
        return self.own(pinned=True)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Parcel:
        """The parcel on a device, by one copy, and what could not be packed by one each."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        own = self.own()
        return replace(own, block=move(own.block), rest=replaced(own.rest, torch.Tensor, move))


class Packer:
    """Packs batches into blocks of shared memory. Belongs to one worker; pickles, without its blocks.

    Args:
        most: blocks that are kept. What is more are lost ones, whose batches nobody took when an iteration was broken
            off.
    """

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._blocks: list[torch.Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most, "_blocks": []}

    def pack(self, batch: Any) -> Parcel:
        """Put the CPU tensors of a batch into a block.

        Args:
            batch: as `replaced` goes through it; what else is in it travels as without this.
        """
        placed: list[tuple[Part, torch.Tensor]] = []
        end = 0

        def place(tensor: torch.Tensor) -> Any:
            nonlocal end
            if tensor.layout is not torch.strided or tensor.device.type != "cpu":
                return tensor
            # Others have parts of their own, or are larger than what they hold.
            if tensor.is_nested or tensor.is_quantized or tensor.untyped_storage().nbytes() < tensor.nbytes:
                return tensor
            part = Part(end, tensor.nbytes, tuple(tensor.shape), tensor.dtype)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            placed.append((part, tensor))
            return part

        rest = replaced(batch, torch.Tensor, place)
        block = self._block(end + 1)
        for part, tensor in placed:
            part.of(block).copy_(tensor.detach())
        block[-1] = 1
        return Parcel(block, end, rest)

    def _block(self, size: int) -> torch.Tensor:
        """A free block of at least this size; one that is too small makes room for a larger one."""
        free = [number for number, block in enumerate(self._blocks) if not block[-1]]
        for number in free:
            if len(self._blocks[number]) >= size:
                return self._blocks[number]
        if free:
            del self._blocks[free[0]]
        elif len(self._blocks) >= self.most:
            del self._blocks[0]
        # As torch's own collate function takes shared memory; a quarter more, since batches differ in size.
        storage = torch.UntypedStorage._new_shared(size + size // 4)  # type: ignore[no-untyped-call]
        block = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
        self._blocks.append(block)
        return self._blocks[-1]


def unpack(parcel: Parcel) -> Any:
    """The batch of a parcel, its tensors views of the parcel's block."""
    # `data`: views would count changes in place together, and autograd would take one's for the other's.
    return replaced(parcel.rest, Part, lambda part: part.of(parcel.block).data)


def replaced(batch: Any, kind: Any, change: Callable[[Any], Any]) -> Any:
    """A batch with every value of a type changed, in mappings, lists, tuples and what has a method `replaced`.

    Args:
        batch: what a collate function makes; anything else in it stays as it is.
        kind: the type, or a tuple of types.
        change: from such a value to what is to stand there.
    """
    if isinstance(batch, kind):
        return change(batch)
    if isinstance(batch, Mapping):
        changed = {name: replaced(value, kind, change) for name, value in batch.items()}
        if type(batch) is dict or not hasattr(batch, "update"):
            return changed
        same: Any = copy.copy(batch)  # of its own type, such as transformers' BatchEncoding
        same.update(changed)
        return same
    if type(batch) is list or type(batch) is tuple:
        return type(batch)(replaced(value, kind, change) for value in batch)
    if isinstance(batch, tuple) and type(batch).__bases__ == (tuple,) and hasattr(batch, "_make"):
        return batch._make(replaced(value, kind, change) for value in batch)
    return batch.replaced(kind, change) if hasattr(batch, "replaced") else batch
