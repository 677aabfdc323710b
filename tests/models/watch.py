"""Which modules really compute attention in a forward: seen from outside, without the library's reading of code."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
FUSED = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


class Watch(TorchFunctionMode):
    """While active, counts calls of softmax over keys and of fused attention by the innermost module at work."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {module: path for path, module in model.named_modules()}
        self.at_work: list[nn.Module] = []
        self.attentions: Counter[str] = Counter()
        self.ran: set[str] = set()
        self.handles = [module.register_forward_pre_hook(self._enter) for module in self.paths]
        self.handles += [module.register_forward_hook(self._leave, always_call=True) for module in self.paths]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.at_work.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.at_work.pop()
        if not isinstance(output, Tensor) or output.numel():
            self.ran.add(self.paths[module])

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.at_work and (func in FUSED or (func in SOFTMAX and self._is_attention(args[0]))):
            self.attentions[self.paths[self.at_work[-1]]] += 1
        return func(*args, **kwargs)

    def _is_attention(self, logits: Tensor) -> bool:
        kind = type(self.at_work[-1]).__name__
        if "HyperConnection" in kind:  # mixes copies of the stream
            return False
        named = re.search("attention|attn", kind, re.IGNORECASE)
        return logits.dim() >= 4 or (logits.dim() == 3 and named is not None)
