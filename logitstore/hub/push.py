"""Publishing a dataset on the Hub: files first, then one commit that makes them a dataset."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from logitstore.checks import validate
from logitstore.dataset.reader import Dataset
from logitstore.dataset.shards import read_manifest
from logitstore.errors import (
    CorruptDataError,
    DatasetExistsError,
    InvalidInputError,
    LogitStoreError,
    RemoteAccessError,
    RemoteError,
    UnsupportedVersionError,
)
from logitstore.hub.card import BEGIN, card
from logitstore.hub.preview import previews
from logitstore.io import LocalStore, sha256_file
from logitstore.io.client import LOG_IN, Branch, Client, call
from logitstore.io.hub import HubPlace, HubStore
from logitstore.io.store import URL
from logitstore.limits import MANIFEST_BYTES
from logitstore.schema import parse_manifest
from logitstore.schema.manifest import MANIFEST_NAME

COMMIT_FILES: Final = 100
"""The most files of one commit: the Hub ends requests that take it longer than a minute."""

GROUP_BYTES: Final = 2**26
"""Small files are sent together up to this size: the Hub counts requests."""

CARD_NAME: Final = "README.md"
_CARD_BYTES: Final = 2**22
_SHARD: Final = re.compile(r"data/([^/]+)/\1-[0-9]{5,}\.arrow")
_PREVIEW: Final = re.compile(r"preview/[^/]+\.arrow")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
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


@dataclass(frozen=True)
class _There:
    """What is in the branch, or in that it will start from: head, files, those that its manifest names, card."""

    commit: str
    files: dict[str, RepoFile]
    named: frozenset[str]
    card: str | None
    branched: bool = True


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
    stay, see `logitstore.hub.card`.

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
        CorruptDataError: the dataset is not valid.
        DatasetExistsError: the tag names another commit, or the repository is public where a private one was asked for.
        DatasetNotFoundError: there is no dataset at the path.
        InvalidInputError: no directory, name of a repository or of a branch, or the existing card cannot be read.
        RemoteError: the Hub cannot be reached, or somebody else pushed meanwhile.
        RemoteAccessError: the token is missing, not valid or has no right to write; or there is no room.
    """
    place, client = HubPlace.parse(repo), Client.of(token=token, endpoint=endpoint)
    if place.revision or place.folder:
        raise InvalidInputError(f"{repo!r}: give namespace/name alone, and a branch by revision= (--revision)")
    if URL.match(os.fspath(path)):
        raise InvalidInputError(f"{os.fspath(path)!r} is no directory; fetch it with `logitstore pull`, and push that")
    root = Path(path)
    dataset = Dataset(LocalStore(root), read_manifest(LocalStore(root)))
    if not call(f"{place.repo}: cannot be pushed to", client.signed_in):
        raise RemoteAccessError(f"{place.repo}: {LOG_IN}")
    if check:
        _check(root)
    branch = Branch(client.api(), place.repo, revision or constants.DEFAULT_REVISION)
    pushing = _Pushing(client, branch, progress)
    there = pushing.look(private=private)
    existing = there.card if there is not None else None
    files = _files(root, dataset, place.repo, existing, licence=licence, language=language)
    known = there.files if there is not None else {}
    needed = [file for file in files if not _is_there(file, known.get(file.path))]
    stale = _stale(there, files)
    if tag is not None and there is not None:
        pushing.free(tag, None if needed or stale else there.commit)
    if check:
        pushing.verify(needed)
    there = pushing.make(there, private=private)
    commit = there.commit
    if needed or stale:
        # The manifest goes with every change: it may have to be taken away meanwhile.
        sent = needed if files[-1] in needed else [*needed, files[-1]]
        commit = pushing.send(sent, stale, there, message or "Push a dataset with logitstore")
    if tag is not None:
        branch.tag(tag, commit)
        pushing.free(tag, commit)  # somebody else may have given another one this name meanwhile
    size = sum(file.size for file in needed)
    url = f"{client.endpoint}/datasets/{place.repo}"
    return Pushed(place.repo, url, commit, len(needed), size, not (needed or stale))


def _check(root: Path) -> None:
    """Refuse a dataset that is not valid, by checks that read no chunk."""
    errors = [finding for finding in validate(root) if finding.severity == "error"]
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
        existing = _text(store.small(CARD_NAME, _CARD_BYTES), store.where(CARD_NAME))
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


def _text(card: bytes, where: str) -> str:
    try:
        return card.decode()  # line ends as they are
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{where}: byte {error.start} is not UTF-8, as a card must be; correct it") from None


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


def _stale(there: _There | None, files: list[_File]) -> list[str]:
    """Files of the version before, and what is left of a push that was not finished, that this one does not have."""
    if there is None:
        return []
    made = there.named or BEGIN in (there.card or "")
    ours = {path for path in there.files if _SHARD.fullmatch(path) or (made and _PREVIEW.fullmatch(path))}
    return sorted((ours | there.named) & there.files.keys() - {file.path for file in files})


@dataclass(frozen=True)
class _Pushing:
    """A branch of a repository that is being pushed to."""

    client: Client
    branch: Branch
    progress: Progress | None

    def look(self, *, private: bool) -> _There | None:
        """What is there, or in the main branch where the branch is not; None where the repository is not.

        Raises:
            DatasetExistsError: the repository is public, and a private one was asked for.
            InvalidInputError: it is no branch.
        """
        repo, name = self.branch.repo, self.branch.name
        is_private = self.branch.private()
        if is_private is None:
            return None
        if private and not is_private:
            raise DatasetExistsError(
                f"{repo} is public, and --private does not change that; make it private in its settings, or choose "
                f"another name"
            )
        head = self.branch.head()
        if head is not None:
            return self.see(head)
        if _COMMIT.fullmatch(name) or self.branch.tagged(name) is not None:
            raise InvalidInputError(f"{repo}: {name} is no branch; a tag and a commit cannot be changed")
        start = self.branch.head(constants.DEFAULT_REVISION)
        if start is None:
            raise RemoteError(f"{repo}: the Hub names no branch {constants.DEFAULT_REVISION}; try again later")
        return replace(self.see(start), branched=False)

    def see(self, commit: str) -> _There:
        """What a commit holds."""
        files = self.branch.files(commit)
        store = HubStore(HubPlace(self.branch.repo), commit, self.client)
        named: frozenset[str] = frozenset()
        if MANIFEST_NAME in files:
            try:
                manifest = read_manifest(store)
                named = frozenset([MANIFEST_NAME, *(info.path for info in manifest.files)])
            except (CorruptDataError, UnsupportedVersionError):
                named = frozenset()  # not ours to remove what it names
        text = None
        if CARD_NAME in files:
            text = _text(store.small(CARD_NAME, _CARD_BYTES), store.where(CARD_NAME))
        return _There(commit, files, named, text)

    def free(self, tag: str, commit: str | None) -> None:
        """Refuse a tag that names something else.

        Raises:
            DatasetExistsError: it does.
        """
        target = self.branch.tagged(tag)
        if target not in (None, commit):
            raise DatasetExistsError(
                f"{self.branch.repo} has a tag {tag} already, of another version ({str(target)[:12]}); choose another, "
                f"or delete it there first"
            )

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

    def make(self, there: _There | None, *, private: bool) -> _There:
        """Make the repository and the branch, where they are not there.

        Raises:
            DatasetExistsError: somebody else made a public one meanwhile.
            RemoteError: somebody else made it and pushed.
        """
        if there is None:
            self.branch.create_repo(private=private)
            there = self.look(private=private)
            if there is None:
                raise RemoteAccessError(
                    f"{self.branch.repo}: it exists, and your token does not see it; choose another name"
                )
            if there.named or there.card is not None:
                raise RemoteError(f"{self.branch.repo}: somebody else made it meanwhile; push again")
        if not there.branched:
            self.branch.create(there.commit)
        return there

    def send(self, files: list[_File], stale: list[str], there: _There, message: str) -> str:
        """Upload files, the manifest being the last of them, and then make them appear; the last commit."""
        total, done = sum(file.size for file in files), 0
        added = []
        for group in _groups(files[:-1]):
            paths = [file.content for file in group if isinstance(file.content, Path)]
            states = [_state(path) for path in paths]
            additions = [_addition(file) for file in group]
            self.branch.upload(additions)
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
            commit = self.branch.commit(step, commit, text)
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


def plan(added: list[CommitOperationAdd], stale: list[str], there: _There) -> list[list[Any]]:
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
