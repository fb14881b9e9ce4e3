"""Whether two datasets can be looked at side by side."""

from __future__ import annotations

from logitstore.dataset.reader import Dataset
from logitstore.errors import InvalidInputError


def check_tokenizers(a: Dataset, b: Dataset) -> bool:
    """Whether the tokenizers of both are known; then they are the same.

    Raises:
        InvalidInputError: they are known to differ.
    """
    first, second = (None if d.info.tokenizer is None else d.info.tokenizer.digest for d in (a, b))
    if first is None or second is None:
        return False
    if first != second:
        raise InvalidInputError(
            f"the tokenizers differ, so that the same id is another token: {a.name} has {first[:16]}, {b.name} has "
            f"{second[:16]}; take two datasets of one vocabulary"
        )
    return True
