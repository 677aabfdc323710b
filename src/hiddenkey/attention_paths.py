"""Attention with dropped logits or weights (arXiv 2403.00812, eq. 1-3): the reference, and the choice of path.

`reference` is written from the equations; every faster path equals it, rows that a draw would empty included:

    by_key   a draw of whole keys under no mask but padding: one bias per key
    folded   a draw of whole keys for many queries and keys, under any mask: one more feature
    by_cell  everything else: a mask of (B, H, Q, K)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .compensations import COMPENSATIONS
from .masks import Mask, Shape, broadcasts, draw, guard, hiding, over_cells, read_mask, spread
from .patterns import PATTERNS, Grid
from .recipe import Drop, Recipe, select, space_of

# Flash kernels on CUDA want head sizes in multiples of 8.
FEATURES = 8
# Up to so many entries a mask of (B, H, Q, K) costs less than one more feature, which loses digits in emptied rows.
SMALL = 2**22


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    drop: str | Recipe,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    keep: Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with structured drops.

    query: (B, H, Q, D); key, value: (B, Hkv, K, D) with Hkv = H unless `enable_gqa`. Returns (B, H, Q, Dv) in
    the dtype of `value`, under autocast in that of autocast.
    drop: a recipe whose `logits` and `weights` drops are used, such as "logits:column@0.1".
    attn_mask: bool (True = visible) or additive float, broadcastable to (B, H, Q, K); of zeros and one number of -50
    or less it hides, whatever a draw leaves.
    is_causal: query i sees keys 0 to i, also where Q and K differ. scale: above 0; None: 1 / √D.
    keep: bool, broadcastable to (B, Hkv or H, Q, K), True = kept; replaces the draw of the only drop.
    training: False: nothing drops, as in `torch.nn.functional.dropout`; give a module's own `self.training`.

    One draw is made per example and key/value head. A row that a draw would empty keeps all it can see, and a
    row that can see nothing gives zeros. Raises ValueError for a recipe without such drops, `keep` with several, a
    scale of 0 or less, both masks at once, and tensors that do not fit together in shape, dtype or device.
    """
    drops = select(drop, ("logits", "weights"), "attention")
    _check(query, key, value, attn_mask, is_causal, enable_gqa, keep, drops)
    _check_kinds(query, key, value, attn_mask, keep, scale)
    if 0 in (*query.shape, *key.shape, *value.shape):
        none = sum(x.flatten()[:0].sum() for x in (query, key, value))  # 0, with a gradient
        return value.new_zeros((*query.shape[:3], value.shape[3])) + none
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = hiding(attn_mask)
    mask, bias = read_mask(attn_mask, causal=is_causal)
    if not training:
        return undropped(query, key, value, mask, bias, scale)
    shape = (query.shape[0], key.shape[1], query.shape[2], key.shape[2])
    keeps = draw_keeps(drops, shape, query.device, mask) if keep is None else [_full_rank(keep, shape)]
    return attend(query, key, value, drops, keeps, mask=mask, bias=bias, scale=scale)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    drops: Sequence[Drop],
    keeps: Sequence[Tensor],
    *,
    mask: Mask,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The output (B, H, Q, Dv), by the fastest path that is exact for this call.

    keeps: one bool mask per drop, (B, Hkv or H, Q or 1, K). bias: float, broadcastable to (B, H, Q, K).
    """
    if [space_of(drop) for drop in drops] != ["logits"]:
        return reference(query, key, value, drops, keeps, mask=mask, bias=bias, scale=scale)
    query, key, value = _as_autocast(query, key, value)
    keep = keeps[0].expand(*keeps[0].shape[:-1], key.shape[2])
    if keep.shape[2] == 1:
        if mask.full is None and bias is None and not mask.causal:
            return by_key(query, key, value, keep, mask, scale)
        if query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] > SMALL:
            return folded(query, key, value, keep, mask, bias, scale)
    return by_cell(query, key, value, keep, mask, bias, scale)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    drops: Sequence[Drop],
    keeps: Sequence[Tensor],
    *,
    mask: Mask,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same as `attend`, from the equations: logits, softmax and weights in float32 (float64 for float64)."""
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = attention_logits(query, key, scale, bias)
    visible = mask.dense((*query.shape[:3], key.shape[2]), query.device)
    weights = drop_weights(logits, visible, drops, [spread(keep, heads) for keep in keeps])
    return weights.to(value.dtype) @ value


def by_cell(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, mask: Mask, bias: Tensor | None, scale: float | None
) -> Tensor:
    """Dropped logits as a mask of torch's kernels: keep (B, Hkv or H, Q or 1, K)."""
    visible = mask.dense((*query.shape[:3], key.shape[2]), query.device)
    allowed = guard(spread(keep, query.shape[1]), visible)
    if bias is not None:
        allowed = torch.where(allowed, bias.to(query.dtype), -torch.inf)
    return _sdpa(query, key, value, allowed, scale)


def by_key(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """The same for keep (B, Hkv or H, 1, K) and a mask of keys alone: a bias with stride 0 over the queries."""
    visible = guard(keep, None if mask.keys is None else mask.keys[:, None, None])
    bias = torch.where(visible, 0.0, -torch.inf).to(query.dtype)
    return _sdpa(query, key, value, spread(bias, query.shape[1]).expand(*query.shape[:3], -1), scale)


def folded(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, mask: Mask, bias: Tensor | None, scale: float | None
) -> Tensor:
    """The drop as one more feature of queries and keys, for any kernel and any mask (identities of section 2).

    keep: (B, Hkv or H, 1, K). For kernels that take only their own causal mask, and where one of (B, H, Q, K) would
    be too large. A row whose visible keys are all dropped is shifted as a whole, so it keeps them by itself.
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


def undropped(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, bias: Tensor | None, scale: float | None
) -> Tensor:
    """The same with nothing dropped."""
    seen = _dense(mask, bias, query)
    return _sdpa(query, key, value, None if seen is None else over_cells(seen), scale, mask.causal)


def draw_keeps(drops: Sequence[Drop], shape: Shape, device: torch.device, mask: Mask) -> list[Tensor]:
    """One keep mask per drop, over (B, Hkv, Q, K)."""
    needed = any(PATTERNS[drop.pattern].needs_segments for drop in drops)
    grid = Grid.attention(shape, device, mask.segments(shape) if needed else None)
    return [draw(drop, grid) for drop in drops]


def attention_logits(query: Tensor, key: Tensor, scale: float | None, bias: Tensor | None) -> Tensor:
    """Scaled, biased logits (B, H, Q, K) in float32, or float64 for float64 input."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        logits = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    return logits if bias is None else logits + bias.to(dtype)


def guarded(drops: Sequence[Drop], keeps: Sequence[Tensor], allowed: Tensor) -> list[Tensor]:
    """What each drop leaves to see of what is allowed, (B, H, Q, K): the draws of logits one after the other."""
    found = []
    for drop, keep in zip(drops, keeps, strict=True):
        left = guard(keep, allowed)
        allowed = left if space_of(drop) == "logits" else allowed
        found.append(left)
    return found


def drop_weights(logits: Tensor, visible: Tensor | None, drops: Sequence[Drop], keeps: Sequence[Tensor]) -> Tensor:
    """Softmax over the visible logits with the drops at work: the weights that meet the values.

    logits: (B, H, Q, K); visible, keeps: bool, broadcastable to it.
    """
    allowed = torch.ones_like(logits[:1, :1, :1], dtype=torch.bool) if visible is None else visible
    alive = allowed.any(-1, keepdim=True)
    # A row that sees nothing is computed as if it saw everything, and zeroed at the end: no NaN on the way.
    allowed = allowed | ~alive
    for drop, keep in zip(drops, keeps, strict=True):
        if space_of(drop) == "logits":
            allowed = guard(keep, allowed)
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    for drop, keep in zip(drops, keeps, strict=True):
        if space_of(drop) == "weights":
            weights = COMPENSATIONS[drop.compensation].apply(weights * guard(keep, allowed), drop.p)
    return weights * alive


def _full_rank(keep: Tensor, shape: Shape) -> Tensor:
    return over_cells(keep).expand(shape[0], -1, -1, shape[3])


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


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does before sdpa, for a kernel below it."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_kinds(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, scale: float | None
) -> None:
    """What the kernels below take for granted: they read memory, and do not ask whose."""
    inputs = (query, key, value)
    dtypes = [x.dtype for x in inputs]
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"query, key and value must be floating point, got {', '.join(map(str, dtypes))}")
    if len(set(dtypes)) > 1 and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(f"query, key and value must have one dtype, got {', '.join(map(str, dtypes))}")
    devices = {x.device for x in (*inputs, mask, keep) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be more than 0, got {scale}")


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    keep: Tensor | None,
    drops: Sequence[Drop],
) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if any(x.dim() != 4 for x in (query, key, value)):
        raise ValueError(f"attention takes (B, heads, length, D) tensors, got {shapes}")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query, key and value do not fit together: {shapes}")
    if query.shape[1] != key.shape[1] and (not enable_gqa or query.shape[1] % key.shape[1]):
        raise ValueError(
            f"{query.shape[1]} query heads over {key.shape[1]} key/value heads ({shapes}): "
            "pass enable_gqa=True, with the former a multiple of the latter"
        )
    if mask is not None and is_causal:
        raise ValueError("pass either attn_mask or is_causal=True, as in scaled_dot_product_attention")
    cells = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool (True = visible) or an additive float mask, got {mask.dtype}")
    if mask is not None and not broadcasts(mask.shape, cells):
        raise ValueError(f"attn_mask must broadcast to (B, H, Q, K) = {cells}, got shape {tuple(mask.shape)}")
    if keep is None:
        return
    if keep.dtype != torch.bool:
        raise ValueError(f"keep must be a bool tensor (True = kept), got {keep.dtype}")
    if len(drops) > 1:
        raise ValueError(f"keep replaces one draw, but the recipe has {len(drops)}: {' + '.join(map(str, drops))}")
    wanted = (query.shape[0], (key.shape[1], query.shape[1]), query.shape[2], key.shape[2])
    if not broadcasts(keep.shape, wanted):
        raise ValueError(f"keep must broadcast to (B, Hkv or H, Q, K) = {wanted}, got shape {tuple(keep.shape)}")
