"""The text that a tokenizer's chat template makes of messages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

from logitstore.convert.base import Tally
from logitstore.errors import MissingDependencyError, SourceError
from logitstore.tokenizer import Tokenizer

_DATE_NOTE: Final = "In {n} of the prompts the chat template writes the date: that of the reply is taken, in UTC."


@dataclass(frozen=True, slots=True)
class Chat:
    """What a chat template is given.

    Attributes:
        messages: their `content` is a text.
        tools: as the request describes them.
        arguments: further ones of the template.
        prompted: whether the beginning of an answer follows the messages.
        continued: whether the answer goes on with the last message.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    arguments: dict[str, Any]
    prompted: bool = True
    continued: bool = False


def rendered(chat: Chat, tokenizer: Tokenizer, day: float | None, tally: Tally) -> str:
    """The text that the tokenizer's chat template makes of a chat.

    Args:
        chat: the messages.
        tokenizer: has the template.
        day: for templates that write the date, in seconds since 1970; None is today.
        tally: where it is counted that the date is written.

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
        text = str(
            template.render(
                **roles,
                **{"add_generation_prompt": chat.prompted, "documents": None, **chat.arguments},
                messages=chat.messages,
                tools=chat.tools,
            )
        )
    except (MissingDependencyError, SourceError):
        raise
    except Exception as error:  # a template may raise anything
        raise SourceError(f"the chat template does not take its messages ({error})") from error
    return _continued(chat, text) if chat.continued else text


def _continued(chat: Chat, text: str) -> str:
    """Without what the template writes behind the last message."""
    if chat.prompted:
        raise SourceError("add_generation_prompt and continue_final_message exclude each other; say one of them")
    said = chat.messages[-1].get("content") if chat.messages else None
    said = said if isinstance(said, str) else ""
    bare = said.strip()
    at = text.rfind(bare)
    if not bare or at < 0:
        raise SourceError("the chat template does not show the last message as it is, as continue_final_message needs")
    # Spaces at its end stay where the template keeps them.
    return text[: at + len(said if text.startswith(said, at) else bare)]


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
