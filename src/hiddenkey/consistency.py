"""Consistency losses between two views of one batch (arXiv 2403.00812, section 3.2, eq. 11-12).

A consistency says three things: the formula, which second view it wants, and which side gets gradient.
Values are in nats, summed over classes, averaged over rows, in float32 (float64 stays float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .registry import Registry

Divergence = Callable[[Tensor, Tensor], Tensor]
Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class Consistency:
    """A named consistency loss.

    divergence: (…, V) and (…, V) logits in float32 or float64 -> (…) values.
    clean: the second view is the inference pass (no drops); otherwise it is a second draw.
    both: gradient flows into both views; otherwise the second one is held constant.
    scalar: compares predictions themselves, not distributions (regression).
    """

    name: str
    divergence: Divergence
    clean: bool = False
    both: bool = False
    scalar: bool = False

    def by_row(self, first: Tensor, second: Tensor) -> Tensor:
        """The divergence. Raises ValueError where the function gives something else than one value per row."""
        values = self.divergence(first, second)
        if values.shape != first.shape[:-1]:
            raise ValueError(
                f"the function of {self.name!r} must give one value per row, {tuple(first.shape[:-1])}, but gave "
                f"{tuple(values.shape)} for logits of {tuple(first.shape)}"
            )
        return values


CONSISTENCIES: Registry[Consistency] = Registry("consistency")


def register_consistency(
    name: str, *, clean: bool = False, both: bool = False, scalar: bool = False
) -> Callable[[Divergence], Divergence]:
    """Decorator: add a consistency under `name`; the arguments are the fields of `Consistency`.

    Raises ValueError for a malformed or taken name.
    """

    def add(divergence: Divergence) -> Divergence:
        CONSISTENCIES.add(name, Consistency(name, divergence, clean, both, scalar))
        return divergence

    return add


def one_way(first: Tensor, second: Tensor) -> Tensor:
    """KL(P1 || P2) from logits.

    As p and q both sum to 1, with d = log(p/q) it is the sum of p (d + exp(-d) - 1), whose terms are at least 0 in
    floating point too; those of p d cancel for nearly equal views.
    """
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    p, d = log_p.exp(), log_p - log_q
    near = (d + torch.expm1(-d.clamp(min=-1))).clamp(min=0)
    return torch.where(d > -1, p * near, p * (d - 1) + log_q.exp()).sum(-1)


@register_consistency("kl-rdrop", both=True)
@register_consistency("kl-clean", clean=True)
@register_consistency("kl")
def bidirectional(first: Tensor, second: Tensor) -> Tensor:
    """(KL(P1 || P2) + KL(P2 || P1)) / 2, eq. 11; with gradient on both sides R-Drop's (arXiv 2106.14448)."""
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2


@register_consistency("js", clean=True)
def to_inference(first: Tensor, second: Tensor) -> Tensor:
    """KL(P1 || P̄), eq. 12: what the paper calls JS."""
    return one_way(first, second)


@register_consistency("jsd", clean=True)
def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """The textbook Jensen-Shannon divergence between P1 and P̄.

    With m = (p + q) / 2 and d = log(p/q) / 2 it is the sum of m (d tanh d - log cosh d), whose terms are at least 0
    in floating point too; those of p log(p/m) cancel for nearly equal views.
    """
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    d = (log_p - log_q) / 2
    small, apart = d.clamp(-1, 1), d.abs()
    near = small * small.tanh() - torch.log1p(2 * (small / 2).sinh().square())
    decay = (-2 * apart).exp()
    far = math.log(2) - torch.log1p(decay) - 2 * apart * decay / (1 + decay)
    return ((log_p.exp() + log_q.exp()) / 2 * torch.where(apart < 1, near, far)).sum(-1)


@register_consistency("mse", scalar=True)
def squared_difference(first: Tensor, second: Tensor) -> Tensor:
    """(ŷ1 - ŷ2)², summed over outputs: R-Drop's choice for regression (arXiv 2106.14448)."""
    return (first - second).square().sum(-1)


def consistency_loss(
    name: str,
    first: Tensor,
    second: Tensor,
    *,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The consistency `name` between two views.

    first, second: logits (…, V), the view that is trained and the other one; predictions for `mse`.
    valid: bool (…), rows that count; None: all. Without any valid row the loss is 0.
    reduction: `mean` over valid rows, `sum` over them, or `none`: (…), 0 where not valid. Returns float32, of float64
    float64.
    A class that both views exclude by minus infinity gives NaN; exclude it by a number such as -1e4.

    Gradient flows into `first`, and into `second` only where the consistency says both (`kl-rdrop`).
    Raises ValueError for an unknown name, unequal shapes, `mse` of tensors without an axis of outputs, a `valid` that
    does not fit, another reduction.
    """
    consistency = CONSISTENCIES[name]
    if first.shape != second.shape:
        raise ValueError(
            f"the two views must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}: "
            "pass the logits of the same batch twice"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != first.shape[:-1]):
        raise ValueError(
            f"valid must be a bool tensor of shape {tuple(first.shape[:-1])}, the logits' without the classes; "
            f"got {valid.dtype} of shape {tuple(valid.shape)}"
        )
    if consistency.scalar and first.dim() < 2:
        raise ValueError(
            f"{name!r} compares predictions of shape (…, outputs), got {tuple(first.shape)}; unsqueeze(-1)"
        )
    rows = first.shape[:-1]
    if valid is not None:
        first, second = first[valid], second[valid]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    second = second if consistency.both else second.detach()
    values = consistency.by_row(first.to(dtype), second.to(dtype))
    if reduction == "none":
        return values if valid is None else values.new_zeros(rows).masked_scatter(valid, values)
    return values.sum() / max(values.numel(), 1) if reduction == "mean" else values.sum()
