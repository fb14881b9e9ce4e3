"""`logitstore merge`."""

from __future__ import annotations

import click

from logitstore.dataset.join import merge
from logitstore_cli.restructure import joined, reporting


@click.command("merge")
@click.argument("datasets", nargs=-1, required=True, type=click.Path(), metavar="DATASET...")
@click.argument("output", type=click.Path())
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there, when the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def command(datasets: tuple[str, ...], output: str, overwrite: bool, as_json: bool) -> None:
    """Make one dataset of several at OUTPUT: of their shards as they are, hard links or verified copies.

    Splits of one name are joined. Datasets of different tokenizers, teachers, widths, temperatures, resolutions or
    columns are refused, and so are two sequences of one id.

    Example: logitstore merge first second both
    """
    with reporting("merging", "bytes") as progress:
        done = merge(datasets, output, overwrite=overwrite, progress=progress)
    joined(output, done, as_json=as_json)
