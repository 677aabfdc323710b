"""Drawing with matplotlib: lines with spread, families side by side, differences with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from .curves import Curve
from .statistics import Difference, Summary
from .style import panel, style
from .svg import colour, render, settings

WIDTH = 4.9
_SMALL = 8.5


def families(curves: Sequence[Curve], baseline: Summary | None, x: str, y: str) -> str:
    """Curves of each family in a small panel of its own, all on the same axes, with the baseline's level."""
    names = list(dict.fromkeys(panel(curve.method) for curve in curves))
    columns = 2 if len(names) > 1 else 1
    rows = -(-len(names) // columns)
    with settings():
        canvas = Canvas(figsize=(WIDTH, 2.55 * rows + 0.3), layout="constrained")
        grid = canvas.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axis, name in zip(grid.flat, names, strict=False):
            if baseline is not None:
                axis.axhline(baseline.mean, color=colour("ink"), linewidth=1)
                if baseline.sd is not None:
                    low, high = baseline.mean - baseline.sd, baseline.mean + baseline.sd
                    axis.axhspan(low, high, color=colour("grid"), alpha=0.5, linewidth=0)
            _lines(axis, [curve for curve in curves if panel(curve.method) == name])
            _legend(axis, 1)
        for place in range(len(names), rows * columns):
            grid.flat[place].set_axis_off()
            grid.flat[place - columns].tick_params(labelbottom=True)
        canvas.supxlabel(x, fontsize=10)
        canvas.supylabel(y, fontsize=10)
        return render(canvas)


def lines(curves: Sequence[Curve], x: str, y: str, band: bool = False, powers: bool = False) -> str:
    """Curves in one panel; spread as a band or as whiskers; x in powers of two."""
    with settings():
        canvas = Canvas(figsize=(WIDTH, 3.7), layout="constrained")
        axis = canvas.subplots()
        if powers:
            axis.set_xscale("log", base=2)
        _lines(axis, curves, band)
        if powers:
            ticks = sorted({place for curve in curves for place, _ in curve.points})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        _legend(axis, 2)
        return render(canvas)


def forest(rows: Sequence[tuple[str, str, Difference, float | None]], x: str) -> str:
    """Differences to 0 with their intervals, a row for each method and its tasks; the paper's as hollow diamonds."""
    with settings():
        canvas = Canvas(figsize=(WIDTH, 0.3 * len(rows) + 1.15), layout="constrained")
        axis = canvas.subplots()
        axis.axvline(0, color=colour("ink"), linewidth=1)
        for place, (method, _, found, printed) in enumerate(rows):
            drawn = style(method)
            if found.low is not None and found.high is not None:
                axis.plot([found.low, found.high], [place, place], color=drawn.colour, linewidth=2)
            axis.plot(found.mean, place, drawn.mark, color=drawn.colour, markersize=6)
            if printed is not None:
                axis.plot(printed, place, "D", color=colour("muted"), markersize=5, markerfacecolor="none")
        axis.plot([], [], "o-", color=colour("ink"), label="here, with 95 % interval")
        axis.plot([], [], "D", color=colour("muted"), markerfacecolor="none", label="paper")
        axis.set_yticks(range(len(rows)), [method + where for method, where, _, _ in rows], color=colour("ink"))
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.set_xlabel(x)
        axis.grid(axis="x", color=colour("grid"), linewidth=0.6)
        axis.set_axisbelow(True)
        canvas.legend(loc="outside upper left", ncols=2, fontsize=_SMALL)
        return render(canvas)


def _lines(axis: Axes, curves: Sequence[Curve], band: bool = False) -> None:
    for curve in curves:
        drawn = style(curve.method)
        xs, means = [x for x, _ in curve.points], [found.mean for _, found in curve.points]
        spread = [found.sd or 0.0 for _, found in curve.points]
        few = len(xs) <= 12
        look: dict[str, Any] = {
            "color": drawn.colour,
            "linestyle": drawn.line,
            "marker": drawn.mark if few else "",
            "markersize": 4,
        }
        axis.plot(xs, means, linewidth=1.6, label=curve.method, **look)
        if band:
            low, high = ([mean + side * sd for mean, sd in zip(means, spread, strict=True)] for side in (-1, 1))
            axis.fill_between(xs, low, high, color=drawn.colour, alpha=0.12, linewidth=0)
        elif any(spread):
            axis.errorbar(xs, means, spread, fmt="none", ecolor=drawn.colour, elinewidth=0.8, alpha=0.6)
    axis.grid(axis="y", color=colour("grid"), linewidth=0.6)
    axis.set_axisbelow(True)


def _legend(axis: Axes, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=columns,
        fontsize=_SMALL,
        borderaxespad=0.2,
        handlelength=2.4,
        labelspacing=0.25,
    )
