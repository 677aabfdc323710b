"""What a person sees of a sweep: its plan, and how far it is."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from .board import Board
from .plan import Plan
from .record import RunRecord


def print_plan(plan: Plan, console: Console) -> None:
    """Runs per method, and in total."""
    counts: Counter[str] = Counter()
    for group in plan.groups:
        counts[group.method.name] += len(group.slots)
    width = max(map(len, (*counts, "total")))
    for method in plan.sweep.methods:
        _say(console, f"{method.name:<{width}}  {counts[method.name]:>5}  {method.recipe}")
    _say(console, f"{'total':<{width}}  {plan.total:>5}  runs in {len(plan.groups)} groups, into {plan.folder}")


class Display:
    """A line per worker of this machine, one for the whole, and a line for every run that ends."""

    def __init__(self, plan: Plan, board: Board, console: Console) -> None:
        self._board = board
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._whole = self._progress.add_task(plan.sweep.name, total=plan.total, note="")
        self._rows: dict[int, TaskID] = {}
        self._known = {record.id for record in board.records()}
        self._before = len(self._known)
        self._started = time.monotonic()

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._progress.stop()

    def tick(self, workers: dict[int, str]) -> None:
        """Show where things stand; workers: their names, by number."""
        records = self._board.records()
        for record in records:
            if record.id not in self._known:
                self._known.add(record.id)
                _say(self._console, f"{len(self._known)}/{self._progress.tasks[0].total} {_told(record)}")
        self._progress.update(self._whole, completed=len(records), note=self._time_left(len(records)))
        busy = {entry.worker: entry for entry in self._board.busy()}
        for number, name in workers.items():
            if number not in self._rows:
                self._rows[number] = self._progress.add_task("", total=None, note="")
            entry = busy.get(name)
            text = (
                f"worker {number}: {entry.id}, {_clock(time.time() - entry.since)}" if entry else f"worker {number}"
            )
            self._progress.update(self._rows[number], description=text)

    def _time_left(self, done: int) -> str:
        fresh = done - self._before
        if not fresh:
            return ""
        left = int(self._progress.tasks[0].total or 0) - done
        return f"{_clock((time.monotonic() - self._started) / fresh * left)} left"


def _told(record: RunRecord) -> str:
    if record.status == "failed":
        return f"{record.id}: failed: {record.failure}"
    name = f"validation_{record.metric}"
    return f"{record.id}: {name} {record.best[name]} in {record.seconds:.1f} s"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
