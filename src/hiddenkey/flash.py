"""torch's CPU attention kernel, called below `scaled_dot_product_attention`.

There it takes an additive mask, which may have stride 0 over the queries, together with its own causal mask, and
returns what a backward pass of one's own needs. A query that sees nothing gives zeros.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NAME = "_scaled_dot_product_flash_attention_for_cpu"
ARGUMENTS = ["query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"]


def available(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel is there, takes these arguments and these shapes, and reads them as they lie.

    It takes neighbours along the last axis for neighbours in memory, without a look.
    """
    fits = query.shape[-1] == value.shape[-1] and query.shape[2] <= value.shape[2]
    fits = fits and query.shape[0] == key.shape[0] == value.shape[0]
    fits = fits and all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    return fits and query.device.type == "cpu" and not torch.compiler.is_compiling() and _has_kernel()


@cache
def _has_kernel() -> bool:
    if not hasattr(torch.ops.aten, NAME) or not hasattr(torch.ops.aten, NAME + "_backward"):
        return False
    schema = getattr(torch.ops.aten, NAME).default._schema
    return [argument.name for argument in schema.arguments] == ARGUMENTS


def forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(output (B, H, Q, D), logsumexp (B, H, Q)); bias: (B, H, Q, K) in the dtype of `query`."""
    return getattr(torch.ops.aten, NAME)(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)


def backward(
    tensors: tuple[Tensor, ...], logsumexp: Tensor, bias: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. tensors: the output's gradient, query, key, value, output."""
    kernel = getattr(torch.ops.aten, NAME + "_backward")
    return kernel(*tensors, logsumexp, 0.0, is_causal, attn_mask=bias, scale=scale)
