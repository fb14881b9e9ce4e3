"""`openai`: replies of OpenAI's API and of servers like it, one JSON object a line.

A chat's `choices[].logprobs.content` has the generated tokens with the best candidates in the place of each; so have
llama-server's completions and the `output[].content[]` of a Response. Other completions have four lists, and with
`echo` the prompt's tokens too, of which the first has no row. Row t of a reply is about token t, and becomes the row
of the position before it.

Tokens are given as bytes or as text, and are found in the teacher's vocabulary, except where the server gives ids:
llama-server of all, vLLM (return_token_ids) of the generated ones and the prompt. What cannot be found is left to the
tail; where it is a generated token, the sequence ends before it. Other replies do not hold their prompts: these come
from the requests (`--prompts`), else one placeholder stands for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Piece, Record, Tally
from logitstore.convert.lines import JSONL, first_line, read_lines
from logitstore.convert.openai_replies import Choice, Listing, Reply, choices_of, listing, read_reply
from logitstore.convert.prompts import WITHOUT, Prompt, PromptEncoder, prompt_of
from logitstore.convert.request_files import key_of, with_requests
from logitstore.convert.rows import Rows, bounded, spread
from logitstore.convert.source import Input
from logitstore.convert.vocabulary import Vocabulary, certain, check_vocabulary
from logitstore.encoding import ragged
from logitstore.errors import SourceError

_OWN_KEYS: Final = re.compile(rb'"(choices|output|response)"\s*:')
_LOGPROBS_KEY: Final = re.compile(rb'"logprobs"\s*:\s*[{\[]')
_FOREIGN: Final = re.compile(
    rb'"(prompt_logprobs|completion_probabilities|meta_info|details)"\s*:\s*[\[{]'
    rb'|"token_id:[0-9]'
)
_COLUMNS: Final = pa.schema([("prompt", pa.string()), ("text", pa.string())])

_RAW_NOTE: Final = (
    "Logprobs are taken to be of the raw distribution over the vocabulary, at temperature 1, whatever the sampler's "
    "settings were."
)
_NO_PROMPT_NOTE: Final = (
    WITHOUT + "replies do not hold it: such sequences are fit to look at, not to train on; give the requests with "
    "--prompts to train on them."
)
_GAP_NOTE: Final = WITHOUT + "some of its tokens have no logprobs and it is not certain which."
_SPELLING_NOTE: Final = (
    "In {n} of the choices loss_mask is 0, because the tokens do not spell the text: it is not certain that they are "
    "those that were generated; capture with ids if the server gives them."
)
_HIDDEN_NOTE: Final = WITHOUT + "thoughts or calls of tools stand before the answer, which the reply does not hold."


def _recognises(source: Input) -> bool:
    line = first_line(source)
    own = line.startswith(b"{") and _OWN_KEYS.search(line) and _LOGPROBS_KEY.search(line)
    return bool(own) and not _FOREIGN.search(line)


def _read(inputs: list[Input], options: Options) -> Import:
    full = options.tokenizer if options.tokenizer is not None and not options.tokenizer.is_partial else None
    encoder = None if full is None else PromptEncoder(full).load()
    bos = options.tokenizer.bos_id if options.tokenizer is not None else None
    pieces = read_lines(inputs, _never).pieces
    first = next(pieces, None)
    parse = _Parser(
        None if encoder is None else Vocabulary(encoder),
        bos or 0,
        requests=options.prompts is not None,
        named=first is not None and _are_named(first),
    )
    opened = read_lines(inputs, parse)
    opened.pieces = with_requests(chain([] if first is None else [first], pieces), options.prompts)
    opened.settings = {"columns": _COLUMNS}
    opened.notes = [_RAW_NOTE]
    opened.check = check_vocabulary
    return opened


def _never(_record: Record, _tally: Tally) -> list[Item]:
    return []


def _are_named(piece: Piece) -> bool:
    """Whether the first replies have ids of their own, each another; all are numbered otherwise."""
    names = [key.name for record in piece.records() if (key := key_of(record.data)).readable]
    return None not in names and len(set(names)) == len(names)


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequences of a reply.

    Attributes:
        vocabulary: finds tokens, and encodes prompts; None without a tokenizer.
        placeholder: the token that stands for a prompt.
        requests: whether the requests are given.
        named: whether sequences are named by the replies' ids.
    """

    vocabulary: Vocabulary | None
    placeholder: int
    requests: bool
    named: bool

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        reply = read_reply(record.data.reply)
        choices = list(choices_of(reply, tally))
        lists = [listing(choice, self.vocabulary, tally) for choice in choices]
        prompt, obstacles = self._prompt(record, reply, choices, lists, tally)
        missing = reply.generated - sum(each.size for each in choices)
        name = reply.custom_id or reply.id
        made = (
            self._sequence(reply, *each, prompt, missing, obstacles, tally) for each in zip(choices, lists, strict=True)
        )
        for number, found in enumerate(bounded(made)):
            called = {"id": f"{name}#{number}" if number else str(name)} if self.named and name else {}
            yield Item("add", found | called)
        for note in sorted(obstacles):
            tally.note(note)

    def _sequence(
        self,
        reply: Reply,
        choice: Choice,
        listed: Listing,
        prompt: Prompt,
        missing: int,
        obstacles: set[str],
        tally: Tally,
    ) -> dict[str, Any]:
        """Arguments of `Writer.add` for a choice; adds what keeps its context from being known to the `obstacles`."""
        n = certain(listed.ids, tally)
        if listed.echo and n == 0:
            raise SourceError("it is not certain which token the first one is, so none is; capture with ids")
        ids = listed.ids[:n]
        if choice.prompt is not None:
            prompt = Prompt(prompt.text, choice.prompt)
        obstacle = None if listed.echo else self._obstacle(reply, choice, ids, prompt, missing)
        if obstacle is not None:
            obstacles.add(obstacle)
        known = listed.echo or (obstacle is None and prompt.tokens is not None)
        before = [] if listed.echo else prompt.tokens if known and prompt.tokens else [self.placeholder]
        spelled = self._spell(ids, choice.text, within=True) is not False
        tally.note(_SPELLING_NOTE, not spelled)
        return _arguments(listed, n, before, known=known and spelled) | {"prompt": prompt.text, "text": choice.text}

    def _prompt(
        self, record: Record, reply: Reply, choices: list[Choice], lists: list[Listing], tally: Tally
    ) -> tuple[Prompt, set[str]]:
        """The prompt, and what keeps it from being known, unless its reader says that."""
        if all(one.echo or choice.prompt is not None for choice, one in zip(choices, lists, strict=True)):
            return Prompt(), set()
        if not self.requests:
            return Prompt(), {_NO_PROMPT_NOTE}
        encoder = None if self.vocabulary is None else self.vocabulary.encoder
        day = reply.created if reply.created is not None else reply.created_at
        return prompt_of(record.data, encoder, reply.prompt_tokens, day, tally), set()

    def _obstacle(
        self, reply: Reply, choice: Choice, ids: NDArray[np.int64], prompt: Prompt, missing: int
    ) -> str | None:
        """What keeps the tokens between the prompt and the last generated one from being known."""
        if prompt.tokens is None:
            return None
        if not choice.follows or (missing > 0 and reply.reasoned):
            return _HIDDEN_NOTE
        return _GAP_NOTE if missing > 0 and not self._spell(ids, choice.text, within=False) else None

    def _spell(self, ids: NDArray[np.int64], text: str | None, *, within: bool) -> bool | None:
        """Whether tokens are those of a text as far as both go; None where that cannot be told.

        Args:
            ids: the tokens.
            text: the text; a server may have taken spaces from its ends, and put characters for bytes at its end.
            within: whether the text may be a part of what the tokens spell: thoughts, or marks, were taken from it.
        """
        said = (text or "").strip().rstrip("\N{REPLACEMENT CHARACTER}").encode()
        if self.vocabulary is None or not said:
            return None
        known = self.vocabulary.encoder.tokenizer
        marks = np.isin(ids, list(known.special_tokens))  # a server may leave them out of the text, or not
        joined, bare = (b"".join(known.pieces(part.tolist())).lstrip() for part in (ids, ids[~marks]))
        either = (joined, bare)
        if any(each.startswith(said) or said.startswith(each.rstrip()) for each in either):
            return True
        return within and any(said in each for each in either)


def _arguments(listed: Listing, certain_tokens: int, before: list[int], *, known: bool) -> dict[str, Any]:
    """Arguments of `Writer.add`: the row about a token stands at the position before it."""
    tokens = np.array([*before, *listed.ids[:certain_tokens].tolist()], np.int64)
    first, last = int(listed.echo), min(certain_tokens + 1, len(listed.ids))  # the first that is not certain has a row
    rows = _cut(listed.rows, first, last)
    at = len(before) - 1 + np.arange(first, last)
    found = rows.arguments(tokens, at)
    found["loss_mask"] = spread(listed.there[first:last] & known, at, len(tokens), 0)
    return found


def _cut(rows: Rows, first: int, last: int) -> Rows:
    """Some of the rows."""
    ends = ragged.offsets(rows.count)
    part = slice(int(ends[first]), int(ends[max(first, last)]))
    some = slice(first, last)
    return Rows(
        rows.count[some],
        rows.ids[part],
        rows.logprobs[part],
        None if rows.target_logprob is None else rows.target_logprob[some],
        None if rows.target_rank is None else rows.target_rank[some],
    )


IMPORTER: Final = Importer(
    name="openai",
    description="OpenAI and servers like it: replies with logprobs (chat, completions, Responses, Batch), one a line",
    loses="candidates whose bytes tell no token, or several; settings of the engine",
    recognises=_recognises,
    read=_read,
    patterns=JSONL,
    options=("prompts",),
)
