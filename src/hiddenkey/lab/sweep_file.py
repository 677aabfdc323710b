"""The sweep file: YAML, checked, to the runs it asks for; and the checks before the first of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import string
import warnings
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

import hiddenkey

from ..errors import ConfigError, RunError
from ..registry import nearest, unknown
from .config import (
    DEFAULTS,
    FIELD_TYPES,
    OF_A_TASK,
    PATHS,
    TrainConfig,
    convert,
    expanded,
    parse_yaml,
    plain,
    read_yaml,
)
from .run_folder import NOT_OF_THE_RUN, RESULT, read_result

Values = dict[str, Any]

_SHARED = tuple(name for name in FIELD_TYPES if name not in ("out", "overwrite", "recipe"))
_SAME_FOR_ALL = (*OF_A_TASK, "seed", "data_seed")
_CHECKED = (
    *OF_A_TASK,
    *("data_seed", "target_modules", "attn_implementation", "trust_remote_code", "dtype", "label_smoothing"),
)
"""Fields on which data, structure and their checks depend."""
_SHOWN, _LONGEST_SLUG, _MOST_RUNS, _MOST_DRAWS = 200, 100, 100_000, 100_000

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", "Choices for a categorical distribution")  # lists of names; nothing stores them


def _value(name: str, given: Any) -> Any:
    """A value in the type of the field `name`; a name that is no field is a number or a text for the recipe."""
    if name in FIELD_TYPES:
        value = convert(name, given)
        # Absolute from ~, or the ids of runs would not say which model and data they are of.
        return expanded(value) if name in PATHS else value
    if isinstance(given, str):  # YAML reads 1e-4 as a text
        return float(given) if re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", given) else given
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise ConfigError(f"{name} = {given!r} is not allowed: it is a number or a text where it stands in a recipe.")
    return given


def _fields(given: Values) -> Values:
    for name in given:
        if name not in _SHARED:
            raise ConfigError(unknown("name", name, _SHARED))
    return {name: _value(name, value) for name, value in given.items()}


def _each_once(name: str, values: list[Any]) -> list[Any]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"{name}: {value!r} stands in it twice; give every value once.")
    return values


def _distributions(grid: Values) -> Values:
    return {name: _distribution(name, given) for name, given in grid.items()}


def _distribution(name: str, given: Any) -> BaseDistribution:
    way = "a list of one or more values, or {low: 0.01, high: 0.3, log: true}, where log may be left out"
    try:
        if isinstance(given, dict) and given.keys() <= {"low", "high", "log"}:
            ends = {end: value if end == "log" else _value(name, value) for end, value in given.items()}
            whole = all(isinstance(ends.get(end), int) for end in ("low", "high"))
            return IntDistribution(**ends) if whole else FloatDistribution(**ends)
        if isinstance(given, list) and given:
            return CategoricalDistribution(_each_once(name, [_value(name, value) for value in given]))
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # Optuna's, of ends that are none
        way = f"{way} ({error})"
    raise ConfigError(f"{name} = {given!r} is not allowed: it is {way}.")


def _points(axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
    points = {}
    for key, entries in axes.items():
        names = [name.strip() for name in key.split(",")]
        rows = entries if len(names) > 1 else [[entry] for entry in entries]
        if not rows or not all(isinstance(row, list) and len(row) == len(names) for row in rows):
            kind = "values" if len(names) == 1 else f"lists of {len(names)} values"
            raise ConfigError(f"{key} = {entries!r} is not allowed: it is a list of one or more {kind}.")
        points[key] = _each_once(key, [_fields(dict(zip(names, row, strict=True))) for row in rows])
    return points


Text = Annotated[str, Field(max_length=_SHOWN, pattern=r"\S")]
Name = Annotated[str, Field(max_length=_LONGEST_SLUG - 20, pattern=r"[A-Za-z0-9]")]
Fields = Annotated[Values, AfterValidator(_fields)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Method(_Part):
    """A recipe, perhaps with {names} to fill, fields of its own, and what its trials vary."""

    recipe: Text
    set: Fields = {}
    grid: Annotated[Values, AfterValidator(_distributions)] = {}
    """Optuna's distributions by name."""

    @property
    def size(self) -> float:
        """How many different settings it has; infinite where a range holds real numbers."""
        return math.prod((_size(distribution) for distribution in self.grid.values()), start=1.0)

    @model_validator(mode="after")
    def _check_names(self) -> Method:
        try:
            named = {str(name) for _, name, _, _ in string.Formatter().parse(self.recipe) if name is not None}
        except ValueError as error:
            raise ConfigError(f"{self.recipe!r}: {error}; write {{p}} where the value of p goes.") from None
        for name in sorted(named - set(self.grid)):
            raise ConfigError(f"the recipe has {{{name}}}, but grid has no {name}; give its values there.")
        for name in self.grid:
            if (name in named) == (name in FIELD_TYPES) or name in ("out", "overwrite", "recipe"):
                raise ConfigError(
                    f"grid: {name[:_SHOWN]} is neither a field that can be varied nor a name of your own in the "
                    f"recipe, as {{{name[:_SHOWN]}}}.{nearest(name[:_SHOWN], [*_SHARED, *named])}"
                )
        return self


def _size(distribution: BaseDistribution) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    return distribution.high - distribution.low + 1 if isinstance(distribution, IntDistribution) else math.inf


class SweepFile(_Part):
    """A sweep as its file gives it, every value in the type of its field."""

    name: Text
    out: Annotated[Text, AfterValidator(expanded)]
    base: Fields
    methods: Annotated[dict[Name, Method], Field(min_length=1)]
    axes: Annotated[dict[str, list[Any]], AfterValidator(_points)] = {}
    """For each line of the file: what it sets, a value after another."""
    search: Literal["grid", "random", "tpe"] = "grid"
    trials: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Trials of every method on each combination of axes; a grid has as many as it has points."""

    @model_validator(mode="after")
    def _check_places(self) -> SweepFile:
        """A field has one place, except that a method may give another value than the base."""
        in_axes = [name.strip() for key in self.axes for name in key.split(",")]
        for name in in_axes:
            if in_axes.count(name) > 1 or name in self.base:
                raise ConfigError(f"{name} stands twice in base and axes; give it once.")
            if name in ("task", "metric"):
                raise ConfigError(f"axes: {name} cannot be one: a sweep's runs are judged alike; write one for each.")
        for name in ("model", "data"):
            if name not in (*self.base, *in_axes):
                raise ConfigError(f"base: {name} is missing; every run needs a model and data.")
        for title, method in self.methods.items():
            for name in (*method.set, *method.grid):
                if name in in_axes or name in _SAME_FOR_ALL:
                    raise ConfigError(f"methods.{title}: {name} is the same for all; give it in base or in axes.")
                if name in method.set and name in method.grid:
                    raise ConfigError(f"methods.{title}: {name} stands in set and in grid; give it in one of them.")
        return self

    @model_validator(mode="after")
    def _check_counts(self) -> SweepFile:
        if (self.trials is None) != (self.search == "grid"):
            raise ConfigError(f"trials = {self.trials}: random and tpe need them; a grid has one for each point.")
        titles: dict[str, str] = {}
        for title, method in self.methods.items():
            other = titles.setdefault(re.sub("[^a-z0-9]+", " ", title.lower()).strip(), title)
            if other != title:
                raise ConfigError(f"methods: {other!r} and {title!r} are one name to a reader; rename one.")
            if method.size == math.inf and self.search == "grid":
                raise ConfigError(f"methods.{title}.grid: a range needs search: random or tpe; a grid lists values.")
            if self.trials and method.size < self.trials:
                raise ConfigError(
                    f"methods.{title}: grid has {method.size:g} different settings, but trials = {self.trials}; give "
                    "it more values or ranges, or ask for fewer trials."
                )
        counts = {title: self.trials or method.size for title, method in self.methods.items()}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{title} {count:g}" for title, count in counts.items())
            raise ConfigError(
                f"methods have unequal numbers of trials, so that the one with more would win by chance: {said}. "
                "Give every grid as many points."
            )
        total = sum(counts.values()) * math.prod(map(len, self.axes.values()))
        if total > _MOST_RUNS:
            raise ConfigError(f"the file asks for {total:g} runs; a sweep has at most {_MOST_RUNS}. Split it.")
        return self


def read_sweep(path: str | Path, sets: Iterable[str] = (), out: str = "") -> SweepFile:
    """Read a sweep file; `sets` are texts `field=value` that replace fields of its base.

    Raises:
        ConfigError: unknown or missing names, values of wrong types, a field that is given in two places.
        OSError: the file cannot be read.
    """
    given = read_yaml(path)
    if isinstance(given, dict):
        given |= {"out": out} if out else {}
    for text in sets:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError("write --set field=value, such as --set model=./tiny")
            if isinstance(given, dict) and isinstance(given.get("base"), dict):
                given["base"][name] = parse_yaml(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--set {text} is not allowed: {error}") from None
    try:
        return SweepFile.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_message(error)}") from None


def _message(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part)[:_SHOWN] for part in first["loc"])
    if first["type"] == "value_error":  # one of ours
        return f"{where}: {first['ctx']['error']}".removeprefix(": ")
    if first["type"] == "missing":
        return f"{where} is missing."
    if first["type"] == "extra_forbidden":
        known = SweepFile.model_fields if len(first["loc"]) == 1 else Method.model_fields
        return f"{where}: {unknown('name', str(first['loc'][-1])[:_SHOWN], known)}"
    shown = repr(first["input"])
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return f"{where} = {shown} is not allowed: {first['msg']}.".removeprefix(" = ")


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
    title: str
    axes: Values

    @property
    def method(self) -> Method:
        """What its trials are of."""
        return self.file.methods[self.title]

    @cached_property
    def name(self) -> str:
        """It seeds what random search and TPE draw, so it changes with all that the trials share."""
        shared = [self.file.base | self.method.set, self.method.recipe, self.file.search, repr(self.method.grid)]
        axes = " ".join(f"{name}={plain(value)}" for name, value in self.axes.items())
        return " / ".join(filter(None, (self.file.name, self.title, axes, _digest(shared))))

    @property
    def trials(self) -> int:
        """How many trials it has when all are done."""
        return self.file.trials or int(self.method.size)

    def settings(self) -> Generator[Values, float | None, None]:
        """The settings of its trials; TPE is sent the value of each (lower is better) before it gives the next.

        No setting comes twice. Seeds are fixed, so the same values give the same settings.
        """
        grid = self.method.grid
        if self.file.search == "grid":
            for values in itertools.product(*(distribution.choices for distribution in grid.values())):
                yield dict(zip(grid, values, strict=True))
            return
        seed = int(_digest(self.name), 16)
        chance: BaseSampler = RandomSampler(seed)
        sampler = TPESampler(seed=seed, n_startup_trials=5) if self.file.search == "tpe" else chance
        study, taken = optuna.create_study(), list[Values]()
        for _ in range(self.trials):
            study.sampler = sampler
            for _ in range(_MOST_DRAWS):
                trial = study.ask(grid)
                # Machines may differ in the last digits of a logarithm; their runs must not.
                setting = {
                    name: min(max(float(f"{value:.6g}"), grid[name].low), grid[name].high)
                    if isinstance(grid[name], FloatDistribution)
                    else value
                    for name, value in trial.params.items()
                }
                if setting not in taken:
                    break
                study.tell(trial, state=TrialState.FAIL)
                study.sampler = chance  # where TPE would only repeat itself, as in a space of few values
            taken.append(setting)
            study.tell(trial, (yield setting) or 0.0)

    def run(self, trial: int, params: Values) -> Run:
        """The run of these parameters. Raises ConfigError or RecipeError for what is not allowed."""
        fields = {name: value for name, value in params.items() if name in FIELD_TYPES}
        # repr, as str would round nothing but write texts the same
        texts = {name: value if isinstance(value, str) else repr(value) for name, value in params.items()}
        try:
            recipe = self.method.recipe.format(**texts)
            config = TrainConfig(
                **(self.file.base | self.axes | self.method.set | fields), recipe=recipe, out=self.file.out
            )
            config.check()
            name = _run_id(self.title, params | self.axes, config)
        except (ValueError, LookupError, AttributeError) as error:  # the last two of braces that hold no name
            said = ", ".join(f"{name} = {plain(value)!r}" for name, value in (params | self.axes).items())
            kind = type(error) if isinstance(error, hiddenkey.UserError) else ConfigError
            raise kind(f"methods.{self.title}, {said}: {error}") from None
        sweep = {
            "name": self.file.name,
            "method": self.title,
            "params": {name: plain(value) for name, value in params.items()},
            "axes": {name: plain(value) for name, value in self.axes.items()},
            "trial": trial,
            "trials": self.trials,
        }
        return Run(name, replace(config, out=str(Path(self.file.out) / name)), sweep)

    def corners(self) -> list[Run]:
        """Runs that show whether every value of the space is allowed: each one's ends, the others at their first."""
        ends = {
            name: each.choices if isinstance(each, CategoricalDistribution) else (each.low, each.high)
            for name, each in self.method.grid.items()
        }
        first = {name: values[0] for name, values in ends.items()}
        settings = [first | {name: value} for name, values in ends.items() for value in values]
        return [self.run(0, setting) for setting in settings or [first]]


@dataclass(frozen=True)
class Slot:
    """A place for one trial of a group; its run is None until TPE chooses it."""

    index: int
    group: Group
    trial: int
    run: Run | None = None


@dataclass(frozen=True)
class SweepPlan:
    """For every combination of axes, every method, and of each all trials."""

    file: SweepFile
    slots: tuple[Slot, ...]
    known_runs: tuple[Run, ...]
    """Its runs; of a search by TPE those at the corners."""

    @cached_property
    def name(self) -> str:
        """Its name in a storage that holds many sweeps; another file makes another name."""
        return f"{self.file.name} / {_digest([[slot.group.name, slot.trial] for slot in self.slots])}"

    @property
    def folder(self) -> Path:
        """Where runs, logs and the database lie."""
        return Path(self.file.out)


def make_plan(file: SweepFile) -> SweepPlan:
    """Expand a sweep; every configuration and recipe is checked.

    Raises:
        ConfigError: two equal runs, a value that is not allowed.
        RecipeError: a recipe that does not parse.
    """
    slots: list[Slot] = []
    corners: list[Run] = []
    for parts in itertools.product(*file.axes.values()):
        axes = {name: value for part in parts for name, value in part.items()}
        for group in (Group(file, title, axes) for title in file.methods):
            corners += group.corners() if file.search != "grid" else []
            settings = itertools.repeat(None, group.trials) if file.search == "tpe" else group.settings()
            for trial, setting in enumerate(settings, 1):
                run = None if setting is None else group.run(trial, setting)
                slots.append(Slot(len(slots), group, trial, run))
    runs = [slot.run for slot in slots if slot.run is not None]
    seen: set[tuple[str, str]] = set()
    for run in runs:
        of = (str(run.sweep["method"]), run.id.rpartition("-")[2])
        if of in seen:
            raise ConfigError(f"{run.id} stands for two runs that are equal; take one of them out.")
        seen.add(of)
    return SweepPlan(file, tuple(slots), tuple(corners if file.search == "tpe" else runs))


def _run_id(method: str, values: Values, config: TrainConfig) -> str:
    """Method and values, and a hash of all fields that differ from their defaults: a new field changes no id."""
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_OF_THE_RUN}
    made_of = {name: value for name, value in fields.items() if name not in DEFAULTS or value != DEFAULTS[name]}
    made_of["recipe"] = str(hiddenkey.parse(config.recipe))
    slug = "-".join(map(_slug, (method, *(f"{name}{_short(value)}" for name, value in values.items()))))
    return f"{slug[:_LONGEST_SLUG].strip('-.')}-{_digest(made_of)}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.")


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "-".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def check_plan(plan: SweepPlan) -> None:
    """Check data, metrics, model, LoRA's targets, tokenizer, prompts and recipes, each combination once.

    Raises:
        RunError: the data have changed since some runs were made.
        UserError, OSError: as `hiddenkey.lab.train.train` before it reads the weights.
    """
    from .console import quieten
    from .model import require_dtype
    from .preflight import check_run, check_structure

    quieten()
    kinds: dict[str, list[TrainConfig]] = {}
    for run in plan.known_runs:
        kind = json.dumps([plain(getattr(run.config, name)) for name in _CHECKED])
        kinds.setdefault(kind, []).append(run.config)
    for configs in kinds.values():
        require_dtype(configs[0].dtype)
        checked = check_run(configs[0], hiddenkey.parse(configs[0].recipe))
        check_structure(configs[0], checked.examples, checked.task, dict.fromkeys(each.recipe for each in configs))
        made = next((Path(config.out) for config in configs if (Path(config.out) / RESULT).exists()), None)
        found = read_result(made) if made else None
        if found is not None and found.data_digest not in ("", checked.examples.digest):
            raise RunError(
                f"the rows of {configs[0].data} with data_seed = {configs[0].data_seed} are no longer those of "
                f"{made}, which is made already. Bring the old ones back, or give another --out."
            )
