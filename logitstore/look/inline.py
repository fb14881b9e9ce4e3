"""Files of the pages, which hold them inline, and what a Content-Security-Policy calls them."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files


@cache
def asset(name: str) -> str:
    """The text of a file in `assets`."""
    return (files("logitstore.look") / "assets" / name).read_text(encoding="utf-8")


def style(name: str) -> str:
    """A style sheet behind the palette that the pages share."""
    return asset("palette.css") + asset(name)


def source(text: str) -> str:
    """What a policy allows instead of an address: the digest of an inline script or style sheet, quoted."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
