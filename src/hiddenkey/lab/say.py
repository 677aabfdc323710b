"""One line for a person."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a text as it is: brackets in names are no markup, numbers have no colours, and no line is broken."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
