"""What a sweep tells before its first run: lengths, and what metrics of generated texts need."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hiddenkey.lab import metrics
from hiddenkey.lab.errors import ConfigError, DataError, RunError
from hiddenkey.lab.sweep import run as running
from hiddenkey.lab.sweep.board import Board
from hiddenkey.lab.sweep.config import SweepConfig
from hiddenkey.lab.sweep.crew import Job
from hiddenkey.lab.sweep.file import read_sweep
from hiddenkey.lab.sweep.plan import make_plan
from hiddenkey.lab.sweep.run import sweep
from hiddenkey.lab.sweep.storage import open_storage

from .. import tiny
from .tools import GRACE, write_sweep

METHODS = {"baseline": {"recipe": "baseline", "grid": {"learning_rate": [1e-4]}}}


@pytest.fixture
def base(llama: Path, pairs: Path, tmp_path: Path) -> dict[str, Any]:
    test = tiny.write_csv(tmp_path / "test.csv", tiny.paired_rows(6))
    return {"model": str(llama), "data": str(pairs), "test": str(test), "separator": " ", "max_length": 16}


def dry_run(path: Path) -> None:
    sweep(SweepConfig(str(path), dry_run=True), Console(quiet=True))


def test_a_sweep_without_a_test_part_says_what_that_means(base: dict[str, Any], tmp_path: Path):
    said = []
    for fields in (base, {name: value for name, value in base.items() if name != "test"}):
        with io.StringIO() as heard:
            path = write_sweep(tmp_path, base=fields, axes=None, methods=METHODS)
            sweep(SweepConfig(str(path), dry_run=True), Console(file=heard))
            said.append("a report will have no results of these runs" in heard.getvalue())
    assert said == [False, True]


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"generation_metrics": ["meteor"]}, ConfigError, "meteor need Java"),
        ({"generation_metrics": ["bleu"], "max_new_tokens": 62}, ConfigError, "the 64 that"),
        ({"max_length": 3}, DataError, "max_length = 3"),
    ],
)
def test_what_cannot_be_generated_or_learnt_is_told(
    base: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    error: Any,
    said: str,
):
    monkeypatch.setattr(metrics, "has_java", lambda: False)
    with pytest.raises(error, match=said):
        dry_run(write_sweep(tmp_path, base=base | fields, axes=None, methods=METHODS))
    dry_run(write_sweep(tmp_path, base=base, axes=None, methods=METHODS))


def test_a_tokenizer_of_other_texts_is_told(base: dict[str, Any], tmp_path: Path):
    rows = [{"prompt": f"ein ganz anderer Satz {i}", "completion": "gut"} for i in range(12)]
    data = str(tiny.write_csv(tmp_path / "german.csv", rows))
    with pytest.raises(ConfigError, match=r"does not know \d+ of \d+ tokens"):
        dry_run(write_sweep(tmp_path, base=base | {"data": data}, axes=None, methods=METHODS))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_workers_share_the_cores_that_the_job_may_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert [running._threads(SweepConfig("s.yaml", workers=workers)) for workers in (1, 2, 4, 9)] == [6, 3, 1, 1]
    assert running._threads(SweepConfig("s.yaml", workers=4, threads=5)) == 5


def test_the_rows_of_every_data_seed_are_checked(base: dict[str, Any], tmp_path: Path):
    rows = [*tiny.paired_rows(24), {"prompt": "the film " * 8, "completion": "was fine"}]
    base |= {"data": str(tiny.write_csv(tmp_path / "long.csv", rows)), "train_size": 4, "eval_size": 1}
    dry_run(write_sweep(tmp_path, base=base, axes={"data_seed": [0]}, methods=METHODS))
    with pytest.raises(DataError, match="max_length = 16"):
        dry_run(write_sweep(tmp_path, base=base, axes={"data_seed": list(range(20))}, methods=METHODS))


def test_smoothed_scores_are_told_wherever_they_stand(bert: Path, tmp_path: Path):
    rows = [{"text": row["text"], "score": i / 7} for i, row in enumerate(tiny.labelled_rows(30))]
    data = tiny.write_csv(tmp_path / "scores.csv", rows)
    base = {"model": str(bert), "data": str(data), "max_length": 16}
    dry_run(write_sweep(tmp_path, base=base, axes=None, methods=METHODS))
    with pytest.raises(ConfigError, match=r"label_smoothing = 0\.1 .*regression"):
        dry_run(write_sweep(tmp_path, base=base, axes={"label_smoothing": [0.0, 0.1]}, methods=METHODS))


def opened(path: Path, url: str) -> Board:
    """A sweep that was started on another machine."""
    board = Board(make_plan(read_sweep(path)), open_storage(url, GRACE), str(os.getpid()))
    board.open({})
    board.note_grace(GRACE)
    return board


def test_what_a_late_worker_lacks_is_no_fault_of_a_run(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_sweep(tmp_path, base=base | {"generation_metrics": ["meteor"]}, axes=None, methods=METHODS)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    board = opened(path, url)
    monkeypatch.setattr(metrics, "has_java", lambda: False)
    with pytest.raises(ConfigError, match="meteor need Java"):
        sweep(SweepConfig(str(path), worker=True, storage=url, grace=GRACE), Console(quiet=True))
    assert board.take() is not None, "another machine may make it"


def test_a_worker_that_sees_several_gpus_takes_no_run(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_sweep(tmp_path, base=base, axes=None, methods=METHODS)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    board = opened(path, url)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RunError, match=r"sees 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        sweep(SweepConfig(str(path), worker=True, storage=url, grace=GRACE), Console(quiet=True))
    assert board.take() is not None


class NobodyAtWork:
    """A crew that has made nothing."""

    def __init__(self, job: Job, board: Board) -> None:
        self.count = 0

    def start(self, count: int) -> None:
        self.count = count

    def watch(self, tick: Any) -> None:
        raise RunError(f"{self.count} workers were started")

    def stop(self) -> None:
        """Nothing to stop."""


def test_several_gpus_are_for_the_workers(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_sweep(tmp_path, base=base, axes=None, methods=METHODS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(running, "Crew", NobodyAtWork)
    with pytest.raises(RunError, match="2 workers were started"):
        sweep(SweepConfig(str(path), workers=2), Console(quiet=True))


def test_a_sweep_that_cannot_train_in_the_type_is_told_before_any_run(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_sweep(tmp_path, base=base | {"dtype": "float16"}, axes=None, methods=METHODS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(running, "Crew", None)
    with pytest.raises(ConfigError, match="float16 needs a CUDA device"):
        sweep(SweepConfig(str(path)), Console(quiet=True))


def test_a_consistency_of_another_task_is_told_before_any_run(base: dict[str, Any], tmp_path: Path):
    methods = {"odd": {"recipe": "hiddenkey@{p} ~ mse*1.0", "grid": {"p": [0.1]}}}
    with pytest.raises(ConfigError, match="'mse' compares predictions of a regression, and this task is causal-lm"):
        dry_run(write_sweep(tmp_path, base=base, axes=None, methods=methods))


def test_an_unknown_attention_backend_is_told_before_any_run(base: dict[str, Any], tmp_path: Path):
    path = write_sweep(tmp_path, base=base | {"attn_implementation": "foo"}, axes=None, methods=METHODS)
    with pytest.raises(ConfigError, match="foo"):
        sweep(SweepConfig(str(path), dry_run=True), Console(quiet=True))


def test_a_worker_that_cannot_train_in_the_type_takes_no_run(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_sweep(tmp_path, base=base | {"dtype": "float16"}, axes=None, methods=METHODS)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    board = opened(path, url)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="float16 needs a CUDA device"):
        sweep(SweepConfig(str(path), worker=True, storage=url, grace=GRACE), Console(quiet=True))
    assert board.take() is not None
