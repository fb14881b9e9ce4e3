import base64
import hashlib
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.look.advice import Advice
from logitstore.look.charts import number, percent, power_of_ten, scatter, size, whole
from logitstore.look.collect import Uncertain
from logitstore.look.report import report
from logitstore.look.stats import Column, Duplicates, Stats, stats
from logitstore.look.summaries import Histogram

VOID = {"meta"}
SECTIONS = ["distributions", "next-token", "bytes", "less", "uncertain", "duplicates"]


class Page(HTMLParser):
    """The elements of a page and its text; every element must be closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).replace("\xa0", " ").split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def figures(write):
    """The figures of a dataset with everything: a function, so that a test may change the dataset."""

    def make(**settings):
        return stats(logitstore.open(write(**{"sequences": 12, "positions": 40, "k": 20, **settings})))

    return make


@pytest.fixture
def nothing():
    return Stats(
        full=True, sequences=0, sequences_in_all=0, positions=0, positions_in_all=0, scored=0, impossible=0, trained=None,
        candidates=0, length=None, count=None, coverage=None, tail=None, entropy=None,
        entropies={"stored": 0, "candidates and tail": 0, "draws": 0, "candidates": 0}, teaching=None, bytes=0,
        bytes_a_position=None, columns=[Column("framing", 0, 0.0, None)], uncertain=[],
        duplicates=Duplicates(0, []), advice=[], advice_rows=[],
    )  # fmt: skip


def test_a_page_is_whole_and_refers_to_nothing_outside(figures):
    text = report("data", figures())
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "form", "use", "image", "foreignobject"}
    for tag, attributes in page.elements:
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes
        if "href" in attributes:
            assert tag == "a"
            assert attributes["href"].startswith("#")
    assert not re.search(r"https?:|url\(|@import|data:", text)
    assert len(text) < 100_000
    assert [one["id"] for one in page.all("section")] == SECTIONS
    assert [one["href"] for one in page.all("a")] == [f"#{name}" for name in SECTIONS]


def test_the_policy_lets_in_the_one_style(figures):
    text = report("data", figures())
    policy = next(one["content"] for one in Page(text).all("meta") if "http-equiv" in one)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_a_page_can_be_read_by_other_means_than_eyes(figures):
    page = Page(report("data", figures()))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        assert set(attributes.get("aria-labelledby", "").split()) <= set(ids)
    pictures = [one for one in page.all("svg") if "aria-hidden" not in one]
    assert {one["role"] for one in pictures} == {"img"}
    assert [one["aria-labelledby"].split()[0].removesuffix("-title") for one in pictures] == [
        "entropy", "coverage", "length", "rank", "surprise", "columns", "kl",
    ]  # fmt: skip
    assert len(page.all("table")) == len(page.all("caption")) == 4
    assert {one["scope"] for one in page.all("th")} == {"row", "col"}
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert [len(page.all(tag)) for tag in ("header", "main", "nav", "footer")] == [1, 1, 1, 1]


def test_all_figures_are_there(figures):
    found = figures()
    text = Page(report("my data", found)).text
    teaching = found.teaching
    expected = [
        "my data",
        "Figures of all of it: 12 sequences and 546 positions.",
        number(found.bytes_a_position), size(found.bytes), number(found.entropy.mean), percent(found.coverage.mean),
        "of the candidates, and the tail as one class: a lower bound",
        percent(teaching.top_1), percent(teaching.outside), f"at least {number(teaching.cross_entropy_at_least)} nats",
        f"at least {number(teaching.perplexity_at_least)}", f"{number(teaching.cross_entropy_known)} nats",
        *(number(value) for value in found.entropy.percentiles.values()),
        *(percent(value) for value in found.coverage.percentiles.values()),
        *(whole(value) for value in found.length.percentiles.values()),
        *(number(one.bits_a_candidate) for one in found.columns),
        *(one.name for one in found.columns),
        *(one.id for one in found.uncertain), *(number(one.entropy) for one in found.uncertain),
        *(number(one.kl) for one in found.advice), *(number(one.kl_even) for one in found.advice),
        *(percent(one.share) for one in found.advice),
        "top-k 16", "top-p 0.9", "resolution 1/16", "k 16", "p 0.9", "1/8",
        "20 everywhere", "32\N{EN DASH}63: 100 %", "no loss mask stored",
        "None: no two sequences have the same tokens.",
    ]  # fmt: skip
    assert [one for one in expected if one.replace("\xa0", " ") not in text] == []


def test_the_same_figures_give_the_same_page(figures):
    found = figures()
    assert report("data", found) == report("data", found)


HOSTILE = "</style></title><script>alert(1)</script>\u202e\u2066\x1b\x00\ud800\"'&amp;<!--"


def test_names_and_ids_are_text(figures):
    found = replace(
        figures(),
        uncertain=[Uncertain(HOSTILE, 3, 20, 1.5), Uncertain("x" * 100_000, 4, 20, 1.25)],
        columns=[Column(HOSTILE, 10, 1.0, 1.0), Column("字" * 60, 5, 0.5, 0.5)],
        advice=[replace(one, setting=HOSTILE) for one in figures(name="other").advice[:1]]
        + figures(name="third").advice,
    )
    text = report(HOSTILE, found)
    page = Page(text)
    text.encode()
    assert not page.all("script")
    assert text.count("</style>") == text.count("<!doctype") == 1
    assert "<!--" not in text
    assert not set(text) & set("\u202e\u2066\x1b\x00\ud800")
    shown = "</style></title><script>alert(1)</script>\\u202e\\u2066\\x1b\\x00\\ud800\"'&amp;<!--"
    assert page.text.count(shown) >= 4
    assert len(text) < 100_000


def test_a_dataset_without_anything(nothing):
    page = Page(report("", nothing))
    for said in (
        "It holds no sequences.", "A dataset", "not known", "No tail is stored.", "No position has any.",
        "There are no sequences.", "No position has both a distribution and a token after it.", "Nothing was read.",
        "Nothing was tried", "No sequence has a known entropy.",
    ):  # fmt: skip
        assert said in page.text
    assert not page.all("svg")
    assert [one["id"] for one in page.all("section")] == SECTIONS


def test_sequences_without_distributions(nothing, figures):
    found = replace(
        nothing, sequences=3, sequences_in_all=3, positions=30, positions_in_all=30, length=figures().length
    )
    text = Page(report("data", found)).text
    assert "With a distribution 0 (0 %)" in text
    assert "None: no two sequences have the same tokens." in text


def test_ratios_only(write, rows):
    path = write(normalised="candidates")
    found = stats(logitstore.open(path))
    assert found.coverage is None
    text = Page(report("ratios", found)).text
    assert "Coverage not known of the candidates" in text
    assert "Not known: the probabilities are of the candidates only, or sampled." in text
    assert "of the candidates alone: nothing else is known" in text
    assert "Cross-entropy not known Perplexity not known" in text
    assert "top-k 4" in text


def test_sampled_distributions(tmp_path, quiet):
    random = np.random.default_rng(0)
    with logitstore.Writer(tmp_path / "draws", logit_width=1000) as writer:
        for _ in range(4):
            draws = random.integers(1, 9, (30, 12))
            writer.add_draws(random.integers(0, 12, 30), np.tile(np.arange(12), (30, 1)), draws, draws.sum(1))
    text = Page(report("draws", stats(logitstore.open(tmp_path / "draws")))).text
    assert "or they are sampled, and unbiased only as they are" in text
    assert "Not known: the probabilities are of the candidates only, or sampled." in text


def test_what_is_known_exactly_has_no_bound(figures):
    found = figures()
    exact = replace(found.teaching, cross_entropy=2.0, perplexity=math.exp(2), unranked=0.0, known=1.0)
    text = Page(report("data", replace(found, teaching=exact))).text
    assert "Cross-entropy 2.00 nats Perplexity 7.39" in text
    assert "Cross-entropy where known" not in text
    assert "not known:" not in text


def test_what_no_float_holds(figures):
    found = figures()
    surprised = replace(found.teaching, cross_entropy=800.0, perplexity=math.inf, cross_entropy_known=math.inf)
    endless = replace(found.entropy, mean=math.inf, greatest=math.inf, percentiles={"50": math.nan})
    text = Page(report("data", replace(found, teaching=surprised, entropy=endless))).text
    assert "Cross-entropy 800.0 nats Perplexity over 10³⁰⁰" in text
    assert "Entropy, nats infinite" in text
    assert "unknown" in text


def test_spreads_without_histograms_and_ranks_that_nobody_knows(figures):
    found = figures()
    blank = {name: replace(getattr(found, name), histogram=None) for name in ("entropy", "coverage", "length")}
    ranks = Histogram(found.teaching.ranks.edges, (0,) * len(found.teaching.ranks.counts))
    for unranked in (1.0, 0.0):
        teaching = replace(found.teaching, ranks=ranks, unranked=unranked, surprise=None)
        page = Page(report("data", replace(found, **blank, teaching=teaching)))
        assert [
            one["aria-labelledby"] for one in page.all("svg") if "rank-title" in one.get("aria-labelledby", "")
        ] == (["rank-title rank-desc"] if unranked else [])


def test_a_sample_says_that_it_is_one(figures):
    found = replace(figures(), full=False, sequences_in_all=1_000_000, positions_in_all=45_000_000)
    text = Page(report("data", found)).text
    assert "Figures of a sample: 12 sequences (0.001 %) and 546 positions" in text
    assert "1,000,000 sequences and 45,000,000 positions" in text
    assert "None: no two of the sequences that were read have the same tokens." in text
    assert "Columns, in the chunks that were read" in text
    assert "The highest mean entropies, of the sequences that were read" in text


def test_duplicates_are_listed(figures):
    found = replace(figures(), duplicates=Duplicates(3, [[0, 1_234, 7], [4, 5]]))
    text = Page(report("data", found)).text
    assert "3 sequences (25.0 %) have the tokens of an earlier one." in text
    assert "0, 1,234, 7" in text
    one = Page(report("data", replace(found, full=False, duplicates=Duplicates(1, [])))).text
    assert "1 sequence (8.33 %) has the tokens of an earlier one, among those that were read." in one


def test_many_columns_are_summed_up(figures):
    columns = [Column(f"column-{n}", 100 - n, 1.0, None) for n in range(60)]
    text = Page(report("data", replace(figures(), columns=columns))).text
    assert "52 others: 52.0" in text
    assert "20 smaller ones are not listed" in text
    assert "a column of the data's own" in text


def test_costs_of_nothing_and_settings_that_save_nothing(figures):
    advice = [
        Advice("top_k", 4.0, 4.0, None, 0.0, None, -3.0, -0.1),
        Advice("top_k", 2.0, 2.0, None, math.nan, None, 0.0, 0.0),
    ]
    page = Page(report("data", replace(figures(), advice=advice)))
    assert "k 4" in page.text
    assert "saves -3.00 bytes (-10.0 %)" in page.text
    assert [one["viewbox"] for one in page.all("svg") if one.get("aria-labelledby", "").startswith("kl")]


def test_labels_of_points_stay_inside_and_apart(figures):
    chart = scatter("x", "x", "x", "y", list(_points()))
    places = re.findall(r'<text class="label( end| middle)?" x="([\d.]+)" y="([\d.]+)">([^<]+)<', chart)
    boxes = []
    for anchor, x, y, label in places:
        width = 6.2 * len(label)
        left = float(x) - {"": 0, " end": width, " middle": width / 2}[anchor]
        boxes.append((left, float(y) - 9, left + width, float(y) + 2))
    assert len(boxes) == 5
    assert all(box[0] >= 0 and box[2] <= 370 for box in boxes)
    for n, a in enumerate(boxes):
        for b in boxes[n + 1 :]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def _points():
    from logitstore.look.charts import Point

    yield [Point("k 32", 1e-3, 10, ""), Point("k 16", 1.2e-3, 11, ""), Point("k 8", 1e-2, 40, "")]
    yield [Point("p 0.95", 1.1e-3, 10.5, ""), Point("p 0.8", 9e-3, 39, "")]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0), "0"), (number(2.583), "2.58"), (number(128.83), "128.8"), (number(12345.6), "12,346"),
        (number(0.0454), "0.0454"), (number(0.28), "0.280"), (number(0.0000972), "9.7\xd710⁻⁵"), (number(math.inf), "infinite"),
        (number(1.5e20), "1.5\xd710²⁰"), (whole(1048576), "1,048,576"), (whole(497.148), "497.1"), (whole(math.nan), "unknown"),
        (percent(0), "0\xa0%"), (percent(1), "100\xa0%"), (percent(0.907), "90.7\xa0%"), (percent(0.9999999), "99.999\xa0%"),
        (percent(0.00015), "0.015\xa0%"), (percent(1e-9), "under 0.001\xa0%"), (percent(1.0076), "100.8\xa0%"),
        (size(0), "0\xa0B"), (size(999), "999\xa0B"), (size(5187888), "5.19\xa0MB"), (size(2e18), "2,000\xa0PB"),
        (power_of_ten(-4), "0.0001"), (power_of_ten(-7), "10⁻⁷"), (power_of_ten(1), "10"),
    ],
)  # fmt: skip
def test_numbers_are_for_people(shown, expected):
    assert shown == expected


ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.exists():
        pytest.skip("needs /usr/bin/chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield opened
        opened.close()


def test_in_a_browser(browser, figures, nothing, tmp_path):
    hostile = replace(figures(), uncertain=[Uncertain("x" * 300 + HOSTILE, 3, 20, 1.5)])
    shots = Path(os.environ.get("LOGITSTORE_SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    for name, text in {"report": report("n" * 150, hostile), "report-empty": report("empty", nothing)}.items():
        file = tmp_path / f"{name}.html"
        file.write_text(text, encoding="utf-8")
        for scheme, width, forced in (
            ("light", 1280, "none"), ("dark", 1280, "none"), ("light", 390, "none"), ("dark", 390, "none"),
            ("light", 1280, "active"),
        ):  # fmt: skip
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, forced_colors=forced
            )
            page = context.new_page()
            said, asked = [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            # An element may stick out only of one that scrolls by itself.
            assert (
                page.evaluate(
                    """() => [...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll > *, svg"))
                    .filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5).map((one) => one.outerHTML)"""
                )
                == []
            )
            assert page.evaluate("getComputedStyle(document.body).fontSize") == "14px"  # the style was let in
            page.screenshot(
                path=shots / f"{name}-{scheme}-{width}{'-forced' * (forced == 'active')}.png", full_page=True
            )
            context.close()
            assert said == []
            assert asked == [file.as_uri()]
