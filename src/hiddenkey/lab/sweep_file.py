"""The sweep file: YAML to a checked `SweepFile`; and the flags of `hiddenkey sweep`."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
import yaml

from ..registry import nearest, unknown
from .config import FIELD_TYPES, OF_A_TASK, PATHS, convert, expanded
from .config_file import parse_yaml, read_yaml
from .errors import ConfigError

Search = Literal["grid", "random", "tpe"]
Values = dict[str, Any]
Space = dict[str, Any]
"""Name of what is varied: a tuple of values, or Optuna's distribution of a range."""

_KEYS = ("name", "out", "base", "methods", "axes", "search", "trials")
_NOT_SHARED = ("out", "overwrite", "recipe")
_SHARED = tuple(name for name in FIELD_TYPES if name not in _NOT_SHARED)
_SAME_FOR_ALL = (*OF_A_TASK, "seed", "data_seed")
_OF_GENERATION = ("num_beams", "length_penalty", "no_repeat_ngram", "max_new_tokens")
_MOST_TRIALS = 1000
_SHOWN = 200


@dataclass(frozen=True)
class SweepConfig:
    """Run every method, trial and seed that a sweep file asks for; the same command continues after any stop."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """The sweep file, in YAML; docs/sweeps.md describes it."""
    workers: int = 1
    """Processes on this machine, each with one run at a time."""
    worker: bool = False
    """Be one worker; start any number of them, on any number of machines."""
    storage: str = ""
    """Database URL that all machines share, such as postgresql+psycopg://user@host/db; default: a file in `out`."""
    grace: int = 120
    """Seconds without a heartbeat after which a run is given to another worker; the same for all workers."""
    dry_run: bool = False
    """Check the file, its recipes, data and models, print the plan, and run nothing."""
    out: str = ""
    """Used instead of the file's `out`."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A field of the file's `base`, such as --set model=./tiny; may be given several times."""

    def check(self) -> None:
        """Raises ConfigError for a value out of its range, or flags that exclude one another."""
        if self.workers < 1:
            raise ConfigError(f"workers = {self.workers} is not allowed: it is a whole number of 1 or more.")
        if self.grace < 4:
            raise ConfigError(f"grace = {self.grace} is not allowed: it is 4 seconds or more.")
        if self.worker and (self.workers > 1 or self.dry_run):
            raise ConfigError("--worker is one process that works; give it without --workers and --dry-run.")


@dataclass(frozen=True)
class Method:
    """A recipe, perhaps with {names} to fill, fields of its own, and what its trials vary."""

    name: str
    recipe: str
    fields: Values = field(default_factory=dict)
    space: Space = field(default_factory=dict)


@dataclass(frozen=True)
class SweepFile:
    """A sweep as its file gives it, every value in the type of its field."""

    name: str
    out: str
    base: Values
    methods: tuple[Method, ...]
    axes: tuple[tuple[Values, ...], ...]
    search: Search
    trials: int
    """Trials of every method on each combination of axes; 0 for a grid, which has as many as it has points."""


def read_sweep(path: str | Path, sets: Iterable[str] = (), out: str = "") -> SweepFile:
    """Read a sweep file; `sets` are texts `field=value` that replace fields of its base.

    Raises:
        ConfigError: unknown or missing names, values of wrong types, a field that is given in two places.
        OSError: the file cannot be read.
    """
    given = read_yaml(path)
    try:
        _known("the file", given, _KEYS, required=("name", "out", "base", "methods"))
        search = given.get("search", "grid")
        if search not in get_args(Search):
            raise _wrong("search", search, f"one of {', '.join(get_args(Search))}")
        sweep = SweepFile(
            name=_text("name", given["name"]),
            out=expanded(out or _text("out", given["out"])),
            base=_fields("base", given["base"]) | _sets(sets),
            methods=_methods(given["methods"], search),
            axes=_axes(given.get("axes", {})),
            search=search,
            trials=_trials(given, search),
        )
        _check_places(sweep)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return sweep


def number_of_points(space: Space) -> float:
    """How many different settings a space has; infinite where it holds a range of real numbers."""
    sizes = (len(values) if isinstance(values, tuple) else _steps(values) for values in space.values())
    return math.prod(sizes, start=1.0)


def _steps(distribution: Any) -> float:
    return distribution.high - distribution.low + 1 if isinstance(distribution.high, int) else math.inf


def _wrong(where: str, given: Any, allowed: str) -> ConfigError:
    shown = repr(given)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return ConfigError(f"{where} = {shown} is not allowed: it is {allowed}.")


def _known(where: str, given: Any, allowed: tuple[str, ...], required: tuple[str, ...] = ()) -> None:
    if not isinstance(given, Mapping):
        raise _wrong(where, given, f"a mapping of {', '.join(allowed)}")
    for name in given:
        if name not in allowed:
            raise ConfigError(f"{where}: {unknown('name', str(name)[:_SHOWN], allowed)}")
    missing = [name for name in required if name not in given]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} is missing; it needs {', '.join(required)}.")


def _text(where: str, given: Any) -> str:
    if not isinstance(given, str) or not given.strip() or len(given) > _SHOWN:
        raise _wrong(where, given, f"a text of 1 to {_SHOWN} letters")
    return given


def _fields(where: str, given: Any) -> Values:
    _known(where, given, _SHARED)
    # Paths are made absolute from ~, or the ids of runs would not say which model and data they are of.
    values = {name: _value(where, name, value) for name, value in given.items()}
    return {name: expanded(value) if name in PATHS else value for name, value in values.items()}


def _value(where: str, name: str, given: Any) -> Any:
    """A value in the type of the field `name`; a name that is no field is a number or a text for the recipe."""
    if name in FIELD_TYPES:
        try:
            return convert(name, given)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    if isinstance(given, str):
        return _number(given)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise _wrong(where, given, "a number or a text where it stands in a recipe")
    return given


def _number(text: str) -> float | str:
    # YAML reads 1e-4 as a text; what is a whole number was quoted on purpose, and Python reads 1_0 as ten.
    try:
        number = float(text)
    except ValueError:
        return text
    return text if "_" in text or text.lstrip("+-").isdigit() or not math.isfinite(number) else number


def _sets(sets: Iterable[str]) -> Values:
    values = {}
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text} is not allowed: write --set field=value, such as --set model=./tiny.")
        if name in values:
            raise ConfigError(f"--set gives {name} twice; give it once.")
        try:
            values[name] = parse_yaml(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--set {text}: {value!r} is not YAML: {error}") from error
    return _fields("--set", values)


def _methods(given: Any, search: Search) -> tuple[Method, ...]:
    if not isinstance(given, Mapping) or not given:
        raise _wrong("methods", given, "a mapping of one or more names to methods")
    methods = []
    for name, entry in given.items():
        where = f"methods.{_text('the name of a method', name)}"
        _known(where, entry, ("recipe", "set", "grid"), required=("recipe",))
        grid = entry.get("grid", {})
        if not isinstance(grid, Mapping):
            raise _wrong(f"{where}.grid", grid, "a mapping of names to lists of values")
        space = {str(of): _dimension(f"{where}.grid.{of}", str(of), values, search) for of, values in grid.items()}
        recipe = _text(f"{where}.recipe", entry["recipe"])
        methods.append(Method(name, recipe, _fields(f"{where}.set", entry.get("set", {})), space))
    return tuple(methods)


def _dimension(where: str, name: str, given: Any, search: Search) -> Any:
    if isinstance(given, Mapping) and search != "grid":
        return _range(where, name, given)
    if not isinstance(given, list) or not given:
        more = (
            "; a range needs search: random or tpe" if search == "grid" else ", or {low: 0.01, high: 0.3, log: true}"
        )
        raise _wrong(where, given, f"a list of one or more values{more}")
    return _each_once(where, [_value(where, name, item) for item in given])


def _range(where: str, name: str, given: Mapping[Any, Any]) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution  # takes half a second

    _known(where, given, ("low", "high", "log"), required=("low", "high"))
    low, high = (_value(where, name, given[key]) for key in ("low", "high"))
    log = given.get("log", False)
    numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not isinstance(log, bool) or not low < high or (log and low <= 0):
        allowed = "two numbers with low below high, and above 0 where log is true"
        raise _wrong(where, dict(given), allowed)
    whole = isinstance(low, int) and isinstance(high, int)
    return IntDistribution(low, high, log=log) if whole else FloatDistribution(low, high, log=log)


def _each_once(where: str, values: list[Any]) -> tuple[Any, ...]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"{where}: {value!r} stands in it twice; give every value once.")
    return tuple(values)


def _axes(given: Any) -> tuple[tuple[Values, ...], ...]:
    if not isinstance(given, Mapping):
        raise _wrong("axes", given, "a mapping of fields to lists of values")
    axes = []
    for key, entries in given.items():
        where, names = f"axes.{key}", [name.strip() for name in str(key).split(",")]
        if not isinstance(entries, list) or not entries:
            raise _wrong(where, entries, "a list of one or more values")
        rows = entries if len(names) > 1 else [[entry] for entry in entries]
        if not all(isinstance(row, list) and len(row) == len(names) for row in rows):
            raise _wrong(where, entries, f"a list of lists of {len(names)} values")
        _each_once(f"axes: {key}", names)
        axes.append(_each_once(where, [_fields(where, dict(zip(names, row, strict=True))) for row in rows]))
    return tuple(axes)


def _trials(given: Mapping[str, Any], search: Search) -> int:
    trials = given.get("trials", 0)
    if search == "grid":
        if "trials" in given:
            raise ConfigError("trials is for search: random or tpe; a grid has as many trials as it has points.")
        return 0
    if isinstance(trials, bool) or not isinstance(trials, int) or not 1 <= trials <= _MOST_TRIALS:
        raise _wrong(f"search: {search}, trials", trials, f"a whole number from 1 to {_MOST_TRIALS}")
    return trials


def _check_places(sweep: SweepFile) -> None:
    """A field has one place, except that a method may give another value than the base."""
    in_axes = [name for axis in sweep.axes for name in axis[0]]
    for name in in_axes:
        if in_axes.count(name) > 1:
            raise ConfigError(f"axes: {name} stands in two axes; give it in one.")
        if name in _OF_GENERATION and not sweep.base.get("generation_metrics"):
            raise ConfigError(f"axes: {name} changes nothing without generation_metrics in base.")
        if name in ("task", "metric"):
            raise ConfigError(f"axes: {name} cannot be one: a sweep's runs are judged alike; write a sweep for each.")
        if name in sweep.base:
            raise ConfigError(f"{name} stands in base and in axes; give it in one of them.")
    for name in ("model", "data"):
        if name not in (*sweep.base, *in_axes):
            raise ConfigError(f"base: {name} is missing; every run needs a model and data.")
    for method in sweep.methods:
        where = f"methods.{method.name}"
        for name in (*method.fields, *method.space):
            if name in in_axes:
                raise ConfigError(f"{where}: {name} is an axis; an axis is the same for all methods.")
            if name in _SAME_FOR_ALL:
                raise ConfigError(f"{where}: {name} is the same for all methods; give it in base or in axes.")
            if name in method.space and name in method.fields:
                raise ConfigError(f"{where}: {name} stands in set and in grid; give it in one of them.")
        _check_names(where, method)


def _check_names(where: str, method: Method) -> None:
    try:
        parts = [part[1:] for part in string.Formatter().parse(method.recipe) if part[1] is not None]
        if any(form or conversion or not str(name).isidentifier() for name, form, conversion in parts):
            raise ValueError("only a name stands in braces")
    except ValueError as error:
        raise ConfigError(f"{where}: {method.recipe!r}: {error}; write {{p}} where the value of p goes.") from error
    in_recipe = {str(name) for name, _, _ in parts}
    for name in sorted(in_recipe - set(method.space)):
        raise ConfigError(f"{where}: the recipe has {{{name}}}, but grid has no {name}; give its values there.")
    for name in method.space:
        if name in in_recipe and name in FIELD_TYPES:
            raise ConfigError(
                f"{where}.grid: {name} is a field of `hiddenkey train`; name what is in braces otherwise."
            )
        if name not in in_recipe and name not in _SHARED:
            hint = nearest(name, [*_SHARED, *in_recipe])
            raise ConfigError(
                f"{where}.grid: {name[:_SHOWN]} is neither a field that can be varied nor in the recipe.{hint} Write "
                f"{{{name[:_SHOWN]}}} where the recipe needs its value."
            )
