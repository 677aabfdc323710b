"""From the rows of a source to checked examples: labels, split, subset."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List, Value

from ..errors import DataError
from .config import TrainConfig
from .data_files import PLACE, SEEN, Columns, TaskName, find_columns, read_source, require_columns, values

_SHOWN_ROWS = 10
_MANY_CLASSES = 5
"""More than these, with less than two rows each, are no classes."""
_WHOLE = re.compile(r"^([+-]?\d+)\.0+$")


@dataclass(frozen=True)
class Examples:
    """The parts with the same columns, and the place of each row in the part that was read.

    Classification and regression: `first`, `second` (where there is one) and `label`; causal-lm: `prompt`,
    `completion`, and `seen` where the rows say whether training has their kind. `label_names` are the classes in the
    order of their numbers, empty for the other tasks. columns: where they came from; unread: the other columns.
    """

    task: TaskName
    train: Dataset
    validation: Dataset
    test: Dataset | None
    label_names: tuple[str, ...]
    columns: Columns
    unread: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """A short hash of all rows, part by part."""
        found = hashlib.sha256()
        for rows in (self.train, self.validation, self.test):
            columns = (
                {} if rows is None else {name: values(rows, name) for name in rows.column_names if name != PLACE}
            )
            found.update(json.dumps(columns).encode())
        return found.hexdigest()[:16]


def load_examples(config: TrainConfig) -> Examples:
    """Read, check, split and cut the data of `config`; the same seed gives the same rows.

    Raises:
        DataError: missing columns, rows without text or label, a label unknown to training, too few rows.
        OSError: the data cannot be read.
    """
    train, validation, test = read_source(config)
    columns, names_there = find_columns(config, train), train.column_names
    for rows, part in ((train, "training"), (validation, "validation"), (test, "test")):
        if rows is not None:
            require_columns(rows, [*columns.texts, columns.label], f"{part} data")
            _check_rows(rows, columns, f"{part} data")
    names = _label_names(train, columns.label) if columns.task == "classification" else ()
    train, validation, test = map(_placed, (train, validation, test))
    if validation is None:
        train, validation = _split(train, columns, config)
    train = _subset(train, config.train_size, config.data_seed, "train_size")
    validation = _subset(validation, config.eval_size, config.data_seed, "eval_size")
    return Examples(
        task=columns.task,
        train=_normalise(train, columns, names, "training data"),
        validation=_normalise(validation, columns, names, "validation data"),
        test=None if test is None else _test_part(test, columns, names, config.test_size),
        label_names=names,
        columns=columns,
        unread=tuple(name for name in names_there if name not in (*columns.texts, columns.label, SEEN)),
    )


def _placed(rows: Any) -> Any:
    return None if rows is None else rows.add_column(PLACE, list(range(1, len(rows) + 1)))


def _check_rows(rows: Dataset, columns: Columns, part: str) -> None:
    if len(rows) == 0:
        raise DataError(f"The {part} has no rows.")
    written = columns.task == "causal-lm"
    for name in (*columns.texts, *([columns.label] if written else [])):
        _require_texts(rows.features[name], name, part, lists=written)
    if not written and isinstance(rows.features[columns.label], (List, LargeList)):
        raise DataError(f"Column {columns.label!r} of the {part} holds lists; a row has one label here, not several.")
    texts = {name: values(rows, name) for name in columns.texts}
    for name, found in texts.items():
        _refuse(part, f"no text in column {name!r}", [_is_missing(text, blank=False) for text in found])
    if not written:  # of a pair one text may be empty, and a prompt may be
        blank = [all(_is_missing(text) for text in row) for row in zip(*texts.values(), strict=True)]
        _refuse(part, f"no text in column {' or '.join(map(repr, texts))}", blank)
    labels = values(rows, columns.label)
    if isinstance(rows.features[columns.label], ClassLabel):  # the hub hides the labels of a test part so
        labels = [None if label == -1 else label for label in labels]
    what = "completion" if written else "label"
    _refuse(part, f"no {what} in column {columns.label!r}", list(map(_is_missing, labels)))


def _require_texts(feature: Any, name: str, part: str, lists: bool) -> None:
    """Texts, or lists of them; a number is one too."""
    inner = feature.feature if lists and isinstance(feature, (List, LargeList)) else feature
    dtype = getattr(inner, "dtype", None)
    if not isinstance(inner, (Value, ClassLabel)) or "binary" in str(dtype):
        raise DataError(f"Column {name!r} of the {part} was read as {dtype or type(inner).__name__}, not as texts.")


def _is_missing(value: Any, blank: bool = True) -> bool:
    """Nothing, NaN, or, if `blank` counts too, a text of spaces; of a list any item."""
    if isinstance(value, list):
        return any(_is_missing(item, blank) for item in value)
    return value is None or value != value or (blank and isinstance(value, str) and not value.strip())


def _refuse(part: str, fault: str, found: list[bool]) -> None:
    rows = [str(place) for place, wrong in enumerate(found, 1) if wrong]
    if rows:
        shown = ", ".join(rows[:_SHOWN_ROWS])
        more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
        raise DataError(
            f"The {part} has {fault} in {len(rows)} rows: {shown}{more} (counted from 1, without a header). "
            "Fill these rows or take them out."
        )


def _split(rows: Dataset, columns: Columns, config: TrainConfig) -> tuple[Dataset, Dataset]:
    groups = _groups(rows, columns)
    held_out = max(1, round(config.validation_fraction * len(groups)))
    if held_out >= len(groups):
        raise DataError(
            f"{len(rows)} rows ({len(groups)} of them different) cannot be split into training and validation; give "
            "more rows."
        )
    parts = Dataset.from_dict({"rows": groups}).train_test_split(test_size=held_out, seed=config.data_seed)
    train, validation = ([i for group in values(parts[name], "rows") for i in group] for name in ("train", "test"))
    return rows.select(train), rows.select(validation)


def _groups(rows: Dataset, columns: Columns) -> list[list[int]]:
    """Numbers of the rows that belong together: the references of one prompt, and every other row by itself."""
    if columns.task != "causal-lm":
        return [[i] for i in range(len(rows))]
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(values(rows, columns.texts[0])):
        groups.setdefault(_prompt(prompt), []).append(i)
    return list(groups.values())


def _test_part(rows: Dataset, columns: Columns, names: tuple[str, ...], size: int) -> Dataset:
    # Chosen without a seed of the run: all runs are compared on the same rows.
    groups = _groups(rows, columns)
    chosen = values(_subset(Dataset.from_dict({"rows": groups}), size, 0, "test_size"), "rows")
    return _normalise(rows.select([i for group in chosen for i in group]), columns, names, "test data")


def _subset(rows: Dataset, size: int, seed: int, field: str) -> Dataset:
    if size > len(rows):
        raise DataError(f"{field} = {size}, but there are {len(rows)} rows; give {len(rows)} or fewer, or 0 for all.")
    return rows.shuffle(seed=seed).select(range(size)) if size else rows


def _label_names(rows: Dataset, column: str) -> tuple[str, ...]:
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(map(_canonical, feature.names))
    names = {_canonical(value) for value in values(rows, column)}
    if len(names) < 2:
        raise DataError(f"Column {column!r} holds one label only, {names.pop()!r}; classification needs two or more.")
    if len(names) > _MANY_CLASSES and len(names) > len(rows) / 2:
        raise DataError(
            f"Column {column!r} holds {len(names)} different labels in {len(rows)} rows: too many for classes. "
            "Give --task regression or another --label-column."
        )
    return tuple(sorted(names, key=_numbers_first))


def _canonical(value: Any) -> str:
    # A table program may have given whole numbers a ".0" in one file and not in another.
    return _WHOLE.sub(r"\1", str(value).strip())


def _numbers_first(name: str) -> tuple[int, float, str]:
    try:
        number = float(name)
    except ValueError:
        return (1, 0.0, name)
    return (0, number, name) if math.isfinite(number) else (1, 0.0, name)  # NaN has no place in an order


def _normalise(rows: Dataset, columns: Columns, names: tuple[str, ...], part: str) -> Dataset:
    if columns.task == "causal-lm":
        return _pairs(rows, columns)
    fields: dict[str, list[Any]] = {"first": [str(text) for text in values(rows, columns.texts[0])]}
    if len(columns.texts) == 2:
        fields["second"] = [str(text) for text in values(rows, columns.texts[1])]
    labels = values(rows, columns.label)
    fields["label"] = (
        _scores(labels, columns, part)
        if columns.task == "regression"
        else _classes(labels, rows, columns, names, part)
    )
    fields[PLACE] = values(rows, PLACE)
    return Dataset.from_dict(fields)


def _pairs(rows: Dataset, columns: Columns) -> Dataset:
    named = {"prompt": columns.texts[0], "completion": columns.label, PLACE: PLACE, **_marks(rows)}
    pairs: dict[str, list[Any]] = {name: [] for name in named}
    for prompt, completion, *marks in zip(*(values(rows, column) for column in named.values()), strict=True):
        for target in completion if isinstance(completion, list) else [completion]:
            for name, value in zip(pairs, (_prompt(prompt), str(target), *marks), strict=True):
                pairs[name].append(value)
    if not pairs["completion"]:
        raise DataError(f"Every list in column {columns.label!r} is empty; every part needs completions.")
    return Dataset.from_dict(pairs)


def _marks(rows: Dataset) -> dict[str, str]:
    return {SEEN: SEEN} if getattr(rows.features.get(SEEN), "dtype", "") == "bool" else {}


def _prompt(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _scores(labels: list[Any], columns: Columns, part: str) -> list[float]:
    try:
        scores = [float(label) for label in labels]
    except (TypeError, ValueError) as error:
        raise DataError(f"Column {columns.label!r} holds something that is not a number: {error}.") from error
    if not all(map(math.isfinite, scores)):
        raise DataError(f"Column {columns.label!r} holds a score that is not finite.")
    if part == "training data" and len(set(scores)) == 1:
        raise DataError(f"Column {columns.label!r} of the {part} holds one score only, {scores[0]:g}: none to learn.")
    return scores


def _classes(labels: list[Any], rows: Dataset, columns: Columns, names: tuple[str, ...], part: str) -> list[int]:
    feature = rows.features[columns.label]
    if isinstance(feature, ClassLabel):  # its numbers are those of this part's own list of names
        labels = feature.int2str(labels)
    number = {name: index for index, name in enumerate(names)}
    found = [_canonical(label) for label in labels]
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(
            f"The {part} has labels that training has not: {', '.join(unknown)}; training has {', '.join(names)}."
        )
    return [number[name] for name in found]
