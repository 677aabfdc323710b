"""Causal attention with dropped keys in torch's CPU kernel: nothing of size queries × keys is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import flash
from .masks import spread


def attend_causal(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, keys: Tensor, scale: float | None
) -> Tensor:
    """Query i sees the kept keys among 0..i, or all real ones there if none is kept: -> (B, H, Q, D).

    kept, keys: bool, broadcastable to (B, Hkv or H, 1, K): kept and real, real. A query that sees no real key gives
    zeros. Where `flash.available`.
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
        output, logsumexp = flash.forward(query, key, value, bias, True, scale)
        early_bias = early_logsumexp = None
        if start:
            rows = emptied[..., :start].transpose(-1, -2) & keys[..., :start]
            early_bias = _bias(spread(rows, heads), query).expand(*query.shape[:2], start, start)
            first = (query[:, :, :start], key[:, :, :start], value[:, :, :start])
            early, early_logsumexp = flash.forward(*first, early_bias, True, scale)
            output[:, :, :start] += early
        ctx.scale, ctx.start = scale, start
        ctx.save_for_backward(query, key, value, output, logsumexp, bias, early_logsumexp, early_bias)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp, bias, early_logsumexp, early_bias = ctx.saved_tensors
        tensors = (gradient, query, key, value, output)
        gradients = flash.backward(tensors, logsumexp, bias, True, ctx.scale)
        if ctx.start:
            early = tuple(x[:, :, : ctx.start] for x in tensors)
            parts = flash.backward(early, early_logsumexp, early_bias, True, ctx.scale)
            for whole, part in zip(gradients, parts, strict=True):
                whole[:, :, : ctx.start] += part
        return *gradients, None, None, None


def _bias(visible: Tensor, query: Tensor) -> Tensor:
    return torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill_(~visible, -torch.inf)
