"""`logitstore convert`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import click

from logitstore.convert import Converted, Import, convert, importers
from logitstore.convert.base import Alignment, ValueKind
from logitstore.dataset.commit import existing_manifest, is_published
from logitstore.dataset.origin import Sink
from logitstore.dataset.parts import read_parts
from logitstore.dataset.summary import Summary
from logitstore.encoding.values import VALUES_OPTIONS
from logitstore.schema.journal import Part
from logitstore_cli.output import note, progress_bar, quiet_client, result, result_json, size
from logitstore_cli.push import push_with_bar, summary_line
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
@click.option(
    "--push-as-you-go",
    "repo",
    metavar="NS/NAME",
    help="Bring complete shards to the Hub and delete them here meanwhile.",
)
@click.option("--private", is_flag=True, help="Make that repository private.")
@click.option("--revision", metavar="BRANCH", help="Branch of that repository.  [default: main]")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(
    inputs: tuple[str, ...],
    output: str,
    importer: str | None,
    shard_size: int | None,
    pairs: tuple[tuple[str, str], ...],
    repo: str | None,
    private: bool,
    revision: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Convert captures of one format into a dataset at OUTPUT.

    Several inputs become one dataset, in the order given; a directory or a glob stands for its files, `-` for standard
    input. Files under zstd and gzip are decompressed on the fly. Exits 3 when records were skipped (--on-error skip).
    A conversion that was stopped, or killed, is gone on with by the same command with --resume, to the same dataset.

    With --push-as-you-go, shards are at OUTPUT only until they are on the Hub; what makes them a dataset is pushed in
    the end. Of several parts (--part), it is pushed by `logitstore commit` and `logitstore push`.

    Example: logitstore convert replies.jsonl my-dataset --teacher google/gemma-3-270m
    """
    if repo is None and (private or revision is not None):
        raise click.UsageError("--private and --revision say something of --push-as-you-go, which is not given")
    with progress_bar() as bar:
        converted = convert(
            inputs,
            output,
            importer=importer,
            shard_bytes=shard_size,
            map=dict(pairs),
            progress=_reporter(bar),
            sink=None if repo is None else lambda: _sink(bar, output, options["overwrite"], repo, private, revision),
            **options,
        )
    _note_assumptions(converted)
    if not as_json:
        for line in summary_lines(converted, output):
            result(line)
    alone = Part.parse(options["split"] or "train", options["part"]).of == 1
    pushed = push_with_bar(output, repo, private=private, revision=revision) if repo is not None and alone else None
    if as_json:
        more = {"pushed": asdict(pushed)} if pushed is not None else {}
        result_json({**summary_json(converted), **more})
    elif pushed is not None:
        result(summary_line(pushed))
    if not alone:
        note(f"This part is finished; when all are, join them: {_joining(output, repo, revision)}")
    if pushed is not None and (where := _where(output, pushed.repo, revision)):
        note(where)
    return 3 if converted.skipped else 0


def _note_assumptions(converted: Converted) -> None:
    """What was assumed, and what was left out."""
    for text in converted.notes:
        note(f"Note: {text}")
    for text in converted.failures:
        note(f"Skipped: {text}")
    if converted.skipped > len(converted.failures):
        note(f"Skipped: {converted.skipped - len(converted.failures):,} more")


def _joining(output: str, repo: str | None, revision: str | None) -> str:
    """The commands that make a dataset of finished parts."""
    branch = f" --revision {revision}" if revision is not None else ""
    return f"logitstore commit {output}" + (f" && logitstore push {output} {repo}{branch}" if repo is not None else "")


def _sink(bar: Any, output: str, overwrite: bool, repo: str, private: bool, revision: str | None) -> Sink | None:
    """Takes shards to the Hub; None where the dataset is complete, so that no shard will be written."""
    root = Path(output)
    old = existing_manifest(root)
    if old is not None and not overwrite and all(is_published(state, old) for state in read_parts(root)):
        return None
    from logitstore.hub import HubSink  # noqa: PLC0415 - whoever does not push must not wait for the Hub's client

    quiet_client()
    task: list[Any] = []

    def report(done: int, total: int) -> None:
        if not task:
            task.append(bar.add_task("sending", total=None, rate=""))
        bar.update(task[0], completed=done, total=total, rate=size(done))

    return HubSink(repo, private=private, revision=revision, progress=report)


def _where(output: str, repo: str, revision: str | None) -> str | None:
    """What is to be said of shards that are no longer here; None where all are."""
    manifest = existing_manifest(Path(output))
    shards = manifest.shards if manifest is not None else ()
    gone = sum(not (Path(output) / info.path).exists() for info in shards)
    at = f"@{quote(revision, safe='')}" if revision is not None else ""
    if not gone:
        return None
    return (
        f"{output} holds the manifest and the tokenizer; of its {len(shards):,} shards, {gone:,} are on the Hub alone: "
        f"fetch them with `logitstore pull {repo}{at} {output}`"
    )


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
