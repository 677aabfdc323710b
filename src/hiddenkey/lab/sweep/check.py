"""Before anything long starts: data is read and measured, and every recipe is planned on a model without weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..checked import check_structure
from ..config import TrainConfig
from ..data import Examples, load_examples
from ..generation import collect_prompts
from ..settings import require_dtype
from ..tasks import choose_metric, make_task, refuse_smoothing
from .plan import SweepPlan

# What neither the data nor the structure of a model depends on; the data of every data_seed is checked.
_FREE = (
    *("out", "overwrite", "recipe", "learning_rate", "epochs", "max_steps", "batch_size", "eval_batch_size"),
    *("gradient_accumulation", "weight_decay", "warmup", "scheduler", "max_grad_norm", "label_smoothing", "seed"),
    *("data_seed", "keep", "patience", "dtype", "save_steps", "log_steps", "lora_r", "lora_alpha", "lora_dropout"),
    *("gradient_checkpointing", "train_eval_size", "group_by_length"),
)


def check_plan(plan: SweepPlan) -> None:
    """Check data, metrics, model, LoRA's targets, tokenizer, prompts and recipes of all runs, each combination once.

    Raises:
        UserError, OSError: as `hiddenkey.lab.run.train` before it reads the weights.
    """
    alike: dict[str, list[TrainConfig]] = {}
    for config in _configs(plan):
        kind = repr({name: value for name, value in config.to_dict().items() if name not in _FREE})
        alike.setdefault(kind, []).append(config)
    for configs in alike.values():
        _check(configs)


def check_dtypes(plan: SweepPlan) -> None:
    """Check that this machine can train in the types that the plan asks for.

    Raises:
        ConfigError: it cannot.
    """
    for dtype in {config.dtype for config in _configs(plan)}:
        require_dtype(dtype)


def _configs(plan: SweepPlan) -> Iterator[TrainConfig]:
    """Of every run, or of those at the corners of a search that chooses its runs later."""
    for group in plan.groups:
        runs = group.corners() if group.ordered else (slot.run for slot in group.slots if slot.run is not None)
        yield from (run.config for run in runs)


def _check(configs: list[TrainConfig]) -> None:
    config = configs[0]
    examples = load_examples(config)
    task = make_task(examples, config.separator)
    choose_metric(task, config.metric)
    for each in configs:
        refuse_smoothing(examples.task, each.label_smoothing)
    skeleton, tokenizer = check_structure(config, examples, task, dict.fromkeys(each.recipe for each in configs))
    _check_lengths(config, examples, tokenizer, skeleton)
    others = {other.data_seed: other for other in configs if other.data_seed != config.data_seed}
    for other in others.values():
        _check_lengths(other, load_examples(other), tokenizer, skeleton)


def _check_lengths(config: TrainConfig, examples: Examples, tokenizer: Any, skeleton: Any) -> None:
    collect_prompts(config, examples.test, tokenizer, skeleton)
    if examples.task != "causal-lm":
        return  # other tasks cut what is too long
    task = make_task(examples, config.separator)
    for rows in (examples.train, examples.validation, examples.test):
        if rows is not None:
            task.tokenise(rows, tokenizer, config.max_length)
