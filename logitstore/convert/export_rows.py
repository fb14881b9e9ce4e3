"""What exporters share: rectangles of candidates, and Parquet files of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert import users
from logitstore.convert.base import Export
from logitstore.convert.facts import metadata
from logitstore.dataset.reader import Dataset
from logitstore.errors import InvalidInputError
from logitstore.shard.sequence import Sequence

NEEDED: Final = ("tokens", "ids", "logprobs", "loss_mask")
"""The columns of a dataset that a trainer's format takes, whatever a view decodes."""

SLOTS: Final = 2**25
"""The most candidates of one sequence as a rectangle, padding included: bounds memory."""

_BLOCK: Final = 2**20  # slots that are filled up at once
_GROUP_BYTES: Final = 48 * 2**20  # of a row group: the Hub's viewer reads none over 300 MB
_GROUP_ROWS: Final = 1024


def width_of(dataset: Dataset, most: int | None) -> tuple[int, list[str]]:
    """Candidates of the widest position of a dataset, at least 1 and at most so many; a note on what that leaves out.

    Trainers that take rectangles cut all rows to the narrowest, or fail, where these differ in width.
    """
    widest = max((int(sequence.count.max(initial=0)) for sequence in dataset.select(["count"])), default=0)
    k = max(1, widest if most is None else min(most, widest))
    return k, [f"Candidates beyond the best {k} of a position were left out."] if widest > k else []


def rectangle(sequence: Sequence, k: int, pad: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best k candidates of each position, [T, k]; where there are fewer, pads of ids that are none of them.

    These are the lowest ids, since they exist in every vocabulary: a loss looks them up in the student's logits.

    Raises:
        InvalidInputError: the rectangle would be too large.
    """
    count = sequence.count
    if len(count) * k > SLOTS:
        raise InvalidInputError(
            f"sequence {sequence.id!r}: {len(count)} positions of {k} candidates each, padding included, are too many "
            f"for one row; take a smaller k"
        )
    ids, logprobs = sequence.dense(k, fill_logprob=pad)
    short = np.flatnonzero(count < k)
    step = max(1, _BLOCK // k)
    for start in range(0, len(short), step):
        rows = short[start : start + step]
        ids[rows] = _filled(ids[rows], count[rows].astype(np.int64))
    return ids, logprobs


def _filled(ids: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows whose ids behind the `count` first ones are the lowest that are not among those."""
    k = ids.shape[1]
    listed = np.arange(k) < count[:, None]
    taken = np.zeros(ids.shape, np.bool_)
    row, rank = np.nonzero(listed & (ids < k))
    taken[row, ids[row, rank]] = True
    free = np.argsort(taken, axis=1, kind="stable")  # in ascending order, and the taken ones behind them
    row, rank = np.nonzero(~listed)
    ids[row, rank] = free[row, rank - count[row]]
    return ids


def nested(rows: list[NDArray[Any]], kind: pa.DataType) -> pa.Array:
    """An Arrow array of lists [T], or of lists of lists [T, k], of these arrays."""
    values = pa.array(np.concatenate([each.ravel() for each in rows]), kind)
    if rows[0].ndim == 2:
        inner = np.concatenate([[0], *(np.full(len(each), each.shape[1]) for each in rows)]).cumsum()
        values = pa.ListArray.from_arrays(pa.array(inner, pa.int32()), values)
    outer = np.cumsum([0, *(len(each) for each in rows)])
    return pa.ListArray.from_arrays(pa.array(outer, pa.int32()), values)


def write_table(
    dataset: Dataset,
    path: Path,
    options: Export,
    own: Mapping[str, tuple[pa.DataType, int]],
    columns_of: Callable[[Sequence], Mapping[str, NDArray[Any]]],
    *,
    taken: Collection[str] = (),
    needed: Collection[str] = NEEDED,
) -> list[str]:
    """Write a Parquet file with a row a sequence, in row groups of bounded size.

    Args:
        dataset: the dataset.
        path: the file.
        options: what the exporter is told.
        own: the format's columns: the type of their numbers, and how many lists deep these lie.
        columns_of: those columns of a sequence, [T] or [T, k].
        taken: further names that the format, or its importer, understands as its own.
        needed: columns of the dataset that `columns_of` takes.

    Returns:
        Notes on users' columns that were left out.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415 - takes a while, and few need it

    clashing = [name for name in users.types_of(dataset) if name in own or name in taken]
    kept, notes = users.split_for_parquet({n: t for n, t in users.types_of(dataset).items() if n not in clashing})
    if clashing:
        notes.append(f"The columns {', '.join(clashing)} are left out: the format uses these names.")
    fields = [pa.field(name, pa.list_(kind if deep == 1 else pa.list_(kind))) for name, (kind, deep) in own.items()]
    schema = pa.schema([pa.field("id", pa.utf8()), *fields, *kept.items()], metadata(dataset))
    done = 0
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for group in _groups(dataset.select([*needed, *kept]), columns_of):
            arrays = {"id": pa.array([stored.id for stored, _ in group], pa.utf8())}
            arrays |= {name: nested([values[name] for _, values in group], kind) for name, (kind, _) in own.items()}
            for name, kind in kept.items():
                arrays[name] = users.array_of(name, [stored.columns[name] for stored, _ in group], kind)
            table = pa.table(arrays, schema=schema)
            try:
                writer.write_table(table, row_group_size=len(group))
            except pa.ArrowException as error:
                raise users.unwritten(table, error) from error
            done += len(group)
            options.progress(done)
    return notes


def _groups(
    dataset: Dataset, columns_of: Callable[[Sequence], Mapping[str, NDArray[Any]]]
) -> Iterator[list[tuple[Sequence, Mapping[str, NDArray[Any]]]]]:
    held: list[tuple[Sequence, Mapping[str, NDArray[Any]]]] = []
    size = 0
    for stored in dataset:
        columns = columns_of(stored)
        more = sum(values.nbytes for values in columns.values())
        more += sum(map(users.size_of, stored.__dict__.get("columns", {}).values()))
        if held and (size + more > _GROUP_BYTES or len(held) == _GROUP_ROWS):
            yield held
            held, size = [], 0
        held.append((stored, columns))
        size += more
    if held:
        yield held
