"""`distillkit`, out: a directory of Parquet and `compression_config.yaml` (see `distillkit`, which reads it back).

Its trainer and its packer take every column as numbers, one a token. So no column of ids is written: these stand in the
metadata of the Parquet files, with normalisation and temperature. By `labels` the trainer masks the row of the same
position. Every candidate is an exact one: no curve is fitted to any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Export, Exporter
from logitstore.convert.distillkit import IDS_KEY, SETTINGS
from logitstore.convert.distillkit_codec import PADDING, Codec, describe, format_settings, id_bits, pack
from logitstore.convert.export_rows import NEEDED, rectangle
from logitstore.convert.facts import metadata
from logitstore.dataset.reader import Dataset
from logitstore.encoding import ragged
from logitstore.shard.sequence import Sequence

_GROUP_BYTES: Final = 48 * 2**20  # a row group closes at this many; Parquet adds some
_FILE_BYTES: Final = 640 * 2**20
_FILE_IDS: Final = 8 * 2**20  # bytes of ids in the metadata of a file
_UNMASKED: Final = -100  # the label that is no label
_SCHEMA: Final = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
        ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ("labels", pa.list_(pa.int64())),
    ]
)


def _write(dataset: Dataset, path: Path, options: Export) -> list[str]:
    codec = _exact_codec(dataset, options.k)
    path.mkdir()
    (path / SETTINGS).write_text(format_settings(codec), encoding="utf-8")
    cut = filled = empty = 0
    with _Files(path, codec, _SCHEMA.with_metadata(metadata(dataset))) as files:
        for number, sequence in enumerate(dataset.select(NEEDED), 1):
            files.add(sequence)
            count = sequence.count.astype(np.int64)
            cut += int(np.maximum(count - codec.k, 0).sum())
            filled += int(((count > 0) & (count < codec.k)).sum())
            empty += int((count == 0).sum())
            options.progress(number)
    info = dataset.info
    notes = (
        (cut, f"{cut:,} candidates beyond the best {codec.k} of their position were left out."),
        (
            filled,
            f"{filled:,} positions have fewer than {codec.k} candidates: unused ids of probability 0 fill them up.",
        ),
        (empty, f"{empty:,} positions have no distribution: their rows are such ids alone, and `labels` masks them."),
        (
            info.normalised == "candidates",
            "That probabilities are normalised over the candidates stands in the metadata of the files alone.",
        ),
        (
            info.temperature != 1,
            f"The temperature {info.temperature} stands in the metadata of the files alone; its trainer supposes 1.",
        ),
    )
    return [f"Settings: {describe(codec)}.", *(note for holds, note in notes if holds)]


def _exact_codec(dataset: Dataset, most: int | None) -> Codec:
    """Settings that store every candidate as it is: k of the widest position, and a width that all ids fit."""
    width = dataset.info.logit_width
    widest = highest = 0
    for sequence in dataset.select(["count"] if width is not None else ["count", "ids"]):
        widest = max(widest, int(sequence.count.max(initial=0)))
        if width is None:
            highest = max(highest, int(sequence.ids.max(initial=0)))
    k = max(1, widest if most is None else min(most, widest))
    d = max(2, k, highest + 1 if width is None else width)
    if 2 ** id_bits(d) < d:  # DistillKit would give ids too few bits
        d = 2 ** d.bit_length()
    return Codec(d=d, k=k, exact_k=k, polynomial_terms=(), delta_encoding=False)


@dataclass(slots=True)
class _Files:
    """Writes `data_0.parquet`, `data_1.parquet`, ...; a context manager."""

    path: Path
    codec: Codec
    schema: pa.Schema
    held: list[tuple[NDArray[Any], ...]] = field(default_factory=list)
    held_bytes: int = 0
    ids: list[str] = field(default_factory=list)
    id_bytes: int = 0
    bytes: int = 0
    number: int = 0
    writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        if self.writer is not None:
            self._finish()

    def add(self, sequence: Sequence) -> None:
        """Add a sequence; what is held is written when it is enough."""
        cells = _cells(sequence, self.codec)
        self.held.append(cells)
        self.held_bytes += sum(cell.nbytes for cell in cells)
        self.ids.append(sequence.id)
        self.id_bytes += len(sequence.id.encode()) + 3
        if self.held_bytes >= _GROUP_BYTES or self.id_bytes >= _FILE_IDS:
            self._flush()

    def _flush(self) -> None:
        """Write what is held as one row group; an empty one is written where there would be no file at all."""
        import pyarrow.parquet as pq  # noqa: PLC0415 - takes a while, and few need it

        if not self.held and self.number + (self.writer is not None) > 0:
            return
        if self.writer is None:
            file = self.path / f"data_{self.number}.parquet"
            self.writer = pq.ParquetWriter(file, self.schema, compression="zstd", write_page_checksum=True)
        self.writer.write_batch(_batch(self.held), row_group_size=max(1, len(self.held)))
        self.bytes += self.held_bytes
        self.held, self.held_bytes = [], 0
        if self.bytes >= _FILE_BYTES or self.id_bytes >= _FILE_IDS:
            self._finish()

    def _finish(self) -> None:
        self.writer.add_key_value_metadata({IDS_KEY: msgspec.json.encode(self.ids)})
        self.writer.close()
        self.writer = None
        self.number += 1
        self.bytes, self.ids, self.id_bytes = 0, [], 0


def _cells(sequence: Sequence, codec: Codec) -> tuple[NDArray[Any], ...]:
    """Tokens [T], bytes of the values and of the ids [T, ...], labels [T]."""
    ids, logprobs = rectangle(sequence, codec.k, PADDING)
    count = sequence.count
    values = np.ascontiguousarray(logprobs, "<f4").view(np.uint8).reshape(len(ids), 4 * codec.k)
    trained = count > 0
    if sequence.loss_mask is not None:
        trained &= sequence.loss_mask != 0
    tokens = sequence.tokens.astype(np.uint64)
    return tokens, values, pack(ids, id_bits(codec.d)), np.where(trained, tokens.astype(np.int64), _UNMASKED)


def _batch(rows: list[tuple[NDArray[Any], ...]]) -> pa.RecordBatch:
    """The cells of some sequences as Arrow has them; no value becomes a Python object."""
    if not rows:
        return pa.RecordBatch.from_pylist([], schema=_SCHEMA)
    arrays = []
    for cells in zip(*rows, strict=True):
        whole = np.concatenate(cells)
        values = pa.array(whole.ravel())
        if whole.ndim == 2:
            values = pa.ListArray.from_arrays(np.arange(len(whole) + 1, dtype=np.int32) * whole.shape[1], values)
        starts = ragged.offsets(np.array([len(cell) for cell in cells])).astype(np.int32)
        arrays.append(pa.ListArray.from_arrays(starts, values))
    return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


EXPORTER: Final = Exporter(
    name="distillkit",
    description="DistillKit: a directory of Parquet with exact logprobs, and compression_config.yaml",
    loses=(
        "tails, candidates beyond k, target logprobs and ranks, logsumexp, entropy, draws, users' columns, splits, "
        "teacher and tokenizer; loss_mask where a position has no distribution"
    ),
    write=_write,
    files=(SETTINGS, "data_[0-9]*.parquet"),
)
