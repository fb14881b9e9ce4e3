"""`logitstore select`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from logitstore.dataset.divide import select
from logitstore.errors import InvalidInputError
from logitstore_cli.output import note
from logitstore_cli.restructure import made, reporting
from logitstore_cli.types import SIZE

_NAMED = 5


@click.command("select")
@click.argument("dataset", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--ids", "file", type=click.Path(), help="A file with one id a line; - is standard input.")
@click.option("--id", "ids", multiple=True, metavar="ID", help="An id; may be repeated.")
@click.option("--missing-ok", is_flag=True, help="Leave out ids that are not there, and exit with 3.")
@click.option("--shard-size", type=SIZE, help="A shard closes at this size.  [default: 256MiB]")
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there, when the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def command(
    dataset: str,
    output: str,
    file: str | None,
    ids: tuple[str, ...],
    missing_ok: bool,
    shard_size: int | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Make a dataset at OUTPUT of the sequences of DATASET with these ids, in the order of DATASET.

    Values are written as they are stored. An id that is not there is an error, unless --missing-ok.

    Example: logitstore select my-dataset some --ids ids.txt
    """
    if file is None and not ids:
        raise click.UsageError("name ids by --ids FILE or --id ID")
    wanted = [*ids, *(_read(file) if file is not None else ())]
    with reporting("selecting", "positions") as progress:
        done = select(
            dataset,
            output,
            wanted,
            missing_ok=missing_ok,
            shard_bytes=shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    made(output, done.manifest, as_json=as_json, missing=list(done.missing))
    if not done.missing:
        return 0
    named = ", ".join(repr(name) for name in done.missing[:_NAMED])
    more = ", ..." if len(done.missing) > _NAMED else ""
    what = "1 id is" if len(done.missing) == 1 else f"{len(done.missing):,} ids are"
    note(f"Note: {what} not in {dataset}: {named}{more}")
    return 3


def _read(file: str) -> list[str]:
    """The ids in a file, one a line; empty lines are none."""
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{file} is not UTF-8 (byte {error.start}); write one id a line in UTF-8") from error
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [line for line in lines if line]
