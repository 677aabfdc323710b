"""Several tasks as one: averages over tasks for every seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from . import words
from .claims import CLAIMS, Claim, Verdict, verdict
from .metrics import metric
from .paper import BASELINE, gap_on, rank_of
from .statistics import Difference, Seed, Values, average, describe, holm
from .study import Condition, Task, When


@dataclass(frozen=True)
class Pool:
    """The classification and regression tasks of one model whose results are in points: Table 1's kind."""

    tasks: tuple[Task, ...]

    @property
    def model(self) -> str:
        """The model's name."""
        return self.tasks[0].model

    @property
    def methods(self) -> list[str]:
        """All methods, in the order of Table 1."""
        return sorted({method for task in self.tasks for method in task.methods}, key=rank_of)

    def averages(self, method: str, when: When = "best") -> dict[Seed, float]:
        """Mean over all tasks by seed; empty where a task lacks the method."""
        return average([task.values(method, when) for task in self.tasks])

    def compare(self, first: str, second: str, when: When = "best", second_when: When | None = None) -> Pooled:
        """First minus second, positive where the first is better."""
        both = self.with_both(first, second)
        pooled = self.over(lambda task: differences(task, first, second, when, second_when) if task in both else None)
        return pooled.among(self.seeds(first, second))

    def paper_gap(self, first: str, second: str) -> float | None:
        """How far the first lies above the second in the paper, on the tasks that `compare` takes."""
        shared = [task for task in self.with_both(first, second) if differences(task, first, second)]
        keys = [task.key if task.metric_of_the_paper else None for task in shared]
        return gap_on(keys, first, second)

    def with_both(self, first: str, second: str) -> list[Task]:
        """The tasks on which both methods were run."""
        return [task for task in self.tasks if {first, second} <= task.methods.keys()]

    def seeds(self, first: str, second: str) -> set[Seed]:
        """The seeds of either method on these tasks."""
        both = self.with_both(first, second)
        return {seed for task in both for method in (first, second) for seed in task.methods[method]}

    def decline(self, method: str) -> Pooled:
        """The best epoch minus the last one of the same runs, those that the best epoch chose."""
        pooled = self.over(lambda task: task.declines(method) if method in task.methods else None)
        return pooled.among({seed for task in self.tasks for seed in task.methods.get(method, {})})

    def over(self, find: Callable[[Task], Values | None]) -> Pooled:
        """Average over the tasks for which differences are found; None of a task: it was not run."""
        found = [(task, values) for task in self.tasks if (values := find(task)) is not None]
        some = [(task, values) for task, values in found if values]
        return Pooled(tuple(task.label for task, _ in some), average([values for _, values in some]), bool(found))


@dataclass(frozen=True)
class Pooled:
    """Differences by seed, each an average over tasks."""

    tasks: tuple[str, ...]
    values: dict[Seed, float]
    run: bool = False
    """Whether both sides were run on any task."""
    lost: tuple[Seed, ...] = ()
    """Seeds that were run and left out, as a task or a side has no result of them."""

    @cached_property
    def difference(self) -> Difference | None:
        """With its interval; None where there is nothing in common."""
        return describe(list(self.values.values()))

    def among(self, seen: Collection[Seed]) -> Pooled:
        """The same, of the seeds that were seen: those without a difference are named as lost."""
        return replace(self, lost=tuple(sorted(set(seen) - self.values.keys())))

    @property
    def nothing(self) -> str:
        """Why there is no difference where there is none."""
        return words.NO_COMMON if self.run else words.NOT_RUN


@dataclass(frozen=True)
class Finding:
    """A claim and what was found."""

    claim: Claim
    """Of several pairs those alone that were run; all where none was."""
    partly: bool
    """Whether some of its pairs were not run."""
    tasks: tuple[str, ...]
    difference: Difference | None
    adjusted: float | None
    """p-value after Holm's correction over all claims that were run."""
    verdict: Verdict
    nothing: str
    """Why there is no difference where there is none."""
    paper_here: float | None = None
    """The difference in the paper on the same tasks; None where it does not print one."""
    lost: tuple[Seed, ...] = ()
    """Seeds that were run and left out, as a task or a side has no result of them."""


def differences(
    task: Task,
    first: str,
    second: str,
    when: When = "best",
    second_when: When | None = None,
    name: str = "",
    condition: Condition | None = None,
) -> dict[Seed, float]:
    """First minus second by seed, turned so that positive is better."""
    lower = (metric(name) if name else task.metric).lower_is_better
    one = task.values(first, when, name, condition)
    other = task.values(second, second_when or when, name, condition)
    sign = -1.0 if lower else 1.0
    return {seed: sign * (one[seed] - other[seed]) for seed in sorted(one.keys() & other.keys())}


def gained(task: Task, method: str, name: str = "") -> Difference | None:
    """A method over the baseline in a test metric, positive where it is better."""
    return describe(list(differences(task, method, BASELINE, name=name).values()))


def gains(task: Task, name: str = "") -> dict[str, tuple[Difference | None, float | None]]:
    """Every method over the baseline, with p-values after Holm's correction over them."""
    compared = [method for method in task.methods if method != BASELINE]
    found = [gained(task, method, name) for method in compared]
    adjusted = holm([change.p if change else None for change in found])
    return dict(zip(compared, zip(found, adjusted, strict=True), strict=True))


def pools(tasks: Sequence[Task]) -> list[Pool]:
    """One pool for each model; the one with most runs first."""
    fit = [task for task in tasks if not task.generation and task.metric.in_points]
    models = {task.model: Pool(tuple(other for other in fit if other.model == task.model)) for task in fit}
    return sorted(models.values(), key=lambda pool: -sum(len(task.records) for task in pool.tasks))


def against(pool: Pool, reference: str, methods: Sequence[str]) -> list[tuple[str, Pooled, float | None]]:
    """Each method minus the reference, with p-values after Holm's correction over these methods."""
    found = [(method, pool.compare(method, reference)) for method in methods]
    ps = [pooled.difference.p if pooled.difference else None for _, pooled in found]
    return [(method, pooled, p) for (method, pooled), p in zip(found, holm(ps), strict=True)]


def findings(pool: Pool | None) -> list[Finding]:
    """Every claim with its verdict."""
    claims = [_as_run(pool, claim) for claim in CLAIMS]
    found = [_measure(pool, claim) for claim in claims]
    changes = [pooled.difference for pooled in found]
    adjusted = holm([change.p if change else None for change in changes])
    return [
        Finding(
            claim,
            claim != whole,
            pooled.tasks,
            change,
            p,
            _verdict(claim, pooled, p),
            pooled.nothing,
            _paper_here(pool, claim),
            pooled.lost,
        )
        for whole, claim, pooled, change, p in zip(CLAIMS, claims, found, changes, adjusted, strict=True)
    ]


def why_none(methods: Collection[str], method: str) -> str:
    """Why a method has no difference to the baseline where it has none."""
    return words.NO_COMMON if {method, BASELINE} <= set(methods) else words.NOT_RUN


def _verdict(claim: Claim, pooled: Pooled, adjusted: float | None) -> Verdict:
    # Run without a seed in common is fewer seeds than decide anything.
    nothing = pooled.run and not pooled.values
    return "undecided" if nothing else verdict(claim, pooled.difference, adjusted)


def _as_run(pool: Pool | None, claim: Claim) -> Claim:
    """With those of its pairs that the task with most of them has, so that all tasks are asked the same."""
    tasks = pool.tasks if pool else ()
    run = [tuple(pair for pair in claim.pairs if _has(task, pair)) for task in tasks]
    most = max(run, key=len, default=())
    return replace(claim, pairs=most) if most else claim


def _asked(pool: Pool, claim: Claim) -> Pool:
    """The tasks that have all of its pairs."""
    return Pool(tuple(task for task in pool.tasks if _has(task, *claim.pairs)))


def _has(task: Task, *pairs: tuple[str, str]) -> bool:
    return all(method in task.methods for pair in pairs for method in pair)


def _measure(pool: Pool | None, claim: Claim) -> Pooled:
    if pool is None:
        return Pooled((), {})
    if claim.source == "rank":
        return pool.over(_rank_differences).among({seed for task in pool.tasks for seed in _rank_seeds(task)})
    if claim.source == "epochs":
        return pool.compare(BASELINE, BASELINE, "best", "last")
    asked = _asked(pool, claim)
    pooled = asked.over(lambda task: average([differences(task, *pair) for pair in claim.pairs]))
    return pooled.among({seed for pair in claim.pairs for seed in asked.seeds(*pair)})


def _paper_here(pool: Pool | None, claim: Claim) -> float | None:
    gaps = [_asked(pool, claim).paper_gap(*pair) for pair in claim.pairs] if pool else []
    known = [gap for gap in gaps if gap is not None]
    return sum(known) / len(known) if known and len(known) == len(gaps) else None


def _rank_differences(task: Task) -> dict[Seed, float] | None:
    ends = _rank_ends(task)
    if ends is None:
        return None
    one, other = (task.values(BASELINE, condition=condition) for condition in ends)
    return {seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())}


def _rank_seeds(task: Task) -> set[Seed]:
    return {seed for condition in _rank_ends(task) or () for seed in task.conditions[condition][BASELINE]}


def _rank_ends(task: Task) -> tuple[Condition, Condition] | None:
    """The conditions of rank 8 and of the largest rank."""
    ranks = {} if BASELINE in task.incomplete else task.ranks(BASELINE)  # the largest may be what is missing
    return (ranks[8], ranks[max(ranks)]) if 8 in ranks and max(ranks) > 8 else None
