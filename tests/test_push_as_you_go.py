"""Shards that go to the Hub while they are written: none stays here, none is lost, and no published dataset suffers."""

import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("huggingface_hub")

import huggingface_hub
from hub import Fault

import logitstore
from logitstore.dataset.commit import commit
from logitstore.dataset.parts import read_parts
from logitstore.dataset.status import status
from logitstore.errors import (
    CorruptDataError,
    DatasetExistsError,
    InvalidInputError,
    RemoteAccessError,
    RemoteError,
)
from logitstore.hub import HubSink, pull, push
from logitstore.hub import sink as sinks
from logitstore_cli.main import main

command_module = importlib.import_module("logitstore_cli.convert")
pytestmark = [
    pytest.mark.usefixtures("quiet", "impatient"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

REPO = "me/x"
CHUNK = 200
SETTINGS = {"logit_width": 1000, "teacher": "t", "chunk_candidates": CHUNK, "shard_bytes": 3000}
SEQUENCES = 24
KILLS = int(os.environ.get("LOGITSTORE_KILLS", "20")) // 6


@pytest.fixture
def impatient(monkeypatch):
    """Nobody waits long before asking again, or before a commit."""
    monkeypatch.setattr(sinks, "COMMIT_SECONDS", 0.05)
    no_wait = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_wait)
    monkeypatch.setattr("logitstore.io.client.waiting", lambda status, headers: 0.0)
    huggingface_hub.utils.disable_progress_bars()


@pytest.fixture
def fill(rows):
    def feed(writer, numbers=range(SEQUENCES)):
        for number in numbers:
            writer.add(*rows(number, 5 + number % 7, 8), id=f"s{number}")

    return feed


@pytest.fixture
def whole(tmp_path, fill):
    """The same dataset, written here."""
    with logitstore.Writer(tmp_path / "whole", **SETTINGS) as writer:
        fill(writer)
    return tmp_path / "whole"


@pytest.fixture
def capture(tmp_path, rows, monkeypatch):
    """A function that makes a capture; commands make several chunks of it."""
    monkeypatch.setattr(command_module, "convert", functools.partial(command_module.convert, chunk_candidates=CHUNK))

    def make(name="in.npz", seed=0):
        tokens, ids, logprobs = zip(*(rows(seed + number, 12, 8) for number in range(SEQUENCES)), strict=True)
        lengths = [12] * SEQUENCES
        arrays = {"tokens": tokens, "ids": ids, "logprobs": logprobs}
        np.savez(tmp_path / name, lengths=lengths, **{key: np.concatenate(each) for key, each in arrays.items()})
        return tmp_path / name

    return make


@pytest.fixture
def npz(capture):
    return capture()


def process(*arguments):
    """The same command in a process of its own."""
    code = (
        "import functools, sys\n"
        "from logitstore_cli import convert, main\n"
        f"convert.convert = functools.partial(convert.convert, chunk_candidates={CHUNK})\n"
        "sys.exit(main.main())\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    """What a process says that ends well."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def files_in(path):
    found = [file for file in path.rglob("*") if file.is_file()]
    return {f.relative_to(path).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


def shards_in(path):
    return [name for name in files_in(path) if name.endswith(".arrow")]


def of_shards(path):
    """What a manifest says of the shards."""
    return [(info.path, info.sha256, info.bytes) for info in logitstore.open(path).info.shards]


def errors_of(path):
    return [finding for finding in logitstore.validate(path, deep=True) if finding.severity == "error"]


def check_pulled(tmp_path, whole, name="pulled", repo=REPO):
    """That what is on the Hub is the dataset that was written here."""
    pull(repo, tmp_path / name)
    assert of_shards(tmp_path / name) == of_shards(whole)
    assert errors_of(tmp_path / name) == []


def run(*arguments, status=0):
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == status, (done.output, done.exception)
    return done.stdout, done.stderr + str(done.exception or "")  # which the program shows


def puts(hub):
    """Uploads that came whole."""
    return [r.path for r in hub.requests if r.origin == "storage" and r.method == "PUT" and r.status == 200]


def wait_until(reached):
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


# As it should go


def test_shards_leave_while_others_are_written(hub, tmp_path, fill, whole):
    told = []
    out = tmp_path / "d"
    with logitstore.Writer(out, sink=HubSink(REPO, progress=lambda *n: told.append(n)), **SETTINGS) as writer:
        fill(writer, range(15))
        wait_until(lambda: hub.files(REPO).keys() >= {"data/train/train-00000.arrow"})
        fill(writer, range(15, SEQUENCES))
        assert status(out).parts[0].sent >= 1
    shards = of_shards(whole)
    assert len(shards) >= 5
    assert set(files_in(out)) == {"logitstore.json"}
    assert of_shards(out) == shards
    size = sum(length for _, _, length in shards)
    assert told[-1] == (size, size)
    assert "logitstore.json" not in hub.files(REPO)  # not before all is there
    assert len(puts(hub)) == len(shards)
    pushed = push(out, REPO)
    assert pushed.files == 3  # preview, card, manifest
    assert len(puts(hub)) <= len(shards) + 1  # the preview
    check_pulled(tmp_path, whole)
    assert hub.files(REPO)["preview/train.arrow"] == published_alone(hub, whole)["preview/train.arrow"]
    assert push(out, REPO).unchanged
    done = pull(REPO, out)  # what is here is completed
    assert done.fetched == size
    assert errors_of(out) == []
    assert push(out, REPO).unchanged


def published_alone(hub, path):
    push(path, "me/alone")
    return hub.files("me/alone")


def test_a_command_does_all_of_it(hub, tmp_path, npz):
    command = ("convert", npz, tmp_path / "d", "--teacher", "t", "--logit-width", 1000, "--shard-size", 3000)
    run("convert", npz, tmp_path / "whole", *command[3:])
    more = ("--push-as-you-go", REPO, "--private", "--revision", "v 1/a")
    out, err = run(*command, *more)
    assert f"/datasets/{REPO}: 3 files" in out
    shards = len(of_shards(tmp_path / "whole"))
    assert shards > 2
    assert (
        f"of its {shards} shards, {shards} are on the Hub alone: fetch them with `logitstore pull {REPO}@v%201%2Fa"
        in err
    )
    assert shards_in(tmp_path / "d") == []
    assert hub.repos[REPO].private
    assert "logitstore.json" not in hub.files(REPO)  # the main branch
    check_pulled(tmp_path, tmp_path / "whole", repo=f"{REPO}@v%201%2Fa")
    # Again: nothing is left to do.
    head = hub.commits(REPO, "v 1/a")[0].sha
    before = files_in(tmp_path / "d")
    out, err = run(*command, *more, "--resume")
    assert "unchanged" in out
    assert "it was finished before" in err
    found = json.loads(run(*command, *more, "--resume", "--json")[0])
    assert found["pushed"]["unchanged"]
    assert found["pushed"]["commit"] == head == hub.commits(REPO, "v 1/a")[0].sha
    assert files_in(tmp_path / "d") == before
    # As a new one: refused here, before the Hub is asked.
    hub.clear_log()
    assert "holds a dataset" in run(*command, *more, status=1)[1]
    assert hub.requests == []
    # What was fetched stays.
    run("pull", f"{REPO}@v%201%2Fa", tmp_path / "d")
    out, err = run(*command, *more, "--resume")
    assert "on the Hub alone" not in err
    assert errors_of(tmp_path / "d") == []


def test_mistakes_in_a_command_make_no_repository(hub, tmp_path, npz):
    assert "--push-as-you-go, which is not given" in run("convert", npz, tmp_path / "d", "--private", status=2)[1]
    run("convert", tmp_path / "no.npz", tmp_path / "d", "--push-as-you-go", REPO, status=1)
    assert (
        "give namespace/name alone"
        in run("convert", npz, tmp_path / "d", "--push-as-you-go", f"{REPO}@v1", status=1)[1]
    )
    assert hub.repos == {}
    assert not (tmp_path / "d").exists()


def test_parts_in_processes_of_their_own(hub, tmp_path, capture):
    out = tmp_path / "d"

    def command(number, path):
        known = ("--teacher", "t", "--logit-width", 1000, "--shard-size", 3000)
        return ["convert", tmp_path / f"{number}.npz", path, "--part", f"{number}/3", *known]

    for number in range(3):
        capture(f"{number}.npz", 100 * number)
    for number in range(3):
        run(*command(number, tmp_path / "whole"))
    commit(tmp_path / "whole")
    place = ("--push-as-you-go", REPO, "--revision", "b")
    for started in [process(*command(number, out), *place) for number in range(3)]:
        _, err = ended(started)
        assert f"logitstore commit {out} && logitstore push {out} {REPO} --revision b" in err
    assert shards_in(out) == []
    assert all(part.sent == part.shards > 1 for part in status(out).parts)
    run("commit", out)
    run("push", out, REPO, "--revision", "b")
    check_pulled(tmp_path, tmp_path / "whole", repo=f"{REPO}@b")
    assert len(of_shards(out)) > 10


# What is stopped


def test_a_writer_that_is_killed_goes_on(hub, tmp_path, npz):
    out = tmp_path / "d"
    command = ("convert", npz, out, "--teacher", "t", "--logit-width", 1000, "--shard-size", 3000)
    run("convert", npz, tmp_path / "whole", *command[3:])
    command = (*command, "--push-as-you-go", REPO, "--resume")
    hub.latency = 0.01
    moments = random.Random(7)
    for _ in range(KILLS):
        hub.clear_log()
        started, enough = process(*command), moments.randint(6, 30)
        wait_until(lambda n=enough, it=started: len(hub.requests) >= n or it.poll() is not None)
        started.send_signal(signal.SIGKILL)
        started.communicate()
    hub.latency = 0
    run(*command)
    assert "unchanged" in run(*command)[0]
    check_pulled(tmp_path, tmp_path / "whole")
    pull(REPO, out)
    assert errors_of(out) == []


@pytest.mark.parametrize("before", ["hashes", "line", "removal", "done", "manifest", "clean", "push"])
def test_a_writer_that_is_stopped_between_two_steps_goes_on(hub, tmp_path, npz, monkeypatch, before):
    """As an error at the moment would: what was done before is there, and nothing that follows."""
    command = ("convert", npz, tmp_path / "d", "--teacher", "t", "--logit-width", 1000, "--shard-size", 3000)
    run("convert", npz, tmp_path / "whole", *command[3:])
    command = (*command, "--push-as-you-go", REPO)

    class Stopped(BaseException):
        pass

    def stop(*args, **kwargs):
        raise Stopped

    part = sys.modules["logitstore.dataset.part"]
    with monkeypatch.context() as patch:
        if before == "hashes":
            patch.setattr(part, "write_atomic", stop)
        elif before == "line":
            patch.setattr(part, "Sent", stop)
        elif before == "removal":
            patch.setattr(Path, "unlink", lambda path, **_: path.name.endswith(".arrow") and stop())
        elif before == "done":
            patch.setattr(part, "Done", stop)
        elif before == "manifest":
            patch.setattr(part, "publish", stop)
        elif before == "clean":
            patch.setattr("logitstore.dataset.commit.clean", stop)
        else:
            patch.setattr("logitstore_cli.convert.push_with_bar", stop)
        with pytest.raises(Stopped):
            main.main(list(map(str, command)), standalone_mode=False)
    run(*command, "--resume")
    assert shards_in(tmp_path / "d") == []
    check_pulled(tmp_path, tmp_path / "whole")
    assert "unchanged" in run(*command, "--resume")[0]
    assert not (tmp_path / "d" / "parts").exists()


def test_a_program_that_ends_does_not_wait_for_its_shards(hub, tmp_path):
    hub.bytes_per_second = 100
    code = (
        "import sys, time, numpy as np, logitstore\n"
        "from logitstore.hub import HubSink\n"
        "writer = logitstore.Writer(sys.argv[1], logit_width=1000, teacher='t', shard_bytes=1, sink=HubSink('me/x'))\n"
        "writer.add(np.zeros(900, int), np.tile(np.arange(200), (900, 1)), np.full((900, 200), -6.0))\n"
        "writer._part._flush()\n"
        "time.sleep(0.5)\n"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], check=True, timeout=60, capture_output=True)
    assert time.monotonic() - start < 10
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert len(shards_in(tmp_path / "d")) == 1


# What fails


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 500, "chance": 0.3, "times": 30},
        {"kind": "status", "status": 429, "path": "/commit/", "times": 4},
        {"kind": "status", "status": 409, "path": "/commit/", "times": 3},
        {"kind": "status", "status": 412, "path": "/commit/", "times": 3},
        {"kind": "lost-reply", "path": "/commit/", "times": 3},
        {"kind": "lost-reply", "chance": 0.2, "times": 30},
        {"kind": "drop", "chance": 0.3, "times": 30},
        {"kind": "drop-upload", "origin": "storage", "after": 500, "times": 3},
    ],
)
def test_a_network_that_fails_now_and_then(hub, tmp_path, fill, whole, fault):
    sink = HubSink(REPO)
    armed = hub.fault(Fault(**fault))
    with logitstore.Writer(tmp_path / "d", sink=sink, **SETTINGS) as writer:
        fill(writer)
    hub.clear_faults()
    assert armed.hits > 0
    assert shards_in(tmp_path / "d") == []
    push(tmp_path / "d", REPO)
    check_pulled(tmp_path, whole)
    added = [commit.title for commit in hub.commits(REPO) if commit.title.startswith("Add data")]
    assert len(set(added)) == len(added)


def test_an_outage_does_not_end_the_run(hub, tmp_path, fill, whole, monkeypatch):
    monkeypatch.setattr(sinks, "RETRY_SECONDS", 0.05)
    sink = HubSink(REPO)
    hub.fault(Fault(kind="drop", times=None))
    with logitstore.Writer(tmp_path / "d", sink=sink, **SETTINGS) as writer:
        fill(writer)
        writer._part._flush()
        wait_until(lambda: sink._rounds > 3 and not sink._due)
        assert len(shards_in(tmp_path / "d")) > 3
        hub.clear_faults()
        wait_until(lambda: any(name.endswith(".arrow") for name in hub.files(REPO)))  # without another shard
    assert shards_in(tmp_path / "d") == []
    push(tmp_path / "d", REPO)
    check_pulled(tmp_path, whole)


@pytest.mark.parametrize(
    ("fault", "kind", "match"),
    [
        ({"kind": "drop"}, RemoteError, "cannot be reached"),
        ({"kind": "status", "status": 503}, RemoteError, "a problem \\(503\\)"),
        ({"kind": "status", "status": 401, "path": "/preupload/"}, RemoteAccessError, "token is not valid"),
        ({"kind": "status", "status": 402, "path": "/objects/batch"}, RemoteAccessError, "no room"),
    ],
)
def test_what_fails_to_the_end_is_an_error_and_can_be_gone_on_with(hub, tmp_path, fill, whole, fault, kind, match):
    sink = HubSink(REPO)
    hub.fault(Fault(times=None, **fault))
    with (
        pytest.raises(kind, match=rf"{match}.*shards stay here until then: go on with --resume"),
        logitstore.Writer(tmp_path / "d", sink=sink, **SETTINGS) as writer,
    ):
        fill(writer)
    hub.clear_faults()
    assert len(shards_in(tmp_path / "d")) == len(of_shards(whole))
    with logitstore.Writer(tmp_path / "d", resume=True, sink=HubSink(REPO), **SETTINGS) as writer:
        fill(writer)
    assert shards_in(tmp_path / "d") == []
    push(tmp_path / "d", REPO)
    check_pulled(tmp_path, whole)


def test_a_shard_that_was_damaged_here_stays(hub, tmp_path, fill):
    sink = HubSink(REPO)
    down = hub.fault(Fault(kind="drop", times=None))
    with (
        pytest.raises(CorruptDataError, match=r"train-00001\.arrow: its sha256 is not that of the journal"),
        logitstore.Writer(tmp_path / "d", sink=sink, **SETTINGS) as writer,
    ):
        fill(writer)
        wait_until(lambda: down.hits)
        path = tmp_path / "d" / "data/train/train-00001.arrow"
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        hub.clear_faults()
    assert "data/train/train-00001.arrow" not in hub.files(REPO)
    assert shards_in(tmp_path / "d") == ["data/train/train-00001.arrow"]


# Who may write, and where


def test_who_may_not_write_is_told_before_anything_is_written(hub, write, monkeypatch):
    push(write("small", sequences=2), REPO)
    hub.create_repo("me/empty")
    hub.add_user("you", "hf_you_secret")
    hub.add_user("reader", "hf_reader_secret", role="read")
    hub.set_private("me/empty", private=False)
    for repo, token in (("me/empty", "hf_you_secret"), ("reader/x", "hf_reader_secret"), ("you/x", None)):
        with pytest.raises(RemoteAccessError, match="your token has no right to do that"):
            HubSink(repo, token=token)
    with pytest.raises(RemoteAccessError, match="the token is not valid"):
        HubSink("me/empty", token="hf_bad_secret")
    with pytest.raises(DatasetExistsError, match="me/empty is public"):
        HubSink("me/empty", private=True)
    with pytest.raises(InvalidInputError, match="no branch"):
        HubSink("me/empty", revision="0" * 40)
    with pytest.raises(InvalidInputError, match="write namespace/name"):
        HubSink("x y")
    monkeypatch.delenv("HF_TOKEN")
    hub.clear_log()
    with pytest.raises(RemoteAccessError, match="no token is set"):
        HubSink("me/empty")
    assert hub.requests == []


def test_a_published_dataset_is_not_touched(hub, tmp_path, fill, whole, write):
    other = write("other", sequences=4)
    push(other, REPO)
    head = hub.commits(REPO)[0].sha
    for revision in (None, "new"):
        with pytest.raises(DatasetExistsError, match=f"{REPO} holds a dataset"):
            HubSink(REPO, revision=revision)
    # One that is published meanwhile is not touched either, whether it has files of these names or not.
    for name, late in (("me/same", other), ("me/late", write("late", sequences=4, split="validation"))):
        sink = HubSink(name)
        push(late, name)
        with (
            pytest.raises(DatasetExistsError, match=f"{name} holds a dataset|{name}.* there already with other bytes"),
            logitstore.Writer(tmp_path / "d", sink=sink, resume=True, **SETTINGS) as writer,
        ):
            fill(writer)
        assert len(hub.commits(name)) == 2
        pull(name, tmp_path / f"pulled-{late.name}")
        assert of_shards(tmp_path / f"pulled-{late.name}") == of_shards(late)
        assert errors_of(tmp_path / f"pulled-{late.name}") == []
    assert hub.commits(REPO)[0].sha == head
    # What was written goes on to another place.
    with logitstore.Writer(tmp_path / "d", resume=True, sink=HubSink("me/else"), **SETTINGS) as writer:
        fill(writer)
    push(tmp_path / "d", "me/else")
    check_pulled(tmp_path, whole, repo="me/else")


def test_another_file_at_a_shards_path_is_told_early(hub, tmp_path, fill, whole):
    hub.commit_files(REPO, {"data/train/train-00000.arrow": b"another run's"})
    sink = HubSink(REPO)
    given = []

    def feed(writer):
        for number in range(SEQUENCES):
            fill(writer, [number])
            given.append(number)
            if number == 9:
                wait_until(lambda: sink._refused)

    with (
        pytest.raises(DatasetExistsError, match=r"train-00000\.arrow is there already with other bytes.*delete it"),
        logitstore.Writer(tmp_path / "d", sink=sink, **SETTINGS) as writer,
    ):
        feed(writer)
    assert 9 <= len(given) < 20
    assert hub.files(REPO)["data/train/train-00000.arrow"] == b"another run's"
    hub.commit_files(REPO, {}, delete=["data/train/train-00000.arrow"])
    with logitstore.Writer(tmp_path / "d", resume=True, sink=HubSink(REPO), **SETTINGS) as writer:
        fill(writer)
    push(tmp_path / "d", REPO)
    check_pulled(tmp_path, whole)


def test_what_is_there_already_is_not_sent_again(hub, tmp_path, fill, whole):
    hub.commit_files(REPO, {info.path: (whole / info.path).read_bytes() for info in logitstore.open(whole).info.shards})
    with logitstore.Writer(tmp_path / "d", sink=HubSink(REPO), **SETTINGS) as writer:
        fill(writer)
    assert shards_in(tmp_path / "d") == []
    assert puts(hub) == []
    assert len(hub.commits(REPO)) == 2
    push(tmp_path / "d", REPO)
    check_pulled(tmp_path, whole)


def test_two_runs_that_want_one_place_lose_nothing(hub, tmp_path, rows):
    """Whoever comes second is told, and keeps its shards."""
    hub.latency = 0.005
    outcomes, gate = {}, threading.Barrier(2)

    def one(name, seed):
        try:
            sink = HubSink(REPO)
            gate.wait()
            with logitstore.Writer(tmp_path / name, sink=sink, **SETTINGS) as writer:
                for number in range(SEQUENCES):
                    writer.add(*rows(seed + number, 9, 8))
            outcomes[name] = None
        except DatasetExistsError as error:
            outcomes[name] = error

    threads = [threading.Thread(target=one, args=(name, seed)) for name, seed in (("a", 0), ("b", 1000))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(outcomes.values())
    there = {hashlib.sha256(data).hexdigest() for data in hub.files(REPO).values()}
    for name in ("a", "b"):
        here = set(files_in(tmp_path / name).values())
        states = read_parts(tmp_path / name)
        assert bool(states) == bool(outcomes[name])
        shards = [info.sha256 for state in states for info in state.shards]
        shards += [sha256 for _, sha256, _ in of_shards(tmp_path / name)] if not states else []
        assert len(shards) > 1
        assert set(shards) <= there | here


def test_a_repository_that_does_not_know_sha256s_is_told_of(hub, tmp_path, fill):
    hub.commit_files(REPO, {".gitattributes": b""})
    with (
        pytest.raises(InvalidInputError, match=r"not stored as a large file.*\*\.arrow filter=lfs"),
        logitstore.Writer(tmp_path / "d", sink=HubSink(REPO), **SETTINGS) as writer,
    ):
        fill(writer)
    assert len(shards_in(tmp_path / "d")) >= 5


def test_a_push_without_the_shards_needs_them_there(hub, tmp_path, whole):
    push(whole, REPO)
    out = tmp_path / "d"
    shutil.copytree(whole, out)
    gone = next(out.glob("data/train/*00001.arrow"))
    gone.unlink()
    assert push(out, REPO).unchanged
    with pytest.raises(CorruptDataError, match=r"train-00001\.arrow: the shard is missing"):
        push(out, "me/y")
    assert "me/y" not in hub.repos
    hub.commit_files(
        REPO, {gone.relative_to(out).as_posix(): b"x" * gone.with_name("train-00002.arrow").stat().st_size}
    )
    with pytest.raises(CorruptDataError, match="the shard is missing"):
        push(out, REPO)


def test_shards_of_parts_that_were_begun_anew_are_removed_by_the_push(hub, tmp_path, fill):
    with logitstore.Writer(tmp_path / "old", part="0/2", sink=HubSink(REPO), **SETTINGS) as writer:
        fill(writer)
    for number in range(3):
        with logitstore.Writer(tmp_path / "d", part=f"{number}/3", sink=HubSink(REPO), **SETTINGS) as writer:
            fill(writer, range(number, SEQUENCES, 3))
    commit(tmp_path / "d")
    push(tmp_path / "d", REPO)
    assert {name for name in hub.files(REPO) if name.startswith("data/")} == {
        path for path, _, _ in of_shards(tmp_path / "d")
    }


def test_a_closed_sink_takes_nothing(hub, tmp_path, whole):
    sink = HubSink(REPO)
    sink.close()
    info = logitstore.open(whole).info.shards[0]
    with pytest.raises(InvalidInputError, match="closed"):
        sink.take(whole / info.path, info)


def test_shards_that_come_soon_after_one_another_are_committed_together(hub, whole, monkeypatch):
    """The Hub takes some 128 commits an hour."""
    monkeypatch.setattr(sinks, "COMMIT_SECONDS", 3600)
    sink = HubSink(REPO)
    first, *others = logitstore.open(whole).info.shards
    sink.take(whole / first.path, first)
    wait_until(lambda: len(hub.commits(REPO)) == 2)  # the first goes at once
    for number, info in enumerate(others, 2):
        sink.take(whole / info.path, info)
        wait_until(lambda n=number: len(puts(hub)) == n)
    assert len(hub.commits(REPO)) == 2
    places = dict(sink.arrived(wait=True))
    assert places == {info.path: f"hf://datasets/{REPO}/{info.path}" for info in (first, *others)}
    assert len(hub.commits(REPO)) == 3
    sink.close()


def test_a_failure_inside_the_thread_is_told(hub, whole):
    sink = HubSink(REPO, progress=lambda done, total: 1 / 0)
    for info in logitstore.open(whole).info.shards:
        sink.take(whole / info.path, info)
    with pytest.raises(ZeroDivisionError):
        list(sink.arrived(wait=True))
    sink.close()
