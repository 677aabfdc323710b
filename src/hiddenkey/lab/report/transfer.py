"""Values chosen on one task, used on another: what is left of a gain without tuning on the task itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from . import machine, words
from .blocks import Table, Text
from .paper import BASELINE, HIDDENKEY, METHODS, RIVALS
from .pool import Pool, Pooled
from .statistics import Seed, average, holm
from .study import Task, tested

NOTE = (
    "Test metrics in points, mean over all ordered pairs of tasks, paired over seeds: for each seed the trial "
    "that validation chose on the one task is used on the other. The baseline is tuned on each task itself. "
    "Pairs: those with a value, of those where there was something to choose among; a seed that one of them lacks is "
    "in no mean. Left out: seeds of pairs of tasks without a value, counted; a run that failed there has no test "
    "metric and is not in the means, so those of a method that fails are better than it is."
)
FAILED = "failed there"
ABSENT = "no whole set of trials"
UNTRIED = "not tried there"
UNCHOSEN = "nothing to choose"
UNTESTED = "no test result there"


@dataclass(frozen=True)
class Transfer:
    """One method from one task to another."""

    values: dict[Seed, float]
    """Test metric on the target, by seed, of the trial that was chosen on the source."""
    left_out: tuple[str, ...]
    """Why, for every other seed of either."""


Pairs = list[tuple[Task, Transfer]]
"""Of one method, the ordered pairs of tasks with something to choose among: the target, and what came of it."""


def transfer_table(pool: Pool) -> Table:
    """Own choice, another task's choice, and the difference, as means over all ordered pairs of tasks."""
    pairs_of = {method: _pairs(pool, method) for method in (*METHODS, *RIVALS) if method in pool.methods}
    found = [
        (method, pairs, _over(pairs, method), _over(pairs, BASELINE)) for method, pairs in pairs_of.items() if pairs
    ]
    adjusted = holm(
        [gained.difference.p if gained.difference and name != BASELINE else None for name, *_, gained in found]
    )
    rows, data = [], []
    for (method, pairs, lost, gained), p in zip(found, adjusted, strict=True):
        gain = None if method == BASELINE else gained.difference
        over_tuned = words.paired(gain, len(lost.values), nothing=gained.nothing)
        cost, missing = lost.difference, left_out(pairs)
        used = sum(bool(pair.values) for _, pair in pairs)
        rows.append(
            [
                f"`{method}`",
                words.difference(cost, nothing=lost.nothing),
                words.NOTHING if method == BASELINE else over_tuned,
                str(len(lost.values)),
                f"{used} of {len(pairs)}",
                words.p_value(p),
                words.counted(missing),
            ]
        )
        about = {"method": method, "cost_of_transfer": machine.rounded(cost.mean if cost else None)}
        about |= {"task_pairs": used, "task_pairs_run": len(pairs)}
        data.append(about | machine.gain(gain, p) | {"left_out": len(missing)})
    headings = (
        "method",
        "another task's choice minus its own [95 %]",
        "another task's choice over the tuned baseline [95 %]",
        "n",
        "pairs of tasks",
        "p (Holm)",
        "left out",
    )
    return Table("transfer", "Values chosen on another task", headings, rows, data, NOTE, long=True)


def transfer_words(pool: Pool) -> Text:
    """What becomes of HiddenKey."""
    pairs = _pairs(pool, HIDDENKEY)
    lost, gained, missing = _over(pairs, HIDDENKEY), _over(pairs, BASELINE), left_out(pairs)
    without = f" Left out: {words.counted(missing)}." if missing else ""
    if lost.difference is None or gained.difference is None:
        return Text(f"`{HIDDENKEY}` with values chosen on another task: {gained.nothing}.{without}")
    return Text(
        f"With values chosen on another task `{HIDDENKEY}` changes by {words.difference(lost.difference)} points, "
        f"and lies {words.difference(gained.difference)} over the baseline that is tuned on the task itself; "
        f"n = {gained.difference.n}.{without}"
    )


def transferred(source: Task, target: Task, method: str) -> Transfer | None:
    """From one task to the other, by seed; None where a task lacks the method or has nothing to choose among."""
    here, there = source.methods.get(method), target.methods.get(method)
    if not here or not there or all(len(group.runs) < 2 for group in there.values()):
        return None
    found = {seed: _used(source, target, method, seed) for seed in sorted(here.keys() | there.keys())}
    values = {seed: value for seed, value in found.items() if isinstance(value, float)}
    return Transfer(values, tuple(why for why in found.values() if isinstance(why, str)))


def left_out(pairs: Pairs) -> list[str]:
    """Why a seed of a pair of tasks has no value, for each that has none."""
    return [why for _, pair in pairs for why in pair.left_out]


def _pairs(pool: Pool, method: str) -> Pairs:
    found = ((target, transferred(source, target, method)) for source, target in permutations(pool.tasks, 2))
    return [(target, pair) for target, pair in found if pair is not None]


def _used(source: Task, target: Task, method: str, seed: Seed) -> float | str:
    here, there = (task.methods[method].get(seed) for task in (source, target))
    if here is None or there is None:
        return ABSENT
    chosen = here.chosen("best")
    if chosen is None:
        return UNCHOSEN
    run = next((run for run in there.runs if run.params == chosen.params), None)
    if run is None:
        return UNTRIED
    if run.status != "finished":
        return FAILED
    value = tested(run, "best", target.metric)
    return UNTESTED if value is None else value


def _over(pairs: Pairs, reference: str) -> Pooled:
    """The transferred values minus those of the reference, tuned on the target itself."""
    maps, names = [], set()
    for target, found in pairs:
        own = target.values(reference)
        shared = sorted(found.values.keys() & own.keys())
        if shared:
            maps.append({seed: found.values[seed] - own[seed] for seed in shared})
            names.add(target.label)
    return Pooled(tuple(sorted(names)), average(maps), any(reference in target.methods for target, _ in pairs))
