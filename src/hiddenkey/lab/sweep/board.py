"""What is to be done, who does it, and what came of it: the trials of a sweep in Optuna's storage.

One study for each group, one trial for each attempt at a slot. Of the trials of a slot that wait or run, only the
one with the lowest number counts, so that two processes that queue the same slot at the same moment do no harm.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from ..errors import RunError
from .draw import draw_tpe
from .plan import Group, Plan, Run, Slot
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
    run: Run


@dataclass(frozen=True)
class Busy:
    """A run that a worker is at, since when."""

    worker: str
    id: str
    since: float


class Board:
    """The trials of one plan in one storage."""

    def __init__(self, plan: Plan, storage: Any, worker: str) -> None:
        self.plan = plan
        self.worker = worker
        self._storage = storage
        self._studies: dict[str, int] = {}
        self._done: dict[str, list[RunRecord]] = {}
        self._looked = -math.inf

    def queue(self, known: dict[str, RunRecord]) -> int:
        """Queue every slot that has no trial; those whose record is `known`, by id, as done. Says how many wait.

        Runs that were given up get new attempts.
        """
        waiting = 0
        for group in self.plan.groups:
            study = self._study(group, make=True)
            found = self._by_key(group)
            for slot in group.slots:
                trials = found.get(slot.key, [])
                if _is_done(trials):
                    continue
                record = self._known(group, slot, known)
                if record is not None:
                    attributes = {"key": slot.key, "id": record.id, "record": record.to_dict()}
                    self._add(study, create_trial(value=record.value, user_attrs=attributes))
                    continue
                waiting += 1
                if not any(trial.state in _LIVE for trial in trials):
                    self._add(study, _waiting(slot.key))
        return waiting

    def ready(self) -> bool:
        """Whether the storage knows all groups of the plan."""
        names = {study.study_name for study in insist(self._storage.get_all_studies)}
        return all(group.name in names for group in self.plan.groups)

    def take(self) -> Claim | None:
        """The next run that waits, now ours; None where all are done or at work.

        Raises:
            RunError: a run was given up after too many attempts.
        """
        self._look_for_dead()
        for group in self._open():
            trials = self._by_key(group)
            for slot in group.slots:
                if _is_done(trials.get(slot.key, [])):
                    continue
                claim = self._take(group, slot, trials.get(slot.key, []))
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
        for group in self._open():
            for trial in self._trials(group):
                if trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == worker:
                    self._set(trial._trial_id, TrialState.FAIL)

    def records(self) -> list[RunRecord]:
        """The records of all slots that are done, in the plan's order."""
        return [record for group in self.plan.groups for record in self._records(group)]

    def busy(self) -> list[Busy]:
        """Who is at what."""
        found = []
        for group in self._open():
            for trial in self._trials(group):
                attributes = trial.user_attrs
                if trial.state == TrialState.RUNNING and {"worker", "id", "since"} <= attributes.keys():
                    found.append(Busy(attributes["worker"], attributes["id"], attributes["since"]))
        return found

    def finished(self) -> bool:
        """Whether every slot is done."""
        return len(self.records()) == self.plan.total

    def _open(self) -> Iterator[Group]:
        return (group for group in self.plan.groups if len(self._records(group)) < len(group.slots))

    def _records(self, group: Group) -> list[RunRecord]:
        if group.name in self._done:
            return self._done[group.name]
        trials = self._by_key(group)
        done = [slot for slot in group.slots if _is_done(trials.get(slot.key, []))]
        records = [_record(slot, trials[slot.key]) for slot in done]
        if len(records) == len(group.slots):
            self._done[group.name] = records
        return records

    def _take(self, group: Group, slot: Slot, trials: list[FrozenTrial]) -> Claim | None:
        if not any(trial.state in _LIVE for trial in trials):
            self._add(self._study(group), _again(slot, trials))
            trials = self._by_key(group)[slot.key]
        live = [trial for trial in trials if trial.state in _LIVE]
        if _is_done(trials) or not live or live[0].state == TrialState.RUNNING:
            return None
        number = live[0]._trial_id
        # Before the claim: a trial without a heartbeat would never be taken from a worker that dies at once.
        insist(lambda: self._storage.record_heartbeat(number))
        try:
            if not insist(lambda: self._storage.set_trial_state_values(number, TrialState.RUNNING)):
                return None
        except UpdateFinishedTrialError:
            return None
        run = slot.run or self._next(group, slot)
        for name, value in {"worker": self.worker, "id": run.id, "since": time.time()}.items():
            self._attribute(number, name, value)
        return Claim(number, run)

    def _next(self, group: Group, slot: Slot) -> Run:
        earlier = [record for record in self._records(group) if record.trial < slot.trial]
        space = group.method.space
        history = [(typed(record.params), record.value) for record in earlier]
        return group.run(slot.trial, draw_tpe(space, slot.trial, group.name, history))

    def _known(self, group: Group, slot: Slot, known: dict[str, RunRecord]) -> RunRecord | None:
        if slot.run is not None:
            return known.get(slot.run.id)
        earlier = self._records(group)
        if len(earlier) < slot.trial - 1:
            return None
        return known.get(self._next(group, slot).id)

    def _look_for_dead(self) -> None:
        if time.monotonic() - self._looked < self._storage.get_heartbeat_interval():
            return
        self._looked = time.monotonic()
        for group in self._open():
            study = optuna.load_study(study_name=group.name, storage=self._storage)
            with no_warnings():
                insist(partial(fail_stale_trials, study))

    def _study(self, group: Group, make: bool = False) -> int:
        if group.name not in self._studies:
            if make:
                with suppress(DuplicatedStudyError):
                    insist(lambda: self._storage.create_new_study([StudyDirection.MINIMIZE], group.name))
            self._studies[group.name] = insist(lambda: self._storage.get_study_id_from_name(group.name))
        return self._studies[group.name]

    def _trials(self, group: Group) -> list[FrozenTrial]:
        study = self._study(group)
        return insist(lambda: self._storage.get_all_trials(study, deepcopy=False))

    def _by_key(self, group: Group) -> dict[str, list[FrozenTrial]]:
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self._trials(group):
            found.setdefault(trial.user_attrs["key"], []).append(trial)
        return found

    def _add(self, study: int, trial: FrozenTrial) -> None:
        insist(lambda: self._storage.create_new_trial(study, template_trial=trial))

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


def _record(slot: Slot, trials: list[FrozenTrial]) -> RunRecord:
    done = next(trial for trial in trials if trial.state == TrialState.COMPLETE)
    # A grid that has grown counts its trials anew.
    return replace(make_record(done.user_attrs["record"]), trial=slot.trial)


def _waiting(key: str, deaths: int = 0, errors: int = 0) -> FrozenTrial:
    attributes = {"key": key, "deaths": deaths, "errors": errors}
    return create_trial(state=TrialState.WAITING, user_attrs=attributes)


def _again(slot: Slot, trials: list[FrozenTrial]) -> FrozenTrial:
    """A new attempt at a slot whose last one failed, or was lost while it was queued."""
    if not trials:
        return _waiting(slot.key)
    attributes = trials[-1].user_attrs
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
