"""Figures as people read them: tables of spreads, histograms of bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

from logitstore.look.summaries import PERCENTILES, Histogram, Spread
from logitstore_cli.show_render import bar

CELLS = 40
"""Of the longest bar."""

Format = Callable[[float], str]


def percent(share: float | None) -> str:
    """A share of one."""
    return "unknown" if share is None else f"{100 * share:.1f} %"


def nats(value: float | None) -> str:
    """Nats, with enough digits for small ones."""
    if value is None:
        return "unknown"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"


def whole(value: float) -> str:
    """A number of things; a mean of them has a digit behind the point."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def spread_lines(rows: Iterable[tuple[str, Spread | None, Format]]) -> Iterator[str]:
    """A table of how numbers are spread: a line each."""
    names = ["mean", "least", *(f"{percent} %" if percent != 50 else "median" for percent in PERCENTILES), "greatest"]
    yield f"{'':<22}" + "".join(f"{name:>10}" for name in names)
    for name, spread, shown in rows:
        if spread is None:
            yield f"{name:<22}{'unknown':>10}"
            continue
        percentiles = (spread.percentiles.get(str(percent)) for percent in PERCENTILES)
        values = [spread.mean, spread.least, *percentiles, spread.greatest]
        yield f"{name:<22}" + "".join(f"{'' if value is None else shown(value):>10}" for value in values)


def histogram_lines(histogram: Histogram, shown: Format) -> Iterator[str]:
    """A bar for each bin, from the first to the last one that is not empty; `shown` writes an edge."""
    counts, edges, total = histogram.counts, histogram.edges, sum(histogram.counts)
    used = [number for number, count in enumerate(counts) if count]
    if not used:
        return
    blocks = sys.stdout.isatty()
    for number in range(used[0], used[-1] + 1):
        name = f"{shown(edges[number])} to {shown(edges[number + 1])}"
        yield bar_line(name, counts[number], max(counts), total, blocks=blocks)


def bar_line(name: str, count: float, most: float, total: float, *, blocks: bool) -> str:
    """A name, a count, its share of all, and a bar."""
    return f"  {name:<18}{count:>12,.0f}{100 * count / total:>8.1f} %  {bar(count / most, CELLS, blocks=blocks)}"
