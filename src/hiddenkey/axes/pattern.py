"""What shape is dropped (arXiv 2403.00812, Fig. 2). One pattern is one function: (grid, p) -> keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..draws import random_keep
from ..registry import Registry
from .grid import Grid

Draw = Callable[[Grid, float], Tensor]
Unit = Literal["entry", "row", "fixed"]


@dataclass(frozen=True)
class Pattern:
    """A named way to draw; `needs_segments` when the draw depends on where documents begin and end.

    unit: what is drawn by itself, which says how far a realised rate may lie from p: every `entry` of the returned
    mask; a whole `row` of it, one index of the leading axes, which is always safe to say; or nothing, because
    round(p · length) places of every document are dropped: `fixed`.
    """

    name: str
    draw: Draw
    needs_segments: bool = False
    unit: Unit = "row"


PATTERNS: Registry[Pattern] = Registry("pattern")


def register_pattern(name: str, *, needs_segments: bool = False, unit: Unit = "row") -> Callable[[Draw], Draw]:
    """Decorator: add a pattern under `name`, for every position.

    The function takes a `Grid` and the rate p in [0, 1) and returns a boolean mask (True = kept) that
    broadcasts to `grid.shape`. Draw from torch's default generators: activation checkpointing restores those.
    needs_segments, unit: the fields of `Pattern`. Raises ValueError for a malformed or taken name, or another unit.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unit = {unit!r} is not allowed: it is one of {', '.join(get_args(Unit))}")

    def add(draw: Draw) -> Draw:
        PATTERNS.add(name, Pattern(name, draw, needs_segments, unit))
        return draw

    return add


@register_pattern("element", unit="entry")
def element(grid: Grid, p: float) -> Tensor:
    """Every (query, key) or (token, feature) by itself."""
    return random_keep(grid.shape, p, grid.device)


@register_pattern("column", unit="entry")
def column(grid: Grid, p: float) -> Tensor:
    """Every key by itself, for all queries of its head; every token by itself, its whole vector."""
    return grid.lay(random_keep((*grid.lead, grid.places), p, grid.device))


@register_pattern("span", needs_segments=True, unit="fixed")
def span(grid: Grid, p: float) -> Tensor:
    """One run of round(p * length) places in every document, its start uniform inside the document.

    Halves round up. Padding is never part of a run, and no run crosses from one document into the next.
    """
    segments = grid.segments_over_lead()
    first, length = document_bounds(segments)
    dropped = run_length(length, p)
    # One number per document: every place reads the one drawn at its document's first place.
    draws = torch.rand((*grid.lead, grid.places), dtype=torch.float32, device=grid.device)
    draws = draws.gather(-1, first.expand_as(draws))
    start = torch.minimum(torch.floor(draws * (length - dropped + 1)), length - dropped)
    offset = torch.arange(grid.places, device=grid.device) - first
    inside = (offset >= start) & (offset < start + dropped) & (segments > 0)
    return grid.lay(~inside)


def run_length(length: Tensor, p: float) -> Tensor:
    """round(p · length), halves up: p is a decimal number, which binary fractions miss by less than 1e-9 places."""
    return torch.floor(length.double() * p + (0.5 + 1e-9))


def document_bounds(segments: Tensor) -> tuple[Tensor, Tensor]:
    """For every place the index of the first place of its document, and the document's length.

    segments: int (..., places), equal neighbours are one document.
    """
    places = segments.shape[-1]
    index = torch.arange(places, device=segments.device).expand(segments.shape)
    change = segments[..., 1:] != segments[..., :-1]
    edge = torch.ones_like(segments[..., :1], dtype=torch.bool)
    opens, closes = torch.cat([edge, change], -1), torch.cat([change, edge], -1)
    first = torch.where(opens, index, 0).cummax(-1).values
    last = torch.where(closes, index, places).flip(-1).cummin(-1).values.flip(-1)
    return first, last - first + 1
