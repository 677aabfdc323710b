"""The baseline with a method's own settings: how much of a gain, or of a loss, is the baseline's tuning.

The trials of a method vary its rate, those of the baseline its settings, such as the learning rate. Here each trial
of a method is compared with the baseline's one trial that has the same settings: the trial that validation chose,
which is how the paper compares (its baseline has no grid), and the mean of all trials, where nothing is chosen on
either side.
"""

from __future__ import annotations

import statistics

from ..config import complete
from ..sweep.record import RunRecord
from . import machine, words
from .blocks import Block, Table, Text
from .cells import gain_cells
from .paper import BASELINE, HIDDENKEY, METHODS, RIVALS
from .pool import Pool, Pooled
from .statistics import Seed, holm
from .study import Task, tested

NOTE = (
    "Test metrics in points, mean over tasks, paired over seeds: each trial of a method minus the baseline's one "
    "trial that has the same settings in what the baseline's trials vary. The chosen trial: of a method's trials the "
    "one that validation chose, against a baseline without a choice; this favours the method, and is how the paper "
    "compares. All trials: their mean, so that neither side has a choice. Holm's correction over the methods, for "
    "either apart."
)


def blocks(pool: Pool) -> list[Block]:
    """What becomes of HiddenKey, and the table; nothing where the baseline had one trial."""
    if not any(BASELINE in task.methods and task.tuned(BASELINE) for task in pool.tasks):
        return []
    return [_in_words(pool), table(pool)]


def table(pool: Pool) -> Table:
    """Every method over the baseline with its settings."""
    names = [method for method in (*METHODS, *RIVALS) if method != BASELINE and method in pool.methods]
    found = [[compare(pool, method, chosen) for method in names] for chosen in (True, False)]
    adjusted = [holm([one.difference.p if one.difference else None for one in side]) for side in found]
    rows, data = [], []
    for method, best, every, best_p, every_p in zip(names, *found, *adjusted, strict=True):
        rows.append([f"`{method}`", *gain_cells(pool, best, best_p), *gain_cells(pool, every, every_p)])
        ours = {f"all_{name}": value for name, value in machine.gain(every.difference, every_p).items()}
        data.append({"method": method, "tasks": " ".join(best.tasks)} | machine.gain(best.difference, best_p) | ours)
    headings = ("method", "chosen trial [95 %]", "n", "p (Holm)", "all trials [95 %]", "n", "p (Holm)")
    lost = {f"{method}, all trials": every.lost for method, every in zip(names, found[1], strict=True)}
    note = f"{NOTE} {words.left_out(lost)}".rstrip()
    return Table("same-settings", "Over the baseline with the same settings", headings, rows, data, note, long=True)


def compare(pool: Pool, method: str, chosen: bool) -> Pooled:
    """Over the baseline with the same settings; of the trial that validation chose, or the mean of all."""
    both = pool.with_both(method, BASELINE)
    pooled = pool.over(lambda task: over_same(task, method, chosen) if task in both else None)
    return pooled.among(pool.seeds(method, BASELINE))


def over_same(task: Task, method: str, chosen: bool) -> dict[Seed, float]:
    """By seed; seeds where a trial failed, or the baseline has none with its settings, are left out."""
    found = {}
    for seed, group in task.methods[method].items():
        best = group.chosen("best")
        runs = list(group.runs) if not chosen else [best] if best else []
        differences = [_over_partner(task, run, seed) for run in runs]
        known = [value for value in differences if value is not None]
        if known and len(known) == len(runs):
            found[seed] = statistics.fmean(known)
    return dict(sorted(found.items()))


def _over_partner(task: Task, run: RunRecord, seed: Seed) -> float | None:
    names = task.tuned(BASELINE)
    group = task.methods[BASELINE].get(seed)
    wanted = _settings(run, names)
    other = next((one for one in group.runs if _settings(one, names) == wanted), None) if group else None
    value, base = tested(run, "best", task.metric), tested(other, "best", task.metric)
    if value is None or base is None:
        return None
    return base - value if task.metric.lower_is_better else value - base


def _settings(run: RunRecord, names: tuple[str, ...]) -> list[str]:
    given = complete(run.config) | run.params
    return [str(given.get(name)) for name in names]


def _in_words(pool: Pool) -> Text:
    best, every = (compare(pool, HIDDENKEY, chosen) for chosen in (True, False))
    if best.difference is None or every.difference is None:
        nothing = "no trial of either with a result on the same seed" if best.run else words.NOT_RUN
        return Text(f"`{HIDDENKEY}` over LoRA alone with the same settings: {nothing}.")
    return Text(
        f"Over LoRA alone with the same settings, untuned as in the paper, `{HIDDENKEY}` lies "
        f"{words.difference(best.difference)} points with the trial that validation chose, and "
        f"{words.difference(every.difference)} in the mean of its trials; n = {best.difference.n}."
    )
