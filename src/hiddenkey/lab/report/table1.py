"""Table 1: methods × tasks, and what each gains over the baseline; the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Sequence

from . import machine, words
from .blocks import Block, Table, Text
from .cells import gain_cells
from .paper import BASELINE, METHODS, RIVALS, TABLE1, TABLE1_SD, TABLE1_TASKS, gap, misprinted, true_average
from .pool import Pool, Pooled, against
from .statistics import Summary, summarise
from .study import Task
from .task_table import task_table

MISPRINTS = (
    "The paper prints the averages 91.16 for `hiddenkey-input` and 90.95 for `hiddenkey-output`; the averages of its "
    "own four numbers are 91.91 and 91.70. The paper's gains here are of the true averages."
)
IN_THE_PAPER = (
    "Gains in the paper: RoBERTa-large, medians of five runs; the mean of RTE, MRPC, STS-B and SST-2, and that of "
    "the tasks that stand here, where it prints the method on all of them (CoLA: LoRA alone and `hiddenkey`)."
)


def blocks(pool: Pool, suffix: str = "") -> list[Block]:
    """The overview, further methods, and one table for each task."""
    further = [method for method in pool.methods if method not in (*METHODS, *RIVALS)]
    found: list[Block] = [overview(pool, METHODS, f"table1{suffix}", f"Table 1 on {pool.model}")]
    if further:
        methods = (BASELINE, *further)
        found.append(overview(pool, methods, f"further{suffix}", f"Further methods on {pool.model}"))
    return found + [task_table(task) for task in pool.tasks]


def overview(pool: Pool, methods: Sequence[str], name: str, title: str) -> Table:
    """Mean ± sd for every task, and the difference to the baseline averaged over tasks."""
    compared = [method for method in methods if method != BASELINE]
    gains = {method: (pooled, adjusted) for method, pooled, adjusted in against(pool, BASELINE, compared)}
    paper = any(method in TABLE1 for method in compared)
    headings = ["method", "gain over baseline [95 %]", "n", "p (Holm)"]
    headings += ["in the paper, four tasks", "in the paper, same tasks"] if paper else []
    headings += ["average"] if len(pool.tasks) > 1 else []
    headings += [f"{task.label}, {task.metric.label}" for task in pool.tasks]
    most = max((len(task.values(method)) for task in pool.tasks for method in task.methods), default=0)
    rows, data = [], []
    for method in methods:
        pooled, adjusted = gains.get(method, (Pooled((), {}), None))
        found, average = pooled.difference, summarise(list(pool.averages(method).values()))
        printed = gap(method, BASELINE) if method in TABLE1 and method != BASELINE else None
        here = pool.paper_gap(method, BASELINE) if method != BASELINE else None
        row = [f"`{method}`"]
        row += [words.NOTHING] * 3 if method == BASELINE else gain_cells(pool, pooled, adjusted)
        row += [words.signed(printed), words.signed(here)] if paper else []
        row += [_counted(average, _why_no_average(pool, method), most)] if len(pool.tasks) > 1 else []
        rows.append([*row, *(_cell(task, method, most) for task in pool.tasks)])
        numbers = machine.summary(average) | machine.gain(found, adjusted)
        numbers |= {"paper_gain": machine.rounded(printed), "paper_gain_same_tasks": machine.rounded(here)}
        data.append({"method": method, "tasks": " ".join(pooled.tasks)} | numbers)
    tested = sum(pooled.difference is not None for pooled, _ in gains.values())
    lost = words.left_out({method: pooled.lost for method, (pooled, _) in gains.items()})
    parts = (_note(most, tested), lost, IN_THE_PAPER if paper else "")
    return Table(name, title, headings, rows, data, " ".join(part for part in parts if part))


def paper_table() -> Table:
    """The paper's Table 1."""
    rows, data = [], []
    for method, numbers in TABLE1.items():
        spreads = TABLE1_SD.get(method, (None,) * 4)
        cells = [
            f"{value:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
            for value, spread in zip(numbers, spreads, strict=False)
        ]
        average = f"{numbers[4]:.2f}" + (f" (true: {true_average(method):.2f})" if misprinted(method) else "")
        rows.append([f"`{method}`", *cells, average])
        printed = dict(zip((*TABLE1_TASKS, "average_printed"), numbers, strict=True))
        data.append({"method": method, **printed, "average_true": machine.rounded(true_average(method))})
    headings = ("method", "RTE", "MRPC", "STS-B", "SST-2", "average")
    note = "RoBERTa-large; the best of the rates on the test set itself, against a baseline without a grid."
    return Table("paper-table1", "The paper's Table 1", headings, rows, data, note, long=True)


def misprints() -> Text:
    """What is wrong in the printed table."""
    return Text(MISPRINTS)


def _note(most: int, tested: int) -> str:
    count = f"n = {words.plural(most, 'seed')} unless a cell says otherwise; "
    return (
        f"Test metrics in points, mean ± sd over seeds; {count}of each seed the trial and the epoch that the "
        "validation part chose. Gain: the mean over tasks, paired over seeds (n). p: paired t-test, Holm's "
        f"correction over the {words.plural(tested, 'method')} of this table."
    )


def _why_no_average(pool: Pool, method: str) -> str:
    run = [task for task in pool.tasks if method in task.methods]
    if not run:
        return words.NOT_RUN
    return words.NO_COMMON if len(run) == len(pool.tasks) else "not run on all"


def _cell(task: Task, method: str, most: int) -> str:
    found = summarise(list(task.values(method).values()))
    nothing = words.NO_RESULT if method in task.methods else words.NOT_RUN
    return _counted(found, nothing, most, task.metric.digits)


def _counted(found: Summary | None, nothing: str, most: int, digits: int = 2) -> str:
    text = words.mean_sd(found, digits, nothing)
    return f"{text} (n = {found.n})" if found and found.n != most else text
