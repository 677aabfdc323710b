"""Paired differences over seeds: mean, interval, tests, effect size, and the correction for many comparisons.

The interval and the p-value that decide are Student's, on the paired differences. With 5 seeds the exact sign-flip
test cannot give less than p = 2/32 = 0.06, and the bootstrap, which resamples 5 numbers, covers the truth in about
84 % of cases instead of 95 % (`tests/lab/test_statistics.py` simulates both), so these two stand beside them only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
_SEED = 2403_00812


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences, first minus second; what cannot be computed is NaN.

    One pair has no interval and no test. Equal differences have no interval either, since nothing tells how far
    another seed may lie from them; their p is that of the sign flips.
    """

    n: int
    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan
    """Lower end of Student's 95 % interval."""
    high: float = math.nan
    bootstrap_low: float = math.nan
    """Lower end of the BCa bootstrap interval (Efron 1987); needs three pairs."""
    bootstrap_high: float = math.nan
    p: float = math.nan
    """Paired t-test, two-sided."""
    p_flip: float = math.nan
    """Sign-flip test, two-sided; exact up to 13 pairs."""
    hedges: float = math.nan
    """Hedges' g: mean over sd, corrected for small n; needs three pairs."""

    def shown(self, digits: int, nothing: str = "-") -> str:
        """Mean and interval as text: `+1.3 [+0.2, +2.4]`; `nothing` where there is no pair."""
        if self.n == 0:
            return nothing
        mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} (no interval)" if math.isnan(self.low) else f"{mean} [{low}, {high}]"


def paired_difference(differences: Sequence[float]) -> Difference:
    """Describe paired differences, one number for each seed; n is 0 where there are none."""
    # Metrics are shares of whole examples: differences that agree to nine places are equal.
    found = np.round(np.asarray(differences, dtype=float), 9)
    n = len(found)
    if n < 2:
        return Difference(n, float(found[0])) if n else Difference(0)
    flips = _sign_flips(found)
    if np.ptp(found) == 0:
        return Difference(n, float(found[0]), 0.0, p=flips, p_flip=flips)
    mean, sd = float(found.mean()), float(found.std(ddof=1))
    test = stats.ttest_1samp(found, 0.0)
    low, high = map(float, test.confidence_interval(LEVEL))
    student = Difference(n, mean, sd, low, high, p=float(test.pvalue), p_flip=flips)
    if n == 2:
        return student
    from_below, to_above = _bootstrap(found)
    hedges = mean / sd * (1 - 3 / (4 * (n - 1) - 1))
    return replace(student, bootstrap_low=from_below, bootstrap_high=to_above, hedges=hedges)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (1979); NaN stays NaN and does not count."""
    p = np.asarray(values, dtype=float)
    adjusted = np.full(len(p), math.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN sorts last
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, p[order] * factors))
    return [float(value) for value in adjusted]


def _bootstrap(differences: np.ndarray) -> tuple[float, float]:
    rng = np.random.default_rng(_SEED)
    found = stats.bootstrap((differences,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, rng=rng)
    low, high = map(float, found.confidence_interval)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (math.nan, math.nan)


def _sign_flips(differences: np.ndarray) -> float:
    # Of one sample, exchanged with nothing but its negative.
    rng = np.random.default_rng(_SEED)
    found = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True, rng=rng
    )
    return float(found.pvalue)
