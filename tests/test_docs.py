"""The README's code runs, and its commands exist."""

import re
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

from logitstore.convert import exporters, importers
from logitstore_cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.usefixtures("quiet")
def test_the_longest_example_distils(tmp_path, monkeypatch):
    """Run as it stands, with two small models; the student comes closer to the teacher."""
    torch = pytest.importorskip("torch", reason="the README's example trains with torch")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 200)

        def forward(self, tokens):
            return type("Output", (), {"logits": self.head(self.embed(tokens))})

    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    losses = []
    texts = [torch.randint(0, 50, (30,)).tolist() for _ in range(300)]
    names = {"teacher": Model(), "student": Model(), "texts": texts, "seen": losses}
    exec(code.replace("    loss.backward()", "    seen.append(loss.item())\n    loss.backward()"), names)
    assert len(losses) == 300
    assert sum(losses[-5:]) < sum(losses[:5]) * 0.6


def test_every_command_of_the_readme_exists():
    for line in re.findall(r"^\$ (.*)$", README, re.MULTILINE):
        program, command = line.split()[:2]
        if program == "make":
            assert f"\n{command}:" in (ROOT / "Makefile").read_text()
            continue
        words = [word for word in line.split() if word.startswith("--")]
        done = CliRunner().invoke(main, [command, "--help"])
        assert done.exit_code == 0, command
        for word in words:
            assert word in done.stdout


def test_links_inside_the_repository_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "spec" / "README.md", ROOT / "spec" / "bad" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page, target)


def test_the_table_of_formats_is_that_of_the_registry():
    """Made by `python benchmarks/formats.py --write`."""
    formats = runpy.run_path(str(ROOT / "benchmarks" / "formats.py"))
    assert formats["replaced"](README) == README
    for name in (*importers(), *exporters()):
        assert f"| `{name}` |" in README


def test_formats_say_what_they_are_and_lose():
    for name, one in (*importers().items(), *exporters().items()):
        assert one.name == name
        assert 10 < len(one.description) < 160
        assert not one.description.endswith(".")
        assert not one.loses.endswith(".")
    assert all(one.loses for one in exporters().values())
    asked = {"vllm", "sglang", "openai", "tgi", "llama-server", "llama-kld", "exllama", "tensorrt-llm", "distillkit", "axolotl", "trl", "nemo-aligner", "megatron", "maxtext", "mlx-dwq", "easydistill", "llamakd", "tinker", "columns", "arrays"}  # fmt: skip
    assert asked <= set(importers())
    assert set(exporters()) >= {
        "axolotl",
        "trl",
        "distillkit",
        "nemo-aligner",
        "parquet",
        "npz",
        "safetensors",
        "jsonl",
    }
