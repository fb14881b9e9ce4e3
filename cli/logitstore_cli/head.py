"""`logitstore head`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import numpy as np

import logitstore
from logitstore.shard.sequence import Sequence
from logitstore_cli.output import harmless, named, result


@click.command("head")
@click.argument("dataset", type=click.Path())
@click.option("-n", "--sequences", type=click.IntRange(min=0), default=1, show_default=True, help="Sequences shown.")
@click.option("-p", "--positions", type=click.IntRange(min=0), default=10, show_default=True, help="Positions of each.")
@click.option(
    "-k", "--candidates", type=click.IntRange(min=1), default=5, show_default=True, help="Candidates of each."
)
@click.option("--id", "sequence_id", help="The sequence with this id instead of the first ones.")
@click.option("--json", "as_json", is_flag=True, help="Print each sequence, whole, as a line of JSON.")
def command(
    dataset: str, sequences: int, positions: int, candidates: int, sequence_id: str | None, as_json: bool
) -> None:
    """Show the first sequences: each token, and what the teacher expects after it.

    Example: logitstore head my-dataset -n 2 -k 8
    """
    opened = logitstore.open(dataset)
    chosen = [opened.by_id(sequence_id)] if sequence_id is not None else opened[:sequences]
    tokenizer = None if as_json else opened.tokenizer()
    text = partial(named, tokenizer)
    for sequence in chosen:
        if as_json:
            result(harmless(json.dumps(sequence_json(sequence), ensure_ascii=False)))
            continue
        result(f"{sequence.id}: {len(sequence):,} positions, {len(sequence.ids):,} candidates")
        for position in range(min(positions, len(sequence))):
            token = text(int(sequence.tokens[position]))
            result(f"  {position:>6}  {token:<16} ->  {_best(sequence, position, candidates, text)}")
        if len(sequence) > positions:
            result(f"  {'':>6}  ... {len(sequence) - positions:,} more")


def _best(sequence: Sequence, position: int, k: int, text: Callable[[int], str]) -> str:
    start, end = (int(n) for n in sequence.offsets[position : position + 2])
    if start == end:
        return "(no distribution)"
    end = min(end, start + k)
    pairs = zip(sequence.ids[start:end].tolist(), np.exp(sequence.logprobs[start:end]).tolist(), strict=True)
    return "  ".join(f"{text(token)} {100 * p:.1f}%" for token, p in pairs)


def sequence_json(sequence: Sequence) -> dict[str, Any]:
    """A sequence as JSON: NaN as null, minus infinity as text."""
    fields = {name: _plain(value) for name, value in vars(sequence).items() if value is not None}
    fields.pop("offsets")
    fields["columns"] = {name: _plain(value) for name, value in sequence.columns.items()}
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)
