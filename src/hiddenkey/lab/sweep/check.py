"""Before anything long starts: data is read and measured, and every recipe is planned on a model without weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..checked import check_structure, require_embedded, require_known
from ..config import FIELD_TYPES, TrainConfig, complete
from ..data import Examples, load_examples
from ..errors import RunError
from ..generation import collect_prompts
from ..models import require_dtype
from ..tasks import choose_metric, make_task, refuse_smoothing
from .plan import SweepPlan
from .record import RunRecord

# What neither the data nor the structure of a model depends on; the data of every data_seed is checked.
_FREE = (
    *("out", "overwrite", "recipe", "learning_rate", "epochs", "max_steps", "batch_size", "eval_batch_size"),
    *("gradient_accumulation", "weight_decay", "warmup", "scheduler", "max_grad_norm", "label_smoothing", "seed"),
    *("data_seed", "keep", "patience", "dtype", "save_steps", "log_steps", "lora_r", "lora_alpha", "lora_dropout"),
    *("gradient_checkpointing", "train_eval_size", "group_by_length"),
)


def check_plan(plan: SweepPlan, made: Iterable[RunRecord] = ()) -> None:
    """Check data, metrics, model, LoRA's targets, tokenizer, prompts and recipes of all runs, each combination once.

    made: records that there are already; their rows must be those that the others will have.

    Raises:
        RunError: the data have changed since some runs were made.
        UserError, OSError: as `hiddenkey.lab.run.train` before it reads the weights.
    """
    rows = {(_kind(record.config), record.config["data_seed"]): record for record in made if record.data_digest}
    alike: dict[str, list[TrainConfig]] = {}
    for config in _configs(plan):
        alike.setdefault(_kind(config.to_dict()), []).append(config)
    for kind, configs in alike.items():
        _check(configs, {seed: record for (other, seed), record in rows.items() if other == kind})


def _kind(config: Mapping[str, Any]) -> str:
    whole = complete(config)
    return json.dumps({name: whole[name] for name in FIELD_TYPES if name not in _FREE})


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
        yield from (run.config for run in group.known_runs())


def _check(configs: list[TrainConfig], made: Mapping[int, RunRecord]) -> None:
    config = configs[0]
    examples = load_examples(config)
    _require_same_rows(config, examples, made)
    task = make_task(examples, config.separator)
    choose_metric(task, config.metric)
    for each in configs:
        refuse_smoothing(examples.task, each.label_smoothing)
    skeleton, tokenizer = check_structure(config, examples, task, dict.fromkeys(each.recipe for each in configs))
    rows = task.tokenise(examples.train, tokenizer, config.max_length)
    require_known(rows, tokenizer, config.model)
    require_embedded(rows, tokenizer, skeleton, config.model)
    _check_lengths(config, examples, tokenizer, skeleton)
    others = {other.data_seed: other for other in configs if other.data_seed != config.data_seed}
    for other in others.values():
        examples = load_examples(other)
        _require_same_rows(other, examples, made)
        _check_lengths(other, examples, tokenizer, skeleton)


def _require_same_rows(config: TrainConfig, examples: Examples, made: Mapping[int, RunRecord]) -> None:
    record = made.get(config.data_seed)
    if record is not None and record.data_digest != examples.digest:
        raise RunError(
            f"the rows of {config.data} with data_seed = {config.data_seed} are no longer those of {record.id}, "
            "which is made already: the files, or the versions of the libraries that read them, have changed. Bring "
            "the old ones back, or give another --out, and all runs are made anew."
        )


def _check_lengths(config: TrainConfig, examples: Examples, tokenizer: Any, skeleton: Any) -> None:
    collect_prompts(config, examples.test, tokenizer, skeleton)
    if examples.task != "causal-lm":
        return  # other tasks cut what is too long
    task = make_task(examples, config.separator)
    for rows in (examples.train, examples.validation, examples.test):
        if rows is not None:
            task.tokenise(rows, tokenizer, config.max_length)
