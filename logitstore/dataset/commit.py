"""The files of a dataset while it is written: names for shards, and the manifest that makes them a dataset."""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from logitstore._version import __version__
from logitstore.errors import DatasetExistsError
from logitstore.io import sync_directory, write_atomic
from logitstore.schema import (
    FORMAT_VERSION,
    Manifest,
    ShardInfo,
    Source,
    Split,
    Teacher,
    TokenizerInfo,
    Totals,
    dataset_digest,
    serialise_manifest,
)
from logitstore.schema.manifest import MANIFEST_NAME, FileInfo, sum_splits
from logitstore.tokenizer import PARTIAL_FILE, Tokenizer

if TYPE_CHECKING:
    from logitstore.dataset.settings import Settings
    from logitstore.dataset.summary import Summary
    from logitstore.shard.writer import WrittenShard

DATA_DIRECTORY: Final = "data"
TOKENIZER_DIRECTORY: Final = "tokenizer"
_SHARD: Final = re.compile(r".+-(?P<number>\d{5,})\.arrow(\.partial)?")


class Commit:
    """Names shards, and publishes the manifest when all are there.

    New shards never take the name of a file that exists, so a dataset that is overwritten stays whole until its
    manifest is replaced; then its shards are deleted.

    Args:
        root: directory of the dataset.
        split: name of the split that is written.
        overwrite: replace what is there.

    Raises:
        DatasetExistsError: something is there and `overwrite` is False.
    """

    def __init__(self, root: Path, split: str, *, overwrite: bool) -> None:
        self.root = root
        self.split = split
        if root.exists() and not root.is_dir():
            raise DatasetExistsError(f"{root} is a file; a dataset is a directory")
        self._old = _shard_files(root)
        if not overwrite and (root / MANIFEST_NAME).exists():
            raise DatasetExistsError(f"{root} holds a dataset; choose another path, or overwrite it (--overwrite)")
        if not overwrite and self._old:
            raise DatasetExistsError(
                f"{root} holds an unfinished dataset ({self._old[0].name}); choose another path, or overwrite it "
                f"(--overwrite)"
            )
        self._next = 1 + max((_number(path) for path in self._old), default=-1)
        self._shards: list[ShardInfo] = []

    def next_shard(self) -> Path:
        """Path of the next shard; its directory exists."""
        directory = self.root / DATA_DIRECTORY / self.split
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.split}-{self._next:05d}.arrow"
        self._next += 1
        return path

    def add(self, shard: WrittenShard) -> None:
        """Take up a shard that is complete."""
        self._shards.append(
            ShardInfo(
                path=shard.path.relative_to(self.root).as_posix(),
                split=self.split,
                bytes=shard.bytes,
                sha256=shard.sha256,
                tail_digest=shard.tail_digest,
                sequences=shard.sequences,
                positions=shard.positions,
                candidates=shard.candidates,
            )
        )

    def publish(
        self,
        settings: Settings,
        teacher: Teacher | None,
        tokenizer: Tokenizer | None,
        source: Source | None,
        lineage: tuple[Source, ...],
        user_columns: dict[str, str],
        summary: Summary,
    ) -> Manifest:
        """Write the tokenizer's files and then the manifest: from here on the dataset exists."""
        self.root.mkdir(parents=True, exist_ok=True)
        shards = tuple(self._shards)
        tokenizer_info = None if tokenizer is None else write_tokenizer(self.root, tokenizer)
        manifest = Manifest(
            version=str(FORMAT_VERSION),
            written_by=f"logitstore {__version__}",
            teacher=teacher,
            tokenizer=tokenizer_info,
            logit_width=settings.logit_width,
            normalised=settings.normalised,
            temperature=settings.temperature,
            sampling=settings.sampling(),
            user_columns=user_columns,
            source=source,
            lineage=lineage,
            splits=sum_splits(shards) or {self.split: Split()},
            totals=Totals(
                shards=len(shards),
                sequences=summary.sequences,
                positions=summary.positions,
                candidates=summary.candidates,
                bytes=sum(shard.bytes for shard in shards),
                highest_id=summary.highest_id if summary.highest_id >= 0 else None,
                encodings=summary.encodings,
                columns=summary.columns,
            ),
            dataset_digest=dataset_digest(shards, tokenizer_info),
            shards=shards,
        )
        write_atomic(self.root / MANIFEST_NAME, serialise_manifest(manifest))
        self._remove_old(manifest)
        return manifest

    def _remove_old(self, manifest: Manifest) -> None:
        for path in self._old:
            with contextlib.suppress(OSError):  # a file that stays is unreferenced; `validate` names it
                path.unlink()
        kept = {file.path for file in manifest.tokenizer.files} if manifest.tokenizer is not None else set()
        for path in sorted((self.root / TOKENIZER_DIRECTORY).glob("*")) if self._old else []:
            if path.relative_to(self.root).as_posix() not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()


def write_tokenizer(root: Path, tokenizer: Tokenizer) -> TokenizerInfo:
    """Copy a tokenizer's files into a dataset, as they are, and describe it."""
    directory = root / TOKENIZER_DIRECTORY
    directory.mkdir(exist_ok=True)
    files = {path.name: path.read_bytes() for path in tokenizer.files}
    if tokenizer.is_partial:
        files = {PARTIAL_FILE: tokenizer.to_partial_json()}
    for name, data in files.items():
        write_atomic(directory / name, data)
    sync_directory(directory)
    infos = [
        FileInfo(path=f"{TOKENIZER_DIRECTORY}/{name}", bytes=len(data), sha256=_sha256(data))
        for name, data in sorted(files.items())
    ]
    return describe_tokenizer(tokenizer, tuple(infos))


def describe_tokenizer(tokenizer: Tokenizer, files: tuple[FileInfo, ...]) -> TokenizerInfo:
    """A tokenizer's identity, as the manifest has it."""
    return TokenizerInfo(
        digest=tokenizer.digest,
        vocabulary_size=tokenizer.vocabulary_size,
        special_tokens=_special_digest(tokenizer),
        chat_template=tokenizer.chat_template_sha256,
        files=files,
    )


def _special_digest(tokenizer: Tokenizer) -> str | None:
    """sha256 over (id, text) of the special tokens in id order: id and length as u32, the text in UTF-8."""
    if not tokenizer.special_tokens:
        return None
    parts = [(token, text.encode()) for token, text in sorted(tokenizer.special_tokens.items())]
    return _sha256(b"".join(struct.pack("<II", token, len(text)) + text for token, text in parts))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _shard_files(root: Path) -> list[Path]:
    """Every file under `data/` that has a shard's name, complete or not."""
    return sorted(path for path in root.glob(f"{DATA_DIRECTORY}/*/*") if _SHARD.fullmatch(path.name))


def _number(path: Path) -> int:
    match = _SHARD.fullmatch(path.name)
    return int(match["number"]) if match else -1
