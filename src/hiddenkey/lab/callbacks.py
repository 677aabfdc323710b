"""What a run does beside the training loop: watch the loss, keep time, show progress, mark checkpoints, stop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import NonFiniteLossError
from .checkpoints import mark_complete
from .console import say

_LOSSES = ("loss", "task_loss", "consistency_loss")


class LossGuard(TrainerCallback):
    """Stops at the first logged loss that is NaN or infinite."""

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        """Raises NonFiniteLossError naming the step, the loss and the ways out."""
        for name, value in logs.items():
            if name.endswith("loss") and not math.isfinite(value):
                raise NonFiniteLossError(
                    f"{name} is {value} at step {state.global_step} (learning rate {args.learning_rate}). "
                    "Try a smaller learning_rate, more warmup, a smaller max_grad_norm, "
                    "or dtype bfloat16 or float32 in the place of float16."
                )


class StepClock(TrainerCallback, ExportableState):
    """Seconds of every optimiser step, without loading data; carried over in the checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops it, once the device is done."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(round(time.perf_counter() - self._started, 6))


class Schedule(TrainerCallback):
    """Logs at the end of each epoch, saves every so many steps, and marks a checkpoint when it is whole."""

    def __init__(self, save_steps: int) -> None:
        self.save_steps = save_steps

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        """Asks for a checkpoint when it is time; the end of an epoch has its own, with its evaluation in it."""
        ends = control.should_training_stop or float(state.epoch).is_integer()
        if self.save_steps and state.global_step % self.save_steps == 0 and not ends:
            control.should_save = True

    def on_epoch_end(self, _: Any, __: Any, control: TrainerControl, **___: Any) -> None:
        """Asks for a log entry."""
        control.should_log = True

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Marks the checkpoint just written."""
        mark_complete(Path(args.output_dir), state.global_step)


class EarlyStopping(EarlyStoppingCallback):
    """As its parent, on the validation part alone: the training part is evaluated too."""

    def on_evaluate(self, args: TrainingArguments, *rest: Any, metrics: dict[str, float], **more: Any) -> None:
        """Counts an epoch without a better metric."""
        if args.metric_for_best_model in metrics:
            super().on_evaluate(args, *rest, metrics=metrics, **more)


class Interrupts(TrainerCallback):
    """Heeds Ctrl-C between two batches, when nothing is half done and the last step's checkpoint is written."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before the next step, and within an accumulated step or an evaluation."""
        heed()

    on_substep_end = on_prediction_step = on_step_begin


class ProgressBar(TrainerCallback):
    """Steps, remaining time and the losses of the last log entry, and a line for every evaluated part."""

    def __init__(self, console: Console) -> None:
        # On a narrow terminal the losses are broken into lines; steps and time stay whole.
        whole = Column(no_wrap=True)
        losses = TextColumn("{task.description}", table_column=Column())
        columns = MofNCompleteColumn(table_column=whole), TimeRemainingColumn(table_column=whole), losses
        self.progress = Progress(*columns, console=console)
        self.row = self.progress.add_task("", total=None)
        self.rates: dict[str, float] = {}

    def on_train_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        """Shows the bar."""
        self.progress.update(self.row, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        """Moves it."""
        self.progress.update(self.row, completed=state.global_step)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Shows the losses, and keeps the realised drop rates for the end of the epoch."""
        self.rates |= {name: value for name, value in logs.items() if name.startswith("drop_rate/")}
        if "loss" in logs:
            self.progress.update(self.row, description=_numbers({n: v for n, v in logs.items() if n in _LOSSES}))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, *_: Any, metrics: dict[str, float], **__: Any
    ) -> None:
        """Prints the metrics of the validation part and the drop rates, and the loss of the training part."""
        shown = {
            name: value
            for name, value in metrics.items()
            if name == "eval_train_loss" or (name.startswith("eval_validation_") and not name.endswith(TIMES))
        }
        rates = f"  dropped: {_numbers(self.rates)}" if self.rates and args.metric_for_best_model in metrics else ""
        say(self.progress.console, f"epoch {state.epoch:g}  {_numbers(shown)}{rates}")

    def stop(self) -> None:
        """Leaves the terminal as it was."""
        self.progress.stop()


def _numbers(values: dict[str, float]) -> str:
    named = ((name.removeprefix("eval_").removeprefix("drop_rate/"), value) for name, value in values.items())
    return "  ".join(f"{name} {value:.4g}" for name, value in named)


_Handler = Callable[[int, FrameType | None], Any]

_waiting: dict[int, _Handler] = {}


@contextmanager
def postponed() -> Iterator[None]:
    """Within, the first Ctrl-C or SIGTERM waits for `heed`, or for the end; one more is acted on at once.

    An error that ends it goes first: what waited then waits on, for the next `heed` of whoever catches the error.

    Signals that are ignored, or left to the system, stay so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    handlers = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    earlier = {number: handler for number, handler in handlers.items() if callable(handler)}

    def wait(number: int, frame: FrameType | None) -> None:
        if number in _waiting:
            earlier[number](number, frame)
        _waiting[number] = earlier[number]

    for number in earlier:
        signal.signal(number, wait)
    try:
        yield
    except KeyboardInterrupt:
        _waiting.clear()
        raise
    finally:
        for number, handler in earlier.items():
            if signal.getsignal(number) is wait:
                signal.signal(number, handler)
    heed()


def heed() -> None:
    """Act now on what was postponed.

    Raises:
        KeyboardInterrupt: Ctrl-C waited, or SIGTERM in a worker of a sweep.
    """
    while _waiting:
        number, handler = _waiting.popitem()
        handler(number, None)


Log = list[dict[str, float]]

TIMES = ("_runtime", "_per_second", "_preparation_time")
"""Endings of what the Trainer logs beside metrics."""


def epochs_of(history: Log) -> Log:
    """One row per evaluated epoch: epoch, step, train_loss, validation_loss, validation_accuracy, …"""
    rows: dict[float, dict[str, float]] = {}
    for entry in history:
        found = {name.removeprefix("eval_"): value for name, value in entry.items() if _is_metric(name)}
        if found:
            rows.setdefault(entry["step"], {"epoch": entry["epoch"], "step": entry["step"]}).update(found)
    return list(rows.values())


def best_of(epochs: Log, metric: str, lower_is_better: bool) -> dict[str, float]:
    """The row with the best validation metric; of equals the first."""
    choose = min if lower_is_better else max
    return choose(epochs, key=lambda row: row[f"validation_{metric}"])


def drop_rates(history: Log) -> dict[str, float | None]:
    """Realised rate per position: of all draws that the last log entry knows of, as each is over those before it."""
    return {
        name.removeprefix("drop_rate/"): value
        for entry in history
        for name, value in entry.items()
        if name.startswith("drop_rate/") and math.isfinite(value)
    }


def step_seconds(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of the optimiser steps, and their number; the number alone where it is 0."""
    shares = {"median": 0.5, "p20": 0.2, "p80": 0.8} if seconds else {}
    return {name: float(np.quantile(seconds, share)) for name, share in shares.items()} | {"steps": len(seconds)}


def _is_metric(name: str) -> bool:
    return name.startswith(("eval_validation_", "eval_train_")) and not name.endswith(TIMES)
