"""Drops inside attention code that is not ours: at its softmax, or where it calls torch's attention.

Eager attention differs from model to model (soft caps, sinks, biases), so it is not written again here: the
model's own code runs, and its softmax over keys becomes the softmax with drops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..attention_paths import attend, drop_weights, guarded
from ..masks import Mask, read_mask, spread
from .sites import AttentionSite

SOFTMAX: tuple[Callable[..., Any], ...] = (F.softmax, torch.softmax, Tensor.softmax)
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
# So far below the largest logit of a row a key counts as hidden: libraries hide by adding -10,000, and ALiBi's bias
# of a key at the other end of 4,000 tokens is less than this.
NOTHING = 5000.0


class DropAtSoftmax(TorchFunctionMode):
    """While active, the softmax over the last axis of logits (…, Q, K) drops, and so does torch's attention.

    kv_heads, keys: of the attention at hand; None: those of the logits. `close` must be called at the end.
    """

    def __init__(self, site: AttentionSite, name: str, kv_heads: int | None = None, keys: int | None = None) -> None:
        super().__init__()
        self.site, self.name, self.kv_heads, self.keys = site, name, kv_heads, keys
        self.done = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._once()
            return self._attention(*args, **kwargs)
        if func in SOFTMAX and _over_keys(*args, **kwargs):
            self._once()
            return self._softmax(args[0] if args else kwargs["input"], _dtype(func, args, kwargs))
        return func(*args, **kwargs)

    def close(self) -> None:
        """Raises RuntimeError where there was nothing to drop from."""
        if not self.done:
            raise RuntimeError(
                f"{self._drops()} found no softmax over keys in {self.name} and would be ignored; "
                "leave the position out of the recipe, or these layers"
            )

    def _once(self) -> None:
        if self.done:
            raise RuntimeError(
                f"{self.name} computes a second softmax, so {self._drops()} would be at work in a part of it only; "
                "leave the position out of the recipe, or these layers"
            )
        self.done = True

    def _drops(self) -> str:
        return " and ".join(f"'{drop}'" for drop in self.site.drops)

    def _softmax(self, logits: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Draws per leading index, which is an example and a head, or a window of it."""
        # Padding behind two tokens may come as logits (0.3, 1.2, 1.2 - 10,000) or (0.3, 1.2, -inf): the last is below
        # 1.2 - 5,000 either way and counts as hidden, a far key under ALiBi (1.2 - 3,000) does not.
        shape = logits.shape
        folded = logits.reshape(shape[0], math.prod(shape[1:-2]), *shape[-2:])
        # Before the cast: the lowest float16, which hides a key, is an ordinary number in float32.
        lowest = (folded.amax(-1, keepdim=True) - NOTHING).clamp(min=torch.finfo(logits.dtype).min / 2)
        visible = folded > lowest
        return self._weights(folded if dtype is None else folded.to(dtype), visible).view(shape)

    def _weights(self, logits: Tensor, visible: Tensor) -> Tensor:
        batch, heads, queries, columns = logits.shape
        # Columns past the keys are attention sinks, which are no keys and stay: of logits (k1, k2, k3, sink), keys=3,
        # a draw that keeps (1, 0, 1) becomes (1, 0, 1, 1).
        keys = columns if self.keys is None else self.keys
        kv_heads = self.kv_heads if self.kv_heads and heads % self.kv_heads == 0 else heads
        shape = (batch, kv_heads, queries, keys)
        seen = visible[..., :keys]
        keeps = [spread(keep, heads) for keep in self.site.draw(shape, logits.device, Mask(full=seen))]
        if columns > keys:
            # A sink alone would be left of a row all of whose keys a draw takes.
            keeps = [F.pad(keep, (0, columns - keys), value=True) for keep in guarded(self.site.active, keeps, seen)]
        return drop_weights(logits, visible, self.site.active, keeps)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """torch's attention; dropout_p is one of the model's own dropouts, which are off."""
        mask, bias = read_mask(attn_mask, causal=is_causal)
        shape = (query.shape[0], key.shape[1], query.shape[2], key.shape[2])
        keeps = self.site.draw(shape, query.device, mask)
        return attend(query, key, value, self.site.active, keeps, mask=mask, bias=bias, scale=scale)


class OwnSoftmax:
    """Hooks that make an attention module with its own softmax drop while it is training."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site
        self.active: list[DropAtSoftmax | None] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook."""
        mode = None
        if module.training and self.site.active:
            kv_heads = next((value for name in KV_HEADS if (value := getattr(module, name, None))), None)
            mode = DropAtSoftmax(self.site, type(module).__name__, kv_heads)
        self.active.append(mode)
        if mode is not None:
            mode.__enter__()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook that is called after an error too, then with no output."""
        mode = self.active.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
            if output is not None:
                mode.close()

    def end(self) -> None:
        """Leave what a forward left behind that ended without its hooks, as Ctrl-C ends one."""
        while self.active:
            mode = self.active.pop()
            if mode is not None:
                mode.__exit__(None, None, None)


def _dtype(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """What a call of softmax asks for; before it functional's has one more argument."""
    place = 3 if func is F.softmax else 2
    dtype: torch.dtype | None = args[place] if len(args) > place else kwargs.get("dtype")
    return dtype


def _over_keys(input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> bool:  # noqa: A002
    """Whether a call of softmax is over the last axis of logits per query and key."""
    return input.dim() >= 3 and dim in (-1, input.dim() - 1)
