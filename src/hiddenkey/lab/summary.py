"""Numbers of a run, read off the trainer's log."""

from __future__ import annotations

import math

import numpy as np

Log = list[dict[str, float]]

TIMES = ("_runtime", "_per_second", "_preparation_time")
"""Endings of what the Trainer logs beside metrics."""


def epochs_of(history: Log) -> Log:
    """One row per evaluated epoch: epoch, step, train_loss, validation_loss, validation_accuracy, …"""
    rows: dict[float, dict[str, float]] = {}
    for entry in history:
        found = {name.removeprefix("eval_"): value for name, value in entry.items() if _is_metric(name)}
        if found:
            rows.setdefault(entry["step"], {"epoch": entry["epoch"], "step": entry["step"]}).update(found)
    return list(rows.values())


def best_of(epochs: Log, metric: str, lower_is_better: bool) -> dict[str, float]:
    """The row with the best validation metric; of equals the first."""
    choose = min if lower_is_better else max
    return choose(epochs, key=lambda row: row[f"validation_{metric}"])


def drop_rates(history: Log) -> dict[str, float | None]:
    """Realised rate per position: of all draws that the last log entry knows of, as each is over those before it."""
    return {
        name.removeprefix("drop_rate/"): value
        for entry in history
        for name, value in entry.items()
        if name.startswith("drop_rate/") and math.isfinite(value)
    }


def step_seconds(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of the optimiser steps, and their number; the number alone where it is 0."""
    shares = {"median": 0.5, "p20": 0.2, "p80": 0.8} if seconds else {}
    return {name: float(np.quantile(seconds, share)) for name, share in shares.items()} | {"steps": len(seconds)}


def _is_metric(name: str) -> bool:
    return name.startswith(("eval_validation_", "eval_train_")) and not name.endswith(TIMES)
