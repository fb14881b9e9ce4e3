"""Sizes as people write them."""

from __future__ import annotations

import re
from typing import Final

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*((?:[kmgt]i?)?b?)", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(text: str) -> int | None:
    """Bytes from `1000000`, `256MiB` or `1GB`; None from anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    unit = match[2].lower().removesuffix("b")
    return int(float(match[1]) * (_BINARY[unit[0]] if unit.endswith("i") else _UNITS[unit]))
