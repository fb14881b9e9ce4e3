"""Fuzzing in short: what was found once, and some fresh inputs that are the same each time.

`python tests/fuzz/run.py TARGET --seconds N` is the long form; `make fuzz` runs all targets for ten minutes each.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are Linux's")

FUZZ = Path(__file__).parent / "fuzz"
EXAMPLES = {"shard": 1500, "manifest": 3000, "tokenizer": 1500, "imports": 2500}
FOUND = sorted(path.name for path in (FUZZ / "found").glob("*") if path.is_dir())


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_run", FUZZ / "run.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


@pytest.mark.parametrize("target", FOUND)
def test_what_was_found_is_refused_or_read(fuzz, target):
    files = sorted((FUZZ / "found" / target).glob("*"))
    status, says = fuzz.several(target, files)
    assert status == 0, says


@pytest.mark.parametrize("target", EXAMPLES)
def test_fresh_inputs_end_in_our_errors(fuzz, target):
    number, problems = fuzz.fuzz(target, 1, 0, EXAMPLES[target], 300, None)
    assert number == EXAMPLES[target]
    assert list(problems) == []


def test_problems_are_seen(fuzz, tmp_path):
    """Another exception, much time and much memory; a process that ends is seen by its exit status."""
    code = "import os, sys, time; sys.path.insert(0, sys.argv[1]); import run, targets; "
    for act, says in (
        ("1 / 0", "ZeroDivisionError"),
        ("[0 for _ in iter(lambda: time.process_time() < 6, False)]", "took "),
        ("b'x' * 2**29", "took 51"),
    ):
        made = (
            f"targets.TARGETS['x'] = targets.Target(dict, None, lambda data, scratch: {act}); print(run.read('x', b''))"
        )
        done = fuzz.subprocess.run(
            [sys.executable, "-c", code + made, FUZZ], capture_output=True, text=True, check=True
        )
        assert says in done.stdout
