"""Each dataset in spec/bad gives the finding that its table says, and reading it ends in nothing but our errors."""

import importlib.util
import re
import time
import tracemalloc
from pathlib import Path

import pytest

import logitstore
from logitstore.checks.findings import CODES

BAD = Path(__file__).parent.parent / "spec" / "bad"
ROW = re.compile(
    r"\| `(?P<name>[a-z0-9-]+)` \| (?P<what>[^|]+) \| `(?P<code>[a-z0-9-]+)`(?P<warning> \(warning\))? "
    r"\| (?P<found>quick|deep) \| (?P<reader>refuses it|may read it) \|"
)
TABLE = {row["name"]: row for row in ROW.finditer((BAD / "README.md").read_text(encoding="utf-8"))}
IMPLIED = {"value-range": {"probability-sum"}}  # an infinite value makes an infinite sum
UNREACHED = {
    "corrupt": "what no other code describes; nothing is known that gives it",
    "file-size": "a manifest over 256 MiB",
}


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("bad_make", BAD / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(path, **settings):
    return {(f.code, f.severity) for f in logitstore.validate(path, **settings)}


def test_the_table_names_every_directory_and_every_case(make):
    directories = {path.name for path in BAD.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert directories == set(TABLE) == set(make.CASES)
    assert len(TABLE) >= 20
    lines = [line for line in (BAD / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(lines) == len(TABLE), "a line that the pattern does not match, or a name twice"


def test_every_code_has_a_dataset():
    assert {row["code"] for row in TABLE.values()} == set(CODES) - set(UNREACHED)


@pytest.mark.parametrize("name", TABLE)
def test_validation_finds_it_and_nothing_else(name):
    row = TABLE[name]
    wanted = (row["code"], "warning" if row["warning"] else "error")
    quick, deep = found(BAD / name), found(BAD / name, deep=True)
    assert wanted in deep
    assert (wanted in quick) == (row["found"] == "quick")
    errors = {code for code, severity in deep if severity == "error"}
    assert errors <= {row["code"], "shard-sha256"} | IMPLIED.get(row["code"], set())
    assert quick <= deep


def read_all(path):
    """What each way of reading was refused with."""
    refused = []
    try:
        dataset = logitstore.open(path)
    except logitstore.LogitStoreError as error:
        return [error]
    for read in (lambda: list(dataset), lambda: dataset.by_id("0"), lambda: dataset[-1]):
        try:
            read()
        except logitstore.LogitStoreError as error:
            refused.append(error)
    return refused


@pytest.mark.parametrize("name", TABLE)
def test_reading_refuses_it_or_gives_data(name):
    refused = read_all(BAD / name)
    if TABLE[name]["reader"] == "refuses it":
        assert refused
        assert all(str(BAD / name) in str(error) for error in refused)
    else:
        # An id whose stored hash is wrong is not found; nothing else is refused.
        assert all(isinstance(error, logitstore.SequenceNotFoundError) for error in refused)


@pytest.mark.parametrize("name", TABLE)
def test_time_and_memory_are_bounded(name):
    started = time.process_time()
    tracemalloc.start()
    try:
        logitstore.validate(BAD / name, deep=True)
        read_all(BAD / name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 2
    assert peak < 150e6  # the longest sequence that is allowed, 2^24 positions, takes 64 MiB a column


def test_the_tokenizers_of_broken_datasets_are_refused_or_read():
    for name in TABLE:
        try:
            logitstore.open(BAD / name).tokenizer()
        except logitstore.LogitStoreError:
            continue


def test_making_them_changes_none_that_is_there(make, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make, "HERE", tmp_path)
    for name in make.CASES:
        (tmp_path / name).mkdir()
    (tmp_path / "shard-missing").rmdir()
    make.main()
    assert capsys.readouterr().out == "made shard-missing\n"
    assert [path.name for path in tmp_path.iterdir() if any(path.iterdir())] == ["shard-missing"]
