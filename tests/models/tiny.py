"""A tiny model of every model type, with random weights large enough for differences to show."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from .kinds import class_name
from .shrink import shrink


def build(kind: str, **options: Any) -> Any:
    """The same model at every call, in evaluation mode, in float32 on the CPU. options: as `_from_config` takes."""
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name(kind))
    model = model_class._from_config(shrink(kind), **options)
    enliven(model)
    return model.eval()


def enliven(model: nn.Module) -> None:
    """Weights of the size that keeps activations near one; nothing stays at zero, so that every part matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[1]
                parameter.normal_(0, fan_in**-0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
