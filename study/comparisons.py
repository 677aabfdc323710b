"""Differences between methods: by seed, averaged over tasks, and under fair comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import pandas as pd

from hiddenkey.lab.statistics import Difference, paired_difference

from .paper import BASELINE, gap_on
from .records import METRICS, Study, When, chosen, metric_of

NONE = pd.Series(dtype=float)


@dataclass(frozen=True)
class Pooled:
    """A difference that is the mean over tasks: for each seed one number."""

    tasks: tuple[str, ...]
    difference: Difference


def mean_over(parts: Iterable[pd.Series]) -> pd.Series:
    """Mean over several values for every seed that all of them have."""
    found = list(parts)
    return pd.concat(found, axis=1).dropna().mean(axis=1).sort_index() if found else NONE


def over_tasks(parts: Mapping[str, pd.Series]) -> Pooled:
    """Mean over the tasks that have any values, for the seeds that all of these have."""
    found = {task: values for task, values in parts.items() if len(values)}
    return Pooled(tuple(found), paired_difference(mean_over(found.values())))


def difference(
    study: Study,
    task: str,
    first: str,
    second: str,
    when: When = "best",
    second_when: When | None = None,
    name: str = "",
    condition: str | None = None,
) -> pd.Series:
    """First minus second by seed, in the test metric `name` (else the task's own); positive is better."""
    one = study.values(task, first, when, name, condition)
    other = study.values(task, second, second_when or when, name, condition)
    return metric_of(name or study.result_metric(task)).sign * (one - other).dropna()


def compare(study: Study, first: str, second: str, when: When = "best", second_when: When | None = None) -> Pooled:
    """First minus second, the mean over the pooled tasks that have both."""
    return over_tasks({task: difference(study, task, first, second, when, second_when) for task in study.pool})


def paper_gap(study: Study, tasks: Sequence[str], first: str, second: str) -> float | None:
    """How far the first lies above the second in the paper, on these tasks."""
    return gap_on([study.key(task) if study.paper_metric(task) else None for task in tasks], first, second)


def decline(study: Study, task: str, method: str, name: str = "") -> pd.Series:
    """Test metric of the chosen run's best epoch minus that of its last, by seed; positive: it declined."""
    name = name or study.result_metric(task)
    runs = chosen(study.of(task, method))
    best, last = (study.tested(runs, when, name).set_axis(runs["seed"]) for when in ("best", "last"))
    return metric_of(name).sign * (best - last).dropna()


def rank_conditions(study: Study, task: str, method: str) -> dict[int, str]:
    """The conditions that differ in the rank alone; the plain one is among them where its trials are the same."""
    runs = study.runs[(study.runs.task == task) & (study.runs.method == method)]
    tried = runs.groupby("condition")["params"].agg(frozenset)
    ranks = {int(name.removeprefix("lora_r ")): name for name in tried.index if name.startswith("lora_r ")}
    if ranks and "" in tried and all(tried[name] == tried[""] for name in ranks.values()):
        ranks.setdefault(runs[runs.condition == ""]["config"].iloc[0]["lora_r"], "")
    return dict(sorted(ranks.items()))


def rank_difference(study: Study, task: str) -> pd.Series:
    """The baseline at rank 8 minus the baseline at the largest rank, by seed."""
    ranks = rank_conditions(study, task, BASELINE)
    lacking = study.incomplete[(study.incomplete["task"] == task) & (study.incomplete["method"] == BASELINE)]
    if len(lacking):  # the largest rank may be what is missing
        return NONE
    if 8 not in ranks or max(ranks) == 8:
        return NONE
    one, other = (study.values(task, BASELINE, condition=ranks[rank]) for rank in (8, max(ranks)))
    return (one - other).dropna()


# The same settings: the trials of a method vary its rate, those of the baseline its settings, such as the learning
# rate. Each trial of a method is compared with the baseline's trial that has the same settings, untuned.


def over_same_settings(study: Study, method: str, chosen_trial: bool) -> Pooled:
    """A method over the baseline with its settings: of the trial that validation chose, or the mean of all trials."""
    return over_tasks({task: _same_settings(study, task, method, chosen_trial) for task in study.pool})


def _same_settings(study: Study, task: str, method: str, chosen_trial: bool) -> pd.Series:
    runs, plain = study.of(task, method), study.of(task, BASELINE)
    if runs.empty or plain.empty:
        return NONE
    names = study.tuned(task, BASELINE)
    name = study.result_metric(task)

    def settings(frame: pd.DataFrame) -> pd.DataFrame:
        keys = frame["config"].map(lambda config: json.dumps([config[name] for name in names]))
        return frame[["seed"]].assign(settings=keys, value=study.tested(frame, "best", name))

    ours = settings(chosen(runs) if chosen_trial else runs)
    both = ours.merge(settings(plain), on=["seed", "settings"], how="left", suffixes=("", "_plain"))
    both["difference"] = metric_of(name).sign * (both["value"] - both["value_plain"])
    return both.groupby("seed")["difference"].agg(lambda found: found.mean(skipna=False)).dropna()


# Equal time: runs are made side by side, so that most steps wait for others. What a step costs shows in the least
# disturbed run, by the 20th percentile of its steps; methods are compared where one kind of machine timed both on one
# day.


def step_seconds(study: Study, task: str, method: str) -> pd.Series:
    """Seconds of a step by device and day."""
    runs = study.of(task, method)
    return runs["step_seconds"].groupby([runs["device"], runs["started"].str.slice(0, 10)]).min().dropna()


def step_ratio(study: Study, task: str, method: str) -> float:
    """The method's step time over the baseline's, the median over machines and days; NaN where none timed both."""
    ratios = (step_seconds(study, task, method) / step_seconds(study, task, BASELINE)).dropna()
    return float(ratios.median())


def within_budget(study: Study, method: str) -> tuple[float, Pooled, Pooled]:
    """Mean ratio of step times, and gains over the baseline's last epoch in the validation metric.

    First at the method's own last epoch, then at the epoch (to the nearest) that it reaches in the baseline's time.
    Of each seed the trial that is best at that epoch, on both sides: the best of several epochs would favour the side
    that has more of them.
    """
    ratios = pd.Series({task: step_ratio(study, task, method) for task in study.pool}, dtype=float).dropna()
    whole = over_tasks({task: _gain_at(study, task, method, 0.0) for task in study.pool})
    timed = over_tasks({task: _gain_at(study, task, method, ratio) for task, ratio in ratios.items()})
    return float(ratios.mean()), whole, timed


def _gain_at(study: Study, task: str, method: str, ratio: float) -> pd.Series:
    """ratio: a step's time over the baseline's; 0: without a limit."""
    metric, found = METRICS[study.validation_metric(task)], {}
    ours = dict(list(study.of(task, method).groupby("seed")))
    for seed, runs in study.of(task, BASELINE).groupby("seed"):
        if seed not in ours:
            continue
        values = _at(study, task, runs, math.inf)
        best = (values * metric.sign).idxmax()
        epochs = runs.loc[best, "epochs"]
        # Half an epoch more, so that the nearest epoch counts.
        limit = epochs[-1]["step"] / ratio + epochs[0]["step"] / 2 if ratio else math.inf
        reached = _at(study, task, ours[seed], limit)
        if reached.notna().any():
            found[seed] = metric.scale * metric.sign * (reached[(reached * metric.sign).idxmax()] - values[best])
    return pd.Series(found, dtype=float)


def _at(study: Study, task: str, runs: pd.DataFrame, steps: float) -> pd.Series:
    """The validation metric that each finished run had after so many steps."""
    column = f"validation_{study.validation_metric(task)}"
    rows = runs["epochs"].map(lambda epochs: [row[column] for row in epochs if row["step"] <= steps])
    return rows[runs["status"] == "finished"].map(lambda found: found[-1] if found else math.nan).astype(float)


# Transfer: for each seed the trial that validation chose on one task, used on another.


def transfer(study: Study, method: str) -> tuple[int, int, Pooled, Pooled]:
    """Values chosen on another task: pairs of tasks with a value, pairs in all, and seeds without a value of these.

    Returns the pairs that have a value, the seeds of pairs that have none, what the transfer costs against the
    method's own choice, and what is left over the baseline that is tuned on the task itself.
    """
    tasks = [task for task in study.pool if method in study.methods(task)]
    found = {pair: _transferred(study, *pair, method) for pair in permutations(tasks, 2)}
    lost, gained = (
        over_tasks(
            {
                f"{source} to {target}": (values - study.values(target, reference)).dropna()
                for (source, target), values in found.items()
            }
        )
        for reference in (method, BASELINE)
    )
    missing = sum(int(values.isna().sum()) for values in found.values())
    return len(found), missing, lost, gained


def _transferred(study: Study, source: str, target: str, method: str) -> pd.Series:
    """Test metric on the target by seed; NaN where the chosen trial was not tried or has no result there."""
    here, there = chosen(study.of(source, method)).set_index("seed")["params"], study.of(target, method)
    values = study.tested(there, "best", study.result_metric(target))
    keyed = values.set_axis(pd.MultiIndex.from_frame(there[["seed", "params"]]))
    return pd.Series({seed: keyed.get((seed, params), math.nan) for seed, params in here.items()}, dtype=float)
