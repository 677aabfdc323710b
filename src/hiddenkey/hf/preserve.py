"""What is changed for a while and restored: modes of modules, their forwards, states of random generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn


class Modes:
    """Which modules of a model are in training mode now."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = [(module, module.training) for module in model.modules()]

    def restore(self) -> None:
        """Each module's own mode again."""
        for module, training in self.modes:
            module.training = training


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, every module's own mode restored afterwards."""
    modes = Modes(model)
    model.eval()
    try:
        yield
    finally:
        modes.restore()


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """The same without gradient."""
    with evaluation(model), torch.no_grad():
        yield


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


class RandomState:
    """The states now of Python's generator, NumPy's, and torch's on the CPU and on the model's devices."""

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        self.python, self.numbers = random.getstate(), numpy.random.get_state()
        self.cpu = torch.get_rng_state()
        self.others = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Draw again what was drawn since."""
        random.setstate(self.python)
        numpy.random.set_state(self.numbers)
        torch.set_rng_state(self.cpu)
        for device, state in self.others.items():
            torch.get_device_module(device).set_rng_state(state, device)
