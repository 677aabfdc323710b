"""What the records of a study cannot say, from a file beside them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import RunError

FILE = "notes.md"


def read_notes(folders: Iterable[Path]) -> list[str]:
    """The items of the Markdown list `notes.md` of each folder, inline Markdown; a folder need not have one.

    Raises:
        RunError: a line is no item.
    """
    files = [file for folder in folders if (file := folder / FILE).is_file()]
    return [_item(file, line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]


def _item(file: Path, line: str) -> str:
    if not line.startswith("- "):
        raise RunError(f"{file}: {line!r} is no item of a list. Write each note on one line that begins with '- '.")
    return line[2:]
