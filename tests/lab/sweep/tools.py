"""Sweep files and records for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hiddenkey.lab.sweep.board import Board
from hiddenkey.lab.sweep.file import read_sweep
from hiddenkey.lab.sweep.plan import Run, SweepPlan, make_plan
from hiddenkey.lab.sweep.record import RunRecord
from hiddenkey.lab.sweep.storage import open_storage

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


def board_of(plan: SweepPlan, folder: Path, worker: str = "one") -> Board:
    """A board on a database in `folder`."""
    return Board(plan, open_storage(f"sqlite:///{folder / 'sweep.db'}", GRACE), worker)


def record_of(run: Run, accuracy: float = 0.5, status: Any = "finished") -> RunRecord:
    """What might have come of a run."""
    metrics = {"validation_accuracy": accuracy} if status == "finished" else {}
    return RunRecord(
        id=run.id,
        sweep=run.sweep,
        method=run.method,
        params=run.params,
        axes=run.axes,
        trial=run.trial,
        trials=run.trials,
        config=run.config.to_dict(),
        recipe=run.config.recipe,
        status=status,
        failure="",
        task="classification",
        metric="accuracy",
        lower_is_better=False,
        best=metrics,
        last=metrics,
        test={},
        epochs=[],
        data_rows={},
        trainable_parameters=1,
        drop_rates={},
        step_seconds={},
        seconds=1.0,
        started="2026-01-01T00:00:00Z",
        versions={},
        commit=None,
    )
