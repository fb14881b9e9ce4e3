"""Prompts that a capture holds only as text, or not at all, made into tokens again.

A file of requests has one JSON object a line, as it was sent: `prompt`, a text or its ids; `prompt_token_ids`;
`messages` and `tools`, to be put through the tokenizer's chat template; `input` and `instructions` (OpenAI's
Responses); or these in the `body` of a line for the Batch API.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec

from logitstore.convert.base import Tally
from logitstore.convert.chat_templates import Chat, rendered
from logitstore.convert.lines import decode
from logitstore.convert.request_files import Asked
from logitstore.errors import InvalidInputError, MissingDependencyError, SourceError
from logitstore.limits import ID_LIMIT
from logitstore.tokenizer import TOKENIZER_FILE, Tokenizer

WITHOUT: Final = "In {n} of the replies a placeholder stands for the prompt and loss_mask is 0, because "
"""How a note begins that says why a prompt's tokens are not known."""

COUNT_NOTE: Final = WITHOUT + "there are not as many tokens of the prompt as the engine evaluated."
GUESS_NOTE: Final = (
    "In {n} of the replies the engine does not say how many tokens it made of the prompt, which may have been with BOS "
    "or without: it is taken to be as the tokenizer, or the chat template, has it."
)
_TEXT_NOTE: Final = WITHOUT + "it is a text, and encoding it needs the teacher's tokenizer; convert with --tokenizer."


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
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    body: msgspec.Raw = msgspec.Raw()


_REQUEST: Final = msgspec.json.Decoder(_Request)
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
        if evaluated not in {None, len(text)}:
            tally.note(COUNT_NOTE)
            return Prompt()
        return Prompt(None, text)
    chat = text is None
    if encoder is None:
        tally.note(_TEXT_NOTE)
        return Prompt(text)
    if text is None:
        text = rendered(_chat_of(request), encoder.tokenizer, day, tally)
    return Prompt(text, chosen(encoder.chat_encodings(text) if chat else encoder.encodings(text), evaluated, tally))


def chosen(encodings: Iterable[list[int]], evaluated: int | None, tally: Tally) -> list[int] | None:
    """The one of these encodings that has as many tokens as the engine evaluated; the first where that is not known."""
    found = [tokens for tokens in encodings if tokens and evaluated in {None, len(tokens)}]
    if not found:
        tally.note(COUNT_NOTE)
        return None
    tally.note(GUESS_NOTE, evaluated is None and any(tokens != found[0] for tokens in found))
    return found[0]


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


def _chat_of(request: _Request) -> Chat:
    """The chat of a request, or what a request for a Response stands for."""
    if request.messages is not None:
        messages = [_plain(each, "\n") for each in request.messages]  # as vLLM and llama-server join parts
    else:
        given = request.input if request.input is not None else []
        said = [{"role": "user", "content": given}] if isinstance(given, str) else [_plain(each, "") for each in given]
        before = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
        messages = [*before, *said]
    continued = bool(request.continue_final_message)
    prompted = not continued if request.add_generation_prompt is None else request.add_generation_prompt
    return Chat(messages, request.tools, request.chat_template_kwargs or {}, prompted=prompted, continued=continued)


def _plain(message: dict[str, Any], between: str) -> dict[str, Any]:
    """A message whose content is a text, as templates expect it."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise SourceError("a part of its input is no text, which the chat template cannot show")
    return message | {"content": between.join(text for text in texts if text is not None)}
