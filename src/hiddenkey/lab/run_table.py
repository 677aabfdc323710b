"""All runs below a folder as one table, read from their `result.json` files; damaged ones are named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from .artifacts import RESULT, stored_result
from .errors import DamagedFileError, RunError

SHARES = {"accuracy", "matthews", "f1", "pearson", "spearman", "token_accuracy", "bleu", "meteor", "rouge_l", "ter"}
"""Metrics that are shown in points, times 100."""
_OF_A_SWEEP = ("name", "method", "params", "axes", "trials")


def read_runs(folder: Path) -> pd.DataFrame:
    """One row for each `result.json` below the folder.

    Raises:
        RunError: there is none, or one is damaged.
    """
    try:
        rows = [_row(path) for path in sorted(folder.rglob(RESULT))]
    except DamagedFileError as error:
        raise RunError(f"{error}. Move it away, or make the run again.") from error
    if not rows:
        raise RunError(f"no {RESULT} below {folder}. Run `hiddenkey train` or `hiddenkey sweep` first.")
    return pd.DataFrame(rows)


def _row(path: Path) -> dict[str, Any]:
    found = stored_result(path)
    config, sweep, metric = found.config, found.sweep, found.metric
    missing = [name for name in _OF_A_SWEEP if name not in sweep]
    if sweep and missing:
        raise DamagedFileError(f"{path} is damaged: sweep: no {', '.join(missing)}")
    axes = {name: value for name, value in sweep.get("axes", {}).items() if name not in ("seed", "data_seed")}
    test = found.test.get("best") or found.test.get("last") or {}
    scale = 100.0 if metric in SHARES else 1.0
    return {
        "task": sweep.get("name") or f"{Path(config['data']).name} with {Path(config['model']).name}",
        "method": sweep.get("method") or config["recipe"],
        "recipe": found.recipe,
        "condition": ", ".join(f"{name} {value}" for name, value in sorted(axes.items())),
        "seed": seed_name(config),
        "tried": _tried(config["recipe"], sweep.get("params", {})),
        "trials": sweep.get("trials", 0),
        "status": found.status,
        "failure": found.failure,
        "metric": metric,
        "validation": _number(found.best.get(f"validation_{metric}")) * scale,
        "test": _number(test.get(metric)) * scale,
        "seconds": found.seconds,
        "folder": found.folder,
        "scale": scale,
        "sign": -1.0 if found.lower_is_better else 1.0,
    }


def _tried(recipe: str, params: dict[str, Any]) -> str:
    """The recipe as it was typed, and what else a trial varies: `baseline, learning_rate 0.001`."""
    return ", ".join([recipe, *(f"{name} {value}" for name, value in params.items() if str(value) not in recipe)])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def seed_name(config: dict[str, Any]) -> str:
    """`11`, or `11/3` where the seed of the data is another one."""
    seed, data_seed = config["seed"], config["data_seed"]
    return f"{seed}" if data_seed in (0, seed) else f"{seed}/{data_seed}"
