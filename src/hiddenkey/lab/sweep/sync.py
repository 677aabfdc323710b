"""Between the storage and `runs/`: either can be lost, and is made again from the other."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ..errors import RunError
from .plan import SweepPlan
from .record import OTHER, RUNS, RunRecord, read_record, write_record


def known_records(plan: SweepPlan) -> dict[str, RunRecord]:
    """The records in the sweep's folder, by id; those put aside too.

    Raises:
        RunError: a file there that is not a record, or not of the run that its name says.
    """
    known: dict[str, RunRecord] = {}
    for path in (path for name in (OTHER, RUNS) for path in sorted((plan.folder / name).glob("*.json"))):
        with suppress(FileNotFoundError):  # a neighbour has moved it since, between the two folders
            record = read_record(path)
            if path.stem != record.id:
                raise RunError(
                    f"{path} is the record of {record.id}; give it the name {record.id}.json, or delete it."
                )
            known[record.id] = record
    return known


def write_records(plan: SweepPlan, records: list[RunRecord], known: dict[str, RunRecord]) -> None:
    """Write the records that the folder lacks or has differently."""
    for record in records:
        if known.get(record.id) != record or not _path(plan, RUNS, record.id).exists():
            write_record(record, plan.folder)
        _path(plan, OTHER, record.id).unlink(missing_ok=True)


def put_aside(plan: SweepPlan, ids: set[str], known: dict[str, RunRecord]) -> int:
    """Move records of this sweep's runs that the plan no longer has to `other/`; how many were moved."""
    moved = 0
    for name, record in known.items():
        path = _path(plan, RUNS, name)
        if name not in ids and record.sweep == plan.sweep.name and path.exists():
            target = _path(plan, OTHER, name)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
            moved += 1
    return moved


def _path(plan: SweepPlan, folder: str, name: str) -> Path:
    return plan.folder / folder / f"{name}.json"
