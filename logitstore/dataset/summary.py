"""What a writer wrote, counted and measured as it goes; and what shards hold, counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from logitstore.dataset.alignment import Alignment
from logitstore.dataset.input import Candidates
from logitstore.encoding import ragged
from logitstore.encoding.values import Encoding, Values, decode_values
from logitstore.schema import Totals
from logitstore.schema.journal import Sums
from logitstore.shard.chunk import OPTIONAL_TYPES
from logitstore.shard.reader import Shard

MEASURED: Final = 16
"""What rounding cost is measured on one sequence of so many: decoding all of them would slow writing down."""


@dataclass(slots=True)
class Summary:
    """What was written, and what rounding cost.

    Attributes:
        sequences: number of sequences.
        positions: number of positions.
        candidates: number of candidates.
        bytes: size of the shards that are complete.
        encodings: sequences under each encoding.
        columns: sequences that have each optional column.
        highest_id: highest candidate id, -1 where there are none.
        max_error: largest difference of a decoded logprob to the one given, nats, in every 16th sequence.
        kl_sum: sum of KL(given ‖ decoded) over their positions, both renormalised over the candidates, nats.
        kl_positions: positions in that sum.
        alignment: whether rows seem to be where they should be; of what `add` and `add_logits` were given.
    """

    sequences: int = 0
    positions: int = 0
    candidates: int = 0
    bytes: int = 0
    encodings: dict[str, int] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    highest_id: int = -1
    max_error: float = 0.0
    kl_sum: float = 0.0
    kl_positions: int = 0
    alignment: Alignment = field(default_factory=Alignment)

    @property
    def bytes_per_position(self) -> float:
        """Bytes of the shards over positions."""
        return self.bytes / max(1, self.positions)

    @property
    def mean_kl(self) -> float:
        """Mean KL(given ‖ decoded), nats."""
        return self.kl_sum / max(1, self.kl_positions)

    def count(self, positions: int, ids: NDArray[np.uint32], values: Values, columns: list[str]) -> None:
        """Count one sequence."""
        self.sequences += 1
        self.positions += positions
        self.candidates += len(ids)
        self.highest_id = max(self.highest_id, int(ids.max()) if len(ids) else -1)
        label = values.encoding.label
        self.encodings[label] = self.encodings.get(label, 0) + 1
        for column in columns:
            self.columns[column] = self.columns.get(column, 0) + 1

    def measure(self, given: Candidates, values: Values, resolution: float) -> None:
        """Measure what rounding cost, by decoding the first sequence of every sixteen."""
        if (self.sequences - 1) % MEASURED or len(given.ids) == 0:
            return
        self.kl_positions += int(np.count_nonzero(given.count))
        if values.encoding is Encoding.FLOAT32:
            return
        decoded = decode_values(values.encoding, values.top, values.gaps, given.count, resolution, values.logsumexp)
        exact = given.logprobs.astype(np.float64)
        error = exact - decoded
        self.max_error = max(self.max_error, float(np.abs(error).max()))
        weight = np.exp(exact)
        sums = ragged.row_sums(weight, given.count)
        scored = sums > 0  # not where candidates are all so improbable that this underflows
        # sum p (log p - log q), p and q renormalised: the weighted error, and the change of the normaliser.
        shift = ragged.row_sums(weight * error, given.count)[scored] / sums[scored]
        moved = ragged.row_sums(weight * np.exp(-error), given.count)[scored] / sums[scored]
        self.kl_sum += float((shift + np.log(moved)).sum())

    def sums(self) -> Sums:
        """As the journal of a part has them."""
        return Sums(
            sequences=self.sequences,
            positions=self.positions,
            candidates=self.candidates,
            encodings=dict(self.encodings),
            columns=dict(self.columns),
            highest_id=self.highest_id,
            max_error=self.max_error,
            kl_sum=self.kl_sum,
            kl_positions=self.kl_positions,
            hits=tuple(self.alignment.hits.tolist()),
            scored=self.alignment.scored,
        )

    @classmethod
    def of(cls, sums: Sums) -> Summary:
        """The inverse of `sums`; bytes are not among them."""
        return cls(
            sequences=sums.sequences,
            positions=sums.positions,
            candidates=sums.candidates,
            encodings=dict(sums.encodings),
            columns=dict(sums.columns),
            highest_id=sums.highest_id,
            max_error=math.nan if sums.max_error is None else sums.max_error,
            kl_sum=math.nan if sums.kl_sum is None else sums.kl_sum,
            kl_positions=sums.kl_positions,
            alignment=Alignment(np.array(sums.hits, np.int64), sums.scored),
        )

    @classmethod
    def of_totals(cls, totals: Totals) -> Summary:
        """The inverse of `totals`; what rounding cost is not among them."""
        return cls(
            sequences=totals.sequences,
            positions=totals.positions,
            candidates=totals.candidates,
            bytes=totals.bytes,
            encodings=dict(totals.encodings),
            columns=dict(totals.columns),
            highest_id=-1 if totals.highest_id is None else totals.highest_id,
        )

    def totals(self, shards: int, size: int) -> Totals:
        """As the manifest has them.

        Args:
            shards: how many there are.
            size: of them, in bytes.
        """
        return Totals(
            shards=shards,
            sequences=self.sequences,
            positions=self.positions,
            candidates=self.candidates,
            bytes=size,
            highest_id=self.highest_id if self.highest_id >= 0 else None,
            encodings=dict(self.encodings),
            columns=dict(self.columns),
        )


def add_totals(totals: Iterable[Totals]) -> Totals:
    """The totals of several datasets, or parts of one, together."""
    many = list(totals)
    encodings: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    for each in many:
        encodings.update(each.encodings)
        columns.update(each.columns)
    return Totals(
        shards=sum(each.shards for each in many),
        sequences=sum(each.sequences for each in many),
        positions=sum(each.positions for each in many),
        candidates=sum(each.candidates for each in many),
        bytes=sum(each.bytes for each in many),
        highest_id=max((each.highest_id for each in many if each.highest_id is not None), default=None),
        encodings=dict(encodings),
        columns=dict(columns),
    )


def tally(shards: Iterable[Shard]) -> Summary:
    """Count what shards hold, as a manifest's totals do: reads every chunk, and decodes the ids alone.

    Raises:
        CorruptDataError: a shard is damaged.
    """
    summary = Summary()
    for shard in shards:
        summary.bytes += shard.tail.file_bytes
        for number in range(len(shard.index)):
            chunk = shard.chunk(number)
            for place in range(len(chunk)):
                for name in OPTIONAL_TYPES:
                    if chunk.cells[name][place].as_buffer().size:
                        summary.columns[name] = summary.columns.get(name, 0) + 1
                label = chunk.encoding(place).label
                summary.encodings[label] = summary.encodings.get(label, 0) + 1
                sequence = chunk.sequence(place, frozenset(["ids"]))
                summary.sequences += 1
                summary.positions += len(sequence.count)
                summary.candidates += len(sequence.ids)
                summary.highest_id = max(summary.highest_id, int(sequence.ids.max()) if len(sequence.ids) else -1)
    return summary
