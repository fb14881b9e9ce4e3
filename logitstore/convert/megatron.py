"""`megatron`: the tars that Megatron-LM writes under `--logits-save-dir`.

`cp{C}_dp{D}__{last iteration}.tar` has `_meta.json` first (settings, and a hash over what determines the samples), then
`{iteration}.pt.zst`: a zstd frame around what torch.save made of three lists with a tensor [S, B, K] for each
microbatch, `values` (logprobs over the vocabulary, best first), `indices_low` (uint16) and `bit_17`. Row s is the
forward pass's, so it predicts the token after position s. Top-p masks entries with a value of -1000 or -10000; their id
reads back as 131071. No file holds tokens. Context parallelism cuts the sequence into parts, which are not joined here.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import zstandard
from numpy.typing import NDArray

from logitstore.convert.base import Import, Importer, Item, Options, Record, Tally
from logitstore.convert.lines import progress
from logitstore.convert.raw_logits import best_first
from logitstore.convert.rows import Rows
from logitstore.convert.source import Input
from logitstore.convert.token_files import Sample, TokenFile, needed
from logitstore.convert.torch_file import Tensor, read_torch
from logitstore.encoding import ragged
from logitstore.errors import LogitStoreError, SourceError
from logitstore.limits import PROBABILITY_SLACK

_NAME: Final = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar(\.zst|\.gz)?$")
_META: Final = "_meta.json"
_MEMBER: Final = re.compile(r"(\d{1,18})\.pt\.zst$")
_MASKED: Final = -1000.0
_ROUNDING: Final = {"float16": 0.004, "bfloat16": 0.032, "float32": 0.0}  # half a step of a logprob of 8 to 16 nats
_HEADERS_LIMIT: Final = 2**24  # bytes of a tar between two members
_META_LIMIT: Final = 2**20
_PAYLOAD_LIMIT: Final = 2**31  # of an iteration, decompressed
_PAYLOAD_RATIO: Final = 1000  # entries that are masked compress well, but not better than this
_PAYLOAD_FREE: Final = 2**26  # this much may come of few bytes
_PART: Final = 2**22
_WINDOW: Final = 2**27

_ALIGNED_NOTE: Final = "Row s of a sample is the forward pass's, and predicts the token after position s."
_ORDER_NOTE: Final = (
    "Tokens were taken in the order of Megatron's sampler: iteration, microbatch, data-parallel rank, place in the "
    "batch. The files hold no tokens, so nothing but the frame's statistics can tell whether these are the ones."
)
_SCALED_NOTE: Final = (
    "In {n} of the positions the probabilities summed to more than 1, since the file rounds logprobs; these were "
    "scaled to sum to 1."
)


@dataclass(frozen=True, slots=True)
class _Meta:
    """What `_meta.json` says: the hash; positions and candidates of a sample, where it says these."""

    hash: str
    positions: int | None
    k: int | None


@dataclass(frozen=True, slots=True)
class _Captured:
    """One sample of a microbatch: its rows [S, K], and its tokens."""

    values: NDArray[Any]
    low: NDArray[np.uint16]
    bit_17: NDArray[np.bool_]
    rounding: float
    tokens: NDArray[np.int64]


def _recognises(source: Input) -> bool:
    try:
        head = source.head()
    except (LogitStoreError, OSError):
        return False
    return head.startswith(_META.encode() + b"\0") and head[257:262] == b"ustar"


def _read(inputs: list[Input], options: Options) -> Import:
    groups = _groups(inputs)
    tokens = needed(options, "a capture of Megatron-LM")
    return Import(
        pieces=_samples(groups, tokens),
        parse=_parse,
        notes=[_ALIGNED_NOTE, _ORDER_NOTE],
        check=tokens.notes,
        **progress(inputs),
    )


def _groups(inputs: list[Input]) -> list[list[Input]]:
    """The inputs by last iteration; in each group one for each data-parallel rank, in order."""
    named = [_NAME.match(source.path.name) for source in inputs]
    groups: dict[int, dict[int, Input]] = {}
    for source, name in zip(inputs, named, strict=True):
        if name is None:
            if len(inputs) > 1:
                raise SourceError(
                    f"{source.name}: of several files each must be named cp0_dp(rank)__(iteration).tar, as Megatron-LM "
                    f"does, since their order follows from it"
                )
            return [inputs]
        if int(name[1]) != 0:
            raise SourceError(
                f"{source.name}: a part of sequences that context parallelism cut up (cp{name[1]}); such captures "
                f"cannot be joined yet, capture with --context-parallel-size 1"
            )
        ranks = groups.setdefault(int(name[3]), {})
        if int(name[2]) in ranks:
            raise SourceError(f"{source.name}: a second file of this rank and iteration")
        ranks[int(name[2])] = source
    first = sorted(next(iter(groups.values())))
    for last, ranks in groups.items():
        if sorted(ranks) != first:
            some = next(iter(ranks.values())).name
            raise SourceError(
                f"{some}: the ranks dp{sorted(ranks)} of iteration {last} are not those of others, dp{first}; give "
                f"the files of all ranks"
            )
    return [[groups[last][rank] for rank in first] for last in sorted(groups)]


def _samples(groups: list[list[Input]], tokens: TokenFile) -> Iterator[Sample]:
    """The samples of all files, in the order of the sampler."""
    number = itertools.count()
    before, run = -1, None
    for group in groups:
        tars = [_Tar(source) for source in group]
        for steps in itertools.zip_longest(*(tar.iterations() for tar in tars)):
            if None in steps or len({(step.iteration, len(step.batches)) for step in steps}) > 1:
                raise SourceError(f"{group[0].name}: the ranks have different iterations or numbers of microbatches")
            if steps[0].iteration <= before:
                raise SourceError(f"{group[0].name}: iteration {steps[0].iteration} comes behind {before}")
            before = steps[0].iteration
            for tar in tars:
                run = run or tar.meta
                if run is not None and tar.meta is not None and tar.meta.hash != run.hash:
                    raise SourceError(f"{tar.source.name}: its hash in {_META} is another than that of the file before")
            for microbatch in range(len(steps[0].batches)):
                for step in steps:
                    yield from step.samples(microbatch, tokens, number)
    tokens.finish()


@dataclass(frozen=True, slots=True)
class _Step:
    """One iteration of a file; `batches` has values, low bits and high bit of each microbatch."""

    name: str
    iteration: int
    batches: list[tuple[Tensor, Tensor, Tensor]]

    def samples(self, microbatch: int, tokens: TokenFile, number: Iterator[int]) -> Iterator[Sample]:
        """The samples of a microbatch."""
        place = f"{self.name}, iteration {self.iteration}, microbatch {microbatch}"
        tensors = self.batches[microbatch]
        try:
            values, low, bit_17 = (tensor.read() for tensor in tensors)
        except SourceError as error:
            raise SourceError(f"{place}: {error}") from error
        rounding = _ROUNDING[tensors[0].dtype]
        for row in range(values.shape[1]):
            data = _Captured(values[:, row], low[:, row], bit_17[:, row], rounding, tokens.take())
            yield Sample(f"{place}, row {row}", next(number), data)


class _Tar:
    """One file, read forwards."""

    def __init__(self, source: Input) -> None:
        self.source = source
        self.meta: _Meta | None = None

    def iterations(self) -> Iterator[_Step]:
        """Its iterations, in order."""
        name = _NAME.match(self.source.path.name)
        last = None
        for member, data in _members(self.source):
            if self.meta is None:
                if member != _META:
                    raise SourceError(f"{self.source.name}: {_META} does not come first; this is another tar")
                self.meta = _meta(data, f"{self.source.name}, {_META}")
            elif match := _MEMBER.match(member):
                last = int(match[1])
                yield _step(data, self.source.name, last, self.meta)
        if self.meta is None or (name is not None and last != int(name[3])):
            said = f"its name says iteration {name[3]}, but it ends with {last}" if name else "it has nothing"
            raise SourceError(f"{self.source.name}: the file is cut off: {said}; fetch it again")


class _Metered:
    """A stream of which no more is read than was allowed: what a tar says of itself may be of any length."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.allowed = 0

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        self.allowed -= len(data)
        if self.allowed < 0:
            raise SourceError("more headers than any tar of Megatron-LM has; this is another file")
        return data


def _members(source: Input) -> Iterator[tuple[str, bytes]]:
    """(name, data) of each regular member of a tar that is read forwards; nothing is written to disk."""
    with source.open() as stream:
        metered = _Metered(stream)
        metered.allowed = _HEADERS_LIMIT
        try:
            with tarfile.open(fileobj=metered, mode="r|") as tar:  # type: ignore[call-overload]  # it only reads
                for member in tar:
                    metered.allowed = _HEADERS_LIMIT + member.size
                    limit = _META_LIMIT if member.name == _META else _PAYLOAD_LIMIT
                    if not member.isreg() or not (member.name == _META or _MEMBER.match(member.name)):
                        continue
                    if member.size > limit:
                        raise SourceError(f"{member.name} has {member.size} bytes, over the limit of {limit}")
                    file = tar.extractfile(member)
                    data = b"" if file is None else file.read()
                    if len(data) != member.size:
                        raise SourceError(f"{member.name} is cut off; fetch the file again")
                    yield member.name, data
        except (tarfile.TarError, EOFError, OSError, OverflowError, ValueError) as error:
            if isinstance(error, LogitStoreError) and str(error).startswith(source.name):
                raise
            raise SourceError(f"{source.name}: {error}; no whole tar of Megatron-LM") from error


def _meta(data: bytes, place: str) -> _Meta:
    try:
        said = json.loads(data)
        identifiers, saver = said["identifiers"], said.get("saver") or {}
        text = json.dumps(identifiers, sort_keys=False, separators=(",", ":"))
        digest = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        length, k = identifiers.get("sequence_length"), saver.get("k")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{place}: not what Megatron-LM writes ({error!r}); fetch the file again") from error
    if said.get("hash") != digest:
        raise SourceError(
            f"{place}: hash is {said.get('hash')!r}, but the identifiers give {digest!r}; one of them was changed"
        )
    return _Meta(digest, length if type(length) is int else None, k if type(k) is int else None)


def _step(data: bytes, name: str, iteration: int, meta: _Meta) -> _Step:
    place = f"{name}, iteration {iteration}"
    try:
        batches = _batches(read_torch(_decompressed(data)))
        for number, (values, _, _) in enumerate(batches):
            _check_shape(values.shape, meta, number)
    except SourceError as error:
        raise SourceError(f"{place}: {error}") from error
    return _Step(name, iteration, batches)


def _check_shape(shape: tuple[int, ...], meta: _Meta, number: int) -> None:
    positions, _, k = shape
    if meta.positions is not None and positions != meta.positions:
        raise SourceError(
            f"microbatch {number}: values have {positions} rows, but sequence_length is {meta.positions}; context "
            f"parallelism cuts sequences up, and such captures cannot be joined yet"
        )
    if meta.k is not None and k > meta.k:
        raise SourceError(f"microbatch {number}: values have {k} candidates, but the saver's k is {meta.k}")


def _decompressed(data: bytes) -> io.BytesIO:
    limit = min(_PAYLOAD_LIMIT, max(_PAYLOAD_FREE, _PAYLOAD_RATIO * len(data)))
    found = io.BytesIO()
    try:
        with zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(data) as reader:
            while part := reader.read(_PART):
                found.write(part)
                if found.tell() > limit:
                    raise SourceError(f"it decompresses to more than {limit} bytes, which no capture does")
    except zstandard.ZstdError as error:
        raise SourceError(f"damaged zstd data ({error}); fetch the file again") from error
    found.seek(0)
    return found


def _batches(saved: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    names = ("values", "indices_low", "bit_17")
    lists = [saved.get(name) if isinstance(saved, dict) else None for name in names]
    for name, found in zip(names, lists, strict=True):
        if not isinstance(found, list) or not all(isinstance(tensor, Tensor) for tensor in found):
            raise SourceError(f"there is no list of tensors {name!r}; this is another file")
    if len({len(found) for found in lists if found is not None}) != 1:
        raise SourceError("values, indices_low and bit_17 are not of as many microbatches")
    batches: list[tuple[Tensor, Tensor, Tensor]] = list(zip(*lists, strict=True))
    for number, (values, low, bit_17) in enumerate(batches):
        if len(values.shape) != 3 or values.shape != low.shape or values.shape != bit_17.shape:
            shapes = f"{values.shape}, {low.shape} and {bit_17.shape}"
            raise SourceError(f"microbatch {number}: values, indices_low and bit_17 have the shapes {shapes}")
        if values.dtype not in _ROUNDING or low.dtype != "uint16" or bit_17.dtype != "bool":
            kinds = f"{values.dtype}, {low.dtype} and {bit_17.dtype}"
            raise SourceError(f"microbatch {number}: values, indices_low and bit_17 are {kinds}")
    return batches


def _parse(record: Record, tally: Tally) -> Iterator[Item]:
    sample: _Captured = record.data
    positions, k = sample.values.shape
    if len(sample.tokens) not in (positions, positions + 1):
        raise SourceError(
            f"its tokens are {len(sample.tokens)} and its rows {positions}; there must be as many, or one more for "
            f"the last target: give the tokens of the same run"
        )
    ids = sample.low.astype(np.int64) | (sample.bit_17.astype(np.int64) << 16)
    ids, logprobs = best_first(ids, sample.values.astype(np.float32))
    rows = Rows(np.full(positions, k, np.int64), ids.ravel(), logprobs.ravel()).keep(~(logprobs.ravel() <= _MASKED))
    yield Item("add", _scaled(rows, sample.rounding, tally).arguments(sample.tokens, slice(0, positions)))


def _scaled(rows: Rows, rounding: float, tally: Tally) -> Rows:
    """The rows, where rounding made probabilities sum to more than 1 with all logprobs lowered alike."""
    sums = ragged.row_sums(np.exp(rows.logprobs, dtype=np.float64), rows.count)
    over = (sums > 1 + PROBABILITY_SLACK) & (sums <= 1 + rounding)
    if not bool(over.any()):
        return rows
    tally.note(_SCALED_NOTE, int(np.count_nonzero(over)))
    shift = np.log(np.where(over, sums, 1.0))
    return replace(rows, logprobs=(rows.logprobs - ragged.spread(shift, rows.count)).astype(np.float32))


IMPORTER: Final = Importer(
    name="megatron",
    description="Megatron-LM: tars of --logits-save-dir, with the tokens from --tokens",
    loses="number of the iteration and microbatch; settings of the saver",
    recognises=_recognises,
    read=_read,
    patterns=("*.tar", "*.tar.zst", "*.tar.gz"),
    options=("tokens",),
)
