"""What exporters share: rectangles of candidates, and Parquet files of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Export
from logitstore.convert.tables import plain
from logitstore.dataset.reader import Dataset
from logitstore.shard.sequence import Sequence

NORMALISED_KEY: Final = b"logitstore.normalised"
"""Key of the metadata of exported tables that says over what their probabilities sum to one."""

_GROUP_BYTES: Final = 48 * 2**20  # of a row group: the Hub's viewer reads none over 300 MB
_GROUP_ROWS: Final = 1024


def width_of(sequence: Sequence, most: int | None) -> int:
    """Candidates of the widest position of a sequence, at least 1 and at most so many."""
    width = int(sequence.count.max()) if len(sequence.count) else 1
    return max(1, min(width, most or width))


def rectangle(sequence: Sequence, k: int, pad: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best k candidates of each position, [T, k]; where there are fewer, pads of ids that are none of them."""
    ids, logprobs = sequence.dense(k, fill_logprob=pad)
    short = np.flatnonzero(sequence.count < k)
    count = sequence.count[short].astype(np.int64)
    listed = np.arange(k) < count[:, None]
    taken = np.zeros((len(short), k), np.bool_)
    row, rank = np.nonzero(listed & (ids[short] < k))
    taken[row, ids[short[row], rank]] = True
    free = np.argsort(taken, axis=1, kind="stable")
    row, rank = np.nonzero(~listed)
    ids[short[row], rank] = free[row, rank - count[row]]
    return ids, logprobs


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
) -> list[str]:
    """Write a Parquet file with a row a sequence, in row groups of bounded size.

    Args:
        dataset: the dataset.
        path: the file.
        options: what the exporter is told.
        own: the format's columns: the type of their numbers, and how many lists deep these lie.
        columns_of: those columns of a sequence, [T] or [T, k].

    Returns:
        Notes on users' columns that were left out.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415 - takes a while, and few need it

    users, clashing = _user_fields(dataset, own)
    fields = [pa.field(name, pa.list_(kind if deep == 1 else pa.list_(kind))) for name, (kind, deep) in own.items()]
    schema = pa.schema([pa.field("id", pa.utf8()), *fields, *users], {NORMALISED_KEY: dataset.info.normalised})
    done = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in _groups(dataset, columns_of):
            arrays = {"id": pa.array([stored.id for stored, _ in group], pa.utf8())}
            arrays |= {name: nested([values[name] for _, values in group], kind) for name, (kind, _) in own.items()}
            for field in users:
                arrays[field.name] = pa.array([plain(stored.columns[field.name]) for stored, _ in group], field.type)
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=len(group))
            done += len(group)
            options.progress(done)
    return [f"The columns {', '.join(clashing)} are left out: the format uses these names."] if clashing else []


def _user_fields(dataset: Dataset, own: Mapping[str, Any]) -> tuple[list[pa.Field], list[str]]:
    """Arrow fields of the users' columns that can be written beside a format's own, and names of those that cannot."""
    fields = dataset._shards[0].user_fields if dataset.info.shards else []  # the manifest has their types as text only
    seen = [field for field in fields if field.name in dataset.columns]
    return [each for each in seen if each.name not in own], [each.name for each in seen if each.name in own]


def _groups(
    dataset: Dataset, columns_of: Callable[[Sequence], Mapping[str, NDArray[Any]]]
) -> Iterator[list[tuple[Sequence, Mapping[str, NDArray[Any]]]]]:
    held: list[tuple[Sequence, Mapping[str, NDArray[Any]]]] = []
    size = 0
    for chunk in dataset.chunks():
        for stored in chunk:
            columns = columns_of(stored)
            more = sum(values.nbytes for values in columns.values())
            if held and (size + more > _GROUP_BYTES or len(held) == _GROUP_ROWS):
                yield held
                held, size = [], 0
            held.append((stored, columns))
            size += more
    if held:
        yield held
