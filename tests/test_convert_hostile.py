"""Inputs that nobody means well with: each importer ends in one of our errors, in bounded memory and time."""

import gzip
import subprocess
import sys

import pytest
import zstandard

import logitstore
from logitstore.convert import convert, importers

pytestmark = pytest.mark.usefixtures("quiet")

NAMES = sorted(importers())
FITTING = {("easydistill", "an empty list")}  # a sample without generated tokens
OPTIONS = {
    "columns": {"value_kind": "logprob", "alignment": "next"},
}

LINES = {
    "nested lists": b"[" * 500_000,
    "nested objects": b'{"a":' * 500_000,
    "nested in a field": b'{"choices":' + b"[" * 500_000,
    "closed nesting": b"[" * 100_000 + b"]" * 100_000,
    "a huge exponent": b'{"logprob": 1e999, "tokens": [1e999], "choices": [{"index": 1e999}]}',
    "a huge integer": b'{"tokens": [' + b"9" * 100_000 + b"]}",
    "invalid UTF-8": b'{"content": "\xff\xfe"}',
    "half a surrogate": b'{"content": "\\ud800", "id": "\\udfff"}',
    "a NUL": b'{"content": "\x00"}',
    "null": b"null",
    "a number": b"17",
    "a text": b'"completion_probabilities"',
    "an empty list": b"[]",
    "an empty object": b"{}",
    "no JSON": b"hello",
    "half an object": b'{"choices": [{"logprobs": {"content": [{"token"',
    "random bytes": bytes(range(256)) * 40,
    "a zip": b"PK\x03\x04" + bytes(100),
    "parquet's magic": b"PAR1" + bytes(100) + b"PAR1",
    "arrow's magic": b"ARROW1\x00\x00" + bytes(100) + b"ARROW1",
    "an arrow stream": b"\xff\xff\xff\xff" + bytes([200, 0, 0, 0]) + bytes(300),
    "a safetensors header": (2**40).to_bytes(8, "little") + b'{"a": 1}',
}


def one(folder, data):
    path = folder / "in.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LINES)
def test_every_importer_refuses_it_with_our_error(tmp_path, name, kind):
    if (name, kind) in FITTING:
        assert convert([one(tmp_path, LINES[kind])], tmp_path / "out", importer=name).summary.sequences == 1
        return
    for suffix in (".jsonl", ".parquet", ".tar", ".safetensors"):
        path = tmp_path / f"in{suffix}"
        path.write_bytes(LINES[kind])
        for on_error in ("stop", "skip"):
            with pytest.raises(logitstore.LogitStoreError):
                convert([path], tmp_path / "out", importer=name, on_error=on_error, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("kind", LINES)
def test_recognising_never_fails(tmp_path, kind):
    for suffix in (".jsonl", ".parquet", ".tar", ".safetensors", ".npz"):
        path = tmp_path / f"in{suffix}"
        path.write_bytes(LINES[kind])
        with pytest.raises(logitstore.LogitStoreError):
            convert([path], tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_input_is_refused(tmp_path, name):
    for suffix in (".jsonl", ".parquet", ".tar", ".safetensors", ".npz"):
        path = tmp_path / f"in{suffix}"
        path.write_bytes(b"")
        with pytest.raises(logitstore.LogitStoreError):
            convert([path], tmp_path / "out", importer=name, **OPTIONS.get(name, {}))


BOMBS = {
    "gzip": lambda: gzip.compress(b'{"choices": [' + bytes(2**20)) + gzip.compress(bytes(2**29), 6),
    "zstd": lambda: zstandard.compress(b'{"choices": [' + b"[" * 2**29),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_of_512_mib_takes_little_memory(tmp_path, kind):
    path = tmp_path / "bomb.jsonl"
    path.write_bytes(BOMBS[kind]())
    code = (
        "import sys, logitstore\n"
        "from logitstore.convert import convert\n"
        "try:\n    convert([sys.argv[1]], sys.argv[2], importer='vllm')\n"
        "except logitstore.SourceError as error:\n    print(error)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"  # ru_maxrss has the parent's in it
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    says, peak = done.stdout.splitlines()
    assert "line 1 is longer than" in says
    assert int(peak) < 900 * 1024  # KiB: the longest line that is allowed, twice, and the program
