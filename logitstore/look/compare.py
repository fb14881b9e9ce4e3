"""Two datasets over the same sequences: where two teachers, or two encodings of one, differ, and by how much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from logitstore.dataset.reader import Dataset
from logitstore.errors import InvalidInputError
from logitstore.look.alike import check_tokenizers
from logitstore.look.calibration import Calibration
from logitstore.look.compared import GROUPS, SPREADS, Compared, Difference, Match, Sums, Task, compare_part
from logitstore.look.parts import all_parts
from logitstore.look.summaries import Moments, Spread
from logitstore.processes import each

_LISTED: Final = 50  # groups, those with the most positions


@dataclass(frozen=True, slots=True)
class Means:
    """The sums over their positions; None where nothing is known. Divergences in nats."""

    positions: int
    kl_ab: float | None
    kl_ba: float | None
    jsd: float | None
    jsd_at_most: float | None
    shared_a: float | None
    shared_b: float | None
    agree: float
    overlap: float
    identical: int

    @classmethod
    def of(cls, sums: Sums) -> Means:
        """Of at least one position."""
        n, known = sums.positions, sums.divergences
        names = ("kl_ab", "kl_ba", "jsd", "jsd_at_most", "shared_a", "shared_b")
        return cls(
            positions=n,
            **{name: getattr(sums, name) / known if known else None for name in names},
            agree=sums.agree / n,
            overlap=sums.overlap / n,
            identical=sums.identical,
        )


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two, at positions where both have a distribution.

    Attributes:
        name: of the dataset.
        teacher: None where it is not known.
        sequences: in the dataset.
        entropy: mean, nats, over the candidates that both have and the rest as one class: alike for both.
        accuracy: share of real next tokens that are the best candidate.
        cross_entropy: mean of -logprob of the real next token, nats, where both know it; None where there is none.
        calibration: the best candidate's probability against how often it is the real next token, by tenths.
        calibration_error: the mean difference of the two.
    """

    name: str
    teacher: str | None
    sequences: int
    entropy: float | None
    accuracy: float | None
    cross_entropy: float | None
    calibration: Calibration
    calibration_error: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two datasets differ as they are stored. KL and JSD are lower bounds, see `logitstore.look.pairs`.

    Attributes:
        a: the first.
        b: the second.
        sequences: compared.
        positions: compared: both have a distribution, and all tokens up to there are the same.
        only_a: sequences that only a has.
        only_b: that only b has.
        differing: sequences whose tokens differ from some position on; what comes before is compared.
        first_differing: (id, position) of the first of them.
        means: over all positions.
        kl_ab: spread of KL(a ‖ b), nats; None where the mass outside the candidates is not known.
        kl_ba: likewise, of KL(b ‖ a).
        jsd: likewise, of the Jensen-Shannon divergence.
        logprobs_moved: mean |difference of logprobs| of the shared candidates, nats.
        logprobs_moved_at_most: the greatest.
        groups: means by value of the column asked for, most positions first, at most fifty.
        differences: the positions where the two differ most, by jsd.
        notes: what one should know.
    """

    a: Side
    b: Side
    sequences: int
    positions: int
    only_a: int
    only_b: int
    differing: int
    first_differing: tuple[str, int] | None
    means: Means
    kl_ab: Spread | None
    kl_ba: Spread | None
    jsd: Spread | None
    logprobs_moved: float | None
    logprobs_moved_at_most: float | None
    groups: dict[str, Means]
    differences: list[Difference]
    notes: list[str]


def compare(
    a: Dataset,
    b: Dataset,
    *,
    by: str | None = None,
    match: Match = "id",
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare two datasets over the same sequences.

    Args:
        a: a dataset, or a view of one.
        b: likewise.
        by: a user's column of a; figures are broken down by its values.
        match: how sequences are matched: by `id`, or by `row` where ids were lost on the way.
        workers: processes that read; 0: this one. The figures are the same.
        progress: called with (sequences of a done, sequences of a).

    Raises:
        InvalidInputError: their tokenizers differ, nothing is there to compare, there is no such column, or it has too
            many values; or a worker was killed.
        CorruptDataError: a chunk's bytes are not what was written.
    """
    notes = _check(a, b, by)
    task = Task(a, b, match, by)
    found = Compared()
    for one in each(compare_part, task, all_parts(a), workers):
        found += one
        if len(found.groups) > GROUPS:
            raise InvalidInputError(f"the column {by!r} has over {GROUPS:,} values; break down by one that has fewer")
        if progress is not None:
            progress(found.matched + found.missing, len(a))
    if not found.total.positions:
        raise InvalidInputError(_nothing(a, b, found, match))
    if not found.total.divergences:
        notes.append(
            "KL and JSD are unknown: they need the probability outside the candidates, which is not known of sampled "
            "distributions and of those normalised over the candidates"
        )
    if found.impossible:
        notes.append(
            f"{found.impossible:,} positions hold impossible numbers and are left out; see logitstore validate --deep"
        )
    spreads = [Spread.of(found.spreads[name]) for name in SPREADS]
    groups = sorted(found.groups.items(), key=lambda item: (-item[1].positions, item[0]))[:_LISTED]
    return Comparison(
        a=_side(a, found.calibrations[0], found.entropies[0]),
        b=_side(b, found.calibrations[1], found.entropies[1]),
        sequences=found.sequences,
        positions=found.total.positions,
        only_a=found.missing,
        only_b=len(b) - found.matched,
        differing=found.differing,
        first_differing=found.first_differing[0] if found.first_differing else None,
        means=Means.of(found.total),
        kl_ab=spreads[0],
        kl_ba=spreads[1],
        jsd=spreads[2],
        logprobs_moved=found.moved.mean,
        logprobs_moved_at_most=found.moved.greatest if found.moved.n else None,
        groups={name: Means.of(sums) for name, sums in groups},
        differences=found.differences,
        notes=notes,
    )


def _side(dataset: Dataset, calibration: Calibration, entropy: Moments) -> Side:
    teacher = dataset.info.teacher
    return Side(
        name=dataset.name,
        teacher=None if teacher is None else teacher.name,
        sequences=len(dataset),
        entropy=entropy.mean,
        accuracy=calibration.accuracy,
        cross_entropy=calibration.surprise / calibration.known if calibration.known else None,
        calibration=calibration,
        calibration_error=calibration.error,
    )


def _check(a: Dataset, b: Dataset, by: str | None) -> list[str]:
    """What has to be said of the two; refuses those that cannot be compared."""
    known = check_tokenizers(a, b)
    if by is not None and by not in a.info.user_columns:
        names = ", ".join(map(repr, a.info.user_columns)) or "none"
        raise InvalidInputError(f"{a.name} has no column {by!r} of its own; it has: {names}")
    notes = []
    if not known:
        notes.append("a tokenizer is unknown: whether the two are the same was not checked")
    for name in ("normalised", "temperature"):
        both = [getattr(dataset.info, name) for dataset in (a, b)]
        if both[0] != both[1]:
            notes.append(f"{name} differs: {both[0]} and {both[1]}")
    return notes


def _nothing(a: Dataset, b: Dataset, found: Compared, match: Match) -> str:
    if not found.matched:
        advice = "; match='row' (--match row) takes them in order" if match == "id" else ""
        return f"no sequence of {a.name} is in {b.name}: they are matched by {match}{advice}"
    if found.first_differing:
        name, position = found.first_differing[0]
        return (
            f"no position can be compared: tokens of the two differ from the start, as in the sequence {name!r} from "
            f"position {position} on; these are other texts, or other tokenizers"
        )
    return f"no position has a distribution in both {a.name} and {b.name}"
