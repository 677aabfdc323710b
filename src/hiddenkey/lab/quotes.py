"""Rows of .csv and .tsv files; a stray quote, which would join many rows into one text, is an error."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

from .columns import NUMBER
from .errors import DataError

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
