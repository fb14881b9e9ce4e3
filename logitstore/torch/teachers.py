"""Several teachers of the same sequences, combined into one: the weighted mixture of their distributions.

The mixture of teachers i with weights w_i, which sum to 1, is p(x) = sum_i w_i p_i(x). A teacher that did not store x
is known only by bounds: p_i(x) is at least 0, and at most exp(tail_i), and at most the probability of its faintest
candidate, since candidates are the most likely tokens. The lower bound is taken, so what is stored of p(x) is never too
much; the mass in doubt stays in the tail, and how much that may be is reported as `mixture_slack`.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.errors import InvalidInputError, InvalidTypeError, LogitStoreWarning
from logitstore.limits import ID_LIMIT
from logitstore.shard.sequence import Sequence
from logitstore.torch.pack import lengths_of
from logitstore.torch.source import Samples, as_samples, common_temperature, expect, is_remote

Missing = Literal["none", "skip"]

SLACK: Final = "mixture_slack"
"""Name of the column float32 [T]: the most that is missing from the stored candidates, all together; NaN where there is
no distribution."""

_DRAWS: Final = (
    "teacher {number} holds draws of a sampled distribution; nothing bounds the probability of a token that was not "
    "drawn, so it cannot be mixed. Use a capture of the top candidates"
)

_VERSION: Final = 1


class Teachers:
    """The mixture of several teachers; it is `Samples` itself, a sample being the mixture of one row of each.

    All teachers have the same sequences in the same order: that is checked of each sample when it is read. A sample
    has the candidates that any teacher stored, best first by the probability that is known; `tail`, the log of the rest
    of the mass; `target_logprob` where every teacher knows it; and in `columns`, beside those of the first teacher,
    `mixture_slack` float32 [T]: with s for it, the mixture's p(x) lies in [stored, stored + s] for every candidate, and
    the mass outside the candidates in [exp(tail) - s, exp(tail)], both up to the rounding of what was stored.
    `loss_mask` is 0 where that of any teacher is 0, and 1 where that of any other is 1. What is not determined by the
    parts (`draws`, `logits`, `target_rank`, `logsumexp`, `entropy`) is None.

    Args:
        samples: the teachers, at least one: paths, datasets or `Samples`.
        weights: positive, one a teacher; they are divided by their sum. None: all alike.
        k: candidates that are kept of each position; the mass of the others goes to the tail.
        missing: of a position at which some teacher has no distribution: `none` gives none there either; `skip` mixes
            the other teachers, with their weights divided by their sum.

    Raises:
        InvalidInputError: there are no teachers; the weights do not fit; the teachers have different numbers of
            sequences or different tokenizers; or one is normalised over its candidates only.
        InvalidTypeError: `missing` is none of the two.
    """

    def __init__(
        self,
        samples: SequenceOf[Any],
        weights: SequenceOf[float] | None = None,
        *,
        k: int | None = None,
        missing: Missing = "none",
    ) -> None:
        if missing not in get_args(Missing):
            raise InvalidTypeError(f"missing={missing!r}; give one of {', '.join(map(repr, get_args(Missing)))}")
        if k is not None and k < 1:
            raise InvalidInputError(f"k is {k}; a number from 1 is needed, or None")
        if isinstance(samples, (str, os.PathLike)):
            raise InvalidTypeError(f"{os.fspath(samples)!r} is one teacher; give a list of them")
        samples = tuple(map(as_samples, samples))
        _check_alike(samples)
        self.temperature = common_temperature(samples)
        self.samples = samples
        self.weights = _checked_weights(weights, len(samples))
        self.k = k
        self.missing = missing
        told = [each.digest for each in samples], [weight.hex() for weight in self.weights], k, missing
        self.digest = hashlib.sha256(f"logitstore teachers {_VERSION}:{told}".encode()).hexdigest()
        self.tokenizer_digest = next(filter(None, (each.tokenizer_digest for each in samples)), None)
        self.logit_width = _highest([each.logit_width for each in samples])
        self.highest_id = _highest([getattr(each, "highest_id", None) for each in samples])
        self.normalised = "vocabulary"
        self.remote = any(map(is_remote, samples))

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.samples[0])

    def lengths(self) -> NDArray[np.uint32]:
        """uint32 [sequences]: positions of each."""
        return lengths_of(self.samples[0])

    def expect(self, rows: SequenceOf[int]) -> None:
        """Start fetching rows that will be read soon."""
        for each in self.samples:
            expect(each, rows)

    def __getitem__(self, row: int) -> Sequence:
        """The mixture of one sequence.

        Raises:
            InvalidInputError: the teachers' sequences differ, or one holds draws.
            CorruptDataError: a sequence's bytes are not what was written.
        """
        sequences = [each[row] for each in self.samples]
        _check_same(sequences, row)
        return mixture(sequences, self.weights, k=self.k, missing=self.missing)


def mixture(
    sequences: SequenceOf[Sequence], weights: SequenceOf[float], *, k: int | None = None, missing: Missing = "none"
) -> Sequence:
    """The mixture of several teachers' distributions of one sequence; see `Teachers`.

    Args:
        sequences: of the same tokens, T of them, one a teacher.
        weights: one a teacher, of the sum 1.
        k: candidates that are kept of each position.
        missing: what to do where a teacher has no distribution.
    """
    first = sequences[0]
    present = np.stack([sequence.count > 0 for sequence in sequences])
    share = _shares(present, np.asarray(weights, np.float64), missing)
    tails = np.stack([_tail_mass(sequence) for sequence in sequences])
    union = _union(sequences, share)
    kept = union if k is None else union.best(k)
    outside = (share * tails).sum(axis=0) + (union.row_mass() - kept.row_mass())
    slack = _slack(sequences, share, tails, kept)
    some = share.sum(axis=0) > 0
    with np.errstate(divide="ignore"):
        tail = np.where(some, np.log(np.maximum(outside, 0)), np.nan)
        logprobs = np.log(kept.mass)
    return Sequence(
        id=first.id,
        tokens=first.tokens,
        count=kept.count.astype(np.uint32),
        offsets=ragged.offsets(kept.count),
        ids=kept.ids.astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        draws=None,
        logits=None,
        tail=tail.astype(np.float32),
        target_logprob=_target_logprob(sequences, share),
        target_rank=None,
        logsumexp=None,
        entropy=None,
        loss_mask=_loss_mask(sequences),
        columns={**vars(first).get("columns", {}), SLACK: np.where(some, slack, np.nan).astype(np.float32)},
        normalised="vocabulary",
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Union:
    """The candidates of all teachers, position by position, most likely first.

    Attributes:
        count: int64 [T].
        ids: int64 [N].
        mass: float64 [N], the known part of the mixture's probability.
        stored: bool [N, teachers], the teacher has stored this candidate.
    """

    count: NDArray[np.int64]
    ids: NDArray[np.int64]
    mass: NDArray[np.float64]
    stored: NDArray[np.bool_]

    def row_mass(self) -> NDArray[np.float64]:
        return ragged.row_sums(self.mass, self.count)

    def best(self, k: int) -> _Union:
        kept = ragged.ranks(self.count) < k
        return _Union(np.minimum(self.count, k), self.ids[kept], self.mass[kept], self.stored[kept])


def _union(sequences: SequenceOf[Sequence], share: NDArray[np.float64]) -> _Union:
    """The union of the candidates of the teachers that have a share in the position."""
    keys, masses, teachers = [], [], []
    for number, (sequence, its_share) in enumerate(zip(sequences, share, strict=True)):
        mass = np.exp(sequence.logprobs, dtype=np.float64) * ragged.spread(its_share, sequence.count)
        used = mass > 0
        keys.append((ragged.rows(sequence.count) * ID_LIMIT + sequence.ids)[used])
        masses.append(mass[used])
        teachers.append(np.full(len(keys[-1]), number))
    key, mass, teacher = np.concatenate(keys), np.concatenate(masses), np.concatenate(teachers)
    order = np.argsort(key, kind="stable")
    key = key[order]
    new = np.append(True, key[1:] != key[:-1])[: len(key)]
    key, starts = key[new], np.flatnonzero(new)
    total = np.add.reduceat(mass[order], starts) if len(starts) else mass
    stored = np.zeros((len(key), len(sequences)), np.bool_)
    stored[np.cumsum(new) - 1, teacher[order]] = True
    count = np.bincount(key // ID_LIMIT, minlength=share.shape[1])
    best = _best_first(total, count)
    return _Union(count, (key % ID_LIMIT)[best], total[best], stored[best])


def _best_first(mass: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the values of each row stand when the largest comes first; equal ones stay in order."""
    widest = int(count.max(initial=0))
    listed = np.arange(widest) < count[:, None]
    rectangle = np.full(listed.shape, np.inf)
    rectangle[listed] = -mass
    order = np.argsort(rectangle, axis=1, kind="stable")
    return np.asarray((order + ragged.offsets(count)[:-1, None])[listed])


def _shares(present: NDArray[np.bool_], weights: NDArray[np.float64], missing: Missing) -> NDArray[np.float64]:
    """float64 [teachers, T]: the weight of each teacher at each position, all 0 where there is no mixture."""
    share = weights[:, None] * present
    if missing == "none":
        return np.asarray(share * present.all(axis=0))
    total = share.sum(axis=0)
    return np.asarray(np.divide(share, total, out=np.zeros_like(share), where=total > 0))


def _tail_mass(sequence: Sequence) -> NDArray[np.float64]:
    """float64 [T]: the mass that the candidates do not cover; where no tail is stored, what they leave of 1."""
    known = np.exp(sequence.tail, dtype=np.float64)
    if not np.isnan(known[sequence.count > 0]).any():
        return np.where(sequence.count > 0, known, 0)
    rest = 1 - ragged.row_sums(np.exp(sequence.logprobs, dtype=np.float64), sequence.count)
    return np.where(np.isnan(known), np.maximum(rest, 0), known) * (sequence.count > 0)


def _slack(
    sequences: SequenceOf[Sequence], share: NDArray[np.float64], tails: NDArray[np.float64], union: _Union
) -> NDArray[np.float64]:
    """float64 [T]: the most that the candidates lack: sum_i w_i min(missing_i exp(faintest_i), exp(tail_i))."""
    slack = np.zeros(share.shape[1])
    for number, sequence in enumerate(sequences):
        lacking = ragged.row_sums(~union.stored[:, number], union.count)
        faintest = np.zeros(len(slack))
        faintest[sequence.count > 0] = np.exp(ragged.lasts(sequence.logprobs, sequence.count), dtype=np.float64)
        slack += share[number] * np.minimum(lacking * np.minimum(faintest, tails[number]), tails[number])
    return slack


def _target_logprob(sequences: SequenceOf[Sequence], share: NDArray[np.float64]) -> NDArray[np.float32] | None:
    """float32 [T]: of the mixture, NaN where a teacher that has a share does not know its own; None where none does."""
    given = [vars(sequence).get("target_logprob") for sequence in sequences]
    if all(each is None for each in given):
        return None
    mass = np.zeros(share.shape[1])
    for each, its_share in zip(given, share, strict=True):
        own = np.full(len(mass), np.nan) if each is None else np.exp(each, dtype=np.float64)
        mass += np.where(its_share > 0, its_share * own, 0)
    with np.errstate(divide="ignore"):
        return np.where(share.any(axis=0), np.log(mass), np.nan).astype(np.float32)


def _loss_mask(sequences: SequenceOf[Sequence]) -> NDArray[np.int8] | None:
    masks = [sequence.loss_mask for sequence in sequences if sequence.loss_mask is not None]
    if not masks:
        return None
    every = np.stack(masks)
    return np.where((every == 0).any(axis=0), 0, every.max(axis=0)).astype(np.int8)


def _checked_weights(weights: SequenceOf[float] | None, teachers: int) -> tuple[float, ...]:
    values = np.asarray([1.0] * teachers if weights is None else list(weights), np.float64)
    if values.shape != (teachers,):
        raise InvalidInputError(f"{len(values)} weights for {teachers} teachers; give one a teacher")
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise InvalidInputError(f"the weights are {values.tolist()}; positive numbers are needed")
    return tuple((values / values.sum()).tolist())


def _highest(values: list[int | None]) -> int | None:
    """The highest, None where one is not known."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _check_alike(samples: SequenceOf[Samples]) -> None:
    if not samples:
        raise InvalidInputError("there are no teachers; give at least one")
    lengths = [len(each) for each in samples]
    if len(set(lengths)) > 1:
        raise InvalidInputError(
            f"the teachers have {', '.join(map(str, lengths))} sequences; the same sequences in the same order are "
            f"needed: capture the missing ones, or take a view of those that all have"
        )
    for number, each in enumerate(samples):
        if each.normalised != "vocabulary":
            raise InvalidInputError(
                f"teacher {number} is normalised over its {each.normalised}: only ratios of its probabilities are "
                f"known, and these cannot be mixed with another teacher's; capture it with logprobs over the vocabulary"
            )
        if getattr(each, "sampled", False):
            raise InvalidInputError(_DRAWS.format(number=number))
    digests = {each.tokenizer_digest for each in samples}
    if len(digests - {None}) > 1:
        raise InvalidInputError(
            f"the teachers have different tokenizers ({', '.join(str(each.tokenizer_digest) for each in samples)}): a "
            f"token id does not mean the same to them; only teachers of one tokenizer can be mixed"
        )
    if None in digests and len(samples) > 1:
        unknown = [str(number) for number, each in enumerate(samples) if each.tokenizer_digest is None]
        warnings.warn(
            f"the tokenizer of teacher {', '.join(unknown)} is not known: that all teachers have the same one can only "
            f"be seen from the input tokens",
            LogitStoreWarning,
            stacklevel=3,
        )


def _check_same(sequences: SequenceOf[Sequence], row: int) -> None:
    first = sequences[0]
    for number, sequence in enumerate(sequences):
        if sequence.id != first.id:
            raise InvalidInputError(
                f"row {row}: teacher 0 has the sequence {first.id!r}, teacher {number} has {sequence.id!r}; the same "
                f"sequences in the same order are needed"
            )
        if not np.array_equal(sequence.tokens, first.tokens):
            raise InvalidInputError(
                f"sequence {first.id!r}: {_difference(first.tokens, sequence.tokens, number)}. The same sequences are "
                f"needed; packs of datasets differ, so mix first and pack the mixture: Packed(Teachers(...))"
            )
        if vars(sequence).get("draws") is not None:
            raise InvalidInputError(f"sequence {first.id!r}: {_DRAWS.format(number=number)}")


def _difference(first: NDArray[Any], other: NDArray[Any], number: int) -> str:
    both = min(len(first), len(other))
    differs = first[:both] != other[:both]
    if differs.any():
        at = int(np.argmax(differs))
        return f"at position {at} the token of teacher 0 is {first[at]}, that of teacher {number} is {other[at]}"
    return (
        f"teacher 0 has {len(first)} tokens, teacher {number} has {len(other)}; they are the same up to position {both}"
    )
