"""`llama-server`: replies of llama.cpp's `/completion` with `n_probs`, one JSON object a line.

A reply has the generated tokens, for each of them the best candidates in its place, and the prompt only as text. With
the tokenizer the prompt is encoded again, and a sequence is the prompt's tokens and the generated ones; without it one
placeholder stands for the prompt. The engine leaves out the entries of tokens that end inside a character, and the
last ones where a stop word ended the text; `tokens` (asked for with `return_tokens`) has them all.

Servers before 2025 gave probabilities after the samplers, and the texts of tokens instead of their ids: these are found
through the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from math import isnan, nan
from typing import Annotated, Final

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Piece, Record, Tally, ready
from logitstore.convert.lines import JSONL, decode, first_line, read_lines
from logitstore.convert.prompts import WITHOUT, PromptEncoder, chosen
from logitstore.convert.rows import CLAMPED, Rows, agreeing, ranks_of, spread
from logitstore.convert.source import Input
from logitstore.convert.vocabulary import (
    Vocabulary,
    certain,
    check_vocabulary,
    count_left,
    gather,
    text_piece,
    without_repeated,
)
from logitstore.encoding import ragged
from logitstore.errors import SourceError
from logitstore.limits import ID_LIMIT, PROBABILITY_SLACK

_OWN_KEY: Final = re.compile(rb'"(completion_probabilities|tokens_predicted)"\s*:')
_FOREIGN_KEY: Final = re.compile(rb'"choices"\s*:')  # OpenAI-style; inside a text its quotes would be escaped
_OLD_KEY: Final = re.compile(rb'"tok_str"\s*:')
_COLUMNS: Final = pa.schema([("prompt", pa.string()), ("text", pa.string())])

_RAW_NOTE: Final = "Logprobs are of the raw distribution, at temperature 1, whatever the sampler's settings were."
_SAMPLED_NOTE: Final = (
    "Probabilities are those after the samplers (post_sampling_probs), normalised over the candidates that these left."
)
_CONTEXT_NOTE: Final = (
    "The context is missing, since without a tokenizer one placeholder stands for each prompt: the dataset is fit to "
    "look at, not to train on, and its loss_mask is 0 throughout; convert with the teacher's tokenizer to train on it."
)
_GAP_NOTE: Final = WITHOUT + "entries are missing and it is not certain which; capture with return_tokens to know."
_EMPTY_NOTE: Final = (
    "At {n} positions the reply has no candidates, though it has some at others, as of tokens that a smaller model "
    "drafted: they are empty, and loss_mask is 0 there."
)
_TRUNCATED_NOTE: Final = "In {n} of the replies the engine says truncated: the model may have seen less of the context."

_Id = Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]


class _Candidate(msgspec.Struct, gc=False):
    id: _Id
    bytes: msgspec.Raw = msgspec.Raw()  # parsed only where they are wanted
    logprob: float = nan  # NaN where the field is missing
    prob: float = nan


class _Entry(_Candidate, gc=False):
    top_logprobs: list[_Candidate] | None = None
    top_probs: list[_Candidate] | None = None


class _Reply(msgspec.Struct, gc=False):
    completion_probabilities: list[_Entry] | None = None
    tokens: list[_Id] | None = None
    prompt: str | None = None
    content: str | None = None
    tokens_evaluated: int | None = None
    tokens_predicted: int | None = None
    truncated: bool = False


class _OldCandidate(msgspec.Struct, gc=False):
    tok_str: str
    prob: float


class _OldEntry(msgspec.Struct, gc=False):
    content: str
    probs: list[_OldCandidate]


class _OldReply(_Reply, gc=False):
    completion_probabilities: list[_OldEntry] | None = None  # type: ignore[assignment]


_REPLY: Final = msgspec.json.Decoder(_Reply)
_OLD_REPLY: Final = msgspec.json.Decoder(_OldReply)


def _recognises(source: Input) -> bool:
    line = first_line(source)
    return line.startswith(b"{") and bool(_OWN_KEY.search(line)) and not _FOREIGN_KEY.search(line)


def _read(inputs: list[Input], options: Options) -> Import:
    full = options.tokenizer if options.tokenizer is not None and not options.tokenizer.is_partial else None
    opened = read_lines(inputs, ready)
    first = next(opened.pieces, None)
    sampled = first is not None and _sampled(first)
    opened.pieces = chain([] if first is None else [first], opened.pieces)
    bos = options.tokenizer.bos_id if options.tokenizer is not None else None
    encoder = None if full is None else PromptEncoder(full).load()
    opened.parse = _Parser(encoder, bos or 0, sampled, None if encoder is None else Vocabulary(encoder))
    opened.check = check_vocabulary
    opened.settings = {"columns": _COLUMNS} | ({"normalised": "candidates"} if sampled else {})
    opened.notes = [_SAMPLED_NOTE if sampled else _RAW_NOTE, *([_CONTEXT_NOTE] if full is None else [])]
    return opened


def _sampled(piece: Piece) -> bool:
    """Whether the numbers of the first reply that has some are probabilities after the samplers."""
    for record in piece.records():
        try:
            entries = _REPLY.decode(record.data).completion_probabilities or []
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            if _OLD_KEY.search(record.data):
                return True
            continue  # it fails when its turn comes
        if entries:
            return any(map(_is_sampled, entries))
    return False


def _is_sampled(entry: _Entry) -> bool:
    return entry.top_probs is not None or not isnan(entry.prob)


def _parse(line: bytes, vocabulary: Vocabulary | None, tally: Tally) -> _Reply:
    try:
        return _REPLY.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        if not _OLD_KEY.search(line):
            return decode(_REPLY, line, "reply of /completion")  # says what is wrong
        if vocabulary is None:
            says = "the token ids are missing, as in all replies of llama-server before 2025 (probs, tok_str)"
            raise SourceError(f"{says}; give the teacher's --tokenizer, or capture again with a later one") from error
    return _with_ids(decode(_OLD_REPLY, line, "reply of /completion"), vocabulary, tally)


def _with_ids(old: _OldReply, vocabulary: Vocabulary, tally: Tally) -> _Reply:
    """A reply of an old server as a newer one would give it, up to the first token that is not certain."""
    said = old.completion_probabilities or []
    texts = [candidate.tok_str for entry in said for candidate in entry.probs]
    count = np.fromiter((len(entry.probs) for entry in said), np.int64, len(said))
    ids = np.fromiter(map(vocabulary.id_of_text, texts), np.int64, len(texts))
    ids = without_repeated(count, ids)
    count_left(tally, ids)
    own = np.fromiter((vocabulary.id_of_text(entry.content) for entry in said), np.int64, len(said))
    vocabulary.settle(own, [text_piece(entry.content) for entry in said], tally)
    rows = np.split(ids, np.cumsum(count)[:-1])
    entries = [
        _Entry(
            id=int(own[at]),
            prob=next((each.prob for each in said[at].probs if each.tok_str == said[at].content), nan),
            top_probs=[
                _Candidate(id=token, prob=each.prob)
                for token, each in zip(rows[at].tolist(), said[at].probs, strict=True)
                if token >= 0
            ],
        )
        for at in range(certain(own, tally))
    ]
    fields = {name: getattr(old, name) for name in old.__struct_fields__}
    return _Reply(**fields | {"completion_probabilities": entries})


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequence of a reply.

    Attributes:
        encoder: encodes prompts; None without a tokenizer.
        placeholder: the token that stands for a prompt.
        sampled: whether the numbers of all replies are probabilities after the samplers.
        vocabulary: finds the tokens of old servers; None without a tokenizer.
    """

    encoder: PromptEncoder | None
    placeholder: int
    sampled: bool
    vocabulary: Vocabulary | None = None

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        reply = _parse(record.data, self.vocabulary, tally)
        entries = reply.completion_probabilities
        if entries is None:
            raise SourceError("there are no completion_probabilities; capture again with n_probs above 0")
        if any(_is_sampled(entry) != self.sampled for entry in entries):
            says = "probabilities after the samplers (post_sampling_probs) stand beside logprobs in this input"
            raise SourceError(f"{says}; convert the two kinds into different datasets")
        top = [(entry.top_probs if self.sampled else entry.top_logprobs) or [] for entry in entries]
        if self.encoder is None:
            gather(tally, chain.from_iterable(top), entries)
        listed, there = _numbers(entries, top, sampled=self.sampled, tally=tally)
        tally.note(_EMPTY_NOTE, int((~there).sum()))
        generated, at = _generated(reply, entries)
        prompt = self._prompt(reply, generated, at, tally)
        before = [self.placeholder] if prompt is None else prompt
        tokens = np.array([*before, *generated], np.int64)
        rows = len(before) - 1 + np.array(range(len(there)) if at is None else at, np.int64)  # t predicts t + 1
        found = listed.arguments(tokens, rows)
        found["loss_mask"] = spread(there & (prompt is not None), rows, len(tokens), 0)
        yield Item("add", found | {"prompt": reply.prompt, "text": reply.content})

    def _prompt(self, reply: _Reply, generated: list[int], at: list[int] | None, tally: Tally) -> list[int] | None:
        """The prompt's tokens; None where a placeholder must stand for them."""
        if self.encoder is None:
            return None
        if reply.truncated:
            tally.note(_TRUNCATED_NOTE)
        if at is None or (not reply.tokens and _has_gap(reply, self.encoder.tokenizer.pieces(generated))):
            tally.note(_GAP_NOTE)
            return None
        encodings = self.encoder.encodings(reply.prompt) if reply.prompt is not None else ()
        return chosen(encodings, reply.tokens_evaluated, tally)


def _has_gap(reply: _Reply, pieces: list[bytes]) -> bool:
    """Whether the text has more than the tokens with an entry: a token before the last has none."""
    text, said = b"".join(pieces), (reply.content or "").encode()
    agree = reply.content is not None and (text.startswith(said) or said.startswith(text))
    return not agree and (reply.tokens_predicted or 0) > len(pieces)


def _generated(reply: _Reply, entries: list[_Entry]) -> tuple[list[int], list[int] | None]:
    """The generated tokens, and the places of those with an entry; None where these are not certain."""
    ids = [entry.id for entry in entries]
    tokens = reply.tokens or ids
    if tokens[: len(ids)] == ids:
        return tokens, list(range(len(ids)))
    forwards, backwards = _find(ids, tokens), _find(ids[::-1], tokens[::-1])
    if len(forwards) < len(ids):
        says = f"the token {ids[len(forwards)]} of entry {len(forwards)} is not among `tokens` in its place"
        raise SourceError(f"{says}; capture this reply again")
    sure = forwards == [len(tokens) - 1 - at for at in reversed(backwards)]
    return (tokens, forwards) if sure else (ids, None)


def _find(ids: list[int], tokens: list[int]) -> list[int]:
    """The first place of each id behind the place of the one before it; shorter where one is not there."""
    rest = enumerate(tokens)
    places = (next((at for at, token in rest if token == wanted), None) for wanted in ids)
    return [at for at in places if at is not None]


def _numbers(
    entries: list[_Entry], top: list[list[_Candidate]], *, sampled: bool, tally: Tally
) -> tuple[Rows, NDArray[np.bool_]]:
    """The candidates, with the logprob of each own token, and its rank where it is one; and which rows are there."""
    count = np.fromiter(map(len, top), np.int64, len(top))
    row = ragged.rows(count)
    flat = [*chain.from_iterable(top), *entries]
    ids = np.fromiter((token.id for token in flat), np.int64, len(flat))
    given = np.fromiter((token.prob if sampled else token.logprob for token in flat), np.float64, len(flat))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(given) if sampled else np.where(given <= CLAMPED, -np.inf, given)
    wrong = ~(values <= PROBABILITY_SLACK)
    wrong[len(row) :] &= ~np.isnan(given[len(row) :])  # an entry may have no number of its own
    if bool(wrong.any()):
        at = int(np.argmax(wrong))
        says = f"the {'prob' if sampled else 'logprob'} of the token {ids[at]} is missing or cannot be: {given[at]}"
        raise SourceError(f"entry {np.r_[row, : len(top)][at]}: {says}; capture it again")
    ids, own_ids = np.split(ids, [len(row)])
    values, own = np.split(values.astype(np.float32), [len(row)])
    rows = Rows(count, ids, values)
    own = agreeing(
        rows, own_ids, np.where(np.isneginf(own), np.float32(np.nan), own), "completion_probabilities", tally
    )
    there = (count > 0) | (not count.any())
    own[~there & (own == 0)] = np.nan  # of a drafted token, which the engine does not look up
    return replace(rows, target_logprob=own, target_rank=ranks_of(rows, own_ids)), there


IMPORTER: Final = Importer(
    name="llama-server",
    description="llama.cpp: replies of llama-server's /completion with n_probs, one a line",
    loses="nothing of the distributions; settings of the engine",
    recognises=_recognises,
    read=_read,
    patterns=JSONL,
)
