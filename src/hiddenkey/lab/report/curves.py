"""The numbers behind the figures: metric against rate and rank, and training over epochs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .paper import rank_of
from .statistics import Seed, Summary, average, summarise
from .study import Condition, Group, Task, When, tested, validation

Part = Literal["validation", "test"]
RATE = "p"


@dataclass(frozen=True)
class Curve:
    """A line: x, and mean and spread over seeds."""

    method: str
    points: tuple[tuple[float, Summary], ...]
    """None where no seed has them all."""
    lost: tuple[Seed, ...] = ()
    """Seeds left out, as they lack some point."""
    bare: tuple[float, ...] = ()
    """Points left out, as no seed has them, on every task where it is a mean over tasks."""


def rate_curves(tasks: Sequence[Task], part: Part) -> list[Curve]:
    """Metric against rate for every method that has one, the mean over the tasks for each seed; Fig. 4.

    Where a method has further values in its grid, those that validation chose at that rate. A curve without points
    stands for a method of which no seed has all its rates, as where they are drawn by chance.
    """
    methods = [name for name in tasks[0].methods if all(name in task.methods for task in tasks)]
    curves = []
    for method in methods:
        points = {
            rate: average([_at_rate(task, method, rate, part) for task in tasks]) for rate in _rates(tasks, method)
        }
        seen = {seed for task in tasks for seed in task.methods[method]} if points else set()
        curves.append(_curve(method, points, seen))
    return [curve for curve in curves if curve.points or curve.lost]


def level(tasks: Sequence[Task], method: str, part: Part) -> Summary | None:
    """The chosen trials of a method, the mean over tasks for each seed."""
    return summarise(list(average([_of_groups(task, task.methods.get(method, {}), part) for task in tasks]).values()))


def rank_curves(tasks: Sequence[Task], when: When) -> list[Curve]:
    """Test metric against the rank of LoRA, the mean over the tasks for each seed; Fig. 5."""
    names = {method for task in tasks for methods in task.conditions.values() for method in methods}
    curves = []
    for method in sorted(names, key=rank_of):
        ranks = [task.ranks(method) for task in tasks]
        points = {
            float(rank): average(
                [task.values(method, when, condition=found[rank]) for task, found in zip(tasks, ranks, strict=True)]
            )
            for rank in ranks[0]
            if all(rank in found for found in ranks)
        }
        seen = {
            seed for task, found in zip(tasks, ranks, strict=True) for seed in _seeds(task, method, found.values())
        }
        curves.append(_curve(method, points, seen if len(points) > 1 else set()))
    return [curve for curve in curves if len(curve.points) > 1 or curve.lost]


def dynamics(task: Task, methods: Sequence[str], name: str, scale: float) -> list[Curve]:
    """A column of the epochs of the chosen trials, as far as all seeds got; Fig. 6."""
    curves = []
    for method in methods:
        groups = task.methods.get(method, {})
        runs = {seed: run for seed, group in groups.items() if (run := group.chosen("best")) is not None}
        points: dict[float, dict[Seed, float]] = {}
        for place in range(min((len(run.epochs) for run in runs.values()), default=0)):
            values = {seed: run.epochs[place].get(name) for seed, run in runs.items()}
            epoch = next(iter(runs.values())).epochs[place]["epoch"]
            points[epoch] = {seed: value * scale for seed, value in values.items() if value is not None}
        curves.append(_curve(method, points, set(runs)))
    return [curve for curve in curves if curve.points]


def _seeds(task: Task, method: str, conditions: Iterable[Condition]) -> set[Seed]:
    return {seed for condition in conditions for seed in task.conditions[condition][method]}


def _rates(tasks: Sequence[Task], method: str) -> list[float]:
    runs = [run for task in tasks for group in task.methods[method].values() for run in group.runs]
    return sorted({float(rate) for run in runs if isinstance(rate := run.params.get(RATE), (int, float))})


def _at_rate(task: Task, method: str, rate: float, part: Part) -> dict[Seed, float]:
    at = {
        seed: Group(tuple(run for run in group.runs if run.params.get(RATE) == rate))
        for seed, group in task.methods[method].items()
    }
    return _of_groups(task, at, part)


def _of_groups(task: Task, groups: dict[Seed, Group], part: Part) -> dict[Seed, float]:
    found = {}
    for seed, group in groups.items():
        run = group.chosen("best")
        if part == "test":
            value = tested(run, "best", task.metric)
        else:
            raw = validation(run, "best") if run else None
            value = None if raw is None else raw * task.validation_metric.scale
        if value is not None:
            found[seed] = value
    return found


def _curve(method: str, points: dict[float, dict[Seed, float]], seen: set[Seed]) -> Curve:
    """Every point over the same seeds, those that all of them have: points of other seeds would not compare."""
    bare = tuple(x for x, values in points.items() if not values)
    points = {x: values for x, values in points.items() if values}
    shared = set.intersection(*(set(values) for values in points.values())) if points else set()
    lost = tuple(sorted(seen - shared))
    summaries = {x: summarise([values[seed] for seed in sorted(shared)]) for x, values in points.items()}
    return Curve(method, tuple((x, summary) for x, summary in summaries.items() if summary is not None), lost, bare)
