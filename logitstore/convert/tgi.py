"""`tgi`: replies of Hugging Face's Text Generation Inference with `details`, one a line, or a list of them.

`details.tokens` are the generated tokens, `details.top_tokens` (asked for with `top_n_tokens`) the best candidates in
the place of each, more than asked for where some are equal. `details.prefill` (`decoder_input_details`) has the tokens
of the prompt with their own logprobs, which are kept as targets; without it one placeholder stands for the prompt. A
row is about the token beside it, and becomes the row of the position before that. `best_of_sequences` are further
sequences.

The server takes its logprobs behind the settings of the sampler, and writes null for those that are no numbers: tokens
that the sampler excluded, and the first of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import nan
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally
from logitstore.convert.lines import JSONL, decode, first_line, read_lines
from logitstore.convert.prompts import WITHOUT
from logitstore.convert.rows import CLAMPED, Rows, agreeing, spread, with_target, without_zeros
from logitstore.convert.source import Input
from logitstore.convert.vocabulary import text_piece
from logitstore.errors import SourceError
from logitstore.limits import ID_LIMIT, PROBABILITY_SLACK

_OWN_KEY: Final = re.compile(rb'"details"\s*:\s*\{')
_TEXT_KEY: Final = re.compile(rb'"generated_text"\s*:')
_COLUMNS: Final = pa.schema([("text", pa.string())])

_SAMPLER_NOTE: Final = (
    "Logprobs are those behind the sampler's settings; they are the model's own where it had none: no temperature, no "
    "penalties, no top_k or top_p."
)
_PROMPT_NOTE: Final = (
    WITHOUT + "there is no prefill: such sequences are fit to look at, not to train on; capture with "
    "decoder_input_details to train on them."
)


class _Token(msgspec.Struct, gc=False):
    id: Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]
    text: str = ""
    logprob: float | None = None


class _Answer(msgspec.Struct, gc=False):
    """The details of a sequence."""

    tokens: list[_Token]
    prefill: list[_Token] = []
    top_tokens: list[list[_Token]] | None = None
    generated_text: str | None = None
    best_of_sequences: list[_Answer] | None = None


class _Reply(msgspec.Struct, gc=False):
    generated_text: str | None = None
    details: _Answer | None = None


_REPLY: Final = msgspec.json.Decoder(_Reply)
_REPLIES: Final = msgspec.json.Decoder(list[_Reply])


def _recognises(source: Input) -> bool:
    line = first_line(source)
    return bool(line[:1] in {b"{", b"["} and _OWN_KEY.search(line) and _TEXT_KEY.search(line))


def _read(inputs: list[Input], options: Options) -> Import:
    bos = options.tokenizer.bos_id if options.tokenizer is not None else None
    return read_lines(inputs, _Parser(bos or 0), settings={"columns": _COLUMNS}, notes=[_SAMPLER_NOTE])


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequences of a line.

    Attributes:
        placeholder: the token that stands for a prompt.
    """

    placeholder: int

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        many = record.data.startswith(b"[")
        replies = decode(_REPLIES, record.data, "list of replies") if many else [decode(_REPLY, record.data, "reply")]
        without = False
        for reply in replies:
            for answer, text in _answers(reply):
                without |= not answer.prefill
                yield Item("add", self._arguments(answer, tally) | {"text": text})
        tally.note(_PROMPT_NOTE, int(without))

    def _arguments(self, answer: _Answer, tally: Tally) -> dict[str, Any]:
        top = answer.top_tokens or []
        if len(top) != len(answer.tokens):
            what = f"there are {len(answer.tokens)} tokens and {len(top)} top_tokens"
            raise SourceError(f"{what}; capture again with top_n_tokens above 0")
        if any(top) and not all(top):
            at = next(at for at, row in enumerate(top) if not row)
            raise SourceError(
                f"top_tokens, row {at} is empty and others are not, so rows are missing; capture it again"
            )
        _gather(tally, chain(chain.from_iterable(top), answer.tokens, answer.prefill))
        before = [token.id for token in answer.prefill] or [self.placeholder]
        tokens = np.array([*before, *(token.id for token in answer.tokens)], np.int64)
        # A row for each token but the first; those of the prompt have no candidates.
        own = _logprobs([*answer.prefill[1:], *answer.tokens], nan)
        count = np.array([0] * (len(before) - 1) + [len(row) for row in top], np.int64)
        flat = [*chain.from_iterable(top)]
        ids = np.fromiter((token.id for token in flat), np.int64, len(flat))
        rows = without_zeros(Rows(count, ids, _logprobs(flat, CLAMPED)))
        own = agreeing(rows, tokens[1:], own, "tokens", tally)
        found = with_target(rows, tokens[1:], own).arguments(tokens, slice(0, len(tokens) - 1))
        trained = np.full(len(top), bool(answer.prefill))
        return found | {"loss_mask": spread(trained, np.arange(len(top)) + len(before) - 1, len(tokens), 0)}


def _answers(reply: _Reply) -> Iterator[tuple[_Answer, str | None]]:
    """The details and the text of each sequence."""
    if reply.details is None:
        raise SourceError("the reply has no details; capture again with details and top_n_tokens")
    yield reply.details, reply.generated_text
    for other in reply.details.best_of_sequences or ():
        yield other, other.generated_text


def _gather(tally: Tally, tokens: Iterable[_Token]) -> None:
    """Keep the texts of tokens: good enough to show, though a decoder may have taken a space from them."""
    for token in tokens:
        if token.id not in tally.doubtful and (piece := text_piece(token.text)) is not None:
            tally.doubtful[token.id] = piece


def _logprobs(tokens: list[_Token], missing: float) -> NDArray[np.float32]:
    values = np.fromiter(
        (missing if token.logprob is None else token.logprob for token in tokens), np.float64, len(tokens)
    )
    if (values > PROBABILITY_SLACK).any():
        wrong = tokens[int(np.argmax(values > PROBABILITY_SLACK))]
        raise SourceError(
            f"the logprob of the token {wrong.id} ({wrong.text!r}) is {wrong.logprob}, which is above 0: a "
            f"probability? Capture it again"
        )
    return np.maximum(values, CLAMPED).astype(np.float32)


IMPORTER: Final = Importer(
    name="tgi",
    description="Hugging Face TGI: replies with details and top_n_tokens, one or a list of them a line",
    loses="settings of the engine",
    recognises=_recognises,
    read=_read,
    patterns=JSONL,
)
