"""Fuzzing: `python tests/fuzz/run.py TARGET --seconds N [--seed S]`, or `--examples N` for the same inputs every time.

Inputs are made from seeds by the target's mutator; number i of a seed is always the same. They are read in a process of
its own, so that a crash, 2 s of work and more than 256 MiB of memory are seen; what is found is saved under
`found/TARGET/`, and `tests/test_fuzz.py` reads it ever after.
"""

from __future__ import annotations

import argparse
import ast
import faulthandler
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

SECONDS = 2
MEMORY = 256 * 2**20
MAIN = ("shard", "manifest", "tokenizer", "imports")
GONE = 77
"""Exit status of a child that needs another in its place: allocators keep much of what they had."""


def forget_peak() -> int:
    """Let the peak start anew; the bytes in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes that this process had in memory."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def make(target: str, seed: int, number: int) -> bytes:
    """Input `number` of a seed."""
    import numpy as np
    from targets import TARGETS

    seeds = TARGETS[target].seeds()
    random = np.random.default_rng([seed, number])
    name = sorted(seeds)[int(random.integers(len(seeds)))]
    return TARGETS[target].mutate(random, seeds[name])


def read(target: str, data: bytes) -> str:
    """Read one input; what is wrong, or nothing."""
    from targets import TARGETS

    scratch = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    started, base = time.process_time(), forget_peak()
    try:
        signal.alarm(10 * SECONDS)  # ends the process, in C as well, and is patient with a busy machine
        try:
            TARGETS[target].run(data, scratch)
        except BaseException as error:  # noqa: BLE001 - pcodec panics with one of its own
            return "".join(traceback.format_exception(error, limit=-6))
        finally:
            signal.alarm(0)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if time.process_time() - started > SECONDS:
        return f"took {time.process_time() - started:.1f} s"
    if peak() - base > MEMORY:
        return f"took {(peak() - base) >> 20} MiB"
    return ""


def child(target: str, seed: int, first: int, last: int, until: float, log: Path) -> int:
    """Read inputs one after another; the log's last line is the one at work."""
    import resource

    from targets import TARGETS

    faulthandler.enable()
    seeds = list(TARGETS[target].seeds().values())
    for data in seeds[:3]:
        read(target, data)  # imports and tables
    base = forget_peak()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MEMORY, used + 64 * MEMORY))
    with log.open("a", buffering=1) as lines:
        for number in range(first, last):
            if time.time() > until:
                break
            data = make(target, seed, number)
            lines.write(f"{number}\n")
            if problem := read(target, data):
                lines.write(f"{number} {problem!r}\n")
            if forget_peak() - base > 2 * MEMORY:
                return GONE
    return 0


def fuzz(
    target: str, seed: int, first: int, last: int, seconds: float, found: Path | None
) -> tuple[int, dict[str, bytes]]:
    """Run children until the time is over or the inputs are read.

    Returns:
        (inputs that were read, what is wrong and with which input).
    """
    problems: dict[str, bytes] = {}
    until = time.time() + seconds
    number = first
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        while number < last and time.time() < until:
            log.write_text("")
            command = [
                sys.executable,
                __file__,
                target,
                "--child",
                str(seed),
                str(number),
                str(last),
                str(until),
                str(log),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = log.read_text().splitlines()
            if not lines:
                if done.returncode == 0:
                    break
                raise RuntimeError(f"{target}: the child did not start: {done.stderr}")
            for line in lines:
                place, _, problem = line.partition(" ")
                if problem:
                    keep(problems, ast.literal_eval(problem), target, make(target, seed, int(place)), found)
            number = int(lines[-1].partition(" ")[0]) + 1
            if done.returncode not in (0, GONE):
                problem = f"ended with {done.returncode}: {done.stderr[-3000:]}"
                keep(problems, problem, target, make(target, seed, number - 1), found)
    return number - first, problems


def keep(problems: dict[str, bytes], problem: str, target: str, data: bytes, found: Path | None) -> None:
    """Remember a problem, and save its input where there is none of the same kind."""
    if kind_of(problem) in map(kind_of, problems) or len(problems) > 40:
        return
    problems[problem] = data
    if found is not None:
        found.mkdir(parents=True, exist_ok=True)
        (found / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


def kind_of(problem: str) -> str:
    """The line of ours that it came from, and what it was: one input of each kind is enough."""
    places = re.findall(r'File "[^"]*/(?:logitstore|fuzz)/[^"]*", line \d+', problem)
    return f"{places[-1:]} {re.sub('[0-9]+', '', problem.strip().splitlines()[-1])[:40]}"


def several(target: str, paths: list[Path]) -> tuple[int, str]:
    """Read files in a process of its own: (exit status, what is wrong)."""
    command = [sys.executable, __file__, target, "--file", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def say(text: str, end: str = "\n") -> None:
    """Write to standard output at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a target of targets.py, or `all` for the main ones")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--examples", type=int, default=2**40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--file", type=Path, nargs="+", help="read these inputs instead")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        seed, first, last, until, log = given.child
        return child(given.target, int(seed), int(first), int(last), float(until), Path(log))
    if given.file:
        from targets import TARGETS

        for data in list(TARGETS[given.target].seeds().values())[:2]:
            read(given.target, data)
        wrong = 0
        for path in given.file:
            say(f"{path}:", end=" ")  # before it is read, which may end the process
            problem = read(given.target, path.read_bytes())
            say(problem or "good")
            wrong |= bool(problem)
        return wrong
    wrong = 0
    for target in MAIN if given.target == "all" else [given.target]:
        started = time.time()
        last = min(given.first + given.examples, 2**40)
        number, problems = fuzz(target, given.seed, given.first, last, given.seconds, HERE / "found" / target)
        wrong += len(problems)
        say(f"{target}: {number} inputs in {time.time() - started:.0f} s, {len(problems)} problems")
        for problem, data in problems.items():
            say(f"  {hashlib.sha256(data).hexdigest()[:12]}: {problem[-1500:]}")
    return min(wrong, 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
