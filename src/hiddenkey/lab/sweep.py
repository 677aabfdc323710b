"""`hiddenkey sweep`: all runs of a sweep file, by any number of processes and machines, safe against any kill.

A run is its folder, which `train` locks, continues, and skips when it is finished. Optuna's storage says only who is
at which run, so that no two processes make the same one, and gives the runs of dead workers to others.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import random
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import Progress

import hiddenkey

from ..errors import BusyError, ConfigError, NonFiniteLossError, RunError, UnfitFolderError
from .callbacks import heed, postponed
from .config import SweepConfig
from .console import say
from .run_folder import CHECKPOINTS, RESULT, hold, make_folder, write_result
from .sweep_file import Run, Slot, SweepPlan, Values, check_plan, make_plan, read_sweep

T = TypeVar("T")

DATABASE = "sweep.db"
ERRORS, DEATHS = 3, 20
"""In a row, after which a worker gives up its work, and the process above the workers the sweep."""
_PAUSE, _PATIENCE, _HELD = 0.5, 30.0, 10.0
_FOUND_WRONG = 2

warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats, said anew at each


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
        check_plan(plan)
        _print_plan(plan, console)
        return plan
    make_folder(plan.folder)
    queue = Queue(plan, config)
    with nullcontext() if config.worker else hold(plan.folder, console, "running a sweep"):
        if config.worker:
            from .trainer_settings import require_one_device

            require_one_device()
        if not queue.open():
            say(console, f"{plan.folder} holds all {len(plan.slots)} runs of {plan.file.name}: nothing to do.")
            return plan
        check_plan(plan)  # by every worker: what this machine lacks is no fault of a run
        if config.worker:
            with _terminated():
                work(queue, console)
        else:
            _print_plan(plan, console)
            _lead(queue, config, console)
    say(console, f"All {len(plan.slots)} runs of {plan.file.name} are done: {plan.folder}")
    return plan


class Queue:
    """Which runs are done, at work or free, by the trials of one study.

    A slot is a trial that waits or runs, or is complete; where its worker went silent or died that trial has failed,
    and the slot gets a new one.
    """

    def __init__(self, plan: SweepPlan, config: SweepConfig, mark: str = "") -> None:
        """`mark` tells this worker from others: a container numbers its processes anew after each start."""
        self.plan, self.config = plan, config
        self.worker = f"{socket.gethostname()} {os.getpid()} {mark or secrets.token_hex(4)}"
        self.study = _open_study(config, plan)
        self.storage: Any = self.study._storage
        self.values: dict[int, float] = {}
        """What the slots that are done have come to."""
        self._chosen: dict[str, tuple[Generator[Values, float | None, None], Slot]] = {}

    def open(self) -> list[Slot]:
        """Slots that are not done, with their runs; of TPE the first of each group, which waits for its value."""
        complete = {
            _slot(trial): math.inf if trial.value is None else trial.value
            for trial in self.trials(TrialState.COMPLETE)
        }
        found: dict[Any, Slot] = {}
        for place in self.plan.slots:
            if place.index in self.values or place.group.name in found:
                continue
            slot = place if place.run else self._choose(place)
            assert slot.run is not None
            # Another machine may hold the folder, where they share a database alone.
            there = place.index in complete and (self.config.storage or (Path(slot.run.config.out) / RESULT).exists())
            if there:
                self.values[place.index] = complete[place.index]
            else:
                found[place.index if place.run else place.group.name] = slot
        return list(found.values())

    def _choose(self, place: Slot) -> Slot:
        settings, slot = self._chosen.get(place.group.name) or (place.group.settings(), place)
        if slot.index != place.index or slot.run is None:
            setting = settings.send(self.values[slot.index] if slot.run else None)
            slot = replace(place, run=place.group.run(place.trial, setting))
            self._chosen[place.group.name] = settings, slot
        return slot

    def take(self, slots: list[Slot]) -> tuple[FrozenTrial, Slot] | None:
        """The first of `slots` that nobody is at, now ours."""
        _insist(lambda: fail_stale_trials(self.study))
        busy = set(map(_slot, self.trials(TrialState.RUNNING)))
        free = [slot for slot in slots if slot.index not in busy]
        # Where another worker was quicker, many are at the same slots: not one after another behind them.
        for slot in [*free[:1], *random.sample(free[1:], len(free[1:]))]:
            if (trial := self._claim(slot)) is not None:
                return trial, slot
        return None

    def _claim(self, slot: Slot) -> FrozenTrial | None:
        """The trial that counts of this slot, now running; None where another worker was quicker.

        Of several that wait or run the one with the lowest number counts, so that two workers may queue it at once.
        """

        def first() -> FrozenTrial | None:
            trials = self.trials(TrialState.WAITING, TrialState.RUNNING)
            return next((trial for trial in trials if _slot(trial) == slot.index), None)

        if first() is None:
            _insist(lambda: self.study.enqueue_trial({}, user_attrs={"slot": slot.index}))
        trial = first()
        if trial is None or trial.state == TrialState.RUNNING or slot not in self.open():
            return None
        self.beat(trial)  # before it runs: without a heartbeat nobody would find its worker dead
        with suppress(UpdateFinishedTrialError):
            if _insist(lambda: self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)):
                _insist(lambda: self.storage.set_trial_user_attr(trial._trial_id, "worker", self.worker))
                return trial
        return None

    def beat(self, trial: FrozenTrial) -> None:
        """Say that the worker of this trial is alive."""
        _insist(lambda: self.storage.record_heartbeat(trial._trial_id))

    def end(self, trial: FrozenTrial, state: TrialState, value: float | None = None) -> None:
        """Complete, fail or give back a trial; nothing happens where it was given to another worker meanwhile."""
        with suppress(UpdateFinishedTrialError):
            values = None if value is None else [value]
            _insist(lambda: self.storage.set_trial_state_values(trial._trial_id, state, values))

    def bury(self, marks: set[str]) -> None:
        """Free the runs of workers that are dead."""
        for trial in self.trials(TrialState.RUNNING):
            if _mark(trial) in marks:
                self.end(trial, TrialState.FAIL)

    def silent(self) -> set[str]:
        """Marks of workers that were taken a run from and have none since: stopped, or cut off from the storage."""
        _insist(lambda: fail_stale_trials(self.study))
        return set(map(_mark, self.trials(TrialState.FAIL))) - set(map(_mark, self.trials(TrialState.RUNNING)))

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All in these states, in the order of their numbers."""
        return _insist(lambda: self.study.get_trials(deepcopy=False, states=states))


def _slot(trial: FrozenTrial) -> int | None:
    found = trial.user_attrs.get("slot")
    return found if isinstance(found, int) else None


def _mark(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("worker")).rpartition(" ")[2]


def work(queue: Queue, console: Console, *, replaced: bool = False) -> None:
    """Make runs until all of the sweep are done, by whomever; those that have failed last.

    replaced: another process takes this one's place when it ends, so it ends after an error that nobody foresaw: a
    GPU that failed fails on in the process that saw it.

    Raises:
        UserError: a run cannot be made, and why.
        SystemExit: after such an error.
    """
    failed, in_a_row = set[int](), 0
    while slots := queue.open():
        heed()  # what came while a run failed
        claim = queue.take(sorted(slots, key=lambda slot: slot.index in failed))
        if claim is None:
            time.sleep(_PAUSE)
            continue
        trial, slot = claim
        run = slot.run
        assert run is not None
        say(console, f"{time.strftime('%H:%M:%S')} {run.id}")
        state, value, pause = TrialState.WAITING, None, 0.0  # given back, unless it is done
        try:
            with _heartbeats(queue, trial, console):
                value = _made(run, console)
            state, in_a_row = TrialState.COMPLETE, 0
        except Exception as error:
            say(console, "".join(traceback.format_exception(error)))
            foreseen = isinstance(error, (hiddenkey.UserError, OSError))
            failed.add(slot.index)
            in_a_row += 1
            pause = _HELD if isinstance(error, BusyError) else 0.0  # its last worker hangs, until it is ended
            if isinstance(error, hiddenkey.UserError) and not isinstance(error, RunError):
                raise
            if replaced and not foreseen:
                sys.exit(1)
            if in_a_row == ERRORS:
                said = f"{error}" if foreseen else f"{type(error).__name__}: {error}"
                raise RunError(f"{ERRORS} tries failed in a row, the last one of {run.id}: {said}") from error
        finally:
            queue.end(trial, state, value)
        time.sleep(pause)


def _made(run: Run, console: Console) -> float:
    """What a search minimises of a run, once its result is in its folder."""
    from .train import train

    folder = Path(run.config.out)
    try:
        try:
            result = train(run.config, console, run.sweep)
        except UnfitFolderError as error:  # begun by another version, or its checkpoints are damaged
            path = folder / RESULT
            if path.exists() and b'"status": "finished"' in path.read_bytes():
                raise
            say(console, f"{error}\nThe run is made anew.")
            result = train(replace(run.config, overwrite=True), console, run.sweep)
    except NonFiniteLossError:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return math.inf
    finally:
        gc.collect()  # the Trainer and its model hold one another
    if result.sweep != run.sweep:  # made by `hiddenkey train`, or before the file changed
        write_result(replace(result, sweep=run.sweep))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    best = result.best.get(f"validation_{result.metric}")
    if best is None or not math.isfinite(best):
        return math.inf
    return best if result.lower_is_better else -best


@contextmanager
def _heartbeats(queue: Queue, trial: FrozenTrial, console: Console) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(queue.config.grace / 4):
            try:
                queue.beat(trial)
            except Exception as error:  # noqa: BLE001 - the run goes on without its storage, which may come back
                say(console, f"No heartbeat: {error}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _lead(queue: Queue, config: SweepConfig, console: Console) -> None:
    """Start workers on this machine, and others where they die or hang, until all runs are done."""
    total, deaths = len(queue.plan.slots), 0
    processes: dict[int, tuple[str, Any]] = {}
    logs = queue.plan.folder / "logs"
    logs.mkdir(exist_ok=True)
    context = _context()

    def start(number: int) -> None:
        mark = secrets.token_hex(4)
        process = context.Process(target=_child, args=(config, queue.plan, number, _log(number), mark))
        process.start()
        processes[number] = mark, process

    def _log(number: int) -> Path:
        return logs / f"worker-{number}.log"

    progress = Progress(console=console, disable=not console.is_terminal, transient=True)
    bar = progress.add_task(queue.plan.file.name.replace("[", r"\["), total=total)
    try:
        with _terminated(), progress, postponed():
            for number in range(1, config.workers + 1):
                start(number)
            told = len(queue.values)
            while queue.open():
                if len(queue.values) > told:
                    told, deaths = len(queue.values), 0
                    say(console, f"{time.strftime('%H:%M:%S')} {told} of {total} runs are done.")
                progress.update(bar, completed=told)
                silent = queue.silent()
                for number, (mark, process) in list(processes.items()):
                    if mark in silent:
                        say(console, f"Worker {number} hangs; it is ended, and another takes its run.")
                        process.kill()
                        process.join()
                    if not process.is_alive():
                        queue.bury({mark})
                        deaths += 1
                        if process.exitcode == _FOUND_WRONG or deaths == DEATHS:
                            end = _log(number).read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
                            raise RunError("\n".join([f"A worker ended; {_log(number)} says why:", *end]))
                        start(number)
                time.sleep(_PAUSE)
                heed()
    finally:
        for _, process in processes.values():
            process.terminate()  # gives its run back
        deadline = time.monotonic() + _PATIENCE
        for _, process in processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        queue.bury({mark for mark, _ in processes.values()})  # last: the storage may be gone


def _context() -> Any:
    """Where it can be, workers are forked from a process that has imported what they need: quick, and less memory.

    A GPU cannot be used in a process that was forked after the libraries have asked for it.
    """
    import torch

    if sys.platform != "linux" or torch.accelerator.current_accelerator() is not None:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hiddenkey.lab.train", "hiddenkey.lab.sweep"])
    return context


def _child(config: SweepConfig, plan: SweepPlan, number: int, log: Path, mark: str) -> None:
    """A worker process; its output goes to its log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process above stops us
    import torch

    from .console import quieten

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(index) for index in range(torch.cuda.device_count())] if named is None else named.split(",")
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[(number - 1) % len(devices)]
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // config.workers))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        quieten()
        try:
            with _terminated():
                work(Queue(plan, config, mark), Console(file=file, width=200), replaced=True)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGTERM)
        except (hiddenkey.UserError, OSError) as error:
            file.write(f"{error or type(error).__name__}\n")
            sys.exit(_FOUND_WRONG)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _terminated() -> Iterator[None]:
    """Within, SIGTERM is KeyboardInterrupt: runs are given back. Once, for it may come twice."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_plan(plan: SweepPlan, console: Console) -> None:
    counts = Counter(slot.group.title for slot in plan.slots)
    width = max(map(len, (*counts, "total")))
    for title, count in counts.items():
        say(console, f"{title:<{width}}  {count:>5}  {plan.file.methods[title].recipe}")
    say(console, f"{'total':<{width}}  {len(plan.slots):>5}  runs, into {plan.folder}")
    if not any(run.config.test for run in plan.known_runs):
        say(console, "No test part is named (`test` in base), so a report will have no results of these runs.")


def _open_study(config: SweepConfig, plan: SweepPlan) -> optuna.Study:
    """The study of a sweep in the database asked for, or in a file in its folder.

    Raises:
        ConfigError: not a URL, or one whose driver is not installed.
        RunError: the database cannot be reached, or was made by another version of Optuna.
    """
    url = config.storage or f"sqlite:///{plan.folder.resolve() / DATABASE}"
    lite = url.startswith("sqlite")
    options: dict[str, Any] = {"pool_pre_ping": True}
    if lite:  # connections that begin no transactions themselves: `_immediate` does
        options = {"connect_args": {"timeout": 120, "isolation_level": None}}
    interval = max(1, config.grace // 4)
    try:
        storage = _insist(lambda: RDBStorage(url, options, heartbeat_interval=interval, grace_period=config.grace), 4)
    except RunError:
        raise
    except (sqlalchemy.exc.ArgumentError, ImportError, ValueError, LookupError, RuntimeError) as error:
        raise ConfigError(  # RuntimeError: of tables that another version of Optuna made
            f"storage {url.split('://')[0]!r} cannot be used: {error} Give a URL such as postgresql+psycopg://user@host/"
            "database, and install its driver: pip install 'psycopg[binary]' for PostgreSQL."
        ) from error
    if lite:
        sqlalchemy.event.listen(storage.engine, "begin", _immediate)
    return _insist(lambda: optuna.create_study(study_name=plan.name, storage=storage, load_if_exists=True))


def _immediate(connection: Any) -> None:
    # SQLite has no SELECT … FOR UPDATE. With the write lock from the beginning, no two workers claim the same trial,
    # and a transaction waits for its turn where it would fail with "database is locked".
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _insist(call: Callable[[], T], tries: int = 7) -> T:
    """Call, and again a little later where the database fails: it may be starting anew, or just be busy.

    Raises:
        RunError: it fails every time; seven tries take 16 to 32 seconds.
    """
    for attempt in range(tries):
        try:
            return call()
        except (sqlalchemy.exc.DBAPIError, StorageInternalError) as error:
            cause = str(error.__cause__ or error)
            damaged = "not a database" in cause or "malformed" in cause
            if damaged or attempt == tries - 1:
                way = "When it can, the same command continues."
                way = f"Move {DATABASE} away: it is made again from the runs." if damaged else way
                raise RunError(f"The storage cannot be reached: {cause}\n{way}") from error
            time.sleep(2**attempt * random.uniform(0.25, 0.5))
    raise AssertionError
