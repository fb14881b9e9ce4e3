"""`logitstore compare`."""

from __future__ import annotations

from collections.abc import Iterator

import click

import logitstore
from logitstore.look.calibration import BINS
from logitstore.look.compare import Comparison, Means, Side, compare
from logitstore.look.compared import Match
from logitstore.processes import cores
from logitstore.text import readable, running, shortened, visible
from logitstore.tokenizer import Tokenizer
from logitstore_cli.figures import histogram_lines, nats, percent, spread_lines
from logitstore_cli.output import named, note, progress_bar, reporter, result, result_json
from logitstore_cli.show_render import ending

_BEFORE = 40  # cells of the text before a position


@click.command("compare")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--by", metavar="COLUMN", help="Break the figures down by the values of this column of A.")
@click.option(
    "--match",
    type=click.Choice(["id", "row"]),
    default="id",
    show_default=True,
    help="How sequences are matched; by row where the ids were lost in a conversion.",
)
@click.option("--workers", type=click.IntRange(min=0), help="Processes; all cores unless given.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(a: str, b: str, by: str | None, match: Match, workers: int | None, as_json: bool) -> None:
    """Compare two datasets over the same sequences: two teachers, two quantisations, two encodings.

    KL and JSD are taken over the candidates that both have and one class for the rest: lower bounds for the
    distributions as they are stored, which rounding moves by some 1e-5 nats.

    Example: logitstore compare bf16-teacher q4-teacher --by domain
    """
    first, second = logitstore.open(a), logitstore.open(b)
    with progress_bar() as bar:
        found = compare(
            first,
            second,
            by=by,
            match=match,
            workers=_workers(first) if workers is None else workers,
            progress=reporter(bar, "comparing", "sequences"),
        )
    for text in found.notes:
        note(f"Note: {text}")
    if as_json:
        result_json(found)
        return
    for line in compare_lines(found, by, first):
        result(line)


def _workers(dataset: logitstore.Dataset) -> int:
    """Other processes take half a second to begin."""
    return cores() if dataset.info.totals.positions > 2**17 else 0


def compare_lines(found: Comparison, by: str | None, a: logitstore.Dataset) -> Iterator[str]:
    """The comparison for people; the texts are those of a."""
    yield from _sides(found)
    yield ""
    yield f"compared: {found.sequences:,} sequences, {found.positions:,} positions"
    for what, count in (("only in A", found.only_a), ("only in B", found.only_b)):
        if count:
            yield f"{what}: {count:,} sequences"
    if found.first_differing is not None:
        name, position = found.first_differing
        yield (
            f"with other tokens, or more, from some position on: {found.differing:,} sequences, such as "
            f"{readable(shortened(name, 60))} from {position:,} on; compared up to there"
        )
    yield ""
    yield from _means(found)
    if found.jsd is not None:
        yield ""
        rows = [("KL(A ‖ B) >=", found.kl_ab), ("KL(B ‖ A) >=", found.kl_ba), ("JSD >=", found.jsd)]
        yield from spread_lines((f"{name}, nats", spread, nats) for name, spread in rows)
        if found.jsd.percentiles_of < found.jsd.n:
            yield f"(percentiles are those of {found.jsd.percentiles_of:,} positions, drawn at random)"
    if found.jsd is not None and found.jsd.histogram is not None:
        yield ""
        yield "JSD >=, nats"
        yield from histogram_lines(found.jsd.histogram, lambda edge: f"{edge:g}")
    yield ""
    yield from _calibration(found)
    if found.groups:
        yield ""
        yield from _groups(found, by or "")
    if found.differences:
        yield ""
        yield from _differences(found, a)


def _sides(found: Comparison) -> Iterator[str]:
    yield f"{'':<34}{'A':>20}{'B':>20}"
    rows: list[tuple[str, list[str]]] = [
        ("dataset", [_fitted(side.name) for side in (found.a, found.b)]),
        ("teacher", [_fitted(side.teacher or "unknown") for side in (found.a, found.b)]),
        ("sequences", [f"{side.sequences:,}" for side in (found.a, found.b)]),
        ("entropy, rest as one class, nats", [nats(side.entropy) for side in (found.a, found.b)]),
        ("next token is the best candidate", [percent(side.accuracy) for side in (found.a, found.b)]),
        ("cross-entropy where both know it", [nats(side.cross_entropy) for side in (found.a, found.b)]),
        ("calibration error", [percent(side.calibration_error) for side in (found.a, found.b)]),
    ]
    for name, (a, b) in rows:
        yield f"{name:<34}{a:>20}{b:>20}"


def _fitted(name: str) -> str:
    """A name in 18 characters: its beginning and its end."""
    name = readable(name)
    return name if len(name) <= 18 else f"{name[:6]}…{name[-11:]}"


def _means(found: Comparison) -> Iterator[str]:
    means = found.means
    yield f"best candidate is the same        {percent(means.agree)}"
    yield f"candidates that both have         {percent(means.overlap)} of the fewer ones"
    yield f"their probability                 {percent(means.shared_a)} in A, {percent(means.shared_b)} in B"
    yield f"positions that are identical      {means.identical:,}"
    moved, most = nats(found.logprobs_moved), nats(found.logprobs_moved_at_most)
    yield f"logprobs differ by                {moved} nats, at most {most}"
    if means.jsd is not None:
        least, most = nats(means.jsd), nats(means.jsd_at_most)
        yield f"JSD                               {least} nats; {most} if what is outside has nothing in common"


def _calibration(found: Comparison) -> Iterator[str]:
    yield "Calibration: how often the best candidate is the next token, by its probability"
    yield f"  {'probability':<18}{'A: positions':>14}{'right':>9}{'B: positions':>16}{'right':>9}"
    for number in range(BINS):
        cells = [_right(side, number) for side in (found.a, found.b)]
        if any(count for count, _ in cells):
            (a, right_a), (b, right_b) = cells
            name = f"{10 * number} % to {10 * number + 10} %"
            yield f"  {name:<18}{a:>14,}{right_a:>9}{b:>16,}{right_b:>9}"


def _right(side: Side, number: int) -> tuple[int, str]:
    n = side.calibration.n[number]
    return n, percent(side.calibration.hits[number] / n) if n else ""


def _groups(found: Comparison, by: str) -> Iterator[str]:
    yield f"  {_fitted(by):<24}{'positions':>11}" + "".join(
        f"{name:>{width}}"
        for name, width in (("KL(A‖B)", 10), ("KL(B‖A)", 10), ("JSD", 10), ("same best", 11), ("overlap", 9))
    )
    for name, means in found.groups.items():
        yield f"  {_fitted(name):<24}{_group(means)}"


def _group(means: Means) -> str:
    values = "".join(f"{nats(value):>10}" for value in (means.kl_ab, means.kl_ba, means.jsd))
    return f"{means.positions:>11,}{values}{percent(means.agree):>11}{percent(means.overlap):>9}"


def _differences(found: Comparison, dataset: logitstore.Dataset) -> Iterator[str]:
    yield "Where they differ most"
    tokenizer = dataset.tokenizer()
    for one in found.differences:
        best = [f"{named(tokenizer, token)} {percent(p)}" for token, p in (one.best_a, one.best_b)]
        place = f"row {one.row:,} position {one.position:,}"
        yield f"  {place:<28} JSD {nats(one.jsd)}  A: {best[0]}  B: {best[1]}"
        yield f"  {'':<28} after {_before(dataset, tokenizer, one.row, one.position)}"


def _before(dataset: logitstore.Dataset, tokenizer: Tokenizer | None, row: int, position: int) -> str:
    """The text that ends with the token at a position."""
    tokens = dataset.select(["tokens"])[row].tokens[: position + 1][-_BEFORE:].tolist()
    return ending(visible("".join(running(tokenizer, tokens))), _BEFORE)
