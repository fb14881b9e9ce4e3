"""A disk that forgets: what a power cut may leave of a directory, by what was synced and what was not.

While a `Recorder` is on, each step that changes the directory is noted: names that come, go and move, bytes of files, and
what was synced. `crash` makes a directory as one of the disks would that POSIX allows: of names that were not synced any may be
there or not, in whatever order, and of bytes that were not synced any part, or zeros in their place.
"""

import os
from pathlib import Path

from logitstore.io import files as io

WATCHED = (("replace", Path), ("unlink", Path), ("mkdir", Path), ("rmdir", Path))


class Recorder:
    """Notes the steps of everything under a directory, in this process."""

    def __init__(self, root, monkeypatch):
        self.root = root
        self.names = {}  # path: inode, as programs see it
        self.steps = []
        self._bytes = {}
        for name, owner in WATCHED:
            monkeypatch.setattr(owner, name, self._after(getattr(owner, name)))
        for name in ("link", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._after(getattr(os, name)))
        monkeypatch.setattr(io.GrowingFile, "write", self._after(io.GrowingFile.write))
        fsync = os.fsync

        def synced(descriptor):
            self.observe()
            fsync(descriptor)
            self.steps.append(("sync", os.fstat(descriptor).st_ino))

        monkeypatch.setattr(os, "fsync", synced)

    def _after(self, act):
        def acted(*arguments, **more):
            try:
                return act(*arguments, **more)
            finally:
                self.observe()

        return acted

    def observe(self):
        """Note what changed since the last step."""
        seen = {}
        for directory, folders, names in os.walk(self.root):
            for name in (*folders, *names):
                path = Path(directory, name)
                inode = path.lstat().st_ino
                seen[path.relative_to(self.root).as_posix()] = inode
                if name in names:
                    data = path.read_bytes()
                    if self._bytes.get(inode) != data:
                        self._bytes[inode] = data
                        self.steps.append(("bytes", inode, data))
        was, self.names = self.names, seen
        moved = {inode: path for path, inode in was.items() if seen.get(path) != inode}
        for path, inode in seen.items():
            if was.get(path) != inode:
                # One step: a name that is moved is never in both places, and what it replaces never gone before.
                self.steps.append(("name", path, inode, moved.pop(inode, None)))
        for path in sorted(set(was) - set(seen), reverse=True):
            if was[path] in moved:
                self.steps.append(("gone", path, was[path]))

    def mark(self, what):
        """Note something of the test's own, to be found among the steps."""
        self.observe()
        self.steps.append(("mark", what))


class Disk:
    """What is on the disk after some of the steps, and what is only in memory."""

    def __init__(self, root_inode):
        self.root_inode = root_inode
        self.folder_of = {"": root_inode}
        self.durable = {}
        self.pending = []
        self.written = {}
        self.synced = {}
        self.marks = []

    def step(self, step):
        kind = step[0]
        if kind == "bytes":
            self.written[step[1]] = step[2]
        elif kind == "mark":
            self.marks.append(step[1])
        elif kind == "sync":
            self._sync(step[1])
        else:
            self.pending.append(step)
            if kind == "name":
                self.folder_of[step[1]] = step[2]

    def _sync(self, inode):
        if inode in self.written:
            self.synced[inode] = self.written[inode]
            return
        left = []
        for step in self.pending:
            paths = [step[1]] if step[0] == "gone" or step[3] is None else [step[1], step[3]]
            if all(self.folder_of.get(_folder(path)) == inode for path in paths):
                _apply(self.durable, step)
            else:
                left.append(step)
        self.pending = left

    def certain(self):
        """The bytes of files that are there after any power cut, by path."""
        return {path: self.synced[inode] for path, inode in self.durable.items() if inode in self.synced}

    def crash(self, target, random):
        """Make a directory as it may be after a power cut now."""
        names = dict(self.durable)
        share = random.choice([0.0, 0.3, 0.7, 1.0])
        kept = [step for step in self.pending if random.random() < share]
        if random.random() < 0.5:
            random.shuffle(kept)
        for step in kept:
            _apply(names, step)
        target.mkdir()
        for path, inode in sorted(names.items()):
            if not (target / path).parent.is_dir():
                continue  # the directory is not there
            if inode in self.written:
                (target / path).write_bytes(self._bytes(inode, random))
            elif not (target / path).exists():
                (target / path).mkdir()

    def _bytes(self, inode, random):
        synced, written = self.synced.get(inode, b""), self.written[inode]
        choice = random.random()
        if not written.startswith(synced):  # it was cut, and written to again
            return synced if choice < 0.5 else written
        if choice < 0.3:
            return synced
        if choice < 0.5:
            return written
        cut = random.randint(len(synced), len(written))
        return written[:cut] if choice < 0.75 else written[:cut] + bytes(len(written) - cut)


def _folder(path):
    return path.rpartition("/")[0]


def _apply(names, step):
    if step[0] == "gone":
        names.pop(step[1], None)
        return
    _, path, inode, before = step
    if before is not None:
        names.pop(before, None)
    names[path] = inode
