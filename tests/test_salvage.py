"""Any one damage of any one file: all undamaged chunks are saved, none is another, and what is lost is said."""

import random
import shutil
import struct

import numpy as np
import pyarrow as pa
import pytest
import recover_data as data_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.shard.layout import MAGIC
from logitstore.shard.salvage import (
    find_digests,
    find_hashes,
    find_index,
    find_messages,
    find_tail,
    first_message,
    parse_chunk,
    parse_schema,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return data_of.write(tmp_path_factory.mktemp("source") / "data")


@pytest.fixture
def shard(source):
    name = data_of.shard_paths(source)[0]
    return (source / name).read_bytes(), data_of.chunks(source, name)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shard=st.integers(0, 3),
    kind=st.sampled_from(data_of.KINDS),
    at=st.floats(0, 1, exclude_max=True),
    length=st.sampled_from([1, 8, 200, 4096]),
    manifest=st.booleans(),
)
def test_one_damage_loses_what_it_touches_alone(tmp_path, source, shard, kind, at, length, manifest):
    name = data_of.shard_paths(source)[shard]
    place = int(at * (source / name).stat().st_size)
    data_of.check_recovery(source, tmp_path, name, kind, place, length, manifest=manifest)


@pytest.mark.slow
@pytest.mark.parametrize("manifest", [True, False])
def test_every_kind_of_damage_all_over_a_shard(tmp_path, source, manifest):
    name = data_of.shard_paths(source)[3]
    size = (source / name).stat().st_size
    for number, at in enumerate(range(0, size, 23)):
        kind, length = data_of.KINDS[number % 6], (1, 8, 200, 4096)[number // 6 % 4]
        data_of.check_recovery(source, tmp_path, name, kind, at, length, manifest=manifest)


def test_a_damaged_chunk_is_named_by_the_ids_of_its_sequences(tmp_path, source):
    name = data_of.shard_paths(source)[1]
    start, end, ids = data_of.chunks(source, name)[1]
    done = data_of.check_recovery(source, tmp_path, name, "bit", end - 9, 0, manifest=True)
    (lost,) = done.lost
    assert (lost.path, lost.chunk, lost.ids, lost.sequences) == (name, 1, tuple(ids), len(ids))
    assert lost.row == sum(len(each) for _, _, each in data_of.chunks(source, name)[:1])
    assert (done.shards_whole, done.shards_salvaged, done.unverified_chunks) == (3, 1, 0)
    done = data_of.check_recovery(source, tmp_path, name, "zero", start, 8, manifest=True)
    assert done.lost[0].ids == ()  # the message is none any more: only how many there were is known
    assert done.lost[0].sequences == len(ids)


def test_an_id_is_believed_only_with_its_hash(tmp_path, source):
    name = data_of.shard_paths(source)[0]
    start, end, ids = data_of.chunks(source, name)[2]
    at = (source / name).read_bytes().index(ids[0].encode(), start, end)
    done = data_of.check_recovery(source, tmp_path, name, "bit", at + 1, 0, manifest=True)
    assert done.lost[0].ids in ((None, *ids[1:]), ())


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("part", ["hashes", "index", "tail", "end mark"])
def test_damage_behind_the_chunks_loses_nothing(tmp_path, source, part, manifest):
    name = data_of.shard_paths(source)[0]
    data = (source / name).read_bytes()
    found = find_tail(memoryview(data))
    at = {
        "hashes": found.hashes_offset + 3,
        "index": found.index_offset + 40,
        "tail": len(data) - 60,
        "end mark": found.hashes_offset - 6,
    }[part]
    done = data_of.check_recovery(source, tmp_path, name, "bit", at, 3, manifest=manifest)
    assert (done.lost, done.unverified_chunks, done.sequences) == ((), 0, data_of.SEQUENCES)


def test_what_a_cut_leaves_without_digests_is_checked_and_counted(tmp_path, source):
    name = data_of.shard_paths(source)[0]
    start, _, _ = data_of.chunks(source, name)[2]
    done = data_of.check_recovery(source, tmp_path, name, "cut", start + 50, 1, manifest=True)
    assert done.unverified_chunks == 2
    (lost,) = done.lost
    assert (lost.chunk, lost.row) == (2, done.unverified_sequences)


def test_a_shard_that_was_cut_behind_its_last_chunk_is_made_whole_again(tmp_path, source):
    """The manifest's digest of the tail vouches for all of it: an index made anew leads to that very digest."""
    name = data_of.shard_paths(source)[0]
    done = data_of.check_recovery(
        source, tmp_path, name, "cut", data_of.chunks(source, name)[-1][1], 1, manifest=True
    )  # fmt: skip
    assert (done.lost, done.unverified_chunks) == ((), 0)


def test_what_is_left_of_an_index_tells_a_damaged_chunk(tmp_path, source):
    """The tail is cut off, and one chunk is damaged so that its rows are valid: the index has another digest of it."""
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    name = data_of.shard_paths(copy)[0]
    _, end, ids = data_of.chunks(copy, name)[1]
    data = bytearray((copy / name).read_bytes())
    data[end - 8] ^= 1  # of the user's column
    (copy / name).write_bytes(data[:-100])
    for number, manifest in enumerate((True, False)):
        if not manifest:
            (copy / "logitstore.json").unlink()
        done = logitstore.recover(copy, tmp_path / f"o{number}")
        assert set(data_of.content(source)) - set(data_of.content(tmp_path / f"o{number}")) == set(ids)
        assert done.unverified_chunks == 0
        assert len(done.lost) == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_schema_message_is_replaced(tmp_path, source, number):
    """By that of another shard; where there is none, by the one that the manifest gives, if it has the digest."""
    one = data_of.write(tmp_path / "one", range(8)) if number else source
    name = data_of.shard_paths(one)[0]
    for at in (2, 300, 900):
        done = data_of.check_recovery(one, tmp_path, name, "bit", at, 4, manifest=True)
        assert (done.lost, done.unverified_chunks) == ((), 0)


def test_the_parts_of_a_shard_are_found_again(shard):
    data, chunks = shard
    view = memoryview(data)
    tail = find_tail(view)
    assert (tail.end, tail.shift) == (len(data), 0)
    assert len(find_index(view, tail)) == len(chunks)
    assert len(find_hashes(view, tail)) == sum(len(ids) for *_, ids in chunks)
    found = list(find_messages(view))
    assert [(m.offset, m.offset + m.length) for m in found] == [(start, end) for start, end, _ in chunks]
    assert all(message.bounded for message in found)
    assert find_digests(view, chunks[-1][1], {m.digest for m in found} | {bytes(16)}) == {m.digest for m in found}
    schema = first_message(view)
    assert parse_schema(schema)[1].logit_width == 300
    start, end, ids = chunks[0]
    assert parse_chunk(schema, pa.py_buffer(data[start:end])).ids() == ids
    moved = memoryview(b"x" * 13 + data + b"y" * 7)
    assert find_tail(moved).shift == 13
    assert [m.offset for m in find_messages(moved)] == [start + 13 for start, *_ in chunks]
    assert find_digests(moved, 0, {found[0].digest}) == {found[0].digest}


def test_nothing_in_a_file_of_garbage_takes_long_or_much(shard):
    """Beginnings of messages all over it, each of which claims all the rest; tails all over it; one byte all over it."""
    data, chunks = shard
    start, end, _ = chunks[0]
    head = bytearray(data[start:end][:1024])
    place = head.index(struct.pack("<q", end - start - 8 - struct.unpack_from("<I", head, 4)[0]))
    head[place : place + 8] = struct.pack("<q", 2**20)
    for garbage in (
        bytes(head) * 4000,
        MAGIC * 400_000,
        b"\xff" * 4_000_000,
        b"\xff\xff\xff\xff\x00\x04\x00\x00" * 400_000,
    ):
        view = memoryview(garbage)
        assert find_tail(view) is None
        assert len(list(find_messages(view))) <= 10_000
        assert find_digests(view, 0, {b"\xff" * 16}) in (set(), {b"\xff" * 16})


def test_garbage_ends_in_our_errors_alone(tmp_path, source):
    choose = random.Random(1)
    good = (source / data_of.shard_paths(source)[0]).read_bytes()
    for number in range(12):
        path = tmp_path / f"g{number}"
        (path / "data" / "train").mkdir(parents=True)
        for file in range(2):
            data = bytearray(good)
            for _ in range(choose.choice([3, 40, 400])):
                data[choose.randrange(len(data))] = choose.randrange(256)
            (path / "data" / "train" / f"train-{file:05d}.arrow").write_bytes(data)
        if number % 3 == 0:
            (path / "logitstore.json").write_bytes(choose.randbytes(300))
        if number % 3 == 1:
            (path / "parts" / "train-00000-of-00001").mkdir(parents=True)
            (path / "parts" / "train-00000-of-00001" / "journal").write_bytes(choose.randbytes(3000))
        try:
            done = logitstore.recover(path, tmp_path / f"o{number}")
        except logitstore.LogitStoreError:
            assert not (tmp_path / f"o{number}").exists()
        else:
            assert done.sequences == len(logitstore.open(tmp_path / f"o{number}"))


def test_sums_that_were_made_anew_are_those_of_numpy(shard):
    data, _ = shard
    tail = find_tail(memoryview(data))
    index = find_index(memoryview(data), tail)
    assert int(np.sum(index["positions"])) == tail.tail.positions
