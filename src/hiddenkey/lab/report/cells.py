"""Cells that several tables have."""

from __future__ import annotations

from collections.abc import Collection

from . import words
from .paper import BASELINE
from .pool import Pool, Pooled, why_none
from .statistics import Difference


def gain_cells(pool: Pool, pooled: Pooled, adjusted: float | None) -> list[str]:
    """A difference, its n with the tasks where they are not all of the pool's, and its p after correction."""
    found = pooled.difference
    few = "" if len(pooled.tasks) in (0, len(pool.tasks)) else f" ({', '.join(pooled.tasks)})"
    return [
        words.difference(found, nothing=pooled.nothing),
        f"{found.n}{few}" if found else words.NOTHING,
        words.p_value(adjusted),
    ]


def gain_beside(result: int, gain: Difference | None, method: str, methods: Collection[str], digits: int = 2) -> str:
    """A gain over the baseline beside a result of so many seeds, with its own n where that is another."""
    if method == BASELINE:
        return words.NOTHING
    return words.paired(gain, result, digits, why_none(methods, method))
