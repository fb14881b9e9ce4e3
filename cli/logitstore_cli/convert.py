"""`logitstore convert`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, get_args

import click

from logitstore.convert import Converted, Import, convert, importers
from logitstore.convert.base import Alignment, ValueKind
from logitstore.dataset.summary import Summary
from logitstore.encoding.values import VALUES_OPTIONS
from logitstore_cli.output import note, progress_bar, result, result_json, size
from logitstore_cli.types import PAIR, RESOLUTION, SIZE


@click.command("convert")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.argument("output", type=click.Path())
@click.option("--from", "importer", metavar="NAME", help="Format of the input; recognised when not given.")
@click.option("--top-k", type=click.IntRange(min=1), help="Most candidates kept of a position.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Keep no more than reach this probability.")
@click.option("--min-k", type=click.IntRange(min=1), help="Least candidates kept under --top-p.  [default: 1]")
@click.option("--values", type=click.Choice(VALUES_OPTIONS), help="Encoding of the values.  [default: auto]")
@click.option("--resolution", type=RESOLUTION, help="Nats a step of the grid.  [default: 1/32]")
@click.option("--tokenizer", type=click.Path(), help="The teacher's tokenizer.json, or its directory.")
@click.option("--teacher", help="Name of the teacher model.")
@click.option("--logit-width", type=click.IntRange(min=1), help="Width of the teacher's head.")
@click.option("--temperature", type=float, help="At which the logprobs were taken.  [default: 1]")
@click.option(
    "--normalised",
    type=click.Choice(["vocabulary", "candidates"]),
    help="Over what the probabilities sum to 1, where the format does not say.",
)
@click.option("--prompts", type=click.Path(), help="JSON lines with the requests that replies answer.")
@click.option("--tokens", type=click.Path(), help="Input tokens, where the capture does not hold them.")
@click.option("--codec-config", type=click.Path(), help="Settings of DistillKit's codec.")
@click.option(
    "--map", "pairs", type=PAIR, multiple=True, help="A column by our name and the input's: tokens=input_ids."
)
@click.option("--value-kind", type=click.Choice(get_args(ValueKind)), help="What the values are.")
@click.option("--alignment", type=click.Choice(get_args(Alignment)), help="Row t is for the next token, or the same.")
@click.option("--split", help="Name of the split.  [default: train]")
@click.option("--shard-size", type=SIZE, help="A shard closes at this size.  [default: 256MiB]")
@click.option("--limit", type=click.IntRange(min=0), help="Most sequences that are taken.")
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", help="What a record does that fails.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, help="Processes that parse.  [default: none but this]"
)
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there, when the new one is complete.")
@click.option("--resume", is_flag=True, help="Go on where a conversion with the same options was stopped.")
@click.option("--part", metavar="I/N", help="Write part I of N, from 0/N on; `logitstore commit` joins them.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(
    inputs: tuple[str, ...],
    output: str,
    importer: str | None,
    shard_size: int | None,
    pairs: tuple[tuple[str, str], ...],
    as_json: bool,
    **options: Any,
) -> int:
    """Convert captures of one format into a dataset at OUTPUT.

    Several inputs become one dataset, in the order given; a directory or a glob stands for its files, `-` for standard
    input. Files under zstd and gzip are decompressed on the fly. Exits 3 when records were skipped (--on-error skip).
    A conversion that was stopped, or killed, is gone on with by the same command with --resume, to the same dataset.

    Example: logitstore convert replies.jsonl my-dataset --teacher google/gemma-3-270m
    """
    with progress_bar() as bar:
        converted = convert(
            inputs,
            output,
            importer=importer,
            shard_bytes=shard_size,
            map=dict(pairs),
            progress=_reporter(bar),
            **options,
        )
    for text in converted.notes:
        note(f"Note: {text}")
    for text in converted.failures:
        note(f"Skipped: {text}")
    if converted.skipped > len(converted.failures):
        note(f"Skipped: {converted.skipped - len(converted.failures):,} more")
    if as_json:
        result_json(summary_json(converted))
    else:
        for line in summary_lines(converted, output):
            result(line)
    if options["part"] is not None:
        note(f"This part is finished; when all are, join them: logitstore commit {output}")
    return 3 if converted.skipped else 0


def _reporter(bar: Any) -> Callable[[Import, Summary], None]:
    """Moves the bar, at most ten times a second."""
    task = bar.add_task("converting", total=None, rate="")
    start = time.monotonic()
    last = [0.0]

    def report(opened: Import, summary: Summary) -> None:
        now = time.monotonic()
        if now - last[0] < 0.1:
            return
        last[0] = now
        rate = f"{summary.positions / max(now - start, 1e-9):,.0f} positions/s"
        bar.update(task, total=opened.total, completed=opened.done(), rate=rate)

    return report


def summary_json(converted: Converted) -> dict[str, Any]:
    """The closing summary as JSON."""
    summary = converted.summary
    return {
        "importer": converted.importer,
        "sequences": summary.sequences,
        "positions": summary.positions,
        "candidates": summary.candidates,
        "bytes": summary.bytes,
        "bytes_per_position": summary.bytes_per_position,
        "encodings": summary.encodings,
        "max_error": summary.max_error,
        "mean_kl": summary.mean_kl,
        "notes": list(converted.notes),
        "skipped": converted.skipped,
        "failures": list(converted.failures),
    }


def summary_lines(converted: Converted, output: str) -> list[str]:
    """The closing summary for people."""
    summary = converted.summary
    encodings = ", ".join(f"{name} ({n:,} sequences)" for name, n in sorted(summary.encodings.items()))
    skipped = f"; {converted.skipped:,} records skipped" if converted.skipped else ""
    counts = f"{summary.sequences:,} sequences, {summary.positions:,} positions, {summary.candidates:,} candidates"
    cost = f"at most {summary.max_error:.2g} nats a logprob, mean KL(given || stored) {summary.mean_kl:.2g} nats"
    return [
        f"{output}: {counts} from {converted.importer}{skipped}",
        f"  {size(summary.bytes)}, {summary.bytes_per_position:.1f} bytes a position; {encodings or 'no values'}",
        f"  rounding cost: {cost}",
    ]


def _importer_lines() -> str:
    return "\n\n".join(["Formats:"] + [f"  {name}: {one.description}" for name, one in importers().items()])


command.epilog = _importer_lines()
