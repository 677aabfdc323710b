"""What a sweep leaves behind: one JSON file for each run."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import RunError


@dataclass(frozen=True)
class RunRecord:
    """One run of a sweep, as `runs/<id>.json` holds it."""

    id: str
    sweep: str
    method: str
    params: dict[str, Any]
    axes: dict[str, Any]
    trial: int
    config: dict[str, Any]
    recipe: str
    status: str
    failure: str
    task: str
    metric: str
    lower_is_better: bool
    best: dict[str, Any]
    last: dict[str, Any]
    test: dict[str, dict[str, Any]]
    epochs: list[dict[str, Any]]
    data_rows: dict[str, int]
    trainable_parameters: int
    drop_rates: dict[str, Any]
    step_seconds: dict[str, float]
    seconds: float
    started: str
    versions: dict[str, str]
    commit: str | None


def read_record(path: Path) -> RunRecord:
    """The record in a file.

    Raises:
        RunError: a file that this version did not write.
    """
    try:
        return RunRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        names = ", ".join(field.name for field in fields(RunRecord))
        raise RunError(f"{path} is not a run of this version ({error}); it should hold: {names}.") from error
