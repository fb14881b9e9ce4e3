"""What an importer and an exporter are.

An importer cuts its input into **pieces** of bounded size; each holds some **records** (a line, a row), and `parse`, a
pure function that other processes can run, makes **items** of a record: sequences, ready for a `Writer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from logitstore.convert.source import Input
from logitstore.dataset.reader import Dataset
from logitstore.tokenizer import Tokenizer

ValueKind = Literal["logprob", "logit", "probability", "draws"]
Alignment = Literal["next", "same"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an importer is told; None (or empty) where nothing was said.

    Attributes:
        tokenizer: the teacher's.
        top_k: candidates to keep; only to read less, since the writer cuts anyway.
        normalised: over what the probabilities sum to one.
        prompts: file with the requests that the replies answer.
        tokens: file with the input tokens, where the capture does not hold them.
        codec_config: file with the settings of a codec.
        map: our name to the name of a column.
        value_kind: what the values are.
        alignment: whether row t predicts the `next` token or is about the `same`, tokens[t].
    """

    tokenizer: Tokenizer | None = None
    top_k: int | None = None
    normalised: Literal["vocabulary", "candidates"] | None = None
    prompts: Path | None = None
    tokens: Path | None = None
    codec_config: Path | None = None
    map: Mapping[str, str] = field(default_factory=dict)
    value_kind: ValueKind | None = None
    alignment: Alignment | None = None


FORMAT_OPTIONS = ("prompts", "tokens", "codec_config", "map", "value_kind", "alignment")
"""Options that only some formats take; to others they must not be given."""


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence: the method of `Writer` that takes it, and that method's arguments.

    Without an `id` among them, a record's first sequence gets the record's number, further ones `number#1`, `number#2`.
    """

    method: Literal["add", "add_logits", "add_draws"]
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One record of an input.

    Attributes:
        place: where it stands, for messages: `replies.jsonl, line 3`.
        number: its number in the whole input, from 0.
        data: what `parse` makes items of.
    """

    place: str
    number: int
    data: Any


class Piece(Protocol):
    """Some records that are parsed together; bounded in size, and fit to be sent to another process."""

    def records(self) -> Iterator[Record]:
        """Its records."""


@dataclass(slots=True)
class Tally:
    """What parsing says besides the sequences; the tallies of all records are added up in input order.

    Attributes:
        notes: how often each of these notes holds; in the text, `{n}` stands for that number.
        counts: figures of the importer's own, for `Import.check`.
        pieces: bytes of tokens by id, as replies carry them.
        doubtful: the same from where they may be wrong; used where nothing better is known.
    """

    notes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    pieces: dict[int, bytes] = field(default_factory=dict)
    doubtful: dict[int, bytes] = field(default_factory=dict)

    def note(self, text: str, n: int = 1) -> None:
        """Say something of this record, or of n things in it; 0 says nothing."""
        if n:
            self.notes[text] += n

    def add(self, other: Tally) -> None:
        """Take in the tally of a later record."""
        self.notes.update(other.notes)
        self.counts.update(other.counts)
        for mine, theirs in ((self.pieces, other.pieces), (self.doubtful, other.doubtful)):
            for token_id, piece in theirs.items():
                mine.setdefault(token_id, piece)

    def vocabulary(self) -> dict[int, bytes]:
        """The bytes of all tokens that are known."""
        return {**self.doubtful, **self.pieces}


@dataclass(frozen=True, slots=True)
class Ready:
    """A piece of a format that is one stream and no records: one sequence that is read already."""

    place: str
    number: int
    item: Item

    def records(self) -> Iterator[Record]:
        """The sequence."""
        yield Record(self.place, self.number, self.item)


Parse = Callable[[Record, Tally], Iterable[Item]]
"""Makes items of a record. Raises `SourceError` or `InvalidInputError`, without the record's place."""


def ready(record: Record, _tally: Tally) -> Iterable[Item]:
    """The `parse` of pieces that are `Ready`."""
    return (record.data,)


@dataclass(slots=True, kw_only=True)
class Import:
    """An opened input.

    Attributes:
        pieces: its pieces in order; reading them raises `SourceError` where the input is damaged.
        parse: makes items of a record; picklable.
        settings: arguments of `Writer` that the input determines or suggests; what the user says comes first.
        done: bytes of input consumed so far, for progress.
        total: bytes of input; None where that is not known.
        sequences: number of sequences; None where that is not known beforehand.
        notes: what was assumed, and what was left out, known from the start. Each is one sentence.
        check: called with the tally so far now and then, and at the end (`final=True`) before the dataset is
            committed; raises `SourceError` where the whole cannot be right, and returns notes of the whole.
    """

    pieces: Iterator[Piece]
    parse: Parse = ready
    settings: dict[str, Any] = field(default_factory=dict)
    done: Callable[[], int] = lambda: 0
    total: int | None = None
    sequences: int | None = None
    notes: list[str] = field(default_factory=list)
    check: Callable[[Tally, bool], list[str]] = lambda _tally, _final: []


@dataclass(frozen=True, slots=True, kw_only=True)
class Importer:
    """One foreign format, in.

    Attributes:
        name: what `--from` takes.
        description: one line for the help text and the README.
        loses: what the conversion does not keep; empty where that is nothing.
        recognises: whether an input is of this format, by its name and head; cheap, and never raises.
        read: opens inputs of this format; several are one dataset, in the order given.
        patterns: names of the files that are taken when a directory is given.
        options: the `FORMAT_OPTIONS` that it takes.
    """

    name: str
    description: str
    loses: str
    recognises: Callable[[Input], bool]
    read: Callable[[list[Input], Options], Import]
    patterns: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What an exporter is told.

    Attributes:
        k: most candidates of a position; None keeps all.
        progress: to be called with the number of sequences written so far.
    """

    k: int | None = None
    progress: Callable[[int], None] = lambda _sequences: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """One foreign format, out.

    Attributes:
        name: what `--to` takes.
        description: one line for the help text and the README.
        loses: what the format does not hold.
        write: writes a dataset as a file or directory of this path, which is not there yet, and returns notes on what
            was lost. `export` gives it a path of the final name in a temporary directory, and moves what was written
            into place when it is complete.
        files: of an output that is a directory, patterns of the files that it writes, as `data/*.parquet`. A directory
            is only ever replaced where all that is in it has such names.
    """

    name: str
    description: str
    loses: str
    write: Callable[[Dataset, Path, Export], list[str]]
    files: tuple[str, ...] = ()
