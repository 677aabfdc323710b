"""Names, parameters and failures are data: each file format escapes them at one place, here.

Figures are drawn under `PLAIN_TEXT`, so that matplotlib reads no mathematics into a name. HTML is made of the
Markdown, by a parser that lets no tags through.
"""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

PLAIN_TEXT = {"text.parse_math": False, "text.usetex": False}
"""Settings of matplotlib."""
_MARKDOWN = re.compile(r"([\\`*_\[\]|$!~])")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def one_line(value: Any) -> str:
    """The text on one line: every run of white space and line breaks is one space."""
    return " ".join(str(value).split())


def markdown(value: Any) -> str:
    """The text as Markdown shows it literally, on one line."""
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKDOWN.sub(r"\\\1", text)


def markdown_table(frame: pd.DataFrame) -> str:
    """A table for a Markdown page; cells and headings are texts."""
    escaped = frame.astype(str).map(markdown).rename(columns=markdown)
    return escaped.to_markdown(index=False, disable_numparse=True)


def latex_table(frame: pd.DataFrame) -> str:
    """A booktabs table for LaTeX, without a caption; cells and headings are texts."""
    return frame.astype(str).map(one_line).rename(columns=one_line).to_latex(index=False, escape=True)


def csv_table(frame: pd.DataFrame) -> str:
    """A table as CSV, numbers with six places. A text that a spreadsheet would run as a formula is quoted by '."""
    texts = frame.round(6)
    for name in texts.select_dtypes(exclude="number"):
        texts[name] = texts[name].map(_csv_cell, na_action="ignore")
    return texts.to_csv(index=False, lineterminator="\n")


def _csv_cell(value: Any) -> str:
    text = one_line(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
