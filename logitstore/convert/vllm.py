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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert import vllm_rows as engine
from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally
from logitstore.convert.lines import JSONL, decode, first_line, read_lines
from logitstore.convert.rows import Rows, bounded
from logitstore.convert.source import Input
from logitstore.convert.vllm_replies import REPLY, Choice, Chosen, Id, LogprobRows, Reply, are_ids, chosen, token_ids
from logitstore.convert.vllm_rows import Kind
from logitstore.dataset.writer import Writer
from logitstore.encoding import ragged
from logitstore.errors import SourceError

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
    "taken to be the BOS that the tokenizer adds; capture with return_token_ids to be sure."
)
_NO_LOGPROBS: Final = "there are no logprobs; capture with prompt_logprobs or logprobs above 0"


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
    kind = engine.kind_for(writer, value_kind)
    found = [arguments for arguments, _ in sequences(request_output, kind, Tally())]
    for number, arguments in enumerate(found):
        called = {} if name is None else {"id": numbered(str(name), number)}
        writer.add(**arguments, **called, **columns)


def numbered(name: str, number: int) -> str:
    """The id of a sequence of a record whose first has this id."""
    return name if number == 0 else f"{name}#{number}"


def sequences(output: Any, kind: Kind, tally: Tally) -> Iterator[tuple[dict[str, Any], Any]]:
    """Arguments of `Writer.add` for each completion of a `RequestOutput` or a dump of it, and the completion.

    Raises:
        SourceError: rows are missing or not where they should be.
    """
    prompt = engine.integers(getattr(output, "prompt_token_ids", None), "prompt_token_ids")
    if len(prompt) == 0:
        raise SourceError("there are no prompt_token_ids, and no choices; give what vLLM gave")
    scored = getattr(output, "prompt_logprobs", None)
    parts = [] if scored is None else [(0, _prompt_rows(engine.listed(scored, "prompt_logprobs"), prompt, kind, tally))]
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
            made.append((len(prompt) - 1, engine.own_first(said, tokens, name, kind, tally=tally)))
        yield engine.arguments(np.concatenate([prompt, tokens]), made), each


def _prompt_rows(said: engine.Listed, prompt: NDArray[np.int64], kind: Kind, tally: Tally) -> Rows:
    """The rows of a prompt's tokens but the first, which are those of the positions from 0.

    Raises:
        SourceError: rows are missing or not where they should be.
    """
    _check_prompt(said, len(prompt))
    return engine.own_first(said.since(1), prompt[1:], "prompt_logprobs", kind, 1, tally)


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
class _Context:
    """The prompt of a choice.

    Attributes:
        tokens: its tokens; a placeholder where none is known.
        sure: whether these are certain.
        parts: the rows about them, as `arguments` takes them.
        taken: whether they were taken of the rows.
    """

    tokens: NDArray[np.int64]
    sure: bool
    parts: list[tuple[int, Rows]]
    taken: bool = False


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequences of a reply.

    Attributes:
        kind: what the values are.
        bos: stands where the first token of a prompt is not known; None where the tokenizer is not, or has none.
        adds_bos: whether the tokenizer puts it before every prompt.
    """

    kind: Kind
    bos: int | None
    adds_bos: bool

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        reply = decode(REPLY, record.data, "reply of vLLM")
        dumped = reply.outputs is not None or reply.choices is None
        made = self._dumped(reply, tally) if dumped else self._served(reply, tally)
        name = reply.id if reply.request_id is None else reply.request_id
        if not name or name.isdecimal():
            name = None  # a counter of the process, which begins again in the next
        for number, found in enumerate(bounded(made)):
            called = {} if name is None else {"id": numbered(name, number)}
            yield Item("add", found | called | {"prompt": reply.prompt})

    def _dumped(self, reply: Reply, tally: Tally) -> Iterator[dict[str, Any]]:
        for found, output in sequences(reply, self.kind, tally):
            yield found | {"text": None if output is None else output.text}

    def _served(self, reply: Reply, tally: Tally) -> Iterator[dict[str, Any]]:
        if not reply.choices:
            raise SourceError("choices is empty; capture this reply again")
        shared: list[_Context] = []
        for number, choice in enumerate(reply.choices):
            if choice.delta:
                raise SourceError("this is a piece of a streamed reply; capture without stream")
            try:
                found = self._sequence(reply, choice, shared, tally)
            except SourceError as error:
                raise SourceError(f"choices[{number}]: {error}") from error
            yield found | {"text": choice.text if choice.message is None else choice.message.content}

    def _sequence(self, reply: Reply, choice: Choice, shared: list[_Context], tally: Tally) -> dict[str, Any]:
        said = chosen(choice.logprobs)
        if said is not None and said.echoes and are_ids(said.tokens):
            tokens = token_ids(said.tokens)
            start = choice.prompt_token_ids or reply.prompt_token_ids or []
            _check_tokens(tokens[: len(start)], start)
            _check_tokens(tokens[max(0, len(tokens) - len(choice.token_ids or ())) :], choice.token_ids)
            return engine.arguments(tokens, [(0, said.since(1).rows(tokens[1:], self.kind, tally))])
        prompt = self._context_of(reply, choice, shared, tally)
        parts = list(prompt.parts)
        made, rows = self._generated(choice, said, tally, others=bool(parts))
        if rows is not None:
            parts.append((len(prompt.tokens) - 1, rows))
        if not parts:
            raise SourceError(_NO_LOGPROBS)
        tally.note(engine.CONTEXT_NOTE, not prompt.sure)
        tally.note(_TAKEN_NOTE, prompt.taken and prompt.sure)
        return engine.arguments(np.concatenate([prompt.tokens, made]), parts, trained=prompt.sure)

    def _context_of(self, reply: Reply, choice: Choice, shared: list[_Context], tally: Tally) -> _Context:
        """The prompt of a choice; choices without one of their own have one `shared` among them."""
        if choice.prompt_token_ids is not None or choice.prompt_logprobs is not None:
            scored = reply.prompt_logprobs if choice.prompt_logprobs is None else choice.prompt_logprobs
            return self._context(choice.prompt_token_ids or reply.prompt_token_ids, scored, tally)
        if not shared:
            shared.append(self._context(reply.prompt_token_ids, reply.prompt_logprobs, tally))
        return shared[0]

    def _context(self, ids: list[Id] | None, scored: LogprobRows, tally: Tally) -> _Context:
        if scored is None:
            return _Context(np.array(ids or [self.bos or 0], np.int64), bool(ids), [])
        said = engine.listed(scored, "prompt_logprobs")
        prompt = np.array(ids or [], np.int64)
        if not ids:
            _check_prompt(said, len(said.count))
            engine.check_order(said, "prompt_logprobs")
            prompt = np.r_[self.bos or 0, ragged.heads(said.ids, said.count)]
        parts = [(0, _prompt_rows(said, prompt, self.kind, tally))]
        return _Context(prompt, bool(ids) or self.adds_bos, parts, taken=not ids)

    def _generated(
        self, choice: Choice, said: Chosen | None, tally: Tally, *, others: bool
    ) -> tuple[NDArray[np.int64], Rows | None]:
        """The generated tokens, and the rows about them; `others` says whether the sequence has some without these."""
        known = None if choice.token_ids is None else np.array(choice.token_ids, np.int64)
        none = np.empty(0, np.int64)
        if said is None:
            tally.note(_UNKNOWN_NOTE, known is None)
            return none if known is None else known, None
        if are_ids(said.tokens):
            tokens = token_ids(said.tokens)
            _check_tokens(tokens, choice.token_ids)
            return tokens, said.rows(tokens, self.kind, tally)
        if not others:
            raise SourceError(_ONLY_TEXT)
        if known is None:
            tally.note(_UNKNOWN_NOTE)
            return none, None
        tally.note(_TEXT_NOTE)
        said = said.since(max(0, len(said.tokens) - len(known))) if said.echoes else said
        if len(said.own) != len(known):
            raise SourceError(f"logprobs has {len(said.own)} tokens, token_ids {len(known)}; capture it again")
        return known, said.targets(known, self.kind)


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
    known = options.tokenizer
    parse = _Parser(kind, None, adds_bos=False)
    if known is not None:
        parse = _Parser(kind, known.bos_id, known.bos_id is not None and known.adds_bos)
    opened = read_lines(inputs, parse, settings={"columns": _COLUMNS} | engine.settings_of(kind))
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
