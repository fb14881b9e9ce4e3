"""Datasets under URLs that fsspec knows: in memory, over HTTP with ranges, and what goes wrong there."""

import functools
import http.server
import importlib.util
import multiprocessing
import pickle
import re
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

import logitstore

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")]


def all_same(remote, local):
    assert len(remote) == len(local)
    for one, other in zip(remote, local, strict=True):
        assert one.id == other.id
        for name in ("tokens", "count", "ids", "logprobs", "tail"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.fixture
def dataset(write):
    tokenizer = logitstore.Tokenizer.from_pieces({i: f"t{i} ".encode() for i in range(1000)})
    settings = {"chunk_candidates": 6000, "shard_bytes": 80_000, "tokenizer": tokenizer}
    return write(sequences=60, positions=40, k=32, **settings)


@pytest.fixture
def memory(dataset):
    """The dataset in fsspec's memory; a new name each time, since that file system is global."""
    system = fsspec.filesystem("memory")
    root = f"/{dataset.parent.name}/d"
    for path in dataset.rglob("*"):
        if path.is_file():
            system.pipe(f"{root}/{path.relative_to(dataset).as_posix()}", path.read_bytes())
    yield root
    system.rm(root, recursive=True)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges, which the standard library's server does not have."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        self.server.asked.append((self.path, self.headers.get("Range")))
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(found[1]), min(int(found[2]) + 1, len(data))) if found else (0, len(data))
        self.send_response(206 if found else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        if found:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(dataset):
    """The dataset on a plain web server on loopback."""
    pytest.importorskip("aiohttp", reason="fsspec reads http:// and https:// with aiohttp")
    handler = functools.partial(Handler, directory=str(dataset.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.asked, running.failures = [], 0
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        running.url = f"http://127.0.0.1:{running.server_port}/{dataset.name}"
        yield running
        running.shutdown()
        thread.join()


def test_in_memory(dataset, memory):
    local, remote = logitstore.open(dataset), logitstore.open(f"memory://{memory}")
    assert remote.path == f"memory://{memory}"
    all_same(remote, local)
    all_same(remote[::-3], local[::-3])
    all_same(pickle.loads(pickle.dumps(remote)), local)
    assert list(remote.tokenizer().items()) == list(local.tokenizer().items())
    assert remote.by_id(local[33].id).id == local[33].id


def test_over_http(dataset, server):
    local, remote = logitstore.open(dataset), logitstore.open(server.url)
    all_same(remote, local)
    assert remote.tokenizer().digest == local.tokenizer().digest
    ranges = [asked for _, asked in server.asked if asked]
    assert len(ranges) > 3
    server.asked.clear()
    all_same(logitstore.open(server.url), local)
    assert {path.split("/")[-1] for path, _ in server.asked} == {"logitstore.json"}  # the rest is in the cache


def test_a_server_that_fails_sometimes(dataset, server, monkeypatch):
    monkeypatch.setattr("logitstore.io.http.BACKOFF_SECONDS", 0.01)
    server.failures = 2
    remote = logitstore.open(server.url)
    server.failures = 2
    all_same(remote, logitstore.open(dataset))
    server.failures = 10**6
    with pytest.raises(logitstore.RemoteError, match=r"http://127.*logitstore\.json: cannot be read"):
        logitstore.open(server.url)


def _count(dataset, queue):
    queue.put(sum(len(sequence.ids) for sequence in dataset))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(dataset, server, method):
    remote = logitstore.open(server.url)
    list(remote[:2])
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_count, args=(remote, queue))
    process.start()
    assert queue.get(timeout=60) == logitstore.open(dataset).info.totals.candidates
    process.join(60)
    assert process.exitcode == 0


def test_what_is_not_there(dataset, memory):
    with pytest.raises(logitstore.DatasetNotFoundError, match=r"memory://nowhere is no logitstore dataset"):
        logitstore.open("memory://nowhere")
    system = fsspec.filesystem("memory")
    info = logitstore.open(dataset).info.shards[1]
    data = (dataset / info.path).read_bytes()
    remote = logitstore.open(f"memory://{memory}")
    first = remote.info.shards[0].sequences
    system.pipe(f"{memory}/{info.path}", data[:-500])
    with pytest.raises(logitstore.CorruptDataError, match=info.path):
        remote[first]
    system.pipe(f"{memory}/{info.path}", data[:5000] + b"\x01" + data[5001:])
    with pytest.raises(logitstore.CorruptDataError, match=info.path):
        list(remote)
    system.rm(f"{memory}/{info.path}")
    with pytest.raises(logitstore.CorruptDataError, match="names this file, and it is missing"):
        logitstore.open(f"memory://{memory}")[first]


def test_protocols_that_are_unknown_or_need_a_package():
    with pytest.raises(logitstore.InvalidInputError, match="nonsense"):
        logitstore.open("nonsense://a/b")
    if importlib.util.find_spec("s3fs") is None:
        with pytest.raises(logitstore.MissingDependencyError, match=r"s3://bucket/d: .*s3fs"):
            logitstore.open("s3://bucket/d")


def test_options_reach_the_file_system_and_stay_secret(dataset):
    class Guarded(fsspec.implementations.local.LocalFileSystem):
        protocol = "guarded"

        def __init__(self, password=None, **settings):
            super().__init__(**settings)
            self.password = password

        def open(self, path, mode="rb", **settings):
            self.check()
            return super().open(path, mode, **settings)

        def cat_file(self, path, start=None, end=None, **settings):
            self.check()
            return super().cat_file(path, start=start, end=end, **settings)

        def check(self):
            if self.password != "sesame":
                raise PermissionError("Bearer abcdef is no key")

    fsspec.register_implementation("guarded", Guarded, clobber=True)
    url = f"guarded://{dataset}"
    remote = logitstore.open(url, storage_options={"password": "sesame"})
    all_same(remote, logitstore.open(dataset))
    assert "sesame" not in repr(remote._store)
    with pytest.raises(logitstore.RemoteAccessError, match="no access") as caught:
        logitstore.open(url, storage_options={"password": "guess"})
    assert "abcdef" not in str(caught.value)
