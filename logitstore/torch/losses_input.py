"""What the losses are given: checked, and cut down to the rows that count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from logitstore.errors import InvalidInputError, InvalidTypeError
from logitstore.torch.losses_dense import Kind, working_dtype

Tail = Literal["ghost", "renormalise", "uniform", "target"]
Normalised = Literal["vocabulary", "candidates"]
Reduction = Literal["mean", "sum", "none"]

DERIVED_MASS: Final = 1e-6
"""The least mass of a tail that is not stored but computed from the candidates."""

MOST_MASS: Final = 1.1
"""More than this no candidates have together, however coarsely their logprobs are rounded (1/8: 1.07)."""


@dataclass(frozen=True)
class Given:
    """The tensors that a loss is called with beside the logits [..., V]; see `forward_kl` and `LossOptions`."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor | None
    following: Tensor | None
    mask: Tensor | None


_NO_TAIL: Final = (
    "tail={tail!r} needs the mass outside the candidates, but these logprobs are normalised over their candidates, so "
    "that it is unknown: use tail='renormalise', or a dataset normalised over the vocabulary"
)


@dataclass(frozen=True)
class Teacher:
    """What the student is compared with at M rows of the flat logits.

    Attributes:
        rows: int64 [M], which rows.
        ids: int64 [M, K]; where there is no candidate, the best one's.
        logprobs: [M, K], of the working dtype; -inf where there is no candidate. A row has at least one.
        tail: [M], log of the mass outside the candidates; -inf where there is none.
        others: int64 [M], entries that are no candidates.
    """

    rows: Tensor
    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    others: Tensor


def read_teacher(logits: Tensor, given: Given, tail: Tail) -> Teacher:
    """Checks what is given, takes the rows that count and completes their tails.

    Args:
        logits: [..., V].
        given: the tensors; under `tail="target"` with the token that follows, which gets the mass of the tail.
        tail: what becomes of the mass outside the candidates.

    Raises:
        InvalidInputError: something does not fit; see `forward_kl`.
        InvalidTypeError: a dtype that cannot be used.
    """
    _check_given(logits, given, tail)
    counts = (given.logprobs != -torch.inf).any(-1).reshape(-1)
    following = None if given.following is None else given.following.reshape(-1).long()
    rows = rows_where(counts if following is None else counts & (following >= 0), flat_mask(given.mask, logits))
    ids, logprobs = (x.flatten(0, -2)[rows] for x in (given.ids, given.logprobs))
    ids, logprobs = ids.long(), logprobs.to(working_dtype(logits))
    if ids.shape[1] == 0:
        ids, logprobs = functional.pad(ids, (0, 1)), functional.pad(logprobs, (0, 1), value=-torch.inf)
    width = logits.shape[-1]
    stored = None if given.tail is None else given.tail.reshape(-1)[rows]
    _check_candidates(ids, logprobs, width, stored, tail)
    others = width - (logprobs != -torch.inf).sum(1)
    mass = _tail(logprobs, stored)
    mass = mass.masked_fill(others == 0, -torch.inf)
    if following is not None:
        check_ids("target_next", following[rows], width)
        ids, logprobs = _give(ids, logprobs, mass, following[rows])
        mass = torch.full_like(mass, -torch.inf)
    best = logprobs.argmax(1, keepdim=True)
    ids = torch.where(logprobs > -torch.inf, ids, ids.gather(1, best))
    return Teacher(rows, ids, logprobs, mass, others)


def _tail(logprobs: Tensor, stored: Tensor | None) -> Tensor:
    """The stored tail, or where there is none what the candidates leave."""
    # In float64: a small tail is what float32 would lose of a sum near 1.
    derived = (1 - logprobs.double().exp().sum(1)).clamp(min=DERIVED_MASS).log().to(logprobs.dtype)
    return derived if stored is None else torch.where(stored.isnan(), derived, stored.to(derived.dtype))


def _give(ids: Tensor, logprobs: Tensor, tail: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates with the mass of the tail added to one token, which may be one of them or a new one."""
    own = (ids == token[:, None]) & (logprobs > -torch.inf)
    logprobs = torch.where(own, torch.logaddexp(logprobs, tail[:, None]), logprobs)
    new = tail.masked_fill(own.any(1), -torch.inf)
    return torch.cat([ids, token[:, None]], 1), torch.cat([logprobs, new[:, None]], 1)


def flat_mask(mask: Tensor | None, logits: Tensor) -> Tensor | None:
    """The mask as [N], checked."""
    if mask is None:
        return None
    check_tensor("mask", mask, logits.shape[:-1], "bool")
    return mask.reshape(-1)


def rows_where(counts: Tensor, mask: Tensor | None) -> Tensor:
    """int64 [M]: the rows that count and are in the mask."""
    return (counts if mask is None else counts & mask).nonzero()[:, 0]


def check_options(kind: Kind, tail: str, temperature: float, normalised: str) -> None:
    """Refuses options that are unknown, or make no sense together."""
    check_one_of("tail", tail, Tail)
    check_one_of("normalised", normalised, Normalised)
    if not 0 < temperature < math.inf:
        raise InvalidInputError(f"temperature={temperature} must be positive and finite")
    if normalised == "candidates" and tail != "renormalise":
        raise InvalidInputError(_NO_TAIL.format(tail=tail))
    if kind == "reverse_kl" and tail == "target":
        raise InvalidInputError(
            "reverse_kl with tail='target' is infinite: the teacher would be zero where the student never is. "
            "Use tail='ghost', or forward_kl, jensen_shannon or total_variation"
        )


def check_one_of(name: str, value: str, choices: Any) -> None:
    """Refuses a value that is none of a `Literal`'s."""
    if value not in get_args(choices):
        raise InvalidInputError(f"{name}={value!r} is not one of {', '.join(map(repr, get_args(choices)))}")


def check_chunk(chunk: int | None) -> None:
    """Refuses a chunk without positions."""
    if chunk is not None and chunk < 1:
        raise InvalidInputError(f"chunk={chunk}: at least one position must be computed at a time")


def check_logits(logits: Tensor) -> None:
    """Refuses what cannot be a student's logits."""
    if not isinstance(logits, Tensor):
        raise InvalidTypeError(f"logits are a {type(logits).__name__}; pass the tensor, such as model(...).logits")
    if not logits.is_floating_point():
        raise InvalidTypeError(f"logits are {logits.dtype}; they must be floating point")
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise InvalidInputError(f"logits have shape {list(logits.shape)}; they must be [B, T, V] or [N, V]")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], kind: Literal["int", "float", "bool"]) -> None:
    """Refuses another shape or kind of dtype."""
    found = "bool" if tensor.dtype == torch.bool else "float" if tensor.is_floating_point() else "int"
    if found != kind:
        raise InvalidTypeError(f"{name} is {tensor.dtype}; it must be of a kind of {kind}")
    if tensor.shape != shape:
        raise InvalidInputError(
            f"{name} has shape {list(tensor.shape)}, but {list(shape)} belongs to these logits and candidates"
        )


def check_ids(name: str, ids: Tensor, width: int) -> None:
    """Refuses token ids that the student has no logit for."""
    if ids.numel() == 0:
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    _check_range(name, low, high, width)


def check_support(teacher: Teacher, tail: str) -> None:
    """Refuses a reverse divergence from a teacher that gives no mass to entries where the student has some."""
    empty = (teacher.tail == -torch.inf) & (teacher.others > 0)
    if empty.any():
        raise InvalidInputError(
            f"reverse_kl with tail={tail!r} is infinite: target_tail is -inf at row {int(teacher.rows[empty][0])}, and "
            f"the student has mass there. Use tail='renormalise', or NaN for tails that are unknown"
        )


def _check_given(logits: Tensor, given: Given, tail: Tail) -> None:
    check_logits(logits)
    positions = logits.shape[:-1]
    check_tensor("target_ids", given.ids, (*positions, *given.ids.shape[-1:]), "int")
    check_tensor("target_logprobs", given.logprobs, given.ids.shape, "float")
    if given.tail is not None:
        check_tensor("target_tail", given.tail, positions, "float")
    if given.following is not None:
        check_tensor("target_next", given.following, positions, "int")
    elif tail == "target":
        raise InvalidInputError("tail='target' gives the tail to the token that follows: pass target_next")


def _check_candidates(ids: Tensor, logprobs: Tensor, width: int, stored: Tensor | None, tail: Tail) -> None:
    if ids.numel() == 0:
        return
    valid = logprobs != -torch.inf
    # Places without a candidate get different ids, so that they are none twice.
    distinct = torch.where(valid, ids, -1 - torch.arange(ids.shape[1], device=ids.device)).sort(1).values
    facts = (
        ids.masked_fill(~valid, 0).amin(),
        ids.masked_fill(~valid, 0).amax(),
        (distinct[:, 1:] == distinct[:, :-1]).any(),
        ~(logprobs < torch.inf).all(),
        (logprobs.exp().sum(1) > MOST_MASS).any(),
        ids.new_zeros(()) if stored is None else (stored == torch.inf).any(),
    )
    low, high, twice, undefined, heavy, ratios = torch.stack([fact.long() for fact in facts]).tolist()
    _check_range("target_ids", low, high, width)
    if twice:
        raise InvalidInputError("target_ids has an id twice at one position: add up the probabilities of the two first")
    if undefined:
        raise InvalidInputError("target_logprobs has NaN or inf; where there is no candidate it must be -inf")
    if ratios and tail != "renormalise":
        raise InvalidInputError(_NO_TAIL.format(tail=tail))
    if heavy and tail != "renormalise":
        raise InvalidInputError(
            "target_logprobs has a position with probabilities that sum to over 1.1: these are no logprobs normalised "
            "over the vocabulary. Logits need normalised='candidates' and tail='renormalise'"
        )


def _check_range(name: str, low: int, high: int, width: int) -> None:
    if low < 0 or high >= width:
        raise InvalidInputError(
            f"{name} has id {low if low < 0 else high}, but the student's logits are {width} wide: its vocabulary is "
            f"too small, or is another one than the teacher's. Train a student with the tokenizer of the dataset, and "
            f"with embeddings as wide as the dataset's logit_width"
        )
