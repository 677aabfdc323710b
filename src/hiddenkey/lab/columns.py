"""Which columns hold the texts and the labels, and so what the task is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from .config import TrainConfig
from .errors import DataError

TaskName = Literal["classification", "regression", "causal-lm"]

# Usual names, the first that is there wins; capitals and spaces around them do not matter.
PROMPT_COMPLETION = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("mr", "ref"),
    ("triples", "texts"),
)
TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 string", "#2 string"),
    ("sentence",),
    ("text",),
)
LABELS = ("label", "labels", "score", "target", "quality")
_LABELLED = ("texts and labels", "such as text and label", "--text-columns and --label-column")
_WRITTEN = ("prompts and completions", "such as prompt and completion", "--prompt-column and --completion-column")
# Up to so many different values may be classes: numbers that a table program has given a ".0", or texts of a column
# without a usual name.
_FEW_CLASSES = 20
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
FRACTION = re.compile(r"[+-]?\d*\.\d*(e[+-]?\d+)?", re.IGNORECASE)
_CHATS = {"messages", "conversations", "conversation"}
# Says of a row of WebNLG's test part whether training had its category.
SEEN = "seen"
# The place of a row in its part as it was read, from 1: messages name it after a split too.
PLACE = "place in its part"


@dataclass(frozen=True)
class Columns:
    """The task and its columns: one or two texts and a label, or prompt and completion."""

    task: TaskName
    texts: tuple[str, ...]
    label: str


def values(rows: Dataset, column: str) -> list[Any]:
    """A whole column, read at once: to iterate over `rows[column]` reads it row by row, 14 times slower."""
    found: list[Any] = rows[column][:]
    return found


def find_columns(config: TrainConfig, rows: Dataset) -> Columns:
    """The columns given in `config`, or those of the usual names.

    Raises:
        DataError: a column is missing, or none has a usual name.
    """
    fields = (*config.text_columns, config.label_column, config.prompt_column, config.completion_column)
    given = [name for name in fields if name]
    require_columns(rows, given, "training data")
    if len(set(given)) < len(given):
        raise DataError(f"A column is named twice: {', '.join(map(repr, given))}; a text is not its own label.")
    if config.prompt_column:
        return Columns("causal-lm", (config.prompt_column,), config.completion_column)
    labelled = bool(config.text_columns or config.label_column)
    pair = None if labelled else _first(PROMPT_COMPLETION, rows.column_names)
    if config.task == "causal-lm":
        if pair is None:
            raise _not_found([_WRITTEN], rows, config)
        return _written(pair, rows)
    texts = config.text_columns or _first(TEXTS, rows.column_names)
    label = config.label_column or usual_label(rows.column_names)
    if texts and label in texts:
        raise DataError(
            f"Column {label!r} would be text and label; name the others with --text-columns or --label-column."
        )
    if texts and label:
        task = config.task if config.task != "auto" else _task_of(rows, label)
        return Columns(task, texts, label)
    if pair and config.task == "auto":
        return _written(pair, rows)
    if not given and config.task != "regression":
        found = _text_and_classes(rows)
        if found:
            return found
    raise _not_found([_LABELLED] if labelled or config.task != "auto" else [_LABELLED, _WRITTEN], rows, config)


def _written(pair: tuple[str, ...], rows: Dataset) -> Columns:
    # Alpaca's third column is a part of the prompt in the rows that have one.
    third = _first((("instruction", "input"),), rows.column_names)
    filled = sum(map(bool, values(rows, third[1]))) if third and third[0] == pair[0] else 0
    if third and filled:
        raise DataError(
            f"The column {third[1]!r} holds text in {filled} rows, and is not read beside {third[0]!r}: put both "
            "into one column and name that with --prompt-column."
        )
    return Columns("causal-lm", pair[:1], pair[1])


def require_columns(rows: Dataset, names: list[str], part: str) -> None:
    """Raises DataError naming the columns of `names` that `rows` lacks, and those that it has."""
    missing = [name for name in names if name not in rows.column_names]
    if missing:
        has = ", ".join(rows.column_names)
        raise DataError(f"The {part} has no column {', '.join(map(repr, missing))}; its columns are: {has}.")


def _first(candidates: tuple[tuple[str, ...], ...], names: Sequence[str]) -> tuple[str, ...] | None:
    there = {name.strip().lower(): name for name in names} | {name: name for name in names}
    usual = next((found for found in candidates if set(found) <= set(there)), None)
    return usual and tuple(there[name] for name in usual)


def usual_label(names: Sequence[str]) -> str:
    """The column of a usual name for labels; empty where there is none."""
    found = _first(tuple((name,) for name in LABELS), names)
    return found[0] if found else ""


def _text_and_classes(rows: Dataset) -> Columns | None:
    """Two columns of any names, of which one alone can hold classes: few values, each of them often."""
    if len(rows.column_names) != 2:
        return None
    labels = [name for name in rows.column_names if _holds_classes(name, values(rows, name))]
    if len(labels) != 1:
        return None
    text = next(name for name in rows.column_names if name != labels[0])
    return Columns("classification", (text,), labels[0])


def _holds_classes(name: str, found: list[Any]) -> bool:
    if not all(isinstance(value, (str, int)) for value in found):
        return False
    kinds = set(map(str, found))
    # Without a header line the name is the label of the first row; and scores are numbers with a point.
    return 2 <= len(kinds) <= min(_FEW_CLASSES, len(found) // 4) and not any(
        kind == name or FRACTION.fullmatch(kind) for kind in kinds
    )


def _task_of(rows: Dataset, label: str) -> TaskName:
    feature = rows.features[label]
    if not getattr(feature, "dtype", "").startswith("float"):
        return "classification"
    found = sorted({value for value in values(rows, label) if value is not None and value == value})
    if len(found) <= _FEW_CLASSES and all(value.is_integer() for value in found):
        raise DataError(
            f"Column {label!r} holds whole numbers, written as {', '.join(map(str, found))}: classes or scores? "
            "Say --task classification or --task regression."
        )
    return "regression"


def _not_found(kinds: list[tuple[str, str, str]], rows: Dataset, config: TrainConfig) -> DataError:
    usual = "; ".join(f"{what} ({names}): name them with {flags}" for what, names, flags in kinds)
    has = ", ".join(rows.column_names)
    return DataError(f"No columns of a usual name for {usual}. The columns are: {has}.{_guess(rows, config)}")


def _guess(rows: Dataset, config: TrainConfig) -> str:
    names = rows.column_names
    if len(names) == 1 and re.search(r"[;\t]", names[0]):
        return " They look like one line with other separators: a .csv has commas, a .tsv tabs."
    if chats := _CHATS & set(names):
        return (
            f" Messages, in {chats.pop()!r}, need a chat template: train on them with TRL (docs/trainers.md), or "
            "write them as two columns, prompt and completion."
        )
    if config.data.lower().endswith((".csv", ".tsv")) or Path(config.data).expanduser().is_dir():
        return " Where these are data, the file (.csv, .tsv) has no header line: give --column-names."
    return ""
