"""Faults: kills, full disks, damaged files, two processes in one folder. Each is told, and nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hiddenkey.errors import ConfigError, DataError, RunError
from hiddenkey.lab import train as run
from hiddenkey.lab.callbacks import StepClock
from hiddenkey.lab.checkpoints import last_checkpoint
from hiddenkey.lab.config import TrainConfig, read_fields
from hiddenkey.lab.data import load_examples
from hiddenkey.lab.run_folder import read_result, write_text

from .signals import heed_interrupts
from .test_run import config, same  # noqa: F401


class Killed(BaseException):
    """A kill, as far as the code that runs can see."""


def stop(*_: Any, **__: Any) -> None:
    raise Killed


def kill_at(monkeypatch: pytest.MonkeyPatch, name: str, config: TrainConfig) -> None:  # noqa: F811
    """A run that is killed when it calls the function of that name."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, name, stop)
        run.train(config)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 8, "patience": 1, "metric": "loss", "learning_rate": 0.5},
        {"epochs": 8, "patience": 1, "metric": "loss", "learning_rate": 0.5, "keep": "best", "save_steps": 2},
        {"epochs": 3, "max_steps": 5, "save_steps": 5},
        {"epochs": 2, "save_steps": 6},
    ],
    ids=("patience", "best", "max_steps", "epochs"),
)
def test_a_run_killed_after_its_last_step_trains_no_further(
    config: TrainConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
):
    config = replace(config, **change)
    whole = run.train(replace(config, out=str(tmp_path / "whole")))
    kill_at(monkeypatch, "save_adapter", config)
    continued = run.train(config)
    assert same(config.out, str(tmp_path / "whole"))
    assert continued.last == whole.last
    assert continued.best == whole.best
    assert [row["step"] for row in continued.epochs] == [row["step"] for row in whole.epochs]
    assert continued.step_seconds["steps"] == whole.step_seconds["steps"]


def test_a_run_killed_before_its_first_step_starts_again(
    config: TrainConfig,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    kill_at(monkeypatch, "write_result", config)
    assert (Path(config.out) / "checkpoints").exists(), "made by the Trainer"
    assert run.train(config).status == "finished"


def test_the_end_of_an_epoch_is_saved_with_its_evaluation(
    config: TrainConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    config = replace(config, save_steps=3)  # three steps are an epoch
    whole = run.train(replace(config, out=str(tmp_path / "whole")))

    class Killer(run.Schedule):
        def on_save(self, *arguments: Any, **named: Any) -> None:
            super().on_save(*arguments, **named)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "Schedule", Killer)
        with pytest.raises(Killed):
            run.train(config)
    assert run.train(config).epochs == whole.epochs


@pytest.mark.parametrize(
    "file",
    [
        "optimizer.pt",
        "complete",
        pytest.param("trainer_state.json", marks=pytest.mark.full),
        pytest.param("adapter_model.safetensors", marks=pytest.mark.full),
    ],
)
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_taken(
    config: TrainConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
):
    whole = run.train(replace(config, out=str(tmp_path / "whole")))
    kill_at(monkeypatch, "save_adapter", config)
    checkpoints = Path(config.out) / "checkpoints"
    damage(checkpoints / "checkpoint-6" / file)
    with (tmp_path / "told").open("w") as told:
        assert run.train(config, Console(file=told, width=1000)).last == whole.last
    assert f"checkpoint-6 is damaged: {file} changed" in (tmp_path / "told").read_text()
    assert same(config.out, str(tmp_path / "whole"))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_a_best_checkpoint_that_was_changed_is_not_loaded(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    config = replace(config, metric="loss", keep="best")
    real = StepClock.on_step_end

    def change(clock: StepClock, args: Any, state: Any, *others: Any, **more: Any) -> None:
        real(clock, args, state, *others, **more)
        if state.global_step == 5:
            damage(Path(args.output_dir) / "checkpoint-3" / "adapter_model.safetensors")
            state.best_metric = 0.0  # none is better

    monkeypatch.setattr(StepClock, "on_step_end", change)
    with pytest.raises(RunError, match=r"checkpoint-3 is damaged: adapter_model\.safetensors changed"):
        run.train(config)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past `size` bytes fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [6000, pytest.param(512, marks=pytest.mark.full)])
def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_later(
    config: TrainConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
):
    whole = run.train(replace(config, out=str(tmp_path / "whole")))
    real = run._Trainer._save_checkpoint

    def full(trainer: Any, *arguments: Any, **named: Any) -> None:
        with largest_file(size) if trainer.state.global_step == 6 else largest_file(2**30):
            real(trainer, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(run._Trainer, "_save_checkpoint", full)
        with pytest.raises(RunError, match=r"step 6 cannot be written(?s:.*)same command continues"):
            run.train(config)
    assert read_result(Path(config.out)).status == "failed"
    assert run.train(config).last == whole.last
    assert same(config.out, str(tmp_path / "whole"))


def test_an_error_that_is_not_of_the_disk_is_not_called_so():
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"), run.written("The checkpoint"):
        raise RuntimeError("CUDA out of memory")


def test_an_adapter_that_cannot_be_written_is_told(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    real = run.save_adapter

    def full(*arguments: Any) -> None:
        with largest_file(512):
            real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_adapter", full)
        with pytest.raises(RunError, match="adapter cannot be written"):
            run.train(config)
    assert not (Path(config.out) / "adapter").exists()
    failed = read_result(Path(config.out))
    assert failed is not None
    assert failed.status == "failed"
    assert run.train(config).adapter.exists()


def test_a_run_goes_on_with_the_same_rows_only(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    data = tmp_path / "rows.csv"
    shutil.copy(config.data, data)
    config = replace(config, data=str(data))
    kill_at(monkeypatch, "_test", config)
    whole = data.read_text()
    data.write_text(whole.replace("good", "GOOD").replace("bad", "good").replace("GOOD", "bad"))
    with pytest.raises(RunError, match=r"data of .* have changed since that run began(?s:.*)--overwrite"):
        run.train(config)
    data.write_text(whole)
    assert run.train(config).status == "finished"


def test_a_run_of_a_version_with_fewer_fields_goes_on(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    kill_at(monkeypatch, "_test", config)
    path = Path(config.out) / "result.json"
    record = json.loads(path.read_text())
    del record["config"]["neftune_alpha"], record["data_digest"]
    path.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"neftune_alpha: 0\.0 there, 1\.0 now"):
        run.train(replace(config, neftune_alpha=1.0))
    assert run.train(config).status == "finished"


def test_a_second_process_waits_until_the_first_is_gone_even_killed(config: TrainConfig):  # noqa: F811
    Path(config.out).mkdir()
    code = (
        "import sys, time; from pathlib import Path; from rich.console import Console; "
        "from hiddenkey.lab.run_folder import hold\n"
        "with hold(Path(sys.argv[1]), Console()): print('in', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, config.out], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    with pytest.raises(RunError, match=r"Another process is training(?s:.*)--out"):
        run.train(replace(config, overwrite=True))
    process.kill()
    process.wait()
    assert run.train(config).status == "finished"


def test_torchrun_is_told_what_to_do(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="DropTrainer"):
        run.train(config)


def test_a_machine_with_several_gpus_is_told_what_to_do(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RunError, match=r"sees 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        run.train(config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"model: [", b"!!python/object/apply:os.system [ls]"]
)
def test_a_damaged_configuration_is_told(tmp_path: Path, content: bytes):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_fields(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "fine", "label": "good"}\n{"text": "cold", "label": \n'),
        ("a.jsonl", b'{"text": "fine", "label": "good"}\n["cold"]\n'),
        ("a.jsonl", b'{"text": "fine", "label": "good"}\n\x00\x01\n'),
        ("a.jsonl", b'{"text": "fine", "label": "good"}\n{"text": "cold"}\n'),
        ("a.csv", b"text,label\nfine,good\ncold\n"),
        ("a.csv", b"text,label\nfine,good\ncold,bad,worse\n"),
        ("a.csv", b"text,label\nfine,good\n\xff\xfe,bad\n"),
        ("a.parquet", b"PAR1 this is cut off"),
    ],
)
def test_a_damaged_row_is_told(config: TrainConfig, tmp_path: Path, name: str, content: bytes):  # noqa: F811
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError):
        load_examples(replace(config, data=str(path)))


@pytest.mark.full
def test_twenty_kills_at_random_moments(config: TrainConfig, tmp_path: Path):  # noqa: F811
    config = replace(config, epochs=200, save_steps=2)
    whole = run.train(replace(config, out=str(tmp_path / "whole")))
    flags = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in CHANGED]
    command = [sys.executable, "-c", "from hiddenkey.cli import main; main()", "train", *flags]
    generator, reached = random.Random(0), []
    for kill in range(20):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
        )
        wait_for_start(Path(config.out), process)
        time.sleep(generator.uniform(0, 1.2))
        os.kill(process.pid, signal.SIGINT if kill % 4 == 3 else signal.SIGKILL)
        _, error = process.communicate(timeout=60)
        assert "Traceback" not in error
        reached.append(step_of(Path(config.out)))
    assert reached == sorted(reached)
    assert reached[-1] > 0
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same(config.out, str(tmp_path / "whole"))
    result = read_result(Path(config.out))
    assert result is not None
    assert result.last == whole.last
    assert [row["step"] for row in result.epochs] == [row["step"] for row in whole.epochs]


CHANGED = ("model", "data", "out", "recipe", "max_length", "batch_size", "epochs", "log_steps", "save_steps")


def wait_for_start(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until this process has written its first record."""
    began, deadline = time.time(), time.monotonic() + 120
    path = folder / "result.json"
    while not (path.exists() and path.stat().st_mtime > began):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def step_of(folder: Path) -> int:
    """The newest checkpoint that is whole."""
    found = (folder / "checkpoints").glob("checkpoint-*/complete")
    return max((int(path.parent.name.partition("-")[2]) for path in found), default=0)


def test_what_is_somebodys_own_among_the_checkpoints_stays(tmp_path: Path):
    for name in ("good", "1"):  # the other one was cut short
        (tmp_path / f"checkpoint-{name}").mkdir()
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    assert last_checkpoint(tmp_path, print) is None
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-good", "checkpoint-notes.txt"}


TEXTS = [letter * 50_000 for letter in "abcd"]


def write_often(path: Path, text: str) -> None:
    for _ in range(200):
        write_text(path, text)


def test_four_processes_write_one_file_and_every_reader_sees_it_whole(tmp_path: Path):
    path = tmp_path / "record.json"
    write_text(path, TEXTS[0])
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write_often, args=(path, text)) for text in TEXTS]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert path.read_text() in TEXTS
    assert [process.exitcode for process in processes] == [0] * 4
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path):
    with largest_file(512), pytest.raises(OSError, match="too large"):
        write_text(tmp_path / "result.json", TEXTS[0])
    assert not list(tmp_path.iterdir())
