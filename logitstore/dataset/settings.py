"""The settings of a writer, checked once."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final, get_args

from logitstore.dataset.input import Cut
from logitstore.encoding.cells import PCO_VERSION
from logitstore.encoding.values import VALUES_OPTIONS, ValuesOption
from logitstore.errors import InvalidInputError
from logitstore.limits import ID_LIMIT, SEQUENCE_CANDIDATES
from logitstore.schema import FORMAT_VERSION, Sampling, ShardHeader, serialise_header
from logitstore.schema.header import Normalised, is_power_of_two

_SPLIT: Final = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a writer does with every sequence; the arguments of `Writer`."""

    split: str
    values: ValuesOption
    resolution: float
    temperature: float
    normalised: Normalised
    logit_width: int | None
    chunk_candidates: int
    shard_bytes: int
    cut: Cut

    @classmethod
    def check(cls, **settings: Any) -> Settings:
        """From the arguments of a writer.

        Raises:
            InvalidInputError: naming the setting and what it can be.
        """
        made = cls(**settings)
        if not (_SPLIT.fullmatch(made.split) and len(made.split) <= 64):
            raise InvalidInputError(f"split is {made.split!r}; letters, digits, underscores and inner dots are allowed")
        if made.values not in VALUES_OPTIONS:
            raise InvalidInputError(f"values is {made.values!r}; it is one of {', '.join(VALUES_OPTIONS)}")
        if not (2**-20 <= made.resolution <= 1 and is_power_of_two(made.resolution)):
            raise InvalidInputError(
                f"resolution is {made.resolution!r}; it is a power of two from 1/1048576 to 1, such as 1/32"
            )
        if not 0 < made.temperature <= 1e6:
            raise InvalidInputError(f"temperature is {made.temperature!r}; it is above 0")
        if made.normalised not in get_args(Normalised):
            raise InvalidInputError(f"normalised is {made.normalised!r}; it is 'vocabulary' or 'candidates'")
        if made.logit_width is not None and not 1 <= made.logit_width <= ID_LIMIT:
            raise InvalidInputError(f"logit_width is {made.logit_width}; it is from 1 to 2^31, or None")
        if not 1 <= made.chunk_candidates <= SEQUENCE_CANDIDATES:
            raise InvalidInputError(f"chunk_candidates is {made.chunk_candidates}; it is from 1 to 2^24")
        if made.shard_bytes < 1:
            raise InvalidInputError(f"shard_bytes is {made.shard_bytes}; it is at least 1")
        return made

    def with_logit_width(self, width: int, *, fixed: bool) -> Settings:
        """The same settings with the width that dense logits show.

        Args:
            width: of the logits.
            fixed: whether there are sequences already: all shards say one width.

        Raises:
            InvalidInputError: another width was said before.
        """
        if width in (self.logit_width, 0):
            return self
        if self.logit_width is not None:
            raise InvalidInputError(f"logits are {width} wide, but logit_width is {self.logit_width}")
        return self if fixed else replace(self, logit_width=width)

    def header(self) -> bytes:
        """The JSON of a shard written under these settings."""
        return serialise_header(
            ShardHeader(
                version=str(FORMAT_VERSION),
                pco=PCO_VERSION,
                logit_width=self.logit_width,
                normalised=self.normalised,
                temperature=self.temperature,
                resolution=self.resolution,
            )
        )

    def sampling(self) -> Sampling:
        """What the manifest says of them."""
        cut = self.cut
        return Sampling(
            values=self.values, resolution=self.resolution, top_k=cut.top_k, top_p=cut.top_p, min_k=cut.min_k
        )
