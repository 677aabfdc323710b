"""The board: each run is taken by one worker at a time, and none is lost."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from hiddenkey.lab.errors import RunError
from hiddenkey.lab.sweep import board as board_module
from hiddenkey.lab.sweep.board import Board, Claim
from hiddenkey.lab.sweep.draw import seed_of

from .tools import GRACE, board_of, plan_of, record_of

RANGES = {
    "baseline": {"recipe": "baseline", "grid": {"learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}},
    "dropkey": {"recipe": "dropkey@{p}", "grid": {"p": {"low": 0.01, "high": 0.3}}},
}


def taken(board: Board) -> Claim:
    claim = board.take()
    assert claim is not None
    return claim


def drain(board: Board) -> list[str]:
    """Finish all that waits; the ids in their order."""
    ids = []
    while (claim := board.take()) is not None:
        ids.append(claim.run.id)
        board.finish(claim, record_of(claim.run, accuracy=seed_of(claim.run.id) % 100 / 100))
    return ids


def test_a_run_is_taken_once(tmp_path: Path):
    plan = plan_of(tmp_path)
    one, two = board_of(plan, tmp_path, "one"), board_of(plan, tmp_path, "two")
    assert not two.is_open()
    assert one.open({}) == plan.total == 8
    assert not two.is_open(), "records may still be on their way"
    one.note_grace(GRACE)
    assert two.is_open()
    claims = [taken((one, two)[turn % 2]) for turn in range(8)]
    assert len({claim.run.id for claim in claims}) == 8
    assert one.take() is two.take() is None
    assert not one.finished()
    assert Counter(entry.worker for entry in two.busy()) == {"one": 4, "two": 4}
    for claim in claims:
        assert one.finish(claim, record_of(claim.run))
    assert one.finished()
    assert two.finished()
    assert [record.id for record in two.records()] == [s.run.id for g in plan.groups for s in g.slots if s.run]
    assert one.open({}) == 0


def test_a_run_given_back_waits_again(tmp_path: Path):
    board = board_of(plan_of(tmp_path), tmp_path)
    board.open({})
    claim = taken(board)
    board.release(claim)
    assert taken(board) == claim


def test_the_run_of_a_dead_worker_is_taken_over_and_comes_too_late_from_it(tmp_path: Path):
    plan = plan_of(tmp_path)
    dead, alive = board_of(plan, tmp_path, "dead"), board_of(plan, tmp_path, "alive")
    dead.open({})
    claim = taken(dead)
    alive.bury("dead")
    again = taken(alive)
    assert again.run == claim.run
    assert again.trial != claim.trial
    assert not dead.finish(claim, record_of(claim.run, accuracy=0.1))
    dead.release(claim)
    dead.fail(claim, "too late")
    assert alive.finish(again, record_of(claim.run, accuracy=0.9))
    assert [record.best["validation_accuracy"] for record in dead.records()] == [0.9]


def test_a_silent_worker_counts_as_dead_and_one_that_beats_does_not(tmp_path: Path):
    plan = plan_of(tmp_path)
    silent, alive = board_of(plan, tmp_path, "silent"), board_of(plan, tmp_path, "alive")
    alive.open({})
    lost, kept = taken(silent), taken(alive)
    for _ in range(6):
        time.sleep(0.85)
        alive.beat(kept)
    looked = board_of(plan, tmp_path, "new")
    assert taken(looked).run == lost.run
    assert kept.run.id not in drain(looked)


def test_a_run_whose_workers_die_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(board_module, "DEATHS", 2)
    board = board_of(plan_of(tmp_path), tmp_path)
    board.open({})
    for _ in range(2):
        taken(board)
        board.bury("one")
    with pytest.raises(RunError, match="2 workers died"):
        board.take()
    board.open({})  # the command once more
    taken(board)


def test_an_error_is_tried_three_times_and_a_mistake_once(tmp_path: Path):
    board = board_of(plan_of(tmp_path), tmp_path)
    board.open({})
    for _ in range(3):
        board.fail(taken(board), "the disk is full")
    with pytest.raises(RunError, match=r"failed 3 times(?s:.*)the disk is full"):
        board.take()
    board.open({})
    board.fail(taken(board), "no such column", final=True)
    with pytest.raises(RunError, match="no such column"):
        board.take()


def test_what_a_kill_lost_between_two_steps_is_made(tmp_path: Path):
    board = board_of(plan_of(tmp_path), tmp_path)
    board.open({})
    claim = taken(board)
    board._set(claim.trial, TrialState.FAIL)  # and killed before anything else
    assert claim.run.id in drain(board)
    assert board.finished()


def test_a_slot_queued_twice_is_made_once(tmp_path: Path):
    plan = plan_of(tmp_path)
    one, two = board_of(plan, tmp_path, "one"), board_of(plan, tmp_path, "two")
    one.open({})
    group = plan.groups[0]
    for slot in group.slots:
        two._add(board_module._waiting(slot.key))
    ids = [taken(one).run.id, taken(two).run.id, *drain(one)]
    assert len(ids) == len(set(ids)) == plan.total


def test_known_records_are_not_made_again(tmp_path: Path):
    plan = plan_of(tmp_path)
    first = board_of(plan, tmp_path)
    first.open({})
    drain(first)
    known = {record.id: record for record in first.records()}
    missing = known.pop(next(iter(known)))
    (tmp_path / "new").mkdir()
    board = board_of(plan, tmp_path / "new")
    assert board.open(known) == 1
    assert drain(board) == [missing.id]
    more = plan_of(tmp_path, axes={"seed": [1, 2, 3]})
    grown = board_of(more, tmp_path)
    assert grown.open({}) == 4
    assert {record.axes["seed"] for record in grown.records()} == {1, 2}


def test_a_grid_that_grows_keeps_its_runs_and_counts_its_trials_anew(tmp_path: Path):
    def methods(rates: list[float]) -> dict[str, Any]:
        return {"dropkey": {"recipe": "dropkey@{p}", "grid": {"p": rates}}}

    board = board_of(plan_of(tmp_path, methods=methods([0.1, 0.2]), axes=None), tmp_path)
    board.open({})
    drain(board)
    grown = board_of(plan_of(tmp_path, methods=methods([0.05, 0.1, 0.2]), axes=None), tmp_path)
    assert grown.open({}) == 1
    drain(grown)
    assert [(record.trial, record.params["p"]) for record in grown.records()] == [(1, 0.05), (2, 0.1), (3, 0.2)]
    assert {record.trials for record in grown.records()} == {3}


def test_tpe_takes_one_trial_after_another_and_the_same_ones_again(tmp_path: Path):
    plan = plan_of(tmp_path, methods=RANGES, axes=None, search="tpe", trials=8)
    board = board_of(plan, tmp_path)
    board.open({})
    first, second = taken(board), taken(board)
    assert {first.run.method, second.run.method} == {"baseline", "dropkey"}
    assert board.take() is None
    board.release(first)
    board.release(second)
    ids = drain(board)
    assert len(set(ids)) == 16
    (tmp_path / "new").mkdir()
    again = board_of(plan, tmp_path / "new")
    records = {record.id: record for record in board.records()}
    assert again.open({name: records[name] for name in list(records)[:5]}) == 11
    assert set(drain(again)) == set(list(records)[5:])
    assert [record.trial for record in again.records()] == [*range(1, 9)] * 2
    assert {record.trials for record in again.records()} == {8}


def test_failed_runs_count_as_the_worst(tmp_path: Path):
    plan = plan_of(tmp_path, methods=RANGES, axes=None, search="tpe", trials=3)
    board = board_of(plan, tmp_path)
    board.open({})
    while (claim := board.take()) is not None:
        assert board.finish(claim, record_of(claim.run, status="failed"))
    assert board.finished()
    assert {record.value for record in board.records()} == {math.inf}
    record = board.records()[0]
    good = replace(record, status="finished", best={"validation_accuracy": 0.7})
    assert good.value == -0.7
    assert replace(good, lower_is_better=True).value == 0.7
    assert replace(good, best={"validation_accuracy": None}).value == math.inf
