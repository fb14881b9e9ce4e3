"""What was fetched is kept: bounded, verified, shared by processes, and never a reason to fail."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

import logitstore
from logitstore.io import cache as module
from logitstore.io.cache import Cache, cache
from logitstore.units import parse_size


def files(root):
    return [path for path in root.rglob("*") if path.is_file()]


def held(root):
    return sum(path.stat().st_size for path in files(root))


def item(size, fill=0):
    return pa.py_buffer(bytes([fill]) * size)


def test_items_come_back(tmp_path):
    kept = Cache(tmp_path / "deep" / "cache", 10_000)
    assert kept.get("a") is None
    kept.put("a", item(100, 1))
    kept.put("b", item(0))
    assert kept.get("a").equals(item(100, 1))
    assert kept.get("b").size == 0
    kept.put("a", item(50, 2))
    assert kept.get("a").equals(item(50, 2))
    assert Cache(tmp_path / "deep" / "cache", 10_000).get("a").equals(item(50, 2))


def test_the_limit_holds_and_the_least_recently_used_goes(tmp_path):
    kept = Cache(tmp_path, 1000)
    for number in range(10):
        kept.put(str(number), item(100, number))
        os.utime(kept._place(str(number))[1], (number, number))
    assert held(tmp_path) == 1000
    assert kept.get("0") is not None  # used now
    kept.put("new", item(150))
    assert held(tmp_path) <= 1000
    assert kept.get("0") is not None
    assert kept.get("new") is not None
    assert kept.get("1") is None
    assert kept.get("2") is None
    assert kept.get("3") is not None
    kept.put("all", item(1000))
    assert [path.stat().st_size for path in files(tmp_path)] == [1000]
    kept.put("too large", item(1001))
    assert kept.get("too large") is None
    assert kept.get("all") is not None


def test_what_other_processes_put_counts(tmp_path):
    kept = Cache(tmp_path, 3200)
    kept.put("own", item(100))
    Cache(tmp_path, 10**6).put("other", item(3000))
    for number in range(8):
        kept.put(str(number), item(100))
    assert held(tmp_path) <= 3200 + 3200 // 16 + 100


def test_unfinished_items_are_never_seen_and_old_ones_removed(tmp_path):
    kept = Cache(tmp_path, 1000)
    kept.put("a", item(100))
    directory, place = map(Path, kept._place("b"))
    directory.mkdir(parents=True, exist_ok=True)
    for name, age in (("1-1", 0), ("2-2", 2 * module._STALE_SECONDS)):
        path = place.with_name(f"{place.name}.{name}{module._SUFFIX}")
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    assert kept.get("b") is None
    fresh = Cache(tmp_path, 1000)
    fresh.put("c", item(100))
    assert sorted(path.name.split(".")[1] for path in files(tmp_path) if "." in path.name) == ["1-1"]


def test_a_killed_writer_leaves_nothing_that_is_taken_for_an_item(tmp_path):
    code = (
        "import sys, pyarrow as pa; from pathlib import Path; from logitstore.io.cache import Cache\n"
        "kept = Cache(Path(sys.argv[1]), 2**30); print(flush=True)\n"
        "for i in range(10**9): kept.put(str(i), pa.py_buffer(bytes([i % 251]) * 300_000))"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.1)
        process.kill()
        process.wait()
        process.stdout.close()
    kept = Cache(tmp_path, 2**30)
    found = [kept.get(str(number)) for number in range(2000)]
    assert any(found)
    for number, data in enumerate(found):
        assert data is None or data.equals(item(300_000, number % 251))


def test_threads(tmp_path):
    kept = Cache(tmp_path, 20_000)
    failures = []

    def work(seed):
        for number in range(200):
            name = (number * 7 + seed) % 60
            data = kept.get(str(name))
            if data is not None and not data.equals(item(500, name)):
                failures.append(name)
            kept.put(str(name), item(500, name))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert held(tmp_path) <= 20_000 + 6 * 500


def test_a_directory_that_refuses_turns_keeping_off(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    kept = Cache(tmp_path / "file" / "cache", 1000)
    with pytest.warns(logitstore.LogitStoreWarning, match="LOGITSTORE_CACHE"):
        kept.put("a", item(10))
    kept.put("a", item(10))  # silent from now on
    assert kept.get("a") is None


def test_a_full_disk_turns_keeping_off(tmp_path, monkeypatch):
    kept = Cache(tmp_path, 1000)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(logitstore.LogitStoreWarning, match="No space left on device"):
        kept.put("a", item(10))
    assert files(tmp_path) == []


def test_the_environment_says_where_and_how_much(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGITSTORE_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("LOGITSTORE_CACHE_SIZE", "3MiB")
    assert (cache().root, cache().limit) == (tmp_path / "here", 3 * 2**20)
    assert cache() is cache()
    monkeypatch.delenv("LOGITSTORE_CACHE")
    monkeypatch.delenv("LOGITSTORE_CACHE_SIZE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert (cache().root, cache().limit) == (tmp_path / "xdg" / "logitstore", 10 * 2**30)
    monkeypatch.setenv("LOGITSTORE_CACHE_SIZE", "much")
    with pytest.raises(logitstore.InvalidInputError, match="LOGITSTORE_CACHE_SIZE is 'much'"):
        cache()
    monkeypatch.setenv("LOGITSTORE_CACHE_SIZE", "0")
    cache().put("a", item(1))
    assert not (tmp_path / "xdg").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("12", 12), ("1k", 1000), ("1 KiB", 1024), ("1.5MB", 1_500_000), ("2gib", 2**31), ("1T", 10**12),
     ("", None), ("MiB", None), ("-1", None), ("1 PB", None), ("1,5", None)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.usefixtures("quiet")
def test_damage_on_the_disk_is_fetched_again(hub, write, tmp_path):
    """Whoever reads an item verifies it."""
    from logitstore.hub import push

    path = write(sequences=40, positions=40, k=32, chunk_candidates=6000)
    push(path, "me/x")
    local = logitstore.open(path)
    assert [s.ids.tolist() for s in logitstore.open("hf://datasets/me/x")] == [s.ids.tolist() for s in local]
    kept = files(tmp_path / "cache")
    assert len(kept) > 3
    for number, file in enumerate(kept):
        data = bytearray(file.read_bytes())
        if number % 2:
            data[len(data) // 2] ^= 1
        file.write_bytes(data if number % 2 else data[: number * 10])
    hub.clear_log()
    assert [s.ids.tolist() for s in logitstore.open("hf://datasets/me/x")] == [s.ids.tolist() for s in local]
    assert any(request.origin == "storage" for request in hub.requests)
    hub.clear_log()
    assert [s.ids.tolist() for s in logitstore.open("hf://datasets/me/x")] == [s.ids.tolist() for s in local]
    assert not any(request.origin == "storage" for request in hub.requests)


@pytest.mark.usefixtures("quiet")
def test_one_dataset_does_not_answer_for_another(hub, write, tmp_path):
    """A forged manifest names another dataset's sha256: what it put into the cache is its own."""
    from logitstore.hub import push

    one, other = write("one", seed=1), write("other", seed=2)
    push(one, "me/x")
    push(other, "me/y")
    list(logitstore.open("hf://datasets/me/x"))
    before = set(files(tmp_path / "cache"))
    push(one, "me/z")
    list(logitstore.open("hf://datasets/me/z"))
    assert set(files(tmp_path / "cache")) > before
    np_ids = [sequence.ids.tolist() for sequence in logitstore.open("hf://datasets/me/y")]
    assert np_ids == [sequence.ids.tolist() for sequence in logitstore.open(other)]


def test_many_writers_at_once_hold_the_limit(tmp_path):
    kept = Cache(tmp_path, 2**20)
    gate = threading.Barrier(16)

    def put(number):
        gate.wait()
        kept.put(str(number), item(2**19, number))

    threads = [threading.Thread(target=put, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept.put("last", item(2**19))
    assert held(tmp_path) <= 2**20
    assert kept._writing == 0


def test_a_directory_that_is_emptied_meanwhile_does_no_harm(tmp_path, monkeypatch):
    kept = Cache(tmp_path, 1000)
    replace = os.replace

    def emptied(source, target):
        os.unlink(source)  # noqa: PTH108
        return replace(source, target)

    monkeypatch.setattr(os, "replace", emptied)
    kept.put("a", item(10))
    monkeypatch.setattr(os, "replace", replace)
    kept.put("a", item(10))
    assert kept.get("a") is not None
