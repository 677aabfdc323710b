"""Which part of the data is learnt from, which chooses the epoch, and which is the test: no row is two of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .config import TrainConfig
from .hub import is_path

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

_ENDINGS = ", ".join(FORMATS)

Places = tuple[str, ...]
"""Where the rows of a part lie: paths of files, or a split of a hub data set; empty: nowhere."""

_SHARD = re.compile(r"-\d+-of-\d+")

# A name, perhaps with "set", perhaps with a number: train, trainset, train-00000-of-00002, train_500.
_KINDS = {
    "train": re.compile(r"train(ing)?([_-]?set)?([-_.]\d.*)?"),
    "validation": re.compile(r"(validation|valid|val|dev)([_-]?set)?([_-]matched)?([-_.]\d.*)?"),
    "test": re.compile(r"test([_-]?set)?(_w_refs)?([-_.]\d.*)?"),
}


@dataclass(frozen=True)
class Parts:
    """The three parts of a run; without a place for validation its rows are cut from the training rows."""

    train: Places
    validation: Places
    test: Places


def local_parts(config: TrainConfig) -> Parts | None:
    """The parts of `config.data` that are files here; None where it names a data set of the hub.

    Raises:
        DataError: a format that is not known, a part that is missing, or one that would be used twice.
        FileNotFoundError: no such file or folder.
    """
    path = Path(config.data).expanduser()
    if config.data_config and path.exists():
        raise DataError(f"data_config = {config.data_config!r} is for data sets of the hub; {path} is here.")
    if path.is_dir():
        there = _parts_of_folder(path)
    elif path.suffix.lower() in FORMATS:
        there = {"train": (str(path.resolve()),)}
    elif path.exists():
        raise DataError(f"{path} is of no format that is read; these are: {_ENDINGS}.")
    elif is_path(config.data):
        raise FileNotFoundError(f"data = {config.data!r}: there is no such file or folder.")
    else:
        return None
    parts = choose_parts(there, config)
    for places in (parts.train, parts.validation, parts.test):
        require_files(places)
    return parts


def require_files(places: Places) -> None:
    """Raises DataError for files of several formats or of another one, or empty ones; FileNotFoundError for none."""
    files = [Path(place) for place in places]
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1 or not suffixes <= set(FORMATS):
        raise DataError(f"{', '.join(places)}: one format at a time, and one of {_ENDINGS}.")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"No such data file: {file}")
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty; training needs rows.")


def _parts_of_folder(folder: Path) -> dict[str, Places]:
    """The data files of a folder, under their names without endings."""
    found: dict[str, Places] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in FORMATS:
            found[file.stem] = (*found.get(file.stem, ()), str(file.resolve()))
    return found


def choose_parts(there: dict[str, Places], config: TrainConfig) -> Parts:
    """The parts that `config` names, out of those that are there.

    A part asked for as the test is never the validation part as well: then validation is cut from training.

    Raises:
        DataError: a part that is not there, one that is there several times, or one that would be used twice.
    """
    train = _of_kind("train", there, config.data)
    if not train:
        raise DataError(
            f"{config.data} has no training part; it has {_names(there)}. Name a file train with an ending of "
            f"{_ENDINGS}, or give the file itself as data."
        )
    test = _find(config.test, there, config.data) if config.test else ()
    if config.validation:
        validation = _find(config.validation, there, config.data)
    else:
        found = _of_kind("validation", there, config.data)
        validation = () if set(found) & set(test) else found
    for field, places, other, others in (
        ("test", test, "training", train),
        ("test", test, "validation", validation),
        ("validation", validation, "training", train),
    ):
        if set(places) & set(others):
            raise DataError(
                f"{field} = {getattr(config, field)!r} is the {other} part of {config.data} too; what is learnt from "
                "or chosen by tells nothing about new data. Give another part or file."
            )
    return Parts(train, validation, test)


def _find(name: str, there: dict[str, Places], data: str) -> Places:
    if Path(name).suffix.lower() in FORMATS:
        return (str(Path(name).expanduser().resolve()),)
    kind = next((kind for kind, names in _KINDS.items() if names.fullmatch(name.lower())), "")
    found = there.get(name) or (_of_kind(kind, there, data) if kind else ())
    if not found:
        raise DataError(f"{data} has no part {name!r}; it has {_names(there)}. A file works too: {_ENDINGS}.")
    return found


def _of_kind(kind: str, there: dict[str, Places], data: str) -> Places:
    found = {name: places for name, places in there.items() if _KINDS[kind].fullmatch(name.lower())}
    if len(found) > 1 and len({_SHARD.sub("", name) for name in found}) > 1:
        raise DataError(
            f"{data} has several {kind} parts: {_names(found)}. One may hold rows of another, so leave one of them "
            "there, or name a file; shards of one part are called train-00000-of-00002 and so on."
        )
    return tuple(place for places in found.values() for place in places)


def _names(there: dict[str, Places]) -> str:
    return (
        ", ".join(Path(place).name for places in there.values() for place in places)
        or f"no file ending in {_ENDINGS}"
    )
