"""Real rows through every exporter and back: rounding on the grid brings sums over 1, and must not stop anything."""

from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.convert import convert, export, exporters

FIXTURE = Path(__file__).parent / "data" / "gemma3-270m-shakespeare-top64.npz"
BACK = {
    "npz": {"importer": "arrays"},
    "safetensors": {"importer": "arrays"},
    "parquet": {"importer": "columns", "value_kind": "logprob", "alignment": "next"},
    "jsonl": {"importer": "columns", "value_kind": "logprob", "alignment": "next"},
}
SUFFIX = {"distillkit": "", "npz": ".npz", "safetensors": ".safetensors", "jsonl": ".jsonl", "nemo-aligner": ".jsonl"}
WITHOUT_LAST = ("trl", "nemo-aligner")  # no distribution where the next token is not there

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("resolution", [1 / 32, 1 / 8])
@pytest.mark.parametrize("name", sorted(exporters()))
def test_rounded_rows_come_back(tmp_path, name, resolution):
    convert([FIXTURE], tmp_path / "x", values="grid", resolution=resolution, logit_width=262_144, teacher="t")
    x = logitstore.open(tmp_path / "x")
    over = sum(int((np.exp(s.dense(64)[1], dtype=np.float64).sum(axis=1) > 1.0001).sum()) for s in x)
    assert over > 0
    path = tmp_path / f"y{SUFFIX.get(name, '.parquet')}"
    export(x, path, name)
    convert([path], tmp_path / "z", values="float32", **BACK.get(name, {"importer": name}))
    z = logitstore.open(tmp_path / "z")
    assert len(z) == len(x)
    for before, after in zip(x, z, strict=True):
        assert (before.tokens == after.tokens).all()
        rows = len(before) - (name in WITHOUT_LAST)
        assert (before.count[:rows] == after.count[:rows]).all()
        n = int(before.offsets[rows])
        assert (np.sort(before.ids[:n].reshape(rows, 64)) == np.sort(after.ids[:n].reshape(rows, 64))).all()
        assert np.abs(before.logprobs[:n] - after.logprobs[:n]).max() <= 0.065
    assert logitstore.is_valid(logitstore.validate(tmp_path / "z", deep=True))
