"""One file: whole, or the chunks of it that are undamaged, and what of it is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitstore.checks.findings import Findings
from logitstore.checks.rows import check_sequence
from logitstore.encoding.cells import PCO_VERSION
from logitstore.encoding.codes import check_order
from logitstore.errors import CorruptDataError, LogitStoreError, UnsupportedVersionError
from logitstore.io import MappedFile, sha256_file
from logitstore.recovery.evidence import File
from logitstore.recovery.result import Lost
from logitstore.schema import Manifest, ShardHeader, ShardInfo, serialise_header
from logitstore.shard.chunk import FORMAT_FIELDS, shard_schema
from logitstore.shard.layout import END_MARK, INDEX_DTYPE, Tail, digest, id_hash, write_tail
from logitstore.shard.reader import Shard
from logitstore.shard.salvage import (
    FoundTail,
    Message,
    find_contradicted,
    find_digests,
    find_hashes,
    find_index,
    find_messages,
    find_tail,
    first_message,
    parse_chunk,
    parse_ids,
    parse_schema,
)
from logitstore.shard.sequence import DEFAULT_COLUMNS

_TRIED: Final = 8
_DAMAGED: Final = "the chunk's bytes are damaged"
_UNWRITTEN: Final = "a chunk that was not written to its end"
_CUT: Final = "the file is cut off or damaged from here on"
_GAP: Final = "the file is damaged here"


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A chunk that is undamaged.

    Attributes:
        offset: of its message in the file.
        length: of its message.
        positions: in it.
        candidates: in it.
        hashes: uint64 [sequences], hashes of the ids.
        digest: xxh3-128 of the message.
        vouched: whether a digest covers it.
    """

    offset: int
    length: int
    positions: int
    candidates: int
    hashes: NDArray[np.uint64]
    digest: bytes
    vouched: bool = True

    @property
    def entry(self) -> tuple[int, int, int, int, int, bytes]:
        """It in an index."""
        return self.offset, self.length, len(self.hashes), self.positions, self.candidates, self.digest


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """What can be had of a file.

    Attributes:
        file: which.
        schema: its schema message.
        header: of that.
        user_columns: of that; names and types.
        pieces: its undamaged chunks, in order.
        lost: what is not.
        whole: what the manifest would say of the file as it is; None where it is not whole.
    """

    file: File
    schema: bytes
    header: ShardHeader
    user_columns: tuple[tuple[str, str], ...]
    pieces: tuple[Piece, ...]
    lost: tuple[Lost, ...] = ()
    whole: ShardInfo | None = None

    @property
    def sequences(self) -> int:
        """How many are saved."""
        return sum(len(piece.hashes) for piece in self.pieces)


Fits = Callable[[ShardHeader, tuple[tuple[str, str], ...]], bool]
"""Whether a shard with this header and these columns can be of the dataset."""


def examine_whole(root: Path, file: File) -> Examined | None:
    """A file that is undamaged to the last byte; None where it is not.

    Raises:
        UnsupportedVersionError: this release cannot read it.
    """
    path = root / file.path
    try:
        source = MappedFile(path)
        shard = Shard(source)
        if file.info is not None and shard.tail_digest != file.info.tail_digest:
            return None
        shard.check_end_mark()
        hashes = shard.hashes.copy()
        pieces = []
        for number, entry in enumerate(shard.index):
            offset, length = int(entry["offset"]), int(entry["length"])
            found = digest(source.read(offset, length))
            if found != entry["digest"].tobytes():
                return None
            rows = hashes[shard.starts[number] : shard.starts[number + 1]]
            pieces.append(Piece(offset, length, int(entry["positions"]), int(entry["candidates"]), rows, found))
        tail = shard.tail
        info = ShardInfo(
            path=file.path.removesuffix(".partial"),
            split=file.split,
            bytes=source.size,
            sha256=sha256_file(path),
            tail_digest=shard.tail_digest,
            sequences=tail.sequences,
            positions=tail.positions,
            candidates=tail.candidates,
        )
        schema = source.read(0, tail.schema_bytes).to_pybytes()
    except (CorruptDataError, FileNotFoundError):
        return None
    return Examined(file, schema, shard.header, _user_columns(shard.schema), tuple(pieces), whole=info)


def own_schema(root: Path, file: File) -> bytes:
    """The schema message of a damaged file, where a digest covers it; else nothing."""
    if file.schema:
        return file.schema
    try:
        data = _view(root / file.path)
        found = find_tail(data, file.info.tail_digest if file.info is not None else None)
        schema = first_message(data)
    except LogitStoreError:
        return b""
    return schema if found is not None and digest(schema) == found.tail.schema_digest else b""


def made_schema(manifest: Manifest) -> bytes:
    """The schema message that a writer of this release makes for a manifest; empty where its columns are not plain.

    A digest tells whether it is that of a shard.
    """
    header = ShardHeader(
        version=manifest.version,
        features=manifest.features,
        pco=PCO_VERSION,
        logit_width=manifest.logit_width,
        normalised=manifest.normalised,
        temperature=manifest.temperature,
        resolution=manifest.sampling.resolution,
    )
    try:
        fields = [pa.field(name, pa.type_for_alias(kind)) for name, kind in manifest.user_columns.items()]
    except ValueError:
        return b""
    message: bytes = shard_schema(serialise_header(header), fields).serialize().to_pybytes()
    return message


def examine(root: Path, file: File, schemas: Sequence[bytes], fits: Fits | None) -> Examined | tuple[Lost, ...]:
    """The undamaged chunks of a file.

    Args:
        root: the directory.
        file: which.
        schemas: undamaged schema messages of other shards.
        fits: whether a schema can be of this dataset; None where nothing says it.

    Returns:
        What can be had; only what is lost where that is all.

    Raises:
        UnsupportedVersionError: this release cannot read it.
    """
    total = file.info.sequences if file.info is not None else None
    try:
        data = _view(root / file.path)
        tail = find_tail(data, file.info.tail_digest if file.info is not None else None)
        if tail is None and file.info is not None and _is_another(data, file.info):
            return (Lost(file.path, "another shard lies in the place of this one", total, row=0),)
    except (CorruptDataError, FileNotFoundError) as error:
        reason = "the file is missing" if isinstance(error, FileNotFoundError) else str(error)
        return (Lost(file.path, reason, total, row=0),)
    if total is None and tail is not None:
        total = tail.tail.sequences
    messages = [] if tail is not None and find_index(data, tail) is not None else list(find_messages(data))
    chosen = _choose_schema(data, tail, file, schemas, fits, messages)
    if chosen is None:
        return (Lost(file.path, "its schema message is damaged, and no other shard has the same", total, row=0),)
    salvage = _Salvage(file, data, chosen)
    index = None if tail is None else find_index(data, tail)
    if tail is not None and index is not None:
        salvage.by_index(tail, index)
    else:
        salvage.by_walking(tail, messages, total)
    header, columns = salvage.header, _user_columns(salvage.arrow)
    return Examined(file, chosen, header, columns, tuple(salvage.pieces), tuple(salvage.lost))


def _view(path: Path) -> memoryview:
    source = MappedFile(path)
    return memoryview(source.read(0, source.size)).cast("B")


def _user_columns(schema: pa.Schema) -> tuple[tuple[str, str], ...]:
    return tuple((each.name, str(each.type)) for each in list(schema)[len(FORMAT_FIELDS) :])


def _is_another(data: memoryview, info: ShardInfo) -> bool:
    found = find_tail(data)
    return found is not None and found.end == len(data) and found.shift == 0 and found.digest != info.tail_digest


def _choose_schema(
    data: memoryview,
    tail: FoundTail | None,
    file: File,
    schemas: Sequence[bytes],
    fits: Fits | None,
    messages: Sequence[Message],
) -> bytes | None:
    """The schema message of a file: one that has the tail's digest; without a tail, one under which chunks decode."""
    own = first_message(data)
    others = [each for each in (file.schema, *schemas) if each]
    if tail is not None:
        moved = bytes(data[tail.shift : tail.shift + tail.tail.schema_bytes]) if tail.shift > 0 else b""
        for each in (own, moved, *others):
            if each and digest(each) == tail.tail.schema_digest:
                parse_schema(each)
                return each
        return None
    # The journal's is certain. Other shards of a dataset have the same one; the file's own may have a flipped bit.
    usable = [each for each in dict.fromkeys((*others, own)) if _is_usable(each, fits)]
    for each in usable if len(usable) > 1 else ():
        for message in messages[:_TRIED]:
            try:
                _check(data, message.offset, message.length, each)
            except CorruptDataError:
                continue
            return each
    return usable[0] if usable else None


def _is_usable(schema: bytes, fits: Fits | None) -> bool:
    try:
        arrow, header = parse_schema(schema)
    except (CorruptDataError, UnsupportedVersionError):
        return False
    return fits is None or fits(header, _user_columns(arrow))


def _check(data: memoryview, offset: int, length: int, schema: bytes) -> Piece:
    """A chunk, every row of which was checked.

    Raises:
        CorruptDataError: its rows are not valid.
    """
    message = pa.py_buffer(data[offset : offset + length])
    chunk = parse_chunk(schema, message)
    check_order(chunk.order)
    findings = Findings()
    columns = DEFAULT_COLUMNS | frozenset(chunk.user_names)
    positions = candidates = 0
    hashes = np.empty(len(chunk), np.uint64)
    for place in range(len(chunk)):
        sequence = chunk.sequence(place, columns)
        check_sequence(sequence, chunk, place, findings, shard="", chunk_number=0, row=place)
        positions += len(sequence.count)
        candidates += len(sequence.ids)
        hashes[place] = id_hash(sequence.id)
    for finding in findings.done():
        if finding.severity == "error":
            raise CorruptDataError(finding.message, code=finding.code, row=finding.row)
    return Piece(offset, length, positions, candidates, hashes, digest(message))


class _Salvage:
    """Gathers the chunks of one file."""

    def __init__(self, file: File, data: memoryview, schema: bytes) -> None:
        self.file = file
        self.data = data
        self.schema = schema
        self.pieces: list[Piece] = []
        self.lost: list[Lost] = []
        self.arrow, self.header = parse_schema(schema)

    def lose(self, reason: str, sequences: int | None, **more: Any) -> None:
        """Report a loss."""
        self.lost.append(Lost(self.file.path, reason, sequences, **more))

    def try_piece(self, offset: int, length: int) -> Piece | str:
        """A chunk, or what is wrong with its rows."""
        try:
            return _check(self.data, offset, length, self.schema)
        except CorruptDataError as error:
            return str(error)

    def by_index(self, tail: FoundTail, index: NDArray[Any]) -> None:
        """Take the chunks whose digests are those of an undamaged index; what else there is, is damaged."""
        hashes = find_hashes(self.data, tail)
        row = 0
        for number, entry in enumerate(index):
            count = int(entry["sequences"])
            self._take_entry(number, row, entry, tail.shift, hashes)
            row += count

    def _take_entry(self, number: int, row: int, entry: Any, shift: int, hashes: NDArray[np.uint64] | None) -> None:
        offset, length, count = int(entry["offset"]), int(entry["length"]), int(entry["sequences"])
        reason = _DAMAGED
        for place in dict.fromkeys((offset, offset + shift)):
            if place < 0 or not has_digest(self.data, place, length, entry["digest"].tobytes()):
                continue
            piece = self.try_piece(place, length)
            if isinstance(piece, Piece):
                self.pieces.append(piece)
                return
            reason = f"its rows are not valid: {piece}"
        ids: tuple[str | None, ...] = ()
        if hashes is not None:
            ids = self._ids(offset, length, hashes[row : row + count])
        self.lose(reason, count, chunk=number, row=row, ids=ids)

    def _ids(self, offset: int, length: int, hashes: NDArray[np.uint64]) -> tuple[str | None, ...]:
        """The ids of a damaged chunk, as far as they have the hashes that an undamaged section says."""
        names = parse_ids(self.schema, pa.py_buffer(self.data[offset : offset + length]))
        if len(names) != len(hashes):
            return ()
        ids = tuple(name if id_hash(name) == int(each) else None for name, each in zip(names, hashes, strict=True))
        return ids if any(name is not None for name in ids) else ()

    def by_walking(self, tail: FoundTail | None, messages: Sequence[Message], total: int | None) -> None:
        """Take what digests of a journal, or of what is left of an index, vouch for; else what is valid in itself."""
        entries = self.file.entries
        known = {entry["digest"].tobytes(): number for number, entry in enumerate(entries)}
        tried: dict[int, Piece | str] = {}

        def piece_at(offset: int, length: int) -> Piece | str:
            if offset not in tried:
                tried[offset] = self.try_piece(offset, length)
            return tried[offset]

        every = {message.offset: message for message in messages}
        for entry in entries:
            offset, length, found = int(entry["offset"]), int(entry["length"]), entry["digest"].tobytes()
            if has_digest(self.data, offset, length, found):
                every[offset] = Message(offset, length, found, bounded=True)
        digests = {message.digest for message in every.values()}
        trailer = max((m.offset + m.length for m in messages if m.bounded), default=0)
        vouched = (digests & set(known)) | (digests & self.file.digests)
        vouched |= find_digests(self.data, trailer, digests - vouched)
        chain = self._chain(sorted(every.values(), key=lambda m: m.offset), piece_at)
        if chain and _is_all(chain, tail, self.file.info, self.schema):
            vouched |= {piece.digest for piece in chain}
        broken = [entry for entry in entries if entry["digest"].tobytes() not in digests]
        spans = _Spans([(int(entry["offset"]), int(entry["offset"]) + int(entry["length"])) for entry in broken])
        first = sorted((m for m in every.values() if m.digest in vouched), key=lambda m: m.offset)
        taken = _apart(first, [])
        doubtful = [m for m in every.values() if m.digest not in vouched and m.bounded and not spans.touch(m)]
        contradicted = find_contradicted(self.data, trailer, doubtful)
        doubtful = [m for m in doubtful if m.offset not in contradicted]
        messages = _apart(sorted(doubtful, key=lambda m: m.offset), taken)
        wrong: dict[bytes, str] = {}
        for message in messages:
            piece = piece_at(message.offset, message.length)
            if isinstance(piece, Piece):
                self.pieces.append(piece if message.digest in vouched else replace(piece, vouched=False))
            else:
                wrong[message.digest] = f"its rows are not valid: {piece}"
        self._account(total, known, wrong)

    def _chain(self, messages: Sequence[Message], piece_at: Callable[[int, int], Piece | str]) -> list[Piece]:
        """The chunks that follow one another from the schema message on."""
        chain: list[Piece] = []
        place = len(self.schema)
        for message in messages:
            if message.offset != place:
                continue
            piece = piece_at(message.offset, message.length)
            if isinstance(piece, str):
                break
            chain.append(piece)
            place += message.length
        return chain

    def _account(self, total: int | None, known: dict[bytes, int], wrong: dict[bytes, str]) -> None:
        """Say what is missing: chunks of the journal, and holes between the chunks that were taken."""
        saved = {piece.digest for piece in self.pieces}
        rows = np.concatenate([[0], np.cumsum(self.file.entries["sequences"], dtype=np.int64)])
        for each, number in known.items():
            if each not in saved:
                count = int(self.file.entries["sequences"][number])
                self.lose(wrong.get(each, _DAMAGED), count, chunk=number, row=int(rows[number]))
        holes = self._holes()
        if total is not None:
            missing = total - sum(len(piece.hashes) for piece in self.pieces)
            missing -= sum(each.sequences or 0 for each in self.lost)
            if missing > 0:
                place, row = holes[0] if holes else (0, None)
                chunk = None if row is None else _number_at(self.pieces, place)
                alone = len(holes) == 1
                self.lose(_CUT if alone else _GAP, missing, chunk=chunk, row=row if alone else None)
            return
        for place, row in holes:
            last = place >= (self.pieces[-1].offset if self.pieces else 0)
            written = _UNWRITTEN if last and not self.file.complete else _CUT if last else _GAP
            self.lose(written, None, chunk=_number_at(self.pieces, place) if row is not None else None, row=row)

    def _holes(self) -> list[tuple[int, int | None]]:
        """Where bytes are not accounted for, each with the row that follows; None after the first one."""
        holes: list[tuple[int, int | None]] = []
        place, row = len(self.schema), 0
        ranges = [(int(e["offset"]), int(e["length"]), 0) for e in self.file.entries]
        ranges += [(piece.offset, piece.length, len(piece.hashes)) for piece in self.pieces]
        for offset, length, sequences in sorted(ranges):
            if offset > place:
                holes.append((place, None if holes else row))
            place = max(place, offset + length)
            row += sequences
        rest = bytes(self.data[place : place + len(END_MARK)])
        if rest[: len(END_MARK)] != END_MARK and (rest or self.file.complete):
            holes.append((place, None if holes else row))
        return holes


def has_digest(data: memoryview, offset: int, length: int, expected: bytes) -> bool:
    """Whether the bytes of a message are those of a digest."""
    return offset + length <= len(data) and digest(data[offset : offset + length]) == expected


def _is_all(chain: Sequence[Piece], tail: FoundTail | None, info: ShardInfo | None, schema: bytes) -> bool:
    """Whether chunks are all that a shard had: an index made of them has the digest of the tail, or all of it does."""
    index = np.array([piece.entry for piece in chain], INDEX_DTYPE)
    made = digest(index.tobytes())
    if tail is not None and made == tail.tail.index_digest:
        return True
    if info is None:
        return False
    hashes = np.concatenate([piece.hashes for piece in chain]).astype("<u8").tobytes()
    sums = [int(index[name].sum(dtype=np.uint64)) for name in ("sequences", "positions", "candidates")]
    whole = Tail(info.bytes, len(schema), len(index), sums[0], sums[1], sums[2], digest(schema), digest(hashes), made)
    return write_tail(whole)[-24:-8].hex() == info.tail_digest


def _apart(more: Iterable[Message], taken: Sequence[Message]) -> list[Message]:
    """Messages that overlap none of those that are taken, nor each other, and those; by offset."""
    spans = _Spans([(message.offset, message.offset + message.length) for message in taken])
    found, end = list(taken), 0
    for message in more:
        if message.offset >= end and not spans.touch(message):
            found.append(message)
            end = message.offset + message.length
    return sorted(found, key=lambda message: message.offset)


def _number_at(pieces: Sequence[Piece], place: int) -> int:
    return sum(piece.offset < place for piece in pieces)


class _Spans:
    """Ranges of bytes that do not overlap."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        ordered = sorted(spans)
        self._starts = np.array([start for start, _ in ordered], np.int64)
        self._ends = np.maximum.accumulate(np.array([end for _, end in ordered], np.int64))

    def touch(self, message: Message) -> bool:
        """Whether a message has a byte of one of them."""
        place = int(np.searchsorted(self._starts, message.offset + message.length))  # those that begin before its end
        return place > 0 and int(self._ends[place - 1]) > message.offset
