"""From runs to results: one chosen trial for each method, condition and seed.

The trial is chosen by the validation metric, never by the test metric: for the result of the best epoch by the metric
of each trial's best epoch, for the result without early stopping by that of its last epoch. Of equals the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import RunError
from ..sweep.record import RUNS, RunRecord, method_key, read_record
from .alike import require_one_plan, require_one_setting, require_one_task
from .metrics import Metric, metric
from .paper import DECODERS, PRINTED_METRICS, PRINTED_TEXT_METRICS, TASK_LABELS, rank_of, task_key
from .statistics import Seed

When = Literal["best", "last"]
Condition = tuple[tuple[str, Any], ...]
"""The axes of a group other than its seeds, sorted by name."""

_SEEDS = ("seed", "data_seed")
_RANK = "lora_r"


@dataclass(frozen=True)
class Group:
    """All trials of one method in one condition with one seed."""

    runs: tuple[RunRecord, ...]

    def chosen(self, when: When) -> RunRecord | None:
        """The finished trial with the best validation metric; None where all failed."""
        best = self._best(when)
        return best[0] if best else None

    @property
    def tied(self) -> bool:
        """Whether trials share the best validation metric."""
        return len(self._best("best")) > 1

    @property
    def failed(self) -> int:
        """Trials that failed."""
        return sum(run.status == "failed" for run in self.runs)

    def _best(self, when: When) -> list[RunRecord]:
        scored = [(score, run) for run in self.runs if (score := validation(run, when)) is not None]
        if not scored:
            return []
        choose = min if scored[0][1].lower_is_better else max
        best = choose(score for score, _ in scored)
        return [run for score, run in scored if score == best]


Groups = dict[Seed, Group]


@dataclass(frozen=True)
class Task:
    """All records of one sweep name: one task on one model."""

    name: str
    records: tuple[RunRecord, ...]
    conditions: dict[Condition, dict[str, Groups]]
    """Condition → method → seed → group; methods in the order of Table 1."""
    incomplete: tuple[str, ...]
    """The method of every group left out because some of its trials have no record yet."""
    main: Condition

    @property
    def key(self) -> str | None:
        """The paper's task, or None."""
        return task_key(self.name)

    @property
    def metric_of_the_paper(self) -> bool:
        """Whether the paper prints numbers of this task in this metric; others say nothing beside ours."""
        return PRINTED_METRICS.get(self.key or "") == self.metric.name

    @property
    def label(self) -> str:
        """The name as shown; with the axes of its main condition, beside which there may be others."""
        plain = "".join(letter for letter in self.name.lower() if letter.isalnum())
        axes = " ".join(f"{axis} {value}" for axis, value in self.main if axis != "model")
        return TASK_LABELS.get(plain, self.name) + (f" ({axes})" if axes else "")

    @property
    def methods(self) -> dict[str, Groups]:
        """The groups of the main condition."""
        return self.conditions[self.main]

    @property
    def trials(self) -> dict[str, int]:
        """How many trials each method had."""
        return {method: _trials(groups) for method, groups in self.methods.items()}

    @property
    def shown(self) -> list[RunRecord]:
        """The runs of the main condition; all where none of its groups is whole."""
        runs = [run for groups in self.methods.values() for group in groups.values() for run in group.runs]
        return runs or list(self.records)

    @property
    def model(self) -> str:
        """The last part of the model's name or path."""
        return Path(str(self.shown[0].config["model"])).name

    @property
    def decoder(self) -> bool:
        """Whether the model is decoder-only, by its name."""
        return DECODERS.search(self.model) is not None

    @property
    def generation(self) -> bool:
        """Whether texts are generated."""
        return self.records[0].task == "causal-lm"

    @cached_property
    def metric(self) -> Metric:
        """What a result is: BLEU where texts were generated, else the metric that chose the epoch."""
        first = self.records[0]
        if any("bleu" in row for run in self.records for row in run.test.values()):
            return metric("bleu")
        return metric(first.metric, first.lower_is_better)

    @property
    def validation_metric(self) -> Metric:
        """The metric that chose trial and epoch."""
        return metric(self.records[0].metric, self.records[0].lower_is_better)

    @property
    def generation_metrics(self) -> tuple[str, ...]:
        """The metrics of its table."""
        return PRINTED_TEXT_METRICS.get(self.key or "", PRINTED_TEXT_METRICS["e2e"])

    def values(
        self, method: str, when: When = "best", name: str = "", condition: Condition | None = None
    ) -> dict[Seed, float]:
        """Test metric of the chosen trial by seed, in the unit it is shown in."""
        shown = metric(name) if name else self.metric
        groups = self.conditions[self.main if condition is None else condition].get(method, {})
        found = {seed: tested(group.chosen(when), when, shown) for seed, group in groups.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def tuned(self, method: str) -> tuple[str, ...]:
        """The names of the values that a method's trials differ in."""
        tried = [run.params for group in self.methods[method].values() for run in group.runs]
        names = dict.fromkeys(name for params in tried for name in params)
        return tuple(name for name in names if len({str(params.get(name)) for params in tried}) > 1)

    def declines(self, method: str, name: str = "") -> dict[Seed, float]:
        """Test metric of the chosen run's best epoch minus that of its last, by seed; positive: it declined."""
        shown = metric(name) if name else self.metric
        sign, found = -1.0 if shown.lower_is_better else 1.0, {}
        for seed, group in self.methods[method].items():
            run = group.chosen("best")
            best, last = (tested(run, when, shown) for when in ("best", "last"))
            if best is not None and last is not None:
                found[seed] = sign * (best - last)
        return found

    def ranks(self, method: str) -> dict[int, Condition]:
        """The conditions that differ in the rank alone, by rank.

        The plain one is among them where no axis has its rank, if the method had the same trials at all of them.
        """
        found: dict[int, Condition] = {}
        for condition, methods in self.conditions.items():
            if method in methods and {name for name, _ in condition} == {_RANK}:
                found[int(dict(condition)[_RANK])] = condition
        plain = self.conditions.get((), {}).get(method)
        if found and plain and all(_tried(plain) == _tried(self.conditions[rank][method]) for rank in found.values()):
            run = next(iter(plain.values())).runs[0]
            found.setdefault(int(run.config[_RANK]), ())
        return dict(sorted(found.items()))


def validation(run: RunRecord, when: When) -> float | None:
    """The validation metric by which a run is chosen; None where it failed or has none."""
    if run.status != "finished":
        return None
    row = run.best if when == "best" else run.last
    return row.get(f"validation_{run.metric}")


def tested(run: RunRecord | None, when: When, shown: Metric) -> float | None:
    """A test metric of a run, in its unit; generated texts are those of the one adapter that was kept."""
    if run is None:
        return None
    value = run.test.get(when, {}).get(shown.name)
    if value is None and run.task == "causal-lm" and when == "best":
        value = run.test.get("last", {}).get(shown.name)
    return None if value is None else value * shown.scale


def read_study(folders: Iterable[Path]) -> list[Task]:
    """The tasks of all records below the folders, in the order of Table 1.

    Raises:
        RunError: there is no record, one cannot be read, or records of one name are not of one task.
    """
    folders = list(folders)
    found_in = {folder: _records_below(folder) for folder in folders}
    empty = [str(folder) for folder, records in found_in.items() if not records]
    if empty or not folders:
        raise RunError(f"no runs below {', '.join(empty)}: looked for runs/*.json. Run `hiddenkey sweep` first.")
    paths = sorted({path for records in found_in.values() for path in records})
    by_sweep: dict[str, dict[str, RunRecord]] = defaultdict(dict)
    for path in paths:
        record = read_record(path)
        other = by_sweep[record.sweep].setdefault(record.id, record)
        if (other.best, other.last, other.test) != (record.best, record.last, record.test):
            raise RunError(
                f"{path} and another record below {', '.join(map(str, folders))} are of one run, {record.id}, and "
                "differ; give the folder of one of them."
            )
    tasks = [make_task(name, list(records.values())) for name, records in by_sweep.items()]
    return sorted(tasks, key=_place)


def _records_below(folder: Path) -> list[Path]:
    found = list(folder.rglob(f"{RUNS}/*.json"))
    return found or (list(folder.glob("*.json")) if folder.resolve().name == RUNS else [])


def make_task(name: str, records: list[RunRecord]) -> Task:
    """Group the records of one sweep name.

    Raises:
        RunError: they are not of one task on one model, or a method's are not of one plan.
    """
    records.sort(key=lambda run: (rank_of(method_key(run.method)), run.trial, run.id))
    require_one_task(name, records)
    for method in dict.fromkeys(method_key(run.method) for run in records):
        require_one_setting(name, method, (run for run in records if method_key(run.method) == method))
    found: dict[Condition, dict[str, dict[Seed, list[RunRecord]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for run in records:
        condition = tuple(sorted((axis, _plain(value)) for axis, value in run.axes.items() if axis not in _SEEDS))
        seed = (int(run.config["seed"]), int(run.config["data_seed"]))
        found[condition][method_key(run.method)][seed].append(run)
    conditions: dict[Condition, dict[str, Groups]] = {}
    incomplete: list[str] = []
    for condition in sorted(found, key=_in_order):
        conditions[condition] = {}
        for method, seeds in found[condition].items():
            require_one_plan(name, method, seeds.values())
            whole = _whole(seeds)
            incomplete += [method] * (len(seeds) - len(whole))
            if whole:
                conditions[condition][method] = whole
    return Task(name, tuple(records), conditions, tuple(incomplete), _main(conditions))


def _whole(seeds: dict[Seed, list[RunRecord]]) -> Groups:
    # Records of earlier versions do not say how many trials were planned: as many as the fullest seed has.
    trials = max(len(runs) for runs in seeds.values())
    planned = max(run.trials for runs in seeds.values() for run in runs)
    return {seed: Group(tuple(runs)) for seed, runs in sorted(seeds.items()) if len(runs) == max(trials, planned)}


def _trials(groups: Groups) -> int:
    return max((len(group.runs) for group in groups.values()), default=0)


def _tried(groups: Groups) -> set[str]:
    return {str(sorted(run.params.items())) for group in groups.values() for run in group.runs}


def _main(conditions: dict[Condition, dict[str, Groups]]) -> Condition:
    # Table 1 is of the condition without further axes; else of the paper's rank; else of the first with most methods.
    def place(condition: Condition) -> tuple[bool, bool, bool, int]:
        other_rank = dict(condition).get(_RANK) != 8
        return condition != (), condition != ((_RANK, 8),), other_rank, -len(conditions[condition])

    return min(conditions, key=place)


def _in_order(condition: Condition) -> list[tuple[str, bool, float, str]]:
    numbers = {name: value for name, value in condition if isinstance(value, int | float)}
    return [(name, name not in numbers, numbers.get(name, 0), str(value)) for name, value in condition]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _place(task: Task) -> tuple[bool, int, str]:
    order = list(TASK_LABELS)
    return task.generation, order.index(task.key) if task.key else len(order), task.name
