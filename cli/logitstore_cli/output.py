"""The one sink of output: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TextIO

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from logitstore.errors import DatasetExistsError, InvalidInputError, LogitStoreWarning
from logitstore.text import escaped, label, visible
from logitstore.tokenizer import Tokenizer

_OBEYED: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200f\u2028-\u202e\u2066-\u2069]")
"""What terminals obey in a text of lines and tabs; the left-to-right mark stays, which only keeps order."""


def result(text: str = "") -> None:
    """A line of the result."""
    click.echo(_printable(text, sys.stdout))


def result_json(value: Any, *, indent: int = 2) -> None:
    """The result as JSON."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=indent).decode()
    click.echo(harmless(text))


def harmless(text: str) -> str:
    """The same JSON, with what a terminal would obey escaped, and what the stream's encoding cannot hold."""
    text = _OBEYED.sub(_as_json, text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return re.sub("[^\x00-\x7f]", _as_json, text)
    return text


def _as_json(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1]


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


def reporter(bar: Progress, doing: str, unit: str) -> Callable[[int, int], None]:
    """Moves a bar by (done, total); says how many a second."""
    task = bar.add_task(doing, total=None, rate="")
    start = time.monotonic()

    def report(done: int, total: int) -> None:
        rate = f"{done / max(time.monotonic() - start, 1e-9):,.0f} {unit}/s"
        bar.update(task, completed=done, total=total or None, rate=rate)

    return report


def check_target(target: Path, dataset: Path | str, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written, that nobody asked to replace, or that is a part of a dataset.

    Args:
        target: the file.
        dataset: the directory that was read; a URL is no place for it.
        overwrite: whether a file that is there may be replaced.

    Raises:
        InvalidInputError: it is a directory, a device, in the dataset, or in no directory.
        DatasetExistsError: something is there.
    """
    if target.is_dir():
        raise InvalidInputError(f"{target} is a directory; give the name of a file")
    if not target.parent.is_dir():
        raise InvalidInputError(f"{target.parent} is no directory; make it first")
    if isinstance(dataset, Path) and target.resolve().is_relative_to(dataset.resolve()):
        raise InvalidInputError(
            f"{target} is in the dataset {dataset}, which holds its own files alone; choose another"
        )
    if target.exists() and not target.is_file():
        raise InvalidInputError(f"{target} is no file; give the name of one")
    if not overwrite and (target.exists() or target.is_symlink()):
        raise DatasetExistsError(f"{target} is there already; choose another name, or replace it (--overwrite)")


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
    return f"'{visible(text)}'"


def named(tokenizer: Tokenizer | None, token: int) -> str:
    """A token by itself: its text in quotes; its id where there is no tokenizer."""
    text = label(tokenizer, token)
    return text if tokenizer is None else f"'{text}'"


def _printable(text: str, stream: TextIO) -> str:
    """The text with what a terminal would obey escaped, and what the stream's encoding cannot hold replaced.

    Names of files and columns are strangers' too; and a pipe on Windows must not end a command.
    """
    text = _OBEYED.sub(lambda found: escaped(found[0]), text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
