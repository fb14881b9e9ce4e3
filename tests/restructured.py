"""What the tests of merge, append, split, select and repack share."""

import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.dataset.reader import DEFAULT_COLUMNS
from logitstore.encoding.values import Encoding

ENCODINGS = ("grid", "wide", "bfloat16", "float16", "float32", "draws")


def files(path):
    return sorted(p.relative_to(path).as_posix() for p in Path(path).rglob("*") if not p.is_dir())


def check_valid(path, killed=False):
    """Every byte and every sum is right, and nothing is there that the manifest does not name.

    Who was killed behind the manifest may leave something in `parts`, which the next command removes.
    """
    findings = logitstore.validate(path, deep=True)
    assert [f for f in findings if f.severity == "error" or f.code == "unreferenced-file"] == []
    info = logitstore.open(path).info
    named = {"logitstore.json", *(file.path for file in info.files)}
    assert {name for name in files(path) if not (killed and name.startswith("parts/"))} == named
    assert killed or not (Path(path) / "parts").exists()
    return info


def same(a, b):
    """Whether two values are the same, NaN too."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b


def assert_same(a, b, but=()):
    """Two sequences are the same in every column, bit for bit."""
    for name in sorted(DEFAULT_COLUMNS | {"id", "logits", "columns", "offsets"}):
        if name not in but:
            assert same(getattr(a, name), getattr(b, name)), (a.id, name)


def everything(path):
    dataset = logitstore.open(path)
    return list(dataset.select([*dataset.columns, "logits"]))


def ragged(random, counts, width, spread=3.0):
    """(ids, logprobs) flat, best first, with some mass left."""
    ids, logprobs = [np.empty(0, np.int64)], [np.empty(0)]
    for count in counts:
        ids.append(random.choice(width, count, replace=False))
        logits = -np.sort(-random.normal(0, spread, count))
        logprobs.append(logits - np.log(np.exp(logits).sum() + 0.5) if count else logits)
    return np.concatenate(ids), np.concatenate(logprobs).astype(np.float32)


def bfloat16_logits(random, positions, width):
    """Dense bfloat16 logits, as uint16 patterns."""
    return (random.normal(0, 4, (positions, width)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def add(writer, random, encoding, name, lengths=(1, 12), counts=(0, 9), width=1000, **columns):
    """Add a sequence of random shape, in this encoding, with every second optional column."""
    n = int(random.integers(*lengths))
    tokens = random.integers(0, width, n)
    more = {}
    if random.random() < 0.5:
        more = {"entropy": random.uniform(0, 5, n), "loss_mask": random.integers(-1, 2, n)}
    if encoding == "bfloat16":
        writer.add_logits(tokens, bfloat16_logits(random, n, width), id=name, **more, **columns)
        return
    count = random.integers(*counts, n)
    ids, logprobs = ragged(random, count, width)
    if encoding == "draws":
        draws = random.integers(1, 30, len(ids))
        sums = np.array([part.sum() for part in np.split(draws, np.cumsum(count)[:-1])])
        writer.add_draws(tokens, ids, draws, sums.astype(np.int64), count=count, id=name, **more, **columns)
        return
    if encoding == "wide" and count.max() > 1:
        ends = np.cumsum(count)[count > 1] - 1
        logprobs[ends] -= 3000
    if random.random() < 0.5:
        more |= {"target_rank": random.integers(20, 30, n), "target_logprob": np.full(n, -20.5)}
    writer.add(tokens, ids, logprobs, count=count, id=name, **more, **columns)


def make(
    path, encoding="grid", sequences=12, seed=0, prefix="s", lengths=(1, 12), counts=(0, 9), column=None, **settings
):
    """Write a dataset of random sequences of one encoding; returns its path."""
    random = np.random.default_rng(seed)
    values = {"wide": "grid", "draws": "auto"}.get(encoding, encoding)
    width = settings.setdefault("logit_width", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", logitstore.LogitStoreWarning)
        with logitstore.Writer(path, teacher="t", values=values, **settings) as writer:
            for i in range(sequences):
                columns = {} if column is None else column(i)
                add(writer, random, encoding, f"{prefix}{i}", lengths, counts, width, **columns)
    return path


LABELS = {"wide": "grid", **{name: Encoding[name.upper()].label for name in ENCODINGS if name != "wide"}}


def run(monkeypatch, capsys, *arguments, status=0, stdin=None):
    """A command in this process: (standard output, standard error)."""

    from logitstore_cli.main import run

    with monkeypatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        patch.setattr(sys, "argv", ["logitstore", *map(str, arguments)])
        if stdin is not None:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as left:
            run()
    out, err = capsys.readouterr()
    assert left.value.code == status, (left.value.code, out, err)
    assert "Traceback" not in err
    return out, err


def small_tokenizer(directory, letters="abcdefgh", template=None):
    """A tokenizer.json of these letters, one id each, up to 1,000 ids; returns its directory."""
    directory.mkdir(parents=True)
    vocab = {letters[i] if i < len(letters) else f"w{i}": i for i in range(1000)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w999"}
    (directory / "tokenizer.json").write_text(json.dumps({"model": model}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory
