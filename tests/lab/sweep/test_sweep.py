"""Whole sweeps of tiny models: every run is made once, whatever is killed, and the same command continues."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from rich.console import Console

from hiddenkey.errors import BusyError, ConfigError, DataError, RunError, UserError
from hiddenkey.lab import metrics
from hiddenkey.lab import train as run_module
from hiddenkey.lab.callbacks import postponed
from hiddenkey.lab.config import SweepConfig, TrainConfig
from hiddenkey.lab.run_folder import RunResult, hold, read_result
from hiddenkey.lab.sweep import Queue, sweep, work
from hiddenkey.lab.sweep_file import make_plan, read_sweep

from .. import tiny
from ..signals import heed_interrupts
from .tools import GRACE, plan_of, queue_of, results_in, runs_of, write_finished, write_sweep

PROGRAM = [sys.executable, "-c", "from hiddenkey.cli import main; main()"]
BASE = {"epochs": 1, "batch_size": 16, "max_length": 16, "train_eval_size": 0, "save_steps": 1}
ONE = {"baseline": {"recipe": "baseline", "grid": {"learning_rate": [1e-4]}}}
QUIET = Console(quiet=True)


@pytest.fixture
def base(bert: Path, sentences: Path) -> dict[str, Any]:
    return BASE | {"model": str(bert), "data": str(sentences)}


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Replace the training by what a test wants, called with the run's configuration; gives the folders tried."""

    def use(instead: Callable[[Any, int], None]) -> list[str]:
        tried: list[str] = []

        def made(config: Any, console: Console, sweep: dict[str, Any]) -> RunResult:
            tried.append(Path(config.out).name)
            instead(config, len(tried))
            found = read_result(Path(config.out))
            if found is not None:
                return found
            run = next(run for run in runs_of(plan_of_out(config.out)) if run.config.out == config.out)
            return write_finished(run)

        monkeypatch.setattr(run_module, "train", made)
        return tried

    return use


def plan_of_out(out: str) -> Any:
    """The plan of the sweep file beside the folder of all runs."""
    return make_plan(read_sweep(Path(out).parents[1] / "sweep.yaml"))


def said_by(config: SweepConfig) -> str:
    heard = io.StringIO()
    sweep(config, Console(file=heard, width=200))
    return heard.getvalue()


def work_here(path: Path) -> Queue:
    """Make a sweep in this process."""
    queue = queue_of(make_plan(read_sweep(path)))
    work(queue, QUIET)
    return queue


def pids(queue: Queue) -> list[int]:
    """Processes of the workers that are at a run."""
    workers = [trial.user_attrs.get("worker") for trial in queue.trials(TrialState.RUNNING)]
    return [int(name.split()[1]) for name in workers if name]


@contextmanager
def command(path: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """`hiddenkey sweep`, killed at the end if it is there still."""
    whole = [*PROGRAM, "sweep", str(path), "--grace", str(GRACE), *flags]
    with (path.parent / "said").open("a") as said:
        process = subprocess.Popen(whole, stderr=said, text=True, preexec_fn=heed_interrupts)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def until(what: Callable[[], Any], seconds: float = 240) -> Any:
    """What it gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return found


def kill_at_random(path: Path, kills: int) -> None:
    """Make a sweep by four processes of the command; workers and the command are killed, stopped and interrupted."""
    plan = make_plan(read_sweep(path))
    queue, generator, done = queue_of(plan, "watch"), random.Random(0), 0
    while queue.open():
        with command(path, "--workers", "4") as process:
            while process.poll() is None:
                time.sleep(generator.uniform(0.5, 3))
                busy = pids(queue)
                if not busy or done >= kills:
                    continue
                done += 1
                if done % 6 == 0:
                    process.send_signal(signal.SIGINT if done % 12 else signal.SIGKILL)
                else:
                    kind = signal.SIGSTOP if done % 5 == 0 else signal.SIGKILL
                    send(generator.choice(busy), kind)
            assert process.returncode in (0, 130, -signal.SIGKILL), (path.parent / "said").read_text()
    assert done >= kills
    assert "Traceback" not in (path.parent / "said").read_text()
    results = results_in(plan.folder)
    assert results.keys() == {run.id for run in runs_of(plan)}
    assert {result.status for result in results.values()} == {"finished"}
    for run in runs_of(plan)[::10]:
        alone = run_module.train(replace(run.config, out=str(path.parent / run.id)), QUIET)
        found = results[run.id]
        assert (alone.best, alone.last, alone.data_rows) == (found.best, found.last, found.data_rows)
        assert found.sweep == run.sweep


def send(pid: int, kind: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, kind)


def test_twelve_runs_by_four_processes_killed_at_random(base: dict[str, Any], tmp_path: Path):
    kill_at_random(write_sweep(tmp_path, base=base, axes={"seed": [1, 2, 3]}), kills=6)


@pytest.mark.full
def test_a_hundred_runs_by_four_processes_killed_at_random(base: dict[str, Any], tmp_path: Path):
    kill_at_random(write_sweep(tmp_path, base=base, axes={"seed": list(range(25))}), kills=30)


def test_ctrl_c_gives_the_runs_back_and_says_how_to_go_on(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base | {"epochs": 2000}, methods=ONE)
    queue = queue_of(make_plan(read_sweep(path)), "watch")
    with command(path, "--workers", "2") as process:
        until(lambda: len(pids(queue)) == 2 and len(results_in(tmp_path / "out")) == 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    states = [trial.state for trial in queue.trials(*TrialState)]
    assert states == [TrialState.WAITING] * 2
    assert "The same command continues" in (tmp_path / "said").read_text()


def test_a_stopped_worker_is_ended_and_its_run_made_by_another(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base, methods=ONE)
    queue = queue_of(make_plan(read_sweep(path)), "watch")
    with command(path, "--workers", "1") as process:
        stopped = until(lambda: pids(queue))[0]
        os.kill(stopped, signal.SIGSTOP)
        assert process.wait(300) == 0
    assert "hangs; it is ended" in (tmp_path / "said").read_text()
    assert len(results_in(tmp_path / "out")) == 2


def test_a_worker_killed_at_its_start_does_not_end_the_sweep(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base, methods=ONE)
    with command(path, "--workers", "1") as process:
        log = tmp_path / "out/logs/worker-1.log"
        until(log.exists)
        server = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = [int(pid) for pid in server.read_text().split()]
        workers = [
            int(pid) for child in children for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split()
        ]
        for pid in workers:
            send(pid, signal.SIGKILL)
        assert process.wait(300) == 0
    assert workers
    assert len(results_in(tmp_path / "out")) == 2


def test_a_folder_that_a_stopped_process_holds_is_told_in_the_end(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any
):
    held = runs_of(plan_of(tmp_path, base=base))[0].id

    def busy(config: Any, count: int) -> None:
        if Path(config.out).name == held:
            raise BusyError(f"Another process is training in {config.out}.")

    tried = train(busy)
    monkeypatch.setattr("hiddenkey.lab.sweep._HELD", 0.1)
    with pytest.raises(
        RunError, match=rf"3 tries failed in a row, the last one of {held}: Another process is training"
    ):
        work_here(tmp_path / "sweep.yaml")
    assert len(results_in(tmp_path / "out")) == 7, "the others are made meanwhile"
    assert tried.count(held) == 4
    assert tried[-1] == held


def test_an_error_is_tried_again_and_then_stops_the_sweep(base: dict[str, Any], tmp_path: Path, train: Any):
    def full(config: Any, count: int) -> None:
        if count < 3:
            raise OSError(28, "No space left on device")

    path = write_sweep(tmp_path, base=base)
    tried = train(full)
    work_here(path)
    assert len(tried) == 10
    for error, said in (
        (OSError(28, "No space left"), r"3 tries failed in a row(?s:.*)No space left"),
        (DataError("odd"), "odd"),
        (ValueError("unforeseen"), r"3 tries failed in a row(?s:.*)ValueError: unforeseen"),
    ):

        def fail(config: Any, count: int, error: Exception = error) -> None:
            raise error

        train(fail)
        write_sweep(tmp_path, base=base | {"lora_r": 2}, name=type(error).__name__)
        with pytest.raises(UserError, match=said):
            work_here(path)


def test_a_signal_that_came_while_a_run_failed_is_heeded_before_the_next(
    base: dict[str, Any], tmp_path: Path, train: Any
):
    def fail(config: Any, count: int) -> None:
        with postponed():
            signal.raise_signal(signal.SIGINT)
            raise RunError("the disk is full")

    tried = train(fail)
    with pytest.raises(KeyboardInterrupt):
        work_here(write_sweep(tmp_path, base=base))
    assert len(tried) == 1


def test_a_loss_that_is_not_finite_is_a_result(base: dict[str, Any], tmp_path: Path):
    methods = {"baseline": {"recipe": "baseline", "grid": {"learning_rate": [1e-4, 1e38]}}}
    more = {"log_steps": 1, "max_grad_norm": 1e30, "save_steps": 0}
    queue = work_here(write_sweep(tmp_path, base=base | more, axes=None, methods=methods))
    good, bad = sorted(results_in(tmp_path / "out").values(), key=lambda result: result.sweep["trial"])
    assert (good.status, bad.status) == ("finished", "failed")
    assert "learning rate 1e+38" in bad.failure
    assert [*queue.values.values()] == [-good.best["validation_accuracy"], float("inf")]
    assert (good.preset, good.task_key, good.is_decoder, good.lower_is_better) == (
        "baseline",
        "sentences",
        False,
        False,
    )
    assert not (Path(good.folder) / "checkpoints").exists()
    assert good.adapter.exists()


@pytest.mark.parametrize(
    ("recipe", "preset"), [("hiddenkey-js@0.1 ~ kl*2", "hiddenkey-js"), ("logits:column@0.1", "")]
)
def test_a_result_says_what_it_is(recipe: str, preset: str, llama: Path, tmp_path: Path):
    (tmp_path / "data/NLG").mkdir(parents=True)
    for part in ("train", "dev"):
        tiny.write_csv(tmp_path / f"data/NLG/{part}.csv", tiny.paired_rows(24))
    more = {"separator": " ", "max_steps": 1, "max_length": 16, "recipe": recipe}
    config = TrainConfig(model=str(llama), data=str(tmp_path / "data/NLG"), out=str(tmp_path / "run"), **more)
    result = run_module.train(config, QUIET)
    assert (result.preset, result.task_key, result.is_decoder, result.lower_is_better) == (
        preset,
        "data/nlg",
        True,
        True,
    )
    assert result.sweep == {}
    assert datetime.fromisoformat(result.started) <= datetime.now(UTC)


@pytest.mark.parametrize("left", ["another version", "another configuration", "cut short"])
def test_a_run_is_made_anew_where_an_unfinished_one_does_not_fit(left: str, base: dict[str, Any], tmp_path: Path):
    (run,) = runs_of(plan_of(tmp_path, base=base, methods=ONE, axes=None))
    other = write_finished(run)
    texts = {
        "another version": '{"status": "running", "later": 1}',
        "another configuration": json.dumps(other.__dict__ | {"status": "running", "config": {"epochs": 9}}),
        "cut short": '{"status": "fini',
    }
    path = Path(run.config.out) / "result.json"
    path.write_text(texts[left])
    work_here(tmp_path / "sweep.yaml")
    result = results_in(tmp_path / "out")[run.id]
    assert (result.status, result.config["epochs"], len(result.epochs)) == ("finished", 1, 1)


def test_a_finished_run_of_another_version_is_told_and_kept(base: dict[str, Any], tmp_path: Path):
    (run,) = runs_of(plan_of(tmp_path, base=base, methods=ONE, axes=None))
    write_finished(run)
    path = Path(run.config.out) / "result.json"
    path.write_text('{"status": "finished", "later": 1}')
    with pytest.raises(RunError, match=r"result\.json"):
        work_here(tmp_path / "sweep.yaml")
    assert path.read_text() == '{"status": "finished", "later": 1}'


def test_a_file_that_grows_keeps_its_runs_and_counts_their_trials_anew(
    base: dict[str, Any], tmp_path: Path, train: Any
):
    def methods(rates: list[float]) -> dict[str, Any]:
        return {"dropkey": {"recipe": "dropkey@{p}", "grid": {"p": rates}}}

    def nothing(config: Any, count: int) -> None:
        """Finished at once, as `train` says of a run that is."""

    train(nothing)
    work_here(write_sweep(tmp_path, base=base, methods=methods([0.1, 0.2]), axes=None))
    first = results_in(tmp_path / "out")
    work_here(write_sweep(tmp_path, base=base, methods=methods([0.05, 0.1, 0.2]), axes=None))
    results = results_in(tmp_path / "out")
    assert first.keys() < results.keys()
    told = sorted((r.sweep["trial"], r.sweep["params"]["p"], r.sweep["trials"]) for r in results.values())
    assert told == [(1, 0.05, 3), (2, 0.1, 3), (3, 0.2, 3)]


def test_data_that_changed_since_a_run_was_made_are_told(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base, methods=ONE)
    queue = queue_of(make_plan(read_sweep(path)))
    run = runs_of(queue.plan)[0]
    run_module.train(run.config, QUIET, run.sweep)
    sweep(SweepConfig(str(path), dry_run=True), QUIET)
    tiny.write_csv(Path(base["data"]), tiny.labelled_rows(41))
    with pytest.raises(RunError, match=r"data_seed = 0 are no longer those of"):
        sweep(SweepConfig(str(path), dry_run=True), QUIET)


def test_mistakes_are_told_before_anything_runs(base: dict[str, Any], tmp_path: Path):
    for change, error, said in (
        ({"data": "gone.csv"}, OSError, "gone.csv"),
        ({"label_column": "lable"}, DataError, "lable"),
        ({"metric": "bleu"}, ConfigError, "bleu"),
        ({"target_modules": ["nothing"]}, ConfigError, "nothing"),
        ({"max_length": 100}, ConfigError, "100"),
        ({"attn_implementation": "foo"}, ConfigError, "foo"),
        ({"dtype": "float16"}, ConfigError, "float16 needs a CUDA device"),
    ):
        path = write_sweep(tmp_path, base=base | change)
        for config in (
            SweepConfig(str(path), dry_run=True),
            SweepConfig(str(path)),
            SweepConfig(str(path), worker=True),
        ):
            with pytest.raises(error, match=said):
                sweep(config, QUIET)
        assert not list((tmp_path / "out").glob("*/result.json"))
    for flags in ({"workers": 0}, {"grace": 1}, {"worker": True, "workers": 2}, {"worker": True, "dry_run": True}):
        with pytest.raises(ConfigError):
            sweep(SweepConfig(str(path), **flags), QUIET)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"generation_metrics": ["meteor"]}, ConfigError, "meteor need Java"),
        ({"generation_metrics": ["bleu"], "max_new_tokens": 62}, ConfigError, "the 64 that"),
        ({"max_length": 3}, DataError, "max_length = 3"),
        ({"data": "german.csv"}, ConfigError, r"does not know \d+ of \d+ tokens"),
        ({"data": "long.csv", "train_size": 4, "eval_size": 1}, DataError, "max_length = 16"),
    ],
)
def test_what_cannot_be_generated_or_learnt_is_told(
    llama: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    error: Any,
    said: str,
):
    monkeypatch.setattr(metrics, "has_java", lambda: False)
    monkeypatch.chdir(tmp_path)
    test = str(tiny.write_csv(tmp_path / "test.csv", tiny.paired_rows(6)))
    german = [{"prompt": f"ein ganz anderer Satz {i}", "completion": "gut"} for i in range(12)]
    tiny.write_csv(tmp_path / "german.csv", german)
    tiny.write_csv(
        tmp_path / "long.csv", [*tiny.paired_rows(24), {"prompt": "the film " * 8, "completion": "was fine"}]
    )
    fine = {"model": str(llama), "data": str(pairs), "test": test, "separator": " ", "max_length": 16}
    axes = {"data_seed": list(range(20))}  # the long row is in the subset of some seeds
    for base in (fine, fine | fields):
        path = write_sweep(tmp_path, base=base, axes=axes, methods=ONE)
        if base == fine:
            sweep(SweepConfig(str(path), dry_run=True), QUIET)
        else:
            with pytest.raises(error, match=said):
                sweep(SweepConfig(str(path), dry_run=True), QUIET)


def test_a_worker_that_sees_several_gpus_takes_no_run(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RunError, match=r"sees 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        sweep(SweepConfig(str(write_sweep(tmp_path, base=base)), worker=True), QUIET)


def test_any_worker_may_be_the_first_and_the_only_one(base: dict[str, Any], tmp_path: Path, train: Any):
    tried = train(lambda config, count: None)
    path = write_sweep(tmp_path, base=base)
    sweep(SweepConfig(str(path), worker=True), QUIET)
    assert len(tried) == len(results_in(tmp_path / "out")) == 8
    assert "nothing to do" in said_by(SweepConfig(str(path)))


def test_one_sweep_at_a_time_in_a_folder(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base)
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out", QUIET), pytest.raises(BusyError, match="running a sweep"):
        sweep(SweepConfig(str(path)), QUIET)


def test_a_dry_run_prints_the_plan_and_leaves_nothing(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base | {"model": "set from outside"})
    said = said_by(SweepConfig(str(path), dry_run=True, set=(f"model={base['model']}",)))
    assert "dropkey column      4  dropkey:column@{p}" in said
    assert "8  runs, into" in said
    assert "a report will have no results of these runs" in said
    assert not (tmp_path / "out").exists()


def test_heartbeats_go_on_though_the_storage_fails_once(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Any
):
    beats: list[int] = []
    beat = Queue.beat

    def failing(queue: Queue, trial: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            beats.append(trial.number)
            if len(beats) == 1:
                raise OSError("the storage is away")
        beat(queue, trial)

    monkeypatch.setattr(Queue, "beat", failing)
    train(lambda config, count: until(lambda: len(beats) > 2))
    work_here(write_sweep(tmp_path, base=base, methods=ONE, axes=None))
    assert len(beats) > 2
