"""The checks that read every byte and every row."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from logitstore.checks.findings import Findings
from logitstore.checks.rows import check_sequence
from logitstore.dataset.alignment import Alignment
from logitstore.dataset.ids import IdSet
from logitstore.encoding.codes import check_order
from logitstore.errors import CorruptDataError
from logitstore.io import sha256_file
from logitstore.schema import Manifest
from logitstore.shard.chunk import OPTIONAL_TYPES, Chunk
from logitstore.shard.layout import id_hash
from logitstore.shard.reader import Shard
from logitstore.shard.sequence import DEFAULT_COLUMNS, Sequence
from logitstore.tokenizer import Tokenizer


class DeepCheck:
    """Goes through a dataset once and keeps the sums that only the whole shows."""

    def __init__(self, root: Path, manifest: Manifest, findings: Findings, tokenizer: Tokenizer | None) -> None:
        self.root = root
        self.manifest = manifest
        self.findings = findings
        self.columns = DEFAULT_COLUMNS | frozenset(manifest.user_columns)
        self.vocabulary_size = tokenizer.vocabulary_size if tokenizer is not None else None
        self.ids = IdSet()
        self.encodings: Counter[str] = Counter()
        self.optional: Counter[str] = Counter()
        self.highest_id = -1
        self.highest_token = -1
        self.alignment = Alignment()
        self.whole = True
        self.row = 0

    def skip(self, number: int) -> None:
        """Pass over a shard that could not be opened."""
        self.whole = False
        self.row += self.manifest.shards[number].sequences

    def shard(self, number: int, shard: Shard) -> None:
        """Check a shard's sha256 and all of its chunks."""
        info = self.manifest.shards[number]
        if sha256_file(self.root / info.path) != info.sha256:
            self.findings.add(
                "shard-sha256",
                "the file's sha256 is not that of the manifest: its bytes were changed; fetch or copy it again",
                shard=info.path,
            )
        for index in range(len(shard.index)):
            self._chunk(shard, info.path, index)

    def _chunk(self, shard: Shard, path: str, number: int) -> None:
        start, rows = self.row, int(shard.index["sequences"][number])
        self.row += rows
        try:
            chunk = shard.chunk(number)
            check_order(chunk.order)
        except CorruptDataError as error:
            self.whole = False
            self.findings.add_corrupt(error.at(path=shard.path), self.root, chunk=number)
            return
        first = int(shard.starts[number])
        candidates, readable = 0, True
        for place in range(rows):
            sequence = self._sequence(chunk, shard, number, place, start + place)
            if sequence is None:
                readable = False
                continue
            candidates += len(sequence.ids)
            self._identify(sequence, shard, path, number, first + place, start + place)
            check_sequence(sequence, chunk, place, self.findings, shard=path, chunk_number=number, row=start + place)
        if readable and candidates != int(shard.index["candidates"][number]):
            self.findings.add(
                "chunk-counts",
                f"the chunk holds {candidates} candidates, the index says {shard.index['candidates'][number]}",
                shard=path,
                chunk=number,
            )

    def _sequence(self, chunk: Chunk, shard: Shard, number: int, place: int, row: int) -> Sequence | None:
        try:
            sequence = chunk.sequence(place, self.columns)
            self.encodings[chunk.encoding(place).label] += 1
        except CorruptDataError as error:
            self.whole = False
            self.findings.add_corrupt(error.at(path=shard.path), self.root, chunk=number, row=row)
            return None
        for name in OPTIONAL_TYPES:
            if chunk.batch.column(name)[place].as_buffer().size:
                self.optional[name] += 1
        if len(sequence.ids):
            self.highest_id = max(self.highest_id, int(sequence.ids.max()))
        if len(sequence.tokens):
            self.highest_token = max(self.highest_token, int(sequence.tokens.max()))
        self.alignment.add(sequence.tokens, sequence.count, sequence.offsets, sequence.ids)
        return sequence

    def _identify(self, sequence: Sequence, shard: Shard, path: str, number: int, in_shard: int, row: int) -> None:
        if not self.ids.add(sequence.id):
            self.findings.add(
                "duplicate-sequence-id",
                f"the id {sequence.id!r} was there before; ids are unique in a dataset",
                shard=path, chunk=number, row=row,
            )  # fmt: skip
        try:
            hashed = int(shard.hashes[in_shard])
        except CorruptDataError:
            return  # reported once for the shard
        if hashed != id_hash(sequence.id):
            self.findings.add(
                "shard-hashes",
                f"the hash of the id {sequence.id!r} is wrong: look-up by id does not find it",
                shard=path, chunk=number, row=row,
            )  # fmt: skip

    def finish(self) -> None:
        """Report what only the whole shows."""
        if (problem := self.alignment.problem()) is not None:
            self.findings.add("alignment", problem)
        if self.vocabulary_size is not None and self.highest_token >= self.vocabulary_size:
            self.findings.add(
                "id-range",
                f"the token {self.highest_token} is outside the tokenizer's {self.vocabulary_size} tokens",
                "warning",
            )
        if not self.whole:
            return  # what could not be read is missing from the sums
        totals = self.manifest.totals
        highest = self.highest_id if self.highest_id >= 0 else None
        for name, found, said in (
            ("encodings", dict(self.encodings), totals.encodings),
            ("columns", dict(self.optional), totals.columns),
            ("highest_id", highest, totals.highest_id),
        ):
            if found != said:
                self.findings.add("totals", f"the content's {name} are {found}, the manifest says {said}")
