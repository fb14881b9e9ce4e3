"""What systems do to writers: no room, no right, no clock. A clear error, and earlier commits as they were."""

import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import logitstore
from logitstore.io import files as io

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.skipif(os.name == "nt", reason="signals, limits and users of POSIX systems"),
]

SETTINGS = {"logit_width": 1000, "chunk_candidates": 200, "shard_bytes": 9000, "teacher": "t"}


def fill(path, rows, numbers=range(40), **more):
    with logitstore.Writer(path, **SETTINGS, **more) as writer:
        for number in numbers:
            writer.add(*rows(number, 3 + number % 7, 6), id=f"s{number}")


def content(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def committed(tmp_path, rows):
    path = tmp_path / "d"
    fill(path, rows, range(3))
    return path


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_refuses_at_any_moment_loses_no_earlier_commit(tmp_path, rows, committed, monkeypatch, call, error):
    """Each write and each sync fails in turn: the error names the file, the old dataset stays, and resuming works."""
    old = content(committed)
    target, name = (io.GrowingFile, "write") if call == "write" else (os, "fsync")
    act = getattr(target, name)
    calls = [0]
    for at in itertools.count(1, 5):
        calls[0] = 0

        def fail(*arguments, at=at):
            calls[0] += 1
            if calls[0] == at:
                raise OSError(error, os.strerror(error))
            return act(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            try:
                fill(committed, rows, overwrite=True)
            except OSError as caught:
                assert caught.errno == error
            else:
                assert at > 20
                break
        ids = [s.id for s in logitstore.open(committed)]
        assert ids in (["s0", "s1", "s2"], [f"s{n}" for n in range(40)])  # the directory's last sync may have failed
        assert {name: data for name, data in content(committed).items() if name in old} == old or len(ids) == 40
        if list(committed.glob("parts/*/journal")) and len(ids) == 3:
            try:
                fill(committed, rows, resume=True)
            except logitstore.DatasetExistsError as refused:
                assert "begin it anew" in str(refused)
            else:
                assert len(logitstore.open(committed)) == 40
        fill(committed, rows, range(3), overwrite=True)
        old = content(committed)


LIMITED = """
import resource, sys, warnings, numpy as np, logitstore
warnings.simplefilter("ignore")
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
with logitstore.Writer(sys.argv[1], logit_width=1000, overwrite=True, chunk_candidates=200) as writer:
    for number in range(200):
        writer.add([1, 2, 3], [[1, 2], [3, 4], [5, 6]], [[-1.0, -2.0]] * 3)
"""


def test_a_file_that_may_not_grow_is_an_error_with_its_name(committed):
    """The kernel refuses in the middle of a write: what it took of it must not pass for a chunk."""
    old = [s.id for s in logitstore.open(committed)]
    done = subprocess.run([sys.executable, "-c", LIMITED, committed], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "train-00" in done.stderr
    assert [s.id for s in logitstore.open(committed)] == old
    assert logitstore.is_valid(logitstore.validate(committed, deep=True))


UNPRIVILEGED = """
import os, sys, warnings
warnings.simplefilter("ignore")
os.umask(0o077)
if os.getuid() == 0:
    import encodings.cp437, importlib, logitstore_cli.main
    from logitstore.convert.run import importers
    importers()  # while these files can be read
    for name in logitstore_cli.main.COMMANDS.values():
        importlib.import_module(name)
    os.setgid(65534); os.setuid(65534)
from logitstore_cli import run
sys.argv = ["logitstore", *sys.argv[1:]]
run()
"""


def unprivileged(*arguments):
    """A command as a user who may do nothing."""
    arguments = [str(argument) for argument in arguments]
    return subprocess.run([sys.executable, "-c", UNPRIVILEGED, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def capture():
    return Path(__file__).parent / "data" / "gemma3-270m-shakespeare-top64.npz"


@pytest.fixture
def readable(tmp_path):
    """A directory that everybody may enter."""
    for path in (tmp_path, *tmp_path.parents):
        if path.owner() == Path.home().owner() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    return tmp_path


def test_a_directory_that_may_not_be_written_to_is_an_error_with_its_name(readable, capture, committed):
    before = content(committed)
    committed.chmod(0o555)
    try:
        done = unprivileged("convert", capture, committed, "--overwrite")
        assert done.returncode == 1
        assert "Permission denied" in done.stderr
        assert str(committed) in done.stderr
        assert "Traceback" not in done.stderr
        assert unprivileged("info", committed).returncode == 0
        assert unprivileged("status", committed).returncode == 0
        assert unprivileged("validate", "--deep", committed).returncode == 0
    finally:
        committed.chmod(0o755)
    assert content(committed) == before


def test_a_shard_that_may_not_be_read_is_an_error_with_its_name(readable, committed):
    shard = next(committed.glob("data/*/*.arrow"))
    shard.chmod(0)
    done = unprivileged("head", committed)
    assert done.returncode == 1
    assert shard.name in done.stderr
    assert "Traceback" not in done.stderr
    shard.chmod(0o644)


def test_permission_that_is_lost_meanwhile_is_an_error_and_can_be_gone_on_from(tmp_path, rows, committed, monkeypatch):
    old = content(committed)
    replace = Path.replace

    def refuse(self, target):
        if Path(target).name == "logitstore.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(PermissionError, match="Permission denied"):
            fill(committed, rows, overwrite=True)
    assert {name: content(committed)[name] for name in old} == old
    assert [s.id for s in logitstore.open(committed)] == ["s0", "s1", "s2"]
    fill(committed, rows, resume=True)
    assert len(logitstore.open(committed)) == 40


def test_signals_that_interrupt_system_calls_change_nothing(tmp_path, rows):
    """A handler runs every millisecond or so; Python goes on with what it interrupted."""
    fill(tmp_path / "quiet", rows)
    came = []
    old = signal.signal(signal.SIGALRM, lambda number, _: came.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0011)
    try:
        fill(tmp_path / "d", rows)
        assert logitstore.is_valid(logitstore.validate(tmp_path / "d", deep=True))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert len(came) > 5
    assert content(tmp_path / "d") == content(tmp_path / "quiet")


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, rows, monkeypatch):
    fill(tmp_path / "quiet", rows)
    now = [2e9]

    def earlier():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(time, "time_ns", lambda: int(earlier() * 1e9))
    fill(tmp_path / "d", rows, range(20))
    fill(tmp_path / "d", rows, overwrite=True)
    assert [s.id for s in logitstore.open(tmp_path / "d")] == [f"s{n}" for n in range(40)]
    assert logitstore.is_valid(logitstore.validate(tmp_path / "d", deep=True))


def test_writes_of_a_few_bytes_at_a_time_make_the_same_file(tmp_path, rows, monkeypatch):
    """As some file systems and full pipes do: a write may take less than it was given."""
    fill(tmp_path / "quiet", rows)
    init = io.GrowingFile.__init__

    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, view):
            return self.file.write(view[:777])

        def __getattr__(self, name):
            return getattr(self.file, name)

    def slow(self, *arguments):
        init(self, *arguments)
        self._file = Slow(self._file)

    monkeypatch.setattr(io.GrowingFile, "__init__", slow)
    fill(tmp_path / "d", rows)
    assert content(tmp_path / "d") == content(tmp_path / "quiet")


def test_few_file_descriptors_are_enough(committed):
    """A writer and a reader of many shards, with 40 descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 100  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    try:
        with logitstore.Writer(committed, logit_width=10, chunk_candidates=1, shard_bytes=1, overwrite=True) as writer:
            for _ in range(100):
                writer.add([1], [[1]], [[-1.0]])
        assert len(list(logitstore.open(committed))) == 100
        assert len(logitstore.open(committed).info.shards) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
