"""Evaluation mode for a while, every module's own mode given back afterwards."""

from __future__ import annotations

from torch import nn

Modes = list[tuple[nn.Module, bool]]


def to_evaluation(model: nn.Module) -> Modes:
    """Put the model into evaluation mode; returns the mode of each module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    return modes


def give_back_modes(modes: Modes) -> None:
    """Give each module the mode it had."""
    for module, training in modes:
        module.training = training
