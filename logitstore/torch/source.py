"""Sources: which sample stands at (seed, epoch, place).

`Samples` are rows that can be asked for by number, such as those of a dataset; a `Source` puts samples in an order.
Nothing here needs torch.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Iterable
from fractions import Fraction
from itertools import accumulate
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import xxhash
from numpy.typing import NDArray

import logitstore
from logitstore.dataset.reader import Dataset, Decoding
from logitstore.errors import InvalidInputError, InvalidTypeError, LogitStoreWarning
from logitstore.shard.sequence import Sequence
from logitstore.tokenizer import Tokenizer
from logitstore.torch.order import Order, Shuffle, permutation

_CHUNKS: Final = 512

MIXTURE_BLOCK: Final = 1024
"""Samples of a mixture among which every source has its share; more where a weight would get none."""

_MIXTURE_BLOCK_LIMIT: Final = 2**40


@runtime_checkable
class Samples(Protocol):
    """Rows that can be asked for by number.

    Attributes:
        digest: identifies the content and what was done to it.
        tokenizer_digest: of the tokens; None when unknown.
        logit_width: candidate ids are below it; None when unknown.
        normalised: over what the probabilities sum to one, `vocabulary` or `candidates`.

    They may have an attribute `highest_id` (None when unknown), which tells better than the width which students fit;
    and, where rows come over a network, `remote` (True) and a method `expect(rows)`, which starts fetching them.
    """

    digest: str
    tokenizer_digest: str | None
    logit_width: int | None
    normalised: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Sequence: ...


@runtime_checkable
class Source(Protocol):
    """Samples in an order, in every epoch another one.

    Attributes:
        digest: identifies the samples and the rules of their order.

    It may have `remote` (True) and a method `expect(seed, places)`, as samples do; places are pairs of epoch and place.
    """

    digest: str

    def __len__(self) -> int:
        """Samples of an epoch."""

    def at(self, seed: int, epoch: int, place: int) -> Sequence:
        """The sample at a place, from 0 to len - 1, of an epoch: a pure function."""


class DatasetSamples:
    """The rows of a dataset, or of a view of one, as `Samples`; made by `of_dataset`. Pickles."""

    def __init__(self, dataset: Dataset) -> None:
        info = dataset.info
        rows: range = dataset._rows
        every = rows == range(info.totals.sequences)
        self.digest = info.dataset_digest + ("" if every else f"[{rows.start}+{rows.step}*{len(rows)}]")
        self.tokenizer_digest = info.tokenizer.digest if info.tokenizer is not None else None
        self.logit_width: int | None = info.logit_width
        self.highest_id = info.totals.highest_id
        self.normalised: str = info.normalised
        self.temperature = info.temperature
        self.sampled = "draws" in info.totals.encodings
        self.decode = dataset.decode
        # Shuffled rows come back to the chunks of a window of blocks.
        self.dataset = dataset.with_remembered(_CHUNKS)
        self.remote = dataset.store.remote

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.dataset)

    def __getitem__(self, row: int) -> Sequence:
        """A sequence.

        Raises:
            RowIndexError: the row is outside the dataset.
            CorruptDataError: its bytes are not what was written.
        """
        return self.dataset[row]

    def expect(self, rows: Iterable[int]) -> None:
        """Start fetching rows that will be read soon."""
        self.dataset.expect(rows)

    def lengths(self) -> NDArray[np.uint32]:
        """Positions of each sequence, in order: uint32 [len(self)]; see `Dataset.lengths`."""
        return self.dataset.lengths()

    def __repr__(self) -> str:
        return f"DatasetSamples({self.dataset!r})"


def of_dataset(dataset: Dataset) -> DatasetSamples:
    """A dataset or a view of one as `Samples`; the digest is the dataset's, and for a view its rows.

    Which columns are decoded is not part of the digest: it does not change which sample is which.
    """
    return DatasetSamples(dataset)


def as_samples(given: Any, columns: Iterable[str] | None = None, decode: Decoding | None = None) -> Samples:
    """What was given as `Samples`: a path is opened, a `Dataset` wrapped.

    Args:
        given: path, `Dataset` or `Samples`.
        columns: columns to decode, None for those of the view; only for a path or a `Dataset`.
        decode: who decodes the candidates, see `Dataset.with_decoding`; likewise.

    Raises:
        InvalidTypeError: it is none of these.
        InvalidInputError: there is no such column or decoding, or an option is for a dataset and samples were given.
        DatasetNotFoundError: there is no dataset at the path.
    """
    if isinstance(given, (str, os.PathLike)):
        given = logitstore.open(given)
    if isinstance(given, Dataset):
        given = given if columns is None else given.select(columns)
        return of_dataset(given if decode is None else given.with_decoding(decode))
    if isinstance(given, Source):
        raise InvalidTypeError(
            f"{type(given).__name__} has an order of its own already; give the samples that it was made of, and make a "
            f"Mixture or Shuffled of the result"
        )
    if not isinstance(given, Samples):
        raise InvalidTypeError(f"{type(given).__name__} is neither a path nor a Dataset, Samples or a Source")
    if columns is not None or decode is not None:
        raise InvalidInputError(
            f"columns= and decode= are for a dataset; use its select and with_decoding before making "
            f"{type(given).__name__}"
        )
    return given


class Shuffled:
    """Samples in a shuffled order: a `Source`.

    Args:
        samples: path, `Dataset` or `Samples`.
        shuffle: `blocks`, `full` or `none`, see `Order`.
        block: rows of a block.
        window: blocks of a window.

    Raises:
        InvalidInputError: there are no samples, or a number is not positive.
        InvalidTypeError: `samples` or `shuffle` is of another kind.
    """

    def __init__(self, samples: Any, shuffle: Shuffle = "blocks", block: int = 256, window: int = 16) -> None:
        self.samples = as_samples(samples)
        self._rule = (shuffle, block, window)
        _order(len(self.samples), self.samples.digest, 0, self._rule)
        self.digest = f"{self.samples.digest}:{shuffle}" + (f":{block}:{window}" if shuffle == "blocks" else "")
        self.tokenizer_digest = self.samples.tokenizer_digest
        self.logit_width = self.samples.logit_width
        self.highest_id: int | None = getattr(self.samples, "highest_id", None)
        self.normalised = self.samples.normalised
        self.temperature: float | None = getattr(self.samples, "temperature", None)
        self.remote = is_remote(self.samples)

    def __len__(self) -> int:
        """Samples of an epoch: all."""
        return len(self.samples)

    def at(self, seed: int, epoch: int, place: int) -> Sequence:
        """The sample at a place of an epoch."""
        return self.samples[self._order(seed).row(epoch, place)]

    def expect(self, seed: int, places: Iterable[tuple[int, int]]) -> None:
        """Start fetching samples that will be read soon."""
        if self.remote:
            order = self._order(seed)
            expect(self.samples, [order.row(epoch, place) for epoch, place in places])

    def _order(self, seed: int) -> Order:
        return _order(len(self.samples), self.samples.digest, seed, self._rule)


def is_remote(of: Samples | Source) -> bool:
    """Whether samples come over a network, so that it is worth saying which will be read."""
    return bool(getattr(of, "remote", False))


def expect(of: Samples | Source, *what: Any) -> None:
    """Say what will be read soon, where that helps."""
    if is_remote(of):
        of.expect(*what)  # type: ignore[union-attr] # what is remote has it


@functools.lru_cache(maxsize=64)
def _order(size: int, digest: str, seed: int, rule: tuple[Shuffle, int, int]) -> Order:
    shuffle, block, window = rule
    return Order(size, digest, seed, shuffle, block=block, window=window)


class Mixture:
    """Several sources mixed by weight: a `Source`.

    Of every 1,024 consecutive samples (more where a weight would otherwise get none) each source gives its share,
    rounded by the largest remainder, at places that a keyed permutation tells. A source goes on in its own epochs: its
    q-th sample overall is that at place q % len of its epoch q // len, so a small source is repeated, each time in
    another order.

    Args:
        sources: paths, datasets, samples or sources; those that are no source are shuffled by blocks.
        weights: positive numbers of any scale, one a source: how often samples (not tokens) come from it.
        epoch_samples: length of an epoch of the mixture; None for the sum of the sources' lengths.

    Raises:
        InvalidInputError: no sources, weights that cannot be used, or sources of different tokenizers.
    """

    def __init__(self, sources: Iterable[Any], weights: Iterable[float], epoch_samples: int | None = None) -> None:
        self.sources = tuple(as_source(source) for source in sources)
        weights = tuple(weights)
        if not self.sources or len(weights) != len(self.sources):
            raise InvalidInputError(f"{len(self.sources)} sources and {len(weights)} weights; give one weight a source")
        self.counts = apportion(weights)
        self._starts = (0, *accumulate(self.counts))
        self._samples = sum(map(len, self.sources)) if epoch_samples is None else epoch_samples
        if self._samples < 1:
            raise InvalidInputError(f"epoch_samples={self._samples}; give the samples of an epoch, from 1 on")
        self.tokenizer_digest = _common_tokenizer(self.sources)
        widths = [getattr(source, "logit_width", None) for source in self.sources]
        self.logit_width = None if None in widths else max(width for width in widths if width is not None)
        self.highest_id = max((id_ for id_ in map(highest_id, self.sources) if id_ is not None), default=None)
        self.temperature = common_temperature(self.sources)
        self.remote = any(map(is_remote, self.sources))
        known = {getattr(source, "normalised", None) for source in self.sources}
        self.normalised = "vocabulary" if known == {"vocabulary"} else "candidates"
        parts = [f"{count} {source.digest}" for count, source in zip(self.counts, self.sources, strict=True)]
        self.digest = f"mixture:{xxhash.xxh3_128_hexdigest(chr(10).join([str(self._samples), *parts]).encode())}"

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self._samples

    def at(self, seed: int, epoch: int, place: int) -> Sequence:
        """The sample at a place of an epoch."""
        source, number = self.locate(seed, epoch, place)
        chosen = self.sources[source]
        return chosen.at(seed, *divmod(number, len(chosen)))

    def expect(self, seed: int, places: Iterable[tuple[int, int]]) -> None:
        """Start fetching samples that will be read soon."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for epoch, place in places:
            source, number = self.locate(seed, epoch, place)
            wanted.setdefault(source, []).append(divmod(number, len(self.sources[source])))
        for source, own in wanted.items():
            expect(self.sources[source], seed, own)

    def locate(self, seed: int, epoch: int, place: int) -> tuple[int, int]:
        """(source, which of all its samples since the beginning) at a place of an epoch."""
        block, inner = divmod(epoch * self._samples + place, self._starts[-1])
        slot = permutation(self._starts[-1], self.digest, seed, block, "mixture")(inner)
        source = next(i for i, start in enumerate(self._starts[1:]) if slot < start)
        return source, block * self.counts[source] + slot - self._starts[source]


def apportion(weights: tuple[float, ...]) -> tuple[int, ...]:
    """How many samples of a block each source gives: largest remainder, in exact arithmetic, ties to the first.

    Args:
        weights: positive and finite, of any scale.

    Returns:
        One number from 1 on for each weight. Their sum, the length of a block, is 1,024 or twice that, and so on, as
        the smallest weight needs.

    Raises:
        InvalidInputError: a weight is not a positive number, or far too small beside the others.
    """
    try:
        exact = [Fraction(float(weight)) for weight in weights]
    except (TypeError, ValueError, OverflowError):
        raise InvalidInputError(f"weights {list(weights)}; give positive, finite numbers") from None
    if min(exact) <= 0:
        raise InvalidInputError(f"weights {list(weights)}; give positive numbers, and leave out what has weight 0")
    block = MIXTURE_BLOCK
    while True:
        shares = [block * weight / sum(exact) for weight in exact]
        counts = [int(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for i in by_remainder[: block - sum(counts)]:
            counts[i] += 1
        if min(counts) > 0:
            return tuple(counts)
        block *= 2
        if block > _MIXTURE_BLOCK_LIMIT:
            raise InvalidInputError(f"weights {list(weights)}: the smallest would hardly ever come; leave it out")


def _common_tokenizer(sources: tuple[Source, ...]) -> str | None:
    digests = [getattr(source, "tokenizer_digest", None) for source in sources]
    known = {digest: digests.index(digest) for digest in digests if digest is not None}
    if len(known) > 1:
        listed = ", ".join(f"source {number}: {digest}" for digest, number in known.items())
        raise InvalidInputError(
            f"the sources have different tokenizers, so one student cannot learn from them together ({listed}); "
            f"mix datasets that were made with one tokenizer"
        )
    if None in digests and len(sources) > 1:
        unknown = ", ".join(str(number) for number, digest in enumerate(digests) if digest is None)
        message = f"the tokenizer of some mixed sources is unknown ({unknown}): whether it is one cannot be checked"
        warnings.warn(message, LogitStoreWarning, stacklevel=3)
    return next(iter(known), None)


def common_temperature(parts: Iterable[Any]) -> float | None:
    """The temperature at which all logprobs were taken; None where it is not known, or with a warning, not one."""
    known = {found for each in parts if (found := getattr(each, "temperature", None)) is not None}
    if len(known) > 1:
        listed = ", ".join(map(str, sorted(known)))
        message = f"the logprobs are at different temperatures ({listed}): they are used together as they are stored"
        warnings.warn(message, LogitStoreWarning, stacklevel=4)
    return known.pop() if len(known) == 1 else None


def highest_id(of: Samples | Source) -> int | None:
    """The highest candidate id that is known to be possible: the one that occurs, else by the logit width."""
    occurs: int | None = getattr(of, "highest_id", None)
    width: int | None = getattr(of, "logit_width", None)
    return width - 1 if occurs is None and width is not None else occurs


def as_source(
    given: Any, shuffle: Shuffle = "blocks", columns: Iterable[str] | None = None, decode: Decoding | None = None
) -> Source:
    """What was given as a `Source`: paths, datasets and samples are shuffled.

    Args:
        given: path, `Dataset`, `Samples` or `Source`.
        shuffle: the order of what is no source.
        columns: columns to decode; only for a path or a `Dataset`.
        decode: who decodes the candidates; likewise.

    Raises:
        InvalidTypeError: it is none of these.
        InvalidInputError: an option is for a dataset, and a source was given.
    """
    if isinstance(given, Source):
        if columns is not None or decode is not None or shuffle != "blocks":
            raise InvalidInputError(
                "columns=, decode= and shuffle= are for a dataset; a source has its own: give them to it"
            )
        return given
    return Shuffled(as_samples(given, columns, decode), shuffle)


def check_student(of: Samples | Source, tokenizer: Tokenizer | str | None, vocabulary_size: int | None) -> None:
    """Refuse a student that cannot learn from these samples.

    Args:
        of: what is trained on.
        tokenizer: the student's, or its digest; None is not checked.
        vocabulary_size: rows of the student's output; None is not checked.

    Raises:
        InvalidInputError: another tokenizer, or a vocabulary that does not hold every candidate.
        InvalidTypeError: `tokenizer` is neither a Tokenizer nor a digest.
    """
    if tokenizer is not None:
        _check_tokenizer(getattr(of, "tokenizer_digest", None), _digest_of(tokenizer))
    highest = highest_id(of)
    if vocabulary_size is not None and highest is not None and highest >= vocabulary_size:
        raise InvalidInputError(
            f"the student's vocabulary of {vocabulary_size} has no row for the teacher's candidates, whose ids go up "
            f"to {highest}; resize its embeddings to {highest + 1} or more, if the tokenizer is the same, or take a "
            f"student with the teacher's vocabulary"
        )


def _digest_of(tokenizer: object) -> str:
    if isinstance(tokenizer, Tokenizer):
        if tokenizer.digest is None:
            raise InvalidInputError("a partial vocabulary has no identity; give the tokenizer with its tokenizer.json")
        return tokenizer.digest
    if not isinstance(tokenizer, str) or re.fullmatch("[0-9a-f]{64}", tokenizer) is None:
        raise InvalidTypeError(
            f"tokenizer={tokenizer!r} is no digest; give logitstore.Tokenizer.from_path(...) of the student, or the "
            f"64 hexadecimal digits of its digest"
        )
    return tokenizer


def _check_tokenizer(theirs: str | None, ours: str) -> None:
    if theirs is None:
        message = "the dataset does not say its tokenizer: whether it is the student's cannot be checked"
        warnings.warn(message, LogitStoreWarning, stacklevel=4)
    elif theirs != ours:
        raise InvalidInputError(
            f"the student's tokenizer ({ours[:12]}) is not the dataset's ({theirs[:12]}): its ids mean other tokens. "
            f"Take a student with the teacher's tokenizer, or a dataset captured with the student's"
        )
