"""What every exporter gets from the frame: an output that appears whole or not at all."""

import pytest

import logitstore
from logitstore.convert import Exporter, export
from logitstore.errors import DatasetExistsError, InvalidInputError
from logitstore_cli.main import COMMANDS


def write_ids(dataset, path, options):
    """The ids, one a line; a directory where the path has no suffix."""
    if path.name.endswith(".dir.unfinished"):
        path.mkdir()
        path = path / "ids.txt"
    with path.open("w") as file:
        for number, sequence in enumerate(dataset, 1):
            if sequence.id == "3" and options.k == 99:
                raise InvalidInputError("the sequence '3' cannot be held")
            file.write(f"{sequence.id} {options.k}\n")
            options.progress(number)
    return ["Everything but the ids was lost."]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    one = Exporter(name="ids", description="only the ids", loses="the rest", write=write_ids)
    monkeypatch.setattr("logitstore.convert.run_export.exporters", lambda: {"ids": one})


def test_a_dataset_its_path_and_a_view_are_exported(tmp_path, write):
    path = write()
    seen = []
    done = export(path, tmp_path / "new" / "out.txt", "ids", progress=seen.append)
    assert (tmp_path / "new" / "out.txt").read_text().split("\n")[0] == "0 None"
    assert (done.exporter, done.sequences, done.notes) == ("ids", 6, ("Everything but the ids was lost.",))
    assert seen == [1, 2, 3, 4, 5, 6]
    export(logitstore.open(path)[1:3], tmp_path / "view.dir", "ids", k=2)
    assert (tmp_path / "view.dir" / "ids.txt").read_text() == "1 2\n2 2\n"
    assert {each.name for each in tmp_path.iterdir()} == {"data", "new", "view.dir"}


@pytest.mark.parametrize("name", ["out.txt", "out.dir"])
def test_what_is_there_stays_unless_it_is_to_be_replaced(tmp_path, write, name):
    path = write()
    export(path, tmp_path / name, "ids")
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    with pytest.raises(DatasetExistsError, match="is there already"):
        export(path, tmp_path / name, "ids")
    with pytest.raises(InvalidInputError, match="cannot be held"):
        export(path, tmp_path / name, "ids", k=99, overwrite=True)
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before
    export(path, tmp_path / name, "ids", k=5, overwrite=True)
    file = tmp_path / name if name == "out.txt" else tmp_path / name / "ids.txt"
    assert file.read_text().startswith("0 5\n")
    assert {each.name for each in tmp_path.iterdir()} == {"data", name}


def test_a_failed_export_leaves_nothing(tmp_path, write):
    with pytest.raises(InvalidInputError):
        export(write(), tmp_path / "out.dir", "ids", k=99)
    assert [each.name for each in tmp_path.iterdir()] == ["data"]


def test_wrong_arguments_are_named(tmp_path, write):
    with pytest.raises(InvalidInputError, match="no exporter is called 'nope'; there are: ids"):
        export(write(), tmp_path / "out", "nope")
    with pytest.raises(InvalidInputError, match="k is 0"):
        export(tmp_path / "data", tmp_path / "out", "ids", k=0)
    with pytest.raises(logitstore.DatasetNotFoundError):
        export(tmp_path / "nowhere", tmp_path / "out", "ids")


def test_export_is_a_command():
    assert COMMANDS["export"] == "logitstore_cli.export"
