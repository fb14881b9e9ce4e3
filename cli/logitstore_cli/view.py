"""`logitstore view`."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any, Final

import click

import logitstore
from logitstore.io.files import write_atomic
from logitstore.look.page import CANDIDATES, POSITIONS, collect, page_html
from logitstore.look.serve import serve
from logitstore.look.words import name_of
from logitstore_cli.output import check_target, note, result, size


class RowsType(click.ParamType[tuple[range, ...]]):
    """Row numbers and spans of them, both ends included, such as `3,7,10-12`."""

    name = "rows"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[range, ...]:
        """From text."""
        if isinstance(value, tuple):
            return value
        spans = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*([0-9]{1,15})\s*(?:-\s*([0-9]{1,15})\s*)?", part)
            if match is None or (match[2] and int(match[2]) < int(match[1])):
                self.fail(f"{value!r} are no rows; write numbers and spans of them, such as 3,7,10-12", param, ctx)
            spans.append(range(int(match[1]), int(match[2] or match[1]) + 1))
        return tuple(spans)


ROWS: Final = RowsType()


@click.command("view")
@click.argument("dataset", type=click.Path())
@click.option("--rows", type=ROWS, help="Sequences on the page, such as 0-4 or 3,7,10-12; the first five otherwise.")
@click.option("--id", "ids", multiple=True, help="A sequence by its id; may be given again.")
@click.option("--with", "other", type=click.Path(), help="Another dataset over the same sequences, side by side.")
@click.option("-o", "--output", help="The page's file; - is standard output. By default the dataset's name with .html.")
@click.option("--serve", "port", type=click.IntRange(0, 65535), help="Serve all sequences on this port of 127.0.0.1.")
@click.option(
    "-k",
    "--candidates",
    type=click.IntRange(1, 1000),
    default=CANDIDATES,
    show_default=True,
    help="Candidates of each position.",
)
@click.option(
    "--positions",
    type=click.IntRange(min=1),
    default=POSITIONS,
    show_default=True,
    help="Most positions on the page.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def command(
    dataset: str,
    rows: tuple[range, ...] | None,
    ids: tuple[str, ...],
    other: str | None,
    output: str | None,
    port: int | None,
    candidates: int,
    positions: int,
    overwrite: bool,
) -> None:
    """Make a page of what the teacher expects after each token: one HTML file that needs nothing else.

    With --serve, page through the whole dataset instead, until Ctrl-C; 0 is any free port.

    Example: logitstore view my-dataset --rows 0-9 -o page.html
    """
    if port is not None and (output is not None or rows is not None or ids or overwrite):
        raise click.UsageError(
            "--serve shows every sequence and writes no file; leave out --rows, --id, -o and --overwrite"
        )
    opened = logitstore.open(dataset)
    beside = None if other is None else logitstore.open(other)
    if port is not None:
        serve(opened, port, other=beside, candidates=candidates, positions=positions, ready=_ready)
        return
    target = Path(output if output is not None else f"{name_of(opened)}.html")
    to_stdout = output == "-"
    if not to_stdout:
        check_target(target, opened.path, overwrite=overwrite)
    chosen = collect(
        opened,
        rows=None if rows is None else itertools.chain.from_iterable(rows),
        ids=ids,
        other=beside,
        candidates=candidates,
        positions=positions,
    )
    for text in chosen.notes:
        note(f"Note: {text}; --positions allows more, and --serve shows every sequence")
    page = page_html(chosen.data).encode()
    if to_stdout:
        click.echo(page, nl=False)
        return
    check_target(target, opened.path, overwrite=overwrite)  # once more: decoding takes a while
    write_atomic(target, page)
    count = len(chosen.data["sequences"])
    result(f"{target}: {count} sequence{'s' if count != 1 else ''}, {size(len(page))}")


def _ready(url: str) -> None:
    result(url)
    sys.stdout.flush()  # whoever started this through a pipe waits for it
    note("Ctrl-C ends it.")
