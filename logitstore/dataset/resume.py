"""What a writer that was stopped left, made fit to be gone on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow as pa

from logitstore.dataset.agree import Described, agree
from logitstore.dataset.commit import part_files
from logitstore.dataset.parts import State, arrow_schema, part_directory, part_names, read_plan
from logitstore.errors import CorruptDataError, InvalidInputError, SourceNotFoundError
from logitstore.io import MappedFile, partial_path, sync_directory
from logitstore.schema import Manifest, ShardInfo
from logitstore.schema.journal import JOURNAL_NAME, Plan
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
        if name == "fingerprint":
            _check_fingerprint(root, before, now)
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
    path = partial_path(root / state.opened.path)
    try:
        file = MappedFile(path)
    except SourceNotFoundError:
        if state.synced:
            raise CorruptDataError(
                "it is missing; save the others with `logitstore recover`", code="shard-missing", path=str(path)
            ) from None
        return entries, hashes
    length = len(state.opened.schema)
    schema = arrow_schema(state.opened.schema)
    whole = file.size >= length and file.read(0, length).to_pybytes() == state.opened.schema
    for chunk in state.chunks if whole else ():
        if chunk.offset + chunk.length > file.size:
            break
        message = file.read(chunk.offset, chunk.length)
        if digest(message).hex() != chunk.digest:
            break
        check_message(message)
        try:
            batch = pa.ipc.read_record_batch(message, schema)
            batch.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise CorruptDataError(f"a chunk is none: {error}", code="chunk-message", path=file.path) from error
        hashes += [id_hash(value) for value in batch.column(0).to_pylist()]
        sizes = (chunk.offset, chunk.length, chunk.sequences, chunk.positions, chunk.candidates)
        entries.append((*sizes, bytes.fromhex(chunk.digest)))
    end = entries[-1][0] + entries[-1][1] if entries else 0
    if end < state.synced:  # else what follows was not synced before the system stopped
        raise CorruptDataError(
            f"its bytes from {end} on were changed after they were synced; save the others with `logitstore recover`",
            code="chunk-digest",
            path=file.path,
        )
    return entries, hashes


def check_known(root: Path, state: State) -> None:
    """Refuse to go on where the journal does not know of a complete shard: it would be lost.

    Raises:
        CorruptDataError: naming it.
    """
    known = {info.path for info in state.shards}
    directory = part_directory(root, state.part)
    for path, number in part_files(root, state.part).items():
        unknown = path.suffix == ".arrow" and path.relative_to(root).as_posix() not in known
        if unknown and number >= state.plan.first:
            raise CorruptDataError(
                f"the journal of {state.part} is damaged: it does not know of {path.name}, which is complete; save "
                f"what is there with `logitstore recover`",
                code="journal",
                path=str(directory / JOURNAL_NAME),
            )
    names = {name.rpartition("/")[2] for name in known}
    for path in directory.glob("*.ids"):
        if path.stem not in names:
            raise CorruptDataError(
                f"the journal of {state.part} is damaged: it does not know of {path.stem}, which was sent",
                code="journal",
                path=str(directory / JOURNAL_NAME),
            )


def check_siblings(root: Path, now: Plan) -> None:
    """Refuse a part that could not be joined with the others.

    Raises:
        InvalidInputError: naming the other one, and the difference.
    """
    own = described(now)
    for part in part_names(root):
        if part.of == now.part.of > 1 and part.split == now.part.split and part != now.part:
            other = read_plan(root, part)
            width = None if other is None else other.logit_width
            if other is not None:
                either = own.logit_width if width is None else width  # it may not be known yet
                agree(
                    [replace(described(other), logit_width=either), replace(own, logit_width=own.logit_width or either)]
                )


def described(plan: Plan) -> Described:
    """What a part says of itself before its first sequence."""
    return Described(
        str(plan.part), plan.normalised, plan.temperature, plan.logit_width, plan.sampling, plan.teacher,
        plan.tokenizer, None, {}, plan.source, plan.lineage,
    )  # fmt: skip


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


def _check_fingerprint(root: Path, before: Plan, now: Plan) -> None:
    for key in {**before.fingerprint, **now.fingerprint}:
        was, is_now = before.fingerprint.get(key), now.fingerprint.get(key)
        if was != is_now:
            raise InvalidInputError(
                f"{root}: {now.part} was begun with another {key} ({was or 'none'}, and now {is_now or 'none'}); go on "
                f"with the same, or begin anew (--overwrite)"
            )


def _difference(name: str, was: Any, is_now: Any) -> tuple[str, Any, Any]:
    """The first field that differs, by name, and its two values."""
    for field in was.__struct_fields__ if isinstance(was, msgspec.Struct) and type(was) is type(is_now) else ():
        if getattr(was, field) != getattr(is_now, field):
            inner = field if name == "sampling" else f"{name}.{field}"
            return _difference(inner, getattr(was, field), getattr(is_now, field))
    return name, was, is_now


def _shown(value: Any) -> str:
    return "not known" if value is None else repr(value)
