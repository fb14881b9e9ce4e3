"""The manifest: `logitstore.json`, the commit point of a dataset (spec, "Manifest")."""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import PurePosixPath
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from logitstore.errors import CorruptDataError
from logitstore.limits import ID_LIMIT
from logitstore.schema.header import (
    LogitWidth,
    Normalised,
    Resolution,
    ShardHeader,
    Temperature,
    is_power_of_two,
)
from logitstore.schema.version import FORMAT_NAME, Features, check_readable

MANIFEST_NAME: Final = "logitstore.json"
TOKENIZER_DIRECTORY: Final = "tokenizer"

Count = Annotated[int, Meta(ge=0, le=2**53)]  # what every JSON reader holds exactly
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
SplitName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=64)]  # as `datasets` has it
RelativePath = Annotated[str, Meta(min_length=1, max_length=1024)]

_SEAL: Final = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')
_SEAL_LENGTH: Final = len(b',\n "sha256": ""\n}\n') + 64


class Teacher(msgspec.Struct, frozen=True, kw_only=True):
    """The model whose distributions these are; what is not known is null.

    Attributes:
        name: repository or path.
        revision: commit of the repository.
        quantisation: such as `Q4_K_M`.
        dtype: of the weights in the engine.
        licence: of the model.
        engine: program that ran it.
        engine_version: its version.
        logprobs_mode: what the engine calls its values, such as `raw_logprobs`.
    """

    name: str
    revision: str | None = None
    quantisation: str | None = None
    dtype: str | None = None
    licence: str | None = None
    engine: str | None = None
    engine_version: str | None = None
    logprobs_mode: str | None = None


class FileInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the dataset that is no shard: path in it, bytes, sha256."""

    path: RelativePath
    bytes: Count
    sha256: Sha256


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of the tokenizer, and its files in the dataset.

    Attributes:
        digest: sha256 over (id, bytes) in id order; null for a partial vocabulary.
        vocabulary_size: highest id + 1; null for a partial vocabulary.
        special_tokens: sha256 over (id, text) of the special tokens; a difference in it alone only warns.
        chat_template: sha256 of the chat template; likewise.
        files: the tokenizer's files.
    """

    digest: Sha256 | None
    vocabulary_size: Annotated[int, Meta(ge=1, le=ID_LIMIT)] | None
    special_tokens: Sha256 | None = None
    chat_template: Sha256 | None = None
    files: tuple[FileInfo, ...] = ()

    @property
    def folder(self) -> str:
        """The directory of its files: `tokenizer`, or one below it."""
        return self.files[0].path.rpartition("/")[0] if self.files else TOKENIZER_DIRECTORY


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What the writer was told to keep of each distribution, and how to encode it."""

    values: str
    resolution: Resolution
    top_k: Annotated[int, Meta(ge=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_k: Annotated[int, Meta(ge=1)] = 1


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What the dataset was made from: a format's name and the names of files, or a dataset's name and revision."""

    format: str | None = None
    name: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()


class ShardInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One shard.

    Attributes:
        path: relative to the dataset, with `/`.
        split: its split.
        bytes: size of the file.
        sha256: of the file.
        tail_digest: xxh3-128 that the file's tail carries of itself. The tail holds the digests of everything else:
            a shard that belongs to another dataset is found by reading 128 bytes of it.
        sequences: number of sequences.
        positions: number of positions.
        candidates: number of candidates.
    """

    path: RelativePath
    split: SplitName
    bytes: Count
    sha256: Sha256
    tail_digest: Xxh3
    sequences: Count
    positions: Count
    candidates: Count


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the shards of a split."""

    shards: Count = 0
    sequences: Count = 0
    positions: Count = 0
    candidates: Count = 0
    bytes: Count = 0


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the dataset.

    Attributes:
        shards: number of shards.
        sequences: number of sequences.
        positions: number of positions.
        candidates: number of candidates.
        bytes: size of the shards.
        highest_id: highest candidate id; null when there are no candidates.
        encodings: sequences under each encoding.
        columns: sequences that have each optional per-position column.
    """

    shards: Count
    sequences: Count
    positions: Count
    candidates: Count
    bytes: Count
    highest_id: Annotated[int, Meta(ge=0, lt=ID_LIMIT)] | None
    encodings: dict[str, Count] = {}
    columns: dict[str, Count] = {}


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What concerns a dataset as a whole. Its file ends with the sha256 of the bytes before that field.

    Attributes:
        format: always `logitstore`.
        version: format version, `major.minor`.
        features: feature flags.
        written_by: program and version.
        teacher: the model; null when it was not said.
        tokenizer: identity and files; null when it was not given.
        logit_width: width of the teacher's head; candidate ids are below it; null when it was not said.
        normalised: over what the probabilities sum to one.
        temperature: at which the logprobs were taken.
        sampling: what was kept of each distribution.
        user_columns: the users' columns and their Arrow types.
        source: what this dataset was made from.
        lineage: what that was made from, and so on; the teacher's own teachers too.
        splits: sums of each split.
        totals: sums of all.
        dataset_digest: one digest of the content, see `dataset_digest`.
        shards: the shards; those of one split follow one another.
    """

    format: Literal["logitstore"] = FORMAT_NAME
    version: str
    features: Features = Features()
    written_by: str
    teacher: Teacher | None
    tokenizer: TokenizerInfo | None
    logit_width: LogitWidth | None
    normalised: Normalised
    temperature: Temperature
    sampling: Sampling
    user_columns: dict[str, str] = {}
    source: Source | None = None
    lineage: tuple[Source, ...] = ()
    splits: dict[SplitName, Split]
    totals: Totals
    dataset_digest: Sha256
    shards: tuple[ShardInfo, ...]

    @property
    def files(self) -> tuple[ShardInfo | FileInfo, ...]:
        """All files that it names: the tokenizer's, then the shards."""
        return (*(self.tokenizer.files if self.tokenizer is not None else ()), *self.shards)

    def header_agrees(self, header: ShardHeader) -> bool:
        """Whether a shard's header says the same as the manifest about how values are to be read."""
        return (
            header.logit_width == self.logit_width
            and header.normalised == self.normalised
            and header.temperature == self.temperature
            and header.resolution == self.sampling.resolution
        )


def dataset_digest(shards: tuple[ShardInfo, ...], tokenizer: TokenizerInfo | None) -> str:
    """One digest of a dataset's content: sha256 over a line for the tokenizer and one for each shard, in order.

    Args:
        shards: in the order of the manifest.
        tokenizer: its digest is the first line, `-` when there is none.

    Returns:
        64 hexadecimal digits.
    """
    lines = [tokenizer.digest if tokenizer is not None and tokenizer.digest is not None else "-"]
    lines += [f"{shard.split} {shard.sequences} {shard.sha256}" for shard in shards]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def sum_splits(shards: tuple[ShardInfo, ...]) -> dict[str, Split]:
    """The sums of each split, in the order in which the splits first appear."""
    splits: dict[str, Split] = {}
    for shard in shards:
        old = splits.get(shard.split, Split())
        splits[shard.split] = Split(
            shards=old.shards + 1,
            sequences=old.sequences + shard.sequences,
            positions=old.positions + shard.positions,
            candidates=old.candidates + shard.candidates,
            bytes=old.bytes + shard.bytes,
        )
    return splits


def serialise_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON, one field a line where it helps the eye, sealed by its sha256."""
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    body = body.removesuffix(b"\n}")
    return body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def parse_manifest(data: bytes) -> Manifest:
    """The inverse of `serialise_manifest`.

    Raises:
        CorruptDataError: the seal does not fit the bytes, or the content contradicts itself.
        UnsupportedVersionError: this release cannot read it.
    """
    seal = _SEAL.search(data, max(0, len(data) - _SEAL_LENGTH))
    if seal is None:
        raise CorruptDataError(
            "the manifest does not end with its sha256: it is cut off or was edited", code="manifest"
        )
    if hashlib.sha256(data[: seal.start()]).hexdigest().encode() != seal.group(1):
        raise CorruptDataError("the manifest's bytes do not have its sha256: damaged or edited", code="manifest")
    check_readable(data)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptDataError(f"the manifest is not valid: {error}", code="manifest") from error
    _check_consistent(manifest)
    return manifest


def _check_consistent(manifest: Manifest) -> None:
    _check_paths(manifest)
    if not is_power_of_two(manifest.sampling.resolution):
        raise CorruptDataError(f"resolution {manifest.sampling.resolution} is no power of two", code="manifest")
    sums = sum_splits(manifest.shards)
    if sum(1 for _ in itertools.groupby(manifest.shards, lambda shard: shard.split)) != len(sums):
        raise CorruptDataError("the manifest's shards of one split do not follow one another", code="manifest")
    if any(split != Split() and name not in sums for name, split in manifest.splits.items()) or any(
        manifest.splits.get(name) != split for name, split in sums.items()
    ):
        raise CorruptDataError("the manifest's splits are not the sums of its shards", code="manifest-sums")
    for field in ("shards", "sequences", "positions", "candidates", "bytes"):
        if getattr(manifest.totals, field) != sum(getattr(split, field) for split in sums.values()):
            raise CorruptDataError(
                f"the manifest's total of {field} is not the sum of its shards", code="manifest-sums"
            )
    if manifest.dataset_digest != dataset_digest(manifest.shards, manifest.tokenizer):
        raise CorruptDataError("the manifest's dataset digest is not that of its shards", code="manifest-sums")


def _check_paths(manifest: Manifest) -> None:
    paths = [file.path for file in manifest.files]
    for path in paths:
        if not is_safe_path(path):
            raise CorruptDataError(f"the manifest names {path!r}, a path outside the dataset", code="manifest-path")
    if len(set(paths)) != len(paths):
        raise CorruptDataError("the manifest names a file twice", code="manifest-path")
    of_tokenizer = manifest.tokenizer
    folders = {file.path.rpartition("/")[0] for file in of_tokenizer.files} if of_tokenizer is not None else set()
    if len(folders) > 1 or any(folder.partition("/")[0] != TOKENIZER_DIRECTORY for folder in folders):
        raise CorruptDataError("the tokenizer's files are not together under tokenizer/", code="manifest-path")


def is_safe_path(path: str) -> bool:
    """Whether a path of a manifest stays inside the dataset on every system."""
    if "\\" in path or ":" in path or "\0" in path or path.startswith("/") or path.endswith("/"):
        return False
    return all(part not in ("", ".", "..") for part in path.split("/")) and PurePosixPath(path).as_posix() == path
