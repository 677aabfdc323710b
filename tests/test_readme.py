"""What the README shows is true: its code runs, its commands parse, its links lead somewhere."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hiddenkey
from hiddenkey import cli
from hiddenkey.axes.pattern import PATTERNS
from hiddenkey.axes.position import POSITIONS
from hiddenkey.consistency import CONSISTENCIES

from .hf.tiny import make

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language, heading):
    """The code blocks of a language under a heading."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def clean_registries():
    yield
    for registry, name in ((PATTERNS, "pair"), (POSITIONS, "attended"), (CONSISTENCIES, "logit-mse")):
        registry.remove(name)


def test_the_code_under_extending_runs(clean_registries):
    (code,) = blocks("python", "Extending")
    names = {"hiddenkey": hiddenkey, "model": make("llama")}
    exec(compile(code, "README.md", "exec"), names)
    plan = str(hiddenkey.plan(names["model"], "attended:pair@0.1 ~ logit-mse*0.5"))
    assert "attended:pair@0.1" in plan
    assert "self_attn" in plan
    with hiddenkey.attach(names["model"], "attended[:]:pair@0.5 ~ logit-mse*0.5") as attachment:
        from .hf.tiny import batch

        hiddenkey.consistency_step(names["model"], batch("llama")).total.backward()
        assert 0.2 < attachment.position_rates()["attended"] < 0.8


def setting(tmp_path):
    """What the snippets take for granted."""
    from types import SimpleNamespace

    import torch
    from transformers import TrainingArguments

    from .hf.tiny import batch

    rows, tensors = batch("llama"), [torch.randn(2, 4, 6, 8) for _ in range(3)]
    logits = torch.randn(2, 6, 9, requires_grad=True)
    return {
        "hiddenkey": hiddenkey,
        "model": make("llama").train(False),
        "args": TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True),
        "data": [{name: value[i] for name, value in rows.items()} for i in range(len(rows["labels"]))],
        "loader": [rows],
        "self": SimpleNamespace(training=True),
        **dict(zip("qkv", tensors, strict=True)),
        "task": torch.zeros(()),
        "logits": logits,
        "other_logits": logits + 1,
        "mask": torch.ones(2, 6).bool(),
    }


def snippets():
    return [
        code
        for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if code not in blocks("python", "Extending")
    ]


@pytest.mark.parametrize("place", range(3))
def test_every_other_snippet_runs(place, tmp_path):
    codes = snippets()
    assert len(codes) == 3
    names = setting(tmp_path)
    exec(compile(codes[place], "README.md", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 1
    if "loss" in names:
        total = getattr(names["loss"], "total", names["loss"])
        assert total.requires_grad
    if "out" in names:
        assert names["out"].shape == names["q"].shape


def rows_under(heading):
    """The cells of the table whose first heading this is."""
    lines = README.split(f"| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_preset_is_what_stands_beside_it():
    seen, before = 0, ""
    for left, right, *_ in rows_under("preset"):
        presets, recipes = (re.findall(r"`([^`]*)`", cell) for cell in (left, right))
        if right.startswith("the same"):
            presets, recipes = presets[-1:], [f"{before} {recipes[0]}"]
        if len(recipes) == len(presets) and "@p" in left:
            for preset, recipe in zip(presets, recipes, strict=True):
                assert str(hiddenkey.parse(preset.replace("@p", "@0.1"))) == str(
                    hiddenkey.parse(recipe.replace("@p", "@0.1"))
                )
                seen += 1
        before = recipes[0] if recipes else before
    assert seen == 7


def names_of_a_new_process():
    """The names by axis, without those that other tests registered."""
    code = (
        "import json, hiddenkey.axes.position as p, hiddenkey.axes.pattern as q, hiddenkey.axes.compensation as c\n"
        "import hiddenkey.consistency as k\n"
        "axes = dict(position=p.POSITIONS, pattern=q.PATTERNS, compensation=c.COMPENSATIONS)\n"
        "axes['consistency'] = k.CONSISTENCIES\n"
        "print(json.dumps({axis: registry.names() for axis, registry in axes.items()}))"
    )
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)


def test_the_names_of_the_axes_are_all_there_are():
    axes = {row[0]: re.findall(r"`([^`]*)`", row[1]) for row in rows_under("axis")}
    for axis, names in names_of_a_new_process().items():
        assert sorted(axes[axis]) == sorted(names), axis
    defaults = {name: POSITIONS[name].compensation for name in POSITIONS.names()}
    assert "Default: `none` for `logits`, `normalize` for `weights`, `rescale` elsewhere" in README
    rest = dict.fromkeys(("hidden", "input", "output"), "rescale")
    assert defaults == {"logits": "none", "weights": "normalize"} | rest


def commands():
    text = "\n".join(blocks("sh", "Use it")).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("hiddenkey ")]


def test_there_are_commands():
    assert {command.split()[1] for command in commands()} == {"train", "plan", "doctor", "sweep", "report"}


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    parsed = cli._parse(shlex.split(command)[1:])
    if hasattr(parsed, "recipe"):
        hiddenkey.parse(parsed.recipe)
    if hasattr(parsed, "check"):
        parsed.check()


@pytest.mark.parametrize(
    "path", [word for command in commands() for word in command.split() if word.endswith(".yaml")]
)
def test_sweep_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("recipe", re.findall(r"`([a-z-]+(?:\[[^`\]]*\])?(?::[a-z-]+)*@p(?: \+ [^`]*)?)`", README))
def test_recipes_parse(recipe):
    hiddenkey.parse(recipe.replace("@p", "@0.1"))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README)) | {"CITATION.cff"}))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:docs/)?[A-Za-z_]+\.(?:md|cff|txt))`", README))))
def test_files_that_are_named_exist(path):
    assert (ROOT / path).exists()
