"""Publishing a dataset on the Hub: files first, then one commit that makes them a dataset."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from logitstore.checks import validate
from logitstore.dataset.reader import Dataset
from logitstore.dataset.shards import read_manifest
from logitstore.errors import (
    CorruptDataError,
    DatasetExistsError,
    DatasetNotFoundError,
    InvalidInputError,
    RemoteError,
    UnsupportedVersionError,
)
from logitstore.hub.card import card
from logitstore.hub.preview import previews
from logitstore.io import LocalStore, sha256_file
from logitstore.io.client import Client, call, explained, patience, scrubbed
from logitstore.io.http import FAILURES, TRIES, pause
from logitstore.io.hub import HubPlace, HubStore
from logitstore.schema.manifest import MANIFEST_NAME

COMMIT_FILES: Final = 100
"""The most files of one commit: the Hub ends requests that take it longer than a minute."""

CARD_NAME: Final = "README.md"
_CARD_BYTES: Final = 2**22
_SHOWN: Final = 5
_TIMEOUT: Final = constants.HF_HUB_ETAG_TIMEOUT

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
    """What is in the branch: its head, its files, and those of them that its manifest names."""

    commit: str
    files: dict[str, RepoFile]
    named: frozenset[str]
    card: str | None


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
    more than 100 files by several, the manifest in the last. Files of an earlier version that this one does not have
    are removed by it; all others stay. Hand-written parts of a card stay, see `logitstore.hub.card`.

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
        InvalidInputError: no name of a repository, or the existing card cannot be read.
        RemoteError: the Hub cannot be reached, or somebody else pushed meanwhile.
        RemoteAccessError: the token is missing, not valid or has no right to write; or there is no room.
    """
    root = Path(path)
    dataset = Dataset(LocalStore(root), read_manifest(LocalStore(root)))
    if check:
        _check(root)
    place, client = HubPlace.parse(repo), Client.of(token=token, endpoint=endpoint)
    if place.revision or place.folder:
        raise InvalidInputError(f"{repo!r}: give namespace/name alone, and a branch by revision= (--revision)")
    pushing = _Pushing(client, client.api(), place.repo, revision or constants.DEFAULT_REVISION, progress)
    there = pushing.look(private=private)
    existing = there.card if there is not None else None
    files = _files(root, dataset, place.repo, existing, licence=licence, language=language)
    known = there.files if there is not None else {}
    needed = [file for file in files if not _is_there(file, known.get(file.path))]
    stale = _stale(there, files)
    pushing.tagged(tag, there, changes=bool(needed or stale))
    if check:
        pushing.verify(needed)
    if there is None:
        there = pushing.make(private=private)
    if needed or stale:
        commit = pushing.send(needed, stale, there, message or "Push a dataset with logitstore")
    else:
        commit = there.commit
    if tag is not None:
        call(
            f"{place.repo}: the tag {tag} cannot be made",
            pushing.api.create_tag,
            place.repo,
            tag=tag,
            revision=commit,
            repo_type="dataset",
            exist_ok=True,
        )
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
    own = root / CARD_NAME
    if existing is None and own.is_file():
        existing = own.read_bytes().decode("utf-8", "replace")  # line ends as they are
    made[CARD_NAME] = card(manifest, repo, existing=existing, previews=shown, **said).encode()
    made[MANIFEST_NAME] = (root / MANIFEST_NAME).read_bytes()
    return files + [_File(path, data, len(data)) for path, data in made.items()]


def _is_there(file: _File, there: RepoFile | None) -> bool:
    """Whether the repository has this file; one with a sha256 in the manifest is not read for that."""
    if there is None or there.size != file.size:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == (file.sha256 or hashlib.sha256(_content(file)).hexdigest()))
    return bool(there.blob_id == git_hash(_content(file)))


def _content(file: _File) -> bytes:
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


def _stale(there: _There | None, files: list[_File]) -> list[str]:
    """Files of the version before that this one does not have."""
    if there is None or not there.named:
        return []
    kept = {file.path for file in files}
    made = {path for path in there.files if re.fullmatch(r"preview/[^/]+\.arrow", path)}
    return sorted((set(there.named) | made) & set(there.files) - kept)


@dataclass(frozen=True)
class _Pushing:
    """A branch of a repository that is being pushed to."""

    client: Client
    api: HfApi
    repo: str
    branch: str
    progress: Progress | None

    def look(self, *, private: bool) -> _There | None:
        """What is there; None where the repository or the branch is not.

        Raises:
            DatasetExistsError: the repository is public, and a private one was asked for.
        """
        what = f"{self.repo}: cannot be read"
        try:
            info = call(what, self.api.dataset_info, self.repo, expand=["private"], timeout=_TIMEOUT)
            if private and not info.private:
                raise DatasetExistsError(
                    f"{self.repo} is public, and --private does not change that; make it private in its settings, or "
                    f"choose another name"
                )
            return self.see(self.head())
        except DatasetNotFoundError:
            return None

    def head(self) -> str:
        """The commit of the branch now.

        Raises:
            DatasetNotFoundError: there is no such branch.
        """
        what = f"{self.repo}: the branch {self.branch} cannot be read"
        info = call(what, self.api.dataset_info, self.repo, revision=self.branch, expand=["sha"], timeout=_TIMEOUT)
        return str(info.sha)

    def see(self, commit: str) -> _There:
        """What a commit holds."""
        files = self.files(commit)
        store = HubStore(HubPlace(self.repo), commit, self.client)
        named: frozenset[str] = frozenset()
        if MANIFEST_NAME in files:
            try:
                manifest = read_manifest(store)
                named = frozenset([MANIFEST_NAME, *(info.path for info in manifest.files)])
            except (CorruptDataError, UnsupportedVersionError):
                named = frozenset()  # not ours to remove what it names
        text = store.small(CARD_NAME, _CARD_BYTES).decode("utf-8", "replace") if CARD_NAME in files else None
        return _There(commit, files, named, text)

    def files(self, commit: str) -> dict[str, RepoFile]:
        """The files of a commit by path."""

        def listed() -> list[RepoFile]:
            tree = self.api.list_repo_tree(self.repo, recursive=True, revision=commit, repo_type="dataset")
            return [entry for entry in tree if isinstance(entry, RepoFile)]

        return {file.path: file for file in call(f"{self.repo}: cannot be read", listed)}

    def tagged(self, tag: str | None, there: _There | None, *, changes: bool) -> None:
        """Refuse a tag that names something else.

        Raises:
            DatasetExistsError: it does.
        """
        if tag is None or there is None:
            return
        refs = call(f"{self.repo}: cannot be read", self.api.list_repo_refs, self.repo, repo_type="dataset")
        target = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        if target is not None and (changes or target != there.commit):
            raise DatasetExistsError(
                f"{self.repo} has a tag {tag} already, of another version ({target[:12]}); choose another, or delete it"
                f" there first"
            )

    def verify(self, files: list[_File]) -> None:
        """Check files against the manifest before anything is sent.

        Raises:
            CorruptDataError: one is not what was written.
        """
        total, done = sum(file.size for file in files), 0
        for file in files:
            if isinstance(file.content, Path) and sha256_file(file.content) != file.sha256:
                raise CorruptDataError(
                    "its sha256 is not that of the manifest: its bytes were changed; nothing was sent",
                    code="shard-sha256",
                    path=str(file.content),
                )
            done += file.size
            self.tell("checking", done, total)

    def make(self, *, private: bool) -> _There:
        """Make the repository and the branch, where they are not there."""
        what = f"{self.repo}: cannot be made"

        def create() -> None:
            try:
                self.api.create_repo(self.repo, repo_type="dataset", private=private or None)
            except HfHubHTTPError as error:
                if error.response.status_code != 409:  # it is there: another push, or a reply that was lost
                    raise

        call(what, create)
        if self.branch != constants.DEFAULT_REVISION:
            call(what, self.api.create_branch, self.repo, branch=self.branch, repo_type="dataset", exist_ok=True)
        return self.see(self.head())

    def send(self, needed: list[_File], stale: list[str], there: _There, message: str) -> str:
        """Upload files, and then make them appear; the last commit."""
        total, done = sum(file.size for file in needed), 0
        added = []
        for file in needed:
            content = str(file.content) if isinstance(file.content, Path) else file.content
            addition = CommitOperationAdd(file.path, content)
            if file.sha256 not in (None, addition.upload_info.sha256.hex()):
                raise CorruptDataError(
                    "its sha256 is not that of the manifest: its bytes were changed",
                    code="shard-sha256",
                    path=str(content),
                )
            call(
                f"{self.repo}: {file.path} cannot be sent",
                self.api.preupload_lfs_files,
                self.repo,
                [addition],
                repo_type="dataset",
                revision=self.branch,
                free_memory=False,
            )
            added.append(addition)
            done += file.size
            self.tell("sending", done, total)
        commit = there.commit
        steps = plan(added, stale, there)
        for number, step in enumerate(steps):
            text = message if len(steps) == 1 else f"{message} (part {number + 1} of {len(steps)})"
            commit = self.commit(step, commit, text)
        return commit

    def commit(self, operations: list[Any], parent: str, message: str) -> str:
        """Make one commit on the parent that was seen; whether a lost reply was a success is looked up.

        Raises:
            RemoteError: somebody else pushed meanwhile, or the Hub cannot be reached.
        """
        what, failures = f"{self.repo}: the commit cannot be made", 0
        while True:
            try:
                made = self.api.create_commit(
                    self.repo,
                    operations,
                    commit_message=message,
                    repo_type="dataset",
                    revision=self.branch,
                    parent_commit=parent,
                )
                return str(made.oid)
            except FAILURES as error:
                failures += 1
                wait = patience(error, failures)
                meaning = explained(error, what)
            except ValueError as error:  # the Hub's own check of the card
                raise InvalidInputError(f"{what}: {scrubbed(str(error))}; correct README.md and push again") from None
            head = self.head()
            if head != parent:
                if self.holds(head, operations):
                    return head
                raise RemoteError(f"{self.repo}: somebody else changed {self.branch} meanwhile; push again")
            if wait is None or failures >= TRIES:
                raise meaning
            pause(wait)

    def holds(self, commit: str, operations: list[Any]) -> bool:
        """Whether a commit has all that these operations make."""
        files = self.files(commit)
        for operation in operations:
            there = files.get(operation.path_in_repo)
            if isinstance(operation, CommitOperationDelete):
                if there is not None:
                    return False
            elif there is None or there.size != operation.upload_info.size:
                return False
            elif there.lfs is not None:
                if there.lfs.sha256 != operation.upload_info.sha256.hex():
                    return False
            elif there.blob_id != _blob(operation):
                return False
        return True

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(what, done, total)


def _blob(operation: CommitOperationAdd) -> str:
    with operation.as_file() as file:
        return git_hash(file.read())


def plan(added: list[CommitOperationAdd], stale: list[str], there: _There) -> list[list[Any]]:
    """The commits, each of 100 added files at most, the manifest in the last.

    A commit before the last one that changed a file of the version before would leave a dataset that looks complete
    and is not. New files come first, therefore; and where changed ones do not fit the last commit, the first one takes
    the old manifest away.
    """
    changed = [addition for addition in added if addition.path_in_repo in there.named]
    fresh = [addition for addition in added if addition.path_in_repo not in there.named]
    last = [addition for addition in fresh + changed if not addition.path_in_repo.startswith("data/")]
    shards = [addition for addition in fresh + changed if addition.path_in_repo.startswith("data/")]
    room = max(0, COMMIT_FILES - len(last))
    early = shards[: max(0, len(shards) - room)]
    removed: list[Any] = [CommitOperationDelete(path) for path in stale]
    steps: list[list[Any]] = [list(early[at : at + COMMIT_FILES]) for at in range(0, len(early), COMMIT_FILES)]
    if steps and any(addition.path_in_repo in there.named for addition in early):
        steps[0].append(CommitOperationDelete(MANIFEST_NAME))
    return [*steps, [*shards[len(early) :], *last, *removed]]
