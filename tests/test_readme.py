"""What README and docs/extending.md show is true: the code runs, the commands parse, the links lead somewhere."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hiddenkey
from hiddenkey import cli
from hiddenkey.compensations import COMPENSATIONS
from hiddenkey.consistency import CONSISTENCIES
from hiddenkey.patterns import PATTERNS
from hiddenkey.positions import POSITIONS

from .hf.tiny import batch, make
from .lab.tiny import save_bert

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXTENDING = (ROOT / "docs/extending.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("hiddenkey ")
]


@pytest.fixture
def own_names():
    """Names that a snippet registers are forgotten after it."""
    registries = (PATTERNS, POSITIONS, COMPENSATIONS, CONSISTENCIES)
    before = [set(registry.names()) for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)


def run(code, names):
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_ten_lines_run_and_print_the_plan_and_the_rates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = SNIPPETS[0].replace("sentence-transformers/all-MiniLM-L6-v2", str(save_bert(tmp_path / "bert")))
    names = run(code.replace('TrainingArguments("out"', 'TrainingArguments("out", use_cpu=True'), {})
    printed = capsys.readouterr().out
    assert "hidden:element@0.1" in printed
    assert names["trainer"].state.global_step == 40
    assert all(abs(rate - 0.1) < 0.05 for rate in names["trainer"].attachment.position_rates().values())


def test_the_other_snippets_run(own_names):
    query, key, value = (torch.randn(2, 4, 6, 8) for _ in range(3))
    logits = torch.randn(2, 6, 9, requires_grad=True)
    names = {"hiddenkey": hiddenkey, "model": make("llama").eval(), "loader": [batch("llama")], "task": logits.sum()}
    names |= {"q": query, "k": key, "v": value, "self": SimpleNamespace(training=True)}
    names |= {"logits": logits, "other_logits": logits + 1, "mask": torch.ones(2, 6).bool()}
    loop, functions, consistency = SNIPPETS[1:]
    assert run(loop, names)["loss"].total.grad_fn is not None
    assert run(functions, names)["out"].shape == query.shape
    assert names["loss"].requires_grad
    run(consistency, names)
    assert "logit-mse" in CONSISTENCIES.names()


def test_the_code_of_the_page_on_extending_runs(own_names):
    (code,) = re.findall(r"```python\n(.*?)```", EXTENDING, re.DOTALL)
    model = run(code, {"hiddenkey": hiddenkey, "model": make("llama")})["model"]
    with hiddenkey.attach(model, "attended[:]:pair@0.5 ~ logit-mse*0.5") as attachment:
        hiddenkey.consistency_step(model, batch("llama")).total.backward()
        assert 0.2 < attachment.position_rates()["attended"] < 0.8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    parsed = cli._parse(shlex.split(command)[1:])
    if hasattr(parsed, "recipe"):
        hiddenkey.parse(parsed.recipe)


def test_every_command_is_shown():
    assert {command.split()[1] for command in COMMANDS} == {"train", "plan", "doctor", "sweep", "report"}


def rows_under(heading):
    """The cells of the table whose first heading this is."""
    lines = README.split(f"| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_preset_is_what_stands_beside_it():
    compared, before = 0, ""
    for left, right, *_ in rows_under("preset"):
        presets, recipes = (re.findall(r"`([^`]*)`", cell) for cell in (left, right))
        if right.startswith("the same"):
            recipes = [f"{before} {recipes[0]}"]
        for preset in presets:
            hiddenkey.parse(preset.replace("@p", "@0.1"))
        if len(recipes) == len(presets) and "@p" in left:
            for pair in zip(presets, recipes, strict=True):
                first, second = (str(hiddenkey.parse(text.replace("@p", "@0.1"))) for text in pair)
                assert first == second
                compared += 1
        before = recipes[0] if recipes else before
    assert compared == 10


def test_the_names_of_the_axes_are_all_there_are():
    code = (  # in a process of its own, without the names that other tests register
        "import json, hiddenkey\n"
        "from hiddenkey.positions import POSITIONS as position\n"
        "from hiddenkey.patterns import PATTERNS as pattern\n"
        "from hiddenkey.compensations import COMPENSATIONS as compensation\n"
        "from hiddenkey.consistency import CONSISTENCIES as consistency\n"
        "axes = dict(position=position, pattern=pattern, compensation=compensation, consistency=consistency)\n"
        "print(json.dumps({axis: registry.names() for axis, registry in axes.items()}))"
    )
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    shown = {row[0]: re.findall(r"`([^`]*)`", row[1]) for row in rows_under("axis")}
    assert {axis: sorted(shown[axis]) for axis in found} == {axis: sorted(names) for axis, names in found.items()}


def test_the_counts_and_versions_are_those_of_the_rest():
    said = " ".join(README.split())
    supported = re.search(r"\| (\d+) \| supported \|", (ROOT / "docs/models.md").read_text())[1]
    assert f"{supported} of the 649 model types of transformers" in said
    needs = dict(re.findall(r'"(torch|transformers)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    assert f"torch {needs['torch']}, transformers {needs['transformers']} or newer" in said


PAGES = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    targets = re.findall(r"\]\((?!http|#|mailto)([^)#\s]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
