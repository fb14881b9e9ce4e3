"""The one sink of output: results on standard output, everything else on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from logitstore.errors import LogitStoreWarning


def result(text: str = "") -> None:
    """A line of the result."""
    click.echo(_printable(text, sys.stdout))


def result_json(value: Any, *, indent: int = 2) -> None:
    """The result as JSON."""
    data = msgspec.json.encode(value)
    click.echo(msgspec.json.format(data, indent=indent).decode())


def note(text: str) -> None:
    """A line for people: progress, warnings, errors."""
    click.echo(_printable(text, sys.stderr), err=True)


def warn_on_stderr(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:  # fmt: skip
    """Shows a warning as one line; ours without the line of code that gave it."""
    if issubclass(category, LogitStoreWarning):
        note(f"Warning: {message}")
    else:
        note(f"Warning: {message} ({category.__name__}, {filename}:{lineno})")


def progress_bar() -> Progress:
    """A progress bar on standard error; silent when that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def quiet_client() -> None:
    """Leave progress and messages to our own: the Hub's client draws several bars, and warns of what is tried again."""
    from huggingface_hub.utils import disable_progress_bars  # noqa: PLC0415 - takes longer than most commands

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    return f"{n:,.1f} TiB"


def quoted(text: str) -> str:
    """Text of a token in quotes, so that every character shows: control characters are escaped."""
    return "'" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + "'"


def _printable(text: str, stream: TextIO) -> str:
    """The text with what the stream's encoding cannot hold replaced: a pipe on Windows must not end a command."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
