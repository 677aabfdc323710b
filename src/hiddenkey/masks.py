"""What each query may see, kept as small as it is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def over_cells(mask: Tensor) -> Tensor:
    """A mask that broadcasts to (B, H, Q, K), with all four axes."""
    return mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))


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
