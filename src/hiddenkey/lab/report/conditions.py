"""Results on other axes than seeds, such as ranks and training sizes: every condition beside its own baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import machine, words
from .blocks import Block, Table
from .cells import gain_beside
from .paper import BASELINE
from .pool import differences
from .statistics import describe, summarise
from .study import Condition, Task

NOTE = (
    "Test metrics, mean ± sd over seeds; of each seed the trial and the epoch that the validation part chose in that "
    "condition. Gain: paired over seeds, against the baseline in the same condition; no correction."
)


def blocks(tasks: Sequence[Task]) -> list[Block]:
    """One table, or nothing where no sweep has such axes."""
    found = [
        _row(task, condition, method)
        for task in tasks
        for condition, methods in task.conditions.items()
        if condition != task.main
        for method in methods
    ]
    if not found:
        return []
    headings = ("task", "condition", "method", "result", "n", "gain over baseline [95 %]", "failed runs")
    rows, data = zip(*found, strict=True)
    return [Table("conditions", "Further conditions", headings, rows, data, NOTE, long=True)]


def shown(condition: Condition) -> str:
    """`lora_r 64`."""
    return " ".join(f"{name} {value}" for name, value in condition) or "no further axis"


def _row(task: Task, condition: Condition, method: str) -> tuple[list[str], dict[str, Any]]:
    groups, digits = task.conditions[condition][method], task.metric.digits
    result = summarise(list(task.values(method, condition=condition).values()))
    gain = None
    if method != BASELINE:
        gain = describe(list(differences(task, method, BASELINE, condition=condition).values()))
    failed = sum(group.failed for group in groups.values())
    n = result.n if result else 0
    cells = [
        task.label,
        shown(condition),
        f"`{method}`",
        words.mean_sd(result, digits, words.NO_RESULT),
        str(n),
        gain_beside(n, gain, method, task.conditions[condition], digits),
        str(failed),
    ]
    about = {"task": task.name, "model": task.model, "metric": task.metric.name, "method": method}
    return cells, about | dict(condition) | machine.summary(result) | machine.gain(gain) | {"failed": failed}
