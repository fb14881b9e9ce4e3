"""logitstore: the file format and toolkit for teacher distributions.

```python
import logitstore

with logitstore.Writer("out", teacher="my/teacher") as writer:
    writer.add(tokens=tokens, ids=ids, logprobs=logprobs)
for sequence in logitstore.open("out"):
    ids, logprobs = sequence.dense(k=64)
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from logitstore._version import __version__
from logitstore.checks import Finding, is_valid, validate
from logitstore.dataset.commit import commit
from logitstore.dataset.reader import Dataset, open  # noqa: A004 - as zarr and tarfile name it
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
from logitstore.schema import Manifest, Source, Teacher
from logitstore.shard.sequence import Sequence
from logitstore.tokenizer import Tokenizer

if TYPE_CHECKING:
    from logitstore.dataset.divide import select, split
    from logitstore.dataset.join import append, merge
    from logitstore.dataset.repack import repack
    from logitstore.recovery import Lost, Recovered, recover

_LATER = {
    "append": "dataset.join",
    "merge": "dataset.join",
    "repack": "dataset.repack",
    "select": "dataset.divide",
    "split": "dataset.divide",
    "Lost": "recovery",
    "Recovered": "recovery",
    "recover": "recovery",
}
"""What few programs use is imported when it is: `import logitstore` is to be fast."""


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"logitstore.{_LATER[name]}"), name)
    raise AttributeError(f"module 'logitstore' has no attribute {name!r}")


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
