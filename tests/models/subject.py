"""A model under examination: how it is run, and what the library finds in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import hiddenkey

from .inputs import Inputs, tensors
from .record import Record
from .watch import Watch

LOGITS, HIDDEN = "logits[:]:column@{0}", "hidden[:]:element@{0}"
RATE, NEVER = 0.4, 1e-9
SEED = 5


class Subject:
    """A model under examination."""

    def __init__(self, kind: str, model: Any, inputs: Inputs, recipe: str, record: Record) -> None:
        self.kind, self.model, self.inputs, self.recipe, self.record = kind, model, inputs, recipe, record

    def at(self, rate: float) -> str:
        return self.recipe.format(rate)

    def run(
        self, model: Any = None, inputs: Inputs | None = None, *, training: bool = True, seed_with: int = SEED
    ) -> list[Tensor]:
        """All outputs under one seed."""
        seed(seed_with)
        model = self.model if model is None else model
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad():
            outputs = tensors(model.train(training)(**(inputs or self.inputs)))
            for name, buffer in model.named_buffers():  # statistics of batch norms
                buffer.copy_(buffers[name])
        return outputs

    def state(self) -> dict[str, Any]:
        """What a detach must give back."""
        modules = dict(self.model.named_modules())
        return {
            "hooks": {path: len(m._forward_hooks) + len(m._forward_pre_hooks) for path, m in modules.items()},
            "attributes": {path: sorted(vars(m)) for path, m in modules.items()},
            "implementations": {
                path: str(m.config._attn_implementation) for path, m in modules.items() if hasattr(m, "config")
            },
        }

    def find(self) -> None:
        """Fill in what the plan finds, and what it does not."""
        record, plan = self.record, hiddenkey.plan(self.model, self.at(RATE))
        stacks = plan.structure.stacks
        self.sites = plan.sites
        places = {(site.drop.position, site.path) for site in plan.sites}
        if len(places) < len(plan.sites):
            raise RuntimeError("a place is found twice")
        record.layers = sum(len(stack.layers) for stack in stacks)
        record.attentions = sum(site.drop.position == "logits" for site in plan.sites)
        record.feed_forwards = sum(site.drop.position == "hidden" for site in plan.sites)
        record.causal = any(stack.latter_half for stack in stacks)
        with hiddenkey.attach(self.model, "baseline"), Watch(self.model) as watch:
            self.run()
        self.ran = watch.ran
        found = {path for stack in stacks for layer in stack.layers for path in layer.attentions}
        missed = [path for path in watch.attentions if not any(_related(path, known) for known in found)]
        inside = [path for path in missed if any(part.isdigit() for part in path.split("."))]
        if "logits" not in record.missing:
            record.missing += [f"attention of {path}" for path in patterns(inside)]
        record.outside = patterns([path for path in missed if path not in inside])
        without = sum(_lacks_feed_forwards(stack) for stack in stacks)
        if without and "hidden" not in record.missing:
            record.missing.append(f"feed-forward of {without} layers")


def _lacks_feed_forwards(stack: Any) -> int:
    """How many layers with attention have none, where layers aren't of one kind each (Nemotron-H)."""
    if any(layer.feed_forwards and not layer.attentions for layer in stack.layers):
        return 0
    return sum(not layer.feed_forwards for layer in stack.layers if layer.attentions)


def seed(number: int) -> None:
    """numpy too: speech models mask their input with it."""
    torch.manual_seed(number)
    np.random.seed(number)


def _related(path: str, known: str) -> bool:
    return path == known or path.startswith(known + ".") or known.startswith(path + ".")


def patterns(paths: list[str]) -> list[str]:
    return list(
        dict.fromkeys(".".join("#" if part.isdigit() else part for part in path.split(".")) for path in paths)
    )


def same(first: list[Tensor], second: list[Tensor], *, exact: bool = True) -> bool:
    if len(first) != len(second):
        return False
    pairs = list(zip(first, second, strict=True))
    if exact:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs)
