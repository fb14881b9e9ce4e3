"""Work in several processes: in order, and ended by Ctrl-C at any moment, once or several times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from logitstore.errors import InvalidInputError
from logitstore.processes import each

SCRIPT = """
import signal, sys, time
from logitstore.processes import each

def work(state, one):
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        pass
    return bytes(300_000)  # more than a pipe holds

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been inherited as ignored
    try:
        for number, _ in enumerate(each(work, None, range(10_000), 2)):
            print(number, flush=True)
    except KeyboardInterrupt:
        sys.exit(7)
"""


def double(state, one):
    return state * one


def fail(_state, one):
    if one == 3:
        raise InvalidInputError("three")
    return one


def end(_state, one):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_order(workers):
    assert list(each(double, 3, range(20), workers)) == [3 * n for n in range(20)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_in_its_place(workers):
    seen = []
    with pytest.raises(InvalidInputError, match="three"):
        seen.extend(each(fail, None, range(20), workers))
    assert list(zip(range(3), each(fail, None, range(20), workers), strict=False)) == [(0, 0), (1, 1), (2, 2)]


def test_a_killed_worker_is_one_error():
    with pytest.raises(InvalidInputError, match="before its time"):
        list(each(end, None, range(5), 2))


@pytest.mark.skipif(os.name != "posix", reason="sends signals to a group of processes")
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("after", [0.0, 0.02, 0.3])
def test_ctrl_c_ends_all_processes(tmp_path, times, after):
    """After the first result, while others are computed and sent; nothing is left, and no worker prints a traceback."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "0\n"
        time.sleep(after)
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.01)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 7 or (times > 1 and process.returncode != 0)
        assert "SpawnProcess" not in errors
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
        pytest.fail("processes are left")
