"""What a method costs: step time and seconds per run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from . import machine, words
from .blocks import Block, Table, Text
from .budget import step_ratio, step_seconds
from .paper import BASELINE, HIDDENKEY, rank_of
from .study import Task

ROUGH = (
    "Method and baseline were timed on one day and processors of one name (records of earlier versions have none), "
    "else there is no ratio. Runs were made side by side on shared cores, so times are rough."
)


def blocks(tasks: Sequence[Task]) -> list[Block]:
    """HiddenKey in a sentence, and the table."""
    ratios = [
        f"{task.label} {words.TIMES} {ratio:.2f}"
        for task in tasks
        if (ratio := step_ratio(task, HIDDENKEY)) is not None
    ]
    run = any({HIDDENKEY, BASELINE} <= task.methods.keys() for task in tasks)
    nothing = words.NOT_TIMED if run else words.NOT_RUN
    told = f"A step of `{HIDDENKEY}` over one of the baseline: {', '.join(ratios) or nothing}. {ROUGH}"
    return [Text(told), cost_table(tasks)]


def cost_table(tasks: Sequence[Task]) -> Table:
    """Methods × tasks: step time over the baseline's, seconds of a run."""
    methods = sorted({method for task in tasks for method in task.methods}, key=rank_of)
    data = [_cost(task, method) for task in tasks for method in task.methods]
    shown = {(row["task"], row["method"]): _words(row) for row in data}
    rows = [[f"`{method}`", *(shown.get((task.name, method), words.NOT_RUN) for task in tasks)] for method in methods]
    headings = ("method", *(f"{task.label} ({task.model})" for task in tasks))
    note = (
        "Optimiser step over the baseline's, each the 20th percentile of the steps of the least disturbed run; in "
        "brackets the median seconds of a whole run, evaluation and waiting included. " + ROUGH
    )
    return Table("cost", "Step time and seconds per run", headings, rows, data, note, long=True)


def _cost(task: Task, method: str) -> dict[str, Any]:
    groups = task.methods[method]
    runs = [run for group in groups.values() for run in group.runs if run.status == "finished"]
    return {
        "task": task.name,
        "model": task.model,
        "method": method,
        "runs": len(runs),
        "median_seconds": machine.rounded(statistics.median(run.seconds for run in runs)) if runs else None,
        "step_seconds": machine.rounded(min(step_seconds(groups).values(), default=None)),
        "step_time_ratio": machine.rounded(step_ratio(task, method)),
    }


def _words(row: dict[str, Any]) -> str:
    ratio, seconds = row["step_time_ratio"], row["median_seconds"]
    first = words.NOTHING if ratio is None else f"{words.TIMES} {ratio:.2f}"
    return first if seconds is None else f"{first} ({seconds:.0f} s)"
