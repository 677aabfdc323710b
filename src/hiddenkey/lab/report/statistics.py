"""Paired differences over seeds: interval, tests, effect size, correction for many comparisons.

Which interval and which test decide, and why. With 5 seeds the exact sign-flip test cannot give less than
p = 2/32 = 0.06, and the bootstrap, which only reshuffles 5 numbers, gives intervals that hold the truth in about 84 %
of cases instead of 95 % (`tests/lab/test_report_statistics.py` simulates both). So the interval and the p-value that
decide are Student's, on the paired differences: right for normal differences at every n, close for others. Bootstrap
and sign-flip stand beside them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
_EXACT_UP_TO = 14
_SEED = 2403_00812

Seed = tuple[int, int]
Values = Mapping[Seed, float]


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of n values; sd is None for one."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences, first minus second; intervals and tests are None where n is 1.

    Where all differences are equal nothing tells how far another seed may lie from them: there is no interval, and
    the p-value is that of the sign flips.
    """

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    """Lower end of Student's interval."""
    high: float | None = None
    bootstrap_low: float | None = None
    """Lower end of the bias-corrected and accelerated bootstrap's interval; None below three pairs too."""
    bootstrap_high: float | None = None
    p: float | None = None
    """Paired t-test, two-sided."""
    p_flip: float | None = None
    """Sign-flip test, two-sided; exact up to 14 pairs."""
    hedges: float | None = None
    """Mean over sd of the differences, with Hedges' correction for small n; None below three pairs, for which that is
    zero, and where all are equal."""


def summarise(values: Sequence[float]) -> Summary | None:
    """Mean and sd, or None of nothing."""
    if not values:
        return None
    return Summary(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def describe(differences: Sequence[float]) -> Difference | None:
    """The mean of paired differences with all that is said about it."""
    # Metrics are shares of whole examples: what differs in the last bits alone is equal.
    found = np.round(np.asarray(differences, dtype=float), 9)
    n = len(found)
    if n < 2:
        return Difference(n, float(found[0])) if n else None
    equal = np.ptp(found) == 0  # of which a mean and an sd in binary numbers miss by a bit
    mean, sd = (float(found[0]), 0.0) if equal else (float(found.mean()), float(found.std(ddof=1)))
    flips = sign_flip(found)
    if equal:
        return Difference(n, mean, sd, p=flips, p_flip=flips)
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    low, high = bootstrap(found)
    return Difference(
        n,
        mean,
        sd,
        mean - half,
        mean + half,
        low,
        high,
        p=float(2 * stats.t.sf(abs(mean) / error, n - 1)),
        p_flip=flips,
        hedges=mean / sd * (1 - 3 / (4 * (n - 1) - 1)) if n > 2 else None,
    )


def bootstrap(differences: np.ndarray) -> tuple[float | None, float | None]:
    """Interval of the mean: BCa (Efron 1987) with a fixed seed; None of fewer than three."""
    if len(differences) < 3:
        return None, None
    rng = np.random.default_rng(_SEED)
    found = stats.bootstrap(
        (differences,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="BCa", rng=rng
    )
    low, high = (float(end) for end in found.confidence_interval)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)


def sign_flip(differences: np.ndarray) -> float:
    """How often |mean| is at least as large when signs are flipped: all 2^n flips, or 2^14 drawn ones."""
    n = len(differences)
    if n <= _EXACT_UP_TO:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(_SEED).choice((1.0, -1.0), size=(2**_EXACT_UP_TO, n))
        signs[0] = 1.0  # what was seen counts as one of the draws, so that p is never 0
    means = np.abs(signs @ differences)
    return float(np.mean(means >= abs(differences.sum()) - 1e-9))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p-values (1979); None stays None and does not count."""
    order = sorted((value, place) for place, value in enumerate(values) if value is not None)
    adjusted: list[float | None] = [None] * len(values)
    highest = 0.0
    for done, (value, place) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - done) * value))
        adjusted[place] = highest
    return adjusted


def average(maps: Sequence[Values]) -> dict[Seed, float]:
    """Mean over several maps for every seed that all of them have."""
    if not maps:
        return {}
    shared = set(maps[0]).intersection(*maps[1:])
    return {seed: float(np.mean([values[seed] for values in maps])) for seed in sorted(shared)}
