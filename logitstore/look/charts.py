"""Charts as SVG text, and numbers as people write them. Pure functions; nothing in them is trusted to be HTML already.

Colours and fonts are the page's: elements have classes and no styles. Charts are drawn in units of about a CSS pixel.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from logitstore.look.summaries import Histogram, Spread
from logitstore.text import readable

NBSP: Final = "\N{NO-BREAK SPACE}"

_TO: Final = "\N{EN DASH}"
_WIDTH: Final = 340
_ROW: Final = 21
_BAR: Final = 12
_GLYPH: Final = 6.2  # width of a character, about; those of Chinese, Japanese and Korean are twice as wide
_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def escaped(text: str) -> str:
    """Any text as HTML, what does not show in it made visible."""
    return html.escape(readable(text))


def whole(value: float) -> str:
    """A number of things, or a mean of them: `1,048,576`, `497.1`."""
    if not math.isfinite(value):
        return _special(value)
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 10_000 else f"{value:,.1f}"


def number(value: float) -> str:
    """A measured number, to about three digits."""
    if not math.isfinite(value):
        return _special(value)
    size = abs(value)
    if size >= 1e15:
        return _power(value)
    if size >= 10:
        return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}"
    if size >= 1 or size == 0:
        return f"{value:.2f}" if size else "0"
    return f"{value:#.3g}" if size >= 1e-4 else _power(value)


def percent(share: float) -> str:
    """A share of one; what is not all or nothing does not look like it."""
    if not math.isfinite(share):
        return _special(share)
    value = 100 * share
    if value in (0, 100):
        text = f"{value:.0f}"
    elif 99.9 <= value < 100:
        text = f"{min(value, 99.999):.3f}".rstrip("0")
    elif abs(value) >= 10:
        text = f"{value:.1f}"
    else:
        text = f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
    if text in ("0.000", "-0.000"):
        text = "under 0.001"
    return text + NBSP + "%"


def size(count: float) -> str:
    """Bytes: `128 B`, `5.19 MB`."""
    unit, units = 0, ("B", "kB", "MB", "GB", "TB", "PB")
    while count >= 999.5 and unit < len(units) - 1:
        count, unit = count / 1000, unit + 1
    return (f"{count:,.0f}" if unit == 0 or count >= 100 else f"{count:.3g}") + NBSP + units[unit]


def things(count: int, one: str) -> str:
    """`1 sequence`, `1,234 sequences`."""
    return f"{count:,}{NBSP}{one}{'' if count == 1 else 's'}"


def power_of_ten(exponent: int) -> str:
    """`0.001`, `10⁻⁷`."""
    if -4 <= exponent <= 4:
        return f"{10.0**exponent:.{max(0, -exponent)}f}"
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def _power(value: float) -> str:
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}\N{MULTIPLICATION SIGN}10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def _special(value: float) -> str:
    return "unknown" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a chart.

    Attributes:
        label: what it is.
        value: its length.
        text: its value, in words.
        rest: whether it stands for what the others do not.
    """

    label: str
    value: float
    text: str
    rest: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a scatter chart: its label, where it is, and what it is in words."""

    label: str
    x: float
    y: float
    text: str


def _svg(ident: str, title: str, desc: str, height: float, body: Iterable[str], *, width: float = _WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {_at(width)} {_at(height)}" role="img" aria-labelledby="{ident}-title {ident}-desc">'
        f'<title id="{ident}-title">{escaped(title)}</title><desc id="{ident}-desc">{escaped(desc)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(x: float, y: float, content: str, names: str) -> str:
    return f'<text class="{names}" x="{_at(x)}" y="{_at(y)}">{escaped(content)}</text>'


def _width(text: str) -> float:
    """Of a label, about."""
    return sum(2 * _GLYPH if unicodedata.east_asian_width(c) in "WF" else _GLYPH for c in text)


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    return f'<line class="{name}" x1="{_at(x1)}" y1="{_at(y1)}" x2="{_at(x2)}" y2="{_at(y2)}"/>'


def _said(bars: Sequence[Bar]) -> str:
    return "; ".join(f"{bar.label}: {bar.text}" for bar in bars) + "."


def bars_across(ident: str, title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars, each in a line with its label and its value: for bins that are uneven or are names."""
    left = 10 + max(_width(bar.label) for bar in bars)
    room = _WIDTH - left - 14 - max(_width(bar.text) for bar in bars)
    most = max(*(bar.value for bar in bars), 1e-300)

    def body() -> Iterator[str]:
        for row, bar in enumerate(bars):
            y = _ROW * row + 4
            width = max(1.0 if bar.value > 0 else 0.0, room * max(bar.value, 0.0) / most)
            yield _text(left - 8, y + 10, bar.label, "tick end")
            yield (
                f'<rect class="bar{" rest" if bar.rest else ""}" x="{_at(left)}" y="{y}" width="{_at(width)}" '
                f'height="{_BAR}" rx="2"/>'
            )
            yield _text(left + width + 6, y + 10, bar.text, "tick value")
        yield _line(left, 0, left, _ROW * len(bars), "axis")

    return _svg(ident, title, _said(bars), _ROW * len(bars) + 2, body())


def bars_up(ident: str, title: str, bars: Sequence[Bar], edges: Sequence[str], mark: tuple[float, str] | None) -> str:
    """Vertical bars of equal width, side by side: for a histogram whose bins are even.

    Args:
        ident: of the chart on the page.
        title: what it shows.
        bars: values are shares of one.
        edges: a label for each edge of the bins, of which there is one more than bins; empty: none.
        mark: (a place in bins from the left, its label), such as the mean.
    """
    left, right, top, bottom = 36.0, _WIDTH - 8.0, 22.0, 212.0
    ticks = _ticks(max(bar.value for bar in bars))
    step, scale = (right - left) / len(bars), (bottom - top) / (ticks[-1] or 1.0)

    def body() -> Iterator[str]:
        for tick in ticks:
            y = bottom - scale * tick
            yield _line(left, y, right, y, "grid" if tick else "axis")
            yield _text(left - 6, y + 4, f"{100 * tick:g}{NBSP}%", "tick end")
        for place, bar in enumerate(bars):
            height = max(1.0 if bar.value > 0 else 0.0, scale * bar.value)
            yield (
                f'<rect class="bar" x="{_at(left + step * place + 1)}" y="{_at(bottom - height)}" '
                f'width="{_at(step - 2 if step > 6 else step)}" height="{_at(height)}" rx="1.5">'
                f"<title>{escaped(bar.label)}: {escaped(bar.text)}</title></rect>"
            )
        for place, edge in enumerate(edges):
            if edge:
                yield _text(left + step * place, bottom + 16, edge, "tick middle")
        if mark is not None:
            x = left + step * mark[0]
            yield _line(x, 0, x, bottom, "mark")
            near_end = x > (left + right) / 2
            yield _text(x + (-5 if near_end else 5), 9, mark[1], f"note{' end' if near_end else ''}")

    said = _said(bars) + (f" {mark[1].capitalize()}." if mark is not None else "")
    return _svg(ident, title, said, bottom + 24, body())


def _ticks(most: float, count: int = 4) -> list[float]:
    """Round numbers from zero to what is at least the most."""
    if not (math.isfinite(most) and most > 0):
        return [0.0, 1.0]
    rough = most / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))
    return [float(f"{step * n:.9g}") for n in range(math.ceil(most / step - 1e-9) + 1)]


_LEAST: Final = 1e-7  # a KL of less is that of rounding: it is drawn there, zero too


def scatter(
    ident: str, title: str, x_label: str, y_label: str, series: Sequence[Sequence[Point]], *, width: float = 370
) -> str:
    """Points on a logarithmic x axis, those of a series joined, each with its label beside it where there is room."""
    every = [point for points in series for point in points]
    logs = [math.log10(_shown(point.x)) for point in every]
    middle, span = (min(logs) + max(logs)) / 2, max(2.0, max(logs) - min(logs) + 0.5)  # with a decade's line or two
    low, high = middle - span / 2, middle + span / 2
    bottom_tick = min(0.0, *(point.y for point in every))
    ticks = _ticks(max(point.y for point in every), 5)
    ticks = ([-tick for tick in reversed(_ticks(-bottom_tick)[1:])] if bottom_tick < 0 else []) + ticks
    left, right, top, bottom = 40.0, width - 12.0, 30.0, 310.0
    scale = (bottom - top) / (ticks[-1] - ticks[0])

    def place(point: Point) -> tuple[float, float]:
        return (
            left + (right - left) * (math.log10(_shown(point.x)) - low) / (high - low),
            bottom - scale * (point.y - ticks[0]),
        )

    def body() -> Iterator[str]:
        for tick in ticks:
            y = bottom - scale * (tick - ticks[0])
            yield _line(left, y, right, y, "grid" if tick else "axis")
            yield _text(left - 6, y + 4, f"{tick:g}", "tick end")
        for exponent in range(math.ceil(low), math.floor(high) + 1, max(1, math.ceil(span / 7))):
            x = left + (right - left) * (exponent - low) / (high - low)
            yield _line(x, top, x, bottom, "grid")
            yield _text(x, bottom + 16, power_of_ten(exponent), "tick middle")
        yield _text(0, 12, y_label, "note")
        yield _text(right, bottom + 34, x_label, "note end")
        for number_, points in enumerate(series):
            yield from (_line(*place(a), *place(b), f"join series-{min(number_, 2)}") for a, b in pairwise(points))
        for number_, points in enumerate(series):
            yield from (marker(*place(point), number_, point.text) for point in points)
        labels = [(*place(point), point.label) for point in every]
        joins = [(*place(a), *place(b)) for points in series for a, b in pairwise(points)]
        yield from _labels(labels, joins, (left, top - 8, right + 8, bottom))

    said = "; ".join(point.text for point in every) + "."
    return _svg(ident, title, said, bottom + 40, body(), width=width)


def _shown(x: float) -> float:
    return min(max(x, _LEAST), 1e7) if not math.isnan(x) else _LEAST


def marker(x: float, y: float, series: int, text: str = "") -> str:
    """A point: a circle, a square or a diamond by its series, so that colour is not all that tells them apart."""
    title = f"<title>{escaped(text)}</title>" if text else ""
    name = f"point series-{min(series, 2)}"
    if series == 0:
        return f'<circle class="{name}" cx="{_at(x)}" cy="{_at(y)}" r="4.5">{title}</circle>'
    if series == 1:
        return f'<rect class="{name}" x="{_at(x - 4)}" y="{_at(y - 4)}" width="8" height="8">{title}</rect>'
    path = f"M{_at(x)} {_at(y - 5.5)}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"
    return f'<path class="{name}" d="{path}">{title}</path>'


Box = tuple[float, float, float, float]


def _labels(points: Sequence[tuple[float, float, str]], joins: Sequence[Box], frame: Box) -> Iterator[str]:
    """Each point's label at the side of it where it covers least, be it points, the lines between them or labels."""
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    for x1, y1, x2, y2 in joins:
        dots = [(x1 + (x2 - x1) * n / 24, y1 + (y2 - y1) * n / 24) for n in range(25)]
        taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in dots]
    for x, y, label in points:
        width = _width(label)
        sides = [
            (x + 8, y + 4, ""), (x - 8, y + 4, " end"), (x, y - 9, " middle"), (x, y + 18, " middle"),
            (x + 7, y - 6, ""), (x + 7, y + 14, ""), (x - 7, y - 6, " end"), (x - 7, y + 14, " end"),
        ]  # fmt: skip
        boxes = [_box(*side, width) for side in sides]
        costs = [sum(map(_overlap, [box] * len(taken), taken)) + _outside(box, frame) for box in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        yield _text(sides[best][0], sides[best][1], label, "label" + sides[best][2])


def _box(x: float, y: float, anchor: str, width: float) -> Box:
    start = x - (width if anchor == " end" else width / 2 if anchor == " middle" else 0)
    return start, y - 9, start + width, y + 2


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, frame: Box) -> float:
    return 100 * sum(
        max(0.0, over) for over in (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
    )


BinName = Callable[[float, float, float], str]
"""A bin's name from its edges, and the last edge of all."""


def histogram_even(ident: str, title: str, spread: Spread, histogram: Histogram) -> str:
    """A histogram with bins of one width, without the empty ones at its end, and where the mean is."""
    edges, found = histogram.edges, histogram.counts
    end = 1 + max((place for place, count in enumerate(found) if count), default=0)
    # The last bin takes what is beyond it too, and may be wider than the others.
    open_end = end == len(found)
    names = [f"{edge:g}" if edge == int(edge) else "" for edge in edges[: end + 1]]
    if open_end:
        names[-1] = "\N{INFINITY}"
    bars = []
    for place, share in enumerate(_of_all(found[:end], spread.n)):
        name = f"{edges[place]:g} to {edges[place + 1]:g}"
        if open_end and place == end - 1:
            name = f"{edges[place]:g} and more"
        bars.append(Bar(name, share, percent(share)))
    mean = spread.mean / (edges[1] - edges[0])
    return bars_up(ident, title, bars, names, (mean, f"mean {number(spread.mean)}") if 0 <= mean <= end else None)


def histogram_bars(histogram: Histogram, n: int, names: BinName) -> list[Bar]:
    """The bins as shares of n numbers, without the empty ones at both ends."""
    edges = histogram.edges
    filled = [place for place, count in enumerate(histogram.counts) if count] or [0]
    of_all = _of_all(histogram.counts, n)
    return [
        Bar(names(edges[place], edges[place + 1], edges[-1]), of_all[place], percent(of_all[place]))
        for place in range(filled[0], filled[-1] + 1)
    ]


def _of_all(found: Sequence[int], n: int) -> list[float]:
    return [count / n if n else 0.0 for count in found]


def shares(low: float, high: float, _last: float) -> str:
    """The name of a bin of shares of one."""
    if low == 0 and high < 0.01:
        return f"under {100 * high:g}{NBSP}%"
    return f"{100 * low:g}{_TO}{100 * high:g}{NBSP}%"


def counts(low: float, high: float, last: float) -> str:
    """The name of a bin of whole numbers."""
    if high == last:
        return f"{low:,.0f} and more"
    return f"{low:,.0f}" if high - low == 1 else f"{low:,.0f}{_TO}{high - 1:,.0f}"
