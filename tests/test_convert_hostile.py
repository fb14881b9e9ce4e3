"""Inputs that nobody means well with: each importer ends in one of our errors, in bounded memory and time."""

import gzip
import subprocess
import sys
import zipfile

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


def npz(folder, **members):
    path = folder / "in.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(header, data=b""):
    """An array file with any header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


HEADERS = {
    "no Python": b"{'descr': (",
    "a NUL": b"{'descr': '<i4', \x00 ",
    "no printing": b"{'descr': \x89",
    "nested": b"(" * 9000,
    "a shape of 2^60": b"{'descr': '<i4', 'fortran_order': False, 'shape': (%d, 4), }" % (2**60),
    "nothing": b"",
}


@pytest.mark.parametrize("name", ["arrays", "exllama"])
@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_arrays_that_are_no_python_are_refused(tmp_path, name, kind):
    bad = npy(HEADERS[kind])
    for arrays in ({"tokens": bad, "lengths": bad, "ids": bad, "logprobs": bad}, {"token_ids": bad, "logits": bad}):
        with pytest.raises(logitstore.LogitStoreError):
            convert([npz(tmp_path, **arrays)], tmp_path / "out", importer=name)
        with pytest.raises(logitstore.LogitStoreError):
            convert([npz(tmp_path, **arrays)], tmp_path / "out")


@pytest.mark.parametrize("name", ["arrays", "exllama"])
def test_a_zip_of_a_later_version_is_refused(tmp_path, name):
    path = npz(tmp_path, tokens=b"", logits=b"", token_ids=b"")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 250  # the version that is needed to extract
    path.write_bytes(bytes(data))
    for importer in (name, None):
        with pytest.raises(logitstore.LogitStoreError):
            convert([path], tmp_path / "out", importer=importer)


def test_a_setting_that_is_cut_off_is_refused(tmp_path):
    scalar = npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (), }", b"\0" * 7)
    one = npy(b"{'descr': '<i4', 'fortran_order': False, 'shape': (1,), }", b"\1\0\0\0")
    with pytest.raises(logitstore.SourceError):
        path = npz(tmp_path, tokens=one, lengths=one, ids=one, logprobs=one, temperature=scalar)
        convert([path], tmp_path / "out", importer="arrays")


def test_tensors_without_dimensions_are_refused(tmp_path):
    entry = '{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    header = (f'{{"token_ids":{entry},"top_k_probs":{entry},"logits":{entry}}}').encode()
    path = tmp_path / "in.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(logitstore.LogitStoreError):
        convert([path], tmp_path / "out", importer="exllama")


def test_a_temperature_beyond_floats_is_none(tmp_path):
    from logitstore.convert.trl import _temperature

    assert _temperature({"temperature": 10**400}) is None
    assert _temperature({"temperature": 2}) == 2.0


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
