"""Colour, line and mark of every method: a colour for a family, a line for a pattern."""

from __future__ import annotations

from dataclasses import dataclass

from .paper import BASELINE, family
from .svg import colour

Line = str | tuple[int, tuple[int, int]]

_FAMILIES = {BASELINE: "ink", "dropkey": "blue", "hiddencut": "brown", "dropattention": "red"}
_PATTERNS: dict[str, tuple[Line, str]] = {"element": ("-", "o"), "column": ("--", "s"), "span": (":", "^")}
_HIDDENKEYS: dict[str, tuple[Line, str]] = {
    "hiddenkey-": ("--", "s"),
    "hiddenkey": ("-", "o"),
    "hiddenkey-js": ("-.", "D"),
    "hiddenkey-input": (":", "^"),
    "hiddenkey-output": ((0, (1, 4)), "v"),
}
LAST = "baseline, last epoch"


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    colour: str
    line: Line
    mark: str


def style(method: str) -> Style:
    """The style of a method; methods that are not the paper's are purple."""
    name, _, pattern = method.partition(" ")
    if method in _HIDDENKEYS:
        return Style(colour("green"), *_HIDDENKEYS[method])
    if method == LAST:
        return Style(colour("ink"), ":", "^")
    line, mark = _PATTERNS.get(pattern, ("-", "o"))
    return Style(colour(_FAMILIES.get(name if pattern in _PATTERNS else method, "purple")), line, mark)


def panel(method: str) -> str:
    """The small panel that a method stands in: its family, all of HiddenKey's rows together."""
    return "hiddenkey" if method in _HIDDENKEYS else family(method)
