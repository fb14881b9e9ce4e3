"""What a writer that was stopped left, made fit to be gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow as pa

from logitstore.dataset.commit import part_files
from logitstore.dataset.parts import State
from logitstore.errors import CorruptDataError, InvalidInputError, SourceNotFoundError
from logitstore.io import MappedFile, partial_path, sync_directory
from logitstore.schema import Manifest, ShardInfo
from logitstore.schema.journal import Plan
from logitstore.shard.layout import digest, id_hash
from logitstore.shard.message import check_message
from logitstore.shard.writer import ChunkEntry

_OF_THE_RUN: Final = frozenset({"version", "written_by", "overwrite", "first"})
"""What a plan says of its run, and not of the data."""


def check_same(root: Path, before: Plan, now: Plan) -> None:
    """Refuse to go on with other settings.

    The logit width may be left to what the data show.

    Raises:
        InvalidInputError: naming the difference.
    """
    for name in Plan.__struct_fields__:
        if name in _OF_THE_RUN:
            continue
        was, is_now = getattr(before, name), getattr(now, name)
        if name == "tokenizer":  # its identity; not how its files are spelled
            was, is_now = (each and each.digest for each in (was, is_now))
        if was != is_now and not (name == "logit_width" and is_now is None):
            what, was, is_now = _difference(name, was, is_now)
            raise InvalidInputError(
                f"{root}: {now.part} was begun with {what} {_shown(was)}, and now it is {_shown(is_now)}; go on with "
                f"the same settings, or begin anew (--overwrite)"
            )


def plan_of(manifest: Manifest, now: Plan) -> Plan:
    """What the writer of a dataset was told, as far as its manifest says it.

    Args:
        manifest: of the dataset.
        now: the plan of a writer, for what the manifest does not say.
    """
    alone = now.part.of == 1  # else the source is that of all parts together
    return msgspec.structs.replace(
        now,
        sampling=manifest.sampling,
        normalised=manifest.normalised,
        temperature=manifest.temperature,
        logit_width=manifest.logit_width,
        teacher=manifest.teacher,
        tokenizer=manifest.tokenizer,
        source=manifest.source if alone else now.source,
        lineage=manifest.lineage if alone else now.lineage,
    )


def settle(root: Path, state: State, info: ShardInfo) -> None:
    """Give a complete shard its name, where the writer was stopped before.

    Raises:
        CorruptDataError: it is missing.
    """
    path = root / info.path
    if info.path in state.sent:
        path.unlink(missing_ok=True)  # the writer was stopped between the line of the journal and this
        return
    if path.exists():
        return
    if not partial_path(path).exists():
        raise CorruptDataError(
            "a shard that was complete is missing; save the others with `logitstore recover`",
            code="shard-missing",
            path=str(path),
        )
    partial_path(path).replace(path)
    sync_directory(path.parent)


def whole_chunks(root: Path, state: State) -> tuple[list[ChunkEntry], list[int]]:
    """The chunks of the shard that is not complete whose bytes are there, and the hashes of their ids."""
    entries: list[ChunkEntry] = []
    hashes: list[int] = []
    if state.opened is None:
        return entries, hashes
    try:
        file = MappedFile(partial_path(root / state.opened.path))
    except SourceNotFoundError:
        return entries, hashes
    length = len(state.opened.schema)
    if file.size < length or file.read(0, length).to_pybytes() != state.opened.schema:
        return entries, hashes
    schema = pa.ipc.read_schema(pa.py_buffer(state.opened.schema))
    for chunk in state.chunks:
        if chunk.offset + chunk.length > file.size:
            break
        message = file.read(chunk.offset, chunk.length)
        if digest(message).hex() != chunk.digest:
            break  # not synced before the system stopped
        check_message(message)
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        hashes += [id_hash(value) for value in batch.column(0).to_pylist()]
        sizes = (chunk.offset, chunk.length, chunk.sequences, chunk.positions, chunk.candidates)
        entries.append((*sizes, bytes.fromhex(chunk.digest)))
    return entries, hashes


def remove_unknown(root: Path, state: State, *, keep: bool) -> None:
    """Remove shards that are not complete and of which the journal knows nothing: nothing of them was synced.

    Args:
        root: the dataset.
        state: of the part.
        keep: whether the shard that it says is not complete is gone on with.
    """
    opened = root / state.opened.path if state.opened is not None and keep else None
    for path in part_files(root, state.part):
        if path.suffix == ".partial" and (opened is None or path != partial_path(opened)):
            path.unlink()


def _difference(name: str, was: Any, is_now: Any) -> tuple[str, Any, Any]:
    """The first field that differs, by name, and its two values."""
    for field in was.__struct_fields__ if isinstance(was, msgspec.Struct) and type(was) is type(is_now) else ():
        if getattr(was, field) != getattr(is_now, field):
            inner = field if name == "sampling" else f"{name}.{field}"
            return _difference(inner, getattr(was, field), getattr(is_now, field))
    return name, was, is_now


def _shown(value: Any) -> str:
    return "not known" if value is None else repr(value)
