"""The map-style dataset: sequences by row, in workers too."""

import itertools
import multiprocessing
import pickle

import numpy as np
import pytest
from torch.utils.data import DataLoader

import logitstore
from logitstore.torch.loader import LogitDataset

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def ids_and_first_logprobs(sequences):
    return [(sequence.id, float(sequence.logprobs[0])) for sequence in sequences]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_style_dataset_by_row(write, workers):
    path = write(sequences=7)
    dataset = LogitDataset(path, columns=["logprobs", "tokens"])
    assert len(dataset) == 7
    expected = ids_and_first_logprobs(logitstore.open(path))
    assert ids_and_first_logprobs([dataset[np.int64(i)] for i in range(7)]) == expected
    assert ids_and_first_logprobs([pickle.loads(pickle.dumps(dataset))[6]]) == expected[6:]
    with pytest.raises(logitstore.NotSelectedError):
        _ = dataset[0].tail
    loader = DataLoader(dataset, batch_size=3, collate_fn=ids_and_first_logprobs, num_workers=workers)
    assert flat(loader) == expected


def test_rows_in_a_process_of_their_own(write):
    dataset = LogitDataset(write())
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert [s.id for s in pool.map(dataset.__getitem__, range(3))] == [dataset[i].id for i in range(3)]
