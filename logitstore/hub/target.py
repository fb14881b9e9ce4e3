"""A branch of a dataset's repository on the Hub that is written to: what it holds; made where it is not there."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Self

from huggingface_hub import constants
from huggingface_hub.hf_api import RepoFile

from logitstore.dataset.shards import read_manifest
from logitstore.errors import (
    CorruptDataError,
    DatasetExistsError,
    InvalidInputError,
    RemoteAccessError,
    RemoteError,
    UnsupportedVersionError,
)
from logitstore.io.client import LOG_IN, Branch, Client, call
from logitstore.io.hub import HubPlace, HubStore
from logitstore.schema.manifest import MANIFEST_NAME

CARD_NAME: Final = "README.md"
CARD_BYTES: Final = 2**22
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def card_text(card: bytes, where: str) -> str:
    """A card's text.

    Raises:
        InvalidInputError: it is not UTF-8.
    """
    try:
        return card.decode()  # line ends as they are
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{where}: byte {error.start} is not UTF-8, as a card must be; correct it") from None


@dataclass(frozen=True)
class There:
    """What is in the branch, or in that it will start from.

    Attributes:
        commit: its head.
        files: by path.
        named: those that its manifest names, and the manifest.
        card: its text; None where there is none.
        branched: whether the branch itself is there.
    """

    commit: str
    files: dict[str, RepoFile]
    named: frozenset[str]
    card: str | None
    branched: bool = True


@dataclass(frozen=True)
class Target:
    """A branch of a repository that is written to.

    Attributes:
        client: the account.
        branch: the branch.
    """

    client: Client
    branch: Branch

    @classmethod
    def of(
        cls, repo: str, revision: str | None, *, token: str | bool | None = None, endpoint: str | None = None
    ) -> Self:
        """A branch by name; nothing is asked yet.

        Args:
            repo: `ns/name`.
            revision: name of the branch; None for the main branch.
            token: of the Hub; None for that of `hf auth login` or `HF_TOKEN`.
            endpoint: of the Hub; None for `HF_ENDPOINT` or huggingface.co.

        Raises:
            InvalidInputError: no name of a repository, or no endpoint.
        """
        place, client = HubPlace.parse(repo), Client.of(token=token, endpoint=endpoint)
        if place.revision or place.folder:
            raise InvalidInputError(f"{repo!r}: give namespace/name alone, and a branch by revision= (--revision)")
        return cls(client, Branch(client.api(), place.repo, revision or constants.DEFAULT_REVISION))

    @property
    def repo(self) -> str:
        """The repository: `ns/name`."""
        return self.branch.repo

    @property
    def url(self) -> str:
        """Page of the dataset."""
        return f"{self.client.endpoint}/datasets/{self.repo}"

    def store(self, commit: str) -> HubStore:
        """The files of a commit, to be read."""
        return HubStore(HubPlace(self.repo), commit, self.client)

    def check_token(self) -> None:
        """Refuse to begin without a token.

        Raises:
            RemoteAccessError: there is none, or none that can be sent.
        """
        if not call(f"{self.repo}: cannot be pushed to", self.client.signed_in):
            raise RemoteAccessError(f"{self.repo}: {LOG_IN}")

    def look(self, *, private: bool) -> There | None:
        """What is there, or in the main branch where the branch is not; None where the repository is not.

        Raises:
            DatasetExistsError: the repository is public, and a private one was asked for.
            InvalidInputError: it is no branch.
        """
        repo, name = self.repo, self.branch.name
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

    def see(self, commit: str) -> There:
        """What a commit holds."""
        files = self.branch.files(commit)
        store = self.store(commit)
        named: frozenset[str] = frozenset()
        if MANIFEST_NAME in files:
            try:
                manifest = read_manifest(store)
                named = frozenset([MANIFEST_NAME, *(info.path for info in manifest.files)])
            except (CorruptDataError, UnsupportedVersionError):
                named = frozenset()  # not ours to remove what it names
        text = None
        if CARD_NAME in files:
            text = card_text(store.small(CARD_NAME, CARD_BYTES), store.where(CARD_NAME))
        return There(commit, files, named, text)

    def free(self, tag: str, commit: str | None) -> None:
        """Refuse a tag that names something else.

        Raises:
            DatasetExistsError: it does.
        """
        target = self.branch.tagged(tag)
        if target not in (None, commit):
            raise DatasetExistsError(
                f"{self.repo} has a tag {tag} already, of another version ({str(target)[:12]}); choose another, "
                f"or delete it there first"
            )

    def make(self, there: There | None, *, private: bool) -> There:
        """Make the repository and the branch, where they are not there.

        Raises:
            DatasetExistsError: somebody else made a public one meanwhile.
            RemoteError: somebody else made it and pushed.
        """
        if there is None:
            self.branch.create_repo(private=private)
            there = self.look(private=private)
            if there is None:
                raise RemoteAccessError(f"{self.repo}: it exists, and your token does not see it; choose another name")
            if there.named or there.card is not None:
                raise RemoteError(f"{self.repo}: somebody else made it meanwhile; push again")
        if not there.branched:
            self.branch.create(there.commit)
        return there
