"""`distillkit`: what DistillKit's captures write and its trainer reads, in.

Parquet (or what `datasets` saves) with one row a sequence: `input_ids`, and in one of three layouts the candidates of
each position: `compressed_logprobs` with `bytepacked_indices`; in older sets `packed_indices`, `exact_values` and
`coeffs`; or `token_ids` with `top_values` as they are. The settings of the codec are no part of the files; a capture
leaves them beside them in `compression_config.yaml`. Row i predicts input_ids[i + 1]. A capture appends a pad token to
short texts, so that their last token has a distribution too, and has one row fewer than tokens; packed sets have as
many, and number the documents of a row in `attention_mask`. Ranks that the engine did not give hold -inf and any id.

The codecs lose: curves run over each other and sums over 1 even when read rightly. How often that is so tells right
settings from wrong ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Piece, Record, Tally
from logitstore.convert.beside import check_normalised, count_whole
from logitstore.convert.distillkit_codec import (
    MOST,
    PADDING,
    SETTINGS_BYTES,
    Codec,
    LegacyCodec,
    decode,
    decode_legacy,
    describe,
    parse_settings,
    usable,
)
from logitstore.convert.facts import settings_of
from logitstore.convert.rows import Rows, same_shape
from logitstore.convert.source import Input
from logitstore.convert.tables import (
    Batch,
    has_columns,
    numbers,
    plain,
    present,
    ragged_numbers,
    read_tables,
    table_kind,
)
from logitstore.errors import InvalidInputError, SourceError
from logitstore.limits import ID_LIMIT

Layout = Literal["present", "legacy", "raw"]

SETTINGS: Final = "compression_config.yaml"
"""The file with the settings, beside the data."""

IDS_KEY: Final = b"logitstore.ids"
"""In the metadata of an exported Parquet file: JSON, the id of each row."""

_LAYOUTS: Final[dict[Layout, tuple[str, ...]]] = {
    "present": ("compressed_logprobs", "bytepacked_indices"),
    "legacy": ("packed_indices", "exact_values", "coeffs"),
    "raw": ("token_ids", "top_values"),
}
_ID: Final = "logitstore.id"  # a column that is added to what is read
_IDS: Final = msgspec.json.Decoder(list[str])

_JUDGED: Final = 1000  # rows before the settings are judged on the way

_ALIGNED_NOTE: Final = "Row i was taken as the distribution of input_ids[i + 1]."
_PAD_NOTE: Final = "The pad token that captures append to short texts is kept: it stands at the end of their tokens."
_LOGIT_NOTE: Final = "Values were taken as logits and normalised over the candidates of each row."
_MASK_NOTE: Final = (
    "attention_mask is kept as a column. In packed sets it numbers the documents; each document is a context of its "
    "own, and its last row predicts what followed there, not the first token of the next one."
)
_LABEL_NOTE: Final = (
    "In {n} of the sequences loss_mask is 0 where `labels` is negative, as DistillKit's trainer has it."
)
_SHORT_NOTE: Final = "In {n} of the sequences more than the last position has no row."


def _recognises(source: Input) -> bool:
    return any(has_columns(source, "input_ids", *columns) for columns in _LAYOUTS.values())


def _read(inputs: list[Input], options: Options) -> Import:
    layout = _layout(inputs[0])
    logits = _are_logits(inputs[0], layout, options)
    codec = _codec(inputs, options, layout)
    masked = has_columns(inputs[0], "attention_mask")
    settings = settings_of(inputs)
    judged = not logits and "normalised" not in settings and options.normalised is None
    if codec is not None:
        settings["logit_width"] = codec.d
    notes = [_ALIGNED_NOTE, _PAD_NOTE] + ([] if codec is None else [f"Settings: {describe(codec)}."])
    if logits:
        settings["normalised"] = "candidates"
        notes.append(_LOGIT_NOTE)
    if masked:
        settings["columns"] = pa.schema([("attention_mask", pa.list_(pa.int64()))])
        notes.append(_MASK_NOTE)
    opened = read_tables(
        inputs,
        _Parser(layout, codec, logits, masked),
        ("input_ids", *_LAYOUTS[layout], "labels", "attention_mask"),
        settings=settings,
        notes=notes,
        check=partial(_check, inputs[0].name, codec, judged=judged),
    )
    opened.pieces = _named(opened.pieces, {source.name: _written_ids(source) for source in inputs})
    return opened


def _are_logits(source: Input, layout: Layout, options: Options) -> bool:
    kind = options.value_kind or ("logprob" if layout != "raw" else None)
    if kind is None:
        says = "nothing says whether top_values are raw logits or logprobs"
        raise InvalidInputError(f"{source.name}: {says}; give --value-kind logit or --value-kind logprob")
    if kind not in ("logprob", "logit"):
        raise InvalidInputError(f"{source.name}: DistillKit has no values of the kind {kind}, but logprobs and logits")
    if kind == "logit" and options.normalised == "vocabulary":
        raise InvalidInputError("logits of some candidates can be normalised over these alone: --normalised candidates")
    return kind == "logit"


def _layout(source: Input) -> Layout:
    for layout, columns in _LAYOUTS.items():
        if has_columns(source, "input_ids", *columns):
            return layout
    ways = "; or ".join(", ".join(columns) for columns in _LAYOUTS.values())
    raise SourceError(f"{source.name}: the columns input_ids and {ways} are needed, and it has not all of these")


def _codec(inputs: list[Input], options: Options, layout: Layout) -> Codec | LegacyCodec | None:
    """The settings: those that are named, or those beside the files.

    Raises:
        InvalidInputError: there are none, or the files need none.
        SourceError: they are malformed, of the other codec, or differ from directory to directory.
    """
    if layout == "raw":
        if options.codec_config is not None:
            raise InvalidInputError(f"{inputs[0].name}: its values are not compressed; leave --codec-config out")
        return None
    files = [options.codec_config] if options.codec_config is not None else _beside(inputs)
    found = {file: parse_settings(_content(file), str(file)) for file in files}
    first = files[0]
    for file, codec in found.items():
        if isinstance(codec, LegacyCodec) != (layout == "legacy"):
            other = "legacy" if layout != "legacy" else "present"
            raise SourceError(f"{file}: these are settings of the {other} codec, but the files are of the {layout} one")
        if codec != found[first]:
            raise SourceError(f"{file} and {first} say different settings; convert these files one after another")
    return found[first]


def _beside(inputs: list[Input]) -> list[Path]:
    """The files of settings in the directories of the inputs, or one above, where the Hub has them."""
    directories = dict.fromkeys(source.path.resolve().parent for source in inputs if source.size is not None)
    places = {directory: [directory / SETTINGS, directory.parent / SETTINGS] for directory in directories}
    found = {directory: [file for file in files if file.is_file()] for directory, files in places.items()}
    missing = [directory for directory, files in found.items() if not files]
    if missing or not found:
        raise InvalidInputError(
            f"{inputs[0].name}: there is no {SETTINGS} beside it, and the values cannot be read without: give "
            f"--codec-config, a YAML file with the settings of the capture (d, k, exact_k and so on; vocab_size for d "
            f"in legacy ones), which a trainer's configuration has under `teacher`"
        )
    return list(dict.fromkeys(files[0] for files in found.values()))


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(SETTINGS_BYTES + 1)
    except OSError as error:
        raise InvalidInputError(f"{file}: the settings cannot be read ({error})") from error


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequence of a row.

    Attributes:
        layout: of the files.
        codec: the settings; None where nothing is compressed.
        logits: whether the values are logits, not logprobs.
        masked: whether attention_mask is kept.
    """

    layout: Layout
    codec: Codec | LegacyCodec | None
    logits: bool
    masked: bool

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        row = record.data
        tokens = numbers(row, "input_ids", np.int64)
        given = self._decoded(row)
        if len(given.count) > len(tokens):
            says = f"{_LAYOUTS[self.layout][0]} has {len(given.count)} rows for {len(tokens)} input_ids"
            raise SourceError(f"{says}; there is at most one a token")
        if len(given.count) < len(tokens) - 1:
            tally.note(_SHORT_NOTE)
        _judge(given, tally)
        rows, figures = usable(given, ID_LIMIT if self.codec is None else self.codec.d, logits=self.logits)
        tally.counts.update(figures)
        found = rows.arguments(tokens, slice(0, len(rows.count)))
        if present(row, "labels") and (mask := _mask(row, tokens, found["count"])) is not None:
            found["loss_mask"] = mask
            tally.note(_LABEL_NOTE)
        if self.masked and present(row, "attention_mask"):
            found["attention_mask"] = _per_token(row, "attention_mask", tokens).tolist()
        if present(row, _ID):
            found["id"] = plain(row[_ID])
        yield Item("add", found)

    def _decoded(self, row: Mapping[str, Any]) -> Rows:
        """All candidates as the files have them."""
        names = _LAYOUTS[self.layout]
        if self.codec is None:
            count, ids = ragged_numbers(row, names[0], np.int64)
            other, values = ragged_numbers(row, names[1], np.float32)
            same_shape(count, other, *names)
            return Rows(count, ids, values)
        if isinstance(self.codec, Codec):
            widths = {names[0]: (np.uint8, self.codec.value_bytes), names[1]: (np.uint8, self.codec.id_bytes)}
            found = decode(self.codec, *_matrices(row, widths, "bytes"))
        else:
            shapes = ((np.uint64, self.codec.words), (np.float32, self.codec.exact_k), (np.float32, self.codec.terms))
            found = decode_legacy(self.codec, *_matrices(row, dict(zip(names, shapes, strict=True)), "numbers"))
        return Rows(np.full(len(found[0]), self.codec.k), found[0].ravel(), found[1].ravel())


def _matrices(row: Mapping[str, Any], shapes: Mapping[str, tuple[Any, int]], unit: str) -> list[NDArray[Any]]:
    """Columns, by name their dtype and the length that the settings say all their rows have.

    Raises:
        SourceError: naming column and row.
    """
    found: list[NDArray[Any]] = []
    for name, (dtype, width) in shapes.items():
        count, flat = ragged_numbers(row, name, dtype)
        if bool((count != width).any()):
            at = int(np.argmax(count != width))
            says = f"row {at}: {name} has {count[at]} {unit}, but by the settings it has {width}"
            raise SourceError(f"{says}: these are not the settings of the capture")
        if found and len(count) != len(found[0]):
            raise SourceError(f"{name} has {len(count)} rows, {next(iter(shapes))} {len(found[0])}")
        found.append(flat.reshape(len(count), width))
    return found


def _per_token(row: Mapping[str, Any], name: str, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    values = numbers(row, name, np.int64)
    if len(values) != len(tokens):
        raise SourceError(f"{name} has {len(values)} numbers for {len(tokens)} input_ids")
    return values


def _mask(row: Mapping[str, Any], tokens: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Which rows are trained on; None where all are that have candidates."""
    mask = _per_token(row, "labels", tokens) >= 0
    return None if bool(mask[count > 0].all()) else mask


def _judge(given: Rows, tally: Tally) -> None:
    """Count the rows, and those that sum to one as they stand there, without what is no candidate."""
    counted = Tally()
    count_whole(given.keep(given.logprobs > PADDING), counted)
    tally.counts.update({f"judged {name}": n for name, n in counted.counts.items()})


def _check(
    source: str,
    codec: Codec | LegacyCodec | None,
    tally: Tally,
    final: bool,  # noqa: FBT001
    *,
    judged: bool,
) -> list[str]:
    """Judge the whole, and say the figures."""
    counts = tally.counts
    rows, over, positive = counts["rows"], counts["over"], counts["positive"]
    if not final and rows < _JUDGED:
        return []
    wrong = "" if codec is None else f"the settings are not those of the capture ({describe(codec)})"
    if 2 * positive > rows and not isinstance(codec, Codec):
        says = f"{source}: {positive:,} of {rows:,} rows have values above 0"
        raise SourceError(f"{says}: these are logits (give --value-kind logit)" + (f", or {wrong}" if wrong else ""))
    if 3 * over > rows:
        says = f"{source}: {over:,} of {rows:,} rows sum to over {MOST}, or are no numbers"
        raise SourceError(f"{says}: {wrong or 'these are no logprobs'}")
    if judged:
        whole = Counter({name: counts[f"judged {name}"] for name in ("rows", "whole")})
        check_normalised(Tally(counts=whole), final)
    if not final:
        return []
    unsorted, scaled, emptied = (counts[name] for name in ("unsorted", "scaled", "emptied"))
    ordered = (
        f"Of {rows:,} rows, {unsorted:,} were out of order and sorted, {scaled:,} summed to over 1 and were scaled"
    )
    return [f"{ordered}, and {emptied:,} were left out, as they sum to over {MOST} or hold what is no logprob."]


def _written_ids(source: Input) -> list[str]:
    """The ids that `export` wrote into the metadata of a Parquet file; none where it wrote none."""
    import pyarrow.parquet as pq  # noqa: PLC0415 - takes a while, and few need it

    if source.size is None or table_kind(source) != "parquet":
        return []
    try:
        return _IDS.decode((pq.read_metadata(source.path).metadata or {}).get(IDS_KEY, b"[]"))
    except (pa.ArrowException, OSError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return []  # where the file is damaged, reading it says so


def _named(pieces: Iterator[Piece], names: Mapping[str, list[str]]) -> Iterator[Piece]:
    """The pieces, with the ids of their rows as a further column."""
    for piece in pieces:
        if isinstance(piece, Batch):
            ids = names[piece.name][piece.row : piece.row + piece.batch.num_rows]
            if len(ids) == piece.batch.num_rows:
                yield replace(piece, batch=piece.batch.append_column(_ID, pa.array(ids, pa.string())))
                continue
        yield piece


IMPORTER: Final = Importer(
    name="distillkit",
    description="DistillKit: Parquet or Arrow with compressed logprobs, and compression_config.yaml",
    loses="rows that sum to over 1.02; columns other than input_ids, labels and attention_mask",
    recognises=_recognises,
    read=_read,
    patterns=("*.parquet", "*.arrow"),
    options=("codec_config", "value_kind"),
)
