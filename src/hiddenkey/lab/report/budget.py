"""Equal time: what a method reaches while the baseline trains."""

from __future__ import annotations

import math
import statistics
from operator import itemgetter

from ..sweep.record import RunRecord
from .paper import BASELINE
from .pool import Pool, Pooled
from .statistics import Seed
from .study import Group, Groups, Task

Place = tuple[str, str]
"""The processor's name and the day; records of earlier versions have no name."""


def step_seconds(groups: Groups) -> dict[Place, float]:
    """The 20th percentile of the steps of the least disturbed run, for each machine and day.

    Runs are made side by side, so that most steps wait for others; what a step costs shows where it did not.
    """
    found: dict[Place, float] = {}
    for run in (run for group in groups.values() for run in group.runs):
        if seconds := run.step_seconds.get("p20"):
            place = (run.versions.get("device", ""), run.started.partition("T")[0])
            found[place] = min(seconds, found.get(place, math.inf))
    return found


def step_ratio(task: Task, method: str) -> float | None:
    """The method's step time over the baseline's, the median over the machines and days that timed both.

    None where none did: a sweep that goes on elsewhere, or on another day, may find a faster machine.
    """
    own, plain = (step_seconds(task.methods.get(name, {})) for name in (method, BASELINE))
    ratios = [own[place] / plain[place] for place in own.keys() & plain.keys()]
    return statistics.median(ratios) if ratios else None


def within_budget(pool: Pool, method: str) -> tuple[float | None, Pooled, Pooled]:
    """Mean ratio of step times, and gains over the baseline's last epoch in the validation metric.

    First at the method's own last epoch, then at the one (to the nearest) that it reaches in the baseline's time.
    """
    ratios = [ratio for task in pool.tasks if (ratio := step_ratio(task, method)) is not None]
    seen = pool.seeds(method, BASELINE)
    whole = pool.over(lambda task: _gains(task, method, 0.0)).among(seen)
    budgeted = pool.over(lambda task: _gains(task, method, step_ratio(task, method))).among(seen)
    return (statistics.fmean(ratios) if ratios else None), whole, budgeted


def _gains(task: Task, method: str, ratio: float | None) -> dict[Seed, float] | None:
    """ratio: a step's time over the baseline's; 0: without a limit."""
    if ratio is None or method not in task.methods or BASELINE not in task.methods:
        return None
    shown = task.validation_metric
    sign = -shown.scale if shown.lower_is_better else shown.scale
    found = {}
    for seed, group in task.methods[BASELINE].items():
        base = _best(task, group, math.inf)
        if base is None or seed not in task.methods[method]:
            continue
        value, run = base
        other = _best(task, task.methods[method][seed], _steps(run, ratio))
        if other is not None:
            found[seed] = sign * (other[0] - value)
    return dict(sorted(found.items()))


def _steps(base: RunRecord, ratio: float) -> float:
    # As many as fit into the baseline's time, and half an epoch, so that the nearest epoch counts.
    total, per_epoch = base.epochs[-1]["step"], base.epochs[0]["step"]
    return float(total) / ratio + per_epoch / 2 if ratio else math.inf


def _best(task: Task, group: Group, steps: float) -> tuple[float, RunRecord] | None:
    """The best of a group's runs by what they had reached after so many steps."""
    values = [(value, run) for run in group.runs if (value := _value(run, steps)) is not None]
    choose = min if task.validation_metric.lower_is_better else max
    return choose(values, key=itemgetter(0)) if values else None


def _value(run: RunRecord, steps: float) -> float | None:
    # One epoch for each run: the best of several would favour the side that has more of them.
    rows = [row for row in run.epochs if row["step"] <= steps]
    return rows[-1].get(f"validation_{run.metric}") if rows and run.status == "finished" else None
