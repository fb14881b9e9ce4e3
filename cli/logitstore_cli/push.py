"""`logitstore push`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from logitstore_cli.output import progress_bar, quiet_client, result, result_json, size

if TYPE_CHECKING:
    from logitstore.hub import Pushed


@click.command("push")
@click.argument("dataset", type=click.Path())
@click.argument("repo", metavar="NS/NAME")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to, made when it is not there.  [default: main]")
@click.option("--tag", help="Name the commit, as v1.")
@click.option("--message", help="Message of the commit.")
@click.option("--licence", metavar="ID", help="Licence of the dataset for its card, as cc-by-4.0.")
@click.option("--language", metavar="CODE", help="Language of its texts for its card, as en.")
@click.option("--no-validate", is_flag=True, help="Do not check the dataset before.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def command(dataset: str, repo: str, no_validate: bool, as_json: bool, **options: Any) -> None:
    """Publish DATASET on the Hugging Face Hub as NS/NAME, with a card and a preview that people can read.

    What is there already is not sent again. The account is that of `hf auth login`, or of HF_TOKEN.

    Example: logitstore push my-dataset me/my-dataset --private --tag v1
    """
    pushed = push_with_bar(dataset, repo, check=not no_validate, **options)
    if as_json:
        result_json(dataclasses.asdict(pushed))
    else:
        result(summary_line(pushed))


def push_with_bar(dataset: str, repo: str, **options: Any) -> Pushed:
    """Push, and show how far it is."""
    from logitstore.hub import push  # noqa: PLC0415 - `--help` must not wait for the Hub's client

    quiet_client()
    with progress_bar() as bar:
        task = bar.add_task("looking", total=None, rate="")

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None, rate=size(done))

        return push(dataset, repo, progress=report, **options)


def summary_line(pushed: Pushed) -> str:
    """What a push did, for people."""
    if pushed.unchanged:
        return f"{pushed.url}: unchanged, all of it is there already (commit {pushed.commit[:12]})"
    return f"{pushed.url}: {pushed.files:,} files, {size(pushed.bytes)}, commit {pushed.commit[:12]}"
