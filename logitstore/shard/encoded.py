"""A sequence whose candidates are still encoded: what a worker hands over when a device is to decode them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding.values import Encoding
from logitstore.errors import CorruptDataError, NotSelectedError
from logitstore.shard.sequence import Sequence

_DECODED: Final = ("ids", "logprobs", "logits")


@dataclass(frozen=True, eq=False, repr=False)
class EncodedSequence(Sequence):
    """A `Sequence` with codes and gaps in place of `ids`, `logprobs` and `logits`, which it refuses.

    T positions, P of them with candidates, N candidates in all. Whole numbers are signed, as devices want them; `top`
    and `gaps` are the bits of the unsigned numbers that the cells hold. Everything was checked: an id that comes of
    these codes is below the logit width. Sampled distributions are sorted on reading, and stand here as float32.

    Attributes:
        encoding: how `top` and `gaps` are encoded; never `draws`.
        resolution: nats a step of the grid.
        order: int32 [M'], the chunk's token order; its sequences share it.
        codes: int32 [N]; one that is not negative is an id, and -1, -2, ... count from the end of the order.
        top: float32 [P] under the grids, else the best candidate's ordinal: int16 or int32 [P].
        gaps: int16 or int32 [N - P], steps from each candidate to the next.
        shift: float32 [P], under bfloat16 the logsumexp that makes logits logprobs; else empty.
    """

    encoding: Encoding
    resolution: float
    order: NDArray[np.int32]
    codes: NDArray[np.int32]
    top: NDArray[Any]
    gaps: NDArray[Any]
    shift: NDArray[np.float32]

    def cut(self, positions: int) -> EncodedSequence:
        """Its first positions; the user's columns stay as they are.

        Args:
            positions: at most this many are left.
        """
        if positions >= len(self.count):
            return self
        total, present = int(self.offsets[positions]), int(np.count_nonzero(self.count[:positions]))
        ends = {"offsets": positions + 1, "order": len(self.order), "codes": total, "draws": total}
        ends |= {"top": present, "shift": present, "gaps": total - present}
        fields = {
            name: value[: ends.get(name, positions)] if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }
        return EncodedSequence.of(fields)

    def __getattr__(self, name: str) -> Any:
        if name in _DECODED:
            raise NotSelectedError(
                f"the column {name!r} of this sequence is still encoded: collate it with logitstore.torch.HFCollator, "
                f"or read it through Dataset.with_decoding('cpu')"
            )
        return super().__getattr__(name)


def signed(values: NDArray[Any]) -> NDArray[Any]:
    """Unsigned whole numbers as the signed ones of the same bits; anything else as it is."""
    if values.dtype.kind != "u":
        return values
    return np.asarray(values.view(np.int16 if values.itemsize == 2 else np.int32))


def relative_codes(codes: NDArray[np.uint32], places: int, limit: int) -> NDArray[np.int32]:
    """Codes counted from the end of the order: what is not negative is an id.

    Args:
        codes: uint32 [n]; changed in place.
        places: length of the order.
        limit: ids are below this, at most 2^31.

    Returns:
        int32 [n], from -places to limit - 1.

    Raises:
        CorruptDataError: a code is past the end of the table of ids.
    """
    highest = int(codes.max()) - places if len(codes) else 0
    if highest >= limit:
        raise CorruptDataError(f"the column ids holds the id {highest}, limit {limit}", code="id-range")
    codes -= np.uint32(places)
    return codes.view(np.int32)


def shifts(logsumexp: NDArray[np.float32] | None, count: NDArray[Any]) -> NDArray[np.float32]:
    """The logsumexp of the positions with candidates, float32 [P].

    Raises:
        CorruptDataError: it is missing or not finite where logits need it.
    """
    present = count > 0
    if not present.any():
        return np.empty(0, np.float32)
    if logsumexp is None or not bool(np.isfinite(logsumexp[present]).all()):
        raise CorruptDataError("bfloat16 logits without their logsumexp", code="cell")
    return logsumexp[present]
