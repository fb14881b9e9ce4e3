"""`vllm`: what vLLM gives, as objects, as dumps of them, and as replies of its server, one JSON object a line.

A row of `prompt_logprobs` is about the prompt's token of its own place, so the first is None; one of
`outputs[].logprobs` is about the generated token of its place: both are shifted by one here. A row begins with the
actual token and its true rank, and then has the best candidates: as a dictionary in which every token stands once, or
flat in columns, where the actual token stands twice when it is among them.

The server writes dictionaries with strings as keys, and the chosen tokens as the `logprobs` of OpenAI's completions
and chat, whose tokens are texts unless it was asked to `return_tokens_as_token_ids`. It writes -9999 for -inf.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert import vllm_rows as engine
from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally
from logitstore.convert.lines import JSONL, decode, first_line, read_lines
from logitstore.convert.rows import Rows
from logitstore.convert.source import Input
from logitstore.convert.vllm_rows import Kind
from logitstore.dataset.writer import Writer
from logitstore.encoding import ragged
from logitstore.errors import SourceError
from logitstore.limits import ID_LIMIT

_PREFIX: Final = "token_id:"
_FILLED: Final = re.compile(rb'"prompt_logprobs"\s*:\s*[\[{]|"token_id:[0-9]')
_COLUMNS: Final = pa.schema([("prompt", pa.string()), ("text", pa.string())])

_NOTE: Final = (
    "A row of prompt_logprobs is taken to be about the token of its own place, and is shifted by one; logprobs are "
    "taken to be of the raw distribution at temperature 1, as in the default logprobs_mode, raw_logprobs."
)
_TEXT_NOTE: Final = (
    "In {n} of the sequences the generated tokens have no candidates, since these are texts, of which several ids may "
    "have the same; capture with return_tokens_as_token_ids to have them."
)
_ONLY_TEXT: Final = (
    "the candidates are texts, of which several ids may have the same, and there are no prompt_logprobs; capture with "
    "return_tokens_as_token_ids, or convert --from openai with the teacher's tokenizer"
)
_UNKNOWN_NOTE: Final = "In {n} of the sequences the generated tokens are left out, since their ids are not known."
_TAKEN_NOTE: Final = (
    "In {n} of the sequences the prompt's tokens are those that begin the rows of prompt_logprobs, and the first is "
    "taken to be the tokenizer's BOS; capture with return_token_ids to be sure."
)
_NO_LOGPROBS: Final = "there are no logprobs; capture with prompt_logprobs or logprobs above 0"

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


_Rows = list[dict[Id, Logprob] | None] | _Flat | None


class _Candidate(msgspec.Struct, gc=False):
    token: str
    logprob: float | None = None


class _Entry(_Candidate, gc=False):
    top_logprobs: list[_Candidate] | None = None


class _Said(msgspec.Struct, gc=False):
    """`logprobs` of a choice: `content` in chat, the lists in completions."""

    content: list[_Entry] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float | None] | None] | None = None


class _Message(msgspec.Struct, gc=False):
    content: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    message: _Message | None = None
    prompt_token_ids: list[Id] | None = None
    token_ids: list[Id] | None = None
    prompt_logprobs: _Rows = None
    logprobs: _Said | None = None


class _Output(msgspec.Struct, gc=False):
    token_ids: list[Id] | None = None
    text: str | None = None
    logprobs: _Rows = None


class _Reply(msgspec.Struct, gc=False):
    id: str | None = None
    request_id: str | None = None
    prompt: str | None = None
    prompt_token_ids: list[Id] | None = None
    prompt_logprobs: _Rows = None
    choices: list[_Choice] | None = None
    outputs: list[_Output] | None = None


_REPLY: Final = msgspec.json.Decoder(_Reply)


def add(
    writer: Writer,
    request_output: Any,
    *,
    id: str | None = None,  # noqa: A002 - the format's own name for it
    value_kind: Kind = "logprob",
    **columns: Any,
) -> None:
    """Add what vLLM made of a request: the prompt and each completion are one sequence.

    Both forms of logprobs are taken; of the flat one (`SamplingParams(flat_logprobs=True)`) no dictionary and no other
    object is made per token. Without `prompt_logprobs` only the rows of generated tokens are filled, and the reverse.

    Args:
        writer: takes the sequences.
        request_output: a `RequestOutput`, or what has its attributes `prompt_token_ids`, `prompt_logprobs`, `outputs`
            (with `token_ids` and `logprobs`) and `request_id`.
        id: of the first completion; those after it are called `id#1`, `id#2`. None takes the `request_id`.
        value_kind: `logit` under `logprobs_mode` raw_logits or processed_logits, with a writer of
            `normalised="candidates"`.
        **columns: the user's own columns.

    Raises:
        SourceError: rows are missing or not where they should be, or it is no RequestOutput.
        InvalidInputError: a value cannot be stored.
    """
    name = getattr(request_output, "request_id", None) if id is None else id
    found = [arguments for arguments, _ in sequences(request_output, engine.kind_for(writer, value_kind))]
    for number, arguments in enumerate(found):
        called = {} if name is None else {"id": numbered(str(name), number)}
        writer.add(**arguments, **called, **columns)


def numbered(name: str, number: int) -> str:
    """The id of a sequence of a record whose first has this id."""
    return name if number == 0 else f"{name}#{number}"


def sequences(output: Any, kind: Kind) -> Iterator[tuple[dict[str, Any], Any]]:
    """Arguments of `Writer.add` for each completion of a `RequestOutput` or a dump of it, and the completion.

    Raises:
        SourceError: rows are missing or not where they should be.
    """
    prompt = engine.integers(getattr(output, "prompt_token_ids", None), "prompt_token_ids")
    if len(prompt) == 0:
        raise SourceError("there are no prompt_token_ids, and no choices; give what vLLM gave")
    scored = getattr(output, "prompt_logprobs", None)
    parts = [] if scored is None else [(0, prompt_rows(engine.listed(scored, "prompt_logprobs"), prompt, kind))]
    outputs = getattr(output, "outputs", None) or []
    if not parts and all(getattr(each, "logprobs", None) is None for each in outputs):
        raise SourceError(_NO_LOGPROBS)
    if not outputs:
        yield engine.arguments(prompt, parts), None
    for number, each in enumerate(outputs):
        name = f"outputs[{number}].logprobs"
        tokens = engine.integers(getattr(each, "token_ids", None), f"outputs[{number}].token_ids")
        made = list(parts)
        if (logprobs := getattr(each, "logprobs", None)) is not None:
            said = engine.listed(logprobs, name)
            _check_rows(said.count, len(tokens), name, "generated tokens")
            made.append((len(prompt) - 1, engine.own_first(said, tokens, name, kind)))
        yield engine.arguments(np.concatenate([prompt, tokens]), made), each


def prompt_rows(said: engine.Listed, prompt: NDArray[np.int64], kind: Kind) -> Rows:
    """The rows of a prompt's tokens but the first, which are those of the positions from 0.

    Raises:
        SourceError: rows are missing or not where they should be.
    """
    _check_prompt(said, len(prompt))
    return engine.own_first(said.since(1), prompt[1:], "prompt_logprobs", kind, first=1)


def _check_prompt(said: engine.Listed, tokens: int) -> None:
    if len(said.count) and said.count[0]:
        raise SourceError("prompt_logprobs, row 0: there is one, though nothing stands before the first token")
    _check_rows(np.r_[1, said.count[1:]] if len(said.count) else said.count, tokens, "prompt_logprobs", "tokens")


def _check_rows(count: NDArray[np.int64], tokens: int, name: str, what: str) -> None:
    if len(count) != tokens:
        raise SourceError(f"{name} has {len(count)} rows for {tokens} {what}; capture it again")
    if not bool(count.all()):
        at = int(np.argmin(count > 0))
        last = at + int(np.argmax(np.r_[count[at:], 1] > 0)) - 1
        says = f"rows {at} to {last} are missing, as prefix caching leaves them out"
        raise SourceError(f"{name}: {says}; capture again with enable_prefix_caching=False")


@dataclass(frozen=True, slots=True)
class _Chosen:
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

    def since(self, row: int) -> _Chosen:
        """Without the rows before this one."""
        at = int(self.count[:row].sum())
        return _Chosen(self.tokens[row:], self.own[row:], self.count[row:], self.names[at:], self.values[at:])

    def rows(self, tokens: NDArray[np.int64], kind: Kind) -> Rows:
        """The rows of the generated tokens, given as ids."""
        ids = _token_ids(self.names)
        values = np.fromiter((-np.inf if value is None else value for value in self.values), np.float64, len(ids))
        said = engine.Listed(self.count, ids, values, np.zeros(len(ids), np.int64))
        engine.check_values(said, "logprobs", kind)
        rest = said.rows(ids != np.repeat(tokens, self.count))
        return engine.finished(rest, tokens, self.own, None, "logprobs", kind)


def _chosen(said: _Said | None) -> _Chosen | None:
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
    return _Chosen(tokens, engine.numbers(own), np.array(count, np.int64), names, values)


def _are_ids(names: Sequence[str]) -> bool:
    return not names or names[0].startswith(_PREFIX)


def _token_ids(names: Sequence[str]) -> NDArray[np.int64]:
    """The ids that the tokens of a server say that was asked to `return_tokens_as_token_ids`."""
    try:
        ids = np.fromiter((int(name.removeprefix(_PREFIX)) for name in names), np.int64, len(names))
    except (ValueError, OverflowError) as error:
        raise SourceError(f"logprobs: a token is no `token_id:` with an id, as the first is ({error})") from error
    if not all(name.startswith(_PREFIX) for name in names):
        raise SourceError("logprobs: some tokens are `token_id:` with an id and some are texts; capture it again")
    return ids


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequences of a reply.

    Attributes:
        kind: what the values are.
        bos: stands where the first token of a prompt is not known; None where the tokenizer is not, or has none.
    """

    kind: Kind
    bos: int | None

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        reply = decode(_REPLY, record.data, "reply of vLLM")
        made = self._dumped(reply) if reply.outputs is not None or reply.choices is None else self._served(reply, tally)
        name = reply.id if reply.request_id is None else reply.request_id
        if name is not None and name.isdecimal():
            name = None  # a counter of the process, which begins again in the next
        for number, (found, text) in enumerate(made):
            called = {} if name is None else {"id": numbered(name, number)}
            yield Item("add", found | called | {"prompt": reply.prompt, "text": text})

    def _dumped(self, reply: _Reply) -> Iterator[tuple[dict[str, Any], str | None]]:
        for found, output in sequences(reply, self.kind):
            yield found, None if output is None else output.text

    def _served(self, reply: _Reply, tally: Tally) -> Iterator[tuple[dict[str, Any], str | None]]:
        if not reply.choices:
            raise SourceError("choices is empty; capture this reply again")
        for number, choice in enumerate(reply.choices):
            try:
                found = self._sequence(reply, choice, tally)
            except SourceError as error:
                raise SourceError(f"choices[{number}]: {error}") from error
            yield found, choice.text if choice.message is None else choice.message.content

    def _sequence(self, reply: _Reply, choice: _Choice, tally: Tally) -> dict[str, Any]:
        said = _chosen(choice.logprobs)
        if said is not None and said.echoes and _are_ids(said.tokens):
            tokens = _token_ids(said.tokens)
            start = choice.prompt_token_ids or reply.prompt_token_ids or []
            _check_tokens(tokens[: len(start)], start)
            _check_tokens(tokens[max(0, len(tokens) - len(choice.token_ids or ())) :], choice.token_ids)
            return engine.arguments(tokens, [(0, said.since(1).rows(tokens[1:], self.kind))])
        prompt, sure, parts = self._prompt(reply, choice, tally)
        made, rows = self._generated(choice, said, tally, others=bool(parts))
        if rows is not None:
            parts.append((len(prompt) - 1, rows))
        if not parts:
            raise SourceError(_NO_LOGPROBS)
        tally.note(engine.CONTEXT_NOTE, not sure)
        return engine.arguments(np.concatenate([prompt, made]), parts, trained=sure)

    def _prompt(
        self, reply: _Reply, choice: _Choice, tally: Tally
    ) -> tuple[NDArray[np.int64], bool, list[tuple[int, Rows]]]:
        """The prompt's tokens, whether they are certain, and the rows that are about them."""
        ids = choice.prompt_token_ids or reply.prompt_token_ids
        scored = reply.prompt_logprobs if choice.prompt_logprobs is None else choice.prompt_logprobs
        if scored is None:
            return np.array(ids or [self.bos or 0], np.int64), bool(ids), []
        said = engine.listed(scored, "prompt_logprobs")
        sure = bool(ids) or self.bos is not None
        if not ids:
            _check_prompt(said, len(said.count))
            ids = [self.bos or 0, *ragged.heads(said.ids, said.count).tolist()]
            tally.note(_TAKEN_NOTE, sure)
        prompt = np.array(ids, np.int64)
        return prompt, sure, [(0, prompt_rows(said, prompt, self.kind))]

    def _generated(
        self,
        choice: _Choice,
        said: _Chosen | None,
        tally: Tally,
        *,
        others: bool,
    ) -> tuple[NDArray[np.int64], Rows | None]:
        """The generated tokens, and the rows about them; `others` says whether the sequence has some without these."""
        known = None if choice.token_ids is None else np.array(choice.token_ids, np.int64)
        none = np.empty(0, np.int64)
        if said is None:
            tally.note(_UNKNOWN_NOTE, known is None)
            return none if known is None else known, None
        if _are_ids(said.tokens):
            tokens = _token_ids(said.tokens)
            _check_tokens(tokens, choice.token_ids)
            return tokens, said.rows(tokens, self.kind)
        if not others:
            raise SourceError(_ONLY_TEXT)
        if known is None:
            tally.note(_UNKNOWN_NOTE)
            return none, None
        tally.note(_TEXT_NOTE)
        said = said.since(max(0, len(said.tokens) - len(known))) if said.echoes else said
        if len(said.own) != len(known):
            raise SourceError(f"logprobs has {len(said.own)} tokens, token_ids {len(known)}; capture it again")
        return known, engine.targets_only(known, said.own, "logprobs", self.kind)


def _check_tokens(said: NDArray[np.int64], tokens: list[int] | None) -> None:
    """Refuse logprobs that are about other tokens than the generated ones."""
    if tokens is None or said.tolist() == tokens:
        return
    at = next((at for at, (one, other) in enumerate(zip(said.tolist(), tokens, strict=False)) if one != other), None)
    at = min(len(said), len(tokens)) if at is None else at
    raise SourceError(f"logprobs has {len(said)} tokens, token_ids {len(tokens)}, and they differ from number {at}")


def _recognises(source: Input) -> bool:
    line = first_line(source)
    if not line.startswith(b"{"):
        return False
    keys = engine.keys_at(line)
    if (1, b"choices") in keys:
        return bool(_FILLED.search(line))
    own = {(1, b"outputs"), (1, b"request_id"), (1, b"prompt_token_ids")}
    others = {(1, b"context_logits"), (1, b"topk_prompt_logprobs")}  # of TensorRT-LLM and Tinker
    return (1, b"prompt_logprobs") in keys and bool(keys & own) and not keys & others


def _read(inputs: list[Input], options: Options) -> Import:
    kind = engine.kind_of(options)
    bos = options.tokenizer.bos_id if options.tokenizer is not None else None
    opened = read_lines(inputs, _Parser(kind, bos), settings={"columns": _COLUMNS} | engine.settings_of(kind))
    opened.notes = [_NOTE, *([engine.LOGIT_NOTE] if kind == "logit" else [])]
    return opened


IMPORTER: Final = Importer(
    name="vllm",
    description="vLLM: dumps of its RequestOutput, and replies of its server with token ids, one a line",
    loses="candidates that are given as texts only; ranks that the server does not give",
    recognises=_recognises,
    read=_read,
    patterns=JSONL,
    options=("value_kind",),
)
