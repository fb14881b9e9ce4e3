"""`logitstore.tokenizer`: ids to bytes for every kind of vocabulary, identity, special tokens, errors."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
import struct
import tempfile
import unicodedata
from contextlib import suppress
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.errors import InvalidInputError, InvalidTypeError, LogitStoreError, SourceNotFoundError
from logitstore.tokenizer import Tokenizer

REAL = Path(__file__).parents[1] / "../shared/data/tokenizers"

SENTENCEPIECE_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def alphabet() -> list[str]:
    """The character of each byte, as GPT-2's vocabulary has it; written apart from the module's."""
    characters, following = [], 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            characters.append(chr(byte))
        else:
            characters.append(chr(following))
            following += 1
    return characters


ALPHABET = alphabet()


def byte_level(piece: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in piece)


def content(vocab, *, added=(), model=None, **top):
    tokens = [
        {"id": token_id, "content": text, "special": special, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for token_id, text, special in added
    ]
    return {
        "version": "1.0",
        "added_tokens": tokens,
        "model": {"type": "BPE", "merges": [], "vocab": vocab} | (model or {}),
    } | top


def write(folder: Path, tokenizer, **others) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    for name, value in others.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture
def load(tmp_path):
    def load(vocab, *, config=None, **options) -> Tokenizer:
        others = {} if config is None else {"tokenizer_config": config}
        return Tokenizer.from_path(write(tmp_path / "tokenizer", content(vocab, **options), **others))

    return load


class TestBytes:
    @pytest.mark.parametrize(
        "where",
        [
            {"decoder": BYTE_LEVEL},
            {"decoder": {"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [BYTE_LEVEL]}]}},
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, BYTE_LEVEL]}},
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, BYTE_LEVEL]}},
        ],
    )
    def test_byte_level_vocabularies_use_the_byte_alphabet(self, load, where):
        tokenizer = load({"Ġthe": 0, "Ċ": 1, "ðŁ": 2, "¦Ħ": 3}, **where)
        assert tokenizer.pieces(range(4)) == [b" the", b"\n", b"\xf0\x9f", b"\xa6\x84"]
        assert tokenizer.text([0, 2, 3, 1]) == " the🦄\n"
        assert tokenizer.text([0, 2]) == " the\N{REPLACEMENT CHARACTER}"

    def test_all_256_bytes_of_the_alphabet(self, load):
        vocabulary = {character: byte for byte, character in enumerate(ALPHABET)}
        tokenizer = load(vocabulary, decoder=BYTE_LEVEL)
        assert tokenizer.pieces(range(256)) == [bytes([byte]) for byte in range(256)]

    def test_a_piece_with_a_character_outside_the_byte_alphabet_is_plain_text(self, load):
        tokenizers = pytest.importorskip("tokenizers")
        vocabulary = {"日Ġ": 0, "Ġ ": 1, "\n": 2, "ĠŃ": 3, "\N{SOFT HYPHEN}": 4, "Ń": 5, "é": 6}
        tokenizer = load(vocabulary, decoder=BYTE_LEVEL)
        plain = ["日Ġ".encode(), "Ġ ".encode(), b"\n", b" \xad", "\N{SOFT HYPHEN}".encode()]
        assert tokenizer.pieces(range(5)) == plain
        assert tokenizer.pieces([5, 6]) == [b"\xad", b"\xe9"]
        peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        peer.decoder = tokenizers.decoders.ByteLevel()
        assert [tokenizer.text([i, 2]) for i in range(7)] == [peer.decode([i, 2]) for i in range(7)]

    def test_sentencepiece_with_byte_fallback(self, load):
        vocabulary = {
            "<unk>": 0,
            "▁the": 1,
            "▁▁": 2,
            "a▁b": 3,
            "<0x0A>": 4,
            "<0xe5>": 5,
            "<0x0G>": 6,
            "<0x0A>>": 7,
        }
        tokenizer = load(vocabulary, decoder=SENTENCEPIECE_DECODER)
        assert tokenizer.pieces(range(6)) == [b"<unk>", b" the", b"  ", b"a b", b"\n", b"\xe5"]
        assert tokenizer.pieces([6, 7]) == [b"<0x0G>", b"<0x0A>>"]
        assert tokenizer.text([1, 4]) == " the\n", "a span's first space stays"

    def test_byte_fallback_of_the_model_alone(self, load):
        replace = SENTENCEPIECE_DECODER["decoders"][0]
        with_fallback = load({"<0x41>": 0}, decoder=replace, model={"byte_fallback": True})
        assert with_fallback.token_bytes(0) == b"A"
        assert load({"<0x41>": 0}, decoder=replace, model={"byte_fallback": None}).token_bytes(0) == b"<0x41>"

    @pytest.mark.parametrize("part", ["decoder", "pre_tokenizer"])
    def test_unigram_pieces_have_their_place_as_id(self, load, part):
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        vocabulary = [["<pad>", 0.0], ["</s>", 0], ["▁a", -1.5], ["ß", -2], ["▁a", -9.0]]
        tokenizer = load(vocabulary, model={"type": "Unigram", "unk_id": 0}, **{part: metaspace})
        assert tokenizer.pieces(range(5)) == [b"<pad>", b"</s>", b" a", "ß".encode(), b" a"]
        assert tokenizer.id_of(b" a") == (2, 4)
        assert tokenizer.vocabulary_size == 5

    def test_metaspace_with_another_mark(self, load):
        tokenizer = load({"_a": 0, "▁": 1}, decoder={"type": "Metaspace", "replacement": "_"})
        assert tokenizer.pieces([0, 1]) == [b" a", "▁".encode()]

    def test_wordpiece_starts_of_words_carry_the_space(self, load):
        vocabulary = {"[UNK]": 0, "run": 1, "##ning": 2, "##": 3, "[CLS]": 4}
        added = [(0, "[UNK]", True), (4, "[CLS]", True)]
        decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
        tokenizer = load(vocabulary, added=added, model={"type": "WordPiece"}, decoder=decoder)
        assert tokenizer.pieces(range(5)) == [b"[UNK]", b" run", b"ning", b"", b"[CLS]"]
        assert tokenizer.text([4, 1, 2, 1]) == "[CLS] running run"

    def test_end_of_word_suffix(self, load):
        tokenizer = load({"the</w>": 0, "th": 1}, decoder={"type": "BPEDecoder", "suffix": "</w>"})
        assert tokenizer.pieces([0, 1]) == [b"the ", b"th"]

    def test_without_a_decoder_pieces_are_as_they_are(self, load):
        tokenizer = load({"the": 0, "Ġ▁": 1, "##a": 2}, model={"type": "WordLevel"}, decoder=None)
        assert tokenizer.pieces(range(3)) == [b"the", "Ġ▁".encode(), b"##a"]

    def test_added_tokens_are_their_content(self, load):
        end = "<\N{FULLWIDTH VERTICAL LINE}end▁of▁sentence\N{FULLWIDTH VERTICAL LINE}>"
        added = [(1, "<Ġñ>", False), (2, "Ġ", True), (9, end, True)]
        tokenizer = load({"Ġa": 0, "old": 1}, added=added, decoder=BYTE_LEVEL)
        assert tokenizer.pieces(range(3)) == [b" a", "<Ġñ>".encode(), "Ġ".encode()]
        assert tokenizer.text([9]) == end
        assert tokenizer.vocabulary_size == 10
        assert tokenizer.token_bytes(5) is None

    def test_an_added_token_that_repeats_its_piece_is_text_unless_special(self, load):
        added = [(0, "▁▁", False), (1, "▁s", True), (2, "▁c", False)]
        tokenizer = load({"▁▁": 0, "▁s": 1, "▁b": 2}, added=added, decoder=SENTENCEPIECE_DECODER)
        assert tokenizer.pieces(range(3)) == [b"  ", "▁s".encode(), "▁c".encode()]

    def test_holes_and_unknown_ids(self, load):
        tokenizer = load({"c": 900, "a": 0, "b": 5})
        assert [tokenizer.token_bytes(i) for i in (0, 5, 900)] == [b"a", b"b", b"c"]
        unknown = [1, 4, 6, 899, 901, 2**31, 2**70, -1, -900, -(2**70)]
        assert [tokenizer.token_bytes(i) for i in unknown] == [None] * len(unknown)
        assert tokenizer.vocabulary_size == 901
        assert tokenizer.text([0, 1, 5]) == "a\N{REPLACEMENT CHARACTER}b"
        assert tokenizer.pieces([1]) == ["\N{REPLACEMENT CHARACTER}".encode()]

    def test_ids_may_come_from_numpy_and_generators(self, load):
        tokenizer = load({"a": 0, "b": 1})
        for dtype in (np.uint8, np.uint32, np.int64):
            assert tokenizer.text(np.array([1, 0, 1], dtype=dtype)) == "bab"
        assert tokenizer.text(i for i in (1, 1)) == "bb"
        assert tokenizer.text([]) == ""

    @pytest.mark.parametrize("wrong", [1.0, "1", None, b"1", [1], np.float32(1)])
    def test_ids_that_are_no_integers(self, load, wrong):
        tokenizer = load({"a": 0, "b": 1})
        with pytest.raises(InvalidTypeError, match="not an integer"):
            tokenizer.token_bytes(wrong)
        with pytest.raises(InvalidTypeError, match="not an integer"):
            tokenizer.text([0, wrong])


class TestIdentity:
    def test_digest_is_of_id_length_and_bytes(self, load):
        tokenizer = load({"Ġb": 7, "a": 0}, added=[(300, "<e>", True)], decoder=BYTE_LEVEL)
        tokens = [(0, b"a"), (7, b" b"), (300, b"<e>")]
        data = b"".join(struct.pack("<II", token_id, len(piece)) + piece for token_id, piece in tokens)
        assert tokenizer.digest == hashlib.sha256(data).hexdigest()

    def test_digest_depends_on_bytes_and_not_on_how_they_are_written(self, tmp_path):
        one = content({"Ġa": 0, "b": 1}, decoder=BYTE_LEVEL)
        two = content({"b": 1, "▁a": 0}, decoder=SENTENCEPIECE_DECODER)
        three = content({"▁a": 0, "B": 1}, decoder=SENTENCEPIECE_DECODER)
        found = [Tokenizer.from_path(write(tmp_path / str(i), c)) for i, c in enumerate((one, two, three))]
        assert found[0] == found[1]
        assert found[0].digest == found[1].digest != found[2].digest
        assert found[1] != found[2]
        assert hash(found[0]) == hash(found[1])

    def test_special_flags_and_template_are_apart_from_the_digest(self, tmp_path):
        plain = Tokenizer.from_path(write(tmp_path / "a", content({"a": 0}, added=[(1, "<e>", False)])))
        folder = write(tmp_path / "b", content({"a": 0}, added=[(1, "<e>", True)]))
        (folder / "chat_template.jinja").write_text("x")
        special = Tokenizer.from_path(folder)
        assert plain.digest == special.digest
        assert plain != special
        assert plain != "something else"

    def test_it_is_immutable(self, load):
        tokenizer = load({"a": 0}, added=[(1, "<s>", True)], config={"bos_token": "<s>"})
        with pytest.raises(FrozenInstanceError):
            tokenizer.is_partial = True
        with pytest.raises(TypeError):
            tokenizer.special_tokens[0] = "x"
        with pytest.raises(TypeError):
            tokenizer.special_roles["eos"] = 1

    def test_it_pickles_and_copies(self, load):
        tokenizer = load({"Ġa": 0, "b": 5}, added=[(6, "<s>", True)], config={"bos_token": "<s>"}, decoder=BYTE_LEVEL)
        assert tokenizer.id_of(b"b") == (5,)
        size = len(pickle.dumps(tokenizer))
        for again in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer), copy.copy(tokenizer)):
            assert again == tokenizer
            assert again.files == tokenizer.files
            assert again.digest == tokenizer.digest
            assert again.pieces([0, 5, 6]) == tokenizer.pieces([0, 5, 6])
            assert len(pickle.dumps(again)) == size, "what is cached stays out"

    def test_repr_is_short(self, load):
        tokenizer = load({"a": 0})
        assert repr(tokenizer) == f"<Tokenizer {tokenizer.digest[:12]}: 1 tokens>"
        assert repr(Tokenizer.from_pieces({1: b""})) == "<Tokenizer partial: 1 tokens>"

    def test_id_of(self, load):
        tokenizer = load({"a": 0, "<0x61>": 1, "b": 2}, decoder=SENTENCEPIECE_DECODER)
        assert tokenizer.id_of(b"a") == (0, 1)
        assert tokenizer.id_of(b"b") == (2,)
        assert tokenizer.id_of(b"nowhere") == ()
        with pytest.raises(InvalidTypeError, match="not bytes"):
            tokenizer.id_of("a")


class TestConfiguration:
    ADDED = ((1, "<s>", True), (2, "</s>", True), (3, "<tool>", False), (7, "<pad>", True))

    def test_special_tokens_and_roles(self, load):
        config = {
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
            "pad_token": None,
            "unk_token": "<nowhere>",
            "model_max_length": 1000000000000000019884624838656,
            "added_tokens_decoder": {"1": {"content": "<s>"}},
        }
        tokenizer = load({"a": 0}, added=self.ADDED[::-1], config=config)
        assert dict(tokenizer.special_tokens) == {1: "<s>", 2: "</s>", 7: "<pad>"}
        assert list(tokenizer.special_tokens) == [1, 2, 7]
        assert dict(tokenizer.special_roles) == {"bos": 1, "eos": 2}
        assert tokenizer.bos_id == 1

    def test_a_role_may_be_a_piece_of_the_vocabulary(self, load):
        assert dict(load({"a": 4}, config={"unk_token": "a"}).special_roles) == {"unk": 4}
        unigram = load([["<unk>", 0.0]], config={"unk_token": "<unk>"})
        assert dict(unigram.special_roles) == {"unk": 0}

    def test_special_tokens_map_fills_in(self, tmp_path):
        special = {"bos_token": "</s>", "pad_token": {"content": "<pad>"}, "additional_special_tokens": []}
        config = {"bos_token": "<s>"}
        folder = write(
            tmp_path, content({"a": 0}, added=self.ADDED), tokenizer_config=config, special_tokens_map=special
        )
        assert dict(Tokenizer.from_path(folder).special_roles) == {"bos": 1, "pad": 7}

    def test_nothing_known(self, load):
        tokenizer = load({"a": 0})
        assert dict(tokenizer.special_roles) == {}
        assert dict(tokenizer.special_tokens) == {}
        assert tokenizer.bos_id is None
        assert tokenizer.chat_template is None
        assert tokenizer.chat_template_sha256 is None
        assert not tokenizer.adds_bos
        assert not tokenizer.is_partial

    def test_chat_template(self, tmp_path):
        folder = write(tmp_path, content({"a": 0}), tokenizer_config={"chat_template": "{{ ü }}"})
        tokenizer = Tokenizer.from_path(folder)
        assert tokenizer.chat_template == "{{ ü }}"
        assert tokenizer.chat_template_sha256 == hashlib.sha256("{{ ü }}".encode()).hexdigest()
        (folder / "chat_template.jinja").write_bytes(b"{{ newer }}\r\n")
        assert Tokenizer.from_path(folder).chat_template == "{{ newer }}\r\n", "the file wins, as it is"

    def test_named_chat_templates(self, load):
        named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
        assert load({"a": 0}, config={"chat_template": named}).chat_template == "D"
        assert load({"a": 0}, config={"chat_template": named[:1]}).chat_template is None

    @staticmethod
    def template(*before):
        return {
            "type": "TemplateProcessing",
            "single": [
                *({"SpecialToken": {"id": token, "type_id": 0}} for token in before),
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {},
        }

    @pytest.mark.parametrize(
        ("processor", "config", "adds"),
        [
            (template("<s>"), {"bos_token": "<s>"}, True),
            ({"type": "Sequence", "processors": [BYTE_LEVEL, template("<s>")]}, {"bos_token": "<s>"}, True),
            (template(), {"bos_token": "<s>", "add_bos_token": True}, False),
            (template("</s>"), {"bos_token": "<s>"}, False),
            (template("<s>"), {}, True),
            (template(), {}, False),
            (BYTE_LEVEL, {"bos_token": "<s>", "add_bos_token": True}, True),
            (None, {"bos_token": "<s>", "add_bos_token": True}, True),
            (None, {"bos_token": None, "add_bos_token": True}, False),
            (None, {"bos_token": "<s>", "add_bos_token": False}, False),
            (None, {"bos_token": "<s>"}, False),
        ],
    )
    def test_adds_bos(self, load, processor, config, adds):
        tokenizer = load({"a": 0}, added=self.ADDED, config=config, post_processor=processor)
        assert tokenizer.adds_bos is adds

    def test_files(self, tmp_path):
        folder = write(tmp_path, content({"a": 0}), generation_config={}, tokenizer_config={}, config={})
        assert Tokenizer.from_path(folder).files == (
            folder / "tokenizer.json",
            folder / "tokenizer_config.json",
        )
        (folder / "chat_template.jinja").write_text("x")
        (folder / "special_tokens_map.json").write_text("{}")
        expected = [
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
        ]
        tokenizer = Tokenizer.from_path(str(folder))
        assert tokenizer.files == tuple(folder / name for name in expected)
        itself = Tokenizer.from_path(folder / "tokenizer.json")
        assert itself == tokenizer
        assert itself.files == tokenizer.files


class TestPartial:
    PIECES = {70000: b" the", 3: b"", 12: b"\xf0\x9f"}  # noqa: RUF012

    def test_known_and_unknown(self):
        tokenizer = Tokenizer.from_pieces(self.PIECES)
        assert tokenizer.is_partial
        assert tokenizer.digest is None
        assert tokenizer.vocabulary_size is None
        assert tokenizer.files == ()
        assert tokenizer.bos_id is None
        assert tokenizer.token_bytes(3) == b""
        assert tokenizer.token_bytes(4) is None
        assert tokenizer.text([70000, 4, 12]) == " the\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
        assert tokenizer.id_of(b" the") == (70000,)

    def test_written_in_id_order_and_read_back(self, tmp_path):
        tokenizer = Tokenizer.from_pieces(self.PIECES)
        written = tokenizer.to_partial_json()
        assert written == b'{\n"3": "",\n"12": "f09f",\n"70000": "20746865"\n}\n'
        assert Tokenizer.from_pieces(dict(sorted(self.PIECES.items()))).to_partial_json() == written
        path = tmp_path / "partial_vocabulary.json"
        path.write_bytes(written)
        for source in (tmp_path, path):
            again = Tokenizer.from_path(source)
            assert again == tokenizer
            assert again.files == (path,)

    def test_empty(self, tmp_path):
        nothing = Tokenizer.from_pieces({})
        assert nothing.to_partial_json() == b"{}\n"
        (tmp_path / "partial_vocabulary.json").write_bytes(b"{}\n")
        assert Tokenizer.from_path(tmp_path) == nothing
        assert nothing.token_bytes(0) is None

    def test_of_a_whole_tokenizer(self, load):
        assert load({"b": 1, "Ġ": 0}, decoder=BYTE_LEVEL).to_partial_json() == b'{\n"0": "20",\n"1": "62"\n}\n'

    def test_a_whole_one_beside_it_is_preferred(self, tmp_path):
        (tmp_path / "partial_vocabulary.json").write_bytes(b"{}\n")
        write(tmp_path, content({"a": 0}))
        assert not Tokenizer.from_path(tmp_path).is_partial
        assert Tokenizer.from_path(tmp_path / "partial_vocabulary.json").is_partial

    @pytest.mark.parametrize(
        "data",
        [
            b"[]",
            b'{"01": ""}',
            b'{"-0": ""}',
            b'{"-1": ""}',
            b'{"+1": ""}',
            b'{" 1": ""}',
            b'{"1.0": ""}',
            b'{"0x1": ""}',
            b'{"": ""}',
            b'{"2147483648": ""}',
            b'{"99999999999999999999999": ""}',
            '{"٣": ""}'.encode(),
            b'{"1": "6"}',
            b'{"1": "6g"}',
            b'{"1": "61 62"}',
            b'{"1": "61\\n"}',
            b'{"1": 61}',
            b'{"1": null}',
            b'{"1": "61", "1": "62"}',
            b'{"1": "61", "\\u0031": "61"}',
            b'{"1": "61"',
        ],
    )
    def test_damaged(self, tmp_path, data):
        path = tmp_path / "partial_vocabulary.json"
        path.write_bytes(data)
        with pytest.raises(InvalidInputError, match=re.escape(str(path))):
            Tokenizer.from_path(tmp_path)

    @pytest.mark.parametrize("wrong", [{-1: b""}, {2**31: b""}, {2**80: b""}])
    def test_ids_out_of_range(self, wrong):
        with pytest.raises(InvalidInputError, match=r"not in 0\.\.2147483647"):
            Tokenizer.from_pieces(wrong)

    @pytest.mark.parametrize("wrong", [{"1": b""}, {1.0: b""}, {1: "a"}, {1: None}, {1: bytearray(b"a")}])
    def test_wrong_types(self, wrong):
        with pytest.raises(InvalidTypeError):
            Tokenizer.from_pieces(wrong)

    def test_numpy_ids(self):
        assert Tokenizer.from_pieces({np.uint32(7): b"x"}) == Tokenizer.from_pieces({7: b"x"})


GOOD = content({"Ġa": 0, "b": 1}, added=[(2, "<s>", True)], decoder=BYTE_LEVEL)


def with_model(**fields):
    return json.dumps(GOOD | {"model": GOOD["model"] | fields}).encode()


def with_top(**fields):
    return json.dumps(GOOD | fields).encode()


class TestDamagedFiles:
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"not JSON",
            b"\xff\xfe",
            b"\xef\xbb\xbf{}",
            b"[]",
            b"null",
            b"{}",
            json.dumps(GOOD).encode()[:-1],
            json.dumps(GOOD).encode() + b"x",
            b"[" * 200_000,
            b'{"decoder":' * 100_000,
            b'{"model":{"vocab":{"a":0}},"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
            b'{"model":{"vocab":{"a":0}},"decoder":' + b'{"type":"Sequence","decoders":[' * 100_000,
            b'{"model":{"vocab":{"a":0,"\xff":1}}}',
            b'{"model":{"vocab":{"a":0,"\\ud800":1}}}',
            b'{"model":{"vocab":{"a":0,"\\udc00":1}}}',
            with_top(model=None),
            with_top(model=[]),
            json.dumps({"model": {"type": "BPE", "merges": []}}).encode(),
            with_model(vocab=None),
            with_model(vocab={"a": -1}),
            with_model(vocab={"a": 2**31}),
            with_model(vocab={"a": 10**30}),
            with_model(vocab={"a": 1.5}),
            with_model(vocab={"a": "1"}),
            with_model(vocab={"a": True}),
            with_model(vocab={"a": 0, "b": 0}),
            with_model(vocab=[["a", 0.0], ["b"]]),
            with_model(vocab=[[1, 0.0]]),
            with_model(vocab=["a"]),
            with_model(byte_fallback="yes"),
            with_top(model={"vocab": {}}, added_tokens=[]),
            with_top(added_tokens={}),
            with_top(added_tokens=[{"id": 5}]),
            with_top(added_tokens=[{"content": "x"}]),
            with_top(added_tokens=[{"id": -1, "content": "x"}]),
            with_top(added_tokens=[{"id": 2**31, "content": "x"}]),
            with_top(added_tokens=[{"id": 5, "content": "x", "special": 1}]),
            with_top(added_tokens=[{"id": 5, "content": "x"}, {"id": 5, "content": "y"}]),
            with_top(added_tokens=[{"id": 5, "content": "x"}, {"id": 5, "content": "x"}]),
            with_top(decoder="ByteLevel"),
            with_top(decoder={}),
            with_top(decoder={"type": 3}),
            with_top(decoder={"type": "Sequence", "decoders": 3}),
            with_top(decoder={"type": "Replace", "pattern": {"Regex": "▁"}, "content": " "}),
            with_top(decoder={"type": "Replace", "pattern": {"String": ""}, "content": " "}),
            with_top(decoder={"type": "Replace", "pattern": "▁", "content": " "}),
            with_top(decoder={"type": "Metaspace", "replacement": ""}),
            with_top(decoder={"type": "Metaspace"}),
            with_top(decoder={"type": "CTC", "pad_token": "<pad>"}),
            with_top(post_processor={"type": "TemplateProcessing", "single": "$A"}),
        ],
    )
    def test_tokenizer_json(self, tmp_path, data):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(data)
        with pytest.raises(InvalidInputError, match=re.escape(str(path))) as caught:
            Tokenizer.from_path(tmp_path)
        assert ";" in str(caught.value), "it says what to do"

    @pytest.mark.parametrize(
        ("name", "data"),
        [
            ("tokenizer_config.json", b"{"),
            ("tokenizer_config.json", b"[]"),
            ("tokenizer_config.json", b'{"bos_token": 3}'),
            ("tokenizer_config.json", b'{"bos_token": {"content": 3}}'),
            ("tokenizer_config.json", b'{"add_bos_token": "yes"}'),
            ("tokenizer_config.json", b'{"chat_template": 3}'),
            ("tokenizer_config.json", b'{"chat_template": [3]}'),
            ("tokenizer_config.json", b'{"chat_template": "\\ud800"}'),
            ("tokenizer_config.json", b'{"x":' * 100_000),
            ("special_tokens_map.json", b""),
            ("special_tokens_map.json", b'{"eos_token": ["</s>"]}'),
            ("chat_template.jinja", b"\xff"),
        ],
    )
    def test_the_files_beside_it(self, tmp_path, name, data):
        (write(tmp_path, GOOD) / name).write_bytes(data)
        with pytest.raises(InvalidInputError, match=re.escape(str(tmp_path / name))):
            Tokenizer.from_path(tmp_path)

    def test_deep_nesting_of_steps_is_followed(self, load):
        decoder = BYTE_LEVEL
        for _ in range(150):
            decoder = {"type": "Sequence", "decoders": [decoder]}
        assert load({"Ġ": 0}, decoder=decoder).token_bytes(0) == b" "

    @pytest.mark.parametrize("name", ["", "nowhere", "tokenizer.json", "partial_vocabulary.json", "file/inside"])
    def test_missing(self, tmp_path, name):
        (tmp_path / "file").write_text("x")
        with pytest.raises(SourceNotFoundError, match=r"no tokenizer here; give a directory") as caught:
            Tokenizer.from_path(tmp_path / name)
        assert isinstance(caught.value, LogitStoreError)
        assert isinstance(caught.value, FileNotFoundError)

    def test_only_the_file_that_was_asked_for(self, tmp_path):
        (tmp_path / "partial_vocabulary.json").write_bytes(b"{}\n")
        with pytest.raises(SourceNotFoundError):
            Tokenizer.from_path(tmp_path / "tokenizer.json")

    def test_unreadable(self, tmp_path):
        (tmp_path / "tokenizer.json").mkdir()
        with pytest.raises(InvalidInputError, match="cannot be read"):
            Tokenizer.from_path(tmp_path)
        with pytest.raises(InvalidInputError, match="cannot be read"):
            Tokenizer.from_path("with\0nul")


def read_bytes(data: bytes, name: str = "tokenizer.json") -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        return Tokenizer.from_path(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "vocab", "decoders", "pattern", "String", "content", "id", "single"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


class TestProperties:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.binary(min_size=1, max_size=12), unique=True, min_size=1, max_size=30))
    def test_byte_level_round_trip(self, pieces):
        vocabulary = {byte_level(piece): token_id for token_id, piece in enumerate(pieces)}
        tokenizer = read_bytes(json.dumps(content(vocabulary, decoder=BYTE_LEVEL)).encode())
        ids = range(len(pieces))
        assert tokenizer.pieces(ids) == pieces
        assert tokenizer.text(ids) == b"".join(pieces).decode(errors="replace")
        assert [tokenizer.id_of(piece) for piece in pieces] == [(token_id,) for token_id in ids]

    @settings(max_examples=60, deadline=None)
    @given(st.dictionaries(st.integers(0, 2**31 - 1) | st.integers(0, 20), st.binary(max_size=12)))
    def test_partial_round_trip(self, pieces):
        tokenizer = Tokenizer.from_pieces(pieces)
        again = read_bytes(tokenizer.to_partial_json(), "partial_vocabulary.json")
        assert again == tokenizer
        assert again.to_partial_json() == tokenizer.to_partial_json()
        for token_id, piece in pieces.items():
            assert again.token_bytes(token_id) == piece
            assert token_id in again.id_of(piece)
            if token_id + 1 not in pieces:
                assert again.token_bytes(token_id + 1) is None

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_any_damage_is_one_error_or_none(self, data):
        good = json.dumps(GOOD | {"decoder": SENTENCEPIECE_DECODER}).encode()
        at = data.draw(st.integers(0, len(good) - 1))
        patch = data.draw(st.binary(max_size=3) | st.sampled_from([b"null", b"[]", b"{}", b"1", b'"']))
        damaged = good[:at] + patch + good[at + data.draw(st.integers(0, 4)) :]
        with suppress(InvalidInputError):
            assert read_bytes(damaged).digest

    @settings(max_examples=150, deadline=None)
    @given(
        st.sampled_from(["model", "added_tokens", "decoder", "pre_tokenizer", "normalizer", "post_processor"]),
        JSON,
    )
    def test_any_json_in_any_place_is_one_error_or_none(self, name, value):
        with suppress(InvalidInputError):
            assert read_bytes(json.dumps(GOOD | {name: value}).encode()).digest


TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    " leading,  double   and trailing spaces  ",
    "def f(x):\n\tif x:\n\t\treturn {'a': [1, 2.5e-3]}  # why\r\n\n\n\treturn None\n",
    "emoji 🦄👩‍👩‍👧‍👦🇩🇪 and \N{ZERO WIDTH SPACE}marks",
    "日本語と中文、한국어 และไทย, Ελληνικά, العربية",
    "naïve café — “quotes” … ½ € \N{NO-BREAK SPACE}x",
    "rare: 𒀀𓂀ꙮ \x00\x01\x7f \ue000",
    "<0x41> Ġ Ċ ## </s> [CLS]",
]
"""Together they use whole words, spaces, control characters, and characters that only bytes can spell."""


@pytest.fixture(scope="module", params=["gemma3", "llama3", "qwen3"])
def real(request):
    """A published tokenizer and the `tokenizers` package's reading of it."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = REAL / request.param
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"the tokenizer files of {request.param} are not here (shared/data/tokenizers)")
    peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return request.param, Tokenizer.from_path(folder), peer


class TestPublished:
    def test_size_and_beginning(self, real):
        name, tokenizer, peer = real
        expected = {"gemma3": (262145, 2), "llama3": (128256, 128000), "qwen3": (151669, None)}
        assert (tokenizer.vocabulary_size, tokenizer.bos_id) == expected[name]
        assert tokenizer.vocabulary_size == peer.get_vocab_size(with_added_tokens=True)
        assert tokenizer.adds_bos == (name == "gemma3") == (peer.encode("a").ids[0] == tokenizer.bos_id)
        assert [path.name for path in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]
        assert tokenizer.chat_template
        added = peer.get_added_tokens_decoder()
        assert dict(tokenizer.special_tokens) == {i: t.content for i, t in sorted(added.items()) if t.special}

    @pytest.mark.parametrize("text", TEXTS)
    def test_texts(self, real, text):
        _, tokenizer, peer = real
        text = unicodedata.normalize("NFC", text)
        ids = peer.encode(text, add_special_tokens=False).ids
        assert b"".join(tokenizer.pieces(ids)) == text.encode()
        assert tokenizer.text(ids) == peer.decode(ids, skip_special_tokens=False) == text

    def test_cut_characters(self, real):
        _, tokenizer, peer = real
        ids = peer.encode("cut 𒀀", add_special_tokens=False).ids
        for end in range(len(ids) + 1):
            text = re.sub("\N{REPLACEMENT CHARACTER}+", "\N{REPLACEMENT CHARACTER}", tokenizer.text(ids[:end]))
            theirs = peer.decode(ids[:end], skip_special_tokens=False)
            assert text == re.sub("\N{REPLACEMENT CHARACTER}+", "\N{REPLACEMENT CHARACTER}", theirs)

    def test_single_tokens(self, real):
        _, tokenizer, peer = real
        ids = sorted({*range(0, tokenizer.vocabulary_size, 37), *range(600), *tokenizer.special_tokens})
        texts = peer.decode_batch([[token_id] for token_id in ids], skip_special_tokens=False)
        whole = [
            (i, text.encode()) for i, text in zip(ids, texts, strict=True) if "\N{REPLACEMENT CHARACTER}" not in text
        ]
        assert len(whole) > 0.9 * len(ids)
        assert [(i, tokenizer.token_bytes(i)) for i, _ in whole] == whole

    def test_all_bytes_have_a_token(self, real):
        _, tokenizer, _ = real
        missing = [byte for byte in range(256) if not tokenizer.id_of(bytes([byte]))]
        assert missing == []

    def test_ids_of_bytes_are_complete(self, real):
        _, tokenizer, _ = real
        for token_id in range(0, tokenizer.vocabulary_size, 1009):
            piece = tokenizer.token_bytes(token_id)
            assert token_id in tokenizer.id_of(piece)
            assert {tokenizer.token_bytes(other) for other in tokenizer.id_of(piece)} == {piece}

    def test_pickling_is_compact(self, real):
        _, tokenizer, _ = real
        data = pickle.dumps(tokenizer)
        assert len(data) < 30 * tokenizer.vocabulary_size
        assert pickle.loads(data) == tokenizer
