"""Whole sweeps of tiny models: every run is made once, whatever is killed, and the same command continues."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from hiddenkey.errors import UserError
from hiddenkey.lab.artifacts import GENERATIONS
from hiddenkey.lab.errors import BusyError, ConfigError, DataError, RunError
from hiddenkey.lab.interrupts import postponed
from hiddenkey.lab.lock import hold
from hiddenkey.lab.run import train
from hiddenkey.lab.sweep import crew, worker
from hiddenkey.lab.sweep.board import Board, Claim
from hiddenkey.lab.sweep.config import SweepConfig
from hiddenkey.lab.sweep.crew import Job, is_alive, serve
from hiddenkey.lab.sweep.file import read_sweep
from hiddenkey.lab.sweep.plan import Run, make_plan
from hiddenkey.lab.sweep.record import RunRecord, read_record
from hiddenkey.lab.sweep.run import sweep
from hiddenkey.lab.sweep.storage import open_storage
from hiddenkey.lab.sweep.worker import make_run

from ..signals import heed_interrupts
from .tools import GRACE, record_of, sweep_values, write_sweep

PROGRAM = [sys.executable, "-c", "from hiddenkey.cli import main; main()"]
BASE = {"epochs": 1, "batch_size": 16, "max_length": 16, "train_eval_size": 0}


@pytest.fixture
def base(bert: Path, sentences: Path) -> dict[str, Any]:
    return BASE | {"model": str(bert), "data": str(sentences)}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that take no time, where what comes of them does not matter."""
    monkeypatch.setattr(worker, "make_run", lambda run, console: record_of(run, accuracy=len(run.id) / 100))


def here(path: Path, url: str = "") -> tuple[Job, Board]:
    """A sweep queued, and a board to watch it."""
    plan = make_plan(read_sweep(path))
    url = url or f"sqlite:///{plan.folder / 'sweep.db'}"
    plan.folder.mkdir(exist_ok=True)
    board = Board(plan, open_storage(url, GRACE), "watch")
    board.open({})
    board.note_grace(GRACE)
    return Job(plan, url, GRACE, 1), board


def work_here(path: Path) -> Board:
    """Make a sweep in this process."""
    job, board = here(path)
    serve(job, Console(quiet=True))
    return board


def records_in(folder: Path) -> dict[str, RunRecord]:
    return {path.stem: read_record(path) for path in (folder / "runs").glob("*.json")}


def said_by(config: SweepConfig, path: Path) -> str:
    with path.open("w") as file:
        sweep(config, Console(file=file, width=200))
    return path.read_text()


def results(record: RunRecord) -> tuple[Any, ...]:
    """What does not depend on clocks and places."""
    epochs = [{name: value for name, value in row.items() if "seconds" not in name} for row in record.epochs]
    return record.id, record.params, record.axes, record.trial, record.recipe, record.best, record.last, epochs


def kill_after(board: Board, runs: int) -> threading.Thread:
    """Kill a worker once so many runs are done and it is at the next."""

    def kill() -> None:
        while True:
            busy = board.busy()
            if len(board.records()) >= runs and busy:
                os.kill(int(busy[0].worker.rpartition("-")[2]), signal.SIGKILL)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_two_workers_of_which_one_is_killed(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base)
    _, board = here(path)
    killer = kill_after(board, 2)
    said = said_by(SweepConfig(str(path), workers=2, threads=1), tmp_path / "said")
    killer.join(1)
    assert not killer.is_alive()
    out = tmp_path / "out"
    records = records_in(out)
    assert records.keys() == {record.id for record in board.records()}
    assert len(records) == 8
    assert "8/8" in said
    assert "All 8 runs" in said
    assert not (out / "work").exists()
    assert (out / "logs" / "worker-2.log").read_text()
    one = next(iter(records.values()))
    alone = train(next(s.run.config for g in board.plan.groups for s in g.slots if s.run and s.run.id == one.id))
    assert (one.best, one.last, one.data_rows) == (alone.best, alone.last, alone.data_rows)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("runs/*.json")}
    assert "nothing to do" in said_by(SweepConfig(str(path)), tmp_path / "said")
    assert {file: file.stat().st_mtime_ns for file in out.rglob("runs/*.json")} == before


@pytest.mark.usefixtures("no_training")
def test_a_sweep_that_has_lost_its_database_or_its_records(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base, axes=None)
    work_here(path)
    out = tmp_path / "out"
    records = records_in(out)
    (out / "sweep.db").unlink()
    assert "nothing to do" in said_by(SweepConfig(str(path)), tmp_path / "said")
    for file in (out / "runs").iterdir():
        file.unlink()
    assert "nothing to do" in said_by(SweepConfig(str(path)), tmp_path / "said")
    assert records_in(out) == records


@pytest.mark.usefixtures("no_training")
def test_a_changed_base_makes_other_runs_and_puts_the_old_ones_aside(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base, axes=None)
    first = {record.id for record in work_here(path).records()}
    write_sweep(tmp_path, base=base | {"lora_r": 2}, axes=None)
    second = {record.id for record in work_here(path).records()}
    assert not first & second
    out = tmp_path / "out"
    assert "4 records are of runs that the file no longer asks for" in said_by(
        SweepConfig(str(path)), tmp_path / "said"
    )
    assert records_in(out).keys() == second
    assert {file.stem for file in (out / "other").iterdir()} == first
    (out / "sweep.db").unlink()
    write_sweep(tmp_path, base=base, axes=None)
    assert "nothing to do" in said_by(SweepConfig(str(path)), tmp_path / "said")
    assert records_in(out).keys() == first


@pytest.mark.usefixtures("no_training")
def test_a_slip_in_the_command_puts_no_record_aside(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base, axes=None)
    first = {record.id for record in work_here(path).records()}
    with pytest.raises(OSError, match="typo"):
        sweep(SweepConfig(str(path), set=("model=./typo",)), Console(quiet=True))
    assert records_in(tmp_path / "out").keys() == first


@pytest.mark.usefixtures("no_training")
def test_two_sweeps_in_one_folder_and_a_sweep_with_another_name(base: dict[str, Any], tmp_path: Path):
    first = {record.id for record in work_here(write_sweep(tmp_path, base=base, axes=None)).records()}
    path = write_sweep(tmp_path, base=base | {"lora_r": 2}, axes=None, name="second")
    second = {record.id for record in work_here(path).records()}
    assert "nothing to do" in said_by(SweepConfig(str(path)), tmp_path / "said")
    assert records_in(tmp_path / "out").keys() == first | second
    path = write_sweep(tmp_path, base=base | {"lora_r": 2}, axes=None, name="third")
    assert "nothing to do" in said_by(SweepConfig(str(path)), tmp_path / "said")
    assert {record.sweep for record in records_in(tmp_path / "out").values()} == {"tiny", "third"}


RANGES = {
    "baseline": {"recipe": "baseline", "grid": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}},
    "dropkey": {"recipe": "dropkey:column@{p}", "grid": {"p": {"low": 0.01, "high": 0.3}}},
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("search", ["random", "tpe"])
def test_searches(base: dict[str, Any], tmp_path: Path, search: str):
    path = write_sweep(tmp_path, base=base, axes=None, methods=RANGES, search=search, trials=7)
    work_here(path)
    records = records_in(tmp_path / "out")
    assert sorted((record.method, record.trial) for record in records.values()) == [
        (method, trial) for method in ("baseline", "dropkey") for trial in range(1, 8)
    ]
    assert all(
        record.config["learning_rate"] == record.params["learning_rate"]
        for record in records.values()
        if record.method == "baseline"
    )


@pytest.mark.usefixtures("no_training")
def test_two_folders_on_one_storage(base: dict[str, Any], tmp_path: Path):
    path, url = write_sweep(tmp_path, base=base, axes=None), f"sqlite:///{tmp_path / 'shared.db'}"
    job, board = here(path, url)
    serve(job, Console(quiet=True))
    there = SweepConfig(str(path), worker=True, storage=url, out=str(tmp_path / "there"), grace=GRACE)
    sweep(there, Console(quiet=True))
    assert records_in(tmp_path / "there") == records_in(tmp_path / "out")
    assert len(board.records()) == 4


def write_generations(run: Run) -> None:
    """What a run leaves in its work folder that has generated texts."""
    folder = Path(run.config.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GENERATIONS).write_text(run.id)


def texts_in(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in (folder / "texts").glob("*.jsonl")}


def test_texts_are_kept_before_a_run_counts_as_done(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def written(run: Run, console: Console) -> RunRecord:
        write_generations(run)
        return record_of(run)

    def killed(board: Board, claim: Claim, record: RunRecord) -> bool:
        finish(board, claim, record)
        raise KeyboardInterrupt

    finish = Board.finish
    monkeypatch.setattr(worker, "make_run", written)
    monkeypatch.setattr(Board, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        work_here(write_sweep(tmp_path, base=base, axes=None))
    (name, text), *_ = texts_in(tmp_path / "out").items()
    assert text == name


@pytest.mark.usefixtures("no_training")
def test_texts_of_done_runs_are_taken_out_of_work_folders_before_these_go(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base, axes=None)
    board = work_here(path)
    runs = [slot.run for group in board.plan.groups for slot in group.slots if slot.run]
    for run in runs:
        write_generations(run)
    assert "nothing to do" in said_by(SweepConfig(str(path)), tmp_path / "said")
    assert texts_in(tmp_path / "out") == {run.id: run.id for run in runs}
    assert not (tmp_path / "out" / "work").exists()


def test_a_loss_that_is_not_finite_is_a_record(base: dict[str, Any], tmp_path: Path):
    methods = {"baseline": {"recipe": "baseline", "grid": {"learning_rate": [1e-4, 1e38]}}}
    work_here(write_sweep(tmp_path, base=base | {"log_steps": 1, "max_grad_norm": 1e30}, axes=None, methods=methods))
    good, bad = sorted(records_in(tmp_path / "out").values(), key=lambda record: record.trial)
    assert (good.status, bad.status) == ("finished", "failed")
    assert (good.trials, bad.trials) == (2, 2)
    assert "learning rate 1e+38" in bad.failure
    assert bad.value > good.value


def test_an_error_is_tried_again_and_then_stops_the_sweep(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tries: list[str] = []

    def full(run: Run, console: Console) -> RunRecord:
        tries.append(run.id)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")
        return record_of(run)

    monkeypatch.setattr(worker, "make_run", full)
    path = write_sweep(tmp_path, base=base, axes=None)
    work_here(path)
    assert len(tries) == 6
    assert len(records_in(tmp_path / "out")) == 4
    for error, said in (
        (OSError(28, "No space left"), r"failed 3 times(?s:.*)No space left"),
        (DataError("odd"), "odd"),
    ):
        monkeypatch.setattr(worker, "make_run", Mock(side_effect=error))
        write_sweep(tmp_path, base=base | {"lora_r": 2}, axes=None)
        with pytest.raises(UserError, match=said):
            work_here(path)


def test_an_error_that_nobody_foresaw_ends_the_process_of_a_crew(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A GPU that failed fails on in that process; a worker by itself has no other."""
    monkeypatch.setattr(worker, "make_run", Mock(side_effect=RuntimeError("an illegal memory access")))
    job, board = here(write_sweep(tmp_path, base=base, axes=None))
    for tries in (1, 2, 3):
        with pytest.raises(SystemExit, match="1"):
            serve(job, Console(quiet=True), replaced=True)
        assert worker.make_run.call_count == tries
    with pytest.raises(RunError, match=r"failed 3 times(?s:.*)an illegal memory access"):
        serve(job, Console(quiet=True), replaced=True)
    assert not board.busy()


def test_workers_that_end_before_their_time_are_told(base: dict[str, Any], tmp_path: Path):
    job, board = here(write_sweep(tmp_path, base=base))
    idle = crew.Crew.__new__(crew.Crew)
    idle.job, idle.board, idle._members = job, board, []
    with pytest.raises(RunError, match=r"ended before all runs were done(?s:.*)logs says why"):
        idle.watch(lambda _: None)


@pytest.mark.parametrize(("said", "told"), [("it broke", "it broke"), (OSError(), "OSError")])
def test_a_workers_last_word_is_heard_after_its_end(said: Any, told: str, tmp_path: Path):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.send(crew._READY)
    theirs.send(crew.last_word(said) if isinstance(said, OSError) else said)
    theirs.close()
    ended = SimpleNamespace(is_alive=lambda: False, exitcode=0)
    one = crew.Crew.__new__(crew.Crew)
    with pytest.raises(RunError, match=told):
        one._is_at_work(crew._Member(1, "one", ended, ours))


def test_a_signal_that_came_while_a_run_failed_is_heeded_before_the_next(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tries: list[str] = []

    def fail(run: Run, console: Console) -> RunRecord:
        tries.append(run.id)
        with postponed():
            signal.raise_signal(signal.SIGTERM)
            raise RunError("the disk is full")

    monkeypatch.setattr(worker, "make_run", fail)
    with pytest.raises(KeyboardInterrupt):
        work_here(write_sweep(tmp_path, base=base))
    assert len(tries) == 1


def test_a_run_at_work_gives_signs_of_life(tmp_path: Path):
    beats: list[int] = []

    def beat(claim: Claim) -> None:
        beats.append(claim.trial)
        if len(beats) == 1:
            raise OSError("the storage is away")

    board: Any = SimpleNamespace(beat=beat)
    claim: Any = SimpleNamespace(trial=7)
    with worker._heartbeat(board, claim, 0.02, Console(quiet=True)):
        deadline = time.monotonic() + 30
        while len(beats) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert beats[:3] == [7, 7, 7]
    count = len(beats)
    time.sleep(0.1)
    assert len(beats) == count


def test_the_work_folder_of_a_finished_run_goes_at_once(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[list[str]] = []

    def leave(run: Run, console: Console) -> RunRecord:
        folder = Path(run.config.out)
        seen.append(sorted(path.name for path in folder.parent.glob("*")))
        (folder / "checkpoints").mkdir(parents=True)
        return record_of(run)

    monkeypatch.setattr(worker, "make_run", leave)
    work_here(write_sweep(tmp_path, base=base))
    assert seen == [[]] * 8
    assert list((tmp_path / "out" / "work").iterdir()) == []


@pytest.mark.parametrize(("visible", "given"), [("3,5", ["3", "5", "3"]), ("4", ["4", "4", "4"]), ("", ["", "", ""])])
def test_workers_take_the_devices_in_turn(visible: str, given: list[str], monkeypatch: pytest.MonkeyPatch):
    found = []
    for number in (1, 2, 3):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        crew._one_device(number)
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert found == given


def test_a_worker_has_one_name_in_every_process(monkeypatch: pytest.MonkeyPatch):
    names = set()
    for drawn in (
        0x0123_4567_89AB | 1 << 40,
        0x00FF_4567_89AB | 1 << 40,
    ):  # as uuid draws them without a network card
        monkeypatch.setattr(crew.uuid, "getnode", lambda drawn=drawn: drawn)
        names.add(crew.worker_name(12))
    assert len(names) == 1
    monkeypatch.setattr(crew.uuid, "getnode", lambda: 0x0023_4567_89AB)
    assert crew.worker_name(12) not in names


def test_containers_of_one_machine_count_their_processes_apart(monkeypatch: pytest.MonkeyPatch):
    here = crew.worker_name(12)
    monkeypatch.setattr(crew, "_NAMESPACE", Mock(readlink=lambda: Path("pid:[1234]")))
    assert crew.worker_name(12) != here
    assert crew.worker_name(12).endswith("-1234-12")


@pytest.mark.parametrize(("metric", "lower"), [("loss", True), ("accuracy", False)])
def test_records_say_which_way_is_better(base: dict[str, Any], tmp_path: Path, metric: str, lower: bool):
    methods = {"baseline": {"recipe": "baseline"}}
    work_here(write_sweep(tmp_path, base=base | {"metric": metric, "max_steps": 1}, methods=methods, axes=None))
    [record] = records_in(tmp_path / "out").values()
    assert record.lower_is_better is lower
    assert record.value == record.best[f"validation_{metric}"] * (1 if lower else -1)


def test_mistakes_are_told_before_anything_runs(base: dict[str, Any], tmp_path: Path):
    for change, error, said in (
        ({"data": "gone.csv"}, OSError, "gone.csv"),
        ({"label_column": "lable"}, DataError, "lable"),
        ({"metric": "bleu"}, ConfigError, "bleu"),
        ({"target_modules": ["nothing"]}, ConfigError, "nothing"),
        ({"max_length": 100}, ConfigError, "100"),
    ):
        path = write_sweep(tmp_path, base=base | change)
        for config in (SweepConfig(str(path), dry_run=True), SweepConfig(str(path))):
            with pytest.raises(error, match=said):
                sweep(config, Console(quiet=True))
        assert not (tmp_path / "out" / "work").exists()
    with pytest.raises(RunError, match="without --worker first"):
        sweep(SweepConfig(str(path), worker=True, out=str(tmp_path / "new")), Console(quiet=True))
    for flags in ({"workers": 0}, {"threads": -1}, {"grace": 1}, {"worker": True, "workers": 2}):
        with pytest.raises(ConfigError):
            sweep(SweepConfig(str(path), **flags), Console(quiet=True))


def test_one_sweep_at_a_time_in_a_folder(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base)
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out", Console(quiet=True)), pytest.raises(BusyError, match="running a sweep"):
        sweep(SweepConfig(str(path)), Console(quiet=True))


def test_a_dry_run_prints_the_plan_and_leaves_nothing(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base | {"model": "set from outside"})
    said = said_by(SweepConfig(str(path), dry_run=True, set=(f"model={base['model']}",)), tmp_path / "said")
    assert "dropkey column      4  dropkey:column@{p}" in said
    assert "8  runs in 4 groups" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_workers_that_are_not_forked(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crew, "_context", lambda: multiprocessing.get_context("spawn"))
    path = write_sweep(tmp_path, base=base)
    assert "All 8 runs" in said_by(SweepConfig(str(path), workers=2, threads=1), tmp_path / "said")


@pytest.mark.full
def test_a_hundred_runs_by_four_processes_killed_at_random(bert: Path, sentences: Path, tmp_path: Path):
    values = sweep_values(tmp_path, base=BASE | {"model": str(bert), "data": str(sentences)})
    path = write_sweep(tmp_path, base=values["base"], axes={"seed": list(range(25))})
    job, board = here(path)
    assert job.plan.total == 100
    command = [*PROGRAM, "sweep", str(path), "--workers", "4", "--threads", "1", "--grace", "8"]
    generator, kills = random.Random(0), 0
    with (tmp_path / "said").open("w") as said:
        while True:
            process = subprocess.Popen(command, stderr=said, preexec_fn=heed_interrupts)
            while process.poll() is None:
                time.sleep(generator.uniform(0.5, 4))
                busy = [pid for entry in board.busy() if is_alive(pid := int(entry.worker.rpartition("-")[2]))]
                if not busy or kills >= 24:
                    continue
                kills += 1
                if kills % 8 == 0:
                    process.send_signal(signal.SIGINT if kills % 16 else signal.SIGKILL)
                else:
                    os.kill(generator.choice(busy), signal.SIGKILL)
            if process.returncode == 0:
                break
            assert process.returncode in (130, -signal.SIGKILL), (tmp_path / "said").read_text()
    assert kills >= 20
    assert "Traceback" not in (tmp_path / "said").read_text()
    records = records_in(tmp_path / "out")
    assert records.keys() == {slot.run.id for group in job.plan.groups for slot in group.slots if slot.run}
    assert not (tmp_path / "out" / "work").exists()
    runs = [slot.run for group in job.plan.groups for slot in group.slots if slot.run]
    for run in runs[::10]:
        alone = make_run(replace(run, config=replace(run.config, out=str(tmp_path / run.id))), Console(quiet=True))
        assert results(alone) == results(records[run.id])


def test_the_command(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base | {"epochs": 0})
    done = subprocess.run([*PROGRAM, "sweep", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "epochs = 0" in done.stderr
    assert "Traceback" not in done.stderr
