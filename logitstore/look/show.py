"""One sequence to look at: its text piece by piece with what the teacher was unsure of, and chosen positions in full.

Everything about position t belongs to token t: its distribution is that of the token after it. Logprobs are natural
logs; entropies are in nats; what is unknown is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import numpy as np

from logitstore.errors import InvalidInputError, LogitStoreError, RowIndexError
from logitstore.look.measures import COLUMNS, Measures, measure
from logitstore.shard.sequence import Sequence
from logitstore.text import label, running
from logitstore.tokenizer import Tokenizer

__all__ = ["COLUMNS", "FOUND", "PROMPT", "Candidate", "Next", "Piece", "Position", "Shown", "TextNotFoundError", "show"]

FOUND: Final = 10
"""Places of a text that are shown; how many more there are is said."""

PROMPT: Final = "prompt"
"""The column in which importers keep the text of a prompt for which a placeholder stands."""

_UNCERTAIN: Final = 3  # positions that are shown where none is asked for
_BEFORE: Final = 200  # characters of text before a position


class TextNotFoundError(LogitStoreError, LookupError):
    """The text that was looked for is not in the sequence."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token where it stands, and its position.

    Attributes:
        id: of the token.
        text: untrusted; joined, those of a sequence are its text. Empty where another token completes the character;
            that of the whole prompt for a placeholder that stands for it.
        entropy: of the distribution after it, nats; None where there is none, or not enough is known.
        entropy_is_stored: else it is a lower bound: that of the candidates, and of everything else as one class.
        next_rank: rank of the next token from 1.
        next_logprob: its logprob: how surprised the teacher was, with the sign turned.
    """

    id: int
    text: str
    entropy: float | None
    entropy_is_stored: bool
    next_rank: int | None
    next_logprob: float | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A candidate of a position.

    Attributes:
        rank: from 1.
        id: of the token.
        text: the token by itself, escaped; the id where there is no tokenizer.
        probability: of 1; a share of the candidates where only their ratios are known, or of the draws.
        logprob: its log.
        draws: how often it was drawn; None unless the distribution was sampled.
        is_next: whether it is the real next token.
    """

    rank: int
    id: int
    text: str
    probability: float
    logprob: float
    draws: int | None
    is_next: bool


@dataclass(frozen=True, slots=True)
class Next:
    """The real next token of a position.

    Attributes:
        id: of the token.
        text: as of a candidate.
        is_candidate: whether it is among the stored ones, listed or not.
        rank: from 1; None where unknown.
        probability: None where unknown.
        logprob: likewise.
    """

    id: int
    text: str
    is_candidate: bool
    rank: int | None
    probability: float | None
    logprob: float | None


@dataclass(frozen=True, slots=True)
class Position:
    """A position that was chosen.

    Attributes:
        position: from 0.
        id: of its token.
        text: that token by itself, escaped.
        before: the text up to it and with it, the last of it, untrusted.
        entropy: nats, as of a piece.
        entropy_is_stored: as of a piece.
        count: stored candidates; 0 where there is no distribution.
        draws: the sum of the draws of all; None unless the distribution was sampled.
        candidates: the best of them.
        next: the real next token; None at the end of the sequence.
        everything_else: probability of what is neither listed nor the next token: of the other candidates, and of the
            tail where there can be one; None where that is unknown.
    """

    position: int
    id: int
    text: str
    before: str
    entropy: float | None
    entropy_is_stored: bool
    count: int
    draws: int | None
    candidates: tuple[Candidate, ...]
    next: Next | None
    everything_else: float | None


@dataclass(frozen=True, slots=True)
class Shown:
    """What is shown of a sequence.

    Attributes:
        id: of the sequence.
        row: in the dataset; None where it was not said.
        normalised: `candidates` where only ratios are known, and percentages are shares of the candidates.
        tokens: all of them.
        positions: those that were chosen, in the order of the text.
        found_more: places of the text that was looked for beyond those shown.
    """

    id: str
    row: int | None
    normalised: str
    tokens: tuple[Piece, ...]
    positions: tuple[Position, ...]
    found_more: int


def show(
    sequence: Sequence,
    tokenizer: Tokenizer | None,
    *,
    row: int | None = None,
    at: Iterable[int] = (),
    find: str | None = None,
    candidates: int = 10,
) -> Shown:
    """What there is to see of a sequence.

    Args:
        sequence: one that has `COLUMNS`, and `PROMPT` if the dataset has it.
        tokenizer: the teacher's; None: ids stand for texts.
        row: of the sequence, to be told again.
        at: positions to be chosen; negative ones count from the end.
        find: a text: the positions at which it ends are chosen. Without both, those that are most uncertain are.
        candidates: of each chosen position, at most.

    Raises:
        RowIndexError: a position is outside the sequence.
        TextNotFoundError: the text is not in the sequence.
        InvalidInputError: the text is empty.
    """
    measures = measure(sequence)
    texts = _texts(sequence, tokenizer)
    chosen, more = [_inside(position, sequence) for position in at], 0
    if find is not None:
        ends = _ends(texts, find)
        if not ends:
            raise TextNotFoundError(f"the text {find!r} is not in the sequence {sequence.id!r}")
        chosen, more = chosen + ends[:FOUND], max(0, len(ends) - FOUND)
    elif not chosen:
        chosen = _most_uncertain(measures)
    return Shown(
        id=sequence.id,
        row=row,
        normalised=sequence.normalised,
        tokens=_pieces(sequence, measures, texts),
        positions=tuple(
            _position(sequence, measures, tokenizer, "".join(texts[max(0, t + 1 - _BEFORE) : t + 1]), t, candidates)
            for t in sorted(set(chosen))
        ),
        found_more=more,
    )


def _texts(sequence: Sequence, tokenizer: Tokenizer | None) -> list[str]:
    """The text of each token; that of the prompt for a placeholder, which the tokenizer does not know."""
    tokens = sequence.tokens.tolist()
    texts = running(tokenizer, tokens)
    prompt = sequence.columns.get(PROMPT)
    if tokens and tokenizer is not None and tokenizer.token_bytes(tokens[0]) is None and isinstance(prompt, str):
        texts[0] = prompt or texts[0]
    return texts


def _inside(position: int, sequence: Sequence) -> int:
    length = len(sequence)
    if not -length <= position < length:
        raise RowIndexError(f"position {position} of the sequence {sequence.id!r}, which has {length}")
    return position % length


def _ends(texts: list[str], wanted: str) -> list[int]:
    """The positions of the tokens that hold the last character of a text, ascending."""
    if not wanted:
        raise InvalidInputError("the text to be found is empty")
    whole = "".join(texts)
    ends = np.array(list(accumulate(map(len, texts))), np.int64)
    last = []
    start = whole.find(wanted)
    while start >= 0:
        last.append(start + len(wanted) - 1)
        start = whole.find(wanted, start + len(wanted))
    return np.unique(np.searchsorted(ends, last, side="right")).tolist() if last else []


def _most_uncertain(measures: Measures) -> list[int]:
    """The positions of the highest entropies; the first of those with a distribution where none is known."""
    known = np.flatnonzero(~np.isnan(measures.entropy))
    if len(known) == 0:
        known = np.flatnonzero(measures.scored)
    order = np.argsort(-measures.entropy[known], kind="stable")
    return [int(known[place]) for place in order[:_UNCERTAIN]]


def _number(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _pieces(sequence: Sequence, measures: Measures, texts: list[str]) -> tuple[Piece, ...]:
    columns = (measures.entropy, measures.entropy_is_stored, measures.target_rank, measures.target_logprob)
    values = zip(sequence.tokens.tolist(), texts, *(column.tolist() for column in columns), strict=True)
    return tuple(
        Piece(token, text, _number(entropy), is_stored, rank or None, _number(logprob))
        for token, text, entropy, is_stored, rank, logprob in values
    )


def _position(
    sequence: Sequence, measures: Measures, tokenizer: Tokenizer | None, before: str, t: int, k: int
) -> Position:
    token, count = int(sequence.tokens[t]), int(sequence.count[t])
    following = _next(sequence, measures, tokenizer, t)
    listed = _candidates(sequence, measures, tokenizer, t, min(k, count))
    draws = sequence.draws
    return Position(
        position=t,
        id=token,
        text=label(tokenizer, token),
        before=before[-_BEFORE:],
        entropy=_number(measures.entropy[t]),
        entropy_is_stored=bool(measures.entropy_is_stored[t]),
        count=count,
        draws=None if draws is None else int(draws[sequence.offsets[t] : sequence.offsets[t + 1]].sum()),
        candidates=listed,
        next=following,
        everything_else=_everything_else(sequence, measures, t, listed, following),
    )


def _next(sequence: Sequence, measures: Measures, tokenizer: Tokenizer | None, t: int) -> Next | None:
    if t + 1 == len(sequence):
        return None
    token = int(sequence.tokens[t + 1])
    logprob = _number(measures.target_logprob[t])
    return Next(
        id=token,
        text=label(tokenizer, token),
        is_candidate=bool(measures.target_is_candidate[t]),
        rank=int(measures.target_rank[t]) or None,
        probability=None if logprob is None else math.exp(min(logprob, 0.0)),
        logprob=logprob,
    )


def _candidates(
    sequence: Sequence, measures: Measures, tokenizer: Tokenizer | None, t: int, k: int
) -> tuple[Candidate, ...]:
    start = int(sequence.offsets[t])
    here = slice(start, start + k)
    ids, probabilities = sequence.ids[here].tolist(), measures.probabilities[here].tolist()
    draws = [None] * k if sequence.draws is None else sequence.draws[here].tolist()
    following = int(sequence.tokens[t + 1]) if t + 1 < len(sequence) else -1
    return tuple(
        Candidate(rank, token, label(tokenizer, token), p, math.log(p) if p > 0 else -math.inf, n, token == following)
        for rank, (token, p, n) in enumerate(zip(ids, probabilities, draws, strict=True), 1)
    )


def _everything_else(
    sequence: Sequence, measures: Measures, t: int, listed: tuple[Candidate, ...], following: Next | None
) -> float | None:
    start, end = (int(n) for n in sequence.offsets[t : t + 2])
    can_have_tail = sequence.normalised == "vocabulary" and sequence.draws is None
    tail = float(measures.tail[t]) if can_have_tail else 0.0
    rest = float(measures.probabilities[start + len(listed) : end].sum()) + tail
    if start == end or math.isnan(rest):
        return None
    own_line = following is not None and not any(candidate.is_next for candidate in listed)
    if own_line and following is not None and following.probability is not None:
        rest -= following.probability
    return min(1.0, max(0.0, rest))  # rounding: stored probabilities may add up to a little more than one
