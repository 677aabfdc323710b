"""One training run, from a configuration to an adapter."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerState, set_seed

import hiddenkey

from ..errors import LabError, RunError
from ..hf.structure import read
from ..presets import PRESETS
from . import provenance
from .callbacks import (
    TIMES,
    EarlyStopping,
    Interrupts,
    LossGuard,
    ProgressBar,
    Schedule,
    StepClock,
    best_of,
    drop_rates,
    epochs_of,
    postponed,
    step_seconds,
)
from .checkpoints import is_last, last_checkpoint, require_whole, unmark
from .config import Keep, TrainConfig
from .console import say
from .generation import generation_scores
from .model import load_model, save_adapter
from .preflight import Checked, check_run, tell
from .run_folder import (
    CHECKPOINTS,
    RunResult,
    clear,
    hold,
    make_folder,
    open_folder,
    require_same_data,
    require_space,
    write_result,
)
from .trainer_settings import ByLength, require_one_device, training_arguments

_TORCHS_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")
"""One of these is in what torch says of a file that it cannot write, which it calls a RuntimeError."""


def train(config: TrainConfig, console: Console | None = None, sweep: Mapping[str, Any] | None = None) -> RunResult:
    """Train, or continue, or return the finished run that lies in `config.out`; `sweep`: as in `RunResult`.

    Progress goes to `console`, standard error by default. What can be is checked before the weights are read.

    Raises:
        ConfigError, DataError, RunError: see `hiddenkey.errors`.
        RecipeError, PlanError: the recipe is wrong, or finds no site in this model.
        NonFiniteLossError: the loss became NaN or infinite.
        OSError: a file, model or data set that cannot be read or written.
    """
    console = console or Console(stderr=True)
    config.check()
    recipe = hiddenkey.parse(config.recipe)
    if int(os.environ.get("WORLD_SIZE") or "1") > 1:
        raise RunError("hiddenkey train is one process; for several write a script with hiddenkey.DropTrainer.")
    require_one_device()
    folder = Path(config.out)
    make_folder(folder)
    with hold(folder, console):
        return _train(config, recipe, console, dict(sweep or {}))


def _train(config: TrainConfig, recipe: Any, console: Console, sweep: dict[str, Any]) -> RunResult:
    started = time.perf_counter()
    earlier = open_folder(config)
    if earlier is not None and earlier.status == "finished":
        say(
            console,
            f"{config.out} holds this run, finished: nothing to do. If its data have changed since, --overwrite "
            "makes it anew.",
        )
        return earlier
    checked = check_run(config, recipe)
    if earlier is not None:
        require_same_data(earlier, checked.examples.digest)
    tell(checked, config, recipe, console)
    trainer = _make_trainer(config, recipe, checked, console)
    say(console, f"\n{trainer.attachment.plan}\n")
    with postponed():
        if config.overwrite:
            clear(Path(config.out))
        result = _first_record(config, recipe, checked, trainer, sweep)
        write_result(result)
        try:
            _fit(trainer, config, console)
            result = _last_record(result, checked, trainer)
            result = replace(result, test=_test(config, result, checked, trainer, console))
            finished = replace(result, status="finished", seconds=round(time.perf_counter() - started, 3))
            with written("The adapter"):
                save_adapter(trainer.model, checked.tokenizer, finished)
                write_result(finished)
        except LabError as error:
            with suppress(OSError):  # a full disk takes no note of it either
                write_result(replace(result, status="failed", failure=str(error)))
            raise
    return finished


@contextmanager
def written(what: str) -> Iterator[None]:
    """Says in one way what the libraries below say in three: that something could not be written.

    Raises:
        RunError: in the place of their errors.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(mark in str(error) for mark in _TORCHS_WRITER):
            raise
        raise RunError(
            f"{what} cannot be written: {error}. Free some space; the same command continues from the last checkpoint"
            " that was written, without --overwrite."
        ) from error


class _Trainer(hiddenkey.DropTrainer):
    """Tells of checkpoints that cannot be written or changed since, and evaluates without label smoothing.

    order: of the training rows; None: the Trainer's own.
    """

    order: ByLength | None = None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self.order or super()._get_train_sampler(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        unmark(Path(self.args.output_dir), self.state.global_step)
        with written(f"The checkpoint of step {self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        load_weights(self, self.state.best_global_step)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # A smoothed loss is on another scale, so that runs with and without could not be compared by it.
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.label_smoother = smoother


def _make_trainer(config: TrainConfig, recipe: Any, checked: Checked, console: Console) -> Any:
    task, tokenizer = checked.task, checked.tokenizer
    arguments = training_arguments(config, task, checked.metric)
    set_seed(config.seed)
    trainer = _Trainer(
        recipe=recipe,
        model=load_model(config, task, tokenizer),
        args=arguments,
        train_dataset=checked.train,
        eval_dataset=checked.evaluated(config),
        data_collator=task.collator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=task.measure,
        preprocess_logits_for_metrics=task.reduce_logits,
        callbacks=[Interrupts(), LossGuard(), StepClock(), Schedule(config.save_steps)],
    )
    if config.group_by_length:
        trainer.order = ByLength(checked.train_lengths, config.batch_size, config.seed)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar(console))
    if config.patience:
        trainer.add_callback(EarlyStopping(config.patience))
    require_space(Path(config.out), _bytes_of_run(trainer))
    return trainer


def _bytes_of_run(trainer: Any) -> int:
    # An adapter; four checkpoints (one more than is kept, while it is written) of it and two moments of AdamW.
    trained = sum(parameter.nbytes for parameter in trainer.model.parameters() if parameter.requires_grad)
    return (1 + 4 * 3) * trained + 64 * 2**20


def _fit(trainer: Any, config: TrainConfig, console: Console) -> None:
    def tell(message: str) -> None:
        say(console, message)

    checkpoint = last_checkpoint(Path(config.out) / CHECKPOINTS, tell)
    if checkpoint is not None:
        tell(f"Continuing from {checkpoint}.")
    if checkpoint is not None and is_last(checkpoint):
        _take_up(trainer, checkpoint)
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        _callback(trainer, ProgressBar).stop()


def _take_up(trainer: Any, checkpoint: Path) -> None:
    """What a training left that was killed after its last checkpoint: the Trainer would train a step more."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    state = trainer.state
    load_weights(trainer, state.best_global_step if trainer.args.load_best_model_at_end else state.global_step)
    clock = trainer.state.stateful_callbacks[StepClock.__name__]
    _callback(trainer, StepClock).seconds = clock["attributes"]["seconds"]


def _callback(trainer: Any, kind: type[Any]) -> Any:
    # Looked up, because the Trainer makes its stateful callbacks anew when it continues.
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind))


def _first_record(
    config: TrainConfig, recipe: Any, checked: Checked, trainer: Any, sweep: dict[str, Any]
) -> RunResult:
    return RunResult(
        folder=config.out,
        status="running",
        config=config.to_dict(),
        recipe=str(recipe),
        plan=str(trainer.attachment.plan),
        task=checked.examples.task,
        versions=provenance.versions(),
        commit=provenance.commit(),
        data_rows=checked.row_counts,
        data_digest=checked.examples.digest,
        trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        label_names=list(checked.examples.label_names),
        metric=checked.metric,
        last={},
        best={},
        epochs=[],
        history=[],
        drop_rates={},
        drop_rates_by_site={},
        step_seconds={},
        seconds=0.0,
        sweep=sweep,
        preset=_preset(config.recipe),
        task_key=_task_key(config),
        is_decoder=any(stack.causal for stack in read(trainer.model).stacks),
        lower_is_better=checked.metric in checked.task.lower_is_better,
        started=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _preset(typed: str) -> str:
    """`hiddenkey-js` of "hiddenkey-js@0.1"; empty for drops that are written out."""
    name = re.split(r"[\[:@~+\s]", typed.strip(), maxsplit=1)[0]
    return name if name in PRESETS and "+" not in typed else ""


def _task_key(config: TrainConfig) -> str:
    """`glue/rte` of that hub data set and of a folder data/glue/RTE, `mine` of a file mine.csv."""
    path = Path(config.data)
    parts = [path.stem] if path.is_file() else path.parts[-2:]
    return "/".join(filter(None, (*parts, config.data_config))).lower()


def _last_record(running: RunResult, checked: Checked, trainer: Any) -> RunResult:
    history = trainer.state.log_history
    epochs = epochs_of(history)
    rates = trainer.attachment.rates()
    return replace(
        running,
        last=epochs[-1],
        best=best_of(epochs, checked.metric, checked.metric in checked.task.lower_is_better),
        epochs=epochs,
        history=history,
        drop_rates=drop_rates(history),
        drop_rates_by_site={site: rate if math.isfinite(rate) else None for site, rate in rates.items()},
        step_seconds=step_seconds(_callback(trainer, StepClock).seconds),
    )


def _test(
    config: TrainConfig, result: RunResult, checked: Checked, trainer: Any, console: Console
) -> dict[str, dict[str, float]]:
    if checked.test is None:
        return {}
    say(console, f"Testing on {len(checked.test)} rows.")
    steps: dict[Keep, int] = {"best": int(result.best["step"] or 0), "last": int(result.last["step"] or 0)}
    found = final_scores(trainer, checked.test, steps, config.keep)
    if checked.prompts:
        say(console, f"Generating for {len(checked.prompts)} prompts.")
        found[config.keep] |= generation_scores(trainer, checked.prompts, config, console)
    return found


def load_weights(trainer: Any, step: int) -> None:
    """Give the trainer's model the weights of the checkpoint of `step`.

    Raises:
        RunError: the checkpoint is gone or damaged.
    """
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    require_whole(checkpoint)
    trainer._load_from_checkpoint(str(checkpoint))


def final_scores(trainer: Any, rows: Dataset, steps: dict[Keep, int], keep: Keep) -> dict[str, dict[str, float]]:
    """Test metrics of the models that the checkpoints of `steps` hold; the one to `keep` stays in the trainer.

    Raises:
        RunError: a checkpoint is gone or damaged.
    """
    found: dict[int, dict[str, float]] = {}
    for step in sorted(set(steps.values()), key=lambda step: step == steps[keep]):
        load_weights(trainer, step)
        metrics = trainer.predict(rows, metric_key_prefix="test").metrics
        found[step] = {name[len("test_") :]: value for name, value in metrics.items() if not name.endswith(TIMES)}
    return {name: dict(found[step]) for name, step in steps.items()}
