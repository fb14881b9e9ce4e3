"""What handlers receive and return."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from hub.blobs import Blob, Slice

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
EMPTY = Slice(Blob.of(b""), 0, 0)


@dataclass(frozen=True)
class Call:
    """A request with its body read."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: Blob
    sha256: str
    """Of the body."""

    @property
    def params(self) -> dict[str, list[str]]:
        return parse_qs(self.query, keep_blank_values=True)

    def param(self, name: str, default: str = "") -> str:
        return self.params.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        return self.param(name).lower() in {"1", "true"}

    def json(self) -> Any:
        try:
            return json.loads(self.body.read() or b"{}")
        except ValueError as error:
            raise Refusal(400, "the body is not JSON") from error


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Slice = EMPTY


class Refusal(Exception):  # noqa: N818 - an answer, not a failure of the server
    """An answer that says no."""

    def __init__(self, status: int, message: str, *, code: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.fields = fields
        self.headers: dict[str, str] = {}

    def answer(self) -> Answer:
        headers = {"X-Error-Message": self.message, **self.headers}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return as_json({"error": self.message, **self.fields}, status=self.status, headers=headers)


class StorageRefusal(Refusal):
    """The same from the storage, which speaks XML."""

    def answer(self) -> Answer:
        xml = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>"
        return as_bytes(xml.encode(), "application/xml", status=self.status, headers=self.headers)


def as_bytes(data: bytes, kind: str, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, {"Content-Type": kind, **(headers or {})}, Slice(Blob.of(data), 0, len(data)))


def as_json(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return as_bytes(json.dumps(value).encode(), "application/json; charset=utf-8", status=status, headers=headers)


def as_blob(blob: Blob, wanted: str | None, headers: Mapping[str, str]) -> Answer:
    """A blob or the range of it that was asked for. As with S3, what is not one range of bytes is ignored."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = _RANGE.fullmatch(wanted.strip()) if wanted else None
    if match is None or match.groups() == ("", ""):
        return Answer(200, headers, Slice(blob, 0, blob.size))
    first, last = match.groups()
    start = int(first) if first else max(0, blob.size - int(last))
    stop = min(blob.size, int(last) + 1) if first and last else blob.size
    if first and last and int(last) < int(first):
        return Answer(200, headers, Slice(blob, 0, blob.size))
    if start >= blob.size:
        return Answer(416, {**headers, "Content-Range": f"bytes */{blob.size}"})
    return Answer(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{blob.size}"}, Slice(blob, start, stop))
