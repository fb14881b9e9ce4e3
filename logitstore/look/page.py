"""A page that shows what a teacher expects after each token: a dataset as data for it, and as one HTML file.

The page makes no request, and nothing of a dataset becomes markup: its data stands in one block of JSON, from which a
script sets text. The Content-Security-Policy names that script and the style sheet by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.dataset.reader import Dataset
from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, RowIndexError, SequenceNotFoundError
from logitstore.look.alike import check_tokenizers
from logitstore.look.measures import COLUMNS, Measures, measure
from logitstore.shard.sequence import Sequence
from logitstore.text import label, readable, running, shortened
from logitstore.tokenizer import Tokenizer

ROWS: Final = 5
"""Rows of a page for which none are named."""

CANDIDATES: Final = 10
"""Candidates of each position that a page lists."""

POSITIONS: Final = 50_000
"""Positions that a page holds at most, and that are served at a time: about 200 bytes each."""

PROMPT: Final = "prompt"
"""The column in which importers keep the text of a prompt whose tokens they do not know."""

_SCRIPTS: Final = ("model.js", "source.js", "chart.js", "text.js", "panel.js", "dialog.js", "view.js")
_TOKEN_TEXT: Final = 1024  # characters of one token in running text: a vocabulary may hold anything
_PROMPT_TEXT: Final = 65_536
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


@dataclass(slots=True)
class Tokens:
    """The table of the distinct tokens of a page: elsewhere a token is its place in it.

    Args:
        tokenizers: the first that knows a token says its text.
    """

    tokenizers: tuple[Tokenizer | None, ...]
    ids: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    _places: dict[int, int] = field(default_factory=dict)

    def places(self, ids: NDArray[Any]) -> list[int]:
        """The place of each of some token ids; new ones are added, frequent ones first since they are shorter then."""
        distinct, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        known = distinct.tolist()
        for at in np.argsort(-counts, kind="stable").tolist():
            if known[at] not in self._places:
                self._places[known[at]] = len(self.ids)
                self.ids.append(known[at])
                self.labels.append(label(self._knowing(known[at]), known[at]))
        table = np.asarray([self._places[token] for token in known], np.int64)
        return list(table[inverse].tolist())

    def as_data(self) -> dict[str, Any]:
        """Ids and labels, side by side."""
        return {"ids": self.ids, "labels": self.labels}

    def _knowing(self, token: int) -> Tokenizer | None:
        for tokenizer in self.tokenizers:
            if tokenizer is not None and tokenizer.token_bytes(token) is not None:
                return tokenizer
        return self.tokenizers[0]


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
        self._dataset = _needed(dataset)
        self._other = None if other is None else _needed(other)
        self._datasets = (dataset,) if other is None else (dataset, other)
        if other is not None:
            _check_comparable(dataset, other)
        self._tokenizers = tuple(each.tokenizer() for each in self._datasets)

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
            "candidates": self.candidates,
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
        views = [sequence_data(sequence, tokens, self._tokenizers[0], self.candidates, window)]
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
        return sequence_data(found, tokens, self._tokenizers[1], self.candidates, window)


def sequence_data(
    sequence: Sequence, tokens: Tokens, tokenizer: Tokenizer | None, candidates: int, window: slice
) -> dict[str, Any]:
    """The positions of a sequence as flat lists; null where something is unknown.

    Of position t, the distribution of the token after t: `count`, `entropy` (nats), `exact` (whether that is of the
    whole vocabulary, not a lower bound), `rest` (probability of everything that is not listed), `more` (that of the
    candidates that are not listed; only where some `rest` is unknown), `draws`. Of the token t, as position t - 1
    expected it: `rank` (0: unknown) and `surprise` (nats). The listed candidates of all positions follow one another
    in `candidates` and `probabilities`, min(count, listed) of each.

    Args:
        sequence: T positions.
        tokens: table of tokens, which grows; `tokens` and `candidates` are places in it.
        tokenizer: says the text of the tokens where it is not their label.
        candidates: how many of each position are listed.
        window: the positions.
    """
    measures = measure(sequence)
    count = sequence.count.astype(np.int64)
    listed = ragged.ranks(count) < candidates
    inside = _within(count, window)
    shown = listed & inside
    data: dict[str, Any] = {
        "kind": "draws" if sequence.draws is not None else sequence.normalised,
        "listed": candidates,
        "tokens": tokens.places(sequence.tokens[window]),
        "candidates": tokens.places(sequence.ids[shown]),
        "probabilities": _rounded(measures.probabilities[shown]),
        "count": _same(count[window].tolist()),
        "entropy": _rounded(np.maximum(measures.entropy[window], 0)),
        "exact": _same(measures.entropy_is_stored[window].tolist()),
    }
    data |= _texts(sequence, tokens, tokenizer, data["tokens"], window)
    data |= _rest(measures, count, listed, window)
    data |= _expected(measures, window)
    if sequence.draws is not None:
        data["draws"] = _same(ragged.row_sums(sequence.draws, count)[window].astype(np.int64).tolist())
    return data


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


def page(
    dataset: Dataset,
    *,
    rows: Iterable[int] | None = None,
    ids: Iterable[str] = (),
    other: Dataset | None = None,
    candidates: int = CANDIDATES,
    positions: int = POSITIONS,
) -> str:
    """A page of some sequences, as one HTML file that makes no request. Takes and raises what `collect` does."""
    chosen = collect(dataset, rows=rows, ids=ids, other=other, candidates=candidates, positions=positions)
    return page_html(chosen.data)


def page_html(data: dict[str, Any]) -> str:
    """Data of a page as HTML."""
    style, script = _asset("view.css"), _script()
    title = " and ".join(each["name"] for each in data["datasets"])
    parts = {
        "{{policy}}": html.escape(policy(served=bool(data["served"])).partition("; frame-ancestors")[0]),
        "{{title}}": html.escape(title),
        "{{style}}": style,
        "{{data}}": json_in_html(data),
        "{{script}}": script,
    }
    pieces = []
    template = _asset("view.html")
    for name, value in parts.items():  # in the order of the template, so that no value is looked at again
        before, _, template = template.partition(name)
        pieces += [before, value]
    return "".join([*pieces, template])


def policy(*, served: bool) -> str:
    """The Content-Security-Policy of the page; what only a header may say comes last."""
    directives = [
        "default-src 'none'",
        f"script-src '{_digest(_script())}'",
        f"style-src '{_digest(_asset('view.css'))}'",
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


def name_of(dataset: Dataset) -> str:
    """What to call a dataset where its path is nobody's business: the last part of it."""
    path = dataset.path
    if isinstance(path, Path):
        return path.resolve().name or "dataset"
    return urlsplit(path).path.rstrip("/").rpartition("/")[2].partition("@")[0] or "dataset"  # without a revision


def _needed(dataset: Dataset) -> Dataset:
    prompt = [PROMPT] if PROMPT in dataset.info.user_columns else []
    return dataset.select([*COLUMNS, *prompt])


def _check_comparable(dataset: Dataset, other: Dataset) -> None:
    check_tokenizers(dataset, other)
    for sequence in dataset[:_COMMON_SEARCHED].select([]):
        try:
            other.row_of(sequence.id)
        except SequenceNotFoundError:
            continue
        return
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
    for source in (rows, named):
        for row in source:
            if not 0 <= row < len(dataset):
                raise RowIndexError(f"row {row} of a dataset of {len(dataset)} sequences")
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


def _texts(
    sequence: Sequence, tokens: Tokens, tokenizer: Tokenizer | None, places: list[int], window: slice
) -> dict[str, Any]:
    """`after`: what follows each token's label; `at`, `text`: tokens whose text where they stand is not their label."""
    if tokenizer is None:
        return {"after": " ", "at": [], "text": []}
    ids = sequence.tokens[window].tolist()
    texts = [shortened(readable(text, keep="\n\t"), _TOKEN_TEXT) for text in running(tokenizer, ids)]
    prompt = _prompt(sequence, tokenizer) if texts and window.start == 0 else None
    if prompt is not None:
        texts[0] = shortened(readable(prompt, keep="\n\t"), _PROMPT_TEXT)
    differ = [at for at, text in enumerate(texts) if text != tokens.labels[places[at]]]
    data: dict[str, Any] = {"after": "", "at": differ, "text": [texts[at] for at in differ]}
    return data | ({} if prompt is None else {"prompt": True})


def _prompt(sequence: Sequence, tokenizer: Tokenizer) -> str | None:
    """The prompt for which an unknown first token stands."""
    prompt = sequence.columns.get(PROMPT)
    known = len(sequence) == 0 or tokenizer.token_bytes(int(sequence.tokens[0])) is not None
    return prompt if isinstance(prompt, str) and prompt and not known else None


def _rest(measures: Measures, count: NDArray[Any], listed: NDArray[np.bool_], window: slice) -> dict[str, Any]:
    more = ragged.row_sums(np.where(listed, 0, measures.probabilities), count)[window]
    rest = measures.tail[window] + more
    data: dict[str, Any] = {"rest": _rounded(rest)}
    if np.isnan(rest[count[window] > 0]).any():
        data["more"] = _rounded(more)
    return data


def _expected(measures: Measures, window: slice) -> dict[str, Any]:
    """Of each token, what the position before it says of it."""
    rank = np.concatenate([[0], measures.target_rank])[:-1]
    surprise = np.concatenate([[np.nan], -measures.target_logprob])[:-1]
    before = bool(window.start and measures.scored[window.start - 1 : window.start].any())
    return {
        "rank": rank[window].tolist(),
        "surprise": _rounded(np.maximum(surprise[window], 0)),
        "before": before,
    }


def _within(count: NDArray[np.int64], window: slice) -> NDArray[np.bool_]:
    """Which candidates belong to the positions of a window: bool [N]."""
    positions = np.zeros(len(count), np.bool_)
    positions[window] = True
    return ragged.spread(positions, count)


def _rounded(values: NDArray[Any]) -> list[float | None]:
    """To five significant digits; None where there is no finite number."""
    finite = np.isfinite(values).tolist()
    return [float(f"{value:.5g}") if ok else None for value, ok in zip(values.tolist(), finite, strict=True)]


def _same(values: list[Any]) -> Any:
    """One value where all are equal, else the list."""
    return values[0] if values and values.count(values[0]) == len(values) else values


def _asset(name: str) -> str:
    return (files("logitstore.look") / "assets" / name).read_text(encoding="utf-8")


def _script() -> str:
    return "'use strict';\n{\n" + "\n".join(_asset(name) for name in _SCRIPTS) + "}\n"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
