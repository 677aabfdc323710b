"""From a sweep file to its groups, trials and runs."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hiddenkey

from ..config import FIELD_TYPES, TrainConfig, plain
from ..errors import ConfigError
from .draw import draw_random
from .file import Method, SweepFile, Values
from .record import WORK, method_key, run_id
from .space import Choice, Space


@dataclass(frozen=True)
class Run:
    """One run: its name, what it was made of, and its configuration."""

    id: str
    sweep: str
    method: str
    params: Values
    axes: Values
    trial: int
    trials: int
    """How many its group has."""
    config: TrainConfig


@dataclass(frozen=True)
class Slot:
    """A place for one trial of a group; `run` is None where the search fills it later."""

    key: str
    trial: int
    run: Run | None


@dataclass(frozen=True)
class Group:
    """A method on one combination of axes: the trials among which one is chosen by validation.

    `name` is another one when anything but the grid changes.
    """

    sweep: SweepFile
    method: Method
    axes: Values

    @cached_property
    def name(self) -> str:
        """Sweep, method, axes, and a hash of what all trials share."""
        shared: dict[str, Any] = {
            "base": self.sweep.base | self.method.fields,
            "recipe": self.method.recipe,
            "search": self.sweep.search,
        }
        if self.ordered:
            shared["space"] = {name: repr(dimension) for name, dimension in self.method.space.items()}
        axes = " ".join(f"{name}={plain(value)}" for name, value in self.axes.items())
        return " / ".join(filter(None, (self.sweep.name, self.method.name, axes, _digest(shared))))

    @property
    def ordered(self) -> bool:
        """Whether a trial waits for those before it: a search that learns from them."""
        return self.sweep.search == "tpe"

    @property
    def trials(self) -> int:
        """How many trials it has when all are done."""
        return self.sweep.trials or len(_grid(self.method.space))

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Its trials, in order."""
        if self.ordered:
            return tuple(Slot(f"{self.name} / {trial}", trial, None) for trial in range(1, self.sweep.trials + 1))
        runs = (self.run(trial, params) for trial, params in enumerate(self._settings(), 1))
        return tuple(Slot(run.id, run.trial, run) for run in runs)

    def run(self, trial: int, params: Values) -> Run:
        """The run of these parameters.

        Raises:
            ConfigError: a value that is not allowed.
            RecipeError: a recipe that does not parse.
        """
        method = self.method
        in_recipe = {name: _text(value) for name, value in params.items() if name not in FIELD_TYPES}
        values = self.sweep.base | self.axes | method.fields
        values |= {name: value for name, value in params.items() if name in FIELD_TYPES}
        config = TrainConfig(**values, recipe=method.recipe.format(**in_recipe), out=self.sweep.out)
        try:
            config.check()
            name = run_id(method.name, params | self.axes, config)
        except hiddenkey.UserError as error:
            raise type(error)(f"methods.{method.name}, {_told(params | self.axes)}: {error}") from None
        folder = str(Path(self.sweep.out) / WORK / name)
        config = TrainConfig(**values, recipe=config.recipe, out=folder)
        return Run(name, self.sweep.name, method.name, params, self.axes, trial, self.trials, config)

    def corners(self) -> Iterator[Run]:
        """Runs that show whether every value of the space is allowed: each one's ends, the others at their first."""
        first = {name: dimension.ends[0] for name, dimension in self.method.space.items()}
        yield self.run(0, first)
        for name, dimension in self.method.space.items():
            for end in dimension.ends[1:]:
                yield self.run(0, first | {name: end})

    def known_runs(self) -> Iterator[Run]:
        """Its runs; of a search that chooses them later, those at the corners."""
        return self.corners() if self.ordered else (slot.run for slot in self.slots if slot.run is not None)

    def _settings(self) -> list[Values]:
        if self.sweep.search == "grid":
            return _grid(self.method.space)
        return draw_random(self.method.space, self.sweep.trials, self.name)


@dataclass(frozen=True)
class SweepPlan:
    """All groups of a sweep: for every combination of axes, every method."""

    sweep: SweepFile
    groups: tuple[Group, ...]

    @cached_property
    def name(self) -> str:
        """Its name in a storage that holds many sweeps; another base makes another name."""
        return f"{self.sweep.name} / {_digest({'base': self.sweep.base, 'search': self.sweep.search})}"

    @property
    def folder(self) -> Path:
        """Where records, logs and the storage lie."""
        return Path(self.sweep.out)

    @property
    def total(self) -> int:
        """Number of runs."""
        return sum(len(group.slots) for group in self.groups)


def make_plan(sweep: SweepFile) -> SweepPlan:
    """Expand a sweep; every configuration and recipe is checked.

    Raises:
        ConfigError: unequal numbers of trials, two equal runs, model or data missing, a value that is not allowed.
        RecipeError: a recipe that does not parse.
    """
    for name in ("model", "data"):
        if name not in sweep.base and not any(name in axis[0] for axis in sweep.axes):
            raise ConfigError(f"base: {name} is missing; every run needs a model and data.")
    _check_counts(sweep)
    combinations = [_merged(points) for points in itertools.product(*sweep.axes)]
    groups = tuple(Group(sweep, method, axes) for axes in combinations for method in sweep.methods)
    for group in groups:
        if sweep.search != "grid":
            list(group.corners())
    _check_names(sweep)
    _check_ids(groups)
    return SweepPlan(sweep, groups)


def _merged(points: tuple[Values, ...]) -> Values:
    return {name: value for point in points for name, value in point.items()}


def _grid(space: Space) -> list[Values]:
    lists = [dimension.values for dimension in space.values() if isinstance(dimension, Choice)]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*lists)]


def _check_counts(sweep: SweepFile) -> None:
    if sweep.search != "grid":
        return
    counts = {method.name: len(_grid(method.space)) for method in sweep.methods}
    if len(set(counts.values())) > 1:
        usual = Counter(counts.values()).most_common(1)[0][0]
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConfigError(
            f"methods have unequal numbers of trials, so that the one with more would win by chance: {told}. "
            f"Give every grid as many points, for instance {usual}."
        )


def _check_names(sweep: SweepFile) -> None:
    seen: dict[str, str] = {}
    for method in sweep.methods:
        other = seen.setdefault(method_key(method.name), method.name)
        if other != method.name:
            raise ConfigError(f"methods: {other!r} and {method.name!r} are one name to the report; rename one.")


def _check_ids(groups: tuple[Group, ...]) -> None:
    seen: dict[str, str] = {}
    for group in groups:
        settings: set[str] = set()
        for run in group.known_runs():  # corners too show whether two methods share names of files
            setting = run.id.rpartition("-")[2]
            if not group.ordered and (setting in settings or seen.get(run.id) == group.method.name):
                raise ConfigError(f"{run.id} stands for two runs that are equal; take one of them out.")
            other = seen.setdefault(run.id, group.method.name)
            if other != group.method.name:
                raise ConfigError(
                    f"methods: {other!r} and {group.method.name!r} have a run in common, and one name for its file, "
                    f"{run.id}: names of files keep a to z, digits, dots and underscores. Rename one."
                )
            settings.add(setting)


def _digest(values: Values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _told(values: Values) -> str:
    return ", ".join(f"{name} = {plain(value)!r}" for name, value in values.items())
