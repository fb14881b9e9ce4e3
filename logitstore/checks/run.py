"""`validate`: all checks in the order in which a reader meets the bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from logitstore.checks.deep import check_sums
from logitstore.checks.findings import Finding, Findings
from logitstore.checks.parts import ChunkIds, Sums, Task, check_part, parts_of
from logitstore.checks.quick import check_described, check_files, check_tokenizer
from logitstore.checks.repeated import check_repeated
from logitstore.checks.workers import workers_for
from logitstore.dataset.shards import read_manifest
from logitstore.errors import (
    CorruptDataError,
    DatasetNotFoundError,
    IncompleteDatasetError,
    UnsupportedVersionError,
)
from logitstore.io import LocalStore
from logitstore.io.store import local_path
from logitstore.processes import each
from logitstore.schema import Manifest


def validate(
    path: str | os.PathLike[str],
    deep: bool = False,  # noqa: FBT001, FBT002 - validate(path, True) is documented
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Check a dataset.

    Args:
        path: directory of the dataset.
        deep: read every byte and check every row; otherwise only manifest, sizes, tails, indexes, schemas and
            tokenizer.
        workers: processes that read, where `deep`; 0: this one. The findings are the same, in the same order. None: as
            many as there are cores; 0 for less than 64 MiB, and in a script without `if __name__ == "__main__":`.
        progress: called with (bytes of shards checked, bytes in all).

    Raises:
        InvalidInputError: the path is a URL, a negative number of workers, or one was killed.

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
    task = Task(root, manifest, deep)
    sums, ids, done, total = Sums(), list[ChunkIds](), 0, manifest.totals.bytes
    processes = workers_for(total, workers) if deep else 0
    with contextlib.closing(each(check_part, task, parts_of(task), processes)) as parts:
        for part in parts:
            findings.join(part.found)
            sums += part.sums
            ids += part.ids
            done += part.bytes
            if progress is not None:
                progress(done, total)
    if deep:
        check_repeated(task, ids, findings)
        check_sums(sums, manifest, tokenizer.vocabulary_size if tokenizer is not None else None, findings)
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
