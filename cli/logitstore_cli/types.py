"""Parameter types that several commands share."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Final

import click

from logitstore.units import parse_size

SIZE_NOTE: Final = "Sizes are written as 256MiB or 1GB, resolutions as 1/32."


class SizeType(click.ParamType[int]):
    """Bytes, such as `256MiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """From text."""
        if isinstance(value, int):
            return value
        size = parse_size(str(value))
        if size is None:
            self.fail(f"{value!r} is no size; write bytes as 1000000, 256MiB or 1GB", param, ctx)
        return size


class ResolutionType(click.ParamType[float]):
    """A power of two, such as `1/32`."""

    name = "resolution"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """From text."""
        if isinstance(value, float):
            return value
        try:
            return float(Fraction(str(value)))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is no resolution; write a power of two such as 1/32", param, ctx)


class PairType(click.ParamType[tuple[str, str]]):
    """Two names, such as `tokens=input_ids`."""

    name = "ours=theirs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """From text."""
        if isinstance(value, tuple):
            return value
        ours, equals, theirs = str(value).partition("=")
        if not (ours and equals and theirs):
            self.fail(f"{value!r} is no pair; write our name and the input's as tokens=input_ids", param, ctx)
        return ours, theirs


PAIR: Final = PairType()
SIZE: Final = SizeType()
RESOLUTION: Final = ResolutionType()
