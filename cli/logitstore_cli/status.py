"""`logitstore status`."""

from __future__ import annotations

import dataclasses

import click

from logitstore.dataset.status import PartStatus, Status, status
from logitstore_cli.output import result, result_json, size


@click.command("status")
@click.argument("directory", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(directory: str, as_json: bool) -> None:
    """Say how far the writers in DIRECTORY are: parts, what they hold, and their last sequences.

    Example: logitstore status my-dataset
    """
    found = status(directory)
    if as_json:
        totals = None if found.manifest is None else found.manifest.totals
        result_json({"committed": totals, "parts": [dataclasses.asdict(part) for part in found.parts]})
        return
    for line in _lines(directory, found):
        result(line)


def _lines(directory: str, found: Status) -> list[str]:
    lines = []
    if found.manifest is not None:
        totals = found.manifest.totals
        held = f"{totals.sequences:,} sequences, {totals.positions:,} positions, {size(totals.bytes)}"
        lines.append(f"{directory}: a dataset of {held}")
    if found.parts:
        counts = [
            f"{n} {state}" for state in ("finished", "writing", "stopped", "missing") if (n := _count(found, state))
        ]
        held = f"{sum(part.sequences for part in found.parts):,} sequences, {size(sum(p.bytes for p in found.parts))}"
        lines.append(
            f"{directory}: {len(found.parts)} part{'s' * (len(found.parts) > 1)} ({', '.join(counts)}); {held}"
        )
        lines += [_part_line(part) for part in found.parts]
        lines.append(_advice(found))
    elif found.manifest is None:
        lines.append(
            f"{directory}: shards without a manifest or journals; save what is there with `logitstore recover`"
        )
    return lines


def _count(found: Status, state: str) -> int:
    return sum(part.state == state for part in found.parts)


def _part_line(part: PartStatus) -> str:
    line = f"  {part.split} {part.number}/{part.of}  {part.state:8}"
    if part.state == "missing":
        return line.rstrip()
    shards = f"{part.shards:,} shard{'s' * (part.shards != 1)}"
    held = f"{part.sequences:,} sequences, {part.positions:,} positions, {size(part.bytes)} in {shards}"
    sent = f", {part.sent:,} of them on the Hub" if part.sent else ""
    return f"{line}  {held}{sent}; last id {part.last if part.last is not None else '-'}"


def _advice(found: Status) -> str:
    if all(part.state == "finished" for part in found.parts):
        return "All parts are finished: `logitstore commit` makes them a dataset."
    if _count(found, "stopped") or _count(found, "missing"):
        return "Parts that were stopped are gone on with by --resume, or saved by `logitstore recover`."
    return "Writers are at work."
