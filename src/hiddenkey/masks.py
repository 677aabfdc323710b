"""What each query may see, kept as small as it is known, and what a draw leaves of it: never an emptied row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError
from .patterns import PATTERNS, Grid
from .recipe import Drop

Shape = tuple[int, int, int, int]
# A weight of exp(-50) beside one of 1 is nothing in float32; in a row of which a draw takes the others it is 1.
FAR = -50.0


@dataclass(frozen=True)
class Mask:
    """Visibility of keys: everything, less what the fields take away.

    keys: bool (B, K), False at padding. causal: query i sees keys 0..i, as torch's `is_causal`.
    full: bool, broadcastable to (B, H, Q, K), for anything else; then the other two are not set.
    """

    keys: Tensor | None = None
    causal: bool = False
    full: Tensor | None = None

    def dense(self, shape: Shape, device: torch.device) -> Tensor | None:
        """A bool mask that broadcasts to (B, H, Q, K); None: everything is visible."""
        if self.full is not None:
            return self.full
        keys = None if self.keys is None else self.keys[:, None, None, :]
        if not self.causal:
            return keys
        causal = torch.ones(shape[-2:], dtype=torch.bool, device=device).tril()
        return causal if keys is None else causal & keys

    def segments(self, shape: Shape) -> Tensor | None:
        """Which keys are one document: int (B, K), 0 where no query looks; None: one document each."""
        if self.full is not None:
            return documents_in(self.full, shape)
        return None if self.keys is None else self.keys.long()


def read_mask(mask: Tensor | None, *, causal: bool = False) -> tuple[Mask, Tensor | None]:
    """(visibility, additive bias) of a boolean or additive mask.

    An additive entry below half the lowest number of its dtype hides the key: libraries write minus infinity or
    the lowest number itself.
    """
    if mask is None:
        return Mask(causal=causal), None
    if mask.dtype == torch.bool:
        return Mask(full=mask), None
    visible = ~(mask <= torch.finfo(mask.dtype).min / 2)  # NaN hides nothing, and is seen
    return Mask(full=visible), mask.masked_fill(~visible, 0)


def hiding(mask: Tensor) -> Tensor:
    """An additive mask of any shape; where it holds nothing but zeros and one number of -50 or less, with the lowest
    number of its dtype in the place of that, which hides for certain.

    Swin's windows hide by -100, older libraries by -10,000. A bias takes many values, however low they are (ALiBi,
    relative positions), and stays.
    """
    low, lowest = mask.amin(), torch.finfo(mask.dtype).min
    hides = mask == low
    shown = mask == 0
    only = (shown | hides).all() & shown.any() & (low <= FAR) & (low > lowest / 2)
    return mask.masked_fill(hides & only, lowest)


def documents_in(visible: Tensor, shape: Shape) -> Tensor:
    """The documents of a batch, read off its mask: int (B, K), 0 where no query looks.

    Neighbours are of one document when the later one, as a query, sees both.
    """
    batch, _, queries, keys = shape
    heads = visible.shape[-3] if visible.dim() > 2 else 1
    seen = visible.expand(batch, heads, queries, keys).any(1)
    real = seen.any(1)
    joined = real[:, 1:] & real[:, :-1]
    if queries <= keys:
        # The last keys are the queries' own; a prefix comes before them.
        own = keys - queries
        joined[:, max(own - 1, 0) :] &= seen.diagonal(own - 1, 1, 2)
    opens = real.clone()
    opens[:, 1:] &= ~joined
    return opens.cumsum(-1) * real


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


def guard(keep: Tensor, visible: Tensor | None) -> Tensor:
    """What is left to see: the visible entries that are kept, or all of them in a row that would be emptied.

    keep, visible: bool, broadcastable to (B, H, Q, K); visible None: everything. Under a causal mask a column draw
    empties query i with probability p^(i+1); minus infinity would then give NaN, a large finite number a look into
    the future.
    """
    left = keep if visible is None else keep & visible
    # The largest byte, because on a CPU torch takes eight times as long for `any` over bool (torch 2.13).
    emptied = left.view(torch.uint8).amax(-1, keepdim=True) == 0
    return left | (emptied if visible is None else emptied & visible)


def over_cells(mask: Tensor) -> Tensor:
    """A mask that broadcasts to (B, H, Q, K), with all four axes."""
    return mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))


def spread(keep: Tensor, heads: int) -> Tensor:
    """Give every query head the mask of its key/value head: (B, Hkv, …) -> (B, H, …)."""
    own = keep.shape[1]
    return keep if own in (1, heads) else keep.repeat_interleave(heads // own, dim=1)


def broadcasts(shape: torch.Size, wanted: Sequence[int | tuple[int, ...]]) -> bool:
    """Whether a tensor of this shape broadcasts to the wanted one; a tuple holds the sizes allowed on an axis."""
    sizes = [size if isinstance(size, tuple) else (size,) for size in wanted]
    pairs = zip(reversed(shape), reversed(sizes), strict=False)
    return len(shape) <= len(sizes) and all(size == 1 or size in allowed for size, allowed in pairs)


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
