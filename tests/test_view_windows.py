"""The page of `view` in a real browser: keys, assistive technology, colors, windows of any size, and pictures to look at.

`LOGITSTORE_SCREENSHOTS` names a directory where the pictures go.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from view_browser import DESKTOP, PHONE, press, selected, until, write

pytest_plugins = ["view_browser"]  # its fixtures


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
