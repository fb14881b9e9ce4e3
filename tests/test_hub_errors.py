"""What the Hub and the network refuse: one message each that says what to do, and never a token or a signed address."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
import traceback
import types

import pytest

pytest.importorskip("huggingface_hub")

import huggingface_hub
from hub import Fault
from hub import api as hub_api

import logitstore
from logitstore.errors import (
    DatasetNotFoundError,
    InvalidInputError,
    LogitStoreError,
    RemoteAccessError,
    RemoteError,
)
from logitstore.hub import pull, push

pytestmark = [
    pytest.mark.usefixtures("quiet", "impatient"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

REPO = "me/x"
PLACE = f"hf://datasets/{REPO}"
SECRETS = re.compile(r"hf_[a-z]+_(me|secret)|Signature=|Expires=|Bearer ")


@pytest.fixture
def impatient(monkeypatch):
    no_wait = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_wait)
    monkeypatch.setattr("logitstore.io.client.waiting", lambda status, headers: 0.0)
    monkeypatch.setattr("logitstore.io.http.waiting", lambda status, headers: 0.0)
    huggingface_hub.utils.disable_progress_bars()


@pytest.fixture
def small(write):
    return write("small", sequences=2)


@pytest.fixture
def published(hub, small):
    push(small, REPO)
    return small


def whole_chain(error):
    """All that any printer of tracebacks could show, also of what is suppressed."""
    text, waiting, seen = "", [error], set()
    while waiting:
        error = waiting.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            text += "".join(traceback.format_exception(error)) + repr(error) + str(vars(error).get("args", error.args))
            waiting += [error.__cause__, error.__context__]
    return text


def refused(kind, match, function, *args, **kwargs):
    """That a call ends in one clear error without secrets."""
    with pytest.raises(kind, match=match) as caught:
        function(*args, **kwargs)
    error = caught.value
    assert type(error) is kind
    assert "\n" not in str(error)
    assert not SECRETS.search(str(error)), error
    assert not SECRETS.search(whole_chain(error))
    return str(error)


def readers(tmp_path):
    """Ways to read."""
    return [
        lambda place, **more: pull(place, tmp_path / "pulled", **more),
        lambda place, **more: logitstore.open(f"hf://datasets/{place}", storage_options=more or None),
    ]


def command(*arguments, status=1, **environment):
    """Standard error of a command that fails, or its standard output."""
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-m", "logitstore_cli", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert not SECRETS.search(done.stdout + done.stderr)
    if status:
        assert done.stdout == ""
        assert re.fullmatch(r"Error: [^\n]+\n", done.stderr) or status == 2
    return done.stderr if status else done.stdout


# Reading


def test_what_is_not_there(hub, tmp_path, published):
    for read in readers(tmp_path):
        refused(DatasetNotFoundError, "no such repository, or your token does not see it; check the name", read, "me/y")
        refused(DatasetNotFoundError, "no such revision; name a branch, a tag or a commit", read, f"{REPO}@v9")
        refused(DatasetNotFoundError, "no such", read, f"{REPO}@{'0' * 40}")
    hub.commit_files("me/empty", {"a.txt": b"a"})
    for read in readers(tmp_path):
        refused(DatasetNotFoundError, "is no logitstore dataset", read, "me/empty")


def test_what_is_private(hub, tmp_path, published):
    hub.set_private(REPO)
    hub.add_user("you", "hf_you_secret")
    for read in readers(tmp_path):
        for token in ("hf_you_secret", False):
            refused(DatasetNotFoundError, "your token does not see it.*hf auth login", read, REPO, token=token)


def test_what_is_gated(hub, tmp_path, published):
    hub.gate(REPO)
    hub.add_user("you", "hf_you_secret")
    for read in readers(tmp_path):
        for token in ("hf_you_secret", False):
            refused(RemoteAccessError, "is gated; accept its terms on its page", read, REPO, token=token)
    hub.grant(REPO, "you")
    assert len(logitstore.open(PLACE, storage_options={"token": "hf_you_secret"})) == 2


@pytest.mark.parametrize("fault", [429, 500, 503, "drop"])
def test_a_hub_that_does_not_answer(hub, tmp_path, published, fault):
    armed = hub.fault(
        Fault(kind="drop", origin="hub", times=None)
        if fault == "drop"
        else Fault(kind="status", status=fault, origin="hub", times=None, headers={"RateLimit": '"api";r=0;t=1'})
    )
    meaning = {429: r"limits your requests \(429\)", "drop": "cannot be reached"}.get(fault, rf"a problem \({fault}\)")
    for read in readers(tmp_path):
        refused(RemoteError, f"{meaning}.*try again", read, REPO)
    refused(RemoteError, f"{meaning}.*try again", push, published, REPO)
    assert armed.hits > 9


@pytest.mark.parametrize("status", [403, 503])
def test_a_storage_that_does_not_answer(hub, tmp_path, published, write, status, caplog):
    caplog.set_level(logging.DEBUG, "logitstore")
    hub.fault(Fault(kind="status", status=status, origin="storage", times=None))
    refused(RemoteError, "try again later|refused with status 403", pull, REPO, tmp_path / "pulled")
    other = write("other", sequences=3)
    message = refused(RemoteError, "try again later", push, other, REPO)
    assert ("storage refused (403)" if status == 403 else "a problem (503)") in message
    assert not SECRETS.search(caplog.text)  # those of the Hub's client too


# Rights


def test_no_token(hub, small, monkeypatch, published):
    hub.clear_log()
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, False, True):
        refused(RemoteAccessError, "no token is set; log in with `hf auth login`, or set HF_TOKEN", push, small, REPO,
                token=token)  # fmt: skip
    assert hub.requests == []


def test_a_bad_token(hub, tmp_path, small):
    for call in (*readers(tmp_path), lambda place, **more: push(small, place, **more)):
        refused(RemoteAccessError, "the token is not valid.*hf auth login", call, REPO, token="hf_bad_secret")


@pytest.mark.parametrize("token", ["hf_bad_secret\x01", "hf_bad_secret\u20ac", "hf_bad_secret\r\nX: y"])
def test_what_is_no_token_at_all(hub, tmp_path, small, token):
    for call in (*readers(tmp_path), lambda place, **more: push(small, place, **more)):
        refused(RemoteAccessError, "the token is not valid.*hf auth login", call, REPO, token=token)


def test_no_right_to_write(hub, small, published, write):
    hub.add_user("reader", "hf_reader_secret", role="read")
    hub.add_user("you", "hf_you_secret")
    hub.clear_log()
    match = "your token has no right to do that: .*; use one with write access to this namespace"
    refused(RemoteAccessError, match, push, small, "you/x")
    refused(RemoteAccessError, match, push, small, "reader/x", token="hf_reader_secret")
    other = write("other", sequences=3)
    refused(RemoteAccessError, match, push, other, REPO, token="hf_you_secret")
    assert [r.path for r in hub.requests if r.status == 403] == [
        "/api/repos/create", "/api/repos/create", f"/api/datasets/{REPO}/preupload/main",
    ]  # fmt: skip
    hub.set_private(REPO)
    refused(RemoteAccessError, match, push, other, REPO, token="hf_you_secret")
    assert len(hub.commits(REPO)) == 2


@pytest.mark.parametrize(
    "endpoint", ["/preupload/", "/objects/batch", "/objects/verify", "/commit/", "/api/repos/create"]
)
@pytest.mark.parametrize(
    ("status", "kind", "match"),
    [
        (403, RemoteAccessError, "your token has no right to do that"),
        (401, RemoteAccessError, "the token is not valid"),
        (402, RemoteAccessError, "no room"),
        (413, RemoteAccessError, "no room"),
        (400, RemoteError, r"the Hub refused \(400\)"),
    ],
)
def test_a_final_answer_is_not_asked_for_again(hub, small, endpoint, status, kind, match):
    armed = hub.fault(Fault(kind="status", status=status, path=endpoint, times=None))
    refused(kind, match, push, small, REPO)
    assert armed.hits == (2 if "verify" in endpoint else 1)  # of two files
    assert len([r for r in hub.requests if r.path.endswith("/batch")]) <= 1
    hub.clear_faults()
    push(small, REPO)


def test_no_room(hub, small):
    hub.quota_bytes = 10
    match = "no room: Private repository storage limit reached, .*; free space, make the repository public"
    refused(RemoteAccessError, match, push, small, REPO)
    assert len(hub.commits(REPO)) == 1
    assert len([r for r in hub.requests if r.path.endswith("/objects/batch")]) == 1
    hub.quota_bytes = None
    push(small, REPO)


def test_a_card_that_the_hub_refuses(hub, small, monkeypatch):
    answer = hub_api.as_json

    def refuse(value, **more):
        if value == {"errors": [], "warnings": []}:
            return answer({"errors": [{"message": '"license" must be another'}]}, status=400)
        return answer(value, **more)

    monkeypatch.setattr(hub_api, "as_json", refuse)
    match = r'metadata in README\.md\. - "license" must be another; correct README\.md and push again'
    refused(InvalidInputError, match, push, small, REPO)
    assert len([r for r in hub.requests if r.path == "/api/validate-yaml"]) == 1
    assert len(hub.commits(REPO)) == 1


def test_an_error_of_one_object_in_a_batch(hub, small, monkeypatch):
    monkeypatch.setattr(
        "hub.lfs.upload_action",
        lambda hub, repo, file, **more: {
            **file,
            "error": {"code": 422, "message": "too odd https://s/x?Signature=abc"},
        },
    )
    refused(RemoteError, "cannot be sent.*cannot be used .*too odd", push, small, REPO)


# The network and the environment


@pytest.fixture
def nowhere():
    """An endpoint where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_no_network(hub, small, tmp_path, nowhere):
    match = "the Hub cannot be reached .*; check the network and try again"
    for call in (*readers(tmp_path), lambda place, **more: push(small, place, **more)):
        refused(RemoteError, match, call, REPO, endpoint=nowhere)
    assert hub.requests == []


def test_an_answer_that_is_none_of_a_hub(hub, small, tmp_path, monkeypatch):
    monkeypatch.setattr("hub.api.description", lambda *args, **more: ["a proxy's page"])
    for call in (*readers(tmp_path), lambda place, **more: push(small, place, **more)):
        with pytest.raises(LogitStoreError):
            call(REPO)


def test_offline(hub, small, tmp_path):
    match = "HF_HUB_OFFLINE is set; unset it to reach the Hub"
    assert match in command("push", small, REPO, HF_HUB_OFFLINE="1")
    assert match in command("pull", REPO, tmp_path / "pulled", HF_HUB_OFFLINE="1")
    assert hub.requests == []


def test_a_hub_without_xet(hub, small):
    text = command("push", small, REPO, HF_HUB_DISABLE_XET=None)
    assert "this Hub has no Xet storage; set HF_HUB_DISABLE_XET=1 and try again" in text
    assert len(hub.commits(REPO)) == 1


def test_commands_end_with_one_message(hub, small, tmp_path):
    assert "no token is set; log in with `hf auth login`" in command("push", small, REPO, HF_TOKEN=None)
    assert "the token is not valid" in command("push", small, REPO, HF_TOKEN="hf_bad_secret")
    assert "no such repository" in command("pull", "me/y", tmp_path / "pulled")
    assert "there is no logitstore.json in it" in command("push", tmp_path, REPO)
    assert "'x y' is no dataset on the Hub; write namespace/name" in command("push", small, "x y")
    assert "--private does" not in command("push", small, status=2)
    hub.quota_bytes = 10
    assert "no room" in command("push", small, REPO)
    hub.quota_bytes = None
    hub.fault(Fault(kind="status", status=500, path="/lfs/", method="PUT", times=1))  # warned of by the client
    assert json.loads(command("push", small, REPO, "--json", status=0))["files"] > 0


def test_the_clients_warnings_hold_no_signed_address(hub, small, caplog):
    with caplog.at_level(logging.DEBUG):
        caplog.clear()
        logger = logging.getLogger("huggingface_hub.utils._http")
        logger.addHandler(caplog.handler)  # it does not propagate
        try:
            hub.fault(Fault(kind="status", status=500, path="/lfs/", method="PUT"))
            push(small, REPO)
        finally:
            logger.removeHandler(caplog.handler)
    warned = [
        record.getMessage()
        for record in caplog.records
        if "PUT" in record.getMessage() and "500" in record.getMessage()
    ]
    assert any("/lfs/me/x/" in text for text in warned)
    assert not [
        r
        for r in caplog.records
        if r.name.startswith(("logitstore", "huggingface_hub")) and SECRETS.search(r.getMessage())
    ]
