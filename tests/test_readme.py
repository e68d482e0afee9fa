"""The README: short, and its Python block runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_it_has_at_most_900_words():
    assert len(README.split()) <= 900


def test_its_python_block_runs(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (block,) = PYTHON
    exec(compile(block, "README.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "5"]
    assert transformers.LlamaForCausalLM.from_pretrained("my_llama").config.num_hidden_layers == 3


def test_it_leads_to_every_page():
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages - set(re.findall(r"\]\((docs/\w+\.md)", README)) == set()
