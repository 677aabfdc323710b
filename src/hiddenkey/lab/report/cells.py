"""Cells that several tables have."""

from __future__ import annotations

from . import words
from .pool import Pool, Pooled


def gain_cells(pool: Pool, pooled: Pooled, adjusted: float | None) -> list[str]:
    """A difference, its n with the tasks where they are not all of the pool's, and its p after correction."""
    found = pooled.difference
    few = "" if len(pooled.tasks) in (0, len(pool.tasks)) else f" ({', '.join(pooled.tasks)})"
    return [
        words.difference(found, nothing=pooled.nothing),
        f"{found.n}{few}" if found else words.NOTHING,
        words.p_value(adjusted),
    ]
