"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from .blocks import Bullets, Figure, Figures, Report, Table, Text
from .claims_table import VERDICTS
from .svg import COLOURS, inline

TEMPLATE = "page.html.j2"
_WORDY = 28
_TIED = "\N{NO-BREAK SPACE}"


def page_text(report: Report, folder: str) -> str:
    """The page; `folder` is where its tables lie as files."""
    return _template().render(report=report, folder=folder, colours=COLOURS)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hiddenkey.lab.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    markdown = MarkdownIt("commonmark", {"html": False})
    environment.filters["words"] = lambda text: Markup(markdown.renderInline(_kept_together(text)))
    environment.filters["picture"] = _picture
    environment.filters["verdict"] = lambda text: text.replace(" ", "-") if text in VERDICTS else ""
    environment.tests["wordy"] = lambda text: len(text) > _WORDY
    environment.globals["kind"] = _kind
    return environment.get_template(TEMPLATE)


def _kept_together(text: str) -> str:
    # No line may break inside "n = 5", "0.1 ± 0.2" or "[−0.1, +0.3]".
    text = re.sub(r"\b([np]) ([=<]) (?=[\d<])", rf"\1{_TIED}\2{_TIED}", text)
    text = re.sub(r" ± (?=\d)", f"{_TIED}±{_TIED}", text)
    return re.sub(r" ?\[([^\] ]+), ([^\] ]+)\]", rf"{_TIED}[\1,{_TIED}\2]", text)


def _picture(figure: Figure) -> Markup:
    return Markup(inline(figure.svg, figure.name, str(escape(figure.alt))))


def _kind(block: Any) -> str:
    kinds = {Text: "text", Bullets: "bullets", Table: "table", Figures: "figures"}
    return kinds[type(block)]
