"""Tables 2 and 3: generated texts, E2E and WebNLG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import machine, words
from .blocks import Block, Table, Text
from .metrics import metric
from .paper import BASELINE, PRINTED_TEXT_METRICS, TABLE2, TABLE3, TASK_LABELS
from .pool import differences, why_none
from .statistics import describe, holm, summarise
from .study import Task
from .task_table import about_task

PARTS = ("all", "seen", "unseen")


def blocks(tasks: Sequence[Task]) -> list[Block]:
    """Both, each as far as it was run, and further tasks of this kind."""
    found: list[Block] = []
    for number, key in ((2, "e2e"), (3, "webnlg")):
        ours = [task for task in tasks if task.generation and task.key == key]
        found += [_generation(number, task) for task in ours] or [
            Text(f"Table {number}, {TASK_LABELS[key]}: {words.NOT_RUN}.")
        ]
    others = [task for task in tasks if task.generation and task.key not in PRINTED_TEXT_METRICS]
    return found + [_generation(0, task) for task in others]


def _generation(number: int, task: Task) -> Table:
    names = [(part, name) for part in _parts(task) for name in (*task.generation_metrics, "nll")]
    shown = [(part, name) for part, name in names if _ours(task, part, name)]
    gains = {method: describe(list(differences(task, method, BASELINE).values())) for method in task.methods}
    compared = [method for method in task.methods if method != BASELINE]
    ps = dict(zip(compared, holm([p.p if (p := gains[method]) else None for method in compared]), strict=True))
    rows, data = [], []
    for method in task.methods:
        gain = gains[method] if method != BASELINE else None
        cells = [words.mean_sd(summarise(_values(task, method, *pair)), metric(pair[1]).digits) for pair in shown]
        change = (
            words.NOTHING
            if method == BASELINE
            else words.difference(gain, task.metric.digits, why_none(task.methods, method))
        )
        rows.append([f"`{method}`", *cells, str(len(task.values(method))), change, words.p_value(ps.get(method))])
        about = {"task": task.name, "model": task.model, "method": method}
        means = {f"{part}_{name}": _mean(_values(task, method, part, name)) for part, name in shown}
        data.append(about | means | machine.gain(gain, ps.get(method)))
    rows += [[*row, words.NOTHING, words.NOTHING, words.NOTHING] for row in _paper_rows(task, shown)]
    headings = [
        "method",
        *(metric(name).label + (f", {part}" if len(_parts(task)) > 1 else "") for part, name in shown),
        "n",
        f"gain in {task.metric.label} [95 %]",
        "p (Holm)",
    ]
    title = f"Table {number}: {task.label}" if number else task.label
    note = (
        "Test part, mean ± sd over seeds; texts come from the adapter that was kept. Gain: positive where the method "
        "is better, paired over seeds; paired t-test, Holm's correction over the methods of this table."
    )
    return Table(f"generation-{machine.slug(task.name)}", f"{title} ({about_task(task)})", headings, rows, data, note)


def _parts(task: Task) -> tuple[str, ...]:
    return PARTS if task.key == "webnlg" else ("all",)


def _stored(part: str, name: str) -> str:
    return name if part == "all" else f"{name}_{part}"


def _values(task: Task, method: str, part: str, name: str) -> list[float]:
    return list(task.values(method, name=_stored(part, name)).values())


def _ours(task: Task, part: str, name: str) -> bool:
    return any(_values(task, method, part, name) for method in task.methods)


def _mean(values: list[float]) -> float | None:
    found = summarise(values)
    return machine.rounded(found.mean) if found else None


def _paper_rows(task: Task, shown: Sequence[tuple[str, str]]) -> list[list[str]]:
    rows = []
    if task.key == "e2e":
        for model, methods in TABLE2.items():
            for method, numbers in methods.items():
                known = {
                    ("all", name): value for name, value in zip(PRINTED_TEXT_METRICS["e2e"], numbers, strict=True)
                }
                rows.append([f"paper, {model}: `{method}`", *_known(known, shown)])
    if task.key == "webnlg":
        for method in (BASELINE, "hiddenkey"):
            known = {
                (part, name): value
                for part, methods in TABLE3.items()
                for name, value in zip(PRINTED_TEXT_METRICS["webnlg"], methods[method], strict=True)
            }
            rows.append([f"paper, GPT2-Medium: `{method}`", *_known(known, shown)])
    return rows


def _known(known: Mapping[tuple[str, str], float], shown: Sequence[tuple[str, str]]) -> list[str]:
    return [words.number(known[pair], metric(pair[1]).digits) if pair in known else words.NOTHING for pair in shown]
