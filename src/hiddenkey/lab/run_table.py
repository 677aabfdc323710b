"""All runs below a folder as one table, read from their `result.json` files; damaged ones are named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from .artifacts import RESULT
from .errors import RunError

SHARES = {"accuracy", "matthews", "f1", "pearson", "spearman", "token_accuracy", "bleu", "meteor", "rouge_l", "ter"}
"""Metrics that are shown in points, times 100."""
NEEDED: dict[str, type] = {
    **dict.fromkeys(("status", "failure", "recipe", "metric"), str),
    **dict.fromkeys(("config", "best", "test", "sweep"), dict),
    **dict.fromkeys(("config.model", "config.data", "config.recipe"), str),
    **dict.fromkeys(("config.seed", "config.data_seed"), int),
    "lower_is_better": bool,
}
"""What a `result.json` must hold."""
OF_A_SWEEP = {"sweep.name": str, "sweep.method": str, "sweep.params": dict, "sweep.axes": dict, "sweep.trials": int}
"""What its `sweep` must hold; it is empty for a run of `hiddenkey train`."""


def read_runs(folder: Path) -> pd.DataFrame:
    """One row for each `result.json` below the folder.

    Raises:
        RunError: there is none, or one lacks a field or holds a value of another kind.
    """
    rows = [_row(path) for path in sorted(folder.rglob(RESULT))]
    if not rows:
        raise RunError(f"no {RESULT} below {folder}. Run `hiddenkey train` or `hiddenkey sweep` first.")
    return pd.DataFrame(rows)


def _row(path: Path) -> dict[str, Any]:
    def reject(word: str) -> float:
        raise ValueError(f"{word} is no number")

    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=reject)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair, which no file can hold
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON: {str(error)[:200]}. Move it away, or make the run again.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no record of a run. Move it away, or make the run again.")
    for name, kind in (NEEDED | (OF_A_SWEEP if found.get("sweep") else {})).items():
        outer, _, inner = name.partition(".")
        _require(path, name, found[outer].get(inner) if inner else found.get(outer), kind)
    config, sweep, metric = found["config"], found["sweep"], found["metric"]
    axes = {name: value for name, value in sweep.get("axes", {}).items() if name not in ("seed", "data_seed")}
    test = found["test"].get("best") or found["test"].get("last") or {}
    _require(path, "test.best", test, dict)
    scale = 100.0 if metric in SHARES else 1.0
    return {
        "task": sweep.get("name") or f"{Path(config['data']).name} with {Path(config['model']).name}",
        "method": sweep.get("method") or config["recipe"],
        "recipe": found["recipe"],
        "condition": ", ".join(f"{name} {value}" for name, value in sorted(axes.items())),
        "seed": seed_name(config),
        "tried": _tried(config["recipe"], sweep.get("params", {})),
        "trials": sweep.get("trials", 0),
        "status": found["status"],
        "failure": found["failure"],
        "metric": metric,
        "validation": _number(path, f"best.validation_{metric}", found["best"].get(f"validation_{metric}")) * scale,
        "test": _number(path, f"test.best.{metric}", test.get(metric)) * scale,
        "seconds": _number(path, "seconds", found["seconds"]),
        "folder": str(path.parent),
        "scale": scale,
        "sign": -1.0 if found["lower_is_better"] else 1.0,
    }


def _tried(recipe: str, params: dict[str, Any]) -> str:
    """The recipe as it was typed, and what else a trial varies: `baseline, learning_rate 0.001`."""
    return ", ".join([recipe, *(f"{name} {value}" for name, value in params.items() if str(value) not in recipe)])


def seed_name(config: dict[str, Any]) -> str:
    """`11`, or `11/3` where the seed of the data is another one."""
    seed, data_seed = config["seed"], config["data_seed"]
    return f"{seed}" if data_seed in (0, seed) else f"{seed}/{data_seed}"


def _require(path: Path, name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = kind.__name__ if isinstance(kind, type) else "number"
        shown = "missing" if value is None else f"{str(value)[:60]!r}"
        raise RunError(f"{path}: {name} is {shown}, but should be of type {wanted}. Make the run again.")


def _number(path: Path, name: str, value: Any) -> float:
    """NaN where there is none."""
    if value is None:
        return math.nan
    _require(path, name, value, (int, float))
    if abs(value) > 1e300:
        raise RunError(f"{path}: {name} is too large for a number. Make the run again.")
    return float(value)
