"""The random generators that a model may draw from, to go back to."""

from __future__ import annotations

import random

import numpy
import torch
from torch import nn


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
