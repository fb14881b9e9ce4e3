"""`logitstore show`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
from rich.console import Console

import logitstore
from logitstore.dataset.reader import Dataset
from logitstore.look.show import Shown, show
from logitstore.look.words import to_be_read
from logitstore_cli.output import result, result_json
from logitstore_cli.show_render import RAMP, RAMP_16, Look, lines


@click.command("show")
@click.argument("dataset", type=click.Path())
@click.option("--row", type=int, help="The sequence of this row; negative ones count from the end.  [default: 0]")
@click.option("--id", "sequence_id", help="The sequence with this id.")
@click.option("--at", type=int, multiple=True, help="A position; negative ones count from the end. May be repeated.")
@click.option(
    "--find",
    metavar="TEXT",
    help="The positions at which this text ends: what comes after it? Case and kinds of white space do not matter.",
)
@click.option(
    "-k", "--candidates", type=click.IntRange(min=1), default=10, show_default=True, help="Candidates of each position."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    dataset: str,
    row: int | None,
    sequence_id: str | None,
    at: tuple[int, ...],
    find: str | None,
    candidates: int,
    as_json: bool,
) -> None:
    """Show a sequence: its text shaded by what the teacher was unsure of, and what it expected at some positions.

    Everything about position t belongs to token t: its candidates are for the token after it. Without --at and --find
    the three most uncertain positions are shown.

    Example: logitstore show my-dataset --find "favorite color is"
    """
    if row is not None and sequence_id is not None:
        raise click.UsageError("--row and --id both name a sequence; give one of them")
    if find == "":
        raise click.UsageError("--find needs a text")
    opened = logitstore.open(dataset)
    shown = chosen(opened, row=row, sequence_id=sequence_id, at=at, find=find, candidates=candidates)
    if as_json:
        result_json(as_data(shown))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    look = look_of(console, identified=opened.info.tokenizer is not None)
    for line in lines(shown, look):
        if look.blocks:
            console.print(line)
        else:
            result(line.plain)


def chosen(dataset: Dataset, *, row: int | None = None, sequence_id: str | None = None, **options: Any) -> Shown:
    """What there is to see of a sequence of a dataset.

    Args:
        dataset: any.
        row: of the sequence, 0 if not given.
        sequence_id: instead of it.
        options: as for `show`.

    Raises:
        LogitStoreError: there is no such sequence, position or text.
    """
    view = to_be_read(dataset)
    row = row or 0 if sequence_id is None else view.row_of(sequence_id)
    sequence = view[row]
    return show(sequence, dataset.tokenizer(), row=row % len(view), **options)


def look_of(console: Console, *, identified: bool = True) -> Look:
    """How to draw on this console: plainly, unless it is a terminal that can show more."""
    fancy = console.is_terminal and not console.options.ascii_only
    if not fancy:
        return Look(identified=identified)
    ramps = {"truecolor": RAMP, "256": RAMP, "standard": RAMP_16, "windows": RAMP_16}
    ramp = () if console.no_color else ramps.get(console.color_system or "", ())
    return Look(console.width, blocks=True, ramp=ramp, identified=identified)


def as_data(shown: Shown) -> dict[str, Any]:
    """What is shown, for JSON."""
    return dataclasses.asdict(shown)
