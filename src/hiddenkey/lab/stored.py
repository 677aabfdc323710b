"""Files of our own that are read back: checked against the types of what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from ..errors import DamagedFileError
from .config import fault

T = TypeVar("T")


def read_json(path: Path, kind: type[T]) -> T:
    """What a JSON file holds, as the type hints of `kind` want it.

    Raises:
        DamagedFileError: it holds something else; the message names the file and the field.
        OSError: it cannot be read.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        where, wrong = fault(error)
        raise DamagedFileError(f"{path} is damaged: {where + ': ' if where else ''}{wrong}") from None
