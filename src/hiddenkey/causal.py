"""Causal attention with dropped keys in the kernel below torch's sdpa (CPU).

The kernel takes an additive mask, which may have stride 0 over the queries, together with its own causal mask; the
public function allows only one of the two. Nothing of size queries × keys is built.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .drop import spread

NAME = "_scaled_dot_product_flash_attention_for_cpu"
ARGUMENTS = ["query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"]


def available(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel is there, takes these arguments and these shapes."""
    fits = query.shape[-1] == value.shape[-1] and query.shape[2] <= value.shape[2]
    return fits and query.device.type == "cpu" and not torch.compiler.is_compiling() and _has_kernel()


@cache
def _has_kernel() -> bool:
    if not hasattr(torch.ops.aten, NAME) or not hasattr(torch.ops.aten, NAME + "_backward"):
        return False
    schema = getattr(torch.ops.aten, NAME).default._schema
    return [argument.name for argument in schema.arguments] == ARGUMENTS


def attend_causal(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, keys: Tensor, scale: float | None
) -> Tensor:
    """Query i sees the kept keys among 0..i, or all real ones there if none is kept: -> (B, H, Q, D).

    kept, keys: bool, broadcastable to (B, Hkv or H, 1, K): kept and real, real. A query that sees no real key gives
    zeros.
    """
    return CausalKeys.apply(query, key, value, kept, keys, scale)


class CausalKeys(torch.autograd.Function):
    """Two calls: one for the rows with a kept key, one for the few before it, which the draw would empty.

    In each call the other one's rows see nothing, so their output and gradient are zero and the results add up. The
    second call is as long as the longest run of dropped keys at the start.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, keys: Tensor, scale: float | None
    ) -> Tensor:
        heads = query.shape[1]
        emptied = kept.cumsum(-1) == 0
        start = min(int(emptied.sum(-1).max()), query.shape[2])
        bias = _bias(spread(kept, heads), query).expand(*query.shape[:3], -1)
        output, logsumexp = _kernel(query, key, value, bias, scale)
        early_bias = early_logsumexp = None
        if start:
            rows = emptied[..., :start].transpose(-1, -2) & keys[..., :start]
            early_bias = _bias(spread(rows, heads), query).expand(*query.shape[:2], start, start)
            first = (query[:, :, :start], key[:, :, :start], value[:, :, :start])
            early, early_logsumexp = _kernel(*first, early_bias, scale)
            output[:, :, :start] += early
        ctx.scale, ctx.start = scale, start
        ctx.save_for_backward(query, key, value, output, logsumexp, bias, early_logsumexp, early_bias)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp, bias, early_logsumexp, early_bias = ctx.saved_tensors
        tensors = (gradient, query, key, value, output)
        gradients = _kernel_backward(tensors, logsumexp, bias, ctx.scale)
        if ctx.start:
            early = tuple(x[:, :, : ctx.start] for x in tensors)
            parts = _kernel_backward(early, early_logsumexp, early_bias, ctx.scale)
            for whole, part in zip(gradients, parts, strict=True):
                whole[:, :, : ctx.start] += part
        return *gradients, None, None, None


def _bias(visible: Tensor, query: Tensor) -> Tensor:
    return torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill_(~visible, -torch.inf)


def _kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    return getattr(torch.ops.aten, NAME)(query, key, value, 0.0, True, attn_mask=bias, scale=scale)


def _kernel_backward(
    tensors: tuple[Tensor, ...], logsumexp: Tensor, bias: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = getattr(torch.ops.aten, NAME + "_backward")
    return kernel(*tensors, logsumexp, 0.0, True, attn_mask=bias, scale=scale)
