"""`logitstore validate`."""

from __future__ import annotations

import dataclasses

import click

from logitstore.checks import Finding, is_valid, validate
from logitstore_cli.output import progress_bar, result, result_json


@click.command("validate")
@click.argument("dataset", type=click.Path())
@click.option("--deep", is_flag=True, help="Read every byte and check every row.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def command(context: click.Context, dataset: str, deep: bool, as_json: bool) -> None:
    """Check a dataset, and list every problem. Exit status 1 when one of them is an error.

    Example: logitstore validate my-dataset --deep
    """
    with progress_bar() as bar:
        task = bar.add_task("checking", total=None, rate="")
        findings = validate(
            dataset, deep, progress=lambda done, total: bar.update(task, completed=done, total=total or None)
        )
    valid = is_valid(findings)
    if as_json:
        result_json({"valid": valid, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            result(finding_line(finding))
        counts = {kind: sum(f.severity == kind for f in findings) for kind in ("error", "warning", "info")}
        said = ", ".join(f"{n} {kind}{'s' if n != 1 else ''}" for kind, n in counts.items() if n)
        depth = "every row" if deep else "without reading rows; --deep reads every one"
        result(f"{dataset}: {'valid' if valid else 'INVALID'} ({said or 'no findings'}; checked {depth})")
    context.exit(0 if valid else 1)


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
