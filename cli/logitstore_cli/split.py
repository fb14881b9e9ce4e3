"""`logitstore split`."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Final

import click

from logitstore.dataset.divide import split
from logitstore_cli.restructure import made, reporting
from logitstore_cli.types import SIZE


class ShareType(click.ParamType[tuple[str, float]]):
    """A split and its share, such as `train=0.9`."""

    name = "split=share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """From text."""
        if isinstance(value, tuple):
            return value
        name, _, share = str(value).partition("=")
        try:
            return name, float(Fraction(share))
        except (ValueError, ZeroDivisionError, OverflowError):
            self.fail(f"{value!r} is no share; write a split and its share as train=0.9 or train=2/3", param, ctx)


_SHARE: Final = ShareType()


@click.command("split")
@click.argument("dataset", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--into", "shares", type=_SHARE, multiple=True, required=True, help="A split and its share: train=0.9.")
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Another one shares out otherwise.  [default: 0]"
)
@click.option("--shard-size", type=SIZE, help="A shard closes at this size.  [default: 256MiB]")
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there, when the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def command(
    dataset: str,
    output: str,
    shares: tuple[tuple[str, float], ...],
    seed: int,
    shard_size: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Share the sequences of DATASET out among splits, by a hash of their ids, into a new dataset at OUTPUT.

    Where a sequence goes depends on its id and the seed alone. Shares sum to 1. Values are written as they are stored.

    Example: logitstore split my-dataset parted --into train=0.9 --into validation=0.1
    """
    if len(dict(shares)) < len(shares):
        raise click.UsageError("--into names a split twice")
    with reporting("splitting", "positions") as progress:
        manifest = split(
            dataset,
            output,
            dict(shares),
            seed=seed,
            shard_bytes=shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    made(output, manifest, as_json=as_json)
