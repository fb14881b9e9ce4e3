"""A decoded sequence: what a reader hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from logitstore.encoding import ragged
from logitstore.errors import NotSelectedError

SEQUENCE_COLUMNS: Final = (
    "tokens",
    "count",
    "ids",
    "logprobs",
    "draws",
    "logits",
    "tail",
    "target_logprob",
    "target_rank",
    "logsumexp",
    "entropy",
    "loss_mask",
)
"""The columns of every dataset, by the names of the attributes of `Sequence`."""

DEFAULT_COLUMNS: Final = frozenset(SEQUENCE_COLUMNS) - {"logits"}
"""What is decoded unless `Dataset.select` says otherwise: `logits` repeat what `logprobs` and `logsumexp` say."""


@dataclass(frozen=True, eq=False, repr=False)
class Sequence:
    """One sequence: tokens, and at each position t the distribution of the token at t + 1.

    T positions; N candidates in all, position by position, best first. The candidates of position t are
    `[offsets[t]:offsets[t + 1]]` of the flat arrays.

    Attributes:
        id: unique in the dataset.
        tokens: uint32 [T].
        count: uint32 [T], candidates of each position.
        offsets: int64 [T + 1].
        ids: int32 [N].
        logprobs: float32 [N], nats; for sampled distributions log(draws / sum of draws).
        draws: int32 [N], how often each was drawn; None unless the distributions were sampled.
        logits: float32 [N], the bfloat16 logits, up to one constant a position where they were found from logprobs;
            None where the values are not bfloat16. Not decoded unless selected.
        tail: float32 [T], log of the probability that the candidates do not cover; NaN where there is none.
        target_logprob: float32 [T], logprob of tokens[t + 1]; NaN where unknown; None when not stored.
        target_rank: int64 [T], its rank from 1; 0 where unknown; None when not stored.
        logsumexp: float32 [T], of the logits; NaN where unknown; None when not stored.
        entropy: float32 [T], nats over the whole vocabulary; NaN where unknown; None when not stored.
        loss_mask: int8 [T], 1 where row t is trained on, 0 where not, -1 where unknown; None when not stored.
        columns: the user's columns.
        normalised: over what the probabilities sum to one, `vocabulary` or `candidates`; with the latter only their
            ratios are known.
    """

    id: str
    tokens: NDArray[np.uint32]
    count: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    draws: NDArray[np.int32] | None
    logits: NDArray[np.float32] | None
    tail: NDArray[np.float32]
    target_logprob: NDArray[np.float32] | None
    target_rank: NDArray[np.int64] | None
    logsumexp: NDArray[np.float32] | None
    entropy: NDArray[np.float32] | None
    loss_mask: NDArray[np.int8] | None
    columns: dict[str, Any]
    normalised: str

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """A sequence with some of the fields; touching another one raises `NotSelectedError`."""
        sequence = object.__new__(cls)
        sequence.__dict__.update(fields)
        return sequence

    def __getattr__(self, name: str) -> Any:
        if name in self.__dataclass_fields__:
            raise NotSelectedError(
                f"the column {name!r} was not selected; these were: {', '.join(sorted(self.__dict__))}. "
                f"Name it in Dataset.select(columns=[...])"
            )
        raise AttributeError(f"a Sequence has no attribute {name!r}")

    def __repr__(self) -> str:
        fields = [f"id={self.id!r}"]
        for name, value in self.__dict__.items():
            if isinstance(value, np.ndarray):
                fields.append(f"{name}={value.dtype}{list(value.shape)}")
        return f"Sequence({', '.join(fields)})"

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.tokens) if "tokens" in self.__dict__ else len(self.count)

    def dense(
        self, k: int, fill_id: int = 0, fill_logprob: float = -np.inf
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best k candidates of each position as a rectangle; logprobs may be a view of the sequence's own.

        Args:
            k: width; positions with more candidates lose the last ones, others are filled up.
            fill_id: id where there is no candidate.
            fill_logprob: logprob there, nats.

        Returns:
            (ids int64 [T, k], logprobs float32 [T, k]).
        """
        if k > 0 and ragged.uniform(self.count) == k:
            return self.ids.reshape(-1, k).astype(np.int64), self.logprobs.reshape(-1, k)
        ids = np.full((len(self.count), k), fill_id, np.int64)
        logprobs = np.full((len(self.count), k), fill_logprob, np.float32)
        rank = ragged.ranks(self.count)
        kept = rank < k
        at = (ragged.rows(self.count)[kept], rank[kept])
        ids[at] = self.ids[kept]
        logprobs[at] = self.logprobs[kept]
        return ids, logprobs
