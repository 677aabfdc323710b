"""Our attention function and mask function, registered under one name around each that can be wrapped.

The mask function matters as much as the other: under a name without one, transformers builds no mask at all and
causality is lost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..attention_paths import attend
from ..errors import PlanError
from ..masks import Mask, read_mask
from .attention_softmax import DropAtSoftmax
from .sites import AttentionSite
from .source_reading import asks_for_sdpa, names_in, uses_interface

PREFIX = "hiddenkey_"
WRAPPED = ("sdpa", "eager")
SITE = "hiddenkey_site"
NOTE = "hiddenkey_mask"


class OurName(str):
    """Our name around `name`, which equals the wrapped name too, for models that compare it with "sdpa" themselves.

    The registries look names up by their hash, which is that of ours. torch.compile follows that from torch 2.13 on.
    """

    def __new__(cls, name: str) -> OurName:
        return super().__new__(cls, PREFIX + wrapped_name(name))

    def __eq__(self, other: object) -> bool:
        return str(self) == other or wrapped_name(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(str(self))


Attended = tuple[Tensor, Tensor | None]
EAGER: dict[type[nn.Module], Callable[..., Attended]] = {}


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
    queries = query.shape[2]
    position_bias = kwargs.get("position_bias")
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and is_causal and queries > 1:
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
        mask, bias = Mask(causal=True), None
    else:
        mask, bias = known_mask(attention_mask)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    keeps = site.draw((query.shape[0], key.shape[1], queries, key.shape[2]), query.device, mask)
    output = attend(
        query,
        key,
        value,
        site.active,
        keeps,
        mask=mask,
        bias=bias,
        scale=kwargs.get("scaling"),
    )
    return output.transpose(1, 2).contiguous(), None


def sdpa_mask(**kwargs: Any) -> Tensor | None:
    """transformers' mask for sdpa, with a note of what it was made from where that is simple.

    A mask of padding, or of padding and causality, says no more than one bool per key; with the note its
    queries × keys entries need not be read again in every layer.
    """
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**kwargs)
    function, padding = kwargs.get("mask_function"), kwargs.get("attention_mask")
    square = kwargs.get("q_length") == kwargs.get("kv_length") and kwargs.get("q_offset", 0) == 0
    simple = function is bidirectional_mask_function or (function is causal_mask_function and square)
    if mask is None or padding is None or not simple or torch.compiler.is_compiling():
        return mask
    if padding.dim() == 2 and padding.shape[-1] == mask.shape[-1] and kwargs.get("kv_offset", 0) == 0:
        setattr(mask, NOTE, Mask(keys=padding.bool(), causal=function is causal_mask_function))
    return mask


def known_mask(mask: Tensor | None) -> tuple[Mask, Tensor | None]:
    """(visibility, bias) of a mask that a layer was given, by its note where it has one."""
    note = getattr(mask, NOTE, None)
    return read_mask(mask) if note is None else (note, None)


def eager_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Attended:
    """The model's own eager attention, with the drops of the module's site at its softmax in training."""
    own = own_eager(module)
    site = _site(module)
    if site is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    with DropAtSoftmax(site, type(module).__name__, key.shape[1], key.shape[2]) as mode:
        attended = own(module, query, key, value, attention_mask, **kwargs)
    if not torch.compiler.is_compiling():  # which can't call methods of a mode
        mode.close()
    return attended


def own_eager(module: nn.Module) -> Callable[..., Attended]:
    """The eager attention function that the module's forward names, of the file of its class or of a parent."""
    kind = type(module)
    if kind not in EAGER:
        EAGER[kind] = _find_eager(module)
    return EAGER[kind]


def _find_eager(module: nn.Module) -> Callable[..., Attended]:
    names = [name for name in names_in(module) if name.endswith("eager_attention_forward")]
    for parent in type(module).__mro__:
        for name in names:
            function = getattr(sys.modules[parent.__module__], name, None)
            if function is not None:
                return function
    raise PlanError(f"{type(module).__name__} has no eager attention function; use attn_implementation='sdpa'")


def read_eager(model: nn.Module) -> None:
    """Find the eager function of every attention now: torch.compile can't follow how it is found."""
    for module in model.modules():
        if uses_interface(module):
            own_eager(module)


def check_backend(path: str, module: Any) -> str | None:
    """What keeps us from working inside this attention module, or None."""
    config = getattr(module, "config", None)
    if config is None:
        return None
    name = wrapped_name(config._attn_implementation)
    if name not in WRAPPED:
        return (
            f"its attention implementation is {name!r} at {path}, whose kernel takes no drops; load the model with "
            "attn_implementation='sdpa' or 'eager', or call model.set_attn_implementation('sdpa')"
        )
    if name == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        return f"reorder_and_upcast_attn at {path} bypasses the attention interface; set it to False, or use 'sdpa'"
    return None


def our_name(model: nn.Module, name: str) -> str:
    """The name under which our function around `name` is registered, as this model is to see it."""
    compared = any(asks_for_sdpa(module) for module in model.modules())
    # A configuration that asks for attention weights, now or later, insists on "eager".
    return OurName(name) if compared or name == "eager" else PREFIX + name


def wrapped_name(name: str | None) -> str:
    """The implementation that `name` stands for, ours taken off."""
    return (name or "eager").removeprefix(PREFIX)


def restore_backend(config: Any) -> None:
    """Give a configuration the name that ours stands for; one without our name stays as it is."""
    name = getattr(config, "_attn_implementation", None)
    if isinstance(name, str) and name.startswith(PREFIX):
        config._attn_implementation_internal = wrapped_name(name)


def _site(module: nn.Module) -> AttentionSite | None:
    """The module's site where it drops now: the module is training and a drop is switched on."""
    site: AttentionSite | None = vars(module).get(SITE)
    return site if site is not None and module.training and site.active else None


AttentionInterface.register(PREFIX + "sdpa", sdpa_forward)
AttentionMaskInterface.register(PREFIX + "sdpa", sdpa_mask)
AttentionInterface.register(PREFIX + "eager", eager_forward)
AttentionMaskInterface.register(PREFIX + "eager", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
