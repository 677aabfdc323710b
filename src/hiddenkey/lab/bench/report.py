"""Results of a bench for the eye: a table on the terminal, a bar chart as PNG."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .record import Case, Record, Row

# Okabe and Ito's colours, which the colour-blind can tell apart.
REFERENCE, OURS, RIVAL = "#000000", "#0072B2", "#E69F00"
INK, MUTED = "#222222", "#777777"
HEADINGS = ("provider", "rounds", "p20", "p50", "p80", "ratio", "paired", "peak memory", "its ratio")
FEW = 5
"""Of fewer rounds p20 and p80 would be made up between two of them."""
PIPED = 120


def print_case(case: Case) -> None:
    """Times, ratios and memory as a table."""
    table = Table(title=f"{case.name}, ratios to {case.reference}")
    table.add_column(HEADINGS[0])
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for cells in table_rows(case):
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else PIPED).print(table)


def table_rows(case: Case) -> list[list[str]]:
    """Provider, rounds, p20, p50, p80, ratio, paired ratio, peak memory, its ratio."""
    return [
        [
            row.name,
            str(len(row.seconds)),
            *(_quantile(row, share) for share in (0.2, 0.5, 0.8)),
            number(case.ratio(row.name)),
            number(case.paired(row.name)),
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f} MiB",
            number(case.memory_ratio(row.name)),
        ]
        for row in case.rows
    ]


def _quantile(row: Row, share: float) -> str:
    return duration(row.quantile(share)) if share == 0.5 or len(row.seconds) >= FEW else "-"


def duration(seconds: float) -> str:
    """Seconds as milliseconds, three digits or whole."""
    return f"{seconds * 1e3:,.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def number(value: float | None) -> str:
    """A ratio with two places, three where two would hide the difference to 1."""
    if value is None:
        return "-"
    return f"{value:.3f}" if 0.9 < value < 1.1 else f"{value:.2f}"


def bar_chart(record: Record, path: Path) -> None:
    """Ratios of the median time, and of peak memory, one bar for each provider; whiskers from p20 to p80."""
    memory = any(row.peak_bytes is not None for case in record.cases for row in case.rows)
    heights = [0.30 * len(case.rows) + 0.75 for case in record.cases]
    figure = Figure(figsize=(10 if memory else 7, sum(heights) + 0.5), layout="constrained")
    grid = figure.subplots(len(record.cases), 2 if memory else 1, squeeze=False, height_ratios=heights)
    for case, axes in zip(record.cases, grid, strict=True):
        _bars(axes[0], case, "time", names=True)
        if any(row.peak_bytes is not None for row in case.rows):
            _bars(axes[1], case, "peak memory", names=False)
        elif memory:
            axes[1].set_axis_off()
    figure.suptitle(record.title, fontsize=11, color=INK)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bars(axis: Axes, case: Case, quantity: str, names: bool) -> None:
    timed = quantity == "time"
    ratios = [(case.ratio if timed else case.memory_ratio)(row.name) for row in case.rows]
    places = range(len(case.rows))
    colours = [colour(row.name, row.what, case.reference) for row in case.rows]
    axis.barh(places, [ratio or 0 for ratio in ratios], color=colours, height=0.7)
    ends = [ratio or 0.0 for ratio in ratios]
    reference = case.row(case.reference)
    if timed and reference is not None:
        for place, row in zip(places, case.rows, strict=True):
            low, high = (row.quantile(share) / reference.quantile(0.5) for share in (0.2, 0.8))
            axis.plot([low, high], [place, place], color=MUTED, linewidth=1.2)
            ends[place] = max(ends[place], high)
    for place, ratio in zip(places, ratios, strict=True):
        axis.text(ends[place] + max(ends) * 0.015, place, number(ratio), va="center", fontsize=8, color=INK)
    axis.axvline(1, color=MUTED, linewidth=0.8, linestyle=":")
    axis.set_yticks(list(places), [row.name for row in case.rows] if names else [], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max(ends) * 1.18)
    axis.set_title(f"{case.name}: {quantity}, ratio to {case.reference}", fontsize=8.5, color=INK, loc="left")
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def colour(name: str, what: str, reference: str) -> str:
    """Black for the reference, blue for ours, orange for rivals."""
    return REFERENCE if name == reference else OURS if what.startswith("ours") else RIVAL
