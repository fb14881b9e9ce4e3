"""Writing a dataset: sequences in, shards and a manifest out."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from logitstore.dataset import input as checked
from logitstore.dataset.commit import Commit
from logitstore.dataset.ids import IdSet
from logitstore.dataset.logits import reduce_logits
from logitstore.dataset.settings import Settings
from logitstore.dataset.summary import Summary
from logitstore.dataset.usercolumns import UserColumns, own_values
from logitstore.encoding import ragged
from logitstore.encoding.values import Encoding, Values, ValuesOption, encode_values
from logitstore.errors import InvalidInputError, LogitStoreWarning
from logitstore.io.store import local_path
from logitstore.limits import (
    CHUNK_CANDIDATES,
    CHUNK_COLUMN_BYTES,
    CHUNK_POSITIONS,
    CHUNK_SEQUENCES,
    SEQUENCE_CANDIDATES,
)
from logitstore.schema import Manifest, Source, Teacher
from logitstore.schema.header import Normalised
from logitstore.shard.chunk import StoredSequence, encode_tail, shard_schema
from logitstore.shard.writer import ShardWriter
from logitstore.tokenizer import Tokenizer

if TYPE_CHECKING:
    from types import TracebackType

DEFAULT_LOGITS_TOP_K = 128


class Writer:
    """Writes a dataset; a context manager.

    Leaving the block normally commits the dataset; leaving it with an exception leaves what was written as an
    unfinished one, which readers refuse, and an older dataset at the same path as it was.

    Args:
        path: directory of the dataset.
        tokenizer: the teacher's, or a path to it; None when it is not known.
        teacher: name of the model, or what is known of it; None when it is not known.
        logit_width: width of the teacher's head; candidate ids must be below it. None when it is not known.
        split: name of the split that is written.
        values: encoding of the values; `auto` is `bfloat16` where that is exact, else `grid`.
        resolution: nats a step of the grid, a power of two.
        top_k: most candidates kept of a position; None keeps all that are given (128 of dense logits).
        top_p: keep no more candidates than reach this probability; None keeps all.
        min_k: least candidates kept under `top_p`.
        temperature: at which the logprobs were taken.
        normalised: over what the probabilities given sum to one: `vocabulary`, or `candidates` where only ratios
            are known; there is no tail then.
        source: what the dataset is made from.
        lineage: what that was made from, and so on.
        columns: names and types of the users' columns; None takes them from the first chunk.
        chunk_candidates: a chunk closes at this many candidates.
        shard_bytes: a shard closes at this many bytes.
        overwrite: replace a dataset that is there; it stays until the new one is complete.

    Raises:
        DatasetExistsError: something is there and `overwrite` is False.
        InvalidInputError: a setting is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        teacher: Teacher | str | Mapping[str, Any] | None = None,
        logit_width: int | None = None,
        split: str = "train",
        values: ValuesOption = "auto",
        resolution: float = 1 / 32,
        top_k: int | None = None,
        top_p: float | None = None,
        min_k: int = 1,
        temperature: float = 1.0,
        normalised: Normalised = "vocabulary",
        source: Source | None = None,
        lineage: tuple[Source, ...] = (),
        columns: pa.Schema | None = None,
        chunk_candidates: int = CHUNK_CANDIDATES,
        shard_bytes: int = 256 * 2**20,
        overwrite: bool = False,
    ) -> None:
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_path(Path(tokenizer))
        self._settings = Settings.check(
            split=split,
            values=values,
            resolution=resolution,
            temperature=temperature,
            normalised=normalised,
            logit_width=logit_width,
            chunk_candidates=chunk_candidates,
            shard_bytes=shard_bytes,
            cut=checked.Cut(top_k, top_p, min_k),
        )
        self._columns = UserColumns(columns)
        root = local_path(path, "write to a directory, and publish it with `logitstore push`")
        self._commit = Commit(root, split, overwrite=overwrite)
        self._tokenizer = tokenizer
        self._teacher = _as_teacher(teacher)
        self._source = source
        self._lineage = lineage
        self._ids = IdSet()
        self._open: list[StoredSequence] = []
        self._open_size = [0, 0, 0]  # candidates, positions, bytes of users' columns
        self._shard: ShardWriter | None = None
        self._closed = False
        self._failure: BaseException | None = None
        self.summary = Summary()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    @property
    def closed(self) -> bool:
        """Whether nothing can be added any more: it was closed, or writing failed."""
        return self._closed

    @property
    def settings(self) -> Settings:
        """What it does with every sequence."""
        return self._settings

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the dataset will name."""
        return self._tokenizer

    def use_partial_vocabulary(self, pieces: Mapping[int, bytes]) -> None:
        """Keep the bytes of these tokens where no whole tokenizer is known: enough to show text, no identity."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_pieces(pieces)
        elif self._tokenizer.is_partial:
            self._tokenizer = Tokenizer.from_pieces({**pieces, **dict(self._tokenizer.items())})

    def add(
        self,
        tokens: ArrayLike,
        ids: ArrayLike,
        logprobs: ArrayLike,
        *,
        count: ArrayLike | None = None,
        id: str | None = None,  # noqa: A002 - the format's own name for it
        tail: ArrayLike | None = None,
        target_logprob: ArrayLike | None = None,
        target_rank: ArrayLike | None = None,
        logsumexp: ArrayLike | None = None,
        entropy: ArrayLike | None = None,
        loss_mask: ArrayLike | None = None,
        **columns: Any,
    ) -> None:
        """Add a sequence of T positions. Row t is the distribution of tokens[t + 1].

        Args:
            tokens: integers [T].
            ids: candidate ids, [T, k], or flat [N] with `count`; any order.
            logprobs: natural logs of their probabilities, the same shape; -inf is left out.
            count: candidates of each position [T]; 0 is no distribution.
            id: unique in the dataset; None takes the running number.
            tail: [T], log of the probability that the candidates given do not cover; None derives it; NaN is none.
            target_logprob: [T], logprob of tokens[t + 1]; NaN is unknown.
            target_rank: [T], its rank from 1; 0 is unknown.
            logsumexp: [T], of the logits; NaN is unknown.
            entropy: [T], nats over the whole vocabulary; NaN is unknown.
            loss_mask: [T], 1 where row t is trained on.
            **columns: the user's own columns, any value that Arrow can hold.

        Raises:
            InvalidInputError: naming sequence, position and value.
        """
        with self._adding(id) as name:
            token_array = checked.as_tokens(tokens)
            n = len(token_array)
            counts, id_array, values = checked.as_ragged(ids, logprobs, count, n, "logprobs", "f", "floats")
            width = self._settings.logit_width
            ordered = checked.order_candidates(counts, id_array, values, width)
            self._store(
                name,
                token_array,
                ordered,
                tail,
                _optional(n, target_logprob, target_rank, logsumexp, entropy, loss_mask),
                columns,
            )

    def add_logits(
        self,
        tokens: ArrayLike,
        logits: ArrayLike,
        *,
        id: str | None = None,  # noqa: A002
        entropy: ArrayLike | None = None,
        loss_mask: ArrayLike | None = None,
        **columns: Any,
    ) -> None:
        """Add a sequence from dense logits; logprobs, tail, target and logsumexp are computed.

        Args:
            tokens: integers [T].
            logits: float32 or float16 [T, V], or bfloat16 as uint16 [T, V]; row t predicts tokens[t + 1].
            id: as for `add`.
            entropy: as for `add`.
            loss_mask: as for `add`.
            **columns: as for `add`.

        Raises:
            InvalidInputError: naming sequence, position and value.
        """
        with self._adding(id) as name:
            token_array = checked.as_tokens(tokens)
            width = np.shape(logits)[-1] if np.ndim(logits) == 2 else 0
            settings = self._settings.with_logit_width(width, fixed=self.summary.sequences > 0)
            kept = reduce_logits(token_array, logits, settings.cut.top_k or DEFAULT_LOGITS_TOP_K)
            self._settings = settings
            optional = _optional(
                len(token_array), kept.target_logprob, kept.target_rank, kept.logsumexp, entropy, loss_mask
            )
            self._store(name, token_array, kept.candidates, kept.tail, optional, columns)

    def add_draws(
        self,
        tokens: ArrayLike,
        ids: ArrayLike,
        draws: ArrayLike,
        n: int | ArrayLike,
        *,
        count: ArrayLike | None = None,
        id: str | None = None,  # noqa: A002
        target_logprob: ArrayLike | None = None,
        target_rank: ArrayLike | None = None,
        entropy: ArrayLike | None = None,
        loss_mask: ArrayLike | None = None,
        **columns: Any,
    ) -> None:
        """Add a sequence whose distributions were sampled with replacement.

        Args:
            tokens: integers [T].
            ids: ids that were drawn, [T, m], or flat [N] with `count`; any order, each once a position.
            draws: how often each was drawn, the same shape; 0 is left out.
            n: draws at each position, one number or [T]; a check, since it is the sum of the draws.
            count: as for `add`.
            id: as for `add`.
            target_logprob: as for `add`.
            target_rank: as for `add`.
            entropy: as for `add`.
            loss_mask: as for `add`.
            **columns: as for `add`.

        Raises:
            InvalidInputError: naming sequence, position and value.
        """
        with self._adding(id) as name:
            token_array = checked.as_tokens(tokens)
            total = len(token_array)
            counts, id_array, times = checked.as_ragged(ids, draws, count, total, "draws", "iu", "integers")
            kept = checked.order_draws(counts, id_array, times, n, self._settings.logit_width)
            optional = _optional(total, target_logprob, target_rank, None, entropy, loss_mask)
            values = Values(Encoding.DRAWS, np.empty(0, np.uint32), kept.draws)
            self._append(name, token_array, kept.count, kept.ids, values, optional, columns)

    def close(self) -> None:
        """Write what is left and commit the dataset; does nothing the second time.

        Raises:
            InvalidInputError: a user's column cannot be stored, or writing failed before.
            OSError: the disk is full, say.
        """
        if self._failure is not None:
            raise InvalidInputError(f"nothing was committed, since writing failed before: {self._failure}")
        if self._closed:
            return
        try:
            self._flush()
            self._finish_shard()
            manifest = self._commit.publish(
                self._settings, self._teacher, self._tokenizer, self._source, self._lineage,
                self._columns.types(), self.summary,
            )  # fmt: skip
        except BaseException:
            self.abort()
            raise
        self._closed = True
        _warn_of_unknowns(manifest)

    def abort(self) -> None:
        """Stop without committing: complete chunks stay under temporary names, and readers refuse the dataset."""
        self._closed = True
        if self._shard is not None:
            with contextlib.suppress(OSError):  # what ended the writing is the error to show
                self._shard.close()
            self._shard = None

    def _adding(self, sequence_id: str | None) -> _Adding:
        if self._closed:
            raise InvalidInputError("the writer is closed; open a new one")
        if self._shard is not None:
            self._shard.sync_if_due()
        return _Adding(str(self.summary.sequences) if sequence_id is None else sequence_id)

    def _store(
        self,
        name: str,
        tokens: NDArray[np.uint32],
        given: checked.Candidates,
        tail: ArrayLike | None,
        optional: dict[str, NDArray[Any]],
        columns: dict[str, Any],
    ) -> None:
        """Cut, derive the tail, and encode the values."""
        cut = checked.cut_candidates(given, self._settings.cut)
        kept = cut.candidates
        if self._settings.normalised == "vocabulary":
            optional["tail"] = encode_tail(checked.tail_of(tail, cut))
        elif tail is not None:
            raise InvalidInputError("a tail was given, but there is none where normalised='candidates'")
        values = encode_values(
            kept.logprobs,
            kept.count,
            self._settings.values,
            self._settings.resolution,
            logsumexp=optional.get("logsumexp"),
            logits=kept.logits,
        )
        if values.logsumexp is not None:
            optional["logsumexp"] = values.logsumexp
        self._append(name, tokens, kept.count, kept.ids.astype(np.uint32), values, optional, columns)
        self.summary.measure(kept, values, self._settings.resolution)
        self.summary.alignment.add(tokens, kept.count, ragged.offsets(kept.count), kept.ids)

    def _append(
        self,
        name: str,
        tokens: NDArray[np.uint32],
        count: NDArray[np.uint32],
        ids: NDArray[np.uint32],
        values: Values,
        optional: dict[str, NDArray[Any]],
        columns: dict[str, Any],
    ) -> None:
        if len(ids) > SEQUENCE_CANDIDATES:
            raise InvalidInputError(
                f"{len(ids)} candidates, over the limit of {SEQUENCE_CANDIDATES}: cut the sequence up, or use top_k"
            )
        column_bytes = self._columns.check(columns)
        columns = own_values(columns)
        if not self._ids.add(name):
            raise InvalidInputError(
                "this id was added before; ids are unique in a dataset: rename one, or leave ids out"
            )
        size = (len(ids), len(tokens), column_bytes)
        limits = (self._settings.chunk_candidates, CHUNK_POSITIONS, CHUNK_COLUMN_BYTES)
        if self._open and any(a + b > c for a, b, c in zip(self._open_size, size, limits, strict=True)):
            self._flush()
        self._open.append(StoredSequence(name, tokens, count, ids, values, optional, columns))
        self._open_size = [a + b for a, b in zip(self._open_size, size, strict=True)]
        self.summary.count(len(tokens), ids, values, [name for name, cells in optional.items() if len(cells)])
        full = any(a >= b for a, b in zip(self._open_size, limits, strict=True))
        if full or len(self._open) >= CHUNK_SEQUENCES:
            self._flush()

    def _flush(self) -> None:
        """Write the open chunk; close the shard when it is large enough.

        A chunk that was not written whole ends the writing: what would come behind it could not be read.
        """
        if not self._open:
            return
        try:
            user = self._columns.arrays(self._open)
            if self._shard is None:
                schema = shard_schema(self._settings.header(), self._columns.fields())
                self._shard = ShardWriter(self._commit.next_shard(), schema)
            self._shard.write(self._open, user)
            self._open, self._open_size = [], [0, 0, 0]
            if self._shard.bytes >= self._settings.shard_bytes:
                self._finish_shard()
        except BaseException as error:
            self._failure = error
            self.abort()
            raise

    def _finish_shard(self) -> None:
        if self._shard is not None:
            written = self._shard.finish()
            self._commit.add(written)
            self.summary.bytes += written.bytes
            self._shard = None


class _Adding:
    """Names the sequence in whatever its arrays are refused for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> str:
        if not isinstance(self.name, str):
            raise InvalidInputError(f"the id {self.name!r} is no string")
        try:
            self.name.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"the id {self.name!r} is not valid Unicode: {error.reason}") from error
        return self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, InvalidInputError):
            raise type(error)(f"sequence {self.name!r}: {error}") from error


def _optional(
    positions: int,
    target_logprob: ArrayLike | None,
    target_rank: ArrayLike | None,
    logsumexp: ArrayLike | None,
    entropy: ArrayLike | None,
    loss_mask: ArrayLike | None,
) -> dict[str, NDArray[Any]]:
    floats = {"target_logprob": target_logprob, "logsumexp": logsumexp, "entropy": entropy}
    stored: dict[str, NDArray[Any]] = {
        name: checked.as_floats(name, value, positions) for name, value in floats.items() if value is not None
    }
    if target_rank is not None:
        stored["target_rank"] = checked.as_ranks(target_rank, positions)
    if loss_mask is not None:
        stored["loss_mask"] = checked.as_mask(loss_mask, positions)
    return stored


def _as_teacher(teacher: Teacher | str | Mapping[str, Any] | None) -> Teacher | None:
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    try:
        return msgspec.convert({"name": teacher} if isinstance(teacher, str) else dict(teacher), Teacher)
    except msgspec.ValidationError as error:
        raise InvalidInputError(f"teacher: {error}") from error


def _warn_of_unknowns(manifest: Manifest) -> None:
    unknown = [
        name.replace("_", " ") for name in ("teacher", "tokenizer", "logit_width") if getattr(manifest, name) is None
    ]
    if manifest.tokenizer is not None and manifest.tokenizer.digest is None:
        unknown.append("tokenizer's identity")
    if unknown:
        warnings.warn(
            f"the dataset does not say its {', '.join(unknown)}: whoever uses it must know",
            LogitStoreWarning,
            3,
        )
