"""A page that shows what a teacher expects after each token: a dataset as data for it, and as one HTML file.

The page makes no request, and nothing of a dataset becomes markup: its data stands in one block of JSON, from which a
script sets text. The Content-Security-Policy names that script and the style sheet by their digests.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Final

import msgspec
import numpy as np

from logitstore.dataset.reader import Dataset
from logitstore.errors import InvalidInputError, RowIndexError, SequenceNotFoundError
from logitstore.look.alike import check_tokenizers
from logitstore.look.inline import asset, source, style
from logitstore.look.page_data import Tokens, sequence_data
from logitstore.look.words import SHADES, name_of, to_be_read
from logitstore.shard.sequence import Sequence
from logitstore.tokenizer import Tokenizer

ROWS: Final = 5
"""Rows of a page for which none are named."""

CANDIDATES: Final = 10
"""Candidates of each position that a page lists."""

POSITIONS: Final = 50_000
"""Positions that a page holds at most, and that are served at a time: about 200 bytes each."""

_SHEET: Final = "view.css"
_SCRIPTS: Final = ("model.js", "source.js", "chart.js", "text.js", "panel.js", "dialog.js", "view.js")
_COMMON_SEARCHED: Final = 1000  # sequences of which one has to be in the other dataset too


@dataclass(frozen=True, slots=True)
class Collected:
    """The data of a page.

    Attributes:
        data: of builtin types, as it becomes JSON.
        notes: what the page leaves out, for whoever makes it.
    """

    data: dict[str, Any]
    notes: list[str]


class Viewed:
    """A dataset, and perhaps a second one beside it, as the data of a page.

    Args:
        dataset: the dataset.
        other: another one, over the same sequences; they are matched by id.
        candidates: how many of each position are listed.

    Raises:
        InvalidInputError: the tokenizers of the two are known to differ, or they have no sequence in common.
    """

    def __init__(self, dataset: Dataset, other: Dataset | None = None, *, candidates: int = CANDIDATES) -> None:
        if candidates < 1:
            raise InvalidInputError(f"{candidates} candidates of each position; give a number from 1")
        self.candidates = candidates
        self.whole = dataset
        self._dataset = to_be_read(dataset)
        self._other = None if other is None else to_be_read(other)
        self._datasets = (dataset,) if other is None else (dataset, other)
        self._notes: list[str] = []
        own = dataset.tokenizer()
        self._tokenizers: tuple[Tokenizer | None, ...] = (own,)  # those that say the texts, each once
        if other is not None and not _check_comparable(dataset, other):
            self._notes.append("It could not be checked that both have the same vocabulary.")
            others = other.tokenizer()
            if own is None or others is None:
                self._tokenizers = (own or others,)
            else:
                self._tokenizers = (own, others)

    def split(self, name: str | None) -> Dataset:
        """The dataset, or one split of it, with the columns that a page shows.

        Raises:
            InvalidInputError: there is no such split.
        """
        return self._dataset if name is None else self._dataset.split(name)

    def tokens(self) -> Tokens:
        """An empty table of tokens."""
        return Tokens(self._tokenizers)

    def meta(self) -> dict[str, Any]:
        """What the page says of the datasets themselves."""
        return {
            "datasets": [_dataset_data(each) for each in self._datasets],
            "splits": [{"name": name, "sequences": len(self.whole.split(name))} for name in self.whole.splits],
            "shades": SHADES,
            "notes": self._notes,
        }

    def sequence(self, sequence: Sequence, row: int, tokens: Tokens, start: int, limit: int) -> dict[str, Any]:
        """One sequence of the dataset, and the same of the other one.

        Args:
            sequence: a sequence of `split`.
            row: its row.
            tokens: table of tokens, which grows.
            start: the first position.
            limit: positions at most.

        Raises:
            CorruptDataError: the bytes of the other dataset's sequence are not what was written.
        """
        window = slice(start, start + limit)
        views = [sequence_data(sequence, tokens, 0, self.candidates, window)]
        if self._other is not None:
            views.append(self._beside(self._other, sequence, tokens, window))
        return {"row": row, "id": sequence.id, "positions": len(sequence), "start": start, "views": views}

    def _beside(self, other: Dataset, sequence: Sequence, tokens: Tokens, window: slice) -> dict[str, Any]:
        try:
            found = other.by_id(sequence.id)
        except SequenceNotFoundError:
            return {"problem": f"{name_of(other)} has no sequence with this id."}
        if not np.array_equal(found.tokens, sequence.tokens):
            return {"problem": f"{name_of(other)} has other tokens under this id: the two cannot be compared."}
        return sequence_data(found, tokens, len(self._tokenizers) - 1, self.candidates, window)


def collect(
    dataset: Dataset,
    *,
    rows: Iterable[int] | None = None,
    ids: Iterable[str] = (),
    other: Dataset | None = None,
    candidates: int = CANDIDATES,
    positions: int = POSITIONS,
) -> Collected:
    """Decode some sequences for a page that holds them.

    Args:
        dataset: the dataset.
        rows: their rows, in the order of the page; by default the first five, or none if ids are given.
        ids: their ids; they follow the rows.
        other: another dataset over the same sequences.
        candidates: how many of each position are listed.
        positions: how many the page holds at most; what follows is left out, and `notes` says so.

    Raises:
        RowIndexError: a row is outside the dataset.
        SequenceNotFoundError: there is no such id.
        InvalidInputError: the datasets cannot be compared, or a number is below 1.
        CorruptDataError: the bytes of a sequence are not what was written.
    """
    if positions < 1:
        raise InvalidInputError(f"{positions} positions; give a number from 1")
    viewed = Viewed(dataset, other, candidates=candidates)
    tokens, left = viewed.tokens(), positions
    sequences: list[dict[str, Any]] = []
    notes: list[str] = []
    for row in _chosen(dataset, rows, ids):
        sequence = viewed.split(None)[row]
        if left < max(1, len(sequence)) and sequences:
            notes.append(f"sequences on the page: {len(sequences)}; row {row} would exceed {positions:,} positions")
            break
        sequences.append(viewed.sequence(sequence, row, tokens, 0, left))
        if left < len(sequence):
            notes.append(f"only the first {left:,} of the {len(sequence):,} positions of row {row} are on the page")
            break
        left -= max(1, len(sequence))  # an empty one takes room too
    if other is not None and sequences and all("problem" in each["views"][1] for each in sequences):
        raise InvalidInputError(
            f"none of the chosen sequences is in {name_of(other)} with the same id and tokens; name other rows"
        )
    data = {"served": False, **viewed.meta(), "tokens": tokens.as_data(), "sequences": sequences}
    return Collected(data, notes)


def page(dataset: Dataset, **options: Any) -> str:
    """A page of some sequences, as one HTML file that makes no request. Takes and raises what `collect` does."""
    return page_html(collect(dataset, **options).data)


def page_html(data: dict[str, Any]) -> str:
    """Data of a page as HTML."""
    sheet, script = style(_SHEET), _script()
    title = " and ".join(each["name"] for each in data["datasets"])
    parts = {
        "{{policy}}": html.escape(policy(served=bool(data["served"])).partition("; frame-ancestors")[0]),
        "{{title}}": html.escape(title),
        "{{style}}": sheet,
        "{{data}}": json_in_html(data),
        "{{script}}": script,
    }
    pieces = []
    template = asset("view.html")
    for name, value in parts.items():  # in the order of the template, so that no value is looked at again
        before, _, template = template.partition(name)
        pieces += [before, value]
    return "".join([*pieces, template])


@cache
def policy(*, served: bool) -> str:
    """The Content-Security-Policy of the page; what only a header may say comes last."""
    directives = [
        "default-src 'none'",
        f"script-src {source(_script())}",
        f"style-src {source(style(_SHEET))}",
        "img-src data:",
        *(["connect-src 'self'"] if served else []),
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
        "frame-ancestors 'none'",
    ]
    return "; ".join(directives)


def json_in_html(data: Any) -> str:
    """JSON that can stand inside a `<script>`: it holds nothing that ends it, opens another, or is no JavaScript."""
    text = msgspec.json.encode(data).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _check_comparable(dataset: Dataset, other: Dataset) -> bool:
    """Whether their tokenizers are known to be the same; what is known to differ, or to have no sequence, fails."""
    same = check_tokenizers(dataset, other)
    for sequence in dataset[:_COMMON_SEARCHED].select([]):
        try:
            other.row_of(sequence.id)
        except SequenceNotFoundError:
            continue
        return same
    raise InvalidInputError(
        f"none of the first {min(len(dataset), _COMMON_SEARCHED):,} sequences of {name_of(dataset)} is in "
        f"{name_of(other)}; sequences are matched by id"
    )


def _chosen(dataset: Dataset, rows: Iterable[int] | None, ids: Iterable[str]) -> Iterator[int]:
    """Rows by number and by id, each once."""
    named = [dataset.row_of(each) for each in ids]
    if rows is None:
        rows = () if named else range(min(ROWS, len(dataset)))
    seen = set()
    for row in chain(rows, named):
        if row < 0:
            raise RowIndexError(f"there is no row {row}: rows are counted from 0")
        if row not in seen:
            seen.add(row)
            yield row


def _dataset_data(dataset: Dataset) -> dict[str, Any]:
    info = dataset.info
    return {
        "name": name_of(dataset),
        "teacher": None if info.teacher is None else _published(info.teacher.name),
        "temperature": info.temperature,
        "sequences": len(dataset),
        "text": info.tokenizer is not None,
    }


def _published(teacher: str) -> str:
    """A teacher's name; of one that was a directory, which is nobody's business, the last part."""
    local = teacher.startswith(("/", "~", ".", "\\")) or teacher[1:2] == ":"
    return teacher.replace("\\", "/").rstrip("/").rpartition("/")[2] if local else teacher


def _script() -> str:
    return "'use strict';\n{\n" + "\n".join(asset(name) for name in _SCRIPTS) + "}\n"
