"""Values chosen on one task, used on another: what is left of a gain without tuning on the task itself."""

from __future__ import annotations

from itertools import permutations

from . import machine, words
from .blocks import Table, Text
from .metrics import metric
from .paper import BASELINE, HIDDENKEY, METHODS, RIVALS
from .pool import Pool, Pooled
from .statistics import Seed, average, holm
from .study import Task, tested


def transfer_table(pool: Pool) -> Table:
    """Own choice, another task's choice, and the difference, as means over all ordered pairs of tasks."""
    names = [method for method in (*METHODS, *RIVALS) if method in pool.methods]
    found = [(method, _lost(pool, method), _gained(pool, method)) for method in names]
    found = [row for row in found if row[1].values]
    adjusted = holm(
        [gained.difference.p if gained.difference and name != BASELINE else None for name, _, gained in found]
    )
    rows, data = [], []
    for (method, lost, gained), p in zip(found, adjusted, strict=True):
        gain = None if method == BASELINE else gained.difference
        shown = words.NOTHING if method == BASELINE else words.difference(gain)
        count = len(lost.values)
        rows.append([f"`{method}`", words.difference(lost.difference), shown, str(count), words.p_value(p)])
        lost_mean = lost.difference.mean if lost.difference else None
        data.append({"method": method, "cost_of_transfer": machine.rounded(lost_mean)} | machine.gain(gain, p))
    headings = (
        "method",
        "another task's choice minus its own [95 %]",
        "another task's choice over the tuned baseline [95 %]",
        "n",
        "p (Holm)",
    )
    note = (
        "Test metrics in points, mean over all ordered pairs of tasks, paired over seeds: for each seed the trial "
        "that validation chose on the one task is used on the other. The baseline is tuned on each task itself."
    )
    return Table("transfer", "Values chosen on another task", headings, rows, data, note, long=True)


def transfer_words(pool: Pool) -> Text:
    """What becomes of HiddenKey."""
    lost, gained = _lost(pool, HIDDENKEY).difference, _gained(pool, HIDDENKEY).difference
    if lost is None or gained is None:
        return Text(f"`{HIDDENKEY}` with values chosen on another task: {words.NOT_RUN}.")
    return Text(
        f"With values chosen on another task `{HIDDENKEY}` changes by {words.difference(lost)} points, and lies "
        f"{words.difference(gained)} over the baseline that is tuned on the task itself; n = {gained.n}."
    )


def transferred(source: Task, target: Task, method: str) -> dict[Seed, float]:
    """Test metric on the target, by seed, of the trial that was chosen on the source."""
    found = {}
    for seed, group in source.methods.get(method, {}).items():
        chosen, there = group.chosen("best"), target.methods.get(method, {}).get(seed)
        if chosen is None or there is None or len(there.runs) < 2:
            continue
        run = next((run for run in there.runs if run.params == chosen.params and run.status == "finished"), None)
        value = tested(run, "best", metric(target.metric.name))
        if value is not None:
            found[seed] = value
    return found


def _lost(pool: Pool, method: str) -> Pooled:
    return _over_pairs(pool, method, method)


def _gained(pool: Pool, method: str) -> Pooled:
    return _over_pairs(pool, method, BASELINE)


def _over_pairs(pool: Pool, method: str, reference: str) -> Pooled:
    maps, names = [], set()
    for source, target in permutations(pool.tasks, 2):
        values, own = transferred(source, target, method), target.values(reference)
        shared = values.keys() & own.keys()
        if shared:
            maps.append({seed: values[seed] - own[seed] for seed in sorted(shared)})
            names.add(target.label)
    return Pooled(tuple(sorted(names)), average(maps))
