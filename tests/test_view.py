"""The page of `view`: its data is what the measures say, and nothing of a dataset becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from pull_rows import local  # noqa: F401 - a fixture
from view_rows import Elements, hostile_dataset

import logitstore
from logitstore.errors import InvalidInputError, RowIndexError, SequenceNotFoundError
from logitstore.look import page as module
from logitstore.look.measures import everything_else, measure
from logitstore.look.page import collect, json_in_html, name_of, page, page_html
from logitstore.look.page_data import Tokens, sequence_data
from logitstore.look.words import SHADES
from logitstore.shard.sequence import Sequence
from logitstore.text import readable, running
from logitstore.tokenizer import Tokenizer

ASSETS = Path(str(files("logitstore.look") / "assets"))
NAMES = ("view.js", "model.js", "source.js", "chart.js", "text.js", "panel.js", "dialog.js")


@pytest.fixture
def hostile(tmp_path, quiet):
    return hostile_dataset(tmp_path / "hostile")


def only(dataset, row=0, **options):
    """(the data of one sequence as the page has it, table of tokens)."""
    data = collect(dataset, rows=[row], **options).data
    return data["sequences"][0]["views"][0], data["tokens"]


def each(value, length):
    return value if isinstance(value, list) else [value] * length


def none_for_nan(values):
    return [None if value != value else pytest.approx(value, rel=1e-4, abs=1e-9) for value in values.tolist()]  # noqa: PLR0124


def spelled(view, table):
    texts = [table["labels"][view["spelled"]][place] + view["after"] for place in view["tokens"]]
    for at, text in zip(view["at"], view["text"], strict=True):
        texts[at] = text
    return texts


# Data


@pytest.mark.parametrize("k", [3, 8, 20])
def test_the_data_is_what_the_measures_say(write, k):
    random = np.random.default_rng(1)
    extras = {
        "entropy": [np.nan, *random.uniform(1, 3, 11)], "target_logprob": -random.uniform(4, 9, 12), "target_rank": random.integers(20, 90, 12),
    }  # fmt: skip
    dataset = logitstore.open(write(per_sequence=lambda i: extras if i == 0 else {}))
    for row in (0, 3):
        sequence = dataset[row]
        measures = measure(sequence)
        view, table = only(dataset, row, candidates=k)
        length = len(sequence)
        count = each(view["count"], length)
        assert count == sequence.count.tolist()
        assert [table["ids"][place] for place in view["tokens"]] == sequence.tokens.tolist()
        listed = np.concatenate([np.arange(n) for n in sequence.count]) < k
        assert [table["ids"][place] for place in view["candidates"]] == sequence.ids[listed].tolist()
        assert view["probabilities"] == none_for_nan(measures.probabilities[listed])
        assert view["entropy"] == none_for_nan(measures.entropy)
        assert each(view["exact"], length) == measures.entropy_is_stored.tolist()
        place = [-1, *measures.target_place.tolist()[:-1]]
        assert view["place"] == place
        assert view.get("rank", [at + 1 for at in place]) == [0, *measures.target_rank.tolist()[:-1]]
        assert ("rank" in view) == (sequence.target_rank is not None)
        assert view["surprise"] == [None, *none_for_nan(-measures.target_logprob[:-1])]
        assert view["before"] is False
        assert view["rest"] == none_for_nan(everything_else(sequence, measures, k))
        assert (view["kind"], view["entropy_from"], view["impossible"]) == ("vocabulary", "candidates and tail", [])


def test_numbers_are_rounded_for_display_only(tmp_path, quiet):
    dataset = logitstore.open(one(tmp_path / "d", [1, 2], [[4], [5]], np.log([[0.242499], [0.5]]), values="float32"))
    assert only(dataset)[0]["probabilities"][0] == pytest.approx(0.242499, rel=1e-7)


def test_positions_without_distribution(tmp_path, quiet):
    with logitstore.Writer(tmp_path / "d") as writer:
        writer.add([1, 2, 3, 4], [5, 6, 7], np.log([0.5, 0.25, 0.5], dtype=np.float32), count=[0, 2, 0, 1])
    view, table = only(logitstore.open(tmp_path / "d"))
    assert view["count"] == [0, 2, 0, 1]
    assert view["entropy"][0] is view["entropy"][2] is None
    assert [table["labels"][0][place] for place in view["candidates"]] == ["5", "6", "7"]
    assert spelled(view, table) == ["1 ", "2 ", "3 ", "4 "]


def test_draws_and_ratios_have_no_tail(tmp_path, quiet):
    with logitstore.Writer(tmp_path / "draws") as writer:
        writer.add_draws([1, 2, 3], [[4, 9, 2], [7, 1, 1], [0, 0, 0]], [[10, 30, 10], [50, 0, 0], [0, 0, 0]], 50)
    view, _ = only(logitstore.open(tmp_path / "draws"), candidates=1)
    assert (view["kind"], view["draws"], view["count"]) == ("draws", [50, 50, 0], [3, 1, 0])
    assert view["probabilities"] == pytest.approx([0.6, 1.0])
    assert view["rest"] == [pytest.approx(0.2), None, None]
    assert view["entropy_from"] == "draws"
    with logitstore.Writer(tmp_path / "ratios", normalised="candidates") as writer:
        writer.add([1, 2], [[4, 9], [7, 1]], np.log([[0.6, 0.2], [0.4, 0.1]], dtype=np.float32))
    view, _ = only(logitstore.open(tmp_path / "ratios"), candidates=1)
    assert view["kind"] == "candidates"
    assert view["probabilities"] == pytest.approx([0.75, 0.8], abs=0.01)
    assert view["rest"] == pytest.approx([0.25, 0.2], abs=0.01)


def test_a_stored_target_that_is_no_candidate_is_not_part_of_the_rest(tmp_path, quiet):
    with logitstore.Writer(tmp_path / "draws") as writer:
        writer.add_draws(
            [1, 2, 3], [[4, 9, 7], [7, 1, 5], [4, 5, 6]], [[30, 10, 10]] * 3, 50,
            target_logprob=np.log([0.3, 0.1, np.nan]), target_rank=[2, 3, 0],
        )  # fmt: skip
    view, _ = only(logitstore.open(tmp_path / "draws"), candidates=1)
    assert view["place"] == [-1, -1, -1]
    assert view["rank"] == [0, 2, 3]
    assert view["rest"] == pytest.approx([0.4, 0.4, 0.4])
    assert view["told"] == [False, True, True]


def one(path, tokens, ids, logprobs, tokenizer=None, columns=None, name="a", **settings):
    """A dataset of one sequence."""
    with logitstore.Writer(path, tokenizer=tokenizer, teacher="t", **settings) as writer:
        writer.add(tokens, ids, np.asarray(logprobs, np.float32), id=name, **(columns or {}))
    return path


def test_columns_of_users_and_no_prompt(tmp_path, quiet):
    path = one(tmp_path / "d", [1, 2], [[4], [5]], np.log([[0.5], [0.5]]), columns={"note": "x"})
    assert collect(logitstore.open(path)).data["sequences"][0]["id"] == "a"


def test_impossible_numbers_are_said_to_be(tmp_path, quiet):
    dataset = logitstore.open(one(tmp_path / "d", [1, 2, 3], [[4], [5], [6]], np.log([[0.5]] * 3)))
    forged = {"logprobs": np.array([-0.7, 3, -0.7], np.float32)}
    sequence = Sequence.of(vars(dataset[0]) | forged)
    tokens = Tokens((None,))
    view = sequence_data(sequence, tokens, 0, 4, slice(0, 3))
    assert view["impossible"] == [1]
    assert view["entropy"][1] is None
    assert view["surprise"][2] is None
    part = sequence_data(sequence, tokens, 0, 4, slice(2, 3))
    assert (part["impossible"], part["before"]) == ([-1], False)


def test_labels_are_those_of_each_datasets_own_tokenizer(tmp_path, quiet, monkeypatch):
    numbers = np.log([[0.5], [0.5]])
    pieces = {i: b" a%d" % i for i in range(9)}
    others = {i: b" b%d" % i for i in range(9)}
    first, same, plain = (
        logitstore.open(one(tmp_path / name, [1, 2], [[4], [5]], numbers, tokenizer, logit_width=9))
        for name, tokenizer in (
            ("first", Tokenizer.from_pieces(pieces)), ("same", Tokenizer.from_pieces(pieces)), ("plain", None),
        )
    )  # fmt: skip
    partial = logitstore.open(
        one(tmp_path / "partial", [1, 2], [[4], [5]], numbers, Tokenizer.from_pieces(others), logit_width=9)
    )
    for a, b in ((first, plain), (plain, first)):
        data = collect(a, other=b).data
        assert len(data["tokens"]["labels"]) == 1
        assert [spelled(view, data["tokens"]) for view in data["sequences"][0]["views"]] == [[" a1", " a2"]] * 2
        assert "could not be checked" in data["notes"][0]
    data = collect(first, other=partial).data
    texts = [spelled(view, data["tokens"]) for view in data["sequences"][0]["views"]]
    assert texts == [[" a1", " a2"], [" b1", " b2"]]
    assert "could not be checked" in data["notes"][0]
    monkeypatch.setattr(module, "check_tokenizers", lambda a, b: True)
    data = collect(first, other=same).data
    assert (len(data["tokens"]["labels"]), data["notes"]) == (1, [])


def test_a_window_is_a_part_of_the_whole(write):
    dataset = logitstore.open(write(positions=30))
    viewed = module.Viewed(dataset)
    sequence = viewed.split(None)[0]
    tokens = viewed.tokens()
    whole = sequence_data(sequence, tokens, 0, 4, slice(0, 30))
    part = sequence_data(sequence, tokens, 0, 4, slice(10, 20))
    for name in ("tokens", "entropy", "rest"):
        assert part[name] == whole[name][10:20]
    for name in ("surprise", "place"):  # and of the token that follows
        assert each(part[name], 11) == each(whole[name], 30)[10:21]
    assert part["next"] == whole["tokens"][20]
    assert "next" not in whole
    for name in ("candidates", "probabilities"):
        assert part[name] == whole[name][40:80]
    assert part["before"] is True
    assert viewed.sequence(sequence, 0, tokens, 10, 10)["positions"] == 30


def test_a_character_over_the_edge_of_parts_comes_out_whole(tmp_path, quiet):
    pieces = {i: bytes([byte]) for i, byte in enumerate("\N{GRINNING FACE}a".encode())}
    tokens = [4, 0, 1, 2, 3, 4]
    path = one(
        tmp_path / "d",
        tokens,
        np.array([[1, 2]] * 6),
        np.log([[0.5, 0.25]] * 6),
        Tokenizer.from_pieces(pieces),
        logit_width=9,
    )
    viewed = module.Viewed(logitstore.open(path))
    table = viewed.tokens()
    texts = []
    for start in (0, 3):
        part = viewed.sequence(viewed.split(None)[0], 0, table, start, 3)["views"][0]
        texts.append("".join(spelled(part, table.as_data())))
    assert texts == ["a", "\N{GRINNING FACE}a"]


def test_texts_are_readable_and_joined_give_the_whole(hostile):
    view, table = only(hostile)
    tokens = hostile[0].tokens.tolist()
    texts = spelled(view, table)
    expected = [readable(text, keep="\n\t") for text in running(hostile.tokenizer(), tokens)]
    long = tokens.index(11)
    assert texts[:long] + texts[long + 1 :] == expected[:long] + expected[long + 1 :]
    assert len(texts[long]) == 1024
    assert texts[5:7] == ["", "\N{GRINNING FACE}"]
    assert (texts[7], texts[10], texts[-2]) == ("\n", "\\u202e", "<id 19>")


def test_a_prompt_stands_where_its_placeholder_does(tmp_path, quiet):
    from logitstore_cli.demo import command as demo

    assert CliRunner().invoke(demo, [str(tmp_path / "demo")]).exit_code == 0
    dataset = logitstore.open(tmp_path / "demo")
    view, table = only(dataset)
    assert view["prompt"] is True
    assert "".join(spelled(view, table)).startswith("<bos>My favorite color is yellow.\n\nI love")
    best = [table["labels"][0][place] for place in view["candidates"][:3]]
    assert best == [" blue", " red", " the"]


def test_which_rows(write, hostile):
    dataset = logitstore.open(write(sequences=9, positions=3))
    rows = lambda **options: [each["row"] for each in collect(dataset, **options).data["sequences"]]  # noqa: E731
    assert rows() == [0, 1, 2, 3, 4]
    assert rows(rows=[7, 2, 7]) == [7, 2]
    assert rows(ids=["5", "6"]) == [5, 6]
    assert rows(rows=[6], ids=["5", "6"]) == [6, 5]
    assert collect(dataset[:0]).data["sequences"] == []
    with pytest.raises(RowIndexError, match="no row 9: the rows are 0 to 8"):
        rows(rows=[9])
    with pytest.raises(RowIndexError):
        rows(rows=[-1])
    with pytest.raises(RowIndexError, match="there are no sequences"):
        collect(dataset[:0], rows=[0])
    with pytest.raises(SequenceNotFoundError, match="nobody"):
        rows(ids=["nobody"])
    for wrong in ({"candidates": 0}, {"positions": 0}):
        with pytest.raises(InvalidInputError, match="from 1"):
            rows(**wrong)
    assert only(hostile, 1)[0]["tokens"] == []


def test_positions_are_capped_and_it_is_said(write):
    dataset = logitstore.open(write(sequences=9, positions=10))  # 10, 11, 12 ... positions
    whole = collect(dataset, positions=60)
    assert (len(whole.data["sequences"]), whole.notes) == (5, [])
    some = collect(dataset, rows=range(9), positions=40)
    assert len(some.data["sequences"]) == 3
    assert some.notes == ["sequences on the page: 3; row 3 would exceed 40 positions"]
    first = collect(dataset, positions=4)
    assert first.notes == ["only the first 4 of the 10 positions of row 0 are on the page"]
    assert len(first.data["sequences"][0]["views"][0]["tokens"]) == 4
    endless = collect(dataset, rows=range(10**12), positions=25)
    assert len(endless.data["sequences"]) == 2


def test_rows_of_ids(local):  # noqa: F811
    dataset = logitstore.open(local)
    for row in (0, 17, 39, 44):
        assert dataset.row_of(dataset[row].id) == row
    test = dataset.split("test")
    assert test.row_of(test[3].id) == 3
    assert dataset[::-1].row_of(dataset[0].id) == len(dataset) - 1
    with pytest.raises(SequenceNotFoundError):
        test.row_of(dataset[0].id)


def test_two_datasets(write, tmp_path, quiet):
    first = logitstore.open(write(sequences=4))
    second = logitstore.open(
        write("second", sequences=3, values="float32", per_sequence=lambda i: {"id": ["0", "1", "9"][i]}, teacher="u")
    )
    with logitstore.Writer(tmp_path / "third", teacher="v", logit_width=9) as writer:
        writer.add([1, 2], [[4], [5]], np.log([[0.5], [0.5]], dtype=np.float32), id="1")
    data = collect(first, other=second).data
    assert [each["name"] for each in data["datasets"]] == ["data", "second"]
    views = [each["views"] for each in data["sequences"]]
    assert views[1][0]["tokens"] == views[1][1]["tokens"]
    assert views[1][0]["candidates"] == views[1][1]["candidates"]
    assert views[2][1] == {"problem": "second has no sequence with this id."}
    with pytest.raises(InvalidInputError, match="none of the chosen sequences is in third"):
        collect(first, other=logitstore.open(tmp_path / "third"))
    with pytest.raises(InvalidInputError, match="none of the first 4 sequences of data is in apart"):
        collect(first, other=logitstore.open(write("apart", per_sequence=lambda i: {"id": f"x{i}"})))


def test_two_datasets_of_different_tokenizers(write, monkeypatch):
    import msgspec

    first, second = logitstore.open(write()), logitstore.open(write("second"))
    for dataset, digest in ((first, "a"), (second, "b")):
        tokenizer = logitstore.schema.TokenizerInfo(digest=digest * 64, vocabulary_size=9)
        dataset._manifest = msgspec.structs.replace(dataset.info, tokenizer=tokenizer)
    with pytest.raises(InvalidInputError, match="tokenizers differ"):
        collect(first, other=second)


# The page


def test_nothing_of_a_dataset_becomes_markup(hostile):
    text = page(hostile)
    plain = Elements(page_html({**collect(hostile).data, "sequences": [], "tokens": {"ids": [], "labels": [[]]}}))
    elements = Elements(text)
    assert elements.found == plain.found
    style, data, script = elements.inside
    assert "alert(" not in text.replace(data, "")
    assert not re.search("[<>&\u2028\u2029]", data)
    assert json.loads(data)["sequences"][0]["id"] == "<script>alert(2)</script>&"
    assert [tag for tag, _ in elements.found if tag in ("script", "style", "link", "img", "iframe", "form", "a")] == [
        "link", "style", "script", "script",
    ]  # fmt: skip
    for _, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()  # noqa: E731
    (said,) = [a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{digest(script)}'" in said
    assert f"style-src 'sha256-{digest(style)}'" in said
    assert said.startswith("default-src 'none'; ")
    assert "connect-src" not in said
    assert "unsafe" not in said


def test_the_page_asks_for_nothing(hostile):
    text = page(hostile)
    assert set(re.findall(r"https?://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "url(" not in text


def test_no_path_of_this_machine_is_in_the_page(tmp_path, write, monkeypatch):
    dataset = logitstore.open(write(teacher="/home/someone/models/big"))
    text = page(dataset)
    assert str(tmp_path) not in text
    assert "/home/" not in text
    assert collect(dataset).data["datasets"][0]["teacher"] == "big"
    monkeypatch.chdir(tmp_path / "data")
    assert name_of(logitstore.open(".")) == "data"
    for name, published in (("org/model", "org/model"), ("C:\\models\\x", "x"), ("./x/", "x"), ("gpt-4o", "gpt-4o")):
        assert module._published(name) == published


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hf://datasets/me/facts@0123abc", "facts"), ("hf://datasets/me/facts@main/part/", "part"), ("https://h/d/x?token=secret", "x"),
        ("s3://bucket", "dataset"),
    ],
)  # fmt: skip
def test_names_of_remote_datasets(path, name):
    assert name_of(SimpleNamespace(path=path)) == name


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_a_name_that_is_no_utf_8(write):
    path = write()
    named = path.with_name(os.fsdecode(b"caf\xe9"))
    path.rename(named)
    name = name_of(logitstore.open(named))
    assert name == "caf\N{REPLACEMENT CHARACTER}"
    assert json.loads(json_in_html({"name": name})) == {"name": name}


def test_shades_are_those_of_show(write):
    assert tuple(collect(logitstore.open(write())).data["shades"]) == SHADES
    assert ", ".join(f"{shade:g}" for shade in SHADES) not in (ASSETS / "model.js").read_text(encoding="utf-8")


def test_names_are_escaped(write):
    text = page(logitstore.open(write("<b>&amp;")))
    assert "<title>&lt;b&gt;&amp;amp; " in text
    assert "<b>" not in text


def test_json_in_html():
    value = {"a": ["</script><!--", "&lt;", "\u2028\u2029", "\N{GRINNING FACE}", None, 1e-300, -0.5]}
    text = json_in_html(value)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == value


def test_the_script_never_makes_markup_of_text():
    names = sorted(path.name for path in ASSETS.glob("*.js"))
    assert names == sorted(NAMES)
    for name in (*NAMES, "view.css", "view.html"):
        text = (ASSETS / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) < 500, name
        for banned in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", 'setTimeout("', ".srcdoc"):  # fmt: skip
            assert banned not in text, (name, banned)


def test_20_000_tokens_take_less_than_4_mb(tmp_path, quiet):
    path = long_dataset(tmp_path / "long", 20_000)
    text = page(logitstore.open(path))
    assert len(text.encode()) < 4_000_000


def long_dataset(path, positions, k=16):
    """A dataset of one long sequence of words of several lengths and line ends."""
    pieces = {i: f" w{i:x}".encode() for i in range(2000)} | {0: b"\n", 1: b".", 2: b" <script>alert(1)</script>"}
    random = np.random.default_rng(7)
    tokens = random.zipf(1.4, positions) % 2000
    with logitstore.Writer(path, tokenizer=Tokenizer.from_pieces(pieces), logit_width=2000, teacher="t") as writer:
        logits = -np.sort(-random.normal(0, 3, (positions, k)), axis=1)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.1
        ids = (random.integers(0, 2000, (positions, 1)) + np.arange(k) * 31) % 2000
        writer.add(tokens, ids, logprobs.astype(np.float32))
    return path
