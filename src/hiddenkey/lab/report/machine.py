"""Numbers and names for files that machines read."""

from __future__ import annotations

from typing import Any

from .statistics import Difference, Summary

_OF_A_DIFFERENCE = ("mean", "sd", "low", "high", "bootstrap_low", "bootstrap_high", "p", "p_flip", "hedges")


def rounded(value: float | None) -> float | None:
    """Six places: what differs below is noise of the machine."""
    return None if value is None else round(value, 6)


def gain(found: Difference | None, adjusted: float | None = None) -> dict[str, Any]:
    """A paired difference as columns."""
    values = {f"gain_{name}": rounded(getattr(found, name, None)) for name in _OF_A_DIFFERENCE}
    return {"pairs": found.n if found else 0} | values | {"p_holm": rounded(adjusted)}


def summary(found: Summary | None) -> dict[str, Any]:
    """Mean, sd and n as columns."""
    return {
        "n": found.n if found else 0,
        "mean": rounded(found.mean if found else None),
        "sd": rounded(found.sd if found else None),
    }


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())
