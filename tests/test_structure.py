"""The habits of the code that can be checked: layers, sizes, import time, no asserts on input."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "logitstore"
LAYERS = (
    "errors", "limits", "units", "processes", "_version", "encoding", "schema", "tokenizer", "text", "io", "shard", "dataset", "checks", "recovery",
    "convert", "hub", "torch", "look",
)  # fmt: skip
"""A module imports from layers before its own, never from later ones. `schema` and `encoding` do no I/O."""

SOURCES = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "cli").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def layer(module):
    name = module.split(".")[1] if "." in module else ""
    return LAYERS.index(name) if name in LAYERS else -1


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_data_flows_one_way_through_the_layers(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = layer(".".join(parts))
    if parts == ("logitstore", "__init__"):
        return
    assert own >= 0, f"{path} is in no layer"
    for module in imports(path):
        if module.startswith("logitstore"):
            assert layer(module) <= own, f"{path} imports {module}"


def test_no_module_is_over_500_lines():
    assert {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500} == {}


def test_input_is_checked_by_errors_not_asserts():
    found = [p.name for p in SOURCES for node in ast.walk(ast.parse(p.read_text())) if isinstance(node, ast.Assert)]
    assert found == []


def test_nothing_unpickles_or_evaluates():
    banned = {"pickle", "marshal", "shelve"}
    for path in SOURCES:
        found = {module.split(".")[0] for module in imports(path)}
        assert not banned & found, path
        assert "torch" not in found or path.is_relative_to(PACKAGE / "torch"), path


def test_importing_the_package_is_fast_and_light():
    code = (
        "import sys, time; start = time.perf_counter(); import logitstore; "
        "print(time.perf_counter() - start); print(*sys.modules)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    modules = runs[0].stdout.splitlines()[1].split()
    for heavy in (
        "torch",
        "tokenizers",
        "huggingface_hub",
        "urllib3",
        "fsspec",
        "rich",
        "click",
        "pandas",
        "pyarrow.parquet",
    ):
        assert heavy not in modules
    assert min(float(run.stdout.splitlines()[0]) for run in runs) < 2  # 0.25 s where nothing else runs


def test_core_dependencies_are_those_that_are_meant():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.replace(">", " ").replace("=", " ").split()[0] for line in project["dependencies"]}
    assert names == {
        "numpy", "pyarrow", "pcodec", "zstandard", "xxhash", "huggingface_hub", "urllib3", "fsspec", "click", "rich", "pyyaml", "msgspec",
    }  # fmt: skip


def test_public_names():
    import logitstore

    for name in logitstore.__all__:
        assert getattr(logitstore, name).__doc__ or name == "__version__"
    errors = [getattr(logitstore, n) for n in logitstore.__all__ if n.endswith("Error")]
    for error in errors:
        assert issubclass(error, logitstore.LogitStoreError)
        builtins = [
            c for c in error.__mro__ if c.__module__ == "builtins" and c not in (object, Exception, BaseException)
        ]
        assert builtins or error is logitstore.LogitStoreError
