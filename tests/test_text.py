"""Tokens as people read them."""

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstore.text import ELLIPSIS, label, readable, running, shortened, unknown, visible
from logitstore.tokenizer import Tokenizer

TURNING = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
PIECES = st.lists(st.one_of(st.binary(max_size=6), st.text(max_size=4).map(str.encode)), min_size=1, max_size=12)


def is_harmless(text):
    """No terminal obeys it: no controls, no ends of lines, nothing that turns the direction."""
    return not any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} or c in TURNING for c in text)


def tokenizer_of(*pieces):
    return Tokenizer.from_pieces(dict(enumerate(pieces)))


@given(PIECES)
def test_running_texts_joined_are_the_text_of_all(pieces):
    texts = running(tokenizer_of(*pieces), range(len(pieces)))
    assert len(texts) == len(pieces)
    assert "".join(texts) == b"".join(pieces).decode(errors="replace")


@given(st.text(min_size=1), st.data())
def test_text_cut_anywhere_comes_out_whole(text, data):
    encoded = text.encode()
    cuts = sorted({0, len(encoded), *data.draw(st.lists(st.integers(0, len(encoded))))})
    pieces = [encoded[start:end] for start, end in pairwise(cuts)]
    assert "".join(running(tokenizer_of(*pieces), range(len(pieces)))) == text


@given(PIECES)
def test_nothing_that_a_terminal_obeys_comes_out(pieces):
    tokenizer = tokenizer_of(*pieces)
    for token, text in enumerate(running(tokenizer, range(len(pieces)))):
        shown = label(tokenizer, token)
        assert shown.isprintable()
        assert is_harmless(shown)
        assert len(shown) <= 64
        assert is_harmless(readable(text))


@given(st.text())
def test_text_of_any_kind_becomes_harmless(text):
    assert is_harmless(readable(text))
    assert is_harmless(readable(text, keep="\n").replace("\n", ""))
    assert visible(text).isprintable()
    assert visible(visible(text)) == visible(text)


def test_a_shared_character_belongs_to_the_token_that_completes_it():
    tokenizer = tokenizer_of(b"a\xf0", b"\x9f\x98", b"\x80b", b"\xf0")
    assert running(tokenizer, [0, 1, 2]) == ["a", "", "\U0001f600b"]
    assert running(tokenizer, [0, 1]) == ["a", "\ufffd"]
    assert running(tokenizer, [3, 0, 1, 2]) == ["", "\ufffda", "", "\U0001f600b"]
    assert [label(tokenizer, token) for token in range(3)] == ["a\\xf0", "\\x9f\\x98", "\\x80b"]


def test_accents_stand_on_a_circle_alone_and_on_their_letter_in_text():
    tokenizer = tokenizer_of(b"e", "\u0301".encode(), "\u200d".encode())
    assert label(tokenizer, 1) == "\u25cc\u0301"
    assert label(tokenizer, 2) == "\\u200d"
    assert "".join(running(tokenizer, [0, 1])) == "e\u0301"
    assert readable("\U0001f468\u200d\U0001f469\ufe0f\u00a0") == "\U0001f468\u200d\U0001f469\ufe0f\u00a0"


def test_marks_without_their_letter_stand_on_a_circle_whatever_their_class():
    marks = ["\u0301", "\ufe0f", "\u20dd", "\u0903", "\u093e"]
    tokenizer = tokenizer_of(*(mark.encode() for mark in marks))
    assert [label(tokenizer, token) for token in range(5)] == ["\u25cc" + mark for mark in marks]


@pytest.mark.parametrize("mark", ["\u0301", "\ufe0f", "\u20dd"])
def test_marks_do_not_pile_up(mark):
    tokenizer = tokenizer_of(*(("a" + mark * count + "b").encode() for count in (8, 9, 50, 300)))
    whole, *cut = [label(tokenizer, token) for token in range(3)]
    assert whole == readable(whole) == f"a{mark * 8}b"
    assert cut == [f"a{mark * 8}{ELLIPSIS}b"] * 2
    assert label(tokenizer, 3).startswith(f"a{mark * 8}{ELLIPSIS}")
    assert len(label(tokenizer, 3)) < 20
    assert readable(f"\n{mark * 9}x{mark * 300}", keep="\n") == f"\n{mark * 8}{ELLIPSIS}x{mark * 8}{ELLIPSIS}"


def test_unknown_ids_end_what_was_begun():
    tokenizer = tokenizer_of(b"a\xf0", b"\x9f")
    assert label(tokenizer, 7) == unknown(7) == "<id 7>"
    assert running(tokenizer, [0, 7, 1]) == ["a", "\ufffd<id 7>", "\ufffd"]


def test_without_a_tokenizer_ids_stand_for_texts():
    assert label(None, 12) == "12"
    assert running(None, [12, 3]) == ["12 ", "3 "]
    assert running(None, []) == running(tokenizer_of(b"a"), []) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n\t\x1b[0m\x9b", "a\\n\\t\\x1b[0m\\x9b"), ("\u202eabc", "\\u202eabc"), ("\u2028", "\\u2028"),
        ("\ue000", "\\ue000"), ("é今\u05d0", "é今\u05d0"),
    ],
)  # fmt: skip
def test_what_is_escaped(text, shown):
    assert readable(text) == visible(text) == shown
    assert readable("a\nb\r", keep="\n") == "a\nb\\r"


def test_long_tokens_are_shortened():
    tokenizer = tokenizer_of(b"x" * 10**5, "\U0001f600".encode() * 64, "\U0001f600".encode() * 65)
    assert label(tokenizer, 0) == "x" * 63 + ELLIPSIS
    assert label(tokenizer, 1) == "\U0001f600" * 64
    assert label(tokenizer, 2) == "\U0001f600" * 63 + ELLIPSIS
    assert (shortened("abc", 3), shortened("abcd", 3)) == ("abc", "ab" + ELLIPSIS)
