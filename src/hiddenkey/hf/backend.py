"""Our attention function and mask function, registered under one name around each that can be wrapped.

The mask function matters as much as the other: under a name without one, transformers builds no mask at all and
causality is lost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..attend import attend, causal_mask, split_mask
from .sites import AttentionSite
from .softmax import DropAtSoftmax
from .structure import uses_interface

PREFIX = "hiddenkey_"
WRAPPED = ("sdpa", "eager")
SITE = "hiddenkey_site"

Attended = tuple[Tensor, Tensor | None]


def sdpa_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Attended:
    """transformers' sdpa attention, with the drops of the module's site in training.

    query: (B, H, Q, D); key, value: (B, Hkv, K, D). Returns (B, Q, H, Dv) and no weights.
    """
    site = _site(module)
    if site is None:
        wrapped: Callable[..., Attended] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return wrapped(module, query, key, value, attention_mask, **kwargs)
    visible, bias = split_mask(attention_mask)
    queries = query.shape[2]
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    position_bias = kwargs.get("position_bias")
    if attention_mask is None and is_causal and queries > 1:
        key, value = key[:, :, :queries], value[:, :, :queries]
        visible = causal_mask(queries, queries, query.device)
        position_bias = None if position_bias is None else position_bias[..., :queries]
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    shape = (query.shape[0], key.shape[1], queries, key.shape[2])
    keeps = site.draw(shape, query.device, visible)
    output, _ = attend(
        query,
        key,
        value,
        site.drops,
        visible=visible,
        bias=bias,
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        keeps=keeps,
    )
    return output.transpose(1, 2).contiguous(), None


def eager_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Attended:
    """The model's own eager attention, with the drops of the module's site at its softmax in training."""
    own = own_eager(module)
    site = _site(module)
    if site is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    with DropAtSoftmax(site, key.shape[1], key.shape[2]):
        return own(module, query, key, value, attention_mask, **kwargs)


def own_eager(module: nn.Module) -> Callable[..., Attended]:
    """`eager_attention_forward` of the file that defines the module's class, or one of its parents."""
    for parent in type(module).__mro__:
        function = getattr(sys.modules[parent.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(f"{type(module).__name__} has no eager attention function; use attn_implementation='sdpa'")


def check_backend(path: str, module: Any) -> str | None:
    """What keeps us from working inside this attention module, or None."""
    if not uses_interface(module):
        return None
    name = wrapped_name(module.config._attn_implementation)
    if name not in WRAPPED:
        return (
            f"its attention implementation is {name!r} at {path}, whose kernel takes no drops; load the model with "
            "attn_implementation='sdpa' or 'eager', or call model.set_attn_implementation('sdpa')"
        )
    if name == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        return f"reorder_and_upcast_attn at {path} bypasses the attention interface; set it to False, or use 'sdpa'"
    return None


def wrapped_name(name: str | None) -> str:
    """The implementation that `name` stands for, ours taken off."""
    return (name or "eager").removeprefix(PREFIX)


def _site(module: nn.Module) -> AttentionSite | None:
    return vars(module).get(SITE) if module.training else None


for _name, _function in (("sdpa", sdpa_forward), ("eager", eager_forward)):
    AttentionInterface.register(PREFIX + _name, _function)
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
