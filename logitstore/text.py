"""Tokens as people read them: what does not show is escaped, and a character that several tokens share comes out whole.

Token text is untrusted: what comes out of here holds no control characters and nothing that turns the direction of
the text around it. It is not HTML.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterable
from itertools import groupby
from typing import Final

from logitstore.tokenizer import Tokenizer

ELLIPSIS: Final = "\N{HORIZONTAL ELLIPSIS}"
DOTTED_CIRCLE: Final = "\N{DOTTED CIRCLE}"

_LABEL: Final = 64  # characters of a token: vocabularies hold runs of hundreds of spaces, and may hold anything
_MARKS: Final = 8  # in a row: no script needs more, and hundreds would flood the lines above and below
_CONTROLS: Final = {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}
_TURNING: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # bidi controls


def escaped(character: str) -> str:
    r"""A character as Python writes it in a string: `\n`, `\x1b`, `\u202e`."""
    return character.encode("unicode_escape").decode()


def visible(text: str) -> str:
    """Text with every character escaped that does not show, spaces other than the common one among them."""
    return "".join(c if c.isprintable() else escaped(c) for c in text)


def in_text(character: str) -> str:
    """A character of running text, where spaces of all kinds and the joiners of scripts and emoji belong to it."""
    plain = unicodedata.category(character) not in _CONTROLS and character not in _TURNING
    return character if plain else escaped(character)


def readable(text: str, keep: str = "") -> str:
    """Running text with control characters escaped, and an ellipsis in place of marks that pile up on one letter.

    Args:
        text: any text.
        keep: control characters that stay, such as a line's end.
    """
    return "".join(c if c in keep else in_text(c) for c in _unpiled(text))


def shortened(text: str, limit: int) -> str:
    """Text of at most so many characters."""
    return text if len(text) <= limit else text[: limit - 1] + ELLIPSIS


def unknown(token: int) -> str:
    """What stands for a token that the tokenizer does not know: a placeholder, or one outside a partial vocabulary."""
    return f"<id {token}>"


def label(tokenizer: Tokenizer | None, token: int) -> str:
    r"""One token by itself, as a candidate is shown: escaped, at most 64 characters.

    Bytes that are part of a character come out as `\xf0\x9f`, and an accent without its letter on a dotted circle;
    an ellipsis stands for marks that pile up on one letter. Without a tokenizer it is the id.
    """
    piece = None if tokenizer is None else tokenizer.token_bytes(token)
    if piece is None:
        return str(token) if tokenizer is None else unknown(token)
    text = visible(_unpiled(piece[: 4 * _LABEL + 4].decode(errors="backslashreplace")))
    if text and unicodedata.category(text[0]).startswith("M"):
        text = DOTTED_CIRCLE + text
    return shortened(text, _LABEL)


def running(tokenizer: Tokenizer | None, tokens: Iterable[int]) -> list[str]:
    """The text of each token where it stands: joined, they are the text of all.

    A character whose bytes several tokens share belongs to the one that completes it; those before it are empty. Bytes
    that are no UTF-8 become U+FFFD. Nothing is escaped: see `readable`. Without a tokenizer, ids with a space each.
    """
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = []
    for token in tokens:
        piece = tokenizer.token_bytes(token)
        if piece is None:
            texts.append(decoder.decode(b"", final=True) + unknown(token))
            decoder.reset()
        else:
            texts.append(decoder.decode(piece))
    if texts and (rest := decoder.decode(b"", final=True)):
        texts[-1] += rest
    return texts


def _unpiled(text: str) -> str:
    """Text with at most so many marks in a row that take no room, as accents do."""
    if text.isascii():
        return text
    kept = []
    for piling, run in groupby(text, lambda character: unicodedata.category(character) in {"Mn", "Me"}):
        characters = "".join(run)
        kept.append(characters[:_MARKS] + ELLIPSIS if piling and len(characters) > _MARKS else characters)
    return "".join(kept)
