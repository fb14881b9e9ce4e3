"""Prompts that a capture holds only as text, or not at all, made into tokens again.

A file of requests has one JSON object a line, as it was sent: `prompt`, a text or its ids; `prompt_token_ids`;
`messages` and `tools`, to be put through the tokenizer's chat template; `input` and `instructions` (OpenAI's
Responses); or these in the `body` of a line for the Batch API.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, NamedTuple, NoReturn

import msgspec

from logitstore.convert.base import Piece, Record, Tally
from logitstore.convert.lines import decode
from logitstore.convert.source import Input
from logitstore.errors import InvalidInputError, MissingDependencyError, SourceError
from logitstore.limits import ID_LIMIT
from logitstore.tokenizer import TOKENIZER_FILE, Tokenizer

WITHOUT: Final = "In {n} of the replies a placeholder stands for the prompt and loss_mask is 0, because "
"""How a note begins that says why a prompt's tokens are not known."""

COUNT_NOTE: Final = WITHOUT + "the tokenizer does not make as many tokens of the prompt as the engine evaluated."
_PIECE_BYTES: Final = 2**20  # of requests that are handed on together
_TEXT_NOTE: Final = WITHOUT + "it is a text, and encoding it needs the teacher's tokenizer; convert with --tokenizer."
_DATE_NOTE: Final = "In {n} of the prompts the chat template writes the date: that of the reply is taken, in UTC."


@dataclass(slots=True)
class PromptEncoder:
    """Makes of a text the tokens that an engine may have made of it; pickles.

    Args:
        tokenizer: the teacher's, whole and read from files.
    """

    tokenizer: Tokenizer
    _engine: Any = field(default=None, repr=False)
    _opening: str = field(default="", repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptEncoder, (self.tokenizer,)

    def load(self) -> PromptEncoder:
        """Get ready; called by `encodings` where it was not.

        Raises:
            MissingDependencyError: the package tokenizers is not there.
            InvalidInputError: it cannot read this tokenizer.
        """
        if self._engine is not None:
            return self
        try:
            import tokenizers  # noqa: PLC0415 - an optional dependency
        except ImportError as error:
            says = "encoding the prompts needs the package tokenizers: pip install 'logitstore[tokenizers]'"
            raise MissingDependencyError(says) from error
        path = next((path for path in self.tokenizer.files if path.name == TOKENIZER_FILE), None)
        if path is None:
            raise InvalidInputError("encoding the prompts needs a tokenizer.json; give its path as the tokenizer")
        try:
            self._engine = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # it raises nothing narrower
            raise InvalidInputError(f"{path}: the package tokenizers cannot read it ({error})") from error
        self._engine.no_truncation()
        self._engine.no_padding()
        bos = self.tokenizer.bos_id
        self._opening = self.tokenizer.text([] if bos is None else [bos]) + " "
        return self

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, special tokens in it included and none added."""
        return list(self.load()._engine.encode(text, add_special_tokens=False).ids)

    def encodings(self, text: str) -> Iterator[list[int]]:
        """The tokens that the engine may have made of a prompt, with and without BOS, the likeliest first."""
        tokens = self.encode(text)
        bos = self.tokenizer.bos_id
        if bos is None or tokens[:1] == [bos]:
            yield tokens
        else:
            yield from ([bos, *tokens], tokens) if self.tokenizer.adds_bos else (tokens, [bos, *tokens])
        if bos is not None and text.startswith(self._opening):
            # Some tokenizers put a space before a text, which the reply then shows: not a second one.
            yield [bos, *self.encode(text.removeprefix(self._opening))]

    def chat_encodings(self, text: str) -> Iterator[list[int]]:
        """The same of what a chat template made, which writes BOS itself where it is wanted."""
        tokens = self.encode(text)
        yield tokens
        yield from (other for other in self.encodings(text) if other != tokens)


class Asked(NamedTuple):
    """A reply and the request that it answers.

    Attributes:
        reply: its line.
        place: where the request stands; empty where requests are not given.
        request: its line; None where there is none.
    """

    reply: bytes
    place: str = ""
    request: bytes | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a reply answers.

    Attributes:
        text: of the prompt; None where only its ids are given, or nothing is known.
        tokens: of the prompt; None where they are not known, and a placeholder must stand for them.
    """

    text: str | None = None
    tokens: list[int] | None = None


_Ids = list[Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]]


class _Request(msgspec.Struct, gc=False):
    prompt: msgspec.Raw = msgspec.Raw()
    prompt_token_ids: _Ids | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    body: msgspec.Raw = msgspec.Raw()


class _Named(msgspec.Struct, gc=False):
    custom_id: str | None = None
    id: str | int | None = None

    def key(self) -> str | None:
        return self.custom_id or (None if self.id in {None, ""} else str(self.id))


_REQUEST: Final = msgspec.json.Decoder(_Request)
_NAMED: Final = msgspec.json.Decoder(_Named)
_PROMPT: Final = msgspec.json.Decoder(str | list[str | int] | None)
_IDS: Final = msgspec.json.Decoder(_Ids)


def prompt_of(
    asked: Asked, encoder: PromptEncoder | None, evaluated: int | None, day: float | None, tally: Tally
) -> Prompt:
    """The prompt that a request holds.

    Args:
        asked: the request.
        encoder: encodes texts; None where the tokenizer is not known.
        evaluated: how many tokens the engine made of it; None where that is not known.
        day: when the reply was made, in seconds since 1970.
        tally: where it is counted that tokens are not known.

    Raises:
        SourceError: there is no such request, or it holds no prompt.
    """
    if asked.request is None:
        raise SourceError(f"no request in {asked.place} has the id of this reply; give all requests, or leave ids out")
    try:
        return _prompt_of(asked.request, encoder, evaluated, day, tally)
    except SourceError as error:
        raise SourceError(f"its request ({asked.place}): {error}") from error


def _prompt_of(
    line: bytes, encoder: PromptEncoder | None, evaluated: int | None, day: float | None, tally: Tally
) -> Prompt:
    request = decode(_REQUEST, line, "request")
    if request.body and bytes(request.body) != b"null":
        request = decode(_REQUEST, request.body, "body of a request")
    text = _text_of(request)
    if isinstance(text, list):
        if not text:
            raise SourceError("its prompt has no tokens; give at least the one that the engine puts before a text")
        return Prompt(None, text)
    chat = text is None
    if encoder is None:
        tally.note(_TEXT_NOTE)
        return Prompt(text)
    if text is None:
        text = _rendered(request, encoder.tokenizer, day, tally)
    for tokens in encoder.chat_encodings(text) if chat else encoder.encodings(text):
        if tokens and evaluated in {None, len(tokens)}:
            return Prompt(text, tokens)
    tally.note(COUNT_NOTE)
    return Prompt(text)


def _text_of(request: _Request) -> str | list[int] | None:
    """The prompt as ids or a text; None where it is to be made of messages."""
    if request.prompt_token_ids is not None:
        return request.prompt_token_ids
    prompt = decode(_PROMPT, request.prompt, "prompt") if request.prompt else None
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, list):
        if not all(isinstance(each, int) for each in prompt):
            raise SourceError("its prompt is several texts; write a request of its own for each reply")
        return decode(_IDS, request.prompt, "prompt")
    if prompt is None and request.messages is None and request.input is None:
        raise SourceError("it has no prompt, messages, input or prompt_token_ids")
    return prompt


def _messages_of(request: _Request) -> list[dict[str, Any]]:
    """The messages of a chat, or those that a request for a Response stands for."""
    if request.messages is not None:
        return request.messages
    given = request.input if request.input is not None else []
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else [_plain(each) for each in given]
    before = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
    return [*before, *messages]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a text, as templates expect it."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part.get("text") if isinstance(part, dict) else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise SourceError("a part of its input is no text, which the chat template cannot show")
    return message | {"content": "".join(text for text in texts if text is not None)}


def _rendered(request: _Request, tokenizer: Tokenizer, day: float | None, tally: Tally) -> str:
    """The text that the tokenizer's chat template makes of the messages.

    Raises:
        MissingDependencyError: the package jinja2 is not there.
        SourceError: there is no template, or it refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise SourceError("the tokenizer has no chat template to make a prompt of its messages; give prompt_token_ids")
    now = datetime.now(UTC) if day is None else _moment(day)

    def strftime_now(form: str) -> str:
        tally.notes[_DATE_NOTE] = 1
        return now.strftime(form)

    roles = {
        f"{role}_token": (tokenizer.token_bytes(token) or b"").decode(errors="replace")
        for role, token in tokenizer.special_roles.items()
    }
    try:
        template = _environment(strftime_now).from_string(tokenizer.chat_template)
        return str(
            template.render(
                **roles,
                **{"add_generation_prompt": True, "documents": None, **(request.chat_template_kwargs or {})},
                messages=_messages_of(request),
                tools=request.tools,
            )
        )
    except (MissingDependencyError, SourceError):
        raise
    except Exception as error:  # a template may raise anything
        raise SourceError(f"the chat template does not take its messages ({error})") from error


def _moment(day: float) -> datetime:
    try:
        return datetime.fromtimestamp(day, UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise SourceError(f"the time of the reply is none ({day})") from error


def _environment(strftime_now: Any) -> Any:
    """What chat templates are written for: jinja2 without access to anything, and four functions."""
    try:
        import jinja2  # noqa: PLC0415 - an optional dependency
        from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415
    except ImportError as error:
        says = "making prompts of messages needs the package jinja2: pip install 'logitstore[tokenizers]'"
        raise MissingDependencyError(says) from error

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant says; here only its content counts."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - as templates call it
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,  # noqa: FBT001, FBT002
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


@dataclass(frozen=True, slots=True)
class _Answered:
    """A piece whose records have their requests."""

    answered: list[Record]

    def records(self) -> Iterator[Record]:
        yield from self.answered


def with_requests(pieces: Iterator[Piece], path: Path | None) -> Iterator[Piece]:
    """Pieces of lines whose records' data become `Asked`.

    Requests are found by `custom_id` or `id` where the first request and the first reply have one and the reply's is
    among the requests'; else they are taken in order.

    Args:
        pieces: of replies, one a line.
        path: the file of requests; None where there is none.

    Raises:
        SourceError: there are fewer requests than replies, or more, or two have the same id.
    """
    if path is None:
        for piece in pieces:
            yield _Answered([replace(record, data=Asked(record.data)) for record in piece.records()])
        return
    source = Input(path)
    if source.size is None:
        raise InvalidInputError("the requests are read twice, so they cannot come from standard input; give a file")
    try:
        with tempfile.TemporaryFile() as held:
            find: _ById | _InOrder | None = None
            for piece in pieces:
                answered: list[Record] = []
                size = 0
                for record in piece.records():
                    find = find or _finder(source, held, record.data)
                    asked = find(record.data)
                    answered.append(replace(record, data=asked))
                    size += len(asked.request or b"")
                    if size > _PIECE_BYTES:  # short answers to long prompts
                        yield _Answered(answered)
                        answered, size = [], 0
                if answered:
                    yield _Answered(answered)
            if isinstance(find, _InOrder):
                find.end()
    finally:
        source.close()


def _finder(source: Input, held: BinaryIO, reply: bytes) -> _ById | _InOrder:
    index = _index(source, held, reply)
    return _InOrder(source.name, source.lines()) if index is None else _ById(source.name, held, index)


def id_of(line: bytes) -> str | None:
    """The id of a request or a reply, `custom_id` before `id`; None where it has none or cannot be read."""
    return _key(line)[0]


def _key(line: bytes) -> tuple[str | None, bool]:
    """The id of a request or a reply, and whether it is one that the user gave."""
    try:
        named = _NAMED.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None, False  # it fails when its turn comes
    return named.key(), named.custom_id is not None


def _index(source: Input, held: BinaryIO, reply: bytes) -> dict[str, tuple[int, int, int]] | None:
    """Number, start and length by id of the requests, which are copied into a file; None where ids do not pair them."""
    wanted, given = _key(reply)
    found: dict[str, tuple[int, int, int]] = {}
    if wanted is None:
        return None
    at = 0
    for number, line in source.lines():
        key = id_of(line)
        if key is None:
            if not found:
                return None
            raise SourceError(f"{source.name}, line {number}: this request has no id, those before it have")
        if key in found:
            before = found[key][0]
            raise SourceError(f"{source.name}, line {number}: line {before} has the same id {key!r}; make ids unique")
        found[key] = (number, at, len(line))
        held.write(line)
        at += len(line)
    return found if given or wanted in found else None


@dataclass(slots=True)
class _ById:
    """Finds the request of a reply by its id."""

    name: str
    held: BinaryIO
    index: dict[str, tuple[int, int, int]]

    def __call__(self, reply: bytes) -> Asked:
        found = self.index.get(id_of(reply) or "")
        if found is None:
            return Asked(reply, self.name)
        number, start, length = found
        self.held.seek(start)
        return Asked(reply, f"{self.name}, line {number}", self.held.read(length))


@dataclass(slots=True)
class _InOrder:
    """Takes the next request for each reply."""

    name: str
    lines: Iterator[tuple[int, bytes]]
    replies: int = 0

    def __call__(self, reply: bytes) -> Asked:
        number, line = next(self.lines, (0, b""))
        if not number:
            raise SourceError(f"{self.name}: there are fewer requests than replies: {self.replies}; give one for each")
        self.replies += 1
        return Asked(reply, f"{self.name}, line {number}", line)

    def end(self) -> None:
        if next(self.lines, None) is not None:
            raise SourceError(
                f"{self.name}: there are more requests than the {self.replies} replies, so it is not certain which "
                f"belong together; give both the same ids (custom_id), or only the requests that were answered"
            )
