"""`logitstore recover`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import click

from logitstore.recovery import Lost, Recovered, recover
from logitstore_cli.output import note, progress_bar, result, result_json

_LISTED: Final = 1000


@click.command("recover")
@click.argument("directory", type=click.Path())
@click.argument("output", type=click.Path(), required=False)
@click.option("--in-place", is_flag=True, help="Make the dataset in DIRECTORY whole, in place of writing to OUTPUT.")
@click.option("--teacher", help="Name of the teacher model, where nothing that is left says it.")
@click.option(
    "--tokenizer", type=click.Path(), help="The teacher's tokenizer.json, or its directory, where that is lost."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was saved and lost as JSON.")
def command(
    directory: str,
    output: str | None,
    in_place: bool,
    teacher: str | None,
    tokenizer: str | None,
    as_json: bool,
) -> int:
    """Save what can be saved of the dataset in DIRECTORY, whose writer was killed or whose files are damaged.

    Whole shards are taken as they are; of damaged ones the chunks that a digest vouches for, or, where none is left,
    those whose rows are valid. What was saved is checked to the last row first. Every sequence that is lost is listed.
    Exits 0 when nothing was lost, 3 when something was.

    A writer that was only stopped is better gone on with (--resume).

    Example: logitstore recover my-dataset rescued

    With --in-place, what was damaged is kept in DIRECTORY/before-recovery, and unfinished parts cannot be resumed.

    Example: logitstore recover my-dataset --in-place
    """
    if (output is None) == (not in_place):
        raise click.UsageError("give either OUTPUT, or --in-place")
    with _reporting() as progress:
        done = recover(directory, output, in_place=in_place, teacher=teacher, tokenizer=tokenizer, progress=progress)
    for text in done.notes:
        note(f"Note: {text}")
    if as_json:
        sums = {"lost_sequences": done.lost_sequences, "lost_is_known": done.lost_is_known}
        result_json(dataclasses.asdict(done) | sums)
    else:
        for line in _lines(done):
            result(line)
    return 3 if done.lost else 0


def _lines(done: Recovered) -> Iterator[str]:
    listed = 0
    more = 0
    for each in done.lost:
        for line in lost_lines(each):
            if listed < _LISTED:
                yield line
                listed += 1
            else:
                more += 1
    if more:
        yield f"lost: and {more:,} more; all are in --json"
    if done.unchanged:
        yield f"{done.path}: nothing is damaged; {done.sequences:,} sequences, every row checked"
        return
    yield (
        f"{done.path}: {done.sequences:,} sequences saved, every row checked; {done.shards_whole:,} shards as they "
        f"were, {done.shards_salvaged:,} written anew"
    )
    if done.unverified_chunks:
        yield (
            f"  not covered by a digest: {done.unverified_sequences:,} sequences in {done.unverified_chunks:,} chunks, "
            f"whose rows are valid"
        )
    if done.duplicates:
        yield f"  there twice, kept once: {done.duplicates:,} sequences"
    if done.kept is not None:
        yield f"  what was damaged is in {done.kept}"
    if done.lost:
        known = f"{done.lost_sequences:,} sequences"
        yield f"  lost: {known}" if done.lost_is_known else f"  lost: {known}, and others whose number is not known"
    else:
        yield "  lost: nothing"


def lost_lines(lost: Lost) -> Iterator[str]:
    """One line for each sequence whose id is known, and one for those whose ids are not."""
    place = lost.path + (f", chunk {lost.chunk}" if lost.chunk is not None else "")
    unknown = []
    for number, name in enumerate(lost.ids):
        if name is None:
            unknown.append(number)
        else:
            row = f", row {lost.row + number}" if lost.row is not None else ""
            yield f"lost: {name} ({place}{row}): {lost.reason}"
    if not lost.ids:
        yield f"lost: {place}{_rows(lost.row, lost.sequences)}: {lost.reason}"
    for first, count in _runs(unknown):
        yield f"lost: {place}{_rows(None if lost.row is None else lost.row + first, count)}: {lost.reason}"


def _rows(row: int | None, count: int | None) -> str:
    if count == 0:
        return ""
    number = "an unknown number of sequences" if count is None else f"{count:,} sequence{'s' * (count != 1)}"
    if row is None:
        return f", {number}"
    if count is None:
        return f", {number} from row {row} on"
    return f", {number} (row {row})" if count == 1 else f", {number} (rows {row} to {row + count - 1})"


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """(first, how many) of numbers that follow one another."""
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], at - start
            start = at


@contextmanager
def _reporting() -> Iterator[Callable[[str, int, int], None]]:
    """A bar that says what is being done; moved at most ten times a second."""
    with progress_bar() as bar:
        task = bar.add_task("recovering", total=None, rate="")
        last = [0.0]

        def report(doing: str, done: int, total: int) -> None:
            if time.monotonic() - last[0] >= 0.1 or done >= total:
                last[0] = time.monotonic()
                bar.update(task, description=doing, completed=done, total=total or None)

        yield report
