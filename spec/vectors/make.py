"""Writes golden vectors that are not there yet; never one that is.

`python spec/vectors/make.py` makes, for each function below, a dataset `v1/NAME/` and what a reader must give for it,
`v1/NAME.json`. Every later release must read them. A new case gets a new name.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import logitstore
from logitstore.schema import FORMAT_VERSION
from logitstore.shard.sequence import SEQUENCE_COLUMNS

HERE = Path(__file__).parent
LONG = 500
"""Arrays of more values are given by length and sha256 of their little-endian bytes."""

Case = Callable[[Path], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register a case under its function's name."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


def rows(seed: int, positions: int, k: int, width: int = 1000) -> tuple[Any, Any, Any]:
    """(tokens, ids, logprobs) with falling logprobs and some mass left, the same on every machine."""
    state = np.random.Generator(np.random.PCG64(seed))
    ids = np.stack([state.permutation(width)[:k] for _ in range(positions)]) if positions else np.empty((0, k), int)
    steps = state.integers(1, 2**12, (positions, k)).astype(np.float64) / 2**10
    logprobs = -0.25 - math.log(k) / 2 - np.cumsum(steps, axis=1) / 2
    logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True)) + 0.0625 if positions else 0
    return state.integers(0, width, positions), ids, logprobs.astype(np.float32)


@case
def empty_dataset(path: Path) -> None:
    with logitstore.Writer(path, teacher="t", logit_width=10):
        pass


@case
def empty_sequence(path: Path) -> None:
    with logitstore.Writer(path, logit_width=10) as writer:
        writer.add([], np.empty((0, 3), int), np.empty((0, 3), np.float32), id="nothing")
        writer.add([1], [[4, 2]], np.log([[0.5, 0.25]]), id="something")


@case
def no_candidates(path: Path) -> None:
    with logitstore.Writer(path, logit_width=10) as writer:
        writer.add([1, 2, 3], [], [], count=[0, 0, 0])


@case
def ragged_counts(path: Path) -> None:
    tokens, ids, logprobs = rows(1, 7, 6)
    count = np.array([3, 0, 6, 1, 0, 2, 5])
    keep = np.arange(6) < count[:, None]
    with logitstore.Writer(path, logit_width=1000) as writer:
        writer.add(tokens, ids[keep], logprobs[keep], count=count, loss_mask=[0, 0, 1, 1, 1, 1, -1])


@case
def one_candidate(path: Path) -> None:
    tokens, ids, logprobs = rows(2, 20, 8)
    with logitstore.Writer(path, logit_width=1000, top_k=1) as writer:
        writer.add(tokens, ids, logprobs)


@case
def many_candidates(path: Path) -> None:
    """70,000 candidates at one position: more than 16 bits count."""
    n = 70_000
    logprobs = -np.arange(n) / 2**13 - 12.0
    with logitstore.Writer(path, logit_width=262_144, values="grid") as writer:
        writer.add([262_143, 5], 262_143 - np.arange(n), logprobs.astype(np.float32), count=[n, 0])


@case
def highest_id(path: Path) -> None:
    """Ids up to logit width - 1 of a vocabulary of 262,144; a token beyond it."""
    tokens, ids, logprobs = rows(3, 16, 4, 100)
    with logitstore.Writer(path, logit_width=262_144) as writer:
        writer.add(262_144 - tokens, 262_143 - ids, logprobs)


@case
def wide_gaps(path: Path) -> None:
    """Gaps of more than 65,535 steps."""
    with logitstore.Writer(path, logit_width=10, values="grid") as writer:
        writer.add([1, 2], [[1, 2, 3], [4, 5, 6]], [[-0.5, -2100.0, -5000.25], [-0.125, -3.0, -2400.0]])


@case
def zero_probability(path: Path) -> None:
    """Candidates given as -inf are not stored."""
    inf = -np.inf
    with logitstore.Writer(path, logit_width=10) as writer:
        writer.add([1, 2, 3], [[1, 2, 3], [0, 0, 0], [4, 0, 0]], [[-1.0, inf, -1.5], [inf] * 3, [-0.25, inf, inf]])


@case
def no_tail(path: Path) -> None:
    tokens, ids, logprobs = rows(4, 12, 5)
    with logitstore.Writer(path, logit_width=1000, normalised="candidates") as writer:
        writer.add(tokens, ids, logprobs)


@case
def tails(path: Path) -> None:
    """Given tails, no tail, and a tail of log 0."""
    p = np.log([[0.5, 0.25], [0.5, 0.25], [0.5, 0.5]])
    with logitstore.Writer(path, logit_width=10) as writer:
        writer.add([1, 2, 3], [[1, 2], [3, 4], [5, 6]], p, tail=[np.log(0.25), np.nan, -np.inf])


@case
def bfloat16_logits_across_zero(path: Path) -> None:
    logits = np.array(
        [[1.5, 0.0, -0.75, -3.0], [-0.0, -0.125, -8.0, -9.5], [0.25, 2**-130, -(2**-130), -1.0]], np.float32
    )
    bits = (logits.view(np.uint32) >> 16).astype(np.uint16)
    with logitstore.Writer(path) as writer:
        writer.add_logits([0, 2, 3], bits[:, [2, 0, 3, 1]])


@case
def bfloat16_from_logprobs(path: Path) -> None:
    """Logprobs whose logits are found by an anchor."""
    state = np.random.Generator(np.random.PCG64(5))
    logits = -np.sort(-np.round(state.normal(18, 4, (9, 16)) * 8) / 8)
    logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.125).astype(np.float32)
    with logitstore.Writer(path, logit_width=1000, values="bfloat16") as writer:
        writer.add(state.integers(0, 1000, 9), np.stack([state.permutation(1000)[:16] for _ in range(9)]), logprobs)


@case
def float16_values(path: Path) -> None:
    tokens, ids, logprobs = rows(6, 10, 6)
    with logitstore.Writer(path, logit_width=1000, values="float16") as writer:
        writer.add(tokens, ids, logprobs)


@case
def float32_values(path: Path) -> None:
    tokens, ids, logprobs = rows(7, 10, 6)
    with logitstore.Writer(path, logit_width=1000, values="float32") as writer:
        writer.add(tokens, ids, logprobs)


@case
def coarse_grid(path: Path) -> None:
    tokens, ids, logprobs = rows(8, 10, 6)
    with logitstore.Writer(path, logit_width=1000, values="grid", resolution=1 / 8, temperature=0.5) as writer:
        writer.add(tokens, ids, logprobs)


@case
def draws(path: Path) -> None:
    state = np.random.Generator(np.random.PCG64(9))
    with logitstore.Writer(path, logit_width=1000) as writer:
        for _ in range(2):
            drawn = np.minimum(np.floor(-np.log(1 - state.random((8, 50))) * 40), 999).astype(int)
            ids = [np.unique(row, return_counts=True) for row in drawn]
            count = [len(i) for i, _ in ids]
            writer.add_draws(
                state.integers(0, 1000, 8), np.concatenate([i for i, _ in ids]), np.concatenate([n for _, n in ids]),
                50, count=count,
            )  # fmt: skip


@case
def several_encodings_and_chunks(path: Path) -> None:
    """Twelve sequences in several chunks and shards, each encoding among them."""
    with logitstore.Writer(path, logit_width=1000, chunk_candidates=200, shard_bytes=6000) as writer:
        for i in range(12):
            tokens, ids, logprobs = rows(10 + i, 5 + i, 8)
            if i % 3 == 2:
                writer.add_draws(tokens, ids, np.full(ids.shape, i), 8 * i)
            elif i % 3 == 1:
                logits = np.round(logprobs * 4) / 4
                lse = np.log(np.exp(logits).sum(axis=1)) + 0.5
                writer.add(tokens, ids, logits - lse[:, None], logsumexp=lse)
            else:
                writer.add(tokens, ids, logprobs)


@case
def tokens_beyond_the_logit_width(path: Path) -> None:
    """Placeholders in the input that the head cannot predict."""
    with logitstore.Writer(path, logit_width=10) as writer:
        writer.add([1, 10, 12, 2**31 - 1], [[1, 9]] * 4, [[-0.5, -2.0]] * 4)


@case
def empty_positions_under_every_encoding(path: Path) -> None:
    """Counts of 0 first, in the middle and last."""
    count = [0, 4, 0, 0, 5, 0]
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    logits = np.array([20.0, 18.5, 18.375, 3.5, -1.0, -1.5, -2.25, -9.0, -33.0])
    logprobs = logits - np.repeat([20.5, -0.25], [4, 5])
    lse = [np.nan, 20.5, np.nan, np.nan, -0.25, np.nan]
    with logitstore.Writer(path, logit_width=10) as writer:
        writer.add([1] * 6, ids, logprobs, count=count, logsumexp=lse, id="bfloat16")
        writer.add([1] * 6, ids, logprobs - 0.01 * np.arange(9), count=count, id="grid")
        writer.add_draws([1] * 6, ids, [5, 1, 3, 1, 2, 2, 2, 2, 2], 10, count=count, id="draws, with ties")


@case
def full_token_order(path: Path) -> None:
    """More ids occur twice than the order holds."""
    ids = np.tile(np.arange(5000), 2).reshape(2, 5000) * 7
    logprobs = np.tile(-np.log(5000.0) - 0.125 - np.arange(5000) / 2**12, (2, 1))
    with logitstore.Writer(path, logit_width=35_000) as writer:
        writer.add([0, 7], ids, logprobs.astype(np.float32))


@case
def unicode_ids(path: Path) -> None:
    names = ["", "ascii", "naïve", "日本語", "🇫🇷", "a\u0301", "\x00\n", "x" * 300]
    with logitstore.Writer(path, logit_width=10) as writer:
        for i, name in enumerate(names):
            writer.add([i], [[i]], [[-0.5]], id=name)


@case
def user_columns(path: Path) -> None:
    """Text, numbers, lists, structs, dictionaries decoded, and missing values."""
    kinds = pa.schema(
        [
            pa.field("text", pa.utf8()),
            pa.field("score", pa.float64()),
            pa.field("spans", pa.list_(pa.int32())),
            pa.field("meta", pa.struct([("source", pa.dictionary(pa.int8(), pa.utf8())), ("year", pa.int16())])),
        ]
    )
    with logitstore.Writer(path, logit_width=10, columns=kinds) as writer:
        meta = {"source": "wiki", "year": 2026}
        writer.add([1, 2], [[3], [4]], [[-0.5], [-1.0]], text="Grüße 👋", score=0.5, spans=[1, 2, 3], meta=meta)
        writer.add([1], [[3]], [[-0.5]], text="", spans=[], meta={"source": None, "year": 1})
        writer.add([1], [[3]], [[-0.5]])


@case
def optional_columns(path: Path) -> None:
    tokens, ids, logprobs = rows(30, 6, 4)
    nan = np.nan
    with logitstore.Writer(path, logit_width=1000) as writer:
        writer.add(
            tokens, ids, logprobs,
            target_logprob=[-1.5, nan, -0.125, -np.inf, -20, nan], target_rank=[3, 0, 1, 900, 70_000, 0],
            logsumexp=[18.25, 17, 16.5, nan, 3, -2], entropy=[0, 1.5, 2.25, nan, 6, 12], loss_mask=[0, 0, 1, 1, -1, 0],
        )  # fmt: skip
        writer.add(tokens, ids, logprobs)


@case
def tokenizer_and_unknown_width(path: Path) -> None:
    pieces = {1: b"a", 7: b" blue", 9: b"\xf0\x9f", 12: b""}
    with logitstore.Writer(path, tokenizer=logitstore.Tokenizer.from_pieces(pieces)) as writer:
        writer.add([1, 7], [[7, 9], [1, 2**31 - 1]], [[-0.5, -2], [-0.25, -3]])


def as_json(value: Any) -> Any:
    """An array or value of a sequence as JSON: NaN as null, infinities as text, long arrays by their digest."""
    if isinstance(value, np.ndarray):
        if len(value) > LONG:
            data = value.astype(value.dtype.newbyteorder("<")).tobytes()
            return {
                "dtype": value.dtype.name,
                "length": len(value),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        return [as_json(item) for item in value.tolist()]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        return "-inf" if value < 0 else "inf"
    return value


def expected(path: Path) -> dict[str, Any]:
    """What a reader gives for a dataset."""
    dataset = logitstore.open(path)
    info = dataset.info
    dataset = dataset.select([*SEQUENCE_COLUMNS, *info.user_columns])
    sequences = []
    for sequence in dataset:
        fields = {name: as_json(getattr(sequence, name)) for name in ("id", *SEQUENCE_COLUMNS)}
        sequences.append({**fields, "columns": sequence.columns})
    return {
        "format_version": info.version,
        "logit_width": info.logit_width,
        "normalised": info.normalised,
        "temperature": info.temperature,
        "sequences": sequences,
    }


def main() -> None:
    """Write the vectors that are missing."""
    target = HERE / f"v{FORMAT_VERSION.major}"
    target.mkdir(exist_ok=True)
    warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
    for name, function in CASES.items():
        if (target / f"{name}.json").exists():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            function(path)
            text = json.dumps(expected(path), indent=1, ensure_ascii=False)
            shutil.copytree(path, target / name)
        (target / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"made {name}")


if __name__ == "__main__":
    main()
