"""Loading for training: datasets for `torch.utils.data`, and a loader whose state is exact.

The global order of samples is a pure function of the source, the seed, the epoch and the place (see `order`); ranks
and workers only share it out. With G = batch_size * world_size, global batch b is the positions [b * G, (b + 1) * G).
Rank r takes the r-th part of it, and worker w of W the batches w, w + W, ... of its rank: the DataLoader's round robin
then gives them in the global order.
"""

from __future__ import annotations

import itertools
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Dataset as MapDataset

from logitstore.dataset.reader import Decoding
from logitstore.errors import InvalidInputError, InvalidTypeError, LogitStoreWarning
from logitstore.shard.sequence import Sequence
from logitstore.tokenizer import Tokenizer
from logitstore.torch.device import EncodedBatch, decode_batch, to_device
from logitstore.torch.order import Shuffle
from logitstore.torch.parcel import Packer, Parcel, replaced, unpack
from logitstore.torch.source import Source, as_samples, as_source, check_student, expect, is_remote
from logitstore.torch.state import Plan, State, StreamState


class LogitDataset(MapDataset[Sequence]):
    """The sequences of a dataset by row, for a `DataLoader` with a sampler of yours.

    It pickles and works in workers, forked or spawned. A `collate_fn` is needed: torch's own does not know sequences.

    Args:
        dataset: path, `logitstore.Dataset` (or a view of one), or `Samples`.
        columns: columns to decode; None for those of the view.
        decode: `cpu`, or `device`: workers hand over codes and gaps, half the bytes, and the device decodes them; None
            for that of the view.
        tokenizer: the student's, or its digest: refused when it is not the dataset's.
        vocabulary_size: rows of the student's output: refused when there are candidates above it.

    Raises:
        InvalidInputError: the student does not fit, or there is no such column.
        InvalidTypeError: `dataset` or `tokenizer` is of another kind.
        DatasetNotFoundError: there is no dataset at the path.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        columns: Iterable[str] | None = None,
        decode: Decoding | None = None,
        tokenizer: Tokenizer | str | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        self.samples = as_samples(dataset, columns, decode)
        check_student(self.samples, tokenizer, vocabulary_size)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.samples)

    def __getitem__(self, row: int) -> Sequence:
        """A sequence.

        Raises:
            RowIndexError: the row is outside the dataset.
            CorruptDataError: its bytes are not what was written.
        """
        return self.samples[operator.index(row)]

    def __getitems__(self, rows: list[int]) -> list[Sequence]:
        """The sequences of a batch, which a `DataLoader` asks for at once."""
        expect(self.samples, [operator.index(row) for row in rows])
        return [self[row] for row in rows]


class StreamingLogits(IterableDataset[Sequence]):
    """Samples in the global order, shared out among ranks and workers.

    Use it with `LogitLoader`, whose state is exact; with torchdata's `StatefulDataLoader`, or with a plain
    `DataLoader`, both with the same `batch_size`. Any number of ranks and workers gives the same global batches when
    the global batch, batch_size * world_size, is the same.

    An iteration is `epochs` epochs long, or the rest of them when it starts in the middle. It starts where
    `load_state_dict`, `skip` or `set_epoch` said, else at the beginning; `LogitLoader` moves on by itself, other
    loaders need `set_epoch` before each iteration. Workers that live on (`persistent_workers`) see it too.

    Without `drop_last` a global batch may span two epochs, and the last one of an iteration may be incomplete: the
    ranks then get fewer samples, the last ones none, so that their number of batches may differ by one. Where ranks
    wait for each other (DDP), use `drop_last=True`.

    Args:
        source: path, `logitstore.Dataset` (or a view of one), `Samples`, or a `Source` such as `Mixture`.
        batch_size: samples of a batch on one rank.
        seed: of the order.
        epochs: of an iteration; None for one without end.
        shuffle: `blocks`, `full` or `none`, see `Order`; a `Source` has its own.
        drop_last: drop the incomplete global batch at the end of every epoch.
        rank: of this process, with `world_size`; None for that of `torch.distributed` once it is initialised, else 0
            of 1. It is asked for when an iteration starts.
        world_size: number of processes that share the samples.
        tokenizer: the student's, or its digest: refused when it is not the dataset's.
        vocabulary_size: rows of the student's output: refused when there are candidates above it.
        columns: columns to decode; None for those of the view.
        decode: `cpu`, or `device`: workers hand over codes and gaps, half the bytes, and the device decodes them; None
            for that of the view.

    Raises:
        InvalidInputError: the student does not fit, or a number or column cannot be used.
        InvalidTypeError: an argument is of another kind.
        DatasetNotFoundError: there is no dataset at the path.
    """

    def __init__(
        self,
        source: Any,
        *,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        shuffle: Shuffle = "blocks",
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        tokenizer: Tokenizer | str | None = None,
        vocabulary_size: int | None = None,
        columns: Iterable[str] | None = None,
        decode: Decoding | None = None,
    ) -> None:
        self.source: Source = as_source(source, shuffle, columns, decode)
        check_student(self.source, tokenizer, vocabulary_size)
        self.batch_size = _integer("batch_size", batch_size)
        self.seed = _integer("seed", seed)
        self.epochs = None if epochs is None else _integer("epochs", epochs)
        self.drop_last = drop_last
        self._given = _check_rank(rank, world_size)
        self.moves = 0
        self._position = 0
        # In shared memory, so that workers which live on see where the next iteration starts.
        self._start = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        Plan(len(self.source), self.epochs, self.batch_size * (world_size or 1), drop_last, 0)  # refuses what cannot be

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has no process group: it is told the rank.
        return {**self.__dict__, "_given": self.rank_of_world()}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self._start.share_memory_()

    def __copy__(self) -> StreamingLogits:
        same = object.__new__(type(self))
        same.__dict__.update({**self.__dict__, "_start": self._start.clone()})
        same._start.share_memory_()
        return same

    def rank_of_world(self) -> tuple[int, int]:
        """(rank, world_size): as given, else of `torch.distributed` where it is initialised, else (0, 1)."""
        if self._given is not None:
            return self._given
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        if os.environ.get("WORLD_SIZE", "1") != "1":
            message = (
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed is not initialised: every process "
                f"gets all samples. Initialise it first, or give rank= and world_size="
            )
            warnings.warn(message, LogitStoreWarning, stacklevel=2)
        return 0, 1

    def __iter__(self) -> Stream:
        """The samples of this rank and worker, from where the iteration starts."""
        info = get_worker_info()
        return self.stream(*((0, 1) if info is None else (info.id, info.num_workers)))

    def stream(self, worker: int, workers: int) -> Stream:
        """The samples of one of so many workers of this rank."""
        rank, world_size = self.rank_of_world()
        return Stream(self.source, self.seed, self._plan(int(self._start)), (rank, world_size), (worker, workers))

    def __len__(self) -> int:
        """Samples of this rank in one whole iteration.

        Raises:
            InvalidTypeError: it has no end.
        """
        plan = self._plan(0)
        batches = plan.batches()
        if batches is None:
            raise InvalidTypeError("epochs=None has no length; count steps, or give a number of epochs")
        return (batches - 1) * self.batch_size + len(plan.share(batches - 1, *self.rank_of_world()))

    def state_dict(self) -> dict[str, Any]:
        """Where the next iteration starts, or how far `LogitLoader` is: small, and good for JSON.

        It is the same on every rank, and can be loaded on any number of ranks and workers.
        """
        return self._state(self._position).to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration where the state was taken.

        Raises:
            InvalidInputError: it is of another dataset, order or seed.
            UnsupportedVersionError: a later release wrote it.
        """
        loaded = State.from_dict(state)
        loaded.check(self.source.digest, self.seed, len(self.source))
        self._move(loaded.position)

    def skip(self, batches: int) -> None:
        """Start the next iteration so many global batches later.

        Raises:
            InvalidInputError: there are not so many left in the iteration.
        """
        plan = self._plan(self._position)
        left = plan.batches()
        if batches < 0 or (left is not None and batches > left):
            raise InvalidInputError(f"cannot skip {batches} global batches; {left} are left in this iteration")
        self._move(plan.after(batches))

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the beginning of an epoch.

        Where it would start within that epoch already, such as after `load_state_dict`, it stays there.

        Raises:
            InvalidInputError: the epoch is negative.
        """
        if _integer("epoch", epoch) < 0:
            raise InvalidInputError(f"epoch {epoch}; epochs count from 0")
        if self._position // len(self.source) != epoch:
            self._move(epoch * len(self.source))

    def begin(self) -> Plan:
        """Let the next iteration start where the loader is. For `LogitLoader`."""
        self._move(self._position)
        return self._plan(self._position)

    def advance(self, position: int) -> None:
        """Say how far the loader is, in samples over all ranks. For `LogitLoader`."""
        self._position = position

    def _move(self, position: int) -> None:
        self.moves += 1
        self._position = position
        self._start.fill_(position)

    def _state(self, position: int) -> State:
        epoch = position // len(self.source)
        return State(digest=self.source.digest, seed=self.seed, epoch=epoch, position=position)

    def _plan(self, start: int) -> Plan:
        global_batch = self.batch_size * self.rank_of_world()[1]
        return Plan(len(self.source), self.epochs, global_batch, self.drop_last, start)


class Stream(Iterator[Sequence]):
    """The samples of one worker of one rank; made by `StreamingLogits`.

    Args:
        source: the samples.
        seed: of their order.
        plan: the global batches.
        rank: (rank, world_size).
        worker: (worker, workers).
    """

    def __init__(self, source: Source, seed: int, plan: Plan, rank: tuple[int, int], worker: tuple[int, int]) -> None:
        self.source = source
        self.seed = seed
        self.plan = plan
        self.rank = rank
        self.worker, self.workers = worker
        self._batches = 0
        self._told = 0  # batches of this worker whose samples were asked for ahead
        self._left = iter(range(0))

    def __next__(self) -> Sequence:
        while (position := next(self._left, None)) is None:
            number = self.worker + self._batches * self.workers
            if not self.plan.batch(number):
                raise StopIteration
            self._left = iter(self.plan.share(number, *self.rank))
            self._batches += 1
            if is_remote(self.source):
                self._expect()
        return self.source.at(self.seed, *divmod(position, self.plan.samples))

    def _expect(self) -> None:
        """Say which samples come next: those of this batch, and of some after it."""
        wanted: list[int] = []
        first = max(self._batches - 1, self._told)
        for batch in itertools.count(first):
            ahead = (batch - self._batches) * self.plan.global_batch // self.rank[1]
            number = self.worker + batch * self.workers
            if (batch > self._batches and ahead >= _AHEAD) or not self.plan.batch(number):
                self._told = batch
                break
            wanted += self.plan.share(number, *self.rank)
        expect(self.source, self.seed, [divmod(position, self.plan.samples) for position in wanted])

    def state_dict(self) -> dict[str, Any]:
        """How far this worker is, for torchdata's StatefulDataLoader.

        Raises:
            InvalidInputError: it is within a batch.
        """
        if operator.length_hint(self._left):
            raise InvalidInputError(
                f"the loader stopped within a batch: its batch_size is not that of StreamingLogits, "
                f"{self.plan.global_batch // self.rank[1]}; give both the same"
            )
        return self._state().to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the worker was.

        Raises:
            InvalidInputError: the state is of another source, seed, plan or number of workers.
        """
        loaded = StreamState.from_dict(state)
        if loaded.differs(self._state()):
            raise InvalidInputError(
                "the state is of another source, seed, global batch, epochs, drop_last or number of workers; turn the "
                "StatefulDataLoader's state into one for any number of ranks and workers with "
                "logitstore.torch.global_state, and give that to StreamingLogits.load_state_dict"
            )
        self._batches = self._told = loaded.batches
        self._left = iter(range(0))

    def _state(self) -> StreamState:
        start = self.plan.start
        state = State(digest=self.source.digest, seed=self.seed, epoch=start // self.plan.samples, position=start)
        return StreamState(state=state, plan=self.plan, workers=self.workers, batches=self._batches)


_END: Final = object()

_AHEAD: Final = 64
"""Samples of a remote dataset that are asked for before their turn, at least, beside the next batch."""


class _Packs:
    """A collate function whose batches leave a worker in one piece."""

    def __init__(self, collate: Callable[[list[Sequence]], Any], most: int) -> None:
        self.collate = collate
        self.packer = Packer(most)

    def __call__(self, sequences: list[Sequence]) -> Any:
        batch = self.collate(sequences)
        return batch if get_worker_info() is None else self.packer.pack(batch)


class LogitLoader(DataLoader[Any]):
    """A `DataLoader` over `StreamingLogits` that knows exactly how far it is: it counts the batches it hands out.

    Its state is that of the batches which were handed out; what workers have prefetched does not count. Every iteration
    goes on where the last one was left: after the end with the next epochs, after a break with the next batch.
    One iteration at a time.

    Args:
        dataset: the samples and their batch size.
        collate_fn: makes a batch of a list of `Sequence`; None for the list itself.
        device: where the batches go, through pinned memory and without blocking; None for where the collator made them.
            A batch that is still encoded is decoded there.
        **options: those of `DataLoader`, without what `dataset` decides: batch size, order, dropping.

    Raises:
        InvalidInputError: an option contradicts `dataset`.
        InvalidTypeError: `dataset` is no `StreamingLogits`.
    """

    dataset: StreamingLogits

    def __init__(
        self,
        dataset: StreamingLogits,
        *,
        collate_fn: Callable[[list[Sequence]], Any] | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(dataset, StreamingLogits):
            raise InvalidTypeError(f"{type(dataset).__name__} is no StreamingLogits; wrap it: StreamingLogits(...)")
        if options.setdefault("batch_size", dataset.batch_size) != dataset.batch_size:
            raise InvalidInputError(
                f"batch_size={options['batch_size']} here and {dataset.batch_size} in StreamingLogits; give it there"
            )
        for name in ("shuffle", "sampler", "batch_sampler", "drop_last"):
            if options.get(name):
                raise InvalidInputError(f"{name}= is not for LogitLoader; StreamingLogits decides order and dropping")
        if not options.get("in_order", True):
            raise InvalidInputError("in_order=False would lose the order of the batches; leave it out")
        super().__init__(dataset, collate_fn=list if collate_fn is None else collate_fn, **options)
        self.device = device

    def __iter__(self) -> Any:
        """The batches from where the loader is to the end of the iteration."""
        plan = self.dataset.begin()
        return self._count(super().__iter__(), plan, self.dataset.moves)

    def _count(self, batches: Iterator[Any], plan: Plan, moves: int) -> Iterator[Any]:
        mapped: dict[int, torch.Tensor] = {}  # blocks come again, and are mapped once while they are held
        for number in itertools.count(1):
            if moves != self.dataset.moves:
                raise InvalidInputError(
                    "the loader was moved since this iteration began, by load_state_dict, skip, set_epoch or another "
                    "iteration; leave this one, and begin another"
                )
            if (batch := next(batches, _END)) is _END:
                break
            if isinstance(batch, Parcel) and batch.shared:
                block = batch.block
                mapped.pop(block.data_ptr(), None)
                mapped[block.data_ptr()] = block
                if len(mapped) > self.num_workers * self._most_blocks():
                    del mapped[next(iter(mapped))]
            placed = self._placed(batch)
            self.dataset.advance(plan.after(number))
            yield placed
        if moves == self.dataset.moves and plan.end is not None:
            self.dataset.advance(plan.end)

    def _placed(self, batch: Any) -> Any:
        if self.device is not None:
            batch = to_device(batch, self.device)
        if isinstance(batch, Parcel):
            batch = unpack(batch.own())
        return replaced(batch, EncodedBatch, decode_batch)

    def _most_blocks(self) -> int:
        """Of a worker: one for each batch that may be on its way, one that is read and one that is written."""
        return (self.prefetch_factor or 2) + 2

    def _get_iterator(self) -> Any:
        # Only here: what makes a loader of its own from this one, as accelerate does, gets the collate function given.
        given = self.collate_fn
        if self.num_workers:
            self.collate_fn = _Packs(given, self._most_blocks())
        try:
            return super()._get_iterator()
        finally:
            self.collate_fn = given

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the batches that it has handed out; see `StreamingLogits.state_dict`."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration where the state was taken; see `StreamingLogits.load_state_dict`."""
        self.dataset.load_state_dict(state)

    def skip(self, batches: int) -> None:
        """Start the next iteration so many global batches later; see `StreamingLogits.skip`."""
        self.dataset.skip(batches)

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the beginning of an epoch; see `StreamingLogits.set_epoch`."""
        self.dataset.set_epoch(epoch)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidTypeError(f"{name}={value!r}; give an integer") from None


def _check_rank(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise InvalidInputError(f"rank={rank}, world_size={world_size}; give both, with 0 <= rank < world_size")
    return rank, world_size
