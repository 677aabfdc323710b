"""Structured dropout for people with their own models: a module in the place of `nn.Dropout`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .axes.grid import Grid
from .drop import Tally, compensate, draw, select
from .recipe import Drop, Recipe, RecipeError


def drop_stream(
    x: Tensor,
    drop: Drop,
    *,
    segments: Tensor | None = None,
    keep: Tensor | None = None,
    tally: Tally | None = None,
) -> Tensor:
    """Drop from a (B, T, D) sequence or (B, D) vectors: x' = C(x · M), M ~ P(p).

    segments: int (B, T), see `Grid`. keep: replaces the draw. tally: counts it.
    """
    if keep is None:
        keep = draw(drop, Grid.stream(x, segments))
        if tally is not None:
            tally.add(keep)
        if x.dim() == 2:
            keep = keep.squeeze(1)
    return compensate(drop, x * keep)


class StructuredDropout(nn.Module):
    """Structured dropout of a (B, T, D) sequence, active in training only.

    drop: a recipe with one drop at a stream position, such as "hidden:span@0.1"; which position does not matter
    here. Raises RecipeError for any other recipe.
    """

    def __init__(self, drop: str | Recipe) -> None:
        super().__init__()
        drops = select(drop, ("stream",), "StructuredDropout")
        if len(drops) > 1:
            raise RecipeError(
                f"StructuredDropout takes one drop, got {len(drops)} in '{drop}': make one module for each"
            )
        self.drop = drops[0]

    def forward(self, x: Tensor, valid: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """x: (B, T, D) of any float dtype -> the same.

        valid: bool (B, T), False at padding, which spans leave out. keep: bool, broadcastable to (B, T, D),
        True = kept, replaces the draw. Raises ValueError for tensors that do not fit.
        """
        if x.dim() != 3:
            raise ValueError(f"StructuredDropout takes a (B, T, D) tensor, got shape {tuple(x.shape)}")
        if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:2]):
            raise ValueError(
                f"valid must be bool of shape {tuple(x.shape[:2])}, got {valid.dtype} of shape {tuple(valid.shape)}"
            )
        if keep is not None and keep.dtype != torch.bool:
            raise ValueError(f"keep must be a bool tensor (True = kept), got {keep.dtype}")
        if not self.training or self.drop.p == 0:
            return x
        return drop_stream(x, self.drop, segments=None if valid is None else valid.long(), keep=keep)

    def extra_repr(self) -> str:
        return f"'{self.drop}'"
