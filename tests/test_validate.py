"""`validate` beyond spec/bad: good data gives no errors, nothing stops it, and it always returns findings."""

import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitstore
from logitstore.dataset.shards import open_shard
from logitstore.io import LocalStore

BAD = Path(__file__).parent.parent / "spec" / "bad"
MANIFEST = "logitstore.json"


@pytest.fixture(scope="module")
def forge():
    """spec/bad/make.py, for what it seals again."""
    spec = importlib.util.spec_from_file_location("bad_make", BAD / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problems(path, **settings):
    """All findings but the one that every dataset here has: it names no tokenizer."""
    return [f for f in logitstore.validate(path, **settings) if f.code != "tokenizer-unknown"]


def places(findings):
    return {(f.code, f.shard, f.chunk, f.row, f.position) for f in findings}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# Good datasets.


def wide(writer, rows):
    writer.add([1, 2], [[1, 2, 3], [4, 5, 6]], [[-0.5, -2100.0, -5000.25], [-0.125, -3.0, -2400.0]])


def bfloat16_logits(writer, rows):
    logits = np.random.default_rng(0).normal(0, 4, (20, 1000)).astype(np.float32)
    writer.add_logits(np.arange(20), (logits.view(np.uint32) >> 16).astype(np.uint16))


def draws(writer, rows):
    tokens, ids, _ = rows(0, 12, 5)
    writer.add_draws(tokens, ids, np.full(ids.shape, [20, 10, 10, 9, 1]), 50, entropy=[2.0] * 12)


def empty_sequences(writer, rows):
    writer.add([], [], [], count=[])
    writer.add([1, 2], [], [], count=[0, 0])
    writer.add([3], [[1]], [[-0.5]])


def optional_columns(writer, rows):
    nan = np.nan
    writer.add(
        *rows(0, 6, 4),
        target_logprob=[-1.5, nan, 0, -np.inf, -20, nan], target_rank=[0, 0, 5, 900, 70_000, 0],
        logsumexp=[18.25, 17, 16.5, nan, 3, -2], entropy=[0, 1.5, 2.25, nan, 6, 12], loss_mask=[0, 0, 1, 1, -1, 0],
    )  # fmt: skip


def the_right_targets(writer, rows):
    tokens, ids, logprobs = rows(0, 30, 8)
    tokens[1:] = ids[np.arange(29), np.arange(29) % 8]
    writer.add(tokens, ids, logprobs, target_rank=[*(np.arange(29) % 8 + 1), 3])


def unusual_tails(writer, rows):
    p = np.log([[0.5, 0.25], [0.5, 0.25], [0.5, 0.5], [1 - 1e-6, 1e-7]])
    writer.add([1, 2, 3, 4], np.arange(8).reshape(4, 2), p, tail=[np.log(0.25), np.nan, -np.inf, -40])


def sums_of_a_little_over_one(writer, rows):
    writer.add([1, 2], [[1, 2]] * 2, np.log([[0.75, 0.25], [0.9, 0.1]]) + 5e-5)


@pytest.mark.parametrize("deep", [False, True], ids=["quick", "deep"])
@pytest.mark.parametrize(
    "add",
    [
        wide, bfloat16_logits, draws, empty_sequences, optional_columns, the_right_targets, unusual_tails,
        sums_of_a_little_over_one,
    ],
)  # fmt: skip
def test_good_sequences_give_no_findings(tmp_path, quiet, rows, add, deep):
    with logitstore.Writer(tmp_path / "d", teacher="t", logit_width=1000) as writer:
        add(writer, rows)
    assert problems(tmp_path / "d", deep=deep) == []


@pytest.mark.parametrize("deep", [False, True], ids=["quick", "deep"])
@pytest.mark.parametrize(
    "settings",
    [
        {"values": "grid"},
        {"values": "grid", "resolution": 1.0},
        {"values": "grid", "resolution": 2**-16, "k": 300},
        {"values": "float16", "k": 300},
        {"values": "float32"},
        {"normalised": "candidates"},
        {"sequences": 0},
        {"sequences": 30, "chunk_candidates": 200, "shard_bytes": 5000},
        {"top_p": 0.8, "min_k": 2},
        {"per_sequence": lambda i: {"note": f"n{i}", "spans": [i, 2]}},
        {"split": "valid", "temperature": 0.5},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_good_datasets_give_no_findings(write, settings, deep):
    assert problems(write(**settings), deep=deep) == []


def test_a_dataset_with_a_tokenizer_and_all_else_gives_no_findings_at_all(small):
    assert logitstore.validate(small, deep=True) == []


def test_what_is_unknown_is_a_warning(tmp_path, quiet):
    with logitstore.Writer(tmp_path / "d"):
        pass
    findings = logitstore.validate(tmp_path / "d", deep=True)
    unknown = ["teacher-unknown", "tokenizer-unknown", "logit-width-unknown"]
    assert [(f.code, f.severity) for f in findings] == [(code, "warning") for code in unknown]
    assert logitstore.is_valid(findings)


# Nothing stops at the first problem.


@pytest.fixture
def shards(tmp_path, quiet, rows):
    """Three shards of two chunks of two sequences of 4 positions with 4 candidates."""
    path = tmp_path / "d"
    settings = {"values": "float32", "chunk_candidates": 32, "shard_bytes": 3000}
    with logitstore.Writer(path, teacher="t", logit_width=1000, **settings) as writer:
        for seed in range(12):
            writer.add(*rows(seed, 4, 4), entropy=[1.0] * 4)
    assert [info.sequences for info in logitstore.open(path).info.shards] == [4, 4, 4]
    assert all(len(open_chunks(path, number)) == 2 for number in range(3))
    return path


def open_chunks(path, number):
    info = logitstore.open(path).info
    return open_shard(LocalStore(path), info.shards[number], info).index


def name_of(number):
    return f"data/train/train-{number:05d}.arrow"


def test_every_damage_in_a_dataset_is_reported(shards):
    end = open_chunks(shards, 1)["offset"][1] + open_chunks(shards, 1)["length"][1]
    for chunk in (0, 1):
        flip(shards / name_of(0), int(open_chunks(shards, 0)["offset"][chunk]) + 200)
    flip(shards / name_of(1), int(end) + 5)
    flip(shards / name_of(1), int(end) + 8)
    (shards / name_of(2)).unlink()
    (shards / "data" / "train" / "train-00003.arrow").touch()
    quick = {
        ("shard-end-mark", name_of(1), None, None, None),
        ("shard-hashes", name_of(1), None, None, None),
        ("shard-missing", name_of(2), None, None, None),
        ("unreferenced-file", name_of(3), None, None, None),
    }
    assert places(problems(shards)) == quick
    assert places(problems(shards, deep=True)) == quick | {
        ("chunk-digest", name_of(0), 0, None, None),
        ("chunk-digest", name_of(0), 1, None, None),
        ("shard-sha256", name_of(0), None, None, None),
        ("shard-sha256", name_of(1), None, None, None),
    }


def test_every_wrong_row_is_reported_at_its_place(shards, forge, monkeypatch):
    monkeypatch.setattr(forge, "SHARD", name_of(1))
    forgery = forge.Forgery(shards)
    forgery.rows[0]["encoding"] = 77
    forgery.rows[1]["id"] = "0"
    forgery.change("top", np.uint32, 4, slice(2, 4), 2**32 - 1, row=1)
    forgery.change("ids", np.uint32, 16, 5, forgery.get("ids", np.uint32, 16, 2)[4], row=2)
    forgery.put("entropy", np.float32, [1.0, 1.0, 1.0, -1.0], row=3)
    forgery.rows[3]["id"] = "11"  # the last of the next shard
    forgery.seal()
    at = (name_of(1), 0, 5), (name_of(1), 1, 6), (name_of(1), 1, 7)
    findings = problems(shards, deep=True)
    assert places(findings) == {
        ("cell", name_of(1), 0, 4, None),
        ("duplicate-sequence-id", *at[0], None),
        ("shard-hashes", *at[0], None),
        ("value-range", *at[0], 2),
        ("duplicate-id", *at[1], 1),
        ("optional-range", *at[2], 3),
        ("shard-hashes", *at[2], None),
        ("duplicate-sequence-id", name_of(2), 1, 11, None),
    }
    assert len(findings) == 8
    (repeated,) = (f for f in findings if f.code == "value-range")
    assert "and at 1 more position" in repeated.message


def test_rows_are_numbered_on_behind_a_shard_that_cannot_be_read(shards, forge, monkeypatch):
    monkeypatch.setattr(forge, "SHARD", name_of(2))
    forgery = forge.Forgery(shards)
    forgery.rows[3]["encoding"] = 77
    forgery.seal()
    (shards / name_of(0)).unlink()
    flip(shards / name_of(1), -1)
    assert places(problems(shards, deep=True)) == {
        ("shard-missing", name_of(0), None, None, None),
        ("shard-tail", name_of(1), None, None, None),
        ("cell", name_of(2), 1, 11, None),
    }


def test_more_than_a_thousand_findings_of_one_code_are_summarised(tmp_path, quiet, forge):
    with logitstore.Writer(tmp_path / "d", teacher="t", logit_width=10) as writer:
        for _ in range(1100):
            writer.add([], [], [], count=[])
    forgery = forge.Forgery(tmp_path / "d")
    forgery.hashes = [value ^ 1 for value in forgery.hashes]
    forgery.rows[7]["encoding"] = 9
    forgery.seal()
    findings = problems(tmp_path / "d", deep=True)
    wrong = [f for f in findings if f.code == "shard-hashes"]
    assert len(wrong) == 1001
    assert wrong[-1].message == "99 more findings of this kind are not listed"
    assert (wrong[-1].severity, wrong[-1].row) == ("error", None)
    assert [f.row for f in findings if f.code == "cell"] == [7]


def test_progress_counts_the_bytes_of_all_shards(shards):
    (shards / name_of(1)).unlink()
    seen = []
    logitstore.validate(shards, deep=True, progress=lambda done, total: seen.append((done, total)))
    total = logitstore.open(shards).info.totals.bytes
    assert len(seen) == 3
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


# Alignment.


def off_by(path):
    """By how many positions the rows are said to be off, or None."""
    findings = problems(path, deep=True)
    assert {f.code for f in findings} <= {"alignment"}, findings
    return int(findings[0].message.split("off by ")[1].split(";")[0]) if findings else None


def write_rows(path, sequences):
    with logitstore.Writer(path, teacher="t", logit_width=300_000, values="grid") as writer:
        for tokens, ids, logprobs in sequences:
            writer.add(tokens, ids, logprobs)
    return path


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_misaligned_rows_of_a_real_capture_are_found(tmp_path, quiet, shared, shift):
    with np.load(shared("gemma3-270m-shakespeare-top64.npz")) as capture:
        tokens, lengths, ids, logprobs = (capture[name] for name in ("tokens", "lengths", "ids", "logprobs"))
    cuts = np.cumsum(lengths)[:-1]
    sequences = zip(*(np.split(array, cuts) for array in (tokens, ids, logprobs)), strict=True)
    path = write_rows(tmp_path / "d", [(np.roll(t, shift), i, p) for t, i, p in sequences])
    assert off_by(path) == (shift or None)


def guesses(random, tokens, hits, shift=1):
    """Rows whose best candidate is tokens[t + shift] at a share of the positions, and any other token elsewhere."""
    others = random.integers(0, 1000, len(tokens))
    best = np.where(random.random(len(tokens)) < hits, np.roll(tokens, -shift), others)
    return tokens, np.stack([best, best + 1000], axis=1), np.tile([-0.5, -1.5], (len(tokens), 1))


@pytest.mark.parametrize("hits", [0.25, 0.9])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_misaligned_rows_are_found(tmp_path, quiet, hits, shift):
    random = np.random.default_rng(shift)
    # Text repeats its tokens, so that some hits are by chance.
    texts = [random.zipf(1.5, 200) % 500 for _ in range(5)]
    path = write_rows(tmp_path / "d", [guesses(random, text, hits, shift) for text in texts])
    assert off_by(path) == (None if shift == 1 else shift - 1)


REPEATED = {
    "one token": [7],
    "two in turn": [7, 8],
    "three in turn": [7, 8, 9],
    "runs of three": np.repeat(np.arange(50), 3),
    "a space between words": np.stack([np.arange(50), np.full(50, 99)], axis=1).ravel(),
}


# On the other texts, a teacher that says each token again never says what comes next.
TEACHERS = [
    (text, teacher)
    for text in REPEATED
    for teacher in ("right", "always one", "random", "the same again")
    if teacher != "the same again" or text in ("one token", "runs of three")
]


@pytest.mark.parametrize(("text", "teacher"), TEACHERS)
def test_repetitive_text_is_no_misalignment(tmp_path, quiet, text, teacher):
    tokens = np.resize(REPEATED[text], 900)
    random = np.random.default_rng(0)
    best = {
        "right": np.roll(tokens, -1),
        "the same again": tokens,
        "always one": np.full(900, tokens[1]),
        "random": random.integers(0, 100, 900),
    }[teacher]
    rows = np.stack([best, best + 1000], axis=1), np.tile([-0.5, -1.5], (900, 1))
    assert off_by(write_rows(tmp_path / "d", [(tokens, *rows)])) is None


@pytest.mark.parametrize("positions", [1, 2, 3, 20])
def test_few_positions_are_too_few_to_tell(tmp_path, quiet, positions):
    tokens = np.arange(positions)
    path = write_rows(tmp_path / "d", [guesses(np.random.default_rng(0), tokens, 1.0, 0)])
    assert off_by(path) is None


def test_a_random_teacher_is_no_misalignment(tmp_path, quiet):
    random = np.random.default_rng(0)
    texts = [random.zipf(1.3, 1000) % 500 for _ in range(20)]
    assert off_by(write_rows(tmp_path / "d", [guesses(random, text, 0.0) for text in texts])) is None


def test_misalignment_is_found_beside_what_cannot_be_read(tmp_path, quiet):
    random = np.random.default_rng(0)
    path = tmp_path / "d"
    with logitstore.Writer(path, teacher="t", logit_width=2000, shard_bytes=1, chunk_candidates=1) as writer:
        for _ in range(3):
            writer.add(*guesses(random, random.integers(0, 500, 200), 0.7, 0))
    (path / name_of(1)).unlink()
    assert {f.code for f in problems(path, deep=True)} == {"alignment", "shard-missing"}


# Paths.


@pytest.mark.parametrize("deep", [False, True], ids=["quick", "deep"])
def test_a_path_without_a_dataset_is_a_finding(tmp_path, deep):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "data" / "train").mkdir(parents=True)
    (tmp_path / "unfinished" / name_of(0)).with_suffix(".arrow.partial").touch()
    (tmp_path / "directory" / MANIFEST).mkdir(parents=True)
    expected = {
        "nowhere": "dataset-missing",
        "file": "dataset-missing",
        "empty": "dataset-missing",
        "unfinished": "dataset-incomplete",
        "directory": "file-kind",
    }
    for name, code in expected.items():
        for path in (tmp_path / name, str(tmp_path / name)):
            (finding,) = logitstore.validate(path, deep)
            assert (finding.code, finding.severity) == (code, "error")
            assert not logitstore.is_valid([finding])


def test_a_manifest_beside_other_shards_names_what_is_missing_and_what_is_left_over(write):
    path, other = write("one", sequences=1), write("other", sequences=1, split="test")
    shutil.copytree(other / "data" / "test", path / "data" / "test")
    (path / name_of(0)).unlink()
    assert places(problems(path)) == {
        ("shard-missing", name_of(0), None, None, None),
        ("unreferenced-file", "data/test/test-00000.arrow", None, None, None),
    }


# Every byte counts.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two shards, several chunks and encodings, every optional column, users' columns, a tokenizer of two files."""
    root = tmp_path_factory.mktemp("small")
    (root / "tokenizer").mkdir()
    vocabulary = {f"{i:x}.": i for i in range(40)}
    (root / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    (root / "tokenizer" / "tokenizer_config.json").write_text('{"bos_token": "0.", "chat_template": "{{ messages }}"}')
    random = np.random.default_rng(0)
    path = root / "d"
    with (
        warnings.catch_warnings(),
        logitstore.Writer(
            path, teacher="t", logit_width=40, tokenizer=root / "tokenizer", chunk_candidates=30, shard_bytes=6000,
            columns=pa.schema([("note", pa.utf8()), ("spans", pa.list_(pa.int32()))]),
        ) as writer,
    ):  # fmt: skip
        warnings.simplefilter("error")
        for i in range(6):
            tokens = random.integers(0, 40, 5)
            ids = np.stack([random.permutation(40)[:4] for _ in range(5)])
            logprobs = -np.cumsum(random.uniform(0.1, 1, (5, 4)), axis=1) - 2
            if i == 1:
                writer.add_draws(tokens, ids, np.full(ids.shape, [9, 6, 4, 1]), 20, note="drawn")
            elif i == 4:
                logits = np.round(logprobs * 4) / 4
                lse = np.log(np.exp(logits).sum(axis=1)) + 1
                writer.add(tokens, ids, logits - lse[:, None], logsumexp=lse, spans=[1, 2])
            else:
                writer.add(
                    tokens, ids, logprobs, note="grid", entropy=[1.0] * 5, loss_mask=[0, 1, 1, 1, 0],
                    target_logprob=[-1.0, -2, np.nan, -9, -1], target_rank=[5, 9, 0, 30, 7],
                )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def files(small):
    found = sorted(path for path in small.rglob("*") if path.is_file())
    assert len(found) == 5
    return {path: path.read_bytes() for path in found}


@given(st.data())
def test_a_change_of_any_byte_of_any_file_is_an_error_in_that_file(small, files, data):
    path = data.draw(st.sampled_from(list(files)), label="file")
    at = data.draw(st.integers(0, len(files[path]) - 1), label="byte")
    changed = bytearray(files[path])
    changed[at] ^= data.draw(st.integers(1, 255), label="bits")
    assert errors_with(small, path, changed, files) == {path.relative_to(small).as_posix()}


@given(st.data())
def test_a_file_of_any_other_length_is_an_error_in_that_file(small, files, data):
    path = data.draw(st.sampled_from(list(files)), label="file")
    length = data.draw(st.integers(0, len(files[path]) - 1), label="length")
    changed = data.draw(st.sampled_from([files[path][:length], files[path] + files[path][:length] + b"\0"]))
    assert errors_with(small, path, changed, files) == {path.relative_to(small).as_posix()}


def errors_with(root, path, changed, files):
    """The files in which deep validation finds errors when one of them has these bytes."""
    path.write_bytes(changed)
    try:
        return {f.shard for f in logitstore.validate(root, deep=True) if f.severity == "error"}
    finally:
        path.write_bytes(files[path])


@given(st.data())
def test_forged_bytes_under_right_digests_never_end_validation(small, files, forge, data):
    """Findings or none, but no exception and no warning: the forger may have made another good dataset."""
    forgery = forge.Forgery(small)
    messages = [forgery.message(number) for number in range(len(forgery.chunks))]
    number = data.draw(st.integers(0, len(messages) - 1), label="chunk")
    changed = bytearray(messages[number])
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        at = data.draw(st.integers(0, len(changed) - 1), label="byte")
        changed[at] = data.draw(st.integers(0, 255), label="value")
    messages[number] = bytes(changed)
    try:
        forgery.seal(messages=messages)
        findings = logitstore.validate(small, deep=True)
    finally:
        for path, content in files.items():
            path.write_bytes(content)
    assert not {f.code for f in findings} & {"shard-sha256", "chunk-digest", "shard-other", "corrupt"}


@given(st.data())
def test_forged_values_never_end_validation(small, files, forge, data):
    """Numbers of every kind in a cell: infinite, NaN, beyond every limit."""
    forgery = forge.Forgery(small)
    row = data.draw(st.integers(0, len(forgery.rows) - 1), label="row")
    name, kind = data.draw(st.sampled_from(CELLS), label="cell")
    extremes = [0, 1, 2**15, 2**16 - 1] if kind == np.uint16 else [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    numbers = st.floats(width=32) if kind == np.float32 else st.sampled_from(extremes)
    n = data.draw(st.sampled_from([5, 15, 20]), label="values")
    forgery.put(name, kind, data.draw(st.lists(numbers, min_size=n, max_size=n)), row)
    forgery.rows[row]["encoding"] = data.draw(st.integers(0, 6), label="encoding")
    try:
        forgery.seal()
        logitstore.validate(small, deep=True)
    finally:
        for path, content in files.items():
            path.write_bytes(content)


CELLS = [
    ("tokens", np.uint32), ("count", np.uint32), ("ids", np.uint32), ("top", np.float32), ("top", np.uint16),
    ("top", np.uint32), ("gaps", np.uint16), ("gaps", np.uint32), ("tail", np.uint16), ("target_logprob", np.float32),
    ("target_rank", np.uint32), ("logsumexp", np.float32), ("entropy", np.float32), ("loss_mask", np.uint16),
]  # fmt: skip
