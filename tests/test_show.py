"""`logitstore show`: what is shown of a sequence, and how it is drawn."""

import html
import io
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.cells import cell_len
from rich.color import Color, ColorSystem
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, MONOKAI

import logitstore
from logitstore.convert import convert
from logitstore.look.show import TextNotFoundError, show
from logitstore.look.words import SHADES, to_be_read
from logitstore.tokenizer import Tokenizer
from logitstore_cli.show import as_data, chosen, look_of
from logitstore_cli.show_render import PART, RAMP, RAMP_16, Look, bar, beginning, ending, isolated, level, lines

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.filterwarnings("ignore::logitstore.LogitStoreWarning")]

PIECES = {
    0: b"one", 1: b" two", 2: b" \xf0\x9f", 3: b"\x98\x80", 4: "\u05e9\u05dc\u05d5\u05dd".encode(), 5: b"\x1b[31mred\n\tx",
    6: "\u4eca\u65e5\u306e".encode(), 7: b" " * 100, 8: "\u202eabc\u0301".encode(), 9: b"[bold]m[/bold] :smile:",
}  # fmt: skip
PRINTED = re.compile("\x1b\\[[0-9;]*m")


def distributions(tokens, k):
    """Position t has the tokens after t in a row, so that the next one has rank 1 where tokens count up."""
    ids = (np.asarray(tokens, np.int64)[:, None] + 1 + np.arange(k)) % 50
    logprobs = np.tile(np.log(0.8 * 0.5 ** np.arange(1, k + 1)), (len(tokens), 1)).astype(np.float32)
    return ids, logprobs


def written(path, tokens, k=3, ids=None, logprobs=None, draws=None, pieces=PIECES, settings=None, **columns):
    if pieces is not None:
        (path / "t").mkdir()
        (path / "t" / "partial_vocabulary.json").write_bytes(Tokenizer.from_pieces(pieces).to_partial_json())
    made_ids, made_logprobs = distributions(tokens, k)
    ids = made_ids if ids is None else ids
    given = {"tokenizer": path / "t" if pieces is not None else None, "teacher": "t", "logit_width": 50}
    with logitstore.Writer(path / "d", values="float32", **given, **(settings or {})) as writer:
        if draws is not None:
            writer.add_draws(tokens, ids, draws, int(np.sum(draws[0])), **columns)
        else:
            writer.add(tokens, ids, made_logprobs if logprobs is None else logprobs, **{"id": "s", **columns})
    return logitstore.open(path / "d")


def plain(dataset, look=None, **options):
    identified = dataset.info.tokenizer is not None
    return [line.plain for line in lines(chosen(dataset, **options), look or Look(identified=identified))]


def run(*arguments, status=0, **environment):
    command = [sys.executable, "-m", "logitstore_cli", "show", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=120, env={**os.environ, **environment}, check=False)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == status, (done.returncode, out, err)
    assert "Traceback" not in err
    return out, err


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    import warnings

    path = tmp_path_factory.mktemp("show") / "demo"
    with (
        as_file(files("logitstore") / "demo" / "llama-server-completion.jsonl.zst") as capture,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        convert([capture], path, teacher="google/gemma-3-270m", logit_width=262_144)
    return path


# What is shown


def test_a_position_says_what_comes_after_its_token(tmp_path):
    shown = chosen(written(tmp_path, [0, 1, 2, 3]), at=[0])
    assert (shown.id, shown.row, shown.normalised, shown.found_more) == ("s", 0, "vocabulary", 0)
    assert [piece.text for piece in shown.tokens] == ["one", " two", " ", "\U0001f600"]
    assert [piece.next_rank for piece in shown.tokens] == [1, 1, 1, None]
    assert shown.tokens[0].next_logprob == pytest.approx(np.log(0.4))
    (position,) = shown.positions
    assert (position.position, position.text, position.before, position.count) == (0, "one", "one", 3)
    assert [(c.rank, c.id, c.text, c.is_next) for c in position.candidates] == [
        (1, 1, " two", True), (2, 2, " \\xf0\\x9f", False), (3, 3, "\\x98\\x80", False),
    ]  # fmt: skip
    assert [c.probability for c in position.candidates] == pytest.approx([0.4, 0.2, 0.1])
    assert position.everything_else == pytest.approx(0.3, abs=0.01)
    assert (position.next.id, position.next.rank, position.next.is_candidate) == (1, 1, True)
    mass = np.array([0.4, 0.2, 0.1, 0.3])
    assert position.entropy == pytest.approx(-(mass * np.log(mass)).sum(), abs=0.02)
    assert position.entropy_from == "candidates and tail"


def test_what_is_not_listed_is_with_everything_else_but_for_the_next_token(tmp_path):
    dataset = written(
        tmp_path, [0, 3, 1, 9, 0], target_logprob=np.log([0.1, 0.05, 0.01, np.nan, np.nan]), target_rank=[3, 7, 9, 0, 0]
    )
    first, second, third, fourth, last = chosen(dataset, at=range(5), candidates=2).positions
    assert (first.next.rank, first.next.is_candidate) == (3, True)
    assert first.everything_else == pytest.approx(0.3, abs=0.01)  # the tail; the third candidate has its own line
    assert (second.next.rank, second.next.is_candidate) == (7, False)
    assert second.everything_else == pytest.approx(0.35, abs=0.01)
    assert third.next.probability == pytest.approx(0.01)
    assert (fourth.next.rank, fourth.next.probability) == (None, None)
    assert fourth.everything_else == pytest.approx(0.4, abs=0.01)
    assert last.next is None
    assert last.everything_else == pytest.approx(0.4, abs=0.01)
    text = "\n".join(plain(dataset, at=[0, 1, 2, 3], candidates=2))
    assert re.search(r"\n  3  '\\x98\\x80' +10.00 %  <- next\n", text)
    assert re.search(r"\n  7  ' two' +5.00 %  <- next, not among the 3 candidates\n", text)
    assert re.search(r"\n  \?  'one' +<- next, not among the 3 candidates\n", text)


def test_the_most_uncertain_positions_are_chosen_in_the_order_of_the_text(tmp_path):
    dataset = written(tmp_path, [0, 1, 2, 3, 0, 1], entropy=[1, 5, 2, np.nan, 4, 0.5])
    shown = chosen(dataset)
    assert [position.position for position in shown.positions] == [1, 2, 4]
    sources = ["stored", "stored", "stored", "candidates and tail", "stored", "stored"]
    assert [piece.entropy_from for piece in shown.tokens] == sources
    text = "\n".join(plain(dataset, at=[1, 3]))
    assert "entropy 5.00 nats" in text
    assert "entropy at least 1.2" in text


def test_positions_by_number(tmp_path):
    dataset = written(tmp_path, [0, 1, 2])
    assert [position.position for position in chosen(dataset, at=[-1, 0, 2, 0]).positions] == [0, 2]
    for outside in (3, -4):
        says = f"^there is no position {outside}: the sequence 's' has the positions 0 to 2$"
        with pytest.raises(logitstore.RowIndexError, match=says):
            chosen(dataset, at=[outside])


def test_a_text_is_found_where_it_ends(tmp_path):
    dataset = written(tmp_path, [0, 1, 2, 3, 0, 1])
    for text, positions in (
        ("one", [0, 4]),
        ("e t", [1, 5]),
        ("one two ", [2]),
        ("wo \U0001f600o", [4]),
        ("o", [0, 1, 4, 5]),
    ):
        assert [p.position for p in chosen(dataset, find=text).positions] == positions, text
    assert [p.position for p in chosen(dataset, find="one two", at=[2]).positions] == [1, 2, 5]
    with pytest.raises(TextNotFoundError, match="'three' is not in the sequence 's'"):
        chosen(dataset, find="three")
    with pytest.raises(logitstore.InvalidInputError):
        chosen(dataset, find="")


def test_case_and_kinds_of_white_space_make_no_difference_to_what_is_found(tmp_path):
    pieces = {0: "Stra\u00dfe".encode(), 1: b"\n", 2: "\u0130 \u03a3".encode(), 3: b"x"}
    dataset = written(tmp_path, [0, 1, 2, 3, 0, 2], pieces=pieces)
    for text, positions in (
        ("STRASSE", [0, 4]), ("stra\u00dfe\u00a0", [1]), ("e i\u0307", [2]), ("\u03c2X", [3]), ("\u03c3", [2, 5]),
        ("s", [0, 4]), ("SX", []), ("e  ", []),
    ):  # fmt: skip
        if positions:
            assert [p.position for p in chosen(dataset, find=text).positions] == positions, text
        else:
            with pytest.raises(TextNotFoundError):
                chosen(dataset, find=text)


def test_many_places_are_counted(tmp_path):
    dataset = written(tmp_path, [0] * 25)
    shown = chosen(dataset, find="one")
    assert [position.position for position in shown.positions] == list(range(10))
    assert shown.found_more == 15
    assert plain(dataset, find="one")[-1] == "15 more places of this text are not shown."


def test_the_text_of_a_prompt_stands_for_its_placeholder(demo):
    shown = chosen(logitstore.open(demo), find="My favorite color is")
    assert shown.tokens[0].text == "<bos>My favorite color is"
    (position,) = shown.positions
    assert position.position == 0
    assert [c.text for c in position.candidates[:2]] == [" blue", " red"]
    assert position.next.text == " yellow"


@pytest.mark.parametrize("pieces", [PIECES, None])
def test_columns_of_users_need_no_prompt_among_them(tmp_path, pieces):
    dataset = written(
        tmp_path, [0, 1], pieces=pieces, settings={"columns": pa.schema({"domain": pa.string()})}, domain="law"
    )
    shown = chosen(dataset)
    assert not shown.begins_with_placeholder
    assert shown.tokens[0].text == ("one" if pieces else "0 ")


def test_a_placeholder_is_told_by_the_data_not_by_its_text(tmp_path):
    given = {"settings": {"columns": pa.schema({"prompt": pa.string()})}, "prompt": "before <id 40>"}
    shown = chosen(dataset := written(tmp_path, [40, 0, 41], **given), at=[0, 2])
    assert shown.begins_with_placeholder
    assert [piece.text for piece in shown.tokens] == ["before <id 40>", "one", "<id 41>"]
    text = plain(dataset, at=[0, 2])
    assert any(line.startswith("  a placeholder for the prompt: 3 candidates") for line in text)
    assert any(line.startswith("  token '<id 41>': 3 candidates") for line in text)


def test_tokens_that_a_tokenizer_lacks_are_no_placeholders(tmp_path):
    dataset = written(tmp_path, [40, 0], settings={"columns": pa.schema({"prompt": pa.string()})}, prompt="")
    assert not chosen(dataset).begins_with_placeholder
    assert any(line.startswith("  token '<id 40>'") for line in plain(dataset, at=[0]))


def test_the_next_token_takes_nothing_from_draws_of_which_it_is_none(tmp_path):
    ids, draws = np.tile(np.arange(10, 22), (2, 1)), np.tile([40, *[1] * 11], (2, 1))
    dataset = written(tmp_path, [0, 1], ids=ids, draws=draws, target_logprob=np.log([0.5, np.nan]))
    (first,) = chosen(dataset, at=[0]).positions
    assert (first.draws, first.count, first.next.is_candidate) == (51, 12, False)
    assert first.everything_else == pytest.approx(2 / 51)
    assert re.search(r"\n +other candidates +3.92 %$", "\n".join(plain(dataset, at=[0])))


def test_the_next_token_has_the_numbers_of_the_candidate_that_it_is(tmp_path):
    ids, draws = np.tile(np.arange(10, 22), (2, 1)), np.tile([40, *[1] * 11], (2, 1))
    known = {"target_logprob": np.log([0.5, np.nan]), "target_rank": [30, 0]}
    shown = chosen(written(tmp_path, [0, 21], ids=ids, draws=draws, **known), at=[0])
    assert (shown.tokens[0].next_rank, shown.tokens[0].next_logprob) == (30, pytest.approx(np.log(0.5)))
    (first,) = shown.positions
    assert (first.next.rank, first.next.probability) == (12, pytest.approx(1 / 51))
    assert first.everything_else == pytest.approx(1 / 51)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("stored", ""), ("candidates and tail", "at least "), ("draws", "of the draws "),
        ("candidates", "among the candidates "),
    ],
)  # fmt: skip
def test_an_entropy_is_said_to_be_a_bound_only_where_it_is_one(tmp_path, source, said):
    given = {
        "stored": {"entropy": [1.5, 1.5]},
        "candidates and tail": {},
        "draws": {"ids": [[1, 5]] * 2, "draws": np.array([[30, 20]] * 2)},
        "candidates": {"settings": {"normalised": "candidates"}},
    }
    dataset = written(tmp_path, [0, 1], **given[source])
    shown = chosen(dataset, at=[0])
    assert [piece.entropy_from for piece in shown.tokens] == [source] * 2
    assert shown.positions[0].entropy_from == source
    text = plain(dataset, Look(200, blocks=True, ramp=RAMP), at=[0])
    assert re.search(rf", entropy {said}\d", "\n".join(text))
    assert text[1].endswith("nats of uncertainty" + (f" ({said.strip()})" if said else ""))


def test_bounds_beside_stored_entropies_are_told_apart(tmp_path):
    dataset = written(tmp_path, [0, 1], entropy=[1, np.nan])
    assert plain(dataset, Look(ramp=RAMP))[1].endswith("nats of uncertainty (where not stored: at least)")


def test_entropies_are_not_below_zero(tmp_path):
    dataset = written(tmp_path, [0, 1], ids=[[5]] * 2, draws=np.array([[7]] * 2))
    assert "-0.00" not in "\n".join(plain(dataset))


def test_sampled_distributions_say_how_many_draws(tmp_path):
    dataset = written(tmp_path, [0, 1, 2], ids=[[1, 5]] * 3, draws=np.array([[30, 20]] * 3))
    shown = chosen(dataset)
    assert [position.position for position in shown.positions] == [0, 1, 2]
    first = shown.positions[0]
    assert (first.draws, [c.draws for c in first.candidates], first.entropy is None) == (
        50,
        [30, 20],
        shown.tokens[0].entropy is None,
    )
    assert first.everything_else == 0
    text = "\n".join(plain(dataset, at=[0], candidates=1))
    assert "sampled: 50 draws of 2 tokens" in text
    assert re.search(r"other candidates +40.00 %", text)


def test_ratios_are_shares_of_the_candidates(tmp_path):
    dataset = written(tmp_path, [0, 1], settings={"normalised": "candidates"})
    (position,) = chosen(dataset, at=[0]).positions
    assert [c.probability for c in position.candidates] == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert position.everything_else == 0
    assert "other candidates" not in "\n".join(plain(dataset, at=[0]))
    text = "\n".join(plain(dataset, at=[0], candidates=1))
    assert "only their ratios are known: percentages are shares of the candidates" in text
    assert re.search(r"other candidates +42.86 %", text)


def test_ids_stand_for_texts_without_a_tokenizer(tmp_path):
    dataset = written(tmp_path, [7, 8, 9], pieces=None)
    text = plain(dataset, find="7 8")
    assert "7 8 9 " in text
    assert "position 1 after '7 8 '" in text
    assert any(re.match(r"  1  9 +40.00 %  #+  <- next$", line) for line in text)


def test_ragged_counts_and_positions_without_a_distribution(tmp_path):
    dataset = written(tmp_path, [0, 1, 2], ids=[1, 2, 3], logprobs=np.log([0.5, 0.25, 0.9]), count=[2, 0, 1])
    shown = chosen(dataset, at=[0, 1, 2])
    assert [position.count for position in shown.positions] == [2, 0, 1]
    assert (shown.tokens[1].entropy, shown.positions[1].everything_else) == (None, None)
    text = "\n".join(plain(dataset, at=[1]))
    assert "token ' two': no distribution\n" in text
    assert re.search(r"' \\xf0\\x9f' +<- next$", text)
    assert [p.position for p in chosen(dataset).positions] == [0, 2]


@pytest.mark.parametrize(("following", "k", "left"), [(1, 3, 0), (1, 2, 0.25), (3, 3, 0), (3, 2, 0), (3, 1, 0.25)])
def test_there_is_no_line_where_nothing_is_left(tmp_path, following, k, left):
    dataset = written(
        tmp_path, [0, following], ids=[[1, 2, 3]] * 2, logprobs=np.log([[0.5, 0.25, 0.25]] * 2),
        settings={"normalised": "candidates"}, target_logprob=np.log([{1: 0.5, 3: 0.249}[following], np.nan]),
    )  # fmt: skip
    (position,) = chosen(dataset, at=[0], candidates=k).positions
    assert position.everything_else == pytest.approx(left, abs=0 if left == 0 else 0.01)
    assert ("other candidates" in "\n".join(plain(dataset, at=[0], candidates=k))) == (left > 0)


@pytest.mark.parametrize("tokens", [[], [1]])
def test_empty_and_shortest_sequences(tmp_path, tokens):
    dataset = written(tmp_path, tokens)
    assert len(chosen(dataset).positions) == len(tokens)
    assert plain(dataset)[0] == f"sequence 's' (row 0): {len(tokens)} token{'' if len(tokens) == 1 else 's'}"
    says = "the sequence 's' has the positions 0 to 0" if tokens else "the sequence 's' is empty"
    with pytest.raises(logitstore.RowIndexError, match=f"there is no position {len(tokens)}: {says}$"):
        chosen(dataset, at=[len(tokens)])
    assert len(plain(dataset, Look(ramp=RAMP))) > 1 or not tokens


def test_a_dataset_without_sequences_says_so(tmp_path):
    with logitstore.Writer(tmp_path / "d", teacher="t", logit_width=50):
        pass
    with pytest.raises(logitstore.RowIndexError, match=r"\b(no|0) sequences"):
        chosen(logitstore.open(tmp_path / "d"))


def test_impossible_numbers_are_not_shown(tmp_path):
    dataset = written(tmp_path, [0, 1, 2])
    sequence = to_be_read(dataset)[0]
    forged = np.array(sequence.logprobs)
    forged[[0, 5]] = 3, np.nan
    sequence = type(sequence).of({**vars(sequence), "logprobs": forged})
    shown = show(sequence, dataset.tokenizer())
    assert [position.position for position in shown.positions] == [2]
    shown = show(sequence, dataset.tokenizer(), at=[0, 1])
    for position in shown.positions:
        assert (position.impossible, position.count, position.candidates) == (True, 3, ())
        assert (position.entropy, position.everything_else, position.next.probability) == (None, None, None)
    text = [line.plain for line in lines(shown, Look())]
    assert text.count("  token 'one': its numbers are impossible: see logitstore validate --deep") == 1
    assert sum(re.fullmatch(r"  \?  ' two' +<- next", line) is not None for line in text) == 1
    assert not any("%" in line for line in text)
    forged[8] = np.inf
    assert [position.position for position in show(sequence, None).positions] == [0, 1, 2]
    assert json.loads(json.dumps(as_data(shown), allow_nan=False))["positions"][0]["impossible"]


def test_columns_are_not_looked_at_beyond_those_needed(write):
    sequence = logitstore.open(write(sequences=1))[0]
    assert show(sequence, None, at=[0]).row is None


# How it is drawn


def test_nothing_untrusted_reaches_the_terminal(tmp_path):
    dataset = written(tmp_path, [5, 8, 9, 4, 7, 2, 3], k=10, id="a\x1b[2J\u202e")
    for look in (Look(), Look(100, blocks=True, ramp=RAMP)):
        text = "\n".join(plain(dataset, look, at=range(7)))
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        assert "sequence 'a\\x1b[2J\\u202e'" in text
        assert "\\x1b[31mred↵\n⇥x\\u202eabc\u0301[bold]m[/bold] :smile:" in text


def test_joiners_stay_in_text_and_are_escaped_in_candidates(tmp_path):
    family = "\N{MAN}\u200d\N{WOMAN}"
    text = plain(written(tmp_path, [1, 0, 1], pieces={0: family.encode(), 1: "\u00a0a".encode()}), at=[0, 1])
    assert text[2] == f"\u00a0a{family}\u00a0a"
    assert f"position 1 after '\u00a0a{family}'" in text
    assert any("  '\\xa0a'" in line for line in text)
    assert "  token '\N{MAN}\\u200d\N{WOMAN}'" in "\n".join(text)


def test_a_right_to_left_candidate_leaves_the_order_of_its_line_alone(tmp_path):
    word = "\u05e9\u05dc\u05d5\u05dd"
    assert isolated("'a'") == "'a'"
    assert isolated(f"'{word}'") == f"\u200e'{word}'\u200e"
    rows = [line for line in plain(written(tmp_path, [3, 4]), at=[0]) if re.match(r"  \d ", line)]
    assert rows[0].startswith(f"  1  \u200e'{word}'\u200e")
    assert len({cell_len(line[: line.index("%")]) for line in rows}) == 1


def test_columns_are_even_whatever_the_width_of_the_letters(tmp_path):
    dataset = written(tmp_path, [3], k=8)
    for width in (40, 80, 120):
        rows = [
            line for line in plain(dataset, Look(width, blocks=True), at=[0], candidates=8) if re.match(r"  \d ", line)
        ]
        assert len({cell_len(line[: line.index("%")]) for line in rows}) == 1
        assert max(map(cell_len, rows)) <= max(width, 70)


def test_partial_characters_can_be_seen_where_there_are_shades(tmp_path):
    dataset = written(tmp_path, [3, 2, 3], pieces=PIECES | {2: b"\xf0\x9f"})
    assert plain(dataset, Look(80, blocks=True, ramp=RAMP))[3] == "\ufffd▯\U0001f600".replace("\ufffd", "\ufffd\ufffd")
    assert plain(dataset)[2] == "\ufffd\ufffd\U0001f600"


def test_tokens_without_width_can_be_seen(tmp_path):
    pieces = {
        0: b"e",
        1: "\u0301".encode(),
        2: "\u200b".encode(),
        3: "\u00ad".encode(),
        4: "\u200d".encode(),
        5: b"x\xe2",
    }
    dataset = written(tmp_path, [0, 1, 2, 3, 4, 0], k=6, pieces=pieces)
    assert plain(dataset, Look(blocks=True))[2] == f"e\u0301{PART * 3}e"
    assert plain(dataset)[2] == "e\u0301\u200b\u00ad\u200de"
    text = "\n".join(plain(dataset, at=[0]))
    for label in ("\u25cc\u0301", "\\u200b", "\\xad", "\\u200d"):
        assert f"'{label}'" in text


def test_marks_do_not_pile_up(tmp_path):
    dataset = written(tmp_path, [0, 1, 0], pieces={0: ("a" + "\u0301" * 300).encode(), 1: b"b"})
    for look in (Look(), Look(blocks=True, ramp=RAMP)):
        assert max(map(len, re.findall("\u0301+", "\n".join(plain(dataset, look, at=[0, 1]))))) == 8


def test_shades_follow_the_entropy(tmp_path):
    dataset = written(tmp_path, [0, 1, 0], entropy=[0.1, 9, 1.6])
    text = list(lines(chosen(dataset, at=[1]), Look(80, blocks=True, ramp=RAMP)))[3]
    assert [text.plain[span.start : span.end] for span in text.spans] == ["one", " two", "one"]
    shades = [span.style.bgcolor for span in text.spans]
    assert shades == [RAMP[0].bgcolor, RAMP[-1].bgcolor, RAMP[3].bgcolor]
    assert [span.style.underline for span in text.spans] == [None, True, None]
    assert [level(entropy) for entropy in (0, *SHADES, 99)] == [0, 1, 2, 3, 4, 5, 6, 7, 7]


def luminance(color, theme):
    channels = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color.get_truecolor(theme)]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


@pytest.mark.parametrize("theme", [DEFAULT_TERMINAL_THEME, MONOKAI], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("ramp", "system"), [(RAMP, ColorSystem.TRUECOLOR), (RAMP, ColorSystem.EIGHT_BIT), (RAMP_16, ColorSystem.STANDARD)]
)
def test_shades_can_be_read_and_told_apart(ramp, system, theme):
    assert len(ramp) == len(SHADES) + 1
    assert len({style.bgcolor.downgrade(system) for style in ramp}) == len(ramp)
    for style in ramp:
        both = sorted(luminance(color.downgrade(system), theme) for color in (style.color, style.bgcolor))
        assert isinstance(style.bgcolor, Color)
        assert (both[1] + 0.05) / (both[0] + 0.05) > (4.5 if system is not ColorSystem.STANDARD else 3), style


def test_bars():
    assert [bar(share, 8, blocks=False) for share in (0, 0.001, 0.5, 1)] == ["", "#", "####", "########"]
    assert [bar(share, 2, blocks=True) for share in (0, 0.001, 0.25, 0.53, 1)] == ["", "▏", "▌", "█", "██"]


def test_texts_are_cut_by_cells():
    assert ending("今日の天気", 5) == "…天気"
    assert beginning("今日の天気", 5) == "今日…"
    assert ending("abc", 3) == beginning("abc", 3) == "abc"
    assert beginning("   a   b", 6) == "   a …"


def test_a_console_says_how_to_draw():
    def look(**settings):
        environment = settings.pop("environment", {})
        return look_of(Console(file=io.StringIO(), width=90, _environ=environment, legacy_windows=False, **settings))

    assert look() == Look()
    assert look(force_terminal=True, color_system="truecolor") == Look(90, blocks=True, ramp=RAMP)
    assert look(force_terminal=True, color_system="standard").ramp == RAMP_16
    assert look(force_terminal=True, color_system="256", environment={"NO_COLOR": "1"}) == Look(90, blocks=True)
    assert look(force_terminal=True, color_system=None) == Look(90, blocks=True)


# The command


def test_a_pipe_gets_plain_text(demo):
    out, err = run(demo, "--find", "favorite color is", "-k", 3)
    assert err == ""
    assert out == (
        "sequence '0' (row 0): 49 tokens\n"
        "\n"
        "<bos>My favorite color is yellow.↵\n"
        "↵\n"
        "I love the color yellow, it\u2019s the color of peace and love. I think that color is so beautiful. I love that color.↵\n"
        "↵\n"
        "I love the color yellow because it represents love. It\u2019s so beautiful\n"
        "\n"
        "position 0 after '<bos>My favorite color is'\n"
        "  a placeholder for the prompt: 64 candidates, entropy at least 3.21 nats\n"
        "  1  ' blue'           12.32 %  #######################################\n"
        "  2  ' red'             9.60 %  ##############################\n"
        "  3  ' the'             6.81 %  ######################\n"
        "  6  ' yellow'          4.98 %  <- next\n"
        "     everything else   66.47 %\n"
    )
    assert run(demo, "--find", "favorite color is", "-k", 3, COLUMNS="30")[0] == out


def test_json_says_everything(demo):
    content = json.loads(run(demo, "--row", -11, "--at", -1, "--at", 3, "--json")[0])
    assert (content["id"], content["row"], len(content["tokens"])) == ("1", 1, 49)
    assert set(content["tokens"][0]) == {"id", "text", "entropy", "entropy_from", "next_rank", "next_logprob"}
    assert content["tokens"][-1]["entropy"] is None
    assert [position["position"] for position in content["positions"]] == [3, 48]
    first = content["positions"][0]
    total = sum(candidate["probability"] for candidate in first["candidates"]) + first["everything_else"]
    assert total + (
        0 if any(c["is_next"] for c in first["candidates"]) else first["next"]["probability"]
    ) == pytest.approx(1, abs=0.01)
    assert content["positions"][1]["next"] is None
    assert json.loads(run(demo, "--id", "1", "--json")[0])["row"] == 1


def test_json_obeys_no_control_of_its_text(tmp_path):
    dataset = written(tmp_path, [0, 1], pieces={0: "\x1b[0m\x9b\u202e".encode(), 1: "é".encode()})
    out, _ = run(dataset.path, "--json")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)
    assert json.loads(out)["tokens"][0]["text"] == "\x1b[0m\x9b\u202e"
    assert "é" in out


def test_data_of_what_is_shown_is_finite(tmp_path):
    dataset = written(tmp_path, [0, 1, 2], entropy=[np.nan, np.nan, np.nan])
    assert "NaN" not in json.dumps(as_data(chosen(dataset)))


def test_errors_and_usage(demo):
    for arguments, says in (
        (["--find", "no such text"], "the text 'no such text' is not in the sequence '0'"),
        (["--at", 49], "there is no position 49: the sequence '0' has the positions 0 to 48"),
        (["--row", 12], "row 12"),
        (["--id", "nobody"], "no sequence has the id 'nobody'"),
    ):
        out, err = run(demo, *arguments, status=1)
        assert (out, err.count("\n")) == ("", 1)
        assert says in err
    for arguments in (["--row", 1, "--id", "1"], ["--find", ""], ["-k", 0], ["--at", "x"]):
        assert "Usage: logitstore show" in run(demo, *arguments, status=2)[1]
    assert "Example: logitstore show" in run("--help")[0]


def in_terminal(*arguments, **environment):
    """What the command writes to a terminal of 80 columns."""
    pty = pytest.importorskip("pty", reason="a terminal is made by the operating system")
    main, other = pty.openpty()
    command = [sys.executable, "-m", "logitstore_cli", "show", *map(str, arguments)]
    settings = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environment}
    inherited = {
        name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR", "COLORTERM"}
    }
    with subprocess.Popen(command, stdout=other, env=inherited | settings) as process:
        os.close(other)
        written = b""
        while True:
            try:
                piece = os.read(main, 65536)
            except OSError:  # Linux says so when the other side is closed
                break
            if not piece:
                break
            written += piece
    os.close(main)
    assert process.returncode == 0
    return written.decode().replace("\r\n", "\n")


def test_a_terminal_gets_shades_and_blocks_and_no_other_control(tmp_path):
    dataset = written(tmp_path, [5, 8, 9, 4, 7, 2, 3])
    text = in_terminal(dataset.path, "--at", 0)
    assert "48;5;" in text
    assert "█" in text
    assert "nats of uncertainty (at least)" in text
    assert "\x1b" not in PRINTED.sub("", text)
    assert max(cell_len(line) for line in PRINTED.sub("", text).splitlines()) <= 80
    assert "48;2;" in in_terminal(dataset.path, COLORTERM="truecolor")
    assert set(PRINTED.findall(in_terminal(dataset.path, NO_COLOR="1"))) <= {"\x1b[1m", "\x1b[0m"}
    assert "\x1b" not in in_terminal(dataset.path, TERM="dumb")


def test_a_pipe_of_any_encoding_and_with_forced_colours(demo):
    out, _ = run(demo, "--at", 0, PYTHONIOENCODING="ascii")
    assert out.isascii()
    assert "####" in out
    assert "48;5;" in run(demo, "--at", 0, FORCE_COLOR="1", TERM="xterm-256color")[0]


# The picture


def words(svg):
    """All that is written in a picture, and the lengths of its bars."""
    written = "".join(re.findall("<text[^>]*>([^<]*)</text>", svg))
    return " ".join(html.unescape(written).split()), re.findall(
        '<rect class="[^"]*" .* width="([^"]*)" height="19"/>', svg
    )


def test_the_picture_of_the_readme_is_what_the_command_shows(tmp_path):
    pictures = runpy.run_path(str(ROOT / "examples" / "pictures.py"))
    pictures["main"](tmp_path / "a")
    pictures["main"](tmp_path / "b")
    made = (tmp_path / "a" / "show.svg").read_text(encoding="utf-8")
    assert made == (tmp_path / "b" / "show.svg").read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:|//)[^\s\"]*", made) == ["http://www.w3.org/2000/svg"]
    assert "' yellow' 4.98 % <- next" in words(made)[0]
    assert words(made) == words((ROOT / "docs" / "show.svg").read_text(encoding="utf-8"))
