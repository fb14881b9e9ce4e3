"""The dataset card, `README.md`: metadata for the Hub, and a section made from the manifest.

What people wrote into a card stays: keys of its metadata that are not ours, and every byte outside the section.
Whatever comes from the manifest is text of strangers: it is escaped, so that it can be neither Markdown nor HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, Final

import yaml  # type: ignore[import-untyped]

from logitstore.errors import InvalidInputError
from logitstore.schema.manifest import Manifest, Source, Teacher, TokenizerInfo

BEGIN: Final = "<!-- logitstore: generated, edits here are lost -->"
END: Final = "<!-- logitstore: end -->"
TAGS: Final = ("logitstore", "knowledge-distillation", "logits", "logprobs")

_REPO: Final = re.compile(r"(?=.{3,200}\Z)[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FRONT: Final = re.compile(r"[\s\ufeff]*---(?:\r\n|\r|\n)((?:[\s\S]*?(?:\r\n|\r|\n))??)---[ \t]*(?:\r\n|\r|\n|\Z)")
_SECTION: Final = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)})[\\s\\S])*?{re.escape(END)}")
_CODE: Final = re.compile(r"[^`|<>&\\$]+")  # what a span of code can hold in a cell of a table
_UNSAFE: Final = re.compile(r"[!-,./:-@\[-`{-~]")  # ASCII punctuation but the hyphen
_SIZES: Final = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
_OPTIONAL: Final = {
    "tail": "log of the probability that the candidates do not cover",
    "target_logprob": "log-probability of the token that follows",
    "target_rank": "its rank",
    "logsumexp": "of the logits",
    "entropy": "over the whole vocabulary",
    "loss_mask": "which positions are trained on",
}
_OPEN: Final = """```python
import logitstore

dataset = logitstore.open("hf://datasets/{repo}")
sequence = dataset[0]
ids, logprobs = sequence.dense(k=8)  # of each position the best 8 candidates
```"""
_PULL: Final = """```console
$ logitstore pull {repo} my-dataset
```"""
_TRAIN: Final = """```python
from logitstore.torch import HFCollator, LogitLoader, StreamingLogits, losses

stream = StreamingLogits("my-dataset", batch_size=8)
for batch in LogitLoader(stream, collate_fn=HFCollator()):
    loss = losses.distillation_loss(student(batch["input_ids"]).logits, batch{options})
```"""
_SAMPLE: Final = """```python
from datasets import load_dataset

sample = load_dataset("{repo}", "preview", split={split})
```"""
_LONGEST: Final = 200  # characters of a value from the manifest
_MOST: Final = 20  # items of a list from the manifest


def card(
    manifest: Manifest,
    repo_id: str,
    *,
    existing: str | None = None,
    previews: Iterable[str] | None = None,
    licence: str | None = None,
    language: str | Sequence[str] | None = None,
    pretty_name: str | None = None,
) -> str:
    """The card of a dataset, whole. Given its own result as `existing`, it returns it unchanged.

    What is passed as an argument wins over an existing card, and that over what would be made up here. Only facts of
    the manifest are always ours: `size_categories`, the configs `preview` and `logits`, our tags (beside others').

    The `license` is never guessed. A teacher's licence is about its weights, and only whoever publishes the dataset
    can say under which terms: without a word of theirs the key is left out, which the Hub shows as "no licence
    stated", while `other` would say that there is one. The section names the teacher's licence, and what it may mean.

    Args:
        manifest: of the dataset.
        repo_id: `namespace/name` of the dataset on the Hub.
        existing: the card that is there now.
        previews: the splits with a file `preview/<split>.arrow` of at least one row, such as the result of
            `logitstore.hub.preview.previews`; all splits that have sequences when it is None.
        licence: of the dataset, as the Hub names it (`apache-2.0`, `cc-by-4.0`, `gemma`, `other`).
        language: of its texts, as ISO codes.
        pretty_name: its title.

    Returns:
        The content of README.md. Its line ends are those of the existing card.

    Raises:
        InvalidInputError: `repo_id` is none, or the metadata of the existing card cannot be read.
    """
    if not _REPO.fullmatch(repo_id):
        raise InvalidInputError(f"{repo_id!r} is no name of a dataset on the Hub; give namespace/name")
    front, body = _split(existing or "")
    before = _load(front)
    splits = [name for name, split in manifest.splits.items() if split.sequences]
    shown = splits if previews is None else [name for name in manifest.splits if name in set(previews)]
    title = str(pretty_name or before.get("pretty_name") or re.sub(r"[-_]+", " ", repo_id.split("/")[1]).strip())
    changes: dict[str, Any] = {
        **({} if language is None else {"language": [language] if isinstance(language, str) else list(language)}),
        **({} if licence is None else {"license": licence}),
        **({"pretty_name": title} if pretty_name or "pretty_name" not in before else {}),
        **({} if "task_categories" in before else {"task_categories": ["text-generation"]}),
        "size_categories": [_size_category(manifest.totals.sequences)],
        "tags": _tags(before.get("tags")),
    }
    configs = _configs(manifest, splits, shown, before.get("configs"))
    changes |= {"configs": configs} if configs else {}
    # What named and linked another licence does not belong to the new one.
    other = licence is not None and before.get("license") not in (licence, None)
    removed = {"license_name", "license_link"} if other else set()
    removed |= {"configs"} - set(changes)
    metadata = _edited(front, before, changes, removed)
    licensed = bool(changes.get("license", before.get("license")))
    section = _section(manifest, repo_id, splits, shown, licensed=licensed)
    newline = "\r\n" if re.match(r"[^\n]*\r\n", existing or "") else "\n"
    head = f"---\n{metadata}---\n"
    if not body.strip():
        heading = " ".join(title.split()).replace("<", "&lt;")
        body += f"{newline if not body else ''}# {heading}{newline}"
    return head.replace("\n", newline) + _with_section(body, section.replace("\n", newline), newline)


def _split(text: str) -> tuple[str, str]:
    """(metadata, body) of a card; the metadata with plain line ends, empty where there is none."""
    match = _FRONT.match(text)
    if match is None:
        return "", text.removeprefix("\ufeff")
    return re.sub(r"\r\n|\r", "\n", match[1]), text[match.end() :]


def _load(front: str) -> dict[str, Any]:
    advice = "correct what stands between the lines `---` at its top, or remove it"
    try:
        root = yaml.compose(front, Loader=yaml.SafeLoader)
        metadata = yaml.safe_load(front)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 2}" if mark is not None else "its metadata"  # after the first `---`
        raise InvalidInputError(f"README.md, {line}: this is no YAML ({error.problem}); {advice}") from error
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise InvalidInputError(f"README.md: its metadata is no YAML ({error}); {advice}") from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise InvalidInputError(f"README.md: its metadata is {type(metadata).__name__}, not key: value; {advice}")
    keys = [(key.tag, key.value) for key, _ in root.value]
    twice = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
    if twice is not None:
        raise InvalidInputError(f"README.md: {twice[1]!r} stands in its metadata twice; keep one of them")
    return metadata


def _edited(front: str, before: dict[str, Any], changes: dict[str, Any], removed: set[str]) -> str:
    """The metadata as YAML with some keys changed; the text of all others, with its comments, stays as it is."""
    after = {key: value for key, value in before.items() if key not in removed} | changes
    text = _spliced(front, before, after)
    try:
        # What is not written as one `key: value` after another does not survive the splicing.
        same = text is not None and yaml.safe_load(text) == after
    except (yaml.YAMLError, ValueError, TypeError):
        same = False
    return text if text is not None and same else _dump(after)


def _spliced(front: str, before: dict[str, Any], after: dict[str, Any]) -> str | None:
    root = yaml.compose(front, Loader=yaml.SafeLoader)
    starts = [key.start_mark.index for key, _ in root.value] if root is not None and before else []
    if len(starts) != len(before):
        return None
    ends = [*starts, len(front)]
    texts = dict(zip(before, (front[start:end] for start, end in pairwise(ends)), strict=True))
    parts = [front[: ends[0]]]
    for key, value in after.items():
        parts.append(texts[key] if key in before and before[key] == value else _dump({key: value}))
    return "".join(parts)


def _dump(metadata: dict[str, Any]) -> str:
    return str(yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True))


def _tags(existing: Any) -> list[Any]:
    tags = [existing] if isinstance(existing, str) else existing if existing is not None else []
    if not isinstance(tags, list):
        raise InvalidInputError(f"README.md: `tags` in its metadata is {type(tags).__name__}; make it a list")
    return [*tags, *(tag for tag in TAGS if tag not in tags)]


def _configs(manifest: Manifest, splits: list[str], shown: list[str], existing: Any) -> list[dict[str, Any]]:
    """Ours, then the others. The viewer opens ours unless another one is the default: `datasets` allows only one."""
    given = existing if existing is not None else []
    if not isinstance(given, list) or not all(isinstance(config, dict) for config in given):
        raise InvalidInputError("README.md: `configs` in its metadata is no list of key: value; correct or remove it")
    others = [config for config in given if config.get("config_name") not in ("preview", "logits")]
    ours: list[dict[str, Any]] = []
    if shown:
        files = [{"split": name, "path": f"preview/{name}.arrow"} for name in shown]
        ours.append({"config_name": "preview", "data_files": files})
    if splits:
        shards: list[dict[str, Any]] = [{"split": name, "path": _shards(manifest, name)} for name in splits]
        ours.append({"config_name": "logits", "data_files": shards})
    if ours and not any(config.get("default") or config.get("config_name") == "default" for config in others):
        ours[0] = {"config_name": ours[0]["config_name"], "default": True, "data_files": ours[0]["data_files"]}
    return [*ours, *others]


def _shards(manifest: Manifest, split: str) -> str | list[str]:
    """Where the shards of a split are: where the format puts them, else one by one."""
    paths = [PurePosixPath(shard.path) for shard in manifest.shards if shard.split == split]
    usual = all(path.parent == PurePosixPath("data", split) and path.suffix == ".arrow" for path in paths)
    return f"data/{split}/*.arrow" if usual else [str(path) for path in paths]


def _size_category(sequences: int) -> str:
    """The Hub's bucket."""
    bounds = [10 ** (at + 3) for at in range(len(_SIZES))]
    at = sum(sequences >= bound for bound in bounds)
    if at == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if at == len(_SIZES) else f"{_SIZES[at - 1]}<n<{_SIZES[at]}"


def _with_section(body: str, section: str, newline: str) -> str:
    """The body with our section in place of the old one, or after everything when there is none.

    A section begins at the last mark before an end mark: text after a begin mark without its end may be somebody's.
    Of several sections the first one is replaced and the others go.
    """
    match = _SECTION.search(body)
    if match is None:
        gap = "" if re.search(r"\n\r?\n\Z", body) else newline if body.endswith("\n") else newline * 2
        return f"{body}{gap}{section}{newline}"
    rest, removed = body[match.end() :], 1
    while removed:
        rest, removed = _SECTION.subn("", rest)
    return body[: match.start()] + section + rest


def _section(manifest: Manifest, repo_id: str, splits: list[str], shown: list[str], *, licensed: bool) -> str:
    parts = [
        BEGIN,
        _about(manifest),
        _table(("property", "value"), _facts(manifest)),
        *_splits(manifest),
        *_origin(manifest),
        *_usage(manifest, repo_id, splits, shown),
        _integrity(manifest),
        _terms(manifest.teacher, licensed=licensed),
        END,
    ]
    return "\n\n".join(parts)


def _about(manifest: Manifest) -> str:
    teacher = "a language model that was not recorded" if manifest.teacher is None else _model(manifest.teacher.name)
    over = (
        "normalised over the teacher's whole vocabulary"
        if manifest.normalised == "vocabulary"
        else "normalised over the stored candidates only: their ratios are known, the probability of all others is not"
    )
    sampled = (
        " Under the encoding `draws`, a candidate's probability is its share of the tokens drawn from the teacher."
        if "draws" in manifest.totals.encodings
        else ""
    )
    return (
        "## Teacher distributions\n\n"
        f"This dataset holds what {teacher} (the *teacher*) expects after each token of some texts: candidates for the "
        "next token with their log-probabilities. Smaller models (*students*) are trained on them without running "
        "the teacher again, which is called knowledge distillation.\n\n"
        f"Row t of a sequence predicts token t + 1. Log-probabilities are natural logarithms, {over}, at temperature "
        f"{manifest.temperature:g}.{sampled} The files are in the format of "
        f"`logitstore`, version {_value(manifest.version)}."
    )


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    totals, teacher = manifest.totals, manifest.teacher
    facts = [("teacher", "not recorded" if teacher is None else _model(teacher.name))]
    if teacher is not None:
        facts += [
            (label, _value(value))
            for label, value in (
                ("its revision", teacher.revision),
                ("quantisation", teacher.quantisation),
                ("dtype", teacher.dtype),
                ("engine", " ".join(filter(None, (teacher.engine, teacher.engine_version)))),
                ("kind of log-probabilities", teacher.logprobs_mode),
            )
            if value
        ]
    facts += _tokenizer(manifest.tokenizer)
    facts += [
        ("width of its logits", "not recorded" if manifest.logit_width is None else f"{manifest.logit_width:,}"),
        ("kept of each distribution", _kept(manifest)),
        ("stored as", _encodings(manifest)),
        ("sequences", f"{totals.sequences:,}"),
        ("positions", f"{totals.positions:,}"),
        ("candidates", f"{totals.candidates:,}{_per(totals.candidates, totals.positions, '')}"),
        ("size", f"{_size(totals.bytes)}{_per(totals.bytes, totals.positions, 'bytes ')}"),
    ]
    optional = [
        f"{_value(name)}{f' ({_OPTIONAL[name]})' if name in _OPTIONAL else ''}"
        for name, count in totals.columns.items()
        if count
    ]
    own = [f"{_value(name)} ({_value(kind)})" for name, kind in manifest.user_columns.items()]
    facts += [("also at each position", _listed(optional))] if optional else []
    facts += [("further columns", _listed(own))] if own else []
    return facts


def _tokenizer(tokenizer: TokenizerInfo | None) -> list[tuple[str, str]]:
    if tokenizer is None:
        return [("tokenizer", "not recorded: the data does not say which token an id stands for")]
    where = ", files in `tokenizer/`" if tokenizer.files else ", without its files"
    if tokenizer.digest is None:
        return [("tokenizer", f"some tokens of the vocabulary, no identity{where}")]
    size = "" if tokenizer.vocabulary_size is None else f"{tokenizer.vocabulary_size:,} tokens"
    return [("tokenizer", f"{size}{where}"), ("its digest", _value(tokenizer.digest))]


def _kept(manifest: Manifest) -> str:
    sampling = manifest.sampling
    best = "all candidates that were given" if sampling.top_k is None else f"the best {sampling.top_k:,} candidates"
    if sampling.top_p is None:
        return best
    least = f", but at least {sampling.min_k:,}" if sampling.min_k > 1 else ""
    most = "" if sampling.top_k is None else f", at most {sampling.top_k:,}"
    return f"the best candidates until they cover a probability of {sampling.top_p:g}{most}{least}"


def _encodings(manifest: Manifest) -> str:
    step = manifest.sampling.resolution
    known = {
        "grid": f"log-probabilities in steps of {_fraction(step)}, off by at most {_fraction(step / 2)}",
        "bfloat16": "the teacher's bfloat16 logits, exact",
        "float16": "log-probabilities in float16",
        "float32": "log-probabilities in float32",
        "draws": "how often each candidate was drawn, exact",
    }
    names = manifest.totals.encodings
    many = len(names) > 1
    listed = [
        f"{_value(name)}{f' ({known[name]})' if name in known else ''}{f': {count:,} sequences' if many else ''}"
        for name, count in names.items()
    ]
    return _listed(listed) or "nothing yet"


def _splits(manifest: Manifest) -> list[str]:
    if not manifest.splits:
        return ["The dataset is empty."]
    rows = [
        (_value(name), f"{split.sequences:,}", f"{split.positions:,}", f"{split.candidates:,}", _size(split.bytes))
        for name, split in manifest.splits.items()
    ]
    return [_table(("split", "sequences", "positions", "candidates", "size"), rows)]


def _origin(manifest: Manifest) -> list[str]:
    sources = [*([manifest.source] if manifest.source is not None else []), *manifest.lineage]
    lines = [line for source in sources if (line := _source(source))]
    if not lines:
        return []
    more = [f"- and {len(lines) - _MOST:,} more"] if len(lines) > _MOST else []
    return ["### Where it comes from\n\nThe latest step first.\n\n" + "\n".join([*lines[:_MOST], *more])]


def _source(source: Source) -> str:
    parts = [
        _value(source.name) if source.name else "",
        f"revision {_value(source.revision)}" if source.revision else "",
        f"format {_value(source.format)}" if source.format else "",
        f"from {_listed([_value(name) for name in source.files], 5)}" if source.files else "",
    ]
    listed = ", ".join(filter(None, parts))
    return f"- {listed}" if listed else ""


def _usage(manifest: Manifest, repo_id: str, splits: list[str], shown: list[str]) -> list[str]:
    if not splits:
        return []
    known = manifest.normalised == "vocabulary"
    parts = [
        "### How to use it",
        "With the Python package `logitstore`, from the Hub; only what is asked for is fetched:",
        _OPEN.format(repo=repo_id),
        "To train on it, fetch it once; every chunk is verified when it is read:",
        _PULL.format(repo=repo_id),
        _TRAIN.format(options="" if known else ', tail="renormalise"'),
    ]
    if shown:
        last = "probabilities, and that of all the `rest`:" if known else "shares of the probability that is stored:"
        about = (
            "With `datasets`, a readable sample, the one that the viewer shows: the first positions of the first "
            "sequences. Each row is a position: the text so far, the token that really follows, the best candidates "
            f"with their {last}"
        )
        parts += [about, _SAMPLE.format(repo=repo_id, split=json.dumps(shown[0]))]
    columns = ", the further columns" if manifest.user_columns else ""
    raw = (
        f'The config `"logits"` gives `datasets` the files as they are: ids, lengths{columns} and compressed binary '
        "cells. Tokens, candidates and log-probabilities are in these cells, and only `logitstore` decodes them."
    )
    return [*parts, raw]


def _integrity(manifest: Manifest) -> str:
    return (
        "### Integrity\n\n"
        "Every byte has a digest that is checked when it is read. `logitstore validate my-dataset --deep` checks all "
        f"of them, and every row. The digest of this dataset is {_value(manifest.dataset_digest)}."
    )


def _terms(teacher: Teacher | None, *, licensed: bool) -> str:
    name = None if teacher is None else teacher.licence
    own = "" if licensed else " No licence is stated for the dataset itself: ask whoever publishes it."
    return (
        "### Terms\n\n"
        f"The teacher's licence: {_value(name) if name else 'not recorded'}. A model's licence may restrict what its "
        "outputs are used for, such as training other models, and may ask something of the models trained on them. "
        "Whoever uses this data must follow it, and the terms of the texts." + own
    )


def _model(name: str) -> str:
    """The name of a model, linked where it looks like one of the Hub."""
    return f"[`{name}`](https://huggingface.co/{name})" if _REPO.fullmatch(name) else _value(name)


def _value(text: str) -> str:
    """A value from the manifest: as code where that is safe, else with all that Markdown could read into it escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: _LONGEST + 1])
    if len(shown) > _LONGEST:
        shown = shown[: _LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
    shown = shown.strip() or "(blank)"
    return f"`{shown}`" if _CODE.fullmatch(shown) else _escaped(shown)


def _escaped(text: str) -> str:
    return _UNSAFE.sub(lambda match: f"&#{ord(match[0])};", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(items: Sequence[str], most: int = _MOST) -> str:
    more = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return ", ".join([*items[:most], *more])


def _fraction(step: float) -> str:
    return "1" if step == 1 else f"1/{round(1 / step)}"


def _per(amount: int, positions: int, unit: str) -> str:
    return f", {amount / positions:.1f} {unit}a position" if positions else ""


def _size(amount: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:,.0f} {unit}" if unit == "B" else f"{amount:,.1f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} TiB"
