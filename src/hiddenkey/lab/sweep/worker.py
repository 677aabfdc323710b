"""A worker: takes one run after another, and keeps what came of each."""

from __future__ import annotations

import gc
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

import hiddenkey

from ..artifacts import RunResult, finite, read_result
from ..config import plain
from ..errors import BusyError, NonFiniteLossError, RunError, UnfitFolderError
from ..interrupts import heed
from ..run import train
from ..say import say
from ..tasks import lower_is_better
from .board import Board, Claim
from .plan import Run, SweepPlan
from .record import RunRecord, keep_texts, write_record

_PAUSE = 1.0
_HELD = 30.0
_UNFORESEEN = 1
_OF_RESULT = (
    *("config", "recipe", "failure", "task", "metric", "best", "last", "test", "epochs", "data_rows"),
    *("trainable_parameters", "drop_rates", "step_seconds", "seconds", "versions", "commit", "data_digest"),
)


def work(plan: SweepPlan, board: Board, interval: float, console: Console, *, replaced: bool = False) -> None:
    """Make runs until all of the sweep are done, by whomever; the heartbeat goes every `interval` seconds.

    replaced: another process takes this one's place when it ends, so it ends after an error that nobody foresaw: a
    GPU that failed fails on in the process that saw it.

    Raises:
        UserError: a run cannot be made, and why.
        SystemExit: after such an error, which is noted.
    """
    held: dict[str, float] = {}  # slots whose folder another process holds, and until when others go first
    while True:
        heed()  # what came while a run failed
        claim = board.take({slot for slot, until in held.items() if time.monotonic() < until})
        if claim is not None:
            say(console, f"{datetime.now(UTC):%H:%M:%S} {claim.run.id}")
            if not _work_on(plan, board, claim, interval, console, replaced):
                held[claim.slot] = time.monotonic() + _HELD
        elif board.finished():
            return
        else:
            time.sleep(_PAUSE)  # the others are at the last runs, which may yet be ours


def _work_on(plan: SweepPlan, board: Board, claim: Claim, interval: float, console: Console, replaced: bool) -> bool:
    """Whether the folder was free."""
    with _heartbeat(board, claim, interval, console):
        try:
            record = _made(claim.run, console)
            keep_texts(plan.folder, claim.run.id)  # before the run counts as done: nobody would make them again
        except (KeyboardInterrupt, SystemExit):
            board.release(claim)
            raise
        except BusyError as error:  # its last worker was silent, but lives
            say(console, str(error))
            board.release(claim)
            return False
        except (RunError, OSError) as error:
            _note(board, claim, error, console)
            return True
        except hiddenkey.UserError as error:
            board.fail(claim, str(error), final=True)
            raise
        except Exception as error:  # noqa: BLE001 - kept, tried again, and told when it stays
            _note(board, claim, error, console)
            if replaced:
                sys.exit(_UNFORESEEN)
            return True
    if board.finish(claim, record):
        write_record(record, plan.folder)
        shutil.rmtree(claim.run.config.out, ignore_errors=True)
    return True


def _made(run: Run, console: Console) -> RunRecord:
    try:
        return make_run(run, console)
    except UnfitFolderError as error:  # of another version, or of data that have changed: the folder is the sweep's
        say(console, f"{error}\nIt is deleted, and the run made anew.")
        shutil.rmtree(run.config.out)
        return make_run(run, console)


def make_run(run: Run, console: Console) -> RunRecord:
    """Train, and make a record of it; a loss that is not finite is a result too.

    Raises:
        as `hiddenkey.lab.run.train`, but for NonFiniteLossError.
    """
    started = datetime.now(UTC)
    try:
        result = train(run.config, console)
    except NonFiniteLossError as error:
        found = read_result(Path(run.config.out))
        if found is None:
            raise
        result = replace(found, status="failed", failure=str(error))
    finally:
        gc.collect()  # the Trainer and its model hold one another
    return _record(run, result, started)


def _record(run: Run, result: RunResult, started: datetime) -> RunRecord:
    found = finite(asdict(result))
    return RunRecord(
        id=run.id,
        sweep=run.sweep,
        method=run.method,
        params={name: plain(value) for name, value in run.params.items()},
        axes={name: plain(value) for name, value in run.axes.items()},
        trial=run.trial,
        trials=run.trials,
        status="finished" if result.status == "finished" else "failed",
        lower_is_better=lower_is_better(result.task, result.metric),
        started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        **{name: found[name] for name in _OF_RESULT},
    )


def _note(board: Board, claim: Claim, error: Exception, console: Console) -> None:
    say(console, "".join(traceback.format_exception(error)))
    text = str(error) if isinstance(error, (hiddenkey.UserError, OSError)) else f"{type(error).__name__}: {error}"
    board.fail(claim, text)


@contextmanager
def _heartbeat(board: Board, claim: Claim, interval: float, console: Console) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(interval):
            try:
                board.beat(claim)
            except Exception as error:  # noqa: BLE001 - the run goes on without its storage, which may come back
                say(console, f"No heartbeat: {error}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
