"""The figures of the paper, drawn anew: 4 (rates), 5 (ranks), 6 (training), and the gains with their intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hiddenkey.lab.report import PLAIN_TEXT, forest

from .comparisons import compare, mean_over, paper_gap, rank_conditions
from .paper import BASELINE, METHODS, PATTERNS, RIVALS
from .records import METRICS, Study, When, chosen, metric_of

Part = Literal["validation", "test"]
PARTS: tuple[Part, ...] = ("validation", "test")
LINES_OF_EPOCHS: tuple[tuple[When, str], ...] = (("best", "-"), ("last", ":"))

_LOOK = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9}
_FAMILY = {
    "baseline": "black",
    "dropkey": "#0067a3",
    "hiddencut": "#8a5c00",
    "dropattention": "#c2410c",
    "hiddenkey": "#00765a",
    "rivals": "#8a3f9e",
}
TRAINED = (BASELINE, "dropkey column", "hiddencut element", "hiddenkey-", "hiddenkey")
_LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (1, 3)), "v"))


def draw_figures(study: Study, folder: Path) -> dict[str, str]:
    """Write all figures that have something to show; the title of each by the name of its file."""
    found = {}
    for name, title, draw in (
        ("gains.png", "Gain over the baseline in points, mean over tasks, with 95 % intervals", _gains),
        ("rates.png", "Metric against drop rate, of methods that were run on all tasks (Fig. 4)", _rates),
        ("patterns.png", "Test metric against drop rate, pattern by pattern (Fig. 4)", _patterns),
        ("ranks.png", "Test metric against the rank of LoRA (Fig. 5)", _ranks),
        ("training.png", "Training loss and validation metric of the chosen trials (Fig. 6)", _training),
    ):
        with rc_context(PLAIN_TEXT | _LOOK):
            figure = draw(study)
            if figure is not None:
                figure.savefig(folder / name, dpi=90, metadata={"Software": None})
                found[name] = title
    return found


def _gains(study: Study) -> Figure | None:
    names = [name for name in (*METHODS, *RIVALS) if name != BASELINE]
    pooled = {name: compare(study, name, BASELINE) for name in names}
    shown = {name: found for name, found in pooled.items() if found.difference.n}
    if not shown:
        return None
    few = {name: len(found.tasks) < len(study.pool) for name, found in shown.items()}
    labels = [name + (f" ({', '.join(map(study.label, shown[name].tasks))})" if few[name] else "") for name in shown]
    printed = [paper_gap(study, found.tasks, name, BASELINE) for name, found in shown.items()]
    axes = forest(labels, [found.difference for found in shown.values()], "points over the baseline")
    points = [(gap, place) for place, gap in enumerate(printed) if gap is not None]
    axes.plot(*zip(*points, strict=True), "D", color="grey", markerfacecolor="none", label="paper, same tasks")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return axes.figure  # type: ignore[return-value]


def _at_rates(study: Study, task: str, method: str, part: Part) -> pd.DataFrame:
    """Seeds × rates, of the trial that validation chose at each rate; seeds that lack a rate are left out."""
    runs = study.of(task, method)
    rates = runs["params"].map(lambda params: json.loads(params).get("p"))
    found = {
        rate: _metric(study, task, chosen(runs[rates == rate]), part) for rate in sorted(rates.dropna().unique())
    }
    return pd.DataFrame(found).dropna()


def _metric(study: Study, task: str, runs: pd.DataFrame, part: Part) -> pd.Series:
    if part == "test":
        return study.tested(runs, "best", study.result_metric(task)).set_axis(runs["seed"])
    return (runs["validation_best"] * METRICS[study.validation_metric(task)].scale).set_axis(runs["seed"])


def _rates(study: Study) -> Figure | None:
    methods = [
        name for name in study.compared if all(not _at_rates(study, task, name, "test").empty for task in study.pool)
    ]
    if not methods:
        return None
    groups = {f"mean of {len(study.pool)} tasks": study.pool} if len(study.pool) > 1 else {}
    groups |= {study.label(task): [task] for task in study.pool}
    figure = Figure(figsize=(8, 2 * len(groups) + 0.6), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False, sharex=True)
    for row, (label, tasks) in zip(grid, groups.items(), strict=True):
        for axes, part in zip(row, PARTS, strict=True):
            plain = mean_over([_metric(study, task, chosen(study.of(task, BASELINE)), part) for task in tasks])
            axes.axhline(plain.mean(), color="black", linewidth=1)
            axes.axhspan(plain.mean() - plain.std(), plain.mean() + plain.std(), color="grey", alpha=0.2, linewidth=0)
            for method in methods:
                frames = [_at_rates(study, task, method, part) for task in tasks]
                _line(axes, method, sum(frames[1:], frames[0]).dropna() / len(frames))
            axes.set_title(f"{label}, {part}", fontsize=9)
        row[0].set_ylabel("points")
    for axes in grid[-1]:
        axes.set_xlabel("drop rate")
    _legend(figure, grid[0][0])
    return figure


def _patterns(study: Study) -> Figure | None:
    """The task with most methods, a panel for each family."""
    if not study.pool:
        return None
    task = max(study.pool, key=lambda name: len(study.methods(name)))
    families: dict[str, list[str]] = {}
    for method in study.methods(task):
        if not _at_rates(study, task, method, "test").empty:
            families.setdefault(_family(method), []).append(method)
    if not families:
        return None
    rows = -(-len(families) // 2)
    figure = Figure(figsize=(8, 2.7 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(families) :]:
        axes.set_axis_off()
    plain = study.values(task, BASELINE)
    for axes, (_, methods) in zip(grid.flat, families.items(), strict=False):
        axes.axhline(plain.mean(), color="black", linewidth=1)
        axes.axhspan(plain.mean() - plain.std(), plain.mean() + plain.std(), color="grey", alpha=0.2, linewidth=0)
        for method in methods:
            _line(axes, method, _at_rates(study, task, method, "test"))
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axes.tick_params(labelbottom=True)
    figure.supxlabel("drop rate", fontsize=9)
    figure.supylabel(f"{study.label(task)}, test {metric_of(study.result_metric(task)).label}", fontsize=9)
    return figure


def _ranks(study: Study) -> Figure | None:
    ranks = {task: rank_conditions(study, task, BASELINE) for task in study.pool}
    ranks = {task: found for task, found in ranks.items() if len(found) > 1}
    if not ranks:
        return None
    figure = Figure(figsize=(5, 3 * len(ranks)), layout="constrained")
    for axes, (task, found) in zip(figure.subplots(len(ranks), squeeze=False)[:, 0], ranks.items(), strict=True):
        for when, line in LINES_OF_EPOCHS:
            values = pd.DataFrame(
                {rank: study.values(task, BASELINE, when, condition=name) for rank, name in found.items()}
            ).dropna()
            axes.errorbar(
                list(values), values.mean(), values.std(), fmt="o", linestyle=line, color="black", elinewidth=0.8,
                label=f"baseline, {when} epoch",
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(found), [str(rank) for rank in found])
        axes.set_xlabel("rank of LoRA, lora_alpha constant")
        axes.set_ylabel(f"{study.label(task)}, test {metric_of(study.result_metric(task)).label}")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def _training(study: Study) -> Figure:
    figure = Figure(figsize=(8, 2 * len(study.tasks) + 0.6), layout="constrained")
    grid = figure.subplots(len(study.tasks), 2, squeeze=False)
    for row, task in zip(grid, study.tasks, strict=True):
        name = study.validation_metric(task)
        for axes, (column, label, scale) in zip(
            row,
            (
                ("train_loss", "training loss, without drops", 1.0),
                (f"validation_{name}", f"validation {METRICS[name].label}", METRICS[name].scale),
            ),
            strict=True,
        ):
            for method in (method for method in TRAINED if method in study.methods(task)):
                epochs = chosen(study.of(task, method))["epochs"]
                curves = [
                    pd.Series({row["epoch"]: row.get(column) for row in found}, dtype=float) for found in epochs
                ]
                # As far as all seeds got.
                _line(axes, method, pd.DataFrame(curves).dropna(axis="columns") * scale, band=True)
            axes.set_title(f"{study.label(task)}: {label}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    _legend(figure, grid[0][0])
    return figure


def _line(axes: Axes, method: str, values: pd.DataFrame, band: bool = False) -> None:
    """Mean over rows, with their sd as whiskers or as a band."""
    line, mark = _style(method)
    colour = _FAMILY[_family(method)]
    x, mean, sd = list(values), values.mean(), values.std().fillna(0)
    axes.plot(x, mean, color=colour, linestyle=line, marker=mark, markersize=4, linewidth=1.4, label=method)
    if band:
        axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.1, linewidth=0)
    else:
        axes.errorbar(x, mean, sd, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), fontsize=8)


def _family(method: str) -> str:
    first = method.split(" ")[0]
    return "hiddenkey" if method.startswith("hiddenkey") else first if first in _FAMILY else "rivals"


def _style(method: str) -> tuple[str | tuple[int, tuple[int, int]], str]:
    own = [name for name in (*METHODS, *RIVALS) if _family(name) == _family(method)]
    pattern = method.rpartition(" ")[2]
    place = PATTERNS.index(pattern) if pattern in PATTERNS else own.index(method) if method in own else 0
    return _LINES[place % len(_LINES)]
