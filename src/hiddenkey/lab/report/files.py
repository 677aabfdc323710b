"""Tables as CSV and LaTeX, the report as Markdown."""

from __future__ import annotations

import csv
import io
import re

from .blocks import Block, Bullets, Figures, Report, Table, Text

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "≤": r"$\leq$",
    "ⁿ": r"$^n$",
}


def csv_text(table: Table) -> str:
    """The table for machines: one line of names, then numbers; nothing where there is none."""
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for row in table.data for name in row))
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.data)
    return buffer.getvalue()


def latex_text(table: Table) -> str:
    """The table for a paper, with booktabs."""
    columns = "l" + "r" * (len(table.headings) - 1)
    head = " & ".join(_latex(heading) for heading in table.headings)
    rows = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in table.rows]
    lines = [
        rf"% {table.title}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def markdown_text(report: Report, page: str, folder: str) -> str:
    """The short report: long tables are links to their files, long figures stay on the page."""
    parts = [
        f"# {report.title}",
        "Written by `hiddenkey report`; do not edit. The same with every figure and table on one page: "
        f"[{page}]({page}).",
    ]
    for section in report.sections:
        parts.append(f"## {section.title}")
        parts += [text for block in section.blocks if (text := _block(block, folder))]
    return "\n\n".join(parts) + "\n"


def _block(block: Block, folder: str) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Bullets):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Figures):
        if block.long:
            return ""
        pictures = [f"![{figure.title}]({folder}/{figure.name}.svg)" for figure in block.figures]
        return "\n".join(pictures) + (f"\n\n{block.note}" if block.note else "")
    return _table(block, folder)


def _table(table: Table, folder: str) -> str:
    links = f"[CSV]({folder}/{table.name}.csv), [LaTeX]({folder}/{table.name}.tex)"
    if table.long:
        return f"{table.title}: {links}"
    cells = [list(table.headings), ["---"] * len(table.headings), *table.rows]
    rows = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]
    note = f"\n\n{table.note}" if table.note else ""
    return f"**{table.title}** ({links})\n\n" + "\n".join(rows) + note


def _latex(cell: str) -> str:
    parts = re.split(r"`([^`]*)`", cell)
    return "".join(
        _escape(part) if place % 2 == 0 else rf"\texttt{{{_escape(part)}}}" for place, part in enumerate(parts)
    )


def _escape(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
