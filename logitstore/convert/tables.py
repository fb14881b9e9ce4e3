"""Tables: Parquet, Arrow files and streams, the directories of `datasets`, and JSON lines, row by row.

A record's `data` is a row: the values by column name. They are Arrow scalars where the table is Arrow, and what JSON
gives elsewhere; `numbers` and `ragged_numbers` make arrays of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Import, Item, Parse, Piece, Record, Tally
from logitstore.convert.lines import JSONL, decode, has_keys, read_lines
from logitstore.convert.source import Input
from logitstore.errors import LogitStoreError, SourceError

TABLES: Final = ("*.parquet", "*.arrow", "*.feather", *JSONL)
"""Names of files of tables."""

_PIECE_BYTES: Final = 2**22  # of a Parquet file's data, uncompressed but still encoded
_PIECE_ROWS: Final = 1024
_JSON: Final = msgspec.json.Decoder()
_ARROW_ERRORS: Final = (pa.ArrowException, OSError, ValueError, KeyError)


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of an Arrow table.

    Attributes:
        name: of the file.
        first: number of the first row in the whole input, from 0.
        row: its number in the file.
        batch: the rows.
    """

    name: str
    first: int
    row: int
    batch: pa.RecordBatch

    def records(self) -> Iterator[Record]:
        """One record a row."""
        columns = dict(zip(self.batch.schema.names, self.batch.columns, strict=True))
        for at in range(self.batch.num_rows):
            row = {name: column[at] for name, column in columns.items()}
            yield Record(f"{self.name}, row {self.row + at}", self.first + at, row)

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrow pickles the whole buffers of a slice; a message holds what is in it alone.
        message = self.batch.serialize().to_pybytes()
        return _unpack, (self.name, self.first, self.row, self.batch.schema.serialize().to_pybytes(), message)


def _unpack(name: str, first: int, row: int, schema: bytes, message: bytes) -> Batch:
    batch = pa.ipc.read_record_batch(pa.py_buffer(message), pa.ipc.read_schema(pa.py_buffer(schema)))
    return Batch(name, first, row, batch)


def read_tables(inputs: list[Input], parse: Parse, columns: Sequence[str] | None = None, **fields: Any) -> Import:
    """An import of inputs with one record a row; all are JSON lines, or none is.

    Args:
        inputs: the inputs.
        parse: makes items of a record whose `data` is a row.
        columns: those that are read of Parquet files, where they have them; None reads all.
        **fields: further fields of `Import`.

    Raises:
        SourceError: an input cannot be read, or the inputs are of both kinds.
    """
    kinds = {table_kind(source) for source in inputs}
    if kinds == {"json"}:
        return read_lines(inputs, _OfJson(parse), **fields)
    if "json" in kinds:
        raise SourceError("JSON lines and Arrow tables in one input; convert them one after another")
    done = [0]
    return Import(
        pieces=_pieces(inputs, columns, done),
        parse=parse,
        done=lambda: done[0],
        total=sum(source.size or 0 for source in inputs),
        **fields,
    )


@dataclass(frozen=True, slots=True)
class _OfJson:
    parse: Parse

    def __call__(self, record: Record, tally: Tally) -> Sequence[Item]:
        row = decode(_JSON, record.data, "JSON object")
        if not isinstance(row, dict):
            raise SourceError("no JSON object; each line is one row, as {column: value}")
        return tuple(self.parse(Record(record.place, record.number, row), tally))


def table_kind(source: Input) -> str:
    """`parquet`, `arrow file`, `arrow stream` or else `json`, by the first bytes."""
    head = source.head()
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1"):
        return "arrow file"
    return "arrow stream" if head.startswith(b"\xff\xff\xff\xff") else "json"


def has_columns(source: Input, *names: str) -> bool:
    """Whether a table has all these columns; never raises."""
    try:
        if table_kind(source) == "json":
            return has_keys(source, *names)
        schema, _ = _open(source, None)
    except (LogitStoreError, *_ARROW_ERRORS):
        return False
    return set(names) <= set(schema.names)


def schema_of(source: Input) -> pa.Schema:
    """The schema of an Arrow or Parquet table.

    Raises:
        SourceError: it cannot be read.
    """
    return _open(source, None)[0]


def _pieces(inputs: list[Input], columns: Sequence[str] | None, done: list[int]) -> Iterator[Piece]:
    first = 0
    for source in inputs:
        before, row = done[0], 0
        _, batches = _open(source, columns)
        try:
            for fraction, batch in batches:
                batch.validate(full=True)  # before anything is touched: a forged table could end the process
                for start in range(0, batch.num_rows, _PIECE_ROWS):
                    part = batch.slice(start, _PIECE_ROWS)
                    yield Batch(source.name, first, row, part)
                    first, row = first + part.num_rows, row + part.num_rows
                done[0] = before + int((source.size or 0) * fraction)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, LogitStoreError):
                raise
            raise SourceError(f"{source.name}: damaged behind row {row} ({error}); fetch the file again") from error
        done[0] = before + (source.size or 0)


def _open(source: Input, columns: Sequence[str] | None) -> tuple[pa.Schema, Iterator[tuple[float, pa.RecordBatch]]]:
    """The schema, and the batches, each with the part of the file that is read after it."""
    kind = table_kind(source)
    if source.size is None:
        raise SourceError("tables cannot be read from standard input: name the file")
    try:
        if kind == "parquet":
            return _open_parquet(source.path, columns)
        if kind == "json":
            raise SourceError(f"{source.name}: no Parquet or Arrow table")
        mapped = pa.memory_map(str(source.path))
        reader = pa.ipc.open_file(mapped) if kind == "arrow file" else pa.ipc.open_stream(mapped)
    except LogitStoreError:
        raise
    except _ARROW_ERRORS as error:
        raise SourceError(f"{source.name}: no whole table ({error}); fetch the file again") from error
    return reader.schema, _arrow_batches(reader, mapped, source.size)


def _arrow_batches(reader: Any, mapped: pa.MemoryMappedFile, size: int) -> Iterator[tuple[float, pa.RecordBatch]]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        total = reader.num_record_batches
        for number in range(total):
            yield (number + 1) / total, reader.get_batch(number)
        return
    for batch in reader:
        yield mapped.tell() / size, batch


def _open_parquet(
    path: Path, columns: Sequence[str] | None
) -> tuple[pa.Schema, Iterator[tuple[float, pa.RecordBatch]]]:
    import pyarrow.parquet as pq  # noqa: PLC0415 - takes a while, and few need it

    file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)  # a row group may be gigabytes: read it in parts
    schema = file.schema_arrow
    chosen = None if columns is None else [name for name in columns if name in schema.names]

    def batches() -> Iterator[tuple[float, pa.RecordBatch]]:
        with file:
            rows = 0
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                size = max(1, min(_PIECE_ROWS, _PIECE_BYTES * group.num_rows // max(1, group.total_byte_size)))
                for batch in file.iter_batches(size, row_groups=[number], columns=chosen, use_threads=False):
                    rows += batch.num_rows
                    yield rows / max(1, file.metadata.num_rows), batch

    return schema, batches()


def present(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a value in this column."""
    value = row.get(name)
    return bool(value.is_valid) if isinstance(value, pa.Scalar) else value is not None


def plain(value: Any) -> Any:
    """The value of a cell as Python has it."""
    return value.as_py() if isinstance(value, pa.Scalar) else value


def numbers(row: Mapping[str, Any], name: str, dtype: Any) -> NDArray[Any]:
    """A column's list of numbers: [T] of the dtype.

    Raises:
        SourceError: it is missing or something else; null stands there, and the dtype is of integers.
    """
    values = _arrow(row, name, pa.list_(pa.from_numpy_dtype(dtype)))
    return _array(values, name, dtype)


def ragged_numbers(row: Mapping[str, Any], name: str, dtype: Any) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """A column's list of lists of numbers, (count [R], flat [N] of the dtype); a list that is null is empty.

    Raises:
        SourceError: as for `numbers`.
    """
    rows = _arrow(row, name, pa.list_(pa.list_(pa.from_numpy_dtype(dtype))))
    if isinstance(rows, pa.NullArray):  # every row is null
        return np.zeros(len(rows), np.int64), np.empty(0, dtype)
    if not _is_list(rows.type):
        raise SourceError(f"{name} is {rows.type}s; a list of lists of numbers is needed")
    count = np.asarray(rows.value_lengths().fill_null(0)).astype(np.int64)
    return count, _array(rows.flatten(), name, dtype)


def _arrow(row: Mapping[str, Any], name: str, kind: pa.DataType) -> pa.Array:
    """A cell's list as an Arrow array."""
    value = row.get(name)
    if value is None or (isinstance(value, pa.Scalar) and not value.is_valid):
        raise SourceError(f"there is no {name} in this row")
    if not isinstance(value, pa.Scalar):
        try:
            value = pa.scalar(value, kind)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise SourceError(f"{name} is not {kind} ({error})") from error
    elif isinstance(value, pa.ExtensionScalar):
        value = value.value
    if not _is_list(value.type):
        raise SourceError(f"{name} is {value.type}; a list is needed")
    return value.values


def _array(values: pa.Array, name: str, dtype: Any) -> NDArray[Any]:
    wanted = np.dtype(dtype)
    kind = pa.types
    fits = kind.is_integer(values.type) or (wanted.kind == "f" and kind.is_floating(values.type))
    if not (fits or kind.is_null(values.type) or (kind.is_boolean(values.type) and wanted.kind != "f")):
        raise SourceError(f"{name} holds {values.type}; {'numbers' if wanted.kind == 'f' else 'integers'} are needed")
    if values.null_count and wanted.kind != "f":
        raise SourceError(f"{name} holds null; capture it again, or leave these rows out")
    try:
        array = values.cast(pa.from_numpy_dtype(wanted)).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise SourceError(f"{name}: {error}") from error
    return np.asarray(array).astype(wanted, copy=False)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
