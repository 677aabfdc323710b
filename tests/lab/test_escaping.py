"""Names are data in every format: nothing in them is read as markup, a formula or mathematics."""

from __future__ import annotations

import csv
import io
import re

import pandas as pd
import pytest
from markdown_it import MarkdownIt
from matplotlib import rc_context
from matplotlib.figure import Figure

from hiddenkey.lab.report import PLAIN_TEXT, csv_table, latex_table, markdown, markdown_table

NAMES = [
    "$\\frac$",
    "one\n\\input{/etc/passwd}\n# two",
    "![](http://x/y.png)",
    "<script>alert(1)</script>",
    "=1+1",
    "@SUM(A1)",
    "-2+3",
    "a | b",
    "`code` _and_ *more* ~~x~~ &amp; \\",
]


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_a_name_as_it_is(name: str):
    """In a sentence and in a cell, by a parser that lets tags through, as GitHub's does."""
    wanted = " ".join(name.split())
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for text in (f"Better: {markdown(name)}.", markdown_table(pd.DataFrame({"method": [name], "n": [1]}))):
        tokens = [child for token in parser.parse(text) for child in token.children or []]
        assert {token.type for token in tokens} <= {"text", "text_special"}
        assert wanted in "".join(token.content for token in tokens)
        assert not any(token.type.startswith("html") for token in parser.parse(text))


@pytest.mark.parametrize("name", NAMES)
def test_csv_keeps_a_name_in_its_cell_and_runs_no_formula(name: str):
    text = csv_table(pd.DataFrame({"method": [name, None], "gain": [-1.5, 2.0]}))
    rows = list(csv.reader(io.StringIO(text)))
    assert len(rows) == 3
    assert rows[1][0].removeprefix("'") == " ".join(name.split())
    assert not rows[1][0].startswith(("=", "+", "-", "@"))
    assert (rows[1][1], rows[2]) == ("-1.5", ["", "2.0"])


@pytest.mark.parametrize("name", NAMES)
def test_latex_has_a_name_in_one_row_without_a_live_command(name: str):
    text = latex_table(pd.DataFrame({"method": [name], "n": [1]}))
    (row,) = text.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    row = re.sub(r"\\(text(backslash|asciitilde|asciicircum) |space|[&%$#_{}\\])| & ", "", row)
    assert not set(row) & set("\\$#%&{}~_"), row


@pytest.mark.parametrize("name", NAMES[:4])
def test_a_figure_draws_a_name_that_is_no_mathematics(name: str):
    with rc_context(PLAIN_TEXT):
        figure = Figure()
        figure.subplots().set_title(name)
        figure.savefig(io.BytesIO())
