"""Typed metadata: the JSON Schemas, the seal, and what the parsers refuse; the text of the specification."""

import hashlib
import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.errors import CorruptDataError
from logitstore.schema import FormatVersion, parse_header, parse_manifest, serialise_manifest
from logitstore.schema.header import is_power_of_two
from logitstore.schema.manifest import is_safe_path
from logitstore.shard import layout

ROOT = Path(__file__).parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["manifest.schema.json", "shard-header.schema.json"])
def test_json_schemas_are_those_of_the_types(name):
    schemas = load(ROOT / "spec" / "schemas.py")
    assert (ROOT / "spec" / name).read_text() == schemas.schema_text(name)


def test_the_worked_example_of_the_specification_is_what_the_code_gives():
    examples = load(ROOT / "spec" / "examples.py")
    assert examples.BEGIN + examples.examples() + examples.END in (ROOT / "spec" / "README.md").read_text()


def test_every_vector_has_its_maker():
    make = load(ROOT / "spec" / "vectors" / "make.py")
    made = {path.stem for path in (ROOT / "spec" / "vectors" / "v1").glob("*.json")}
    assert made == set(make.CASES)


def test_limits_of_the_specification_are_those_of_the_code():
    from logitstore import limits

    text = (ROOT / "spec" / "README.md").read_text().partition("## 12. Limits")[2]
    for value, said in (
        (limits.ID_LIMIT, "2^31"), (limits.ORDER_LIMIT, "4,096"), (limits.SEQUENCE_CANDIDATES, "2^24"),
        (limits.MESSAGE_BYTES, "2^31 - 1"), (limits.SCHEMA_BYTES, "2^24"), (limits.MANIFEST_BYTES, "2^28"),
    ):  # fmt: skip
        assert said in text
        assert eval(said.replace("^", "**").replace(",", "")) == value
    assert layout.TAIL_BYTES == 128
    assert layout.INDEX_DTYPE.itemsize == 48
    assert layout.MAGIC.hex(" ") in (ROOT / "spec" / "README.md").read_text()


def test_the_manifest_is_plain_json_with_its_seal_last(write):
    data = (write() / "logitstore.json").read_bytes()
    content = json.loads(data)
    assert next(iter(content)) == "format"
    assert list(content)[-1] == "sha256"
    body = data[: data.rindex(b',\n "sha256"')]
    assert hashlib.sha256(body).hexdigest() == content["sha256"]
    assert serialise_manifest(parse_manifest(data)) == data


def reseal(content):
    body = json.dumps({k: v for k, v in content.items() if k != "sha256"}, indent=1).removesuffix("\n}").encode()
    return body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: m["shards"][0].update(path="../x"), "manifest-path"),
        (lambda m: m["shards"][0].update(path="/etc/passwd"), "manifest-path"),
        (lambda m: m["shards"][0].update(path="a\\b"), "manifest-path"),
        (lambda m: m["shards"][0].update(path="C:/x"), "manifest-path"),
        (lambda m: m["shards"].append(m["shards"][0]), "manifest-path"),
        (lambda m: m["totals"].update(sequences=7), "manifest-sums"),
        (lambda m: m["splits"]["train"].update(bytes=7), "manifest-sums"),
        (lambda m: m["splits"].update(other=m["splits"]["train"]), "manifest-sums"),
        (lambda m: m.update(dataset_digest="0" * 64), "manifest-sums"),
        (lambda m: m["shards"][0].update(sequences=-1), "manifest"),
        (lambda m: m["shards"][0].update(sequences=1.5), "manifest"),
        (lambda m: m["shards"][0].update(sequences=2**60), "manifest"),
        (lambda m: m["shards"][0].update(sha256="no"), "manifest"),
        (lambda m: m["shards"][0].update(split="a/b"), "manifest"),
        (lambda m: m["sampling"].update(resolution=0.3), "manifest"),
        (lambda m: m.update(temperature=0), "manifest"),
        (lambda m: m.update(normalised="no"), "manifest"),
        (lambda m: m.update(logit_width=0), "manifest"),
        (lambda m: m.pop("totals"), "manifest"),
        (lambda m: m.update(format="parquet"), "json"),
        (lambda m: m.pop("version"), "json"),
        (lambda m: m.update(version="one"), "version"),
    ],
)
def test_manifests_that_contradict_themselves_are_refused(write, change, code):
    content = json.loads((write() / "logitstore.json").read_bytes())
    assert parse_manifest(reseal(content))
    change(content)
    with pytest.raises(CorruptDataError) as caught:
        parse_manifest(reseal(content))
    assert caught.value.code == code


def test_unknown_fields_are_ignored(write):
    content = json.loads((write() / "logitstore.json").read_bytes())
    known = parse_manifest(reseal(content))
    content["later"] = {"a": 1}
    content["shards"][0]["later"] = 1
    assert parse_manifest(reseal(content)) == known


def test_split_order(write):
    content = json.loads((write(shard_bytes=1, chunk_candidates=1) / "logitstore.json").read_bytes())
    content["shards"][1]["split"] = "other"
    with pytest.raises(CorruptDataError, match="do not follow one another"):
        parse_manifest(reseal(content))


@pytest.mark.parametrize("path", ["a", "data/train/x.arrow", "a/b c/é"])
def test_safe_paths(path):
    assert is_safe_path(path)


@pytest.mark.parametrize("path", ["/a", "a/../b", "..", ".", "a//b", "a/./b", "a/", "a\\b", "c:a", "a\0b", ""])
def test_unsafe_paths(path):
    assert not is_safe_path(path)


def test_versions():
    assert FormatVersion(1, 0) < FormatVersion(1, 2) < FormatVersion(2, 0)
    assert str(FormatVersion.parse("1.12")) == "1.12"
    assert FormatVersion(1, 99).is_readable()
    assert not FormatVersion(2, 0).is_readable()
    for text in ("1", "1.", ".1", "1.0.0", "a.b", "-1.0", "1.0 ", "\u0663.\u0660", "9" * 20 + ".0"):
        with pytest.raises(CorruptDataError):
            FormatVersion.parse(text)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"{", b"\xff", b'{"format": "logitstore", "version": 1}'])
def test_headers_that_are_no_headers(text):
    with pytest.raises(CorruptDataError):
        parse_header(text)


def test_powers_of_two():
    assert all(is_power_of_two(2.0**n) for n in range(-20, 3))
    assert not any(is_power_of_two(x) for x in (0.0, 0.3, 3.0, 1 / 3))


def test_the_tail_reads_back_and_every_wrong_number_is_refused():
    tail = layout.Tail(1000, 100, 2, 3, 4, 5, b"a" * 16, b"b" * 16, b"c" * 16)
    data = layout.write_tail(tail)
    assert len(data) == 128
    assert layout.read_tail(b"x" * 50 + data, 1000) == tail
    for field, value in (
        ("file_bytes", 999), ("schema_bytes", 0), ("schema_bytes", 2**60), ("chunks", 2**60), ("chunks", 0),
        ("sequences", 2**62), ("sequences", 200),
    ):  # fmt: skip
        wrong = layout.write_tail(replaced(tail, field, value))
        with pytest.raises(CorruptDataError):
            layout.read_tail(wrong, 1000)


def replaced(tail, field, value):
    from dataclasses import replace

    return replace(tail, **{field: value})


def test_a_tail_of_a_later_version_is_told_from_a_damaged_one():
    tail = replaced(layout.Tail(1000, 100, 2, 3, 4, 5, b"a" * 16, b"b" * 16, b"c" * 16), "version", FormatVersion(3, 1))
    with pytest.raises(logitstore.UnsupportedVersionError, match=r"3\.1"):
        layout.read_tail(layout.write_tail(tail), 1000)
    body = bytes(200) + struct.pack("<IHH", 232, 2, 0)  # a longer tail of another layout
    longer = body + layout.digest(body) + layout.MAGIC
    with pytest.raises(logitstore.UnsupportedVersionError, match=r"2\.0"):
        layout.read_tail(longer, 1000)


def test_an_index_that_contradicts_the_tail_is_refused():
    index = np.array([(100, 50, 1, 2, 3, b"x" * 16), (150, 60, 2, 2, 2, b"y" * 16)], layout.INDEX_DTYPE)

    def read(**changes):
        changed = index.copy()
        for name, (row, value) in changes.items():
            changed[name][row] = value
        data = changed.tobytes()
        size = 210 + 8 + 3 * 8 + 2 * 48 + 128
        tail = layout.Tail(size, 100, 2, 3, 4, 5, b"", b"", layout.digest(data))
        return layout.read_index(data, tail)

    assert (read() == index).all()
    for change in (
        {"offset": (0, 99)}, {"offset": (1, 151)}, {"length": (0, 0)}, {"length": (1, 2**63)}, {"length": (1, 61)},
        {"sequences": (0, 0)}, {"sequences": (0, 2)}, {"positions": (0, 9)}, {"candidates": (0, 2**63)}, {"candidates": (1, 9)},
    ):  # fmt: skip
        with pytest.raises(CorruptDataError):
            read(**change)
