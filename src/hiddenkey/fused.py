"""Fast attention by torch's kernels: drops of whole keys, drops of cells, and none.

A keep mask that is the same for every query is a bias per key, for which nothing of size queries × keys is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import causal, cells, flash
from .masks import Mask, guard, over_cells, spread

# Flash kernels on CUDA want head sizes in multiples of 8.
FEATURES = 8
# Up to so many entries a mask of (B, H, Q, K) costs less than one more feature.
SMALL = 2**22


def attend_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    mask: Mask,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """DropKey (arXiv 2403.00812, eq. 3) with one keep mask per key: keep (B, Hkv or H, 1, K) -> (B, H, Q, Dv).

    bias: additive, broadcastable to (B, H, Q, K). Equal to `attend.reference`, rows that the draw would empty
    included.
    """
    query, key, value = _as_autocast(query, key, value)
    if mask.full is None and bias is None:
        if not mask.causal:
            return _unmasked(query, key, value, keep, mask, scale)
        if flash.available(query, key, value):
            kept, keys = _kept(keep, mask)
            return causal.attend_causal(query, key, value, kept, keys, scale)
    elif query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= SMALL:
        return attend_cells(query, key, value, keep, mask, bias, scale)
    return folded(query, key, value, keep, mask, bias, scale)


def attend_cells(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    mask: Mask,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same with a keep mask per query and key: (B, Hkv or H, Q, K). The weights are never built."""
    query, key, value = _as_autocast(query, key, value)
    if bias is None and flash.available(query, key, value):
        return cells.attend_parts(query, key, value, keep, mask, scale)
    visible = mask.dense((*query.shape[:3], key.shape[2]), query.device)
    allowed = guard(spread(keep, query.shape[1]), visible)
    if bias is not None:
        allowed = torch.where(allowed, bias.to(query.dtype), -torch.inf)
    return _sdpa(query, key, value, allowed, scale)


def undropped(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, bias: Tensor | None, scale: float | None
) -> Tensor:
    """The same with nothing dropped."""
    seen = _dense(mask, bias, query)
    return _sdpa(query, key, value, None if seen is None else over_cells(seen), scale, mask.causal)


def _unmasked(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, mask: Mask, scale: float | None) -> Tensor:
    kept, keys = _kept(keep, mask)
    # All rows of a head see the same keys, so they are all emptied or none is.
    visible = kept | (keys & ~kept.any(-1, keepdim=True))
    bias = _over_queries(torch.where(visible, 0.0, -torch.inf), query)
    return _sdpa(query, key, value, bias, scale)


def folded(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, mask: Mask, bias: Tensor | None, scale: float | None
) -> Tensor:
    """The bias as one more feature of queries and keys, for any kernel and any mask (identities of section 2).

    A row whose visible keys are all dropped is shifted as a whole, so it keeps its full support by itself.
    """
    size = query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    if mask.keys is not None or (mask.causal and bias is not None):
        mask = Mask(full=mask.dense((*query.shape[:3], key.shape[2]), query.device))
    shift = torch.where(keep, 0.0, -_shift(query, key, bias, scale))
    if shift.shape[1] not in (1, key.shape[1]):
        key, value = (x.repeat_interleave(shift.shape[1] // x.shape[1], dim=1) for x in (key, value))
    extra = F.pad(shift.transpose(-1, -2).expand(*key.shape[:-1], 1), (0, FEATURES - 1)).to(key.dtype)
    query = torch.cat([query, F.pad(query.new_full((*query.shape[:-1], 1), 1 / scale), (0, FEATURES - 1))], -1)
    wide = F.pad(value, (0, max(query.shape[-1] - value.shape[-1], 0)))
    output = _sdpa(query, torch.cat([key, extra], -1), wide, _dense(mask, bias, query), scale, mask.causal)
    return output[..., : value.shape[-1]]


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: bool = False
) -> Tensor:
    grouped = bool(query.shape[1] != key.shape[1])  # of symbolic sizes it would be no bool
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _shift(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """What is taken off dropped keys, (); of a row that the draw would empty it is taken off the whole, and cancels.

    Large enough that the weight of a dropped key underflows to zero beside any kept one, whose logit lies at most
    twice the longest query times the longest key below, and hardly larger, because it costs digits in emptied rows
    (float32 at 1e4: four of them).
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query_length, key_length = (torch.linalg.vector_norm(x.detach(), dim=-1, dtype=wide).amax() for x in (query, key))
    furthest = scale * query_length * key_length
    if bias is not None:
        furthest = furthest + bias.detach().abs().amax()
    underflow = 1000.0 if query.dtype == torch.float64 else 120.0
    return (underflow + 2 * furthest).clamp(max=torch.finfo(query.dtype).max / 4 * min(scale, 1.0))


def _dense(mask: Mask, bias: Tensor | None, query: Tensor) -> Tensor | None:
    if bias is None:
        return mask.full
    bias = bias.to(query.dtype)
    return bias if mask.full is None else torch.where(mask.full, bias, -torch.inf)


def _kept(keep: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """(kept and real, real) keys, both bool and broadcastable to (B, Hkv, 1, K)."""
    if mask.keys is None:
        return keep, torch.ones_like(keep)
    keys = mask.keys[:, None, None, :]
    return keep & keys, keys


def _over_queries(bias: Tensor, query: Tensor) -> Tensor:
    """(B, Hkv, 1, K) -> (B, H, Q, K) with stride 0 over the queries."""
    return spread(bias.to(query.dtype), query.shape[1]).expand(*query.shape[:3], -1)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does before sdpa, for a kernel below it."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
