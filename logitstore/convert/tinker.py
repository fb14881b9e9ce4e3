"""`tinker`: what Tinker's sampling service says of prompts, and the datums of off-policy distillation, one a line.

A sample reply has `topk_prompt_logprobs`, for every token of the prompt the best [id, logprob] in its place and null
for the first one, and `prompt_logprobs`, the logprob of the token itself: row t is about token t. It does not hold its
prompt, which must stand beside it (`prompt_token_ids`, `tokens` or the request's `prompt`) or come with `--tokens`.

A datum has `target_tokens` and `weights`, [N, K], as lists of lists or as Tinker's tensors ({data, shape}), by
themselves or under `loss_fn_inputs`: row t predicts the token behind input token t, the weights are probabilities
normalised over the K candidates, all 0 where the position is not trained on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally, ready
from logitstore.convert.beside import check_actual, first_record, paired
from logitstore.convert.lines import JSONL, decode, first_line, has_keys, read_lines
from logitstore.convert.rows import Rows, flat, of_probabilities, same_shape, with_target, without_zeros
from logitstore.convert.source import Input
from logitstore.convert.token_files import samples_of
from logitstore.encoding import ragged
from logitstore.errors import SourceError
from logitstore.limits import ID_LIMIT, PROBABILITY_SLACK

_JSON: Final = msgspec.json.Decoder()
_TOKEN_COLUMNS: Final = ("input_ids", "tokens")
_SAME: Final = 0.125  # nats: how far two reports of one logprob may be apart, for what the engine rounded
_TENSOR_LIMIT: Final = 2**24  # candidates of one sequence

_REPLY_NOTE: Final = (
    "Row t of topk_prompt_logprobs is about token t; logprobs are taken to be those of the raw distribution, "
    "normalised over the whole vocabulary, at temperature 1."
)
_DATUM_NOTE: Final = "Weights are normalised over the candidates of each position; row t predicts the token behind t."
_MISSING_NOTE: Final = "{n} positions behind the first one are null, and have no distribution."
_SCALED_NOTE: Final = "At {n} positions the weights do not sum to 1; they were normalised."


_Id = Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]
_Length = Annotated[int, msgspec.Meta(ge=0, le=_TENSOR_LIMIT)]


class _Chunk(msgspec.Struct, gc=False):
    tokens: list[_Id]


class _Input(msgspec.Struct, gc=False):
    chunks: list[_Chunk]


class _Ids(msgspec.Struct, gc=False):
    data: list[_Id]
    shape: list[_Length]


class _Numbers(msgspec.Struct, gc=False):
    data: list[float]
    shape: list[_Length]


class _Targets(msgspec.Struct, gc=False):
    target_tokens: list[list[_Id]] | _Ids
    weights: list[list[float]] | _Numbers


class _Line(msgspec.Struct, gc=False):
    id: str | int | None = None
    prompt_token_ids: list[_Id] | None = None
    input_ids: list[_Id] | None = None
    tokens: list[_Id] | None = None
    prompt: _Input | list[_Id] | str | None = None
    model_input: _Input | list[_Id] | None = None
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[_Id, float]] | None] | None = None
    loss_fn_inputs: _Targets | None = None
    target_tokens: list[list[_Id]] | _Ids | None = None
    weights: list[list[float]] | _Numbers | None = None


_LINE: Final = msgspec.json.Decoder(_Line)


def _recognises(source: Input) -> bool:
    return has_keys(source, "topk_prompt_logprobs") or (
        first_line(source).startswith(b"{") and has_keys(source, "target_tokens", "weights")
    )


def _read(inputs: list[Input], options: Options) -> Import:
    opened = read_lines(inputs, ready)
    datums = False
    with contextlib.suppress(SourceError):  # what is no line of Tinker fails when its turn comes
        datums = _targets(decode(_LINE, first_record(opened) or b"{}", "line of Tinker")) is not None
    if options.tokens is not None:
        opened.pieces = paired(opened.pieces, samples_of(options.tokens), str(options.tokens))
    opened.parse = _Parser(datums, options.tokens is not None)
    opened.settings = {"normalised": "candidates"} if datums else {}
    opened.notes = [_DATUM_NOTE if datums else _REPLY_NOTE]
    return opened


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequence of a line: of a datum, or of a sample reply."""

    datums: bool
    paired: bool

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        data, beside = record.data if self.paired else (record.data, None)
        line = decode(_LINE, data, "line of Tinker")
        targets = _targets(line)
        if (targets is not None) != self.datums:
            raise SourceError("datums (target_tokens, weights) and sample replies are in one input; convert them apart")
        tokens = _tokens(line) if beside is None else beside
        made = _of_reply(line, tokens, tally) if targets is None else _of_datum(targets, tokens, tally)
        yield Item("add", made | ({} if line.id is None else {"id": str(line.id)}))


def _targets(line: _Line) -> _Targets | None:
    if line.loss_fn_inputs is not None:
        return line.loss_fn_inputs
    if line.target_tokens is None or line.weights is None:
        return None
    return _Targets(line.target_tokens, line.weights)


def _tokens(line: _Line) -> NDArray[np.int64]:
    given = (line.prompt_token_ids, line.tokens, line.input_ids, line.prompt, line.model_input)
    for tokens in given:
        if isinstance(tokens, _Input):
            return np.array([*chain.from_iterable(part.tokens for part in tokens.chunks)], np.int64)
        if isinstance(tokens, list):
            return np.array(tokens, np.int64)
    raise SourceError(
        "the tokens are missing: put prompt_token_ids beside the reply, or give a file with the input_ids of each "
        "record, in order, with --tokens"
    )


def _of_reply(line: _Line, tokens: NDArray[np.int64], tally: Tally) -> dict[str, Any]:
    top = line.topk_prompt_logprobs
    if top is None:
        raise SourceError("there is no topk_prompt_logprobs; sample again with topk_prompt_logprobs above 0")
    said = line.prompt_logprobs or [None] * len(top)
    for name, values in (("topk_prompt_logprobs", top), ("prompt_logprobs", said)):
        if len(values) != len(tokens):
            raise SourceError(f"{name} has {len(values)} rows for {len(tokens)} tokens; row t is about token t")
    if top and top[0]:
        raise SourceError("topk_prompt_logprobs: row 0 is not null, but nothing stands before the first token")
    count, pairs = flat(top, np.dtype((np.float64, 2)))
    own = np.array([np.nan if value is None else value for value in said], np.float64)
    tally.note(_MISSING_NOTE, int((count[1:] == 0).sum()))
    with np.errstate(over="ignore"):  # the infinite is refused as what it is
        logprobs, own = pairs[:, 1].astype(np.float32), own[1:].astype(np.float32)
    rows = without_zeros(Rows(count[1:], pairs[:, 0].astype(np.int64), logprobs))
    check_actual(rows, tokens[1:], own, "prompt_logprobs")
    if bool((own > PROBABILITY_SLACK).any()):
        at = int(np.argmax(own > PROBABILITY_SLACK))
        raise SourceError(f"prompt_logprobs, row {at + 1}: {own[at]} is no logprob")
    rows = with_target(rows, tokens[1:], own)
    return rows.arguments(tokens, slice(0, len(rows.count)))


def _of_datum(targets: _Targets, tokens: NDArray[np.int64], tally: Tally) -> dict[str, Any]:
    count, ids = _matrix(targets.target_tokens, "target_tokens", np.int64)
    other, weights = _matrix(targets.weights, "weights", np.float64)
    same_shape(other, count, "weights", "target_tokens")
    if len(count) not in (len(tokens), len(tokens) - 1):
        raise SourceError(
            f"target_tokens has {len(count)} rows for {len(tokens)} tokens; it has one for each token of model_input"
        )
    of_probabilities(weights)  # refuses what is none
    listed = weights > 0
    count = ragged.row_sums(listed, count).astype(np.int64)
    ids, weights = ids[listed], weights[listed]
    sums = ragged.row_sums(weights, count)
    tally.note(_SCALED_NOTE, int((np.abs(sums - 1) > 1e-3)[count > 0].sum()))
    scale = np.repeat(sums, count)
    rows = Rows(count, ids, of_probabilities(np.minimum(weights / scale, 1.0)))
    found = rows.arguments(tokens, slice(0, len(count)))
    return found | {"loss_mask": found["count"] > 0}


def _matrix(given: Any, name: str, dtype: Any) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """(count [N], values) of lists of lists, or of a tensor of shape [N, K]."""
    if isinstance(given, list):
        return flat(given, dtype)
    if len(given.shape) != 2 or given.shape[0] * given.shape[1] != len(given.data):
        raise SourceError(f"{name} has the shape {given.shape} and {len(given.data)} values; [N, K] is needed")
    return np.full(given.shape[0], given.shape[1], np.int64), np.array(given.data, dtype)


IMPORTER: Final = Importer(
    name="tinker",
    description="Tinker: sample replies with topk_prompt_logprobs, and datums of off-policy distillation, one a line",
    loses="nothing of the distributions of replies; sampled sequences",
    recognises=_recognises,
    read=_read,
    patterns=JSONL,
    options=("tokens",),
)
