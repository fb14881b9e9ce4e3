"""`logitstore export`."""

from __future__ import annotations

import time
from typing import Any

import click

import logitstore
from logitstore.convert import export, exporters
from logitstore_cli.output import note, progress_bar, result, result_json


@click.command("export")
@click.argument("dataset", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--to", required=True, metavar="NAME", help="Format of the output.")
@click.option("--split", help="Take one split.  [default: all]")
@click.option("--k", type=click.IntRange(min=1), help="Most candidates of a position.  [default: all]")
@click.option("--limit", type=click.IntRange(min=0), help="Most sequences that are taken.")
@click.option("--overwrite", is_flag=True, help="Replace what is there, when the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(
    dataset: str,
    output: str,
    to: str,
    split: str | None,
    k: int | None,
    limit: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write DATASET in the format of a trainer at OUTPUT, and say what that format does not hold.

    Example: logitstore export my-dataset train.parquet --to trl
    """
    opened = logitstore.open(dataset)
    opened = opened if split is None else opened.split(split)
    opened = opened[:limit]
    with progress_bar() as bar:
        exported = export(opened, output, to, k=k, overwrite=overwrite, progress=_reporter(bar, len(opened)))
    for text in exported.notes:
        note(f"Note: {text}")
    if as_json:
        result_json({"exporter": to, "sequences": exported.sequences, "notes": list(exported.notes)})
    else:
        result(f"{output}: {exported.sequences:,} sequences as {to}")


def _reporter(bar: Any, total: int) -> Any:
    """Moves the bar, at most ten times a second."""
    task = bar.add_task("exporting", total=total, rate="")
    last = [0.0]

    def report(sequences: int) -> None:
        if time.monotonic() - last[0] >= 0.1:
            last[0] = time.monotonic()
            bar.update(task, completed=sequences)

    return report


def _exporter_lines() -> str:
    lines = [f"  {name}: {one.description}. Loses {one.loses}." for name, one in exporters().items()]
    return "\n\n".join(["Formats:", *lines])


command.epilog = _exporter_lines()
