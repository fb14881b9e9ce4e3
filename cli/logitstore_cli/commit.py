"""`logitstore commit`."""

from __future__ import annotations

import click

from logitstore.dataset.commit import commit
from logitstore_cli.output import note, result, result_json, size


@click.command("commit")
@click.argument("directory", type=click.Path())
@click.option("--overwrite", is_flag=True, help="Replace the dataset that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was committed as JSON.")
def command(directory: str, overwrite: bool, as_json: bool) -> None:
    """Join the finished parts in DIRECTORY (convert --part, Writer(part=...)) into one dataset.

    Parts that are missing or were stopped are named, and nothing is committed. Committing again does nothing.

    Example: logitstore commit my-dataset
    """
    committed = commit(directory, overwrite=overwrite)
    for text in committed.notes:
        note(f"Note: {text}")
    totals = committed.manifest.totals
    if as_json:
        result_json({"unchanged": committed.unchanged, "notes": committed.notes, "totals": totals})
        return
    was = "was committed before; " if committed.unchanged else ""
    shards = f"{totals.shards:,} shard{'s' * (totals.shards != 1)}"
    held = f"{totals.sequences:,} sequences, {totals.positions:,} positions in {shards}"
    result(f"{directory}: {was}{held}, {size(totals.bytes)}")
