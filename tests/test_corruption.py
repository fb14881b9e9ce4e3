"""Over every bit and every truncation, a read gives the exact data or one `CorruptDataError`; nothing else.

Here a sample; `test_every_bit_and_every_length` (marked slow, part of CI) goes through all of them.
"""

import json
import shutil
import warnings

import numpy as np
import pyarrow as pa
import pytest

import logitstore
from logitstore.dataset.shards import open_shard
from logitstore.io import LocalStore
from logitstore.schema.manifest import MANIFEST_NAME
from logitstore.shard.sequence import SEQUENCE_COLUMNS

SAMPLE = 8_000


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A dataset with one shard of about 4 KB: every encoding, two chunks, optional and users' columns."""
    path = tmp_path_factory.mktemp("victim") / "data"
    random = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        with logitstore.Writer(path, teacher="t", logit_width=300, chunk_candidates=80) as writer:
            for i in range(4):
                ids = np.stack([random.permutation(300)[:6] for _ in range(5)])
                logprobs = -np.cumsum(random.uniform(0.1, 1, (5, 6)), axis=1) - 2
                tokens = random.integers(0, 300, 5)
                if i == 1:
                    writer.add_draws(tokens, ids, np.full(ids.shape, 5), 30, text="drawn")
                elif i == 2:
                    logits = np.round(logprobs * 4) / 4
                    lse = np.log(np.exp(logits).sum(axis=1)) + 1
                    writer.add(tokens, ids, logits - lse[:, None], logsumexp=lse, text="bfloat16")
                else:
                    writer.add(tokens, ids, logprobs, entropy=[1.0] * 5, loss_mask=[0, 1, 1, 1, 0], text="grid")
    (shard,) = logitstore.open(path).info.shards
    assert 3500 < shard.bytes < 5000
    return path


def everything(path):
    """All that a reader gives, as comparable bytes."""
    dataset = logitstore.open(path)
    out = [repr(dataset.info)]
    for sequence in dataset.select([*SEQUENCE_COLUMNS, *dataset.info.user_columns]):
        fields = sorted(vars(sequence).items())
        out += [v.dtype.str + v.tobytes().hex() if isinstance(v, np.ndarray) else repr(v) for _, v in fields]
        out.append(dataset.by_id(sequence.id).id)
    return out


def read_mutated(path, name, data, expected, what):
    (path / name).write_bytes(data)
    try:
        found = everything(path)
    except logitstore.CorruptDataError as error:
        assert error.path is not None, what
        assert str(path) in str(error), what
        return "refused"
    assert found == expected, what
    return "exact"


def mutate(tmp_path, victim, name, which):
    """Apply mutations, given as bit numbers and, negative, lengths to cut to."""
    path = tmp_path / "copy"
    shutil.copytree(victim, path)
    expected = everything(path)
    data = (path / name).read_bytes()
    seen = {"refused": 0, "exact": 0}
    for mutation in which:
        if mutation < 0:
            seen[read_mutated(path, name, data[: -mutation - 1], expected, f"cut to {-mutation - 1}")] += 1
            continue
        broken = bytearray(data)
        broken[mutation // 8] ^= 1 << mutation % 8
        seen[read_mutated(path, name, bytes(broken), expected, f"bit {mutation % 8} of byte {mutation // 8}")] += 1
    return seen


def all_mutations(victim, name):
    size = (victim / name).stat().st_size
    return np.concatenate([np.arange(size * 8), -1 - np.arange(size)])


def names(victim):
    return [MANIFEST_NAME, logitstore.open(victim).info.shards[0].path]


@pytest.mark.parametrize("which", [0, 1], ids=["manifest", "shard"])
def test_a_sample_of_bits_and_lengths(tmp_path, victim, which):
    name = names(victim)[which]
    mutations = all_mutations(victim, name)
    share = SAMPLE // 4 if which == 0 else SAMPLE * 3 // 4
    sample = np.random.default_rng(1).choice(mutations, min(share, len(mutations)), replace=False)
    seen = mutate(tmp_path, victim, name, sample.tolist())
    assert seen["exact"] < len(sample) / 100  # Arrow's end mark, which reading does not need


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("which", [0, 1], ids=["manifest", "shard"])
def test_every_bit_and_every_length(tmp_path, victim, which, part):
    name = names(victim)[which]
    mutations = all_mutations(victim, name)[part::4].tolist()
    seen = mutate(tmp_path, victim, name, mutations)
    assert seen["refused"] + seen["exact"] == len(mutations)
    assert seen["exact"] <= 64 * (which == 1)  # the 8 bytes of Arrow's end mark


def test_damage_names_file_chunk_and_offset(tmp_path, victim):
    path = tmp_path / "copy"
    shutil.copytree(victim, path)
    (info,) = logitstore.open(path).info.shards
    shard = open_shard(LocalStore(path), info, logitstore.open(path).info)
    offset = int(shard.index["offset"][1])
    data = bytearray((path / info.path).read_bytes())
    data[offset + 100] ^= 1
    (path / info.path).write_bytes(data)
    dataset = logitstore.open(path)
    assert dataset[0].id == "0"
    with pytest.raises(logitstore.CorruptDataError) as caught:
        list(dataset)
    assert (caught.value.path, caught.value.chunk, caught.value.offset) == (str(path / info.path), 1, offset)
    assert caught.value.code == "chunk-digest"
    assert isinstance(caught.value, ValueError)


def test_a_shard_of_another_dataset_is_refused(tmp_path, victim, write):
    path = tmp_path / "copy"
    shutil.copytree(victim, path)
    name = logitstore.open(path).info.shards[0].path
    other = write(sequences=1)
    shutil.copy(other / name, path / name)
    with pytest.raises(logitstore.CorruptDataError, match="bytes"):
        logitstore.open(path)[0]


def test_random_bytes_are_refused(tmp_path, victim):
    path = tmp_path / "copy"
    shutil.copytree(victim, path)
    (info,) = logitstore.open(path).info.shards
    random = np.random.default_rng(0)
    for size in (0, 1, 100, info.bytes):
        (path / info.path).write_bytes(random.bytes(size))
        with pytest.raises(logitstore.CorruptDataError):
            logitstore.open(path)[0]
        (path / MANIFEST_NAME).replace(tmp_path / "keep")
        (path / MANIFEST_NAME).write_bytes(random.bytes(size))
        with pytest.raises(logitstore.CorruptDataError):
            logitstore.open(path)
        (tmp_path / "keep").replace(path / MANIFEST_NAME)


def test_nested_and_huge_json_is_refused(tmp_path):
    import hashlib

    for body in (
        b'{"a": ' + b"[" * 100_000,
        b"{" + b'"a":{' * 5000,
        b'{"format": "logitstore", "version": ' + b"9" * 5000,
    ):
        seal = b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'
        (tmp_path / MANIFEST_NAME).write_bytes(body + seal)
        with pytest.raises(logitstore.CorruptDataError):
            logitstore.open(tmp_path)


def test_a_directory_or_device_in_place_of_a_file_is_refused(tmp_path, victim):
    path = tmp_path / "copy"
    shutil.copytree(victim, path)
    (info,) = logitstore.open(path).info.shards
    (path / info.path).unlink()
    (path / info.path).mkdir()
    with pytest.raises(logitstore.CorruptDataError, match="not a regular file"):
        logitstore.open(path)[0]
    (path / info.path).rmdir()
    (path / info.path).symlink_to("/dev/zero")
    with pytest.raises(logitstore.CorruptDataError, match="not a regular file"):
        logitstore.open(path)[0]


def test_versions_and_features_from_the_future_are_named(tmp_path, victim):
    from logitstore.schema import manifest as module

    info = logitstore.open(victim).info
    body = json.loads(module.serialise_manifest(info))
    for change, says in (
        ({"version": "2.0"}, r"format version 2\.0.*install the release that wrote it"),
        ({"features": {"required": ["sorting"], "optional": []}}, "the feature 'sorting'"),
    ):
        import hashlib

        text = json.dumps({**body, **change}, indent=1)
        text = text[: text.index(',\n "sha256": "' + body["sha256"])]
        seal = f',\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'
        (tmp_path / MANIFEST_NAME).write_text(text + seal)
        with pytest.raises(logitstore.UnsupportedVersionError, match=says):
            logitstore.open(tmp_path)
    text = json.dumps({**body, "version": "1.7", "features": {"optional": ["x"]}, "later": 1}, indent=1)
    head = json.loads(text)
    head.pop("sha256")
    text = json.dumps(head, indent=1).removesuffix("\n}")
    (tmp_path / MANIFEST_NAME).write_text(text + f',\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n')
    assert logitstore.open(tmp_path).info.totals == info.totals


def test_forged_messages_do_not_crash(tmp_path, victim):
    """Arrow messages changed at random, with digests made to fit: exact, other or refused, but never a crash."""
    from logitstore.io import MappedFile
    from logitstore.shard.layout import digest
    from logitstore.shard.reader import Shard

    (info,) = logitstore.open(victim).info.shards
    shard = Shard(MappedFile(victim / info.path))
    data = (victim / info.path).read_bytes()
    random = np.random.default_rng(2)

    class Forged:
        path, size, opening, mapped = "forged", len(data), len(data), True

        def __init__(self, changed):
            self.buffer = pa.py_buffer(changed)

        def read(self, offset, length, _accept):
            return self.buffer.slice(offset, length)

    refused = 0
    for _ in range(3000):
        number = int(random.integers(len(shard.index)))
        offset, length = int(shard.index["offset"][number]), int(shard.index["length"][number])
        changed = bytearray(data)
        for _ in range(int(random.integers(1, 4))):
            changed[offset + int(random.integers(min(length, 1500)))] = int(random.integers(256))
        opened = Shard(Forged(bytes(changed)))
        opened.index = opened.index.copy()
        opened.index["digest"][number] = np.void(digest(changed[offset : offset + length]))
        try:
            list(opened.chunk(number).sequences(frozenset(SEQUENCE_COLUMNS)))
        except logitstore.LogitStoreError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize("width", [10, 2**21])
def test_ids_outside_the_logit_width_are_refused_in_every_row(tmp_path, width):
    """An id of the token order, one behind it, and one that wraps: in the first row of a chunk and in later ones."""
    from logitstore.encoding.values import Encoding, Values
    from logitstore.io import MappedFile
    from logitstore.schema import ShardHeader, serialise_header
    from logitstore.shard.chunk import StoredSequence, shard_schema
    from logitstore.shard.reader import Shard
    from logitstore.shard.writer import ShardWriter

    header = ShardHeader(
        version="1.0", pco="4.1", logit_width=width, normalised="vocabulary", temperature=1.0, resolution=1 / 32
    )
    grid = Values(Encoding.GRID, np.full(1, -1, np.float32), np.full(1, 8, np.uint16))

    def row(name, *ids):
        return StoredSequence(name, np.zeros(1, np.uint32), np.full(1, 2, np.uint32), np.array(ids, np.uint32), grid)

    rows = [row("good", 1, 2), row("often", 3, width), row("often again", 4, width), row("once", 5, width + 7)]
    rows += [row("negative", 6, 2**31 + 5), row("negative again", 7, 2**31 + 5), row("good again", 1, 2)]
    writer = ShardWriter(tmp_path / "s.arrow", shard_schema(serialise_header(header), []))
    writer.write(rows, [])
    writer.seal()
    writer.publish()
    wanted = frozenset(["ids"])
    for first in range(len(rows)):
        chunk = Shard(MappedFile(tmp_path / "s.arrow")).chunk(0)
        for place in (first, *range(len(rows))):
            if rows[place].id.startswith("good"):
                assert chunk.sequence(place, wanted).ids.tolist() == [1, 2]
            else:
                with pytest.raises(logitstore.CorruptDataError, match="id"):
                    chunk.sequence(place, wanted)
