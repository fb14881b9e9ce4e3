"""`logitstore repack`."""

from __future__ import annotations

import click

from logitstore.dataset.repack import repack
from logitstore_cli.restructure import made, reporting
from logitstore_cli.types import RESOLUTION, SIZE


@click.command("repack")
@click.argument("dataset", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--shard-size", type=SIZE, help="A shard closes at this size.  [default: 256MiB]")
@click.option("--resolution", type=RESOLUTION, help="A coarser grid, nats a step.  [default: as it is]")
@click.option("--top-k", type=click.IntRange(min=1), help="Most candidates kept of a position.  [default: all]")
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there, when the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def command(
    dataset: str,
    output: str,
    shard_size: int | None,
    resolution: float | None,
    top_k: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write DATASET anew at OUTPUT: in shards of another size, on a coarser grid, with fewer candidates.

    What is not to be changed stays exactly as it is stored, and so does the encoding of each sequence. --resolution
    rounds those on the grid alone, a second time: the errors of both roundings add up. A finer grid than that of
    DATASET would bring nothing back, and is refused. What --top-k drops goes into the tail; where the token that
    follows is dropped, its logprob and rank are kept.

    Example: logitstore repack my-dataset smaller --top-k 32 --resolution 1/16 --shard-size 1GiB
    """
    with reporting("repacking", "positions") as progress:
        manifest = repack(
            dataset,
            output,
            shard_bytes=shard_size,
            resolution=resolution,
            top_k=top_k,
            overwrite=overwrite,
            progress=progress,
        )
    made(output, manifest, as_json=as_json)
