"""`tensorrt-llm`: what TensorRT-LLM's LLM API gives, as objects and as dumps of them, one JSON object a line.

The logprobs look like vLLM's, but `prompt_logprobs` stand elsewhere and are aligned otherwise. They are made of the
context logits, so that row t is about the token *after* the prompt's token t, and the last one about the first
generated token; there is no None. `outputs[].logprobs` has a row for each generated token. A row has the best
candidates by rank, and in releases since 2026 the token that follows where it is not among them (for a while it was
the token before: such a candidate stands behind a hole in the ranks, and is left out). In the simple format there are
numbers instead of dictionaries, the logprobs of the tokens that follow. Without logprobs, `context_logits`
[prompt, vocabulary] and `generation_logits` [generated, vocabulary] are reduced to candidates here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.convert import vllm_rows as engine
from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally
from logitstore.convert.lines import JSONL, decode, first_line, read_lines
from logitstore.convert.rows import Rows
from logitstore.convert.source import Input
from logitstore.convert.vllm import numbered
from logitstore.convert.vllm_replies import Id, Logprob
from logitstore.dataset.logits import Reduced, reduce_logits
from logitstore.dataset.writer import DEFAULT_LOGITS_TOP_K, Writer
from logitstore.errors import SourceError

_COLUMNS: Final = pa.schema([("prompt", pa.string()), ("text", pa.string())])
_NOTE: Final = (
    "A row of prompt_logprobs is taken to be about the token after its own place, and one of outputs[].logprobs about "
    "the generated token of its place; logprobs are taken to be of the raw distribution at temperature 1."
)
_NO_LOGPROBS: Final = "there are no logprobs; capture with prompt_logprobs or logprobs"
_NO_LOGITS: Final = "there are logits, but no logprobs: add these objects with logitstore.convert.tensorrt_llm.add"

_Rows = list[dict[Id, Logprob] | float | None] | None


class _Output(msgspec.Struct, gc=False):
    token_ids: list[Id] | None = None
    text: str | None = None
    logprobs: _Rows = None
    prompt_logprobs: _Rows = None
    dense: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="generation_logits")


class _Dump(msgspec.Struct, gc=False):
    outputs: list[_Output]
    request_id: str | int | None = None
    prompt: str | None = None
    prompt_token_ids: list[Id] | None = None
    dense: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="context_logits")


_DUMP: Final = msgspec.json.Decoder(_Dump)


def add(writer: Writer, request_output: Any, *, id: str | None = None, **columns: Any) -> None:  # noqa: A002
    """Add what TensorRT-LLM made of a request: the prompt and each completion are one sequence.

    Logprobs are taken where there are some; else logits, of which as many candidates are kept as the writer's `top_k`
    says (128 without it).

    Args:
        writer: takes the sequences.
        request_output: a `RequestOutput`, or what has its attributes `prompt_token_ids`, `outputs` (with `token_ids`,
            `logprobs`, `prompt_logprobs`, `generation_logits`), `context_logits` and `request_id`.
        id: of the first completion; those after it are called `id#1`, `id#2`. None takes the `request_id`.
        **columns: the user's own columns.

    Raises:
        SourceError: rows are missing or not where they should be, or it is no RequestOutput.
        InvalidInputError: a value cannot be stored.
    """
    name = getattr(request_output, "request_id", None) if id is None else id
    top_k = writer.settings.cut.top_k or DEFAULT_LOGITS_TOP_K
    for number, found in enumerate([found for found, _ in _sequences(request_output, top_k)]):
        called = {} if name is None else {"id": numbered(str(name), number)}
        writer.add(**found, **called, **columns)


def _sequences(output: Any, top_k: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Arguments of `Writer.add` for each completion, and the completion."""
    prompt = engine.integers(getattr(output, "prompt_token_ids", None), "prompt_token_ids")
    outputs = getattr(output, "outputs", None) or []
    if len(prompt) == 0 or not outputs:
        raise SourceError(f"there are no {'outputs' if len(prompt) else 'prompt_token_ids'}; give what the engine gave")
    for number, each in enumerate(outputs):
        generated = engine.integers(getattr(each, "token_ids", None), f"outputs[{number}].token_ids")
        tokens = np.concatenate([prompt, generated])
        scored = _given(each, "prompt_logprobs") or _given(outputs[0], "prompt_logprobs")
        said = _given(each, "logprobs")
        if scored is not None or said is not None:
            parts = _parts(scored, said, tokens, len(prompt))
            yield engine.arguments(tokens, parts), each
            continue
        context, made = getattr(output, "context_logits", None), getattr(each, "generation_logits", None)
        if context is None and made is None:
            raise SourceError(_NO_LOGPROBS)
        yield _of_logits(tokens, len(prompt), context, made, top_k), each


def _given(output: Any, field: str) -> Any:
    """Logprobs of an output; an empty list is the engine's default where none were asked for."""
    found = getattr(output, field, None)
    return found if found is not None and len(found) else None


def _parts(scored: Any, said: Any, tokens: NDArray[np.int64], prompt: int) -> list[tuple[int, Rows]]:
    """The rows about the prompt and those about the generated tokens, each with the position of the first."""
    following = np.r_[tokens[1:], -1]  # nothing follows the last one
    parts = []
    if scored is not None and len(scored) != prompt:
        raise SourceError(f"prompt_logprobs has {len(scored)} rows for {prompt} tokens; capture it again")
    if scored is not None and scored[0] is None:  # as vLLM has it: about the tokens of their own places
        parts.append((0, _rows(scored[1:], tokens[1:prompt], "prompt_logprobs")))
    elif scored is not None:
        parts.append((0, _rows(scored, following[:prompt], "prompt_logprobs")))
    if said is not None:
        generated = len(tokens) - prompt
        if len(said) < generated:
            raise SourceError(f"logprobs has {len(said)} rows for {generated} generated tokens; capture it again")
        # More are those of a stop word, whose tokens the engine took away: the first is still of the last position.
        parts.append((prompt - 1, _rows(said[: generated + 1], following[prompt - 1 :][: len(said)], "logprobs")))
    return _without_overlap(parts)


def _without_overlap(parts: list[tuple[int, Rows]]) -> list[tuple[int, Rows]]:
    """Both say something of the first generated token: keep the row with more candidates."""
    if len(parts) < 2 or len(parts[0][1].count) <= parts[1][0] or len(parts[1][1].count) == 0:
        return parts
    (start, before), (at, after) = parts
    last = len(before.count) - 1
    if before.count[last] > after.count[0]:
        return [(start, before), (at + 1, _cut(after, slice(1, None)))]
    return [(start, _cut(before, slice(0, last))), (at, after)]


def _cut(rows: Rows, part: slice) -> Rows:
    kept = np.zeros(len(rows.count), np.bool_)
    kept[part] = True
    mask = np.repeat(kept, rows.count)
    target, rank = rows.target_logprob, rows.target_rank
    return Rows(
        rows.count[part],
        rows.ids[mask],
        rows.logprobs[mask],
        None if target is None else target[part],
        None if rank is None else rank[part],
    )


def _rows(said: Sequence[Any], tokens: NDArray[np.int64], name: str) -> Rows:
    if any(each is None for each in said):
        at = next(at for at, each in enumerate(said) if each is None)
        raise SourceError(f"{name}: row {at} is missing; capture again without reuse of cached blocks")
    simple = [isinstance(each, int | float) for each in said]
    if not any(simple):
        return engine.own_anywhere(engine.of_dicts(said, name), tokens, name, "logprob")
    if not all(simple):
        raise SourceError(f"{name} has numbers and dictionaries; capture it again")
    own = np.array(said, np.float64)
    if bool(np.isnan(own).any()):
        raise SourceError(f"{name}: row {int(np.argmax(np.isnan(own)))} is NaN; capture it again")
    return engine.targets_only(tokens, np.where(tokens < 0, np.nan, own), name, "logprob")


def _of_logits(tokens: NDArray[np.int64], prompt: int, context: Any, made: Any, top_k: int) -> dict[str, Any]:
    """Arguments of `Writer.add` from dense logits of the prompt's positions, the generated ones, or both."""
    generated = len(tokens) - prompt
    parts: list[tuple[int, Reduced]] = []
    if context is not None:
        dense = _dense(context, "context_logits", prompt)
        parts.append((0, _reduced(tokens, 0, dense[:prompt] if made is None or not generated else dense[:-1], top_k)))
    if made is not None and generated:
        dense = _dense(made, "generation_logits", generated, more=True)
        parts.append((prompt - 1, _reduced(tokens, prompt - 1, dense[:generated], top_k)))
    if not parts:
        raise SourceError(_NO_LOGPROBS)
    at = np.concatenate([np.arange(first, first + len(part.candidates.count)) for first, part in parts])
    found: dict[str, Any] = {"tokens": tokens}
    for field in ("ids", "logprobs"):
        found[field] = np.concatenate([getattr(part.candidates, field) for _, part in parts])
    count = np.zeros(len(tokens), np.int64)
    count[at] = np.concatenate([part.candidates.count for _, part in parts])
    for field, fill in (("tail", np.nan), ("logsumexp", np.nan), ("target_logprob", np.nan), ("target_rank", 0)):
        column = np.full(len(tokens), fill)
        column[at] = np.concatenate([getattr(part, field) for _, part in parts])
        found[field] = column.astype(np.int64) if field == "target_rank" else column
    return found | {"count": count}


def _dense(logits: Any, name: str, rows: int, *, more: bool = False) -> NDArray[Any]:
    """Logits as an array of that many rows (or more), whatever tensor they are."""
    if hasattr(logits, "detach"):
        logits = logits.detach().cpu()
        logits = (logits.float() if "bfloat16" in str(logits.dtype) else logits).numpy()
    try:
        array = np.asarray(logits)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{name} is no array ({error})") from error
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2 or not (len(array) == rows or (more and len(array) > rows)):
        raise SourceError(f"{name} has shape {list(array.shape)} for {rows} tokens; [tokens, vocabulary] is needed")
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _reduced(tokens: NDArray[np.int64], first: int, logits: NDArray[Any], top_k: int) -> Reduced:
    """The candidates and targets of some rows of which the first is at this position."""
    found = reduce_logits(tokens[first : first + len(logits)].astype(np.uint32), logits, top_k)
    end = first + len(logits)
    if len(logits) > 0 and end < len(tokens):  # the target of the last row stands behind them
        pair = tokens[end - 1 : end + 1].astype(np.uint32)
        last = reduce_logits(pair, np.repeat(logits[-1:], 2, axis=0), 1)
        found.target_logprob[-1], found.target_rank[-1] = last.target_logprob[0], last.target_rank[0]
    return found


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequences of a dump."""

    def __call__(self, record: Record, _tally: Tally) -> Iterator[Item]:
        dump = decode(_DUMP, record.data, "dump of TensorRT-LLM's RequestOutput")
        dense = [bytes(dump.dense), *(bytes(each.dense) for each in dump.outputs)]
        there = [_given(each, field) for each in dump.outputs for field in ("logprobs", "prompt_logprobs")]
        if not any(there) and set(dense) - {b"", b"null"}:
            raise SourceError(_NO_LOGITS)
        name = None if dump.request_id is None else str(dump.request_id)
        if name is not None and name.isdecimal():
            name = None  # a counter of the process, which begins again in the next
        for number, (found, output) in enumerate(_sequences(dump, 0)):
            called = {} if name is None else {"id": numbered(name, number)}
            yield Item("add", found | called | {"prompt": dump.prompt, "text": output.text})


def _recognises(source: Input) -> bool:
    line = first_line(source)
    if not line.startswith(b"{"):
        return False
    keys = engine.keys_at(line)
    own = {(3, b"prompt_logprobs"), (3, b"generation_logits"), (1, b"context_logits")}
    return (1, b"outputs") in keys and (1, b"prompt_logprobs") not in keys and bool(keys & own)


def _read(inputs: list[Input], _options: Options) -> Import:
    return read_lines(inputs, _Parser(), settings={"columns": _COLUMNS}, notes=[_NOTE])


IMPORTER: Final = Importer(
    name="tensorrt-llm",
    description="TensorRT-LLM: dumps of the LLM API's RequestOutput, one a line",
    loses="a candidate whose rank is not next to the others'",
    recognises=_recognises,
    read=_read,
    patterns=JSONL,
)
