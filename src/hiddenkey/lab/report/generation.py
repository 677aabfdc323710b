"""Tables 2 and 3: generated texts, E2E and WebNLG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import figures, machine, words
from .blocks import Block, Table, Text
from .cells import gain_beside
from .metrics import metric
from .paper import BASELINE, PRINTED_TEXT_METRICS, TABLE2, TABLE3, TASK_LABELS
from .pool import gains
from .statistics import describe, summarise
from .study import Task
from .task_table import about_task

PARTS = ("all", "seen", "unseen")


def blocks(tasks: Sequence[Task]) -> list[Block]:
    """Both, each as far as it was run, and further tasks of this kind."""
    found: list[Block] = []
    for number, key in ((2, "e2e"), (3, "webnlg")):
        ours = [task for task in tasks if task.generation and task.key == key]
        found += [block for task in ours for block in _generation(number, task)] or [
            Text(f"Table {number}, {TASK_LABELS[key]}: {words.NOT_RUN}.")
        ]
    others = [task for task in tasks if task.generation and task.key not in PRINTED_TEXT_METRICS]
    return found + [block for task in others for block in _generation(0, task)]


def judged_by(task: Task) -> list[str]:
    """The metric of the texts, and the one that chose trial and epoch."""
    return list(dict.fromkeys((task.metric.name, task.validation_metric.name)))


def _generation(number: int, task: Task) -> list[Block]:
    return [_table(number, task), Text(_epochs(task)), *figures.training([task], long=True)]


def _table(number: int, task: Task) -> Table:
    names = [(part, name) for part in _parts(task) for name in (*task.generation_metrics, "nll")]
    shown = [(part, name) for part, name in names if _ours(task, part, name)]
    found_by = {name: gains(task, name) for name in judged_by(task)}
    rows, data = [], []
    for method in task.methods:
        cells = [words.mean_sd(summarise(_values(task, method, *pair)), metric(pair[1]).digits) for pair in shown]
        row, n = [f"`{method}`"], len(task.values(method))
        line = {"task": task.name, "model": task.model, "method": method, "n": n}
        line |= {key: value for pair in shown for key, value in _columns(task, method, *pair).items()}
        for name, found in found_by.items():
            gain, p = found.get(method, (None, None))
            row += [gain_beside(n, gain, method, task.methods, metric(name).digits), words.p_value(p)]
            line |= {f"{name}_{key}": value for key, value in machine.gain(gain, p).items()}
        rows.append([*row, str(n), *cells])
        data.append(line)
    blank = [words.NOTHING] * (2 * len(found_by) + 1)
    rows += [[name, *blank, *cells] for name, *cells in _paper_rows(task, shown)]
    headings = [
        "method",
        *(heading for name in found_by for heading in (f"gain in {metric(name).label} [95 %]", "p (Holm)")),
        "n",
        *(metric(name).label + (f", {part}" if len(_parts(task)) > 1 else "") for part, name in shown),
    ]
    title = f"Table {number}: {task.label}" if number else task.label
    return Table(
        f"generation-{machine.slug(task.name)}", f"{title} ({about_task(task)})", headings, rows, data, _note(task)
    )


def _columns(task: Task, method: str, part: str, name: str) -> dict[str, float | None]:
    found = summarise(_values(task, method, part, name))
    mean, sd = (machine.rounded(found.mean), machine.rounded(found.sd)) if found else (None, None)
    return {f"{part}_{name}": mean, f"{part}_{name}_sd": sd}


def _note(task: Task) -> str:
    lower = [metric(name).label for name in (*task.generation_metrics, "nll") if metric(name).lower_is_better]
    seeds = {seed for groups in task.methods.values() for seed in groups}
    lost = {method: seeds - task.values(method).keys() for method in task.methods}
    return " ".join(
        part
        for part in (
            f"Test part, mean ± sd over seeds; {words.listed(lower)}: lower is better. Trial and epoch were chosen "
            f"by the {task.validation_metric.label} of the validation part; texts are of the adapter that was kept. "
            "Gain: positive where the method is better, paired over seeds; paired t-test, Holm's correction over the "
            "methods of this table, for each metric apart.",
            words.left_out(lost),
        )
        if part
    )


def _epochs(task: Task) -> str:
    """Whether there was any overfitting to prevent."""
    runs = [run for run in task.shown if run.status == "finished"]
    early = sum(run.best["epoch"] < run.last["epoch"] for run in runs)
    shown = task.validation_metric
    declined = describe(list(task.declines(BASELINE, shown.name).values())) if BASELINE in task.methods else None
    text = f"{task.label}: in {early} of {words.plural(len(runs), 'run')} the best epoch came before the last one."
    if declined is None:
        return text
    return text + (
        f" The chosen runs of LoRA alone lose {words.difference(declined, shown.digits)} in test {shown.label} from "
        f"their best epoch to their last, n = {declined.n}."
    )


def _parts(task: Task) -> tuple[str, ...]:
    return PARTS if task.key == "webnlg" else ("all",)


def _stored(part: str, name: str) -> str:
    return name if part == "all" else f"{name}_{part}"


def _values(task: Task, method: str, part: str, name: str) -> list[float]:
    return list(task.values(method, name=_stored(part, name)).values())


def _ours(task: Task, part: str, name: str) -> bool:
    return any(_values(task, method, part, name) for method in task.methods)


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
