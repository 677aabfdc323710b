"""Sweep files for tests, and what lies in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from hiddenkey.lab.config import SweepConfig
from hiddenkey.lab.run_folder import RunResult, read_result
from hiddenkey.lab.sweep import Queue
from hiddenkey.lab.sweep_file import Run, SweepPlan, make_plan, read_sweep

GRACE = 4


def sweep_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A sweep of two methods with two trials each on two seeds, as its file holds it."""
    values: dict[str, Any] = {
        "name": "tiny",
        "out": str(folder / "out"),
        "base": {"model": "bert", "data": "sentences.csv", "epochs": 1, "batch_size": 16, "max_length": 16},
        "methods": {
            "baseline": {"recipe": "baseline", "grid": {"learning_rate": ["2e-4", "4e-4"]}},
            "dropkey column": {"recipe": "dropkey:column@{p}", "grid": {"p": [0.05, 0.1]}},
        },
        "axes": {"seed": [1, 2]},
    }
    return {name: value for name, value in (values | changes).items() if value is not None}


def write_sweep(folder: Path, **changes: Any) -> Path:
    """The same as a file."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep_values(folder, **changes), sort_keys=False))
    return path


def plan_of(folder: Path, **changes: Any) -> SweepPlan:
    """Its plan."""
    return make_plan(read_sweep(write_sweep(folder, **changes)))


def runs_of(plan: SweepPlan) -> list[Run]:
    """Its runs, where the file fixes them."""
    return [slot.run for slot in plan.slots if slot.run is not None]


def queue_of(plan: SweepPlan, mark: str = "one", storage: str = "") -> Queue:
    """A worker's view of it."""
    plan.folder.mkdir(exist_ok=True)
    return Queue(plan, SweepConfig("sweep.yaml", grace=GRACE, storage=storage), mark)


def results_in(folder: Path) -> dict[str, RunResult]:
    """All results in a sweep's folder, by the name of the run's folder."""
    found = {path.parent.name: read_result(path.parent) for path in folder.glob("*/result.json")}
    return {name: result for name, result in found.items() if result is not None}


def write_finished(run: Run, accuracy: float = 0.5) -> RunResult:
    """What a finished run leaves, without the training."""
    empty: dict[str, Any] = {}
    result = RunResult(
        folder=run.config.out,
        status="finished",
        config=run.config.to_dict(),
        recipe=run.config.recipe,
        plan="",
        task="classification",
        versions=empty,
        commit=None,
        data_rows=empty,
        trainable_parameters=1,
        metric="accuracy",
        last={"validation_accuracy": accuracy},
        best={"validation_accuracy": accuracy},
        epochs=[],
        history=[],
        drop_rates=empty,
        drop_rates_by_site=empty,
        step_seconds=empty,
        seconds=1.0,
        sweep=run.sweep,
    )
    folder = Path(run.config.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result.__dict__))
    return result
