"""`hiddenkey sweep`: from a file to all its records."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress

from rich.console import Console

from ..artifacts import make_folder
from ..errors import ConfigError, RunError
from ..interrupts import postponed
from ..lock import hold
from ..say import say
from .board import Board
from .config import SweepConfig
from .crew import Crew, Job, bury_dead, serve, terminated, worker_name
from .file import read_sweep
from .plan import SweepPlan, make_plan
from .record import WORK, RunRecord, keep_texts
from .show import Display, print_plan
from .storage import FILE, open_storage, url_of
from .sync import known_records, put_aside, write_records

_WAIT_FOR_SWEEP = 300.0


def sweep(config: SweepConfig, console: Console | None = None) -> SweepPlan:
    """Make every run of a sweep that is not made yet; returns when all are.

    Raises:
        UserError: a mistake in the file, its recipes, data or models; a run that cannot be made.
        OSError: a file, model or data set that cannot be read or written.
    """
    console = console or Console(stderr=True)
    config.check()
    plan = make_plan(read_sweep(config.file, config.set, config.out))
    if config.dry_run:
        _check(plan)
        print_plan(plan, console)
        return plan
    make_folder(plan.folder)
    job = Job(plan, url_of(config.storage, plan.folder), config.grace, _threads(config))
    if config.worker:
        _join(job, config, console)
        return plan
    with hold(plan.folder, console, "running a sweep"):
        _lead(job, config.workers, console)
    return plan


def _lead(job: Job, workers: int, console: Console) -> None:
    plan = job.plan
    known = known_records(plan)
    board = Board(plan, open_storage(job.storage, job.grace), worker_name(os.getpid()))
    to_do = board.open(known)
    board.note_grace(job.grace)
    bury_dead(board)
    if not to_do:
        _tidy(plan, board, known, console)
        _write(plan, board)
        say(console, f"{plan.folder} holds all {plan.total} runs of {plan.sweep.name}: nothing to do.")
        return
    _check_dtypes(plan)
    _check(plan, board.records())
    _tidy(plan, board, known, console)  # only now: a slip in the command must not put all records aside
    print_plan(plan, console)
    say(console, f"{plan.total - to_do} of {plan.total} runs are done, {to_do} to go, {workers} at a time.")
    crew = Crew(job, board)
    try:
        with terminated(), Display(plan, board, console) as display, postponed():
            crew.start(workers)
            crew.watch(display.tick)
    finally:
        crew.stop()
        _write(plan, board)
    say(console, f"All {plan.total} runs of {plan.sweep.name} are done: {plan.folder}/runs")


def _check(plan: SweepPlan, made: Iterable[RunRecord] = ()) -> None:
    # Slow to import: a mistake in the file has been told by now.
    from ..quiet import quieten
    from .check import check_plan

    quieten()
    check_plan(plan, made)


def _check_dtypes(plan: SweepPlan) -> None:
    from .check import check_dtypes

    check_dtypes(plan)


def _require_one_device() -> None:
    from ..settings import require_one_device

    require_one_device()


def _join(job: Job, config: SweepConfig, console: Console) -> None:
    if not config.storage and not (job.plan.folder / FILE).exists():
        raise RunError(
            f"{job.plan.folder} holds no {FILE}: start the sweep without --worker first, or give the --storage of "
            "the one that runs."
        )
    _require_one_device()  # this process is the worker; those of a crew are given one each
    _check_dtypes(job.plan)
    board = Board(job.plan, open_storage(job.storage, job.grace), worker_name(os.getpid()))
    deadline = time.monotonic() + _WAIT_FOR_SWEEP
    while not board.is_open():
        if time.monotonic() > deadline:
            raise RunError(
                f"The storage does not know this sweep ({job.plan.sweep.name}). Start it on one machine without "
                "--worker, and give both the same file."
            )
        say(console, "Waiting for the sweep to be started on another machine.")
        time.sleep(5)
    known = board.grace()
    if known != job.grace:
        raise ConfigError(
            f"grace = {job.grace} is not allowed: the sweep was started with --grace {known}, and its workers have "
            "to agree on when one of them counts as dead."
        )
    if not board.finished():
        _check(
            job.plan, board.records()
        )  # what this machine lacks must not count as a fault of the run that it would take
    try:
        serve(job, console)
    finally:
        _write(job.plan, board)


def _tidy(plan: SweepPlan, board: Board, known: dict[str, RunRecord], console: Console) -> None:
    asked = {slot.run.id for group in plan.groups for slot in group.slots if slot.run is not None}
    moved = put_aside(plan, asked | {record.id for record in board.records()}, known)
    if moved:
        say(
            console,
            f"{moved} records are of runs that the file no longer asks for: moved to {plan.folder}/other, and taken "
            "back when it asks for them again.",
        )


def _write(plan: SweepPlan, board: Board) -> None:
    """Bring `runs/` to what the storage knows; work folders go when nobody needs them any more."""
    records, known = board.records(), known_records(plan)
    write_records(plan, records, known)
    if board.finished():
        for record in records:  # of this sweep alone: another may be at work in the same folder
            keep_texts(plan.folder, record.id)  # of a worker that was killed, or silent for too long
            shutil.rmtree(plan.folder / WORK / record.id, ignore_errors=True)
        with suppress(OSError):
            (plan.folder / WORK).rmdir()


def _threads(config: SweepConfig) -> int:
    # Of the cores that a job may use, which are fewer than the machine has under taskset, Slurm and the like.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.threads or max(1, cores // config.workers)
