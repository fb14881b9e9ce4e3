"""`logitstore info`."""

from __future__ import annotations

from typing import Any

import click
import msgspec

import logitstore
from logitstore.schema import Manifest
from logitstore_cli.output import result, result_json, size


@click.command("info")
@click.argument("dataset", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(dataset: str, as_json: bool) -> None:
    """Say what a dataset is: teacher, tokenizer, size. Only its manifest is read.

    Example: logitstore info my-dataset --json
    """
    info = logitstore.open(dataset).info
    if as_json:
        result_json(info_json(info))
        return
    for name, value in info_rows(info):
        result(f"{name:<20}{value}")


def info_json(info: Manifest) -> dict[str, Any]:
    """What scripts may rely on."""
    totals = info.totals
    return {
        "format_version": info.version,
        "sequences": totals.sequences,
        "positions": totals.positions,
        "candidates": totals.candidates,
        "bytes": totals.bytes,
        "bytes_per_position": totals.bytes / totals.positions if totals.positions else None,
        "splits": msgspec.to_builtins(info.splits),
        "shards": msgspec.to_builtins(info.shards),
        "teacher": msgspec.to_builtins(info.teacher),
        "tokenizer": msgspec.to_builtins(info.tokenizer),
        "features": msgspec.to_builtins(info.features),
        "logit_width": info.logit_width,
        "normalised": info.normalised,
        "temperature": info.temperature,
        "sampling": msgspec.to_builtins(info.sampling),
        "encodings": totals.encodings,
        "columns": totals.columns,
        "user_columns": info.user_columns,
        "source": msgspec.to_builtins(info.source),
        "lineage": msgspec.to_builtins(info.lineage),
        "dataset_digest": info.dataset_digest,
    }


def info_rows(info: Manifest) -> list[tuple[str, str]]:
    """The same for people."""
    totals = info.totals
    per_position = f", {totals.bytes / totals.positions:.1f} bytes a position" if totals.positions else ""
    splits = ", ".join(f"{name} ({split.sequences:,} sequences)" for name, split in info.splits.items())
    encodings = ", ".join(f"{name} ({n:,} sequences)" for name, n in totals.encodings.items())
    sampling = f"top_k {info.sampling.top_k}, top_p {info.sampling.top_p}, resolution {info.sampling.resolution:g}"
    teacher = "unknown"
    if info.teacher is not None:
        fields = msgspec.to_builtins(info.teacher)
        extra = [f"{name} {value}" for name, value in fields.items() if name != "name" and value is not None]
        teacher = ", ".join([info.teacher.name, *extra])
    tokenizer = "unknown"
    if info.tokenizer is not None:
        digest, tokens = info.tokenizer.digest, info.tokenizer.vocabulary_size
        tokenizer = "partial vocabulary, no identity" if digest is None else f"{tokens:,} tokens, {digest[:16]}"
    return [
        ("format version", info.version),
        ("teacher", teacher),
        ("tokenizer", tokenizer),
        ("logit width", "unknown" if info.logit_width is None else f"{info.logit_width:,}"),
        ("logprobs", f"normalised over the {info.normalised}, temperature {info.temperature:g}"),
        ("kept", sampling),
        ("sequences", f"{totals.sequences:,}"),
        ("positions", f"{totals.positions:,}"),
        ("candidates", f"{totals.candidates:,}"),
        ("size", f"{size(totals.bytes)} in {totals.shards:,} shards{per_position}"),
        ("splits", splits),
        ("encodings", encodings or "none"),
        ("optional columns", ", ".join(f"{name} ({n:,})" for name, n in totals.columns.items()) or "none"),
        ("own columns", ", ".join(f"{name}: {kind}" for name, kind in info.user_columns.items()) or "none"),
        ("dataset digest", info.dataset_digest),
    ]
