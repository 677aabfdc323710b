"""What a person is told of a run before it begins: what is learnt from which rows, and what may be a mistake."""

from __future__ import annotations

import math
from collections.abc import Iterator

from datasets import Dataset
from rich.console import Console

from ..recipe import Recipe
from .checked import Checked
from .columns import values
from .config import TrainConfig
from .data import Examples
from .say import say

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
    if checked.examples.task == "causal-lm":
        yield from _marks_in_texts(checked)
        if checked.tokenizer.chat_template:
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
    rows, tokenizer = checked.examples.train, checked.tokenizer
    start, end = tokenizer.bos_token, tokenizer.eos_token
    started = sum(text.startswith(start) for text in values(rows, "prompt")) if start else 0
    if started and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        yield (
            f"{_rows(started)} of training begin with the start token {start!r}, which the tokenizer adds too; one "
            "of the two is used."
        )
    ended = sum(text.endswith(end) for text in values(rows, "completion")) if end else 0
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
