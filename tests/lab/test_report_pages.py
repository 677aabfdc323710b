"""The written report: the same bytes twice, numbers that are right, pages that hold together."""

from __future__ import annotations

import csv
import re
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

from hiddenkey.cli import main
from hiddenkey.lab.errors import RunError
from hiddenkey.lab.report import generation, headline, how, rivals, small_tables, table1, words, write
from hiddenkey.lab.report.blocks import Figures, Report, Section, Table, Text
from hiddenkey.lab.report.claims import CLAIMS, verdict
from hiddenkey.lab.report.files import latex_text, markdown_text
from hiddenkey.lab.report.page import page_text
from hiddenkey.lab.report.pool import Finding, pools
from hiddenkey.lab.report.statistics import Difference
from hiddenkey.lab.report.study import make_task
from hiddenkey.lab.report.svg import render, settings
from hiddenkey.lab.report.task_table import about_task, task_table
from hiddenkey.lab.report.write import write_report

from .made_up import World, make_records, write_records

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "results" / "study"
VOID = {"meta", "link", "br", "img", "hr", "path", "use", "rect"}
NAMES = ("baseline", "hiddencut element", "dropkey column", "hiddenkey-", "hiddenkey", "lora_dropout", "<script>|x")
EFFECTS = {"hiddenkey": 0.02, "dropkey column": -0.02}
SEVERAL = World(methods=("baseline", "hiddenkey"), seeds=(1, 2, 3))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    failing = (("hiddenkey", 2, 1), *(("dropkey column", trial, 2) for trial in range(3)))
    worlds = (
        World(methods=NAMES, effects=EFFECTS, rank_effects={4: 0.0, 64: -0.02}, failing=failing),
        World(task="cola", metric="matthews", level=0.4, methods=NAMES, effects=EFFECTS),
        World(task="e2e", metric="nll", kind="causal-lm", methods=("baseline", "hiddenkey"), model="SmolLM2-135M"),
    )
    for place, world in enumerate(worlds):
        write_records(make_records(world, place), folder / world.task)
    return folder


@pytest.fixture(scope="module")
def docs(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs")
    write_report([str(study)], str(out))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(docs: Path, name: str) -> list[dict[str, str]]:
    with (docs / "results" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """What the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.uses: list[str] = []
        self.svgs: list[dict[str, str | None]] = []
        self.widths: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.append(found["id"])
        self.uses += re.findall(r"#([\w-]+)", " ".join(value or "" for name, value in attrs if name != "style"))
        if tag == "svg":
            self.svgs.append(found)
        if tag == "tr":
            self.widths.append(0)
        if tag in ("td", "th"):
            self.widths[-1] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_same_runs_give_the_same_bytes(study: Path, docs: Path, tmp_path: Path):
    write_report([str(study / "sst2"), str(study / "e2e"), str(study / "cola")], str(tmp_path))
    again = contents(tmp_path)
    assert again == contents(docs)
    assert len(again) > 30


def test_a_report_deletes_what_an_earlier_one_wrote_and_nothing_else(study: Path, tmp_path: Path):
    (tmp_path / "results").mkdir()
    (tmp_path / "outside.csv").write_text("mine")
    for name in ("mine.csv", "mine.tex", "mine.svg"):
        (tmp_path / "results" / name).write_text("mine")
    write_report([str(study)], str(tmp_path))
    first = contents(tmp_path / "results")
    with (tmp_path / "results" / "manifest.txt").open("a") as file:
        file.write("../outside.csv\n")
    write_report([str(study / "e2e")], str(tmp_path))
    second = contents(tmp_path / "results")
    assert "task-sst2.csv" in first
    assert "task-sst2.csv" not in second
    assert {name for name in second if second[name] == b"mine"} == {"mine.csv", "mine.tex", "mine.svg"}
    assert (tmp_path / "outside.csv").exists()


@pytest.mark.parametrize("mine", ("results.md", "results.html", "results/table1.csv", "results/manifest.txt.csv"))
def test_a_report_overwrites_nothing_that_none_wrote(study: Path, tmp_path: Path, mine: str):
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text("mine")
    fits = mine == "results/manifest.txt.csv"  # a name that no report has
    with nullcontext() if fits else pytest.raises(RunError, match=f"{mine} would be overwritten, which no report"):
        write_report([str(study / "e2e"), str(study / "sst2")], str(tmp_path))
    assert (tmp_path / mine).read_text() == "mine"
    assert (tmp_path / "results" / "manifest.txt").exists() == fits


def test_a_report_that_was_killed_is_written_again(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[Path] = []

    def ended(path: Path, text: str) -> None:
        if len(written) > 9:
            raise KeyboardInterrupt
        path.write_text(text)
        written.append(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(write, "write_text", ended)
        write_report([str(study)], str(tmp_path))
    assert len(written) == 10
    write_report([str(study)], str(tmp_path))
    assert (tmp_path / "results.md").exists()


def test_table_1_says_what_the_records_say(study: Path, docs: Path):
    gains = []
    for place, (task, metric) in enumerate((("sst2", "accuracy"), ("cola", "matthews"))):
        level = 0.85 if task == "sst2" else 0.4
        world = World(task=task, metric=metric, level=level, methods=NAMES, effects=EFFECTS)
        if task == "sst2":
            world = World(methods=NAMES, effects=EFFECTS, rank_effects={4: 0.0, 64: -0.02})
        records = [record for record in make_records(world, place) if "lora_r" not in record.axes]

        def result(method, seed, records=records, metric=metric):
            trials = [one for one in records if one.method == method and one.axes["seed"] == seed]
            return 100 * max(trials, key=lambda one: one.best[f"validation_{metric}"]).test["best"][metric]

        gains.append([result("hiddenkey-", seed) - result("baseline", seed) for seed in (1, 2, 3, 4, 5)])
    expected = np.mean(gains, axis=0)
    row = next(row for row in rows_of(docs, "table1") if row["method"] == "hiddenkey-")
    assert float(row["gain_mean"]) == pytest.approx(expected.mean(), abs=1e-5)
    assert float(row["gain_sd"]) == pytest.approx(expected.std(ddof=1), abs=1e-5)
    assert row["pairs"] == "5"
    text = (docs / "results.md").read_text()
    assert f"| `hiddenkey-` | {expected.mean():+.2f} [".replace("-0", "\N{MINUS SIGN}0") in text.replace(
        "`hiddenkey\N{MINUS SIGN}", "`hiddenkey-"
    )


def test_the_first_lines_answer(docs: Path):
    text = (docs / "results.md").read_text()
    top = text[: text.index("## Claims")]
    assert "**HiddenKey helps.**" in top
    assert re.search(r"\*\*\+[12]\.\d\d \[\+\d\.\d\d, \+\d\.\d\d\] points\*\* \(95 % interval, n = 5 seeds, p ", top)
    assert "The paper reports +1.42 points as the mean of its four tasks, +1.20 as that of the tasks run here" in top
    assert re.search(r"- By task: SST-2 \+[12]\.\d\d \[.*\], CoLA \+[12]\.\d\d \[", top)
    texts = "Generated texts, E2E with SmolLM2-135M: `hiddenkey` over LoRA alone"
    assert re.search(texts + r" .*\] in BLEU and .*\] in NLL, n = 5; positive is better", top)
    assert "times the baseline's, roughly (SST-2 and CoLA; timed on shared cores)." in top


def test_on_the_papers_own_tasks_its_gain_stands_once(tmp_path: Path):
    worlds = [replace(SEVERAL, task=task) for task in ("rte", "mrpc", "sst2")]
    worlds.append(replace(SEVERAL, task="stsb", metric="pearson", kind="regression"))
    records = [replace(one, id=f"{one.sweep}-{one.id}") for world in worlds for one in make_records(world)]
    assert "The paper reports +1.42 points as the mean of its four tasks, with RoBERTa" in told(
        tmp_path / "study", records, tmp_path
    )


def test_texts_alone_are_told_of(tmp_path: Path):
    world = World(task="e2e", metric="nll", kind="causal-lm", methods=("baseline", "hiddenkey"), seeds=(1, 2))
    text = told(tmp_path / "study", make_records(world), tmp_path)
    assert "- Generated texts, E2E with all-MiniLM-L6-v2: `hiddenkey` over LoRA alone" in text


MAIN = next(claim for claim in CLAIMS if claim.main)


@pytest.mark.parametrize(
    ("low", "high", "adjusted", "said"),
    [
        (0.9, 2.0, 0.01, "HiddenKey helps."),
        (-2.0, -0.9, 0.01, "HiddenKey does harm here."),
        (
            -0.8,
            -0.1,
            0.3,
            "HiddenKey does not help here, and seems to do harm, but not surely after correction for all claims.",
        ),
        (-0.3, 0.4, 0.9, "HiddenKey does not help here, or little: a gain of 0.5 points is ruled out."),
        (0.1, 2.0, 0.3, "HiddenKey seems to help, but not surely after correction for all claims."),
        (-0.2, 2.0, 0.9, "Whether HiddenKey helps is undecided."),
        (None, None, None, "Whether HiddenKey helps is undecided: 1 seed cannot tell."),
    ],
)
def test_every_answer_of_the_first_line(low, high, adjusted, said):
    one, mean = low is None, 1.0 if low is None or low + high > 0 else -1.0
    change = Difference(1 if one else 5, mean, None if one else 0.5, low, high, p=adjusted)
    finding = Finding(MAIN, False, ("SST-2",), change, adjusted, verdict(MAIN, change, adjusted), "")
    assert headline._verdict(finding, change) == said


def test_two_seeds_cannot_tell_however_alike_they_are():
    change = Difference(2, 0.4, 0.0, 0.4, 0.4, p=0.0)
    finding = Finding(MAIN, False, ("SST-2",), change, 0.0, verdict(MAIN, change, 0.0), "")
    assert headline._verdict(finding, change) == "Whether HiddenKey helps is undecided: 2 seeds cannot tell."


def test_fewer_seeds_than_the_most_are_named_in_every_cell():
    """RTE with three seeds, SST-2 with two of them: so has the average."""
    rte = make_task("rte", make_records(replace(SEVERAL, task="rte")))
    sst2 = make_task("sst2", make_records(replace(SEVERAL, seeds=(1, 2))))
    table = table1.overview(pools([rte, sst2])[0], ("baseline", "hiddenkey"), "t", "T")
    assert "n = 3 seeds unless a cell says otherwise" in table.note
    for row in table.rows:
        average, of_rte, of_sst2 = row[-3:]
        assert (average.endswith("(n = 2)"), "(n" in of_rte, of_sst2.endswith("(n = 2)")) == (True, False, True)


def test_the_papers_gap_is_that_of_the_tasks_with_a_result():
    """Every run of HiddenKey on RTE failed."""
    failing = [("hiddenkey", trial, seed) for trial in range(3) for seed in SEVERAL.seeds]
    rte = make_task("rte", make_records(replace(SEVERAL, task="rte", failing=failing)))
    pool = pools([rte, make_task("sst2", make_records(SEVERAL))])[0]
    assert pool.compare("hiddenkey", "baseline").tasks == ("SST-2",)
    assert pool.paper_gap("hiddenkey", "baseline") == pytest.approx(96.44 - 95.99)


def test_what_was_never_timed_together_was_run_all_the_same(tmp_path: Path):
    later = [
        replace(one, started="2026-11-25T15:20:11Z") if one.method == "hiddenkey" else one
        for one in make_records(SEVERAL)
    ]
    text = told(tmp_path / "study", later, tmp_path)
    assert "`hiddenkey` at the baseline's training time: never timed on one day and one kind of machine." in text
    assert "A step of `hiddenkey` over one of the baseline: never timed on one day and one kind of machine." in text
    [row] = [row for row in rivals.equal_time(pools([make_task("sst2", later)])[0]).rows if row[0] == "`hiddenkey`"]
    assert row[3] == "never timed on one day and one kind of machine"


def test_a_task_is_headed_with_the_model_it_shows():
    """Of two models on an axis the first condition is the main one, whatever the ids of the runs."""
    runs = []
    for place, model in enumerate(("bert-base", "FacebookAI/roberta-base")):
        for one in make_records(SEVERAL):
            config, axes = one.config | {"model": model}, one.axes | {"model": model}
            runs.append(
                replace(one, id=f"{place}-{one.id}", config=config, axes=axes, data_rows={"train": place + 5})
            )
    task = make_task("sst2", runs)
    assert task.main == (("model", "FacebookAI/roberta-base"),)
    assert (task.model, about_task(task)) == ("roberta-base", "roberta-base, 6 train rows")


def test_a_task_that_is_judged_by_its_loss_has_its_table(tmp_path: Path):
    records = [
        replace(one, metric="loss", lower_is_better=True) for one in make_records(replace(SEVERAL, metric="loss"))
    ]
    text = told(tmp_path / "study", records, tmp_path)
    assert "No classification or regression task with a metric in points was run" in text
    assert "[CSV](results/task-sst2.csv)" in text


def test_two_models_have_tables_of_their_own(tmp_path: Path):
    for place, model in enumerate(("models/one", "models/two")):
        world = replace(SEVERAL, task=f"sst2-{place}", model=model, effects={"hiddenkey": 0.02 * place})
        write_records(make_records(world), tmp_path / "study" / world.task)
    write_report([str(tmp_path / "study")], str(tmp_path))
    first, other = (
        next(float(row["gain_mean"]) for row in rows_of(tmp_path, name) if row["method"] == "hiddenkey")
        for name in ("table1", "table1-two")
    )
    assert other - first == pytest.approx(2.0, abs=0.5)
    ids = re.findall(r' id="([^"]+)"', (tmp_path / "results.html").read_text())
    assert len(ids) == len(set(ids))


def test_names_that_are_one_to_a_file_are_refused(tmp_path: Path):
    for name in ("sst2 500", "sst2-500"):
        write_records(make_records(replace(SEVERAL, task=name)), tmp_path / "study" / name)
    with pytest.raises(RunError, match=r"would be written as .*task-sst2-500"):
        write_report([str(tmp_path / "study")], str(tmp_path))


def test_a_method_that_was_not_run_on_all_tasks_has_no_average():
    records = {
        "sst2": make_records(SEVERAL),
        "rte": make_records(replace(SEVERAL, task="rte", level=0.6, methods=("baseline",))),
    }
    pool = pools([make_task(name, runs) for name, runs in records.items()])[0]
    both, one = (pool.averages(method) for method in ("baseline", "hiddenkey"))
    assert one == {}
    for seed, value in both.items():
        assert value == pytest.approx(sum(task.values("baseline")[seed] for task in pool.tasks) / 2)
    rows = {row[0]: row for row in table1.overview(pool, ("baseline", "hiddenkey"), "t", "T").rows}
    assert any("not run on all" in cell for cell in rows["`hiddenkey`"])
    mean = sum(both.values()) / 3
    assert rows["`baseline`"][-3].startswith(f"{mean:.2f} ± {np.std(list(both.values()), ddof=1):.2f}")


def test_every_run_is_counted(docs: Path):
    runs = rows_of(docs, "runs")
    assert len(runs) == 3 * 5 * (7 + 7 + 2 + 2 * 2)
    assert sum(row["status"] == "failed" for row in runs) == 4
    text = (docs / "results.md").read_text()
    assert "300 runs, 4 of them failed" in text
    assert "loss is nan at step 3" in text
    assert "all trials failed" in text
    task = {row["method"]: row for row in rows_of(docs, "task-sst2")}
    assert (task["dropkey column"]["failed"], task["dropkey column"]["n"]) == ("3", "4")
    assert (task["hiddenkey"]["failed"], task["hiddenkey"]["n"]) == ("1", "5")


def test_what_was_not_run_is_said(docs: Path):
    claims = {row["claim"]: row["verdict"] for row in rows_of(docs, "claims")}
    assert claims["the JS loss has no effect"] == "not run"
    assert claims["hiddenkey beats LoRA alone"] == "replicated"
    text = (docs / "results.md").read_text()
    assert "Table 3, WebNLG: not run." in text
    assert "Table 5: RTE and MRPC on a decoder-only model: not run." in text
    assert re.search(r"\| `neftune`[^|]*\| not run \|", text)


def test_tables_2_and_4_have_the_papers_numbers_beside_ours(docs: Path):
    text = (docs / "results.md").read_text()
    blank = f" {words.NOTHING} |" * 5
    assert f"| paper, GPT2-Medium: `hiddenkey` |{blank} 69.76 | 8.765 | 46.80 | 71.78 | 2.511 |" in text
    assert "69.91 ± 0.52 (+1.95)" in text
    assert "91.16 for `hiddenkey-input`" in text


@pytest.mark.parametrize(("metric", "shown"), [("matthews", True), ("accuracy", False)])
def test_the_papers_numbers_stand_beside_its_own_metric_alone(metric, shown):
    world = World(task="cola", metric=metric, methods=("baseline", "hiddenkey"), seeds=(1, 2))
    table = small_tables.blocks([make_task("cola", make_records(world))])[0]
    row = dict(zip(table.headings, table.rows[1], strict=True))
    assert row["metric"] == {"matthews": "Matthews", "accuracy": "accuracy"}[metric]
    assert row["paper, RoBERTa-large (gain)"] == ("69.91 ± 0.52 (+1.95)" if shown else words.NOTHING)
    assert ("The paper's numbers of CoLA are of another metric" in table.note) is not shown


@pytest.mark.parametrize(("metric", "shown"), [("accuracy", True), ("f1", False)])
def test_so_they_do_in_the_table_of_a_task(metric, shown):
    world = World(task="mrpc", metric=metric, methods=("baseline", "hiddenkey"), seeds=(1, 2))
    table = task_table(make_task("mrpc", make_records(world)))
    assert table.rows[1][-1] == ("91.20 (+1.25)" if shown else words.NOTHING)
    assert ("another metric (accuracy) than F1" in table.note) is not shown


def told(study: Path, records, out: Path) -> str:
    return write_report([str(write_records(records, study))], str(out)).read_text()


def test_unequal_numbers_of_trials_are_not_called_equal(tmp_path: Path):
    records = make_records(World(methods=("baseline", "hiddenkey"), seeds=(1, 2, 3)))
    fewer = [one for one in records if one.trial == 0 or one.method != "baseline"]
    alike, unlike = (told(tmp_path / name, runs, tmp_path) for name, runs in (("all", records), ("few", fewer)))
    assert "both tuned with the same number of trials" in alike
    values = "other values of `learning_rate` for `baseline`, of `p` for `hiddenkey`"
    assert f"Every method, the baseline included, had the same number of trials ({values})." in alike
    assert "same number of trials (`hiddenkey` over `p`, LoRA alone over `learning_rate`)" in alike
    assert "the same number of trials" not in unlike
    assert "different numbers of trials (other values of `p` for `hiddenkey`), which favours" in unlike
    assert "tuned with different numbers of trials (SST-2: 3 against 1)" in unlike
    assert "The methods had different numbers of trials" in unlike


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"test": "dev"}, how.CUT),
        ({"test": "validation"}, how.CUT),
        ({"test": "data/devset.csv"}, how.FOUND),
        ({"test": "validation_mismatched"}, how.FOUND),
        ({"test": "test"}, how.FOUND),
        ({"test": "developers"}, how.FOUND),
        ({}, how.FOUND),
        ({"test": "dev", "validation": "held.csv"}, "the validation part that was asked for (`held.csv`)"),
    ],
)
def test_where_the_validation_rows_are_from_is_read_off_the_runs(given, said):
    records = make_records(World(methods=("baseline",), seeds=(1,)))
    task = make_task("sst2", [replace(one, config=one.config | given) for one in records])
    assert f"the trial and the epoch were chosen on {said}." in how.how([task]).text


def test_tasks_that_differ_in_it_are_told_apart():
    world = World(methods=("baseline",), seeds=(1,))
    records = [replace(one, config=one.config | {"test": "dev"}, test={}) for one in make_records(world)]
    tasks = [make_task("sst2", records), make_task("e2e", make_records(replace(world, task="e2e")))]
    text = how.how(tasks).text
    assert f"chosen on {how.CUT} (SST-2) and {how.FOUND} (E2E)." in text
    assert "The test part, which SST-2 lacked, was looked at once" in text


def test_equally_good_trials_are_counted():
    def with_validation(one, value):
        row = one.best | {f"validation_{one.metric}": value}
        return replace(one, best=row, last=row, epochs=[row])

    values = {1: (0.8, 0.8, 0.7), 2: (0.7, 0.7, 0.8), 3: (0.8, 0.8, 0.8)}
    records = [with_validation(one, values[one.axes["seed"]][one.trial]) for one in make_records(SEVERAL)]
    tied = "Where trials were equally good in validation (4 of 6 choices on SST-2) the first in the file counts."
    without = make_task("rte", make_records(replace(SEVERAL, task="rte")))
    assert tied in how.how([make_task("sst2", records), without]).text
    assert "equally good" not in how.how([make_task("sst2", [one for one in records if one.axes["seed"] == 2])]).text


def test_notes_beside_the_runs_stand_in_the_report(tmp_path: Path):
    records = make_records(SEVERAL)
    (tmp_path / "notes.md").write_text("- `hiddenkey` came *last*.\n\n- A machine broke.\n")
    assert "\n- `hiddenkey` came *last*.\n- A machine broke.\n" in told(tmp_path, records, tmp_path / "docs")
    assert "<li><code>hiddenkey</code> came <em>last</em>.</li>" in (tmp_path / "docs/results.html").read_text()


def test_notes_that_are_no_list_are_refused(tmp_path: Path):
    (tmp_path / "notes.md").write_text("- One.\n# Two\n")
    with pytest.raises(RunError, match=r"notes.md: '# Two' is no item of a list"):
        told(tmp_path, make_records(SEVERAL), tmp_path / "docs")


def test_rates_drawn_by_chance_make_no_curve_and_that_is_said(tmp_path: Path):
    drawn = [
        replace(one, params={"p": one.params["p"] + one.axes["seed"] / 100}) if "p" in one.params else one
        for one in make_records(SEVERAL)
    ]
    text = told(tmp_path / "study", drawn, tmp_path)
    why = (
        "run, but no seed has all rates. Seeds left out, as they lack a result at some rates: 1, 2, 3 (`hiddenkey`)."
    )
    assert f"SST-2: metric against rate: {why}" in text


def test_seeds_that_lack_a_point_of_a_curve_are_named(tmp_path: Path):
    world = replace(SEVERAL, failing=(("hiddenkey", 1, 2),), rank_effects={4: 0.0, 64: 0.0})
    records = [one for one in make_records(world) if one.axes != {"seed": 3, "lora_r": 64}]
    text = told(tmp_path / "study", records, tmp_path)
    assert "Seeds left out, as they lack a result at some rates: 2 (`hiddenkey`)." in text
    assert "Seeds left out on SST-2, as they lack a result at some ranks: 3 (`baseline`), 3 (`hiddenkey-`)." in text


def test_tasks_without_a_seed_in_common_were_run_all_the_same(tmp_path: Path):
    records = [*make_records(SEVERAL), *make_records(replace(SEVERAL, task="rte", seeds=(4, 5)))]
    renamed = [replace(one, id=f"{one.sweep}-{one.id}") for one in records]
    text = told(tmp_path / "study", renamed, tmp_path)
    assert "`hiddenkey` against LoRA alone: run, but no seed with a result on both sides." in text
    row = next(line for line in text.splitlines() if line.startswith("| `hiddenkey` | "))
    assert row.startswith("| `hiddenkey` | run, but no seed with a result on both sides | ")
    assert "| run, but no seed with a result on both sides | 8" in row
    assert "as a task or a side has no result of them: 1, 2, 3, 4, 5 (`hiddenkey`)." in text
    claims = {row["claim"]: row["verdict"] for row in rows_of(tmp_path, "claims")}
    assert claims["hiddenkey beats LoRA alone"] == "undecided"
    assert claims["the JS loss has no effect"] == "not run"


def test_a_method_and_a_baseline_of_other_seeds_were_run_all_the_same(tmp_path: Path):
    records = [one for one in make_records(SEVERAL) if (one.method == "baseline") == (one.axes["seed"] == 1)]
    text = told(tmp_path / "study", records, tmp_path)
    assert "`hiddenkey` against LoRA alone: run, but no seed with a result on both sides." in text
    row = {row["method"]: row for row in rows_of(tmp_path, "task-sst2")}["hiddenkey"]
    assert (row["n"], row["pairs"]) == ("2", "0")
    assert "run, but no seed with a result on both sides" in (tmp_path / "results" / "task-sst2.tex").read_text()


def test_a_method_whose_trials_all_failed_was_run(tmp_path: Path):
    failing = [("hiddenkey", trial, seed) for trial in range(3) for seed in SEVERAL.seeds]
    text = told(tmp_path / "study", make_records(replace(SEVERAL, failing=failing)), tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| `hiddenkey` | "))
    assert row.endswith("| run, no result |")


def test_webnlg_has_its_three_parts():
    world = World(task="gpt2-webnlg", metric="nll", kind="causal-lm", methods=("baseline", "hiddenkey"), seeds=(1, 2))
    records = [
        replace(one, test={"best": one.test["best"] | {"bleu_seen": 0.6, "ter_unseen": 0.4}})
        for one in make_records(world)
    ]
    table = generation.blocks([make_task(world.task, records)])[1]
    assert list(table.headings[6:10]) == ["BLEU, all", "METEOR, all", "TER, all", "NLL, all"]
    row = dict(zip(table.headings, table.rows[0], strict=True))
    assert (row["BLEU, seen"], row["TER, unseen"]) == ("60.00 ± 0.00", "40.00 ± 0.00")
    paper = dict(zip(table.headings, table.rows[-1], strict=True))
    assert (paper["BLEU, all"], paper["BLEU, seen"], paper["TER, unseen"]) == ("55.27", "62.49", "45.20")


def test_what_chose_the_texts_is_compared_too():
    """By hand: BLEU and NLL of the trial with the lowest validation NLL, seed by seed."""
    world = World(task="e2e", metric="nll", kind="causal-lm", methods=("baseline", "hiddenkey"), seeds=(1, 2, 3))
    records = make_records(world)

    def result(method, seed, metric):
        trials = [one for one in records if one.method == method and one.axes["seed"] == seed]
        return min(trials, key=lambda one: one.best["validation_nll"]).test["best"][metric]

    table = next(block for block in generation.blocks([make_task("e2e", records)]) if isinstance(block, Table))
    assert table.headings[1:6] == ["gain in BLEU [95 %]", "p (Holm)", "gain in NLL [95 %]", "p (Holm)", "n"]
    assert "NLL: lower is better. Trial and epoch were chosen by the NLL of the validation part" in table.note
    row = table.data[1]
    for metric, sign in (("bleu", 100), ("nll", -1)):
        gains = [sign * (result("hiddenkey", seed, metric) - result("baseline", seed, metric)) for seed in (1, 2, 3)]
        assert row[f"{metric}_gain_mean"] == pytest.approx(np.mean(gains), abs=1e-5)
        assert row[f"{metric}_pairs"] == 3
    values = [100 * result("hiddenkey", seed, "bleu") for seed in (1, 2, 3)]
    assert (row["n"], row["all_bleu"]) == (3, pytest.approx(np.mean(values), abs=1e-5))
    assert row["all_bleu_sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)


def test_seeds_that_a_table_of_texts_lacks_are_named():
    world = World(task="e2e", metric="nll", kind="causal-lm", methods=("baseline", "hiddenkey"), seeds=(1, 2, 3))
    records = [one for one in make_records(world) if (one.method, one.axes["seed"]) != ("hiddenkey", 2)]
    note = next(block.note for block in generation.blocks([make_task("e2e", records)]) if isinstance(block, Table))
    assert "as a task or a side has no result of them: 2 (`hiddenkey`)." in note


def test_whether_there_was_overfitting_in_texts_is_told():
    """The lowest validation NLL is of the second of three epochs in one run of two, whose test NLL then rises."""

    def bent(one, values, test):
        epochs = [{"epoch": float(i), "step": i * 8, "validation_nll": nll} for i, nll in enumerate(values, 1)]
        best = min(epochs, key=lambda row: row["validation_nll"])
        return replace(one, epochs=epochs, best=best, last=epochs[-1], test=test)

    world = World(task="e2e", metric="nll", kind="causal-lm", methods=("baseline",), seeds=(1, 2))
    first, second = (one for one in make_records(world) if one.trial == 0)
    records = [
        bent(first, (3.0, 2.0, 2.5), {"best": {"nll": 2.2, "bleu": 0.1}, "last": {"nll": 2.4}}),
        bent(second, (3.0, 2.0, 1.5), {"best": {"nll": 1.6, "bleu": 0.1}, "last": {"nll": 1.6}}),
    ]
    found = generation.blocks([make_task("e2e", records)])
    text = next(block.text for block in found if isinstance(block, Text))
    assert text.startswith("E2E: in 1 of 2 runs the best epoch came before the last one.")
    assert "The chosen runs of LoRA alone lose +0.100 [" in text
    assert text.endswith(" in test NLL from their best epoch to their last, n = 2.")
    assert any(isinstance(block, Figures) and block.long for block in found)


def test_every_run_has_the_number_that_the_tables_are_of(docs: Path):
    runs = rows_of(docs, "runs")
    assert {(row["sweep"], row["result_metric"]) for row in runs} == {
        ("sst2", "accuracy"),
        ("cola", "matthews"),
        ("e2e", "bleu"),
    }
    table = {row["method"]: row for row in rows_of(docs, "generation-e2e")}
    for method in ("baseline", "hiddenkey"):
        of = [row for row in runs if (row["sweep"], row["method"]) == ("e2e", method)]
        seeds = {row["axes"] for row in of}
        best = [
            min((r for r in of if r["axes"] == seed), key=lambda r: float(r["validation_best"])) for seed in seeds
        ]
        assert np.mean([float(row["result"]) for row in best]) == pytest.approx(float(table[method]["all_bleu"]))


def test_the_page_needs_no_network_and_holds_together(docs: Path):
    text = (docs / "results.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.uses) <= set(page.ids)
    addresses = set(re.findall(r'(?:src|href)="([^"#]+)', text))
    assert all((docs / address).is_file() for address in addresses - {"data:,"}), addresses
    assert not re.search(r"@import|url\((?!#)", text)
    assert "<script" not in text
    assert "&lt;script&gt;|x" in text
    assert all(len(svg["aria-label"] or "") > 40 for svg in page.svgs)
    assert len(page.svgs) >= 12
    assert "prefers-color-scheme: dark" in text
    assert "#0067a3" not in text.partition("</style>")[2], "a colour that the dark page cannot change"


def test_the_rows_of_every_table_are_as_long_as_its_head(docs: Path):
    text = (docs / "results.html").read_text()
    for table in re.findall(r"<table>.*?</table>", text, flags=re.DOTALL):
        assert len(set(Page(table).widths)) == 1
    for block in re.findall(r"(?:^\|.*\|$\n?)+", (docs / "results.md").read_text(), flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}) == 1


def test_the_markdown_links_to_what_is_there(docs: Path):
    links = re.findall(r"\]\(([^)#]+)\)", (docs / "results.md").read_text())
    assert len(links) > 20
    assert all((docs / link).is_file() for link in links)


def test_figures_name_what_they_draw(docs: Path):
    svg = (docs / "results" / "gains.svg").read_text()
    assert "<text" in svg
    assert "hiddencut element" in svg
    drawing = "".join(re.findall(r"<[^>]*>", svg))
    assert re.search(r"\d\.\d{2}", drawing)
    assert not re.search(r"\d\.\d{3,}", drawing)
    assert "2026" not in svg


def test_numbers_in_labels_stay_as_they_are():
    canvas = Canvas()
    axes = canvas.add_subplot()
    axes.plot([0.0123456, 1], [0, 1], label="lr 0.0005")
    axes.set_xticks([0.025, 0.075])
    axes.legend()
    with settings():
        text = " ".join(re.findall(r">([^<]+)<", render(canvas)))
    assert "lr 0.0005" in text
    assert "0.025" in text
    assert "0.075" in text


def test_latex_escapes_what_latex_reads():
    table = Table("t", "T", ("method", "gain [95 %]"), [["`lora_dropout` & 5 %", "\N{MINUS SIGN}0.1 ± 0.2"]], [])
    assert r"\texttt{lora\_dropout} \& 5 \% & $-$0.1 $\pm$ 0.2 \\" in latex_text(table)


def test_inline_markdown_cannot_carry_html():
    report = Report("t", [Section("s", [Text("`a` **b** <img src=x onerror=y>")])])
    text = page_text(report, "results")
    assert "<code>a</code> <strong>b</strong> &lt;img" in text
    assert "# t" in markdown_text(report, "results.html", "results")


def test_the_command_says_where_the_report_is(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_records(make_records(World(methods=("baseline",), seeds=(1,))), tmp_path / "study")
    main(["report", str(tmp_path / "study"), "--out", str(tmp_path / "docs")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "docs" / "results.md")
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "`hiddenkey` against LoRA alone: not run." in text


@pytest.mark.parametrize("begun", [["hiddenkey"], ["baseline", "hiddenkey"]])
def test_the_report_of_a_sweep_that_runs_says_what_is_left_out(begun: list[str], tmp_path: Path):
    records = [replace(one, trials=3) for one in make_records(World(methods=("baseline", "hiddenkey"), seeds=(1, 2)))]
    write_records([one for one in records if one.trial < 2 or one.method not in begun], tmp_path / "study")
    text = write_report([str(tmp_path / "study")], str(tmp_path / "docs")).read_text()
    assert "`hiddenkey` against LoRA alone: not run." in text
    assert f"left out for want of runs of some trials: {2 * len(begun)} pairs of method and seed" in text
    assert "`hiddenkey` \N{MULTIPLICATION SIGN}2." in text


@pytest.mark.parametrize(("arguments", "said"), [(["EMPTY"], "runs/*.json"), ([], "folder")])
def test_nothing_to_report_is_a_mistake_with_a_message(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", *(str(tmp_path) for _ in arguments)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_text_among_the_trials_is_no_emphasis():
    assert words.parameters({"p": 0.05, "how": "kl*1.0 ~ *"}) == "p 0.05 how `kl*1.0 ~ *`"
    assert words.parameters({"scheduler": "cosine", "seen": True}) == "scheduler cosine seen True"


def test_the_committed_report_is_that_of_the_committed_runs(tmp_path: Path):
    if not list(STUDY.rglob("runs/*.json")):
        pytest.skip("results/study holds no runs yet")
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    other = [name for name in ("numpy", "scipy", "matplotlib") if version(name) != pinned[name]]
    if other:
        pytest.skip(f"{', '.join(other)} of other versions than the report was written with")
    write_report([str(STUDY)], str(tmp_path))
    written = contents(tmp_path)
    committed = {name: (ROOT / "docs" / name).read_bytes() for name in written if (ROOT / "docs" / name).is_file()}
    assert sorted(committed) == sorted(written)
    differing = [name for name in written if written[name] != committed[name]]
    assert not differing, "hiddenkey report results/study --out docs"
