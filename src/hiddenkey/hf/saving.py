"""The recipe beside an adapter: a small JSON file of its own, so that the adapter stays plain PEFT."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .. import __version__
from ..errors import RecipeError, SavedRecipeError
from ..recipe import Recipe, parse

FILE = "hiddenkey.json"
FORMAT = 1


def save_recipe(folder: str | os.PathLike[str], recipe: str | Recipe) -> Path:
    """Write `hiddenkey.json` into an existing folder, atomically; returns its path.

    Raises RecipeError for a recipe that can't be read, FileNotFoundError where the folder does not exist.
    """
    path = Path(folder) / FILE
    content = {"format": FORMAT, "recipe": str(parse(recipe)), "hiddenkey": __version__}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def load_recipe(folder: str | os.PathLike[str]) -> Recipe:
    """Read the recipe from `hiddenkey.json` in a folder.

    Raises FileNotFoundError where there is none, SavedRecipeError where it can't be read or is of a newer format.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no recipe was saved beside this adapter")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        format_, text = content["format"], content["recipe"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise SavedRecipeError(f"{path} is damaged ({error!r}); write it again with hiddenkey.save_recipe") from error
    if format_ != FORMAT:
        raise SavedRecipeError(
            f"{path} has format {format_!r}, hiddenkey {__version__} reads format {FORMAT}; "
            f"it was written by hiddenkey {content.get('hiddenkey')}: install that version to read it"
        )
    try:
        return parse(text)
    except (RecipeError, TypeError) as error:
        raise SavedRecipeError(
            f"{path} holds a recipe this hiddenkey does not know: {error}. A plugin's name is known where the "
            "plugin is installed"
        ) from error
