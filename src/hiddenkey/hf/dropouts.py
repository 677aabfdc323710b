"""The dropouts a model brings along: found, set to 0 on attach, given back on detach."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .switch import DropSwitch

RATE_NAME = re.compile(r"dropout|drop_prob|drop_path|pdrop|layerdrop|droprate")
ADAPTER_PART = re.compile(r"(^|\.)(lora|vera|adalora)_dropout(\.|$)")


@dataclass(frozen=True)
class OwnDropout:
    """One rate in the model: the attribute `name` of the module at `path`, at its value `p`."""

    path: str
    name: str
    p: float


def own_dropouts(model: nn.Module) -> Iterator[OwnDropout]:
    """Every dropout of the model itself with a rate above 0 (attention, hidden, embedding, classifier, layers)."""
    for path, module in model.named_modules():
        if ADAPTER_PART.search(path) or isinstance(module, DropSwitch):
            continue
        if isinstance(module, _DropoutNd):
            if module.p > 0:
                yield OwnDropout(path, "p", module.p)
            continue
        for name, value in vars(module).items():
            if isinstance(value, float) and 0 < value < 1 and RATE_NAME.search(name):
                yield OwnDropout(path, name, value)


def adapter_dropouts(model: nn.Module) -> Iterator[OwnDropout]:
    """The adapter's dropouts (`lora_dropout`), which the user chose and which stay as they are."""
    for path, module in model.named_modules():
        if ADAPTER_PART.search(path) and isinstance(module, _DropoutNd) and module.p > 0:
            yield OwnDropout(path, "p", module.p)


def silence(model: nn.Module, dropouts: tuple[OwnDropout, ...]) -> None:
    """Set the rates to 0."""
    for own in dropouts:
        setattr(model.get_submodule(own.path), own.name, 0.0)


def give_back(model: nn.Module, dropouts: tuple[OwnDropout, ...]) -> None:
    """Set the rates to what they were."""
    for own in dropouts:
        setattr(model.get_submodule(own.path), own.name, own.p)
