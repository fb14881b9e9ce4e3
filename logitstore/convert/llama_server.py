"""`llama-server`: replies of llama.cpp's `/completion` with `n_probs`, one JSON object a line.

A reply has the generated tokens, for each of them the best candidates in its place, and the prompt only as text. With
the tokenizer the prompt is encoded again, and a sequence is the prompt's tokens and the generated ones; without it one
placeholder stands for the prompt. The engine leaves out the entries of tokens that end inside a character, and the
last ones where a stop word ended the text; `tokens` (asked for with `return_tokens`) has them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from math import isnan, nan
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Input, Item, Options
from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, LogitStoreError, MissingDependencyError, SourceError
from logitstore.limits import ID_LIMIT, PROBABILITY_SLACK
from logitstore.tokenizer import TOKENIZER_FILE, Tokenizer

_ZERO: Final = -9999.0  # a logprob at or below it means probability zero: JSON has no -inf
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
_WITHOUT: Final = "In {n} of the replies a placeholder stands for the prompt and loss_mask is 0, because "
_PROMPT_NOTE: Final = _WITHOUT + "the tokenizer does not make as many tokens of the prompt as the engine evaluated."
_GAP_NOTE: Final = _WITHOUT + "entries are missing and it is not certain which; capture with return_tokens to know."
_TRUNCATED_NOTE: Final = "In {n} of the replies the engine says truncated: the model may have seen less of the context."

_Id = Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]
_PIECE: Final = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, le=255)]] | None)


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


_REPLY: Final = msgspec.json.Decoder(_Reply)
_Line = tuple[str, _Reply, list[_Entry]]  # where a reply stands, the reply, its entries


def _recognises(source: Input) -> bool:
    try:
        line = source.head().lstrip().split(b"\n", 1)[0]
    except (LogitStoreError, OSError):
        return False
    return line.startswith(b"{") and bool(_OWN_KEY.search(line)) and not _FOREIGN_KEY.search(line)


def _read(inputs: list[Input], options: Options) -> Import:
    begun: list[Input] = []
    kinds: set[bool] = set()
    lines = _lines(inputs, begun, kinds)
    first = list(islice(lines, 1))
    sampled = kinds == {True}
    reader = _Reader(options.tokenizer, sampled=sampled)
    sizes = [source.size for source in inputs]
    return Import(
        items=map(reader.item, chain(first, lines)),
        settings={"columns": _COLUMNS} | ({"normalised": "candidates"} if sampled else {}),
        done=lambda: sum(source.done() for source in begun),
        total=None if None in sizes else sum(size or 0 for size in sizes),
        notes=reader.notes,
        pieces=reader.pieces,
    )


def _lines(inputs: list[Input], begun: list[Input], kinds: set[bool]) -> Iterator[_Line]:
    """The replies; `begun` gathers the inputs, `kinds` whether their numbers are probabilities after the samplers."""
    for source in inputs:
        begun.append(source)
        for number, line in source.lines():
            where = f"{source.name}, line {number}"
            reply = _parse(line, where)
            entries = reply.completion_probabilities
            if entries is None:
                raise SourceError(f"{where}: there are no completion_probabilities; capture again with n_probs above 0")
            kinds.update(entry.top_probs is not None or not isnan(entry.prob) for entry in entries)
            kinds.update(() if kinds else [False])
            if len(kinds) > 1:
                says = "probabilities after the samplers (post_sampling_probs) stand beside logprobs in this input"
                raise SourceError(f"{where}: {says}; convert the two kinds into different datasets")
            yield where, reply, entries


def _parse(line: bytes, where: str) -> _Reply:
    try:
        return _REPLY.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        if _OLD_KEY.search(line):
            says = "the token ids are missing, as in all replies of llama-server before 2025 (probs, tok_str)"
            raise SourceError(f"{where}: {says}; capture again with a later one") from error
        raise SourceError(f"{where}: no whole reply of /completion ({error}); capture it again") from error


def _encoder(tokenizer: Tokenizer) -> Callable[[str], Iterator[list[int]]]:
    """What makes of a prompt the tokens that the engine may have made of it, the likeliest first."""
    try:
        import tokenizers  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        says = "encoding the prompts needs the package tokenizers: pip install 'logitstore[tokenizers]'"
        raise MissingDependencyError(says) from error
    path = next(path for path in tokenizer.files if path.name == TOKENIZER_FILE)
    try:
        engine = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # it raises nothing narrower
        raise InvalidInputError(f"{path}: the package tokenizers cannot read it ({error})") from error
    engine.no_truncation()
    engine.no_padding()
    bos = tokenizer.bos_id
    opening = tokenizer.text([] if bos is None else [bos]) + " "

    def encodings(text: str) -> Iterator[list[int]]:
        tokens = list(engine.encode(text, add_special_tokens=False).ids)
        if bos is None or tokens[:1] == [bos]:
            yield tokens
        else:
            yield from ([bos, *tokens], tokens) if tokenizer.adds_bos else (tokens, [bos, *tokens])
        if bos is not None and text.startswith(opening):
            # Some tokenizers put a space before a text, which the reply then shows: not a second one.
            yield [bos, *engine.encode(text.removeprefix(opening), add_special_tokens=False).ids]

    return encodings


class _Reader:
    """Makes sequences of replies, whose numbers all are `sampled` or not, and gathers notes and the bytes of tokens."""

    def __init__(self, tokenizer: Tokenizer | None, *, sampled: bool) -> None:
        self._full = tokenizer if tokenizer is not None and not tokenizer.is_partial else None
        self._encodings = None if self._full is None else _encoder(self._full)
        self._bos = tokenizer.bos_id if tokenizer is not None else None
        self._sampled = sampled
        self._counted: dict[str, tuple[int, int]] = {}
        self._doubtful: set[int] = set()
        self.notes = [_SAMPLED_NOTE if sampled else _RAW_NOTE, *([_CONTEXT_NOTE] if self._full is None else [])]
        self.pieces: dict[int, bytes] = {}

    def item(self, line: _Line) -> Item:
        """The sequence of one reply; raises `SourceError` where what it says cannot be."""
        _, reply, entries = line
        top = [(entry.top_probs if self._sampled else entry.top_logprobs) or [] for entry in entries]
        if self._full is None:
            self._gather(line, top)
        count, ids, logprobs, own, rank = _numbers(line, top, sampled=self._sampled)
        generated, at = _generated(line)
        prompt = self._prompt(reply, generated, at)
        before = [self._bos or 0] if prompt is None else prompt
        tokens = np.array([*before, *generated], np.int64)
        rows = len(before) - 1 + np.array(range(len(count)) if at is None else at, np.int64)  # t predicts t + 1

        def spread(values: NDArray[Any], fill: float) -> NDArray[Any]:
            column = np.full(len(tokens), fill, values.dtype)
            column[rows] = values
            return column

        arguments = {
            "tokens": tokens,
            "ids": ids,
            "logprobs": logprobs,
            "count": spread(count, 0),
            "target_logprob": spread(own, nan),
            "target_rank": spread(rank, 0),
            "loss_mask": spread(np.full(len(rows), prompt is not None), 0),
        }
        return Item("add", arguments | {"prompt": reply.prompt, "text": reply.content})

    def _prompt(self, reply: _Reply, generated: list[int], at: list[int] | None) -> list[int] | None:
        """The prompt's tokens; None where a placeholder must stand for them."""
        if self._full is None or self._encodings is None:
            return None
        if reply.truncated:
            self._note(_TRUNCATED_NOTE)
        if at is None or (not reply.tokens and _has_gap(reply, self._full.pieces(generated))):
            self._note(_GAP_NOTE)
            return None
        for tokens in self._encodings(reply.prompt) if reply.prompt is not None else ():
            if tokens and reply.tokens_evaluated in {None, len(tokens)}:
                return tokens
        self._note(_PROMPT_NOTE)
        return None

    def _note(self, text: str) -> None:
        place, n = self._counted.get(text, (len(self.notes), 0))
        self._counted[text] = (place, n + 1)
        self.notes[place : place + 1] = [text.format(n=n + 1)]

    def _gather(self, line: _Line, top: list[list[_Candidate]]) -> None:
        """Keep the bytes of tokens; an entry's own may be those of several tokens, so candidates' replace them."""
        where, _, entries = line
        for token in chain(chain.from_iterable(top), entries):
            doubtful = isinstance(token, _Entry)
            if token.id not in self.pieces or (token.id in self._doubtful and not doubtful):
                try:
                    piece = _PIECE.decode(token.bytes or b"null")
                except msgspec.MsgspecError as error:
                    raise SourceError(f"{where}: the bytes of the token {token.id} are none ({error})") from error
                if piece is not None:
                    self.pieces[token.id] = bytes(piece)
                    (self._doubtful.add if doubtful else self._doubtful.discard)(token.id)


def _has_gap(reply: _Reply, pieces: list[bytes]) -> bool:
    """Whether the text has more than the tokens with an entry: a token before the last has none."""
    text, said = b"".join(pieces), (reply.content or "").encode()
    agree = reply.content is not None and (text.startswith(said) or said.startswith(text))
    return not agree and (reply.tokens_predicted or 0) > len(pieces)


def _generated(line: _Line) -> tuple[list[int], list[int] | None]:
    """The generated tokens, and the places of those with an entry; None where these are not certain."""
    where, reply, entries = line
    ids = [entry.id for entry in entries]
    tokens = reply.tokens or ids
    if tokens[: len(ids)] == ids:
        return tokens, list(range(len(ids)))
    forwards, backwards = _find(ids, tokens), _find(ids[::-1], tokens[::-1])
    if len(forwards) < len(ids):
        says = f"the token {ids[len(forwards)]} of entry {len(forwards)} is not among `tokens` in its place"
        raise SourceError(f"{where}: {says}; capture this reply again")
    sure = forwards == [len(tokens) - 1 - at for at in reversed(backwards)]
    return (tokens, forwards) if sure else (ids, None)


def _find(ids: list[int], tokens: list[int]) -> list[int]:
    """The first place of each id behind the place of the one before it; shorter where one is not there."""
    rest = enumerate(tokens)
    places = (next((at for at, token in rest if token == wanted), None) for wanted in ids)
    return [at for at in places if at is not None]


def _numbers(line: _Line, top: list[list[_Candidate]], *, sampled: bool) -> tuple[NDArray[Any], ...]:
    """Count, flat ids and logprobs of the candidates; logprob of each own token, and its rank where it is one."""
    where, _, entries = line
    count = np.fromiter(map(len, top), np.int64, len(top))
    row = ragged.rows(count)
    flat = [*chain.from_iterable(top), *entries]
    ids = np.fromiter((token.id for token in flat), np.int64, len(flat))
    given = np.fromiter((token.prob if sampled else token.logprob for token in flat), np.float64, len(flat))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(given) if sampled else np.where(given <= _ZERO, -np.inf, given)
    wrong = ~(values <= PROBABILITY_SLACK)
    wrong[len(row) :] &= ~np.isnan(given[len(row) :])  # an entry may have no number of its own
    if bool(wrong.any()):
        at = int(np.argmax(wrong))
        says = f"the {'prob' if sampled else 'logprob'} of the token {ids[at]} is missing or cannot be: {given[at]}"
        raise SourceError(f"{where}: entry {np.r_[row, : len(top)][at]}: {says}; capture it again")
    ids, own_ids = np.split(ids, [len(row)])
    values, own = np.split(values.astype(np.float32), [len(row)])
    is_own = ids == own_ids[row]
    level = np.full(len(count), np.nan, np.float32)
    level[row[is_own]] = values[is_own]
    before = (values > level[row]) | ((values == level[row]) & (ids < own_ids[row]))
    rank = np.where(np.isfinite(level), 1 + np.bincount(row, before, minlength=len(count)).astype(np.int64), 0)
    return count, ids, values, np.where(np.isneginf(own), np.float32(np.nan), own), rank


IMPORTER: Final = Importer(
    name="llama-server",
    description="llama.cpp: replies of llama-server's /completion with n_probs, one a line",
    recognises=_recognises,
    read=_read,
)
