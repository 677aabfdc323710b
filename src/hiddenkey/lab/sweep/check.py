"""Before anything long starts: the data is read, and every recipe is planned on a model without weights."""

from __future__ import annotations

from typing import Any

import hiddenkey

from ..config import TrainConfig
from ..data import load_examples
from ..models import find_targets, load_tokenizer
from ..skeleton import build_skeleton
from ..tasks import choose_metric, make_task
from .plan import Plan

# What neither the data nor the structure of a model depends on.
_FREE = (
    *("out", "overwrite", "recipe", "learning_rate", "epochs", "max_steps", "batch_size", "eval_batch_size"),
    *("gradient_accumulation", "weight_decay", "warmup", "scheduler", "max_grad_norm", "label_smoothing", "seed"),
    *("data_seed", "keep", "patience", "dtype", "save_steps", "log_steps", "lora_r", "lora_alpha", "lora_dropout"),
    *("gradient_checkpointing", "train_eval_size"),
)


def check_plan(plan: Plan) -> None:
    """Check data, metric, model, LoRA's targets, tokenizer and recipes of all runs, each combination once.

    Raises:
        UserError, OSError: as `hiddenkey.lab.run.train` before it reads the weights.
    """
    configs: dict[Any, dict[str, TrainConfig]] = {}
    for group in plan.groups:
        runs = group.corners() if group.ordered else (slot.run for slot in group.slots if slot.run is not None)
        for run in runs:
            values = run.config.to_dict()
            kind = repr({name: value for name, value in values.items() if name not in _FREE})
            configs.setdefault(kind, {})[run.config.recipe] = run.config
    for recipes in configs.values():
        _check(recipes)


def _check(recipes: dict[str, TrainConfig]) -> None:
    config = next(iter(recipes.values()))
    examples = load_examples(config)
    task = make_task(examples, config.separator)
    choose_metric(task, config.metric)
    skeleton = build_skeleton(config.model, task.model_class, config.trust_remote_code, **task.model_options())
    find_targets(skeleton, config.target_modules)
    load_tokenizer(config, skeleton)
    for recipe in recipes:
        hiddenkey.plan(skeleton, recipe)
