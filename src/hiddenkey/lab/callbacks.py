"""What a run does beside the training loop: watch the loss, keep time, show progress, mark checkpoints, stop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .checkpoints import mark_complete
from .errors import NonFiniteLossError
from .interrupts import heed
from .say import say
from .summary import TIMES

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
