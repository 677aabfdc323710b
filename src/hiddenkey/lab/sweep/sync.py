"""Between the storage and `runs/`: either can be lost, and is made again from the other."""

from __future__ import annotations

from pathlib import Path

from .plan import Plan
from .record import OTHER, RUNS, RunRecord, read_record, write_record


def known_records(plan: Plan) -> dict[str, RunRecord]:
    """The records in the sweep's folder, by id; those put aside too.

    Raises:
        RunError: a file there that is not a record.
    """
    paths = [path for name in (OTHER, RUNS) for path in sorted((plan.folder / name).glob("*.json"))]
    return {record.id: record for record in map(read_record, paths)}


def write_records(plan: Plan, records: list[RunRecord], known: dict[str, RunRecord]) -> None:
    """Write the records that the folder lacks or has differently."""
    for record in records:
        if known.get(record.id) != record or not _path(plan, RUNS, record.id).exists():
            write_record(record, plan.folder)
        _path(plan, OTHER, record.id).unlink(missing_ok=True)


def put_aside(plan: Plan, ids: set[str], known: dict[str, RunRecord]) -> int:
    """Move records of runs that the plan no longer has to `other/`; how many were moved."""
    moved = 0
    for name in known.keys() - ids:
        path = _path(plan, RUNS, name)
        if path.exists():
            target = _path(plan, OTHER, name)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
            moved += 1
    return moved


def _path(plan: Plan, folder: str, name: str) -> Path:
    return plan.folder / folder / f"{name}.json"
