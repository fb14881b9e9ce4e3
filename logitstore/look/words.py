"""The text of a sequence as `show` and `view` have it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from logitstore.dataset.reader import Dataset
from logitstore.look.measures import COLUMNS
from logitstore.shard.sequence import Sequence
from logitstore.tokenizer import Tokenizer

PROMPT: Final = "prompt"
"""The column in which importers keep the text of a prompt whose tokens they do not know."""

SHADES: Final = (0.25, 0.75, 1.5, 2.25, 3.0, 4.0, 5.0)
"""Where the next shade of uncertainty begins, nats. Fixed, so that sequences look alike where they are alike."""


def to_be_read(dataset: Dataset) -> Dataset:
    """A view of a dataset with what is needed to show its sequences."""
    prompt = [PROMPT] if PROMPT in dataset.info.user_columns else []
    return dataset.select([*COLUMNS, *prompt])


def prompt_of(sequence: Sequence, tokenizer: Tokenizer | None) -> str | None:
    """The text for which the first token stands: an unknown one that an importer put in the place of a prompt."""
    prompt = vars(sequence).get("columns", {}).get(PROMPT)  # not there where no users' column was selected
    if not isinstance(prompt, str) or not prompt or tokenizer is None or len(sequence) == 0:
        return None
    return prompt if tokenizer.token_bytes(int(sequence.tokens[0])) is None else None


def name_of(dataset: Dataset) -> str:
    """What to call a dataset where its path is nobody's business: the last part of it."""
    path = dataset.path
    if isinstance(path, Path):
        name = path.resolve().name
    else:
        name = urlsplit(path).path.rstrip("/").rpartition("/")[2].partition("@")[0]  # without a revision
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", name) or "dataset"  # bytes that are no UTF-8
