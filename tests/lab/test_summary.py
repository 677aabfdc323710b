from __future__ import annotations

import math

import pytest

from hiddenkey.lab import callbacks as summary

LOG = [
    {"epoch": 0.5, "step": 1, "loss": 1.0, "drop_rate/logits": 0.1},
    {"epoch": 1, "step": 2, "loss": 0.8, "drop_rate/logits": 0.3, "drop_rate/hidden": math.nan},
    {"epoch": 1, "step": 2, "eval_validation_loss": 0.7, "eval_validation_runtime": 9.0},
    {"epoch": 1, "step": 2, "eval_train_loss": 0.6, "eval_train_samples_per_second": 9.0},
    {"epoch": 2, "step": 4, "eval_validation_loss": 0.5},
    {"epoch": 3, "step": 6, "eval_validation_loss": 0.5},
]


def test_one_row_per_epoch_with_the_metrics_of_both_parts():
    assert summary.epochs_of(LOG) == [
        {"epoch": 1, "step": 2, "validation_loss": 0.7, "train_loss": 0.6},
        {"epoch": 2, "step": 4, "validation_loss": 0.5},
        {"epoch": 3, "step": 6, "validation_loss": 0.5},
    ]


def test_best_epoch_is_the_first_of_equals():
    rows = summary.epochs_of(LOG)
    assert summary.best_of(rows, "loss", lower_is_better=True)["epoch"] == 2
    assert summary.best_of(rows, "loss", lower_is_better=False)["epoch"] == 1


def test_drop_rates_are_those_of_the_last_entry_which_counts_all_draws():
    assert summary.drop_rates(LOG) == {"logits": pytest.approx(0.3)}


def test_step_seconds_of_many_one_and_no_steps():
    assert summary.step_seconds([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "steps": 6}
    assert summary.step_seconds([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0, "steps": 1}
    assert summary.step_seconds([]) == {"steps": 0}
