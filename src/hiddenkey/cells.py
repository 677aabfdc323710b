"""Attention with a draw for every query and key in torch's CPU kernel, a part of the batch at a time.

The kernel wants a float mask, which for a whole batch costs as much to build as the attention. That of a few heads
stays in cache, and its memory serves the next ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import flash
from .masks import Mask, guard, over_cells, spread

# Entries of a part's mask: 8 MiB of float32, in cache; from 32 MiB on, Linux's allocator asks the system every time.
PART_CELLS = 2**21
# Causal rows that see so few keys are looked at before the kernel; at p = 0.5 one in 10^9 of the others is empty.
FIRST_ROWS = 32
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Part = tuple[slice, slice, slice]


def attend_parts(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """DropKey (arXiv 2403.00812, eq. 3): keep (B, Hkv or H, Q, K) -> (B, H, Q, D), in the dtype of `query`.

    Where `flash.available`. Exact, rows that the draw would empty included.
    """
    return Cells.apply(query, key, value, keep, mask, scale)


class Cells(torch.autograd.Function):
    """The kernel over every part; one byte per cell is kept for the backward pass, never a float."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, keep: Tensor, mask: Mask, scale: float | None
    ) -> Tensor:
        batch, heads, queries, size = query.shape
        # As torch lays it out: heads beside each other for every query.
        output = query.new_empty(batch, queries, heads, size).transpose(1, 2)
        ctx.parts, sums, lefts = list(parts(query, key)), [], []
        for part in ctx.parts:
            tensors, part_keep, part_mask = _cut(part, query, key, value, keep, mask)
            left = seen_at_first(part_keep, part_mask, tensors[0], tensors[1])
            found, total = _run(tensors, left, mask.causal, scale)
            # A row that sees nothing is zero; so may be one that sees something, which _mend tells apart.
            suspect = not bool(found[..., 0].all())
            mended = _mend(left, part_mask, tensors[0], tensors[1]) if suspect else None
            if mended is not None:
                left = mended
                found, total = _run(tensors, left, mask.causal, scale)
            output[part[0], part[1]] = found
            sums.append(total)
            lefts.append(left)
        ctx.causal, ctx.scale = mask.causal, scale
        ctx.save_for_backward(query, key, value, output, *sums, *lefts)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *rest = ctx.saved_tensors
        sums, lefts = rest[: len(ctx.parts)], rest[len(ctx.parts) :]
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for (rows, heads, groups), total, left in zip(ctx.parts, sums, lefts, strict=True):
            wide = [x[rows, heads] for x in (gradient, query, output)]
            narrow = [x[rows, groups] for x in (key, value)]
            bias = _bias(left, wide[1], narrow[0])
            found = flash.backward((*wide[:2], *narrow, wide[2]), total, bias, ctx.causal, ctx.scale)
            for whole, axis, piece in zip(grads, (heads, groups, groups), found, strict=True):
                whole[rows, axis] = piece
        return *grads, None, None, None


def parts(query: Tensor, key: Tensor) -> Iterator[Part]:
    """(examples, heads, key/value heads) of every part: whole examples, or some heads of one."""
    batch, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
    cells, group = query.shape[2] * key.shape[2], heads // kv_heads
    rows = min(max(PART_CELLS // (cells * heads), 1), batch)
    groups = kv_heads if rows > 1 else min(max(PART_CELLS // (cells * group), 1), kv_heads)
    for row in range(0, batch, rows):
        for start in range(0, kv_heads, groups):
            stop = min(start + groups, kv_heads)
            yield slice(row, row + rows), slice(start * group, stop * group), slice(start, stop)


def seen_at_first(keep: Tensor, mask: Mask, query: Tensor, key: Tensor) -> Tensor:
    """What is kept of what is visible, before causality; rows that are likely to be emptied are full again."""
    if mask.full is not None:
        return guard(keep, mask.full)
    left = keep if mask.keys is None else keep & mask.keys[:, None, None]
    if not mask.causal:
        return left
    few = min(FIRST_ROWS, query.shape[2])
    first = _mend(left[:, :, :few, :few], _first(mask, few), query[:, :, :few], key[:, :, :few])
    if first is None:
        return left
    left = left.expand(*left.shape[:2], query.shape[2], -1).clone()
    left[:, :, :few, :few] = first
    return left


def _mend(left: Tensor, mask: Mask, query: Tensor, key: Tensor) -> Tensor | None:
    """`left` with the emptied rows given all they can see; None where no row is emptied."""
    visible = mask.dense((*query.shape[:3], key.shape[2]), query.device)
    shown = left if visible is None else left & visible
    emptied = ~shown.any(-1, keepdim=True)
    if visible is not None:
        emptied = emptied & visible
    return left | emptied if bool(emptied.any()) else None


def _first(mask: Mask, count: int) -> Mask:
    return Mask(None if mask.keys is None else mask.keys[:, :count], mask.causal)


def _cut(
    part: Part, query: Tensor, key: Tensor, value: Tensor, keep: Tensor, mask: Mask
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Mask]:
    rows, heads, groups = part
    tensors = (query[rows, heads], key[rows, groups], value[rows, groups])
    keys = None if mask.keys is None else mask.keys[rows]
    keep = _of_part(keep, part, query, key)
    if mask.full is None:
        return tensors, keep, Mask(keys, mask.causal)
    return tensors, spread(keep, tensors[0].shape[1]), Mask(full=_of_part(mask.full, part, query, key))


def _of_part(mask: Tensor, part: Part, query: Tensor, key: Tensor) -> Tensor:
    """The part of a mask that broadcasts to (B, Hkv or H, Q, K)."""
    rows, heads, groups = part
    mask = over_cells(mask)
    axis = {query.shape[1]: heads, key.shape[1]: groups}.get(mask.shape[1], slice(None))
    return mask[rows if mask.shape[0] > 1 else slice(None), axis]


def _run(
    tensors: tuple[Tensor, Tensor, Tensor], left: Tensor, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    query, key, value = tensors
    return flash.forward(query, key, value, _bias(left, query, key), is_causal, scale)


def _bias(left: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """0 where left, minus infinity elsewhere: (B, H, Q, K)."""
    # Read as an integer, minus infinity is -1/eps in every IEEE type: left / eps - 1/eps in one pass over the cells.
    step, kind = int(1 / torch.finfo(query.dtype).eps), INTEGERS[query.dtype.itemsize]
    bits = left.view(torch.uint8).to(kind)
    bias = torch.add(torch.tensor(-step, dtype=kind), bits, alpha=step, out=bits).view(query.dtype)
    return spread(bias, query.shape[1]).expand(*query.shape[:3], key.shape[2])
