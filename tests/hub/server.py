"""The Hub as a whole."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from hub import api, lfs
from hub.access import Signer, User, Users
from hub.blobs import Blob, Spool
from hub.faults import Armed, Fault, Faults
from hub.journal import Journal, Request
from hub.repos import Change, Commit, Entry, Repo, is_lfs
from hub.wire import Origin


class Hub:
    """Serves datasets on two free ports of 127.0.0.1 while its block runs.

    Attributes:
        endpoint: URL of the Hub's own origin.
        storage: URL of the origin that LFS files are downloaded from and uploaded to.
        token: Token of the user "me".
        latency: Seconds that every answer is delayed, on both origins.
        bytes_per_second: Speed of a connection to the storage, in both directions; None for no limit.
        url_lifetime: Seconds for which signed URLs are valid. They carry whole seconds, rounded down.
        multipart_above: Larger LFS files are uploaded in parts.
        part_size: Bytes of a part.
        page_size: Entries of a page of a tree or of commits; of a tree with `expand` at most 50.
        quota_bytes: LFS uploads beyond that sum over all repositories are refused; None for no limit.
        errors: Tracebacks of exceptions inside the server. A test may assert that it is empty.
        lock: Held where repositories change; never while sleeping, receiving or sending.
    """

    def __init__(
        self,
        *,
        token: str = "hf_test_me",
        latency: float = 0.0,
        bytes_per_second: float | None = None,
        url_lifetime: float = 3600,
        multipart_above: int = 16 << 20,
        part_size: int = 8 << 20,
        page_size: int = 1000,
        quota_bytes: int | None = None,
        spill_above: int = 1 << 20,
    ) -> None:
        self.token = token
        self.latency = latency
        self.bytes_per_second = bytes_per_second
        self.url_lifetime = url_lifetime
        self.multipart_above = multipart_above
        self.part_size = part_size
        self.page_size = page_size
        self.quota_bytes = quota_bytes
        self.endpoint = ""
        self.storage = ""
        self.errors: list[str] = []
        self.lock = threading.RLock()
        # What follows is for the handlers.
        self.users = Users()
        self.signer = Signer()
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, lfs.Upload] = {}
        self.faults = Faults()
        self.journal = Journal()
        self._spill_above = spill_above
        self._closing = threading.Event()
        self._folder = Path()
        self._origins: list[Origin] = []
        self.add_user("me", token)

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="hub-"))
        self._origins = [Origin(self, "hub", "127.0.0.1", api.routes), Origin(self, "storage", "localhost", lfs.routes)]
        self.endpoint, self.storage = (origin.url for origin in self._origins)
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        for origin in self._origins:
            origin.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    # Users

    def add_user(self, name: str, token: str, role: str = "write", orgs: Iterable[str] = ()) -> None:
        """Adds a user, who may write in the namespaces of its name and its organisations if its role is "write"."""
        self.users.add(User(name, token, role, tuple(orgs)))

    def set_private(self, repo: str, private: bool = True) -> None:
        self.repos[repo].private = private

    def gate(self, repo: str, *, gated: bool = True) -> None:
        """Lets only its owner, and users granted access, read the files of a repository."""
        self.repos[repo].gated = gated

    def grant(self, repo: str, user: str) -> None:
        self.repos[repo].granted.add(user)

    # Content

    def create_repo(self, repo: str, *, private: bool = False) -> Repo:
        with self.lock:
            return self.repos.setdefault(repo, Repo(repo, private=private))

    def commit_files(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        delete: Iterable[str] = (),
        message: str = "Add files",
        revision: str = "main",
    ) -> Commit:
        """Makes a commit without a client, in a repository that is created if missing."""
        with self.lock:
            found = self.create_repo(repo)
            tree = found.resolve(revision).tree
            changes = [Change(path) for path in delete]
            for path, data in files.items():
                entry = Entry.regular(data)
                if data and is_lfs(path, len(data), tree):
                    spool = self.spool()
                    spool.write(data)
                    blob, sha256 = spool.finish()
                    entry = Entry.lfs(sha256, found.lfs.setdefault(sha256, blob))
                changes.append(Change(path, entry))
            return found.commit(revision, changes, title=message, message="", author="me")

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {path: entry.blob.read() for path, entry in self.repos[repo].resolve(revision).tree.items()}

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        return self.repos[repo].log(revision)

    def used(self) -> int:
        """Bytes of all LFS files."""
        with self.lock:
            return sum(repo.used for repo in self.repos.values())

    # What happens

    @property
    def requests(self) -> list[Request]:
        return self.journal.requests()

    def clear_log(self) -> None:
        self.journal.clear()

    def fault(self, fault: Fault) -> Armed:
        """Lets something go wrong. The result's `hits` says how often it did."""
        return self.faults.add(fault)

    def clear_faults(self) -> None:
        self.faults.clear()

    def expire_urls(self) -> None:
        """Makes all signed URLs issued so far invalid."""
        self.signer.expire_all()

    # For the handlers

    def spool(self) -> Spool:
        return Spool(self._folder, self._spill_above)

    def forget(self, blob: Blob) -> None:
        """Deletes the file of a blob that nothing refers to any more."""
        if blob.path is not None:
            blob.path.unlink(missing_ok=True)

    def pause(self, seconds: float) -> None:
        """Sleeps, but not beyond the end of the block."""
        if seconds > 0:
            self._closing.wait(seconds)
