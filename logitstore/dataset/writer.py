"""Writing a dataset: sequences in, shards and a manifest out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from logitstore.dataset import input as checked
from logitstore.dataset.logits import reduce_logits
from logitstore.dataset.origin import Origin, Sink
from logitstore.dataset.part import PartWriter
from logitstore.dataset.settings import Settings
from logitstore.dataset.summary import Summary
from logitstore.dataset.usercolumns import UserColumns, own_values
from logitstore.encoding.values import Encoding, Values, ValuesOption, encode_values
from logitstore.errors import InvalidInputError, LogitStoreWarning
from logitstore.io.store import local_path
from logitstore.limits import CHUNK_CANDIDATES, SEQUENCE_ID_BYTES
from logitstore.schema import Manifest, Source, Teacher
from logitstore.schema.header import Normalised
from logitstore.schema.journal import Part
from logitstore.shard.chunk import StoredSequence, encode_tail
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
        resume: go on where an earlier writer with the same settings was stopped: sequences that it wrote (by their ids)
            are passed over when they are added again, and the dataset becomes what it would have become. Begins where
            there is nothing; changes nothing where the dataset is finished.
        sink: takes complete shards to another place while writing goes on, such as `logitstore.hub.HubSink`; they are
            removed here when they have arrived. None leaves them here.
        fingerprint: what else has to be the same when this is gone on with, by name: digests of inputs, say.
        part: number of this writer and how many there are, `3/16` (from `0/16` to `15/16`), where several write one
            split, in other processes or on other machines; `logitstore.commit` joins what they wrote.

    Raises:
        DatasetExistsError: something is there and neither `overwrite` nor `resume` says what to do with it, or another
            writer is at work.
        InvalidInputError: a setting is out of range, or not that of the writer which is to be gone on with.
        CorruptDataError: what is to be gone on with is damaged.
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
        resume: bool = False,
        part: str | None = None,
        fingerprint: Mapping[str, str] | None = None,
        sink: Sink | None = None,
    ) -> None:
        if overwrite and resume:
            raise InvalidInputError(
                "overwrite begins anew and resume goes on: give one of them (a writer that was to overwrite is resumed "
                "by resume alone)"
            )
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer.from_path(Path(tokenizer))
        settings = Settings.check(
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
        root = local_path(path, "write to a directory, and publish it with `logitstore push`").absolute()
        self._part = PartWriter(
            root,
            Part.parse(split, part),
            settings,
            Origin(_as_teacher(teacher), tokenizer, source, lineage, dict(fingerprint or {})),
            UserColumns(columns),
            overwrite=overwrite,
            resume=resume,
            sink=sink,
        )

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
        return self._part.closed

    @property
    def finished(self) -> bool:
        """Whether an earlier writer finished this, so that nothing is left to do; only with `resume`."""
        return self._part.finished

    @property
    def settings(self) -> Settings:
        """What it does with every sequence."""
        return self._part.settings

    @property
    def summary(self) -> Summary:
        """What was written so far, by the writers that this one goes on from too."""
        return self._part.summary

    @property
    def given(self) -> int:
        """How many sequences this writer was given, those passed over that were there before included."""
        return self._part.given

    def numbered(self, number: int) -> str:
        """The id that a sequence gets by its running number; parts share the numbers out among themselves."""
        return self._part.numbered(number)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the dataset will name."""
        return self._part.origin.tokenizer

    def __contains__(self, sequence_id: str) -> bool:
        """Whether a sequence was written already, also by a writer that this one goes on from."""
        return sequence_id in self._part

    def use_partial_vocabulary(self, pieces: Mapping[int, bytes]) -> None:
        """Keep the bytes of these tokens where no whole tokenizer is known: enough to show text, no identity."""
        origin = self._part.origin
        if origin.tokenizer is None or origin.tokenizer.is_partial:
            known = {} if origin.tokenizer is None else dict(origin.tokenizer.items())
            self._part.origin = replace(origin, tokenizer=Tokenizer.from_pieces({**pieces, **known}))

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
            id: unique in the dataset; None takes the running number, which in part i of n is i + n times that in it.
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
            if self._part.had(name):
                return
            token_array = checked.as_tokens(tokens)
            n = len(token_array)
            counts, id_array, values = checked.as_ragged(ids, logprobs, count, n, "logprobs", "f", "floats")
            width = self.settings.logit_width
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
            if self._part.had(name):
                return
            token_array = checked.as_tokens(tokens)
            width = np.shape(logits)[-1] if np.ndim(logits) == 2 else 0
            settings = self.settings.with_logit_width(width, fixed=self.summary.sequences > 0 or self._part.begun)
            kept = reduce_logits(token_array, logits, settings.cut.top_k or DEFAULT_LOGITS_TOP_K)
            optional = _optional(
                len(token_array), kept.target_logprob, kept.target_rank, kept.logsumexp, entropy, loss_mask
            )
            before, self._part.settings = self.settings, settings
            try:
                self._store(name, token_array, kept.candidates, kept.tail, optional, columns)
            except InvalidInputError:
                if not self.summary.sequences:  # what was refused does not say how wide the others are
                    self._part.settings = before
                raise

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
            if self._part.had(name):
                return
            token_array = checked.as_tokens(tokens)
            total = len(token_array)
            counts, id_array, times = checked.as_ragged(ids, draws, count, total, "draws", "iu", "integers")
            kept = checked.order_draws(counts, id_array, times, n, self.settings.logit_width)
            optional = _optional(total, target_logprob, target_rank, None, entropy, loss_mask)
            values = Values(Encoding.DRAWS, np.empty(0, np.uint32), kept.draws)
            self._append(StoredSequence(name, token_array, kept.count, kept.ids, values, optional, columns))

    def close(self) -> None:
        """Write what is left and commit the dataset, or finish the part; does nothing the second time.

        Raises:
            InvalidInputError: a user's column cannot be stored, or writing failed before.
            OSError: the disk is full, say.
        """
        manifest = self._part.close()
        if manifest is not None:
            warn_of_unknowns(manifest, 2)

    def abort(self) -> None:
        """Stop without committing: complete chunks stay, to be gone on with, and readers refuse the dataset."""
        self._part.abort()

    def _adding(self, sequence_id: str | None) -> _Adding:
        if self.closed:
            raise InvalidInputError("the writer is closed; open a new one")
        self._part.sync_if_due()
        return _Adding(self.numbered(self.given) if sequence_id is None else sequence_id)

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
        settings = self.settings
        cut = checked.cut_candidates(given, settings.cut)
        kept = cut.candidates
        if settings.normalised == "vocabulary":
            optional["tail"] = encode_tail(checked.tail_of(tail, cut))
        elif tail is not None:
            raise InvalidInputError("a tail was given, but there is none where normalised='candidates'")
        values = encode_values(
            kept.logprobs,
            kept.count,
            settings.values,
            settings.resolution,
            logsumexp=optional.get("logsumexp"),
            logits=kept.logits,
        )
        if values.logsumexp is not None:
            optional["logsumexp"] = values.logsumexp
        ids = kept.ids.astype(np.uint32)
        self._append(StoredSequence(name, tokens, kept.count, ids, values, optional, columns), kept)

    def _append(self, sequence: StoredSequence, given: checked.Candidates | None = None) -> None:
        column_bytes = self._part.columns.check(sequence.columns)
        self._part.append(replace(sequence, columns=own_values(sequence.columns)), column_bytes, given)


class _Adding:
    """Names the sequence in whatever its arrays are refused for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> str:
        if not isinstance(self.name, str):
            raise InvalidInputError(f"the id {self.name!r} is no string")
        if len(self.name) > SEQUENCE_ID_BYTES:
            raise InvalidInputError(f"an id of {len(self.name)} characters; the limit is {SEQUENCE_ID_BYTES}")
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


def warn_of_unknowns(manifest: Manifest, depth: int) -> None:
    """Warn of what the manifest of a new dataset does not say.

    Args:
        manifest: of the dataset.
        depth: callers between this and whom it concerns.
    """
    unknown = [
        name.replace("_", " ") for name in ("teacher", "tokenizer", "logit_width") if getattr(manifest, name) is None
    ]
    if manifest.tokenizer is not None and manifest.tokenizer.digest is None:
        unknown.append("tokenizer's identity")
    if unknown:
        warnings.warn(
            f"the dataset does not say its {', '.join(unknown)}: whoever uses it must know",
            LogitStoreWarning,
            depth + 1,
        )
