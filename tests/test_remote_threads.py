"""Threads, ends and other people's networks, when a dataset is read where it is."""

import http.server
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hub import Fault

import logitstore
from logitstore.dataset.ahead import LIMIT, Ahead
from logitstore.hub import push

pytestmark = pytest.mark.usefixtures("quiet")

PLACE = "hf://datasets/me/x"


@pytest.fixture
def path(hub, rows, tmp_path):
    """Six shards of several chunks, too large to be read at once."""
    made = tmp_path / "x"
    with logitstore.Writer(made, logit_width=1000, teacher="t", chunk_candidates=6000, shard_bytes=80_000) as writer:
        for i in range(120):
            writer.add(*rows(i, 60, 64))
    assert len(logitstore.open(made).info.shards) > 4
    push(made, "me/x")
    hub.clear_log()
    return made


def ids(dataset):
    return [sequence.id for sequence in dataset]


def at_once(*calls):
    failures = []

    def run(call):
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - looked at below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_ids_looked_for_in_threads(path):
    remote, names = logitstore.open(PLACE), ids(logitstore.open(path))

    def look(seed):
        for row in np.random.default_rng(seed).permutation(len(names))[:12]:
            assert remote.by_id(names[row]).id == names[row]

    at_once(*(lambda seed=seed: look(seed) for seed in range(4)))


def test_rows_expected_in_threads(path):
    remote = logitstore.open(PLACE)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        at_once(*(lambda: [remote.expect(range(n, n + 30)) for n in range(30)] for _ in range(6)))
    finally:
        sys.setswitchinterval(interval)
    assert ids(remote) == ids(logitstore.open(path))


def test_what_failed_ahead_is_asked_for_anew(hub, path):
    """Once the network is back, nothing of the failures is left."""
    remote = logitstore.open(PLACE)
    hub.fault(Fault(origin="storage", kind="status", status=503, times=None))
    remote.expect(range(120))
    with pytest.raises(logitstore.RemoteError):
        list(remote)
    hub.clear_faults()
    assert ids(remote) == ids(logitstore.open(path))


def test_what_comes_before_a_failure_is_given_first(hub, path):
    """A later shard that is missing does not hide the rows before it."""
    info = logitstore.open(path).info
    hub.commit_files("me/x", {}, delete=[info.shards[1].path])
    read = []
    with pytest.raises(logitstore.CorruptDataError, match=info.shards[1].path):
        read.extend(sequence.id for sequence in logitstore.open(PLACE))
    assert read == ids(logitstore.open(path)[: info.shards[0].sequences])


def test_small_chunks_come_together(hub, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("logitstore.dataset.shards.AHEAD_CHUNKS", 64)
    path = tmp_path / "small"
    with logitstore.Writer(path, logit_width=1000, teacher="t", chunk_candidates=100) as writer:
        for i in range(600):
            writer.add(*rows(i, 10, 12))
    push(path, "me/x")
    hub.clear_log()
    assert len(logitstore.open(path)._shards[0].index) > 500
    assert ids(logitstore.open(PLACE)) == ids(logitstore.open(path))
    assert sum(request.origin == "storage" for request in hub.requests) < 150


END = """
import sys, threading, logitstore
dataset = logitstore.open("hf://datasets/me/x")
dataset.expect(range(120))
iterator = iter(dataset)
threading.Thread(target=lambda: next(iterator, None), daemon=True).start()
import time; time.sleep(0.7)
print("done", flush=True)
"""


@pytest.mark.parametrize("fault", [{"kind": "delay", "seconds": 30}, {"kind": "status", "status": 429, "headers": {"Retry-After": "60"}}], ids=["stalled", "429"])  # fmt: skip
def test_a_program_ends_though_the_network_stands_still(hub, path, fault):
    hub.fault(Fault(origin="storage", times=None, **fault))
    with subprocess.Popen([sys.executable, "-c", END], stdout=subprocess.PIPE, env=dict(os.environ)) as process:
        assert process.stdout.readline() == b"done\n"
        started = time.monotonic()
        assert process.wait(timeout=25) == 0
    assert time.monotonic() - started < 10
    hub.clear_faults()


def test_results_ahead():
    ahead = Ahead()
    gate = threading.Event()
    ahead.start(["a", "b"], lambda: (gate.wait(10), [1, 2])[1])
    assert "a" in ahead
    assert ahead.done("a") is None
    gate.set()
    assert (ahead.take("a"), ahead.take("a"), ahead.take("b"), len(ahead)) == (1, None, 2, 0)
    ahead.start(["fails"], lambda: 1 / 0)
    while not ahead._futures["fails"][0].done():
        time.sleep(0.001)
    assert ahead.done("fails") is None
    assert ahead.take("fails") is None
    for number in range(LIMIT + 5):
        ahead.start([number], lambda number=number: [number])
    assert len(ahead) == LIMIT
    assert ahead.take(0) is None
    assert ahead.take(LIMIT) == LIMIT


# Proxies and addresses


class Proxy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Proxy-Authorization")))
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-3/4")
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"data")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("variable", "form", "account"),
    [
        ("http_proxy", "http://127.0.0.1:{}", None),
        ("http_proxy", "127.0.0.1:{}", None),
        ("all_proxy", "http://127.0.0.1:{}", None),
        ("http_proxy", "http://user:p%40ss@127.0.0.1:{}", "Basic dXNlcjpwQHNz"),
    ],
)
def test_proxies_of_the_environment(monkeypatch, variable, form, account):
    from logitstore.io.http import Address, fetch

    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv(variable, form.format(server.server_port))
        parts = []
        fetch(lambda _: Address("http://storage.invalid/file"), 0, 4, parts.append, "x")
        server.shutdown()
        thread.join()
    assert b"".join(parts) == b"data"
    assert server.asked == [("http://storage.invalid/file", account)]


@pytest.mark.parametrize("endpoint", ["http://localhost:abc", "ftp://x", "huggingface.co", "http://a\0b", "http://"])
def test_endpoints_that_are_none(endpoint):
    with pytest.raises(logitstore.InvalidInputError, match="no Hub's endpoint"):
        logitstore.open(PLACE, storage_options={"endpoint": endpoint})


def test_unknown_options_of_the_hub():
    with pytest.raises(logitstore.InvalidInputError, match="token and endpoint, not tokn"):
        logitstore.open(PLACE, storage_options={"tokn": "x"})


def test_a_web_server_that_is_down_is_not_a_dataset_that_is_missing(monkeypatch):
    pytest.importorskip("aiohttp", reason="fsspec reads http:// and https:// with aiohttp")
    monkeypatch.setattr("logitstore.io.http.BACKOFF_SECONDS", 0.01)
    with pytest.raises(
        logitstore.RemoteError, match=r"http://127\.0\.0\.1:1/x/logitstore\.json: cannot be read"
    ) as caught:
        logitstore.open("http://user:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None
