"""Drops inside attention code that is not ours: at its softmax.

Eager attention differs from model to model (soft caps, sinks, biases), so it is not written again here: the
model's own code runs, and its softmax over keys becomes the softmax with drops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..attend import drop_weights
from ..drop import spread
from ..masks import Mask
from .sites import AttentionSite

SOFTMAX: tuple[Callable[..., Any], ...] = (F.softmax, torch.softmax, Tensor.softmax)


class DropAtSoftmax(TorchFunctionMode):
    """While active, the first softmax over 4D logits drops.

    kv_heads, keys: of the attention at hand; None: those of the logits.
    """

    def __init__(self, site: AttentionSite, kv_heads: int | None = None, keys: int | None = None) -> None:
        super().__init__()
        self.site, self.kv_heads, self.keys = site, kv_heads, keys
        self.done = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.done or func not in SOFTMAX or args[0].dim() != 4:
            return func(*args, **kwargs)
        self.done = True
        logits = args[0]
        # Before the cast: the lowest float16, which hides a key, is an ordinary number in float32.
        visible = logits > torch.finfo(logits.dtype).min / 2
        return self._weights(logits if kwargs.get("dtype") is None else logits.to(kwargs["dtype"]), visible)

    def _weights(self, logits: Tensor, visible: Tensor) -> Tensor:
        batch, heads, queries, columns = logits.shape
        # Columns past the keys are attention sinks; they are no keys and stay.
        keys = columns if self.keys is None else self.keys
        shape = (batch, self.kv_heads or heads, queries, keys)
        keeps = self.site.draw(shape, logits.device, Mask(full=visible[..., :keys]))
        keeps = [F.pad(spread(keep, heads), (0, columns - keys), value=True) for keep in keeps]
        return drop_weights(logits, visible, self.site.active, keeps)


class OwnSoftmax:
    """Hooks that make an attention module with its own softmax drop while it is training."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site
        self.active: list[DropAtSoftmax | None] = []

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook."""
        mode = DropAtSoftmax(self.site) if module.training and self.site.active else None
        self.active.append(mode)
        if mode is not None:
            mode.__enter__()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook that is called after an error too."""
        mode = self.active.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
