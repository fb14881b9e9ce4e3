"""Samples and streams for the tests of the loader."""

import itertools

from logitstore.torch.loader import StreamingLogits
from logitstore.torch.source import Shuffled


class Rows:
    """Samples that are their own row numbers."""

    digest = "0" * 64
    tokenizer_digest = "f" * 64
    logit_width = 1000
    normalised = "vocabulary"

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        return row


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def dealt(streams, batch_size):
    """What a DataLoader makes of the samples of its workers: batches in turn, until all have ended."""
    streams = [iter(stream) for stream in streams]
    while streams:
        for stream in list(streams):
            batch = list(itertools.islice(stream, batch_size))
            if batch:
                yield batch
            if len(batch) < batch_size:
                streams.remove(stream)


def stream(size=23, batch_size=4, **options):
    return StreamingLogits(Shuffled(Rows(size), block=4, window=2), batch_size=batch_size, **options)
