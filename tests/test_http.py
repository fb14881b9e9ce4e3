"""Rules of asking again that no server of the tests shows well."""

import pytest

from logitstore.errors import RemoteError
from logitstore.io.http import backoff, pause, same_origin, waiting


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "7"}, 7.1),
        (503, {"Retry-After": "7"}, 7.1),
        (429, {"RateLimit": '"api";r=0;t=12'}, 12.1),
        (503, {"RateLimit": '"api";r=990;t=290'}, 0),  # every answer of the Hub has it
        (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0),
        (429, {"Retry-After": "99999"}, 300),
        (429, {}, 0),
    ],
)
def test_what_a_server_asks_for(status, headers, seconds):
    assert waiting(status, headers) == pytest.approx(seconds)


def test_waits_grow_and_are_scattered(monkeypatch):
    monkeypatch.setattr("logitstore.io.http.BACKOFF_SECONDS", 0.5)
    for failures, middle in ((1, 0.5), (2, 1), (3, 2), (5, 8), (50, 8)):
        waits = {backoff(failures) for _ in range(50)}
        assert len(waits) > 40
        assert all(0.75 * middle <= wait <= 1.25 * middle for wait in waits)


def test_nobody_waits_for_what_is_not_wanted_any_more():
    with pytest.raises(RemoteError):
        pause(1000, lambda: False)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://a/x", "https://a:443/y", True),
        ("http://a/x", "http://A/y?z", True),
        ("http://a:1/x", "http://a:2/x", False),
        ("http://a/x", "https://a/x", False),
        ("https://a.b/x", "https://b/x", False),
        ("https://a@b/x", "https://a/x", False),
    ],
)
def test_origins(one, other, same):
    assert same_origin(one, other) is same
