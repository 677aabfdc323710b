"""Where rows come from: files, folders and the hub, all read by the `datasets` library."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from .config import TrainConfig
from .errors import DataError

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")

# A name, perhaps with "set", perhaps with the number of a shard: train, trainset, train-00000-of-00002.
_TRAIN = re.compile(r"train(ing)?([_-]?set)?([-_.]\d.*)?")
_VALIDATION = re.compile(r"(validation|valid|val|dev)([_-]?set)?([-_.]\d.*)?")


@dataclass(frozen=True)
class Source:
    """Rows as they were read: the training part, and the validation part where there is one."""

    train: Dataset
    validation: Dataset | None


def read_source(config: TrainConfig) -> Source:
    """Read `config.data`, and `config.validation` where it is given.

    Raises:
        DataError: a format that is not known, or a part that is missing.
        OSError: a file or a hub data set that cannot be read.
    """
    path = Path(config.data).expanduser()
    if path.is_dir():
        train, validation = _read_folder(path, config)
    elif path.suffix.lower() in FORMATS:
        train, validation = _read_files([path], config), None
    else:
        return _read_hub(config)
    if config.validation:
        validation = _read_files([Path(config.validation).expanduser()], config)
    return Source(train, validation)


def _read_folder(folder: Path, config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in FORMATS)
    train = [file for file in files if _TRAIN.fullmatch(file.stem.lower())]
    validation = [file for file in files if _VALIDATION.fullmatch(file.stem.lower())]
    if not train:
        found = ", ".join(file.name for file in files) or "none of a known format"
        raise DataError(
            f"{folder} has no training file (files: {found}). Name one train{' or train'.join(FORMATS)}, "
            "or give the file itself as data."
        )
    return _read_files(train, config), _read_files(validation, config) if validation else None


def _read_files(files: list[Path], config: TrainConfig) -> Dataset:
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1 or not suffixes <= set(FORMATS):
        raise DataError(f"{', '.join(map(str, files))}: one format at a time, and one of {', '.join(FORMATS)}.")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"No such data file: {file}")
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty; training needs rows.")
    suffix = suffixes.pop()
    options = _csv_options(suffix, config) if FORMATS[suffix] == "csv" else {}
    names = [str(file.resolve()) for file in files]
    try:
        return load_dataset(FORMATS[suffix], data_files={"train": names}, split="train", **options)
    except (DatasetGenerationError, ValueError) as error:
        # `datasets` says so of a file with a header and no rows as well.
        raise DataError(f"{', '.join(names)} cannot be read, or has no rows: {error.__cause__ or error}") from error


def _csv_options(suffix: str, config: TrainConfig) -> dict[str, Any]:
    # Words such as "null" and "NA" are texts; an empty field stays an empty text.
    options: dict[str, Any] = {"keep_default_na": False}
    if suffix == ".tsv":
        options |= {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if config.column_names:
        options["names"] = list(config.column_names)
    return options


def _read_hub(config: TrainConfig) -> Source:
    parts = _load_hub(config)
    if "train" not in parts:
        raise DataError(f"{config.data} has no split 'train'; it has {', '.join(parts)}.")
    wanted = [config.validation] if config.validation else ["validation", "validation_matched", "dev"]
    found = next((name for name in wanted if name in parts), None)
    if config.validation and found is None:
        raise DataError(f"{config.data} has no split {config.validation!r}; it has {', '.join(parts)}.")
    return Source(parts["train"], parts[found] if found else None)


def _load_hub(config: TrainConfig) -> DatasetDict:
    if not config.data.startswith("glue/"):
        return load_dataset(config.data, config.data_config or None)
    name = config.data.removeprefix("glue/")
    if name not in GLUE:
        raise DataError(f"GLUE has no task {name!r}; it has {', '.join(GLUE)}.")
    return load_dataset("nyu-mll/glue", name)
