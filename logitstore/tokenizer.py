"""The identity of a tokenizer: the bytes of each token id, their digest, special tokens and chat template.

Read from the files that a model is published with, without running the tokenizer: no text is encoded here.
"""

from __future__ import annotations

import hashlib
import operator
import re
import stat
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from logitstore.errors import InvalidInputError, InvalidTypeError, SourceNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

TOKENIZER_FILE, PARTIAL_FILE = "tokenizer.json", "partial_vocabulary.json"
CONFIG_FILE, SPECIAL_FILE = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_ID = 2**31 - 1
MAX_FILE = 2**28
"""The largest file that is read; those of models are some 35 MB at most."""

MAX_TOKEN = 2**16
"""The most characters of a token of a model's vocabulary."""

_FILES = (TOKENIZER_FILE, CONFIG_FILE, SPECIAL_FILE, TEMPLATE_FILE)
_ROLES = ("bos", "eos", "pad", "unk")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
_AGAIN = "fetch the file again, or save it again from its tokenizer"
_Id = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
_Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9A-Fa-f]{2})*\Z")]
_Named = str | dict[str, str | bool | None] | None
_T = TypeVar("_T")


# Only what is needed of the files: the rest, merges above all, is skipped without being built.
class _Model(msgspec.Struct):
    vocab: dict[str, _Id] | list[tuple[str, float]]
    byte_fallback: bool | None = None


class _AddedToken(msgspec.Struct):
    id: _Id
    content: str
    special: bool = False


class _Step(msgspec.Struct):  # a normalizer, pre-tokenizer, post-processor, decoder, or sequence of them
    type: str
    normalizers: list[_Step] = []
    pretokenizers: list[_Step] = []
    processors: list[_Step] = []
    decoders: list[_Step] = []
    pattern: dict[str, str] = {}
    content: str = " "
    replacement: str = ""
    prefix: str = "##"
    suffix: str = ""
    single: list[dict[str, dict[str, str | int]]] = []


class _File(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []
    normalizer: _Step | None = None
    pre_tokenizer: _Step | None = None
    post_processor: _Step | None = None
    decoder: _Step | None = None


class _Config(msgspec.Struct):
    bos_token: _Named = None
    eos_token: _Named = None
    pad_token: _Named = None
    unk_token: _Named = None
    add_bos_token: bool | None = None
    chat_template: str | list[dict[str, str]] | None = None


def _read(path: Path) -> bytes | None:
    """The bytes of a file, or None where there is none."""
    try:
        status = path.stat()
        # A device may never end, and to open a pipe waits for whoever writes.
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise InvalidInputError(f"{path}: no regular file of at most {MAX_FILE} bytes; give the model's own file")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InvalidInputError(f"{path}: cannot be read ({error}); check path and permissions") from error


def _parse(data: bytes, kind: type[_T], path: Path) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise InvalidInputError(f"{path}: not a valid {path.name} ({error}); {_AGAIN}") from error


def _flatten(step: _Step | None) -> list[_Step]:
    """The steps of nested sequences, in order; without recursion, since a file may nest them deeply."""
    stack = [step] if step is not None else []
    steps: list[_Step] = []
    while stack:
        top = stack.pop()
        stack += reversed([*top.normalizers, *top.pretokenizers, *top.processors, *top.decoders])
        steps += [top] if top.type != "Sequence" else []
    return steps


# The alphabet of byte-level vocabularies, code point to byte, for `str.translate`: bytes that print stand for
# themselves, the others are numbered from U+0100 on. What else is below U+0100 must not pass for a byte.
_PRINTING = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTING]
_ALPHABET = dict.fromkeys(_OTHERS, 0xFFFF) | {0x100 + at: byte for at, byte in enumerate(_OTHERS)}


def _spell_byte_level(piece: str) -> bytes:
    try:
        return piece.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:  # one character outside the alphabet makes the whole piece plain text
        return piece.encode()


def _speller(file: _File, path: Path) -> Callable[[str], bytes]:
    """How a piece of the model's vocabulary becomes bytes."""
    before = [*_flatten(file.normalizer), *_flatten(file.pre_tokenizer)]
    # Without a decoder, the mark of a space is known from what is done to a text before the model sees it.
    steps = _flatten(file.decoder) if file.decoder else [step for step in before if step.type == "Metaspace"]
    kinds = {step.type for step in [*steps, *before]}
    if "ByteLevel" in kinds:
        return _spell_byte_level
    replacements = []
    for step in steps:
        mark = step.pattern.get("String") or step.replacement or step.suffix
        if step.type in {"Replace", "Metaspace", "BPEDecoder"} and mark:
            replacements.append((mark, step.content))
        elif step.type not in {"WordPiece", "ByteFallback", "Fuse", "Strip"}:  # the last two concern texts
            raise InvalidInputError(f"{path}: unsupported decoder {step.type!r}; give {PARTIAL_FILE} instead")
    prefix = next((step.prefix for step in steps if step.type == "WordPiece"), None)
    byte_fallback = file.model.byte_fallback or "ByteFallback" in kinds
    byte = re.compile(r"<0x([0-9A-Fa-f]{2})>").fullmatch

    def spell(piece: str) -> bytes:
        if byte_fallback and len(piece) == 6 and (match := byte(piece)):
            return bytes.fromhex(match[1])
        for old, new in replacements:
            # One step may double what the one before it made, and so on.
            if len(piece) + piece.count(old) * len(new) > MAX_TOKEN:
                raise InvalidInputError(f"{path}: its decoder makes a token of over {MAX_TOKEN} characters; {_AGAIN}")
            piece = piece.replace(old, new)
        if prefix is not None:
            piece = piece[len(prefix) :] if piece.startswith(prefix) else " " + piece
        return piece.encode()

    return spell


def _vocabulary(model: _Model, path: Path) -> dict[int, str]:
    """The pieces of the model by id."""
    if isinstance(model.vocab, list):
        return {at: piece for at, (piece, _) in enumerate(model.vocab)}
    pieces = {token_id: piece for piece, token_id in model.vocab.items()}
    if len(pieces) != len(model.vocab):
        raise InvalidInputError(f"{path}: two pieces of its vocabulary have the same id; {_AGAIN}")
    return pieces


def _spell_all(file: _File, pieces: dict[int, str], path: Path) -> dict[int, bytes]:
    """The bytes of all tokens by id."""
    spell = _speller(file, path)
    spelled = {token_id: spell(piece) for token_id, piece in pieces.items()}
    if len({token.id for token in file.added_tokens}) != len(file.added_tokens):
        raise InvalidInputError(f"{path}: two added tokens have the same id; {_AGAIN}")
    for token in file.added_tokens:
        # One that is not special and only repeats its piece (Gemma's runs of spaces) is also what the model
        # makes of ordinary text, and is decoded as such.
        if token.special or pieces.get(token.id) != token.content:
            spelled[token.id] = token.content.encode()
    if not spelled:
        raise InvalidInputError(f"{path}: its vocabulary is empty; {_AGAIN}")
    return spelled


def _named(*configs: _Config) -> dict[str, str]:
    """The tokens that configurations name, by role; the last one's word holds."""
    tokens = ((role, getattr(config, f"{role}_token")) for config in configs for role in _ROLES)
    names = ((role, token.get("content") if isinstance(token, dict) else token) for role, token in tokens)
    return {role: name for role, name in names if isinstance(name, str)}


def _adds_bos(file: _File, config: _Config, bos: str | None) -> bool:
    templates = [step.single for step in _flatten(file.post_processor) if step.type == "TemplateProcessing"]
    if not templates:
        return bool(config.add_bos_token) and bos is not None
    before = takewhile(lambda part: "Sequence" not in part, templates[0])
    put = [part.get("SpecialToken", {}).get("id") for part in before]
    return bos in put if bos is not None else bool(put)


def _pack(spelled: Mapping[int, bytes]) -> tuple[array[int], array[int], bytes]:
    """Ascending ids, n + 1 offsets and the bytes in one piece: 6 MB where 262,144 objects would be 30."""
    ids = sorted(spelled)
    pieces = [spelled[token_id] for token_id in ids]
    return array("q", ids), array("q", accumulate(map(len, pieces), initial=0)), b"".join(pieces)


def _as_id(token_id: object) -> int:
    try:
        return operator.index(token_id)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidTypeError(f"token id {token_id!r} is not an integer; give ids as integers") from None


@dataclass(frozen=True, repr=False)
class Tokenizer:
    """The tokens of a vocabulary, immutable; made by `from_path` or `from_pieces`.

    Equal when everything but `files` is; pickles. An id that is not an integer raises `InvalidTypeError`.

    How pieces become bytes. Byte-level vocabularies (GPT-2, Llama-3, Qwen): the byte alphabet is undone; a
    piece with a character outside it is UTF-8. SentencePiece (Gemma, Llama-2, T5): the mark of a space is a
    space, `<0x0A>` that byte. WordPiece: the continuation prefix is dropped, and a piece without it, which
    starts a word, gets a space before it. Added tokens are their content in UTF-8, except one that is not
    special and repeats the piece of its id. Tokens that only tokenizer_config.json lists are not read.

    Attributes:
        is_partial: whether only some tokens are known; there is then no identity.
        special_tokens: content by id, ascending, of the added tokens that are marked special.
        special_roles: ids by role (bos, eos, pad, unk) of the tokens that tokenizer_config.json names, else
            special_tokens_map.json. One that the vocabulary lacks is left out.
        chat_template: its text, or None; of several named ones the one called "default".
        adds_bos: whether the token that begins a sequence is put before a text: as the post-processor's
            template says, else the configuration. For reports only.
        files: what it was read from, to be copied as it is; empty after `from_pieces`.
    """

    _ids: array[int] = field(hash=False)
    _offsets: array[int] = field(hash=False)
    _blob: bytes
    is_partial: bool
    special_tokens: Mapping[int, str] = field(default_factory=dict, hash=False)
    special_roles: Mapping[str, int] = field(default_factory=dict, hash=False)
    chat_template: str | None = None
    adds_bos: bool = False
    files: tuple[Path, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in ("special_tokens", "special_roles"):
            object.__setattr__(self, name, MappingProxyType(getattr(self, name)))

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, each.name) for each in fields(self))  # without what is cached
        return Tokenizer, tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.

        Args:
            path: directory with a tokenizer.json and, if they are there, tokenizer_config.json,
                special_tokens_map.json and chat_template.jinja; or one with only a partial_vocabulary.json.
                Either file's own path stands for its directory.

        Raises:
            SourceNotFoundError: there is no such file.
            InvalidInputError: a file is damaged, or the bytes of its tokens cannot be told.
        """
        given = Path(path)
        folder = given.parent if given.name in {TOKENIZER_FILE, PARTIAL_FILE} else given
        names = _FILES if given.name != PARTIAL_FILE else ()
        read = {name: data for name in names if (data := _read(folder / name)) is not None}
        if TOKENIZER_FILE in read:
            return cls._from_files(folder, read)
        if given.name != TOKENIZER_FILE and (data := _read(folder / PARTIAL_FILE)) is not None:
            return cls._from_partial(folder / PARTIAL_FILE, data)
        advice = f"give a directory that holds {TOKENIZER_FILE} or {PARTIAL_FILE}, or such a file"
        raise SourceNotFoundError(f"{given}: no tokenizer here; {advice}")

    @classmethod
    def from_pieces(cls, pieces: Mapping[int, bytes]) -> Tokenizer:
        """A partial vocabulary: the tokens whose bytes are known, as when there are only an API's replies.

        Raises:
            InvalidInputError: an id is not an integer in 0..2**31-1, or a piece is not bytes.
        """
        known = {_as_id(token_id): piece for token_id, piece in pieces.items()}
        for token_id, piece in known.items():
            if not 0 <= token_id <= MAX_ID:
                raise InvalidInputError(f"token id {token_id} is not in 0..{MAX_ID}; give the model's ids")
            if not isinstance(piece, bytes):
                raise InvalidTypeError(f"token {token_id} is {type(piece).__name__}; give its bytes")
        return cls(*_pack(known), is_partial=True)

    @classmethod
    def _from_partial(cls, path: Path, data: bytes) -> Tokenizer:
        entries = _parse(data, dict[_Id, _Hex], path)
        # Neither ids nor hex hold a colon or a minus, and of equal ids only the last is left by now.
        if data.count(b":") != len(entries) or b"-" in data:
            raise InvalidInputError(f"{path}: an id stands in it twice or has a sign; write each once, bare")
        known = {token_id: bytes.fromhex(piece) for token_id, piece in entries.items()}
        return cls(*_pack(known), is_partial=True, files=(path,))

    @classmethod
    def _from_files(cls, folder: Path, read: dict[str, bytes]) -> Tokenizer:
        path = folder / TOKENIZER_FILE
        file = _parse(read[TOKENIZER_FILE], _File, path)
        config = _parse(read.get(CONFIG_FILE, b"{}"), _Config, folder / CONFIG_FILE)
        special = _parse(read.get(SPECIAL_FILE, b"{}"), _Config, folder / SPECIAL_FILE)
        template = config.chat_template
        if TEMPLATE_FILE in read:
            try:
                template = read[TEMPLATE_FILE].decode()
            except UnicodeDecodeError as error:
                raise InvalidInputError(f"{folder / TEMPLATE_FILE}: {error}; save it as UTF-8") from error
        if isinstance(template, list):
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        pieces, named = _vocabulary(file.model, path), _named(special, config)
        id_of = {piece: i for i, piece in pieces.items()} | {t.content: t.id for t in file.added_tokens}
        return cls(
            *_pack(_spell_all(file, pieces, path)),
            is_partial=False,
            special_tokens=dict(sorted((t.id, t.content) for t in file.added_tokens if t.special)),
            special_roles={role: id_of[content] for role, content in named.items() if content in id_of},
            chat_template=template,
            adds_bos=_adds_bos(file, config, named.get("bos")),
            files=tuple(folder / name for name in read),
        )

    def __repr__(self) -> str:
        return f"<Tokenizer {(self.digest or 'partial')[:12]}: {len(self._ids)} tokens>"

    def items(self) -> Iterator[tuple[int, bytes]]:
        """Id and bytes of every token, in id order."""
        pieces = (self._blob[start:end] for start, end in pairwise(self._offsets))
        return zip(self._ids, pieces, strict=True)

    @property
    def vocabulary_size(self) -> int | None:
        """Highest id of a token, added ones included, plus one; None when partial."""
        return None if self.is_partial else self._ids[-1] + 1

    @cached_property
    def digest(self) -> str | None:
        """Identity: sha256, as hex, over all tokens in id order; None when partial.

        For each token: id, number of bytes (both little-endian u32), bytes. Ids without a token are left out.
        """
        if self.is_partial:
            return None
        parts = ((i | len(piece) << 32).to_bytes(8, "little") + piece for i, piece in self.items())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a sequence, or None."""
        return self.special_roles.get("bos")

    @property
    def chat_template_sha256(self) -> str | None:
        """Sha256, as hex, of the chat template in UTF-8, or None."""
        return None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()

    @cached_property
    def _index(self) -> dict[bytes, tuple[int, ...]]:
        index: dict[bytes, tuple[int, ...]] = {}
        for token_id, piece in self.items():
            index[piece] = (*index.get(piece, ()), token_id)
        return index

    def id_of(self, piece: bytes) -> tuple[int, ...]:
        """All ids, ascending, of tokens with exactly these bytes; the first call builds an index."""
        if not isinstance(piece, bytes):
            raise InvalidTypeError(f"{piece!r} is not bytes; give a token's bytes")
        return self._index.get(piece, ())

    def token_bytes(self, token_id: int) -> bytes | None:
        """Bytes of a token (possibly none, or part of a character); None when the id is not known."""
        wanted, ids = _as_id(token_id), self._ids
        at = wanted if 0 <= wanted < len(ids) and ids[wanted] == wanted else bisect_left(ids, wanted)
        if at == len(ids) or ids[at] != wanted:
            return None
        return self._blob[self._offsets[at] : self._offsets[at + 1]]

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """Bytes of each token; for an unknown id those of U+FFFD, which `token_bytes` tells apart."""
        return [_UNKNOWN if piece is None else piece for piece in map(self.token_bytes, ids)]

    def text(self, ids: Iterable[int]) -> str:
        """Text of a span of tokens: their bytes, joined, as UTF-8; U+FFFD for invalid ones and unknown ids.

        What a decoder does to whole texts (drop the first space: Llama-2, T5; clean up: BERT) is not applied.
        """
        return b"".join(self.pieces(ids)).decode(errors="replace")

    def to_partial_json(self) -> bytes:
        """The tokens as the content of a partial_vocabulary.json: hex of the bytes by id, in id order."""
        lines = ",\n".join(f'"{token_id}": "{piece.hex()}"' for token_id, piece in self.items())
        return f"{{\n{lines}\n}}\n".encode() if lines else b"{}\n"
