"""What is read and checked before a run, and before the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from datasets import Dataset
from rich.console import Console

import hiddenkey

from ..consistency import CONSISTENCIES
from ..errors import ConfigError
from ..hf.structure import read
from ..recipe import Recipe, parse
from .config import TrainConfig
from .console import say
from .data import Examples, load_examples
from .data_files import values
from .generation import Prompt, collect_prompts
from .model import build_skeleton, embedded_tokens, find_targets, load_tokenizer, model_options, require_quantizer
from .tasks import Task, choose_metric, make_task, refuse_smoothing, start_token


@dataclass(frozen=True)
class Checked:
    """What the checks before a run have found."""

    examples: Examples
    task: Task
    metric: str
    tokenizer: Any
    train: Dataset
    validation: Dataset
    test: Dataset | None
    prompts: list[Prompt]

    @property
    def row_counts(self) -> dict[str, int]:
        """How many rows each part has."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: len(rows) for name, rows in parts.items() if rows is not None}

    @cached_property
    def train_lengths(self) -> list[int]:
        """Tokens of every training row."""
        return _lengths(self.train)

    def evaluated(self, config: TrainConfig) -> dict[str, Dataset]:
        """What the model is evaluated on after every epoch: the validation part, and some of the training rows."""
        parts = {"validation": self.validation}
        size = min(config.train_eval_size, len(self.train))
        if size:
            parts["train"] = _by_length(self.train.shuffle(seed=config.data_seed).select(range(size)))
        return parts


def check_run(config: TrainConfig, recipe: Recipe) -> Checked:
    """Read the data and the model's structure, and check that all of it fits together.

    Raises:
        ConfigError, DataError: see `hiddenkey.errors`.
        PlanError: the recipe finds no site in this model.
        OSError: a model or data that cannot be read.
    """
    examples = load_examples(config)
    task = make_task(examples, config.separator)
    metric = choose_metric(task, config.metric)
    refuse_smoothing(examples.task, config.label_smoothing)
    skeleton, tokenizer = check_structure(config, examples, task, [recipe])
    train_rows = task.tokenise(examples.train, tokenizer, config.max_length)
    require_known(train_rows, tokenizer, config.model)
    validation = task.tokenise(examples.validation, tokenizer, config.max_length)
    test = None
    if examples.test is not None:
        test = _by_length(task.tokenise(examples.test, tokenizer, config.max_length))
    for rows in filter(None, (train_rows, validation, test)):
        require_embedded(rows, tokenizer, skeleton, config.model)
    prompts = collect_prompts(config, examples.test, tokenizer, skeleton)
    return Checked(examples, task, metric, tokenizer, train_rows, _by_length(validation), test, prompts)


def check_structure(
    config: TrainConfig, examples: Examples, task: Task, recipes: Iterable[str | Recipe]
) -> tuple[Any, Any]:
    """The model without its weights, and its tokenizer, once LoRA and every recipe have found a place there.

    Raises:
        ConfigError: no such layers for LoRA, no usable tokenizer, a consistency that is not for this task, or a
            package that the weights need.
        PlanError: a recipe finds no site in this model.
        OSError: no such model.
    """
    skeleton = build_skeleton(config.model, task.model_class, config.trust_remote_code, **model_options(config, task))
    require_quantizer(config.model, skeleton.config)
    find_targets(skeleton, config.target_modules)
    if examples.task == "causal-lm":
        _require_causal(skeleton, config.model)
    for recipe in map(parse, recipes):
        _refuse_consistency(recipe, examples.task)
        hiddenkey.plan(skeleton, recipe)
    return skeleton, load_tokenizer(config, skeleton)


def _require_causal(skeleton: Any, name: str) -> None:
    # transformers puts a language model's head on an encoder too, which then reads what it is to write.
    stacks = read(skeleton).stacks
    if stacks and not any(stack.causal for stack in stacks):
        raise ConfigError(
            f"{name} is an encoder ({type(skeleton).__name__}): each place sees the tokens after it, so it cannot "
            "learn to write. Give a causal language model, or data with labels."
        )


def require_known(rows: Dataset, tokenizer: Any, name: str) -> None:
    """Raises ConfigError for tokenised rows of which the tokenizer knows less than half."""
    if tokenizer.unk_token_id is None:
        return
    special, counts = set(tokenizer.all_special_ids), Counter(chain.from_iterable(values(rows, "input_ids")))
    unknown = counts[tokenizer.unk_token_id]
    known = sum(count for token, count in counts.items() if token not in special)
    if unknown > max(known, len(rows)):
        raise ConfigError(
            f"The tokenizer of {name} does not know {unknown} of {unknown + known} tokens of the training "
            "data; it is not that of these texts, or not that of the model."
        )


def require_embedded(rows: Dataset, tokenizer: Any, model: Any, name: str) -> None:
    """Raises ConfigError for tokenised rows with a token that the model has no vector for."""
    last, known = max(chain.from_iterable(values(rows, "input_ids"))), embedded_tokens(model)
    if last >= known:
        raise ConfigError(
            f"In the tokenizer of {name} the token {tokenizer.convert_ids_to_tokens(last)!r} has the number {last}, "
            f"but the model has vectors for {known} tokens, numbered from 0. Put the model's own tokenizer there, or "
            "save the model again after model.resize_token_embeddings(len(tokenizer))."
        )


def _refuse_consistency(recipe: Recipe, task: str) -> None:
    if recipe.consistency is not None and CONSISTENCIES[recipe.consistency].scalar and task != "regression":
        raise ConfigError(
            f"'{recipe}': the consistency {recipe.consistency!r} compares predictions of a regression, and this task "
            f"is {task}; use kl."
        )


def _lengths(rows: Dataset) -> list[int]:
    return [len(ids) for ids in values(rows, "input_ids")]


def _by_length(rows: Dataset) -> Dataset:
    # Evaluation does not mind the order, and rows of like length need little padding.
    lengths = _lengths(rows)
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__))


_SHOWN = 10
_FEW = 20
"""Rows below which a metric over them says little."""


def tell(checked: Checked, config: TrainConfig, recipe: Recipe, console: Console) -> None:
    """A line for each."""
    lines = [describe(checked.examples), _counts(checked.row_counts), *doubts(checked, config, recipe)]
    for line in lines:
        say(console, line)


def describe(examples: Examples) -> str:
    """One line on what is learnt from which columns."""
    columns, names = examples.columns, examples.label_names
    classes = f" ({_listed(names)})" if names else ""
    unread = f"; not read: {', '.join(examples.unread)}" if examples.unread else ""
    return f"{examples.task}: {columns.label!r}{classes} from {' and '.join(map(repr, columns.texts))}{unread}."


def doubts(checked: Checked, config: TrainConfig, recipe: Recipe) -> Iterator[str]:
    """What is allowed, and is seldom meant."""
    full = checked.train_lengths.count(config.max_length)
    if full:
        yield f"{full} of {len(checked.train)} training rows fill max_length = {config.max_length} and may be cut."
    if len(checked.validation) < _FEW:
        yield f"The epoch is chosen on {_rows(len(checked.validation))} alone, which says little of others."
    for part, rows in (("training", checked.examples.train), ("validation", checked.examples.validation)):
        missing = _missing_classes(checked.examples.label_names, rows)
        if missing:
            yield f"No {part} row is of class {_listed(missing)}."
    yield from _marks_in_texts(checked)
    if checked.examples.task == "causal-lm" and checked.tokenizer.chat_template:
        yield (
            f"{config.model} has a chat template, which is not applied: prompts are read as they stand in the "
            "data. Ask the adapter in the same form, or render the prompts with the template before training."
        )
    steps = _steps(config, len(checked.train))
    warmup = config.warmup if config.warmup >= 1 else math.ceil(config.warmup * steps)
    if warmup >= steps:
        yield (
            f"Warm-up takes {warmup:g} of {steps} steps, so the learning rate never gets to {config.learning_rate:g} "
            "(the first step's is 0); give --warmup 0, or more steps."
        )
    if is_idle(recipe, config):
        yield f"'{recipe}' compares two views that are the same: nothing is drawn, so its consistency is 0."


def _marks_in_texts(checked: Checked) -> Iterator[str]:
    rows, tokenizer, writes = checked.examples.train, checked.tokenizer, checked.examples.task == "causal-lm"
    start, end = start_token(tokenizer), tokenizer.eos_token
    texts = values(rows, "prompt" if writes else "first")
    started = sum(text.startswith(start) for text in texts) if start else 0
    if started and tokenizer("x")["input_ids"][:1] == [tokenizer.convert_tokens_to_ids(start)]:
        yield (
            f"{_rows(started)} of training begin with the start token {start!r}, which the tokenizer adds too; one "
            "of the two is used."
        )
    ended = sum(text.endswith(end) for text in values(rows, "completion")) if end and writes else 0
    if ended:
        yield f"{_rows(ended)} of training end in the end mark {end!r}, which is added too; one of the two is used."


def is_idle(recipe: Recipe, config: TrainConfig) -> bool:
    """Whether a consistency has nothing to tell apart, with the model's own dropouts off."""
    draws = config.lora_dropout or config.neftune_alpha or any(drop.p > 0 for drop in recipe.drops)
    return recipe.consistency is not None and not draws


def _counts(rows: dict[str, int]) -> str:
    test = _rows(rows["test"]) if "test" in rows else "none"
    return f"{_rows(rows['train'])} to learn from, {rows['validation']} to choose the epoch by, {test} to test on."


def _steps(config: TrainConfig, rows: int) -> int:
    """As the Trainer counts them."""
    a_epoch = math.ceil(math.ceil(rows / config.batch_size) / config.gradient_accumulation)
    return config.max_steps or config.epochs * a_epoch


def _missing_classes(names: tuple[str, ...], rows: Dataset) -> list[str]:
    there = set(values(rows, "label")) if names else set()
    return [name for number, name in enumerate(names) if number not in there]


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _rows(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")
