"""What the tests of the page of `view` in a real browser share: the browser, datasets, and what is asked of a page."""

from __future__ import annotations

import shutil
import threading
import time
import warnings

import numpy as np
import pytest

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
