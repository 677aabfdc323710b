"""Structured dropout for people with their own models: a module in the place of `nn.Dropout`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .compensations import COMPENSATIONS
from .errors import RecipeError
from .masks import broadcasts, draw
from .patterns import Grid
from .recipe import Drop, Recipe, select


class KeepTimes(torch.autograd.Function):
    """x · keep · factor in one pass, forward and backward; of the mask one byte per cell is kept."""

    @staticmethod
    def forward(x: Tensor, keep: Tensor, factor: float) -> Tensor:
        if torch.compiler.is_compiling():  # it fuses this; torch 2.11 gets the gradient of the rest wrong
            return x * keep * factor
        # Through uint8, because torch casts bool four times slower (CPU, torch 2.13); in place, because a fresh
        # tensor costs more than the product; both products in one pass, which rounds once.
        kept = keep.view(torch.uint8).to(x.dtype)
        out = kept if kept.shape == x.shape else None
        return torch.addcmul(x.new_zeros(()), kept, x, value=factor, out=out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, keep, ctx.factor = inputs
        ctx.save_for_backward(keep)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return KeepTimes.apply(gradient, keep, ctx.factor), None, None


def draw_stream(x: Tensor, drop: Drop, segments: Tensor | None = None) -> Tensor:
    """A keep mask that broadcasts to a (B, T, D) sequence or (B, D) vectors. segments: int (B, T), see `Grid`."""
    keep = draw(drop, Grid.stream(x, segments))
    return keep if x.dim() > 2 else keep.squeeze(1)


def drop_stream(x: Tensor, drop: Drop, keep: Tensor) -> Tensor:
    """x' = C(x · M), with M given as keep, broadcastable to x."""
    compensation = COMPENSATIONS[drop.compensation]
    if compensation.factor is None:
        return compensation.apply(x * keep, drop.p)
    return KeepTimes.apply(x, keep, compensation.factor(drop.p))


class StructuredDropout(nn.Module):
    """Structured dropout of a (B, T, D) sequence, active in training only.

    drop: a recipe with one drop at a stream position, such as "hidden:span@0.1"; which position does not matter
    here. Its drops in attention are for `attention`, its consistency for `consistency_loss`. Raises RecipeError where
    it has none or several at stream positions.
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
        if not x.is_floating_point():
            raise ValueError(f"StructuredDropout takes a floating point tensor, got {x.dtype}")
        if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:2]):
            raise ValueError(
                f"valid must be bool of shape {tuple(x.shape[:2])}, got {valid.dtype} of shape {tuple(valid.shape)}"
            )
        if keep is not None and keep.dtype != torch.bool:
            raise ValueError(f"keep must be a bool tensor (True = kept), got {keep.dtype}")
        if keep is not None and not broadcasts(keep.shape, x.shape):
            raise ValueError(f"keep must broadcast to {tuple(x.shape)}, got shape {tuple(keep.shape)}")
        if not self.training or (self.drop.p == 0 and keep is None):
            return x
        if keep is None:
            keep = draw_stream(x, self.drop, None if valid is None else valid.long())
        return drop_stream(x, self.drop, keep)

    def extra_repr(self) -> str:
        return f"'{self.drop}'"
