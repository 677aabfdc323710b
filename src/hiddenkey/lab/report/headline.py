"""The first screen: does it help, by how much, how sure."""

from __future__ import annotations

from collections.abc import Sequence

from . import claims_table, figures, generation, words
from .blocks import Block, Bullets, Text
from .budget import step_ratio
from .claims import ALPHA, FEWEST, refuting
from .metrics import metric
from .paper import BASELINE, HIDDENKEY, METHODS, TABLE1_TASKS
from .pool import Finding, Pool, against, gained
from .statistics import Difference
from .study import Task

NO_POOL = "No classification or regression task with a metric in points was run, so the main question is open."


def blocks(pool: Pool | None, found: Sequence[Finding], tasks: Sequence[Task] = ()) -> list[Block]:
    """The answer, what qualifies it, and the gains of all methods in one figure; tasks: all, for those with texts."""
    texts = [line for task in tasks if task.generation and (line := _of_texts(task))]
    if pool is None:
        return [Text(NO_POOL, lead=True), *([Bullets(texts)] if texts else [])]
    main = next(finding for finding in found if finding.claim.main)
    items = [*_by_task(pool), *texts, *_context(main, pool, found)]
    return [Text(_answer(main, pool), lead=True), Bullets(items), *figures.gains(pool)]


def _answer(main: Finding, pool: Pool) -> str:
    change = main.difference
    if change is None:
        return f"`{HIDDENKEY}` against LoRA alone: {main.nothing}."
    over = f"{words.plural(len(main.tasks), 'task')} ({', '.join(main.tasks)})"
    where = f"the mean over {over}" if len(main.tasks) > 1 else over
    shown, tests = f"{words.signed(change.mean)} points", f"n = {words.plural(change.n, 'seed')}"
    if change.low is not None:
        shown = f"{words.difference(change)} points"
        tests = f"95 % interval, {tests}, {words.p_equals(change.p)}, after Holm's correction over all claims "
        tests += words.p_equals(main.adjusted)
    return (
        f"**{_verdict(main, change)}** `{HIDDENKEY}` minus LoRA alone, {where}, {pool.model}, {_tuned(pool)}: "
        f"**{shown}** ({tests})."
    )


def _tuned(pool: Pool) -> str:
    counts = [(task.label, *(task.trials.get(method) for method in (HIDDENKEY, BASELINE))) for task in pool.tasks]
    unequal = [
        f"{label}: {ours} against {plain}" for label, ours, plain in counts if ours and plain and ours != plain
    ]
    if unequal:
        return f"tuned with different numbers of trials ({', '.join(unequal)})"
    ours, plain = (_names(pool, method) for method in (HIDDENKEY, BASELINE))
    over = f" (`{HIDDENKEY}` over {ours}, LoRA alone over {plain})" if ours and plain and ours != plain else ""
    return f"both tuned with the same number of trials{over}"


def _names(pool: Pool, method: str) -> str:
    names = dict.fromkeys(name for task in pool.tasks if method in task.methods for name in task.tuned(method))
    return " and ".join(f"`{name}`" for name in names)


def _verdict(main: Finding, change: Difference) -> str:
    if change.n < FEWEST or change.low is None or change.high is None:
        return f"Whether HiddenKey helps is undecided: {words.plural(change.n, 'seed')} cannot tell."
    if main.verdict == "replicated":
        return "HiddenKey helps."
    if main.verdict == "not replicated" and change.high < 0:
        if main.adjusted is not None and main.adjusted <= ALPHA:
            return "HiddenKey does harm here."
        return "HiddenKey does not help here, and seems to do harm, but not surely after correction for all claims."
    if main.verdict == "not replicated":
        return f"HiddenKey does not help here, or little: a gain of {refuting(main.claim):g} points is ruled out."
    if change.low > 0:
        return "HiddenKey seems to help, but not surely after correction for all claims."
    return "Whether HiddenKey helps is undecided."


def _by_task(pool: Pool) -> list[str]:
    found = [
        (task.label, change) for task in pool.with_both(HIDDENKEY, BASELINE) if (change := gained(task, HIDDENKEY))
    ]
    if len(found) < 2:
        return []
    shown = ", ".join(f"{label} {words.difference(change)}" for label, change in found)
    return [f"By task: {shown}. The mean gives each the same weight, however much chance there is in it."]


def _of_texts(task: Task) -> str:
    found = [
        (metric(name), change) for name in generation.judged_by(task) if (change := gained(task, HIDDENKEY, name))
    ]
    if not found:
        return ""
    shown = " and ".join(f"{words.difference(change, shown.digits)} in {shown.label}" for shown, change in found)
    return (
        f"Generated texts, {task.label} with {task.model}: `{HIDDENKEY}` over LoRA alone {shown}, "
        f"n = {found[0][1].n}; positive is better."
    )


def _context(main: Finding, pool: Pool, found: Sequence[Finding]) -> list[str]:
    own = {task.key for task in pool.tasks if task.label in main.tasks} == set(TABLE1_TASKS)
    here = (
        "" if main.paper_here is None or own else f", {words.signed(main.paper_here)} as that of the tasks run here"
    )
    items = [
        f"The paper reports {words.signed(main.claim.paper_gap)} points as the mean of its four tasks{here}, with "
        "RoBERTa-large and rates chosen on the test set."
    ]
    items += [*_best(pool), *_stopped(pool)]
    ratios = {task.label: ratio for task in pool.tasks if (ratio := step_ratio(task, HIDDENKEY)) is not None}
    if ratios:
        items.append(
            f"A step of `{HIDDENKEY}` takes {sum(ratios.values()) / len(ratios):.2f} times the baseline's, roughly "
            f"({words.listed(ratios)}; timed on shared cores)."
        )
    return [*items, claims_table.count(found)]


def _best(pool: Pool) -> list[str]:
    names = [method for method in METHODS if method != BASELINE]
    found = [
        (pooled, method, pooled.difference, p)
        for method, pooled, p in against(pool, BASELINE, names)
        if pooled.difference
    ]
    ranked = [
        (change.mean, method, change, p)
        for pooled, method, change, p in found
        if len(pooled.tasks) == len(pool.tasks)
    ]
    if len(ranked) < 2:
        return []
    _, method, change, p = max(ranked, key=lambda row: row[0])
    if p is None:
        return []
    return [
        f"Best of the {words.plural(len(ranked), 'method')} of Table 1 that were run on all tasks is `{method}`: "
        f"{words.difference(change)} points, n = {change.n}, {words.p_equals(p)} after Holm's correction over the "
        f"{len(found)} that were run. It was picked after the fact, which flatters its gain."
    ]


def _stopped(pool: Pool) -> list[str]:
    found, same = pool.compare(BASELINE, BASELINE, "best", "last").difference, pool.decline(BASELINE).difference
    if found is None or same is None:
        return []
    return [
        "Early stopping, which every method here has: the baseline with trial and epoch chosen by the best epoch "
        f"lies {words.difference(found)} points over itself chosen by the last, n = {found.n}; within a chosen run "
        f"the best epoch lies {words.difference(same)} over the last."
    ]
