"""The model that is examined, what every check does with it, and how it is left exactly as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ...errors import UserError
from ..attachment import Attachment, StepState, find_attachment, set_step_state
from ..compared_outputs import copied
from ..model_dropouts import adapter_dropouts, own_dropouts, restore_rates, zero_rates
from ..outer_forward import named_outputs
from ..preserve import Modes, RandomState, inference
from ..structure import find_transformer

Batch = Mapping[str, Any]
SEED = 20240301
CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
# What a model raises that can't do what it is asked; whose fault it is, the plain twin tells.
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError)


@dataclass(frozen=True)
class ModelUnderTest:
    """A model with a recipe attached, and batches for it.

    model: as it was given, inside a wrapper or not. rounds: how often each batch is run to count draws.
    random_state: what the doctor found.
    """

    model: nn.Module
    attachment: Attachment
    batches: Sequence[Batch]
    rounds: int
    random_state: RandomState

    @property
    def batch(self) -> Batch:
        """A copy of the first one."""
        return copied(self.batches[0])

    @property
    def transformer(self) -> Any:
        return find_transformer(self.attachment.model)[1]

    @cached_property
    def twin(self) -> nn.Module:
        """A copy of the model without the recipe, on the same weights."""
        model = self.attachment.model
        tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        # What a pass left behind with its graph, as ShadowPEFT's does, cannot be copied.
        left = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
        tensors |= {id(tensor): tensor.detach() for tensor in left if not tensor.is_leaf}
        twin = copy.deepcopy(model, tensors)
        attachment = find_attachment(twin)
        if attachment is not None:
            attachment.detach()
        return twin

    @property
    def layers(self) -> list[str]:
        """The paths of all layers, the decoder's last."""
        return [layer.path for stack in self.attachment.plan.structure.stacks for layer in stack.layers]

    @property
    def trains(self) -> bool:
        """Whether the model is in training mode, a transformers model inside of an adapter included."""
        return self.model.training and all(switch.training for switch in self.attachment.switches)

    @property
    def is_trainable(self) -> bool:
        """Whether any parameter has a gradient."""
        return any(p.requires_grad for p in self.model.parameters())

    def run(self, model: nn.Module, batch: Batch, seed: int = SEED) -> Any:
        """The outputs in the mode the model is in, under a seed."""
        seed_all(seed)
        return model(**copied(batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a model puts out in evaluation mode, in which some draw by themselves (ViT-MAE)."""
        with inference(model):
            return main_output(self.run(model, batch))

    def gradients(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, gradients by parameter) of a training step on the first batch; leaves no gradient behind."""
        loss = loss_of(self.run(model, self.batch))
        if not loss.requires_grad:
            return loss, {}
        try:
            loss.backward()
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        finally:
            clear_gradients(model)
        return loss.detach(), found


def seed_all(seed: int) -> None:
    """Seed torch; Python's and numpy's generators, from which models draw what is no drop, always alike."""
    torch.manual_seed(seed)
    random.seed(0)
    numpy.random.seed(0)


def clear_gradients(model: nn.Module) -> None:
    """Leave every parameter without one."""
    for parameter in model.parameters():
        parameter.grad = None


@contextmanager
def outputs_of(model: nn.Module, paths: Iterable[str]) -> Iterator[list[tuple[str, Any]]]:
    """(path, output) of the modules at `paths`, in the order of their calls meanwhile; of a tuple its first part."""
    seen: list[tuple[str, Any]] = []

    def keep(path: str, output: Any) -> None:
        seen.append((path, output[0] if isinstance(output, tuple) else output))

    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, args, output, path=path: keep(path, output))
        for path in paths
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(seen: Iterable[tuple[str, Any]]) -> list[Tensor]:
    """What layers put out, (B, T, D) each, without what is no tensor: ShadowPEFT passes objects of its own."""
    return [output for _, output in seen if isinstance(output, Tensor)]


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
def preserved(model: nn.Module) -> Iterator[None]:
    """Give back at the end: random states, training modes, gradients, buffers, and how activations are kept."""
    random_state, modes = RandomState(model), Modes(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    flagged = [vars(module) for module in model.modules() if hasattr(module, CHECKPOINTING[0])]
    flags = [{name: own[name] for name in CHECKPOINTING if name in own} for own in flagged]
    # A classifier writes what its first labels look like into its configuration.
    config = find_transformer(model)[1].config
    problem_type = getattr(config, "problem_type", None)
    clear_gradients(model)
    try:
        yield
    finally:
        random_state.restore()
        modes.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for own, kept in zip(flagged, flags, strict=True):
            for name in set(CHECKPOINTING) - set(kept):
                own.pop(name, None)
            own.update(kept)
        if hasattr(config, "problem_type"):
            config.problem_type = problem_type


@contextmanager
def fresh_counts(attachment: Attachment) -> Iterator[None]:
    """The draws inside do not count for the user's rates, nor do steps find out anything for those that follow."""
    tallies, entries = [draw.tally for draw in attachment.draws], attachment.entries.values()
    counts, entered = [tally.counts for tally in tallies], [entry.entered for entry in entries]
    state = set_step_state(attachment, StepState())
    for tally in tallies:
        tally.counts = None
    for entry in entries:
        entry.entered = False
    try:
        with attachment.watch.aside():
            yield
    finally:
        for tally, count in zip(tallies, counts, strict=True):
            tally.counts = count
        for entry, before in zip(entries, entered, strict=True):
            entry.entered = before
        set_step_state(attachment, state)


@contextmanager
def only_our_drops(model: nn.Module) -> Iterator[None]:
    """Every other dropout off: the model's own, where one is on, and the adapter's."""
    zeroed = zero_rates(model, (*own_dropouts(model), *adapter_dropouts(model)))
    try:
        yield
    finally:
        restore_rates(zeroed)


@contextmanager
def without_our_drops(attachment: Attachment) -> Iterator[None]:
    """Our drops switched off."""
    rates = [(switch, switch.p) for switch in attachment.switches]
    for switch, _ in rates:
        switch.p = 0.0
    try:
        yield
    finally:
        for switch, p in rates:
            switch.p = p
