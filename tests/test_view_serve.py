"""The server of `view`, which keeps to itself, and the command."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner
from pull_rows import local  # noqa: F401 - a fixture
from view_rows import Elements, hostile_dataset

import logitstore
from logitstore.errors import (
    DatasetExistsError,
    InvalidInputError,
    LogitStoreError,
    RowIndexError,
    SequenceNotFoundError,
)
from logitstore.look.page import collect, page, policy
from logitstore.look.serve import Server, serve
from logitstore_cli.view import RowsType, command


@pytest.fixture
def hostile(tmp_path, quiet):
    return hostile_dataset(tmp_path / "hostile")


# The server


@contextmanager
def serving(*arguments, **options):
    with Server(*arguments, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def ask(server, path, *, method="GET", headers=None, host=None, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request(
            method, path, body=body, headers={"Host": host or f"127.0.0.1:{server.server_port}", **(headers or {})}
        )
        reply = connection.getresponse()
        return reply, reply.read()
    finally:
        connection.close()


def ask_json(server, path, status=200, **options):
    reply, body = ask(server, path, **options)
    assert reply.status == status, body
    assert reply.headers["Content-Type"] == "application/json"
    return json.loads(body)


def test_the_server_sends_strict_headers(hostile):
    with serving(hostile) as server:
        for path, status in (("/", 200), ("/api/rows", 200), ("/nothing", 404)):
            reply, body = ask(server, path)
            assert reply.status == status
            said = reply.headers
            assert said["Content-Security-Policy"] == policy(served=True)
            assert "frame-ancestors 'none'" in said["Content-Security-Policy"]
            assert "connect-src 'self'" in said["Content-Security-Policy"]
            assert said["X-Content-Type-Options"] == "nosniff"
            assert said["Referrer-Policy"] == "no-referrer"
            assert said["Cache-Control"] == "no-store"
            assert said["Cross-Origin-Resource-Policy"] == "same-origin"
            assert said["Server"] == "logitstore"
            head, nothing = ask(server, path, method="HEAD")
            assert (head.status, nothing) == (status, b"")
            assert head.headers["Content-Length"] == str(len(body))
        assert server.url == f"http://127.0.0.1:{server.server_port}/"
        assert server.socket.getsockname()[0] == "127.0.0.1"


def test_only_its_own_name_is_answered(hostile):
    with serving(hostile) as server:
        port = server.server_port
        assert ask(server, "/", host=f"localhost:{port}")[0].status == 200
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            f"127.0.0.1:{port + 1}",
            f"127.0.0.1.evil.example:{port}",
            "",
        ):
            assert "answers to" in ask_json(server, "/api/rows", 421, headers={"Host": host})["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "NOPE"])
def test_only_get_and_head(hostile, method):
    with serving(hostile) as server:
        reply, body = ask(server, "/", method=method, body=b"x" if method in ("POST", "PUT") else None)
        assert reply.status == 405
        assert reply.headers["Allow"] == "GET, HEAD"
        assert json.loads(body) == {"error": "only GET and HEAD are answered"}


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/logitstore.json", 404, "nothing"), ("/data/train/train-00000.arrow", 404, "nothing"), ("/../hostile/logitstore.json", 404, "nothing"),
        ("/%2e%2e/", 404, "nothing"), ("/api", 404, "nothing"), ("/api/sequence", 400, "row"), ("/api/sequence?row=-1", 400, "row"),
        ("/api/sequence?row=1e3", 400, "row"), ("/api/sequence?row=\u0663", 400, "row"), ("/api/sequence?row=9999999999999999", 400, "row"),
        ("/api/sequence?row=3", 404, "row 3: the rows are 0 to 2"), ("/api/sequence?row=0&start=x", 400, "start"),
        ("/api/rows?start=x", 400, "start"), ("/api/rows?limit=", 400, "limit"), ("/api/rows?split=nope", 400, "nope"),
        ("/api/row", 400, "id"), ("/api/row?id=nobody", 404, "nobody"), ("/api/row?id=%ff", 400, "parameters"), ("/api/rows?" + "a=1&" * 20, 400, "parameters"),
    ],
)  # fmt: skip
def test_wrong_requests_are_answered_in_json(hostile, path, status, says):
    with serving(hostile) as server:
        assert says in ask_json(server, quote(path, safe="/?=&%"), status)["error"]


def test_paging(local):  # noqa: F811
    dataset = logitstore.open(local)
    with serving(dataset) as server:
        listed = ask_json(server, "/api/rows?start=38&limit=4")
        assert listed["total"] == len(dataset) == 49
        assert [each["row"] for each in listed["rows"]] == [38, 39, 40, 41]
        assert [each["id"] for each in listed["rows"]] == [dataset[row].id for row in range(38, 42)]
        assert [each["positions"] for each in listed["rows"]] == [len(dataset[row]) for row in range(38, 42)]
        assert ask_json(server, "/api/rows?start=500")["rows"] == []
        assert len(ask_json(server, "/api/rows?limit=100000")["rows"]) == 49
        test = dataset.split("test")
        assert ask_json(server, "/api/rows?split=test&limit=0") == {"total": 9, "rows": []}
        assert ask_json(server, "/api/rows?split=dev")["total"] == 0
        assert ask_json(server, "/api/sequence?split=test&row=2")["sequence"]["id"] == test[2].id
        assert ask_json(server, f"/api/row?split=test&id={quote(test[4].id)}") == {"row": 4}


def test_a_sequence_is_the_same_as_in_the_page(hostile):
    embedded = collect(hostile, rows=[2]).data
    with serving(hostile) as server:
        name = hostile[2].id
        row = ask_json(server, f"/api/row?id={quote(name, safe='')}")["row"]
        served = ask_json(server, f"/api/sequence?row={row}")
        assert (served["sequence"], served["tokens"]) == (embedded["sequences"][0], embedded["tokens"])
        assert ask_json(server, "/api/sequence?row=1")["sequence"]["positions"] == 0


def test_a_long_sequence_is_sent_in_parts(write):
    with serving(logitstore.open(write(positions=30)), positions=12) as server:
        parts = [ask_json(server, f"/api/sequence?row=0&start={start}")["sequence"] for start in (0, 12, 24)]
        assert [len(each["views"][0]["tokens"]) for each in parts] == [12, 12, 6]
        assert {each["positions"] for each in parts} == {30}
        assert ask_json(server, "/api/sequence?row=0&start=99")["sequence"]["start"] == 24  # beyond the end


def test_an_address_that_is_none(hostile, capfd):
    with serving(hostile) as server, socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
        client.sendall(b"GET http://[/ HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % server.server_port)
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    assert capfd.readouterr() == ("", "")


def test_damage_is_an_answer_and_the_rest_goes_on(write):
    path = write(sequences=40, chunk_candidates=200)
    (shard,) = path.glob("data/train/*.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    with serving(logitstore.open(path)) as server:
        replies = [ask(server, f"/api/sequence?row={row}") for row in range(40)]
        bad = [json.loads(body)["error"] for reply, body in replies if reply.status == 500]
        assert 0 < len(bad) < 20
        assert all("chunk" in error for error in bad)


def test_a_client_that_goes_away_is_no_fault(hostile, capfd):
    with serving(hostile) as server:
        for request in (
            b"GET / HTTP/1.1\r\n",
            b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % server.server_port,
            b"\x00\xff\r\n\r\n",
        ):
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", server.server_port)) as client:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    client.sendall(request)
        assert ask(server, "/")[0].status == 200
    assert capfd.readouterr() == ("", "")


def test_ports(hostile):
    with serving(hostile) as server:
        with pytest.raises(InvalidInputError, match=f"port {server.server_port} of 127.0.0.1 cannot be had"):
            Server(hostile, server.server_port)
        with pytest.raises(InvalidInputError, match="65535"):
            Server(hostile, 70000)


def test_serve_ends_when_it_is_interrupted(hostile):
    def ready(url):
        assert url.startswith("http://127.0.0.1:")
        raise KeyboardInterrupt

    assert serve(hostile, ready=ready) is None


# The command


def run(*arguments, status=0):
    done = CliRunner().invoke(command, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("text", "rows"), [("0-4", [0, 1, 2, 3, 4]), ("3,7,10-12", [3, 7, 10, 11, 12]), (" 5 , 6 - 6", [5, 6]), ("0", [0])]
)
def test_rows_are_parsed(text, rows):
    assert [row for span in RowsType().convert(text, None, None) for row in span] == rows


@pytest.mark.parametrize("text", ["", "a", "4-2", "-1", "1,,2", "1-", "0x1", "1:3", "9" * 20])
def test_wrong_rows_are_refused(write, text):
    _, err = run(write(), f"--rows={text}", status=2)
    assert "3,7,10-12" in err


def test_the_command_writes_a_page(write, tmp_path, monkeypatch):
    path = write(sequences=9)
    monkeypatch.chdir(tmp_path)
    out, err = run(path, "--rows", "0-2,7", "--id", "8", "-k", "3")
    assert re.fullmatch(r"data\.html: 5 sequences, [0-9.]+ KiB\n", out)
    assert err == ""
    text = Path("data.html").read_text(encoding="utf-8")
    assert [each["row"] for each in json.loads(Elements(text).inside[1])["sequences"]] == [0, 1, 2, 7, 8]
    with pytest.raises(DatasetExistsError, match=r"data\.html is there already.*--overwrite"):
        run(path)
    assert Path("data.html").read_text(encoding="utf-8") == text
    run(path, "--overwrite")
    assert Path("data.html").read_text(encoding="utf-8") == page(logitstore.open(path))
    out, _ = run(path, "-o", "-")
    assert out == page(logitstore.open(path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.html"]


def test_the_command_says_what_is_left_out(write, tmp_path):
    _, err = run(write(sequences=9), "-o", tmp_path / "a.html", "--positions", "20")
    assert err == (
        "Note: sequences on the page: 1; row 1 would exceed 20 positions; --positions allows more, and --serve shows every sequence\n"
    )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("-o", "{tmp}"), InvalidInputError), (("-o", "{tmp}/no/page.html"), InvalidInputError), (("--rows", "99", "-o", "{tmp}/a.html"), RowIndexError),
        (("--id", "nobody", "-o", "{tmp}/a.html"), SequenceNotFoundError), (("--with", "{tmp}/nowhere", "-o", "{tmp}/a.html"), LogitStoreError),
    ],
)  # fmt: skip
def test_failures_write_nothing(write, tmp_path, arguments, error):
    path = write()
    with pytest.raises(error):
        run(path, *(a.format(tmp=tmp_path) for a in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("arguments", [("--rows", "0"), ("--id", "0"), ("-o", "x.html"), ("--overwrite",)])
def test_serving_takes_no_rows(write, arguments):
    _, err = run(write(), "--serve", "0", *arguments, status=2)
    assert "--serve shows every sequence" in err


INTERRUPTIBLE = """
import signal
from logitstore_cli import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
run()
"""


@pytest.mark.skipif(os.name == "nt", reason="an interrupt cannot be sent to one process there")
def test_the_command_serves_until_ctrl_c(write):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "view", str(write()), "--serve", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        port = int(re.fullmatch(r"http://127\.0\.0\.1:([0-9]+)/", url)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/api/rows")
        assert json.loads(connection.getresponse().read())["total"] == 6
        process.send_signal(signal.SIGINT)  # with the connection still open
        out, err = process.communicate(timeout=20)
        connection.close()
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "Ctrl-C ends it.\n")
