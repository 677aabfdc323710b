"""One drop at work: draw a keep mask, never empty a row, count what was dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compensations import COMPENSATIONS
from .errors import RecipeError, UserError
from .patterns import PATTERNS, Grid
from .positions import POSITIONS, Space
from .recipe import Drop, Recipe, parse


def draw(drop: Drop, grid: Grid) -> Tensor:
    """A keep mask (True = kept) that broadcasts to `grid.shape`.

    Raises UserError where the pattern's function gave something else.
    """
    keep = PATTERNS[drop.pattern].draw(grid, drop.p)
    if keep.dtype != torch.bool or keep.dim() != len(grid.shape) or not broadcasts(keep.shape, grid.shape):
        raise UserError(
            f"the pattern {drop.pattern!r} must draw a bool mask that broadcasts to {grid.shape}, but drew "
            f"{keep.dtype} of shape {tuple(keep.shape)}; use grid.lay for one over places"
        )
    return keep


def compensate(drop: Drop, erased: Tensor) -> Tensor:
    """Apply the drop's compensation to a tensor whose dropped entries are zero."""
    return COMPENSATIONS[drop.compensation].apply(erased, drop.p)


def space_of(drop: Drop) -> Space:
    """What the drop acts on: attention logits, attention weights, or a stream."""
    return POSITIONS[drop.position].space


def guard(keep: Tensor, visible: Tensor | None) -> Tensor:
    """What is left to see: the visible entries that are kept, or all of them in a row that would be emptied.

    keep, visible: bool, broadcastable to (B, H, Q, K); visible None: everything. Under a causal mask a column draw
    empties query i with probability p^(i+1); minus infinity would then give NaN, a large finite number a look into
    the future.
    """
    left = keep if visible is None else keep & visible
    emptied = ~left.any(-1, keepdim=True)
    return left | (emptied if visible is None else emptied & visible)


def spread(keep: Tensor, heads: int) -> Tensor:
    """Give every query head the mask of its key/value head: (B, Hkv, …) -> (B, H, …)."""
    own = keep.shape[1]
    return keep if own in (1, heads) else keep.repeat_interleave(heads // own, dim=1)


def broadcasts(shape: torch.Size, wanted: Sequence[int | tuple[int, ...]]) -> bool:
    """Whether a tensor of this shape broadcasts to the wanted one; a tuple holds the sizes allowed on an axis."""
    sizes = [size if isinstance(size, tuple) else (size,) for size in wanted]
    pairs = zip(reversed(shape), reversed(sizes), strict=False)
    return len(shape) <= len(sizes) and all(size == 1 or size in allowed for size, allowed in pairs)


def select(recipe: str | Recipe, spaces: tuple[Space, ...], user: str) -> tuple[Drop, ...]:
    """The drops of `recipe` in the given spaces, for a function that has no layers to choose from.

    Raises RecipeError where there is none, or one of them names layers.
    """
    drops = tuple(drop for drop in parse(recipe).drops if space_of(drop) in spaces)
    if not drops:
        allowed = [position.name for position in POSITIONS if position.space in spaces]
        raise RecipeError(
            f"{user} got the recipe '{recipe}', which drops nothing at {' or '.join(allowed)}: "
            f"write for example '{allowed[0]}:column@0.1'"
        )
    for drop in drops:
        if drop.layers is not None:
            raise RecipeError(f"{user} knows no layers, so '{drop}' can't choose any: leave out [{drop.layers}]")
    return drops


def drawn_together(drop: Drop, keep: Tensor, lead: int) -> int:
    """How many entries of a keep mask one draw decides; lead: the number of its leading axes."""
    return 1 if PATTERNS[drop.pattern].unit == "entry" else keep.shape[lead:].numel()


class Tally:
    """How many mask entries were drawn and how many of them dropped, summed where the masks live.

    Of a large mask the first 65,536 entries are counted: a count over all of them costs as much as half the draw.
    What activation checkpointing recomputes is a draw seen again, and is not counted.

    counts: int (3,): dropped, drawn, and the sum of the squared sizes of what is drawn together, from which
    `draws` follows. A tensor, because a compiled model would be compiled again for every new number.
    """

    COUNTED = 2**16

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def add(self, keep: Tensor, together: int = 1) -> None:
        """Count one draw, of which `together` entries at a time are one; does not wait for the device."""
        if not torch.compiler.is_compiling() and is_recomputing():
            return
        keep = keep.flatten()[: self.COUNTED]
        drawn = torch.full((), keep.numel(), device=keep.device)
        self._sum(torch.stack([drawn - torch.count_nonzero(keep), drawn, drawn * min(together, keep.numel())]))

    def merge(self, other: Tally) -> None:
        """Add another tally's counts to this one's."""
        if other.counts is not None:
            self._sum(other.counts)

    @property
    def rate(self) -> float:
        """The realised drop rate; NaN where nothing was drawn, or only from empty tensors."""
        if self.counts is None:
            return float("nan")
        dropped, drawn, _ = self.counts.tolist()
        return dropped / drawn if drawn else float("nan")

    def _sum(self, counts: Tensor) -> None:
        self.counts = counts if self.counts is None else self.counts + counts.to(self.counts.device)


def is_recomputing() -> bool:
    """Whether a forward runs inside a backward, as activation checkpointing does it."""
    return torch._C._current_graph_task_id() != -1
