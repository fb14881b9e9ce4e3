"""The encodings of values (spec, "Values"): `grid`, `bfloat16`, `float16`, `float32` and `draws`.

Each is written and read here, side by side. The encoding is chosen for each sequence.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import anchor, decode, ragged
from logitstore.encoding.ordinals import (
    bfloat16_to_float32,
    bits_to_ordinals,
    float32_to_bfloat16,
    is_bfloat16,
    round_to_bfloat16,
)
from logitstore.errors import CorruptDataError, InvalidInputError
from logitstore.limits import GRID_STEPS

ValuesOption = Literal["auto", "grid", "bfloat16", "float16", "float32"]
"""What a writer can be asked for; `auto` is bfloat16 where that is exact, else the grid."""

VALUES_OPTIONS: Final[tuple[ValuesOption, ...]] = ("auto", "grid", "bfloat16", "float16", "float32")


class Encoding(enum.IntEnum):
    """How one sequence's values are encoded; the number stands in the column `encoding`."""

    GRID = 0
    GRID_WIDE = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    FLOAT32 = 4
    DRAWS = 5

    @property
    def label(self) -> str:
        """The name that people see: wide gaps are a detail of the grid."""
        return "grid" if self is Encoding.GRID_WIDE else self.name.lower()


_U16: Final = np.dtype(np.uint16)
_U32: Final = np.dtype(np.uint32)
_F32: Final = np.dtype(np.float32)

CELL_TYPES: Final[dict[Encoding, tuple[np.dtype[Any], np.dtype[Any]]]] = {
    Encoding.GRID: (_F32, _U16),
    Encoding.GRID_WIDE: (_F32, _U32),
    Encoding.BFLOAT16: (_U16, _U16),
    Encoding.FLOAT16: (_U16, _U16),
    Encoding.FLOAT32: (_U32, _U32),
    Encoding.DRAWS: (_U32, _U32),
}
"""The types of the cells `top` and `gaps` under each encoding."""


@dataclass(frozen=True, slots=True)
class Values:
    """The values of one sequence, ready to become cells.

    Attributes:
        encoding: how they are encoded.
        top: [P] one for each position with candidates.
        gaps: [N - P].
        logsumexp: float32 [T] that the encoding needs (bfloat16), NaN where there are no candidates; else None.
    """

    encoding: Encoding
    top: NDArray[Any]
    gaps: NDArray[Any]
    logsumexp: NDArray[np.float32] | None = None


def encode_values(
    logprobs: NDArray[np.float32],
    count: NDArray[Any],
    values: ValuesOption,
    resolution: float,
    *,
    logsumexp: NDArray[np.float32] | None = None,
    logits: NDArray[np.float32] | None = None,
) -> Values:
    """Choose an encoding and apply it.

    Args:
        logprobs: float32 [N], finite, non-increasing at each position.
        count: candidates of each position [T].
        values: the encoding asked for.
        resolution: nats a step of the grid, a power of two.
        logsumexp: float32 [T] of the logits behind the logprobs, where known.
        logits: float32 [N] those logits themselves, where known.

    Raises:
        InvalidInputError: the encoding asked for cannot hold these values.
    """
    if len(logprobs) == 0:
        return Values(Encoding.GRID, np.empty(0, np.float32), np.empty(0, np.uint16))
    if values in ("auto", "bfloat16"):
        found = _bfloat16_logits(logprobs, count, logsumexp, logits, search=values == "bfloat16")
        if found is not None:
            return _encode_bfloat16(*found, count)
        if values == "bfloat16":
            raise InvalidInputError(
                "these values are not those of bfloat16 logits: no bfloat16 best logit fits every candidate of every "
                "position; use values='auto', 'grid' or 'float32'"
            )
    if values == "float16":
        return _encode_float16(logprobs, count)
    if values == "float32":
        return _encode_float32(logprobs, count)
    steps = _steps(logprobs, count, resolution)
    highest = float(ragged.lasts(steps, count).max())
    if highest >= GRID_STEPS:
        if values == "auto":
            return _encode_float32(logprobs, count)
        raise InvalidInputError(
            f"a candidate is {highest * resolution:.6g} nats below the best one, more than {GRID_STEPS} steps of "
            f"{resolution:g}; use values='float32' or 'auto', a coarser resolution, or leave such candidates out"
        )
    gaps = ragged.differences(steps.astype(np.int32), count)
    wide = len(gaps) > 0 and int(gaps.max()) > 0xFFFF
    return Values(
        Encoding.GRID_WIDE if wide else Encoding.GRID,
        ragged.heads(logprobs, count),
        gaps.astype(np.uint32 if wide else np.uint16),
    )


def decode_values(
    encoding: Encoding,
    top: NDArray[Any],
    gaps: NDArray[Any],
    count: NDArray[Any],
    resolution: float,
    logsumexp: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Logprobs, float32 [N], of any encoding but `draws`; the inverse of `encode_values`.

    Raises:
        CorruptDataError: a bfloat16 sequence without the logsumexp it needs.
    """
    counts = ragged.present(count)
    if encoding in (Encoding.GRID, Encoding.GRID_WIDE):
        return decode.decode_grid(top, gaps, counts, resolution)
    bits = decode.decode_ordinals(top, gaps, counts)
    if encoding is Encoding.FLOAT32:
        return bits.view(np.float32)
    if encoding is Encoding.FLOAT16:
        return bits.view(np.float16).astype(np.float32)
    if len(counts) == 0:
        return np.empty(0, np.float32)
    if logsumexp is None or not bool(np.isfinite(logsumexp[count > 0]).all()):
        raise CorruptDataError("bfloat16 logits without their logsumexp", code="cell")
    return decode.logits_to_logprobs(bits, logsumexp[count > 0], counts)


def decode_logits(top: NDArray[np.uint16], gaps: NDArray[np.uint16], count: NDArray[Any]) -> NDArray[np.float32]:
    """The logits, float32 [N], of a bfloat16 sequence."""
    return bfloat16_to_float32(decode.decode_ordinals(top, gaps, ragged.present(count)))


def encode_draws(
    codes: NDArray[np.uint32], draws: NDArray[Any], count: NDArray[Any]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]:
    """Candidates ascending by code, as differences, and their draws.

    Args:
        codes: uint32 [N].
        draws: how often each was drawn [N], at least 1.
        count: candidates of each position [T].

    Returns:
        (ids uint32 [N]: the first code of each position, then differences; top uint32 [P]: draws of each position in
        all; gaps uint32 [N - P]: draws of each candidate but the first, which has the rest).
    """
    by_code = np.lexsort((codes, ragged.rows(count)))
    codes, draws = codes[by_code], draws[by_code]
    rest = ~ragged.firsts(count)
    steps = codes.copy()
    steps[rest] = ragged.differences(codes, count)
    total = ragged.row_sums(draws, count)[count > 0]
    return steps, total.astype(np.uint32), draws[rest].astype(np.uint32)


def decode_draw_codes(steps: NDArray[np.uint32], count: NDArray[Any]) -> NDArray[np.uint32]:
    """Codes, uint32 [N], ascending at each position.

    Raises:
        CorruptDataError: they leave 32 bits.
    """
    if len(steps) and float(ragged.row_sums(steps, count).max()) >= 2**32:
        raise CorruptDataError("the differences of a position's codes sum to 2^32 or more", code="id-range")
    first = ragged.firsts(count)
    present = count[count > 0]
    return ragged.spread(steps[first], present) + ragged.running_sums(steps[~first], present)


def decode_draws(top: NDArray[np.uint32], gaps: NDArray[np.uint32], count: NDArray[Any]) -> NDArray[np.int64]:
    """Draws, int64 [N], in the order of the codes.

    Raises:
        CorruptDataError: a candidate without draws, or 2^31 draws or more at a position.
    """
    draws = np.zeros(len(top) + len(gaps), np.int64)
    first = ragged.firsts(count)
    draws[~first] = gaps
    draws[first] = top - ragged.row_sums(draws, count)[count > 0].astype(np.int64)
    if len(draws) and (int(draws.min()) < 1 or int(top.max()) >= 2**31):
        raise CorruptDataError("a candidate that was drawn 0 times, or a position with 2^31 draws", code="cell")
    return draws


def by_draws(ids: NDArray[Any], draws: NDArray[Any], count: NDArray[Any]) -> NDArray[np.int64]:
    """The permutation that puts each position's candidates in order: most draws first, ties by id."""
    return np.lexsort((ids, -draws.astype(np.int64), ragged.rows(count)))


def _steps(logprobs: NDArray[np.float32], count: NDArray[Any], resolution: float) -> NDArray[np.float64]:
    """How far each candidate is below the best of its position, in whole steps, as float64."""
    steps = logprobs.astype(np.float64)
    if k := ragged.uniform(count):
        matrix = steps.reshape(-1, k)
        np.subtract(matrix[:, :1].copy(), matrix, out=matrix)
    else:
        steps = ragged.spread(ragged.heads(steps, count), count[count > 0]) - steps
    steps *= 1 / resolution  # exact: a power of two
    return np.rint(steps, out=steps)


def _bfloat16_logits(
    logprobs: NDArray[np.float32],
    count: NDArray[Any],
    logsumexp: NDArray[np.float32] | None,
    logits: NDArray[np.float32] | None,
    *,
    search: bool,
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """(logits float32 [N], logsumexp float32 [T]) when the logits are bfloat16, else None."""
    if logits is not None:
        return (logits, logsumexp) if logsumexp is not None and is_bfloat16(logits) else None
    if logsumexp is not None:
        # A logsumexp that was given is kept as it is, so another one cannot be searched for.
        return _logits_by_logsumexp(logprobs, count, logsumexp)
    if search or anchor.is_likely(logprobs, count[count > 0]):
        return _logits_by_anchors(logprobs, count)
    return None


def _logits_by_logsumexp(
    logprobs: NDArray[np.float32], count: NDArray[Any], logsumexp: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    shift = ragged.spread(logsumexp, count)
    if not bool(np.isfinite(shift).all()):
        return None
    slack = 2 * np.spacing(np.maximum(np.abs(logprobs), np.abs(shift))).astype(np.float64)
    exact = logprobs.astype(np.float64) + shift
    logits = _snap_to_bfloat16(exact, slack)
    if bool((np.abs(logits - exact) > slack).any()):
        return None
    return logits.astype(np.float32), logsumexp


def _logits_by_anchors(
    logprobs: NDArray[np.float32], count: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    present = count > 0
    anchors = anchor.find_anchors(logprobs, count[present])
    if bool(np.isnan(anchors).any()):
        return None
    exact = logprobs.astype(np.float64)
    best = ragged.heads(exact, count)
    logsumexp = np.full(len(count), np.nan, np.float32)
    logsumexp[present] = anchors - best
    exact += ragged.spread(anchors - best, count[present])
    return _snap_to_bfloat16(exact, anchor.slack(logprobs)).astype(np.float32), logsumexp


def _snap_to_bfloat16(exact: NDArray[np.float64], slack: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest bfloat16 numbers; zero where it is within reach, since bfloat16 is finer there than float32 tells."""
    return np.where(np.abs(exact) <= slack, 0.0, round_to_bfloat16(exact))


def _encode_bfloat16(logits: NDArray[np.float32], logsumexp: NDArray[np.float32], count: NDArray[Any]) -> Values:
    ordinals = bits_to_ordinals(float32_to_bfloat16(logits))
    return _encode_ordinals(Encoding.BFLOAT16, ordinals, count, logsumexp)


def _encode_float16(logprobs: NDArray[np.float32], count: NDArray[Any]) -> Values:
    with np.errstate(over="ignore"):
        halves = logprobs.astype(np.float16)
    if not bool(np.isfinite(halves).all()):
        raise InvalidInputError("a logprob is below -65504, the lowest of float16; use values='float32' or 'auto'")
    return _encode_ordinals(Encoding.FLOAT16, bits_to_ordinals(halves.view(np.uint16)), count)


def _encode_float32(logprobs: NDArray[np.float32], count: NDArray[Any]) -> Values:
    return _encode_ordinals(Encoding.FLOAT32, bits_to_ordinals(logprobs.view(np.uint32)), count)


def _encode_ordinals(
    encoding: Encoding,
    ordinals: NDArray[Any],
    count: NDArray[Any],
    logsumexp: NDArray[np.float32] | None = None,
) -> Values:
    # Ordinals fall from candidate to candidate; the unsigned difference the other way round is the gap.
    gaps = ragged.differences(np.invert(ordinals), count)
    return Values(encoding, ragged.heads(ordinals, count), gaps, logsumexp)
