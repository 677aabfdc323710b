"""The records in a sweep's folder, where several workers share it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiddenkey.lab.sweep import sync
from hiddenkey.lab.sweep.record import RUNS, RunRecord, read_record, write_record
from hiddenkey.lab.sweep.sync import known_records

from .tools import plan_of, record_of


def test_a_record_that_a_neighbour_moves_away_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(tmp_path)
    first, second = sorted((record_of(slot.run) for slot in plan.groups[0].slots if slot.run), key=lambda r: r.id)
    for record in (first, second):
        write_record(record, plan.folder)

    def moved(path: Path) -> RunRecord:
        (plan.folder / RUNS / f"{first.id}.json").unlink(missing_ok=True)
        return read_record(path)

    monkeypatch.setattr(sync, "read_record", moved)
    assert known_records(plan) == {second.id: second}
