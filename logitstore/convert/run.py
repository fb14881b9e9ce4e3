"""`convert`: find the importer, and let what it reads flow into a writer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Literal

import xxhash

from logitstore.convert.base import FORMAT_OPTIONS, Alignment, Import, Importer, Options, Tally, ValueKind
from logitstore.convert.lines import first_line
from logitstore.convert.pool import Outcome, parsed
from logitstore.convert.source import Input, expand
from logitstore.dataset.origin import Sink
from logitstore.dataset.summary import Summary
from logitstore.dataset.writer import Writer
from logitstore.errors import InvalidInputError, LogitStoreError, LogitStoreWarning, SourceError
from logitstore.schema import Source
from logitstore.tokenizer import Tokenizer

GROUP: Final = "logitstore.importers"
"""Entry-point group of importers."""

SHOWN_FAILURES: Final = 10
"""How many records that were skipped are listed."""

_BEGINNING: Final = 2**16

_CHECK_EVERY: Final = 4096  # records between two looks at whether the whole can be right


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did.

    Attributes:
        importer: name of the format.
        summary: what was written.
        notes: what was assumed, and what was left out.
        skipped: records that were left out, since they cannot be read.
        failures: the errors of the first ten of them.
    """

    importer: str
    summary: Summary
    notes: tuple[str, ...]
    skipped: int = 0
    failures: tuple[str, ...] = ()


_loaded: dict[str, dict[str, Any]] = {}


def importers() -> dict[str, Importer]:
    """All importers by name, this package's and plugins'; one that cannot be loaded is left out with a warning."""
    return load_plugins(GROUP)


def load_plugins(group: str) -> dict[str, Any]:
    """All objects of an entry-point group by their `name`; one that cannot be loaded is left out with a warning."""
    if group not in _loaded:
        found: dict[str, Any] = {}
        for point in sorted(entry_points(group=group), key=lambda point: point.name):
            try:
                plugin = point.load()
            except (ImportError, AttributeError) as error:
                warnings.warn(
                    f"{group}: {point.name!r} ({point.value}) cannot be loaded: {error}", LogitStoreWarning, 2
                )
                continue
            found[plugin.name] = plugin
        _loaded[group] = found
    return _loaded[group]


def open_inputs(paths: Sequence[Path], name: str | None) -> tuple[Importer, list[Input]]:
    """The importer of this name, or the one that recognises the first input; and the inputs.

    Raises:
        InvalidInputError: there is no such importer, or more than one.
        SourceNotFoundError: an input is not there.
    """
    known = importers()
    if name is not None:
        if name not in known:
            raise InvalidInputError(f"no importer is called {name!r}; there are: {', '.join(known)}")
        return known[name], [Input(path) for path in expand(paths, known[name].patterns)]
    return _recognised(paths, known)


def _recognised(paths: Sequence[Path], known: Mapping[str, Importer]) -> tuple[Importer, list[Input]]:
    fitting = []
    problem: LogitStoreError | None = None
    opened: dict[tuple[Path, ...], list[Input]] = {}  # standard input is opened once: what was peeked at stays there
    for importer in known.values():
        try:
            files = tuple(expand(paths, importer.patterns))
            if files not in opened:
                opened[files] = [Input(path) for path in files]
        except LogitStoreError as error:
            problem = error
            continue
        if importer.recognises(opened[files][0]):
            fitting.append((importer, opened[files]))
    if len(fitting) == 1:
        return fitting[0]
    which = ", ".join(map(str, paths))
    if fitting:
        could = " or ".join(importer.name for importer, _ in fitting)
        raise InvalidInputError(f"{which}: this could be {could}; say which with --from")
    if problem is not None and not opened:
        raise problem
    says = f"{which}: no importer recognises this input; name its format with --from ({', '.join(known)})"
    if any(first_line(files[0]).startswith(b"[") for files in opened.values() if files):
        says += ". A JSON array of records must become one record a line: jq -c '.[]'"
    raise InvalidInputError(says)


def convert(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    importer: str | None = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    prompts: str | os.PathLike[str] | None = None,
    tokens: str | os.PathLike[str] | None = None,
    codec_config: str | os.PathLike[str] | None = None,
    map: Mapping[str, str] | None = None,  # noqa: A002 - the option's name
    value_kind: ValueKind | None = None,
    alignment: Alignment | None = None,
    limit: int | None = None,
    workers: int = 0,
    on_error: Literal["stop", "skip"] = "stop",
    progress: Callable[[Import, Summary], None] | None = None,
    sink: Callable[[], Sink | None] | None = None,
    **settings: Any,
) -> Converted:
    """Convert captures into a dataset.

    Args:
        paths: files of one format, directories or globs of them, `-` for standard input; several become one dataset,
            in this order.
        output: directory of the dataset.
        importer: name of the format; None recognises it.
        tokenizer: the teacher's, or a path to it.
        prompts: JSON lines with the requests that the replies answer, in order or by `id`.
        tokens: file with the input tokens, for formats that do not hold them.
        codec_config: settings of the codec, where the files do not lie beside them.
        map: our name of a column to the input's.
        value_kind: what the values are: `logprob`, `logit`, `probability` or `draws`.
        alignment: `next` where row t predicts the token at t + 1, `same` where it is about the token at t.
        limit: most sequences that are taken.
        workers: processes that parse; the dataset is the same whatever their number. 0 parses in this one.
        on_error: what a record does that cannot be read: `stop`, or `skip` it.
        progress: called after each sequence.
        sink: makes what takes complete shards away (`lambda: HubSink("ns/name")`), when the input is known to be one
            that can be converted; None leaves them here.
        **settings: arguments of `Writer`, `resume` and `part` among them; those that are None are left to the importer
            and to `Writer`.

    Returns:
        What was written, and what was assumed.

    Raises:
        InvalidInputError: no importer fits, an option does not apply, or a value cannot be stored.
        SourceError: an input is damaged, or its rows are not where they should be.
        SourceNotFoundError: an input is not there.
        DatasetExistsError: something is at `output` already.
    """
    if not paths:
        raise InvalidInputError("no input; name at least one file")
    if on_error not in ("stop", "skip"):
        raise InvalidInputError(f"on_error is {on_error!r}; it is 'stop' or 'skip'")
    given = {name: value for name, value in settings.items() if value is not None}
    chosen, inputs = open_inputs([Path(path) for path in paths], importer)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_path(Path(tokenizer))
    options = Options(
        tokenizer=tokenizer,
        top_k=given.get("top_k"),
        normalised=given.get("normalised"),
        prompts=None if prompts is None else Path(prompts),
        tokens=None if tokens is None else Path(tokens),
        codec_config=None if codec_config is None else Path(codec_config),
        map=dict(map or {}),
        value_kind=value_kind,
        alignment=alignment,
    )
    _check_options(chosen, options)
    try:
        opened = chosen.read(inputs, options)
        names = tuple(_readable(each.path.name) for each in inputs if each.size is not None)
        arguments = {
            "source": Source(format=chosen.name, files=names),
            "fingerprint": _fingerprint(options, inputs),
            **opened.settings,
            **given,
        }
        if sink is not None:
            arguments["sink"] = sink()
        with Writer(output, tokenizer=tokenizer, **arguments) as writer:
            if writer.finished:
                return Converted(chosen.name, writer.summary, ("it was finished before: nothing is left to do",))
            return _Run(chosen.name, inputs[0].name, opened, writer, limit, on_error == "skip", progress).run(workers)
    finally:
        for each in inputs:
            each.close()


def _fingerprint(options: Options, inputs: Sequence[Input]) -> dict[str, str]:
    """What decides over the rows besides the writer's settings: options of the format, and how files begin."""
    found = {name: str(value) for name in FORMAT_OPTIONS if (value := getattr(options, name))}
    named = {f"input {number}": each.path for number, each in enumerate(inputs) if each.size is not None}
    named |= {name: path for name in ("prompts", "tokens", "codec_config") if (path := getattr(options, name))}
    return found | {name: f"{path.name}, {_beginning(path)}" for name, path in named.items() if path.is_file()}


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return xxhash.xxh3_64_hexdigest(file.read(_BEGINNING))


def _readable(name: str) -> str:
    """The name of a file as text, also where the system has bytes that are none."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _check_options(chosen: Importer, options: Options) -> None:
    for name in FORMAT_OPTIONS:
        if getattr(options, name) and name not in chosen.options:
            takes = ", ".join(f"--{each.replace('_', '-')}" for each in chosen.options) or "none of its kind"
            option = f"--{name.replace('_', '-')}"
            raise InvalidInputError(f"{option} says nothing to the importer {chosen.name}; it takes {takes}")


@dataclass(slots=True)
class _Run:
    """One conversion on its way."""

    name: str
    source: str
    opened: Import
    writer: Writer
    limit: int | None
    skip: bool
    progress: Callable[[Import, Summary], None] | None
    tally: Tally = field(default_factory=Tally)
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    def run(self, workers: int) -> Converted:
        outcomes = parsed(self.opened, workers)
        try:
            for number, outcome in enumerate(outcomes, 1):
                if not self._wants_more():
                    break
                self._take(outcome)
                if number % _CHECK_EVERY == 0:
                    self._check(final=False)
        finally:
            outcomes.close()  # its workers end now and not some time
        if self.writer.given == 0 and self._wants_more():
            skipped = (
                f": all {self.skipped} records were skipped, the first for {self.failures[0]}" if self.failures else ""
            )
            raise SourceError(f"{self.source}: there are no sequences in this input{skipped}")
        closing = self._check(final=True)
        if vocabulary := self.tally.vocabulary():
            self.writer.use_partial_vocabulary(vocabulary)
        counted = [text.replace("{n}", f"{n:,}") for text, n in self.tally.notes.items()]
        notes = (*self.opened.notes, *counted, *closing)
        return Converted(self.name, self.writer.summary, notes, self.skipped, tuple(self.failures))

    def _wants_more(self) -> bool:
        return self.limit is None or self.writer.given < self.limit

    def _take(self, outcome: Outcome) -> None:
        """Write the sequences of one record; or count it as one that cannot be read, where these are skipped.

        A sequence that the writer refuses leaves those before it in the dataset.
        """
        before = self.writer.given
        try:
            if outcome.error is not None:
                raise outcome.error
            for choice, item in enumerate(outcome.items):
                if self._wants_more():
                    number = self.writer.numbered(outcome.number)
                    name = number if choice == 0 else f"{number}#{choice}"
                    getattr(self.writer, item.method)(**{"id": name, **item.arguments})
                    if self.progress is not None:
                        self.progress(self.opened, self.writer.summary)
            self.tally.add(outcome.tally)
        except (SourceError, InvalidInputError) as error:
            failure = f"{outcome.place}: {error}"
            if self.writer.closed or not self.skip:
                raise type(error)(failure) from error
            if kept := self.writer.given - before:
                failure += f" (of this record, the {kept} sequence{'s' * (kept > 1)} before this one are kept)"
                self.tally.add(outcome.tally)
            self.skipped += 1
            if len(self.failures) < SHOWN_FAILURES:
                self.failures.append(failure)

    def _check(self, *, final: bool) -> list[str]:
        problem = self.writer.summary.alignment.problem()
        if problem is not None:
            raise SourceError(f"{self.source}: {problem}. Check the capture, and --alignment where the format takes it")
        return self.opened.check(self.tally, final)
