"""The rate of a drop as a module of the model, so that whoever turns its dropouts off turns ours off too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..recipe import Drop

SWITCHES = "hiddenkey_drops"


class DropSwitch(nn.Dropout):
    """One drop of the attached recipe: an `nn.Dropout` that stands in the model and is never called.

    All sites of the drop look at its `p`. Code that walks over the modules and sets every dropout to 0 (TRL's
    `disable_dropout`, for reproducible log-probabilities) turns the drop off; p put back turns it on again. They look
    at its mode too, which is the whole model's: PEFT's new layers are in training mode in a model that
    `from_pretrained` left in evaluation mode. It has no parameters and no buffers, so `state_dict` does not know it.
    """

    def __init__(self, drop: Drop) -> None:
        super().__init__(drop.p)
        self.drop = drop

    @property
    def is_on(self) -> bool:
        return self.p > 0

    @property
    def is_active(self) -> bool:
        """Whether it is on and the model is in training mode."""
        return self.is_on and self.training

    def extra_repr(self) -> str:
        return f"{self.drop}{'' if self.is_on else ', switched off'}"


def generate_without_drops(model: Any, generate: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """`model.generate` with the switches in evaluation mode: TRL's GRPO and its kin generate in training mode.

    generate: one that was set on the model by hand; None: that of its class.
    """
    switches = getattr(model, SWITCHES)
    training = switches.training
    switches.eval()
    try:
        return type(model).generate(model, *args, **kwargs) if generate is None else generate(*args, **kwargs)
    finally:
        switches.train(training)
