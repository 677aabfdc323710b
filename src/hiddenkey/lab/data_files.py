"""Where rows come from: files, folders and the hub."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, load_dataset
from pyarrow import ArrowException
from pyarrow.parquet import read_table

from ..errors import DataError
from .config import TrainConfig
from .data_splits import Places, choose_parts, local_parts, require_files
from .hub import GLUE_SET

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


csv.field_size_limit(2**31 - 1)  # a text may have more than the 131,072 characters that are the default

_WAYS_OUT = "A quote inside a quoted text is written twice; or save the rows as .jsonl or .parquet."


def read_records(file: Path) -> list[tuple[int, list[str]]]:
    """The number of its last line and the fields, all texts, of every row; blank lines are left out.

    Raises:
        DataError: a quoted text that does not end before a comma or a line break, or one that holds other rows.
        UnicodeDecodeError: the file is not UTF-8.
    """
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = stream.readlines()
    tab = file.suffix.lower() == ".tsv"
    kind: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {"strict": True}
    reader = csv.reader(lines, **kind)
    found: list[tuple[int, list[str]]] = []
    several: dict[int, list[list[str]]] = {}  # the fields of each line of a row of several, by its first line
    known: dict[int, set[str]] = defaultdict(set)
    end = 0
    try:
        for fields in reader:
            start, end = end, reader.line_num
            if fields:
                found.append((end, fields))
            if end > start + 1:
                several[start] = list(filter(None, csv.reader(lines[start:end], quoting=csv.QUOTE_NONE)))
            else:
                for place, value in enumerate(fields):
                    known[place].add(value)
    except csv.Error as error:
        raise DataError(
            f"{file}, line {end + 1}: a quoted text goes wrong in line {reader.line_num}: {error}. {_WAYS_OUT}"
        ) from error
    # A text of several lines may have commas of its own. Lines are rows where a column, the labels, goes on in them.
    for start, pieces in several.items():
        if len({len(piece) for piece in pieces}) == 1 and len(pieces[0]) > 1:
            for place, values in enumerate(zip(*pieces, strict=True)):
                if all(value in known[place] or NUMBER.fullmatch(value) for value in values):
                    raise DataError(
                        f"{file}, line {start + 1}: a quoted text takes {len(pieces)} rows into itself. "
                        f"Take the stray quote out. {_WAYS_OUT}"
                    )
    return found


# GLUE's CoLA files have no header line.
_COLA = re.compile(r"\w+\t[01]\t\*?\t[^\t]+")
_COLA_COLUMNS = ("source", "label", "star", "sentence")


def read_source(config: TrainConfig) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """The rows of the training part, and of the validation and test parts where there are such.

    Raises:
        DataError: a format that is not known, a part that is missing, or one that would be used twice.
        OSError: a file or a hub data set that cannot be read.
    """
    hub: dict[str, Dataset] = {}
    parts = local_parts(config)
    if parts is None:
        hub = _load_hub(config)
        parts = choose_parts({name: (name,) for name in hub}, config)

    def read(places: Places) -> Dataset:
        return hub[places[0]] if places[0] in hub else _read_files(places, config)

    return (
        read(parts.train),
        read(parts.validation) if parts.validation else None,
        read(parts.test) if parts.test else None,
    )


def _read_files(places: Places, config: TrainConfig) -> Dataset:
    require_files(places)
    suffix = Path(places[0]).suffix.lower()
    tables = suffix in (".csv", ".tsv")
    if config.column_names and not tables:
        raise _names_itself(places[0])
    try:
        if suffix == ".parquet":
            return Dataset(read_table(list(places), partitioning=None))
        read = _table_rows if tables else _json_rows
        rows = [row for place in places for row in read(Path(place), config)]
        columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))}
        found = Dataset.from_dict(_with_scores(columns, config) if tables and config.task == "auto" else columns)
    except DataError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        ways_out = {UnicodeDecodeError: "Save it as UTF-8.", ArrowException: "A column has values of one type."}
        way_out = next((way for kind, way in ways_out.items() if isinstance(error, kind)), "")
        raise DataError(f"{', '.join(places)} cannot be read: {error} {way_out}".rstrip()) from error
    if not rows:
        raise DataError(f"{', '.join(places)} has no rows.")
    return found


def _json_rows(file: Path, _: TrainConfig) -> list[dict[str, Any]]:
    """One object a line, or a list of objects."""
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        text = "[" + ",\n".join(filter(str.strip, text.split("\n"))) + "]"
    try:
        rows: list[dict[str, Any]] = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file} cannot be read: it is no JSON, {error}.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file} cannot be read: a row of JSON is an object, {{...}}.")
    return rows


def _table_rows(file: Path, config: TrainConfig) -> list[dict[str, str]]:
    """Texts stay as they are: 007 and 7.50 are no numbers, and NA is a text."""
    header, *rows = records = read_records(file) or [(1, [])]
    names = config.column_names
    if not names and file.suffix.lower() == ".tsv" and _COLA.fullmatch("\t".join(header[1])):
        names = _COLA_COLUMNS
    if names and [name.strip().lower() for name in header[1]] == [name.lower() for name in names]:
        raise DataError(f"{file} has a header line, {', '.join(names)}; leave out column_names.")
    rows, names = (records, names) if names else (rows, tuple(header[1]))
    twice = sorted({name for name in names if names.count(name) > 1 and name.strip()})
    if twice:
        raise DataError(f"{file} has two columns named {', '.join(map(repr, twice))}; rename one of them.")
    for line, fields in rows:
        if len(fields) > len(names):
            raise DataError(
                f"{file} has {len(names)} column names ({', '.join(names)}), but {len(fields)} fields in line {line}:"
                f" {', '.join(map(repr, fields))}. Name every column; --column-names, where no header line does."
            )
    # A table program leaves out empty fields at the end of a line.
    return [
        {name: text for name, text in zip_longest(names, fields, fillvalue="") if name.strip()} for _, fields in rows
    ]


def _with_scores(columns: dict[str, list[Any]], config: TrainConfig) -> dict[str, list[Any]]:
    """A .csv says no types: labels that are all numbers, and not all whole ones, are scores; others stay texts."""
    name = config.label_column or usual_label(tuple(columns))
    if name in columns and name not in (*config.text_columns, config.completion_column):
        texts = [(text or "").strip() for text in columns[name]]
        if any(map(FRACTION.fullmatch, texts)) and all(NUMBER.fullmatch(text) for text in texts if text):
            return columns | {name: [float(text) if text else None for text in texts]}
    return columns


def _names_itself(data: str) -> DataError:
    return DataError(f"column_names are for .csv and .tsv files; {data} names its columns itself.")


def _load_hub(config: TrainConfig) -> DatasetDict:
    path, name = config.data, config.data_config or None
    if config.column_names:
        raise _names_itself(config.data)
    if config.data.startswith("glue/"):
        if name:
            raise DataError(
                f"data_config = {name!r}, but {config.data} names its configuration already; leave it out."
            )
        path, name = GLUE_SET, config.data.removeprefix("glue/")
    try:
        return load_dataset(path, name)
    except ValueError as error:  # of several configurations none is named, or one that is not there
        raise DataError(f"{config.data} cannot be read: {error} Name a configuration with --data-config.") from error
