"""`convert`: find the importer, and let what it reads flow into a writer."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from logitstore.convert.base import Import, Importer, Input, Options
from logitstore.dataset.summary import Summary
from logitstore.dataset.writer import Writer
from logitstore.errors import InvalidInputError, LogitStoreWarning, SourceError
from logitstore.schema import Source
from logitstore.tokenizer import Tokenizer

GROUP: Final = "logitstore.importers"
"""Entry-point group of importers."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did: the importer's name, what was written, and what was assumed."""

    importer: str
    summary: Summary
    notes: tuple[str, ...]


@cache
def importers() -> dict[str, Importer]:
    """All importers by name, this package's and plugins'; one that cannot be loaded is left out with a warning."""
    found: dict[str, Importer] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            importer = point.load()
        except (ImportError, AttributeError) as error:
            warnings.warn(
                f"the importer {point.name!r} ({point.value}) cannot be loaded: {error}", LogitStoreWarning, 2
            )
            continue
        found[importer.name] = importer
    return found


def find_importer(inputs: Sequence[Input], name: str | None) -> Importer:
    """The importer of this name, or the one that recognises every input.

    Raises:
        InvalidInputError: there is none, or more than one.
    """
    known = importers()
    names = ", ".join(known)
    if name is not None:
        if name not in known:
            raise InvalidInputError(f"no importer is called {name!r}; there are: {names}")
        return known[name]
    fitting = [importer for importer in known.values() if all(importer.recognises(source) for source in inputs)]
    if len(fitting) == 1:
        return fitting[0]
    which = ", ".join(source.name for source in inputs)
    if not fitting:
        raise InvalidInputError(f"{which}: no importer recognises this input; name its format with --from ({names})")
    raise InvalidInputError(
        f"{which}: this could be {' or '.join(importer.name for importer in fitting)}; say which with --from"
    )


def convert(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    importer: str | None = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    limit: int | None = None,
    progress: Callable[[Import, Summary], None] | None = None,
    **settings: Any,
) -> Converted:
    """Convert captures into a dataset.

    Args:
        paths: files of one format, `-` for standard input; several become one dataset, in this order.
        output: directory of the dataset.
        importer: name of the format; None recognises it.
        tokenizer: the teacher's, or a path to it.
        limit: most sequences that are taken.
        progress: called after each sequence.
        **settings: arguments of `Writer`; those that are None are left to the importer and to `Writer`.

    Returns:
        What was written, and what was assumed.

    Raises:
        InvalidInputError: no importer fits, or a value cannot be stored.
        SourceError: an input is damaged.
        SourceNotFoundError: an input is not there.
        DatasetExistsError: something is at `output` already.
    """
    if not paths:
        raise InvalidInputError("no input; name at least one file")
    inputs = [Input(Path(path)) for path in paths]
    chosen = find_importer(inputs, importer)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_path(Path(tokenizer))
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        return _convert(
            chosen, inputs, output, Options(tokenizer=tokenizer, top_k=given.get("top_k")), given, limit, progress
        )
    finally:
        for each in inputs:
            each.close()


def _convert(
    chosen: Importer,
    inputs: list[Input],
    output: str | os.PathLike[str],
    options: Options,
    given: dict[str, Any],
    limit: int | None,
    progress: Callable[[Import, Summary], None] | None,
) -> Converted:
    opened = chosen.read(inputs, options)
    source = Source(format=chosen.name, files=tuple(Path(each.name).name for each in inputs))
    arguments = {"source": source, **opened.settings, **given}
    with Writer(output, tokenizer=options.tokenizer, **arguments) as writer:
        for item in itertools.islice(opened.items, limit):
            try:
                getattr(writer, item.method)(**item.arguments)
            except InvalidInputError as error:
                raise type(error)(f"{', '.join(each.name for each in inputs)}: {error}") from error
            if progress is not None:
                progress(opened, writer.summary)
        if writer.summary.sequences == 0 and limit != 0:
            raise SourceError(f"{inputs[0].name}: there are no sequences in this input")
        if opened.pieces:
            writer.use_partial_vocabulary(opened.pieces)
    return Converted(chosen.name, writer.summary, tuple(opened.notes))
