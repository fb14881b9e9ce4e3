"""The checks that read no chunk: manifest, files, tails, indexes, schemas, tokenizer."""

from __future__ import annotations

from pathlib import Path

from logitstore.checks.findings import Findings
from logitstore.dataset.tokenizer_files import describe_tokenizer
from logitstore.errors import CorruptDataError, LogitStoreError, SourceNotFoundError
from logitstore.io import regular_size, sha256_file
from logitstore.schema import Manifest, ShardInfo, TokenizerInfo
from logitstore.schema.manifest import TOKENIZER_DIRECTORY
from logitstore.shard.reader import Shard
from logitstore.tokenizer import Tokenizer


def check_described(manifest: Manifest, findings: Findings) -> None:
    """Warn of what the manifest does not say, and of totals that contradict it."""
    for name in ("teacher", "tokenizer", "logit_width"):
        if getattr(manifest, name) is None:
            words = name.replace("_", " ")
            findings.add(
                f"{name.replace('_', '-')}-unknown",
                f"the manifest does not say the {words}; whoever uses the dataset must know it",
                "warning",
            )
    if manifest.tokenizer is not None and manifest.tokenizer.digest is None:
        findings.add(
            "tokenizer-unknown",
            "the tokenizer is a partial vocabulary without an identity: students' tokenizers cannot be checked",
            "warning",
        )
    highest, width = manifest.totals.highest_id, manifest.logit_width
    if highest is not None and width is not None and highest >= width:
        findings.add("totals", f"the highest id {highest} is not below the logit width {width}")


def check_files(root: Path, manifest: Manifest, findings: Findings) -> None:
    """Name files that look like shards but are not in the manifest."""
    known = {shard.path for shard in manifest.shards}
    for path in sorted(root.glob("data/*/*.arrow*")):
        name = path.relative_to(root).as_posix()
        if name not in known:
            findings.add(
                "unreferenced-file",
                "not in the manifest: left by a writer that was stopped, or still at work; delete it if none is",
                "warning",
                shard=name,
            )


def check_shard(shard: Shard, info: ShardInfo, manifest: Manifest, findings: Findings) -> None:
    """Checks of an opened shard that reading it does not make."""
    for check in (shard.check_end_mark, lambda: shard.hashes):
        try:
            check()
        except CorruptDataError as error:
            findings.add(error.code, error.reason, shard=info.path)
    found = {field.name: str(field.type) for field in shard.user_fields}
    if found != manifest.user_columns:
        findings.add(
            "user-columns",
            f"its own columns are {found or 'none'}, the manifest says {manifest.user_columns or 'none'}",
            shard=info.path,
        )


def check_tokenizer(root: Path, manifest: Manifest, findings: Findings) -> Tokenizer | None:
    """Check the tokenizer's files and its identity; returns it when it is whole."""
    info = manifest.tokenizer
    if info is None:
        return None
    whole = True
    named = {file.path for file in info.files}
    for path in sorted((root / TOKENIZER_DIRECTORY).rglob("*")):
        if (name := path.relative_to(root).as_posix()) not in named and not path.is_dir():
            findings.add(
                "unreferenced-file", "not in the manifest, but readers of the tokenizer may take it up", "warning",
                shard=name,
            )  # fmt: skip
    for file in info.files:
        try:
            size = regular_size(root / file.path)
            same = size == file.bytes and sha256_file(root / file.path) == file.sha256
            problem = "" if same else "it is not the file that the manifest describes"
        except (SourceNotFoundError, CorruptDataError) as error:
            problem = str(error)
        if problem:
            whole = False
            findings.add("tokenizer-file", f"{file.path}: {problem}; copy it again from the source", shard=file.path)
    if not whole or not info.files:
        return None
    try:
        tokenizer = Tokenizer.from_path(root / info.folder)
    except LogitStoreError as error:
        findings.add("tokenizer-file", str(error))
        return None
    described = describe_tokenizer(tokenizer, info.files)
    if described != info:
        findings.add(
            "tokenizer-identity",
            f"the files give {_identity(described)}; the manifest says {_identity(info)}",
        )
    return tokenizer


def _identity(info: TokenizerInfo) -> str:
    return (
        f"digest {info.digest}, {info.vocabulary_size} tokens, special tokens {info.special_tokens}, "
        f"chat template {info.chat_template}"
    )
