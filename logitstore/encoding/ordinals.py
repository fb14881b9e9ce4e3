"""Ordinals: floating-point numbers as unsigned integers in the same order (spec, "Ordinals").

Neighbouring numbers of a type have neighbouring ordinals, so the ordinals of sorted values differ by little.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Bits = TypeVar("Bits", np.uint16, np.uint32)


def bits_to_ordinals(bits: NDArray[Bits]) -> NDArray[Bits]:
    """IEEE bit patterns (uint16 or uint32) as ordinals of the same type; -0 becomes +0."""
    sign = bits.dtype.type(1 << (bits.dtype.itemsize * 8 - 1))
    bits = np.where(bits == sign, bits.dtype.type(0), bits)
    return np.where(bits & sign, ~bits, bits | sign)


def ordinals_to_bits(ordinals: NDArray[Bits]) -> NDArray[Bits]:
    """Inverse of `bits_to_ordinals`."""
    sign = ordinals.dtype.type(1 << (ordinals.dtype.itemsize * 8 - 1))
    return np.where(ordinals & sign, ordinals ^ sign, ~ordinals)


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The numbers that bfloat16 bit patterns stand for."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bit patterns of float32 numbers that bfloat16 can represent exactly (others are cut off towards zero)."""
    return (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def is_bfloat16(values: NDArray[np.float32]) -> bool:
    """Whether bfloat16 represents every one of these float32 numbers exactly."""
    return not bool((np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFF)).any())


def round_to_bfloat16(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest bfloat16 number to each float64 number of ordinary size, as float64; halves away from zero.

    bfloat16 keeps 7 of the 52 bits of the fraction; 45 are rounded off.
    """
    bits: NDArray[Any] = np.ascontiguousarray(values).view(np.uint64)
    rounded = (bits + np.uint64(1 << 44)) & np.uint64(0xFFFF_FFFF_FFFF_FFFF << 45 & 0xFFFF_FFFF_FFFF_FFFF)
    return rounded.view(np.float64)
