"""Quotes in .csv files: a stray one would join many rows into one text, without an error."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import DataError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_WAYS_OUT = "A quote inside a quoted text is written twice; or save the rows as .jsonl or .parquet."


def require_closed_quotes(file: Path) -> None:
    """Check that every quoted text of a .csv file ends before a comma or a line break, and holds no other rows.

    Raises:
        DataError: naming the line.
    """
    joined = []
    for first, last, lines, row in _records(file):
        if last > first:
            pieces = list(filter(None, csv.reader(lines, quoting=csv.QUOTE_NONE)))
            if len(row) > 1 and all(len(piece) == len(row) for piece in pieces):
                joined.append((first, last, pieces))
    if not joined:
        return
    # A text of several lines may have commas of its own. Lines are rows where a column, the labels, goes on in them.
    places = {first for first, *_ in joined}
    others = [row for first, _, _, row in _records(file) if first not in places]
    for first, last, pieces in joined:
        for place in range(len(pieces[0])):
            known = {row[place] for row in others if place < len(row)}
            if all(piece[place] in known or _NUMBER.fullmatch(piece[place]) for piece in pieces):
                raise DataError(
                    f"{file}, line {first}: a quoted text goes on to line {last} and takes {len(pieces)} rows into "
                    f"itself. Take the stray quote out. {_WAYS_OUT}"
                )


def _records(file: Path) -> Iterator[tuple[int, int, list[str], list[str]]]:
    """First line, last line, lines and fields of every row."""
    lines: list[str] = []

    def read() -> Iterator[str]:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            for line in stream:
                lines.append(line)
                yield line

    limit = csv.field_size_limit(2**31 - 1)
    reader = csv.reader(read(), strict=True)
    first = 1
    try:
        for row in reader:
            yield first, reader.line_num, lines, row
            first = reader.line_num + 1
            lines.clear()
    except csv.Error as error:
        if not lines:
            raise
        where = f"{file}, line {first}"
        if '\\"' in lines[-1]:
            raise DataError(f'{where}: \\" does not stand for a quote in a .csv file. {_WAYS_OUT}') from error
        end = f"line {reader.line_num}" if reader.line_num > first else "the same line"
        fault = "is never closed" if "end of data" in str(error) else f"ends in {end}, in the middle of a field"
        raise DataError(f"{where}: a quoted text {fault}. {_WAYS_OUT}") from error
    finally:
        csv.field_size_limit(limit)
