"""Tables 4 and 5: CoLA and QNLI, and RTE and MRPC on a decoder-only model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import machine, words
from .blocks import Block, Table, Text
from .cells import gain_beside
from .paper import BASELINE, HIDDENKEY, TABLE4, TABLE5, other_metric
from .pool import differences
from .statistics import describe, summarise
from .study import Task

Printed = Mapping[str, Mapping[str, tuple[float, float]]]
NOTE = "Test metrics in points where they are shares, mean ± sd; gain paired over seeds."


def blocks(tasks: Sequence[Task]) -> list[Block]:
    """Both, each as far as it was run."""
    classified = [task for task in tasks if not task.generation]
    encoders, decoders = ([task for task in classified if task.decoder is kind] for kind in (False, True))
    return [
        _table(4, "CoLA and QNLI", TABLE4, encoders, "RoBERTa-large"),
        _table(5, "RTE and MRPC on a decoder-only model", TABLE5, decoders, "LLaMA2-7B"),
    ]


def _table(number: int, what: str, printed: Printed, tasks: Sequence[Task], model: str) -> Block:
    ours = [task for task in tasks if task.key is not None and task.key in printed]
    found = [
        _row(task, method, printed) for task in ours for method in (BASELINE, HIDDENKEY) if method in task.methods
    ]
    title = f"Table {number}: {what}"
    if not found:
        return Text(f"{title}: {words.NOT_RUN}.")
    headings = ("task", "metric", "method", "ours", "n", "gain over baseline [95 %]", f"paper, {model} (gain)")
    apart = [other_metric(task.key, task.metric.label) for task in ours if task.key and not task.metric_of_the_paper]
    rows, data = zip(*found, strict=True)
    return Table(f"table{number}", title, headings, rows, data, NOTE + "".join(apart))


def _row(task: Task, method: str, printed: Printed) -> tuple[list[str], dict[str, Any]]:
    found = summarise(list(task.values(method).values()))
    gain = None if method == BASELINE else describe(list(differences(task, method, BASELINE).values()))
    n = found.n if found else 0
    cells = [
        f"{task.label} ({task.model})",
        task.metric.label,
        f"`{method}`",
        words.mean_sd(found, task.metric.digits, words.NO_RESULT),
        str(n),
        gain_beside(n, gain, method, task.methods, task.metric.digits),
        _printed(task, method, printed),
    ]
    about = {"task": task.name, "metric": task.metric.name, "method": method}
    return cells, about | machine.summary(found) | machine.gain(gain)


def _printed(task: Task, method: str, printed: Printed) -> str:
    if task.key is None or not task.metric_of_the_paper:
        return words.NOTHING
    mean, sd = printed[task.key][method]
    gain = "" if method == BASELINE else f" ({words.signed(mean - printed[task.key][BASELINE][0])})"
    return f"{mean:.2f} ± {sd:.2f}{gain}"
