"""docs/models.md from the rows."""

from pathlib import Path

from .record import Record


def write(path: Path, records: list[Record]) -> None:
    pass
