"""A sequence as the data of a page: flat lists of builtin types, and a table of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.look.measures import Measures, entropy_without_stored, everything_else, measure
from logitstore.look.words import prompt_of
from logitstore.shard.sequence import Sequence
from logitstore.text import label, readable, running, shortened
from logitstore.tokenizer import Tokenizer

_TOKEN_TEXT: Final = 1024  # characters of one token in running text: a vocabulary may hold anything
_PROMPT_TEXT: Final = 65_536
_AROUND: Final = 8  # tokens before and after a part with which its text is decoded: they may share a character


@dataclass(slots=True)
class Tokens:
    """The table of the distinct tokens of a page: elsewhere a token is its place in it.

    Args:
        tokenizers: those that say the texts of tokens; each has labels of its own.
    """

    tokenizers: tuple[Tokenizer | None, ...]
    ids: list[int] = field(default_factory=list)
    labels: list[list[str]] = field(init=False)
    _places: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labels = [[] for _ in self.tokenizers]

    def places(self, ids: NDArray[Any]) -> list[int]:
        """The place of each of some token ids; new ones are added, frequent ones first since they are shorter then."""
        distinct, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        known = distinct.tolist()
        for at in np.argsort(-counts, kind="stable").tolist():
            if known[at] not in self._places:
                self._places[known[at]] = len(self.ids)
                self.ids.append(known[at])
                for labels, tokenizer in zip(self.labels, self.tokenizers, strict=True):
                    labels.append(label(tokenizer, known[at]))
        table = np.asarray([self._places[token] for token in known], np.int64)
        return list(table[inverse].tolist())

    def as_data(self) -> dict[str, Any]:
        """Ids, and the labels of each tokenizer, side by side."""
        return {"ids": self.ids, "labels": self.labels}


def sequence_data(sequence: Sequence, tokens: Tokens, spelled: int, candidates: int, window: slice) -> dict[str, Any]:
    """Some positions of a sequence as flat lists; null where something is unknown.

    Of position t, the distribution of the token after t: `count`, `entropy` (nats), `exact` (whether that is of the
    whole vocabulary; else `entropy_from` says what it is of), `rest` (probability of everything that has no line;
    null also where there is nothing else), `draws`. Of the token t, as position t - 1 expected it: `place` among the
    candidates (-1: none of them), `rank` (0: unknown; left out where the place says it), `surprise` (nats), `told`
    (whether that is stored, or of a probability rather than a share). These have one more where a token follows the
    window: of that token, `next`. The listed candidates of all positions follow one another in `candidates` and
    `probabilities`, min(count, listed) of each. `impossible` are the positions whose numbers are; -1 is the one before
    the window.

    Args:
        sequence: T positions.
        tokens: table of tokens, which grows; `tokens`, `next` and `candidates` are places in it.
        spelled: which of the table's tokenizers says the texts.
        candidates: how many of each position are listed.
        window: the positions, from and to.
    """
    measures = measure(sequence)
    count = sequence.count.astype(np.int64)
    listed = ragged.ranks(count) < candidates
    shown = listed & _within(count, window)
    rest = everything_else(sequence, measures, candidates)
    data: dict[str, Any] = {
        "kind": "draws" if sequence.draws is not None else sequence.normalised,
        "entropy_from": entropy_without_stored(sequence),
        "spelled": spelled,
        "listed": candidates,
        "tokens": tokens.places(sequence.tokens[window]),
        "candidates": tokens.places(sequence.ids[shown]),
        "probabilities": _rounded(measures.probabilities[shown]),
        "count": _same(count[window].tolist()),
        "entropy": _rounded(np.maximum(measures.entropy[window], 0)),
        "exact": _same(measures.entropy_is_stored[window].tolist()),
        "rest": _rounded(np.where(rest == 0, np.nan, rest)[window]),
    }
    data |= _texts(sequence, tokens, data, window)
    data |= _expected(sequence, measures, tokens, window)
    if sequence.draws is not None:
        data["draws"] = _same(ragged.row_sums(sequence.draws, count)[window].astype(np.int64).tolist())
    return data


def _texts(sequence: Sequence, tokens: Tokens, data: dict[str, Any], window: slice) -> dict[str, Any]:
    """`after`: what follows each token's label; `at`, `text`: tokens whose text where they stand is not their label."""
    tokenizer, labels = tokens.tokenizers[data["spelled"]], tokens.labels[data["spelled"]]
    if tokenizer is None:
        return {"after": " ", "at": [], "text": []}
    first = max(0, window.start - _AROUND)
    around = running(tokenizer, sequence.tokens[first : window.stop + _AROUND].tolist())
    places = data["tokens"]
    inside = around[window.start - first :][: len(places)]
    texts = [shortened(readable(text, keep="\n\t"), _TOKEN_TEXT) for text in inside]
    prompt = prompt_of(sequence, tokenizer) if texts and window.start == 0 else None
    if prompt is not None:
        texts[0] = shortened(readable(prompt, keep="\n\t"), _PROMPT_TEXT)
    differ = [at for at, text in enumerate(texts) if text != labels[places[at]]]
    said: dict[str, Any] = {"after": "", "at": differ, "text": [texts[at] for at in differ]}
    return said | ({} if prompt is None else {"prompt": True})


def _expected(sequence: Sequence, measures: Measures, tokens: Tokens, window: slice) -> dict[str, Any]:
    """Of each token, and of the one after the window, what the position before it says of it."""
    follows = window.stop < len(sequence)
    those = slice(window.start, window.stop + follows)

    def of_the_token(values: NDArray[Any], unknown: Any) -> NDArray[Any]:
        return np.concatenate([[unknown], values])[: len(sequence)][those]

    before = slice(max(0, window.start - 1), window.start)
    impossible = np.flatnonzero(measures.impossible[before.start : window.stop]) - (window.start - before.start)
    data: dict[str, Any] = {
        "place": of_the_token(measures.target_place, -1).tolist(),
        "surprise": _rounded(np.maximum(of_the_token(-measures.target_logprob, np.nan), 0)),
        "told": _same(of_the_token(measures.target_is_exact, False).tolist()),  # noqa: FBT003
        "before": bool(measures.scored[before].any()),
        "impossible": impossible.tolist(),
    }
    if sequence.target_rank is not None:
        data["rank"] = of_the_token(measures.target_rank, 0).tolist()
    if follows:
        data["next"] = tokens.places(sequence.tokens[window.stop : window.stop + 1])[0]
    return data


def _within(count: NDArray[np.int64], window: slice) -> NDArray[np.bool_]:
    """Which candidates belong to the positions of a window: bool [N]."""
    positions = np.zeros(len(count), np.bool_)
    positions[window] = True
    return ragged.spread(positions, count)


def _rounded(values: NDArray[Any]) -> list[float | None]:
    """To seven significant digits, which float32 has; the page rounds. None where there is no finite number."""
    finite = np.isfinite(values).tolist()
    return [float(f"{value:.7g}") if ok else None for value, ok in zip(values.tolist(), finite, strict=True)]


def _same(values: list[Any]) -> Any:
    """One value where all are equal, else the list."""
    return values[0] if values and values.count(values[0]) == len(values) else values
