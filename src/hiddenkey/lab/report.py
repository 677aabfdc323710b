"""`hiddenkey report`: what your own runs say, against plain LoRA.

Of each method the trial with the best validation metric stands for a seed. Methods are compared with plain LoRA
(recipe `baseline`) on the same seeds and axes, seeds as the unit: differences over further axes are averaged for each
seed. The metric is that of the test part where all of these runs have one, else that of the validation part.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import pandas as pd
from markdown_it import MarkdownIt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import DamagedFileError, RunError
from .run_folder import RESULT, stored_result, write_text
from .statistics import Difference, holm, paired_difference

PLAIN_TEXT = {"text.parse_math": False, "text.usetex": False}
"""Settings of matplotlib."""
_MARKDOWN = re.compile(r"([\\`*_\[\]|$!~])")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def one_line(value: Any) -> str:
    """The text on one line: every run of white space and line breaks is one space."""
    return " ".join(str(value).split())


def markdown(value: Any) -> str:
    """The text as Markdown shows it literally, on one line."""
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKDOWN.sub(r"\\\1", text)


def markdown_table(frame: pd.DataFrame) -> str:
    """A table for a Markdown page; cells and headings are texts."""
    escaped = frame.astype(str).map(markdown).rename(columns=markdown)
    return escaped.to_markdown(index=False, disable_numparse=True)


def latex_table(frame: pd.DataFrame) -> str:
    """A booktabs table for LaTeX, without a caption; cells and headings are texts."""
    return frame.astype(str).map(one_line).rename(columns=one_line).to_latex(index=False, escape=True)


def csv_table(frame: pd.DataFrame) -> str:
    """A table as CSV, numbers with six places. A text that a spreadsheet would run as a formula is quoted by '."""
    texts = frame.round(6)
    for name in texts.select_dtypes(exclude="number"):
        texts[name] = texts[name].map(_csv_cell, na_action="ignore")
    return texts.to_csv(index=False, lineterminator="\n")


def _csv_cell(value: Any) -> str:
    text = one_line(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


SHARES = {"accuracy", "matthews", "f1", "pearson", "spearman", "token_accuracy", "bleu", "meteor", "rouge_l", "ter"}
"""Metrics that are shown in points, times 100."""
_OF_A_SWEEP = ("name", "method", "params", "axes", "trials")


def read_runs(folder: Path) -> pd.DataFrame:
    """One row for each `result.json` below the folder.

    Raises:
        RunError: there is none, or one is damaged.
    """
    try:
        rows = [_row(path) for path in sorted(folder.rglob(RESULT))]
    except DamagedFileError as error:
        raise RunError(f"{error}. Move it away, or make the run again.") from error
    if not rows:
        raise RunError(f"no {RESULT} below {folder}. Run `hiddenkey train` or `hiddenkey sweep` first.")
    return pd.DataFrame(rows)


def _row(path: Path) -> dict[str, Any]:
    found = stored_result(path)
    config, sweep, metric = found.config, found.sweep, found.metric
    missing = [name for name in _OF_A_SWEEP if name not in sweep]
    if sweep and missing:
        raise DamagedFileError(f"{path} is damaged: sweep: no {', '.join(missing)}")
    axes = {name: value for name, value in sweep.get("axes", {}).items() if name not in ("seed", "data_seed")}
    test = found.test.get("best") or found.test.get("last") or {}
    scale = 100.0 if metric in SHARES else 1.0
    return {
        "task": sweep.get("name") or f"{Path(config['data']).name} with {Path(config['model']).name}",
        "method": sweep.get("method") or config["recipe"],
        "recipe": found.recipe,
        "condition": ", ".join(f"{name} {value}" for name, value in sorted(axes.items())),
        "seed": seed_name(config),
        "tried": _tried(config["recipe"], sweep.get("params", {})),
        "trials": sweep.get("trials", 0),
        "status": found.status,
        "failure": found.failure,
        "metric": metric,
        "validation": _number(found.best.get(f"validation_{metric}")) * scale,
        "test": _number(test.get(metric)) * scale,
        "seconds": found.seconds,
        "folder": found.folder,
        "scale": scale,
        "sign": -1.0 if found.lower_is_better else 1.0,
    }


def _tried(recipe: str, params: dict[str, Any]) -> str:
    """The recipe as it was typed, and what else a trial varies: `baseline, learning_rate 0.001`."""
    return ", ".join([recipe, *(f"{name} {value}" for name, value in params.items() if str(value) not in recipe)])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def seed_name(config: dict[str, Any]) -> str:
    """`11`, or `11/3` where the seed of the data is another one."""
    seed, data_seed = config["seed"], config["data_seed"]
    return f"{seed}" if data_seed in (0, seed) else f"{seed}/{data_seed}"


ALPHA = 0.05
BASELINE = "baseline"
MARK = "<!-- written by hiddenkey report -->"
FILES = ("report.md", "report.html", "runs.csv", "forest.png")
GROUP = ["task", "method", "condition", "seed"]
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>hiddenkey report</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-size: 0.9em; display: block; overflow-x: auto; }}
th, td {{ text-align: left; padding: 0.3rem 0.8rem; border-bottom: 1px solid #ccc; vertical-align: top; }}
td:nth-child(2), td:nth-child(3) {{ white-space: nowrap; }}
img {{ max-width: 100%; }}
</style></head><body>
{body}</body></html>
"""


@dataclass(frozen=True)
class Comparison:
    """A method on one task against plain LoRA; means and difference in the unit that is shown."""

    method: str
    mean: float
    plain: float
    difference: Difference
    """Positive where the method is better; n is 0 where it shares no seed with plain LoRA."""
    p_holm: float = math.nan


@dataclass(frozen=True)
class TaskReport:
    """What was found on one task."""

    task: str
    metric: str
    """Its part and name, such as `test accuracy`."""
    digits: int
    compared: list[Comparison]
    """The best difference first."""
    chosen: pd.DataFrame
    """The run that stands for each method, seed and condition."""
    baseline: str | None
    """The method that is plain LoRA."""
    why_none: str = ""
    """Why there is no such method."""

    @property
    def known(self) -> list[Comparison]:
        """Those that share a seed with plain LoRA."""
        return [one for one in self.compared if one.difference.n]


def write_report(folder: str, out: str = "") -> tuple[Path, list[str]]:
    """Write report.md, report.html, runs.csv and forest.png, into `FOLDER/report` if `out` is empty.

    Returns the path of report.md and the verdict of each task.

    Raises:
        RunError: there are no runs, a record is damaged, or a file that no report wrote would be overwritten.
        OSError: something cannot be written.
    """
    runs = read_runs(Path(folder).expanduser())
    target = Path(out).expanduser() if out else Path(folder).expanduser() / "report"
    _refuse_files_of_others(target)
    target.mkdir(parents=True, exist_ok=True)
    tasks = [_compare(task, found) for task, found in runs.groupby("task", sort=False)]
    with rc_context(PLAIN_TEXT):
        figure = _forests(tasks)
        if figure is not None:
            figure.savefig(target / "forest.png", dpi=120)
    page = _page(folder, runs, tasks)
    write_text(target / "runs.csv", csv_table(runs.drop(columns=["sign", "scale"])))
    write_text(target / "report.md", page)
    write_text(target / "report.html", _html(page, target))
    return target / "report.md", [verdict(task) for task in tasks]


def _compare(task: str, runs: pd.DataFrame) -> TaskReport:
    if runs["metric"].nunique() > 1:
        names = ", ".join(sorted(runs["metric"].unique()))
        raise RunError(f"runs of {task!r} have different metrics: {names}. Give a folder that holds one of them.")
    finished = runs[(runs["status"] == "finished") & runs["validation"].notna()]
    best = (finished["validation"] * finished["sign"]).groupby([finished[name] for name in GROUP]).idxmax()
    chosen = runs.loc[sorted(best)]
    part = "test" if len(chosen) and chosen["test"].notna().all() else "validation"
    chosen = chosen.assign(value=chosen[part])
    plain = list(chosen[chosen["recipe"] == BASELINE]["method"].unique())
    baseline = BASELINE if BASELINE in plain else plain[0] if len(plain) == 1 else None
    why = f"Several methods are plain LoRA with other settings: {', '.join(plain)}. Call one of them baseline."
    why = why if plain else "No finished run of plain LoRA to compare with: add a method with the recipe baseline."
    values = {name: found.set_index(["seed", "condition"])["value"] for name, found in chosen.groupby("method")}
    reference = values.pop(baseline, pd.Series(dtype=float)) if baseline else pd.Series(dtype=float)
    compared = [_against(name, found, reference, runs["sign"].iloc[0]) for name, found in values.items()]
    adjusted = holm([one.difference.p for one in compared])
    compared = [replace(one, p_holm=p) for one, p in zip(compared, adjusted, strict=True)]
    compared.sort(key=lambda one: math.inf if one.difference.n == 0 else -one.difference.mean)
    digits = 1 if runs["scale"].iloc[0] == 100 else 3
    metric = f"{part} {runs['metric'].iloc[0].replace('_', ' ')}"
    return TaskReport(task, metric, digits, compared, chosen, baseline, "" if baseline else why)


def _against(method: str, values: pd.Series, reference: pd.Series, sign: float) -> Comparison:
    both = pd.DataFrame({"ours": values, "plain": reference}).dropna()
    if both.empty:
        return Comparison(method, math.nan, math.nan, Difference(0))
    by_seed = both.groupby(level="seed").mean()
    difference = paired_difference(list(sign * (by_seed["ours"] - by_seed["plain"])))
    return Comparison(method, by_seed["ours"].mean(), by_seed["plain"].mean(), difference)


def verdict(found: TaskReport) -> str:
    """One sentence: what beat plain LoRA, by how much and how surely."""
    if found.baseline is None:
        return markdown(found.why_none)
    if not found.known:
        return "No other method shares a finished seed with plain LoRA, so there is nothing to compare."
    surely = [one for one in found.known if one.p_holm <= ALPHA]
    better = [one for one in surely if one.difference.mean > 0]
    worse = [one for one in surely if one.difference.mean < 0]
    harm = f" Worse than plain LoRA: {', '.join(_in_numbers(found, one) for one in worse)}." if worse else ""
    if better:
        return f"Better than plain LoRA: {'; '.join(_in_numbers(found, one) for one in better)}.{harm}"
    best = _in_numbers(found, found.known[0])
    if max(one.difference.n for one in found.known) == 1:
        return f"**No verdict with one seed**; use five or more. The best was {best}.{harm}"
    return f"**Nothing beat plain LoRA** beyond chance; the best was {best}.{harm}"


def _in_numbers(found: TaskReport, one: Comparison) -> str:
    n = one.difference.n
    return (
        f"**{markdown(one.method)}**: {found.metric} {one.mean:.{found.digits}f}, plain LoRA "
        f"{one.plain:.{found.digits}f}, difference {one.difference.shown(found.digits)}, {n} seed{'s' * (n != 1)}"
    )


def forest(labels: Sequence[str], found: Sequence[Difference], title: str, axes: Axes | None = None) -> Axes:
    """Differences to 0 with their 95 % intervals, a row for each label."""
    if axes is None:
        axes = Figure(figsize=(7, 0.3 * len(labels) + 1.2), layout="constrained").subplots()
    axes.axvline(0, color="black", linewidth=1)
    for place, one in enumerate(found):
        axes.plot([one.low, one.high], [place, place], color="#0067a3", linewidth=2)
        axes.plot(one.mean, place, "o", color="#0067a3", markersize=6)
    axes.set_yticks(range(len(labels)), [shorten(one_line(label), 60) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(title)
    axes.grid(axis="x", linewidth=0.4)
    return axes


def _forests(tasks: Sequence[TaskReport]) -> Figure | None:
    shown = [one for one in tasks if one.known]
    if not shown:
        return None
    heights = [len(one.known) + 2 for one in shown]
    figure = Figure(figsize=(7, 0.35 * sum(heights) + 0.3), layout="constrained")
    grid = figure.subplots(len(shown), squeeze=False, height_ratios=heights)[:, 0]
    for axes, one in zip(grid, shown, strict=True):
        title = f"{one.metric}: difference to plain LoRA, right is better"
        forest([c.method for c in one.known], [c.difference for c in one.known], title, axes)
        axes.set_title(shorten(one_line(one.task), 80) if len(shown) > 1 else "")
    return figure


def _table(runs: pd.DataFrame, found: TaskReport) -> pd.DataFrame:
    """The methods of one task, those that are compared first."""
    rows = []
    for one in (*found.compared, *([Comparison(found.baseline, 0, 0, Difference(0))] if found.baseline else [])):
        own, chosen = (frame[frame["method"] == one.method] for frame in (runs, found.chosen))
        by_seed = chosen.groupby("seed")["value"].mean()
        sd = "" if len(by_seed) < 2 else f" ± {by_seed.std():.{found.digits}f}"
        picked = "; ".join(f"{name} ×{count}" for name, count in Counter(chosen["tried"]).most_common())
        rows.append(
            {
                "method": one.method,
                found.metric: f"{by_seed.mean():.{found.digits}f}{sd}",
                "difference [95 %]": one.difference.shown(found.digits),
                "p (Holm)": "-" if math.isnan(one.p_holm) else f"{one.p_holm:.2g}",
                "seeds": len(by_seed),
                "runs": len(own),
                "chosen by validation": picked,
            }
        )
    return pd.DataFrame(rows)


def _absent(runs: pd.DataFrame) -> Iterator[str]:
    """Failed and unfinished runs, and those that a sweep planned or another method has."""
    for run in runs[runs["status"] != "finished"].itertuples():
        why = f": {run.failure}" if run.failure else ""
        yield f"{run.status}: {run.method}, seed {run.seed}, {run.folder}{why}"
    counts = runs.groupby(GROUP).size()
    for (task, method), own in runs.groupby(["task", "method"], sort=False):
        planned = max(own["trials"].max(), 1)
        for condition, seed in runs[runs["task"] == task].groupby(["condition", "seed"], sort=False).groups:
            there = counts.get((task, method, condition, seed), 0)
            if there < planned:
                where = f"{task}, {condition}" if condition else task
                yield f"missing: {planned - there} of {planned} of {method}, seed {seed}, {where}"


def _page(folder: str, runs: pd.DataFrame, tasks: Sequence[TaskReport]) -> str:
    parts = [MARK, f"# Runs of {markdown(folder)}"]
    for found in tasks:
        own = runs[runs["task"] == found.task]
        size = f"{len(own)} runs, {own['method'].nunique()} methods, {own['seed'].nunique()} seeds."
        parts += [f"## {markdown(found.task)}", verdict(found), size, markdown_table(_table(own, found))]
    if any(found.known for found in tasks):
        parts.append("![Differences to plain LoRA with 95 % intervals](forest.png)")
    if lost := list(_absent(runs)):
        parts += ["## Failed and missing runs", "\n".join(f"- {markdown(one)}" for one in lost)]
    parts.append(
        "Of each method and seed the trial with the best validation metric. Differences are "
        "paired by seed and axes and averaged over axes; Student's 95 % intervals; Holm's correction over methods."
    )
    return "\n\n".join(parts) + "\n"


def _html(page: str, target: Path) -> str:
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(page.removeprefix(MARK))
    if 'src="forest.png"' in body:
        picture = base64.b64encode((target / "forest.png").read_bytes()).decode()
        body = body.replace('src="forest.png"', f'src="data:image/png;base64,{picture}"')
    return _PAGE.format(body=body)


def _refuse_files_of_others(target: Path) -> None:
    page = target / FILES[0]
    if page.is_file() and page.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        return
    others = [str(target / name) for name in FILES if (target / name).exists()]
    if others:
        raise RunError(
            f"{', '.join(others)} would be overwritten, which no report of hiddenkey wrote. Move it away, or give "
            "another folder with --out."
        )
