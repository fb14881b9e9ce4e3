"""The page of `view` in a real browser: what it shows, where it leads, and what it may not do."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from pull_rows import local  # noqa: F401 - a fixture
from view_browser import WORDS, press, rows, selected, until, words, write

import logitstore
from logitstore.tokenizer import Tokenizer

pytest_plugins = ["view_browser"]  # its fixtures


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
