"""`logitstore stats`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

import logitstore
from logitstore.io.files import write_atomic
from logitstore.look.stats import Stats, Teaching, entropy_source, stats
from logitstore.look.words import name_of
from logitstore.processes import cores
from logitstore.text import readable
from logitstore_cli.figures import bar_line, histogram_lines, nats, percent, spread_lines, whole
from logitstore_cli.output import check_target, note, progress_bar, reporter, result, result_json, size


@click.command("stats")
@click.argument("dataset", type=click.Path())
@click.option("--full", is_flag=True, help="Read every sequence; without it, a sample of 32 chunks.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes with --full; all cores unless given.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the figures with charts to this file too.")
@click.option("--overwrite", is_flag=True, help="Replace that file.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(dataset: str, full: bool, workers: int | None, html: Path | None, overwrite: bool, as_json: bool) -> None:
    """Say what the distributions of a dataset are like, and what keeping less would cost and save.

    Example: logitstore stats my-dataset --full --html stats.html
    """
    if workers is not None and not full:
        raise click.UsageError("--workers is for --full: a sample is read by one process")
    if overwrite and html is None:
        raise click.UsageError("--overwrite is for the file of --html")
    opened = logitstore.open(dataset)
    if html is not None:
        check_target(html, opened.path, overwrite=overwrite)
    with progress_bar() as bar:
        figures = stats(
            opened,
            full=full,
            workers=(cores() if workers is None else workers) if full else 0,
            progress=reporter(bar, "reading", "sequences"),
        )
    if html is not None:  # before what is printed: whoever reads that may go away, as `head` does
        from logitstore.look.report import report  # noqa: PLC0415 - only where it is asked for

        write_atomic(html, report(name_of(opened), figures).encode())
        note(f"Note: the figures are in {html} too")
    if as_json:
        result_json(figures)
        return
    for line in stats_lines(dataset, figures):
        result(line)


def stats_lines(name: str, figures: Stats) -> Iterator[str]:
    """The figures for people."""
    read = f"{figures.sequences:,} sequences, {figures.positions:,} positions"
    if not figures.full:
        read = f"a sample, {read}, of {figures.sequences_in_all:,} and {figures.positions_in_all:,} (--full reads all)"
    yield f"{name}: {read}"
    without = figures.positions - figures.scored - figures.impossible
    yield f"positions without a distribution: {without:,}; candidates: {figures.candidates:,}"
    if figures.impossible:
        yield f"positions with impossible numbers, left out: {figures.impossible:,}; see logitstore validate --deep"
    if figures.trained is not None:
        yield f"positions to be trained on, by their loss_mask: {percent(figures.trained)}"
    yield ""
    yield from spread_lines(
        [
            ("positions a sequence", figures.length, whole),
            ("candidates a position", figures.count, whole),
            ("coverage", figures.coverage, percent),
            ("tail", figures.tail, percent),
            ("entropy, nats", figures.entropy, nats),
            ("surprise, nats", figures.teaching.surprise if figures.teaching is not None else None, nats),
        ]
    )
    if figures.count is not None and figures.count.percentiles_of < figures.count.n:
        yield f"(percentiles are those of {figures.count.percentiles_of:,} positions, drawn at random)"
    if figures.entropy is not None and figures.entropy.histogram is not None:
        yield ""
        yield f"Entropy, nats ({entropy_source(figures.entropies)})"
        yield from histogram_lines(figures.entropy.histogram, lambda edge: f"{edge:g}")
    if figures.coverage is not None and figures.coverage.histogram is not None:
        yield ""
        yield "Coverage: the probability of all candidates of a position"
        yield from histogram_lines(figures.coverage.histogram, lambda edge: f"{100 * edge:g} %")
    if figures.teaching is not None:
        yield ""
        yield from _teaching(figures.teaching)
    yield ""
    yield from _bytes(figures)
    yield from _uncertain(figures)
    yield from _advice(figures)


def _teaching(found: Teaching) -> Iterator[str]:
    yield f"The token that really follows ({found.positions:,} positions)"
    yield f"  is the teacher's best candidate at {percent(found.top_1)}"
    yield f"  is not among the candidates at {percent(found.outside)}"
    if found.cross_entropy is not None and found.perplexity is not None:
        yield f"  cross-entropy {nats(found.cross_entropy)} nats, perplexity {found.perplexity:,.2f}"
    elif found.cross_entropy_at_least is not None and found.perplexity_at_least is not None:
        least, perplexity = nats(found.cross_entropy_at_least), f"{found.perplexity_at_least:,.2f}"
        yield f"  cross-entropy at least {least} nats, perplexity at least {perplexity}"
        yield "  (the logprob of a token outside the candidates is not stored: at most the last one's, and the tail's)"
    elif found.cross_entropy_known is not None:
        yield f"  cross-entropy {nats(found.cross_entropy_known)} nats over the {percent(found.known)} that are stored"
    yield "  its rank"
    yield from _ranks(found)


def _ranks(found: Teaching) -> Iterator[str]:
    """A bar for each bin of ranks, and one for those that are not known."""
    edges, counts = found.ranks.edges, found.ranks.counts
    unknown = round(found.unranked * found.positions)
    most, blocks = max(*counts, unknown), sys.stdout.isatty()
    used = max((number for number, count in enumerate(counts) if count), default=-1)
    for number in range(used + 1):
        first, end = int(edges[number]), int(edges[number + 1]) - 1
        name = f"{first:,}" if first == end else f"{first:,} to {end:,}" if end < 2**30 else f"over {first - 1:,}"
        yield bar_line(name, counts[number], most, found.positions, blocks=blocks)
    if unknown:
        yield bar_line("not stored", unknown, most, found.positions, blocks=blocks)


def _bytes(figures: Stats) -> Iterator[str]:
    if figures.bytes_a_position is None:
        yield f"Size: {size(figures.bytes)}"
        return
    yield f"Size: {size(figures.bytes)}, {figures.bytes_a_position:.1f} bytes a position"
    yield f"  {'column':<22}{'bytes a position':>18}{'bits a candidate':>18}"
    for column in sorted(figures.columns, key=lambda one: -one.bytes):
        bits = "" if column.bits_a_candidate is None else f"{column.bits_a_candidate:.3f}"
        yield f"  {readable(column.name):<22}{column.bytes_a_position:>18.2f}{bits:>18}"


def _uncertain(figures: Stats) -> Iterator[str]:
    if figures.uncertain:
        yield ""
        yield "Most uncertain sequences"
        yield f"  {'row':>10}  {'entropy, nats':>13}  {'positions':>9}  id"
        for one in figures.uncertain:
            yield f"  {one.row:>10,}  {one.entropy:>13.3f}  {one.scored:>9,}  {readable(one.id)}"
    yield ""
    again = figures.duplicates
    among = "" if figures.full else ", among those read"
    yield f"Sequences whose tokens an earlier one has too{among}: {again.sequences:,}"
    for rows in again.examples:
        yield f"  rows {', '.join(map(str, rows))}"


def _advice(figures: Stats) -> Iterator[str]:
    if not figures.advice:
        return
    rows = sum(end - first for first, end in figures.advice_rows)
    yield ""
    yield f"What keeping less would cost and save, a position (tried on {rows:,} sequences)"
    yield f"  {'setting':<20}{'candidates':>11}{'coverage':>10}{'KL':>11}{'KL, even':>11}{'saves':>14}"
    for one in figures.advice:
        saved = f"{one.saved:.1f} B {100 * one.share:>3.0f} %"
        option = f"--{one.setting.replace('_', '-')} {one.text}"
        yield (
            f"  {option:<20}{one.candidates:>11.1f}{percent(one.coverage):>10}{nats(one.kl):>11}"
            f"{nats(one.kl_even):>11}{saved:>14}"
        )
    yield "  KL: of what is kept from what is stored, nats, both renormalised over their candidates."
    yield "  KL, even: of what is stored from what is kept, the rest spread evenly over the vocabulary."
