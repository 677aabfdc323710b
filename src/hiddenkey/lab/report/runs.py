"""Every run, finished or failed, and where it came from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..provenance import short, shown_versions
from ..sweep.record import RunRecord
from . import machine, words
from .blocks import Block, Bullets, Table, Text
from .conditions import shown
from .metrics import metric
from .study import Task, tested

SHOWN_FAILURES = 20


def blocks(tasks: Sequence[Task]) -> list[Block]:
    """The counts, what failed, what is unequal, and where the runs came from."""
    records = [run for task in tasks for run in task.records]
    found: list[Block] = [Text(_count(records)), runs_table(tasks)]
    notes = [note for task in tasks for note in _notes(task)]
    if notes:
        found.append(Bullets(notes))
    failures = [
        f"`{run.id}` ({run.sweep}): {run.failure or 'no reason given'}" for run in records if run.status != "finished"
    ]
    if failures:
        rest = len(failures) - SHOWN_FAILURES
        more = [f"and {rest} more, in `runs.csv`"] if rest > 0 else []
        found += [Text("Failed runs:"), Bullets([*failures[:SHOWN_FAILURES], *more])]
    return [*found, _origins(records)]


def runs_table(tasks: Sequence[Task]) -> Table:
    """One line for each sweep; the CSV file has one for each run."""
    rows = []
    for task in tasks:
        failed = sum(run.status != "finished" for run in task.records)
        methods = task.methods
        trials = Counter(len(group.runs) for groups in methods.values() for group in groups.values())
        seeds = {seed for groups in methods.values() for seed in groups}
        rows.append(
            [
                task.name,
                task.model,
                f"{len(task.records):,}",
                f"{failed:,}",
                str(len(methods)),
                str(len(seeds)),
                words.listed(str(count) for count in sorted(trials)),
                words.listed(shown(condition) for condition in task.conditions if condition != task.main),
                f"{sum(run.seconds for run in task.records) / 3600:.2f}",
            ]
        )
    data = [_line(task, run) for task in tasks for run in task.records]
    headings = (
        "sweep",
        "model",
        "runs",
        "failed",
        "methods",
        "seeds",
        "trials per method and seed",
        "further conditions",
        "hours",
    )
    return Table("runs", "All runs", headings, rows, data, "`runs.csv` has a line for every run.")


def _count(records: list[RunRecord]) -> str:
    failed = sum(run.status != "finished" for run in records)
    hours = sum(run.seconds for run in records) / 3600
    total = words.plural(len(records), "run")
    return f"{total}, {failed:,} of them failed; {hours:.1f} hours in the processes that finished them, side by side."


def _notes(task: Task) -> list[str]:
    notes = []
    if task.incomplete:
        methods = words.counted(f"`{method}`" for method in task.incomplete)
        groups = words.plural(len(task.incomplete), "pair")
        notes.append(
            f"{task.name}: left out for want of runs of some trials: {groups} of method and seed, {methods}."
        )
    if len(set(task.trials.values())) > 1:
        shown = words.listed(f"`{method}` {count}" for method, count in task.trials.items())
        notes.append(f"{task.name}: the methods had different numbers of trials, which is not fair: {shown}.")
    lost = [
        f"`{method}` {count}"
        for method, groups in task.methods.items()
        if (count := sum(group.chosen("best") is None for group in groups.values()))
    ]
    if lost:
        notes.append(f"{task.name}: all trials failed, so the seed has no result, for {words.listed(lost)} seeds.")
    return notes


def _origins(records: list[RunRecord]) -> Table:
    found = Counter((run.commit or words.NOTHING, shown_versions(run.versions), _device(run)) for run in records)
    order = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = [[short(commit), versions, device, f"{count:,}"] for (commit, versions, device), count in order]
    data = [
        {"commit": commit, "versions": versions, "device": device, "runs": count}
        for (commit, versions, device), count in order
    ]
    return Table("origins", "Commits, versions and devices", ("commit", "versions", "device", "runs"), rows, data)


def _device(run: RunRecord) -> str:
    known = run.versions.get("device")
    return known or ("CPU" if run.versions.get("torch", "").endswith("+cpu") else "not recorded")


def _line(task: Task, run: RunRecord) -> dict[str, Any]:
    shown = metric(run.metric, run.lower_is_better)

    def scaled(row: dict[str, Any], name: str) -> float | None:
        value = row.get(name)
        return None if value is None else machine.rounded(value * shown.scale)

    return {
        "sweep": run.sweep,
        "id": run.id,
        "method": run.method,
        "recipe": run.recipe,
        "params": json.dumps(run.params),
        "axes": json.dumps(run.axes),
        "trial": run.trial,
        "status": run.status,
        "failure": run.failure,
        "metric": run.metric,
        "best_epoch": run.best.get("epoch"),
        "validation_best": scaled(run.best, f"validation_{run.metric}"),
        "validation_last": scaled(run.last, f"validation_{run.metric}"),
        "test_best": scaled(run.test.get("best", {}), run.metric),
        "test_last": scaled(run.test.get("last", {}), run.metric),
        "result_metric": task.metric.name,
        "result": machine.rounded(tested(run, "best", task.metric)),
        "seconds": run.seconds,
        "started": run.started,
        "commit": run.commit,
    }
