"""The one sink of output: nothing of a dataset steers a terminal, and no file is written that should not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import logitstore


def run(*arguments, **environment):
    command = [sys.executable, "-m", "logitstore_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, env={**os.environ, **environment})


@pytest.fixture
def hostile(tmp_path, quiet):
    """Ids, names of columns and of the directory that terminals would obey."""
    path = tmp_path / "d\x1b]0;owned\x07\u202e"
    with logitstore.Writer(path, logit_width=10) as writer:
        for number in range(3):
            ids, logprobs = [[1, 2]] * 4, np.log(np.array([[0.5, 0.25]] * 4, np.float32))
            writer.add([1, 2, 3, 4], ids, logprobs, id=f"日本\x1b[31m{number}", **{"bad\x1b]0;owned\x07": "x\x1by"})
    return path


@pytest.mark.parametrize(
    "arguments",
    [("stats",), ("compare",), ("compare", "--by", "nope"), ("compare", "--by", "bad\x1b]0;owned\x07"), ("show",), ("info",),
     ("head",), ("validate",), ("show", "--at", "77"), ("show", "--id", "x\x1b")],
    ids=" ".join,
)  # fmt: skip
def test_no_command_lets_a_dataset_steer_a_terminal(hostile, arguments):
    name, *options = arguments
    datasets = [hostile, hostile] if name == "compare" else [hostile]
    done = run(name, *datasets, *options)
    assert not {0x1B, 0x07} & set(done.stdout + done.stderr)
    assert "\u202e" not in (done.stdout + done.stderr).decode()
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("command", ["stats", "show", "head", "info"])
def test_json_is_json_whatever_the_stream_can_hold(hostile, command, encoding):
    done = run(command, hostile, "--json", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.decode(encoding))
    if command == "show":
        assert found["id"] == "日本\x1b[31m0"


@pytest.mark.parametrize("command", [("stats", "--html"), ("view", "-o")], ids=lambda command: command[0])
def test_a_file_is_not_written_where_it_would_harm(write, tmp_path, command):
    path = write()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    name, option = command
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for target, says in (
        (path / "logitstore.json", b"in the dataset"),
        (path / "new.html", b"in the dataset"),
        (tmp_path, b"is a directory"),
        (tmp_path / "nowhere" / "x.html", b"make it first"),
        (fifo, b"is no file"),
    ):
        done = run(name, path, option, target, "--overwrite")
        assert done.returncode == 1, target
        assert says in done.stderr
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert fifo.is_fifo()


def test_options_that_do_nothing_are_refused(write):
    for options in (["--workers", "2"], ["--overwrite"]):
        assert run("stats", write(overwrite=True), *options).returncode == 2
