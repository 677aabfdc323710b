"""Attention alone, forward and backward, in ratios to torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hiddenkey import attention

from .common import Work, measure, parse, parser, write

RATE = 0.1
SHAPES = ("8x12x512x64", "1x16x1024x64", "1x16x2048x64", "1x16x4096x64")
Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def shape(text: str) -> tuple[int, ...]:
    """B x H x L x D, for argparse."""
    batch, heads, length, width = map(int, text.split("x"))
    return batch, heads, length, width


def plain(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """torch's own, nothing dropped."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def ours(recipe: str) -> Attend:
    """`hiddenkey.attention` with a recipe."""
    return lambda query, key, value, causal: attention(query, key, value, recipe, is_causal=causal)


def visible(query: Tensor, causal: bool) -> Tensor:
    """Which keys a query may see: (L, L)."""
    cells = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
    return cells.tril() if causal else cells


def boolean_mask(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Dropped keys as a mask of (B, H, L, L) for torch's attention; the diagonal stays, so no row is empty."""
    keep = torch.rand(*key.shape[:2], 1, key.shape[2], device=key.device) >= RATE
    eye = torch.eye(key.shape[2], dtype=torch.bool, device=key.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(keep | eye) & visible(query, causal))


def dropkey(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """DropKey as in algorithm 1 of arXiv 2208.02646: whole logits, and -1e12 where a cell is dropped."""
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    logits = logits.masked_fill(~visible(query, causal), torch.finfo(logits.dtype).min)
    dropped = torch.bernoulli(torch.full_like(logits, RATE))
    return (logits + dropped * -1e12).softmax(-1).to(value.dtype) @ value


VARIANTS: dict[str, Attend] = {
    "sdpa": plain,
    **{f"logits:{pattern}@{RATE}": ours(f"logits:{pattern}@{RATE}") for pattern in ("column", "span", "element")},
    "column as a boolean mask": boolean_mask,
    "textbook DropKey": dropkey,
}


def backward(attend: Attend, tensors: list[Tensor], causal: bool) -> Work:
    """Forward, and backward from a gradient of ones."""
    ones = torch.ones_like(tensors[0])
    return lambda: torch.autograd.grad(attend(*tensors, causal), tensors, ones)


def main() -> None:
    """Measure every shape, causal and not."""
    flags = parser(__doc__)
    flags.add_argument("--shapes", type=shape, nargs="+", default=[shape(text) for text in SHAPES], help="BxHxLxD")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    found = parse(flags)
    cases: list[dict[str, Any]] = []
    for size in found.shapes:
        torch.manual_seed(0)
        dtype = getattr(torch, found.dtype)
        tensors = [torch.randn(size, device=found.device, dtype=dtype, requires_grad=True) for _ in range(3)]
        for causal in (False, True):
            works = {name: backward(attend, tensors, causal) for name, attend in VARIANTS.items()}
            cases.append(measure(f"{'causal' if causal else 'full'} {'x'.join(map(str, size))}", works, found))
    write(found, cases)


if __name__ == "__main__":
    main()
