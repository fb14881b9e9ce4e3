"""`logitstore demo`."""

from __future__ import annotations

import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import click
import numpy as np
from rich.cells import cell_len, set_cell_size

import logitstore
from logitstore.checks import is_valid, validate
from logitstore.convert import Converted, convert
from logitstore.shard.sequence import Sequence
from logitstore_cli.convert import summary_lines
from logitstore_cli.output import named, note, result, size
from logitstore_cli.validate import finding_line

CAPTURE = "llama-server-completion.jsonl.zst"
BARS = 12
WIDTH = 40


@click.command("demo")
@click.argument("directory", type=click.Path(path_type=Path), required=False)
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there.")
@click.pass_context
def command(context: click.Context, directory: Path | None, overwrite: bool) -> None:
    """Convert a small real capture, check it, and show what the teacher expects after a text.

    Twelve replies of Gemma 3 270M under llama-server. The dataset is written to DIRECTORY, else to a temporary one.

    Example: logitstore demo my-demo
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = directory if directory is not None else Path(scratch) / "demo"
        converted, source = make(target, overwrite=overwrite)
        for text in converted.notes:
            note(f"Note: {text}")
        shown = str(directory) if directory is not None else "demo"
        result(f"A capture of {size(source)} (zstd) became:")
        for line in summary_lines(converted, shown):
            result(line)
        findings = validate(target, deep=True)
        for finding in findings:
            note(finding_line(finding))
        valid = is_valid(findings)
        result(f"{shown}: {'valid' if valid else 'INVALID'}: every byte and every row was checked\n")
        for line in bars(logitstore.open(target)):
            result(line)
    context.exit(0 if valid else 1)


def make(target: Path, *, overwrite: bool = False) -> tuple[Converted, int]:
    """Convert the capture that comes with the package.

    Args:
        target: directory of the dataset.
        overwrite: replace a dataset that is there.

    Returns:
        (what was done, bytes of the capture).

    Raises:
        DatasetExistsError: something is there already.
    """
    with as_file(files("logitstore") / "demo" / CAPTURE) as capture:
        summary = convert([capture], target, teacher="google/gemma-3-270m", logit_width=262_144, overwrite=overwrite)
        return summary, capture.stat().st_size


def bars(dataset: logitstore.Dataset) -> list[str]:
    """The first distribution of the first sequence as bars."""
    sequence = dataset[0]
    tokenizer = dataset.tokenizer()
    position = int(np.flatnonzero(sequence.count)[0])
    start, end = (int(n) for n in sequence.offsets[position : position + 2])
    prompt = str(sequence.columns["prompt"]).removeprefix("<bos>")
    lines = [f'"{prompt}" ... what comes next? The teacher says:']
    probabilities = np.exp(sequence.logprobs[start:end])
    following = int(sequence.tokens[position + 1])
    for token, probability in zip(sequence.ids[start : min(end, start + BARS)].tolist(), probabilities, strict=False):
        text = named(tokenizer, token)
        bar = "#" * max(1, round(WIDTH * float(probability / probabilities[0])))
        chosen = "  <- drawn for this reply" if token == following else ""
        lines.append(f"{_padded(text, 14)} {100 * probability:5.1f} %  {bar}{chosen}")
    return [*lines, *_rest(sequence, position, end - start)]


def _rest(sequence: Sequence, position: int, count: int) -> list[str]:
    tail = float(np.exp(sequence.tail[position]))
    rest = f", and {100 * tail:.1f} % are with the rest of the vocabulary" if tail == tail else ""  # noqa: PLR0124 - NaN
    return [f"{count} candidates are stored{rest}."]


def _padded(text: str, width: int) -> str:
    return text if cell_len(text) > width else set_cell_size(text, width)
