"""What shape is dropped (arXiv 2403.00812, Fig. 2). One pattern is one function: (grid, p) -> keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..registry import Registry
from .grid import Grid

Draw = Callable[[Grid, float], Tensor]


@dataclass(frozen=True)
class Pattern:
    """A named way to draw; `needs_segments` when the draw depends on where documents begin and end."""

    name: str
    draw: Draw
    needs_segments: bool = False


PATTERNS: Registry[Pattern] = Registry("pattern")


def register_pattern(name: str, *, needs_segments: bool = False) -> Callable[[Draw], Draw]:
    """Decorator: add a pattern under `name`, for every position.

    The function takes a `Grid` and the rate p in (0, 1) and returns a boolean mask (True = kept) that
    broadcasts to `grid.shape`. Draw from torch's default generators: activation checkpointing restores those.
    """

    def add(draw: Draw) -> Draw:
        PATTERNS.add(name, Pattern(name, draw, needs_segments))
        return draw

    return add


def random_keep(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """Independent draws of shape `shape`, True with probability 1 - p.

    On a CPU a random byte decides every cell at the 256th below p, and the few drops that are left to p are placed by
    the gaps between them: a tenth of the time of one float each.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.rand(shape, dtype=torch.float32, device=device) >= p
    count, steps = math.prod(shape), math.floor(p * 256)
    # Compared in place and read as bool: a fresh tensor costs more than the comparison.
    keep = random_bytes(count).ge_(steps - 128).view(torch.bool)
    # 1 - p = (1 - steps/256)(1 - rest): both draws are independent of each other and from cell to cell.
    rest = (p - steps / 256) / (1 - steps / 256)
    return keep.index_fill_(0, rare_places(count, rest), False).view(shape)


def random_bytes(count: int) -> Tensor:
    """Uniform int8 (count), from a generator of NumPy (SFC64) with 256 bits of torch's own for a seed.

    torch draws 64 bits at a time from a Mersenne Twister, which takes four times as long.
    """
    seed = torch.empty(4, dtype=torch.int64).random_(-(2**63), None).numpy().view(np.uint32)
    return torch.from_numpy(np.random.SFC64(seed).random_raw(-(-count // 8))).view(torch.int8)[:count]


def rare_places(count: int, rate: float) -> Tensor:
    """The places among `count` of independent events of a small rate: int64, ascending.

    The gaps between events are geometric: exponential ones, rounded up.
    """
    parts, last = [torch.empty(0, dtype=torch.int64)], -1
    while rate > 0 and last < count - 1:
        expected = (count - last) * rate
        gaps = torch.empty(int(expected + 6 * math.sqrt(expected)) + 4, dtype=torch.float64)
        gaps.exponential_(-math.log1p(-rate)).ceil_().clamp_(1, count + 1)
        parts.append(gaps.long().cumsum(0) + last)
        last = int(parts[-1][-1])
    places = torch.cat(parts)
    return places[places < count]


@register_pattern("element")
def element(grid: Grid, p: float) -> Tensor:
    """Every (query, key) or (token, feature) by itself."""
    return random_keep(grid.shape, p, grid.device)


@register_pattern("column")
def column(grid: Grid, p: float) -> Tensor:
    """Every key by itself, for all queries of its head; every token by itself, its whole vector."""
    return grid.lay(random_keep((*grid.lead, grid.places), p, grid.device))


@register_pattern("span", needs_segments=True)
def span(grid: Grid, p: float) -> Tensor:
    """One run of round(p * length) places in every document, its start uniform inside the document.

    Halves round up. Padding is never part of a run, and no run crosses from one document into the next.
    """
    segments = grid.segments_over_lead()
    first, length = document_bounds(segments)
    dropped = torch.floor(length * p + 0.5)
    # One number per document: every place reads the one drawn at its document's first place.
    draws = torch.rand((*grid.lead, grid.places), dtype=torch.float32, device=grid.device)
    draws = draws.gather(-1, first.expand_as(draws))
    start = torch.minimum(torch.floor(draws * (length - dropped + 1)), length - dropped)
    offset = torch.arange(grid.places, device=grid.device) - first
    inside = (offset >= start) & (offset < start + dropped) & (segments > 0)
    return grid.lay(~inside)


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
