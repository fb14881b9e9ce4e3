"""A dataset of several shards and many chunks, and what recovering it must give."""

import random
import shutil
import warnings

import numpy as np

import logitstore
from logitstore.io import MappedFile
from logitstore.shard.reader import Shard

SEQUENCES = 36
SETTINGS = {"teacher": "t", "logit_width": 300, "chunk_candidates": 40, "shard_bytes": 9000}


def rows(number):
    random = np.random.default_rng(number)
    n = int(random.integers(1, 6))
    ids = random.permuted(np.tile(np.arange(300), (n, 1)), axis=1)[:, :5]
    return random.integers(0, 300, n), ids, -1 - np.cumsum(random.uniform(0.5, 2, (n, 5)), axis=1)


def write(path, numbers=range(SEQUENCES), **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        with logitstore.Writer(path, **{**SETTINGS, **settings}) as writer:
            for number in numbers:
                writer.add(*rows(number), id=f"s{number}", n=number)
    return path


def content(path):
    """All sequences by id, as comparable values."""
    found = {}
    for sequence in logitstore.open(path):
        fields = sorted(vars(sequence).items())
        found[sequence.id] = [(k, v.tobytes() if isinstance(v, np.ndarray) else repr(v)) for k, v in fields]
    return found


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def shard_paths(path):
    return [shard.path for shard in logitstore.open(path).info.shards]


def chunks(path, name):
    """(start, end, ids) of each chunk of a shard."""
    shard = Shard(MappedFile(path / name))
    return [
        (int(e["offset"]), int(e["offset"] + e["length"]), shard.chunk(number).ids())
        for number, e in enumerate(shard.index)
    ]


def damage(data, kind, at, length):
    """(bytes, first damaged byte, the one behind the last) of one kind of damage; both are equal for what came between."""
    end = min(len(data), at + length)
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ 1 << length % 8]) + data[at + 1 :], at, at + 1
    if kind == "cut":
        return data[:at], at, len(data)
    if kind == "zero":
        return data[:at] + bytes(end - at) + data[end:], at, end
    if kind == "delete":
        return data[:at] + data[end:], at, end
    if kind == "append":
        return data + random.Random(at).randbytes(length), len(data), len(data)
    return data[:at] + random.Random(at).randbytes(length) + data[at:], at, at


KINDS = ("bit", "cut", "zero", "delete", "append", "insert")


def check_recovery(source, tmp_path, name, kind, at, length, *, manifest):
    """Damage one file of a copy, recover, and check what came of it."""
    copy, output = tmp_path / "copy", tmp_path / "output"
    for path in (copy, output):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, copy)
    data, first, behind = damage((source / name).read_bytes(), kind, at, length)
    (copy / name).write_bytes(data)
    if not manifest:
        (copy / "logitstore.json").unlink()
    before, want = files(copy), content(source)
    undamaged, bordering = set(want), set()
    for start, end, ids in chunks(source, name):
        if (start < behind and first < end) if first < behind else start < first < end:
            undamaged -= set(ids)
        elif end == first:
            bordering = set(ids)  # without any digest left, it cannot be told that its last bytes are its own
    done = logitstore.recover(copy, output, teacher="t")
    assert files(copy) == before
    got = content(output)
    assert all(want[key] == value for key, value in got.items())
    assert undamaged - set(got) <= (bordering if kind in ("zero", "delete", "insert") else set())
    gone = set(want) - set(got)
    assert not gone or done.lost
    if done.lost_is_known:
        assert done.lost_sequences == len(gone)
    assert {name for each in done.lost for name in each.ids if name is not None} <= gone
    return done
