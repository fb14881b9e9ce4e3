"""`sglang`: replies of SGLang's `/generate` with `return_logprob`, one JSON object (or a list of them) a line.

`meta_info` has lists of triples [logprob, token id, text]: `input_token_logprobs` and `output_token_logprobs` with the
actual tokens, `input_top_logprobs` and `output_top_logprobs` with the best candidates of each of their places. A row
is about the token of its own place, so all are shifted by one here; the first of the input is null. The input begins
at `logprob_start_len`: what stands before is not in the reply. The candidates may also be flat, with k in every row:
`*_val_flat`, `*_idx_flat`, `*_shape` and `*_null_prefix`, the number of rows without candidates in front; or so in
base64, little-endian. The shape counts the rows with candidates, or in some releases all rows.
`*_token_ids_logprobs` are of ids that the request named: no best candidates, and left out.
"""

from __future__ import annotations

import binascii
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any, Final, Literal

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
from logitstore.convert.vllm_replies import Id
from logitstore.errors import SourceError
from logitstore.limits import ID_LIMIT

_OWN: Final = re.compile(rb'"(input|output)_(token|top)_logprobs')
_META: Final = re.compile(rb'"meta_info"\s*:')
_COLUMNS: Final = pa.schema([("text", pa.string())])
_FLOATS: Final = {"float32": "<f4", "float64": "<f8", "float16": "<f2"}
_INTEGERS: Final = {"int32": "<i4", "int64": "<i8", "uint32": "<u4"}

_NOTE: Final = (
    "A row is taken to be about the token of its own place, and is shifted by one; logprobs are taken to be at "
    "temperature 1, but the server gives those of generated tokens at the request's temperature unless "
    "SGLANG_RETURN_ORIGINAL_LOGPROB is set."
)
_IDS_NOTE: Final = (
    "In {n} of the replies the logprobs of ids that the request named (token_ids_logprob) are left out, since they are "
    "not the best candidates."
)
_CONTEXT_NOTE: Final = (
    "In {n} of the replies a placeholder stands for tokens of the input that the reply does not hold, and loss_mask is "
    "0: they are fit to look at, not to train on; capture with logprob_start_len=0."
)
_TARGET_NOTE: Final = (
    "In {n} of the replies there are no candidates, only logprobs of the actual tokens; capture with top_logprobs_num."
)
_WHOLE_NOTE: Final = (
    "In {n} of the replies the tokens of the input are taken to be the whole input, since there is no prompt_tokens to "
    "compare with: they are not where logprob_start_len was above 0."
)
_START_NOTE: Final = "In {n} of the replies the first tokens of the input have no distributions (logprob_start_len)."

_Length = Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]


class _Entry(msgspec.Struct, array_like=True, gc=False):
    logprob: float | None  # null is -inf among candidates, and unknown of the first token
    id: Id


_Top = list[list[_Entry] | None]


class _Meta(msgspec.Struct, gc=False):
    id: str | None = None
    prompt_tokens: _Length | None = None
    prompt_token_ids: list[Id] | None = None
    input_token_logprobs: list[_Entry] | None = None
    output_token_logprobs: list[_Entry] | None = None
    input_top_logprobs: _Top | None = None
    output_top_logprobs: _Top | None = None
    input_top_logprobs_val_flat: list[float | None] | None = None
    input_top_logprobs_idx_flat: list[Id] | None = None
    input_top_logprobs_val_flat_b64: str | None = None
    input_top_logprobs_idx_flat_b64: str | None = None
    input_top_logprobs_val_flat_b64_dtype: Literal["float16", "float32", "float64"] = "float32"
    input_top_logprobs_idx_flat_b64_dtype: Literal["int32", "int64", "uint32"] = "int32"
    input_top_logprobs_shape: tuple[_Length, _Length] | None = None
    input_top_logprobs_null_prefix: _Length = 0
    output_top_logprobs_val_flat: list[float | None] | None = None
    output_top_logprobs_idx_flat: list[Id] | None = None
    output_top_logprobs_val_flat_b64: str | None = None
    output_top_logprobs_idx_flat_b64: str | None = None
    output_top_logprobs_val_flat_b64_dtype: Literal["float16", "float32", "float64"] = "float32"
    output_top_logprobs_idx_flat_b64_dtype: Literal["int32", "int64", "uint32"] = "int32"
    output_top_logprobs_shape: tuple[_Length, _Length] | None = None
    output_top_logprobs_null_prefix: _Length = 0
    input_token_ids_logprobs: msgspec.Raw = msgspec.Raw()
    output_token_ids_logprobs: msgspec.Raw = msgspec.Raw()


class _Reply(msgspec.Struct, gc=False):
    meta_info: _Meta
    text: str | None = None
    output_ids: list[Id] | None = None
    input_ids: list[Id] | None = None  # of the request, where the capture kept them
    prompt_token_ids: list[Id] | None = None


_REPLY: Final = msgspec.json.Decoder(_Reply)
_REPLIES: Final = msgspec.json.Decoder(list[_Reply])

_Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class _Part:
    """The input or the output of a reply.

    Attributes:
        tokens: int64 [R].
        own: their logprobs, float64 [R]; NaN where unknown.
        top: the best candidates in their places.
    """

    tokens: NDArray[np.int64]
    own: NDArray[np.float64]
    top: engine.Listed

    def rows(self, first: int, side: _Side, tally: Tally) -> Rows:
        """The rows but the first ones."""
        top = self.top.since(first)
        every = np.ones(len(top.ids), np.bool_)
        name = f"meta_info.{side}_token_logprobs"
        listed, tokens = top.rows(every), self.tokens[first:]
        own = engine.said_once(listed, tokens, self.own[first:], name, "logprob", tally)
        return engine.finished(listed, tokens, own, None, name, "logprob")


def _part(meta: _Meta, side: _Side, tokens: list[int] | None) -> _Part:
    """Read one side of a reply; its tokens may be known where it has no logprobs of them."""
    entries: list[_Entry] = getattr(meta, f"{side}_token_logprobs") or []
    ids = np.array([entry.id for entry in entries] if entries else tokens or [], np.int64)
    own = engine.numbers([entry.logprob for entry in entries]) if entries else np.full(len(ids), np.nan)
    name = f"meta_info.{side}_top_logprobs"
    top = _flat(meta, side, len(ids))
    if top is None:
        top = _nested(getattr(meta, f"{side}_top_logprobs") or [None] * len(ids))
    if len(top.count) != len(ids):
        raise SourceError(f"{name} has {len(top.count)} rows for {len(ids)} tokens; capture it again")
    _check_gaps(top.count > 0, name)
    _check_gaps(~np.isnan(own), f"meta_info.{side}_token_logprobs")
    engine.check_values(top, name, "logprob")
    return _Part(ids, own, top)


def _check_gaps(there: NDArray[np.bool_], name: str) -> None:
    """Refuse rows that are missing behind others; in front the engine has none before `logprob_start_len`."""
    first = int(np.argmax(there)) if bool(there.any()) else len(there)
    if not bool(there[first:].all()):
        at = first + int(np.argmin(there[first:]))
        raise SourceError(f"{name}: row {at} is missing; capture again with --disable-radix-cache")


def _nested(top: _Top) -> engine.Listed:
    """Rows of triples."""
    entries = [*chain.from_iterable(row for row in top if row)]
    count = np.fromiter((len(row) if row else 0 for row in top), np.int64, len(top))
    ids = np.fromiter(map(attrgetter("id"), entries), np.int64, len(entries))
    said = map(attrgetter("logprob"), entries)
    values = np.fromiter((-np.inf if value is None else value for value in said), np.float64, len(entries))
    return engine.Listed(count, ids, values, np.zeros(len(entries), np.int64))


def _flat(meta: _Meta, side: _Side, tokens: int) -> engine.Listed | None:
    """Rows of the flat form, as lists or base64; None where the reply has none."""
    name = f"{side}_top_logprobs"
    values = _column(meta, f"{name}_val_flat", _FLOATS, "float64")
    ids = _column(meta, f"{name}_idx_flat", _INTEGERS, "int64")
    if values is None and ids is None:
        return None
    shape: tuple[int, int] | None = getattr(meta, f"{name}_shape")
    prefix: int = getattr(meta, f"{name}_null_prefix")
    if values is None or ids is None or shape is None:
        raise SourceError(f"meta_info.{name}_val_flat, _idx_flat and _shape belong together, and one is missing")
    rows, k = shape
    covered = rows if rows * k == len(values) else rows - prefix  # some releases count the rows in front too
    if covered < 0 or covered * k != len(values) or len(values) != len(ids):
        says = f"{len(values)} values and {len(ids)} ids do not fill the shape {list(shape)} (null_prefix {prefix})"
        raise SourceError(f"meta_info.{name}: {says}; capture it again")
    if prefix + covered != tokens:
        raise SourceError(f"meta_info.{name} has {prefix + covered} rows for {tokens} tokens; capture it again")
    count = np.r_[np.zeros(prefix, np.int64), np.full(covered, k, np.int64)]
    return engine.Listed(count, ids.astype(np.int64), values.astype(np.float64), np.zeros(len(ids), np.int64))


def _column(meta: _Meta, field: str, dtypes: dict[str, str], listed: str) -> NDArray[Any] | None:
    given: list[Any] | None = getattr(meta, field)
    if given is not None:
        return np.array([-np.inf if value is None else value for value in given], listed)
    packed: str | None = getattr(meta, f"{field}_b64")
    if packed is None:
        return None
    dtype = np.dtype(dtypes[getattr(meta, f"{field}_b64_dtype")])
    try:
        data = binascii.a2b_base64(packed.encode(), strict_mode=True)
    except ValueError as error:
        raise SourceError(f"meta_info.{field}_b64 is no base64 ({error}); capture it again") from error
    if len(data) % dtype.itemsize:
        raise SourceError(f"meta_info.{field}_b64 has {len(data)} bytes, no multiple of {dtype.itemsize}")
    return np.frombuffer(data, dtype)


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequences of a line.

    Attributes:
        placeholder: the token that stands for those of the input that a reply does not hold.
    """

    placeholder: int

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        if record.data.startswith(b"["):
            replies = decode(_REPLIES, record.data, "list of replies of /generate")
        else:
            replies = [decode(_REPLY, record.data, "reply of /generate")]
        if not replies:
            raise SourceError("the list of replies is empty; leave the line out")
        seen: Counter[str] = Counter()
        for number, reply in enumerate(replies):
            try:
                found = self._sequence(reply, tally)
            except SourceError as error:
                raise SourceError(f"reply {number}: {error}" if len(replies) > 1 else str(error)) from error
            if (name := reply.meta_info.id) is not None:
                found["id"] = numbered(name, seen[name])
                seen[name] += 1
            yield Item("add", found | {"text": reply.text})

    def _sequence(self, reply: _Reply, tally: Tally) -> dict[str, Any]:
        meta = reply.meta_info
        given, made = _part(meta, "input", None), _part(meta, "output", reply.output_ids)
        if not any(bool((~np.isnan(part.own)).any()) or len(part.top.ids) for part in (given, made)):
            raise SourceError("there are no logprobs; capture with return_logprob and top_logprobs_num")
        prompt, start, sure = self._prompt(reply, given.tokens)
        tokens = np.concatenate([prompt, _output(reply.output_ids, made.tokens)])
        if start == 0 and not (np.isnan(given.own[0]) and given.top.count[0] == 0):
            raise SourceError(
                "meta_info: row 0 of the input has logprobs, though nothing stands before the first token"
            )
        first = 1 if start == 0 else 0
        parts = [
            (start + first - 1, given.rows(first, "input", tally)),
            (len(prompt) - 1, made.rows(0, "output", tally)),
        ]
        named = {bytes(meta.input_token_ids_logprobs), bytes(meta.output_token_ids_logprobs)}
        tally.note(_IDS_NOTE, bool(named - {b"", b"null", b"[]"}))
        tally.note(_CONTEXT_NOTE, not sure)
        tally.note(_WHOLE_NOTE, start == 0 and meta.prompt_tokens is None and not _given_ids(reply))
        tally.note(_START_NOTE, sure and _begins_late(given, start))
        tally.note(_TARGET_NOTE, len(given.top.ids) + len(made.top.ids) == 0)
        return engine.arguments(tokens, parts, trained=sure)

    def _prompt(self, reply: _Reply, known: NDArray[np.int64]) -> tuple[NDArray[np.int64], int, bool]:
        """The input's tokens, the place of the first of those known by their logprobs, and whether all are certain."""
        meta = reply.meta_info
        whole = np.array(_given_ids(reply), np.int64)
        if len(whole):
            start = len(whole) - len(known)
            if start < 0 or not np.array_equal(whole[start:], known):
                says = "the tokens of meta_info.input_token_logprobs are not the last of the input's token ids"
                raise SourceError(f"{says}; capture it again")
            return whole, start, True
        if len(known) and len(known) >= (meta.prompt_tokens or 0):
            return known, 0, True
        return np.r_[self.placeholder, known], 1, False


def _given_ids(reply: _Reply) -> list[int]:
    """The tokens of the input as ids; empty where the reply does not hold them."""
    return reply.input_ids or reply.prompt_token_ids or reply.meta_info.prompt_token_ids or []


def _begins_late(given: _Part, start: int) -> bool:
    """Whether rows of the input have no candidates, though others, or those of the output, have some."""
    return start > 0 or (bool(given.top.count.any()) and not bool(given.top.count[1:].all()))


def _output(ids: list[int] | None, scored: NDArray[np.int64]) -> NDArray[np.int64]:
    """The generated tokens, by their ids and by their logprobs; either may end earlier."""
    tokens = np.array(ids or [], np.int64)
    both = min(len(tokens), len(scored))
    if not np.array_equal(tokens[:both], scored[:both]):
        at = int(np.argmax(tokens[:both] != scored[:both]))
        says = f"is about the token {scored[at]} at row {at}, where output_ids has {tokens[at]}"
        raise SourceError(f"meta_info.output_token_logprobs {says}; capture it again")
    return tokens if len(tokens) > len(scored) else scored


def _recognises(source: Input) -> bool:
    line = first_line(source)
    return line.startswith((b"{", b"[")) and bool(_META.search(line)) and bool(_OWN.search(line))


def _read(inputs: list[Input], options: Options) -> Import:
    bos = options.tokenizer.bos_id if options.tokenizer is not None else None
    return read_lines(inputs, _Parser(bos or 0), settings={"columns": _COLUMNS}, notes=[_NOTE])


IMPORTER: Final = Importer(
    name="sglang",
    description="SGLang: replies of /generate with logprobs, nested, flat or in base64, one or a list of them a line",
    loses="logprobs of ids that the request named",
    recognises=_recognises,
    read=_read,
    patterns=JSONL,
)
