"""`validate`: all checks in the order in which a reader meets the bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from logitstore.checks.deep import DeepCheck
from logitstore.checks.findings import Finding, Findings
from logitstore.checks.quick import check_described, check_files, check_shard, check_tokenizer
from logitstore.dataset.shards import open_shard, read_manifest
from logitstore.errors import (
    CorruptDataError,
    DatasetNotFoundError,
    IncompleteDatasetError,
    UnsupportedVersionError,
)
from logitstore.io import LocalStore
from logitstore.io.store import local_path
from logitstore.schema import Manifest
from logitstore.shard.reader import Shard


def validate(
    path: str | os.PathLike[str],
    deep: bool = False,  # noqa: FBT001, FBT002 - validate(path, True) is documented
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Check a dataset.

    Args:
        path: directory of the dataset.
        deep: read every byte and check every row; otherwise only manifest, sizes, tails, indexes, schemas and
            tokenizer.
        progress: called with (bytes of shards checked, bytes in all).

    Raises:
        InvalidInputError: the path is a URL.

    Returns:
        Every problem found. The dataset is valid when none of them is an error, see `is_valid`.
    """
    root = local_path(path, "validate what `logitstore pull` fetches; what is read from a URL is verified as it comes")
    findings = Findings()
    manifest = _manifest(root, findings)
    if manifest is None:
        return findings.done()
    check_described(manifest, findings)
    check_files(root, manifest, findings)
    tokenizer = check_tokenizer(root, manifest, findings)
    check = DeepCheck(root, manifest, findings, tokenizer) if deep else None
    done, total = 0, manifest.totals.bytes
    for number, info in enumerate(manifest.shards):
        shard = _shard(root, number, manifest, findings)
        if shard is not None:
            check_shard(shard, info, manifest, findings)
            if check is not None:
                check.shard(number, shard)
        elif check is not None:
            check.skip(number)
        done += info.bytes
        if progress is not None:
            progress(done, total)
    if check is not None:
        check.finish()
    return findings.done()


def is_valid(findings: Iterable[Finding]) -> bool:
    """Whether none of the findings is an error."""
    return all(finding.severity != "error" for finding in findings)


def _manifest(root: Path, findings: Findings) -> Manifest | None:
    try:
        return read_manifest(LocalStore(root))
    except CorruptDataError as error:
        findings.add_corrupt(error, root)
    except UnsupportedVersionError as error:
        findings.add("version", str(error))
    except IncompleteDatasetError as error:
        findings.add("dataset-incomplete", str(error))
    except DatasetNotFoundError as error:
        findings.add("dataset-missing", str(error))
    return None


def _shard(root: Path, number: int, manifest: Manifest, findings: Findings) -> Shard | None:
    info = manifest.shards[number]
    try:
        return open_shard(LocalStore(root), info, manifest)
    except CorruptDataError as error:
        findings.add_corrupt(error, root)
    except UnsupportedVersionError as error:
        findings.add("version", str(error), shard=info.path)
    return None
