"""Evaluation mode, or another forward, for a while; what every module had is given back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

Modes = list[tuple[nn.Module, bool]]


def to_evaluation(model: nn.Module) -> Modes:
    """Put the model into evaluation mode; returns the mode of each module as it was."""
    modes = modes_of(model)
    model.eval()
    return modes


def modes_of(model: nn.Module) -> Modes:
    """The mode of each module."""
    return [(module, module.training) for module in model.modules()]


def give_back_modes(modes: Modes) -> None:
    """Give each module the mode it had."""
    for module, training in modes:
        module.training = training


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while active."""
    modes = to_evaluation(model)
    try:
        yield
    finally:
        give_back_modes(modes)


@contextmanager
def another_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """While active, `forward` runs in the place of the modules' own, one that accelerate put there included."""
    earlier = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, own in zip(modules, earlier, strict=True):
            del module.forward
            if own is not None:
                module.forward = own
