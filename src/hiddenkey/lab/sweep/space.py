"""What a method varies: lists of values, and ranges that random search and TPE draw from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import FIELD_TYPES, convert
from ..errors import ConfigError

_RANGE_KEYS = ("low", "high", "log")


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that show whether all are allowed: here all of them."""
        return self.values

    @property
    def size(self) -> float:
        """How many values there are."""
        return len(self.values)


@dataclass(frozen=True)
class Range:
    """A number from low to high, both included; `log`: uniform in its logarithm."""

    low: float
    high: float
    log: bool
    whole: bool

    @property
    def ends(self) -> tuple[Any, ...]:
        """The lowest and the highest value."""
        return (self.low, self.high)

    @property
    def size(self) -> float:
        """How many values there are."""
        return self.high - self.low + 1 if self.whole else math.inf


Space = dict[str, Choice | Range]


def read_space(where: str, given: Any, search: str) -> Space:
    """The `grid` of a method.

    Raises:
        ConfigError: not a mapping of names to lists, or to ranges where `search` draws from them.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} = {given!r} is not allowed: it is a mapping of names to lists of values.")
    return {str(name): _dimension(f"{where}.{name}", str(name), value, search) for name, value in given.items()}


def value_of(where: str, name: str, given: Any) -> Any:
    """A value in the type of the field `name`; a name that is no field is a number or a text for the recipe.

    Raises:
        ConfigError: another type.
    """
    if name in FIELD_TYPES:
        try:
            return convert(name, FIELD_TYPES[name], given)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    if isinstance(given, str):
        return _number(given)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise ConfigError(f"{where}: {given!r} is not allowed: what stands in a recipe is a number or a text.")
    return given


def typed(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that came from JSON, as the space holds them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in params.items()}


def _number(text: str) -> float | str:
    # YAML reads 1e-4 as a text; what is a whole number was quoted on purpose, and Python reads 1_0 as ten.
    try:
        number = float(text)
    except ValueError:
        return text
    return text if "_" in text or text.lstrip("+-").isdigit() or not math.isfinite(number) else number


def _dimension(where: str, name: str, given: Any, search: str) -> Choice | Range:
    if isinstance(given, Mapping) and search != "grid":
        return _range(where, name, given)
    if not isinstance(given, list) or not given:
        ranges = "" if search == "grid" else ", or {low: 0.01, high: 0.3, log: true}"
        more = "; ranges need search: random or tpe" if isinstance(given, Mapping) else ""
        raise ConfigError(f"{where} = {given!r} is not allowed: it is a list of one or more values{ranges}{more}.")
    values = tuple(value_of(where, name, item) for item in given)
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"{where}: {value!r} stands in it twice; give every value once.")
    return Choice(values)


def _range(where: str, name: str, given: Mapping[Any, Any]) -> Range:
    unknown = [str(key) for key in given if key not in _RANGE_KEYS]
    missing = [key for key in ("low", "high") if key not in given]
    if unknown or missing:
        raise ConfigError(
            f"{where}: a range is {{low: , high: , log: false}}; "
            + "; ".join([*(f"unknown: {key}" for key in unknown), *(f"missing: {key}" for key in missing)])
        )
    low, high = (value_of(where, name, given[key]) for key in ("low", "high"))
    log = given.get("log", False)
    if any(isinstance(end, (bool, str, tuple)) for end in (low, high)):
        raise ConfigError(f"{where} = {dict(given)!r} is not allowed: low and high are numbers.")
    if not isinstance(log, bool):
        raise ConfigError(f"{where}.log = {log!r} is not allowed: it is true or false.")
    if not low < high or (log and low <= 0):
        raise ConfigError(
            f"{where} = {dict(given)!r} is not allowed: low lies below high{', and above 0 with log' if log else ''}."
        )
    return Range(low, high, log, whole=isinstance(low, int) and isinstance(high, int))
