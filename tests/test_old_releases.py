"""Files of other releases: what older ones wrote is read, what newer ones write is refused by those that cannot read it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import logitstore
from logitstore.io import LocalStore, MappedFile
from logitstore.schema import version as versions
from logitstore.schema.version import FormatVersion
from logitstore.shard.reader import Shard
from logitstore_cli.main import main

VECTORS = Path(__file__).parent.parent / "spec" / "vectors"
RELEASED = ("1.0",)
"""Every format version that a release wrote; spec, section 10."""


def test_every_released_version_has_golden_files():
    said = {
        json.loads(path.read_text())["version"] for path in VECTORS.glob("v*/*/logitstore.json")
    }  # fmt: skip
    assert said == set(RELEASED)
    table = (VECTORS.parent / "README.md").read_text().partition("## 10.")[2].partition("\n\nA version")[0]
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| 1")] == list(RELEASED)
    assert FormatVersion.parse(RELEASED[-1]) == versions.FORMAT_VERSION


@pytest.mark.parametrize("path", sorted(VECTORS.glob("v*/*/logitstore.json")), ids=lambda path: path.parent.name)
def test_golden_files_are_read_and_valid(path):
    """What is in them is compared in test_vectors.py, also by the independent reader."""
    dataset = logitstore.open(path.parent)
    expected = json.loads(path.parent.with_suffix(".json").read_text())["sequences"]
    assert [s.id for s in dataset] == [s["id"] for s in expected]
    assert logitstore.is_valid(logitstore.validate(path.parent, deep=True))


def test_an_older_reader_refuses_what_the_newest_writes_and_says_which_release_reads_it(write, monkeypatch):
    """This release as one that came before the format's first version."""
    path = write()
    monkeypatch.setattr(versions, "FORMAT_VERSION", FormatVersion(0, 9))
    shard = next(path.glob("data/*/*.arrow"))
    for refuse in (lambda: logitstore.open(path), lambda: Shard(MappedFile(shard))):
        with pytest.raises(logitstore.UnsupportedVersionError, match=r"format version 1\.0.*reads up to 0\.x.*install"):
            refuse()
    with pytest.raises(logitstore.UnsupportedVersionError, match=rf"\(logitstore {logitstore.__version__}\)"):
        logitstore.open(path)
    (finding,) = [f for f in logitstore.validate(path, deep=True) if f.severity == "error"]
    assert finding.code == "version"
    said = CliRunner().invoke(main, ["info", str(path)], standalone_mode=False).exception
    assert isinstance(said, logitstore.UnsupportedVersionError)
    assert str(path) in str(said)


@pytest.mark.usefixtures("quiet")
def test_an_older_writer_does_not_touch_what_a_newer_one_left(write, rows, tmp_path, monkeypatch):
    path = write()
    with pytest.raises(ZeroDivisionError), logitstore.Writer(tmp_path / "begun", chunk_candidates=1) as writer:
        writer.add(*rows(0, 5, 8))
        raise ZeroDivisionError
    monkeypatch.setattr(versions, "FORMAT_VERSION", FormatVersion(0, 9))
    for place in (path, tmp_path / "begun"):
        before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
        for more in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(logitstore.UnsupportedVersionError, match="install"):
                logitstore.Writer(place, **more)
        with pytest.raises(logitstore.UnsupportedVersionError, match="install"):
            logitstore.commit(place)
        assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


def test_a_reader_that_lacks_a_required_feature_names_it_and_the_release(write, monkeypatch):
    """A newer release that requires a feature of every reader, and this one, which does not know it."""
    from logitstore.schema.manifest import Manifest

    path = write()
    manifest = logitstore.open(path).info
    newer = json.loads((path / "logitstore.json").read_text())
    assert newer["features"] == {"required": [], "optional": []}
    import msgspec

    from logitstore.schema import Features, serialise_manifest

    made = msgspec.structs.replace(
        manifest, version="1.3", written_by="logitstore 1.7.2", features=Features(required=("huffman",))
    )
    assert isinstance(made, Manifest)
    (path / "logitstore.json").write_bytes(serialise_manifest(made))
    with pytest.raises(
        logitstore.UnsupportedVersionError, match=r"feature 'huffman'.*version 1\.3.*\(logitstore 1\.7\.2\)"
    ):
        logitstore.open(path)
    monkeypatch.setattr(versions, "KNOWN_FEATURES", frozenset(["huffman"]))
    assert len(logitstore.open(path)) == 6
    made = msgspec.structs.replace(made, features=Features(optional=("preview",)))
    (path / "logitstore.json").write_bytes(serialise_manifest(made))
    assert len(logitstore.open(path)) == 6
    assert LocalStore(path).has_shards()
