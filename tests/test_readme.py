"""What the README shows is true: its code runs, its commands parse, its links lead somewhere."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hiddenkey
from hiddenkey import cli
from hiddenkey.consistency import CONSISTENCIES
from hiddenkey.patterns import PATTERNS
from hiddenkey.positions import POSITIONS

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
        "import json, hiddenkey.positions as p, hiddenkey.patterns as q, hiddenkey.compensations as c\n"
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


def test_the_counts_and_versions_are_those_of_the_rest():
    said = " ".join(README.split())
    supported = re.search(r"\| (\d+) \| supported \|", (ROOT / "docs/models.md").read_text())[1]
    assert f"Tested on {supported} model types of transformers" in said
    kinds = re.search(r"(\d+) kinds of PEFT adapters", (ROOT / "CHANGELOG.md").read_text())[1]
    assert f"and on {kinds} kinds of PEFT adapters" in said
    needs = dict(re.findall(r'"(torch|transformers)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    assert f"torch {needs['torch']} or newer, transformers {needs['transformers']} or newer" in said
    turned = re.search(r"\| `baseline` \|.*?\(epoch (\d+)\)", (ROOT / "docs/demo/README.md").read_text())[1]
    assert f"LoRA's validation loss turns after epoch {turned} while" in said


def test_no_method_is_surely_better_and_a_step_takes_so_long():
    said = " ".join(README.split())
    methods = [row for row in rows_of("table1") if row["method"] != "baseline"]
    sure = [row for row in methods if float(row["gain_low"]) > 0 and float(row["p_holm"]) <= 0.05]
    assert (len(methods), sure) == (14, [])
    assert "None of the fourteen methods of the paper's Table 1" in said
    assert "is surely better than LoRA alone after correction for many comparisons" in said
    costs = [row for row in rows_of("cost") if row["method"] == "hiddenkey" and row["task"] in TASKS]
    ratios = [float(row["step_time_ratio"]) for row in costs]
    assert len(ratios) == len(TASKS)
    assert f"A step of `hiddenkey` took about {sum(ratios) / len(ratios):.1f} times as long" in said


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


TASKS = {"sst2": "SST-2", "cola": "CoLA", "stsb": "STS-B", "mrpc": "MRPC"}


def signed(value):
    return f"{float(value):+.2f}".replace("-", "\N{MINUS SIGN}")


def rows_of(table):
    with (ROOT / f"docs/results/{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def gain_of(row):
    return f"{signed(row['gain_mean'])} [{signed(row['gain_low'])}, {signed(row['gain_high'])}]"


def test_the_results_are_those_of_the_report():
    found = {row["method"]: row for row in rows_of("table1")}
    tasks = [{row["method"]: row for row in rows_of(f"task-{name}")} for name in TASKS]
    shown = re.findall(r"^\| `([\w:-]+)`(?: \(LoRA alone\))? \| (\d+\.\d\d ± .*) \|$", README, re.MULTILINE)
    assert len(shown) == 5
    for recipe, cells in shown:
        name = recipe.replace(":", " ")
        row, own = found[name], [task[name] for task in tasks]
        gain, paper = ("", "") if recipe == "baseline" else (gain_of(row), signed(row["paper_gain"]))
        wanted = [*(f"{float(one['mean']):.2f} ± {float(one['sd']):.2f}" for one in own), gain, row["n"], paper]
        assert [cell.strip() for cell in cells.split("|")] == wanted, recipe
        assert {one["n"] for one in own} == {row["n"]}


def test_what_is_said_of_each_task_is_what_the_report_found():
    said = " ".join(README.split())
    gains = {
        name: gain_of(next(row for row in rows_of(f"task-{name}") if row["method"] == "hiddenkey")) for name in TASKS
    }
    floor = "where all methods stay near the floor"
    told = f"SST-2 {gains['sst2']}; CoLA {gains['cola']}, {floor}; STS-B {gains['stsb']}; MRPC {gains['mrpc']}."
    assert f"By task, `hiddenkey` over LoRA alone, in points: {told}" in said
    columns = re.search(r"^\| recipe \| (.*) \| gain over LoRA alone, mean of four \[95 %\] \|", README, re.MULTILINE)
    assert [column.partition(",")[0] for column in columns[1].split(" | ")] == list(TASKS.values())


def test_what_is_said_of_runs_that_do_not_get_going_is_what_the_report_found():
    said = " ".join(README.split())
    runs = [row for row in rows_of("runs") if row["sweep"] == "stsb"]
    dropped = [row for row in runs if row["method"] in ("dropkey column", "hiddenkey-", "hiddenkey")]
    cut = [row for row in runs if row["method"] == "hiddencut element"]
    plain = [row for row in runs if row["method"] == "baseline" and "0.0005" in row["params"]]
    groups = (dropped, cut, plain)
    counts = [(sum(float(row["validation_best"]) < 50 for row in rows), len(rows)) for rows in groups]
    assert f"below 50 points in {counts[0][0]} of {counts[0][1]} runs of the three recipes that drop keys" in said
    assert counts[1] == (0, 15)
    alone = f"in {counts[2][0]} of {counts[2][1]} of LoRA alone at their learning rate"
    assert f"recipes that drop keys, in none of 15 of `hiddencut:element`, and {alone}" in said


def test_what_is_said_of_equal_settings_is_what_the_report_found():
    said = " ".join(README.split())
    row = next(row for row in rows_of("same-settings") if row["method"] == "hiddenkey")
    every = gain_of({name: row[f"all_{name}"] for name in ("gain_mean", "gain_low", "gain_high")})
    assert f"the same runs of `hiddenkey` lie {gain_of(row)} points in the mean of the four tasks" in said
    assert f"and the mean of its three rates {every}" in said
    assert row["pairs"] == row["all_pairs"] == "5"


def test_what_is_said_of_ranks_and_early_stopping_is_what_the_report_found():
    said = " ".join(README.split())
    claims = {row["claim"]: row for row in rows_of("claims")}
    rank, last = (next(row for claim, row in claims.items() if part in claim) for part in ("rank grows", "peak"))
    tried = {int(row["lora_r"]) for row in rows_of("conditions") if row["lora_r"]}
    ranks = f"ranks {min(tried)} to {max(tried)} with the same `lora_alpha`, {rank['pairs']} seeds"
    ranks += f"; rank 8 minus rank {max(tried)}: {gain_of(rank)} points"
    assert f"No sign was seen that LoRA overfits as its rank grows ({ranks}), nor that" in said
    assert f"stopping early helps it ({gain_of(last)})" in said
    assert all(float(row["gain_low"]) <= 0 for row in (rank, last))


ENDS, TURNED = ("mean", "low", "high"), ("mean", "high", "low")


def early_of(task):
    """In how many runs the best epoch came before the last, and of how many."""
    runs = [row for row in rows_of("runs") if row["sweep"] == task]
    return sum(row["validation_best"] != row["validation_last"] for row in runs), len(runs)


def test_what_is_said_of_texts_is_what_the_report_found():
    said = " ".join(README.split())
    e2e, webnlg = ({row["method"]: row for row in rows_of(f"generation-{name}")} for name in ("e2e", "webnlg"))

    def gain(row, metric, digits):
        shown = (f"{float(row[f'{metric}_gain_{name}']):+.{digits}f}" for name in ("mean", "low", "high"))
        return "{} [{}, {}]".format(*(value.replace("-", "\N{MINUS SIGN}") for value in shown))

    early, runs = early_of("e2e")
    assert f"the last of ten epochs was the best in {runs - early} of {runs} runs" in said
    assert f"`hiddenkey` minus LoRA alone {gain(e2e['hiddenkey'], 'bleu', 2)} BLEU" in said
    assert "the validation loss turned in {} of {} runs".format(*early_of("webnlg")) in said
    row, key = webnlg["hiddenkey-"], webnlg["dropkey column"]
    above, low, high = (f"{-float(row[f'nll_gain_{name}']):.3f}" for name in ("mean", "high", "low"))
    harm = f"{above} [{low}, {high}] above that of LoRA alone (p = {float(row['nll_p_holm']):.3f} corrected)"
    assert f"the test NLL of `hiddenkey-` lies {harm}" in said
    others = [webnlg[method] for method in ("hiddenkey", "hiddencut element")]
    means = " and ".join(f"{-float(one['nll_gain_mean']):.3f}" for one in others)
    sure = " and ".join(f"{float(one['nll_p_holm']):.3f}" for one in others)
    assert f"features {means} (p = {sure})" in said
    turned = {f"nll_gain_{name}": -float(key[f"nll_gain_{other}"]) for name, other in zip(ENDS, TURNED, strict=True)}
    assert f"that of `dropkey:column` {gain(turned, 'nll', 3)}" in said
    assert "**On generated texts nothing helped, and `hiddenkey-` did harm**" in said
    harmed = [
        (table is webnlg, method)
        for table in (e2e, webnlg)
        for method, one in table.items()
        if method != "baseline" and float(one["nll_gain_high"]) < 0 and float(one["nll_p_holm"]) <= 0.05
    ]
    assert harmed == [(True, "hiddenkey-")]
    tables = [row for table in (e2e, webnlg) for row in table.values() if row["method"] != "baseline"]
    assert all(float(row["bleu_gain_low"]) <= 0 for row in tables)
    assert all(not (float(row["nll_gain_low"]) > 0 and float(row["nll_p_holm"]) <= 0.05) for row in tables)


def test_what_is_said_of_the_nearest_rival_is_what_the_report_found():
    said, rivals = " ".join(README.split()), rows_of("rivals")
    nearest = max(rivals, key=lambda row: float(row["gain_mean"]))
    difference = gain_of({name: nearest[f"hiddenkey_{name}"] for name in ("gain_mean", "gain_low", "gain_high")})
    assert f"`{nearest['method']}` came closest ({gain_of(nearest)}; `hiddenkey` minus it: {difference})" in said
    assert len(rivals) == 7
    assert all(float(row["gain_low"]) <= 0 for row in rivals)
