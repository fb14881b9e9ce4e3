"""Tables: Parquet, Arrow files and streams, the directories of `datasets`, and JSON lines, row by row.

A record's `data` is a row: the values by column name. They are Arrow scalars where the table is Arrow, and what JSON
gives elsewhere; `numbers`, `ragged_numbers` and `any_numbers` make arrays of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.arrow_claims import check_arrow
from logitstore.convert.base import Import, Item, Parse, Piece, Record, Tally
from logitstore.convert.lines import JSONL, decode, has_keys, read_lines
from logitstore.convert.parquet_claims import Claims
from logitstore.convert.source import Input
from logitstore.errors import LogitStoreError, SourceError
from logitstore.shard.layout import END_MARK
from logitstore.shard.scalars import as_py

TABLES: Final = ("*.parquet", "*.arrow", "*.feather", *JSONL)
"""Names of files of tables."""

_PIECE_BYTES: Final = 2**22  # of a table's data, decoded
_PIECE_ROWS: Final = 1024
_ROW_BYTES: Final = 2**30  # a row of this size could not be a sequence: it has 2^24 candidates at most
_JSON: Final = msgspec.json.Decoder()
_ARROW_ERRORS: Final = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError)


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
        # Arrow pickles the whole buffers of a slice; a stream holds what is in it alone, and its dictionaries.
        sink = pa.BufferOutputStream()
        batch = _without_dictionaries(self.batch)
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return _unpack, (self.name, self.first, self.row, sink.getvalue().to_pybytes())


def _unpack(name: str, first: int, row: int, stream: bytes) -> Batch:
    return Batch(name, first, row, pa.ipc.open_stream(pa.py_buffer(stream)).read_next_batch())


def _without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same columns decoded: a dictionary may be far larger than the rows that use it."""
    if not any(pa.types.is_dictionary(kind) for kind in batch.schema.types):
        return batch
    columns = [each.dictionary_decode() if isinstance(each, pa.DictionaryArray) else each for each in batch.columns]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


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
        return read_lines(inputs, OfJson(parse), **fields)
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
class OfJson:
    """The parse of JSON lines by one that takes rows."""

    parse: Parse

    def __call__(self, record: Record, tally: Tally) -> Sequence[Item]:
        """The items of a line's object."""
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
        return set(names) <= set(schema_of(source).names)
    except (LogitStoreError, *_ARROW_ERRORS):
        return False


def schema_of(source: Input) -> pa.Schema:
    """The schema of an Arrow or Parquet table.

    Raises:
        SourceError: it cannot be read.
    """
    table = _open(source)
    table.close()
    return table.schema


class _Table(Protocol):
    """An opened file: its schema, and its batches, each with the part of the file that is read after it."""

    schema: pa.Schema

    def batches(self, columns: Sequence[str] | None) -> Iterator[tuple[float, pa.RecordBatch]]: ...

    def close(self) -> None: ...


def _pieces(inputs: list[Input], columns: Sequence[str] | None, done: list[int]) -> Iterator[Piece]:
    first = 0
    for source in inputs:
        size, row = source.size or 0, 0
        before = done[0]
        table = _open(source)
        try:
            for fraction, batch in table.batches(columns):
                batch.validate(full=True)  # before anything is touched: a forged table could end the process
                for part in _parts(batch):
                    yield Batch(source.name, first, row, part)
                    first, row = first + part.num_rows, row + part.num_rows
                done[0] = before + int(size * fraction)
        except _ARROW_ERRORS as error:
            if isinstance(error, LogitStoreError):
                raise
            raise SourceError(f"{source.name}: damaged behind row {row} ({error}); fetch the file again") from error
        finally:
            table.close()
        done[0] = before + size


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch cut into parts that are small enough to be sent to another process."""
    rows = max(1, min(_PIECE_ROWS, _PIECE_BYTES * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def _open(source: Input) -> _Table:
    kind = table_kind(source)
    if source.size is None:
        raise SourceError("tables cannot be read from standard input: name the file")
    if kind == "json":
        raise SourceError(f"{source.name}: no Parquet or Arrow table")
    with source.path.open("rb") as file:
        if file.read(4) != source.head()[:4]:
            raise SourceError(f"{source.name}: the table is compressed as a whole; decompress the file first")
    try:
        table: _Table = _Parquet(source) if kind == "parquet" else _Ipc(source, stream=kind == "arrow stream")
        names = table.schema.names
        for number in range(len(names)):
            _read_names(table.schema.field(number).type)
    except _ARROW_ERRORS as error:
        raise SourceError(f"{source.name}: no whole table ({error}); fetch the file again") from error
    if len(set(names)) != len(names):
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise SourceError(f"{source.name}: two columns are called {twice!r}; rename one")
    return table


def _read_names(kind: pa.DataType) -> None:
    """Read the names of nested fields, which are of no use where they are not UTF-8."""
    for number in range(kind.num_fields):
        field = kind.field(number)
        _ = field.name
        _read_names(field.type)


class _Ipc:
    """An Arrow file or stream, mapped."""

    def __init__(self, source: Input, *, stream: bool) -> None:
        self._path, self._size = source.path, source.size or 0
        self._mapped = pa.memory_map(str(source.path))
        self._stream = stream
        self._reader = pa.ipc.open_stream(self._mapped) if stream else pa.ipc.open_file(self._mapped)
        self.schema: pa.Schema = self._reader.schema

    def batches(self, _columns: Sequence[str] | None) -> Iterator[tuple[float, pa.RecordBatch]]:
        check_arrow(self._path, stream=self._stream)
        if not self._stream:
            total = self._reader.num_record_batches
            for number in range(total):
                yield (number + 1) / total, self._reader.get_batch(number)
            return
        for batch in self._reader:
            yield self._mapped.tell() / self._size, batch
        # Arrow takes a stream that was cut off between two batches for a whole one.
        self._mapped.seek(self._mapped.tell() - len(END_MARK))
        if self._mapped.read(len(END_MARK)) != END_MARK:
            raise ValueError("the stream's end mark is missing")

    def close(self) -> None:
        self._mapped.close()


class _Parquet:
    """A Parquet file; a row group may be gigabytes, and is read in parts."""

    def __init__(self, source: Input) -> None:
        import pyarrow.parquet as pq  # noqa: PLC0415 - takes a while, and few need it

        self._path = source.path
        self._file = pq.ParquetFile(
            source.path,
            buffer_size=2**20,
            pre_buffer=False,
            page_checksum_verification=True,
            # A list in the footer takes its memory before it is read, and has no more parts than the file has bytes.
            thrift_container_size_limit=min(max(1, source.size or 0), 10**6),
        )
        self.schema: pa.Schema = self._file.schema_arrow
        self._claims: Claims | None = None

    def batches(self, columns: Sequence[str] | None) -> Iterator[tuple[float, pa.RecordBatch]]:
        chosen = [name for name in self.schema.names if columns is None or name in columns]
        total, rows = self._file.metadata.num_rows, 0
        self._claims = Claims(self._path)
        for number in range(self._file.num_row_groups):
            self._claims.check(number, chosen)
            size = self._row_bytes(number, chosen)
            at_once = max(1, min(_PIECE_ROWS, _PIECE_BYTES // max(1, size)))
            for batch in self._group(number, chosen, at_once):
                rows += batch.num_rows
                yield min(1.0, rows / max(1, total)), batch

    def _group(self, number: int, columns: list[str], at_once: int) -> Iterator[pa.RecordBatch]:
        return self._file.iter_batches(at_once, row_groups=[number], columns=columns, use_threads=False)  # type: ignore[no-any-return]

    def _row_bytes(self, number: int, columns: list[str]) -> int:
        """About how large a decoded row of a group is: as in the file, or as its first one, whichever is more.

        Equal values may take next to nothing in the file. The group's `column()` would tell how many there are, but on
        damaged statistics it ends the process (seen with pyarrow 26).
        """
        group = self._file.metadata.row_group(number)
        size = int(group.total_byte_size // max(1, group.num_rows))
        if size > _ROW_BYTES:
            raise ValueError(f"row group {number} says that its rows have {size:,} bytes each")
        first = next(self._group(number, columns, 1), None)
        return size if first is None else max(size, first.nbytes)

    def close(self) -> None:
        self._file.close()
        if self._claims is not None:
            self._claims.close()


def present(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a value in this column."""
    value = row.get(name)
    return bool(value.is_valid) if isinstance(value, pa.Scalar) else value is not None


def plain(value: Any) -> Any:
    """The value of a cell as Python has it.

    Raises:
        SourceError: Python has no such value: nanoseconds, dates beyond year 9999.
    """
    if not isinstance(value, pa.Scalar):
        return value
    try:
        return as_py(value)
    except (*_ARROW_ERRORS, TypeError) as error:
        raise SourceError(f"a value of the type {value.type} cannot be read ({error})") from error


def numbers(row: Mapping[str, Any], name: str, dtype: Any, null: int | None = None) -> NDArray[Any]:
    """A column's list of numbers: [T] of the dtype.

    Args:
        row: the row.
        name: of the column.
        dtype: of the array.
        null: what stands for null where the dtype is of integers; for floats it is NaN.

    Raises:
        SourceError: it is missing or something else; null stands there, and nothing was said for it.
    """
    return _array(_list(row, name), name, dtype, null)


def ragged_numbers(row: Mapping[str, Any], name: str, dtype: Any) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """A column's list of lists of numbers, (count [R], flat [N] of the dtype); a list that is null is empty.

    Raises:
        SourceError: as for `numbers`.
    """
    count, values = any_numbers(row, name, dtype)
    if count is None:
        raise SourceError(f"{name} is a list of numbers; a list of lists of numbers is needed")
    return count, values


def any_numbers(row: Mapping[str, Any], name: str, dtype: Any) -> tuple[NDArray[np.int64] | None, NDArray[Any]]:
    """A column's list of lists of numbers as `ragged_numbers` gives it; or (None, [N]) of a plain list.

    A list that holds nothing but null, or nothing at all, is taken for a list of lists.

    Raises:
        SourceError: as for `numbers`.
    """
    rows = _list(row, name)
    if pa.types.is_null(rows.type):
        return np.zeros(len(rows), np.int64), np.empty(0, dtype)
    if not _is_list(rows.type):
        return None, _array(rows, name, dtype, None)
    count = np.asarray(rows.value_lengths().fill_null(0)).astype(np.int64)
    return count, _array(_decoded(rows.flatten()), name, dtype, None)


def _list(row: Mapping[str, Any], name: str) -> pa.Array:
    """A cell's list as an Arrow array; its own type is what the values are, not what is wanted of them."""
    value = row.get(name)
    if value is None or (isinstance(value, pa.Scalar) and not value.is_valid):
        raise SourceError(f"there is no {name} in this row")
    if isinstance(value, list):
        try:
            return pa.array(value)
        except (*_ARROW_ERRORS, TypeError, RecursionError) as error:
            raise SourceError(f"{name} is no list of numbers ({error})") from error
    while isinstance(value, pa.ExtensionScalar | pa.DictionaryScalar):
        value = value.value
    if not isinstance(value, pa.Scalar) or not _is_list(value.type):
        what = value.type if isinstance(value, pa.Scalar) else type(value).__name__
        raise SourceError(f"{name} is {what}; a list is needed")
    return _decoded(value.values)


def _decoded(values: pa.Array) -> pa.Array:
    """The values under extension types and dictionaries."""
    while isinstance(values, pa.ExtensionArray | pa.DictionaryArray):
        values = values.storage if isinstance(values, pa.ExtensionArray) else values.dictionary_decode()
    return values


def _array(values: pa.Array, name: str, dtype: Any, null: int | None) -> NDArray[Any]:
    wanted = np.dtype(dtype)
    kind = pa.types
    fits = kind.is_integer(values.type) or (wanted.kind == "f" and kind.is_floating(values.type))
    if not (fits or kind.is_null(values.type) or (kind.is_boolean(values.type) and wanted.kind != "f")):
        raise SourceError(f"{name} holds {values.type}; {'numbers' if wanted.kind == 'f' else 'integers'} are needed")
    if values.null_count and wanted.kind != "f" and null is None:
        raise SourceError(f"{name} holds null; capture it again, or leave these rows out")
    try:
        cast = values.cast(pa.from_numpy_dtype(wanted))
        cast = cast if null is None else cast.fill_null(null)
        array = cast.to_numpy(zero_copy_only=False)
    except (pa.ArrowException, OverflowError) as error:
        raise SourceError(f"{name}: {error}") from error
    return np.asarray(array).astype(wanted, copy=False)


def _is_list(kind: pa.DataType) -> bool:
    of = pa.types
    return any(is_one(kind) for is_one in (of.is_list, of.is_large_list, of.is_fixed_size_list, *_VIEWS))


_VIEWS: Final = (pa.types.is_list_view, pa.types.is_large_list_view)
