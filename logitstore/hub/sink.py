"""Shards that go to the Hub while their dataset is being written, so that they need not all have room here.

A thread of its own sends them, so that the teacher does not wait for the network. It makes commits that add shards and
nothing else, each on the commit in which it saw that nothing else has their paths: many writers can send to one
repository, and none replaces what another one brought. What makes a dataset of the shards, the manifest, is not among
them: `push` brings it when all shards are there.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import CommitOperationAdd
from huggingface_hub.hf_api import RepoFile

from logitstore.errors import (
    CorruptDataError,
    DatasetExistsError,
    InvalidInputError,
    LogitStoreError,
    RemoteAccessError,
    RemoteError,
)
from logitstore.hub.target import Target
from logitstore.io.http import backoff, pause
from logitstore.io.hub import HubPlace
from logitstore.schema import ShardInfo
from logitstore.schema.manifest import MANIFEST_NAME

RETRY_SECONDS: Final = 60.0
"""What could not be sent is tried again after so long, or when the next shard comes."""

COMMIT_SECONDS: Final = 30.0
"""Shards whose bytes are there are committed together, at most so often: the Hub takes some 128 commits an hour."""

COMMIT_FILES: Final = 100
ROUNDS: Final = 3
"""So often what is left is tried again in the end, before it is an error."""

_COLLISIONS: Final = 20  # tries of a commit where others commit to the same branch
_STOP_SECONDS: Final = 1.0

Progress = Callable[[int, int], None]
"""Told bytes that have arrived, and bytes that were given, from another thread."""


@dataclass(frozen=True)
class _Leaving:
    """A shard on its way."""

    path: Path
    info: ShardInfo

    def state(self) -> tuple[int, ...]:
        """What changes when the file is written to."""
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def addition(self) -> CommitOperationAdd:
        """For the client, which hashes it.

        Raises:
            CorruptDataError: it is not what was written.
        """
        try:
            # Resolved, because the client expands `~` and drops `..` by the letter.
            addition = CommitOperationAdd(self.info.path, str(self.path.resolve(strict=True)))
        except (OSError, ValueError) as error:
            raise CorruptDataError(f"cannot be read: {error}", code="file-kind", path=str(self.path)) from error
        if addition.upload_info.sha256.hex() != self.info.sha256:
            raise CorruptDataError(
                "its sha256 is not that of the journal: its bytes were changed, and it was not sent",
                code="shard-sha256",
                path=str(self.path),
            )
        return addition

    def is_there(self, file: RepoFile) -> bool:
        """Whether a file of the Hub is this shard."""
        return file.lfs is not None and (file.size, file.lfs.sha256) == (self.info.bytes, self.info.sha256)


class HubSink:
    """Takes the complete shards of a writer to a dataset repository of the Hub, for `Writer(sink=...)`.

    A shard has arrived when the Hub's list of files has its path with its size and sha256. A network that fails, or is
    slower than the teacher, does not stop the writer: shards stay where they are, however many, and are tried again,
    with the next one, after a minute, and in the end, where what is left is an error and the writer can be resumed.
    When the writer has finished, `push` brings the rest; that of several parts, after `commit`.

    Args:
        repo: `ns/name`; made when it is not there.
        private: make the repository private.
        revision: branch; made from the main branch when it is not there. None for the main branch.
        token: of the Hub; None for that of `hf auth login` or `HF_TOKEN`.
        endpoint: of the Hub; None for `HF_ENDPOINT` or huggingface.co.
        progress: told how much has arrived.

    Raises:
        DatasetExistsError: the repository holds a dataset, or is public where a private one was asked for.
        InvalidInputError: no name of a repository or of a branch.
        RemoteAccessError: the token is missing, not valid or has no right to write.
        RemoteError: the Hub cannot be reached.
    """

    def __init__(
        self,
        repo: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._target = Target.of(repo, revision, token=token, endpoint=endpoint)
        self._branch = self._target.branch
        self._place = HubPlace(self._target.repo).url(revision)
        self._progress = progress
        self._begin(private=private)
        self._changed = threading.Condition()
        self._leaving: dict[str, _Leaving] = {}
        self._arrived: list[str] = []
        self._refused: list[Exception] = []  # what need not be tried again
        self._error: LogitStoreError | None = None  # what the last round ended with
        self._rounds = 0  # that were ended
        self._failures = 0  # that ended with an error since one did not
        self._due = False  # whether there is a reason to begin another one at once
        self._again = 0.0  # when to begin one in any case
        self._waited_for = False
        self._closed = False
        self._committed = -math.inf  # when
        self._bytes = (0, 0)  # arrived, given
        self._thread: threading.Thread | None = None

    def _begin(self, *, private: bool) -> None:
        """Make the repository and the branch, and find out what would fail for every shard."""
        target = self._target
        target.check_token()
        there = target.make(target.look(private=private), private=private)
        if MANIFEST_NAME in there.files:
            raise self._published()
        # Asks for the right to write; a file as small as this is not sent.
        self._branch.upload([CommitOperationAdd(MANIFEST_NAME, b"{}")])

    def take(self, path: Path, info: ShardInfo) -> None:
        """Begin to take a shard away; returns at once.

        Args:
            path: where it is.
            info: what it is.

        Raises:
            InvalidInputError: the sink is closed.
        """
        with self._changed:
            if self._closed:
                raise InvalidInputError("the sink is closed; make a new one for each writer")
            self._leaving[info.path] = _Leaving(path, info)
            self._bytes = (self._bytes[0], self._bytes[1] + info.bytes)
            self._due = True
            if self._thread is None:
                # A daemon: an interpreter that ends does not wait for the network, and what is cut off stays here.
                self._thread = threading.Thread(target=self._work, name="logitstore-sink", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def arrived(self, *, wait: bool) -> Iterator[tuple[str, str]]:
        """The shards that have arrived since: (path in the dataset, where it is now).

        Args:
            wait: until all have, or cannot.

        Raises:
            DatasetExistsError: the repository has other files at a shard's path, or holds a dataset by now.
            CorruptDataError: a shard is not what was written; where `wait`, as all that follow.
            RemoteAccessError: the token is not valid any more, or there is no room.
            RemoteError: the Hub could not be reached, though tried again and again.
        """
        with self._changed:
            self._waited_for = wait
            self._due |= wait and bool(self._leaving)
            last = self._rounds + ROUNDS
            self._changed.notify_all()
        while True:
            with self._changed:
                gone, self._arrived = self._arrived, []
                error = self._problem(last, wait=wait)
                ended = error is not None or not wait or not self._leaving
                if not gone and not ended:
                    self._changed.wait(0.5)  # on Windows, nothing interrupts a long wait
            yield from ((path, f"{self._place}/{path}") for path in gone)
            if ended:
                if error is not None:
                    raise error
                return

    def _problem(self, last: int, *, wait: bool) -> Exception | None:
        """What the writer is to be told now."""
        for error in self._refused:
            # A place that is taken is a mistake in what was asked for, and shows early. All else waits for the end.
            if isinstance(error, DatasetExistsError) or (wait and not self._leaving):
                return error
        hopeless = self._rounds > last - ROUNDS and isinstance(self._error, RemoteAccessError)
        if wait and self._leaving and self._error is not None and (hopeless or self._rounds >= last):
            left = f"{n} shards stay" if (n := len(self._leaving)) > 1 else "1 shard stays"
            return type(self._error)(f"{self._error}; {left} here until then: go on with --resume (resume=True)")
        return None

    def close(self) -> None:
        """Stop; what has not arrived stays here."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)  # whoever comes late tells nobody any more

    def _work(self) -> None:
        while self._next():
            error: LogitStoreError | None = None
            try:
                self._round()
            except LogitStoreError as found:
                error = found
            except BaseException as found:  # noqa: BLE001 - raised where the shards are asked for
                with self._changed:
                    self._refused.append(found if isinstance(found, Exception) else RuntimeError(repr(found)))
                    self._leaving.clear()
            with self._changed:
                self._error = error
                self._rounds += 1
                self._failures = 0 if error is None else min(self._failures + 1, 10)
                self._again = time.monotonic() + (backoff(self._failures) if self._waited_for else RETRY_SECONDS)
                self._changed.notify_all()

    def _next(self) -> bool:
        """Wait for a reason to begin a round; whether there is one still."""
        with self._changed:
            while not self._closed:
                left = self._again - time.monotonic()
                if self._leaving and (self._due or left <= 0):
                    self._due = False
                    return True
                self._changed.wait(left if self._leaving else None)
        return False

    def _round(self) -> None:
        """Send what there is to send.

        Raises:
            RemoteError: not all of it could be.
            RemoteAccessError: likewise.
        """
        tried: set[str] = set()
        sent: list[tuple[_Leaving, CommitOperationAdd]] = []
        while not self._closed:
            shard = self._untried(tried, wait=bool(sent))
            if shard is not None:
                tried.add(shard.info.path)
                if self._look([shard])[1]:
                    try:
                        sent.append((shard, self._upload(shard)))
                    except CorruptDataError as error:
                        self._refuse(shard, error)
            if sent and (shard is None or len(sent) >= COMMIT_FILES or self._until_commit() <= 0):
                self._commit(sent)
                sent = []
            elif shard is None:
                return

    def _untried(self, tried: set[str], *, wait: bool) -> _Leaving | None:
        """A shard that was not tried yet in this round; None where there is none.

        Args:
            tried: paths of those that were.
            wait: for one, as long as it is too early for another commit.
        """
        with self._changed:
            while not self._closed:
                for path, shard in self._leaving.items():
                    if path not in tried:
                        return shard
                left = self._until_commit()
                if not wait or self._waited_for or left <= 0:
                    return None
                self._changed.wait(left)
        return None

    def _until_commit(self) -> float:
        """Seconds until the next commit."""
        return self._committed + COMMIT_SECONDS - time.monotonic()

    def _upload(self, shard: _Leaving) -> CommitOperationAdd:
        """Bring the bytes of a shard, which appear with the commit.

        Raises:
            CorruptDataError: they are not what was written.
        """
        addition, before = shard.addition(), shard.state()
        self._branch.upload([addition])
        if shard.state() != before:
            raise CorruptDataError("was changed while it was being sent", code="shard-sha256", path=str(shard.path))
        return addition

    def _commit(self, sent: list[tuple[_Leaving, CommitOperationAdd]]) -> None:
        """Make shards appear whose bytes are there."""
        additions = {shard.info.path: addition for shard, addition in sent}
        shards = [shard for shard, _ in sent]
        for attempt in range(_COLLISIONS):
            head, shards = self._look(shards)
            if not shards:
                self._committed = time.monotonic()
                return
            operations = [additions[shard.info.path] for shard in shards]
            what = shards[0].info.path if len(shards) == 1 else f"{len(shards)} shards"
            try:
                self._branch.commit(operations, head, f"Add {what} with logitstore, the manifest to come")
            except RemoteError:
                if self._branch.head() == head:
                    raise
                pause(backoff(attempt + 1))  # another writer was faster
        raise RemoteError(
            f"{self._target.repo}: {shards[0].info.path} was committed and is not there; look at the repository's "
            f"settings and .gitignore, and try again"
        )

    def _look(self, shards: list[_Leaving]) -> tuple[str, list[_Leaving]]:
        """The head of the branch, and those of the shards that are not there; the others have arrived, or cannot."""
        head = self._branch.head()
        if head is None:
            raise RemoteError(f"{self._target.repo}: there is no branch {self._branch.name} any more; make it again")
        there = self._branch.some(head, [MANIFEST_NAME, *(shard.info.path for shard in shards)])
        left = []
        for shard in shards:
            found = there.get(shard.info.path)
            if found is not None and shard.is_there(found):
                self._arrive(shard)
            elif found is not None:
                self._refuse(shard, self._taken(shard, found))
            elif MANIFEST_NAME in there:
                self._refuse(shard, self._published())
            else:
                left.append(shard)
        return head, left

    def _arrive(self, shard: _Leaving) -> None:
        with self._changed:
            if self._leaving.pop(shard.info.path, None) is not None:
                self._arrived.append(shard.info.path)
                self._bytes = (self._bytes[0] + shard.info.bytes, self._bytes[1])
            done, total = self._bytes
            self._changed.notify_all()
        if self._progress is not None:
            self._progress(done, total)

    def _refuse(self, shard: _Leaving, error: LogitStoreError) -> None:
        with self._changed:
            self._leaving.pop(shard.info.path, None)
            self._refused.append(error)
            self._changed.notify_all()

    def _published(self) -> DatasetExistsError:
        return DatasetExistsError(
            f"{self._target.repo} holds a dataset in {self._branch.name}, which shards that come one by one could not "
            f"replace at once; choose another repository or branch, or push the dataset when it is complete"
        )

    def _taken(self, shard: _Leaving, found: RepoFile) -> LogitStoreError:
        name = f"{self._target.repo}: {shard.info.path}"
        if found.size == shard.info.bytes and found.lfs is None:
            return InvalidInputError(
                f"{name} is not stored as a large file, whose sha256 the Hub would know; add the line `*.arrow "
                f"filter=lfs diff=lfs merge=lfs -text` to its .gitattributes, delete the shard there, and go on "
                f"(--resume, resume=True)"
            )
        return DatasetExistsError(
            f"{name} is there already with other bytes, of another run perhaps, and is not replaced: delete it there, "
            f"or choose another repository, and go on (--resume, resume=True)"
        )
