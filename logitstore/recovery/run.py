"""`recover`: look, examine, write, check, and only then put in place."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from logitstore.dataset.agree import Agreed, Described, agree
from logitstore.dataset.commit import shard_files
from logitstore.errors import CorruptDataError, InvalidInputError
from logitstore.io import regular_size
from logitstore.io.store import local_path
from logitstore.recovery.evidence import Evidence, File, TokenizerFiles, find_evidence, read_tokenizer
from logitstore.recovery.examine import Examined, Fits, examine, examine_whole, made_schema, own_schema
from logitstore.recovery.place import (
    Moves,
    before_directory,
    check_output,
    existing,
    held,
    install_inside,
    install_new,
    new_stage,
    stage_inside,
    take_up,
)
from logitstore.recovery.repeats import Repeats, find_repeats
from logitstore.recovery.result import Lost, Recovered
from logitstore.recovery.stage import (
    Progress,
    Staged,
    check_staged,
    numbered,
    stage_manifest,
    stage_shards,
)
from logitstore.schema import Manifest, Sampling, ShardHeader, Teacher
from logitstore.schema.manifest import MANIFEST_NAME

_NEW = "data/{split}/{split}-{number:05d}.arrow"
_REPAIRED = "data/{split}/{split}-recovered-{number:05d}.arrow"  # no writer of a part takes these for its own


def recover(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
    teacher: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Recovered:
    """Save what can be saved of a dataset whose writer was killed, or whose files are damaged.

    Whole shards are taken as they are, and of damaged ones the chunks that a digest vouches for, or that are valid
    where none is left. The new dataset is checked to the last row before it takes its place. What is lost is listed.

    Args:
        path: directory of the dataset.
        output: directory of the new one; `path` is left as it is.
        in_place: make the dataset in `path` whole instead. What was damaged is kept in `before-recovery/` there, and
            parts that were not finished can no longer be gone on with.
        teacher: name of the teacher, where nothing that is left says it.
        tokenizer: the teacher's tokenizer, where its files are lost.
        progress: told what is being done, and how far it is.

    Raises:
        InvalidInputError: not exactly one of `output` and `in_place`; or parts that cannot be one dataset.
        DatasetNotFoundError: nothing of a dataset is there.
        DatasetExistsError: something is at `output`, or a writer is at work.
        CorruptDataError: nothing could be saved, or what was saved is not valid.
        UnsupportedVersionError: this release cannot read it.
    """
    root = local_path(path, "pull it with `logitstore pull`, which repairs what is damaged")
    if (output is None) == (not in_place):
        raise InvalidInputError("recover either to another directory, or in place (--in-place, in_place=True)")
    told = progress or (lambda _what, _done, _total: None)
    said = _Said(teacher, None if tokenizer is None else read_tokenizer(Path(tokenizer)))
    if output is not None:
        target = local_path(output, "recover to a directory, and publish it with `logitstore push`")
        check_output(root, target)
    find_evidence(root)  # a lock makes directories, and is for a dataset
    with held(root, changing=in_place):
        if output is not None:
            return _to_new(root, target, said, told)
        finished = take_up(root)
        if finished is not None:
            note = "this recovery had been stopped after its checks; it was finished now"
            return replace(finished, notes=(*finished.notes, note))
        return _inside(root, said, told)


@dataclass(frozen=True, slots=True)
class _Said:
    """What the caller says of the dataset."""

    teacher: str | None
    tokenizer: TokenizerFiles | None


@dataclass(frozen=True, slots=True)
class _Saved:
    """What there is to be saved, and what it says of itself."""

    evidence: Evidence
    files: tuple[Examined, ...]
    repeats: Repeats
    lost: tuple[Lost, ...]
    agreed: Agreed
    tokenizer: TokenizerFiles | None
    notes: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the manifest and all that it names are undamaged."""
        manifest = self.evidence.manifest
        if manifest is None or self.lost or self.repeats.dropped or self.tokenizer_changed:
            return False
        return tuple(each.whole for each in self.files) == manifest.shards and self.agreed.teacher == manifest.teacher

    @property
    def tokenizer_changed(self) -> bool:
        """Whether the tokenizer is not that of the manifest."""
        manifest = self.evidence.manifest
        old = None if manifest is None else manifest.tokenizer
        return (None if self.tokenizer is None else self.tokenizer.info) != old or (
            self.tokenizer is not None and self.tokenizer.folder is None and bool(self.tokenizer.info.files)
        )


def _to_new(root: Path, output: Path, said: _Said, progress: Progress) -> Recovered:
    saved = _save(root, said, progress)
    with new_stage(output) as stage:
        staged, manifest = _make(root, stage, saved, progress, in_place=False)
        check_staged(stage, progress)
        install_new(stage, output)
    return _result(output, saved, staged, manifest)


def _inside(root: Path, said: _Said, progress: Progress) -> Recovered:
    saved = _save(root, said, progress)
    with stage_inside(root) as stage:
        staged, manifest = _make(root, stage, saved, progress, in_place=True)
        check_staged(stage, progress)
        if saved.is_whole and not saved.evidence.moved:
            return replace(_result(root, saved, staged, manifest), unchanged=True)
        files = manifest.tokenizer.files if manifest.tokenizer is not None else ()
        changed = [each.path for each in files if not _is_same(root / each.path, stage / each.path)]
        new = [each.path for each in manifest.shards if each.path not in staged.left]
        old = saved.evidence.manifest
        left = {each.path for each in files} | set(staged.left)
        gone = [] if old is None or old.tokenizer is None else [each.path for each in old.tokenizer.files]
        gone += [examined.file.path for examined in saved.files] + [each.path for each in saved.evidence.files]
        before = before_directory(root)
        result = replace(_result(root, saved, staged, manifest), kept=str(root / before))
        moves = Moves(
            manifest=hashlib.sha256((stage / MANIFEST_NAME).read_bytes()).hexdigest(),
            new=(*changed, *new),
            kept=existing(root, changed),
            moved=existing(root, [*(name for name in gone if name not in left), *saved.evidence.moved]),
            before=before,
            result=result,
        )
        install_inside(root, moves)
    return result


def _is_same(one: Path, two: Path) -> bool:
    return one.is_file() and one.read_bytes() == two.read_bytes()


def _make(root: Path, stage: Path, saved: _Saved, progress: Progress, *, in_place: bool) -> tuple[Staged, Manifest]:
    """Make the dataset, to be checked."""
    taken = {path.relative_to(root).as_posix() for path in shard_files(root)} if in_place else set()
    taken |= {each.path for each in saved.evidence.files} if in_place else set()
    names = numbered(_REPAIRED if in_place else _NEW, taken)
    staged = stage_shards(root, stage, saved.files, saved.repeats.dropped, names, in_place=in_place, progress=progress)
    manifest = saved.evidence.manifest
    same = manifest is not None and not staged.new and len(staged.shards) == len(manifest.shards)
    known = manifest.totals if manifest is not None and same else None
    made = stage_manifest(stage, staged, saved.agreed, saved.tokenizer, saved.evidence.splits, known)
    return staged, made


def _result(path: Path, saved: _Saved, staged: Staged, manifest: Manifest) -> Recovered:
    doubtful = [piece for each in saved.files for piece in each.pieces if not piece.vouched]
    return Recovered(
        path=str(path),
        sequences=manifest.totals.sequences,
        lost=saved.lost,
        shards_whole=len(staged.shards) - staged.new,
        shards_salvaged=staged.new,
        unverified_chunks=len(doubtful),
        unverified_sequences=sum(len(piece.hashes) for piece in doubtful),
        duplicates=saved.repeats.same,
        notes=saved.notes,
    )


def _save(root: Path, said: _Said, progress: Progress) -> _Saved:
    """Look at every file."""
    evidence = find_evidence(root)
    files, lost = _examine_all(root, evidence, progress)
    if not files and (evidence.manifest is None or evidence.manifest.shards):
        first = f": {lost[0].path}: {lost[0].reason}" if lost else ""
        raise CorruptDataError(f"no complete chunk is left to be saved, and nothing was changed{first}", path=str(root))
    kept, others = _of_one_dataset(files)
    lost += others
    repeats = find_repeats(root, kept)
    lost += repeats.lost
    notes = [*evidence.notes]
    described, more = _describe(evidence, kept, said)
    agreed = agree(described)
    notes += [*more, *agreed.notes]
    tokenizer, problem = _tokenizer(evidence, said)
    if problem is not None:
        lost.append(problem)
    if evidence.moved and evidence.manifest is None:
        notes.append(
            "what is saved here cannot be gone on with; where a writer was only stopped and nothing is damaged, "
            "resuming it (--resume) in its directory loses nothing"
        )
    return _Saved(evidence, tuple(kept), repeats, tuple(lost), agreed, tokenizer, tuple(notes))


def _examine_all(root: Path, evidence: Evidence, progress: Progress) -> tuple[list[Examined], list[Lost]]:
    fits = None if evidence.manifest is None else _fits(evidence.manifest)
    total, done = sum(_size(root / file.path) for file in evidence.files), 0
    whole: dict[File, Examined] = {}
    for file in evidence.files:
        found = examine_whole(root, file)
        if found is not None and (fits is None or fits(found.header, found.user_columns)):
            whole[file] = found
            done += _size(root / file.path)
            progress("reading", done, total)
    damaged = [file for file in evidence.files if file not in whole]
    schemas = [each.schema for each in whole.values()] + [own_schema(root, file) for file in damaged]
    schemas += [made_schema(evidence.manifest)] if evidence.manifest is not None else []
    schemas = [each for each in dict.fromkeys(schemas) if each]
    files: list[Examined] = []
    lost = list(evidence.lost)
    for file in evidence.files:
        if file in whole:
            files.append(whole[file])
            continue
        found_ = examine(root, file, schemas, fits)
        if isinstance(found_, Examined):
            lost += found_.lost
            if found_.pieces:
                files.append(found_)
        else:
            lost += found_
        done += _size(root / file.path)
        progress("reading", done, total)
    return files, lost


def _size(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return regular_size(path)
    return 0


def _fits(manifest: Manifest) -> Fits:
    def fits(header: ShardHeader, columns: tuple[tuple[str, str], ...]) -> bool:
        return manifest.header_agrees(header) and columns == tuple(manifest.user_columns.items())

    return fits


def _key(examined: Examined) -> tuple[object, ...]:
    header = examined.header
    kind = (header.logit_width, header.normalised, header.temperature, header.resolution)
    return (*kind, examined.user_columns)


def _of_one_dataset(files: Sequence[Examined]) -> tuple[list[Examined], list[Lost]]:
    """Those files that can be of one dataset, most sequences of all; the others are lost."""
    sums: dict[tuple[object, ...], int] = {}
    for each in files:
        sums[_key(each)] = sums.get(_key(each), 0) + each.sequences
    best = max(sums, key=lambda key: sums[key], default=())
    reason = "logit width, normalisation, temperature, resolution or columns are not those of the other files"
    others = [Lost(each.file.path, reason, each.sequences, row=0) for each in files if _key(each) != best]
    return [each for each in files if _key(each) == best], others


def _describe(evidence: Evidence, files: Sequence[Examined], said: _Said) -> tuple[list[Described], list[str]]:
    """What each part says of itself, with what the shards themselves say of their values."""
    notes: list[str] = []
    given = list(evidence.described)
    if not given:
        name = str(evidence.root)
        nothing = Sampling(values="auto", resolution=1.0)
        given = [Described(name, "vocabulary", 1.0, None, nothing, None, None, None, {}, None, ())]
        notes.append("nothing that is left says what was asked for (values, top_k, top_p, min_k), or the source")
    if files:
        header, columns = files[0].header, dict(files[0].user_columns)
        given = [_with_header(each, header, columns) for each in given]
    if said.teacher is not None:
        for each in given:
            if each.teacher is not None and each.teacher.name != said.teacher:
                raise InvalidInputError(
                    f"the teacher is {said.teacher!r} (--teacher), but {each.name} says {each.teacher.name!r}; leave "
                    f"it out"
                )
        given = [replace(each, teacher=each.teacher or Teacher(name=said.teacher)) for each in given]
    if any(each.teacher is None for each in given):
        notes.append("the teacher is not known; say it with --teacher (teacher=)")
    return given, notes


def _with_header(each: Described, header: ShardHeader, columns: dict[str, str]) -> Described:
    return replace(
        each,
        normalised=header.normalised,
        temperature=header.temperature,
        logit_width=header.logit_width,
        sampling=msgspec.structs.replace(each.sampling, resolution=header.resolution),
        user_columns=columns,
    )


def _tokenizer(evidence: Evidence, said: _Said) -> tuple[TokenizerFiles | None, Lost | None]:
    """The tokenizer, and what is lost of it."""
    known = evidence.tokenizers
    if said.tokenizer is not None:
        for each in known:
            if each.info.digest is not None and each.info.digest != said.tokenizer.info.digest:
                raise InvalidInputError(
                    "the tokenizer (--tokenizer) is not that of the dataset; give that one, or leave it out"
                )
        if all(each.folder is None or not each.info.files for each in known):
            return said.tokenizer, None
    if not known:
        return None, None
    whole = [each for each in known if each.folder is not None]
    if whole:
        return whole[0], None
    return known[0], Lost("tokenizer", "its files are damaged or missing; say it with --tokenizer", 0)
