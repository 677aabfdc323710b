"""The statistics against their textbook forms, and by simulation: an interval holds the truth as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hiddenkey.lab import statistics
from hiddenkey.lab.statistics import holm, paired_difference

ONE, TWO = np.array([84.1, 85.0, 83.2, 86.3, 84.9, 85.5]), np.array([83.0, 84.8, 83.4, 85.1, 84.0, 84.2])


def test_a_difference_is_that_of_the_textbook():
    pairs, found = ONE - TWO, paired_difference(ONE - TWO)
    t = stats.t.ppf(0.975, 5)
    error = pairs.std(ddof=1) / math.sqrt(6)
    assert (found.n, found.mean, found.sd) == (6, pytest.approx(pairs.mean()), pytest.approx(pairs.std(ddof=1)))
    assert (found.low, found.high) == (
        pytest.approx(pairs.mean() - t * error),
        pytest.approx(pairs.mean() + t * error),
    )
    assert found.p == pytest.approx(stats.ttest_rel(ONE, TWO).pvalue)
    assert found.hedges == pytest.approx(pairs.mean() / pairs.std(ddof=1) * (1 - 3 / 19))
    assert found.bootstrap_low < found.mean < found.bootstrap_high


def test_sign_flips_are_exact():
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1)
    found = np.array([0.3, -0.1, 0.2, 0.5])
    exact = np.mean(np.abs(found @ signs) >= abs(found.sum()) - 1e-9)
    assert paired_difference(found).p_flip == pytest.approx(exact)
    assert paired_difference([0.3, 0.1, 0.2, 0.5, 0.4]).p_flip == 2 / 32


def test_few_or_equal_pairs_have_no_interval():
    assert paired_difference([]).n == 0
    one = paired_difference([0.5])
    assert (one.n, one.mean, math.isnan(one.low), math.isnan(one.p)) == (1, 0.5, True, True)
    two = paired_difference([1.0, 2.0])
    assert math.isnan(two.bootstrap_low) and math.isnan(two.hedges) and two.low < 1.5 < two.high
    for value in (0.1, 0.8, 100 / 250):  # whose mean and sd in binary numbers miss by a bit
        equal = paired_difference([value] * 3)
        assert (equal.sd, equal.p, math.isnan(equal.low)) == (0.0, 2 / 8, True)
    assert paired_difference([0.0] * 4).p == 1.0


def test_holm_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    first, second, third = holm([math.nan, 0.04, math.nan])
    assert math.isnan(first) and second == 0.04 and math.isnan(third)


def test_students_interval_holds_the_truth_with_five_seeds_and_the_bootstraps_does_not(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    worlds = np.random.default_rng(1).normal(0.3, 1.0, (300, 5))
    found = [paired_difference(world) for world in worlds]
    assert 0.92 < np.mean([one.low < 0.3 < one.high for one in found]) < 0.98
    assert 0.76 < np.mean([one.bootstrap_low < 0.3 < one.bootstrap_high for one in found]) < 0.90


def test_a_difference_as_text():
    found = paired_difference([1.0, 1.4, 1.2])
    assert found.shown(1) == "+1.2 [+0.7, +1.7]"
    assert paired_difference([-0.001]).shown(2) == "+0.00 (no interval)"
    assert paired_difference([]).shown(2, nothing="not run") == "not run"
