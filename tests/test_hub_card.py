import re
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import logitstore
from logitstore.convert import convert
from logitstore.errors import InvalidInputError
from logitstore.hub.card import BEGIN, END, TAGS, card
from logitstore.hub.preview import SCHEMA, preview, previews
from logitstore.schema.manifest import (
    Manifest,
    Sampling,
    ShardInfo,
    Source,
    Split,
    Teacher,
    TokenizerInfo,
    Totals,
    dataset_digest,
    parse_manifest,
    serialise_manifest,
    sum_splits,
)
from logitstore.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
REPO = "someone/teacher-logits"


def made(**fields):
    """A manifest of two splits that passes its own parser."""
    shards = tuple(
        ShardInfo(path=f"data/{split}/{split}-00000.arrow", split=split, bytes=125_600, sha256="0" * 64,
                  tail_digest="0" * 32, sequences=1500, positions=1000, candidates=64_000)
        for split in ("train", "test")
    )  # fmt: skip
    settings = {
        "version": "1.0",
        "written_by": "logitstore 1",
        "teacher": Teacher(name="google/gemma-3-270m"),
        "tokenizer": None,
        "logit_width": 262_144,
        "normalised": "vocabulary",
        "temperature": 1.0,
        "sampling": Sampling(values="auto", resolution=1 / 32, top_k=64),
        "shards": shards,
        **fields,
    }
    shards = settings["shards"]
    sums = {
        name: sum(getattr(shard, name) for shard in shards)
        for name in ("sequences", "positions", "candidates", "bytes")
    }
    settings = {
        "splits": sum_splits(shards),
        "totals": Totals(shards=len(shards), highest_id=None, encodings={"grid": 1500}, columns={"tail": 1500}, **sums),
        "dataset_digest": dataset_digest(shards, settings["tokenizer"]),
        **settings,
    }
    return parse_manifest(serialise_manifest(Manifest(**settings)))


def metadata(text):
    card_class = pytest.importorskip("huggingface_hub").DatasetCard
    assert text.startswith("---")
    return card_class(text).data.to_dict()


def section(text):
    assert text.count(BEGIN) == text.count(END) == 1
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def rows_of(stream):
    return pa.ipc.open_stream(stream).read_all().to_pylist()


# The card: metadata


def test_a_new_card_has_what_the_hub_reads():
    text = card(made(), REPO, licence="cc-by-4.0", language="en")
    assert metadata(text) == {
        "language": ["en"],
        "license": "cc-by-4.0",
        "pretty_name": "teacher logits",
        "task_categories": ["text-generation"],
        "size_categories": ["1K<n<10K"],
        "tags": list(TAGS),
        "configs": [
            {
                "config_name": "preview",
                "default": True,
                "data_files": [
                    {"split": "train", "path": "preview/train.arrow"},
                    {"split": "test", "path": "preview/test.arrow"},
                ],
            },
            {
                "config_name": "logits",
                "data_files": [
                    {"split": "train", "path": "data/train/*.arrow"},
                    {"split": "test", "path": "data/test/*.arrow"},
                ],
            },
        ],
    }
    assert "\n# teacher logits\n\n" + BEGIN in text
    assert text.endswith(END + "\n")


def test_neither_language_nor_licence_is_invented():
    text = card(made(teacher=Teacher(name="google/gemma-3-270m", licence="gemma")), REPO)
    assert not {"language", "license"} & set(metadata(text))
    assert "The teacher's licence: `gemma`." in text
    assert "No licence is stated for the dataset itself" in text
    text = card(made(teacher=None), REPO, licence="mit")
    assert "The teacher's licence: not recorded." in text
    assert "No licence is stated" not in text


@pytest.mark.parametrize(
    ("sequences", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (9999, "1K<n<10K"),
        (10**6, "1M<n<10M"),
        (10**11, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_size_categories_are_the_hubs(sequences, category):
    shard = made().shards[0]
    text = card(made(shards=(msgspec.structs.replace(shard, sequences=sequences),)), REPO)
    assert metadata(text)["size_categories"] == [category]


def test_splits_without_rows_are_left_out_of_the_configs():
    manifest = made()
    assert [config["config_name"] for config in metadata(card(manifest, REPO, previews=[]))["configs"]] == ["logits"]
    configs = metadata(card(manifest, REPO, previews={"test": b"", "other": b""}))["configs"]
    assert configs[0]["data_files"] == [{"split": "test", "path": "preview/test.arrow"}]
    assert len(configs[1]["data_files"]) == 2
    empty = card(made(shards=()), REPO)
    assert "configs" not in metadata(empty)
    assert "The dataset is empty." in section(empty)
    assert "configs" not in metadata(card(made(shards=()), REPO, existing=card(manifest, REPO)))


def test_shards_that_are_elsewhere_are_named_one_by_one():
    shard = msgspec.structs.replace(made().shards[0], path="more/a.arrow")
    configs = metadata(card(made(shards=(shard,)), REPO))["configs"]
    assert configs[1]["data_files"] == [{"split": "train", "path": ["more/a.arrow"]}]


HAND = """---
# how to fill this in
version: 1.10   # of the texts
language: no
license: other
license_name: my-terms
tags: [plays, logits]
pretty_name: "Plays: all"
size_categories: n<1K
configs:
- {config_name: logits, data_files: old.arrow}
- config_name: raw
  data_files: raw/*.arrow
extra: {a: [1, 2]}
---
# Plays

By hand.
"""


def test_what_others_wrote_into_the_metadata_stays():
    text = card(made(), REPO, existing=HAND)
    for line in (
        "# how to fill this in",
        "version: 1.10   # of the texts",
        "language: no",
        'pretty_name: "Plays: all"',
        "extra: {a: [1, 2]}",
    ):
        assert f"\n{line}\n" in text
    found = yaml.safe_load(text.split("---\n")[1])
    assert found["tags"] == ["plays", "logits", "logitstore", "knowledge-distillation", "logprobs"]
    assert (found["license"], found["license_name"]) == ("other", "my-terms")
    assert found["size_categories"] == ["1K<n<10K"]
    assert [config["config_name"] for config in found["configs"]] == ["preview", "logits", "raw"]
    assert found["configs"][1]["data_files"][0]["path"] == "data/train/*.arrow"
    assert list(found)[:8] == [
        "version",
        "language",
        "license",
        "license_name",
        "tags",
        "pretty_name",
        "size_categories",
        "configs",
    ]
    assert "---\n# Plays\n\nBy hand.\n\n" + BEGIN in text
    assert card(made(), REPO, existing=text) == text


def test_an_argument_wins_over_the_existing_card():
    text = card(made(), REPO, existing=HAND, licence="mit", language=["en", "de"], pretty_name="Other")
    found = yaml.safe_load(text.split("---\n")[1])
    assert (found["license"], found["language"], found["pretty_name"]) == ("mit", ["en", "de"], "Other")
    assert "license_name" not in found
    assert card(made(), REPO, existing=text) == text


@pytest.mark.parametrize(
    "theirs",
    ["- config_name: default\n  data_files: a.arrow", "- config_name: x\n  default: true\n  data_files: a.arrow"],
)
def test_there_is_one_default_config(theirs):
    configs = metadata(card(made(), REPO, existing=f"---\nconfigs:\n{theirs}\n---\n"))["configs"]
    assert [config["config_name"] for config in configs[:2]] == ["preview", "logits"]
    assert "default" not in configs[0]
    assert len(configs) == 3


@pytest.mark.parametrize(
    "front",
    ["{a: 1, tags: [x]}", "  a: 1\n  b: 2", "tags: &t [x]\nb: *t", "base: &b {a: 1}\n<<: *b", "a: .nan", "a: |+\n  x\n\n",
     "# only a comment", "", "? a\n: b", "'a': \"---\"", "a: 2024-01-01\nb: 1e3\n...", "tags:", "1: x\nnull: y", "a: 'x\n\n  y'"],
)  # fmt: skip
def test_metadata_of_any_shape_is_merged(front):
    existing = f"---\n{front}\n---\nBody\n"
    text = card(made(), REPO, existing=existing)
    before, after = yaml.safe_load(front + "\n") or {}, yaml.safe_load(re.match(r"---\n([\s\S]*?\n)---\n", text)[1])
    assert {k: repr(v) for k, v in after.items() if k != "tags"}.items() >= {
        k: repr(v) for k, v in before.items() if k != "tags"
    }.items()
    assert set(before.get("tags") or ()) | set(TAGS) == set(after["tags"])
    assert text.endswith("Body\n\n" + section(text) + "\n")
    assert card(made(), REPO, existing=text) == text


@pytest.mark.parametrize(
    ("front", "message"),
    [("a: [1", "README.md, line "), ("a: 1\n b: 2", "README.md, line 3"), ("just text", "not key: value"), ("- a", "not key: value"),
     ("a: 2024-13-45", "no YAML"), ("a: 1\na: 2", "'a' stands in its metadata twice"), ("a: \x00", "no YAML"), ("tags: {a: 1}", "`tags`"),
     ("configs: x", "`configs`"), ("configs: [x]", "`configs`"), ("[" * 3000, "no YAML"), ("a: !!python/name:os.system x", "no YAML")],
)  # fmt: skip
def test_metadata_that_cannot_be_read_is_refused(front, message):
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        card(made(), REPO, existing=f"---\n{front}\n---\nBody\n")


@pytest.mark.parametrize("repo", ["", "name", "a/b/c", "a b/c", 'a/b"\n```', "../x", "a/b\n"])
def test_a_name_that_the_hub_cannot_have_is_refused(repo):
    with pytest.raises(InvalidInputError, match="namespace/name"):
        card(made(), repo)


# The card: what is written by hand

PARTS = st.lists(
    st.sampled_from(["---", "---\n", "\r\n", "\n", "\n\n", "\r", BEGIN, END, BEGIN[:-4], "<!--", "-->", "# Title", "a: 1\n", "tags: [x]\n",
                     "configs: []\n", "text", " ", "\ufeff", "```\n", "é\u2028", "...\n", "license: mit\n"])
    | st.text(max_size=5),
    max_size=12,
).map("".join)  # fmt: skip


@given(PARTS)
def test_hand_written_text_is_kept_and_the_result_is_stable(existing):
    manifest = made()
    try:
        text = card(manifest, REPO, existing=existing)
    except InvalidInputError:
        assert existing.lstrip("\ufeff \r\n\t\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2028\u2029\u3000").startswith("---")
        return
    assert card(manifest, REPO, existing=text) == text
    metadata(text)
    assert "## Teacher distributions" in text
    changed = card(made(temperature=2.0), REPO, existing=text)
    assert card(manifest, REPO, existing=changed) == text
    if BEGIN not in existing and not re.match(r"[\s\ufeff]*---[\r\n]", existing):
        assert existing.removeprefix("\ufeff") in text


@given(before=st.text(), after=st.text(), newline=st.sampled_from(["\n", "\r\n"]))
def test_everything_around_the_section_stays_byte_by_byte(before, after, newline):
    before, after = (text.replace(BEGIN, "").replace(END, "").lstrip("\ufeff") for text in (before, after))
    old = f"---{newline}license: mit{newline}---{newline}{before}x{BEGIN} stale {newline} {END}{after}"
    text = card(made(), REPO, existing=old)
    body = text[text.index(f"{newline}---{newline}") + 3 + 2 * len(newline) :]
    assert body.startswith(before + "x" + BEGIN)
    assert body.endswith(END + after)
    assert "stale" not in section(text)


@pytest.mark.parametrize("count", [2, 3])
def test_of_several_sections_one_remains(count):
    old = "A\n" + "".join(f"{BEGIN}\nstale\n{END}\nhand {n}\n" for n in range(count))
    text = card(made(), REPO, existing=old)
    assert section(text)
    assert [f"hand {n}" in text for n in range(count)] == [True] * count
    assert "stale" not in text


def test_text_behind_a_mark_without_its_end_is_kept():
    text = card(made(), REPO, existing=f"A\n{BEGIN}\nmine, perhaps\n")
    assert f"A\n{BEGIN}\nmine, perhaps\n\n{BEGIN}\n" in text
    assert card(made(), REPO, existing=text) == text


def test_line_ends_are_those_of_the_existing_card():
    text = card(made(), REPO, existing="---\r\nlicense: mit\r\n---\r\n# A\r\n")
    assert "\n" not in text.replace("\r\n", "")
    assert metadata(text)["license"] == "mit"


# The card: the section


def test_the_section_says_what_is_known():
    manifest = made(
        teacher=Teacher(name="meta-llama/Llama-3.1-8B", revision="abc123", quantisation="Q4_K_M", dtype="bfloat16",
                        engine="vllm", engine_version="0.9", logprobs_mode="raw_logprobs", licence="llama3.1"),
        tokenizer=TokenizerInfo(digest="a" * 64, vocabulary_size=128_256),
        sampling=Sampling(values="auto", resolution=1 / 16, top_k=64, top_p=0.95, min_k=4),
        source=Source(format="vllm", files=tuple(f"{n}.jsonl" for n in range(9))),
        lineage=(Source(name="some/texts", revision="main"), Source()),
        user_columns={"prompt": "string"},
        temperature=0.7,
    )  # fmt: skip
    text = section(card(manifest, REPO))
    for expected in (
        "[`meta-llama/Llama-3.1-8B`](https://huggingface.co/meta-llama/Llama-3.1-8B)",
        "`abc123`", "`Q4_K_M`", "`bfloat16`", "`vllm 0.9`", "`raw_logprobs`", "`llama3.1`", "128,256 tokens", "`" + "a" * 64 + "`",
        "temperature 0.7", "token t + 1", "a probability of 0.95, at most 64, but at least 4", "steps of 1/16, off by at most 1/32",
        "245.3 KiB, 125.6 bytes a position", "128,000, 64.0 a position", "`prompt` (`string`)", "`tail`",
        "from `0.jsonl`, `1.jsonl`, `2.jsonl`, `3.jsonl`, `4.jsonl`, and 4 more", "- `some/texts`, revision `main`",
        f'logitstore.open("hf://datasets/{REPO}")', f"logitstore pull {REPO} my-dataset", "StreamingLogits",
        f'load_dataset("{REPO}", "preview", split="train")', "only `logitstore` decodes", f"`{manifest.dataset_digest}`", "--deep",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_section_says_what_is_unknown():
    text = section(card(made(teacher=None, logit_width=None, normalised="candidates"), REPO))
    assert "| teacher | not recorded |" in text
    assert "| tokenizer | not recorded:" in text
    assert "| width of its logits | not recorded |" in text
    assert "normalised over the stored candidates only" in text
    assert 'tail="renormalise"' in text
    assert "`rest`" not in text


EVIL = (
    END, "a | b", "<script>alert(1)</script>", "x`y` | z", "line\nbreak\r\n# heading", "[click](javascript:alert(1))", "-->", "```\n",
    "\\", "a\\|b", "&lt;", "$$x$$", "\u202eevil", "\x00\x1b[31m", " ", "`", "x" * 5000, "a/b](http://x)", "![x](http://y/z.png)",
)  # fmt: skip


@pytest.mark.parametrize("evil", EVIL)
def test_values_from_the_manifest_cannot_break_out(evil):
    plain = made(
        teacher=Teacher(name="n", revision="n", quantisation="n", dtype="n", licence="n", engine="n", engine_version="n", logprobs_mode="n"),
        source=Source(format="n", name="n", revision="n", files=("n",)), user_columns={"n": "n"}, lineage=(Source(name="n"),),
    )  # fmt: skip
    manifest = made(
        teacher=Teacher(name=evil, revision=evil, quantisation=evil, dtype=evil, licence=evil, engine=evil, engine_version=evil, logprobs_mode=evil),
        source=Source(format=evil, name=evil, revision=evil, files=(evil,)), user_columns={evil: evil}, lineage=(Source(name=evil),),
    )  # fmt: skip
    text, expected = card(manifest, REPO), card(plain, REPO)
    inside = section(text)
    assert card(manifest, REPO, existing=text) == text
    assert len(inside.splitlines()) == len(section(expected).splitlines())
    for line, usual in zip(inside.splitlines(), section(expected).splitlines(), strict=True):
        assert line.count("|") == usual.count("|")
        assert len(line) < 8000
        outside = re.sub(r"`[^`]*`", "", line)
        if line not in (BEGIN, END):
            assert "<" not in line
            assert ">" not in line
        assert "](" not in outside
        assert line.count("`") % 2 == 0 or line.startswith("```")
    assert all(c.isprintable() or c == "\n" for c in text)


# The preview


def test_a_preview_is_a_small_uncompressed_stream_and_always_the_same(write):
    dataset = logitstore.open(write(sequences=30, positions=60))
    stream = preview(dataset, "train")
    assert stream == preview(logitstore.open(dataset.path), "train") == previews(dataset)["train"]
    assert len(stream) < 250_000
    reader = pa.ipc.open_stream(stream)
    assert reader.schema.equals(SCHEMA)
    rows = reader.read_all().to_pylist()
    assert len({row["id"] for row in rows}) == 20
    assert len(rows) <= 1000


def test_a_preview_says_what_the_sequences_say(write):
    dataset = logitstore.open(write(sequences=2, positions=5, values="float32"))
    rows = rows_of(preview(dataset, "train"))
    assert [(row["id"], row["position"]) for row in rows] == [("0", t) for t in range(5)] + [("1", t) for t in range(6)]
    for row in rows:
        sequence = dataset.by_id(row["id"])
        at = row["position"]
        start, end = sequence.offsets[at : at + 2]
        probabilities = np.exp(sequence.logprobs[start:end].astype(float))
        assert row["text"] is None
        assert row["token"] == str(sequence.tokens[at])
        assert row["next_token"] == (str(sequence.tokens[at + 1]) if at + 1 < len(sequence) else None)
        assert row["candidates"] == [str(n) for n in sequence.ids[start : start + 5]]
        np.testing.assert_allclose(row["probabilities"], probabilities[:5], atol=1e-5)
        np.testing.assert_allclose(row["rest"], 1 - probabilities[:5].sum(), atol=0.02)


def test_the_rest_is_null_where_it_is_unknown(write):
    rows = rows_of(preview(logitstore.open(write("a", normalised="candidates")), "train"))
    assert {row["rest"] for row in rows} == {None}
    dataset = logitstore.open(write("b", k=3, normalised="candidates"))
    for row in rows_of(preview(dataset, "train")):
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-4)


def test_sampled_distributions_show_shares_of_the_draws(tmp_path, quiet):
    with logitstore.Writer(tmp_path / "d") as writer:
        writer.add_draws(
            [3, 4], [[7, 8, 9, 1, 2, 5], [1, 2, 3, 4, 5, 6]], [[25, 10, 5, 4, 3, 3], [50, 0, 0, 0, 0, 0]], n=50
        )
    first, second = rows_of(preview(logitstore.open(tmp_path / "d"), "train"))
    assert first["candidates"] == ["7", "8", "9", "1", "2"]
    assert first["probabilities"] == [0.5, 0.2, 0.1, 0.08, 0.06]
    assert first["rest"] == 0.06
    assert (second["candidates"], second["probabilities"], second["rest"], second["next_token"]) == (
        ["1"],
        [1.0],
        0.0,
        None,
    )


def test_positions_without_a_distribution_are_left_out(tmp_path, quiet):
    with logitstore.Writer(tmp_path / "d") as writer:
        writer.add([1, 2, 3], [5, 6], np.log([0.5, 0.25]).astype(np.float32), count=[0, 2, 0])
        writer.add([1], [], np.empty(0, np.float32), count=[0])
    rows = rows_of(preview(logitstore.open(tmp_path / "d"), "train"))
    assert [(row["id"], row["position"], row["next_token"]) for row in rows] == [("0", 1, "3")]


def test_a_split_with_nothing_to_show_is_a_valid_stream_and_no_preview(tmp_path, quiet):
    with logitstore.Writer(tmp_path / "d") as writer:
        writer.add([1], [], np.empty(0, np.float32), count=[0])
    dataset = logitstore.open(tmp_path / "d")
    table = pa.ipc.open_stream(preview(dataset, "train")).read_all()
    assert table.num_rows == 0
    assert table.schema.equals(SCHEMA)
    assert previews(dataset) == {}
    with pytest.raises(InvalidInputError, match="no split is called 'other'"):
        preview(dataset, "other")
    with pytest.raises(InvalidInputError, match="positions is 0"):
        preview(dataset, "train", positions=0)


def with_pieces(path, pieces, tokens, ids=None, sequence_id="s"):
    (path / "t").mkdir()
    (path / "t" / "partial_vocabulary.json").write_bytes(Tokenizer.from_pieces(pieces).to_partial_json())
    ids = ids or [[token] for token in tokens]
    with logitstore.Writer(path / "d", tokenizer=path / "t", teacher="t", logit_width=1000) as writer:
        writer.add(tokens, ids, np.log(np.full(np.shape(ids), 0.9 / len(ids[0]), np.float32)), id=sequence_id)
    return logitstore.open(path / "d")


@pytest.mark.filterwarnings("ignore::logitstore.LogitStoreWarning")
def test_tokens_of_any_bytes_are_shown(tmp_path):
    pieces = {
        0: b"Hi",
        1: b"\xe2\x82",
        2: b"\xac",
        3: b"\x00\n\x1b[0m",
        4: "\u202eab\u200d".encode(),
        5: b"x" * 10**6,
        6: b"",
        7: "\U0001f600".encode() * 99,
    }
    rows = rows_of(
        preview(with_pieces(tmp_path, pieces, [0, 1, 2, 3, 4, 8, 5, 6, 7], sequence_id="a\nb" * 100), "train")
    )
    assert [row["token"] for row in rows] == [
        "Hi", "\\xe2\\x82", "\\xac", "\\x00\\n\\x1b[0m", "\\u202eab\\u200d", "<id 8>", "x" * 63 + "…", "", "\U0001f600" * 63 + "…",
    ]  # fmt: skip
    assert [row["text"] for row in rows[:6]] == [
        "Hi", "Hi\ufffd", "Hi€", "Hi€\\x00\\n\\x1b[0m", "Hi€\\x00\\n\\x1b[0m\\u202eab\u200d", "Hi€\\x00\\n\\x1b[0m\\u202eab\u200d<id 8>",
    ]  # fmt: skip
    assert [row["text"] for row in rows[6:]] == ["…" + "x" * 199] * 2 + ["…" + "x" * 100 + "\U0001f600" * 99]
    assert rows[0]["id"].startswith("a\\nba")
    assert len(rows[0]["id"]) == 128


@pytest.mark.filterwarnings("ignore::logitstore.LogitStoreWarning")
def test_long_tokens_make_fewer_rows_not_large_previews(tmp_path):
    pieces = {n: "\U0001f600".encode() * 1000 for n in range(1000)}
    ids = np.arange(1000).reshape(200, 5).tolist()
    stream = preview(with_pieces(tmp_path, pieces, list(range(200)), ids), "train", positions=200)
    assert 50_000 < len(stream) < 250_000


def test_reading_is_in_proportion(write):
    path = write(sequences=60, positions=40, chunk_candidates=400)
    full = preview(logitstore.open(path), "train")
    shard = next(path.glob("data/train/*.arrow"))
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)  # in a chunk of later sequences
    shard.write_bytes(data)
    assert preview(logitstore.open(path), "train") == full


def test_the_demo_reads_as_text(tmp_path, quiet):
    with as_file(files("logitstore") / "demo" / "llama-server-completion.jsonl.zst") as capture:
        convert([capture], tmp_path / "demo", teacher="google/gemma-3-270m", logit_width=262_144)
    dataset = logitstore.open(tmp_path / "demo")
    rows = rows_of(preview(dataset, "train"))
    assert rows[1] == {
        "id": "0",
        "position": 1,
        "text": "<id 0> yellow",
        "token": " yellow",
        "next_token": ".",
        "candidates": [".", ",", "!", " because", " and"],
        "probabilities": [0.39702, 0.18177, 0.11025, 0.08859, 0.05048],
        "rest": 0.17107,
    }
    assert len({row["id"] for row in rows}) == len(dataset) == 12
    assert "- format `llama-server`, from `llama-server-completion.jsonl.zst`" in card(dataset.info, REPO)


def test_a_real_tokenizer_makes_text(tmp_path, shared):
    tokenizer = shared("tokenizers") / "gemma3"
    with np.load(ROOT / "tests" / "data" / "gemma3-270m-shakespeare-top64.npz") as capture:
        tokens, ids, logprobs = (capture[name][:60] for name in ("tokens", "ids", "logprobs"))
    with logitstore.Writer(
        tmp_path / "d", tokenizer=tokenizer, teacher="google/gemma-3-270m", logit_width=262_144
    ) as writer:
        writer.add(tokens, ids, logprobs.astype(np.float32))
    rows = rows_of(preview(logitstore.open(tmp_path / "d"), "train"))
    assert len(rows) == 50
    assert rows[2]["text"] == "<bos>First Citizen"
    assert (rows[2]["next_token"], rows[3]["token"], rows[3]["next_token"]) == (":", ":", "\\n")
    assert all(sum(row["probabilities"]) + row["rest"] == pytest.approx(1, abs=0.02) for row in rows)
    assert rows[-1]["text"].endswith(rows[-1]["token"])


# With `datasets`


def two_splits(write):
    """A dataset of two splits, and of a third one without sequences; with a column of the user's."""
    path, other = (
        write(split, sequences=5, split=split, per_sequence=lambda i: {"note": f"n{i}"}) for split in ("train", "test")
    )
    shutil.move(other / "data" / "test", path / "data" / "test")
    first, second = logitstore.open(path).info, logitstore.open(other).info
    shards = (*first.shards, *second.shards)
    sums = {name: 2 * getattr(first.totals, name) for name in ("shards", "sequences", "positions", "candidates")}
    totals = msgspec.structs.replace(first.totals, bytes=sum(shard.bytes for shard in shards), **sums)
    merged = msgspec.structs.replace(
        first,
        shards=shards,
        splits={**sum_splits(shards), "none": Split()},
        totals=totals,
        dataset_digest=dataset_digest(shards, None),
    )
    (path / "logitstore.json").write_bytes(serialise_manifest(merged))
    return path


def test_both_configs_load_with_datasets(tmp_path, write, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = two_splits(write)
    dataset = logitstore.open(path)
    shown = previews(dataset)
    (path / "preview").mkdir()
    for name, stream in shown.items():
        (path / "preview" / f"{name}.arrow").write_bytes(stream)
    (path / "README.md").write_text(card(dataset.info, REPO, previews=shown), encoding="utf-8", newline="")
    cache = str(tmp_path / "cache")
    viewed = datasets.load_dataset(str(path), split="train", cache_dir=cache)
    assert viewed.to_list() == rows_of(shown["train"])
    stored = datasets.load_dataset(str(path), "logits", split="train", cache_dir=cache)
    assert stored["id"][:] == [sequence.id for sequence in dataset.split("train")]
    assert set(datasets.load_dataset(str(path), "logits", cache_dir=cache)) == {"train", "test"}
    assert set(datasets.load_dataset(str(path), cache_dir=cache)) == set(shown) == {"train", "test"}
    assert {"length", "note"} <= set(stored.column_names)
    for config, rows in (("preview", rows_of(shown["train"])), ("logits", stored.to_list())):
        streamed = datasets.load_dataset(str(path), config, split="train", streaming=True, cache_dir=cache)
        assert list(streamed) == rows
    direct = datasets.load_dataset(
        "arrow", data_files=str(path / "preview" / "train.arrow"), split="train", cache_dir=cache
    )
    assert direct.to_list() == rows_of(shown["train"])
