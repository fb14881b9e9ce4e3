"""`parquet` and `jsonl`: one row a sequence, candidates as lists of lists, best first.

Row t of `ids` and `logprobs` predicts token t + 1; a position without a distribution has empty lists. `tail`,
`target_logprob`, `target_rank`, `logsumexp`, `entropy` and `loss_mask` are there where the dataset has them, one value
a position; `draws`, beside the logprobs, where distributions were sampled; then the users' columns. The importer
`columns` reads both.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Final, Self

import msgspec
import numpy as np
import pyarrow as pa
import zstandard
from numpy.typing import NDArray

from logitstore.convert import users
from logitstore.convert.base import Export, Exporter
from logitstore.convert.facts import FACTS_KEY, described
from logitstore.convert.rows import CLAMPED
from logitstore.dataset.reader import Dataset
from logitstore.encoding import ragged
from logitstore.shard.sequence import Sequence

POSITIONAL: Final = ("tail", "target_logprob", "target_rank", "logsumexp", "entropy", "loss_mask")
"""The columns of one value a position that not every dataset has."""

_GROUP_BYTES: Final = 2**24  # of a Parquet row group, uncompressed: the Hub's viewer wants less than 100 MB
_FILE_BYTES: Final = 400 * 10**6  # of a file, where the output is a directory
_TYPES: Final = {
    "tokens": pa.list_(pa.uint32()),
    "ids": pa.list_(pa.list_(pa.int32())),
    "logprobs": pa.list_(pa.list_(pa.float32())),
    "draws": pa.list_(pa.list_(pa.int32())),
    "tail": pa.list_(pa.float32()),
    "target_logprob": pa.list_(pa.float32()),
    "target_rank": pa.list_(pa.int64()),
    "logsumexp": pa.list_(pa.float32()),
    "entropy": pa.list_(pa.float32()),
    "loss_mask": pa.list_(pa.int8()),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """What of a dataset is exported.

    Attributes:
        dataset: a view with these columns alone.
        names: the format's own columns, `tokens` first.
        user: the users' columns, and their types.
    """

    dataset: Dataset
    names: tuple[str, ...]
    user: dict[str, pa.DataType]

    def without(self, left: Collection[str]) -> Chosen:
        """The same without some of the users' columns."""
        kept = {name: kind for name, kind in self.user.items() if name not in left}
        return Chosen(self.dataset.select([*self.names, *kept]), self.names, kept)


def chosen(dataset: Dataset) -> Chosen:
    """The columns that a dataset has, of those that the view decodes; tokens and candidates always."""
    info = dataset.info
    optional = [name for name in POSITIONAL if name in dataset.columns and info.totals.columns.get(name)]
    sampled = ["draws"] if info.totals.encodings.get("draws") else []
    names = ("tokens", "ids", "logprobs", *sampled, *optional)
    user = users.types_of(dataset)
    return Chosen(dataset.select([*names, *user]), names, user)


def cut(sequence: Sequence, k: int | None) -> Sequence:
    """The sequence with the best k candidates of each position; the tail covers what is left out.

    Args:
        sequence: with `count`, and with `logprobs` where it has a `tail`.
        k: most candidates; None keeps all.
    """
    if k is None or len(sequence.count) == 0 or int(sequence.count.max()) <= k:
        return sequence
    count = sequence.count
    fields = dict(sequence.__dict__)
    keep = ragged.ranks(count) < k
    fields["count"] = np.minimum(count, k).astype(count.dtype)
    fields["offsets"] = ragged.offsets(fields["count"])
    for name in ("ids", "logprobs", "draws"):
        if fields.get(name) is not None:
            fields[name] = fields[name][keep]
    if "tail" in fields:
        left = ragged.row_sums(np.exp(sequence.logprobs[~keep], dtype=np.float64), count - fields["count"])
        with np.errstate(divide="ignore", invalid="ignore"):
            fields["tail"] = np.logaddexp(sequence.tail, np.log(left)).astype(np.float32)
    return Sequence.of(fields)


def cut_notes(dataset: Dataset, k: int | None) -> list[str]:
    """What `cut` loses."""
    if k is None:
        return []
    if dataset.info.totals.columns.get("tail"):
        return [f"Candidates beyond the best {k} of a position were left out; the tail covers them."]
    return [f"Candidates beyond the best {k} of a position were left out."]


# Parquet

_METADATA_NOTE: Final = (
    "Alignment, teacher, temperature, normalisation and the tokenizer's digest are in the file's metadata alone, under "
    "the key logitstore; logitstore convert --from columns reads it back, and takes these from there."
)
_SUFFIX: Final = ".parquet"


def _write_parquet(dataset: Dataset, path: Path, options: Export) -> list[str]:
    what = chosen(dataset)
    kept, left = users.split_for_parquet(what.user)
    what = what.without(what.user.keys() - kept.keys())
    schema = _schema(what, options.k)
    notes = [_METADATA_NOTE, *left, *cut_notes(dataset, options.k)]
    done = _Progress(options)
    if path.name.lower().endswith(_SUFFIX):
        with _Files(schema, lambda _number: path) as files:
            _write_rows(what, what.dataset, files, done, options.k)
        if len(dataset.splits) > 1:
            notes.append(f"The splits {', '.join(dataset.splits)} follow one another in one table.")
        return notes
    folder = path / "data"
    folder.mkdir(parents=True)
    views = {name: what.dataset.split(name) for name in dataset.splits}
    for name, view in views.items():
        if len(view) or (name == dataset.splits[0] and not len(dataset)):
            _write_split(what, view, schema, folder, name, done, options.k)
    return notes


def _write_split(
    what: Chosen, view: Dataset, schema: pa.Schema, folder: Path, name: str, done: _Progress, k: int | None
) -> None:
    """The files of a split, by the names that the Hub and `datasets` know."""
    with _Files(schema, lambda number: folder / f"{name}-{number:05d}.partial", _FILE_BYTES) as files:
        _write_rows(what, view, files, done, k)
    for number in range(files.number + 1):
        written = folder / f"{name}-{number:05d}.partial"
        written.rename(folder / f"{name}-{number:05d}-of-{files.number + 1:05d}.parquet")


@dataclass(slots=True)
class _Progress:
    options: Export
    sequences: int = 0

    def add(self) -> None:
        self.sequences += 1
        self.options.progress(self.sequences)


class _Files:
    """Parquet files one after another; each closes when it is large enough."""

    def __init__(self, schema: pa.Schema, name: Callable[[int], Path], limit: int | None = None) -> None:
        self._schema = schema
        self._name = name
        self._limit = limit
        self._stack = ExitStack()
        self.number = 0
        self._open()

    def _open(self) -> None:
        import pyarrow.parquet as pq  # noqa: PLC0415 - takes a while, and few need it

        self._file = self._stack.enter_context(self._name(self.number).open("wb"))
        self._writer = self._stack.enter_context(
            pq.ParquetWriter(
                self._file, self._schema, compression="zstd", write_page_index=True, write_page_checksum=True
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """A row group."""
        if self._limit is not None and self._file.tell() >= self._limit:
            self._stack.close()
            self.number += 1
            self._open()
        table = pa.Table.from_batches([batch])
        try:
            self._writer.write_table(table, row_group_size=max(1, batch.num_rows))
        except pa.ArrowException as error:
            raise users.unwritten(table, error) from error


def _write_rows(what: Chosen, view: Dataset, files: _Files, done: _Progress, k: int | None) -> None:
    for group in _groups(view, k):
        files.write(_batch(group, what, files._schema))
        for _ in group:
            done.add()


def _groups(view: Dataset, k: int | None) -> Iterator[list[Sequence]]:
    """The sequences in groups of bounded size."""
    group: list[Sequence] = []
    size = 0
    for sequence in view:
        kept = cut(sequence, k)
        more = 4 * len(kept) + 12 * int(kept.offsets[-1]) + sum(map(users.size_of, _user_values(kept).values()))
        if group and size + more > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(kept)
        size += more
    if group:
        yield group


def _schema(what: Chosen, k: int | None) -> pa.Schema:
    fields = [pa.field("id", pa.utf8()), *(pa.field(name, _TYPES[name]) for name in what.names)]
    fields += [pa.field(name, kind) for name, kind in what.user.items()]
    return pa.schema(fields, metadata={FACTS_KEY: msgspec.json.encode(described(what.dataset, k))})


def _user_values(sequence: Sequence) -> dict[str, Any]:
    """The users' columns of a sequence; none where the view has none."""
    found: dict[str, Any] = sequence.__dict__.get("columns", {})
    return found


def _batch(group: list[Sequence], what: Chosen, schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array([sequence.id for sequence in group], pa.utf8())]
    arrays += [_lists(group, name) for name in what.names]
    arrays += [
        users.array_of(name, [sequence.columns.get(name) for sequence in group], kind)
        for name, kind in what.user.items()
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _lists(group: list[Sequence], name: str) -> pa.Array:
    """One column of some sequences; null where a sequence has none."""
    kind = _TYPES[name]
    nested = pa.types.is_list(kind.value_type)
    given = [getattr(sequence, name) for sequence in group]
    dtype = (kind.value_type.value_type if nested else kind.value_type).to_pandas_dtype()
    values: NDArray[Any] = np.concatenate([np.empty(0, dtype), *(each for each in given if each is not None)])
    inner = pa.array(values.astype(dtype, copy=False))
    lengths = [0 if each is None else len(sequence) for each, sequence in zip(given, group, strict=True)]
    if nested:
        counts = [sequence.count for each, sequence in zip(given, group, strict=True) if each is not None]
        inner = pa.ListArray.from_arrays(_offsets(np.concatenate([np.empty(0, np.int64), *counts])), inner)
    absent = pa.array([each is None for each in given], pa.bool_())
    return pa.ListArray.from_arrays(_offsets(np.array(lengths, np.int64)), inner, kind, mask=absent)


def _offsets(lengths: NDArray[Any]) -> pa.Array:
    return pa.array(ragged.offsets(lengths).astype(np.int32))


# JSON lines

_USERS_NOTE: Final = (
    "Of the columns {names} JSON keeps the values, not their Arrow types: NaN and infinities become null, bytes "
    "base64, and dates, times, durations and decimals text."
)


def _write_jsonl(dataset: Dataset, path: Path, options: Export) -> list[str]:
    what = chosen(dataset)
    encoder = msgspec.json.Encoder(enc_hook=users.json_of, decimal_format="string")
    done = _Progress(options)
    with _opened(path) as file:
        for sequence in what.dataset:
            file.write(encoder.encode(_object(cut(sequence, options.k), what)) + b"\n")
            done.add()
    info = dataset.info
    says = ["--value-kind logprob", "--alignment next", f"--normalised {info.normalised}"]
    says += [] if info.temperature == 1 else [f"--temperature {info.temperature:g}"]
    lost = "Teacher, tokenizer, temperature, normalisation and splits are not in the file"
    notes = [f"{lost}; convert it back by --from columns {' '.join(says)}."]
    if what.user:
        notes.append(_USERS_NOTE.replace("{names}", ", ".join(what.user)))
    return [*notes, *cut_notes(dataset, options.k)]


def _opened(path: Path) -> IO[bytes]:
    """The file, compressed where its name will say so."""
    name = path.name
    if name.endswith(".zst"):
        return zstandard.open(path, "wb")  # type: ignore[no-any-return]
    return gzip.open(path, "wb") if name.endswith(".gz") else path.open("wb")  # type: ignore[return-value]


def _object(sequence: Sequence, what: Chosen) -> dict[str, Any]:
    """A sequence as JSON has it; NaN becomes null when it is written, and so do 0 for a rank and -1 for a mask."""
    fields: dict[str, Any] = {"id": sequence.id, "tokens": sequence.tokens.tolist()}
    for name in what.names[1:]:
        values = getattr(sequence, name)
        if values is None:
            fields[name] = None
        elif name in ("ids", "logprobs", "draws"):
            fields[name] = _nested(_listed(name, values), sequence)
        else:
            fields[name] = _listed(name, values)
    return fields | _user_values(sequence)


def _listed(name: str, values: NDArray[Any]) -> list[Any]:
    if name in ("target_rank", "loss_mask"):
        known = values >= (1 if name == "target_rank" else 0)
        values = np.where(known, values.astype(object), np.array(None, object))
    elif values.dtype == np.float32:
        if name == "tail":  # JSON has no -inf, and null is an unknown tail
            values = np.where(np.isneginf(values), np.float32(CLAMPED), values)
        # The shortest text that reads back as this float32; that of its exact value is twice as long.
        values = pa.array(values).cast(pa.string()).cast(pa.float64()).to_numpy(zero_copy_only=False)
    listed: list[Any] = values.tolist()
    return listed


def _nested(values: list[Any], sequence: Sequence) -> list[list[Any]]:
    return [values[start:end] for start, end in pairwise(sequence.offsets.tolist())]


PARQUET: Final = Exporter(
    name="parquet",
    description="Parquet with plain lists, for the Hub's viewer and load_dataset: a file, or a directory of splits",
    loses="the tokenizer's files and the digests; the bfloat16 logits themselves; columns that Parquet has no type for",
    write=_write_parquet,
    files=("data/*-[0-9]*-of-[0-9]*.parquet",),
)

JSONL: Final = Exporter(
    name="jsonl",
    description="JSON lines, one sequence a line, under .zst or .gz where the name says so",
    loses="teacher, tokenizer, temperature, normalisation, splits, digests; the Arrow types of the users' columns",
    write=_write_jsonl,
)
