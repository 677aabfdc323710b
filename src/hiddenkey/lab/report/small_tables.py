"""Tables 4 and 5: CoLA and QNLI, and RTE and MRPC on a decoder-only model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import machine, words
from .blocks import Block, Table, Text
from .paper import BASELINE, HIDDENKEY, TABLE4, TABLE5
from .pool import differences
from .statistics import describe, summarise
from .study import Task

Printed = Mapping[str, Mapping[str, tuple[float, float]]]


def blocks(tasks: Sequence[Task]) -> list[Block]:
    """Both, each as far as it was run."""
    classified = [task for task in tasks if not task.generation]
    encoders, decoders = ([task for task in classified if task.decoder is kind] for kind in (False, True))
    return [
        _table(4, "CoLA and QNLI", TABLE4, encoders, "RoBERTa-large"),
        _table(5, "RTE and MRPC on a decoder-only model", TABLE5, decoders, "LLaMA2-7B"),
    ]


def _table(number: int, what: str, printed: Printed, tasks: Sequence[Task], model: str) -> Block:
    found = [
        _row(task, method, printed[task.key])
        for task in tasks
        if task.key is not None and task.key in printed
        for method in (BASELINE, HIDDENKEY)
        if method in task.methods
    ]
    title = f"Table {number}: {what}"
    if not found:
        return Text(f"{title}: {words.NOT_RUN}.")
    headings = ("task", "method", "ours", "n", "gain over baseline [95 %]", f"paper, {model} (gain)")
    note = "Test metrics in points, mean ± sd; gain paired over seeds."
    rows, data = zip(*found, strict=True)
    return Table(f"table{number}", title, headings, rows, data, note)


def _row(task: Task, method: str, printed: Mapping[str, tuple[float, float]]) -> tuple[list[str], dict[str, Any]]:
    found = summarise(list(task.values(method).values()))
    (mean, sd), plain = printed[method], printed[BASELINE][0]
    own = f"{mean:.2f} ± {sd:.2f}"
    gain, shown = None, words.NOTHING
    if method != BASELINE:
        gain = describe(list(differences(task, method, BASELINE).values()))
        own, shown = f"{own} ({words.signed(mean - plain)})", words.difference(gain)
    cells = [
        f"{task.label} ({task.model})",
        f"`{method}`",
        words.mean_sd(found),
        str(found.n if found else 0),
        shown,
        own,
    ]
    return cells, {"task": task.name, "method": method} | machine.summary(found) | machine.gain(gain)
