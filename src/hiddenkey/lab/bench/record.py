"""What a bench leaves behind: one JSON file for each suite and model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..artifacts import write_json
from ..errors import DamagedFileError, RunError
from ..stored import read_json


@dataclass(frozen=True)
class Row:
    """One provider in one case."""

    __pydantic_config__: ClassVar = {"strict": True, "allow_inf_nan": False}

    name: str
    what: str
    """What it does, in one line."""
    seconds: list[float]
    """Every timed round, in the order of the rounds."""
    peak_bytes: int | None = None
    """Highest sum of the memory it allocated and had not freed, in a run apart; None: not measured."""

    def quantile(self, share: float) -> float:
        """Seconds of the given share of rounds: 0.2, 0.5 or 0.8."""
        if len(self.seconds) == 1:
            return self.seconds[0]
        return statistics.quantiles(self.seconds, n=10, method="inclusive")[round(share * 10) - 1]


@dataclass(frozen=True)
class Case:
    """Providers that took turns on the same input."""

    name: str
    about: dict[str, Any]
    """Shapes and the like."""
    reference: str
    """The row that the ratios are to."""
    rows: list[Row]

    def row(self, name: str) -> Row | None:
        """The row of a provider, or None where it was not measured."""
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, name: str) -> float | None:
        """Median over the reference's median."""
        row, reference = self.row(name), self.row(self.reference)
        return None if row is None or reference is None else row.quantile(0.5) / reference.quantile(0.5)

    def paired(self, name: str) -> float | None:
        """Median of the ratios to the reference's time in the same round."""
        row, reference = self.row(name), self.row(self.reference)
        if row is None or reference is None:
            return None
        return statistics.median(a / b for a, b in zip(row.seconds, reference.seconds, strict=True))

    def memory_ratio(self, name: str, reference: str = "") -> float | None:
        """Peak memory over that of the reference, or of another row."""
        row, other = self.row(name), self.row(reference or self.reference)
        if row is None or other is None or row.peak_bytes is None or not other.peak_bytes:
            return None
        return row.peak_bytes / other.peak_bytes


@dataclass(frozen=True)
class Record:
    """One suite on one model, with where it comes from."""

    name: str
    """Name of the file, without `.json`."""
    suite: str
    title: str
    how: str
    """How time and memory were taken."""
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    date: str
    config: dict[str, Any]
    cases: list[Case]
    facts: dict[str, Any] = field(default_factory=dict)
    """What else was found."""

    def case(self, name: str) -> Case | None:
        """A case by name, or None."""
        return next((case for case in self.cases if case.name == name), None)


@dataclass(frozen=True, kw_only=True)
class _File(Record):
    """A record as its file holds it."""

    format: Literal[1]


def write_record(record: Record, folder: Path) -> Path:
    """Write `<name>.json` whole or not at all; medians and ratios are written for readers, raw times for doubters."""
    content = {"format": 1} | asdict(record)
    for case, written in zip(record.cases, content["cases"], strict=True):
        for row, entry in zip(case.rows, written["rows"], strict=True):
            entry["summary"] = _summary(case, row)
    path = folder / f"{record.name}.json"
    write_json(path, content)
    return path


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
        DamagedFileError: a file that this version did not write.
    """
    found = read_json(path, _File)
    if found.name != path.stem:  # figures are named after it
        raise DamagedFileError(f"{path} is damaged: name: it is {found.name!r}")
    return Record(**{item.name: getattr(found, item.name) for item in fields(Record)})


def read_records(folder: Path) -> dict[str, Record]:
    """All records of a folder by name.

    Raises:
        RunError: there is none, or one cannot be read.
    """
    records = {path.stem: read_record(path) for path in sorted(folder.glob("*.json"))}
    if not records:
        raise RunError(f"no bench results in {folder}; run: hiddenkey bench --out {folder}")
    return records


def _summary(case: Case, row: Row) -> dict[str, float | None]:
    quantiles: Sequence[float] = [row.quantile(share) for share in (0.2, 0.5, 0.8)]
    names = dict(zip(("p20", "p50", "p80"), quantiles, strict=True))
    ratios = {"ratio": case.ratio(row.name), "paired": case.paired(row.name)}
    return {**names, **ratios, "memory_ratio": case.memory_ratio(row.name)}
