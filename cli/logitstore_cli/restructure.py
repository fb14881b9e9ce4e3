"""What the commands share that make datasets of datasets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from logitstore.dataset.join import Joined
from logitstore.schema import Manifest
from logitstore_cli.output import note, progress_bar, reporter, result, result_json, size


@contextmanager
def reporting(doing: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is moved by (done, total), at most ten times a second."""
    with progress_bar() as bar:
        report = reporter(bar, doing, unit)
        last = [0.0]

        def limited(done: int, total: int) -> None:
            if time.monotonic() - last[0] >= 0.1:
                last[0] = time.monotonic()
                report(done, total)

        yield limited


def held(manifest: Manifest) -> str:
    """What a dataset holds, for people."""
    totals = manifest.totals
    sums = f"{totals.sequences:,} sequences, {totals.positions:,} positions"
    shards = f"{totals.shards:,} shard{'s' * (totals.shards != 1)}"
    return f"{sums} in {shards}, {size(totals.bytes)}"


def made(output: str, manifest: Manifest, *, as_json: bool, **more: Any) -> None:
    """Print what was made.

    Args:
        output: as it was given.
        manifest: of it.
        as_json: as JSON.
        **more: further fields of the JSON.
    """
    if as_json:
        result_json({"totals": manifest.totals, "splits": manifest.splits, **more})
        return
    result(f"{output}: {held(manifest)}")
    if len(manifest.splits) > 1:
        for name, split in manifest.splits.items():
            result(f"  {name}: {split.sequences:,} sequences, {split.positions:,} positions, {size(split.bytes)}")


def joined(output: str, done: Joined, *, as_json: bool) -> None:
    """Print what was joined; what was not agreed on, as notes.

    Args:
        output: as it was given.
        done: what was joined.
        as_json: as JSON.
    """
    for text in done.notes:
        note(f"Note: {text}")
    if done.unchanged and not as_json:
        result(f"{output}: unchanged, it held all of them before; {held(done.manifest)}")
        return
    more = {"unchanged": done.unchanged, "linked": done.linked, "copied": done.copied, "notes": done.notes}
    made(output, done.manifest, as_json=as_json, **more)
