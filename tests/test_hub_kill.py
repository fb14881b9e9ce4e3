"""A pull that is killed at any moment leaves nothing that looks complete and is not, and the next one goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.errors import DatasetNotFoundError, IncompleteDatasetError

pytest.importorskip("huggingface_hub")

from logitstore.hub import pull, push
from logitstore.hub.parts import BUFFER, FETCHERS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems")

TESTS = Path(__file__).parent
SEQUENCES = 90
TOKEN = "hf_test_me"
RATE = 1_300_000  # bytes a second and connection: all of it takes a second or so
LOST = FETCHERS * (BUFFER + 2 * RATE // 20)  # what a kill may cost: buffers, and what is in the sockets


class Server:
    """A Hub in a process of its own."""

    def __init__(self, process):
        self.process = process
        self.endpoint = json.loads(process.stdout.readline())["endpoint"]

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.endpoint}/_ctl/{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def log(self, origin):
        return [request for request in self.ask("GET", "log") if request["origin"] == origin]

    def sent(self):
        return sum(request["sent"] for request in self.log("storage"))

    def settle(self):
        """Wait until connections of a killed process are seen to be gone."""
        while (before := self.sent()) != (time.sleep(0.15) or self.sent()):
            assert before >= 0


@pytest.fixture(scope="module")
def server():
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "hub.serve", "--token", TOKEN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        yield Server(process)
        process.stdin.close()


@pytest.fixture(scope="module")
def published(server, tmp_path_factory):
    """Some 12 MB in some shards: path, files by name, and the size of the shards."""
    path = tmp_path_factory.mktemp("kill") / "data"
    random = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        with logitstore.Writer(path, logit_width=50_000, teacher="t", shard_bytes=10**6, values="float32") as writer:
            for _ in range(SEQUENCES):
                ids = random.integers(0, 500, (400, 96)) + 500 * np.arange(96)
                logprobs = -np.cumsum(random.uniform(0.01, 0.2, ids.shape), axis=1) - 4
                writer.add(random.integers(0, 500, 400), ids, logprobs.astype(np.float32))
    push(path, "me/x", endpoint=server.endpoint, token=TOKEN)
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    size = logitstore.open(path).info.totals.bytes
    assert size > 4 * LOST
    return files, size


def started(server, root):
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "logitstore_cli", "pull", "me/x", root]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def kill_when(process, reached, wait=0.0):
    """Kill a process when something is so, unless it has ended before; whether it was killed."""
    end = time.monotonic() + 60
    while process.poll() is None and not reached():
        assert time.monotonic() < end
        time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return process.returncode == -signal.SIGKILL


def check_state(root, files):
    """Whether there is a dataset; if there is, it is whole."""
    try:
        dataset = logitstore.open(root)
    except (DatasetNotFoundError, IncompleteDatasetError):
        return False
    assert len(dataset) == SEQUENCES
    check_bytes(root, files)
    return True


def check_bytes(root, files):
    for name, data in files.items():
        assert (root / name).read_bytes() == data, name


def finish(server, root, files):
    server.ask("POST", "settings", {"bytes_per_second": None})
    pull("me/x", root, endpoint=server.endpoint, token=TOKEN)
    check_bytes(root, files)
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert names == {*files, "README.md"}
    assert [f for f in logitstore.validate(root) if f.severity == "error"] == []


def files_in(folder):
    with contextlib.suppress(OSError):
        return len(os.listdir(folder))  # noqa: PTH208 - it must be quick
    return 0


POINTS = [
    *(("requests", number) for number in (1, 2, 3, 6, 10)),
    *(("bytes", fraction) for fraction in (0.001, 0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.99, 1.0)),
    *(("shards", number) for number in (1, 3, 6)),
    ("card", 1),
    ("manifest", 1),
]
ALWAYS = {("requests", 2), ("bytes", 0.05), ("bytes", 0.6), ("bytes", 0.99), ("shards", 1), ("manifest", 1)}


@pytest.mark.parametrize(
    ("what", "number"),
    [pytest.param(*point, marks=() if point in ALWAYS else pytest.mark.slow) for point in POINTS],
)
def test_a_pull_is_killed_once(server, published, tmp_path, what, number):
    files, size = published
    root = tmp_path / "d"
    server.ask("DELETE", "log")
    server.ask("POST", "settings", {"bytes_per_second": RATE if what in ("requests", "bytes") else None})
    reached = {
        "requests": lambda: len(server.log("hub")) >= number,
        "bytes": lambda: server.sent() >= number * size,
        "shards": lambda: files_in(root / "data" / "train") >= number,
        "card": (root / "README.md").exists,
        "manifest": (root / "logitstore.json").exists,
    }[what]
    killed = kill_when(started(server, root), reached, 0.002 if what in ("requests", "bytes") else 0)
    assert killed or what in ("shards", "card", "manifest")  # these last for some milliseconds
    whole = check_state(root, files)
    assert not (whole and what in ("requests", "bytes") and number != 1.0)
    server.settle()
    first = server.sent()
    finish(server, root, files)
    total = server.sent()
    assert size <= total <= size + LOST
    assert first <= total
    if what in ("shards", "card", "manifest"):  # all was there
        assert total == first == size
    assert server.ask("GET", "errors") == []


def test_a_pull_is_killed_again_and_again(server, published, tmp_path):
    """Each gets some further."""
    files, size = published
    root = tmp_path / "d"
    server.ask("DELETE", "log")
    server.ask("POST", "settings", {"bytes_per_second": RATE})
    kills = 0
    for _ in range(5):
        target = server.sent() + size / 5
        kills += kill_when(started(server, root), lambda target=target: server.sent() >= target, 0.002)
        check_state(root, files)
        server.settle()
    assert kills >= 4
    finish(server, root, files)
    assert server.sent() <= size + kills * LOST
