"""The model under examination, and the few things that every check does with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ...errors import UserError
from ..attachment import Attachment
from ..compared_outputs import copied
from ..outer_forward import named_outputs
from ..preserve import inference
from ..structure import find_transformer
from .preserve import plain_twin, seed_all

Batch = Mapping[str, Any]
States = list[Tensor]
SEED = 20240301
# What a model raises that can't do what it is asked; whose fault it is, the plain twin tells.
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError)


@dataclass(frozen=True)
class Patient:
    """A model with a recipe attached, and batches for it. model: as it was given, inside a wrapper or not."""

    model: nn.Module
    attachment: Attachment
    batches: Sequence[Batch]

    @property
    def batch(self) -> Batch:
        """A copy of the first one."""
        return copied(self.batches[0])

    @property
    def transformer(self) -> Any:
        return find_transformer(self.attachment.model)[1]

    @cached_property
    def twin(self) -> nn.Module:
        """The same model without the recipe, on the same weights."""
        return plain_twin(self.attachment.model)

    @property
    def layers(self) -> list[str]:
        """The paths of all layers, the decoder's last."""
        return [layer.path for stack in self.attachment.plan.structure.stacks for layer in stack.layers]

    @property
    def trains(self) -> bool:
        """Whether the model is in training mode, a transformers model inside of an adapter included."""
        return self.model.training and all(switch.training for switch in self.attachment.switches)

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates of the drops that are switched on."""
        return tuple(switch.p for switch in self.attachment.switches if switch.is_on)

    def train(self, model: nn.Module, batch: Batch, seed: int = SEED) -> Any:
        """The outputs in the mode the model is in, under a seed."""
        seed_all(seed)
        return model(**copied(batch))

    def rest(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        """The model, or another, in evaluation mode without gradient, for a while."""
        return inference(self.model if model is None else model)

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a model puts out in evaluation mode, in which some draw by themselves (ViT-MAE)."""
        seed_all(SEED)
        with self.rest(model):
            return main_output(model(**batch))

    def gradients(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, gradients by parameter) of one training step under a seed; leaves no gradient behind."""
        loss = loss_of(self.train(model, batch))
        if not loss.requires_grad:
            return loss, {}
        try:
            loss.backward()
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        finally:
            for parameter in model.parameters():
                parameter.grad = None
        return loss.detach(), found


@contextmanager
def layers_kept(model: nn.Module, paths: Iterable[str]) -> Iterator[States]:
    """What the layers put out meanwhile, one after the other: (B, T, D) each."""
    states: States = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        if isinstance(state, Tensor):  # ShadowPEFT passes an object of its own
            states.append(state)

    handles = [model.get_submodule(path).register_forward_hook(keep) for path in paths]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def loss_of(outputs: Any) -> Tensor:
    """The loss the model computed from labels; without labels the mean square of what it puts out."""
    loss = named_outputs(outputs).get("loss")
    return main_output(outputs).float().square().mean() if loss is None else loss


def main_output(outputs: Any) -> Tensor:
    """The logits; without a head the last hidden states; the loss where a fused kernel gives no logits."""
    outputs = named_outputs(outputs)
    for name in ("logits", "last_hidden_state", "start_logits", "loss"):
        if outputs.get(name) is not None:
            return outputs[name]
    for value in outputs.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise UserError(f"the model puts out {', '.join(outputs)}, in which the doctor finds no tensor to look at")


@contextmanager
def warnings_hidden() -> Iterator[None]:
    """Warnings that repeat what the findings say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
