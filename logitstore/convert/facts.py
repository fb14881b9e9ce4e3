"""What exported tables say of themselves in their metadata, so that nobody has to when they are read again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec
import pyarrow as pa

from logitstore._version import __version__
from logitstore.convert.source import Input
from logitstore.convert.tables import schema_of, table_kind
from logitstore.dataset.reader import Dataset
from logitstore.errors import SourceError

FACTS_KEY: Final = b"logitstore"
"""Key of the metadata of a `parquet` export: all that concerns the dataset as a whole, as JSON."""

NORMALISED_KEY: Final = b"logitstore.normalised"
TEMPERATURE_KEY: Final = b"logitstore.temperature"
"""Keys of the metadata of tables in trainers' formats, which have no place for these."""


def described(dataset: Dataset, k: int | None) -> dict[str, Any]:
    """What concerns a dataset as a whole, for formats that have a place for it."""
    info = dataset.info
    tokenizer = info.tokenizer
    return {
        "alignment": "next",
        "value_kind": "logprob",
        "normalised": info.normalised,
        "temperature": info.temperature,
        "logit_width": info.logit_width,
        "top_k": k if k is not None else info.sampling.top_k,
        "teacher": info.teacher,
        "tokenizer": tokenizer and {"digest": tokenizer.digest, "vocabulary_size": tokenizer.vocabulary_size},
        "source": info.source,
        "dataset_digest": info.dataset_digest,
        "written_by": f"logitstore {__version__}",
    }


def metadata(dataset: Dataset) -> dict[bytes, bytes]:
    """Metadata for a table in a trainer's format."""
    info = dataset.info
    return {NORMALISED_KEY: info.normalised.encode(), TEMPERATURE_KEY: repr(float(info.temperature)).encode()}


class _Facts(msgspec.Struct, gc=False, omit_defaults=True):
    alignment: Literal["next", "same"] | None = None
    value_kind: Literal["logprob"] | None = None
    normalised: Literal["vocabulary", "candidates"] | None = None
    temperature: float | None = None


_FACTS: Final = msgspec.json.Decoder(_Facts)


def settings_of(inputs: Iterable[Input]) -> dict[str, Any]:
    """The settings `normalised` and `temperature` that exports in trainers' formats say; none of other tables.

    Raises:
        SourceError: they contradict each other, or a table cannot be read.
    """
    return _agreed([(each, _settings(_metadata(each))) for each in inputs], ("normalised", "temperature"))


def facts_of(inputs: Iterable[Input], names: Iterable[str]) -> dict[str, Any]:
    """Those of alignment, value_kind, normalised and temperature that `parquet` exports say; none of other tables.

    Args:
        inputs: the tables.
        names: of the facts that are wanted.

    Raises:
        SourceError: they contradict each other, or a table cannot be read.
    """
    return _agreed([(each, _facts(_metadata(each))) for each in inputs], names)


def _metadata(source: Input) -> Mapping[bytes, bytes]:
    schema: pa.Schema | None = None if table_kind(source) == "json" else schema_of(source)
    return (schema.metadata if schema is not None else None) or {}


def _settings(said: Mapping[bytes, bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    normalised = said.get(NORMALISED_KEY, b"").decode("ascii", "replace")
    if normalised in ("vocabulary", "candidates"):
        found["normalised"] = normalised
    try:
        temperature = float(said.get(TEMPERATURE_KEY, b"nan"))
    except ValueError:
        return found
    return found | ({"temperature": temperature} if _is_one(temperature) else {})


def _facts(said: Mapping[bytes, bytes]) -> dict[str, Any]:
    try:
        facts = _FACTS.decode(said.get(FACTS_KEY, b"{}"))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {}  # not ours
    found = {name: getattr(facts, name) for name in _Facts.__struct_fields__}
    if found["temperature"] is not None and not _is_one(found["temperature"]):
        found["temperature"] = None
    return {name: value for name, value in found.items() if value is not None}


def _is_one(temperature: float) -> bool:
    return 0 < temperature <= 1e6


def _agreed(said: list[tuple[Input, dict[str, Any]]], names: Iterable[str]) -> dict[str, Any]:
    """What all inputs say; what some of them do not say is not known."""
    found: dict[str, Any] = {}
    for name in names:
        values = {facts.get(name): source.name for source, facts in reversed(said)}
        told = [value for value in values if value is not None]
        if len(told) > 1:
            one, other = told[-1], told[0]
            raise SourceError(
                f"{values[one]} says that {name} is {one}, {values[other]} that it is {other}; convert them one after "
                f"another"
            )
        if told and None not in values:
            found[name] = told[0]
    return found
