"""Where rows come from: files, folders and the hub, all read by the `datasets` library."""

from __future__ import annotations

import csv
import glob
import re
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError

from .columns import FRACTION, SEEN, usual_label, values
from .config import TrainConfig
from .errors import DataError
from .hub import GLUE_SET
from .parts import FORMATS, Places, choose_parts, local_parts, require_files
from .quotes import require_closed_quotes

# GLUE's CoLA files have no header line.
_COLA = re.compile(r"\w+\t[01]\t\*?\t[^\t]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_COLA_COLUMNS = ("source", "label", "star", "sentence")

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")


@dataclass(frozen=True)
class Source:
    """Rows as they were read: the training part, and the validation and test parts where there are such."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None


def read_source(config: TrainConfig) -> Source:
    """Read `config.data`, and `config.validation` and `config.test` where they are given.

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

    train = read(parts.train)
    return Source(
        train,
        read(parts.validation) if parts.validation else None,
        read(parts.test) if parts.test else None,
    )


def _read_files(places: Places, config: TrainConfig) -> Dataset:
    require_files(places)
    files = [Path(place) for place in places]
    suffix = files[0].suffix.lower()
    options: dict[str, Any] = {}
    for file in files if FORMATS[suffix] == "csv" else ():
        options = _csv_options(file, config)
    names = [str(file.resolve()) for file in files]
    if config.column_names and FORMATS[suffix] != "csv":
        raise _names_itself(names[0])
    patterns = {"train": [glob.escape(name) for name in names]}
    try:
        # `datasets` would give out what it read before from a file of this name and time, whatever stands in it now.
        Path(HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HF_DATASETS_CACHE, ignore_cleanup_errors=True) as cache:
            reader: dict[str, Any] = {"split": "train", "cache_dir": cache, "keep_in_memory": True}
            rows = load_dataset(FORMATS[suffix], data_files=patterns, **reader, **options)
    except (DatasetGenerationError, ValueError) as error:
        # `datasets` says so of a file with a header and no rows as well.
        cause = error.__cause__ or error
        way_out = " Save it as UTF-8." if isinstance(cause, UnicodeError) else ""
        raise DataError(f"{', '.join(names)} cannot be read, or has no rows: {cause}{way_out}") from error
    return _with_scores(rows, config) if FORMATS[suffix] == "csv" and config.task == "auto" else rows


def _with_scores(rows: Dataset, config: TrainConfig) -> Dataset:
    """A .csv says no types: labels that are all numbers, and not all whole ones, are scores; others stay texts."""
    name = config.label_column or usual_label(rows)
    if name in rows.column_names and name not in (*config.text_columns, config.completion_column):
        texts = [text.strip() for text in values(rows, name)]
        if any(map(FRACTION.fullmatch, texts)) and all(_NUMBER.fullmatch(text) for text in texts if text):
            scores = [float(text) if text else None for text in texts]
            rows = rows.remove_columns(name).add_column(name, scores)
    return rows


def _csv_options(file: Path, config: TrainConfig) -> dict[str, Any]:
    # Words such as "null" and "NA" are texts; an empty field stays an empty text.
    options: dict[str, Any] = {"keep_default_na": False}
    if file.suffix.lower() == ".tsv":
        options |= {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    else:
        require_closed_quotes(file)
    first = _row(file, 0, options)
    names = config.column_names
    if file.suffix.lower() == ".tsv" and _COLA.fullmatch("\t".join(first)):
        names = names or _COLA_COLUMNS
    if names:
        _require_no_header(file, names, first)
        options["names"] = list(names)
    _require_names(file, names or tuple(first), first if names else _row(file, 1, options))
    # Texts stay as they are: 007 and 7.50 are no numbers, in a label neither.
    typed = {SEEN} - {config.prompt_column, config.completion_column, *config.text_columns}
    return options | {"converters": {name: str for name in names or first if name not in typed}}


def _row(file: Path, number: int, options: dict[str, Any]) -> list[str]:
    """One row of a file, blank lines not counted; empty where there is none."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            theirs = {name: options[name] for name in ("delimiter", "quoting") if name in options}
            return next(islice(filter(None, csv.reader(lines, **theirs)), number, None), [])
    finally:
        csv.field_size_limit(limit)


def _require_no_header(file: Path, names: tuple[str, ...], first: list[str]) -> None:
    if [name.strip().lower() for name in first] == [name.lower() for name in names]:
        raise DataError(f"{file} has a header line, {', '.join(first)}; leave out column_names.")
    if len(names) > len(first):
        raise DataError(
            f"column_names holds {len(names)} names, but the first row of {file} has {len(first)} fields: "
            f"{', '.join(map(repr, first))}."
        )


def _require_names(file: Path, names: tuple[str, ...], row: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1 and name.strip()})
    if twice:
        raise DataError(f"{file} has two columns named {', '.join(map(repr, twice))}; rename one of them.")
    # pandas would take the first column for numbers of rows, and shift all others.
    if len(row) > len(names):
        raise DataError(
            f"{file} has {len(names)} column names ({', '.join(names)}), but {len(row)} fields in its first row: "
            f"{', '.join(map(repr, row))}. Name every column, with --column-names where there is no header line."
        )


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
        if name not in GLUE:
            raise DataError(f"GLUE has no task {name!r}; it has {', '.join(GLUE)}.")
    try:
        return load_dataset(path, name)
    except ValueError as error:  # of several configurations none is named, or one that is not there
        raise DataError(f"{config.data} cannot be read: {error} Name a configuration with --data-config.") from error
