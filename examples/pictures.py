"""The pictures of the README, made from the capture that comes with the package.

    python examples/pictures.py [DIRECTORY]

DIRECTORY is `docs` of the repository unless given. `show.svg` is the same byte for byte when it is made again;
`view.png` needs playwright and a browser, Debian's chromium for example, and depends on its fonts.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.terminal_theme import MONOKAI

import logitstore
from logitstore.look.page import page
from logitstore_cli.demo import make
from logitstore_cli.show import chosen, look_of
from logitstore_cli.show_render import BLOCKS, lines

DOCS: Final = Path(__file__).parent.parent / "docs"
WIDTH: Final = 92  # cells
CELL: Final = 12  # width of one in rich's pictures, whose letters are 20 high, in fonts 0.6 times as wide
FIND: Final = "favorite color is"
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome", "chrome")

FORMAT: Final = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
    <style>
    .{unique_id}-matrix {{
        font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace;
        font-size: {char_height}px;
        line-height: {line_height}px;
    }}
    .{unique_id}-title {{
        font-family: sans-serif;
        font-size: 18px;
        font-weight: bold;
    }}
    {styles}
    </style>
    <defs>
    <clipPath id="{unique_id}-clip-terminal">
      <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
    </clipPath>
    {lines}
    </defs>
    {chrome}
    <g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
    {backgrounds}
    <g class="{unique_id}-matrix">
    {matrix}
    </g>
    </g>
</svg>
"""
"""Rich's own frame, without the fonts that it fetches from elsewhere."""


def solid(svg: str) -> str:
    """A picture with its bars as rectangles: between the blocks that they are made of, scaling would leave seams."""

    def rectangle(found: re.Match[str]) -> str:
        style, x, y, bar = found.groups()
        width = CELL * (len(bar) - 1 + BLOCKS.index(bar[-1]) / 8)
        return f'<rect class="{style}" x="{x}" y="{float(y) - 15.5:g}" width="{width:g}" height="19"/>'

    return re.sub(f'<text class="([^"]+)" x="([^"]+)" y="([^"]+)" [^>]*>([{BLOCKS.strip()}]+)</text>', rectangle, svg)


def picture_of_show(dataset: logitstore.Dataset, target: Path) -> None:
    """What `logitstore show` prints in a terminal, as `show.svg`."""
    console = Console(
        record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, color_system="truecolor", no_color=False,
        highlight=False, markup=False, emoji=False, legacy_windows=False, _environ={},
    )  # fmt: skip
    for line in lines(chosen(dataset, find=FIND), look_of(console)):
        console.print(line)
    svg = console.export_svg(
        title=f'logitstore show demo --find "{FIND}"',
        theme=MONOKAI,
        code_format=FORMAT,
        font_aspect_ratio=CELL / 20,
        unique_id="show",
    )
    (target / "show.svg").write_text(
        "".join(f"{line.rstrip()}\n" for line in solid(svg).splitlines()), encoding="utf-8", newline=""
    )


def picture_of_view(dataset: logitstore.Dataset, target: Path) -> None:
    """The page of `logitstore view` in a browser, as `view.png`."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - the other picture needs no browser

    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        sys.exit(f"view.png is a picture of a browser: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        file = Path(scratch) / "demo.html"
        file.write_text(page(dataset, rows=range(6)), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1120, "height": 760}, color_scheme="light", reduced_motion="reduce")
        tab.goto(file.as_uri())
        search = tab.get_by_role("searchbox")
        search.fill(FIND)
        search.press("Enter")
        search.press("Escape")
        tab.screenshot(path=target / "view.png")
        browser.close()


PICTURES: Final = (picture_of_show, picture_of_view)


def main(target: Path) -> None:
    """Make them all."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", logitstore.LogitStoreWarning)  # the capture has a partial vocabulary
            make(Path(scratch) / "demo")
        dataset = logitstore.open(Path(scratch) / "demo")
        for picture in PICTURES:
            picture(dataset, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
