"""Where rows come from: files, folders and the hub."""

from __future__ import annotations

import json
import re
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from pyarrow import ArrowException
from pyarrow.parquet import read_table

from .columns import FRACTION, NUMBER, usual_label
from .config import TrainConfig
from .errors import DataError
from .hub import GLUE_SET
from .parts import Places, choose_parts, local_parts, require_files
from .quotes import read_records

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
