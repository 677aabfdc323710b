"""One task in full: results, chosen values, failed runs, differences to the baseline, tests."""

from __future__ import annotations

from . import machine, words
from .blocks import Table
from .cells import gain_beside
from .paper import BASELINE, TABLE1, TABLE1_TASKS, other_metric
from .pool import gains
from .statistics import Difference, summarise
from .study import Task

NOTE = (
    "Gains are positive where the method is better. p: paired t-test; Holm: corrected over the methods of this "
    "table; sign flips: exact, never below 2/2ⁿ. Hedges g: mean over sd of the paired differences, corrected for "
    "small n. Chosen: what the validation part chose, counted over seeds."
)


def task_table(task: Task) -> Table:
    """Every method of the task's main condition."""
    found = gains(task)
    rows, data = [], []
    for method in task.methods:
        cells, numbers = _row(task, method, *found.get(method, (None, None)))
        rows.append(cells)
        data.append(numbers)
    headings = (
        "method",
        task.metric.label,
        "n",
        "gain over baseline [95 %]",
        "bootstrap",
        "p",
        "p (Holm)",
        "p (sign flips)",
        "Hedges g",
        "chosen",
        "trials",
        "failed runs",
        "paper (gain)",
    )
    title = f"{task.label} in full: {about_task(task)}"
    return Table(f"task-{machine.slug(task.name)}", title, headings, rows, data, NOTE + _apart(task), long=True)


def chosen_values(task: Task, method: str) -> str:
    """What validation chose, counted over seeds."""
    runs = [group.chosen("best") for group in task.methods[method].values()]
    chosen = [{name: run.params.get(name) for name in task.tuned(method)} if run else None for run in runs]
    return words.counted("all failed" if params is None else words.parameters(params) for params in chosen)


def about_task(task: Task) -> str:
    """Model and sizes."""
    parts = dict.fromkeys(part for run in task.shown for part in run.data_rows)
    sizes = ", ".join(f"{_size(task, part)} {part}" for part in parts)
    prompts = task.shown[0].config.get("test_size", 0) if task.generation and "test" in parts else 0
    rows = f"{sizes} rows" + (f" of {words.plural(prompts, 'prompt')}" if prompts else "")
    return ", ".join(part for part in (task.model, rows if sizes else "") if part)


def _size(task: Task, part: str) -> str:
    counts = {run.data_rows[part] for run in task.shown if part in run.data_rows}
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def _row(
    task: Task, method: str, change: Difference | None, adjusted: float | None
) -> tuple[list[str], dict[str, object]]:
    groups, digits = task.methods[method], task.metric.digits
    summary = summarise(list(task.values(method).values()))
    n = summary.n if summary else 0
    trials = max((len(group.runs) for group in groups.values()), default=0)
    failed, chosen = sum(group.failed for group in groups.values()), chosen_values(task, method)
    cells = [
        f"`{method}`",
        words.mean_sd(summary, digits, words.NO_RESULT),
        str(n),
        gain_beside(n, change, method, task.methods, digits),
        words.bootstrapped(change, digits),
        words.p_value(change.p if change else None),
        words.p_value(adjusted),
        words.p_value(change.p_flip if change else None),
        words.signed(change.hedges if change else None),
        chosen,
        str(trials),
        str(failed),
        _printed(task, method),
    ]
    about = {"task": task.name, "model": task.model, "metric": task.metric.name, "method": method}
    last = {"chosen": chosen, "trials": trials, "failed": failed}
    return cells, about | machine.summary(summary) | machine.gain(change, adjusted) | last


def _printed(task: Task, method: str) -> str:
    if task.key not in TABLE1_TASKS or method not in TABLE1 or not task.metric_of_the_paper:
        return words.NOTHING
    place = TABLE1_TASKS.index(task.key)
    value = TABLE1[method][place]
    change = value - TABLE1[BASELINE][place]
    return f"{value:.2f}" + ("" if method == BASELINE else f" ({words.signed(change)})")


def _apart(task: Task) -> str:
    apart = task.key in TABLE1_TASKS and not task.metric_of_the_paper
    return other_metric(task.key, task.metric.label) if apart and task.key else ""
