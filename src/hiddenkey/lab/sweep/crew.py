"""The workers of this machine: started, watched, and started anew when they die."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import RunError
from ..interrupts import heed
from .board import Board
from .plan import SweepPlan

_LOGS = "logs"
_POLL = 0.5
_TICK = 5.0
_PATIENCE = 30.0
_STOPPED = 130
_READY = "ready"
_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Job:
    """What a worker process needs to know."""

    plan: SweepPlan
    storage: str
    grace: int
    threads: int


@dataclass
class _Member:
    number: int
    name: str
    process: Any
    told: Connection
    ready: bool = False


class Crew:
    """Worker processes."""

    def __init__(self, job: Job, board: Board) -> None:
        self.job = job
        self.board = board
        self._members: list[_Member] = []

    def start(self, count: int) -> None:
        """Start so many; `stop` ends those that there are if this fails half way."""
        for number in range(1, count + 1):
            self._members.append(self._start(number))

    def watch(self, tick: Callable[[dict[int, str]], None]) -> None:
        """Until all runs are done; `tick` is called every so often with the names of the workers, by number.

        Raises:
            RunError: a worker says that the sweep cannot go on, or cannot start; all ended before their time.
        """
        ticked = -math.inf
        while True:
            alive = [member for member in self._members if self._is_at_work(member)]
            if not alive or time.monotonic() - ticked > _TICK:
                ticked = time.monotonic()
                tick({member.number: member.name for member in alive})
            if not alive:
                break
            time.sleep(_POLL)
            heed()
        if not self.board.finished():
            raise RunError(
                f"All workers ended before all runs were done; {self.log_of(1).parent} says why. The same command "
                "continues."
            )

    def stop(self) -> None:
        """Have every worker give its run back and end; those that do not are killed."""
        for member in self._members:
            member.process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for member in self._members:
            member.process.join(max(0.0, deadline - time.monotonic()))
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
        for member in self._members:  # afterwards: a storage that is gone leaves no process behind
            self.board.bury(member.name)

    def _is_at_work(self, member: _Member) -> bool:
        alive = member.process.is_alive()  # asked first: what it says before its end has come by then
        for text in _received(member.told):
            if text != _READY:
                raise RunError(text)
            member.ready = True
        if alive:
            return True
        if member.process.exitcode == 0:
            return False
        if not member.ready:
            raise RunError(f"A worker could not start; {self.log_of(member.number)} says why.")
        self.board.bury(member.name)
        self._members[self._members.index(member)] = self._start(member.number)
        return True

    def log_of(self, number: int) -> Path:
        """Where the worker with this number writes."""
        return self.job.plan.folder / _LOGS / f"worker-{number}.log"

    def _start(self, number: int) -> _Member:
        context = _context()
        ours, theirs = context.Pipe(duplex=False)
        log = self.log_of(number)
        log.parent.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=_run, args=(self.job, number, log, theirs))
        process.start()
        theirs.close()
        return _Member(number, worker_name(process.pid), process, ours)


def _context() -> Any:
    """Where it can be, workers are forked from a process that has imported what they need: quick, and less memory.

    A GPU cannot be used in a process that was forked after the libraries have asked for it.
    """
    import torch

    if sys.platform != "linux" or torch.accelerator.current_accelerator() is not None:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hiddenkey.lab.sweep.worker"])
    return context


def worker_name(pid: int) -> str:
    """The name of the worker in a process: machine and process."""
    return f"{_machine()}-{pid}"


def bury_dead(board: Board) -> None:
    """Take over what workers of this machine were at that are dead, without waiting for their silence."""
    for name in {entry.worker for entry in board.busy()}:
        machine, _, pid = name.rpartition("-")
        if machine == _machine() and not is_alive(int(pid)):
            board.bury(name)


def _machine() -> str:
    """Where a number of a process means one process: containers on the host's network have numbers of their own."""
    node = uuid.getnode()
    drawn = node >> 40 & 1  # without a network card: another number in every process
    numbers = ""
    with suppress(OSError):  # Linux alone
        numbers = "".join(letter for letter in str(_NAMESPACE.readlink()) if letter.isdigit())
    return f"{socket.gethostname()}-{0 if drawn else node:x}-{numbers}"


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    if os.name != "posix":
        return True  # nobody can be asked without doing harm
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def serve(job: Job, console: Console, ready: Callable[[], None] = lambda: None, *, replaced: bool = False) -> None:
    """Be one worker, in this process, until all runs are done; replaced: see `work`.

    Raises:
        UserError: the sweep cannot go on.
    """
    import torch  # slow, and not for the process that only watches

    from ..quiet import quieten
    from .storage import open_storage
    from .worker import work

    quieten()
    if job.threads:
        torch.set_num_threads(job.threads)
    board = Board(job.plan, open_storage(job.storage, job.grace), worker_name(os.getpid()))
    ready()
    with terminated():
        work(job.plan, board, job.grace / 4, console, replaced=replaced)


def _run(job: Job, number: int, log: Path, told: Connection) -> None:
    """A worker process: its output goes to its log, a message that stops the sweep to the process above."""
    import hiddenkey

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process above stops us
    _one_device(number)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            serve(job, Console(file=file, width=200), lambda: told.send(_READY), replaced=True)
        except KeyboardInterrupt:
            sys.exit(_STOPPED)
        except (hiddenkey.UserError, OSError) as error:
            told.send(last_word(error))


def last_word(error: Exception) -> str:
    """What a worker tells of the error that ends it: never nothing."""
    return str(error) or type(error).__name__


def _one_device(number: int) -> None:
    # Else the Trainer would spread each run over all of them.
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        devices = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    else:
        import torch

        devices = [str(index) for index in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[(number - 1) % len(devices)]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def terminated() -> Iterator[None]:
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


def _received(connection: Connection) -> Iterator[str]:
    try:
        while connection.poll():
            yield connection.recv()
    except (EOFError, OSError):
        return  # the process has ended, perhaps in the middle of a word
