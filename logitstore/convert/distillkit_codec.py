"""DistillKit's two codecs of sparse distributions: their settings, their bytes, and back. Pure functions on arrays.

A position has k candidates, best first. The **present codec** stores, one after another: the first `exact_k` values as
they are; the coefficients of a curve through the other ones; and bins of what the curve leaves, each with one scale
and integers of some bits. The values may be differences from the one before. Ids are integers of ceil(log2 d) bits.
All such integers stand highest bit first in one stream, which is filled up to a byte at the end of each bin and
position. The **legacy codec** has words of 64 bits with as many whole ids as fit, the first in the lowest bits, exact
values, and coefficients of a curve of powers of the rank.

Its decoder computes in the dtypes of the settings, and rounds after each step; so does this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
import yaml  # type: ignore[import-untyped]
from msgspec import Meta
from numpy.typing import NDArray

from logitstore.convert.rows import CLAMPED, Rows, over_candidates
from logitstore.encoding import ragged
from logitstore.errors import SourceError
from logitstore.limits import ID_LIMIT, PROBABILITY_SLACK

Dtype = Literal["float16", "bfloat16", "float32", "float64"]

SETTINGS_BYTES: Final = 2**16
"""The largest file of settings that is read."""

PADDING: Final = -10000.0
"""The value that `export` gives to a candidate that is none: its probability is 0, and no loss becomes NaN of it."""

MOST: Final = 1.02
"""What the probabilities of a row may sum to: so far the codecs go when they are read rightly."""

_ROUNDING: Final = 1e-6  # of a sum of float32
_BYTES: Final = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_YAML_ERRORS: Final = (  # what its constructors raise on odd scalars, besides its own
    yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError,
)  # fmt: skip

_Width = Annotated[int, Meta(ge=2, le=ID_LIMIT)]
_Candidates = Annotated[int, Meta(ge=1, le=2**24)]
_Exact = Annotated[int, Meta(ge=0, le=2**24)]
_Term = Annotated[int, Meta(ge=-64, le=64)] | Literal["sqrt", "exp"]


class Bin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Some residuals with one scale.

    Attributes:
        scale_dtype: of the scale.
        element_bits: bits of an integer.
        num_elements: number of integers.
    """

    scale_dtype: Dtype
    element_bits: Annotated[int, Meta(ge=1, le=64)]
    num_elements: _Candidates


class Codec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of the present codec, with the defaults that DistillKit has.

    Attributes:
        d: width of the distribution; ids are below it.
        k: candidates of a position.
        exact_k: how many of them are stored as they are.
        exact_dtype: of these.
        polynomial_terms: terms of the curve: powers of t, its square root, its exponential.
        term_dtype: of the coefficients, in which the curve is computed.
        residual_bins: what is added to the curve, from its beginning.
        delta_encoding: whether each value but the first is the difference from the one before.
        error_diffusion: whether the encoder spread rounding errors; nothing to the decoder.
        normalize_t: whether t goes from 0 to 1, and not in steps of 1.
    """

    d: _Width
    k: _Candidates
    exact_k: _Exact
    exact_dtype: Dtype = "float32"
    polynomial_terms: Annotated[tuple[_Term, ...], Meta(max_length=64)] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: Annotated[tuple[Bin, ...], Meta(max_length=4096)] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    def __post_init__(self) -> None:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k is {self.exact_k}, over k ({self.k})")
        binned = sum(each.num_elements for each in self.residual_bins)
        if binned > self.k - self.exact_k:
            raise ValueError(f"residual_bins have {binned} elements for {self.k - self.exact_k} values")
        if self.exact_k < self.k and not self.polynomial_terms and not self.residual_bins:
            raise ValueError(f"nothing says the values behind exact_k ({self.exact_k})")

    @property
    def value_bytes(self) -> int:
        """Bytes of the values of a position."""
        terms = len(self.polynomial_terms or ()) * _BYTES[self.term_dtype]
        bins = [
            _BYTES[each.scale_dtype] + packed_bytes(each.num_elements, each.element_bits) for each in self.residual_bins
        ]
        return self.exact_k * _BYTES[self.exact_dtype] + terms + sum(bins)

    @property
    def id_bytes(self) -> int:
        """Bytes of the ids of a position."""
        return packed_bytes(self.k, id_bits(self.d))


class LegacyCodec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of the legacy codec, with the defaults that DistillKit has.

    Attributes:
        vocab_size: width of the distribution; ids are below it.
        k: candidates of a position.
        exact_k: how many of them are stored as they are.
        polynomial_degree: highest power in the curve.
        invert_polynomial: whether the powers are negative.
        with_sqrt_term: whether the square root is a further term.
        term_dtype: of the coefficients when they were written; the files have float32.
    """

    vocab_size: _Width
    k: _Candidates
    exact_k: _Exact
    polynomial_degree: Annotated[int, Meta(ge=0, le=64)]
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k is {self.exact_k}, over k ({self.k})")

    @property
    def d(self) -> int:
        """Width of the distribution."""
        return self.vocab_size

    @property
    def terms(self) -> int:
        """Coefficients of a position."""
        return self.polynomial_degree + 1 + self.with_sqrt_term if self.exact_k < self.k else 0

    @property
    def words(self) -> int:
        """Words of the ids of a position."""
        return -(-self.k // (64 // id_bits(self.vocab_size)))


def parse_settings(data: bytes, name: str) -> Codec | LegacyCodec:
    """The settings in a YAML file.

    Args:
        data: what the file holds.
        name: of the file, for messages.

    Raises:
        SourceError: it is no YAML, or the settings are not whole or contradict each other.
    """
    if len(data) > SETTINGS_BYTES:
        raise SourceError(f"{name}: over {SETTINGS_BYTES} bytes; these are no settings of a codec")
    try:
        settings = yaml.safe_load(data)
    except _YAML_ERRORS as error:
        raise SourceError(f"{name}: no YAML ({error!s:.300})") from error
    if not isinstance(settings, dict):
        raise SourceError(f"{name}: no settings; `d`, `k`, `exact_k` and so on are needed, one a line")
    try:
        if "vocab_size" in settings or "polynomial_degree" in settings:
            return msgspec.convert(settings, LegacyCodec)
        return msgspec.convert(settings, Codec)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise SourceError(f"{name}: {error}; these must be the settings that the files were captured with") from error


def format_settings(codec: Codec) -> str:
    """The settings as YAML, as a capture writes them."""
    return str(yaml.safe_dump(msgspec.json.decode(msgspec.json.encode(codec))))


def describe(codec: Codec | LegacyCodec) -> str:
    """The settings in one line."""
    found = msgspec.to_builtins(codec)
    return ", ".join(f"{name} {_plain(value)}" for name, value in found.items())


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, dict):
        return "/".join(map(str, value.values()))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def id_bits(d: int) -> int:
    """Bits of an id: ceil(log2 d) in float32, as DistillKit computes it: too few just above 2^21 and higher powers."""
    return math.ceil(np.float32(math.log2(np.float32(d))))


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that n integers of so many bits take."""
    return (n * bits + 7) // 8


def unpack(data: NDArray[np.uint8], bits: int, n: int) -> NDArray[Any]:
    """Integers of some bits each out of streams of bits, highest bit first.

    Args:
        data: [R, bytes], at least `packed_bytes(n, bits)` of them.
        bits: 1 to 64.
        n: integers of a row.

    Returns:
        [R, n] of uint32, or of uint64 where that is too narrow.
    """
    # After some integers the stream is at a byte's beginning again: all such groups are taken apart at once.
    size, step, kind, places = _layout(bits)
    groups = -(-n // size)
    missing = groups * step - data.shape[1]
    whole = np.pad(data, ((0, 0), (0, missing))) if missing > 0 else data[:, : groups * step]
    columns = whole.reshape(len(data), groups, step)
    found = np.zeros((len(data), groups, size), kind)
    for integer, byte, shift in places:
        part = columns[:, :, byte].astype(kind)
        found[:, :, integer] |= part << kind(shift) if shift >= 0 else part >> kind(-shift)
    found &= kind(2**bits - 1)
    return found.reshape(len(data), groups * size)[:, :n]


def pack(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The inverse of `unpack`.

    Args:
        values: non-negative integers [R, n], below 2^bits.
        bits: 1 to 64.

    Returns:
        [R, bytes].
    """
    rows, n = values.shape
    size, step, kind, places = _layout(bits)
    groups = -(-n // size)
    filled = np.zeros((rows, groups * size), kind)
    filled[:, :n] = values
    columns = filled.reshape(rows, groups, size)
    data = np.zeros((rows, groups, step), np.uint8)
    for integer, byte, shift in places:
        part = columns[:, :, integer]
        data[:, :, byte] |= (part >> kind(shift) if shift >= 0 else part << kind(-shift)).astype(np.uint8)
    return data.reshape(rows, groups * step)[:, : packed_bytes(n, bits)]


def _layout(bits: int) -> tuple[int, int, Any, Iterator[tuple[int, int, int]]]:
    """Integers and bytes of a group, the dtype, and (integer, byte, shift) of each byte that holds a part of one."""
    common = math.gcd(bits, 8)
    size, step = 8 // common, bits // common
    places = (
        (integer, byte, (integer + 1) * bits - 8 * (byte + 1))
        for integer in range(size)
        for byte in range(integer * bits // 8, ((integer + 1) * bits - 1) // 8 + 1)
    )
    return size, step, np.uint32 if bits <= 32 else np.uint64, places


def decode(
    codec: Codec, values: NDArray[np.uint8], ids: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and values of the present codec.

    Args:
        codec: the settings.
        values: bytes [R, codec.value_bytes].
        ids: bytes [R, codec.id_bytes].

    Returns:
        (ids [R, k], values [R, k]).
    """
    with np.errstate(all="ignore"):  # what is no number is found afterwards
        return unpack(ids, id_bits(codec.d), codec.k).astype(np.int64), _values(codec, values).astype(np.float32)


def decode_legacy(
    codec: LegacyCodec, words: NDArray[np.uint64], exact: NDArray[np.float32], coefficients: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and values of the legacy codec.

    Args:
        codec: the settings.
        words: [R, codec.words].
        exact: [R, codec.exact_k].
        coefficients: [R, codec.terms].

    Returns:
        (ids [R, k], values [R, k]).
    """
    bits = id_bits(codec.vocab_size)
    each = 64 // bits
    ids = np.empty((*words.shape, each), np.int64)
    for place in range(each):
        ids[:, :, place] = (words >> np.uint64(bits * place)) & np.uint64(2**bits - 1)
    found = [exact]
    if codec.exact_k < codec.k:
        rank = np.arange(1, codec.k - codec.exact_k + 1, dtype=np.float32)
        sign = -1 if codec.invert_polynomial else 1
        with np.errstate(all="ignore"):
            terms = [rank ** np.float32(sign * power) for power in range(codec.polynomial_degree + 1)]
            found.append(_curve([*terms, *([np.sqrt(rank)] if codec.with_sqrt_term else [])], coefficients, "float32"))
    return ids.reshape(len(words), -1)[:, : codec.k], np.concatenate(found, axis=1)


def _values(codec: Codec, data: NDArray[np.uint8]) -> NDArray[Any]:
    approximate = codec.k - codec.exact_k
    exact, at = _take(data, 0, codec.exact_k, codec.exact_dtype)
    terms = codec.polynomial_terms or ()
    coefficients, at = _take(data, at, len(terms), codec.term_dtype)
    parts: list[NDArray[Any]] = []
    for each in codec.residual_bins:
        scale, at = _take(data, at, 1, each.scale_dtype)
        size = packed_bytes(each.num_elements, each.element_bits)
        integers = unpack(data[:, at : at + size], each.element_bits, each.num_elements)
        parts.append(_signed(integers, each.element_bits) * scale)
        at += size
    rest = approximate - sum(each.num_elements for each in codec.residual_bins)
    residual = _round(np.concatenate([*parts, np.zeros((len(data), rest), np.float32)], axis=1), codec.exact_dtype)
    if terms:
        points = _points(approximate, codec.term_dtype, normalised=codec.normalize_t)
        curve = _curve([_term(points, term, codec.term_dtype) for term in terms], coefficients, codec.term_dtype)
        residual = _round(curve + residual, _common(codec.term_dtype, codec.exact_dtype))
    found = np.concatenate([exact, residual], axis=1)
    if codec.delta_encoding:
        # The running sum itself is float64, as torch has it on a processor; a graphics card differs by 1e-5.
        found = _round(np.cumsum(found.astype(np.float32), axis=1, dtype=np.float64), codec.exact_dtype)
    return found


def _common(one: Dtype, other: Dtype) -> Dtype:
    """The dtype of a sum of two."""
    if one == other:
        return one
    return "float64" if "float64" in (one, other) else "float32"


def _take(data: NDArray[np.uint8], at: int, n: int, dtype: Dtype) -> tuple[NDArray[Any], int]:
    """Floats of each row from this byte on, as float32 or float64 [R, n], and where they end."""
    end = at + n * _BYTES[dtype]
    held = np.ascontiguousarray(data[:, at:end])
    if dtype == "bfloat16":
        return (held.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32), end
    wide = np.float64 if dtype == "float64" else np.float32
    return held.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype]).astype(wide), end


def _round(values: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
    """The nearest values that the dtype has, as float32, or float64 for that one."""
    if dtype == "float64":
        return values.astype(np.float64)
    values = values.astype(np.float32)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "float32":
        return values
    bits = values.view(np.uint32)
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    nearest = ((bits + up) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(values), values, nearest)


def _signed(integers: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """What the integers of a bin stand for, in units of its scale."""
    if bits == 1:
        return integers.astype(np.float32) * np.float32(2) - np.float32(1)
    return (integers.astype(np.uint64) - np.uint64(2 ** (bits - 1))).view(np.int64).astype(np.float32)


def _points(n: int, dtype: Dtype, *, normalised: bool) -> NDArray[Any]:
    """The n values of t; those from 0 to 1 are counted from the nearer end, as torch does."""
    steps = np.arange(n)
    if not normalised:
        return _round(steps, dtype)
    step = _round(np.array(1 / max(1, n - 1)), dtype)
    return _round(np.where(steps < n // 2, step * steps, 1 - step * (n - 1 - steps)), dtype) if n > 1 else steps * step


def _term(points: NDArray[Any], term: int | str, dtype: Dtype) -> NDArray[Any]:
    if term == "sqrt":
        return _round(np.sqrt(points), dtype)
    if term == "exp":
        return _round(np.exp(points), dtype)
    power = int(term)
    if power in (2, 3):  # torch multiplies, and rounds in between
        square = _round(points * points, dtype)
        return square if power == 2 else _round(square * points, dtype)
    return _round(points ** points.dtype.type(power), dtype)


def _curve(terms: list[NDArray[Any]], coefficients: NDArray[Any], dtype: Dtype) -> NDArray[Any]:
    """The sum over the terms, [R, n]: products are rounded to the dtype, and the sum once."""
    total = np.zeros((len(coefficients), len(terms[0])), coefficients.dtype)
    for number, term in enumerate(terms):
        total += _round(coefficients[:, number, None] * term, dtype)
    return _round(total, dtype)


def usable(given: Rows, width: int, *, logits: bool) -> tuple[Rows, dict[str, int]]:
    """The candidates that can be stored; rows that cannot be are emptied, and those are scaled that sum to over 1.

    Args:
        given: all candidates, in any order.
        width: ids must be below it.
        logits: whether the values are logits, which are normalised over the candidates then.

    Returns:
        (the rows, how many rows there were of each kind).

    Raises:
        SourceError: an id is too large, or stands twice in a row.
    """
    broken = _any(np.isnan(given.logprobs) | np.isposinf(given.logprobs), given.count)
    keep = given.logprobs > CLAMPED  # not what is none, whose id may be any
    if bool(broken.any()):
        keep &= ~ragged.spread(broken, given.count)
    rows = given.keep(keep)
    _check_ids(rows, width)
    unsorted = _any(_rises(rows), rows.count)
    if logits:
        positive = scaled = np.zeros(len(broken), np.bool_)
        over = emptied = broken
        rows = replace(rows, logprobs=over_candidates(rows.count, rows.logprobs))
    else:
        sums = ragged.row_sums(np.exp(np.minimum(rows.logprobs, 80)), rows.count)
        positive = _any(rows.logprobs > PROBABILITY_SLACK, rows.count)
        over = broken | (sums > MOST)
        emptied = over | positive
        scaled = ~emptied & (sums > 1 + _ROUNDING)
        shift = np.where(scaled, np.log(np.maximum(sums, 1)), 0).astype(np.float32)
        rows = replace(rows, logprobs=rows.logprobs - ragged.spread(shift, rows.count))
    kinds = {"rows": (rows.count > 0) | broken, "unsorted": unsorted & ~emptied, "positive": positive, "over": over}
    kinds |= {"emptied": emptied, "scaled": scaled}
    return rows.keep(~ragged.spread(emptied, rows.count)), {name: int(which.sum()) for name, which in kinds.items()}


def _any(values: NDArray[np.bool_], count: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows have a true value."""
    return np.asarray(ragged.row_sums(values, count) > 0) if bool(values.any()) else np.zeros(len(count), np.bool_)


def _rises(rows: Rows) -> NDArray[np.bool_]:
    """Which candidates have a higher value than the one before in their row."""
    rises = np.zeros(len(rows.logprobs), np.bool_)
    rises[1:] = rows.logprobs[1:] > rows.logprobs[:-1]
    return rises & ~ragged.firsts(rows.count)


def _check_ids(rows: Rows, width: int) -> None:
    wrong = (rows.ids < 0) | (rows.ids >= width)
    if bool(wrong.any()):
        at = int(np.argmax(wrong))
        says = f"row {ragged.rows(rows.count)[at]}: the id {rows.ids[at]} is not at least 0 and below {width}"
        raise SourceError(f"{says}; check the settings, or capture this sequence again")
    key = (ragged.rows(rows.count) << 31) + rows.ids
    if k := ragged.uniform(rows.count):
        key = key.reshape(-1, k)  # shorter rows sort faster
    key = np.sort(key, axis=-1).ravel()
    again = np.flatnonzero(key[1:] == key[:-1])
    if len(again):
        row, token = divmod(int(key[again[0]]), 2**31)
        raise SourceError(f"row {row}: the id {token} stands there twice; check the settings, or capture it again")
