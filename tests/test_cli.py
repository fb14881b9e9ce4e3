"""The command line, as processes: results on standard output, everything else on standard error, exit statuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import logitstore
from logitstore_cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
SCHEMA_INFO = {
    "format_version", "sequences", "positions", "candidates", "bytes", "bytes_per_position", "splits", "shards",
    "teacher", "tokenizer", "features",
}  # fmt: skip


def run(*arguments, status=0, stdin=None, **environment):
    command = [sys.executable, "-m", "logitstore_cli", *map(str, arguments)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, timeout=120, env={**os.environ, **environment}, check=False
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == status, (done.returncode, out, err)
    assert "Traceback" not in err
    return out, err


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    random = np.random.default_rng(0)
    lengths = [5, 0, 7]
    logprobs = -np.cumsum(random.uniform(0.1, 1, (12, 4)), axis=1) - 1
    path = tmp_path_factory.mktemp("npz") / "capture.npz"
    ids = random.permuted(np.tile(np.arange(50, dtype=np.int32), (12, 1)), axis=1)[:, :4]
    np.savez(path, tokens=random.integers(0, 50, 12), lengths=lengths, ids=ids, logprobs=logprobs.astype(np.float32))
    return path


@pytest.fixture(scope="module")
def made(npz, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "data"
    run("convert", npz, path, "--teacher", "t", "--logit-width", 50)
    return path


def test_convert_says_what_it_did(npz, tmp_path):
    out, err = run("convert", npz, tmp_path / "d", "--top-k", 3, "--resolution", "1/16", "--shard-size", "1MiB")
    assert "3 sequences, 12 positions, 36 candidates from arrays" in out
    assert "bytes a position; grid" in out
    assert "mean KL" in out
    assert err == "Warning: the dataset does not say its teacher, tokenizer, logit width: whoever uses it must know\n"
    info = logitstore.open(tmp_path / "d").info
    assert (info.sampling.top_k, info.sampling.resolution) == (3, 1 / 16)
    assert info.source.files == ("capture.npz",)


def test_convert_json(npz, tmp_path):
    out, _ = run("convert", npz, tmp_path / "d", "--json", "--limit", 1, "--values", "float32")
    summary = json.loads(out)
    assert (summary["importer"], summary["sequences"], summary["max_error"]) == ("arrays", 1, 0.0)


def test_nothing_is_overwritten_unless_asked(npz, made, tmp_path):
    before = (made / "logitstore.json").read_bytes()
    out, err = run("convert", npz, made, status=1)
    assert out == ""
    assert "--overwrite" in err
    assert (made / "logitstore.json").read_bytes() == before
    run("convert", npz, tmp_path / "d", "--teacher", "a")
    run("convert", npz, tmp_path / "d", "--teacher", "b", "--overwrite")
    assert logitstore.open(tmp_path / "d").info.teacher.name == "b"


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("nope",), ("convert",), ("convert", "one"), ("convert", "a", "b", "--values", "int4"), ("info",),
        ("convert", "a", "b", "--resolution", "x"), ("convert", "a", "b", "--shard-size", "3 apples"),
        ("convert", "a", "b", "--top-p", "2"), ("head", "d", "-n", "-1"), ("info", "d", "--nope"),
        ("completion", "tcsh"),
    ],
)  # fmt: skip
def test_wrong_usage_is_2(arguments):
    out, err = run(*arguments, status=2)
    assert out == ""
    assert "Usage: logitstore" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("info", "nowhere"), "no logitstore dataset"),
        (("head", "nowhere"), "no logitstore dataset"),
        (("convert", "nowhere", "out"), "nowhere: no such file"),
        (("convert", "{npz}", "out", "--from", "nope"), "there are: arrays"),
        (("convert", "{text}", "out"), "no importer recognises"),
        (("convert", "{npz}", "out", "--tokenizer", "nowhere"), "nowhere"),
        (("convert", "{npz}", "out", "--resolution", "0.3"), "power of two"),
        (("head", "{made}", "--id", "nobody"), "no sequence has the id"),
        (("convert", "{npz}", "{text}"), "is a file"),
    ],
)
def test_failures_are_1_with_one_line(npz, made, tmp_path, monkeypatch, arguments, says):
    text = tmp_path / "text.txt"
    text.write_text("hello")
    monkeypatch.chdir(tmp_path)
    out, err = run(*(str(a).format(npz=npz, made=made, text=text) for a in arguments), status=1)
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_export_says_what_is_lost(made, tmp_path):
    out, err = run("export", made, tmp_path / "out.npz", "--to", "npz", "--limit", 1)
    assert out == f"{tmp_path / 'out.npz'}: 1 sequences as npz\n"
    assert (tmp_path / "out.npz").exists()
    out, err = run("export", made, tmp_path / "out.npz", "--to", "npz", "--overwrite", "--json")
    assert json.loads(out)["exporter"] == "npz"
    out, err = run("export", made, tmp_path / "out.npz", "--to", "npz", status=1)
    assert "is there already" in err
    run("export", made, tmp_path / "other", status=2)
    out, err = run("export", made, tmp_path / "other", "--to", "nope", status=1)
    assert "no exporter is called 'nope'" in err


def test_skipped_records_are_listed_and_exit_with_3(tmp_path):
    entry = {"id": 5, "logprob": -0.5, "top_logprobs": [{"id": 5, "logprob": -0.5}]}
    reply = json.dumps({"completion_probabilities": [entry], "tokens_predicted": 1})
    (tmp_path / "in.jsonl").write_text(reply + "\n" + reply.replace("-0.5", "0.5") + "\n" + reply)
    out, err = run("convert", tmp_path / "in.jsonl", tmp_path / "out", "--on-error", "skip", status=3)
    assert "2 sequences" in out
    assert "; 1 records skipped" in out
    assert f"Skipped: {tmp_path / 'in.jsonl'}, line 2: " in err
    out, err = run("convert", tmp_path / "in.jsonl", tmp_path / "two", "--on-error", "skip", "--json", status=3)
    assert json.loads(out)["skipped"] == 1
    out, err = run("convert", tmp_path / "in.jsonl", tmp_path / "three", status=1)
    assert err.startswith(f"Error: {tmp_path / 'in.jsonl'}, line 2: ")


def test_info(made):
    out, err = run("info", made)
    assert err == ""
    assert "teacher             t\n" in out
    content = json.loads(run("info", made, "--json")[0])
    assert set(content) >= SCHEMA_INFO
    assert (content["sequences"], content["positions"], content["candidates"]) == (3, 12, 48)
    assert content["bytes_per_position"] == content["bytes"] / 12
    assert content["splits"]["train"]["sequences"] == 3
    assert content["teacher"]["name"] == "t"
    assert content["tokenizer"] is None
    assert content["features"] == {"required": [], "optional": []}


def test_validate(made, tmp_path):
    out, _ = run("validate", made, "--deep")
    assert out.endswith("valid (1 warning; checked every row)\n")
    content = json.loads(run("validate", made, "--deep", "--json")[0])
    assert content["valid"] is True
    assert [set(f) for f in content["findings"]] == [
        {"code", "severity", "shard", "chunk", "row", "position", "message"}
    ]
    out, err = run("validate", tmp_path / "nowhere", "--json", status=1)
    assert json.loads(out)["findings"][0]["code"] == "dataset-missing"
    assert err == ""


def test_validate_names_the_damage(made, tmp_path):
    import shutil

    shutil.copytree(made, tmp_path / "d")
    shard = tmp_path / "d" / "data" / "train" / "train-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    out, _ = run("validate", tmp_path / "d", "--deep", status=1)
    assert "error: chunk-digest: data/train/train-00000.arrow, chunk 0:" in out
    assert "INVALID" in out


def test_head(made):
    out, _ = run("head", made, "-n", 2, "-p", 2, "-k", 3)
    assert out.startswith("0: 5 positions, 20 candidates\n")
    assert "... 3 more" in out
    assert "\n1: 0 positions" in out
    lines = [json.loads(line) for line in run("head", made, "-n", 3, "--json")[0].splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2"]
    assert len(lines[0]["tail"]) == 5
    assert json.loads(run("head", made, "--id", "2", "--json")[0])["id"] == "2"


def test_demo(tmp_path):
    out, err = run("demo", tmp_path / "d")
    assert '"My favorite color is" ... what comes next?' in out
    assert "' blue'" in out
    assert "12.3 %" in out
    assert "valid: every byte and every row was checked" in out
    assert "context is missing" in err
    assert logitstore.open(tmp_path / "d").info.totals.sequences == 12
    run("demo", tmp_path / "d", status=1)


def test_demo_leaves_nothing_without_a_directory(tmp_path):
    run("demo", TMPDIR=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_standard_input(shared, tmp_path):
    data = shared("llama-server-completion.jsonl").read_bytes()
    run("convert", "-", tmp_path / "d", "--from", "llama-server", stdin=data)
    run("convert", "-", tmp_path / "e", stdin=data)
    assert len(logitstore.open(tmp_path / "d")) == len(logitstore.open(tmp_path / "e")) == 12


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    out, _ = run("completion", shell)
    assert "_LOGITSTORE_COMPLETE" in out


def test_version_and_help():
    assert run("--version")[0] == f"logitstore, version {logitstore.__version__}\n"
    out, _ = run("--help")
    for command in COMMANDS:
        assert f"  {command} " in out
        text = CliRunner().invoke(main, [command, "--help"]).stdout  # in this process: there are many
        assert "Example: logitstore" in text, command
    assert run("-h")[0] == out


def test_output_to_a_closed_pipe_is_no_error(made):
    command = f'"{sys.executable}" -m logitstore_cli head "{made}" -n 3 --json'
    done = subprocess.run(["bash", "-c", f"{command} | head -c 10"], capture_output=True, check=False)
    assert len(done.stdout) == 10
    assert b"Traceback" not in done.stderr


def test_output_that_cannot_hold_every_character(made):
    run("head", made, PYTHONIOENCODING="ascii")
    run("demo", PYTHONIOENCODING="ascii")


def test_sizes_and_resolutions():
    from logitstore_cli.types import RESOLUTION, SIZE

    sizes = {"5": 5, "1kB": 1000, "256MiB": 256 * 2**20, "1.5 GB": 1_500_000_000, "2g": 2 * 10**9, "1TiB": 2**40}
    assert {text: SIZE.convert(text, None, None) for text in sizes} == sizes
    assert RESOLUTION.convert("1/32", None, None) == 1 / 32
    assert RESOLUTION.convert("0.125", None, None) == 0.125
