"""The figures of the paper, drawn anew: 4 (rates), 5 (ranks), 6 (training), and the gains with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

from . import drawing, words
from .blocks import Block, Figure, Figures, Text
from .curves import Curve, Part, dynamics, level, rank_curves, rate_curves
from .machine import slug
from .metrics import metric
from .paper import BASELINE, HIDDENKEY, HIDDENKEY_MINUS, METHODS, RIVALS
from .pool import Pool, Pooled, against
from .study import Task
from .style import LAST

TRAINED = (BASELINE, "dropkey column", "hiddencut element", HIDDENKEY_MINUS, HIDDENKEY)
WHISKERS = "Mean and sd over seeds; differences are paired, so surer than the sd suggests."

BAND = (
    "Black line and grey band: the baseline, ± sd, of each seed the trial that validation chose, where a point is a "
    "single trial. In the validation figure the line is of the rows that chose it, which flatters it."
)


def gains(pool: Pool) -> list[Block]:
    """Every method's gain over the baseline."""
    names = [method for method in (*METHODS, *RIVALS) if method != BASELINE]
    found = [(method, pooled) for method, pooled, _ in against(pool, BASELINE, names) if pooled.values]
    if not found:
        return []
    rows = [
        (method, _where(pool, pooled), pooled.difference, pool.paper_gap(method, BASELINE))
        for method, pooled in found
    ]
    shown = [(method, where, change, printed) for method, where, change, printed in rows if change is not None]
    title = f"{_mean_of([task.label for task in pool.tasks])}: gain over the baseline ({pool.model})"
    alt = f"{title}, in points, with 95 % intervals. " + "; ".join(
        f"{method}{where} {words.difference(change)}" for method, where, change, _ in shown
    )
    svg = drawing.forest(shown, "points over the baseline")
    note = "The paper's gains are RoBERTa-large's, on the same tasks."
    return [Figures([Figure("gains", title, alt + ".", svg)], note)]


def _where(pool: Pool, pooled: Pooled) -> str:
    few, of = len(pooled.tasks), len(pool.tasks)
    named = f"{', '.join(pooled.tasks)} alone" if few < 3 else f"{few} of {of} tasks"
    return "" if few == of else f" ({named})"


def rates(pool: Pool, suffix: str = "") -> list[Block]:
    """Fig. 4: the mean over tasks, then each task."""
    found: list[Block] = []
    if len(pool.tasks) > 1:
        found += [_rate_pair(pool.tasks, f"rates{suffix}", long=False)]
    return found + [_rate_pair([task], f"rates-{slug(task.name)}", long=len(pool.tasks) > 1) for task in pool.tasks]


def ranks(pool: Pool, suffix: str = "") -> list[Block]:
    """Fig. 5: the tasks that have ranks."""
    tasks = [task for task in pool.tasks if _drawn(rank_curves([task], "best"))]
    if not tasks:
        found = [curve for task in pool.tasks for curve in rank_curves([task], "best")]
        return [Text(f"Metric against rank: {_why_none(found, 'ranks')}")]
    figures = [_rank_figure([task], f"ranks-{slug(task.name)}") for task in tasks]
    note = f"{WHISKERS}{_scaling(tasks)}" + "".join(
        _lost(rank_curves([task], "best"), "ranks", task.label) for task in tasks
    )
    if len(tasks) > 1 and _drawn(mean := rank_curves(tasks, "best")):
        return [
            Figures([_rank_figure(tasks, f"ranks{suffix}")], f"{WHISKERS}{_scaling(tasks)}{_lost(mean, 'ranks')}"),
            Figures(figures, note, title="Metric against rank, each task", long=True),
        ]
    return [Figures(figures, note)]


def training(tasks: Sequence[Task], long: bool = False) -> list[Block]:
    """Fig. 6: training loss and validation metric over the epochs, for the chosen trials; long: all folded."""
    found: list[Block] = []
    for place, task in enumerate(tasks):
        shown, figures = task.validation_metric, []
        parts = (
            ("train_loss", "training loss, without drops", metric("loss")),
            (f"validation_{shown.name}", f"validation {shown.label}", shown),
        )
        for column, label, kind in parts:
            curves = dynamics(task, TRAINED, column, kind.scale)
            if curves:
                title = f"{task.label}: {label}"
                svg = drawing.lines(curves, "epoch", label, band=True)
                alt = _alt(title, curves, kind.digits, ends=True)
                figures.append(Figure(f"training-{slug(task.name)}-{slug(column)}", title, alt, svg))
        if figures:
            found.append(
                Figures(
                    figures,
                    "Mean and sd over seeds, of the trials that validation chose.",
                    f"Training on {task.label}",
                    long=long or place > 0,
                )
            )
    return found or [Text(f"Training over epochs: {words.NOT_RUN}.")]


def _rate_pair(tasks: Sequence[Task], name: str, long: bool) -> Block:
    parts: tuple[Part, Part] = ("validation", "test")
    where, several, figures = _mean_of([task.label for task in tasks]), len(tasks) > 1, []
    for part in parts:
        curves, baseline = _drawn(rate_curves(tasks, part)), level(tasks, BASELINE, part)
        if curves:
            shown = tasks[0].metric if part == "test" else tasks[0].validation_metric
            title = f"{where}: {part} {'metric' if several else shown.label} against rate"
            first = f"Baseline {words.mean_sd(baseline, shown.digits)}. " if baseline else ""
            svg = drawing.families(curves, baseline, "drop rate", "points" if several else f"{part} {shown.label}")
            alt = f"{title}. {first}{_alt('', curves, shown.digits)}"
            figures.append(Figure(f"{name}-{part}", title, alt, svg))
    found = rate_curves(tasks, "validation")
    if not figures:
        return Text(f"{where}: metric against rate: {_why_none(found, 'rates')}")
    note = f"{WHISKERS} {BAND}{_lost(found, 'rates')}"
    return Figures(figures, note, f"{where}: metric against rate", long)


def _drawn(curves: Sequence[Curve]) -> list[Curve]:
    return [curve for curve in curves if curve.points]


def _lost(curves: Sequence[Curve], what: str, where: str = "") -> str:
    on = f" on {where}" if where else ""
    lost = words.seeds_of({curve.method: curve.lost for curve in curves})
    bare = words.listed(
        f"{', '.join(f'{x:g}' for x in curve.bare)} (`{curve.method}`)" for curve in curves if curve.bare
    )
    return (f" Seeds left out{on}, as they lack a result at some {what}: {lost}." if lost else "") + (
        f" {what.capitalize()} left out{on}, as no seed has a result there on every task: {bare}."
        if any(curve.bare for curve in curves)
        else ""
    )


def _why_none(curves: Sequence[Curve], what: str) -> str:
    return f"run, but no seed has all {what}.{_lost(curves, what)}" if curves else f"{words.NOT_RUN}."


def _scaling(tasks: Sequence[Task]) -> str:
    alphas = {run.config["lora_alpha"] for task in tasks for run in task.records}
    if len(alphas) > 1:
        return ""
    return f" lora_alpha is {alphas.pop():g} at every rank, so that the update's scale falls with the rank."


def _rank_figure(tasks: Sequence[Task], name: str) -> Figure:
    last = [Curve(LAST, curve.points) for curve in rank_curves(tasks, "last") if curve.method == BASELINE]
    curves = _drawn([*rank_curves(tasks, "best"), *last])
    title = f"{_mean_of([task.label for task in tasks])}: test metric against the rank of LoRA"
    svg = drawing.lines(
        curves, "rank of LoRA", "points" if len(tasks) > 1 else f"test {tasks[0].metric.label}", powers=True
    )
    return Figure(name, title, _alt(title, curves, tasks[0].metric.digits), svg)


def _alt(title: str, curves: Sequence[Curve], digits: int, ends: bool = False) -> str:
    parts = []
    for curve in curves:
        points = curve.points if not ends or len(curve.points) < 3 else (curve.points[0], curve.points[-1])
        parts.append(f"{curve.method}: " + ", ".join(f"{x:g}: {words.mean_sd(found, digits)}" for x, found in points))
    return (f"{title}. " if title else "") + "; ".join(parts) + "."


def _mean_of(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"Mean of {len(labels)} tasks"
