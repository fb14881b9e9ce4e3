"""One sequence to look at: its text piece by piece with what the teacher was unsure of, and chosen positions in full.

Everything about position t belongs to token t: its distribution is that of the token after it. Logprobs are natural
logs; entropies are in nats; what is unknown is None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

import numpy as np

from logitstore.errors import InvalidInputError, LogitStoreError, RowIndexError
from logitstore.look.measures import ENTROPIES, Measures, entropy_without_stored, everything_else, measure
from logitstore.look.words import prompt_of
from logitstore.shard.sequence import Sequence
from logitstore.text import label, running
from logitstore.tokenizer import Tokenizer

FOUND: Final = 10
"""Places of a text that are shown; how many more there are is said."""

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
        entropy_from: one of `ENTROPIES`, which say how to read it; None with it.
        next_rank: rank of the next token from 1.
        next_logprob: its logprob: how surprised the teacher was, with the sign turned.
    """

    id: int
    text: str
    entropy: float | None
    entropy_from: str | None
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
        is_candidate: whether it is among the stored ones, listed or not. Then it has that one's numbers, which those of
            a piece need not be: other things are known of the next token than of a candidate.
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
        entropy_from: as of a piece.
        impossible: whether numbers of the distribution are, see `Measures`; then neither candidates nor anything found
            from them is told.
        count: stored candidates; 0 where there is no distribution.
        draws: the sum of the draws of all; None unless the distribution was sampled.
        candidates: the best of them.
        next: the real next token; None at the end of the sequence.
        everything_else: probability of what is neither listed nor the next token: of the other candidates, and of the
            tail where there can be one; that of the next token is in it where it is unknown by itself. 0 where nothing
            is left; None where it is unknown.
    """

    position: int
    id: int
    text: str
    before: str
    entropy: float | None
    entropy_from: str | None
    impossible: bool
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
        begins_with_placeholder: whether the first token is one, and its text that of the prompt for which it stands.
        tokens: all of them.
        positions: those that were chosen, in the order of the text.
        found_more: places of the text that was looked for beyond those shown.
    """

    id: str
    row: int | None
    normalised: str
    begins_with_placeholder: bool
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
        sequence: one of `words.to_be_read`.
        tokenizer: the teacher's; None: ids stand for texts.
        row: of the sequence, to be told again.
        at: positions to be chosen; negative ones count from the end.
        find: a text: the positions at which it ends are chosen; letters' case and the kinds of white space make no
            difference. Without both, the positions that are most uncertain are chosen.
        candidates: of each chosen position, at most.

    Raises:
        RowIndexError: a position is outside the sequence.
        TextNotFoundError: the text is not in the sequence.
        InvalidInputError: the text is empty.
    """
    measures = measure(sequence)
    texts = running(tokenizer, sequence.tokens.tolist())
    prompt = prompt_of(sequence, tokenizer)
    if prompt is not None:
        texts[0] = prompt
    chosen, more = [_inside(position, sequence) for position in at], 0
    if find is not None:
        ends = _ends(texts, find)
        if not ends:
            raise TextNotFoundError(f"the text {find!r} is not in the sequence {sequence.id!r}")
        chosen, more = chosen + ends[:FOUND], max(0, len(ends) - FOUND)
    elif not chosen:
        chosen = _most_uncertain(sequence, measures)
    pieces = _pieces(sequence, measures, texts)
    measures = _of_candidates(sequence, measures)
    rest = everything_else(sequence, measures, candidates)
    return Shown(
        id=sequence.id,
        row=row,
        normalised=sequence.normalised,
        begins_with_placeholder=prompt is not None,
        tokens=pieces,
        positions=tuple(
            Position(
                position=t,
                id=pieces[t].id,
                text=label(tokenizer, pieces[t].id),
                before="".join(texts[max(0, t + 1 - _BEFORE) : t + 1])[-_BEFORE:],
                entropy=pieces[t].entropy,
                entropy_from=pieces[t].entropy_from,
                impossible=bool(measures.impossible[t]),
                count=int(sequence.count[t]),
                draws=_draws(sequence, t),
                candidates=_candidates(sequence, measures, tokenizer, t, candidates),
                next=_next(sequence, measures, tokenizer, t),
                everything_else=_number(rest[t]),
            )
            for t in sorted(set(chosen))
        ),
        found_more=more,
    )


def _inside(position: int, sequence: Sequence) -> int:
    length = len(sequence)
    if -length <= position < length:
        return position % length
    has = "is empty" if length == 0 else f"has the positions 0 to {length - 1}"
    raise RowIndexError(f"there is no position {position}: the sequence {sequence.id!r} {has}")


def _ends(texts: list[str], wanted: str) -> list[int]:
    """The positions of the tokens that hold the last character of a text, ascending."""
    if not wanted:
        raise InvalidInputError("the text to be found is empty")
    plain, wanted = [_plain(text) for text in texts], _plain(wanted)  # of other lengths, perhaps, but token by token
    whole = "".join(plain)
    ends = np.array(list(accumulate(map(len, plain))), np.int64)
    last = []
    start = whole.find(wanted)
    while start >= 0:
        last.append(start + len(wanted) - 1)
        start = whole.find(wanted, start + len(wanted))
    return np.unique(np.searchsorted(ends, last, side="right")).tolist() if last else []


def _plain(text: str) -> str:
    """A text as it is compared: by the rule of the search of `view`."""
    return re.sub(r"\s", " ", text.casefold())


def _most_uncertain(sequence: Sequence, measures: Measures) -> list[int]:
    """The positions of the highest entropies; the first of those with a distribution where none is known."""
    known = np.flatnonzero(~np.isnan(measures.entropy))
    if len(known) == 0:
        known = np.flatnonzero(sequence.count)
    order = np.argsort(-measures.entropy[known], kind="stable")
    return [int(known[place]) for place in order[:_UNCERTAIN]]


def _number(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _pieces(sequence: Sequence, measures: Measures, texts: list[str]) -> tuple[Piece, ...]:
    entropy = np.maximum(measures.entropy, 0)  # rounding: that of a single candidate may be a little less
    columns = (entropy, measures.entropy_is_stored, measures.target_rank, measures.target_logprob)
    values = zip(sequence.tokens.tolist(), texts, *(column.tolist() for column in columns), strict=True)
    otherwise = entropy_without_stored(sequence)
    pieces = []
    for token, text, value, is_stored, rank, logprob in values:
        nats = _number(value)
        source = None if nats is None else ENTROPIES[0] if is_stored else otherwise
        pieces.append(Piece(token, text, nats, source, rank or None, _number(logprob)))
    return tuple(pieces)


def _of_candidates(sequence: Sequence, measures: Measures) -> Measures:
    """The measures with the numbers of a candidate for a target that is one: the numbers of a position add up."""
    at = np.flatnonzero(measures.target_place >= 0)
    place = measures.target_place[at]
    rank, logprob = measures.target_rank.copy(), measures.target_logprob.copy()
    rank[at] = place + 1
    with np.errstate(divide="ignore"):
        logprob[at] = np.log(measures.probabilities[sequence.offsets[at] + place])
    return replace(measures, target_rank=rank, target_logprob=logprob)


def _draws(sequence: Sequence, t: int) -> int | None:
    here = slice(sequence.offsets[t], sequence.offsets[t + 1])
    return None if sequence.draws is None else int(sequence.draws[here].sum())


def _next(sequence: Sequence, measures: Measures, tokenizer: Tokenizer | None, t: int) -> Next | None:
    if t + 1 == len(sequence):
        return None
    token = int(sequence.tokens[t + 1])
    logprob = _number(measures.target_logprob[t])
    return Next(
        id=token,
        text=label(tokenizer, token),
        is_candidate=bool(measures.target_place[t] >= 0),
        rank=int(measures.target_rank[t]) or None,
        probability=None if logprob is None else math.exp(min(logprob, 0.0)),
        logprob=logprob,
    )


def _candidates(
    sequence: Sequence, measures: Measures, tokenizer: Tokenizer | None, t: int, k: int
) -> tuple[Candidate, ...]:
    if measures.impossible[t]:
        return ()
    start, end = sequence.offsets[t : t + 2].tolist()
    here = slice(start, min(start + k, end))
    ids, probabilities = sequence.ids[here].tolist(), measures.probabilities[here].tolist()
    draws = [None] * len(ids) if sequence.draws is None else sequence.draws[here].tolist()
    following = int(sequence.tokens[t + 1]) if t + 1 < len(sequence) else -1
    return tuple(
        Candidate(rank, token, label(tokenizer, token), p, math.log(p) if p > 0 else -math.inf, n, token == following)
        for rank, (token, p, n) in enumerate(zip(ids, probabilities, draws, strict=True), 1)
    )
