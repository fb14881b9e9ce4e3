"""What every importer gets from the frame: inputs of all kinds, places in errors, skipping, workers, alignment."""

import gzip
import json
import os
import re
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import zstandard

import logitstore
from logitstore.convert import Import, Importer, Input, Item, Tally, convert, importers
from logitstore.convert import source as source_module
from logitstore.convert.base import FORMAT_OPTIONS
from logitstore.convert.lines import Lines, read_lines
from logitstore.convert.source import expand, natural
from logitstore.errors import InvalidInputError, SourceError, SourceNotFoundError

pytestmark = pytest.mark.usefixtures("quiet")


def parse(record, tally):
    """{"tokens", "best"}: one candidate a row; further kinds for the tests."""
    row = json.loads(record.data)
    if row.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if "wrong" in row:
        raise SourceError(f"position 3: {row['wrong']}; mend it")
    tally.note("{n} rows were read.", len(row["tokens"]))
    tally.pieces.update({token: b"%d" % token for token in row["tokens"]})
    best = np.array(row["best"])[:, None]
    item = {"tokens": row["tokens"], "ids": best, "logprobs": np.full(best.shape, row.get("logprob", -0.5), np.float32)}
    for _ in range(row.get("times", 1)):
        yield Item("add", dict(item))


def read(inputs, options):
    return read_lines(inputs, parse, notes=["Fixed."])


PLAIN = Importer(
    name="plain",
    description="a format of these tests",
    loses="",
    recognises=lambda source: source.head().startswith(b'{"tokens"'),
    read=read,
    patterns=("*.jsonl", "*.jsonl.gz"),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    known = {**importers(), "plain": PLAIN}
    monkeypatch.setattr("logitstore.convert.run.importers", lambda: known)


def line(seed=0, positions=6, **more):
    tokens = np.random.default_rng(seed).integers(0, 100, positions).tolist()
    return json.dumps({"tokens": tokens, "best": [*tokens[1:], 0], **more}).encode() + b"\n"


def shards(path):
    return [file.read_bytes() for file in sorted(Path(path).rglob("*.arrow"))]


def test_an_item_has_its_record_number_as_its_id_and_further_ones_a_suffix(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(0) + b"\n\n" + line(1, times=3) + line(2))
    done = convert([tmp_path / "a.jsonl"], tmp_path / "out", importer="plain")
    assert [s.id for s in logitstore.open(tmp_path / "out")] == ["0", "1", "1#1", "1#2", "2"]
    assert done.notes == ("Fixed.", "18 rows were read.")
    assert done.skipped == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_file_and_line(tmp_path, workers):
    (tmp_path / "a.jsonl").write_bytes(line(0))
    (tmp_path / "b.jsonl").write_bytes(line(1) + b"\n" + line(2, wrong="a hole"))
    with pytest.raises(SourceError, match=r"b\.jsonl, line 3: position 3: a hole; mend it"):
        convert([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", importer="plain", workers=workers)
    with pytest.raises(
        logitstore.IncompleteDatasetError if shards(tmp_path / "out") else logitstore.DatasetNotFoundError
    ):
        logitstore.open(tmp_path / "out")


def test_an_error_of_the_writer_names_file_line_and_sequence(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(0) + line(1, logprob=0.5))
    with pytest.raises(InvalidInputError, match=r"a\.jsonl, line 2: sequence '1': position 0: .* is above 0"):
        convert([tmp_path / "a.jsonl"], tmp_path / "out", importer="plain")


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_counts_lists_ten_and_keeps_the_numbers_of_the_others(tmp_path, workers):
    bad = [line(i, wrong=f"hole {i}") if i % 2 else line(i, logprob=0.5 if i == 4 else -0.5) for i in range(30)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(bad))
    done = convert([tmp_path / "a.jsonl"], tmp_path / "out", importer="plain", on_error="skip", workers=workers)
    assert done.skipped == 16
    assert len(done.failures) == 10
    assert done.failures[0].endswith("a.jsonl, line 2: position 3: hole 1; mend it")
    assert "line 5: sequence '4'" in done.failures[2]
    assert [s.id for s in logitstore.open(tmp_path / "out")] == [str(i) for i in range(0, 30, 2) if i != 4]


def test_a_record_that_is_refused_in_its_middle_says_what_is_kept(tmp_path, monkeypatch):
    def two(record, tally):
        first, second = parse(record, tally)
        yield first
        second.arguments["logprobs"] = second.arguments["logprobs"] + np.float32(1)
        yield second

    one = Importer(
        name="plain", description="", loses="", recognises=PLAIN.recognises, read=lambda i, o: read_lines(i, two)
    )
    monkeypatch.setattr("logitstore.convert.run.importers", lambda: {"plain": one})
    (tmp_path / "a.jsonl").write_bytes(line(0, times=2))
    done = convert([tmp_path / "a.jsonl"], tmp_path / "out", on_error="skip")
    assert (done.summary.sequences, done.skipped) == (1, 1)
    assert re.search(
        r"line 1: sequence '0#1': .*\(of this record, the 1 sequence before this one are kept\)", done.failures[0]
    )
    assert done.notes == ("6 rows were read.",)
    assert logitstore.open(tmp_path / "out").tokenizer() is not None


def test_a_byte_order_mark_and_what_python_writes_and_arrays_are_spoken_of(tmp_path):
    good = {"id": "a", "prompt_token_ids": [1, 2], "prompt_logprobs": [None, {"2": {"logprob": -0.1, "rank": 1}}]}
    path, text = tmp_path / "in.jsonl", json.dumps(good)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert convert([path], tmp_path / "out").importer == "vllm"
    for data, match in [
        (text.replace("-0.1", "-Infinity"), "line 1: no whole reply.*NaN or Infinity, .*write null"),
        (text.replace("-0.1", "NaN"), "write null"),
        (text.replace("-0.1", "-0.1."), "malformed.*capture it again, or repair"),
        (f"[{text}, {text}]", r"a JSON array\? Write one object a line \(jq -c '\.\[\]'\)"),
        (json.dumps([good], indent=1), "a JSON array"),
        (text.replace("[1, 2]", "[1, []]"), "got `array`.*capture it again"),
    ]:
        path.write_text(data)
        with pytest.raises(SourceError, match=match):
            convert([path], tmp_path / "out", importer="vllm", overwrite=True)
    path.write_text(f"[{text}]")
    with pytest.raises(InvalidInputError, match=r"no importer recognises .*A JSON array of records must become"):
        convert([path], tmp_path / "out", overwrite=True)


def test_nothing_but_skipped_records_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(0, wrong="a hole") * 2)
    with pytest.raises(SourceError, match=r"no sequences in this input: all 2 records were skipped, .* a hole"):
        convert([tmp_path / "a.jsonl"], tmp_path / "out", importer="plain", on_error="skip")
    with pytest.raises(InvalidInputError, match="on_error is 'ignore'"):
        convert([tmp_path / "a.jsonl"], tmp_path / "out", importer="plain", on_error="ignore")


def test_the_dataset_is_the_same_whatever_the_number_of_workers(tmp_path):
    """Some 6 MB in three files, so that several pieces are on their way at once."""
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for number, file in enumerate(files):
        file.write_bytes(b"".join(line(1000 * number + i, positions=500) for i in range(400)))
    made = {}
    for workers in (0, 1, 3):
        out = tmp_path / f"out{workers}"
        done = convert(files, out, importer="plain", workers=workers, shard_bytes=100_000)
        made[workers] = shards(out), done.notes, logitstore.open(out).tokenizer().pieces(range(100))
    assert len(made[0][0]) > 2
    assert made[0] == made[1] == made[3]


def test_a_worker_that_is_killed_is_an_error_and_no_hang(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(0) + line(1, die=True))
    with pytest.raises(InvalidInputError, match=r"a worker ended before its time.*fewer --workers"):
        convert([tmp_path / "a.jsonl"], tmp_path / "out", importer="plain", workers=1)


def test_a_limit_ends_reading(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(0) + line(1, times=3) + line(2, wrong="never read"))
    done = convert([tmp_path / "a.jsonl"], tmp_path / "out", importer="plain", limit=3)
    assert done.summary.sequences == 3
    assert convert([tmp_path / "a.jsonl"], tmp_path / "none", importer="plain", limit=0).summary.sequences == 0


@pytest.mark.parametrize("shift", [-1, 1])
def test_rows_that_are_off_by_one_are_refused(tmp_path, shift):
    rows = []
    for seed in range(40):
        tokens = np.random.default_rng(seed).integers(0, 1000, 20)
        rows.append(json.dumps({"tokens": tokens.tolist(), "best": np.roll(tokens, -1 - shift).tolist()}).encode())
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    with pytest.raises(
        SourceError, match=rf"a\.jsonl: .*the rows are off by {re.escape(f'{shift:+d}')}; row t must predict"
    ):
        convert([tmp_path / "a.jsonl"], tmp_path / "out", importer="plain")
    with pytest.raises((logitstore.IncompleteDatasetError, logitstore.DatasetNotFoundError)):
        logitstore.open(tmp_path / "out")


def test_an_importer_may_refuse_the_whole(tmp_path, monkeypatch):
    def check(tally: Tally, final: bool):
        if final and tally.notes["{n} rows were read."] > 6:
            raise SourceError("too many rows")
        return ["Checked."]

    def checked(inputs, options):
        opened: Import = read(inputs, options)
        opened.check = check
        return opened

    one = Importer(name="plain", description="", loses="", recognises=PLAIN.recognises, read=checked)
    monkeypatch.setattr("logitstore.convert.run.importers", lambda: {"plain": one})
    (tmp_path / "a.jsonl").write_bytes(line(0))
    (tmp_path / "b.jsonl").write_bytes(line(0) + line(1))
    assert convert([tmp_path / "a.jsonl"], tmp_path / "a").notes[-1] == "Checked."
    with pytest.raises(SourceError, match="too many rows"):
        convert([tmp_path / "b.jsonl"], tmp_path / "b")
    with pytest.raises((logitstore.IncompleteDatasetError, logitstore.DatasetNotFoundError)):
        logitstore.open(tmp_path / "b")


@pytest.mark.parametrize("name", FORMAT_OPTIONS)
def test_an_option_that_says_nothing_to_the_format_is_refused(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes(line(0))
    value = {"tokens": "ids"} if name == "map" else "logit" if name == "value_kind" else "same"
    with pytest.raises(InvalidInputError, match=f"--{name.replace('_', '-')} says nothing to the importer plain"):
        convert([tmp_path / "a.jsonl"], tmp_path / "out", **{name: value})


# --- inputs


def test_directories_and_globs_stand_for_their_files_in_natural_order(tmp_path):
    for name in ("part_10.jsonl", "part_9.jsonl", "part_2.jsonl.gz", "notes.txt", "_SUCCESS.jsonl", "cache-1.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(line(2)) if name.endswith("gz") else line(len(name)))
    names = ["part_2.jsonl.gz", "part_9.jsonl", "part_10.jsonl"]
    assert [path.name for path in expand([tmp_path], PLAIN.patterns)] == names
    assert [path.name for path in expand([tmp_path / "part_*"], ())] == names
    assert [path.name for path in expand([tmp_path / "part_?.jsonl", tmp_path / "notes.txt"], ())] == [
        "part_9.jsonl",
        "notes.txt",
    ]
    assert sorted([Path("b2"), Path("b10"), Path("a")], key=natural) == [Path("a"), Path("b2"), Path("b10")]
    done = convert([tmp_path], tmp_path / "out")
    assert (done.importer, done.summary.sequences) == ("plain", 3)
    assert logitstore.open(tmp_path / "out").info.source.files == tuple(names)


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path):
    (tmp_path / "a[1].jsonl").write_bytes(line(0))
    (tmp_path / "a1.jsonl").write_bytes(line(1))
    assert expand([tmp_path / "a[1].jsonl"], ()) == [tmp_path / "a[1].jsonl"]


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(SourceNotFoundError, match=r"\*\.npy: no file has such a name"):
        expand([tmp_path / "*.npy"], ())
    with pytest.raises(SourceNotFoundError, match=r"there is no \*\.jsonl or \*\.jsonl\.gz in this directory"):
        expand([tmp_path], PLAIN.patterns)
    with pytest.raises(SourceNotFoundError):
        convert([tmp_path], tmp_path / "out", importer="plain")
    with pytest.raises(SourceNotFoundError, match="no such file"):
        convert([tmp_path / "nowhere"], tmp_path / "out")


def test_files_in_one_directory_below_are_found_and_those_in_several_must_be_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_bytes(line(0))
    assert [path.name for path in expand([tmp_path], PLAIN.patterns)] == ["a.jsonl"]
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "a.jsonl").write_bytes(line(0))
    with pytest.raises(InvalidInputError, match=r"several directories; name one of: .*train, .*valid"):
        expand([tmp_path], PLAIN.patterns)
    (tmp_path / "top.jsonl").write_bytes(line(0))
    assert [path.name for path in expand([tmp_path], PLAIN.patterns)] == ["top.jsonl"]


def test_a_dataset_whose_rows_are_chosen_by_indices_is_refused(tmp_path):
    for name in ("data-00000-of-00001.arrow", "indices.arrow"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        InvalidInputError, match=r"rows are chosen by indices\.arrow; save the result of flatten_indices"
    ):
        expand([tmp_path], ("*.arrow",))


def test_gzip_inputs_are_decompressed(tmp_path):
    text = b"".join(b"line %d\n" % i for i in range(50_000))
    two = gzip.compress(text[:1000]) + gzip.compress(text[1000:])  # members follow one another
    for name, data in (("a.gz", gzip.compress(text)), ("b.gz", two), ("c.gz", two + bytes(1000))):
        (tmp_path / name).write_bytes(data)
        source = Input(tmp_path / name)
        assert source.head() == text[: 64 * 1024]
        assert source.done() == 0
        assert b"\n".join(part for _, part in source.lines()) + b"\n" == text
        assert source.done() == len(data)
    whole = gzip.compress(text)
    for data in (whole[:-20], whole[:-1], whole[:40] + b"xx" + whole[42:], two[:-2], whole + b"no"):
        (tmp_path / "d.gz").write_bytes(data)
        with pytest.raises(SourceError, match="gzip data"):
            list(Input(tmp_path / "d.gz").lines())


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_bomb_of_one_line_is_refused_in_bounded_memory(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(source_module, "LINE_LIMIT", 2**20)
    (tmp_path / "bomb").write_bytes(pack(b'{"tokens"' + b"[" * 2**26))
    with pytest.raises(SourceError, match="line 1 is longer than 1048576 bytes"):
        convert([tmp_path / "bomb"], tmp_path / "out", importer="plain")


def test_pieces_are_bounded_and_number_their_records(tmp_path):
    (tmp_path / "a").write_bytes(b"".join(line(i, positions=20_000) for i in range(20)))
    pieces = list(read_lines([Input(tmp_path / "a"), Input(tmp_path / "a")], parse).pieces)
    assert all(isinstance(piece, Lines) for piece in pieces)
    assert all(sum(len(text) for _, text in piece.lines) <= 2**20 for piece in pieces)
    records = [record for piece in pieces for record in piece.records()]
    assert [record.number for record in records] == list(range(40))
    assert records[25].place == f"{tmp_path / 'a'}, line 6"


def test_unknown_teacher_and_tokenizer_are_warned_of(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert([tmp_path / "a.jsonl"], tmp_path / "out")
    assert any("does not say its teacher" in str(one.message) for one in caught)
