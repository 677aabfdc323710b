"""From a sweep file to its runs, and the checks before the first of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

import hiddenkey

from .artifacts import NOT_OF_THE_RUN, RESULT, read_result
from .config import DEFAULTS, FIELD_TYPES, TrainConfig, plain
from .errors import ConfigError, RunError
from .sweep_file import Method, SweepFile, Values, number_of_points

_MOST_RUNS = 100_000
_STARTUP = 5
_TRIES = 1000
_LONGEST_SLUG = 100

# What neither the data nor the structure of a model depends on.
_FREE = (
    *("out", "overwrite", "recipe", "learning_rate", "epochs", "max_steps", "batch_size", "eval_batch_size", "seed"),
    *("gradient_accumulation", "weight_decay", "warmup", "scheduler", "max_grad_norm", "label_smoothing", "keep"),
    *("data_seed", "patience", "dtype", "save_steps", "log_steps", "lora_r", "lora_alpha", "lora_dropout"),
    *("gradient_checkpointing", "train_eval_size", "group_by_length", "neftune_alpha"),
)


@dataclass(frozen=True)
class Run:
    """One run: its id, which names its folder, its configuration, and what `RunResult.sweep` says of it."""

    id: str
    config: TrainConfig
    sweep: Values


@dataclass(frozen=True)
class Group:
    """A method on one combination of axes: the trials among which one is chosen by validation."""

    file: SweepFile
    method: Method
    axes: Values

    @cached_property
    def name(self) -> str:
        """It seeds what random search and TPE draw, so it changes with all that the trials share."""
        space = {name: repr(values) for name, values in self.method.space.items()}
        shared = [self.file.base | self.method.fields, self.method.recipe, self.file.search, space]
        axes = " ".join(f"{name}={plain(value)}" for name, value in self.axes.items())
        return " / ".join(filter(None, (self.file.name, self.method.name, axes, _digest(shared))))

    @property
    def trials(self) -> int:
        """How many trials it has when all are done."""
        return self.file.trials or int(number_of_points(self.method.space))

    def slots(self) -> list[Slot]:
        """Its trials, in order; TPE chooses their runs later."""
        if self.file.search == "tpe":
            return [Slot(f"{self.name} / {trial}", self, trial, None) for trial in range(1, self.trials + 1)]
        runs = [self.run(trial, params) for trial, params in enumerate(self._settings(), 1)]
        return [Slot(run.id, self, trial, run) for trial, run in enumerate(runs, 1)]

    def run(self, trial: int, params: Values) -> Run:
        """The run of these parameters. Raises ConfigError or RecipeError for what is not allowed."""
        method = self.method
        fields = {name: value for name, value in params.items() if name in FIELD_TYPES}
        # repr, as str would round nothing but write texts the same
        texts = {name: value if isinstance(value, str) else repr(value) for name, value in params.items()}
        values = self.file.base | self.axes | method.fields | fields
        config = TrainConfig(**values, recipe=method.recipe.format(**texts), out=self.file.out)
        try:
            config.check()
            name = _run_id(method.name, params | self.axes, config)
        except hiddenkey.UserError as error:
            said = ", ".join(f"{name} = {plain(value)!r}" for name, value in (params | self.axes).items())
            raise type(error)(f"methods.{method.name}, {said}: {error}") from None
        sweep = {
            "name": self.file.name,
            "method": method.name,
            "params": {name: plain(value) for name, value in params.items()},
            "axes": {name: plain(value) for name, value in self.axes.items()},
            "trial": trial,
            "trials": self.trials,
        }
        return Run(name, replace(config, out=str(Path(self.file.out) / name)), sweep)

    def corners(self) -> list[Run]:
        """Runs that show whether every value of the space is allowed: each one's ends, the others at their first."""
        space = self.method.space.items()
        ends = {name: values if isinstance(values, tuple) else (values.low, values.high) for name, values in space}
        first = {name: values[0] for name, values in ends.items()}
        settings = [first | {name: value} for name, values in ends.items() for value in values]
        return [self.run(0, setting) for setting in settings or [first]]

    def next_setting(self, earlier: list[tuple[Values, float]]) -> Values:
        """What TPE or random search tries after `earlier`, pairs of settings and values (lower is better).

        No setting comes twice. Seeds are fixed, so the same history gives the same setting.
        """
        space = self.method.space
        kinds = {name: _distribution(values) for name, values in space.items()}
        coded = [
            {
                name: space[name].index(value) if isinstance(space[name], tuple) else value
                for name, value in setting.items()
            }
            for setting, _ in earlier
        ]
        learns = self.file.search == "tpe"
        for attempt in range(_TRIES * (len(earlier) + 1)):
            seed = int(_digest([self.name, len(earlier), attempt]), 16)
            # Where TPE would only repeat itself, as in a space of few values, chance goes on.
            by_tpe = learns and attempt < 10
            sampler: BaseSampler = TPESampler(seed=seed, n_startup_trials=_STARTUP) if by_tpe else RandomSampler(seed)
            study = optuna.create_study(sampler=sampler)
            for params, (_, value) in zip(coded, earlier, strict=True) if by_tpe else ():
                study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=value))
            drawn = study.ask(kinds).params
            if drawn not in coded:
                return {
                    name: space[name][value] if isinstance(space[name], tuple) else value
                    for name, value in drawn.items()
                }
        raise ConfigError(
            f"methods.{self.method.name}: no other setting than {len(earlier)} is found; ask for fewer trials."
        )

    def stored(self, trial: int, setting: Any) -> tuple[Values, Run]:
        """A setting as a storage holds it, and its run. Raises RunError where the file does not allow it."""
        try:
            if not isinstance(setting, dict) or setting.keys() != self.method.space.keys():
                raise ConfigError(f"the names are {', '.join(self.method.space)}")
            typed = {name: tuple(value) if isinstance(value, list) else value for name, value in setting.items()}
            return typed, self.run(trial, typed)
        except hiddenkey.UserError as error:
            raise RunError(f"The storage holds {str(setting)[:_LONGEST_SLUG]} for {self.name}: {error}") from None

    def _settings(self) -> list[Values]:
        if self.file.search == "grid":
            points = itertools.product(*self.method.space.values())
            return [dict(zip(self.method.space, values, strict=True)) for values in points]
        settings: list[tuple[Values, float]] = []
        for _ in range(self.trials):
            settings.append((self.next_setting(settings), 0.0))
        return [setting for setting, _ in settings]


@dataclass(frozen=True)
class Slot:
    """A place for one trial of a group; `key` is its name in the storage, `run` None until TPE chooses one."""

    key: str
    group: Group
    trial: int
    run: Run | None


@dataclass(frozen=True)
class SweepPlan:
    """For every combination of axes, every method, and of each all trials."""

    file: SweepFile
    slots: tuple[Slot, ...]

    @cached_property
    def name(self) -> str:
        """Its name in a storage that holds many sweeps; another file makes another name."""
        return f"{self.file.name} / {_digest([[slot.key, slot.group.method.name] for slot in self.slots])}"

    @property
    def folder(self) -> Path:
        """Where runs, logs and the database lie."""
        return Path(self.file.out)

    def known_runs(self) -> list[Run]:
        """Its runs; of a search by TPE those at the corners."""
        if self.file.search != "tpe":
            return [slot.run for slot in self.slots if slot.run is not None]
        groups = {slot.group.name: slot.group for slot in self.slots}
        return [run for group in groups.values() for run in group.corners()]


def make_plan(file: SweepFile) -> SweepPlan:
    """Expand a sweep; every configuration and recipe is checked.

    Raises:
        ConfigError: unequal numbers of trials, two equal runs, too many runs, a value that is not allowed.
        RecipeError: a recipe that does not parse.
    """
    _check_counts(file)
    points = [
        {name: value for part in parts for name, value in part.items()} for parts in itertools.product(*file.axes)
    ]
    groups = [Group(file, method, axes) for axes in points for method in file.methods]
    for group in groups if file.search != "grid" else ():
        group.corners()
    plan = SweepPlan(file, tuple(slot for group in groups for slot in group.slots()))
    seen: dict[str, str] = {}
    settings: set[tuple[str, str]] = set()
    for run in plan.known_runs():
        method, setting = str(run.sweep["method"]), run.id.rpartition("-")[2]
        if seen.setdefault(run.id, method) != method:
            raise ConfigError(
                f"methods: {seen[run.id]!r} and {method!r} share the name of a run, {run.id}. Rename one."
            )
        if (method, setting) in settings and file.search != "tpe":
            raise ConfigError(f"{run.id} stands for two runs that are equal; take one of them out.")
        settings.add((method, setting))
    return plan


def _check_counts(file: SweepFile) -> None:
    counts = {method.name: file.trials or number_of_points(method.space) for method in file.methods}
    for method in file.methods:
        if number_of_points(method.space) < file.trials:
            raise ConfigError(
                f"methods.{method.name}: grid has {number_of_points(method.space):g} different settings, but "
                f"trials = {file.trials}; give it more values or ranges, or ask for fewer trials."
            )
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count:g}" for name, count in counts.items())
        raise ConfigError(
            f"methods have unequal numbers of trials, so that the one with more would win by chance: {said}. Give "
            "every grid as many points."
        )
    total = sum(counts.values())
    for axis in file.axes:
        total *= len(axis)
    if total > _MOST_RUNS:
        raise ConfigError(f"the file asks for {total:g} runs; a sweep has at most {_MOST_RUNS}. Split it.")
    names: dict[str, str] = {}
    for method in file.methods:
        other = names.setdefault(" ".join(re.sub("[:_]", " ", method.name.lower()).split()), method.name)
        if other != method.name:
            raise ConfigError(f"methods: {other!r} and {method.name!r} are one name to a reader; rename one.")


def _run_id(method: str, values: Values, config: TrainConfig) -> str:
    """Method and values, and a hash of all fields that differ from their defaults: a new field changes no id."""
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_OF_THE_RUN}
    made_of = {name: value for name, value in fields.items() if name not in DEFAULTS or value != DEFAULTS[name]}
    made_of["recipe"] = str(hiddenkey.parse(config.recipe))
    words = [method, *(f"{name}{_short(value)}" for name, value in values.items())]
    slug = "-".join(re.sub(r"[^a-z0-9._]+", "-", word.lower()).strip("-.") for word in words)
    return f"{slug[:_LONGEST_SLUG].strip('-.')}-{_digest(made_of)}"


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "-".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _distribution(values: Any) -> BaseDistribution:
    return CategoricalDistribution(range(len(values))) if isinstance(values, tuple) else values


def check_plan(plan: SweepPlan) -> None:
    """Check data, metrics, model, LoRA's targets, tokenizer, prompts and recipes, each combination once.

    Raises:
        RunError: the data have changed since some runs were made.
        UserError, OSError: as `hiddenkey.lab.run.train` before it reads the weights.
    """
    from .checked import check_run, check_structure
    from .models import require_dtype
    from .quiet import quieten
    from .tasks import refuse_smoothing

    quieten()
    kinds: dict[str, dict[int, list[TrainConfig]]] = {}
    for run in plan.known_runs():
        kind = json.dumps({name: plain(getattr(run.config, name)) for name in FIELD_TYPES if name not in _FREE})
        kinds.setdefault(kind, {}).setdefault(run.config.data_seed, []).append(run.config)
    for seeds in kinds.values():
        all_configs = [config for configs in seeds.values() for config in configs]
        for configs in seeds.values():
            checked = check_run(configs[0], hiddenkey.parse(configs[0].recipe))
            _require_same_rows(configs, checked.examples.digest)
        recipes = dict.fromkeys(config.recipe for config in all_configs)
        check_structure(all_configs[0], checked.examples, checked.task, recipes)
        for smoothing in {config.label_smoothing for config in all_configs}:
            refuse_smoothing(checked.examples.task, smoothing)
        for dtype in {config.dtype for config in all_configs}:
            require_dtype(dtype)


def _require_same_rows(configs: list[TrainConfig], digest: str) -> None:
    made = next((Path(config.out) for config in configs if (Path(config.out) / RESULT).exists()), None)
    found = read_result(made) if made else None
    if found is not None and found.data_digest not in ("", digest):
        raise RunError(
            f"the rows of {configs[0].data} with data_seed = {configs[0].data_seed} are no longer those of {made}, "
            "which is made already. Bring the old ones back, or give another --out, and all runs are made anew."
        )
