"""`easydistill`: the logits file of EasyDistill v1, one JSON list a sample.

An item of the list is a generated position: `{"<token id>": probability}`, exp of vLLM's logprob, the best 10 to 20 of
the whole vocabulary. Generation was greedy, so the most probable candidate is the token that was generated; the file
does not say so, and has no prompt. Item j predicts generated token j, from the position before it. The prompts' tokens
come with `--prompts`, JSON lines with `prompt_token_ids`, in order; without them a placeholder stands for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally
from logitstore.convert.beside import paired, rows_beside, tokens_of
from logitstore.convert.lines import JSONL, decode, first_line, read_lines
from logitstore.convert.rows import Rows, of_probabilities
from logitstore.convert.source import Input
from logitstore.convert.tables import numbers, present
from logitstore.encoding import ragged
from logitstore.errors import SourceError
from logitstore.limits import ID_LIMIT

_HEAD: Final = re.compile(rb'\[\s*\{\s*"[0-9]+"\s*:\s*[-0-9.]')

_VALUE_NOTE: Final = "The probabilities are taken to be over the whole vocabulary, at temperature 1."
_GREEDY_NOTE: Final = (
    "The generated tokens are not in the file; generation was greedy, so the best candidate of each position is taken. "
    "It went on behind the end of the text (ignore_eos)."
)
_CONTEXT_NOTE: Final = (
    "The context is missing, since a placeholder stands for each prompt: the dataset is fit to look at, not to train "
    "on, and its loss_mask is 0 throughout; give the prompts with --prompts."
)
_ORDER_NOTE: Final = (
    "At {n} positions the first candidate, where vLLM puts the generated token, is not the best one; the best one was "
    "taken. If many, generation was not greedy, and these are not the tokens."
)

_LINE: Final = msgspec.json.Decoder(list[dict[Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)], float]])
_PROMPT_COLUMNS: Final = ("prompt_token_ids", "prompt_ids", "prompt")


def _recognises(source: Input) -> bool:
    return bool(_HEAD.match(first_line(source)))


def _read(inputs: list[Input], options: Options) -> Import:
    bos = options.tokenizer.bos_id if options.tokenizer is not None else None
    known = options.prompts is not None
    opened = read_lines(inputs, _Parser(bos or 0, known))
    if options.prompts is not None:
        opened.pieces = paired(opened.pieces, rows_beside(options.prompts, _prompt), str(options.prompts))
    opened.notes = [_VALUE_NOTE, _GREEDY_NOTE, *([] if known else [_CONTEXT_NOTE])]
    return opened


def _prompt(row: Mapping[str, Any]) -> NDArray[np.int64]:
    """The tokens of a prompt, at least one."""
    name = next((name for name in _PROMPT_COLUMNS if present(row, name)), None)
    tokens = tokens_of(row) if name is None else numbers(row, name, np.int64)
    if tokens is None or len(tokens) == 0:
        raise SourceError("there are no prompt_token_ids in this row, or none in the list")
    return tokens


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequence of a sample.

    Attributes:
        placeholder: the token that stands for a prompt.
        paired: whether the prompt stands beside the line.
    """

    placeholder: int
    paired: bool

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        line, prompt = record.data if self.paired else (record.data, np.array([self.placeholder], np.int64))
        rows, generated = _numbers(decode(_LINE, line, "list of {token id: probability}"), tally)
        tokens = np.append(prompt, generated)
        at = len(prompt) - 1 + np.arange(len(generated))
        found = rows.arguments(tokens, at)
        found["loss_mask"] = np.zeros(len(tokens), np.int8)
        found["loss_mask"][at] = self.paired
        yield Item("add", found)


def _numbers(items: list[dict[int, float]], tally: Tally) -> tuple[Rows, NDArray[np.int64]]:
    """The rows, and the best candidate of each."""
    count = np.fromiter(map(len, items), np.int64, len(items))
    if bool((count == 0).any()):
        raise SourceError(f"position {int(np.argmin(count))} has no candidates; generate this sample again")
    total = int(count.sum())
    ids = np.fromiter(chain.from_iterable(items), np.int64, total)
    given = np.fromiter(chain.from_iterable(item.values() for item in items), np.float64, total)
    logprobs = of_probabilities(given)
    starts = ragged.offsets(count)[:-1]
    best = np.lexsort((np.arange(total), -given, ragged.rows(count)))[starts]  # the first of the best
    tally.note(_ORDER_NOTE, int((best != starts).sum()))
    return Rows(count, ids, logprobs), ids[best]


IMPORTER: Final = Importer(
    name="easydistill",
    description="EasyDistill v1: the file of teacher logits, one list of {id: probability} a line",
    loses="nothing of the distributions",
    recognises=_recognises,
    read=_read,
    patterns=JSONL,
    options=("prompts",),
)
