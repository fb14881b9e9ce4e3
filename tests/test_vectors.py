"""The files in `spec/vectors/v1`, read by the package and by a reader that was written from the spec alone."""

import ast
import hashlib
import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import logitstore

READER = Path(__file__).parent / "independent_reader.py"
VECTORS = Path(__file__).parent.parent / "spec" / "vectors" / "v1"
NAMES = sorted(path.name for path in VECTORS.iterdir() if path.is_dir())
VALUES = ("tokens", "count", "ids", "logprobs", "draws", "logits", "tail", "target_logprob", "target_rank")
VALUES += ("logsumexp", "entropy", "loss_mask")
INFO = {"format_version": "version"} | {name: name for name in ("logit_width", "normalised", "temperature")}

_spec = importlib.util.spec_from_file_location("independent_reader", READER)
independent_reader = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(independent_reader)

each_vector = pytest.mark.parametrize("name", NAMES)


def text(dataset):
    """Compared as text, -0.0 is not 0.0, and 1 is not 1.0."""
    return json.dumps(dataset, sort_keys=True, indent=1, allow_nan=False)


def expected(name):
    return text(json.loads((VECTORS / f"{name}.json").read_text("utf-8")))


def as_json(value):
    if isinstance(value, np.ndarray) and len(value) > 500:
        little = value.astype(value.dtype.newbyteorder("<")).tobytes()
        return {"dtype": value.dtype.name, "length": len(value), "sha256": hashlib.sha256(little).hexdigest()}
    if isinstance(value, np.ndarray):
        return [as_json(item) for item in value.tolist()]
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else str(value)
    return value


def read_with_the_package(path):
    dataset = logitstore.open(path)
    info = {key: getattr(dataset.info, name) for key, name in INFO.items()}
    sequences = [
        {"id": s.id, "columns": s.columns} | {name: as_json(getattr(s, name)) for name in VALUES}
        for s in dataset.select([*VALUES, *dataset.info.user_columns])
    ]
    return info | {"sequences": sequences}


def test_there_are_vectors_and_each_has_its_expected_values():
    assert len(NAMES) >= 12
    assert sorted(path.stem for path in VECTORS.glob("*.json")) == NAMES


@each_vector
def test_the_independent_reader_gives_the_expected_values(name):
    assert text(independent_reader.read_dataset(VECTORS / name)) == expected(name)


@each_vector
def test_the_package_gives_the_expected_values(name):
    assert text(read_with_the_package(VECTORS / name)) == expected(name)


@each_vector
def test_the_validator_finds_no_errors(name):
    findings = logitstore.validate(VECTORS / name, deep=True)
    assert [finding for finding in findings if finding.severity == "error"] == []


def test_the_independent_reader_imports_nothing_of_the_package():
    modules = set()
    for node in ast.walk(ast.parse(READER.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.partition(".")[0])
    assert modules <= {*sys.stdlib_module_names, "numpy", "pyarrow", "pcodec", "xxhash"}
    assert "importlib" not in modules


@pytest.mark.parametrize("name", ["draws", "optional-columns"])
def test_a_flipped_bit_is_refused_or_without_effect(name, tmp_path):
    copy = tmp_path / name
    shutil.copytree(VECTORS / name, copy)
    rng = random.Random(name)
    for file in ("logitstore.json", "data/train/train-00000.arrow"):
        whole = (copy / file).read_bytes()
        for _ in range(150):
            bit = rng.randrange(8 * len(whole))
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            (copy / file).write_bytes(flipped)
            try:
                read = independent_reader.read_dataset(copy)
            except independent_reader.SpecViolation:
                continue
            assert text(read) == expected(name), f"bit {bit} of {file}"
        (copy / file).write_bytes(whole)
    assert text(independent_reader.read_dataset(copy)) == expected(name)
