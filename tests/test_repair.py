"""Repairing a dataset from a copy: what is damaged is replaced by what is verified, and nothing else is touched."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import msgspec
import pytest

import logitstore
from logitstore.errors import (
    CorruptDataError,
    DatasetExistsError,
    DatasetNotFoundError,
    IncompleteDatasetError,
    InvalidInputError,
    RemoteError,
)
from logitstore.schema import dataset_digest, parse_manifest, serialise_manifest

pytest.importorskip("huggingface_hub")

from hub import Fault
from pull_rows import MANIFEST, REPO, content, stored

from logitstore.hub import parts
from logitstore.hub.repair import NotRepaired, repair
from logitstore.io.lock import FileLock

pytest_plugins = ["pull_rows"]  # its fixtures
pytestmark = pytest.mark.usefixtures("quiet")

TOKENIZER = "tokenizer/tokenizer.json"


@pytest.fixture
def root(local, tmp_path):
    """A copy that can be damaged."""
    return shutil.copytree(local, tmp_path / "d")


@pytest.fixture
def source(local, tmp_path):
    """A copy to be repaired from, which can be damaged too."""
    return shutil.copytree(local, tmp_path / "source")


def shards_of(files):
    """Paths of the shards in the order of the manifest: those of train come first."""
    return [info.path for info in parse_manifest(files[MANIFEST]).shards]


def harm(path, how="flip"):
    if how == "missing":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-1] if how == "cut" else data)


def same(root, files):
    """All files are as they were, and nothing is left beside them."""
    assert content(root, hidden=True) == files
    assert not list(root.rglob(".repair*"))
    return True


def paths_of(reasons):
    return [one.path for one in reasons]


# From a directory


@pytest.mark.parametrize("how", ["flip", "cut", "missing"])
@pytest.mark.parametrize("what", ["shard", "tokenizer"])
def test_a_file_is_repaired(root, source, files, what, how):
    name = TOKENIZER if what == "tokenizer" else shards_of(files)[3]
    harm(root / name, how)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path != root / name}
    told, seen = [], []
    done = repair(root, source, told=lambda *one: told.append(one), progress=lambda *one: seen.append(one))
    assert (done.repaired, done.not_repaired, done.bytes) == ((name,), (), len(files[name]))
    assert told == [(name, None)]
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert same(root, files)
    assert same(source, files)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_nothing_is_done_where_nothing_is_damaged(root, source, files):
    done = repair(root, source)
    assert (done.repaired, done.not_repaired, done.bytes) == ((), (), 0)
    assert same(root, files)


def test_all_that_is_missing_comes_back(root, source, files):
    shutil.rmtree(root / "data")
    shutil.rmtree(root / "tokenizer")
    done = repair(root, source, workers=2)
    assert set(done.repaired) == {name for name in files if name not in (MANIFEST, "README.md")}
    assert same(root, files)


def test_files_of_any_name_are_found_by_their_sha256(root, source, files):
    """The source has the same shards in another order, under other names, and others besides."""
    manifest = parse_manifest(files[MANIFEST])
    test = [info for info in manifest.shards if info.split == "test"]
    train = [info for info in manifest.shards if info.split == "train"]
    renamed = [msgspec.structs.replace(info, path=f"data/train/x-{n}.arrow") for n, info in enumerate(train[::-1])]
    for old, new in zip(train[::-1], renamed, strict=True):
        (source / old.path).rename(source / new.path)
    theirs = (*renamed, *test)
    changed = msgspec.structs.replace(
        manifest, shards=theirs, dataset_digest=dataset_digest(theirs, manifest.tokenizer)
    )
    (source / MANIFEST).write_bytes(serialise_manifest(changed))
    harm(root / train[1].path)
    assert repair(root, source).repaired == (train[1].path,)
    assert same(root, files)


def test_what_the_source_has_damaged_too_stays(root, source, files):
    one, two, three = shards_of(files)[:3]
    for name in (one, two, three):
        harm(root / name)
    harm(source / one)
    harm(source / two, "missing")
    before = content(root)
    done = repair(root, source)
    assert done.repaired == (three,)
    assert paths_of(done.not_repaired) == [one, two]
    assert str(source / one) in done.not_repaired[0].reason
    assert "sha256" in done.not_repaired[0].reason
    assert str(source / two) in done.not_repaired[1].reason
    assert same(root, {**before, three: files[three]})


def test_another_name_of_the_same_bytes_is_tried(tmp_path, rows, quiet):
    """Two shards of equal bytes: the damaged one at the source does not stand in the way."""
    path = tmp_path / "d"
    with logitstore.Writer(path, teacher="t", logit_width=1000) as writer:
        writer.add(*rows(0, 5, 4))
    manifest = parse_manifest((path / MANIFEST).read_bytes())
    source = shutil.copytree(path, tmp_path / "source")
    (info,) = manifest.shards
    shards = msgspec.structs.replace(info, path="data/train/a.arrow"), info
    splits = {"train": msgspec.structs.replace(manifest.splits["train"], shards=2, sequences=2, positions=10,
                                               candidates=2 * info.candidates, bytes=2 * info.bytes)}  # fmt: skip
    totals = msgspec.structs.replace(
        manifest.totals, shards=2, sequences=2, positions=10, candidates=2 * info.candidates, bytes=2 * info.bytes
    )
    twice = msgspec.structs.replace(
        manifest, shards=shards, splits=splits, totals=totals, dataset_digest=dataset_digest(shards, None)
    )
    (source / MANIFEST).write_bytes(serialise_manifest(twice))
    (source / "data/train/a.arrow").write_bytes(b"damaged")
    (path / info.path).unlink()
    assert repair(path, source).repaired == (info.path,)


def test_another_dataset_is_no_source(root, other, files):
    harm(root / shards_of(files)[0])
    before = content(root)
    done = repair(root, other)
    assert done.repaired == ()
    assert done.not_repaired == (NotRepaired(shards_of(files)[0], f"{other} has no file with its sha256"),)
    assert same(root, before)


@pytest.mark.parametrize("wrong", ["nowhere", "itself", "manifest", "url", "no dataset"])
def test_what_cannot_be_done_changes_nothing(root, source, files, tmp_path, wrong):
    harm(root / shards_of(files)[0])
    before = content(root)
    path, given, error = root, source, InvalidInputError
    if wrong == "nowhere":
        given, error = tmp_path / "nowhere", DatasetNotFoundError
    elif wrong == "itself":
        given = Path(os.path.relpath(root))
    elif wrong == "manifest":
        harm(source / MANIFEST)
        error = CorruptDataError
    elif wrong == "url":
        path = "hf://datasets/me/x"
    else:
        path, error = tmp_path, DatasetNotFoundError
    with pytest.raises(error):
        repair(path, given)
    assert same(root, before)


# Links


def test_a_hard_link_is_not_written_through(root, source, files, tmp_path):
    name = shards_of(files)[0]
    harm(root / name)
    damaged = (root / name).read_bytes()
    os.link(root / name, tmp_path / "linked")
    assert repair(root, source).repaired == (name,)
    assert (tmp_path / "linked").read_bytes() == damaged
    assert same(root, files)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights there")
def test_a_symbolic_link_is_replaced_and_not_followed(root, source, files, tmp_path):
    one, two, whole = shards_of(files)[:3]
    for name in (one, whole):
        shutil.move(root / name, tmp_path / Path(name).name)
        (root / name).symlink_to(tmp_path / Path(name).name)
    harm(root / one)
    damaged = (tmp_path / Path(one).name).read_bytes()
    (root / two).unlink()
    (root / two).symlink_to(tmp_path / "nothing")
    assert repair(root, source).repaired == (one, two)
    assert not (root / one).is_symlink()
    assert not (root / two).is_symlink()
    assert (root / whole).is_symlink()
    assert (tmp_path / Path(one).name).read_bytes() == damaged
    assert not (tmp_path / "nothing").exists()
    assert same(root, files)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights there")
def test_nothing_is_written_in_a_directory_outside(root, source, files, tmp_path):
    shutil.move(root / "data" / "train", tmp_path / "outside")
    (root / "data" / "train").symlink_to(tmp_path / "outside")
    name = shards_of(files)[0]
    assert name.startswith("data/train/")
    harm(tmp_path / "outside" / Path(name).name)
    before = content(tmp_path / "outside")
    done = repair(root, source)
    assert paths_of(done.not_repaired) == [name]
    assert "link out of the dataset" in done.not_repaired[0].reason
    assert content(tmp_path / "outside") == before


# The manifest


@pytest.mark.parametrize("how", ["flip", "cut", "missing"])
def test_a_manifest_that_is_damaged_or_missing_is_that_of_the_source(root, source, files, how):
    name = shards_of(files)[2]
    harm(root / MANIFEST, how)
    harm(root / name)
    kept = {} if how == "missing" else {f"{MANIFEST}.damaged": (root / MANIFEST).read_bytes()}
    assert repair(root, source).repaired == (name, MANIFEST)
    assert same(root, {**files, **kept})


def test_each_damaged_manifest_is_kept(root, source, files):
    for how in ("flip", "cut"):
        harm(root / MANIFEST, how)
        repair(root, source)
    assert set(content(root)) - set(files) == {f"{MANIFEST}.damaged", f"{MANIFEST}.damaged-2"}
    assert (root / MANIFEST).read_bytes() == files[MANIFEST]


def test_shards_of_another_dataset_without_a_manifest_are_not_lost(root, other, files):
    harm(root / MANIFEST)
    before = content(root)
    with pytest.raises(InvalidInputError, match="another dataset, and nothing was changed"):
        repair(root, other)
    assert same(root, before)


def test_a_dataset_that_is_being_written_is_left_alone(root, source, files):
    harm(root / MANIFEST, "missing")
    (root / (shards_of(files)[0] + ".partial")).touch()
    before = content(root)
    with pytest.raises(IncompleteDatasetError):
        repair(root, source)
    assert same(root, before)


# Disks


def test_a_full_disk_leaves_the_original(root, source, files, monkeypatch):
    one, two = shards_of(files)[:2]
    harm(root / one)
    harm(root / two)
    before = content(root)
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(parts.os, "fsync", fsync)
    done = repair(root, source)
    assert done.repaired == (two,)
    assert paths_of(done.not_repaired) == [one]
    assert "No space left" in done.not_repaired[0].reason
    monkeypatch.undo()
    assert same(root, {**before, two: files[two]})


def test_room_is_asked_for_first(root, source, files, monkeypatch):
    harm(root / shards_of(files)[0])
    before = content(root)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 7, 3))
    (left,) = repair(root, source).not_repaired
    assert "there is room for 3" in left.reason
    assert same(root, before)


def test_what_cannot_be_read_is_damaged(root, source, files, monkeypatch):
    """A disk that does not give a file any more."""
    name, real = shards_of(files)[1], parts.sha256_file

    def sha256(path):
        if path == root / name and path.stat().st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    inode = (root / name).stat().st_ino
    monkeypatch.setattr(parts, "sha256_file", sha256)
    assert repair(root, source).repaired == (name,)
    assert same(root, files)


def test_a_directory_in_the_place_of_a_shard_stays(root, source, files):
    name = shards_of(files)[0]
    (root / name).unlink()
    (root / name).mkdir()
    (left,) = repair(root, source).not_repaired
    assert left.path == name
    assert (root / name).is_dir()


def test_stopped_it_leaves_nothing_and_goes_on(root, source, files):
    one, two = shards_of(files)[:2]
    harm(root / one)
    harm(root / two)
    before = content(root)

    def told(path, _reason):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(root, source, told=told)
    assert same(root, {**before, one: files[one]})
    assert repair(root, source).repaired == (two,)
    assert same(root, files)


@pytest.mark.parametrize("kind", ["directory", "link", "file"])
def test_what_a_killed_repair_left_is_removed_and_not_followed(root, source, files, tmp_path, kind):
    name = shards_of(files)[0]
    harm(root / name)
    work, outside = root / "data" / "train" / ".repair", tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    if kind == "directory":
        work.mkdir()
        sha256 = hashlib.sha256(files[name]).hexdigest()
        (work / f"{sha256}.part").symlink_to(outside / "mine")
        (work / f"{sha256}.log").write_bytes(bytes(8))
    elif kind == "link":
        work.symlink_to(outside)
    else:
        work.touch()
    assert repair(root, source).repaired == (name,)
    assert same(root, files)
    assert content(outside) == {"mine": b"mine"}


def test_two_repairs_do_not_meet(root, source, files):
    harm(root / shards_of(files)[0])
    before = content(root)
    with FileLock(root / ".repair.lock", ""), pytest.raises(DatasetExistsError, match="another repair is at work"):
        repair(root, source)
    assert same(root, before)
    assert len(repair(root, source).repaired) == 1


# From a network


def test_from_the_hub_only_what_is_damaged_is_fetched(hub, there, root):
    name = shards_of(there)[3]
    harm(root / name)
    harm(root / TOKENIZER)
    hub.clear_log()
    assert repair(root, f"hf://datasets/{REPO}").repaired == (TOKENIZER, name)
    assert same(root, there)
    assert stored(hub) == len(there[name])


def test_from_a_revision_of_the_hub(hub, there, root):
    first = logitstore.open(f"hf://datasets/{REPO}").store.commit
    harm(root / shards_of(there)[0])
    hub.commit_files(REPO, {MANIFEST: b"{}"})
    with pytest.raises(CorruptDataError):
        repair(root, f"hf://datasets/{REPO}")
    repair(root, f"hf://datasets/{REPO}@{first}")
    assert same(root, there)


def test_what_the_network_damages_is_fetched_again(hub, there, root):
    harm(root / shards_of(there)[0], "missing")
    hub.fault(Fault(kind="flip", origin="storage", after=40, times=2))
    assert len(repair(root, f"hf://datasets/{REPO}").repaired) == 1
    assert same(root, there)


def test_what_is_damaged_on_the_hub_stays(hub, there, root):
    name = shards_of(there)[0]
    harm(root / name)
    before = content(root)
    hub.fault(Fault(kind="flip", origin="storage", after=40, times=None))
    (left,) = repair(root, f"hf://datasets/{REPO}").not_repaired
    assert left.path == name
    assert f"hf://datasets/{REPO}/{name}" in left.reason
    assert same(root, before)


def test_a_hub_that_cannot_be_reached_is_one_error(hub, there, root):
    harm(root / shards_of(there)[0])
    before = content(root)
    hub.fault(Fault(kind="status", status=500, origin="storage", times=None))
    with pytest.raises(RemoteError):
        repair(root, f"hf://datasets/{REPO}")
    assert same(root, before)


def test_from_a_file_system_of_fsspec(root, files, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["logitstore.hub.repair"], "_PIECE", 1000)
    system, place = fsspec.filesystem("memory"), f"/{tmp_path.name}/source"
    for name, data in files.items():
        system.pipe(f"{place}/{name}", data)
    try:
        one, two = shards_of(files)[:2]
        harm(root / one)
        harm(root / two)
        harm(root / MANIFEST)
        system.rm(f"{place}/{two}")
        done = repair(root, f"memory:/{place}")
    finally:
        system.rm(place, recursive=True)
    assert done.repaired == (one, MANIFEST)
    assert paths_of(done.not_repaired) == [two]
    assert "no such file" in done.not_repaired[0].reason
    assert (root / one).read_bytes() == files[one]


# The command


def cli(*arguments, status=0):
    command = [sys.executable, "-m", "logitstore_cli", "validate", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_the_command_repairs_and_validates(root, source, files):
    name = shards_of(files)[0]
    harm(root / name)
    out, err = cli(root, "--repair-from", source, "--deep")
    assert out.splitlines()[-1].startswith(f"{root}: valid (")
    assert err.splitlines() == [
        f"repaired: {name}",
        f"{root}: 1 file repaired from {source} ({len(files[name]) / 1024:,.1f} KiB)",
    ]
    assert same(root, files)
    _, err = cli(root, "--repair-from", source)
    assert err == f"{root}: no file is missing or damaged, nothing to repair\n"


def test_the_command_in_json(root, source, files):
    one, two = shards_of(files)[:2]
    harm(root / one)
    harm(root / two)
    harm(source / two)
    out, err = cli(root, "--repair-from", source, "--json", status=1)
    said = json.loads(out)
    assert said["valid"] is False
    assert said["repaired"] == [one]
    assert [one["path"] for one in said["not_repaired"]] == [two]
    assert f"not repaired: {two}: {source / two}" in err
    assert "1 file repaired" in err
    assert "; 1 stays damaged" in err
    out, _ = cli(root, "--json")
    assert set(json.loads(out)) == {"valid", "findings"}


def test_what_could_not_be_repaired_is_invalid_where_a_quick_look_finds_nothing(root, other, files):
    harm(root / shards_of(files)[0])
    out, _ = cli(root)
    assert ": valid (" in out
    out, _ = cli(root, "--repair-from", other, status=1)
    assert f"{root}: INVALID (1 damaged file; checked without reading rows" in out.splitlines()[-1]
