"""Repositories: commits, trees, branches and tags."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hub.answers import Refusal
from hub.blobs import Blob

REGULAR_LIMIT = 10 * 1000 * 1000
"""Larger files go to LFS."""

_LFS_PATTERNS = """
*.7z *.arrow *.avro *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.lz4 *.mds *.mlmodel *.model *.msgpack *.npy
*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite
*.tgz *.wasm *.xz *.zip *.zst *tfevents* *.pcm *.sam *.raw *.aac *.flac *.mp3 *.ogg *.wav *.bmp *.gif *.png *.tiff
*.jpg *.jpeg *.webp *.mp4 *.webm
"""
GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS_PATTERNS.split()
).encode()

_NUMBERS = itertools.count()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Entry:
    """A file of a tree: `oid` is git's, `sha256` is that of an LFS file and None for a regular one."""

    blob: Blob
    oid: str
    sha256: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> Entry:
        return cls(Blob.of(data), git_oid(data))

    @classmethod
    def lfs(cls, sha256: str, blob: Blob) -> Entry:
        return cls(blob, git_oid(lfs_pointer(sha256, blob.size)), sha256)

    @property
    def size(self) -> int:
        return self.blob.size

    def info(self, path: str) -> dict[str, Any]:
        """As trees list it."""
        info: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.sha256 is not None:
            pointer = len(lfs_pointer(self.sha256, self.size))
            info["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": pointer}
        return info


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    date: str
    author: str
    tree: Mapping[str, Entry]


@dataclass
class Repo:
    """A dataset. What changes it is called with the Hub's lock held."""

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    created: str = field(default_factory=now)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, Blob] = field(default_factory=dict)
    """LFS files by SHA-256, committed or not."""

    def __post_init__(self) -> None:
        self._add("main", {".gitattributes": Entry.regular(GITATTRIBUTES)}, "initial commit", "", "system")

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def used(self) -> int:
        return sum(blob.size for blob in list(self.lfs.values()))

    def _add(self, branch: str, tree: Mapping[str, Entry], title: str, message: str, author: str) -> Commit:
        parent, date = self.branches.get(branch), now()
        text = "\n".join(f"{path} {entry.oid}" for path, entry in sorted(tree.items()))
        text = f"{self.id} {parent} {title} {date} {next(_NUMBERS)}\n{text}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        commit = Commit(sha, parent, title, message, date, author, dict(tree))
        self.history[sha] = commit
        self.branches[branch] = sha
        return commit

    def commit(self, branch: str, changes: Iterable[Change], *, title: str, message: str, author: str) -> Commit:
        """Makes a commit of changes to the head of a branch."""
        if branch not in self.branches:
            raise no_such_revision(branch)
        tree = dict(self.history[self.branches[branch]].tree)
        for change in changes:
            change.apply(tree)
        return self._add(branch, tree, title, message, author)

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag, or a full or abbreviated id names."""
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha in self.history:
            return self.history[sha]
        if len(sha) >= 7 and len(found := [s for s in list(self.history) if s.startswith(sha)]) == 1:
            return self.history[found[0]]
        raise no_such_revision(revision)

    def log(self, revision: str) -> list[Commit]:
        """Commits from a revision back to the first."""
        commit: Commit | None = self.resolve(revision)
        commits = []
        while commit is not None:
            commits.append(commit)
            commit = self.history[commit.parent] if commit.parent is not None else None
        return commits

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that gave a file, or the files of a folder, what it has."""

        def of(tree: Mapping[str, Entry]) -> dict[str, str]:
            return {p: e.oid for p, e in tree.items() if p == path or p.startswith(f"{path}/")}

        wanted = of(commit.tree)
        while commit.parent is not None and of(self.history[commit.parent].tree) == wanted:
            commit = self.history[commit.parent]
        return commit


def no_such_revision(revision: str) -> Refusal:
    return Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def no_such_entry(path: str, commit: Commit) -> Refusal:
    refusal = Refusal(404, f"Entry not found: {path}", code="EntryNotFound")
    refusal.headers["X-Repo-Commit"] = commit.sha
    return refusal


@dataclass(frozen=True)
class Change:
    """A file that is set to an entry or, with none, deleted together with what lies under it."""

    path: str
    entry: Entry | None = None

    def apply(self, tree: dict[str, Entry]) -> None:
        under = [path for path in tree if path.startswith(f"{self.path}/")]
        if self.entry is None:
            if self.path not in tree and not under:
                raise Refusal(404, f"{self.path} does not exist", code="EntryNotFound")
            tree.pop(self.path, None)
        else:
            # A file takes the place of a folder of its name and the other way round, as in git.
            parts = self.path.split("/")
            for count in range(1, len(parts)):
                tree.pop("/".join(parts[:count]), None)
            tree[self.path] = self.entry
        for path in under:
            del tree[path]


def check_path(path: Any) -> str:
    if not isinstance(path, str) or any(part in {"", ".", "..", ".git"} for part in path.split("/")):
        raise Refusal(400, f"Invalid path in repo: {path!r}")
    return path


def is_lfs(path: str, size: int, tree: Mapping[str, Entry]) -> bool:
    """Whether a file goes to LFS, by its size and by what .gitattributes says."""
    if size > REGULAR_LIMIT:
        return True
    attributes = tree[".gitattributes"].blob.read().decode() if ".gitattributes" in tree else ""
    for line in attributes.splitlines():
        pattern, *values = line.split() or [""]
        if "filter=lfs" in values:
            subject = path if "/" in pattern else path.rsplit("/", 1)[-1]
            if fnmatch.fnmatchcase(subject, pattern):
                return True
    return False


def listing(tree: Mapping[str, Entry], folder: str, *, recursive: bool) -> list[dict[str, Any]] | None:
    """What lies in a folder, folders included; None if there is no such folder."""
    prefix = f"{folder}/" if folder else ""
    inside = {path: entry for path, entry in tree.items() if path.startswith(prefix)}
    if folder and not inside:
        return None
    found: dict[str, dict[str, Any]] = {}
    for path, entry in inside.items():
        parts = path.removeprefix(prefix).split("/")
        for count in range(1, len(parts) if recursive else min(2, len(parts))):
            name = prefix + "/".join(parts[:count])
            if name not in found:
                found[name] = folder_info(tree, name)
        if recursive or len(parts) == 1:
            found[path] = entry.info(path)
    return [found[path] for path in sorted(found)]


def folder_info(tree: Mapping[str, Entry], folder: str) -> dict[str, Any]:
    inside = sorted((path, entry.oid) for path, entry in tree.items() if path.startswith(f"{folder}/"))
    return {"type": "directory", "oid": hashlib.sha1(repr(inside).encode()).hexdigest(), "size": 0, "path": folder}
