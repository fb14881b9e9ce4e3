"""`logitstore validate`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from logitstore.checks import Finding, is_valid, validate
from logitstore_cli.output import note, progress_bar, quiet_client, result, result_json, size

if TYPE_CHECKING:
    from logitstore.hub.repair import Repaired


@click.command("validate")
@click.argument("dataset", type=click.Path())
@click.option("--deep", is_flag=True, help="Read every byte and check every row.")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Processes with --deep or --repair-from; all cores unless given, one for less than 64 MiB.",
)
@click.option(
    "--repair-from",
    metavar="SOURCE",
    help="First fetch files that are missing or damaged from a copy: a directory, hf://datasets/ns/name, or a URL. The "
    "sha256 of every file is computed for this, also without --deep.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def command(
    context: click.Context, dataset: str, deep: bool, workers: int | None, repair_from: str | None, as_json: bool
) -> None:
    """Check a dataset, and list every problem. Exit status 1 when one of them is an error.

    Example: logitstore validate my-dataset --deep

    With --repair-from, shards and tokenizer files whose bytes are not those of the manifest are replaced, each when the
    good one is there and verified; what the source does not have stays as it is. Where the manifest is missing or
    damaged, the source's is taken, and the damaged one kept as logitstore.json.damaged.

    Example: logitstore validate my-dataset --repair-from hf://datasets/me/my-dataset
    """
    if workers is not None and not deep and repair_from is None:
        raise click.UsageError("--workers is for --deep and --repair-from: nothing else reads every byte")
    done = None if repair_from is None else _repair(dataset, repair_from, workers)
    with progress_bar() as bar:
        task = bar.add_task("checking", total=None, rate="")
        findings = validate(
            dataset,
            deep,
            workers=workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total or None),
        )
    # Without --deep, a damaged file that could not be repaired need not be among the findings.
    valid = is_valid(findings) and (done is None or not done.not_repaired)
    if as_json:
        said: dict[str, Any] = {"valid": valid, "findings": [dataclasses.asdict(finding) for finding in findings]}
        if done is not None:
            said |= {"repaired": done.repaired, "not_repaired": [dataclasses.asdict(one) for one in done.not_repaired]}
        result_json(said)
    else:
        for finding in findings:
            result(finding_line(finding))
        counts = {kind: sum(f.severity == kind for f in findings) for kind in ("error", "warning", "info")}
        if done is not None and done.not_repaired:
            counts["damaged file"] = len(done.not_repaired)
        words = ", ".join(f"{n} {kind}{'s' if n != 1 else ''}" for kind, n in counts.items() if n)
        depth = "every row" if deep else "without reading rows; --deep reads every one"
        result(f"{dataset}: {'valid' if valid else 'INVALID'} ({words or 'no findings'}; checked {depth})")
    context.exit(0 if valid else 1)


def _repair(dataset: str, source: str, workers: int | None) -> Repaired:
    from logitstore.hub.repair import repair  # noqa: PLC0415 - `--help` must not wait for the Hub's client

    def told(path: str, reason: str | None) -> None:
        note(f"repaired: {path}" if reason is None else f"not repaired: {path}: {reason}")

    quiet_client()
    with progress_bar() as bar:
        task = bar.add_task("repairing", total=None, rate="")
        done = repair(
            dataset,
            source,
            workers=workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total or None),
            told=told,
        )
    good, bad = len(done.repaired), len(done.not_repaired)
    if good or bad:
        left = f"; {bad} stay{'s' if bad == 1 else ''} damaged" if bad else ""
        note(f"{dataset}: {good} file{'s' if good != 1 else ''} repaired from {source} ({size(done.bytes)}){left}")
    else:
        note(f"{dataset}: no file is missing or damaged, nothing to repair")
    return done


def finding_line(finding: Finding) -> str:
    """One finding as a line."""
    place = [
        f"{name} {value}" if name else str(value)
        for name, value in (
            ("", finding.shard),
            ("chunk", finding.chunk),
            ("row", finding.row),
            ("position", finding.position),
        )
        if value is not None
    ]
    return f"{finding.severity}: {finding.code}: {', '.join(place) + ': ' if place else ''}{finding.message}"
