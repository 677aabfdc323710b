"""What shape is dropped (arXiv 2403.00812, Fig. 2), and the grid it is drawn on.

One pattern is one function: (grid, p) -> keep. `Grid` and `random_keep` are what patterns are written with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .registry import Registry

# Up to so many cells one float each takes less time than starting a generator: 0.15 ms against 0.6 ms for 3,072 cells
# and 0.35 against 0.64 for 65,536, both after a large matrix product (2 cores, torch 2.13).
SMALL_DRAW = 2**16


@dataclass(frozen=True)
class Grid:
    """The cells of one dropping site.

    A *place* is what a structural pattern takes away as a whole: a key in attention, a token in a stream.

    shape: all cells: attention (B, Hkv, Q, K), stream (B, T, D).
    place_axis: the axis of the places: -1 (keys) in attention, -2 (tokens) in a stream.
    segments: int (B, places): 0 is padding, equal positive numbers are one document; None: one document.
    """

    shape: tuple[int, ...]
    place_axis: int
    device: torch.device
    segments: Tensor | None = None

    @classmethod
    def attention(
        cls, shape: tuple[int, int, int, int], device: torch.device, segments: Tensor | None = None
    ) -> Grid:
        """The grid of (B, Hkv, Q, K) attention logits."""
        return cls(shape, -1, device, segments)

    @classmethod
    def stream(cls, x: Tensor, segments: Tensor | None = None) -> Grid:
        """The grid of a (B, T, D) sequence; a (B, D) vector counts as one token."""
        shape = tuple(x.shape) if x.dim() > 2 else (x.shape[0], 1, x.shape[-1])
        return cls(shape, -2, x.device, segments)

    @property
    def places(self) -> int:
        """How many keys or tokens there are."""
        return self.shape[self.place_axis]

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes that draw independently: (B, Hkv) in attention, (B,) in a stream."""
        return self.shape[:-2]

    def lay(self, mask: Tensor) -> Tensor:
        """Turn a mask over (*lead, places) into one that broadcasts over all cells."""
        return mask.unsqueeze(-2 if self.place_axis == -1 else -1)

    def segments_over_lead(self) -> Tensor:
        """Segments as (*lead, places) or broadcastable to it; ones where there is one document."""
        if self.segments is None:
            return torch.ones((1,) * len(self.lead) + (self.places,), dtype=torch.long, device=self.device)
        batch, places = self.segments.shape
        return self.segments.view(batch, *(1,) * (len(self.lead) - 1), places)


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


def random_keep(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """Independent draws of shape `shape`, True with probability 1 - p.

    On a CPU a random byte decides every one of many cells at the 256th below p, and the few drops that are left to p
    are placed by the gaps between them: a tenth of the time of one float each.
    """
    if device.type != "cpu" or torch.compiler.is_compiling() or math.prod(shape) <= SMALL_DRAW:
        return torch.rand(shape, dtype=torch.float32, device=device) >= p
    count, steps, source = math.prod(shape), math.floor(p * 256), generator()
    # Compared in place and read as bool: a fresh tensor costs more than the comparison.
    keep = random_bytes(source, count).ge_(steps - 128).view(torch.bool)
    # 1 - p = (1 - steps/256)(1 - rest): both draws are independent of each other and from cell to cell.
    rest = (p - steps / 256) / (1 - steps / 256)
    keep.numpy()[rare_places(source, count, rest)] = False
    return keep.view(shape)


def generator() -> np.random.Generator:
    """NumPy's SFC64 with 256 bits of torch's own generator for a seed.

    torch draws 64 bits at a time from a Mersenne Twister, which takes four times as long.
    """
    seed = torch.empty(4, dtype=torch.int64, device="cpu").random_(-(2**63), None).numpy().view(np.uint32)
    return np.random.Generator(np.random.SFC64(seed))


def random_bytes(source: np.random.Generator, count: int) -> Tensor:
    """Uniform int8 (count)."""
    return torch.from_numpy(source.bit_generator.random_raw(-(-count // 8))).view(torch.int8)[:count]


def rare_places(source: np.random.Generator, count: int, rate: float) -> np.ndarray:
    """The places among `count` of independent events of a small rate, int64, ascending: the gaps are geometric."""
    parts, last = [np.empty(0, dtype=np.int64)], -1
    while rate > 0 and last < count - 1:
        expected = (count - last) * rate
        gaps = source.geometric(rate, int(expected + 6 * math.sqrt(expected)) + 4)
        parts.append(np.minimum(gaps, count + 1).cumsum() + last)
        last = int(parts[-1][-1])
    places = np.concatenate(parts)
    return places[: np.searchsorted(places, count)]
