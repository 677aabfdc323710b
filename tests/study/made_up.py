"""Records of runs that never were, with effects that are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from study.records import Study

RATES = (0.05, 0.1, 0.2)
METHODS = ("baseline", "hiddencut element", "hiddenkey-", "hiddenkey", "hiddenkey-input")


def make_record(task: str, method: str, seed: int, trial: int, value: float, **axes: Any) -> dict[str, Any]:
    """A finished run of two epochs, the first of which is the better one by two points."""
    params = {"learning_rate": 1e-3 * trial} if method == "baseline" else {"p": RATES[trial - 1]}
    config = {"model": "m/tiny", "data": task, "seed": seed, "data_seed": seed, "lora_r": 8, "learning_rate": 1e-3}
    last = round(value - 0.02, 9)
    epochs = [{"epoch": 1.0, "step": 8, "validation_accuracy": value, "train_loss": 0.5}]
    epochs.append({"epoch": 2.0, "step": 16, "validation_accuracy": last, "train_loss": 0.3})
    return {
        "folder": f"{method}-{seed}-{trial}-{axes}",
        "sweep": {"name": task, "method": method, "params": params, "axes": {"seed": seed} | axes, "trial": trial}
        | {"trials": len(RATES)},
        "preset": method,
        "task_key": task,
        "is_decoder": False,
        "config": config | {name: params[name] for name in ("learning_rate",) if name in params} | axes,
        "recipe": method,
        "status": "finished",
        "failure": "",
        "task": "classification",
        "metric": "accuracy",
        "best": dict(epochs[0]),
        "last": dict(epochs[1]),
        "test": {"best": {"accuracy": value}, "last": {"accuracy": last}},
        "epochs": epochs,
        "data_rows": {"train": 100, "test": 100},
        "step_seconds": {"p20": 2.0 if method == "hiddenkey" else 1.0},
        "seconds": 20.0,
        "started": "2026-11-24T15:20:11Z",
        "versions": {"torch": "2.13.0", "device": "cpu"},
        "commit": "0123456789",
    }


def make_records(effects: Mapping[str, float], chance: int = 0, noise: float = 0.004) -> list[dict[str, Any]]:
    """All trials of all methods: seeds share their luck, which pairing takes out; the second rate is the best."""
    rng, seeds, tasks = np.random.default_rng(chance), range(1, 6), ("mrpc", "sst2")
    luck = {(task, seed): rng.normal(0, 0.01) for task in tasks for seed in seeds}
    return [
        make_record(
            *(task, method, seed, trial),
            float(0.8 + luck[task, seed] + effects.get(method, 0) - 0.02 * (trial != 2) + rng.normal(0, noise)),
        )
        for task in tasks
        for method in METHODS
        for trial in (1, 2, 3)
        for seed in seeds
    ]


def study_of(
    folder: Path, records: Sequence[dict[str, Any]], change: Callable[[dict[str, Any]], object] = id
) -> Study:
    """The study of these records, each changed before it is written."""
    for record in records:
        change(record)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Study.read(folder)
