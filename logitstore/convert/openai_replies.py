"""What replies of OpenAI's API and of those like it say of tokens: chat, completions and Responses, as flat arrays."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import nan
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Tally
from logitstore.convert.lines import decode
from logitstore.convert.rows import CLAMPED, Rows, agreeing, is_next, with_target, without_zeros
from logitstore.convert.vocabulary import (
    NO_BYTES,
    SEVERAL,
    Vocabulary,
    count_left,
    gather,
    text_piece,
    without_repeated,
)
from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, SourceError
from logitstore.limits import ID_LIMIT, PROBABILITY_SLACK

_REFUSED_NOTE: Final = "In {n} of the choices the model refused, and the tokens are those of its refusal."
_LEFT_NOTE: Final = "In {n} of the choices logprobs of a refusal stand beside others, and were left out."
_NO_ANSWER_NOTE: Final = "{n} replies were left out, since they have no answer: refusals, or calls of tools."
_EMPTY_NOTE: Final = (
    "At {n} positions the reply has no candidates, though it has some at others, as of tokens that a smaller model "
    "drafted: they are empty, and loss_mask is 0 there."
)
_FIRST_NOTE: Final = (
    "At {n} positions the generated token stands in front of better candidates, as in replies of vLLM, and its rank, "
    "which may be far behind, is not known: it is kept as the target only."
)
_LOSSY_NOTE: Final = (
    "At {n} positions the generated token's id and its text are of different tokens, so the texts are not to be "
    "relied on, and the other candidates are left out."
)
_NO_LOGPROBS: Final = "capture again with logprobs (top_logprobs above 0)"


_Id = Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]


_ID_TEXT: Final = re.compile(r"token_id:[0-9]+").fullmatch
_LEAST_ROWS: Final = 4  # of which half tell that something is wrong


class Token(msgspec.Struct, gc=False):
    """A candidate; its id is -1 where the server gives none."""

    id: _Id = -1
    token: str = ""
    bytes: msgspec.Raw = msgspec.Raw()  # parsed only where they are wanted
    logprob: float = nan  # NaN where the field is missing


class Entry(Token, gc=False):
    """A generated token and the best candidates in its place."""

    top_logprobs: list[Token] | None = None


class Logprobs(msgspec.Struct, gc=False):
    """Of a chat or llama-server's completions, `content`; of other completions, four lists."""

    content: list[Entry] | None = None
    refusal: list[Entry] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Message(msgspec.Struct, gc=False):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    message: _Message | None = None
    logprobs: Logprobs | None = None
    delta: msgspec.Raw = msgspec.Raw()
    token_ids: list[_Id] | None = None  # these three are vLLM's
    prompt_token_ids: list[_Id] | None = None
    prompt_logprobs: msgspec.Raw = msgspec.Raw()


class _Part(msgspec.Struct, gc=False):
    type: str = ""
    text: str | None = None
    logprobs: list[Entry] | None = None


class _Output(msgspec.Struct, gc=False):
    type: str = ""
    content: list[_Part] | None = None


class _Details(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Batch(msgspec.Struct, gc=False):
    body: msgspec.Raw = msgspec.Raw()


class Reply(msgspec.Struct, gc=False):
    """One reply, or the line of the Batch API that holds one."""

    id: str | int | None = None
    custom_id: str | None = None
    choices: list[_Choice] | None = None
    output: list[_Output] | None = None
    usage: _Usage | None = None
    created: float | None = None
    created_at: float | None = None
    response: _Batch | None = None
    error: msgspec.Raw = msgspec.Raw()
    prompt_token_ids: list[_Id] | None = None  # these two are vLLM's
    prompt_logprobs: msgspec.Raw = msgspec.Raw()

    @property
    def prompt_tokens(self) -> int | None:
        """How many tokens the prompt has, as the server counts them."""
        usage = self.usage or _Usage()
        return usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens

    @property
    def generated(self) -> int:
        """How many tokens all choices have together; 0 where that is not said."""
        usage = self.usage or _Usage()
        return usage.completion_tokens or usage.output_tokens or 0

    @property
    def reasoned(self) -> bool:
        """Whether some tokens were thoughts."""
        usage = self.usage or _Usage()
        details = usage.completion_tokens_details or usage.output_tokens_details
        return details is not None and (details.reasoning_tokens or 0) > 0


_REPLY: Final = msgspec.json.Decoder(Reply)


def read_reply(line: bytes) -> Reply:
    """The reply of a line.

    Raises:
        SourceError: it holds none.
    """
    reply = decode(_REPLY, line, "reply")
    if reply.response is not None and reply.response.body:
        custom_id = reply.custom_id
        reply = decode(_REPLY, reply.response.body, "reply in response.body")
        reply.custom_id = custom_id
    if reply.choices is None and reply.output is None:
        error = bytes(reply.error) if reply.error else b"null"
        if error != b"null":
            raise SourceError(f"the request failed: {error[:200].decode(errors='replace')}; leave it out, or ask again")
        raise SourceError("there are neither choices nor output: this is no reply")
    return reply


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer of a reply.

    Attributes:
        text: of the answer.
        logprobs: of its tokens.
        follows: whether it follows the prompt: nothing hidden stands between.
        token_ids: its tokens; None where the reply does not give their ids.
        prompt: the ids of its prompt's tokens; None likewise.
    """

    text: str | None
    logprobs: Logprobs
    follows: bool = True
    token_ids: list[int] | None = None
    prompt: list[int] | None = None

    @property
    def size(self) -> int:
        """How many tokens it has."""
        return len(self.logprobs.content or self.logprobs.tokens or self.logprobs.refusal or ())


def choices_of(reply: Reply, tally: Tally) -> Iterator[Choice]:
    """The answers of a reply.

    Raises:
        SourceError: one has no logprobs, or is a piece of a stream, or there is none, or the prompt has logprobs too.
    """
    if reply.choices is not None and not reply.choices:
        raise SourceError("choices is empty; capture this reply again")
    if _holds(reply.prompt_logprobs) or any(_holds(choice.prompt_logprobs) for choice in reply.choices or ()):
        raise SourceError("there are prompt_logprobs, so this is a reply of vLLM; say --from vllm to read them too")
    for number, choice in enumerate(reply.choices or ()):
        if choice.delta:
            raise SourceError("this is a piece of a streamed reply; capture without stream")
        logprobs, message = choice.logprobs, choice.message or _Message()
        if logprobs is None:
            raise SourceError(f"choice {number} has no logprobs; {_NO_LOGPROBS}")
        text = choice.text if choice.text is not None else message.content
        if logprobs.content is None and logprobs.tokens is None and logprobs.refusal is not None:
            tally.note(_REFUSED_NOTE)
            text = message.refusal
        elif logprobs.refusal:
            tally.note(_LEFT_NOTE)
        prompt = choice.prompt_token_ids or reply.prompt_token_ids
        yield Choice(text, logprobs, token_ids=choice.token_ids, prompt=prompt)
    if reply.choices is None:
        messages = list(_messages_of(reply.output or []))
        tally.note(_NO_ANSWER_NOTE, not messages)
        yield from messages


def _holds(given: msgspec.Raw) -> bool:
    return bytes(given) not in {b"", b"null", b"[]", b"{}"}


def _messages_of(output: list[_Output]) -> Iterator[Choice]:
    for place, each in enumerate(output):
        parts = [part for part in each.content or () if part.type == "output_text"] if each.type == "message" else []
        if not parts:
            continue
        for part in parts:
            if part.text and not part.logprobs:
                raise SourceError(
                    f"output {place} has no logprobs; capture again with top_logprobs and "
                    f"include: ['message.output_text.logprobs']"
                )
        entries = [*chain.from_iterable(part.logprobs or () for part in parts)]
        text = "".join(part.text or "" for part in parts)
        yield Choice(text, Logprobs(content=entries), follows=place == 0)


@dataclass(frozen=True, slots=True)
class Listing:
    """The tokens of a choice.

    Attributes:
        ids: int64 [R]; negative where it is not certain which token it is.
        rows: the candidates in the place of each.
        there: whether each has a row, though it may have no candidates, [R].
        echo: whether the first is that of the prompt, and has no row.
    """

    ids: NDArray[np.int64]
    rows: Rows
    there: NDArray[np.bool_]
    echo: bool = False


def listing(choice: Choice, vocabulary: Vocabulary | None, tally: Tally) -> Listing:
    """The tokens of a choice with their candidates.

    Args:
        choice: the choice.
        vocabulary: finds ids; None without a tokenizer.
        tally: where candidates without an id are counted.

    Raises:
        SourceError: rows are missing, do not fit each other, or have values that are no logprobs.
        InvalidInputError: there are no ids, and no vocabulary to find them.
    """
    logprobs = choice.logprobs
    if logprobs.content is None and logprobs.tokens is not None:
        _check_texts(logprobs.tokens)
        return _of_lists(logprobs, vocabulary).listing(choice, vocabulary, tally)
    entries = logprobs.content if logprobs.content is not None else logprobs.refusal
    if entries is None:
        raise SourceError(f"its logprobs hold no content; {_NO_LOGPROBS}")
    _check_texts([entry.token for entry in entries[:1]])
    return _of_entries(entries, vocabulary, tally).listing(choice, vocabulary, tally)


def _check_texts(tokens: Sequence[str]) -> None:
    if tokens and _ID_TEXT(tokens[0]):
        raise SourceError(f"its tokens are ids ({tokens[0]!r}), so this is a reply of vLLM; say --from vllm")


def _of_entries(entries: list[Entry], vocabulary: Vocabulary | None, tally: Tally) -> _Flat:
    top = [entry.top_logprobs or [] for entry in entries]
    if entries and not any(top):
        raise SourceError(f"there are no top_logprobs; {_NO_LOGPROBS}")
    if vocabulary is None:
        gather(tally, chain.from_iterable(top), (entry for entry in entries if entry.id >= 0))
    flat: list[Token] = [*chain.from_iterable(top), *entries]
    ids = np.fromiter((token.id for token in flat), np.int64, len(flat))
    values = np.fromiter((token.logprob for token in flat), np.float64, len(flat))
    pieces: list[bytes | None] = []
    if unnamed := np.flatnonzero(ids < 0).tolist():
        known = _needed(vocabulary)
        ids[unnamed] = [known.id_of_token(flat[at]) for at in unnamed]
        pieces = [known.piece(entry) for entry in entries]
    return _Flat(np.fromiter(map(len, top), np.int64, len(top)), ids, values, pieces, lambda at: flat[at].token)


def _of_lists(given: Logprobs, vocabulary: Vocabulary | None) -> _Flat:
    tokens, own, top = given.tokens or [], given.token_logprobs, given.top_logprobs
    if own is None or top is None:
        raise SourceError(f"there are no {'token' if own is None else 'top'}_logprobs; {_NO_LOGPROBS}")
    for name, other in (("token_logprobs", own), ("top_logprobs", top)):
        if len(other) != len(tokens):
            raise SourceError(f"there are {len(tokens)} tokens and {len(other)} {name}; capture again")
    echo = bool(own) and own[0] is None
    for at, (level, row) in enumerate(zip(own, top, strict=True)):
        if (level is None or row is None) and not (echo and at == 0):
            name = "token_logprobs" if level is None else "top_logprobs"
            raise SourceError(f"{name}[{at}] is null, so a row is missing: only the first token of an echo has none")
    known = _needed(vocabulary)
    rows = [{} if row is None or (echo and at == 0) else row for at, row in enumerate(top)]
    if len(tokens) > echo and not any(rows):
        raise SourceError(f"the top_logprobs are empty; {_NO_LOGPROBS}")
    texts = [*chain.from_iterable(rows), *tokens]
    levels = chain(chain.from_iterable(row.values() for row in rows), (nan if each is None else each for each in own))
    return _Flat(
        np.fromiter(map(len, rows), np.int64, len(rows)),
        np.fromiter(map(known.id_of_text, texts), np.int64, len(texts)),
        np.fromiter(levels, np.float64, len(texts)),
        [text_piece(token) for token in tokens],
        texts.__getitem__,
        echo,
    )


def _given_ids(choice: Choice, tokens: int, *, echo: bool) -> NDArray[np.int64] | None:
    """The ids that the reply itself gives the generated tokens, and under `echo` the prompt's; None without them."""
    if choice.token_ids is None:
        return None
    prompt = choice.prompt or [] if echo else []
    for ids in (choice.token_ids, [*prompt, *choice.token_ids]):
        if len(ids) == tokens:
            return np.array(ids, np.int64)
    raise SourceError(f"there are {len(choice.token_ids)} token_ids and logprobs of {tokens} tokens; capture it again")


def _others(given: NDArray[np.int64], found: NDArray[np.int64], tally: Tally) -> NDArray[np.bool_]:
    """Where the tokens' texts or bytes are of others than their ids: a decoder took a space, for one."""
    apart: NDArray[np.bool_] = (found >= 0) & (found != given)
    known, wrong = int((found >= 0).sum()), int(apart.sum())
    if known >= _LEAST_ROWS and 2 * wrong >= known:
        at = int(np.argmax(apart))
        raise SourceError(
            f"token {at}: its id in token_ids is {given[at]}, but its bytes are those of the token {found[at]}, and so "
            f"for {wrong} of {known} tokens; give the teacher's --tokenizer, or capture with return_tokens_as_token_ids"
        )
    tally.note(_LOSSY_NOTE, wrong)
    return apart


def _needed(vocabulary: Vocabulary | None) -> Vocabulary:
    if vocabulary is None:
        raise InvalidInputError("its tokens have no ids; give the teacher's whole tokenizer (--tokenizer) to find them")
    return vocabulary


@dataclass(frozen=True, slots=True)
class _Flat:
    """Candidates, and after them the generated tokens.

    Attributes:
        count: candidates of each row, [R].
        ids: [N + R].
        values: their logprobs; NaN where missing.
        pieces: [R], bytes of the generated tokens; empty where all have ids.
        name: the text of each, for messages.
        echo: whether the first generated one is the prompt's, and has no row.
    """

    count: NDArray[np.int64]
    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    pieces: Sequence[bytes | None]
    name: Any
    echo: bool = False

    def listing(self, choice: Choice, vocabulary: Vocabulary | None, tally: Tally) -> Listing:
        self._check()
        values = np.maximum(self.values, CLAMPED).astype(np.float32)
        n = int(self.count.sum())
        ids, own_ids = self.ids[:n], self.ids[n:].copy()
        settled = np.zeros(len(own_ids), np.bool_)
        given = _given_ids(choice, len(own_ids), echo=self.echo)
        if self.pieces and vocabulary is not None:
            ids = without_repeated(self.count, ids)
            if given is None:
                own_ids[self._is_repeated(ids, own_ids)] = NO_BYTES
                settled = vocabulary.settle(own_ids, self.pieces, tally)
            count_left(tally, ids)
        kept, there = ids >= 0, self._there(tally)
        if given is not None:
            kept &= ~ragged.spread(_others(given, own_ids, tally), self.count)
            own_ids = given
        level = np.where(there | (values[n:] != 0), values[n:], np.float32(np.nan))  # 0: it was not looked up
        found = without_zeros(Rows(self.count, ids, values[:n]).keep(kept))
        known = agreeing(found, own_ids, np.where(own_ids >= 0, level, np.float32(np.nan)), "logprob", tally)
        found, rank = self._without_first(found, own_ids, known, tally)
        rows = with_target(found, own_ids, np.where(settled, np.float32(np.nan), known), rank)
        if settled.any():  # those are no candidates, whatever their probability
            rows = replace(rows, target_logprob=np.where(known > CLAMPED, known, np.float32(np.nan)))
        return Listing(own_ids, rows, there, self.echo)

    def _there(self, tally: Tally) -> NDArray[np.bool_]:
        """Which generated tokens have a row; an empty one says nothing where others are filled."""
        there = self.count > 0
        there[: int(self.echo)] = True
        if not self.count.any():
            there[:] = True
        tally.note(_EMPTY_NOTE, int((~there).sum()))
        return there

    def _without_first(
        self, rows: Rows, own: NDArray[np.int64], known: NDArray[np.float32], tally: Tally
    ) -> tuple[Rows, NDArray[np.int64]]:
        """Rows without generated tokens that are listed first and out of order, and the ranks of these where certain.

        vLLM's chat lists the first k of the generated token and, behind it, the best ones.
        """
        row = ragged.rows(rows.count)
        best = np.full(len(rows.count), -np.inf, np.float32)
        np.maximum.at(best, row, rows.logprobs)
        mine = rows.ids == own[row]
        first = mine & ragged.firsts(rows.count)
        alone = bool((self.count[int(self.echo) :] == 1).all()) and bool(mine.all())  # k = 1: always itself
        out = first & ((rows.logprobs < best[row]) | alone)
        rest = rows.keep(~out)
        lowest = np.full(len(rows.count), np.inf, np.float32)
        np.minimum.at(lowest, ragged.rows(rest.count), rest.logprobs)
        was = rest.count < rows.count
        rank = np.where(was & is_next(rest, known), rest.count + 1, 0)
        tally.note(_FIRST_NOTE, int((was & (rank == 0) & (known < lowest)).sum()))
        return rest, rank

    def _is_repeated(self, ids: NDArray[np.int64], own: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which generated tokens look like several candidates of their row."""
        n = len(ids)
        row = ragged.rows(self.count)
        hit = (ids == SEVERAL) & (self.ids[:n] == own[row]) & (own[row] >= 0)
        return np.asarray(np.bincount(row, hit, minlength=len(own)) > 0)

    def _check(self) -> None:
        n = int(self.count.sum())
        wrong = ~(self.values <= PROBABILITY_SLACK)
        wrong[n:] &= ~np.isnan(self.values[n:])  # a generated token may have no logprob of its own
        if wrong.any():
            at = int(np.argmax(wrong))
            row = np.r_[ragged.rows(self.count), : len(self.count)][at]
            value = self.values[at]
            what = "missing" if np.isnan(value) else f"{value}, which is above 0: a probability?"
            raise SourceError(f"token {row}: the logprob of {self.name(at)!r} is {what}; capture it again")
