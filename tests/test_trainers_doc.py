"""What docs/trainers.md shows is true: its versions, its snippets, its files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "trainers.md").read_text()
EXAMPLES = {path.stem: path.read_text() for path in (ROOT / "examples").rglob("*.py")}
SECTIONS = {
    "transformers' Trainer": "trainer",
    "TRL's SFTTrainer": "sft",
    "TRL's DPOTrainer": "dpo",
    "Accelerate": "accelerate_loop",
    "A plain loop": "plain_loop",
    "PyTorch Lightning": "lightning_loop",
    "Axolotl": "hiddenkey_axolotl",
    "ms-swift": "hiddenkey_swift",
}


def section(title):
    return DOC.split(f"\n## {title}\n")[1].split("\n## ")[0]


def snippets(title):
    return re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)


@pytest.mark.parametrize("title", SECTIONS)
def test_a_snippet_is_its_examples_text(title):
    assert snippets(title)
    for snippet in snippets(title):
        assert snippet in EXAMPLES[SECTIONS[title]]


def test_the_versions_are_those_of_the_tests():
    table = dict(re.findall(r"^\| ([a-z-]+) \| (\d[\d.]+) \|$", DOC, re.MULTILINE))
    assert set(table) == {"torch", "transformers", "peft", "accelerate", "trl", "pytorch-lightning"}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert table == {name: pinned[name] for name in table}


def test_every_example_is_in_the_table():
    named = set(re.findall(r"`examples/(?:plugins/)?(\w+)\.py`", DOC))
    assert named == set(EXAMPLES) - {"sample_texts"}
