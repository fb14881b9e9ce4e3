"""logitstore: the file format and toolkit for teacher distributions.

```python
import logitstore

with logitstore.Writer("out", teacher="my/teacher") as writer:
    writer.add(tokens=tokens, ids=ids, logprobs=logprobs)
for sequence in logitstore.open("out"):
    ids, logprobs = sequence.dense(k=64)
```
"""

from logitstore._version import __version__
from logitstore.checks import Finding, is_valid, validate
from logitstore.dataset.commit import commit
from logitstore.dataset.divide import select, split
from logitstore.dataset.join import append, merge
from logitstore.dataset.reader import Dataset, open  # noqa: A004 - as zarr and tarfile name it
from logitstore.dataset.repack import repack
from logitstore.dataset.status import status
from logitstore.dataset.writer import Writer
from logitstore.errors import (
    CorruptDataError,
    DatasetExistsError,
    DatasetNotFoundError,
    IncompleteDatasetError,
    InvalidInputError,
    InvalidTypeError,
    LogitStoreError,
    LogitStoreWarning,
    MissingDependencyError,
    NotSelectedError,
    RemoteAccessError,
    RemoteError,
    RowIndexError,
    SequenceNotFoundError,
    SourceError,
    SourceNotFoundError,
    UnsupportedVersionError,
)
from logitstore.recovery import Lost, Recovered, recover
from logitstore.schema import Manifest, Source, Teacher
from logitstore.shard.sequence import Sequence
from logitstore.tokenizer import Tokenizer

__all__ = [
    "CorruptDataError",
    "Dataset",
    "DatasetExistsError",
    "DatasetNotFoundError",
    "Finding",
    "IncompleteDatasetError",
    "InvalidInputError",
    "InvalidTypeError",
    "LogitStoreError",
    "LogitStoreWarning",
    "Lost",
    "Manifest",
    "MissingDependencyError",
    "NotSelectedError",
    "Recovered",
    "RemoteAccessError",
    "RemoteError",
    "RowIndexError",
    "Sequence",
    "SequenceNotFoundError",
    "Source",
    "SourceError",
    "SourceNotFoundError",
    "Teacher",
    "Tokenizer",
    "UnsupportedVersionError",
    "Writer",
    "__version__",
    "append",
    "commit",
    "is_valid",
    "merge",
    "open",
    "recover",
    "repack",
    "select",
    "split",
    "status",
    "validate",
]
