"""What a person sees of a sweep: its plan, and how far it is."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from ..say import say
from .board import Board, Busy
from .plan import SweepPlan
from .record import RunRecord


def print_plan(plan: SweepPlan, console: Console) -> None:
    """Runs per method, and in total."""
    counts: Counter[str] = Counter()
    for group in plan.groups:
        counts[group.method.name] += len(group.slots)
    width = max(map(len, (*counts, "total")))
    for method in plan.sweep.methods:
        say(console, f"{method.name:<{width}}  {counts[method.name]:>5}  {method.recipe}")
    say(console, f"{'total':<{width}}  {plan.total:>5}  runs in {len(plan.groups)} groups, into {plan.folder}")
    if "test" not in {*plan.sweep.base, *(name for axis in plan.sweep.axes for name in axis[0])}:
        say(console, "No test part is named (`test` in base), so a report will have no results of these runs.")


class Display:
    """A line per worker of this machine, one for the whole, and a line for every run that ends."""

    def __init__(self, plan: SweepPlan, board: Board, console: Console) -> None:
        self._board = board
        self._console = console
        self._total = plan.total
        self._known = {record.id for record in board.records()}
        self._before = len(self._known)
        self._started = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._whole = self._bar.add_task(plan.sweep.name, total=self._total, completed=self._before, left="")
        self._live = Live(self._bar, console=console, transient=True)

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._live.stop()

    def tick(self, workers: dict[int, str]) -> None:
        """Show where things stand; workers: their names, by number."""
        records = self._board.records()
        for record in records:
            if record.id not in self._known:
                self._known.add(record.id)
                say(self._console, f"{len(self._known)}/{self._total} {_told(record)}")
        if not self._console.is_terminal:
            return
        self._bar.update(self._whole, completed=len(records), left=self._time_left(len(records)))
        busy = {entry.worker: entry for entry in self._board.busy()}
        lines = [Text(_line(number, busy.get(name)), no_wrap=True) for number, name in sorted(workers.items())]
        self._live.update(Group(*lines, self._bar))

    def _time_left(self, done: int) -> str:
        fresh = done - self._before
        if not fresh:
            return ""
        return f"{_clock((time.monotonic() - self._started) / fresh * (self._total - done))} left"


def _line(number: int, busy: Busy | None) -> str:
    return f"worker {number}  " + (f"{_clock(time.time() - busy.since)}  {busy.id}" if busy else "")


def _told(record: RunRecord) -> str:
    if record.status == "failed":
        return f"{record.id}: failed: {record.failure}"
    name = f"validation_{record.metric}"
    value = record.best.get(name)
    shown = "no number" if value is None else f"{value:.4g}"
    return f"{record.id}: {name} {shown} in {record.seconds:.1f} s"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
