"""What several tests share: datasets made on the spot, and real captures where they are there."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import logitstore

os.environ["HF_HUB_DISABLE_XET"] = "1"  # the tests' Hub has none; read when huggingface_hub is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"

pytest.register_assert_rewrite("pull_rows", "view_browser")  # before a test imports them

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


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """No test reads or writes the cache, token or settings of whoever runs it, or waits long before it asks again."""
    monkeypatch.setenv("LOGITSTORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback that the genuine client talks to as `me`, with a token that may write."""
    import huggingface_hub
    from hub import Hub
    from huggingface_hub import constants

    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr("logitstore.io.http.BACKOFF_SECONDS", 0.01)
        yield server
        huggingface_hub.close_session()
    assert server.errors == []
    assert not [request for request in server.requests if request.origin == "storage" and request.authorization]


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
