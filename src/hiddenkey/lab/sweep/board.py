"""What is to be done, who does it, and what came of it: the trials of a sweep in Optuna's storage.

One study for a sweep, one trial for each attempt at a slot; a slot without a trial waits to be taken. Of the trials
of a slot that wait or run, the one with the lowest number counts, so two workers may reach for it at the same moment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from ..errors import RunError
from .draw import draw_tpe
from .plan import Group, Run, Slot, SweepPlan
from .record import RunRecord, make_record
from .space import typed
from .storage import insist, no_warnings

# How often a run is given to another worker: after its worker died, and after an error.
DEATHS = 20
ERRORS = 3

_LIVE = (TrialState.WAITING, TrialState.RUNNING)


@dataclass(frozen=True)
class Claim:
    """A run that this process has taken, and the trial that says so."""

    trial: int
    slot: str
    run: Run


@dataclass(frozen=True)
class Busy:
    """A run that a worker is at, since when."""

    worker: str
    id: str
    since: float


class Board:
    """The trials of one plan in one storage."""

    def __init__(self, plan: SweepPlan, storage: Any, worker: str) -> None:
        self.plan = plan
        self.worker = worker
        self._storage = storage
        self._study: int | None = None
        self._looked = -math.inf

    def open(self, known: dict[str, RunRecord]) -> int:
        """Make the sweep known to the storage, with the records that are `known`, by id; how many runs are to do.

        Runs that were given up get new attempts.
        """
        with suppress(DuplicatedStudyError):
            insist(lambda: self._storage.create_new_study([StudyDirection.MINIMIZE], self.plan.name))
        found = self._by_key()
        to_do = 0
        for group in self.plan.groups:
            records = _records(group, found)
            for slot in group.slots:
                trials = found.get(slot.key, [])
                if _is_done(trials):
                    continue
                record = _known(group, slot, records, known)
                if record is not None:
                    attributes = {"key": slot.key, "id": record.id, "record": record.to_dict()}
                    self._add(create_trial(value=record.value, user_attrs=attributes))
                    records.append(record)
                    continue
                to_do += 1
                if trials and not any(trial.state in _LIVE for trial in trials):
                    self._add(_waiting(slot.key))
        return to_do

    def note_grace(self, grace: int) -> None:
        """Say after how many seconds of silence workers of this sweep count as dead."""
        insist(lambda: self._storage.set_study_user_attr(self._number(), "grace", grace))

    def grace(self) -> int | None:
        """What the process that opened the sweep said of it; None where it has said nothing."""
        return insist(lambda: self._storage.get_study_user_attrs(self._number())).get("grace")

    def is_open(self) -> bool:
        """Whether the storage knows the sweep, and all records that the process that opened it had."""
        known = any(study.study_name == self.plan.name for study in insist(self._storage.get_all_studies))
        return known and self.grace() is not None

    def take(self, without: Collection[str] = ()) -> Claim | None:
        """The next run that waits, now ours, of no slot in `without`; None where all others are done or at work.

        Raises:
            RunError: a run was given up after too many attempts.
        """
        self._look_for_dead()
        trials = self._by_key()
        for group in self.plan.groups:
            for slot in group.slots:
                if _is_done(trials.get(slot.key, [])):
                    continue
                claim = None if slot.key in without else self._take(group, slot, trials)
                if claim is not None:
                    return claim
                if group.ordered:
                    break
        return None

    def beat(self, claim: Claim) -> None:
        """Say that the worker of this run is alive."""
        self._storage.record_heartbeat(claim.trial)

    def finish(self, claim: Claim, record: RunRecord) -> bool:
        """Keep the record; False where the run was taken from us, because we were silent for too long."""
        try:
            insist(lambda: self._storage.set_trial_user_attr(claim.trial, "record", record.to_dict()))
            insist(lambda: self._storage.set_trial_state_values(claim.trial, TrialState.COMPLETE, [record.value]))
        except UpdateFinishedTrialError:
            return False
        return True

    def release(self, claim: Claim) -> None:
        """Give the run back: it waits again."""
        self._set(claim.trial, TrialState.WAITING)

    def fail(self, claim: Claim, error: str, final: bool = False) -> None:
        """Note that the run ended with an error; final: nobody need try again."""
        for name, value in {"error": error, "final": final}.items():
            self._attribute(claim.trial, name, value)
        self._set(claim.trial, TrialState.FAIL)

    def bury(self, worker: str) -> None:
        """Take over what a worker was at that is known to be dead."""
        for trial in self._running():
            if trial.user_attrs.get("worker") == worker:
                self._set(trial._trial_id, TrialState.FAIL)

    def records(self) -> list[RunRecord]:
        """The records of all slots that are done, in the plan's order."""
        trials = self._by_key()
        return [record for group in self.plan.groups for record in _records(group, trials)]

    def busy(self) -> list[Busy]:
        """Who is at what."""
        names = [field.name for field in fields(Busy)]
        found = [{name: trial.user_attrs.get(name) for name in names} for trial in self._running()]
        return [
            Busy(**entry) for entry in found if None not in entry.values()
        ]  # what has just begun says nothing yet

    def finished(self) -> bool:
        """Whether every slot is done."""
        trials = self._by_key()
        return all(_is_done(trials.get(slot.key, [])) for group in self.plan.groups for slot in group.slots)

    def _take(self, group: Group, slot: Slot, found: dict[str, list[FrozenTrial]]) -> Claim | None:
        trials = found.get(slot.key, [])
        ours = None
        if not any(trial.state in _LIVE for trial in trials):
            ours = self._add(_again(slot, trials))
            trials = self._by_key()[slot.key]
        live = [trial for trial in trials if trial.state in _LIVE]
        number = live[0]._trial_id if live else None
        if ours is not None and (number != ours or _is_done(trials)):
            self._attribute(ours, "spare", True)  # another worker was quicker
            self._set(ours, TrialState.FAIL)
        if number is None or _is_done(trials) or live[0].state == TrialState.RUNNING:
            return None
        # Before the claim: a trial without a heartbeat would never be taken from a worker that dies at once.
        insist(lambda: self._storage.record_heartbeat(number))
        try:
            if not insist(lambda: self._storage.set_trial_state_values(number, TrialState.RUNNING)):
                return None
        except UpdateFinishedTrialError:
            return None
        run = slot.run or _next(group, slot, _records(group, found))
        for name, value in {"worker": self.worker, "id": run.id, "since": time.time()}.items():
            self._attribute(number, name, value)
        return Claim(number, slot.key, run)

    def _look_for_dead(self) -> None:
        if time.monotonic() - self._looked < self._storage.get_heartbeat_interval():
            return
        self._looked = time.monotonic()
        study = insist(lambda: optuna.load_study(study_name=self.plan.name, storage=self._storage))
        with no_warnings():
            insist(lambda: fail_stale_trials(study))

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self._trials() if trial.state == TrialState.RUNNING]

    def _by_key(self) -> dict[str, list[FrozenTrial]]:
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self._trials():
            found.setdefault(trial.user_attrs["key"], []).append(trial)
        return found

    def _trials(self) -> list[FrozenTrial]:
        return insist(lambda: self._storage.get_all_trials(self._number(), deepcopy=False))

    def _add(self, trial: FrozenTrial) -> int:
        return insist(lambda: self._storage.create_new_trial(self._number(), template_trial=trial))

    def _number(self) -> int:
        if self._study is None:
            self._study = self._storage.get_study_id_from_name(self.plan.name)
        return self._study

    def _attribute(self, trial: int, name: str, value: Any) -> None:
        try:
            insist(lambda: self._storage.set_trial_user_attr(trial, name, value))
        except UpdateFinishedTrialError:
            return  # it was taken from us; `finish` says so

    def _set(self, trial: int, state: TrialState) -> None:
        try:
            insist(lambda: self._storage.set_trial_state_values(trial, state))
        except UpdateFinishedTrialError:
            return  # another process was quicker


def _is_done(trials: list[FrozenTrial]) -> bool:
    return any(trial.state == TrialState.COMPLETE for trial in trials)


def _records(group: Group, trials: dict[str, list[FrozenTrial]]) -> list[RunRecord]:
    """The records of a group, in the order of its slots."""
    done = [slot for slot in group.slots if _is_done(trials.get(slot.key, []))]
    return [_record(group, slot, trials[slot.key]) for slot in done]


def _record(group: Group, slot: Slot, trials: list[FrozenTrial]) -> RunRecord:
    done = next(trial for trial in trials if trial.state == TrialState.COMPLETE)
    try:
        record = make_record(done.user_attrs["record"])
    except TypeError as error:
        raise RunError(
            f"The storage holds a record of another version of hiddenkey ({error}). Use that version, or a new "
            "storage: move sweep.db away, or give another --storage; it is made again from runs/."
        ) from error
    # A grid that has grown counts its trials anew, and a sweep or a method may have got another name.
    return replace(record, sweep=group.sweep.name, method=group.method.name, trial=slot.trial, trials=group.trials)


def _next(group: Group, slot: Slot, records: list[RunRecord]) -> Run:
    """The run of a slot that the search fills, from the records of those before it."""
    space = group.method.space
    history = [(typed(record.params), record.value) for record in records if record.trial < slot.trial]
    return group.run(slot.trial, draw_tpe(space, slot.trial, group.name, history))


def _known(group: Group, slot: Slot, records: list[RunRecord], known: dict[str, RunRecord]) -> RunRecord | None:
    if slot.run is not None:
        return known.get(slot.run.id)
    if not known or len(records) < slot.trial - 1:
        return None
    return known.get(_next(group, slot, records).id)


def _waiting(key: str, deaths: int = 0, errors: int = 0) -> FrozenTrial:
    attributes = {"key": key, "deaths": deaths, "errors": errors}
    return create_trial(state=TrialState.WAITING, user_attrs=attributes)


def _again(slot: Slot, trials: list[FrozenTrial]) -> FrozenTrial:
    """A first attempt at a slot, or a new one where the last has failed."""
    earlier = [trial for trial in trials if not trial.user_attrs.get("spare")]
    if not earlier:
        return _waiting(slot.key)
    attributes = earlier[-1].user_attrs
    error = attributes.get("error")
    deaths = attributes.get("deaths", 0) + (error is None)
    errors = attributes.get("errors", 0) + (error is not None)
    name = attributes.get("id", slot.key)
    if attributes.get("final"):
        raise RunError(f"{name}: {error}")
    if errors >= ERRORS:
        raise RunError(f"{name} failed {errors} times, the last time so: {error}")
    if deaths >= DEATHS:
        raise RunError(f"{name}: {deaths} workers died while they were at it, for instance for want of memory.")
    return _waiting(slot.key, deaths, errors)
