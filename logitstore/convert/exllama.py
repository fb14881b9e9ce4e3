"""`exllama`: results of the dynamic generator of ExLlamaV2 and V3, and logits that V3's `model_diff.py` saves.

A result has `token_ids` (1, n), the generated tokens, and as asked for `token_probs` (1, n), `top_k_tokens` and
`top_k_probs` (1, n, k), or `logits` (1, n, vocabulary). Entry j is of the token at its own place: it was drawn from
that distribution. Probabilities are those after temperature and filters; logits are those before the samplers. People
save results as safetensors or npz, or as JSON lines of nested lists; `add` takes them as the generator gives them.
`model_diff.py --save_logits_a` writes safetensors with `logits` [B, T, vocabulary], where row t predicts token t + 1.
"""

from __future__ import annotations

import itertools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally
from logitstore.convert.dense_logits import rows_of_dense
from logitstore.convert.lines import JSONL, decode, has_keys, read_lines
from logitstore.convert.rows import Rows, of_probabilities, spread, with_target
from logitstore.convert.safetensors_file import Mapped, open_safetensors, tensor_shapes
from logitstore.convert.source import BROKEN_ARCHIVE, Input
from logitstore.convert.token_files import Sample, TokenFile, needed
from logitstore.dataset.writer import DEFAULT_LOGITS_TOP_K, Writer
from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, LogitStoreError, SourceError

_PROMPTS: Final = ("prompt_token_ids", "input_ids")
_ARRAYS: Final = ("token_ids", "token_probs", "top_k_tokens", "top_k_probs", "logits", *_PROMPTS)
_COLUMNS: Final = pa.schema([("prompt", pa.string()), ("text", pa.string())])
_AGREES: Final = 0.02  # half precision, and probabilities that were read out before and after a sum
_CHECKED: Final = 8
_LEVELS: Final = re.compile(rb"[\s\[]*")

_ABSENT: Final = (b"", b"null")
_NOTHING: Final = "there are neither top_k_probs nor logits; capture with return_top_tokens or return_logits"
_NPZ_LIMIT: Final = 2**31
_MIXED: Final = (
    "results with logits stand beside others with top_k_probs alone; convert the two kinds into different datasets"
)
_SAMPLED_NOTE: Final = (
    "Probabilities are those after the samplers, normalised over the candidates that these left and the results list."
)
_LOGITS_NOTE: Final = "Logprobs are of the logits before the samplers, normalised over the vocabulary."
_PLACE_NOTE: Final = "Entry j of a result is the distribution that the generated token j was drawn from."
_FORWARD_NOTE: Final = "Row t is the forward pass's, and predicts the token at t + 1; the tokens are those of --tokens."
_CONTEXT_NOTE: Final = (
    "In {n} of the results there is no prompt (prompt_token_ids or input_ids); a placeholder stands for it, and "
    "loss_mask is 0."
)


class _Result(msgspec.Struct, gc=False):
    token_ids: msgspec.Raw = msgspec.Raw()
    token_probs: msgspec.Raw = msgspec.Raw()
    top_k_tokens: msgspec.Raw = msgspec.Raw()
    top_k_probs: msgspec.Raw = msgspec.Raw()
    logits: msgspec.Raw = msgspec.Raw()
    prompt_token_ids: msgspec.Raw = msgspec.Raw()
    input_ids: msgspec.Raw = msgspec.Raw()
    prompt: str | None = None
    full_completion: str | None = None
    text: str | None = None
    identifier: str | int | None = None
    id: str | int | None = None


_RESULT: Final = msgspec.json.Decoder(_Result)
_INTEGERS: Final = tuple(map(msgspec.json.Decoder, (list[int], list[list[int]], list[list[list[int]]])))
_FLOATS: Final = tuple(map(msgspec.json.Decoder, (list[float], list[list[float]], list[list[list[float]]])))


def add(
    writer: Writer,
    result: Mapping[str, Any],
    *,
    prompt_ids: ArrayLike | None = None,
    id: str | None = None,  # noqa: A002 - the format's own name for it
    top_k: int = DEFAULT_LOGITS_TOP_K,
    **columns: Any,
) -> None:
    """Add what a job of the dynamic generator gave, all of it joined along n.

    With `logits`, which are those before the samplers, the writer's `normalised` must be `vocabulary`; with
    `top_k_probs`, which are those after them, `candidates`. Logits are preferred where a result has both.

    Args:
        writer: the writer.
        result: the generator's dictionary, of tensors, arrays or lists; what it still `held` at the end is joined too.
        prompt_ids: tokens of the prompt; without them a placeholder stands for it, and `loss_mask` is 0.
        id: as for `Writer.add`.
        top_k: candidates that are kept of logits.
        **columns: as for `Writer.add`.

    Raises:
        InvalidInputError: the result does not fit the writer.
        SourceError: the result is not what the generator gives.
    """
    parts = [result, *([result["held"]] if isinstance(result.get("held"), Mapping) else [])]
    found: dict[str, NDArray[Any]] = {}
    for name in _ARRAYS:
        arrays = [_one(name, _as_array(name, part[name])) for part in parts if part.get(name) is not None]
        if arrays:
            found[name] = _joined(name, arrays)
    if prompt_ids is not None:
        found[_PROMPTS[0]] = _one(_PROMPTS[0], _as_array("prompt_ids", prompt_ids))
    wanted = "vocabulary" if "logits" in found else "candidates"
    if writer.settings.normalised != wanted:
        raise InvalidInputError(
            f"this result is normalised over the {wanted}; open the writer with normalised={wanted!r}"
        )
    bos = writer.tokenizer.bos_id if writer.tokenizer is not None else None
    writer.add(id=id, **_Parser(top_k, bos or 0, vocabulary="logits" in found).arguments(found, Tally()), **columns)


def _as_array(name: str, given: Any) -> NDArray[Any]:
    """An array of what is one already, a tensor on any device, or nested lists; bfloat16 comes as float32."""
    try:
        for step in ("detach", "cpu"):
            given = getattr(given, step)() if hasattr(given, step) else given
        if str(getattr(given, "dtype", "")).endswith("bfloat16"):
            given = given.float() if hasattr(given, "float") else np.asarray(given).astype(np.float32)
        return np.asarray(given)
    except (ValueError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
        raise SourceError(f"{name} cannot become one array ({error})") from error


def _joined(name: str, arrays: list[NDArray[Any]]) -> NDArray[Any]:
    try:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    except ValueError as error:
        raise SourceError(f"{name}: what is held does not fit the rest ({error})") from error


def _one(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """An array without the dimension of the batch, whose kind and number of dimensions are right.

    Raises:
        SourceError: they are not.
    """
    dimensions = 2 if name.startswith("top_k") or name == "logits" else 1
    if array.ndim == dimensions + 1 and len(array) == 1:
        array = array[0]
    if array.size == 0 and array.ndim != dimensions:
        array = array.reshape((0,) * dimensions)
    kinds = "fu" if name == "logits" else "f" if name.endswith("probs") else "iu"
    if array.ndim != dimensions or (array.dtype.kind not in kinds and array.size):
        raise SourceError(
            f"{name} is {array.dtype} {list(array.shape)}; {'floats' if 'f' in kinds else 'integers'} "
            f"{'[1, n, k]' if dimensions == 2 else '[1, n]'} of one result are needed"
        )
    return array


@dataclass(frozen=True, slots=True)
class _Parser:
    """Makes the sequence of a result.

    Attributes:
        top_k: candidates that are kept of logits.
        placeholder: the token that stands for a prompt.
        vocabulary: whether all results have logits, and are normalised over the vocabulary.
    """

    top_k: int
    placeholder: int
    vocabulary: bool

    def __call__(self, record: Record, tally: Tally) -> Iterator[Item]:
        """The sequence of a record: a line of JSON, the arrays of a file, or a sample of `model_diff.py`."""
        if isinstance(record.data, _Forward):
            yield Item("add", record.data.arguments(self.top_k))
            return
        if isinstance(record.data, dict):
            yield Item("add", self.arguments({n: _one(n, array) for n, array in record.data.items()}, tally))
            return
        said = decode(_RESULT, record.data, "result of ExLlama's generator")
        arrays = {name: _listed(name, raw) for name in _ARRAYS if (raw := bytes(getattr(said, name))) not in _ABSENT}
        arguments = self.arguments({name: _one(name, array) for name, array in arrays.items()}, tally)
        known = said.id if said.id is not None else said.identifier
        own = {} if known is None else {"id": str(known)}
        text = said.full_completion if said.full_completion is not None else said.text
        yield Item("add", arguments | own | {"prompt": said.prompt, "text": text})

    def arguments(self, found: dict[str, NDArray[Any]], tally: Tally) -> dict[str, Any]:
        """Arguments of `Writer.add` of one result's arrays."""
        if "token_ids" not in found:
            raise SourceError("there are no token_ids; save what the generator gives")
        if ("logits" in found) != self.vocabulary:
            raise SourceError(_MIXED if "top_k_probs" in found or "logits" in found else _NOTHING)
        own = found["token_ids"].astype(np.int64)
        if "logits" in found and len(found["logits"]) != len(own):
            raise SourceError(f"logits is {list(found['logits'].shape)} for {len(own)} token_ids")
        prompt = next((found[name].astype(np.int64) for name in _PROMPTS if name in found and found[name].size), None)
        if prompt is None:
            tally.note(_CONTEXT_NOTE)
        before = np.array([self.placeholder]) if prompt is None else prompt
        tokens = np.concatenate((before, own))
        at = slice(len(before) - 1, len(tokens) - 1)
        if "logits" in found:
            arguments = rows_of_dense(tokens, at.start, found["logits"], self.top_k)
        else:
            arguments = _of_probabilities(found, own).arguments(tokens, at)
        arguments["loss_mask"] = spread(np.full(len(own), prompt is not None), at, len(tokens), 0)
        return arguments


def _of_probabilities(found: dict[str, NDArray[Any]], own: NDArray[np.int64]) -> Rows:
    """Rows of a result's probabilities, normalised over the candidates."""
    for name in ("top_k_tokens", "top_k_probs"):
        if name not in found:
            raise SourceError(_NOTHING if name == "top_k_probs" else "there are no top_k_tokens beside top_k_probs")
    ids, probabilities = found["top_k_tokens"], found["top_k_probs"]
    if ids.shape != probabilities.shape or len(ids) != len(own):
        raise SourceError(
            f"top_k_tokens is {list(ids.shape)} and top_k_probs {list(probabilities.shape)} for {len(own)} token_ids"
        )
    drawn = found.get("token_probs")
    if drawn is not None and drawn.shape != own.shape:
        raise SourceError(f"token_probs is {list(drawn.shape)} for {len(own)} token_ids")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if bool((sums > 1 + _AGREES).any()):
        at = int(np.argmax(sums))
        raise SourceError(f"entry {at}: top_k_probs sum to {sums[at]:.4f}; probabilities sum to at most 1")
    count = np.full(len(ids), ids.shape[1], np.int64)
    rows = Rows(count, ids.astype(np.int64).ravel(), of_probabilities(probabilities.ravel()))
    rows = rows.keep(rows.logprobs > -np.inf)
    if drawn is not None:
        _check_drawn(ids, probabilities, own, drawn)
        rows = with_target(rows, own, of_probabilities(drawn))
    total = ragged.row_sums(np.exp(rows.logprobs, dtype=np.float64), rows.count)
    shift = np.log(np.where(total > 0, total, 1.0))
    logprobs = (rows.logprobs - ragged.spread(shift, rows.count)).astype(np.float32)
    target = None if rows.target_logprob is None else (rows.target_logprob - shift).astype(np.float32)
    return replace(rows, logprobs=logprobs, target_logprob=target)


def _check_drawn(ids: NDArray[Any], probabilities: NDArray[Any], own: NDArray[np.int64], drawn: NDArray[Any]) -> None:
    """Refuse entries that are not of the tokens beside them: these have another probability there than they say."""
    listed = ids == own[:, None]
    there = np.where(listed, probabilities, 0).sum(axis=1, dtype=np.float64)
    differs = np.abs(there - drawn) > _AGREES
    lowest = probabilities.min(axis=1, initial=np.inf)
    wrong = np.where(listed.any(axis=1), differs, drawn > lowest + _AGREES)
    if len(own) >= _CHECKED and 2 * np.count_nonzero(wrong) > len(own):
        at = int(np.argmax(wrong))
        raise SourceError(
            f"at {np.count_nonzero(wrong)} of {len(own)} entries, the first of them {at}, token_probs is not what "
            f"top_k_probs says of the token in token_ids; entry j of all must be of the generated token j"
        )


@dataclass(frozen=True, slots=True)
class _Forward:
    """One sample of `model_diff.py`: its logits [T, V], bfloat16 as uint16, and its tokens."""

    logits: NDArray[Any]
    tokens: NDArray[np.int64]

    def arguments(self, top_k: int) -> dict[str, Any]:
        """Arguments of `Writer.add`."""
        rows = len(self.logits)
        if len(self.tokens) not in (rows, rows + 1):
            raise SourceError(
                f"its tokens are {len(self.tokens)} and its rows {rows}; there must be as many, or one more for the "
                f"last target"
            )
        return rows_of_dense(self.tokens, 0, self.logits, top_k)


def _listed(name: str, raw: bytes) -> NDArray[Any]:
    """The array of nested lists."""
    whole = name in ("token_ids", "top_k_tokens", *_PROMPTS)
    levels = _LEVELS.match(raw)
    depth = levels[0].count(b"[") if levels else 0
    decoders: tuple[msgspec.json.Decoder[Any], ...] = _INTEGERS if whole else _FLOATS
    if not 1 <= depth <= len(decoders):
        raise SourceError(f"{name} is no list of numbers, or of such lists")
    values = decode(decoders[depth - 1], raw, f"list of numbers in {name}")
    try:
        return np.array(values, np.int64 if whole else np.float64)
    except (ValueError, OverflowError, TypeError) as error:
        raise SourceError(f"{name} has rows of different lengths, or numbers that are too large ({error})") from error


def _recognises(source: Input) -> bool:
    names = _names(source)
    if names is None:
        return has_keys(source, "token_ids", "top_k_tokens", "top_k_probs") or (
            has_keys(source, "token_ids", "token_probs", "logits")
        )
    return ("token_ids" in names and bool({"top_k_probs", "logits"} & set(names))) or names == {"logits": 3}


def _names(source: Input) -> dict[str, int] | None:
    """The arrays in a file, and of tensors their dimensions; None where it is text. Never raises."""
    if shapes := tensor_shapes(source):
        return shapes
    try:
        if source.size is None or not source.head().startswith(b"PK\x03\x04"):
            return None
        with zipfile.ZipFile(source.path) as archive:
            return {name.removesuffix(".npy"): 0 for name in archive.namelist() if name.endswith(".npy")}
    except (LogitStoreError, *BROKEN_ARCHIVE):
        return None


def _read(inputs: list[Input], options: Options) -> Import:
    top_k = options.top_k or DEFAULT_LOGITS_TOP_K
    bos = options.tokenizer.bos_id if options.tokenizer is not None else None
    parser = partial(_Parser, top_k, bos or 0)
    if _names(inputs[0]) is None and inputs[0].path.suffix not in (".safetensors", ".npz"):
        return _of_lines(inputs, options, parser)
    done = [0]
    first = _open(inputs[0])
    width = {"logit_width": first["logits"].values.shape[-1]} if "logits" in first else {}
    opened = Import(pieces=iter(()), done=lambda: done[0], total=sum(source.size or 0 for source in inputs))
    opened.parse = parser(vocabulary="logits" in first)
    opened.settings = width or {"normalised": "candidates"}
    if "token_ids" not in first:
        tokens = needed(options, "a file of model_diff.py")
        opened.pieces = _forward(inputs, tokens, done)
        opened.notes = [_LOGITS_NOTE, _FORWARD_NOTE]
        return opened
    _no_tokens(options)
    opened.pieces = _results(inputs, done)
    opened.notes = [_LOGITS_NOTE if width else _SAMPLED_NOTE, _PLACE_NOTE]
    return opened


def _of_lines(inputs: list[Input], options: Options, parser: Callable[..., _Parser]) -> Import:
    _no_tokens(options)
    opened = read_lines(inputs, parser(vocabulary=False))
    piece = next(opened.pieces, None)
    vocabulary = width = None
    for record in piece.records() if piece is not None else ():
        try:
            said = _RESULT.decode(record.data)
            vocabulary = bytes(said.logits) not in _ABSENT
            width = _one("logits", _listed("logits", bytes(said.logits))).shape[1] if vocabulary else None
        except (msgspec.MsgspecError, UnicodeError, RecursionError, SourceError):
            continue  # it fails when its turn comes
        break
    opened.pieces = itertools.chain([] if piece is None else [piece], opened.pieces)
    opened.parse = parser(vocabulary=bool(vocabulary))
    opened.settings = {"columns": _COLUMNS} | ({"logit_width": width} if width else {"normalised": "candidates"})
    opened.notes = [_LOGITS_NOTE if vocabulary else _SAMPLED_NOTE, _PLACE_NOTE]
    return opened


def _no_tokens(options: Options) -> None:
    if options.tokens is not None:
        raise InvalidInputError("results of the generator hold their tokens; --tokens is for files of model_diff.py")


def _open(source: Input) -> dict[str, Mapped]:
    """The arrays of a file that are known, by name."""
    if source.size is None:
        raise SourceError("arrays cannot be read from standard input: name the file")
    found = _open_npz(source) if source.head().startswith(b"PK\x03\x04") else open_safetensors(source)
    found = {name: array for name, array in found.items() if name in _ARRAYS}
    if "logits" in found and (found["logits"].values.ndim < 2 or found["logits"].values.shape[-1] == 0):
        raise SourceError(f"{source.name}: logits are {list(found['logits'].values.shape)}; capture them again")
    if "token_ids" not in found and ("logits" not in found or found["logits"].values.ndim != 3):
        raise SourceError(
            f"{source.name}: there are neither token_ids nor logits [batch, length, vocabulary]; save what the "
            f"generator gives"
        )
    return found


def _open_npz(source: Input) -> dict[str, Mapped]:
    try:
        with zipfile.ZipFile(source.path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _NPZ_LIMIT:
            raise SourceError(f"{source.name} has {size} bytes of arrays, too many for memory; save safetensors")
        with np.load(source.path, allow_pickle=False) as arrays:
            return {name: Mapped(np.asarray(arrays[name])) for name in arrays.files if name in _ARRAYS}
    except BROKEN_ARCHIVE as error:
        if isinstance(error, LogitStoreError):
            raise
        raise SourceError(f"{source.name}: not a whole npz ({error}); fetch the file again") from error


def _results(inputs: list[Input], done: list[int]) -> Iterator[Sample]:
    for number, source in enumerate(inputs):
        arrays = _open(source)
        # bfloat16 logits stay bit patterns, which is how they are reduced.
        data = {n: a.values if n == "logits" else a.floats(np.s_[...]) for n, a in arrays.items()}
        if "logits" in arrays and data["logits"].dtype.kind == "u" and not arrays["logits"].bfloat16:
            raise SourceError(f"{source.name}: logits are {data['logits'].dtype}; floats are needed")
        yield Sample(source.name, number, data)
        done[0] += source.size or 0


def _forward(inputs: list[Input], tokens: TokenFile, done: list[int]) -> Iterator[Sample]:
    number = itertools.count()
    for source in inputs:
        logits = _open(source)["logits"]
        if not logits.is_float:
            raise SourceError(f"{source.name}: logits are {logits.values.dtype}; floats are needed")
        for row in range(len(logits.values)):
            yield Sample(f"{source.name}, row {row}", next(number), _Forward(logits.values[row], tokens.take()))
        done[0] += source.size or 0
    if tokens.finish():
        raise SourceError(
            f"{tokens.name} has more samples than the logits, which are of {tokens.taken}: model_diff.py saves the "
            f"logits of its last batch alone; give the tokens of that batch"
        )


IMPORTER: Final = Importer(
    name="exllama",
    description="ExLlamaV2 and V3: results of the dynamic generator, and logits of model_diff.py",
    loses="settings of the sampler; what of the distribution the samplers or top k cut off",
    recognises=_recognises,
    read=_read,
    patterns=("*.safetensors", "*.npz", *JSONL),
    options=("tokens",),
)
