"""The sweep file: YAML to a checked `SweepFile`."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from ...registry import nearest, unknown
from ..config import FIELD_TYPES, OF_A_TASK, PATHS, expanded
from ..config_file import read_yaml
from ..errors import ConfigError
from .space import Space, read_space, value_of

Search = Literal["grid", "random", "tpe"]
Values = dict[str, Any]

_KEYS = ("name", "out", "base", "methods", "axes", "search", "trials")
_METHOD_KEYS = ("recipe", "set", "grid")
_NOT_SHARED = ("out", "overwrite", "recipe")
_SAME_FOR_ALL = (*OF_A_TASK, "seed", "data_seed")
_ONE_PER_SWEEP = ("task", "metric")
_OF_GENERATION = ("num_beams", "length_penalty", "no_repeat_ngram", "max_new_tokens")


@dataclass(frozen=True)
class Method:
    """One row of the tables: a recipe, perhaps with {names} to fill, fields of its own, and what it varies."""

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
    search: Search = "grid"
    trials: int = 0


def read_sweep(path: str | Path, sets: Iterable[str] = (), out: str = "") -> SweepFile:
    """Read a sweep file; `sets` are texts `field=value` in the place of fields of its base.

    Raises:
        ConfigError: unknown or missing names, values of wrong types, a field that is given in two places.
        OSError: the file cannot be read.
    """
    given = _load(path)
    try:
        _known("", given, _KEYS, required=("name", "out", "base", "methods"))
        base = _fields("base", given["base"]) | _sets(sets)
        search = given.get("search", "grid")
        if search not in get_args(Search):
            raise ConfigError(f"search = {search!r} is not allowed: it is one of {', '.join(get_args(Search))}.")
        sweep = SweepFile(
            name=_text("name", given["name"]),
            out=expanded(out or _text("out", given["out"])),
            base=base,
            methods=_methods(given["methods"], search),
            axes=_axes(given.get("axes", {})),
            search=search,
            trials=_trials(given, search),
        )
        _check_places(sweep)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return sweep


def _load(path: str | Path) -> Mapping[str, Any]:
    given = read_yaml(path)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path} holds {type(given).__name__}, not the lines name, out, base and methods.")
    return given


def _known(where: str, given: Any, allowed: tuple[str, ...], required: tuple[str, ...] = ()) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} = {given!r} is not allowed: it is a mapping of {', '.join(allowed)}.")
    prefix = f"{where}: " if where else ""
    for name in given:
        if name not in allowed:
            raise ConfigError(f"{prefix}{unknown('name', str(name), allowed)}")
    missing = [name for name in required if name not in given]
    if missing:
        raise ConfigError(f"{prefix}{', '.join(missing)} is missing; it needs {', '.join(required)}.")


def _text(where: str, given: Any) -> str:
    if not isinstance(given, str) or not given.strip():
        raise ConfigError(f"{where} = {given!r} is not allowed: it is a text.")
    return given


def _fields(where: str, given: Any) -> Values:
    _known(where, given, tuple(name for name in FIELD_TYPES if name not in _NOT_SHARED))
    return {name: _absolute(name, value_of(where, name, value)) for name, value in given.items()}


def _absolute(name: str, value: Any) -> Any:
    # Else the names of runs, made of what ~ stands for, would differ between machines whose plans have one name.
    return expanded(value) if name in PATHS else value


def _sets(sets: Iterable[str]) -> Values:
    values = {}
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text} is not allowed: write --set field=value, such as --set model=./tiny.")
        if name in values:
            raise ConfigError(f"--set gives {name} twice; give it once.")
        try:
            values[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--set {text}: {value!r} is not YAML: {error}") from error
    return _fields("--set", values)


def _methods(given: Any, search: str) -> tuple[Method, ...]:
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"methods = {given!r} is not allowed: it is a mapping of one or more names to methods.")
    methods = []
    for name, entry in given.items():
        where = f"methods.{name}"
        _text(f"the name of {where}", name)
        _known(where, entry, _METHOD_KEYS, required=("recipe",))
        methods.append(
            Method(
                name,
                _text(f"{where}.recipe", entry["recipe"]),
                _fields(f"{where}.set", entry.get("set", {})),
                read_space(f"{where}.grid", entry.get("grid", {}), search),
            )
        )
    return tuple(methods)


def _axes(given: Any) -> tuple[tuple[Values, ...], ...]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"axes = {given!r} is not allowed: it is a mapping of fields to lists of values.")
    return tuple(
        _axis(f"axes.{names}", [name.strip() for name in str(names).split(",")], values)
        for names, values in given.items()
    )


def _axis(where: str, names: list[str], given: Any) -> tuple[Values, ...]:
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where} = {given!r} is not allowed: it is a list of one or more values.")
    if len(names) > 1 and not all(isinstance(entry, list) and len(entry) == len(names) for entry in given):
        raise ConfigError(f"{where} = {given!r} is not allowed: it is a list of lists of {len(names)} values.")
    if len(set(names)) < len(names):
        raise ConfigError(f"{where}: a field stands in it twice; name every field once.")
    entries = given if len(names) > 1 else [[entry] for entry in given]
    points = tuple(_fields(where, dict(zip(names, entry, strict=True))) for entry in entries)
    for index, point in enumerate(points):
        if point in points[:index]:
            raise ConfigError(f"{where}: {given[index]!r} stands in it twice; give every value once.")
    return points


def _trials(given: Mapping[str, Any], search: str) -> int:
    trials = given.get("trials", 0)
    if search == "grid":
        if "trials" in given:
            raise ConfigError("trials is for search: random or tpe; a grid has as many trials as it has points.")
        return 0
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ConfigError(f"search: {search} needs trials: a whole number of 1 or more for every method and axis.")
    return trials


def names_in(recipe: str) -> set[str]:
    """The {names} that a recipe leaves open.

    Raises:
        ConfigError: braces that are not of this form.
    """
    try:
        parts = list(string.Formatter().parse(recipe))
    except ValueError as error:
        raise ConfigError(f"recipe {recipe!r}: {error}; write {{p}} where the value of p goes.") from error
    names = {name for _, name, _, _ in parts if name is not None}
    odd = [name for _, name, form, conversion in parts if name is not None and (form or conversion or not name)]
    if odd or not all(name.isidentifier() for name in names):
        raise ConfigError(f"recipe {recipe!r}: write {{p}} where the value of p goes, and no more in the braces.")
    return names


def _check_places(sweep: SweepFile) -> None:
    """A field has one place, except that a method may give another value than the base."""
    in_axes: list[str] = [name for axis in sweep.axes for name in axis[0]]
    for name in in_axes:
        if in_axes.count(name) > 1:
            raise ConfigError(f"axes: {name} stands in two axes; give it in one.")
        if name in _OF_GENERATION and not sweep.base.get("generation_metrics"):
            raise ConfigError(
                f"axes: {name} changes nothing without generation_metrics in base, and all runs would be made twice."
            )
        if name in _ONE_PER_SWEEP:
            raise ConfigError(f"axes: {name} cannot be one: a sweep's runs are judged alike; write a sweep for each.")
        if name in sweep.base:
            raise ConfigError(f"{name} stands in base and in axes; give it in one of them.")
    for method in sweep.methods:
        where = f"methods.{method.name}"
        for name in (*method.fields, *method.space):
            if name in in_axes:
                raise ConfigError(f"{where}: {name} is an axis; an axis is the same for all methods.")
            if name in _SAME_FOR_ALL:
                raise ConfigError(
                    f"{where}: {name} is the same for all methods, or they could not be compared; give it in base or "
                    "in axes."
                )
        for name in method.space:
            if name in method.fields:
                raise ConfigError(f"{where}: {name} stands in set and in grid; give it in one of them.")
            if name in _NOT_SHARED:
                raise ConfigError(f"{where}.grid: {name} cannot be varied; write {{names}} into the recipe.")
        _check_names(where, method)
        if sweep.search != "grid":
            _check_size(where, method, sweep)


def _check_names(where: str, method: Method) -> None:
    open_names = names_in(method.recipe)
    for name in sorted(open_names - set(method.space)):
        raise ConfigError(f"{where}: the recipe has {{{name}}}, but grid has no {name}; give its values there.")
    for name in method.space:
        if (name in open_names) == (name in FIELD_TYPES):
            if name in open_names:
                raise ConfigError(
                    f"{where}.grid: {name} is both a field and in the recipe; give what is in braces another name."
                )
            raise ConfigError(
                f"{where}.grid: {name} is neither a field nor in the recipe."
                f"{nearest(name, [*FIELD_TYPES, *open_names])} Write {{{name}}} where the recipe needs its value."
            )


def _check_size(where: str, method: Method, sweep: SweepFile) -> None:
    size = 1.0
    for dimension in method.space.values():
        size *= dimension.size
    if size < sweep.trials:
        raise ConfigError(
            f"{where}: grid has {size:g} different settings, but trials = {sweep.trials}; "
            "give it more values or ranges, or ask for fewer trials."
        )
