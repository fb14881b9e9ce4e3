"""Parsing pieces, here or in other processes: what comes out is the same, in the same order."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from logitstore.convert.base import Import, Item, Parse, Piece, Record, Tally, ready
from logitstore.errors import InvalidInputError, SourceError
from logitstore.processes import each


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one record.

    Attributes:
        place: where the record stands.
        number: its number.
        items: its sequences; empty where it failed.
        tally: what it says besides.
        error: why it failed; None where it did not.
    """

    place: str
    number: int
    items: tuple[Item, ...] = ()
    tally: Tally = field(default_factory=Tally)
    error: SourceError | InvalidInputError | None = None


def parsed(opened: Import, workers: int) -> Generator[Outcome]:
    """The outcomes of all records of an import, in order.

    Args:
        opened: the import.
        workers: processes that parse; 0 parses in this one.

    Raises:
        SourceError: the input is damaged, so that what follows cannot be read.
        InvalidInputError: a worker was killed.
    """
    if workers == 0 or opened.parse is ready:
        for piece in opened.pieces:
            for record in piece.records():
                yield _outcome(opened.parse, record)
        return
    for outcomes in each(_outcomes, opened.parse, opened.pieces, workers):
        yield from outcomes


def _outcomes(parse: Parse, piece: Piece) -> list[Outcome]:
    return [_outcome(parse, record) for record in piece.records()]


def _outcome(parse: Parse, record: Record) -> Outcome:
    tally = Tally()
    try:
        items = tuple(parse(record, tally))
    except (SourceError, InvalidInputError) as error:
        return Outcome(record.place, record.number, error=error)
    return Outcome(record.place, record.number, items, tally)
