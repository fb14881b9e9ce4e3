"""Finds the function that answers a path."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote

from hub.answers import Answer, Call

if TYPE_CHECKING:
    from hub.server import Hub

Handler = Callable[..., Answer]

DATASET = r"/api/datasets/(?P<repo>[^/]+/[^/]+)"


class Routes:
    """Functions by method and pattern of the path. Its groups are handed over unquoted."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, re.Pattern[str], Handler]] = []

    def __call__(self, method: str, pattern: str) -> Callable[[Handler], Handler]:
        def add(handler: Handler) -> Handler:
            self._routes.append((method, re.compile(pattern), handler))
            return handler

        return add

    def find(self, hub: Hub, call: Call) -> Answer | None:
        # A HEAD is a GET whose body is not sent.
        method = "GET" if call.method == "HEAD" else call.method
        for wanted, pattern, handler in self._routes:
            if wanted == method and (match := pattern.fullmatch(call.path)):
                groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                return handler(hub, call, **groups)
        return None
