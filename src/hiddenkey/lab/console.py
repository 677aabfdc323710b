"""One line for a person."""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a text as it is: brackets in names are no markup, numbers have no colours, and no line is broken."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def quieten() -> None:
    """Hide the progress bars and notices of transformers and datasets; what fails is raised all the same."""
    import transformers  # here, as messages are printed before the slow imports too

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if find_spec("datasets"):  # the doctor needs no data
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are raised too, and told once
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\b.*")
