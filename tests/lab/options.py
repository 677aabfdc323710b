"""The table of docs/train.md: every field of `TrainConfig`. `python -m tests.lab.options` writes it anew."""

from __future__ import annotations

import ast
import inspect
import json
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_origin

from hiddenkey.lab import config

PAGE = Path(__file__).parents[2] / "docs/train.md"
HEAD = "| field | default | what it is |\n|---|---|---|\n"


def told() -> dict[str, str]:
    """The docstring of every field."""
    tree = ast.parse(inspect.getsource(config.TrainConfig)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = str(text.value.value)
    return found


def table() -> str:
    """One row per field, in the order of the class."""
    rows = (f"| `{name}` | {_default(name)}| {text}{_choice(name)} |\n" for name, text in told().items())
    return HEAD + "".join(rows)


def _default(name: str) -> str:
    if name not in config.DEFAULTS:
        return "needed "
    default = config.DEFAULTS[name]
    if default in ("", []):
        return ""
    return f"`{default if isinstance(default, str) and default.strip() else json.dumps(default)}` "


def _choice(name: str) -> str:
    allowed = get_args(config.FIELD_TYPES[name]) if get_origin(config.FIELD_TYPES[name]) is Literal else ()
    return f" One of {', '.join(f'`{value}`' for value in allowed)}." if allowed else ""


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = text.partition(HEAD)
    after = [line for line in rest.splitlines(keepends=True) if not line.startswith("|")]
    return before + table() + "".join(after)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
