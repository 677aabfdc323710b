"""Keeping what modules put out, as others call them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput


class Capture:
    """While active, keeps what each of some modules puts out: `outputs`, in their order, None before the first call.

    Of several calls the last counts. until_gradient: none counts after one in which the output of the last module has
    gradient, as a loss may make passes of a reference, or for metrics, before and after the one that is learned from.
    cut: the modules after get a constant of the same value in place of the hidden states, which gathers gradient.
    """

    def __init__(self, *modules: nn.Module, until_gradient: bool = False, cut: bool = False) -> None:
        self.modules, self.until_gradient, self.cut = modules, until_gradient, cut
        self.outputs: list[Any] = [None] * len(modules)
        self._is_over = False

    @property
    def states(self) -> Any:
        """The hidden states (B, T, D) that the last module put out; None without a module or a call of it."""
        return states_of(self.outputs[-1]) if self.outputs else None

    def __enter__(self) -> Capture:
        hooks = [partial(self._keep, place) for place in range(len(self.modules))]
        self._handles = [module.register_forward_hook(hook) for module, hook in zip(self.modules, hooks, strict=True)]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, place: int, module: nn.Module, args: Any, output: Any) -> Any:
        if self._is_over:
            return None
        if self.cut:
            leaf = states_of(output).detach().requires_grad_()
            output = (leaf, *output[1:]) if isinstance(output, tuple) else leaf
        self.outputs[place] = output
        self._is_over = self.until_gradient and place == len(self.modules) - 1 and self.states.requires_grad
        return output if self.cut else None


def states_of(output: Any) -> Any:
    """The hidden states (B, T, D) in the output of a layer or a decoder; of some adapters an object of their own."""
    return output[0] if isinstance(output, tuple | ModelOutput) else output


def detached(output: Any) -> Any:
    """The same output, held constant."""
    if isinstance(output, tuple):
        return tuple(detached(part) for part in output)
    return output.detach() if isinstance(output, Tensor) else output
