"""What importers of tables and lines share: what stands beside records, and whether rows are where they should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Import, Piece, Record, Tally, ready
from logitstore.convert.lines import decode
from logitstore.convert.rows import Rows
from logitstore.convert.source import Input
from logitstore.convert.tables import numbers, plain, present, read_tables
from logitstore.encoding import ragged
from logitstore.errors import LogitStoreError, SourceError

_JSON: Final = msgspec.json.Decoder()
TOKEN_COLUMNS: Final[tuple[str, ...]] = ("input_ids", "tokens")
"""Where the tokens of a row stand, the first that is there."""

_SAME: Final = 0.125  # nats: how far two reports of one logprob may be apart, for what the engine rounded
_ROWS_TO_JUDGE: Final = 256
_WHOLE: Final = 1e-4  # how far sums of probabilities that were normalised again are from 1, in half precision


@dataclass(frozen=True, slots=True)
class Paired:
    """A piece with something beside each of its records: their `data` is (data, what is beside it)."""

    piece: Piece
    beside: list[Any]

    def records(self) -> Iterator[Record]:
        """Its records."""
        for record, extra in zip(self.piece.records(), self.beside, strict=True):
            yield replace(record, data=(record.data, extra))


def paired(pieces: Iterator[Piece], beside: Iterator[Any], name: str) -> Iterator[Piece]:
    """Pieces whose records have beside them what another file says, in the same order.

    Args:
        pieces: the pieces.
        beside: one of them for each record.
        name: where those come from, for messages.

    Raises:
        SourceError: there are fewer of them, or more.
    """
    seen = 0
    for piece in pieces:
        size = sum(1 for _ in piece.records())
        held = list(islice(beside, size))
        seen += len(held)
        if len(held) < size:
            raise SourceError(f"{name} ends after {seen} rows, before the records do; it needs one for each, in order")
        yield Paired(piece, held)
    if next(beside, None) is not None:
        raise SourceError(f"{name} has more rows than there are records ({seen}); it needs one for each, in order")


def row_of(data: Any) -> Mapping[str, Any]:
    """The row of a table's record, or the object of a JSON line.

    Raises:
        SourceError: the line is none.
    """
    if not isinstance(data, bytes):
        row: Mapping[str, Any] = data
        return row
    found = decode(_JSON, data, "JSON object")
    if not isinstance(found, dict):
        raise SourceError("no JSON object; each line is one row, as {column: value}")
    return found


def rows_beside(
    path: Path, read: Callable[[Mapping[str, Any]], Any], columns: Sequence[str] | None = None
) -> Iterator[Any]:
    """What `read` makes of each row of a table or of JSON lines; of a Parquet file only some columns are read.

    Raises:
        SourceError: naming the row.
    """
    source = Input(path)
    try:
        for piece in read_tables([source], ready, columns).pieces:
            for record in piece.records():
                try:
                    found = read(row_of(record.data))
                except SourceError as error:
                    raise SourceError(f"{record.place}: {error}") from error
                yield found
    finally:
        source.close()


def tokens_of(row: Mapping[str, Any]) -> NDArray[np.int64] | None:
    """The tokens of a row: `input_ids` or `tokens`; None where it has neither."""
    name = next((name for name in TOKEN_COLUMNS if present(row, name)), None)
    return None if name is None else numbers(row, name, np.int64)


def needed_tokens(row: Mapping[str, Any]) -> NDArray[np.int64]:
    """The tokens of a row of `--tokens`.

    Raises:
        SourceError: it has none.
    """
    tokens = tokens_of(row)
    if tokens is None:
        raise SourceError("there is neither input_ids nor tokens in this row")
    return tokens


def first_record(opened: Import) -> Any:
    """The data of the first record of an import, which stays in it; None where there is none."""
    first = next(opened.pieces, None)
    if first is None:
        return None
    opened.pieces = chain([first], opened.pieces)
    return next((record.data for record in first.records()), None)


def first_row(opened: Import) -> Mapping[str, Any]:
    """The first row of an import, which stays in it; empty where there is none that can be read."""
    try:
        return row_of(first_record(opened) or {})
    except LogitStoreError:
        return {}  # it fails when its turn comes


def id_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The argument `id` where a row has one that is a text or an integer."""
    value = plain(row.get("id"))
    return {"id": str(value)} if isinstance(value, str | int) and not isinstance(value, bool) else {}


def next_tokens(tokens: NDArray[np.int64], at: NDArray[np.int64]) -> NDArray[np.int64]:
    """The token that the row at each of these positions predicts; -1 behind the last one."""
    return np.asarray(np.append(tokens, -1)[at + 1])


def check_actual(rows: Rows, actual: NDArray[np.int64], said: NDArray[Any], name: str) -> None:
    """Refuse rows in whose place another token stands than they were made for.

    Args:
        rows: the candidates.
        actual: the token that stands in the place of each row, [R].
        said: what the producer says is that token's logprob; NaN where it says nothing.
        name: of that field.

    Raises:
        SourceError: naming the row; the candidates contradict what was said.
    """
    row = ragged.rows(rows.count)
    own = rows.ids == actual[row]
    listed = np.full(len(rows.count), np.nan, np.float32)
    listed[row[own]] = rows.logprobs[own]
    lowest = np.full(len(rows.count), np.inf, np.float32)
    np.minimum.at(lowest, row, rows.logprobs)
    wrong = (np.abs(listed - said) > _SAME) | (np.isnan(listed) & (said > lowest + _SAME))
    if bool(wrong.any()):
        at = int(np.argmax(wrong))
        among = f"the candidates say {listed[at]:.4g}" if own[row == at].any() else "it is none of the candidates"
        raise SourceError(
            f"row {at}: {name} gives the token {actual[at]} the logprob {said[at]:.4g}, but {among}; the rows are not "
            f"where they should be, or these are other tokens than those that were scored"
        )


def count_whole(rows: Rows, tally: Tally) -> None:
    """Count the rows, and those whose probabilities sum to one, for `check_normalised`."""
    several = rows.count > 1
    sums = ragged.row_sums(np.exp(np.minimum(rows.logprobs, 1), dtype=np.float64), rows.count)[several]
    tally.counts["rows"] += len(sums)
    tally.counts["whole"] += int((np.abs(sums - 1) < _WHOLE).sum())


def check_normalised(tally: Tally, _final: bool) -> list[str]:  # noqa: FBT001 - as `Import.check` is called
    """Refuse what looks normalised over the candidates while nobody said over what it is.

    Raises:
        SourceError: the probabilities of every row sum to 1.
    """
    rows = tally.counts["rows"]
    if rows >= _ROWS_TO_JUDGE and tally.counts["whole"] == rows:
        raise SourceError(
            f"the probabilities of all {rows} rows sum to 1, as if they were normalised over the candidates; say "
            f"--normalised candidates, or --normalised vocabulary if the candidates really cover everything"
        )
    return []
