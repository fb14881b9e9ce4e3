"""The page of `view` in a real browser: what it shows, keys, what it may not do, and pictures of it to look at.

`LOGITSTORE_SCREENSHOTS` names a directory where the pictures go.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from pull_rows import local  # noqa: F401 - a fixture

import logitstore
from logitstore.convert import convert
from logitstore.look.page import page
from logitstore.look.serve import Server
from logitstore.tokenizer import Tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
DESKTOP, PHONE = (1280, 900), (390, 844)
HOSTILE = {
    0: b"plain ", 1: b"<script>alert(1)</script>", 2: b"</style>", 3: b"-->", 4: b"<!--", 5: b"\xf0\x9f", 6: b"\x98\x80", 7: b"\n", 8: b"\t",
    9: "\u05e9\u05dc\u05d5\u05dd".encode(), 10: "\u202e".encode(), 11: b"x" * 900, 12: b"\x1b[31m", 13: b"&amp;<b>", 14: b"</script>",
    15: b"\xff", 16: b"", 17: "\u200d".encode(), 18: "\u6f22\u5b57".encode(), 19: b"<img src=x onerror=alert(1)>",
}  # fmt: skip
WORDS = {i: f" word{i}".encode() for i in range(500)} | {0: b"\n", 1: b".", 2: b" <script>alert(1)</script>"}


@pytest.fixture(scope="module")
def chromium():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("needs Playwright's Python package: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """A function that opens a page; a message in the console, an error, a dialog or another request fails the test."""
    contexts, wrong = [], []

    def go(dataset=None, *, url=None, size=DESKTOP, fragment="", ready="#panel table", **options):
        about = {
            name: options.pop(name) for name in ("color_scheme", "forced_colors", "reduced_motion") if name in options
        }
        if url is None:
            file = tmp_path / f"page{len(contexts)}.html"
            file.write_text(page(dataset, **options), encoding="utf-8")
            url = file.as_uri()
        context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, **about)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(10_000)
        tab.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        allowed = (url, f"{url}api/") if url.startswith("http") else (url,)
        tab.on(
            "request", lambda request: request.url.partition("#")[0].startswith(allowed) or wrong.append(request.url)
        )
        tab.goto(url + fragment)
        tab.wait_for_selector(ready)
        return tab

    go.wrong = wrong
    yield go
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    from importlib.resources import as_file, files

    path = tmp_path_factory.mktemp("view") / "demo"
    with (
        warnings.catch_warnings(),
        as_file(files("logitstore") / "demo" / "llama-server-completion.jsonl.zst") as capture,
    ):
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        convert([capture], path, teacher="google/gemma-3-270m", logit_width=262_144)
    return logitstore.open(path)


def write(path, pieces, sequences, k=12, seed=0, sharper=1.0, **settings):
    """A dataset of some sequences of tokens, by id."""
    random = np.random.default_rng(seed)
    width = len(pieces)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        with logitstore.Writer(
            path, tokenizer=Tokenizer.from_pieces(pieces), logit_width=width, **{"teacher": "some/teacher", **settings}
        ) as writer:
            for name, given in sequences.items():
                tokens = np.asarray(given, int)
                logits = -np.sort(-random.normal(0, 2.5, (len(tokens), k)), axis=1) * sharper
                logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.1
                ids = (random.integers(0, width, (len(tokens), 1)) + np.arange(k) * 7) % width
                ids[:-1, 1] = np.where(
                    (ids[:-1] == tokens[1:, None]).any(axis=1) | (tokens[1:] % 3 == 0), ids[:-1, 1], tokens[1:]
                )
                writer.add(tokens, ids, logprobs.astype(np.float32), id=name)
    return logitstore.open(path)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    tokens = [*HOSTILE, 0, 9, 9, 0]
    sequences = {"<script>alert(2)</script>": tokens, "": [], "id" * 900: [0, 5]}
    return write(tmp_path_factory.mktemp("view") / "hostile", HOSTILE, sequences, k=2, teacher="<b>teacher</b>")


def words(count, seed):
    return np.random.default_rng(seed).zipf(1.3, count) % 500


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two datasets; of the second one's sequences, one is missing and another has other tokens."""
    base = tmp_path_factory.mktemp("pair")
    first = {f"s{i}": words(300, i) for i in range(4)}
    second = {"s0": first["s0"], "s1": first["s1"], "s3": words(300, 9)}
    return write(base / "first", WORDS, first), write(
        base / "second", WORDS, second, sharper=0.6, teacher="other/teacher"
    )


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return write(tmp_path_factory.mktemp("view") / "long", WORDS, {"long": words(20_000, 3)})


@pytest.fixture
def serving():
    """A function that serves a dataset and returns the address."""
    running = []

    def start(dataset, **options):
        server = Server(dataset, **options)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        running.append((server, thread))
        return server.url

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join(10)
        server.server_close()


def until(holds, seconds=10):
    """Wait for something; Playwright's own way of it is stopped by the page's policy."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def selected(tab, pane=0):
    """The position that is selected, as assistive technology is told."""
    name = tab.get_attribute(f"#text-{pane}", "aria-activedescendant")
    assert tab.get_attribute(f"#{name}", "aria-selected") == "true"
    assert tab.locator(f"#text-{pane} [aria-selected=true]").count() == 1
    return int(name.rpartition("-")[2])


def press(tab, *keys):
    for key in keys:
        tab.keyboard.press(key)


def rows(tab, column=0):
    """(token, probability) of each row of a table."""
    lines = tab.locator(f".column-{column} tbody tr")
    return [
        (lines.nth(i).locator("td").nth(1).inner_text(), lines.nth(i).locator(".value").inner_text())
        for i in range(lines.count())
    ]


def test_what_comes_after_my_favorite_color_is(visit, demo):
    tab = visit(demo)
    press(tab, "/")
    tab.keyboard.type("my FAVORITE color is")
    assert tab.inner_text("#matches") == "1 of 1"
    assert tab.inner_text("#panel h2").endswith("My favorite color is")
    shown = rows(tab)
    assert shown[:3] == [("␣blue", "12.3 %"), ("␣red", "9.60 %"), ("␣the", "6.81 %")]
    assert shown[5][0].split() == ["␣yellow", "comes", "next"]
    assert shown[-1] == ("everything else", "41.1 %")
    assert "at least 3.21 nats" in tab.inner_text(".facts")
    widths = tab.eval_on_selector_all("#panel .bar", "bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert len(widths) == 10  # the rest has none: it is of many tokens
    assert widths == sorted(widths, reverse=True)
    assert widths[1] / widths[0] == pytest.approx(9.60 / 12.3, rel=0.03)
    press(tab, "Escape")
    assert tab.evaluate("document.activeElement.id") == "text-0"


def test_search_goes_from_match_to_match(visit, demo):
    tab = visit(demo)
    tab.fill("#query", "COLOR yellow")
    assert tab.inner_text("#matches") == "1 of 2"
    first = selected(tab)
    assert tab.inner_text(f"#text-0-{first}") == " yellow"
    assert tab.locator("#text-0 .hit").count() == 4
    tab.focus("#query")
    press(tab, "Enter")
    assert tab.inner_text("#matches") == "2 of 2"
    assert selected(tab) > first
    press(tab, "Enter")
    assert selected(tab) == first
    press(tab, "Shift+Enter")
    assert tab.inner_text("#matches") == "2 of 2"
    tab.fill("#query", "nowhere to be found")
    assert tab.inner_text("#matches") == "none"
    tab.fill("#query", "")
    assert tab.locator("#text-0 .hit").count() == 0


def test_keys(visit, pair):
    tab = visit(pair[0])
    tab.focus("#text-0")
    assert selected(tab) == 0
    for keys, position in (
        (["ArrowRight"], 1), (["ArrowRight", "ArrowRight"], 3), (["ArrowLeft"], 2), (["Home", "ArrowLeft"], 0), (["PageDown"], 50), (["PageUp"], 0),
        (["End"], 299), (["ArrowRight"], 299), (["PageUp"], 249), (["Home"], 0),
    ):  # fmt: skip
        press(tab, *keys)
        assert selected(tab) == position, keys
        assert tab.evaluate("document.activeElement.id") == "text-0"
    box = lambda: tab.locator("#text-0 .selected").bounding_box()  # noqa: E731
    press(tab, "ArrowRight", "ArrowRight", "ArrowRight")
    before = box()
    press(tab, "ArrowDown")
    below = box()
    assert 10 < below["y"] - before["y"] < 120
    press(tab, "ArrowUp")
    assert abs(box()["y"] - before["y"]) < 1
    press(tab, "End")
    pane, last = tab.locator("#text-0").bounding_box(), box()
    assert pane["y"] <= last["y"] <= pane["y"] + pane["height"]
    press(tab, "u")
    most = selected(tab)
    entropy = lambda: float(tab.inner_text("#chart-value").split()[1])  # noqa: E731
    highest = entropy()
    press(tab, "u")
    assert selected(tab) != most
    assert entropy() <= highest
    press(tab, "]")
    until(lambda: tab.inner_text("#current .row") == "row 1")
    press(tab, "[")
    until(lambda: tab.inner_text("#current .row") == "row 0")
    assert tab.is_disabled("#previous")


def test_one_tab_stop_for_the_text(visit, pair):
    tab = visit(pair[0])
    stops = []
    while "skip" not in stops[1:]:
        press(tab, "Tab")
        stops.append(tab.evaluate("document.activeElement.id || document.activeElement.name || ''"))
        assert len(stops) < 20
    assert [stop for stop in stops if stop.startswith("text")] == ["text-0"]
    tab.focus("#skip")
    press(tab, "Enter")
    assert tab.evaluate("document.activeElement.id") == "text-0"


def test_what_a_screen_reader_is_told(visit, demo):
    tab = visit(demo)
    for role in ("banner", "main", "complementary", "contentinfo", "search", "navigation"):
        assert tab.get_by_role(role).count() == 1, role
    assert tab.get_by_role("listbox", name="Text of sequence 0, 49 tokens").count() == 1
    assert tab.get_by_role("option").count() == 49
    assert tab.get_by_role("img", name="Entropy along the sequence").get_attribute("aria-label").count("nats") >= 3
    assert tab.get_by_role("table").get_by_role("row").count() == 12
    for name in ("Previous sequence", "Next sequence", "Previous match", "Next match", "Theme: auto"):
        assert tab.get_by_role("button", name=name).count() == 1
    assert tab.get_by_label("Find text in this sequence").count() == 1
    tab.focus("#text-0")
    press(tab, "ArrowRight")
    until(lambda: tab.text_content("#said").startswith(" yellow, position 1. "))
    said = tab.inner_text("#said")
    assert "entropy at least" in said
    assert "likely next: .; " not in said
    assert " %" in said
    names = tab.eval_on_selector_all(
        "button, input, select",
        "all => all.filter(e => !e.closest('dialog')).map(e => e.labels?.length || e.textContent || e.ariaLabel)",
    )
    assert all(names)


def test_text_of_tokens_stays_text(visit, hostile):
    tab = visit(hostile)
    texts = tab.eval_on_selector_all("#text-0 [role=option]", "all => all.map(option => option.textContent)")
    assert texts[:5] == ["plain ", "<script>alert(1)</script>", "</style>", "-->", "<!--"]
    assert texts[5:9] == ["▫", "\N{GRINNING FACE}", "↵\n", "⇥\t"]
    assert texts[10] == "\\u202e"
    assert texts[12:15] == ["\\x1b[31m", "&amp;<b>", "</script>"]
    assert texts[16:18] == ["▫", "▫"]
    assert tab.evaluate("document.scripts.length") == 2
    assert tab.evaluate("document.images.length") == 0
    assert tab.evaluate("document.styleSheets.length") == 1
    assert tab.inner_text("#about").startswith("<b>teacher</b> · 3 sequences")
    styles = "all => [...new Set(all.map(option => getComputedStyle(option).unicodeBidi))]"
    assert tab.eval_on_selector_all("#text-0 [role=option]", styles) == ["isolate"]
    assert all(
        box["width"] > 1
        for box in tab.eval_on_selector_all(
            "#text-0 [role=option]", "all => all.map(o => o.getBoundingClientRect().toJSON())"
        )
    )
    for t in range(len(texts)):  # the table of every position
        tab.evaluate("t => document.getElementById(`text-0-${t}`).click()", t)
        assert selected(tab) == t
    tab.click("#text-0-5")
    assert "\\xf0\\x9f" in tab.inner_text(".about-token")
    tab.click("#next")
    tab.wait_for_selector("#notice p")
    assert tab.inner_text("#notice") == "This sequence has no positions."
    tab.click("#next")
    tab.wait_for_selector("#panel table")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.click("#current")
    assert tab.locator("#rows button").count() == 3
    assert "<script>alert(2)</script>" in tab.inner_text("#rows")
    assert "(empty id)" in tab.inner_text("#rows")
    tab.locator("#rows button").first.click()
    until(lambda: tab.inner_text("#current .row") == "row 0")


def test_the_policy_is_in_force(visit, hostile):
    tab = visit(hostile)
    refused = tab.evaluate(
        """async () => {
          const seen = [];
          document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
          try { document.body.innerHTML += "<b>"; } catch (error) { seen.push(error.name); }
          return seen;
        }"""
    )
    assert "TypeError" in refused
    assert all("TrustedHTML" in said for said in visit.wrong)
    visit.wrong.clear()  # what the browser says of it


def test_shades_and_their_legend(visit, demo):
    tab = visit(demo)
    shades = "[...document.querySelectorAll('#text-0 [role=option]')].map(o => getComputedStyle(o).backgroundColor)"
    entropy = tab.evaluate(shades)
    assert len(set(entropy)) > 3
    assert "what comes after" in tab.inner_text("#meaning")
    assert tab.locator("#scale li").count() == 8
    tab.get_by_label("Surprise").check(force=True)
    assert "before it came" in tab.inner_text("#meaning")
    assert "outside the candidates" in tab.inner_text("#scale")
    surprise = tab.evaluate(shades)
    assert surprise != entropy
    assert surprise[0] == "rgba(0, 0, 0, 0)"  # nothing stands before the first token
    assert tab.inner_text("#chart-title").startswith("Surprise")


def test_a_token_outside_the_candidates_has_the_strongest_shade(visit, tmp_path):
    dataset = write(tmp_path / "outside", {i: b" %d" % i for i in range(40)}, {"a": [3, 39, 3, 38, 3]}, k=4)
    tab = visit(dataset, fragment="#row=0&position=2")
    outside = tab.locator("#text-0 .outside")
    assert outside.count() > 0
    assert "s7" in outside.first.get_attribute("class")
    tab.get_by_label("Surprise").check(force=True)
    outside.first.click()
    assert "outside the candidates" in tab.inner_text(".facts")


CONTRAST = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (color) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const worst = [];
  const backdrop = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; } };
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.closest("dialog, script, style, noscript, svg, :disabled")) continue;
    const r = ratio(getComputedStyle(e).color, backdrop(e));
    if (r < 4.5) worst.push([e.tagName, e.className, e.textContent.slice(0, 20), r]);
  }
  return worst;
}"""


def test_text_is_legible_on_every_shade(visit, hostile):
    for scheme in ("light", "dark"):
        tab = visit(hostile, color_scheme=scheme)
        for mode in ("Entropy", "Surprise"):
            tab.get_by_label(mode, exact=True).check(force=True)
            for level in range(8):
                tab.evaluate(
                    "n => document.querySelectorAll('#text-0 .t').forEach((t) => { t.className = `t e${n} s${n}`; })",
                    level,
                )
                assert tab.evaluate(CONTRAST) == [], (scheme, mode, level)
        tab.fill("#query", "plain")
        assert tab.evaluate(CONTRAST) == []


def test_themes(visit, demo):
    ground = "getComputedStyle(document.body).backgroundColor"
    tab, dark = visit(demo, color_scheme="light"), visit(demo, color_scheme="dark")
    assert tab.evaluate(ground) != dark.evaluate(ground)
    seen = []
    for _ in range(3):
        tab.click("#theme")
        seen.append((tab.inner_text("#theme").split()[1], tab.evaluate(ground)))
    assert [name for name, _ in seen] == ["Light", "Dark", "Auto"]
    assert seen[0][1] == seen[2][1]
    assert seen[1][1] == dark.evaluate(ground)
    visit(demo, forced_colors="active", reduced_motion="reduce")


def test_the_pointer_shows_and_leaves(visit, demo):
    tab = visit(demo)
    before = tab.inner_text("#panel h2")
    tab.hover("#text-0-20")
    tab.wait_for_selector("#panel >> text=under the pointer")
    assert tab.inner_text("#panel h2") != before
    assert selected(tab) == 0
    tab.hover("h1")
    until(lambda: tab.inner_text("#panel h2") == before)
    tab.click("#text-0-20")
    assert selected(tab) == 20


def test_the_chart(visit, demo):
    tab = visit(demo)
    line = tab.get_attribute("#chart .line-0", "d")
    assert line.count("L") + line.count("M") == 48
    box = tab.locator("#chart svg").bounding_box()
    tab.mouse.click(box["x"] + box["width"] - 9, box["y"] + 30)
    assert selected(tab) == 48
    assert tab.get_attribute("#chart .cursor", "visibility") == "visible"


def test_side_by_side(visit, pair):
    tab = visit(pair[0], other=pair[1])
    assert tab.locator("[role=listbox]").count() == 2
    tab.click("#text-1-7")
    assert selected(tab, 0) == selected(tab, 1) == 7
    first, second = rows(tab, 0), rows(tab, 1)
    assert len(first) > 8 < len(second)
    assert first != second
    boxes = [tab.locator(f".column-{i}").bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]
    assert tab.locator("#chart .line").count() == 2
    assert tab.inner_text("#chart-legend").split() == ["first", "second"]
    tab.focus("#text-0")
    press(tab, "End")
    assert selected(tab, 1) == 299
    for says in ("no sequence with this id", "other tokens"):
        press(tab, *("]",) * (2 if says.startswith("no") else 1))
        tab.wait_for_selector(f"#notice >> text={says}")
        assert tab.locator("#text-1 [role=option]").count() == 0
        assert tab.locator("#chart .line").count() == 1


def test_20_000_tokens(visit, long):
    tab = visit(long)
    assert tab.locator("#text-0 [role=option]").count() == 20_000
    blocks = tab.eval_on_selector_all("#text-0 > div", "all => all.map(block => block.childElementCount)")
    assert sum(blocks) == 20_000
    assert max(blocks) <= 512
    assert tab.evaluate("getComputedStyle(document.querySelector('#text-0 > div')).contentVisibility") == "auto"
    assert len(tab.get_attribute("#chart .line-0", "d")) < 30_000
    tab.focus("#text-0")
    press(tab, "End", "ArrowUp", "ArrowLeft")
    assert 19_900 < selected(tab) < 19_999
    assert tab.locator("#text-0 .selected").is_visible()
    tab.fill("#query", "<script>")
    assert tab.inner_text("#matches").startswith("1 of ")
    assert tab.evaluate("document.scripts.length") == 2


def test_the_address_says_where_to_begin(visit, pair):
    tab = visit(pair[0], fragment="#row=2&position=17")
    assert selected(tab) == 17
    assert tab.inner_text("#current .row") == "row 2"
    tab.focus("#text-0")
    press(tab, "ArrowRight")
    until(lambda: tab.evaluate("location.hash") == "#row=2&position=18")
    for fragment in ("#row=x&position=-1", "#\u2028%%"):
        assert visit(pair[0], fragment=fragment).locator("#text-0 .selected").count() == 1


def test_served(visit, serving, local):  # noqa: F811
    tab = visit(url=serving(logitstore.open(local)))
    assert tab.inner_text("#current .row") == "row 0"
    press(tab, "]", "]")
    until(lambda: tab.inner_text("#current .row") == "row 2")
    tab.click("#current")
    tab.wait_for_selector("#rows [aria-current]")
    assert tab.inner_text("#rows-shown") == "1 to 49 of 49"
    tab.fill("#to-row", "48")
    press(tab, "Enter")
    until(lambda: tab.inner_text("#current .row") == "row 48")
    assert tab.is_disabled("#next")
    tab.click("#current")
    tab.fill("#to-row", "49")
    press(tab, "Enter")
    tab.wait_for_selector("#chooser-problem >> text=There is no row 49")
    tab.fill("#to-row", "")
    tab.select_option("#split", "test")
    until(lambda: tab.inner_text("#rows-shown") == "1 to 9 of 9")
    tab.locator("#rows button").nth(3).click()
    until(lambda: tab.inner_text("#current .row") == "row 3")
    name = logitstore.open(local).split("test")[3].id
    assert tab.inner_text("#current .id") == name
    assert not tab.is_disabled("#next")


def test_served_in_parts_and_with_damage(visit, serving, tmp_path):
    dataset = write(tmp_path / "d", WORDS, {f"s{i}": words(90, i) for i in range(9)}, chunk_candidates=1100)
    (shard,) = (tmp_path / "d").glob("data/train/*.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    url = serving(dataset, positions=40)
    bad = next(row for row in range(9) if not readable(dataset, row))
    tab = visit(url=url)
    assert "Positions 0 to 39 of 90 are shown." in tab.inner_text("#notice")
    tab.click("text=Part after")
    tab.wait_for_selector("#notice >> text=Positions 40 to 79")
    assert "position 40 of 90" in tab.inner_text(".about-token")
    assert "nothing stands before it" not in tab.inner_text(".facts")
    for row in range(1, bad + 1):
        tab.click("#next")
        until(lambda row=row: tab.inner_text("#current").split("\n")[0] == f"row {row}")
    tab.wait_for_selector("#notice .problem")
    assert "chunk" in tab.inner_text("#notice")
    assert tab.inner_text("#chart-value") == ""
    assert tab.get_attribute("#text-0", "aria-activedescendant") is None
    assert tab.evaluate("location.hash") == f"#row={bad}"
    assert tab.locator("#text-0 [role=option]").count() == 0
    press(tab, "ArrowRight", "u", "/", "a", "Escape")
    tab.get_by_label("Surprise").check(force=True)
    good = next(row for row in range(9) if readable(dataset, row))
    for _ in range(abs(good - bad)):
        tab.click("#next" if good > bad else "#previous")
    until(lambda: tab.locator("#text-0 [role=option]").count() == 40)
    assert all("500" in said for said in visit.wrong)
    visit.wrong.clear()


def readable(dataset, row):
    try:
        return bool(dataset[row])
    except logitstore.CorruptDataError:
        return False


@pytest.mark.parametrize("size", [(640, 450), (1280, 500)])
def test_magnified_the_page_scrolls_and_nothing_is_lost(visit, pair, demo, size):
    for tab in (visit(demo, size=size), visit(pair[0], other=pair[1], size=size)):
        edges = "all => all.map(e => e.getBoundingClientRect()).map(box => [box.left, box.top, box.right, box.bottom])"
        texts = tab.eval_on_selector_all(".text", edges)
        (reading,) = tab.eval_on_selector_all(".reading", edges)
        (panel,) = tab.eval_on_selector_all(".panel", edges)
        assert all(bottom - top > 100 for _, top, _, bottom in texts)
        assert max(bottom for *_, bottom in texts) <= reading[3] + 1 <= panel[1]
        assert tab.evaluate("document.documentElement.scrollWidth") <= size[0]
        tab.focus("#text-0")
        press(tab, "End")
        assert tab.locator("#text-0 .selected").bounding_box()["y"] < size[1]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(visit, demo, pair, hostile, tmp_path, size, scheme):
    folder = Path(os.environ.get("LOGITSTORE_SCREENSHOTS", tmp_path / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, dataset, options in (
        ("single", demo, {}),
        ("both", pair[0], {"other": pair[1]}),
        *([("hostile", hostile, {})] if (size, scheme) == (DESKTOP, "light") else []),
    ):
        tab = visit(dataset, size=size, color_scheme=scheme, fragment="#row=0&position=4", **options)
        if name == "single":
            tab.fill("#query", "My favorite color is")
        tab.mouse.move(1, 1)
        file = folder / f"view-{name}-{scheme}-{size[0]}.png"
        tab.screenshot(path=file)
        assert file.stat().st_size > 10_000
        assert tab.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert tab.evaluate("document.documentElement.scrollHeight") <= size[1]
        inside = "([pane]) => pane.getBoundingClientRect().height"
        assert tab.eval_on_selector_all("#text-0", inside) > 60


def is_in_sight(tab, pane=0):
    """Whether the selected token is inside its pane and the window."""
    return tab.evaluate(
        """(pane) => {
          const place = document.getElementById(`text-${pane}`);
          const box = place.querySelector(".selected").getClientRects()[0];
          const around = place.getBoundingClientRect();
          return box.top >= Math.max(0, around.top) - 1 && box.bottom <= Math.min(innerHeight, around.bottom) + 1;
        }""",
        pane,
    )


SIZES = [(1280, 900), (1366, 657), (1280, 650), (390, 844), (320, 640)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_selected_token_is_always_in_sight(visit, pair, size):
    for options in ({}, {"other": pair[1]}):
        tab = visit(pair[0], size=size, fragment="#row=0&position=290", **options)
        panes = range(1 + len(options))
        seen = lambda: until(lambda: all(is_in_sight(tab, pane) for pane in panes))  # noqa: B023, E731
        seen()
        assert all(tab.locator(f"#text-{pane}").bounding_box()["height"] >= 90 for pane in panes)
        tab.focus("#text-0")
        for keys in (("Home",), ("PageDown",), ("End",), ("ArrowUp",) * 4, ("u",), ("u",)):
            press(tab, *keys)
            seen()
        tab.fill("#query", "word7")
        seen()
        tab.evaluate("location.hash = '#row=1&position=250'")
        until(lambda: tab.inner_text("#current .row") == "row 1")  # noqa: B023
        seen()
        tab.set_viewport_size({"width": size[0] - 20, "height": size[1] - 20})
        seen()
        folder = os.environ.get("LOGITSTORE_SCREENSHOTS")
        if folder:
            tab.screenshot(path=Path(folder) / f"sight-{len(panes)}-{size[0]}x{size[1]}.png")


def one(path, tokens, ids, probabilities, **settings):
    """A dataset of one sequence, `a`; the tokenizer knows ids below 10."""
    tokenizer = Tokenizer.from_pieces({i: b" w%d" % i for i in range(10)})
    columns = settings.pop("columns", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        with logitstore.Writer(path, tokenizer=tokenizer, logit_width=10, teacher="t", **settings) as writer:
            writer.add(tokens, ids, np.log(probabilities).astype(np.float32), id="a", **columns)
    return logitstore.open(path)


def drawn(path, **columns):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        tokenizer = Tokenizer.from_pieces({i: b" w%d" % i for i in range(10)})
        with logitstore.Writer(path, tokenizer=tokenizer, logit_width=10, teacher="t") as writer:
            writer.add_draws([1, 2, 3], [[4, 9, 7], [7, 1, 5], [4, 5, 6]], [[30, 10, 10]] * 3, 50, id="a", **columns)
    return logitstore.open(path)


def test_a_stored_target_that_is_no_candidate(visit, tmp_path):
    stored = {"target_logprob": np.log([0.3, 0.1, np.nan]), "target_rank": [2, 3, 0]}
    tab = visit(drawn(tmp_path / "d", **stored), candidates=1)
    assert rows(tab)[0] == ("␣w4", "60.0 % (30 of 50)")
    assert rows(tab)[1][0].split() == ["␣w2", "comes", "next"]
    assert rows(tab)[1][1] == "30.0 %"
    assert rows(tab)[2] == ("2 more candidates", "40.0 %")
    assert tab.locator(".rank").all_inner_texts() == ["1", "", ""]
    assert "not among the 3 candidates; its rank is 2" in tab.inner_text("#panel")


def test_entropies_say_what_they_are_of(visit, tmp_path):
    tokens, ids, p = [1, 2, 3], [[4, 9]] * 3, [[0.6, 0.2]] * 3
    bound = one(tmp_path / "bound", tokens, ids, p)
    partly = one(tmp_path / "partly", tokens, ids, p, columns={"entropy": [1.5, np.nan, np.nan]})
    exact = one(tmp_path / "exact", tokens, ids, p, columns={"entropy": [1.5] * 3})
    ratios = one(tmp_path / "ratios", tokens, ids, p, normalised="candidates")
    draws = drawn(tmp_path / "draws")
    for dataset, title, meaning, panel in (
        (bound, "(nats, at least)", "nats (at least).", "entropy at least "),
        (partly, "(nats, at least where not stored)", "nats (at least where not stored).", "entropy 1.50 nats"),
        (exact, "(nats)", "in nats.", "entropy 1.50 nats"),
        (ratios, "(nats, among the candidates)", "nats (among the candidates).", "entropy among the candidates "),
        (draws, "(nats, of the draws)", "nats (of the draws).", "entropy of the draws "),
    ):
        tab = visit(dataset)
        assert tab.inner_text("#chart-title") == f"Entropy along the sequence {title}"
        assert tab.inner_text("#meaning").endswith(meaning)
        assert panel in tab.inner_text(".facts")
        assert title in tab.get_attribute("#chart svg", "aria-label")
        tab.get_by_label("Surprise").check(force=True)
        assert tab.inner_text("#chart-title") == "Surprise along the sequence (nats)"
    tab = visit(exact, other=draws, size=(320, 640))
    assert tab.inner_text("#chart-title") == "Entropy (nats, exact / of the draws)"
    tab = visit(bound, other=draws)
    assert tab.inner_text("#chart-legend").split("\n") == ["bound at least", "draws of the draws"]
    assert tab.inner_text("#meaning").endswith("bound: at least. draws: of the draws.")
    assert tab.inner_text("#notice") == "It could not be checked that both have the same vocabulary."


def test_impossible_numbers(visit, tmp_path, monkeypatch):
    from logitstore.look import page_data

    dataset = one(tmp_path / "d", [1, 2, 3], [[4, 9]] * 3, [[0.6, 0.2]] * 3)
    real = page_data.measure

    def measure(sequence):
        logprobs = sequence.logprobs.copy()
        logprobs[2] = 5
        return real(type(sequence).of(vars(sequence) | {"logprobs": logprobs}))

    monkeypatch.setattr(page_data, "measure", measure)
    tab = visit(dataset)
    tab.click("#text-0-1")
    assert "its numbers are impossible: see `logitstore validate --deep`" in tab.inner_text(".facts")
    assert tab.locator("#panel table").count() == 0
    assert " %" in tab.inner_text(".facts") or "outside" in tab.inner_text(".facts")
    tab.click("#text-0-2")
    assert "the numbers before it are impossible" in tab.inner_text(".facts")
    assert tab.locator("#panel table").count() == 1


def test_percentages_are_rounded_once(visit, tmp_path):
    tab = visit(one(tmp_path / "d", [1, 2], [[4], [5]], [[0.242499], [0.5]], values="float32"))
    assert rows(tab)[0] == ("␣w4", "24.2 %")


def test_the_address_follows_and_leads(visit, pair):
    tab = visit(pair[0])
    press(tab, "]")
    until(lambda: tab.evaluate("location.hash") == "#row=1&position=0")
    assert tab.get_attribute("#current", "aria-label") == "Choose a sequence; row 1, id s1"
    until(lambda: tab.text_content("#said").startswith("Sequence in row 1, id s1, 300 positions. "))
    tab.click("#next")
    until(lambda: tab.evaluate("location.hash") == "#row=2&position=0")
    tab.evaluate("location.hash = '#row=3&position=77'")
    until(lambda: tab.inner_text("#current .row") == "row 3")
    assert selected(tab) == 77
    tab.evaluate("location.hash = '#row=77'")
    until(lambda: tab.inner_text("#notice") == "Row 77 is not on this page.")
    assert (tab.inner_text("#current .row"), selected(tab)) == ("row 3", 77)
    press(tab, "[")
    until(lambda: tab.inner_text("#notice") == "")
    tab = visit(pair[0], fragment="#row=77")
    assert tab.inner_text("#notice") == "Row 77 is not on this page."
    assert tab.inner_text("#current .row") == "row 0"
    assert selected(visit(pair[0], fragment="#row=1&position=500000")) == 299


def test_shortcuts_are_for_the_text_only(visit, pair):
    tab = visit(pair[0])
    for place in ("#theme", "#current", "#query", "[name=shade]"):
        tab.focus(place)
        press(tab, "]", "u")
        assert tab.inner_text("#current .row") == "row 0"
        assert tab.evaluate("document.activeElement.id") != "text-0"
    tab.focus("#text-0")
    for key in ("Control+]", "Alt+]", "Meta+u", "Control+u"):
        press(tab, key)
    assert (tab.inner_text("#current .row"), selected(tab)) == ("row 0", 0)
    press(tab, "]")
    until(lambda: tab.inner_text("#current .row") == "row 1")


def test_nothing_stale_after_an_empty_sequence(visit, hostile):
    tab = visit(hostile)
    tab.focus("#text-0")
    press(tab, "End", "]")
    until(lambda: "no positions" in tab.inner_text("#notice"))
    assert tab.get_attribute("#text-0", "aria-activedescendant") is None
    assert tab.inner_text("#chart-value") == ""
    until(lambda: tab.text_content("#said").endswith("0 positions. It is empty."))
    assert tab.evaluate("location.hash") == "#row=1"


def test_the_split_is_in_the_address(visit, serving, local):  # noqa: F811
    dataset = logitstore.open(local)
    url = serving(dataset)
    tab = visit(url=url, fragment="#split=test&row=3&position=1")
    assert tab.inner_text("#current .id") == dataset.split("test")[3].id
    assert selected(tab) == 1
    press(tab, "]")
    until(lambda: tab.evaluate("location.hash").startswith("#split=test&row=4"))
    tab.click("#current")
    tab.wait_for_selector("#rows [aria-current]")
    assert tab.inner_text("#rows-shown") == "1 to 9 of 9"
    tab.select_option("#split", "")
    until(lambda: tab.inner_text("#rows-shown") == "1 to 49 of 49")
    assert tab.locator("#rows [aria-current]").count() == 0
    tab.click("#go")
    assert tab.inner_text("#chooser-problem") == "Give a row or an id."
    tab.select_option("#split", "dev")
    until(lambda: tab.inner_text("#rows-shown") == "no sequences")
    tab.fill("#to-row", "0")
    tab.click("#go")
    until(lambda: tab.inner_text("#chooser-problem") == "There are no sequences here.")
    press(tab, "Escape")
    tab.click("#current")
    tab.wait_for_selector("#rows [aria-current]")
    assert tab.input_value("#split") == "test"
    assert tab.locator("#rows [aria-current] .row").inner_text() == "row 4"
    tab.locator("#rows button").first.click()
    until(lambda: tab.evaluate("location.hash").startswith("#split=test&row=0"))
    assert tab.evaluate("document.activeElement.id") == "text-0"


def test_parts_of_a_long_sequence(visit, serving, tmp_path):
    dataset = write(tmp_path / "d", WORDS, {"a": words(90, 1)})
    tab = visit(url=serving(dataset, positions=40), fragment="#row=0&position=39")
    assert selected(tab) == 39
    assert tab.locator("#panel .next").count() == 1 or "not among" in tab.inner_text("#panel")
    assert tab.get_by_label("Find text in this part").count() == 1
    tab.focus("#text-0")
    press(tab, "ArrowRight")
    until(lambda: tab.evaluate("location.hash") == "#row=0&position=40")
    assert tab.evaluate("document.activeElement.id") == "text-0"
    press(tab, "ArrowLeft")
    until(lambda: tab.evaluate("location.hash") == "#row=0&position=39")
    assert selected(tab) == 39
    tab.click("text=Part after")
    tab.wait_for_selector("#notice >> text=Positions 40 to 79")
    assert tab.evaluate("document.activeElement.id") == "text-0"
    tab.evaluate("location.hash = '#row=0&position=500000'")
    until(lambda: "position 89 of 90" in tab.inner_text("#panel"))
    tab = visit(dataset, positions=40, fragment="#row=0&position=88")
    assert selected(tab) == 39
    assert tab.locator("#panel .next").count() == 1 or "not among" in tab.inner_text("#panel")


def test_forced_colors_keep_the_shades(visit, demo):
    shade = "[...document.querySelectorAll('#text-0 [role=option], #scale li')].map(o => getComputedStyle(o).backgroundColor)"
    for scheme in ("light", "dark"):
        tab = visit(demo, forced_colors="active", color_scheme=scheme)
        assert len(set(tab.evaluate(shade))) > 4
        assert [bad for bad in tab.evaluate(CONTRAST) if bad[1].startswith("t ")] == []


def test_nothing_is_cut_off_or_lost_on_a_phone(visit, pair, demo):
    tab = visit(demo, size=(320, 640))
    box = tab.evaluate("document.querySelector('#chart-value').getClientRects().length")
    assert box == 1
    edges = "all => all.map(e => e.getBoundingClientRect().right)"
    assert (
        max(tab.eval_on_selector_all("#chart text", edges))
        <= tab.locator("#chart svg").bounding_box()["x"] + tab.locator("#chart svg").bounding_box()["width"]
    )
    tab = visit(pair[0], other=pair[1], size=(390, 844))
    cells = tab.get_by_role("table").first.get_by_role("row").nth(1).get_by_role("cell")
    assert cells.count() == 3
    assert cells.first.text_content() == "1"
    mark = "all => all.map(e => getComputedStyle(e).display)"
    tab.focus("#text-0")
    while tab.locator("#panel .mark").count() == 0:
        press(tab, "ArrowRight")
    assert "none" not in tab.eval_on_selector_all("#panel .mark, #panel .rank", mark)


def test_comes_next_is_not_cut_off(visit, tmp_path):
    pieces = {0: b" x", 1: b" " + b"long" * 15}
    for size in (DESKTOP, PHONE):
        tab = visit(write(tmp_path / f"d{size[0]}", pieces, {"a": [0, 1, 0, 1]}, k=2), size=size)
        for t in range(3):
            tab.evaluate("t => document.getElementById(`text-0-${t}`).click()", t)
            mark, cell = tab.locator(".mark").bounding_box(), tab.locator(".next .token").bounding_box()
            assert mark["x"] + mark["width"] <= cell["x"] + cell["width"] + 1
