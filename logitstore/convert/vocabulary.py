"""Tokens that a reply gives as bytes or as text, made into ids of the teacher's vocabulary, and never into a wrong one.

What a reply says of a token may fit no token, or several, or be a decoder's stand-in for bytes that are no text. Such a
token gets one of the negative numbers below instead of an id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from logitstore.convert.base import Tally
from logitstore.convert.prompts import PromptEncoder
from logitstore.encoding import ragged
from logitstore.errors import SourceError

NO_BYTES: Final = -1
"""The reply does not say the token's bytes: they are null, or stand as a replacement character."""

ABSENT: Final = -2
"""The tokenizer has no token of these bytes."""

SEVERAL: Final = -3
"""Several tokens have these bytes, or several candidates of one row."""

_LEFT: Final = {
    NO_BYTES: "{n} candidates are left to the tail, because the replies do not say their bytes.",
    ABSENT: "{n} candidates are left to the tail, because the tokenizer has no token of their bytes.",
    SEVERAL: "{n} candidates are left to the tail, because more than one token has their bytes; capture with ids if "
    "the server gives them.",
}
_CUT_NOTE: Final = (
    "{n} sequences end before the end of their reply, because it is not certain which token the next one is."
)
_SETTLED_NOTE: Final = (
    "{n} generated tokens have the bytes of several: each is taken to be the one that the tokenizer makes of the text, "
    "and kept as the target only."
)

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_ESCAPED: Final = re.compile(r"bytes:((?:\\x[0-9a-f]{2}|[ -~])*\\x[0-9a-f]{2}(?:\\x[0-9a-f]{2}|[ -~])*)").fullmatch
_ESCAPE: Final = re.compile(rb"\\x([0-9a-f]{2})")
_HALF: Final = "byte: \\x"  # llama-server's old name of a token whose other bytes it may have left out
_KNOWN_LIMIT: Final = 2**20  # spellings of tokens that are remembered: hostile replies must not fill the memory
_WRONG_LEAST, _WRONG_SHARE = 20, 0.05

_PIECE: Final = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, le=255)]] | None)


class Lettered(Protocol):
    """What a reply says of a token with an id."""

    id: int
    bytes: msgspec.Raw


class Spelled(Lettered, Protocol):
    """What a reply says of a token that may have no id, which is negative then."""

    token: str


def piece_of(given: msgspec.Raw, name: object) -> bytes | None:
    """The bytes of a token as its field `bytes` gives them; None where that is null or missing.

    Raises:
        SourceError: it is something else.
    """
    try:
        piece = _PIECE.decode(given or b"null")
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise SourceError(f"the bytes of the token {name} are none ({error})") from error
    return None if piece is None else bytes(piece)


def gather(tally: Tally, candidates: Iterable[Lettered], own: Iterable[Lettered]) -> None:
    """Keep the bytes of tokens; an own one's may be those of several tokens, so candidates' replace them."""
    for known, tokens in ((tally.pieces, candidates), (tally.doubtful, own)):
        for token in tokens:
            if token.id not in known and (piece := piece_of(token.bytes, token.id)) is not None:
                known[token.id] = piece


def text_piece(text: str) -> bytes | None:
    """The bytes of a token of which only the text is given; None where that does not tell them."""
    if match := _ESCAPED(text):
        return _ESCAPE.sub(lambda escape: bytes.fromhex(escape[1].decode()), match[1].encode())
    if not text or _REPLACEMENT in text or text.startswith(_HALF):
        return None
    return text.encode()


@dataclass(slots=True)
class Vocabulary:
    """The ids of a teacher's tokens by their bytes; pickles.

    Args:
        encoder: of the teacher's tokenizer, which is whole.
    """

    encoder: PromptEncoder
    _known: dict[bytes | str, int] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        return Vocabulary, (self.encoder,)

    def piece(self, token: Spelled) -> bytes | None:
        """The bytes of a token; None where the reply does not tell them.

        Raises:
            SourceError: its field `bytes` is no list of bytes.
        """
        if not token.bytes:
            return text_piece(token.token)
        piece = piece_of(token.bytes, repr(token.token))
        if piece is None:  # a special token has no bytes, but a name
            return token.token.encode() if token.token in self.encoder.tokenizer.special_tokens.values() else None
        return None if _REPLACEMENT.encode() in piece else piece or None

    def id_of(self, piece: bytes | None) -> int:
        """The id of the token of these bytes, or why there is none."""
        if piece is None:
            return NO_BYTES
        found = self.encoder.tokenizer.id_of(piece)
        return found[0] if len(found) == 1 else SEVERAL if found else ABSENT

    def id_of_token(self, token: Spelled) -> int:
        """The same of a token in a reply, remembered by how its bytes are spelled there."""
        if not token.bytes:
            return self.id_of_text(token.token)
        key = bytes(token.bytes)
        if key == b"null":
            return self.id_of(self.piece(token))
        found = self._known.get(key)
        return self._remember(key, self.piece(token)) if found is None else found

    def id_of_text(self, text: str) -> int:
        """The same of a token of which only the text is given."""
        found = self._known.get(text)
        return self._remember(text, text_piece(text)) if found is None else found

    def _remember(self, key: bytes | str, piece: bytes | None) -> int:
        if len(self._known) >= _KNOWN_LIMIT:
            self._known.clear()
        self._known[key] = found = self.id_of(piece)
        return found

    def settle(self, ids: NDArray[np.int64], pieces: Sequence[bytes | None], tally: Tally) -> NDArray[np.bool_]:
        """Find out which of several tokens with equal bytes the generated ones are, as far as they are a known text.

        Where the tokenizer's encoding of the text has a token of the same bytes in the same place, it is that one.

        Args:
            ids: of the generated tokens; changed in place.
            pieces: their bytes.
            tally: where they are counted.

        Returns:
            Which ones were settled.
        """
        settled = np.zeros(len(ids), np.bool_)
        if not (ids == SEVERAL).any():
            return settled
        end = next((at for at, piece in enumerate(pieces) if piece is None), len(pieces))
        known = [piece for piece in pieces[:end] if piece is not None]
        places = self._places(b"".join(known))
        for at, (piece, stop) in enumerate(zip(known, accumulate(map(len, known)), strict=True)):
            found = places.get((stop - len(piece), stop))
            if ids[at] == SEVERAL and found in self.encoder.tokenizer.id_of(piece):
                ids[at], settled[at] = found, True
        tally.note(_SETTLED_NOTE, int(settled.sum()))
        return settled

    def _places(self, text: bytes) -> dict[tuple[int, int], int]:
        """The tokens that the tokenizer makes of a text, by where their bytes begin and end."""
        tokens = self.encoder.encode(text.decode(errors="ignore"))
        pieces = self.encoder.tokenizer.pieces(tokens)
        joined = b"".join(pieces)
        added = int(not text.startswith(joined) and joined.startswith(b" "))  # some put a space before a text
        if not text.startswith(joined[added:]):
            return {}
        ends = list(accumulate(map(len, pieces)))
        return {
            (stop - len(piece) - added, stop - added): token
            for token, piece, stop in zip(tokens, pieces, ends, strict=True)
        }


def without_repeated(count: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids with `SEVERAL` for those that stand twice in a row.

    Texts of which a decoder took the space are equal then, and all but one of these candidates are other tokens.

    Args:
        count: candidates of each row.
        ids: [N], found by bytes or text.
    """
    row = ragged.rows(count)
    order = np.lexsort((ids, row))
    again = (np.diff(ids[order]) == 0) & (np.diff(row[order]) == 0)
    twice = np.zeros(len(ids), np.bool_)
    twice[order[1:][again]] = True
    twice[order[:-1][again]] = True
    return np.where(twice & (ids >= 0), SEVERAL, ids)


def count_left(tally: Tally, ids: NDArray[np.int64]) -> None:
    """Count the candidates that have no id."""
    for reason, note in _LEFT.items():
        tally.note(note, int((ids == reason).sum()))
    tally.counts["candidates"] += len(ids)
    tally.counts["absent"] += int((ids == ABSENT).sum())


def certain(ids: NDArray[np.int64], tally: Tally) -> int:
    """How many of the generated tokens are certain, from the first on; counts where that is not all."""
    if not (ids < 0).any():
        return len(ids)
    tally.note(_CUT_NOTE)
    return int(np.argmax(ids < 0))


def check_vocabulary(tally: Tally, _final: bool) -> list[str]:  # noqa: FBT001 - called as `Import.check`
    """Refuse a tokenizer that many tokens are not of.

    Raises:
        SourceError: more than one in twenty are not.
    """
    absent, total = tally.counts["absent"], tally.counts["candidates"]
    if absent > _WRONG_LEAST and absent > _WRONG_SHARE * total:
        raise SourceError(
            f"{absent:,} of the {total:,} candidates are no tokens of this tokenizer, so it is not the teacher's, or "
            f"the replies do not spell tokens as they are; give the teacher's --tokenizer"
        )
    return []
