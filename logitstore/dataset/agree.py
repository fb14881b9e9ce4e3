"""Whether parts or datasets can be one dataset, and what that says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from logitstore.encoding.values import Encoding
from logitstore.errors import InvalidInputError
from logitstore.schema import Manifest, Sampling, Source, Teacher, TokenizerInfo
from logitstore.schema.header import Normalised

_DRAWS: Final = Encoding.DRAWS.label


@dataclass(frozen=True, slots=True)
class Described:
    """What a part or a dataset says of itself.

    Attributes:
        name: for messages.
        normalised: as in the manifest; so are the others.
        user_columns: None where it has no shard, and so no columns yet.
        encodings: sequences under each encoding.
    """

    name: str
    normalised: Normalised
    temperature: float
    logit_width: int | None
    sampling: Sampling
    teacher: Teacher | None
    tokenizer: TokenizerInfo | None
    user_columns: dict[str, str] | None
    encodings: dict[str, int]
    source: Source | None
    lineage: tuple[Source, ...]

    @classmethod
    def of(cls, name: str, manifest: Manifest) -> Described:
        """What a dataset says."""
        return cls(
            name,
            manifest.normalised,
            manifest.temperature,
            manifest.logit_width,
            manifest.sampling,
            manifest.teacher,
            manifest.tokenizer,
            manifest.user_columns if manifest.shards else None,
            manifest.totals.encodings,
            manifest.source,
            manifest.lineage,
        )


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all of them say together; `notes` names what they do not agree on, and is left out."""

    first: Described
    sampling: Sampling
    teacher: Teacher | None
    user_columns: dict[str, str]
    source: Source | None
    lineage: tuple[Source, ...]
    notes: tuple[str, ...]


def agree(many: Sequence[Described]) -> Agreed:
    """Put together what parts or datasets say, at least one.

    Raises:
        InvalidInputError: they differ in what one dataset has once: tokenizer, logit width, kind of the values,
            resolution, teacher, users' columns.
    """
    many = [each for each in many if each.encodings] or many  # a part without sequences fits everywhere
    first = many[0]
    for what, get, advice in _ONCE:
        for other in many[1:]:
            if get(other) != get(first):
                unknown = get(first) is None or get(other) is None
                raise InvalidInputError(
                    f"{first.name} and {other.name} cannot be one dataset: {what} is {_shown(get(first))} in one and "
                    f"{_shown(get(other))} in the other; {'say it of both' if unknown else advice}"
                )
    _check_kinds(many)
    with_columns = [each for each in many if each.user_columns is not None]
    columns = with_columns[0].user_columns if with_columns else {}
    for other in with_columns:
        if list((other.user_columns or {}).items()) != list((columns or {}).items()):
            raise InvalidInputError(
                f"{with_columns[0].name} and {other.name} cannot be one dataset: their own columns are {columns} in "
                f"one and {other.user_columns} in the other"
            )
    notes: list[str] = []
    sampling = _common(many, lambda each: each.sampling, Sampling(values="auto", resolution=first.sampling.resolution),
                       "what was asked for (values, top_k, top_p, min_k)", notes)  # fmt: skip
    teacher = _common_teacher(many, notes)
    source, lineage = _joined_sources(many)
    return Agreed(first, sampling, teacher, columns or {}, source, lineage, tuple(notes))


def _digest(each: Described) -> str | None:
    return None if each.tokenizer is None else each.tokenizer.digest


def _teacher_name(each: Described) -> str | None:
    return None if each.teacher is None else each.teacher.name


_ONCE: Final[tuple[tuple[str, Callable[[Described], Any], str], ...]] = (
    ("the tokenizer", _digest, "ids of one are other tokens in the other"),
    ("the logit width", lambda each: each.logit_width, "a dataset has one teacher, and that one width"),
    ("the normalisation", lambda each: each.normalised, "logprobs over a vocabulary and over candidates do not mix"),
    ("the temperature", lambda each: each.temperature, "logprobs at different temperatures do not mix"),
    (
        "the resolution",
        lambda each: each.sampling.resolution,
        "bring one to the other's with `logitstore repack --resolution`",
    ),
    ("the teacher", _teacher_name, "distributions of different teachers do not mix"),
)


def _check_kinds(many: Sequence[Described]) -> None:
    """Refuse sampled distributions beside others."""
    drawn = [each for each in many if set(each.encodings) == {_DRAWS}]
    scored = [each for each in many if each.encodings and _DRAWS not in each.encodings]
    if drawn and scored:
        raise InvalidInputError(
            f"{drawn[0].name} and {scored[0].name} cannot be one dataset: one holds draws of a sampled teacher, the "
            f"other logprobs"
        )


def _common(many: Sequence[Described], get: Callable[[Described], Any], other: Any, what: str, notes: list[str]) -> Any:
    """What all have; else something that claims nothing, and a note."""
    if all(get(each) == get(many[0]) for each in many):
        return get(many[0])
    notes.append(f"{what} differs, and the whole does not say it")
    return other


def _common_teacher(many: Sequence[Described], notes: list[str]) -> Teacher | None:
    teachers = [each.teacher for each in many]
    first = teachers[0]
    if first is None:
        return None
    fields: dict[str, Any] = {}
    for name in Teacher.__struct_fields__:
        values = {getattr(teacher, name) for teacher in teachers}
        fields[name] = values.pop() if len(values) == 1 else None
        if values:
            notes.append(f"the teacher's {name.replace('_', ' ')} differs, and the whole does not say it")
    return Teacher(**fields)


def _joined_sources(many: Sequence[Described]) -> tuple[Source | None, tuple[Source, ...]]:
    """One source with the files of all, where they are of one kind; else none, and all of them as lineage."""
    sources = _unique(each.source for each in many)
    lineage = _unique(source for each in many for source in each.lineage)
    kinds = {each.source and msgspec.structs.replace(each.source, files=()) for each in many}
    if len(kinds) > 1:  # of some it may not be known: that of the others is not that of the whole
        return None, (*sources, *(source for source in lineage if source not in sources))
    (kind,) = kinds
    files = tuple(dict.fromkeys(name for source in sources for name in source.files))
    return kind and msgspec.structs.replace(kind, files=files), lineage


def _unique(sources: Iterable[Source | None]) -> tuple[Source, ...]:
    return tuple(dict.fromkeys(source for source in sources if source is not None))


def _shown(value: Any) -> str:
    return "not known" if value is None else str(value)
