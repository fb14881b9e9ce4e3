"""Parsing pieces, here or in other processes: what comes out is the same, in the same order."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from logitstore.convert.base import Import, Item, Parse, Piece, Record, Tally, ready
from logitstore.errors import InvalidInputError, SourceError

_AHEAD = 2  # pieces that each worker has waiting: bounds memory, and keeps it busy

_parse: Parse = ready  # of this process, when it is a worker


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
    # Spawned, not forked: a copy of a process with threads, as Arrow's, may wait for ever for a lock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(opened.parse,))
    waiting: deque[Future[list[Outcome]]] = deque()
    try:
        for piece in opened.pieces:
            waiting.append(pool.submit(_work, piece))
            if len(waiting) >= _AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InvalidInputError(
            f"a worker ended before its time, perhaps for want of memory ({error}); convert with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parse: Parse) -> None:
    global _parse  # noqa: PLW0603 - sent once to a worker, not with each piece: it may hold a tokenizer
    _parse = parse


def _work(piece: Piece) -> list[Outcome]:
    return [_outcome(_parse, record) for record in piece.records()]


def _outcome(parse: Parse, record: Record) -> Outcome:
    tally = Tally()
    try:
        items = tuple(parse(record, tally))
    except (SourceError, InvalidInputError) as error:
        return Outcome(record.place, record.number, error=error)
    return Outcome(record.place, record.number, items, tally)
