"""A model that is looked at and left exactly as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..attachment import Attachment, StepState, find_attachment, set_step_state
from ..model_dropouts import adapter_dropouts, own_dropouts, restore_rates, zero_rates
from ..preserve import Modes, RandomState
from ..structure import find_transformer

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Give back at the end: random states, training modes, gradients, buffers, and how activations are kept."""
    modes = Modes(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    # A classifier writes what its first labels look like into its configuration.
    config = find_transformer(model)[1].config
    problem_type = getattr(config, "problem_type", None)
    with random_state(model), checkpointing_preserved(model):
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            modes.restore()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            if hasattr(config, "problem_type"):
                config.problem_type = problem_type
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextmanager
def random_state(model: nn.Module) -> Iterator[None]:
    """Give back the states of all generators afterwards."""
    before = RandomState(model)
    try:
        yield
    finally:
        before.restore()


def seed_all(seed: int) -> None:
    """Seed torch; Python's and numpy's generators, from which models draw what is no drop, always alike."""
    torch.manual_seed(seed)
    random.seed(0)
    numpy.random.seed(0)


@contextmanager
def checkpointing_preserved(model: nn.Module) -> Iterator[None]:
    """Give back which modules recompute their activations, and how."""
    modules = [module for module in model.modules() if hasattr(module, CHECKPOINTING[0])]
    found = [{name: vars(module)[name] for name in CHECKPOINTING if name in vars(module)} for module in modules]
    try:
        yield
    finally:
        for module, values in zip(modules, found, strict=True):
            for name in CHECKPOINTING:
                if name not in values:
                    vars(module).pop(name, None)
            vars(module).update(values)


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
    others = (*own_dropouts(model), *adapter_dropouts(model))
    zeroed = zero_rates(model, others)
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


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy of an attached model with the same tensors, without the recipe."""
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # What a pass left behind with its graph, as ShadowPEFT's does, cannot be copied.
    left = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    tensors |= {id(tensor): tensor.detach() for tensor in left if not tensor.is_leaf}
    twin = copy.deepcopy(model, tensors)
    attachment = find_attachment(twin)
    if attachment is not None:
        attachment.detach()
    return twin
