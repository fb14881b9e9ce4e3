"""The tokenizer's files of a dataset: beside its parts until it is committed, then in their place."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from pathlib import Path

import msgspec

from logitstore.errors import InvalidInputError, SourceNotFoundError
from logitstore.io import make_directory, sha256_file, write_atomic
from logitstore.schema import Manifest, TokenizerInfo
from logitstore.schema.journal import PARTS_DIRECTORY
from logitstore.schema.manifest import TOKENIZER_DIRECTORY, FileInfo
from logitstore.tokenizer import PARTIAL_FILE, Tokenizer


def stage_tokenizer(root: Path, tokenizer: Tokenizer) -> TokenizerInfo:
    """Copy a tokenizer's files beside the parts, as they are, and describe it; parts with equal files share them."""
    files = {path.name: path.read_bytes() for path in tokenizer.files}
    if tokenizer.is_partial:
        files = {PARTIAL_FILE: tokenizer.to_partial_json()}
    infos = [
        FileInfo(path=f"{TOKENIZER_DIRECTORY}/{name}", bytes=len(data), sha256=_sha256(data))
        for name, data in sorted(files.items())
    ]
    info = describe_tokenizer(tokenizer, tuple(infos))
    directory = staged(root, info)
    make_directory(directory)
    for name, data in files.items():
        if not _is(directory / name, data):
            write_atomic(directory / name, data)
    return info


def staged(root: Path, info: TokenizerInfo) -> Path:
    """Where the files of a tokenizer are until the dataset is committed."""
    return root / PARTS_DIRECTORY / f"tokenizer-{_key(info)}"


def merge_partial(root: Path, infos: list[TokenizerInfo]) -> TokenizerInfo:
    """One partial vocabulary of several that are staged.

    Raises:
        InvalidInputError: two say different bytes of a token.
    """
    pieces: dict[int, bytes] = {}
    for info in infos:
        for token, piece in Tokenizer.from_path(staged(root, info)).items():
            if pieces.setdefault(token, piece) != piece:
                raise InvalidInputError(
                    f"the token {token} is {pieces[token]!r} in one part and {piece!r} in another: their tokenizers "
                    f"differ"
                )
    return stage_tokenizer(root, Tokenizer.from_pieces(pieces))


def place_tokenizer(root: Path, info: TokenizerInfo, source: Path, old: Manifest | None) -> TokenizerInfo:
    """Put a tokenizer's files where the manifest will name them.

    Files of the dataset that is there are not touched, since it has to stay whole until its manifest is replaced:
    others of the same name go into a directory of their own.

    Args:
        root: the dataset.
        info: the tokenizer.
        source: directory of its files.
        old: manifest of the dataset that is there.
    """
    taken = {file.path: file for file in old.tokenizer.files} if old is not None and old.tokenizer is not None else {}
    if any(taken.get(file.path, file) != file for file in info.files):
        folder = f"{TOKENIZER_DIRECTORY}/{_key(info)}"
        moved = tuple(msgspec.structs.replace(file, path=f"{folder}/{_name(file)}") for file in info.files)
        info = msgspec.structs.replace(info, files=moved)
    for file in info.files:
        target = root / file.path
        make_directory(target.parent)
        with contextlib.suppress(OSError, SourceNotFoundError):
            if sha256_file(target) == file.sha256:
                continue
        data = (source / _name(file)).read_bytes()
        if _sha256(data) != file.sha256:
            raise InvalidInputError(f"{source / _name(file)} was changed meanwhile; give the tokenizer anew")
        write_atomic(target, data)
    return info


def describe_tokenizer(tokenizer: Tokenizer, files: tuple[FileInfo, ...]) -> TokenizerInfo:
    """A tokenizer's identity, as the manifest has it."""
    return TokenizerInfo(
        digest=tokenizer.digest,
        vocabulary_size=tokenizer.vocabulary_size,
        special_tokens=_special_digest(tokenizer),
        chat_template=tokenizer.chat_template_sha256,
        files=files,
    )


def _special_digest(tokenizer: Tokenizer) -> str | None:
    """sha256 over (id, text) of the special tokens in id order: id and length as u32, the text in UTF-8."""
    if not tokenizer.special_tokens:
        return None
    parts = [(token, text.encode()) for token, text in sorted(tokenizer.special_tokens.items())]
    return _sha256(b"".join(struct.pack("<II", token, len(text)) + text for token, text in parts))


def _key(info: TokenizerInfo) -> str:
    """Names a set of files by their content."""
    return _sha256("".join(f"{_name(file)} {file.sha256}\n" for file in info.files).encode())[:16]


def _name(file: FileInfo) -> str:
    return file.path.rpartition("/")[2]


def _is(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
