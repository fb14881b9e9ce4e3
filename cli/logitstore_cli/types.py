"""Parameter types that several commands share."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, Final

import click

SIZE_NOTE: Final = "Sizes are written as 256MiB or 1GB, resolutions as 1/32."

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*((?:[kmgt]i?)?b?)", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class SizeType(click.ParamType[int]):
    """Bytes, such as `256MiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """From text."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no size; write bytes as 1000000, 256MiB or 1GB", param, ctx)
        unit = match[2].lower().removesuffix("b")
        factor = _BINARY[unit[0]] if unit.endswith("i") else _UNITS[unit]
        return int(float(match[1]) * factor)


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
