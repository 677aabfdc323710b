"""Oracles written from the equations of arXiv 2403.00812 alone: loops over scalars, no code of the library."""

from __future__ import annotations

import torch
from torch import Tensor

# The drop of a recipe, up to its pattern, and the name of its equation below.
KINDS = {
    "logits:{}@{}": "dropkey",
    "weights:{}:none@{}": "none",
    "weights:{}:rescale@{}": "rescale",
    "weights:{}@{}": "normalize",
    "weights:{}:normalize-grad@{}": "normalize-grad",
}


def softmax(g: Tensor, support: list[int]) -> dict[int, Tensor]:
    """w_j = e^{g_j} / S over the keys of `support`."""
    top = max(float(g[j].detach()) for j in support)
    exps = {j: torch.exp(g[j] - top) for j in support}
    total = sum(exps.values())
    return {j: e / total for j, e in exps.items()}


def row_weights(g: Tensor, visible: Tensor, keep: Tensor, kind: str, p: float) -> Tensor:
    """What meets the values in one row: eq. 3 (`dropkey`) or eq. 1-2 and its variants.

    A row that the mask would empty keeps its full visible support; a row that sees nothing is zero.
    """
    live = [j for j in range(len(g)) if visible[j]]
    if not live:
        return torch.zeros_like(g)
    kept = [j for j in live if keep[j]] or live
    if kind == "dropkey":
        weights = softmax(g, kept)
    else:
        plain = softmax(g, live)
        mass = sum(plain[j] for j in kept)
        divisor = {"none": 1, "rescale": 1 - p, "normalize": mass.detach(), "normalize-grad": mass}[kind]
        weights = {j: plain[j] / divisor for j in kept}
    return torch.stack([weights.get(j, g.new_zeros(())) for j in range(len(g))])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    kind: str,
    p: float,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """(B, H, Q, Dv), row by row; query head h reads kv head h // group.

    keep, visible and bias broadcast to (B, H, Q, K).
    """
    batch, heads, queries, width = query.shape
    cells = (batch, heads, queries, key.shape[2])
    group = heads // key.shape[1]
    keep = keep.expand(cells)
    visible = torch.ones(cells, dtype=torch.bool) if visible is None else visible.expand(cells)
    bias = None if bias is None else bias.expand(cells)
    scale = width**-0.5 if scale is None else scale
    out = []
    for b in range(batch):
        for h in range(heads):
            keys, values = key[b, h // group], value[b, h // group]
            for i in range(queries):
                g = keys @ query[b, h, i] * scale
                if bias is not None:
                    g = g + bias[b, h, i]
                out.append(row_weights(g, visible[b, h, i], keep[b, h, i], kind, p) @ values)
    return torch.stack(out).view(batch, heads, queries, value.shape[-1])


def grads(out: Tensor, inputs: tuple[Tensor, ...], seed: int = 5) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of `out`."""
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return torch.autograd.grad(out, inputs, upstream)


def assert_same(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    """Equal values and equal gradients with respect to every input."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for mine, other in zip(grads(ours, inputs), grads(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def qkv(
    batch: int = 2, heads: int = 2, queries: int = 5, keys: int = 5, width: int = 3, kv_heads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random float64 leaves (B, H, Q, D), (B, Hkv, K, D), (B, Hkv, K, D)."""
    kv = (batch, heads if kv_heads is None else kv_heads, keys, width)
    shapes = ((batch, heads, queries, width), kv, kv)
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return query, key, value


def some_keep(pattern: str, batch: int, heads: int, queries: int, keys: int, p: float = 0.4) -> Tensor:
    """A mask of the shape of `pattern`, written by hand; every mask drops something."""
    if pattern == "element":
        keep = torch.rand(batch, heads, queries, keys) >= p
        keep[..., 0, 0] = False
        return keep
    keep = torch.ones(batch, heads, 1, keys, dtype=torch.bool)
    if pattern == "column":
        keep = torch.rand(batch, heads, 1, keys) >= p
        keep[:, 0, 0, 1] = False
        return keep
    for b in range(batch):
        for h in range(heads):
            start = (b + 2 * h) % (keys - 1)
            keep[b, h, 0, start : start + 2] = False
    return keep


def visibility(name: str, batch: int, length: int) -> Tensor:
    """Boolean masks (B, 1, Q, K) as models make them: words joined by `+`.

    causal, window (causal, three keys), left / right (padding, longer in later examples), packed (two documents).
    """
    i, j = torch.arange(length)[:, None], torch.arange(length)
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool)
    for word in name.split("+"):
        if word == "causal":
            mask &= j <= i
        elif word == "window":
            mask &= (j <= i) & (j > i - 3)
        elif word == "packed":
            mask &= (j < length // 2) == (i < length // 2)
        elif word in ("left", "right"):
            for b in range(batch):
                pad = min(2 * b, length - 1)
                mask[b] &= (j >= pad) if word == "left" else (j < length - pad)
        elif word != "all":
            raise KeyError(word)
    return mask
