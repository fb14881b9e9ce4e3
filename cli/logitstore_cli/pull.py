"""`logitstore pull`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from logitstore_cli.output import progress_bar, quiet_client, result, result_json, size


@click.command("pull")
@click.argument("repo", metavar="NS/NAME[@REVISION]")
@click.argument("directory", type=click.Path())
@click.option("--split", help="This split alone.")
@click.option("--shards", metavar="RANGES", help="Some shards alone, by number: 0-9 or 0,2,5-7.")
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there, when the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def command(repo: str, directory: str, as_json: bool, **options: Any) -> None:
    """Fetch a dataset from the Hugging Face Hub into DIRECTORY, verified.

    Stopped in whatever way, it goes on where it was when it is called again. The account is that of `hf auth login`,
    or of HF_TOKEN.

    Example: logitstore pull me/my-dataset@v1 my-dataset --shards 0-9
    """
    from logitstore.hub import pull  # noqa: PLC0415 - `--help` must not wait for the Hub's client

    quiet_client()
    with progress_bar() as bar:
        task = bar.add_task("fetching", total=None, rate="")

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total or None, rate=size(done))

        pulled = pull(repo, directory, progress=report, **options)
    if as_json:
        result_json({**dataclasses.asdict(pulled), "path": str(pulled.path)})
    elif pulled.unchanged:
        result(f"{pulled.path}: unchanged, all of commit {pulled.commit[:12]} is there already, and verified")
    else:
        result(
            f"{pulled.path}: {pulled.shards:,} shards, {size(pulled.bytes)}, {size(pulled.fetched)} fetched, verified "
            f"(commit {pulled.commit[:12]})"
        )
