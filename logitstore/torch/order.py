"""The order of samples: a pure function of the dataset's digest, the seed, the epoch and the place.

Nothing of the length of the dataset is held or computed: where a sample stands comes from keyed permutations that are
evaluated one value at a time. The order is part of what a checkpoint means, so it never changes: its first values
are fixed by tests.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

import xxhash

from logitstore.errors import InvalidInputError, InvalidTypeError

Shuffle = Literal["blocks", "full", "none"]

VERSION: Final = 1
"""Of the order; it stands in every key."""

_MASK: Final = 2**64 - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_ROUNDS: Final = 8


def mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit of 64 depends on every other."""
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


def order_key(digest: str, seed: int, epoch: int, purpose: str) -> int:
    """The 64-bit key of one permutation: xxh3-64 of a line of text."""
    return xxhash.xxh3_64_intdigest(f"logitstore order {VERSION}:{digest}:{seed}:{epoch}:{purpose}".encode())


class Permutation:
    """A keyed permutation of [0, size), evaluated one value at a time.

    A balanced Feistel network of 8 rounds over the next even power of two; a value that leaves the range is put in
    again until it is inside ("cycle walking", Black and Rogaway 2002), on average at most four times.

    Args:
        size: number of values, at least 1.
        key: 64 bits.
    """

    __slots__ = ("_half", "_keys", "_mask", "size")

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = tuple(mix((key + number * _GOLDEN) & _MASK) for number in range(1, _ROUNDS + 1))

    def __call__(self, value: int) -> int:
        """Where a value of [0, size) goes.

        Raises:
            InvalidInputError: it is outside.
        """
        self._check(value)
        half, mask = self._half, self._mask
        while True:
            left, right = value >> half, value & mask
            for key in self._keys:
                left, right = right, left ^ (mix(right ^ key) & mask)
            value = left << half | right
            if value < self.size:
                return value

    def _check(self, value: int) -> None:
        if not 0 <= value < self.size:  # walking from there might never come back
            raise InvalidInputError(f"{value} is not in the range of a permutation of [0, {self.size})")

    def inverse(self, value: int) -> int:
        """Where a value of [0, size) comes from.

        Raises:
            InvalidInputError: it is outside.
        """
        self._check(value)
        half, mask = self._half, self._mask
        while True:
            left, right = value >> half, value & mask
            for key in reversed(self._keys):
                left, right = right ^ (mix(left ^ key) & mask), left
            value = left << half | right
            if value < self.size:
                return value


@dataclass(frozen=True)
class Order:
    """The order of the samples of a dataset in every epoch.

    Attributes:
        size: number of samples.
        digest: identity of the dataset.
        seed: another seed gives another order.
        shuffle: `blocks` permutes blocks of consecutive rows, and then the samples within each window of permuted
            blocks: near random, and few places of the dataset are read at a time. `full` permutes all samples.
            `none` leaves them as they stand.
        block: rows of a block.
        window: blocks of a window.

    Raises:
        InvalidInputError: there are no samples, or a number is not positive.
        InvalidTypeError: `shuffle` is none of the three.
    """

    size: int
    digest: str
    seed: int
    shuffle: Shuffle = "blocks"
    block: int = field(default=256, kw_only=True)
    window: int = field(default=16, kw_only=True)

    def __post_init__(self) -> None:
        if self.shuffle not in get_args(Shuffle):
            raise InvalidTypeError(f"shuffle={self.shuffle!r}; give one of {', '.join(map(repr, get_args(Shuffle)))}")
        if self.size < 1:
            raise InvalidInputError("there are no samples to be put in order; give a dataset that is not empty")
        if self.block < 1 or self.window < 1:
            raise InvalidInputError(f"blocks of {self.block} and windows of {self.window}; give numbers from 1 on")

    def row(self, epoch: int, place: int) -> int:
        """The row of the sample at a place of an epoch.

        Args:
            epoch: from 0.
            place: from 0 to size - 1.

        Raises:
            InvalidInputError: there is no such epoch or place.
        """
        if epoch < 0 or not 0 <= place < self.size:
            raise InvalidInputError(f"epoch {epoch}, place {place} of an order of {self.size} samples")
        if self.shuffle == "none":
            return place
        if self.shuffle == "full":
            return permutation(self.size, self.digest, self.seed, epoch, "all")(place)
        return self._blocks_row(epoch, place)

    def _blocks_row(self, epoch: int, place: int) -> int:
        blocks = -(-self.size // self.block)
        of_blocks = permutation(blocks, self.digest, self.seed, epoch, "blocks")
        partial = _inverse(of_blocks, blocks - 1)  # where the last block went, the only one that may be short
        missing = blocks * self.block - self.size
        length, short = self.block * self.window, partial // self.window
        window, start = _span_of(place, length, short, missing)
        end = min(start + length - (missing if window == short else 0), self.size)
        inner = permutation(end - start, self.digest, self.seed, epoch, f"window {window}")
        place = start + inner(place - start)
        block, start = _span_of(place, self.block, partial, missing)
        return of_blocks(block) * self.block + place - start


def _span_of(place: int, length: int, short: int, missing: int) -> tuple[int, int]:
    """The span that holds a place, and its start: all spans are of one length, but one lacks some places."""
    if place >= (short + 1) * length - missing:
        place += missing
        return place // length, place // length * length - missing
    return place // length, place // length * length


@functools.lru_cache(maxsize=256)
def permutation(size: int, digest: str, seed: int, epoch: int, purpose: str) -> Permutation:
    """The permutation of [0, size) that `order_key` keys; the last ones are remembered."""
    return Permutation(size, order_key(digest, seed, epoch, purpose))


@functools.lru_cache(maxsize=256)
def _inverse(of: Permutation, value: int) -> int:
    return of.inverse(value)
