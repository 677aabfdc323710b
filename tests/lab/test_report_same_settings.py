"""Each trial of a method against the baseline's trial with the same settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hiddenkey.lab.report.pool import pools
from hiddenkey.lab.report.same_settings import blocks, compare, over_same, table
from hiddenkey.lab.report.study import make_task
from hiddenkey.lab.sweep.record import RunRecord

from .made_up import RATES, World, make_records

BASE_RATES = [1e-3 * rate for rate in RATES]
TESTED = {"baseline": (0.80, 0.84, 0.82), "hiddenkey": (0.83, 0.86, 0.81)}
"""Test accuracy of the three trials; validation chooses the second of either, whose settings differ."""


def record(one: RunRecord, lr: float) -> RunRecord:
    """One with a known test accuracy, chosen by its trial, at a learning rate; or one that failed."""
    one = replace(one, config=one.config | {"learning_rate": lr})
    if one.status == "failed":
        return one
    value, chosen = TESTED[one.method][one.trial], 0.9 if one.trial == 1 else 0.5
    best = {"validation_accuracy": chosen, "epoch": 1.0, "step": 8}
    test = {"best": {"accuracy": value + 0.01 * one.axes["seed"]}, "last": {"accuracy": 0.5}}
    return replace(one, best=best, last=best, test=test)


def made(lr: float = BASE_RATES[0], drop: tuple[str, int, int] = ("", 0, 0)):
    """Two methods, three seeds; the other method at one learning rate, which the baseline's first trial has."""
    world = World(methods=("baseline", "hiddenkey"), seeds=(1, 2, 3), failing=[drop])
    records = [record(one, BASE_RATES[one.trial] if one.method == "baseline" else lr) for one in make_records(world)]
    return make_task("sst2", records)


def test_the_chosen_trial_is_compared_with_the_baseline_at_its_settings():
    task = made()
    assert over_same(task, "hiddenkey", True) == {(seed, 0): pytest.approx(6.0) for seed in (1, 2, 3)}
    tuned = pools([task])[0].compare("hiddenkey", "baseline").difference
    assert tuned.mean == pytest.approx(2.0)


def test_the_mean_of_all_trials_has_no_choice():
    assert over_same(made(), "hiddenkey", False) == {
        (seed, 0): pytest.approx(100 * (sum(TESTED["hiddenkey"]) / 3 - 0.80)) for seed in (1, 2, 3)
    }


def test_a_seed_with_a_failed_trial_has_no_mean_and_is_named():
    task = made(drop=("hiddenkey", 2, 2))
    assert set(over_same(task, "hiddenkey", True)) == {(1, 0), (2, 0), (3, 0)}
    pool = pools([task])[0]
    assert set(compare(pool, "hiddenkey", False).values) == {(1, 0), (3, 0)}
    assert (
        "Seeds left out, as a task or a side has no result of them: 2 (`hiddenkey, all trials`)" in table(pool).note
    )


def test_settings_that_the_baseline_never_had_are_not_compared():
    pool = pools([made(lr=0.5)])[0]
    assert compare(pool, "hiddenkey", True).difference is None
    assert "no trial of either with a result on the same seed" in blocks(pool)[0].text


def test_a_baseline_of_one_trial_needs_no_such_table():
    one = [record for record in made().records if record.method != "baseline" or record.trial == 0]
    assert blocks(pools([make_task("sst2", one)])[0]) == []


def test_a_lower_loss_is_a_gain():
    task = made()
    turned = [
        replace(one, metric="loss", lower_is_better=True, test={"best": {"loss": one.test["best"]["accuracy"]}})
        if one.test
        else one
        for one in task.records
    ]
    best = [replace(one, best={"validation_loss": 1.0 if one.trial == 1 else 2.0}) for one in turned]
    found = over_same(make_task("sst2", best), "hiddenkey", True)
    assert found == {(seed, 0): pytest.approx(-0.06) for seed in (1, 2, 3)}
