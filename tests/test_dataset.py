"""Reading: rows, slices, ids, splits, columns; in processes and threads; and memory and files held."""

import multiprocessing
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import logitstore


@pytest.fixture
def dataset(write):
    return logitstore.open(write(sequences=20, chunk_candidates=300, shard_bytes=6000, per_sequence=lambda i: {"n": i}))


def test_rows_and_slices(dataset):
    assert len(dataset.info.shards) > 2
    assert [dataset[i].id for i in (0, 7, -1)] == ["0", "7", "19"]
    assert dataset[np.int64(3)].id == "3"
    assert [s.id for s in dataset[4:7]] == ["4", "5", "6"]
    assert [s.id for s in dataset[::-6]] == ["19", "13", "7", "1"]
    assert dataset[2:10][3].id == "5"
    assert len(dataset[30:]) == 0
    for row in (20, -21):
        with pytest.raises(IndexError, match=f"no row {row}: the rows are 0 to 19"):
            dataset[row]


def test_iteration_reads_chunk_by_chunk(dataset):
    chunks = list(dataset.chunks())
    assert [s.id for chunk in chunks for s in chunk] == [str(i) for i in range(20)]
    assert all(sum(len(s.ids) for s in chunk) <= 300 for chunk in chunks)
    assert len(chunks) > 5


def test_by_id(dataset):
    assert dataset.by_id("13").columns == {"n": 13}
    for missing in ("20", "", "13 "):
        with pytest.raises(KeyError, match="no sequence has the id"):
            dataset.by_id(missing)
    with pytest.raises(logitstore.SequenceNotFoundError):
        dataset[:5].by_id("13")


def test_splits(write):
    dataset = logitstore.open(write(split="valid"))
    assert dataset.splits == ("valid",)
    assert len(dataset.split("valid")) == len(dataset)
    assert [s.id for s in dataset[::-2].split("valid")] == ["5", "3", "1"]
    with pytest.raises(ValueError, match="there are: valid"):
        dataset.split("train")


def test_columns(dataset):
    tokens = dataset.select(["tokens"])
    assert tokens.columns == ("tokens",)
    assert set(vars(tokens[0])) == {"id", "normalised", "tokens"}
    with pytest.raises(AttributeError, match="'ids' was not selected"):
        _ = tokens[0].ids
    with pytest.raises(AttributeError, match="no attribute 'idz'"):
        _ = tokens[0].idz
    assert set(vars(dataset.select(["logprobs", "n"])[0])) == {
        "id",
        "normalised",
        "count",
        "offsets",
        "logprobs",
        "columns",
    }
    assert dataset.select("n")[3].columns == {"n": 3}
    with pytest.raises(ValueError, match="no column is called 'nope'"):
        dataset.select(["nope"])


def test_selected_columns_alone_are_decoded(dataset, monkeypatch):
    from logitstore.encoding.cells import CellDecoder

    decoded = []
    decode = CellDecoder.decode
    monkeypatch.setattr(CellDecoder, "decode", lambda self, cell, n, t: decoded.append(n) or decode(self, cell, n, t))
    whole = len(dataset[5].ids)
    n = len(decoded)
    dataset.select(["tokens"])[5]
    assert len(decoded) == n + 1  # the tokens; the chunk's token order is remembered
    assert whole not in decoded[n:]


def test_lengths(dataset):
    whole = [len(sequence) for sequence in dataset]
    lengths = dataset.lengths()
    assert lengths.dtype == np.uint32
    assert lengths.tolist() == whole
    for view in (slice(0), slice(3, 4), slice(5, 17), slice(2, None, 3), slice(None, None, -1), slice(18, 3, -4)):
        assert dataset[view].lengths().tolist() == whole[view]
    assert dataset[::7][1:].select(["tokens"]).lengths().tolist() == whole[::7][1:]


def test_lengths_of_splits_and_of_empty_sequences(tmp_path, quiet):
    with logitstore.Writer(tmp_path / "d") as writer:
        for length in (2, 0, 3, 0):
            writer.add(np.zeros(length, int), np.zeros((length, 1), int), np.full((length, 1), -1.0))
    dataset = logitstore.open(tmp_path / "d")
    assert dataset.lengths().tolist() == [2, 0, 3, 0]
    assert dataset.split("train")[1:].lengths().tolist() == [0, 3, 0]
    assert dataset[4:].lengths().tolist() == []


def test_lengths_decode_no_cell_of_a_sequence_and_touch_only_the_shards_of_the_view(dataset, monkeypatch):
    from logitstore.shard.chunk import _Row

    monkeypatch.setattr(_Row, "cell", lambda *_: pytest.fail("a cell was decoded"))
    assert sum(dataset.lengths()) == dataset.info.totals.positions
    last = dataset.info.shards[-1]
    (dataset.path / last.path).unlink()
    again = logitstore.open(dataset.path)
    assert len(again[: -last.sequences].lengths()) == 20 - last.sequences
    with pytest.raises(logitstore.CorruptDataError, match="the shard is missing"):
        again.lengths()


def test_lengths_come_from_verified_chunks(dataset):
    shard = dataset.path / dataset.info.shards[1].path
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(logitstore.CorruptDataError, match="digest") as caught:
        dataset.lengths()
    assert caught.value.path == str(shard)


def test_opening_touches_the_manifest_alone(dataset, write):
    for shard in dataset.info.shards:
        (dataset.path / shard.path).unlink()
    again = logitstore.open(dataset.path)
    assert again.info == dataset.info
    with pytest.raises(logitstore.CorruptDataError, match="the shard is missing"):
        again[0]


def test_missing_and_unfinished_datasets(tmp_path):
    with pytest.raises(logitstore.DatasetNotFoundError, match=r"no logitstore\.json"):
        logitstore.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        logitstore.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(logitstore.DatasetNotFoundError):
        logitstore.open(tmp_path / "file")
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "train-00000.arrow.partial").touch()
    with pytest.raises(logitstore.IncompleteDatasetError, match="still being written"):
        logitstore.open(tmp_path)


def total(dataset):
    return sum(int(sequence.ids.sum()) for sequence in dataset)


def test_pickles(dataset):
    _ = dataset[3]
    again = pickle.loads(pickle.dumps(dataset[2:9]))
    assert [s.id for s in again] == [s.id for s in dataset[2:9]]
    sequence = pickle.loads(pickle.dumps(dataset.select(["ids"])[0]))
    assert sequence.ids.tolist() == dataset[0].ids.tolist()
    with pytest.raises(logitstore.NotSelectedError):
        _ = sequence.tokens


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(dataset, method):
    expected = total(dataset)  # shards are open and verified before the processes start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, which is what is tested
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(total, [dataset] * 4) == [expected] * 4


def test_threads(dataset):
    expected = total(dataset)
    fresh = logitstore.open(dataset.path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(total, [fresh] * 16)) == [expected] * 16


def test_errors_pickle(dataset):
    error = logitstore.CorruptDataError("why", code="cell", path="p", chunk=1, offset=2, row=3)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))
    assert str(error) == "p, chunk 1, row 3, byte 2: why"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts file descriptors in /proc")
def test_open_shards_hold_no_file_descriptors(write):
    dataset = logitstore.open(write(sequences=40, shard_bytes=1, chunk_candidates=1))
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert len(dataset.info.shards) == 40
    _ = list(dataset)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_at_most_a_thousand_shards_stay_open(write, monkeypatch):
    monkeypatch.setattr("logitstore.dataset.shards._OPEN_SHARDS", 5)
    dataset = logitstore.open(write(sequences=30, shard_bytes=1, chunk_candidates=1))
    assert [s.id for s in dataset] == [str(i) for i in range(30)]
    assert len(dataset._shards._open) <= 5


def test_memory_is_in_proportion_to_a_chunk(write):
    """Reading a dataset of 120 MB of decoded arrays takes a few MB: in a process of its own."""
    path = write(sequences=160, positions=512, k=64, chunk_candidates=2**17)
    script = (
        "import sys, resource, logitstore\n"
        "ds = logitstore.open(sys.argv[1])\n"
        "_ = ds[0]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "n = sum(len(s.ids) for s in ds)\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    candidates, kilobytes = (int(word) for word in done.stdout.split())
    assert candidates > 160 * 512 * 64
    scale = 1024 if sys.platform == "darwin" else 1
    assert kilobytes / scale < 40_000


def test_arrow_readers_see_ids_lengths_and_users_columns(dataset):
    import pyarrow as pa

    for info in dataset.info.shards:
        with pa.OSFile(str(dataset.path / info.path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        assert table.num_rows == info.sequences
        assert sum(table["length"].to_pylist()) == info.positions
        assert [str(n) for n in table["n"].to_pylist()] == table["id"].to_pylist()
