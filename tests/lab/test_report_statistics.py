"""The statistics against their textbook forms, and by simulation: what is there is found, what is not is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hiddenkey.lab.report import statistics
from hiddenkey.lab.report.claims import CLAIMS, verdict
from hiddenkey.lab.report.pool import differences, findings, pools
from hiddenkey.lab.report.statistics import average, bootstrap, describe, holm, sign_flip, summarise
from hiddenkey.lab.report.study import make_task

from .made_up import World, make_records

ONE = {(seed, 0): value for seed, value in enumerate((84.1, 85.0, 83.2, 86.3, 84.9, 85.5))}
TWO = {(seed, 0): value for seed, value in enumerate((83.0, 84.8, 83.4, 85.1, 84.0, 84.2))}


def test_a_difference_is_that_of_the_textbook():
    pairs = np.array(list(ONE.values())) - np.array(list(TWO.values()))
    found = describe(list(pairs))
    test = stats.ttest_rel(list(ONE.values()), list(TWO.values()))
    low, high = test.confidence_interval(0.95)
    assert found is not None
    assert (found.n, found.mean, found.sd) == (6, pytest.approx(pairs.mean()), pytest.approx(pairs.std(ddof=1)))
    assert (found.low, found.high, found.p) == (pytest.approx(low), pytest.approx(high), pytest.approx(test.pvalue))
    assert found.hedges == pytest.approx(pairs.mean() / pairs.std(ddof=1) * (1 - 3 / 19))
    assert found.bootstrap_low < found.mean < found.bootstrap_high


def test_only_seeds_that_both_have_are_paired():
    methods = (
        make_records(World(methods=("baseline",), seeds=(1, 2, 3, 4))),
        make_records(World(methods=("hiddenkey",), seeds=(3, 4, 5))),
    )
    task = make_task("sst2", [*methods[0], *methods[1]])
    ours, plain = task.values("hiddenkey"), task.values("baseline")
    assert differences(task, "hiddenkey", "baseline") == {
        seed: pytest.approx(ours[seed] - plain[seed]) for seed in ((3, 0), (4, 0))
    }


def test_one_pair_has_no_interval_and_equal_pairs_have_no_spread():
    one = describe([0.5])
    assert one is not None
    assert (one.n, one.mean, one.low, one.p, one.hedges) == (1, 0.5, None, None, None)
    for value in (0.1, 0.8, 100 / 250):  # whose mean and sd in binary numbers miss by a bit
        equal = describe([value] * 3)
        assert equal is not None
        assert (equal.sd, equal.p, equal.hedges, equal.low) == (0.0, 2 / 8, None, None)
        assert equal.mean == pytest.approx(value)
    same, none = describe([0.5] * 4), describe([0.0] * 4)
    assert same is not None and none is not None
    assert (same.low, same.high, same.bootstrap_low, same.p) == (None, None, None, 2 / 16)
    assert (none.p, none.p_flip, none.hedges) == (1.0, 1.0, None)
    assert describe([]) is None


def test_two_pairs_have_no_bootstrap():
    assert bootstrap(np.array([0.1, 0.3])) == (None, None)


def test_two_pairs_have_no_effect_size():
    """Hedges' correction of two pairs is 1 - 3 / 3."""
    assert describe([1.0, 2.0]).hedges is None
    assert describe([1.0, 2.0, 3.0]).hedges == pytest.approx(2 * (1 - 3 / 7))


def test_sign_flips_are_exact():
    assert sign_flip(np.array([0.3, 0.1, 0.2, 0.5, 0.4])) == 2 / 32
    reference = stats.permutation_test(
        (np.array([0.3, -0.1, 0.2, 0.5]),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(np.array([0.3, -0.1, 0.2, 0.5])) == pytest.approx(reference.pvalue)
    many = np.linspace(-1, 1.4, 20)
    assert sign_flip(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.03)


def test_holm_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.04, None]) == [None, 0.04, None]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_means_over_tasks_are_of_the_seeds_that_all_have():
    assert average([{(1, 0): 1.0, (2, 0): 2.0}, {(2, 0): 4.0}]) == {(2, 0): 3.0}
    assert average([]) == {}
    assert summarise([]) is None
    assert summarise([3.0]).sd is None


def test_students_interval_holds_the_truth_with_five_seeds_and_the_bootstraps_does_not(monkeypatch):
    rng = np.random.default_rng(1)
    worlds = rng.normal(0.3, 1.0, (4000, 5))
    half = stats.t.ppf(0.975, 4) * worlds.std(axis=1, ddof=1) / math.sqrt(5)
    assert 0.94 < np.mean(np.abs(worlds.mean(axis=1) - 0.3) < half) < 0.96
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    ends = [bootstrap(world) for world in worlds[:300]]
    assert 0.76 < np.mean([low < 0.3 < high for low, high in ends]) < 0.90


def test_without_any_effect_hardly_ever_is_a_claim_of_more_replicated(monkeypatch):
    monkeypatch.setattr(statistics, "bootstrap", lambda differences: (None, None))
    rng, claims = np.random.default_rng(2), [claim for claim in CLAIMS if claim.kind == "more"]
    wrong = 0
    for _ in range(400):
        found = [describe(differences) for differences in rng.normal(0, 0.5, (len(claims), 5))]
        adjusted = holm([change.p for change in found])
        verdicts = [verdict(claim, change, p) for claim, change, p in zip(claims, found, adjusted, strict=True)]
        wrong += "replicated" in verdicts
    assert wrong / 400 < 0.045  # 2.5 % of families: one side of 5 %; three standard errors on top


def findings_of(effects, chance):
    methods = ("baseline", "hiddenkey-", "hiddenkey", "hiddenkey-js", "hiddenkey-input", "hiddencut element")
    tasks = [
        make_task(name, make_records(World(task=name, effects=effects, methods=methods), chance * 2 + place))
        for place, name in enumerate(("sst2", "rte"))
    ]
    return {finding.claim.says: finding for finding in findings(pools(tasks)[0])}


def test_an_effect_of_known_size_is_found(monkeypatch):
    monkeypatch.setattr(statistics, "bootstrap", lambda differences: (None, None))
    effects = {
        "hiddenkey": 0.02,
        "hiddenkey-": 0.02,
        "hiddenkey-js": 0.02,
        "hiddenkey-input": 0.0,
        "hiddencut element": -0.02,
    }
    covered, verdicts = 0, []
    for chance in range(20):
        found = findings_of(effects, chance)
        main = found["`hiddenkey` beats LoRA alone"]
        covered += main.difference.low <= 2.0 <= main.difference.high
        verdicts.append(
            (
                main.verdict,
                found["`hiddencut element` beats LoRA alone"].verdict,
                found["drops at the input add nothing"].verdict,
            )
        )
    assert covered >= 16
    assert sum(one == "replicated" for one, _, _ in verdicts) >= 18
    assert sum(two == "not replicated" for _, two, _ in verdicts) >= 19
    assert all(three == "replicated" for _, _, three in verdicts)


def test_no_effect_is_not_found(monkeypatch):
    monkeypatch.setattr(statistics, "bootstrap", lambda differences: (None, None))
    verdicts = [findings_of({}, chance)["`hiddenkey` beats LoRA alone"].verdict for chance in range(30)]
    assert verdicts.count("replicated") <= 1
