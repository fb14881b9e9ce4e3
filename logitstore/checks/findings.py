"""What a check reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from logitstore.errors import CorruptDataError

Severity = Literal["error", "warning", "info"]

CODES: Final[dict[str, str]] = {
    # The dataset as a whole.
    "dataset-missing": "there is no dataset at this path",
    "dataset-incomplete": "there are shards but no manifest",
    "version": "this release does not read this version of the format, or a feature it requires",
    "manifest": "the manifest's bytes, seal or fields are wrong",
    "manifest-path": "the manifest names a path outside the dataset, or one twice",
    "manifest-sums": "the manifest's sums or dataset digest are not those of its shards",
    "json": "text that is not the JSON it should be",
    "file-kind": "a directory, device or pipe stands where a file should",
    "file-size": "a file is larger than the format allows",
    "totals": "the manifest's totals are not those of the content",
    "unreferenced-file": "a file with a shard's name that the manifest does not name",
    "teacher-unknown": "the manifest does not say the teacher",
    "tokenizer-unknown": "the manifest does not say the tokenizer, or has no identity of it",
    "logit-width-unknown": "the manifest does not say the logit width",
    "tokenizer-file": "a tokenizer file is missing or is not the one that the manifest describes",
    "tokenizer-identity": "the tokenizer's files do not give the identity in the manifest",
    "alignment": "the tokens that follow are where the rows are off by some positions",
    # A shard.
    "shard-missing": "a shard is not there",
    "shard-size": "a shard has another size than the manifest or its tail says",
    "shard-other": "a whole shard, but not the one that the manifest names",
    "shard-sha256": "a shard's sha256 is not that of the manifest",
    "shard-tail": "the tail is damaged",
    "shard-index": "the index is damaged or contradicts the tail",
    "shard-hashes": "the id hashes are damaged or are not those of the ids",
    "shard-end-mark": "Arrow's end mark is damaged",
    "shard-schema": "the schema message is damaged or has other columns",
    "shard-header": "the shard's header is wrong or contradicts the manifest",
    "user-columns": "the users' columns are not those of the manifest",
    # A chunk.
    "chunk-digest": "a chunk's bytes do not have the digest of the index",
    "chunk-message": "a chunk is no record batch of the schema",
    "chunk-metadata": "a chunk's metadata are missing or wrong",
    "chunk-counts": "a chunk's sequences, positions or candidates are not those of the index",
    "order": "a chunk's token order is wrong",
    # A sequence.
    "cell": "a cell does not decode to what its sequence needs",
    "id-range": "an id is outside the logit width, or a token outside the limits",
    "duplicate-sequence-id": "two sequences have one id",
    "duplicate-id": "an id stands twice at one position",
    "value-order": "logprobs increase from a candidate to the next",
    "value-range": "a logprob is NaN, infinite or above 0",
    "probability-sum": "the probabilities at a position sum to more than 1",
    "tail-range": "a tail is above 0, or present where there can be none",
    "tail-mismatch": "candidates and tail do not sum to 1",
    "target": "target_rank and the candidate of that rank disagree about the next token",
    "optional-range": "a value of an optional column is impossible",
    "corrupt": "damage of another kind",
}
"""Every code that a finding can have, and what it means. Codes do not change from release to release."""

LISTED: Final = 1000
"""Findings of one code that are listed: those of a terabyte of bad rows must fit in memory too."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem.

    Attributes:
        code: stable short name; see `CODES`.
        severity: `error` makes a dataset invalid; `warning` should be looked at; `info` is for the record.
        shard: path of the file in the dataset, or None.
        chunk: number of the chunk in its shard, or None.
        row: row number in the dataset, or None.
        position: position in the sequence, or None.
        message: what is wrong, and what to do.
    """

    code: str
    severity: Severity
    shard: str | None
    chunk: int | None
    row: int | None
    position: int | None
    message: str


@dataclass(frozen=True, slots=True)
class Found:
    """The findings of a part, to be sent and joined.

    Attributes:
        listed: at most `LISTED` of each code and severity.
        times: how often each was found in all.
    """

    listed: tuple[Finding, ...] = ()
    times: tuple[tuple[tuple[str, Severity], int], ...] = ()


class Findings:
    """A list of findings that stays bounded."""

    def __init__(self) -> None:
        self._list: list[Finding] = []
        self._times: Counter[tuple[str, Severity]] = Counter()

    def add(
        self,
        code: str,
        message: str,
        severity: Severity = "error",
        *,
        shard: str | None = None,
        chunk: int | None = None,
        row: int | None = None,
        position: int | None = None,
    ) -> None:
        """Report a problem."""
        self._times[code, severity] += 1
        if self._times[code, severity] <= LISTED:
            self._list.append(Finding(code, severity, shard, chunk, row, position, message))

    def add_corrupt(
        self, error: CorruptDataError, root: Path, *, chunk: int | None = None, row: int | None = None
    ) -> None:
        """Report damage that reading came upon."""
        shard = None if error.path is None else _relative(error.path, root)
        place = f" (byte {error.offset})" if error.offset is not None else ""
        self.add(
            error.code if error.code in CODES else "corrupt",
            error.reason + place,
            shard=shard,
            chunk=error.chunk if error.chunk is not None else chunk,
            row=row,
        )

    def add_unlisted(self, code: str, severity: Severity, times: int) -> None:
        """Count findings that are not listed."""
        self._times[code, severity] += times

    def join(self, found: Found) -> None:
        """Take up the findings of the part that follows."""
        before = self._times.copy()
        for finding in found.listed:
            self._times[finding.code, finding.severity] += 1
            if self._times[finding.code, finding.severity] <= LISTED:
                self._list.append(finding)
        for kind, times in found.times:
            self._times[kind] = before[kind] + times

    def found(self) -> Found:
        """What was found so far, to be joined."""
        return Found(tuple(self._list), tuple(self._times.items()))

    def done(self) -> list[Finding]:
        """The findings, and one more for each code of which some were not listed."""
        listed = Counter((finding.code, finding.severity) for finding in self._list)
        for (code, severity), times in self._times.items():
            if more := times - listed[code, severity]:
                message = f"{more} more findings of this kind are not listed"
                self._list.append(Finding(code, severity, None, None, None, None, message))
        self._times.clear()
        return list(self._list)


def _relative(path: str, root: Path) -> str:
    try:
        return Path(path).relative_to(root).as_posix()
    except ValueError:
        return path
