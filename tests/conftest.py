"""What several tests share: datasets made on the spot, and real captures where they are there."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import logitstore

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

ROOT = Path(__file__).parent.parent


def make_rows(seed, positions, k, width=1000):
    """(tokens [T], ids [T, k], logprobs float32 [T, k]), best first, normalised with some mass left."""
    random = np.random.default_rng(seed)
    ids = random.permuted(np.tile(np.arange(width), (positions, 1)), axis=1)[:, :k]
    logits = -np.sort(-random.normal(0, 3, (positions, k)), axis=1)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.0625
    return random.integers(0, width, positions), ids, logprobs.astype(np.float32)


@pytest.fixture
def rows():
    return make_rows


@pytest.fixture
def write(tmp_path):
    """A function that writes a dataset of some sequences and returns its path."""

    def make(name="data", sequences=6, positions=12, k=8, seed=0, per_sequence=lambda i: {}, **settings):
        path = tmp_path / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
            with logitstore.Writer(path, **{"logit_width": 1000, "teacher": "t", **settings}) as writer:
                for i in range(sequences):
                    writer.add(*make_rows(seed + i, positions + i, k), **per_sequence(i))
        return path

    return make


@pytest.fixture
def quiet():
    """Lets datasets be written without saying their teacher."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        yield


@pytest.fixture
def shared():
    """A function that gives a real capture from beside the repository, or skips and says so."""

    def find(name):
        path = ROOT.parent / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"needs the real capture {name}, which does not come with the repository")
        return path

    return find
