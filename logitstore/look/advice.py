"""What keeping less of each distribution would cost and save: tried on some of the data, with the real encoder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from logitstore.dataset.input import FLOAT_COLUMNS, as_mask, as_ranks
from logitstore.encoding import ragged
from logitstore.encoding.values import Values, ValuesOption, decode_values, encode_values
from logitstore.errors import InvalidInputError
from logitstore.look.measures import measure, normalised_logprobs
from logitstore.schema import Manifest
from logitstore.shard.chunk import StoredSequence, encode_chunk, encode_tail, shard_schema
from logitstore.shard.sequence import Sequence

POSITIONS: Final = 2**13
"""About so many positions are looked at."""

SEQUENCES: Final = 256
"""At most so many sequences are: short ones take as long as others."""

SELECTED: Final = (
    "tokens", "ids", "logprobs", "logits", "draws", "tail",
    "target_logprob", "target_rank", "logsumexp", "entropy", "loss_mask",
)  # fmt: skip
"""What has to be selected."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A writer's setting, `top_k`, `top_p` or `resolution`, and a value of it that keeps less."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Tried:
    """Sums over the sequences that a setting was tried on.

    Attributes:
        positions: of the sequences.
        scored: those with a distribution.
        candidates: that would be kept.
        mass: of their probabilities; NaN where the probabilities are normalised over the candidates.
        kl: of KL(kept ‖ stored) in nats, both made to sum to one over their own candidates: what a trainer sees that
            renormalises.
        kl_even: of KL(stored ‖ kept) in nats over the whole vocabulary, the probability that the candidates do not
            cover being spread evenly over the other tokens: what is forgotten. NaN where that is not known.
        bytes: of the chunks, users' columns apart.
    """

    positions: int = 0
    scored: int = 0
    candidates: int = 0
    mass: float = 0.0
    kl: float = 0.0
    kl_even: float = 0.0
    bytes: int = 0

    def __add__(self, other: Tried) -> Tried:
        return Tried(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class _Kept:
    """One sequence under a setting.

    Attributes:
        mask: bool [N], the candidates kept.
        logprobs: float32 [M], of those, as they would be read.
        rest: float64 [T], probability of the tail and of the candidates that are not kept.
        stored: ready to be written.
    """

    mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    rest: NDArray[np.float64]
    stored: StoredSequence


def settings_to_try(sequences: list[Sequence], info: Manifest) -> list[Setting]:
    """What keeps less of these sequences; nothing of sampled distributions, which are unbiased as they are."""
    sequences = [sequence for sequence in sequences if sequence.draws is None and len(sequence.ids)]
    if not sequences:
        return []
    most = max(int(sequence.count.max()) for sequence in sequences)
    powers = [2**n for n in range(most.bit_length() - 1, -1, -1) if 2**n < most]
    mass = np.concatenate([_mass(s)[s.count > 0] for s in sequences])
    coarsest = info.sampling.resolution if all(s.logits is None for s in sequences) and _is_grid(info) else 1 / 64
    return [
        *(Setting("top_k", float(k)) for k in powers[:4]),
        *(Setting("top_p", p) for p in (0.99, 0.95, 0.9, 0.8) if (mass > p).mean() > 0.05),
        *(Setting("resolution", r) for r in (1 / 32, 1 / 16, 1 / 8) if r > coarsest),
    ]


def _mass(sequence: Sequence) -> NDArray[np.float64]:
    return ragged.row_sums(np.exp(sequence.logprobs, dtype=np.float64), sequence.count)


def _is_grid(info: Manifest) -> bool:
    return info.sampling.values in ("auto", "grid")


def advise(groups: list[list[Sequence]], info: Manifest, bytes_a_position: float) -> list[Advice]:
    """What keeping less of these sequences would cost and save.

    Args:
        groups: sequences that stand in one chunk each, with `SELECTED`.
        info: of their dataset.
        bytes_a_position: that the dataset takes now.

    Returns:
        Nothing where nothing can be left out.
    """
    groups = [[s for s in group if s.draws is None and not measure(s).impossible.any()] for group in groups]
    settings = settings_to_try([sequence for group in groups for sequence in group], info)
    now = sum((tried(group, None, info) for group in groups), Tried())
    return [
        _advice(setting, sum((tried(g, setting, info) for g in groups), Tried()), now, bytes_a_position)
        for setting in settings
    ]


def tried(sequences: list[Sequence], setting: Setting | None, info: Manifest) -> Tried:
    """Encode the sequences of a chunk anew: as they are, or under a setting."""
    width = info.logit_width
    if width is None and info.tokenizer is not None:
        width = info.tokenizer.vocabulary_size
    kept = [_keep(sequence, setting, info) for sequence in sequences]
    total = Tried()
    if not kept:
        return total
    for sequence, one in zip(sequences, kept, strict=True):
        total += _cost(sequence, one, width)
    message = encode_chunk([one.stored for one in kept], shard_schema(b"{}", []), [])
    return total + Tried(bytes=message.size)


def _keep(sequence: Sequence, setting: Setting | None, info: Manifest) -> _Kept:
    name, value = (setting.name, setting.value) if setting is not None else ("", 0.0)
    mask = np.ones(len(sequence.ids), np.bool_)
    if name == "top_k":
        mask = ragged.ranks(sequence.count) < value
    elif name == "top_p":
        mask = _reaching(np.exp(sequence.logprobs, dtype=np.float64), sequence.count, value)  # as a writer does
    count = ragged.row_sums(mask, sequence.count).astype(np.uint32)
    coarser = value if name == "resolution" else None
    values, logprobs = _encoded(sequence, mask, count, info, coarser)
    left_out = np.where(mask, 0.0, np.exp(sequence.logprobs, dtype=np.float64))
    rest = np.exp(sequence.tail, dtype=np.float64) + ragged.row_sums(left_out, sequence.count)
    optional = _optional(sequence, rest)
    if values.logsumexp is not None:
        optional["logsumexp"] = values.logsumexp
    ids = sequence.ids[mask].view(np.uint32)
    return _Kept(mask, logprobs, rest, StoredSequence(sequence.id, sequence.tokens, count, ids, values, optional))


def _encoded(
    sequence: Sequence, mask: NDArray[np.bool_], count: NDArray[np.uint32], info: Manifest, coarser: float | None
) -> tuple[Values, NDArray[np.float32]]:
    """(values under the encoding that they have, or on a coarser grid; logprobs as they would be read)."""
    resolution = info.sampling.resolution if coarser is None else coarser
    logits = None if sequence.logits is None or coarser is not None else sequence.logits[mask]
    # Not "auto": values on a grid may fit bfloat16 too, which takes a long search and more bytes.
    option: ValuesOption = "grid" if logits is None else "bfloat16"
    if coarser is None and info.sampling.values in ("float16", "float32"):
        option = "float16" if info.sampling.values == "float16" else "float32"
    given = sequence.logprobs[mask]
    try:
        values = encode_values(given, count, option, resolution, logsumexp=sequence.logsumexp, logits=logits)
    except InvalidInputError:  # too far apart for the grid, where a writer takes float32
        values = encode_values(given, count, "float32", resolution)
    return values, decode_values(values.encoding, values.top, values.gaps, count, resolution, values.logsumexp)


def _reaching(probabilities: NDArray[np.float64], count: NDArray[Any], top_p: float) -> NDArray[np.bool_]:
    """The best candidates of each position that reach a probability together."""
    before = np.cumsum(probabilities) - probabilities
    before -= ragged.spread(ragged.heads(before, count), count[count > 0])
    return np.asarray(before < top_p)


def _optional(sequence: Sequence, rest: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """The optional cells as they are stored."""
    length = len(sequence.count)
    cells: dict[str, NDArray[Any]] = {}
    if not np.isnan(sequence.tail).all():
        with np.errstate(divide="ignore"):
            cells["tail"] = encode_tail(np.log(rest))
    cells |= {name: value for name in FLOAT_COLUMNS if (value := getattr(sequence, name)) is not None}
    if sequence.target_rank is not None:
        cells["target_rank"] = as_ranks(sequence.target_rank, length)
    if sequence.loss_mask is not None:
        cells["loss_mask"] = as_mask(sequence.loss_mask, length)
    return cells


def _cost(sequence: Sequence, kept: _Kept, width: int | None) -> Tried:
    count, left, mask = sequence.count, kept.stored.count, kept.mask
    scored = count > 0
    given = normalised_logprobs(sequence.logprobs, count, sequence.normalised)
    as_read = normalised_logprobs(kept.logprobs, left, sequence.normalised)
    p, q = np.exp(given), np.exp(as_read)
    mass, mass_left = ragged.row_sums(p, count), ragged.row_sums(q, left)
    with np.errstate(all="ignore"):
        # KL(kept ‖ stored): sum of q/M' (log q/M' - log p/M).
        inside = ragged.row_sums(q * (as_read - given[mask]), left) / mass_left + np.log(mass / mass_left)
    only_ratios = sequence.normalised != "vocabulary"
    known = not only_ratios and width is not None and (len(count) == 0 or width >= int(count.max()))
    return Tried(
        positions=len(count),
        scored=int(scored.sum()),
        candidates=len(kept.logprobs),
        mass=np.nan if only_ratios else float(mass_left.sum()),
        kl=float(inside[scored].sum()),
        kl_even=_even(sequence, kept, p, q, width) if known and width is not None else np.nan,
    )


def _even(sequence: Sequence, kept: _Kept, p: NDArray[np.float64], q: NDArray[np.float64], width: int) -> float:
    """Sum over positions of KL(stored ‖ kept), the rest of both spread evenly over the other tokens."""
    count, left, mask = sequence.count, kept.stored.count, kept.mask
    tail, rest = np.exp(sequence.tail, dtype=np.float64), kept.rest
    tail[count >= width] = 0.0  # rounding: there is nothing else
    with np.errstate(all="ignore"):
        log_p = np.log(p) - ragged.spread(np.log(ragged.row_sums(p, count) + tail), count)
        whole = np.log(ragged.row_sums(q, left) + rest)
        log_rest = np.log(rest / (width - left.astype(np.float64))) - whole  # of one token outside those kept
        log_q = ragged.spread(log_rest, count)
        log_q[mask] = np.log(q) - ragged.spread(whole, left)
        among = ragged.row_sums(np.exp(log_p) * (log_p - log_q), count)
        log_tail = np.log(tail) - np.log(ragged.row_sums(p, count) + tail)
        outside = np.exp(log_tail) * (log_tail - np.log(width - count.astype(np.float64)) - log_rest)
    return float((among + np.where((tail > 0) & (count < width), outside, 0.0))[count > 0].sum())


@dataclass(frozen=True, slots=True)
class Advice:
    """What a setting would cost and save, a position.

    Attributes:
        setting: `top_k`, `top_p` or `resolution`.
        value: of it.
        candidates: kept, mean.
        coverage: their probability, mean; None where that is not known.
        kl: mean KL(kept ‖ stored) over the candidates, renormalised, nats; see `Tried`.
        kl_even: mean KL(stored ‖ kept) over the vocabulary, the rest spread evenly, nats; None where not known.
        saved: bytes.
        share: those over all that a position takes now.
    """

    setting: str
    value: float
    candidates: float
    coverage: float | None
    kl: float
    kl_even: float | None
    saved: float
    share: float

    @property
    def text(self) -> str:
        """The value as the command line takes it."""
        if self.setting == "resolution":
            return str(Fraction(self.value))
        return f"{self.value:.0f}" if self.setting == "top_k" else f"{self.value:g}"


def _advice(setting: Setting, one: Tried, now: Tried, bytes_a_position: float) -> Advice:
    saved = (now.bytes - one.bytes) / now.positions
    return Advice(
        setting=setting.name,
        value=setting.value,
        candidates=one.candidates / one.scored,
        coverage=_known(one.mass / one.scored),
        kl=one.kl / one.scored,
        kl_even=_known(one.kl_even / one.scored),
        saved=saved,
        share=saved / bytes_a_position,
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
