"""Publishing a dataset on the Hub: files first, then one commit that makes them a dataset."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from logitstore.checks import validate
from logitstore.dataset.reader import Dataset
from logitstore.dataset.shards import read_manifest
from logitstore.errors import CorruptDataError, InvalidInputError, LogitStoreError
from logitstore.hub.card import BEGIN, card
from logitstore.hub.preview import previews
from logitstore.hub.target import CARD_BYTES, CARD_NAME, Target, There, card_text
from logitstore.io import LocalStore, sha256_file
from logitstore.io.store import URL, PartialStore
from logitstore.limits import MANIFEST_BYTES
from logitstore.schema import ShardInfo, parse_manifest
from logitstore.schema.manifest import MANIFEST_NAME

COMMIT_FILES: Final = 100
"""The most files of one commit: the Hub ends requests that take it longer than a minute."""

GROUP_BYTES: Final = 2**26
"""Small files are sent together up to this size: the Hub counts requests."""

_SHARD: Final = re.compile(r"data/([^/]+)/\1(-[0-9]{5}-of-[0-9]{5,6})?-[0-9]{5,}\.arrow")
_PREVIEW: Final = re.compile(r"preview/[^/]+\.arrow")
_SHOWN: Final = 5

Progress = Callable[[str, int, int], None]
"""Told what is going on (`checking`, `sending`), bytes done, and bytes in all."""


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo: `ns/name`.
        url: page of the dataset.
        commit: the commit that holds it.
        files: files that were sent or changed.
        bytes: their size.
        unchanged: whether all of it was there before, so that there is no new commit.
    """

    repo: str
    url: str
    commit: str
    files: int
    bytes: int
    unchanged: bool


@dataclass(frozen=True)
class _File:
    """A file to be there: a path, with the sha256 that the manifest says, or bytes."""

    path: str
    content: Path | bytes
    size: int
    sha256: str | None = None


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    licence: str | None = None,
    language: str | None = None,
    check: bool = True,
    token: str | bool | None = None,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Publish a dataset as a dataset repository of the Hub.

    What is there already is not sent again: a second push of the same content does nothing, and one that was killed
    goes on. Shards, tokenizer, preview, card and manifest appear by one commit, made on the parent that was seen;
    more than 100 files by several, the manifest in the last. Files of an earlier version, and shards of a push that
    was not finished, that this one does not have are removed by it; all others stay. Hand-written parts of a card
    stay, see `logitstore.hub.card`. Shards that are not in the directory are taken as they are in the branch, where
    `HubSink` brought them while they were written.

    Args:
        path: directory of the dataset.
        repo: `ns/name`; made when it is not there.
        private: make the repository private.
        revision: branch; made from the main branch when it is not there. None for the main branch.
        tag: name for the commit.
        message: of the commit.
        licence: of the dataset, for its card, as the Hub names it (`cc-by-4.0`); None leaves the card's as it is.
        language: of its texts, for its card, as an ISO code; likewise.
        check: check the dataset, and the sha256 of every file that is to be sent, before anything is.
        token: of the Hub; None for that of `hf auth login` or `HF_TOKEN`.
        endpoint: of the Hub; None for `HF_ENDPOINT` or huggingface.co.
        progress: told what is going on.

    Raises:
        CorruptDataError: the dataset is not valid, or a shard is neither here nor there.
        DatasetExistsError: the tag names another commit, or the repository is public where a private one was asked for.
        DatasetNotFoundError: there is no dataset at the path.
        InvalidInputError: no directory, name of a repository or of a branch, or the existing card cannot be read.
        RemoteError: the Hub cannot be reached, or somebody else pushed meanwhile.
        RemoteAccessError: the token is missing, not valid or has no right to write; or there is no room.
    """
    target = Target.of(repo, revision, token=token, endpoint=endpoint)
    if URL.match(os.fspath(path)):
        raise InvalidInputError(f"{os.fspath(path)!r} is no directory; fetch it with `logitstore pull`, and push that")
    root = Path(path)
    dataset = Dataset(LocalStore(root), read_manifest(LocalStore(root)))
    target.check_token()
    missing = [info for info in dataset.info.shards if not (root / info.path).exists()]
    there = target.look(private=private) if missing else None
    absent = frozenset(info.path for info in missing if there is not None and _has(there, info))
    if there is not None and absent:
        dataset = Dataset(PartialStore(root, target.store(there.commit), absent), dataset.info)
    if check:
        _check(root, absent)
    if not missing:
        there = target.look(private=private)
    pushing = _Pushing(target, progress)
    existing = there.card if there is not None else None
    files = _files(root, dataset, target.repo, existing, licence=licence, language=language)
    known = there.files if there is not None else {}
    needed = [file for file in files if not _is_there(file, known.get(file.path))]
    stale = _stale(there, files)
    if tag is not None and there is not None:
        target.free(tag, None if needed or stale else there.commit)
    if check:
        pushing.verify(needed)
    there = target.make(there, private=private)
    commit = there.commit
    if needed or stale:
        # The manifest goes with every change: it may have to be taken away meanwhile.
        sent = needed if files[-1] in needed else [*needed, files[-1]]
        commit = pushing.send(sent, stale, there, message or "Push a dataset with logitstore")
    if tag is not None:
        target.branch.tag(tag, commit)
        target.free(tag, commit)  # somebody else may have given another one this name meanwhile
    size = sum(file.size for file in needed)
    return Pushed(target.repo, target.url, commit, len(needed), size, not (needed or stale))


def _has(there: There, info: ShardInfo) -> bool:
    """Whether a shard is there, with its bytes as they were written: the Hub knows the sha256 of large files."""
    file = there.files.get(info.path)
    return file is not None and file.lfs is not None and (file.size, file.lfs.sha256) == (info.bytes, info.sha256)


def _check(root: Path, absent: Collection[str]) -> None:
    """Refuse a dataset that is not valid, by checks that read no chunk.

    Args:
        root: its directory.
        absent: shards that need not be here.
    """
    errors = [finding for finding in validate(root) if finding.severity == "error"]
    errors = [finding for finding in errors if finding.code != "shard-missing" or finding.shard not in absent]
    if errors:
        listed = "; ".join(f"{finding.shard or root}: {finding.message}" for finding in errors[:_SHOWN])
        more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise CorruptDataError(
            f"the dataset is not valid: {listed}{more}; `logitstore validate` lists all",
            code=errors[0].code,
            path=str(root),
        )


def _files(root: Path, dataset: Dataset, repo: str, existing: str | None, **said: str | None) -> list[_File]:
    """What is to be in the repository, the manifest last."""
    manifest = dataset.info
    files = [_File(info.path, root / info.path, info.bytes, info.sha256) for info in manifest.files]
    shown = previews(dataset)
    made = {f"preview/{split}.arrow": data for split, data in shown.items()}
    store = LocalStore(root)
    if existing is None and (root / CARD_NAME).is_file():
        existing = card_text(store.small(CARD_NAME, CARD_BYTES), store.where(CARD_NAME))
    made[CARD_NAME] = card(manifest, repo, existing=existing, previews=shown, **said).encode()
    made[MANIFEST_NAME] = store.small(MANIFEST_NAME, MANIFEST_BYTES)
    if parse_manifest(made[MANIFEST_NAME]) != manifest:
        raise _changed(root / MANIFEST_NAME)
    return files + [_File(path, data, len(data)) for path, data in made.items()]


def _is_there(file: _File, there: RepoFile | None) -> bool:
    """Whether the repository has this file; one with a sha256 in the manifest is not read for that."""
    if there is None or there.size != file.size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == (file.sha256 or hashlib.sha256(_content(file)).hexdigest()))
    return bool(there.blob_id == git_hash(_content(file)))


def _content(file: _File) -> bytes:
    if isinstance(file.content, bytes):
        return file.content
    with _reading(file.content):
        return file.content.read_bytes()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say which file cannot be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, LogitStoreError):
            raise
        raise CorruptDataError(f"cannot be read: {error}", code="file-kind", path=str(path)) from error


def _changed(path: Path) -> CorruptDataError:
    return CorruptDataError(
        "was changed while it was being pushed; push again when nothing writes to the dataset",
        code="shard-sha256",
        path=str(path),
    )


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to."""
    with _reading(path):
        status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _groups(files: list[_File]) -> Iterator[list[_File]]:
    """Files that are sent together."""
    group: list[_File] = []
    for file in files:
        if group and (len(group) == COMMIT_FILES or sum(each.size for each in group) + file.size > GROUP_BYTES):
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _stale(there: There | None, files: list[_File]) -> list[str]:
    """Files of the version before, and what is left of a push that was not finished, that this one does not have."""
    if there is None:
        return []
    made = there.named or BEGIN in (there.card or "")
    ours = {path for path in there.files if _SHARD.fullmatch(path) or (made and _PREVIEW.fullmatch(path))}
    return sorted((ours | there.named) & there.files.keys() - {file.path for file in files})


@dataclass(frozen=True)
class _Pushing:
    """A push on its way."""

    target: Target
    progress: Progress | None

    def verify(self, files: list[_File]) -> None:
        """Check files against the manifest before anything is sent.

        Raises:
            CorruptDataError: one is not what was written.
        """
        total, done = sum(file.size for file in files), 0
        for file in files:
            if isinstance(file.content, Path):
                with _reading(file.content):
                    found = sha256_file(file.content)
                if found != file.sha256:
                    raise CorruptDataError(
                        "its sha256 is not that of the manifest: its bytes were changed; nothing was sent",
                        code="shard-sha256",
                        path=str(file.content),
                    )
            done += file.size
            self.tell("checking", done, total)

    def send(self, files: list[_File], stale: list[str], there: There, message: str) -> str:
        """Upload files, the manifest being the last of them, and then make them appear; the last commit."""
        total, done = sum(file.size for file in files), 0
        added = []
        for group in _groups(files[:-1]):
            paths = [file.content for file in group if isinstance(file.content, Path)]
            states = [_state(path) for path in paths]
            additions = [_addition(file) for file in group]
            self.target.branch.upload(additions)
            for path, state in zip(paths, states, strict=True):
                if _state(path) != state:
                    raise _changed(path)
            added += additions
            done += sum(file.size for file in group)
            self.tell("sending", done, total)
        commit = there.commit
        steps = plan([*added, _addition(files[-1])], stale, there)
        for number, step in enumerate(steps):
            text = message if len(steps) == 1 else f"{message} (part {number + 1} of {len(steps)})"
            commit = self.target.branch.commit(step, commit, text)
        self.tell("sending", total, total)
        return commit

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(what, done, total)


def _addition(file: _File) -> CommitOperationAdd:
    """A file for the client, which hashes it.

    Raises:
        CorruptDataError: it is not what the manifest describes.
    """
    if isinstance(file.content, bytes):
        return CommitOperationAdd(file.path, file.content)
    with _reading(file.content):
        # Resolved, because the client expands `~` and drops `..` by the letter.
        addition = CommitOperationAdd(file.path, str(file.content.resolve(strict=True)))
        found = addition.upload_info.sha256.hex()
    if found != file.sha256:
        raise CorruptDataError(
            "its sha256 is not that of the manifest: its bytes were changed",
            code="shard-sha256",
            path=str(file.content),
        )
    return addition


def plan(added: list[CommitOperationAdd], stale: list[str], there: There) -> list[list[Any]]:
    """The commits, each of 100 added files at most, the manifest in the last.

    A commit before the last one that changed a file of the version before would leave a dataset that looks complete
    and is not. New files come first, therefore; and where changed ones do not fit the last commit, the first one takes
    the old manifest away, and with it what else goes, since nobody could tell later what it named.
    """

    def rank(addition: CommitOperationAdd) -> tuple[bool, ...]:
        path = addition.path_in_repo
        return path == MANIFEST_NAME, path == CARD_NAME, bool(_PREVIEW.fullmatch(path)), path in there.files

    added = sorted(added, key=rank)
    early, last = added[:-COMMIT_FILES], added[-COMMIT_FILES:]
    steps: list[list[Any]] = [list(early[at : at + COMMIT_FILES]) for at in range(0, len(early), COMMIT_FILES)]
    steps.append(list(last))
    hidden = [MANIFEST_NAME] if MANIFEST_NAME in there.files and any(rank(addition)[3] for addition in early) else []
    steps[0 if hidden else -1] += [CommitOperationDelete(path) for path in [*stale, *hidden]]
    return steps
