"""Figures of matplotlib as SVG: the same bytes for the same numbers, and colours that a page may change.

Ids are made of what they name, there is no date, and coordinates have two places, so that neither the clock nor the
last bit of a processor shows.
"""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

# Light, dark. Told apart by the colour-blind (after Okabe and Ito), each 4.5 to 1 or better on its paper.
COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "grid": ("#d1d9e0", "#3d444d"),
    "paper": ("#ffffff", "#0d1117"),
    "blue": ("#0067a3", "#58b4ee"),
    "brown": ("#8a5c00", "#f0b83c"),
    "red": ("#c2410c", "#ff9461"),
    "green": ("#00765a", "#3ad6a5"),
    "purple": ("#8a3f9e", "#d59ae6"),
}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hiddenkey",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": COLOURS["muted"][0],
    "axes.labelcolor": COLOURS["ink"][0],
    "text.color": COLOURS["ink"][0],
    "xtick.color": COLOURS["muted"][0],
    "ytick.color": COLOURS["muted"][0],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": COLOURS["paper"][0],
    "axes.facecolor": COLOURS["paper"][0],
    "savefig.facecolor": COLOURS["paper"][0],
    "legend.frameon": False,
    "path.simplify": False,
}
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
"""Of drawing; those of labels stand between tags, and stay as they are."""
_FONTS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def colour(name: str) -> str:
    """A colour by name, as it is on light paper."""
    return COLOURS[name][0]


def settings() -> AbstractContextManager[None]:
    """The context to draw in: `with settings():`."""
    return mpl.rc_context(_SETTINGS)


def render(canvas: Canvas) -> str:
    """The figure as an SVG document."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _NUMBER.sub(lambda found: f"{float(found.group()):.2f}", tag.group()), text)
    text = re.sub(r" ?font-family: [^;\"]*;", "", text).replace("<svg ", f'<svg font-family="{_FONTS}" ', 1)
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found.group() if found.group(1) in used else "", text)
    return re.sub(r"\s*\n\s*", "\n", text)


def inline(svg: str, name: str, alt: str) -> str:
    """An SVG document as a part of a page: colours follow the page, ids are its own."""
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    for colour_name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{colour_name})")
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    if size is not None:
        width = float(size.group(1)) * 96 / 72
        text = text.replace(size.group(), f'style="width: {width:.0f}px"', 1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)
