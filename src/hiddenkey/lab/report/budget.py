"""Equal time: what a method reaches while the baseline trains."""

from __future__ import annotations

import math
import statistics

from ..sweep.record import RunRecord
from .paper import BASELINE
from .pool import Pool, Pooled
from .statistics import Seed
from .study import Groups, Task


def step_seconds(groups: Groups) -> float | None:
    """The 20th percentile of the steps of the least disturbed run; None where none was timed.

    Runs are made side by side, so that most steps wait for others; what a step costs shows where it did not.
    """
    runs = [run for group in groups.values() for run in group.runs]
    return min((run.step_seconds["p20"] for run in runs if run.step_seconds.get("p20")), default=None)


def step_ratio(task: Task, method: str) -> float | None:
    """The method's step time over the baseline's."""
    own, plain = (step_seconds(task.methods.get(name, {})) for name in (method, BASELINE))
    return own / plain if own and plain else None


def within_budget(pool: Pool, method: str) -> tuple[float | None, Pooled, Pooled]:
    """Mean ratio of step times, and gains over the baseline's last epoch in the validation metric.

    First at the method's own last epoch, then at the one (to the nearest) that it reaches in the baseline's time.
    """
    ratios = [ratio for task in pool.tasks if (ratio := step_ratio(task, method)) is not None]
    whole = pool.over(lambda task: _gains(task, method, math.inf))
    budgeted = pool.over(lambda task: _gains(task, method, _steps(task, method)))
    return (statistics.fmean(ratios) if ratios else None), whole, budgeted


def _steps(task: Task, method: str) -> float | None:
    # As many as fit into the baseline's time, and half an epoch, so that the nearest epoch counts.
    ratio = step_ratio(task, method)
    runs = [run for group in task.methods.get(BASELINE, {}).values() for run in group.runs if run.epochs]
    if ratio is None or not runs:
        return None
    total, per_epoch = runs[0].epochs[-1]["step"], runs[0].epochs[0]["step"]
    return float(total) / ratio + per_epoch / 2


def _gains(task: Task, method: str, steps: float | None) -> dict[Seed, float] | None:
    if steps is None or method not in task.methods or BASELINE not in task.methods:
        return None
    shown = task.validation_metric
    sign = -shown.scale if shown.lower_is_better else shown.scale
    one, other = _at(task, method, steps), _at(task, BASELINE, math.inf)
    return {seed: sign * (one[seed] - other[seed]) for seed in sorted(one.keys() & other.keys())}


def _at(task: Task, method: str, steps: float) -> dict[Seed, float]:
    choose = min if task.validation_metric.lower_is_better else max
    found = {}
    for seed, group in task.methods[method].items():
        values = [value for run in group.runs if (value := _value(run, steps)) is not None]
        if values:
            found[seed] = choose(values)
    return found


def _value(run: RunRecord, steps: float) -> float | None:
    # One epoch for each run: the best of several would favour the side that has more of them.
    rows = [row for row in run.epochs if row["step"] <= steps]
    return rows[-1].get(f"validation_{run.metric}") if rows and run.status == "finished" else None
