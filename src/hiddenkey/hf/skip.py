"""Drops of whole tokens after a block that works token by token: what is dropped need not be computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compensations import COMPENSATIONS
from ..dropout import drop_stream
from ..recipe import Drop
from .adapters import works_by_token
from .feed_forward import is_linear
from .sites import StreamSite


def can_skip(block: nn.Module, drop: Drop) -> bool:
    """Whether the block has no parts but linear maps and functions without state, and the drop is a plain factor.

    An adapter other than LoRA may look at several tokens at once, so nothing is skipped under it.
    """
    if not all(works_by_token(part) for part in block.children()):
        return False
    parts = [part for part in block.children() if not is_linear(part)]
    linears = len(list(block.children())) - len(parts)
    stateless = not any(True for part in parts for _ in (*part.parameters(), *part.buffers()))
    own = any(True for _ in block.parameters(recurse=False))
    return linears >= 2 and stateless and not own and COMPENSATIONS[drop.compensation].factor is not None


class TokenSkip(StreamSite):
    """A drop at the output of such a block. Draws before it, gives it the kept tokens, puts its output back.

    A draw over single features, which drops no token, is applied to the output as elsewhere.
    """

    rows: Tensor | None = None
    keep: Tensor | None = None
    shape: torch.Size | None = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook with keywords."""
        self.rows = self.keep = None
        whole = len(args) == 1 and not kwargs and args[0].dim() == 3
        if not self.is_active(module) or not whole or torch.compiler.is_compiling():
            return args, kwargs
        x = args[0]
        self.keep = self.draw(x)
        if self.keep.shape[-1] != 1:
            return args, kwargs
        self.shape, self.rows = x.shape, self.keep.expand(*x.shape[:2], 1).flatten().nonzero().squeeze(1)
        return (x.flatten(0, 1).index_select(0, self.rows).unsqueeze(0),), kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook. The draw goes afterwards: with activation checkpointing nobody else needs it."""
        try:
            return super().after(module, args, output) if self.rows is None else self._put_back(output)
        finally:
            self.rows = self.keep = None

    def _put_back(self, output: Tensor) -> Tensor:
        assert self.rows is not None
        assert self.shape is not None
        factor = COMPENSATIONS[self.drops[0].compensation].factor
        assert factor is not None
        kept = output.squeeze(0) * factor(self.drops[0].p)
        whole = kept.new_zeros(self.shape[0] * self.shape[1], kept.shape[-1]).index_copy(0, self.rows, kept)
        return whole.view(*self.shape[:2], -1)

    def _drop(self, x: Tensor) -> Tensor:
        return super()._drop(x) if self.keep is None else drop_stream(x, self.drops[0], self.keep)
