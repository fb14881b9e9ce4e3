"""The README's table of formats, from the registry. With --write it is put into the README."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from logitstore.convert import exporters, importers

README: Final = Path(__file__).parent.parent / "README.md"
BEGIN: Final = "<!-- formats: made by benchmarks/formats.py --write -->\n"
END: Final = "<!-- end of formats -->\n"


def table() -> str:
    """One row for each format that is read or written."""
    readers, writers = importers(), exporters()
    rows = ["| format | read | write | what is lost |", "|---|---|---|---|"]
    for name in sorted({*readers, *writers}):
        reader, writer = readers.get(name), writers.get(name)
        lost = [f"reading: {reader.loses}"] if reader is not None and reader.loses else []
        lost += [f"writing: {writer.loses}"] if writer is not None else []
        read = "" if reader is None else _cell(reader.description)
        write = "" if writer is None else _cell(writer.description)
        rows.append(f"| `{name}` | {read} | {write} | {_cell('; '.join(lost))} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def replaced(page: str) -> str:
    """A page with the table in its place."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        README.write_text(replaced(README.read_text()))
    else:
        print(table(), end="")
