"""Replies of vLLM's server and dumps of its objects as they are parsed, and what they say of the chosen tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.convert import vllm_rows as engine
from logitstore.convert.base import Tally
from logitstore.convert.rows import Rows, is_next, listed_of
from logitstore.convert.vllm_rows import Kind
from logitstore.errors import SourceError
from logitstore.limits import ID_LIMIT

_PREFIX: Final = "token_id:"
_RANK_NOTE: Final = (
    "At {n} positions the generated token stands below the other candidates, and the server does not say its rank, "
    "which may be far behind: it is kept as the target only."
)

Id = Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]
_Rank = Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]
_Index = Annotated[int, msgspec.Meta(ge=0, lt=2**40)]


class Logprob(msgspec.Struct, gc=False):
    """One candidate of a dictionary."""

    logprob: float | None  # null is how some encoders write -inf
    rank: _Rank | None = None


class _Flat(msgspec.Struct, gc=False):
    start_indices: list[_Index]
    end_indices: list[_Index]
    token_ids: list[Id]
    logprobs: list[float | None]
    ranks: list[_Rank | None] | None = None


LogprobRows = list[dict[Id, Logprob] | None] | _Flat | None


class _Candidate(msgspec.Struct, gc=False):
    token: str
    logprob: float | None = None


class _Entry(_Candidate, gc=False):
    top_logprobs: list[_Candidate] | None = None


class Said(msgspec.Struct, gc=False):
    """`logprobs` of a choice: `content` in chat, the lists in completions."""

    content: list[_Entry] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float | None] | None] | None = None


class _Message(msgspec.Struct, gc=False):
    content: str | None = None


class Choice(msgspec.Struct, gc=False):
    """One answer of a server's reply."""

    text: str | None = None
    message: _Message | None = None
    prompt_token_ids: list[Id] | None = None
    token_ids: list[Id] | None = None
    prompt_logprobs: LogprobRows = None
    logprobs: Said | None = None
    delta: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct, gc=False):
    token_ids: list[Id] | None = None
    text: str | None = None
    logprobs: LogprobRows = None


class Reply(msgspec.Struct, gc=False):
    """A server's reply, or the dump of a `RequestOutput`."""

    id: str | None = None
    request_id: str | None = None
    prompt: str | None = None
    prompt_token_ids: list[Id] | None = None
    prompt_logprobs: LogprobRows = None
    choices: list[Choice] | None = None
    outputs: list[_Output] | None = None


REPLY: Final = msgspec.json.Decoder(Reply)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The `logprobs` of a choice.

    Attributes:
        tokens: what was generated [R]; after the prompt's tokens under `echo`.
        own: their logprobs [R]; NaN where the reply says null.
        count: candidates of each [R].
        names: the candidates [N].
        values: their logprobs [N].
    """

    tokens: list[str]
    own: NDArray[np.float64]
    count: NDArray[np.int64]
    names: list[str]
    values: list[float | None]

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes first: only its first token has no logprob."""
        return len(self.own) > 0 and bool(np.isnan(self.own[0]))

    def since(self, row: int) -> Chosen:
        """Without the rows before this one."""
        at = int(self.count[:row].sum())
        return Chosen(self.tokens[row:], self.own[row:], self.count[row:], self.names[at:], self.values[at:])

    def rows(self, tokens: NDArray[np.int64], kind: Kind, tally: Tally) -> Rows:
        """The rows of the generated tokens, given as ids."""
        self._check_whole()
        ids = token_ids(self.names)
        values = np.fromiter((-np.inf if value is None else value for value in self.values), np.float64, len(ids))
        said = engine.Listed(self.count, ids, values, np.zeros(len(ids), np.int64))
        engine.check_values(said, "logprobs", kind)
        mine = ids == np.repeat(tokens, self.count)
        whole, rest = said.rows(np.ones(len(ids), np.bool_)), said.rows(~mine)
        own = engine.said_once(whole, tokens, self.own, "logprobs", kind, tally)
        rank = np.zeros(len(own), np.int64)
        if kind == "logprob":
            rank = np.where(is_next(rest, own) & (rest.count < self.count), rest.count + 1, 0)
        made = engine.finished(rest, tokens, own, rank, "logprobs", kind)
        listed = listed_of(whole, tokens)
        tally.note(_RANK_NOTE, int((~np.isnan(listed) & (made.count == rest.count) & ~np.isnan(own)).sum()))
        return made

    def targets(self, tokens: NDArray[np.int64], kind: Kind) -> Rows:
        """The same without candidates, whose ids are not known."""
        self._check_whole()
        return engine.targets_only(tokens, self.own, "logprobs", kind)

    def _check_whole(self) -> None:
        engine.check_filled(~np.isnan(self.own), "token_logprobs")
        engine.check_filled(self.count > 0, "top_logprobs")


def chosen(said: Said | None) -> Chosen | None:
    """What the server says of the chosen tokens, in chat or completions; None where it says nothing."""
    if said is None or (said.content is None and said.tokens is None):
        return None
    if said.content is not None:
        top = [entry.top_logprobs or [] for entry in said.content]
        flat = [*chain.from_iterable(top)]
        names, values = [each.token for each in flat], [each.logprob for each in flat]
        tokens = [entry.token for entry in said.content]
        own: list[float | None] = [-np.inf if entry.logprob is None else entry.logprob for entry in said.content]
        count = [len(each) for each in top]
    else:
        tokens, own = said.tokens or [], said.token_logprobs or []
        tops = [each or {} for each in said.top_logprobs or [None] * len(tokens)]
        names, values = [*chain.from_iterable(tops)], [*chain.from_iterable(each.values() for each in tops)]
        count = [len(each) for each in tops]
    if not len(tokens) == len(own) == len(count):
        says = f"{len(tokens)} tokens, {len(own)} token_logprobs and {len(count)} top_logprobs"
        raise SourceError(f"logprobs has {says}; they belong together one by one")
    return Chosen(tokens, engine.numbers(own), np.array(count, np.int64), names, values)


def are_ids(names: Sequence[str]) -> bool:
    """Whether the tokens of a server say their ids."""
    return not names or names[0].startswith(_PREFIX)


def token_ids(names: Sequence[str]) -> NDArray[np.int64]:
    """The ids that the tokens of a server say that was asked to `return_tokens_as_token_ids`.

    Raises:
        SourceError: some do not.
    """
    if not all(name.startswith(_PREFIX) for name in names):
        raise SourceError("logprobs: some tokens are `token_id:` with an id and some are texts; capture it again")
    said = [name.removeprefix(_PREFIX) for name in names]
    wrong = next((each for each in said if not (each.isascii() and each.isdecimal())), None)
    try:
        if wrong is None:
            return np.fromiter(map(int, said), np.int64, len(said))
    except (ValueError, OverflowError):
        wrong = max(said, key=len)
    raise SourceError(f"logprobs: `{_PREFIX}{wrong[:40]}` is no `token_id:` with an id; capture it again")
