"""`hiddenkey sweep`: all runs of a sweep file, by any number of processes and machines, safe against any kill.

A run is its folder, which `train` locks, continues, and skips when it is finished. Optuna's storage says only who is
at which run, so that no two processes make the same one, and gives the runs of dead workers to others.
"""

from __future__ import annotations

import gc
import json
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

from .artifacts import CHECKPOINTS, RESULT, make_folder, write_result
from .errors import BusyError, ConfigError, NonFiniteLossError, RunError, UnfitFolderError
from .interrupts import heed, postponed
from .lock import hold
from .say import say
from .sweep_file import SweepConfig, read_sweep
from .sweep_plan import Run, Slot, SweepPlan, check_plan, make_plan

T = TypeVar("T")

DATABASE = "sweep.db"
DEATHS, ERRORS = 20, 3
"""How often a run is given to another worker: after its worker died, and after an error."""
_LIVE = (TrialState.WAITING, TrialState.RUNNING)
_PAUSE, _PATIENCE, _HELD = 0.5, 30.0, 10.0
_FOUND_WRONG = 2
_STARTS = 5

optuna.logging.set_verbosity(optuna.logging.ERROR)
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
    queue = Queue(plan, config, _name(os.getpid()))
    if config.worker:
        from .settings import require_one_device

        require_one_device()
        if not queue.finished():
            check_plan(plan)  # what this machine lacks is no fault of a run
        with _terminated():
            work(queue, console)
        return plan
    with hold(plan.folder, console, "running a sweep"):
        if queue.finished():
            say(console, f"{plan.folder} holds all {len(plan.slots)} runs of {plan.file.name}: nothing to do.")
            return plan
        check_plan(plan)
        _print_plan(plan, console)
        _lead(queue, config, console)
    say(console, f"All {len(plan.slots)} runs of {plan.file.name} are done: {plan.folder}")
    return plan


class Queue:
    """Which runs are done, at work or free, by the trials of one study: one trial for each attempt at a slot."""

    def __init__(self, plan: SweepPlan, config: SweepConfig, worker: str, since: int | None = None) -> None:
        """`since`: number of the first trial whose failures count, by default of those to come."""
        self.plan, self.config, self.worker = plan, config, worker
        self.study = _open_study(config, plan)
        self.storage: Any = self.study._storage
        self.since = len(self._trials()) if since is None else since
        self.values: dict[str, tuple[dict[str, Any], float]] = {}
        """Setting and value of the slots that are done."""
        self._keys = {slot.key for slot in plan.slots}

    def take(self, without: set[str]) -> tuple[FrozenTrial, Slot, Run] | None:
        """A run that nobody is at, now ours, of no slot in `without`.

        Raises:
            RunError: a run was given up after too many attempts.
        """
        trials, slots = self.look()
        free = [slot for slot in slots if slot.key not in without and not _at_work(trials.get(slot.key, []))]
        # Where another worker was quicker, many are at the same slots: not one after another behind them.
        for slot in [*free[:1], *random.sample(free[1:], len(free[1:]))]:
            trial = self._claim(slot)
            if trial is not None:
                run = slot.run or self._choose(slot)
                said = {"worker": self.worker, "params": None if slot.run else run.sweep["params"]}
                for name, value in said.items():
                    self._note(trial, name, value)
                return trial, slot, run
        return None

    def look(self) -> tuple[dict[str, list[FrozenTrial]], list[Slot]]:
        """(all trials, the slots to do next), once the runs of silent workers are free. Raises as `take`."""
        _insist(lambda: fail_stale_trials(self.study))
        trials = self.by_slot()
        slots = self._open(trials)
        for slot in slots:
            self._require_hope(slot, trials.get(slot.key, []))
        return trials, slots

    def beat(self, trial: FrozenTrial) -> None:
        """Say that the worker of this trial is alive."""
        self.storage.record_heartbeat(trial._trial_id)

    def end(self, trial: FrozenTrial, state: TrialState, value: float | None = None, **notes: Any) -> None:
        """Complete, fail or give back a trial; nothing happens where it was given to another worker meanwhile."""
        for name, note in notes.items():
            self._note(trial, name, note)
        with suppress(UpdateFinishedTrialError):
            values = None if value is None else [value]
            _insist(lambda: self.storage.set_trial_state_values(trial._trial_id, state, values))

    def bury(self, workers: set[str]) -> None:
        """Free the runs of workers that are dead."""
        for trial in self._trials():
            if trial.state == TrialState.RUNNING and _worker(trial) in workers:
                self.end(trial, TrialState.FAIL)

    def silent(self) -> set[str]:
        """Workers that were taken a run from and have none since: stopped, or cut off from the storage."""
        trials = self._trials()
        lost = [trial for trial in trials if trial.state == TrialState.FAIL and "error" not in trial.user_attrs]
        return set(map(_worker, lost)) - {_worker(trial) for trial in trials if trial.state == TrialState.RUNNING}

    def has_worked(self, worker: str) -> bool:
        """Whether a worker of this name has taken a run."""
        return any(_worker(trial) == worker for trial in self._trials())

    def finished(self) -> bool:
        """Whether every slot is done."""
        return not self._open(self.by_slot())

    def by_slot(self) -> dict[str, list[FrozenTrial]]:
        """All trials of the plan's slots, by key, in the order of their numbers."""
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self._trials():
            key = str(trial.user_attrs.get("run"))
            if key in self._keys:
                found.setdefault(key, []).append(trial)
        return found

    def _open(self, trials: dict[str, list[FrozenTrial]]) -> list[Slot]:
        """Slots that are not done; of TPE only the first of each group, since it learns from those before."""
        slots: dict[str, Slot] = {}
        for slot in self.plan.slots:
            if not self._is_done(slot, trials.get(slot.key, [])):
                slots.setdefault(slot.key if slot.run else slot.group.name, slot)
        return list(slots.values())

    def _is_done(self, slot: Slot, trials: list[FrozenTrial]) -> bool:
        if slot.key in self.values:
            return True
        for trial in trials:
            if trial.state == TrialState.COMPLETE:
                setting, run = (
                    ({}, slot.run) if slot.run else slot.group.stored(slot.trial, trial.user_attrs.get("params"))
                )
                # Another machine may hold the folder, where they share a database alone.
                if self.config.storage or (Path(run.config.out) / RESULT).exists():
                    self.values[slot.key] = (setting, float(trial.value if trial.value is not None else math.inf))
                    return True
        return False

    def _require_hope(self, slot: Slot, trials: list[FrozenTrial]) -> None:
        failed = [trial for trial in trials if trial.state == TrialState.FAIL and trial.number >= self.since]
        errors = [trial.user_attrs for trial in failed if "error" in trial.user_attrs]
        if errors and (errors[-1].get("final") or len(errors) >= ERRORS):
            times = "" if errors[-1].get("final") else f" failed {ERRORS} times, the last time so"
            raise RunError(f"{slot.key}{times}: {errors[-1]['error']}")
        if len(failed) - len(errors) >= DEATHS:
            raise RunError(f"{slot.key}: {DEATHS} workers died while they were at it, perhaps for want of memory.")

    def _claim(self, slot: Slot) -> FrozenTrial | None:
        """The trial that counts of this slot, now running; None where another worker was quicker.

        Of several that wait or run the one with the lowest number counts, so that two workers may queue it at once.
        """
        if not any(trial.state in _LIVE for trial in self.by_slot().get(slot.key, [])):
            _insist(lambda: self.study.enqueue_trial({}, user_attrs={"run": slot.key}))
        trials = self.by_slot()[slot.key]
        first = next((trial for trial in trials if trial.state in _LIVE), None)
        if first is None or first.state == TrialState.RUNNING or self._is_done(slot, trials):
            return None
        _insist(lambda: self.beat(first))  # before it runs: without a heartbeat nobody would find its worker dead
        with suppress(UpdateFinishedTrialError):
            if _insist(lambda: self.storage.set_trial_state_values(first._trial_id, TrialState.RUNNING)):
                return first
        return None

    def _choose(self, slot: Slot) -> Run:
        before = [f"{slot.group.name} / {trial}" for trial in range(1, slot.trial)]
        return slot.group.run(slot.trial, slot.group.next_setting([self.values[key] for key in before]))

    def _note(self, trial: FrozenTrial, name: str, value: Any) -> None:
        with suppress(UpdateFinishedTrialError):
            _insist(lambda: self.storage.set_trial_user_attr(trial._trial_id, name, value))

    def _trials(self) -> list[FrozenTrial]:
        return _insist(lambda: self.study.get_trials(deepcopy=False))


def work(queue: Queue, console: Console, *, replaced: bool = False) -> None:
    """Make runs until all of the sweep are done, by whomever.

    replaced: another process takes this one's place when it ends, so it ends after an error that nobody foresaw: a
    GPU that failed fails on in the process that saw it.

    Raises:
        UserError: a run cannot be made, and why.
        SystemExit: after such an error, which is noted.
    """
    held: dict[str, tuple[float, float, str]] = {}  # slots whose folder another process holds: since, last seen, said
    while not queue.finished():
        heed()  # what came while a run failed
        now = time.monotonic()
        lately = {key: entry for key, entry in held.items() if now - entry[1] < _HELD}
        claim = queue.take(set(lately))
        if claim is None:
            for since, last, said in lately.values():
                if last - since > max(3 * queue.config.grace, _PATIENCE):
                    raise RunError(
                        f"{said} It sends no heartbeats: end that process, and the same command continues."
                    )
            time.sleep(_PAUSE)
            continue
        trial, slot, run = claim
        say(console, f"{time.strftime('%H:%M:%S')} {run.id}")
        try:
            with _heartbeats(queue, trial, console):
                value, said = _made(run, console)
        except BusyError as error:  # its last worker was silent, but its process is there
            say(console, str(error))
            since, last, _ = held.get(slot.key, (now, now, ""))
            held[slot.key] = (since if now - last < 3 * _HELD else now, now, str(error))
            queue.end(trial, TrialState.WAITING)
        except (KeyboardInterrupt, SystemExit):
            queue.end(trial, TrialState.WAITING)
            raise
        except Exception as error:  # noqa: BLE001 - noted, and raised by `take` where it stays
            say(console, "".join(traceback.format_exception(error)))
            foreseen = isinstance(error, (hiddenkey.UserError, OSError))
            final = isinstance(error, hiddenkey.UserError) and not isinstance(error, RunError)
            queue.end(
                trial,
                TrialState.FAIL,
                error=str(error) if foreseen else f"{type(error).__name__}: {error}",
                final=final,
            )
            if replaced and not foreseen:
                sys.exit(1)
        else:
            queue.end(trial, TrialState.COMPLETE, value, said=said)


def _made(run: Run, console: Console) -> tuple[float, str]:
    """(what a search minimises, what a person is told) of a run, once its result is in its folder."""
    from .run import train

    folder = Path(run.config.out)
    try:
        try:
            result = train(run.config, console, run.sweep)
        except UnfitFolderError as error:  # begun by another version, or its checkpoints are damaged
            if _claims_to_be_finished(folder):
                raise
            say(console, f"{error}\nThe run is made anew.")
            result = train(replace(run.config, overwrite=True), console, run.sweep)
    except NonFiniteLossError as error:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return math.inf, f"failed: {error}"
    finally:
        gc.collect()  # the Trainer and its model hold one another
    if result.sweep != run.sweep:  # made by `hiddenkey train`, or before the file changed
        write_result(replace(result, sweep=run.sweep))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    metric = f"validation_{result.metric}"
    best = result.best.get(metric)
    value = math.inf if best is None or not math.isfinite(best) else best if result.lower_is_better else -best
    return value, f"{metric} {'-' if best is None else f'{best:.4g}'} in {result.seconds:.1f} s"


def _claims_to_be_finished(folder: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        found: bool = json.loads((folder / RESULT).read_text(encoding="utf-8")).get("status") == "finished"
        return found
    return False


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
    total = len(queue.plan.slots)
    processes: dict[int, tuple[str, Any, Path]] = {}
    lost: Counter[int] = Counter()  # how often a worker has died in a row before its first run

    def start(number: int) -> None:
        log = queue.plan.folder / "logs" / f"worker-{number}.log"
        log.parent.mkdir(exist_ok=True)
        mark = secrets.token_hex(4)
        process = _context().Process(target=_child, args=(config, queue.plan, number, log, queue.since, mark))
        process.start()
        processes[number] = (_name(process.pid, mark), process, log)

    progress = Progress(console=console, disable=not console.is_terminal, transient=True)
    told = set() if queue.finished() else set(queue.values)
    bar = progress.add_task(queue.plan.file.name.replace("[", r"\["), total=total, completed=len(told))

    def tell() -> bool:
        """Say what has been done since; whether that is all."""
        trials = queue.by_slot()
        finished = queue.finished()
        for key in [key for key in queue.values if key not in told]:
            told.add(key)
            said = [trial.user_attrs.get("said") for trial in trials.get(key, [])]
            say(console, f"{len(told)}/{total} {key}: {next(filter(None, said), 'done')}")
        progress.update(bar, completed=len(told))
        return finished

    try:
        with _terminated(), progress, postponed():
            for number in range(1, config.workers + 1):
                start(number)
            while not tell():
                queue.look()
                silent = queue.silent()
                for number, (name, process, log) in list(processes.items()):
                    if name in silent:
                        say(console, f"Worker {number} hangs; it is ended, and another takes its run.")
                        process.kill()
                        process.join()
                    if not process.is_alive():
                        queue.bury({name})
                        lost[number] = 0 if queue.has_worked(name) else lost[number] + 1
                        if process.exitcode == _FOUND_WRONG or lost[number] >= _STARTS:
                            raise RunError(
                                f"A worker ended before all runs were done; {log} says why:\n{_end_of(log)}"
                            )
                        start(number)
                time.sleep(_PAUSE)
                heed()
    finally:
        _stop(queue, processes)


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]) if log.exists() else ""


def _stop(queue: Queue, processes: dict[int, tuple[str, Any, Path]]) -> None:
    """Have every worker give its run back and end; those that do not are killed."""
    for _, process, _ in processes.values():
        process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for _, process, _ in processes.values():
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    queue.bury({name for name, _, _ in processes.values()})  # last: a storage that is gone leaves no process behind


def _context() -> Any:
    """Where it can be, workers are forked from a process that has imported what they need: quick, and less memory.

    A GPU cannot be used in a process that was forked after the libraries have asked for it.
    """
    import torch

    if sys.platform != "linux" or torch.accelerator.current_accelerator() is not None:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hiddenkey.lab.run", "hiddenkey.lab.sweep"])
    return context


def _name(pid: int, mark: str = "") -> str:
    """Of a worker; with a mark, since a container numbers its processes anew after each start."""
    return f"{socket.gethostname()} {pid} {mark}"


def _child(config: SweepConfig, plan: SweepPlan, number: int, log: Path, since: int, mark: str) -> None:
    """A worker process; its output goes to its log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process above stops us
    import torch

    from .quiet import quieten

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
                work(
                    Queue(plan, config, _name(os.getpid(), mark), since), Console(file=file, width=200), replaced=True
                )
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


def _worker(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("worker"))


def _at_work(trials: list[FrozenTrial]) -> bool:
    first = next((trial for trial in trials if trial.state in _LIVE), None)
    return first is not None and first.state == TrialState.RUNNING


def _print_plan(plan: SweepPlan, console: Console) -> None:
    counts = Counter(slot.group.method.name for slot in plan.slots)
    width = max(map(len, (*counts, "total")))
    for method in plan.file.methods:
        say(console, f"{method.name:<{width}}  {counts[method.name]:>5}  {method.recipe}")
    say(console, f"{'total':<{width}}  {len(plan.slots):>5}  runs, into {plan.folder}")
    if "test" not in {*plan.file.base, *(name for axis in plan.file.axes for name in axis[0])}:
        say(console, "No test part is named (`test` in base), so a report will have no results of these runs.")


def _open_study(config: SweepConfig, plan: SweepPlan) -> optuna.Study:
    """The study of a sweep in the database asked for, or in a file in its folder.

    Raises:
        ConfigError: not a URL, or one whose driver is not installed.
        RunError: the database cannot be reached, or was made by another version of Optuna.
    """
    path = str(plan.folder.resolve() / DATABASE)
    if not config.storage and set("{}?%") & set(path):
        raise ConfigError(
            f"{path}: one of {{ }} ? % means something else in a URL; give another --out, or --storage."
        )
    url = config.storage or f"sqlite:///{path}"
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):  # connections that begin no transactions themselves: `_immediate` does
        options = {"connect_args": {"timeout": 120, "isolation_level": None}}
    interval = max(1, config.grace // 4)
    try:
        storage = _insist(lambda: RDBStorage(url, options, heartbeat_interval=interval, grace_period=config.grace), 4)
    except RunError:
        raise
    except RuntimeError as error:  # Optuna's, of tables that another version of it made
        raise RunError(f"storage {url.split('://')[0]!r} cannot be used: {error}") from error
    except (sqlalchemy.exc.ArgumentError, ImportError, ValueError, LookupError) as error:
        raise ConfigError(
            f"storage {url.split('://')[0]!r} cannot be used: {error} Give a URL such as postgresql+psycopg://user@host/"
            "database, and install its driver: pip install 'psycopg[binary]' for PostgreSQL."
        ) from error
    if url.startswith("sqlite"):
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
            damaged = any(word in cause for word in ("not a database", "malformed"))
            if damaged or attempt == tries - 1:
                way = (
                    f"Move {DATABASE} away: it is made again from the runs."
                    if damaged
                    else "When it can, the same command continues."
                )
                raise RunError(f"The storage cannot be reached: {cause}\n{way}") from error
            time.sleep(2**attempt * random.uniform(0.25, 0.5))
    raise AssertionError
