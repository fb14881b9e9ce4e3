"""What is fuzzed: each target has seeds, a mutator, and a run that may end in nothing but our errors."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import forge
import msgspec
import numpy as np
import pyarrow as pa

import logitstore
from logitstore.convert import convert, importers
from logitstore.dataset.reader import Dataset
from logitstore.dataset.shards import read_manifest
from logitstore.schema.manifest import dataset_digest, parse_manifest, serialise_manifest, sum_splits
from logitstore.shard.reader import Shard
from logitstore.shard.sequence import SEQUENCE_COLUMNS

HERE = Path(__file__).parent
SPEC = HERE.parent.parent / "spec"
SHARD = "data/train/train-00000.arrow"
COLUMNS = frozenset(SEQUENCE_COLUMNS)


@dataclass(frozen=True)
class Target:
    """seeds: names and bytes; mutate: other bytes of some; run: reads them, with a directory for files."""

    seeds: Callable[[], dict[str, bytes]]
    mutate: Callable[[Any, bytes], bytes]
    run: Callable[[bytes, Path], None]


class Bytes:
    """A file in memory."""

    mapped = True

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.size, self.opening = path, len(data), min(len(data), 2**16)
        self._buffer = pa.py_buffer(data)

    def read(self, offset, length, _accept=None):
        assert 0 <= offset <= offset + length <= self.size
        return self._buffer.slice(offset, length)

    def read_together(self, parts):
        return [self.read(*part) for part in parts]


@dataclass
class Files:
    """A dataset in memory."""

    files: dict[str, bytes]
    tokenizer: Path | None = None
    name = "fuzzed"
    remote = False

    def where(self, path):
        return path

    def small(self, path, limit):
        assert len(self.files[path]) <= limit
        return self.files[path]

    def shard(self, info):
        if info.path not in self.files:
            raise logitstore.SourceNotFoundError(info.path)
        return Bytes(info.path, self.files[info.path])

    def folder(self, _name, _files):
        return self.tokenizer or Path("/nonexistent")

    def has_shards(self):
        return True


def quietly(run: Callable[[], Any]) -> Any:
    """What it gives, or our error; any other goes on."""
    try:
        return run()
    except logitstore.LogitStoreError as error:
        assert str(error)
        return error


def promised(sequence: Any, width: int | None) -> None:
    """What a reader promises of a sequence, whatever the bytes were."""
    t, n = len(sequence.tokens), len(sequence.ids)
    assert (len(sequence.count), len(sequence.offsets)) == (t, t + 1), "shapes"
    assert int(sequence.offsets[-1]) == n == len(sequence.logprobs) == int(sequence.count.sum(dtype=np.int64)), "shapes"
    assert n == 0 or (int(sequence.ids.min()) >= 0 and int(sequence.ids.max()) < (width or 2**31)), "ids"
    assert t == 0 or int(sequence.tokens.max()) < 2**31, "tokens"
    for name in ("tail", "target_logprob", "target_rank", "logsumexp", "entropy", "loss_mask"):
        values = getattr(sequence, name)
        assert values is None or len(values) == t, name
    assert sequence.draws is None or (len(sequence.draws) == n and (n == 0 or int(sequence.draws.min()) > 0)), "draws"
    assert sequence.logits is None or len(sequence.logits) == n, "logits"


def promised_encoded(sequence: Any, width: int | None) -> None:
    """The same of one that a device is to decode."""
    n, present = int(sequence.offsets[-1]), int(np.count_nonzero(sequence.count))
    assert (len(sequence.codes), len(sequence.top), len(sequence.gaps)) == (n, present, n - present), "shapes"
    if n:
        assert -len(sequence.order) <= int(sequence.codes.min()), "codes"
        assert int(sequence.codes.max()) < (width or 2**31), "codes"


def read_shard(data: bytes) -> Shard | None:
    """Everything that can be asked of a shard by itself."""
    shard = quietly(lambda: Shard(Bytes("shard", data)))
    if not isinstance(shard, Shard):
        return None
    width = shard.header.logit_width
    columns = COLUMNS | {field.name for field in shard.user_fields}
    quietly(shard.check_end_mark)
    quietly(lambda: len(shard.hashes))
    quietly(lambda: shard.find("0"))
    for number in range(min(len(shard.index), 64)):
        chunk = quietly(lambda: shard.chunk(number))  # noqa: B023
        if isinstance(chunk, Exception):
            continue
        chunk.ids(), chunk.bytes_by_column()
        for row in range(min(len(chunk), 64)):
            found = quietly(lambda: chunk.sequence(row, columns))  # noqa: B023
            if not isinstance(found, Exception):
                promised(found, width)
                assert len(found.tokens) == int(chunk.lengths[row])
                repr(found)
            found = quietly(lambda: chunk.sequence(row, columns, encoded=True))  # noqa: B023
            if not isinstance(found, Exception):
                promised_encoded(found, width)
    return shard


def read_dataset(store: Any) -> None:
    """Everything that can be asked of a dataset."""
    manifest = quietly(lambda: read_manifest(store))
    if isinstance(manifest, Exception):
        return
    dataset = Dataset(store, manifest)
    repr(dataset), len(dataset), dataset.splits, dataset.columns
    every = dataset.select([*SEQUENCE_COLUMNS, *manifest.user_columns])
    for run in (
        lambda: [promised(s, manifest.logit_width) for s in every],
        lambda: list(dataset),
        lambda: list(dataset[::-1]),
        lambda: list(dataset.with_decoding("device")),
        lambda: list(every.chunks()),
        lambda: [dataset[part] for part in dataset.parts()],
        dataset.stored,
        dataset.lengths,
        dataset[1::3].lengths,
        lambda: dataset[-1],
        lambda: dataset[len(dataset) // 2],
        lambda: dataset.by_id("0"),
        dataset.tokenizer,
        *(lambda name=name: list(dataset.split(name)[:3]) for name in list(dataset.splits)[:4]),
    ):
        quietly(run)


# A shard.


@cache
def shard_seeds() -> dict[str, bytes]:
    found = {}
    for root in sorted([*(SPEC / "vectors/v1").iterdir(), *(SPEC / "bad").iterdir()]):
        path = root / SHARD
        if path.is_file() and path.stat().st_size < 9000:
            try:
                Shard(Bytes("seed", path.read_bytes()))
            except logitstore.LogitStoreError:
                continue
            found[root.name] = path.read_bytes()
    return found


@cache
def any_manifest() -> Any:
    return parse_manifest((SPEC / "vectors/v1/coarse-grid/logitstore.json").read_bytes())


def manifest_of(data: bytes, shard: Shard) -> bytes:
    """A manifest that fits a shard."""
    tail, header = shard.tail, shard.header
    info = replace_struct(
        any_manifest().shards[0],
        path=SHARD, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), tail_digest=shard.tail_digest,
        sequences=tail.sequences, positions=tail.positions, candidates=tail.candidates,
    )  # fmt: skip
    totals = replace_struct(
        any_manifest().totals,
        shards=1, sequences=tail.sequences, positions=tail.positions, candidates=tail.candidates, bytes=len(data),
    )  # fmt: skip
    return serialise_manifest(
        replace_struct(
            any_manifest(),
            shards=(info,), splits=sum_splits((info,)), totals=totals, dataset_digest=dataset_digest((info,), None),
            tokenizer=None, logit_width=header.logit_width, normalised=header.normalised, temperature=header.temperature,
            sampling=replace_struct(any_manifest().sampling, resolution=header.resolution),
            user_columns={field.name: str(field.type) for field in shard.user_fields},
        )
    )  # fmt: skip


replace_struct = msgspec.structs.replace


def run_shard(data: bytes, scratch: Path) -> None:
    shard = read_shard(data)
    chance = zlib.crc32(data) % 16
    if shard is None or chance > 3:
        return
    manifest = manifest_of(data, shard)
    if chance:
        read_dataset(Files({"logitstore.json": manifest, SHARD: data}))
        return
    (scratch / SHARD).parent.mkdir(parents=True, exist_ok=True)
    (scratch / SHARD).write_bytes(data)
    (scratch / "logitstore.json").write_bytes(manifest)
    logitstore.validate(scratch, deep=True)


# A manifest, beside the shards of a good dataset.

NAMES = ("several-encodings-and-chunks", "tokenizer-and-unknown-width", "user-columns")


@cache
def vector(number: int) -> Files:
    root = SPEC / "vectors/v1" / NAMES[number % len(NAMES)]
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return Files(files, root / "tokenizer")


@cache
def manifest_seeds() -> dict[str, bytes]:
    seeds = {name: bytes([i]) + vector(i).files["logitstore.json"] for i, name in enumerate(NAMES)}
    for root in sorted((SPEC / "bad").iterdir()):
        path = root / "logitstore.json"
        if path.is_file() and root.name.startswith(("manifest", "totals", "tokenizer")):
            seeds[root.name] = bytes([0]) + path.read_bytes()
    return seeds


def sealed(body: bytes) -> bytes:
    return body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def mutate_manifest(random: Any, data: bytes) -> bytes:
    first, text = data[:1], data[1:]
    if int(random.integers(10)) == 0:
        return first + forge.change_bytes(random, text)
    body = text[: text.rfind(b',\n "sha256"')]
    try:
        fields = json.loads(body + b"}")
    except ValueError:
        fields = None
    if fields and int(random.integers(3)):
        change_shards(random, fields)
        body = json.dumps(fields, indent=1).removesuffix("\n}").encode()
    if int(random.integers(2)):
        for _ in range(int(random.choice([1, 2, 3]))):
            body = forge.change_text(random, body)
    return first + sealed(body)


PATHS = ["../x", "/dev/zero", "a//b", "a/./b", "", "C:x", "a\\b", "\0", "a" * 1025, "logitstore.json", "tokenizer", "."]


def change_shards(random: Any, fields: dict) -> None:
    """Other numbers and paths, with sums and digest that fit them."""
    for _ in range(int(random.integers(3))):
        shards = fields["shards"]
        if not shards:
            break
        shard = shards[int(random.integers(len(shards)))]
        kind = int(random.integers(6))
        if kind < 3:
            shard[str(random.choice(["sequences", "positions", "candidates", "bytes"]))] = int(
                random.choice([0, 1, 2**20 + 1, 2**31, 2**40, 2**50, 2**53, 2**53 + 1])
            )
        elif kind == 3:
            shard["path"] = PATHS[int(random.integers(len(PATHS)))]
        elif kind == 4:
            shards.append(dict(shard, path=shard["path"] + "x"))
        else:
            shard["split"] = str(random.choice(["train", "test", "x", "a..b"]))
    splits: dict[str, dict] = {}
    for shard in fields["shards"]:
        split = splits.setdefault(
            shard["split"], dict.fromkeys(("shards", "sequences", "positions", "candidates", "bytes"), 0)
        )
        split["shards"] += 1
        for name in ("sequences", "positions", "candidates", "bytes"):
            split[name] += shard[name]
    fields["splits"] = splits
    for name in ("shards", "sequences", "positions", "candidates", "bytes"):
        fields["totals"][name] = sum(split[name] for split in splits.values())
    lines = [(fields["tokenizer"] or {}).get("digest") or "-"]
    lines += [f"{shard['split']} {shard['sequences']} {shard['sha256']}" for shard in fields["shards"]]
    fields["dataset_digest"] = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def run_manifest(data: bytes, _scratch: Path) -> None:
    store = vector(data[0] if data else 0)
    read_dataset(replace(store, files={**store.files, "logitstore.json": data[1:]}))


# A tokenizer.


@cache
def tokenizer_seeds() -> dict[str, bytes]:
    found = {}
    for path in sorted(SPEC.rglob("tokenizer/*.json")):
        if path.stat().st_size < 20000:
            found[f"{path.parent.parent.name}/{path.name}"] = bundle({path.name: path.read_bytes()})
    steps = [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "ab"},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    model = {"vocab": {"a": 0, "b": 1, "<0x41>": 2, "##c": 3}, "byte_fallback": True}
    added = [{"id": 4, "content": "<s>", "special": True}]
    file = {"model": model, "added_tokens": added, "decoder": {"type": "Sequence", "decoders": steps}}
    config = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "x"}]}
    found["made"] = bundle(
        {"tokenizer.json": json.dumps(file).encode(), "tokenizer_config.json": json.dumps(config).encode()}
    )
    return found


def run_tokenizer(data: bytes, scratch: Path) -> None:
    files = unbundle(data)["files"]
    write_files(files, scratch)
    tokenizer = quietly(lambda: logitstore.Tokenizer.from_path(scratch))
    if not isinstance(tokenizer, Exception):
        len(list(tokenizer.items())), tokenizer.digest, tokenizer.chat_template_sha256, repr(tokenizer)
        tokenizer.text([0, 1, 2**31 - 1]), tokenizer.to_partial_json(), tokenizer.id_of(b"a"), tokenizer.vocabulary_size


# Captures of other programs: files by name, and the options of the import.


def bundle(files: dict[str, bytes]) -> bytes:
    return msgspec.msgpack.encode({"files": files})


def unbundle(data: bytes) -> dict:
    return msgspec.msgpack.decode(data)


def write_files(files: dict[str, bytes], scratch: Path) -> None:
    """The files; what is called `.example` are the records of an ArrayRecord file, which is made of them.

    Nothing is changed in that file itself: reading it is another project's, with checksums of its own.
    """
    if records := [files[name] for name in sorted(files) if name.endswith(".example")]:
        module = importlib.import_module("array_record.python.array_record_module")
        scratch.mkdir(parents=True, exist_ok=True)
        writer = module.ArrayRecordWriter(str(scratch / "capture.array_record"), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return
    for name, content in files.items():
        path = scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@cache
def capture_seeds(name: str) -> dict[str, bytes]:
    """Bundles with an `importer`, the `options` of the import, and which of the files is the `main` one."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted((HERE / "seeds").glob(f"{name}/*"))}


def mutate_bundle(random: Any, data: bytes) -> bytes:
    fields = unbundle(data)
    name = sorted(fields["files"])[int(random.integers(len(fields["files"])))]
    content = fields["files"][name]
    for _ in range(int(random.choice([1, 1, 2, 3]))):
        content = mutate_file(random, content)
    fields["files"][name] = content
    return msgspec.msgpack.encode(fields)


def mutate_file(random: Any, content: bytes) -> bytes:
    """Other bytes of a file; in containers that hold checksums or lengths, mostly such that these are right."""
    fair = int(random.integers(4)) > 0
    if fair and content[:2] == b"PK":
        return mutate_zip(random, content)
    if fair and content[8:9] == b"{" and (n := int.from_bytes(content[:8], "little")) < len(content):
        header = forge.change_text(random, content[8 : 8 + n])
        return len(header).to_bytes(8, "little") + header + content[8 + n :]
    if content[:1] in b"{[ \n" and int(random.integers(5)):
        return forge.change_text(random, content)
    return forge.change_bytes(random, content)


def mutate_zip(random: Any, content: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old:
            members = {info.filename: old.read(info) for info in old.infolist() if info.file_size < 2**20}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error):
        return forge.change_bytes(random, content)
    if not members:
        return forge.change_bytes(random, content)
    chosen = sorted(members)[int(random.integers(len(members)))]
    head = members[chosen][:160]  # where numpy's header and a pickle's opcodes are
    members[chosen] = forge.change_bytes(random, head) + members[chosen][160:]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members.items():
            new.writestr(name, data)
    return out.getvalue()


def run_capture(data: bytes, scratch: Path) -> None:
    fields = unbundle(data)
    importer = fields["importer"]
    source, out = scratch / "in", scratch / "out"
    write_files(fields["files"], source)
    options = dict(fields["options"], on_error="skip" if zlib.crc32(data) % 2 else "stop")
    for name, value in options.items():
        if isinstance(value, str) and value.startswith("file:"):
            options[name] = source / value.removeprefix("file:")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = quietly(lambda: convert([source / fields["main"]], out, importer=importer, **options))
        if not isinstance(done, Exception):  # what was imported is a dataset, whatever it was
            assert not [
                f for f in logitstore.validate(out, deep=True) if f.severity == "error" and f.code not in LENIENT
            ]
    if zlib.crc32(data) % 8 == 0:
        shutil.rmtree(out, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quietly(lambda: convert([source / fields["main"]], out))  # which importer is it for?


LENIENT = {"alignment", "tail-mismatch", "optional-range"}
"""What a validator says of values that no importer can know to be wrong."""

TARGETS = {
    "shard": Target(shard_seeds, forge.forge, run_shard),
    "manifest": Target(manifest_seeds, mutate_manifest, run_manifest),
    "tokenizer": Target(tokenizer_seeds, mutate_bundle, run_tokenizer),
    "imports": Target(lambda: capture_seeds("*"), mutate_bundle, run_capture),
} | {
    f"import-{name}": Target(lambda name=name: capture_seeds(name), mutate_bundle, run_capture)
    for name in sorted(importers())
    if (HERE / "seeds" / name).is_dir()
}
"""`imports` is all of the importers in turn."""
