"""Where training stands: a small versioned state, and the batches that follow from it. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from logitstore.errors import InvalidInputError, UnsupportedVersionError

VERSION: Final = 1

_STREAM_MARK: Final = "logitstore_stream"
_TORCHDATA_STEPS: Final = "_steps_since_snapshot"


class State(msgspec.Struct, frozen=True, kw_only=True):
    """Where training stands, the same on every rank: it knows nothing of ranks, workers, batch sizes or paths.

    Attributes:
        version: of this form.
        digest: of the source: the dataset and the rules of its order.
        seed: of the order.
        epoch: of the next sample, from 0; it follows from the position and is there to be read.
        position: samples that were used since the beginning, over all ranks.
    """

    version: Literal[1] = VERSION
    digest: str
    seed: int
    epoch: Annotated[int, Meta(ge=0)]
    position: Annotated[int, Meta(ge=0, le=2**53)]

    def to_dict(self) -> dict[str, Any]:
        """The state as a plain dict, ready for JSON."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields

    @classmethod
    def from_dict(cls, fields: Any) -> State:
        """The inverse of `to_dict`; fields that it does not know are ignored.

        Raises:
            UnsupportedVersionError: a later release wrote it.
            InvalidInputError: it is no state.
        """
        version = fields.get("version") if isinstance(fields, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise UnsupportedVersionError(
                f"a state of version {version}; this release reads version {VERSION}: install a later logitstore"
            )
        try:
            return msgspec.convert(fields, cls)
        except msgspec.ValidationError as error:
            raise InvalidInputError(
                f"this is no state of a loader: {error}. Give what its state_dict() returned; what torchdata's "
                f"StatefulDataLoader returned, give to that, or first to logitstore.torch.global_state"
            ) from error

    def check(self, digest: str, seed: int, samples: int) -> None:
        """Refuse to go on with another order than the one the state was made in.

        Args:
            digest: of the source that is there now.
            seed: of the loader that is there now.
            samples: of an epoch.

        Raises:
            InvalidInputError: another dataset, order or seed, or an edited state.
        """
        if self.digest != digest:
            raise InvalidInputError(
                f"the state is of another dataset, view, mixture or kind of shuffling: it says {self.digest}, here is "
                f"{digest}. Open what it was made with, or start anew without the state"
            )
        if self.seed != seed:
            raise InvalidInputError(
                f"the state was made with seed={self.seed}, here it is {seed}; give seed={self.seed} to go on in the "
                f"same order, or start anew without the state"
            )
        if self.epoch != self.position // samples:
            raise InvalidInputError(
                f"the state says epoch {self.epoch}, but position {self.position} of {samples} samples an epoch is in "
                f"epoch {self.position // samples}: it was edited; take set_epoch() or skip() to start elsewhere"
            )


@dataclass(frozen=True)
class Plan:
    """The global batches of one iteration: which positions each of them covers.

    An iteration ends where the epochs are full: with `epochs` E, at the next multiple of E epochs after its start.

    Attributes:
        samples: of an epoch.
        epochs: of an iteration; None for one without end.
        global_batch: samples of a batch over all ranks.
        drop_last: whether the incomplete batch at the end of every epoch is left out. Otherwise a batch may span two
            epochs, and only the last one of the iteration may be incomplete.
        start: position at which the iteration starts.

    Raises:
        InvalidInputError: a number is not positive, or `drop_last` would leave out everything.
    """

    samples: int
    epochs: int | None
    global_batch: int
    drop_last: bool
    start: int

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise InvalidInputError(f"a global batch of {self.global_batch} samples; give a batch_size from 1 on")
        if self.epochs is not None and self.epochs < 1:
            raise InvalidInputError(f"epochs={self.epochs}; give a number from 1 on, or None for no end")
        if self.drop_last and self.samples < self.global_batch:
            raise InvalidInputError(
                f"an epoch of {self.samples} samples has no whole batch of {self.global_batch} (over all ranks), and "
                f"drop_last=True drops what is not whole; take a smaller batch_size, or drop_last=False"
            )

    @property
    def end(self) -> int | None:
        """Position at which the iteration ends; None when it does not."""
        if self.epochs is None:
            return None
        length = self.samples * self.epochs
        return (self.start // length + 1) * length

    def batch(self, number: int) -> range:
        """The positions of a global batch, counted from the start; empty when there are not so many."""
        begin = self.start + number * self.global_batch
        if self.drop_last:
            epoch, place = divmod(self.start, self.samples)
            later = number - (self.samples - place) // self.global_batch  # after those of the first epoch
            if later >= 0:
                epochs, later = divmod(later, self.samples // self.global_batch)
                begin = (epoch + 1 + epochs) * self.samples + later * self.global_batch
        stop = begin + self.global_batch
        return range(begin, stop if self.end is None else min(stop, self.end))

    def share(self, number: int, rank: int, world_size: int) -> range:
        """The positions of one rank in a global batch."""
        size = self.global_batch // world_size
        return self.batch(number)[rank * size : (rank + 1) * size]

    def batches(self) -> int | None:
        """Number of global batches; None without end."""
        if self.end is None:
            return None
        if not self.drop_last:
            return -(-(self.end - self.start) // self.global_batch)
        epoch, place = divmod(self.start, self.samples)
        whole = self.end // self.samples - epoch - 1
        return (self.samples - place) // self.global_batch + whole * (self.samples // self.global_batch)

    def after(self, number: int) -> int:
        """Position after so many global batches: where the next one begins, or the end of the iteration."""
        batch = self.batch(number)
        return batch.start if batch or self.end is None else self.end


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """How far one worker of one rank is: what torchdata's StatefulDataLoader keeps for it.

    Attributes:
        logitstore_stream: version of this form, and the mark by which it is found.
        state: at the plan's start.
        plan: the batches.
        workers: among how many the batches of a rank are dealt.
        batches: of its own that it has yielded since the plan's start.
    """

    logitstore_stream: Literal[1] = VERSION
    state: State
    plan: Plan
    workers: int
    batches: Annotated[int, Meta(ge=0)]

    def to_dict(self) -> dict[str, Any]:
        """The state as a plain dict."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields

    @classmethod
    def from_dict(cls, fields: Any) -> StreamState:
        """The inverse of `to_dict`.

        Raises:
            InvalidInputError: it is no such state.
        """
        try:
            return msgspec.convert(fields, cls)
        except msgspec.ValidationError as error:
            raise InvalidInputError(f"this is no state of a worker over StreamingLogits: {error}") from error

    def differs(self, other: StreamState) -> bool:
        """Whether it is of another order, plan or number of workers."""
        return msgspec.structs.replace(self, batches=0) != msgspec.structs.replace(other, batches=0)


def global_state(stateful: Any) -> dict[str, Any]:
    """The state of a torchdata StatefulDataLoader over `StreamingLogits` as one for any number of ranks and workers.

    Args:
        stateful: what the StatefulDataLoader's state_dict() returned, on any rank.

    Returns:
        What `StreamingLogits.load_state_dict` and `LogitLoader.load_state_dict` take.

    Raises:
        InvalidInputError: it does not hold the states of such workers.
    """
    streams = [StreamState.from_dict(fields) for fields in _streams(stateful)]
    if not streams or any(stream.differs(streams[0]) for stream in streams):
        raise InvalidInputError(
            "this is no state of a StatefulDataLoader over StreamingLogits; give what its state_dict() returned"
        )
    state, plan = streams[0].state, streams[0].plan
    # Batches that were handed out after the workers' states were taken count as well.
    position = plan.after(sum(stream.batches for stream in streams) + stateful.get(_TORCHDATA_STEPS, 0))
    return State(digest=state.digest, seed=state.seed, epoch=position // plan.samples, position=position).to_dict()


def _streams(value: Any) -> Iterator[dict[str, Any]]:
    """Every worker's state in nested dicts, wherever torchdata keeps them."""
    if not isinstance(value, dict):
        return
    if _STREAM_MARK in value:
        yield value
        return
    for inner in value.values():
        yield from _streams(inner)
