"""Fetching from the Hub when it is stopped, and the command that does it."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.errors import (
    DatasetNotFoundError,
    IncompleteDatasetError,
    InvalidInputError,
    RemoteError,
)

pytest.importorskip("huggingface_hub")

from hub import Fault
from pull_rows import (
    MODULE,
    REPO,
    assert_absent,
    assert_whole,
    cli,
    content,
    shards_of,
    size_of,
    stored,
)

from logitstore.hub import parts, pull
from logitstore.hub.parts import Parts, Wanted, fetch_all

pytest_plugins = ["pull_rows"]  # its fixtures
pytestmark = pytest.mark.usefixtures("quiet")


# Stopped in whatever way


class Crash(BaseException):
    """What is done after it is not done any more."""


class Fragile:
    """Lets so many calls that change names, or make them durable, succeed, and none after them."""

    def __init__(self, monkeypatch):
        self.left = None
        for owner, name in (
            *((Path, name) for name in ("replace", "unlink", "mkdir", "rmdir")),
            (os, "fsync"),
            (shutil, "copyfile"),
        ):
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, real):
        def call(*args, **kwargs):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise Crash
            return real(*args, **kwargs)

        return call

    def crashes(self, steps, call):
        self.left = steps
        try:
            call()
        except Crash:
            return True
        finally:
            self.left = None
        return False


def check_one_of(root, *datasets):
    """Either there is no dataset, or it is one of these, whole."""
    try:
        logitstore.open(root)
    except (DatasetNotFoundError, IncompleteDatasetError):
        return
    assert not [f for f in logitstore.validate(root, deep=True) if f.severity == "error"]
    got = content(root)
    kept = [{name: data for name, data in files.items() if name != "README.md"} for files in datasets]
    assert {name: got.get(name) for name in kept[0]} == kept[0] or {name: got.get(name) for name in kept[1]} == kept[1]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_at_any_step(hub, there, other, tmp_path, monkeypatch, overwrite):
    pull(REPO, tmp_path / "part", shards="0-2")
    part = content(tmp_path / "part")
    assert len(shards_of(content(other))) > 3  # some names are replaced, others go
    hub.commit_files("me/part", part)
    fragile = Fragile(monkeypatch)
    for steps in range(200):
        root = tmp_path / str(steps)
        if overwrite:
            shutil.copytree(other, root)
        if not fragile.crashes(steps, lambda root=root: pull("me/part", root, overwrite=overwrite)):
            break
        check_one_of(root, content(other), part)
        pull("me/part", root, overwrite=overwrite)
        assert_whole(root, part)
        shutil.rmtree(root)
    assert 15 < steps < 199


@pytest.mark.parametrize(
    "harm", ["log cut", "log long", "log high", "log random", "part short", "part gone", "part random", "whole flipped"]
)
def test_what_a_stopped_pull_left_is_not_believed(hub, there, tmp_path, harm, breaks_off):
    with pytest.raises(RemoteError):
        pull(REPO, tmp_path / "d")
    hub.clear_faults()
    work = tmp_path / "d" / ".pull"
    assert list(work.glob("*.log"))
    for path in work.iterdir():
        data = bytearray(path.read_bytes())
        kind = path.suffix[1:] if path.suffix else "lock" if path.name == "lock" else "whole"
        if harm == "log cut" and kind == "log":
            path.write_bytes(data[:-3])
        elif harm == "log long" and kind == "log":
            path.write_bytes(data + bytes(8))
        elif harm == "log high" and kind == "log":
            path.write_bytes(data[:-8] + b"\xff" * 8)
        elif harm == "log random" and kind == "log":
            path.write_bytes((2000).to_bytes(8, "little") * (len(data) // 8))
        elif harm == "part short" and kind == "part":
            path.write_bytes(data[:-1])
        elif harm == "part gone" and kind == "part":
            path.unlink()
        elif harm == "part random" and kind == "part":
            path.write_bytes(os.urandom(len(data)))
        elif harm == "whole flipped" and kind == "whole":
            data[7] ^= 1
            path.write_bytes(data)
    (work / ("0" * 64)).write_bytes(b"of another")
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)


class Full:
    """A file on a disk that becomes full."""

    def __init__(self, file, room, error):
        self.file, self.room, self.error = file, room, error

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *exc):
        return self.file.__exit__(*exc)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.room:
            raise self.error
        self.room.pop()
        return self.file.write(data)


@pytest.mark.parametrize("step", ["write", "fsync", "manifest"])
def test_a_full_disk(hub, there, tmp_path, monkeypatch, capfd, step):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real, room = Path.open, [None] * 6

    def opened(self, *args, **kwargs):
        file = real(self, *args, **kwargs)
        return Full(file, room, full) if self.suffix == ".part" and kwargs.get("buffering") == 0 else file

    def fail(*args):
        raise full

    with monkeypatch.context() as patch:
        owner, name, fake = {
            "write": (Path, "open", opened),
            "fsync": (os, "fsync", fail),
            "manifest": (MODULE, "write_atomic", fail),
        }[step]
        patch.setattr(owner, name, fake)
        out, err = cli(monkeypatch, capfd, REPO, tmp_path / "d", status=1)
    assert out == ""
    assert err.startswith("Error: ")
    assert "No space left on device" in err
    assert step != "write" or f"{tmp_path}" in err
    assert_absent(tmp_path / "d")
    before = stored(hub)
    assert before
    cli(monkeypatch, capfd, REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)
    lost = 0 if step == "manifest" else parts.FETCHERS * 10_000  # what was on its way when the first one failed
    assert stored(hub) <= sum(len(there[name]) for name in shards_of(there)) + lost


def test_no_room_is_said_before(hub, there, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(InvalidInputError, match="bytes are to be fetched, and there is room for 1,000"):
        pull(REPO, tmp_path / "d")
    assert stored(hub) == 0
    assert_absent(tmp_path / "d")


def test_what_progress_raises_ends_it(hub, there, tmp_path):
    def report(done, total):
        if done > 20_000:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pull(REPO, tmp_path / "d", progress=report)
    assert_absent(tmp_path / "d")
    assert len([r for r in hub.requests if r.origin == "storage"]) < 3 * parts.FETCHERS
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)


def test_progress_goes_up(hub, there, tmp_path, small_segments):
    seen = []
    pull(REPO, tmp_path / "d", progress=lambda *told: seen.append(told))
    done = [told[0] for told in seen]
    assert done == sorted(done)
    assert seen[-1] == (size_of(there), size_of(there))
    assert {total for _, total in seen} == {size_of(there)}
    hub.fault(Fault(kind="flip", after=10, origin="storage"))
    seen.clear()
    pull(REPO, tmp_path / "e", progress=lambda *told: seen.append(told))
    falls = sum(after[0] < before[0] for before, after in itertools.pairwise(seen))
    assert falls == 1
    assert seen[-1] == (size_of(there), size_of(there))


# Files in parts, without a network


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(st.binary(max_size=200), min_size=1, max_size=6),
    st.integers(1, 70),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_any_files_in_any_segments(tmp_path_factory, files, segment, piece, random):
    work = tmp_path_factory.mktemp("work")
    made = {f"f{number}": data for number, data in enumerate(files)}
    left = [random.randrange(40)]

    def fetch(path, offset, length, sink, wanted):
        data = made[path]
        for start in range(offset, offset + length, piece):
            left[0] -= 1
            if left[0] == 0:
                raise RemoteError("broken off")
            part = data[start : min(start + piece, offset + length)]
            sink(bytes(len(part)) if left[0] == -7 else part)

    before = parts.SEGMENT
    parts.SEGMENT = segment
    try:
        for _ in range(8):
            wanted = {sha256(data): Parts(work, Wanted(name, len(data), sha256(data))) for name, data in made.items()}
            told = []
            try:
                fetch_all([one for one in wanted.values() if not one.is_whole], fetch, str, told.append)
            except RemoteError:
                continue
            break
        assert {path.name: path.read_bytes() for path in work.iterdir()} == {sha256(d): d for d in files}
    finally:
        parts.SEGMENT = before
        shutil.rmtree(work)


def test_positions_beyond_32_bits(tmp_path, monkeypatch):
    """A file of 5 GiB that is mostly a hole: offsets are right, and what is written is where it belongs."""
    size, ends = 5 * 2**30, b"the end"
    monkeypatch.setattr(parts, "SEGMENT", 2**31 + 2**20)
    asked = []

    def fetch(path, offset, length, sink, wanted):
        asked.append((offset, length))
        if offset + length == size:
            sink(ends)

    one = Parts(tmp_path, Wanted("f", size, "0" * 64))
    monkeypatch.setattr(Parts, "finish", lambda self, where: True)
    fetch_all([one], fetch, str, lambda number: None)
    segment = 2**31 + 2**20
    assert sorted(asked) == [(0, segment), (segment, segment), (2 * segment, size - 2 * segment)]
    with (tmp_path / f"{'0' * 64}.part").open("rb") as file:
        file.seek(2 * segment)
        assert file.read(len(ends)) == ends
    assert one.there == len(ends)


def test_memory_is_bounded(hub, tmp_path):
    """Of 48 MiB, no more than the buffers of the connections is held."""
    data = os.urandom(48 * 2**20)
    hub.commit_files(REPO, {"large.arrow": data})
    from logitstore.io.hub import HubStore

    store = HubStore.of(REPO)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        one = Parts(tmp_path, Wanted("large.arrow", len(data), sha256(data)))
        fetch_all([one], lambda *a: store.fetch(*a[:4], wanted=a[4], buffer=parts.BUFFER), str, lambda number: None)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert one.is_whole
    assert peak < 24 * 2**20  # the server's buffers in it, too


# The command


def test_the_command(hub, there, tmp_path, monkeypatch, capfd):
    out, err = cli(monkeypatch, capfd, REPO, tmp_path / "d")
    commit = hub.commits(REPO)[0].sha
    count = len(shards_of(there))
    assert re.fullmatch(rf".*/d: {count} shards, .* fetched, verified \(commit {commit[:12]}\)\n", out)
    assert err == ""
    out, err = cli(monkeypatch, capfd, REPO, tmp_path / "d")
    assert out == f"{tmp_path / 'd'}: unchanged, all of commit {commit[:12]} is there already, and verified\n"
    out, err = cli(monkeypatch, capfd, f"{REPO}@main", tmp_path / "e", "--split", "train", "--shards", "0-1", "--json")
    said = json.loads(out)
    assert said == {
        "path": str(tmp_path / "e"), "commit": commit, "shards": 2, "bytes": said["bytes"],
        "fetched": said["bytes"], "unchanged": False,
    }  # fmt: skip
    assert err == ""
    _, err = cli(monkeypatch, capfd, REPO, tmp_path / "e", status=1)
    assert "--overwrite" in err
    cli(monkeypatch, capfd, REPO, tmp_path / "e", "--overwrite")
    assert_whole(tmp_path / "e", there)


def test_the_command_s_errors(hub, there, tmp_path, monkeypatch, capfd):
    for arguments, match in (
        (("me/nowhere", "d"), "no such repository"),
        ((f"{REPO}@nope", "d"), "no such revision"),
        ((REPO, "d", "--split", "nope"), "there are: train, test, dev"),
        ((REPO, "d", "--shards", "x"), "0-9 or 0,2,5-7"),
        (("nonsense", "d"), "namespace/name"),
    ):
        out, err = cli(monkeypatch, capfd, *arguments, status=1)
        assert out == ""
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        assert match in err
    _, err = cli(monkeypatch, capfd, REPO, status=2)
    assert "DIRECTORY" in err
    out, _ = cli(monkeypatch, capfd, "--help")
    assert "Example: logitstore pull" in out


def test_private_gated_and_a_bad_token(hub, there, tmp_path, monkeypatch, capfd):
    hub.add_user("you", "hf_yours")
    monkeypatch.setenv("HF_TOKEN", "hf_yours")
    hub.set_private(REPO)
    _, err = cli(monkeypatch, capfd, REPO, tmp_path / "d", status=1)
    assert "your token does not see it" in err
    hub.set_private(REPO, False)
    hub.gate(REPO)
    _, err = cli(monkeypatch, capfd, REPO, tmp_path / "d", status=1)
    assert "gated; accept its terms" in err
    hub.grant(REPO, "you")
    cli(monkeypatch, capfd, REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    _, err = cli(monkeypatch, capfd, REPO, tmp_path / "e", status=1)
    assert "token" in err


INTERRUPTIBLE = (  # what a shell runs behind itself ignores SIGINT, and so do its children
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import logitstore_cli; logitstore_cli.run()"
)


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is of POSIX systems")
@pytest.mark.parametrize("slow", ["link", "answer"])
def test_control_c_ends_it_soon(hub, there, tmp_path, slow):
    if slow == "link":
        hub.bytes_per_second = 1000
    else:
        hub.fault(Fault(kind="delay", origin="storage", seconds=60, times=None))
    before = len(hub.faults.all())
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "pull", REPO, tmp_path / "d"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    work = tmp_path / "d" / ".pull"
    end = time.monotonic() + 60
    while len(list(work.glob("*.part"))) < 4 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - started
    assert (process.returncode, out, err.strip()) == (1, "", "Stopped.")
    assert took < 3
    assert_absent(tmp_path / "d")
    assert len(hub.faults.all()) == before
    hub.clear_faults()
    hub.bytes_per_second = None
    pull(REPO, tmp_path / "d")
    assert_whole(tmp_path / "d", there)
