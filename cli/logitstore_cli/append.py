"""`logitstore append`."""

from __future__ import annotations

import click

from logitstore.dataset.join import append
from logitstore_cli.restructure import joined, reporting


@click.command("append")
@click.argument("dataset", type=click.Path())
@click.argument("others", nargs=-1, required=True, type=click.Path(), metavar="OTHER...")
@click.option("--json", "as_json", is_flag=True, help="Print what DATASET holds then as JSON.")
def command(dataset: str, others: tuple[str, ...], as_json: bool) -> None:
    """Add the sequences of each OTHER to DATASET, in place: of its shards as they are, linked or copied.

    Readers see DATASET as it was, until all is there. Shards that it has already are not added again, so that this is
    repeated when it was stopped. What cannot be one dataset is refused, as by merge.

    Example: logitstore append my-dataset new-captures
    """
    with reporting("appending", "bytes") as progress:
        done = append(dataset, others, progress=progress)
    joined(dataset, done, as_json=as_json)
