"""The figures of a dataset as one page of HTML: static, self-contained, without scripts, the same for the same figures.

Ids and names are untrusted: all text goes through `escaped`, and the page's policy lets nothing in but its one style.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from logitstore.look.advice import Advice
from logitstore.look.charts import (
    NBSP,
    Bar,
    BinName,
    Point,
    bars_across,
    counts,
    escaped,
    histogram_bars,
    histogram_even,
    marker,
    number,
    percent,
    power_of_ten,
    scatter,
    shares,
    size,
    things,
    whole,
)
from logitstore.look.inline import source, style
from logitstore.look.stats import Stats, Teaching, entropy_source
from logitstore.look.summaries import PERCENTILES, Spread
from logitstore.text import readable, shortened

_TEXT: Final = 200  # characters of an id or a name: nothing bounds those of a file
_COLUMNS: Final = 40  # a table lists so many
_BARS: Final = 8  # and a chart so many

_MEANINGS: Final = {
    "id": "identifiers of sequences",
    "length": "lengths of sequences",
    "encoding": "how values are encoded",
    "tokens": "input tokens",
    "count": "how many candidates a position has",
    "ids": "which tokens the candidates are",
    "top": "the best candidate's logprob or logit",
    "gaps": "steps from each candidate to the next, or draws",
    "tail": "what the candidates do not cover",
    "target_logprob": "logprob of the real next token",
    "target_rank": "rank of the real next token",
    "logsumexp": "normaliser of the logits",
    "entropy": "entropy over the whole vocabulary",
    "loss_mask": "which positions are trained on",
    "framing": "Arrow's framing, and the token order",
}

_SETTINGS: Final = {"top_k": ("top-k", "k"), "top_p": ("top-p", "p"), "resolution": ("resolution", "")}


def report(name: str, stats: Stats) -> str:
    """A page that shows the figures of a dataset with charts.

    Args:
        name: of the dataset.
        stats: its figures.
    """
    sheet = style("report.css")
    policy = f"default-src 'none'; style-src {source(sheet)}; base-uri 'none'; form-action 'none'"
    title = escaped(shortened(name, _TEXT)) or "A dataset"
    sections = _sections(stats)
    links = "".join(f'<li><a href="#{one.ident}">{one.title}</a></li>' for one in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<title>{title} · figures</title>
<style>{sheet}</style>
</head>
<body>
<header>
<h1><bdi>{title}</bdi></h1>
<p class="lead">{_lead(stats)}</p>
{_key_figures(stats)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{"".join(one.html for one in sections[:-2])}<div class="pair">
{"".join(one.html for one in sections[-2:])}</div>
</main>
<footer>
<p>Entropies, surprise and KL are in nats, of natural logarithms. Made by <code>logitstore stats</code>.</p>
</footer>
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class _Section:
    ident: str
    title: str
    body: str

    @property
    def html(self) -> str:
        return (
            f'<section id="{self.ident}" aria-labelledby="{self.ident}-heading">'
            f'<h2 id="{self.ident}-heading">{self.title}</h2>\n{self.body}</section>\n'
        )


def _sections(stats: Stats) -> list[_Section]:
    return [
        _Section("distributions", "Distributions", _distributions(stats)),
        _Section("next-token", "The real next token", _next_token(stats.teaching)),
        _Section("bytes", "What it takes", _bytes(stats)),
        _Section("less", "What less would cost and save", _less(stats)),
        _Section("uncertain", "Most uncertain sequences", _uncertain(stats)),
        _Section("duplicates", "Duplicates", _duplicates(stats)),
    ]


def _lead(stats: Stats) -> str:
    if not stats.sequences_in_all:
        return "It holds no sequences."
    everything = f"{things(stats.sequences_in_all, 'sequence')} and {things(stats.positions_in_all, 'position')}"
    if stats.full:
        return f"Figures of all of it: {everything}."
    share = percent(stats.sequences / stats.sequences_in_all)
    return (
        f"Figures of a sample: {things(stats.sequences, 'sequence')} ({share}) and "
        f"{things(stats.positions, 'position')}, in chunks spread over all {everything}."
    )


def _key_figures(stats: Stats) -> str:
    a_position = None if stats.bytes_a_position is None else number(stats.bytes_a_position)
    teaching = stats.teaching
    by = f"mean, by {whole(stats.count.mean)} candidates" if stats.count and stats.coverage else "of the candidates"
    figures = [
        ("Sequences", whole(stats.sequences_in_all), "all read" if stats.full else f"{stats.sequences:,} read"),
        ("Positions", whole(stats.positions_in_all), "all read" if stats.full else f"{stats.positions:,} read"),
        ("Bytes a position", a_position, f"{size(stats.bytes)} in all"),
        ("Entropy", stats.entropy and number(stats.entropy.mean), "nats, mean"),
        ("Coverage", stats.coverage and percent(stats.coverage.mean), by),
        ("Teacher's accuracy", teaching and percent(teaching.top_1), "top 1, the next token"),
    ]
    tiles = (
        f'<div><dt>{label}</dt><dd class="figure{"" if value else " unknown"}">{value or "not known"}</dd>'
        f"<dd>{about}</dd></div>"
        for label, value, about in figures
    )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _card(title: str, about: str, content: str) -> str:
    return f'<div class="card"><h3>{title}</h3>{f"<p>{about}</p>" if about else ""}{content}</div>\n'


def _cards(cards: Iterable[str], name: str = "cards") -> str:
    return f'<div class="{name}">\n{"".join(cards)}</div>\n'


def _without(reason: str) -> str:
    return f'<p class="without">{reason}</p>'


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return f'<dl class="facts">{"".join(f"<dt>{a}</dt><dd>{b}</dd>" for a, b in facts)}</dl>'


def _table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Sequence[int] = (), name: str = ""
) -> str:
    """A table that scrolls by itself where it is too wide; the first cell of a row is its heading.

    Args:
        caption: what it lists.
        head: of the columns.
        rows: their text, which is escaped.
        texts: columns besides the first that are not numbers.
        name: its class.
    """

    def kind(place: int) -> str:
        return "" if place == 0 or place in texts else ' class="n"'

    named = f' class="{name}"' if name else ""
    top = "".join(f'<th scope="col"{kind(place)}>{escaped(one)}</th>' for place, one in enumerate(head))
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td{kind(place)}>{escaped(one)}</td>" for place, one in enumerate(others, 1))
        lines.append(f'<tr><th scope="row"><bdi>{escaped(first)}</bdi></th>{cells}</tr>\n')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(caption)}">'
        f"<table{named}><caption><span>{escaped(caption)}</span></caption><thead><tr>{top}</tr></thead>\n"
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def _distributions(stats: Stats) -> str:
    return _cards(
        [
            _card("Entropy", _entropy_from(stats), _even("entropy", "Entropy, nats", stats.entropy)),
            _card(
                "Coverage",
                "Probability of the candidates together." + _over_one(stats.coverage),
                _uneven("coverage", "Coverage", stats.coverage, shares, "Not known: the probabilities are of the "
                    "candidates only, or sampled."),
            ),
            _card(
                "Tail",
                "Stored probability of everything else.",
                _uneven("tail", "Tail", stats.tail, shares, "No tail is stored."),
            ),
            _card(
                "Candidates",
                "How many a position has.",
                _uneven("count", "Candidates a position", stats.count, counts, "No position has any."),
            ),
            _card(
                "Lengths",
                "Positions of a sequence.",
                _uneven("length", "Positions of a sequence", stats.length, counts, "There are no sequences."),
            ),
            _card("Positions", "", _positions(stats)),
        ]
    ) + _percentiles(stats)  # fmt: skip


def _entropy_from(stats: Stats) -> str:
    return escaped(f"Nats; {entropy_source(stats.entropies)}.") if stats.entropy is not None else "Not known."


def _over_one(spread: Spread | None) -> str:
    return " A little over 100" + NBSP + "% is from rounding." if spread is not None and spread.greatest > 1 else ""


def _positions(stats: Stats) -> str:
    scored = f" ({percent(stats.scored / stats.positions)})" if stats.positions else ""
    facts = [
        ("Read", whole(stats.positions)),
        ("With a distribution", whole(stats.scored) + scored),
        ("Candidates in them", whole(stats.candidates)),
        ("Trained on", "no loss mask stored" if stats.trained is None else percent(stats.trained)),
    ]
    kinds = {
        "stored": "Entropy stored",
        "candidates and tail": "Entropy a lower bound",
        "draws": "Entropy of the draws",
        "candidates": "Entropy of candidates",
    }
    if stats.impossible:
        facts.append(("With impossible numbers, left out", whole(stats.impossible)))
    return _facts(facts + [(kinds[kind], whole(stats.entropies[kind])) for kind in kinds if stats.entropies.get(kind)])


def _percentiles(stats: Stats) -> str:
    surprise = stats.teaching.surprise if stats.teaching is not None else None
    kinds: list[tuple[str, Spread | None, Callable[[float], str]]] = [
        ("Entropy, nats", stats.entropy, number),
        ("Coverage", stats.coverage, percent),
        ("Tail", stats.tail, percent),
        ("Candidates", stats.count, whole),
        ("Surprise, nats", surprise, number),
        ("Length, positions", stats.length, whole),
    ]
    rows = [
        [label, *map(shown, (one.mean, one.least)), *(_at(one, p, shown) for p in PERCENTILES), shown(one.greatest)]
        for label, one, shown in kinds
        if one is not None
    ]
    if not rows:
        return ""
    head = ["", "mean", "least", *("median" if p == 50 else f"{p}{NBSP}%" for p in PERCENTILES), "greatest"]
    drawn = max(one.percentiles_of for _, one, _ in kinds if one is not None)
    of = f"Percentiles, of up to {things(drawn, 'position')}, and of the sequences' lengths"
    return f'<div class="card">{_table(of, head, rows)}</div>\n'


def _at(spread: Spread, percentile: int, shown: Callable[[float], str]) -> str:
    value = spread.percentiles.get(str(percentile))
    return "" if value is None else shown(value)


def _even(ident: str, title: str, spread: Spread | None) -> str:
    if spread is None or spread.histogram is None:
        return _without("Not known.")
    return histogram_even(ident, title, spread, spread.histogram)


def _uneven(ident: str, title: str, spread: Spread | None, names: BinName, otherwise: str) -> str:
    """A line for each bin; a word if all numbers are the same."""
    if spread is None or spread.histogram is None:
        return _without(otherwise)
    if spread.least == spread.greatest:
        value = percent(spread.least) if names is shares else whole(spread.least)
        return f'<p class="one"><strong>{value}</strong> everywhere</p>'
    return bars_across(ident, title, histogram_bars(spread.histogram, spread.n, names))


def _next_token(teaching: Teaching | None) -> str:
    if teaching is None:
        return _without("No position has both a distribution and a token after it.")
    cards = [
        _card("How well the teacher knows this text", "", _facts(_teaching(teaching))),
        _card("Rank", "Of the real next token; the teacher's best is 1.", _ranks(teaching)),
        _card("Surprise", "Nats: minus its logprob, where that is known.",
              _even("surprise", "Surprise of the real next token, nats", teaching.surprise)),
    ]  # fmt: skip
    return _cards(cards)


def _teaching(teaching: Teaching) -> list[tuple[str, str]]:
    facts = [
        ("Positions", whole(teaching.positions)),
        ("It is the best candidate", percent(teaching.top_1)),
        ("It is no candidate", percent(teaching.outside)),
        ("Its logprob is known", percent(teaching.known)),
        ("Cross-entropy", _bounded(teaching.cross_entropy, teaching.cross_entropy_at_least, _nats)),
        ("Perplexity", _bounded(teaching.perplexity, teaching.perplexity_at_least, _perplexity)),
    ]
    if teaching.cross_entropy is None and teaching.cross_entropy_known is not None:
        facts.append(("Cross-entropy where known", _nats(teaching.cross_entropy_known)))
    return facts


def _bounded(exact: float | None, least: float | None, shown: Callable[[float], str]) -> str:
    if exact is not None:
        return shown(exact)
    return "not known" if least is None else f"at least {shown(least)}"


def _nats(value: float) -> str:
    return f"{number(value)}{NBSP}nats"


def _perplexity(value: float) -> str:
    """It may be more than a float holds, which says nothing of whether it is infinite."""
    return number(value) if math.isfinite(value) else "over " + power_of_ten(300)


def _ranks(teaching: Teaching) -> str:
    bars = histogram_bars(teaching.ranks, teaching.positions, counts) if any(teaching.ranks.counts) else []
    if teaching.unranked:
        bars.append(Bar("not known", teaching.unranked, percent(teaching.unranked), rest=True))
    outside = f"<p>No candidate: {percent(teaching.outside)}." + (
        " Where such a token's rank is not stored, it is not known.</p>" if teaching.unranked else "</p>"
    )
    return (bars_across("rank", "Rank of the real next token", bars) if bars else "") + outside


def _bytes(stats: Stats) -> str:
    columns = sorted((one for one in stats.columns if one.bytes > 0), key=lambda one: (-one.bytes, one.name))
    total = sum(one.bytes for one in columns)
    if not total:
        return _without("Nothing was read.")
    shown = _BARS if len(columns) > _BARS + 1 else len(columns)
    rest = columns[shown:]
    bars = [
        Bar(shortened(readable(one.name), 16), one.bytes_a_position, number(one.bytes_a_position))
        for one in columns[:shown]
    ]
    if rest:
        value = sum(one.bytes_a_position for one in rest)
        bars.append(Bar(f"{len(rest)} others", value, number(value), rest=True))
    rows = [
        [
            shortened(one.name, _TEXT),
            number(one.bytes_a_position),
            "" if one.bits_a_candidate is None else number(one.bits_a_candidate),
            percent(one.bytes / total),
            _MEANINGS.get(one.name, "a column of the data's own"),
        ]
        for one in columns[:_COLUMNS]
    ]
    more = f"; {len(columns) - _COLUMNS} smaller ones are not listed" if len(columns) > _COLUMNS else ""
    read = "" if stats.full else ", in the chunks that were read"
    head = ["column", "bytes a position", "bits a candidate", "share", "what it holds"]
    return _cards(
        [
            _card("Bytes a position, by column", "", bars_across("columns", "Bytes a position, by column", bars)),
            f'<div class="card">{_table(f"Columns{read}{more}", head, rows, texts=[4])}</div>\n',
        ],
        "beside",
    )


def _less(stats: Stats) -> str:
    if not stats.advice:
        return _without(
            "Nothing was tried: there are no distributions, they are too small to keep less of, or they are sampled, "
            "and unbiased only as they are."
        )
    kinds = list(dict.fromkeys(one.setting for one in stats.advice))
    series = [[_point(one) for one in stats.advice if one.setting == kind] for kind in kinds]
    keys = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{marker(7, 7, place)}</svg>{escaped(_names(kind)[0])}</li>'
        for place, kind in enumerate(kinds)
    )
    title = "Bytes a position saved, against KL(kept ‖ stored)"
    chart = scatter("kl", title, "KL(kept ‖ stored), nats: less is better", "bytes a position saved", series)
    head = [
        "setting",
        "candidates",
        "coverage",
        "KL(kept ‖ stored)",
        "KL(stored ‖ kept)",
        "bytes saved",
        "of all bytes",
    ]
    rows = [_advice_row(one) for one in stats.advice]
    about = (
        "KL(kept ‖ stored) is over the candidates, both renormalised: what a trainer that renormalises sees. "
        "KL(stored ‖ kept) is over the whole vocabulary, what is not kept being spread evenly: what is forgotten."
    )
    return _cards(
        [
            _card("Savings and costs", _tried_on(stats), f'<ul class="keys">{keys}</ul>{chart}'),
            f'<div class="card">{_table("Means a position; KL in nats", head, rows)}<p>{about}</p></div>\n',
        ],
        "beside wide",
    )


def _names(setting: str) -> tuple[str, str]:
    return _SETTINGS.get(setting, (setting, setting))


def _setting(advice: Advice, *, short: bool = False) -> str:
    return f"{_names(advice.setting)[short]} {advice.text}".strip()


def _point(advice: Advice) -> Point:
    said = (
        f"{_setting(advice)}: KL {number(advice.kl)} nats, saves {number(advice.saved)} bytes ({percent(advice.share)})"
    )
    return Point(_setting(advice, short=True), advice.kl, advice.saved, said)


def _advice_row(advice: Advice) -> list[str]:
    return [
        _setting(advice),
        whole(advice.candidates),
        "not known" if advice.coverage is None else percent(advice.coverage),
        number(advice.kl),
        "not known" if advice.kl_even is None else number(advice.kl_even),
        number(advice.saved),
        percent(advice.share),
    ]


def _tried_on(stats: Stats) -> str:
    count = sum(end - first for first, end in stats.advice_rows)
    return f"Tried with the real encoder on {things(count, 'sequence')}."


def _uncertain(stats: Stats) -> str:
    if not stats.uncertain:
        return _without("No sequence has a known entropy.")
    rows = [
        [shortened(one.id, _TEXT), whole(one.row), whole(one.scored), number(one.entropy)] for one in stats.uncertain
    ]
    head = ["id", "row", "positions with a distribution", "mean entropy, nats"]
    of = "The highest mean entropies" + ("" if stats.full else ", of the sequences that were read")
    return f'<div class="card">{_table(of, head, rows, name="ids")}</div>\n'


def _duplicates(stats: Stats) -> str:
    among = "sequences" if stats.full else "of the sequences that were read"
    if not stats.duplicates.sequences:
        return _without(f"None: no two {among} have the same tokens." if stats.sequences else "There are no sequences.")
    count = stats.duplicates.sequences
    share = percent(count / stats.sequences) if stats.sequences else ""
    read = "" if stats.full else ", among those that were read"
    have = "has" if count == 1 else "have"
    about = f"<p>{things(count, 'sequence')} ({share}) {have} the tokens of an earlier one{read}.</p>"
    rows = [[str(place), ", ".join(map(whole, group))] for place, group in enumerate(stats.duplicates.examples, 1)]
    listed = _table("Rows with the same tokens: up to ten groups of up to ten", ["group", "rows"], rows, texts=[1])
    return f'<div class="card">{about}{listed if rows else ""}</div>\n'
