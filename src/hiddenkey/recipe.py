"""The recipe language: parse a text once to a frozen `Recipe`, print it in normal form.

logits[1/2:]:column@0.1 + hidden[1/2:]:element@0.1 ~ kl*1.0
position[layers]:pattern:compensation@rate + …     ~ consistency*weight
preset[layers]:pattern@rate + …                    ~ consistency*weight
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from .compensations import COMPENSATIONS
from .consistency import CONSISTENCIES
from .errors import RecipeError, UnknownNameError
from .patterns import PATTERNS
from .positions import POSITIONS, Position, Space
from .presets import PRESETS
from .registry import unknown_or_failed

BASELINE = "baseline"
EXAMPLE = "write for example 'hiddenkey@0.1' or 'logits:column@0.1 + hidden:element@0.1 ~ kl*1.0'"

LONGEST = 10_000
TERM = re.compile(
    r"(?P<name>[^\s\[\]:@]+)(?:\[(?P<layers>[^\[\]]*)\])?(?P<axes>(?::[^\s\[\]:@]*)*)(?:@(?P<rate>\S*))?"
)
BOUND = re.compile(r"-?\d{1,9}|\d{1,9}/\d{1,9}")
# A slice that holds no layer at any of these depths is a slip of the pen, whatever the model.
DEPTHS = (*range(1, 257), 10**9)
NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class LayerSlice:
    """Which layers of a stack: Python's slice with counts, negative counts, or fractions of the depth.

    A start of 0 and a stop of 1 as a fraction are the ends, as None is. Raises RecipeError for a bound that no recipe
    can say, and for what is empty in every model.
    """

    start: int | Fraction | None = None
    stop: int | Fraction | None = None

    def __post_init__(self) -> None:
        for bound in (self.start, self.stop):
            _require_bound(bound)
        if self.start == 0:
            object.__setattr__(self, "start", None)
        if isinstance(self.stop, Fraction) and self.stop == 1:
            object.__setattr__(self, "stop", None)
        if not any(self.resolve(depth) for depth in DEPTHS):
            raise RecipeError(f"the layers [{self}] are empty in every model: the start must lie before the stop")

    def resolve(self, count: int) -> range:
        """The layer indices among `count`; a fraction of the depth is rounded down. May be empty."""

        def place(bound: int | Fraction | None) -> int | None:
            return math.floor(bound * count) if isinstance(bound, Fraction) else bound

        return range(count)[place(self.start) : place(self.stop)]

    def __str__(self) -> str:
        return ":".join("" if bound is None else str(bound) for bound in (self.start, self.stop))


@dataclass(frozen=True)
class Drop:
    """One drop: where, what shape, what makes up for it, how often, in which layers.

    layers None: every layer, in a decoder-only model the latter half (arXiv 2403.00812, section 4).
    Raises RecipeError or UnknownNameError for what no recipe can say.
    """

    position: str
    pattern: str
    compensation: str
    p: float
    layers: LayerSlice | None = None

    def __post_init__(self) -> None:
        position, compensation = POSITIONS[self.position], COMPENSATIONS[self.compensation]
        PATTERNS[self.pattern]
        if position.space not in compensation.spaces:
            allowed = [other.name for other in COMPENSATIONS if position.space in other.spaces]
            raise RecipeError(
                f"{self.position!r} has no compensation {self.compensation!r}; allowed: {', '.join(allowed)}"
            )
        _require_rate(self.position, self.p, self.p)
        if not isinstance(self.layers, LayerSlice | None):
            raise RecipeError(f"layers are a hiddenkey.LayerSlice or None, got {self.layers!r}")
        if self.layers is not None and not position.per_layer:
            raise RecipeError(f"{self.position!r} exists once in a model, so it takes no layers [{self.layers}]")

    def __str__(self) -> str:
        default = POSITIONS[self.position].compensation
        layers = "" if self.layers is None else f"[{self.layers}]"
        compensation = "" if self.compensation == default else f":{self.compensation}"
        return f"{self.position}{layers}:{self.pattern}{compensation}@{float(self.p)!r}"


@dataclass(frozen=True)
class Recipe:
    """Drops, kept in the order of the forward pass, and the consistency that ties two views together.

    weight: of the consistency; 1 where there is none.
    Raises RecipeError or UnknownNameError for what no recipe can say.
    """

    drops: tuple[Drop, ...]
    consistency: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        drops = sorted(self.drops, key=lambda drop: POSITIONS.rank(drop.position) or 0)
        object.__setattr__(self, "drops", tuple(drops))
        if self.consistency is not None:
            CONSISTENCIES[self.consistency]
        _require_weight(self.consistency, self.weight, self.weight)
        if self.consistency is None:  # the text has no place for its weight
            object.__setattr__(self, "weight", 1.0)

    def __str__(self) -> str:
        drops = " + ".join(map(str, self.drops)) or BASELINE
        return drops if self.consistency is None else f"{drops} ~ {self.consistency}*{float(self.weight)!r}"


def space_of(drop: Drop) -> Space:
    """What the drop acts on: attention logits, attention weights, or a stream."""
    return POSITIONS[drop.position].space


def parse(recipe: str | Recipe) -> Recipe:
    """Parse a recipe (see the module's head); a `Recipe` is returned as it is.

    Raises RecipeError for anything that is not a recipe, TypeError for anything but text or a Recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"a recipe is a text or a Recipe, got {type(recipe).__name__}; {EXAMPLE}")
    if len(recipe) > LONGEST:
        raise RecipeError(f"a recipe has at most {LONGEST:,} characters, got {len(recipe):,}; {EXAMPLE}")
    try:
        return _parse(recipe)
    except (RecipeError, UnknownNameError) as error:
        raise RecipeError(f"in the recipe {recipe!r}: {error}") from None


def select(recipe: str | Recipe, spaces: tuple[Space, ...], user: str) -> tuple[Drop, ...]:
    """The drops of `recipe` in the given spaces, for a function that has no layers to choose from.

    Raises RecipeError where there is none, or one of them names layers.
    """
    drops = tuple(drop for drop in parse(recipe).drops if space_of(drop) in spaces)
    if not drops:
        allowed = [position.name for position in POSITIONS if position.space in spaces]
        raise RecipeError(
            f"{user} got the recipe '{recipe}', which drops nothing at {' or '.join(allowed)}: "
            f"write for example '{allowed[0]}:column@0.1'"
        )
    for drop in drops:
        if drop.layers is not None:
            raise RecipeError(f"{user} knows no layers, so '{drop}' can't choose any: leave out [{drop.layers}]")
    return drops


def _parse(text: str) -> Recipe:
    drops_text, *rest = text.split("~")
    if len(rest) > 1:
        raise RecipeError(f"'~' stands once, before the consistency; {EXAMPLE}")
    drops: list[Drop] = []
    consistency: str | None = None
    for term in drops_text.split("+"):
        term_drops, term_consistency = _term(term.strip())
        drops += term_drops
        if not rest and term_consistency and consistency and term_consistency != consistency:
            raise RecipeError(
                f"two presets want different consistencies, {consistency!r} and {term_consistency!r}; "
                "name the one you want after '~'"
            )
        consistency = term_consistency or consistency
    weight = 1.0
    if rest:
        consistency, weight = _consistency(rest[0].strip())
    return Recipe(tuple(drops), consistency, weight)


def _term(text: str) -> tuple[list[Drop], str | None]:
    match = TERM.fullmatch(text)
    if not match:
        raise RecipeError(f"can't read {text!r} as position[layers]:pattern:compensation@rate; {EXAMPLE}")
    name, axes = match["name"], match["axes"].split(":")[1:]
    layers = None if match["layers"] is None else _layers(match["layers"])
    if name in PRESETS and POSITIONS.rank(name) is not None:
        raise RecipeError(f"{name!r} is a preset and a plugin's position; the plugin must rename its own")
    if name in PRESETS:
        return _preset(name, axes, match["rate"], layers)
    if name not in POSITIONS:
        raise RecipeError(unknown_or_failed("position or preset", name, [*POSITIONS.names(), *PRESETS]))
    if not 1 <= len(axes) <= 2:
        raise RecipeError(
            f"{text!r} needs a pattern and at most one compensation after it: "
            f"{name}:PATTERN or {name}:PATTERN:COMPENSATION; patterns: {', '.join(PATTERNS.names())}"
        )
    rate = _rate(name, match["rate"])
    return [_drop(POSITIONS[name], axes[0], axes[1] if len(axes) > 1 else None, rate, layers)], None


def _preset(name: str, axes: list[str], rate: str | None, layers: LayerSlice | None) -> tuple[list[Drop], str | None]:
    preset = PRESETS[name]
    if not preset.drops:
        if axes or rate is not None or layers is not None:
            raise RecipeError(f"{name!r} drops nothing, so it takes no layers, pattern or rate")
        return [], preset.consistency
    if len(axes) > (1 if len(preset.drops) == 1 else 0):
        raise RecipeError(f"{name!r} fixes {preset.drops}; write out the drops to change more than the rate")
    p = _rate(name, rate)
    drops = []
    for position_name, usual in preset.drops:
        position = POSITIONS[position_name]
        inner = layers if position.per_layer else None
        pattern, _, compensation = (axes[0] if axes else usual).partition(":")
        drops.append(_drop(position, pattern, compensation or None, p, inner))
    return drops, preset.consistency


def _drop(position: Position, pattern: str, compensation: str | None, p: float, layers: LayerSlice | None) -> Drop:
    compensation = compensation if compensation is not None else position.compensation
    return Drop(position.name, pattern, compensation, p, layers)


def _rate(name: str, text: str | None) -> float:
    if text is None:
        raise RecipeError(f"{name!r} needs a drop rate: write {name}@0.1")
    p = _number(text)
    _require_rate(name, p, text)
    return p


def _layers(text: str) -> LayerSlice:
    bounds = [bound.strip() for bound in text.split(":")]
    if len(bounds) != 2 or not all(bound == "" or BOUND.fullmatch(bound) for bound in bounds):
        raise RecipeError(
            f"can't read the layers [{text}]: write a slice such as [:], [1/2:], [12:24] or [-4:]; one layer is [3:4]"
        )
    return LayerSlice(*(_bound(bound, text) for bound in bounds))


def _bound(text: str, layers: str) -> int | Fraction | None:
    if text == "":
        return None
    if "/" not in text:
        return int(text)
    numerator, denominator = map(int, text.split("/"))
    if denominator == 0 or numerator > denominator:
        raise RecipeError(f"{text!r} in the layers [{layers}] is not a fraction of the depth between 0 and 1")
    return Fraction(numerator, denominator)


def _consistency(text: str) -> tuple[str, float]:
    name, star, weight = (part.strip() for part in text.partition("*"))
    CONSISTENCIES[name]
    number = _number(weight) if star else 1.0
    _require_weight(name, number, weight)
    return name, number


def _require_bound(bound: object) -> None:
    whole = isinstance(bound, int) and not isinstance(bound, bool)
    share = isinstance(bound, Fraction) and 0 <= bound <= 1
    if bound is not None and not ((whole or share) and BOUND.fullmatch(str(bound))):
        raise RecipeError(
            f"a bound of layers is a whole number, a Fraction of the depth between 0 and 1, or None; got {bound!r}"
        )


def _number(text: str) -> float:
    return float(text) if NUMBER.fullmatch(text) else math.nan


def _require_rate(name: str, p: float, given: object) -> None:
    if not 0 <= p < 1:
        raise RecipeError(f"the drop rate of {name!r} must be a number in [0, 1), got {given!r}")


def _require_weight(name: str | None, weight: float, given: object) -> None:
    if not 0 < weight < math.inf:
        raise RecipeError(f"the weight of {name!r} must be a positive number, got {given!r}")
