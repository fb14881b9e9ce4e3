"""What every exporter gets from the frame: an output that appears whole or not at all."""

import os
import socket
import threading

import pyarrow.parquet as pq
import pytest

import logitstore
from logitstore.convert import Exporter, export, exporters
from logitstore.errors import DatasetExistsError, InvalidInputError
from logitstore_cli.main import COMMANDS


def write_ids(dataset, path, options):
    """The ids, one a line; a directory where the path has no suffix."""
    if path.name.endswith(".dir"):
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
    one = Exporter(name="ids", description="only the ids", loses="the rest", write=write_ids, files=("ids.txt",))
    known = {"ids": one, **exporters()}
    monkeypatch.setattr("logitstore.convert.run_export.exporters", lambda: known)


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


def content(folder):
    return {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}


@pytest.mark.parametrize(
    ("output", "to", "says"),
    [
        ("par/ds", "distillkit", "is the dataset"),
        ("par/link", "distillkit", "is the dataset"),
        ("par/../par/ds", "parquet", "is the dataset"),
        ("par", "parquet", "holds the dataset"),
        ("par/ds/x.parquet", "parquet", "lies inside the dataset"),
        ("par/ds/new/x.jsonl", "jsonl", "lies inside the dataset"),
        ("par/link/x.jsonl", "jsonl", "lies inside the dataset"),
    ],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_the_dataset_itself_is_never_written_over(tmp_path, write, output, to, says, overwrite):
    (tmp_path / "par").mkdir()
    path = write("par/ds")
    (tmp_path / "par" / "notes.txt").write_text("mine")
    (tmp_path / "par" / "link").symlink_to("ds")
    before = content(tmp_path)
    with pytest.raises(InvalidInputError, match=says):
        export(path, tmp_path / output, to, overwrite=overwrite)
    assert content(tmp_path) == before


@pytest.mark.parametrize("to", ["distillkit", "parquet", "jsonl", "ids"])
@pytest.mark.parametrize(
    "stranger", ["notes.txt", "data/notes.txt", "deep/er/ids.txt", "data_0.parquet/x", "empty/", "link@"]
)
def test_a_directory_of_other_things_is_never_replaced(tmp_path, write, to, stranger):
    path, out = write(), tmp_path / "out.dir"
    if to != "jsonl":  # which writes no directories
        export(path, out, to)
    place = out / stranger.rstrip("/@")
    if place.parent.is_file():
        place = out / "other"
    (place if stranger.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
    if stranger.endswith("@"):
        place.symlink_to(tmp_path / "data" / "logitstore.json")
    elif not stranger.endswith("/"):
        place.write_text("mine")
    before = content(tmp_path)
    with pytest.raises(InvalidInputError, match=r"is a directory with .* in it, which no export as"):
        export(path, out, to, overwrite=True)
    assert content(tmp_path) == before
    assert {each.name for each in tmp_path.iterdir()} == {"data", "out.dir"}


@pytest.mark.parametrize("to", ["distillkit", "parquet"])
def test_a_directory_that_an_export_wrote_is_replaced(tmp_path, write, to):
    path = write(sequences=5)
    (tmp_path / "out").mkdir()
    for view in (logitstore.open(path)[:2], logitstore.open(path)):
        export(view, tmp_path / "out", to, overwrite=True)
    rows = [pq.read_metadata(file).num_rows for file in (tmp_path / "out").rglob("*.parquet")]
    assert rows == [5]
    assert {each.name for each in tmp_path.iterdir()} == {"data", "out"}


def test_users_own_hidden_files_stay(tmp_path, write):
    for name in (".out.dir.replaced", ".out.dir.unfinished", ".out.dir.old"):
        (tmp_path / name).write_text("mine")
    path = write()
    for _ in range(2):
        export(path, tmp_path / "out.dir", "ids", overwrite=True)
    assert [each.read_text() for each in sorted(tmp_path.glob(".out*"))] == ["mine"] * 3


def test_runs_at_the_same_time_do_not_meet(tmp_path, write, monkeypatch):
    """Both are writing when either ends; each output is whole, and the last one stays."""
    barrier = threading.Barrier(2, timeout=60)

    def slow(dataset, path, options):
        path.mkdir()
        barrier.wait()
        (path / "ids.txt").write_text(str(options.k))
        barrier.wait()
        return []

    one = Exporter(name="slow", description="slow", loses="all", write=slow, files=("ids.txt",))
    monkeypatch.setattr("logitstore.convert.run_export.exporters", lambda: {"slow": one})
    path = write()
    failed = []

    def run(k):
        try:
            export(path, tmp_path / "out", "slow", k=k, overwrite=True)
        except (logitstore.LogitStoreError, OSError) as error:  # one replaced what the other was replacing
            failed.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) < 2
    assert (tmp_path / "out" / "ids.txt").read_text() in ("1", "2")


def test_what_appears_meanwhile_is_not_replaced(tmp_path, write, monkeypatch):
    def meddling(dataset, path, options):
        path.write_text("new")
        (tmp_path / "out.txt").write_text("mine")
        return []

    one = Exporter(name="slow", description="slow", loses="all", write=meddling)
    monkeypatch.setattr("logitstore.convert.run_export.exporters", lambda: {"slow": one})
    with pytest.raises(DatasetExistsError):
        export(write(), tmp_path / "out.txt", "slow")
    assert (tmp_path / "out.txt").read_text() == "mine"
    assert {each.name for each in tmp_path.iterdir()} == {"data", "out.txt"}


def test_the_old_directory_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, write, monkeypatch):
    path = write()
    export(path, tmp_path / "out.dir", "ids")
    rename = type(tmp_path).rename

    def failing(self, target):
        if self.parent.name == "new":
            raise PermissionError(13, "no", str(self))
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(PermissionError):
        export(path, tmp_path / "out.dir", "ids", k=3, overwrite=True)
    assert (tmp_path / "out.dir" / "ids.txt").read_text().startswith("0 None")
    assert {each.name for each in tmp_path.iterdir()} == {"data", "out.dir"}


@pytest.mark.parametrize("output", [".", "", "..", "out/..", "/"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_name_is_refused(tmp_path, write, monkeypatch, output, overwrite):
    path = write()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(InvalidInputError, match="is no name for a new file"):
        export(path, output, "distillkit", overwrite=overwrite)


def test_places_where_nothing_can_be_are_refused(tmp_path, write):
    path = write()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for output in ("file/x.jsonl", "file/deep/x.jsonl", "dangling/x.jsonl", "x" * 300, "x" * 300 + "/y", "a\0b"):
        with pytest.raises(InvalidInputError, match="nothing can be written at"):
            export(path, tmp_path / output, "ids")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_longest_names_can_be_written(tmp_path, write):
    path = write()
    for name in ("x" * 255, "é" * 125 + ".dir"):
        for _ in range(2):
            export(path, tmp_path / name, "ids", overwrite=True)
        assert (tmp_path / name).exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_dangling_link_is_something(tmp_path, write):
    path = write()
    (tmp_path / "out.txt").symlink_to("nowhere")
    with pytest.raises(DatasetExistsError):
        export(path, tmp_path / "out.txt", "ids")
    export(path, tmp_path / "out.txt", "ids", overwrite=True)
    assert not (tmp_path / "out.txt").is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_devices_and_sockets_are_not_replaced(tmp_path, write, monkeypatch):
    path = write()
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("sock")
        (tmp_path / "link").symlink_to("sock")
        for name in ("sock", "link"):
            with pytest.raises(InvalidInputError, match="is no regular file"):
                export(path, tmp_path / name, "ids", overwrite=True)
    assert os.path.lexists(tmp_path / "sock")


def test_export_is_a_command():
    assert COMMANDS["export"] == "logitstore_cli.export"
