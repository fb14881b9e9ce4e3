"""`logitstore show`: what is shown of a sequence."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from show_rows import PIECES, demo_at, plain, written

import logitstore
from logitstore.look.show import TextNotFoundError, show
from logitstore.look.words import to_be_read
from logitstore_cli.show import as_data, chosen
from logitstore_cli.show_render import RAMP, Look, lines

pytestmark = [pytest.mark.filterwarnings("ignore::logitstore.LogitStoreWarning")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return demo_at(tmp_path_factory.mktemp("show") / "demo")


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
