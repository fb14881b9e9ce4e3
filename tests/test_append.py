"""`append`: a dataset that grows in place, beside readers, and through kills."""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from restructured import check_valid, everything, files, make, small_tokenizer
from restructured import run as in_process
from test_merge import check_joined, killed, no_links, partial  # noqa: F401 - fixtures

import logitstore
from logitstore.dataset.output import locked

pytestmark = pytest.mark.usefixtures("quiet")


def test_shards_are_added_under_new_names(tmp_path):
    a = make(tmp_path / "a", prefix="a", chunk_candidates=30, shard_bytes=4000, column=lambda i: {"x": i})
    b = make(tmp_path / "b", prefix="b", chunk_candidates=30, shard_bytes=4000, column=lambda i: {"x": i})
    c = make(tmp_path / "c", prefix="c", split="validation", column=lambda i: {"x": i})
    d = make(tmp_path / "d", prefix="d", column=lambda i: {"x": i})
    before = logitstore.open(a)
    sequences = everything(a)
    shutil.copytree(a, tmp_path / "old")
    done = logitstore.append(a, [b, c])
    assert (done.unchanged, done.notes, done.linked > 1) == (False, (), True)
    check_joined(a, tmp_path / "old", b, c)
    logitstore.append(a, [d])
    info = check_joined(a, tmp_path / "old", b, d, c)
    assert [s.id for s in before] == [s.id for s in sequences]  # who opened it before sees what was there
    assert info.shards[0] == before.info.shards[0]


@pytest.mark.usefixtures("no_links")
def test_what_is_there_already_is_not_added_again(tmp_path):
    a, b = make(tmp_path / "a", prefix="a"), make(tmp_path / "b", prefix="b")
    c = make(tmp_path / "c", prefix="c", encoding="float32", counts=(1, 9))
    assert logitstore.append(a, [b, b]).copied == 1
    manifest = (a / "logitstore.json").read_bytes()
    again = logitstore.append(a, [b])
    assert (again.unchanged, again.manifest) == (True, logitstore.open(a).info)
    assert (a / "logitstore.json").read_bytes() == manifest
    logitstore.append(b, [c])  # and b has grown since
    done = logitstore.append(a, [b])
    assert (done.copied, done.manifest.totals.sequences) == (1, 36)
    assert check_valid(a).totals.encodings["float32"] == 12
    assert logitstore.append(a, [make(tmp_path / "e", sequences=0)]).unchanged


def test_refusals(tmp_path):
    a, b = make(tmp_path / "a", prefix="a"), make(tmp_path / "b", prefix="b")
    before = files(a)
    (tmp_path / "link").symlink_to(a)
    with pytest.raises(logitstore.InvalidInputError, match="the dataset itself"):
        logitstore.append(a, [tmp_path / "link"])
    with pytest.raises(logitstore.InvalidInputError, match=r"is a URL; .*logitstore pull"):
        logitstore.append("hf://datasets/x/y", [b])
    with pytest.raises(logitstore.InvalidInputError, match="is a URL"):
        logitstore.append(a, ["hf://datasets/x/y"])
    with pytest.raises(logitstore.DatasetNotFoundError):
        logitstore.append(tmp_path / "nowhere", [b])
    assert not (tmp_path / "nowhere").exists()
    with locked(a), pytest.raises(logitstore.DatasetExistsError, match="another"):
        logitstore.append(a, [b])
    assert files(a) == before
    check_valid(a)


def test_parts_that_are_to_replace_the_dataset(tmp_path):
    a, b = make(tmp_path / "a", prefix="a"), make(tmp_path / "b", prefix="b")
    writer = logitstore.Writer(a, logit_width=1000, teacher="t", overwrite=True, chunk_candidates=1)
    writer.add([1], [[2]], [[-1.0]])
    with pytest.raises(logitstore.DatasetExistsError, match="writer is at work"):
        logitstore.append(a, [b])
    writer.abort()
    left = files(a)
    with pytest.raises(logitstore.DatasetExistsError, match="was begun"):
        logitstore.append(a, [b])
    assert files(a) == left
    with logitstore.Writer(a, logit_width=1000, teacher="t", resume=True, chunk_candidates=1):
        pass
    logitstore.append(a, [b])
    assert len(everything(a)) == 13
    check_valid(a)


def test_a_tokenizer_that_was_not_known(tmp_path):
    tok = small_tokenizer(tmp_path / "tok")
    a = make(tmp_path / "a", prefix="a", tokenizer=tok)
    b = make(tmp_path / "b", prefix="b", tokenizer=tok)
    logitstore.append(a, [b])
    assert check_valid(a).tokenizer == logitstore.open(b).info.tokenizer
    c, d = make(tmp_path / "c", prefix="c"), partial(tmp_path / "d", "d", {1: b"x"})
    logitstore.append(c, [d])
    assert dict(logitstore.open(c).tokenizer().items()) == {1: b"x"}
    with pytest.raises(logitstore.InvalidInputError, match="the tokenizer"):
        logitstore.append(c, [a])


def test_a_failure_leaves_the_dataset_as_it_was(tmp_path, no_links):  # noqa: F811
    a = make(tmp_path / "a", prefix="a")
    b, c = make(tmp_path / "b", prefix="b"), make(tmp_path / "c", prefix="c", split="other")
    shard = c / logitstore.open(c).info.shards[0].path
    data = bytearray(shard.read_bytes())
    data[300] ^= 1
    shard.write_bytes(data)
    before = {name: (a / name).read_bytes() for name in files(a)}
    with pytest.raises(logitstore.CorruptDataError):
        logitstore.append(a, [b, c])
    assert {name: (a / name).read_bytes() for name in files(a)} == before
    assert not (a / "data" / "other").exists()
    assert not (a / "parts").exists()


READER = """
import sys, logitstore
whole, stop = set(map(int, sys.argv[2].split(","))), sys.argv[3]
print("ready", flush=True)
import os
seen = set()
while True:
    last = os.path.exists(stop)
    dataset = logitstore.open(sys.argv[1])
    ids = [s.id for s in dataset]
    assert len(ids) == len(set(ids)) == dataset.info.totals.sequences
    assert len(ids) in whole, len(ids)
    seen.add(len(ids))
    if last:
        break
print(*sorted(seen))
"""


def spawn(script, *arguments):
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_reader_beside_it_sees_the_dataset_before_or_after_whole(tmp_path):
    a = make(tmp_path / "a", prefix="a", sequences=5)
    others = [
        make(tmp_path / f"b{i}", prefix=f"b{i}-", sequences=5, shard_bytes=1, chunk_candidates=1) for i in range(4)
    ]
    reader = spawn(READER, a, "5,10,15,20,25", tmp_path / "stop")
    for other in others:
        logitstore.append(a, [other])
        time.sleep(0.05)
    (tmp_path / "stop").touch()
    out, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert out.split()[-1] == "25"
    check_joined(a, *[a])


def test_killed_at_random_moments(tmp_path, killed):  # noqa: F811
    """`KILLS=500 KILL_SEED=1` for more of them."""
    rng = random.Random(int(os.environ.get("KILL_SEED", "0")))
    first = make(tmp_path / "first", prefix="a", sequences=4)
    other = make(tmp_path / "other", prefix="b", sequences=8, chunk_candidates=1, shard_bytes=1, split="more")
    ids = [[f"a{i}" for i in range(4)], [f"b{i}" for i in range(8)]]
    outcomes = set()
    a = tmp_path / "a"
    shutil.copytree(first, a)
    start = time.monotonic()
    killed(None, "append", a, other)
    took = time.monotonic() - start
    shutil.rmtree(a)
    shutil.copytree(first, a)
    for _ in range(int(os.environ.get("KILLS", "12"))):
        was_killed = killed(rng.uniform(0, took), "append", a, other)
        took *= 1 if was_killed else 0.6  # the first one, which was measured, was cold
        found = [s.id for s in logitstore.open(a)]
        assert found in (ids[0], ids[0] + ids[1])
        assert was_killed or found == ids[0] + ids[1]
        assert logitstore.is_valid(logitstore.validate(a, deep=True))
        named = {"logitstore.json", *(shard.path for shard in logitstore.open(a).info.shards)}
        outcomes.add((len(found), set(files(a)) > named))
        if len(found) > 4 or rng.random() < 0.3:
            logitstore.append(a, [other])
            if len(found) == 4:  # what the killed one left is gone
                check_valid(a)
            shutil.rmtree(a)
            shutil.copytree(first, a)
    assert (4, True) in outcomes
    logitstore.append(a, [other])
    check_joined(a, first, other)


def test_the_command(tmp_path, monkeypatch, capsys):
    run = functools.partial(in_process, monkeypatch, capsys)
    a, b = make(tmp_path / "a", prefix="a"), make(tmp_path / "b", prefix="b", top_k=3)
    out, err = run("append", a, b)
    assert out.startswith(f"{a}: 24 sequences, ")
    assert err.startswith("Note: ")
    out, err = run("append", a, b)
    assert out.startswith(f"{a}: unchanged, it held all of them before; 24 sequences")
    assert json.loads(run("append", a, b, "--json")[0])["unchanged"] is True
    run("append", a, status=2)
    assert "the dataset itself" in run("append", a, a, status=1)[1]
