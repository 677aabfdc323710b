"""What one keep mask is drawn on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
