"""docs/train.md names every field of a training run with its default."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from hiddenkey import cli
from hiddenkey.lab.config import DEFAULTS, FIELD_TYPES, TrainConfig

from .options import PAGE, page, table

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_is_that_of_the_source():
    assert page(TEXT) == TEXT


def test_no_field_is_left_out():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.+) \|$", table(), re.MULTILINE)
    assert [name for name, _, _ in rows] == list(FIELD_TYPES)
    shown = {name: default for name, default, _ in rows}
    assert shown["model"] == "needed"
    told = {name: text for name, _, text in rows}
    assert told["dtype"].endswith("One of `float32`, `bfloat16`, `float16`.")
    assert "One of" not in told["seed"]
    assert shown["learning_rate"] == f"`{DEFAULTS['learning_rate']}`"


def test_the_file_that_is_shown_is_one():
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    TrainConfig(**yaml.safe_load(text)).check()


@pytest.mark.parametrize("line", re.findall(r"^(hiddenkey train .*?)(?:  +#.*)?$", TEXT, re.MULTILINE))
def test_commands_parse(line: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[0], encoding="utf-8")
    cli._parse(shlex.split(line)[1:]).check()
