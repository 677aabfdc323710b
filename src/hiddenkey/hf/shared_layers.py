"""Layers below the first drop are the same in both views, so the second view need not compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from .attachment import Attachment, step_state
from .capture import Capture, detached
from .compared_outputs import Batch
from .distributed import everywhere, has_reentrant_checkpoints
from .peft_layers import adapters
from .preserve import RandomState, another_forward
from .structure import Site, find_transformer, reads_lower_keys

COLLECTED = ("output_router_logits", "output_hidden_states", "output_attentions")
View = TypeVar("View")


class LowerLayers:
    """Remembers what the last layer below the first drop put out, and returns it in their place.

    `layers` is empty where nothing can be shared: several stacks, drops from the start, noise on the embedded tokens
    (NEFTune), layers above that read keys of those below, what every layer puts out is asked for, an adapter that
    draws in every layer, or came after the plan, or gradient of both views through reentrant checkpoints, inside of
    which an output has no graph yet. What cannot be foreseen is seen in the first step, whose second view
    is computed in both ways: layers that act otherwise in training or at random (SpecAugment, noise of a router), or
    that are read by more than the layer after them. constant: the second view gets no gradient; otherwise both
    views' meets in them. batch: the model's arguments. looked_into: the second view's layers are asked for.
    """

    def __init__(
        self, attachment: Attachment, *, constant: bool, batch: Batch | None = None, looked_into: bool = False
    ) -> None:
        self.attachment, self.constant = attachment, constant
        plan, stacks = attachment.plan, attachment.plan.structure.stacks
        live = [site for site in plan.sites if site.drop.p > 0]
        # "hiddenkey@0.1" on a decoder of four layers drops in layers 2 and 3: layers 0 and 1 put out the same in both
        # views, so the first view keeps the output of layer 1, and in the second both return it at once. A drop at
        # the input of layer 2 changes what is after that, so its layers are shared all the same; a drop at the
        # embeddings changes everything, and nothing is shared.
        shared = 0
        late = plan.adapters != tuple(adapters(attachment.model))
        draws = plan.adapter_dropouts or plan.restless or late
        if len(stacks) == 1 and not draws and not any(_is_below(site, plan.structure.heads) for site in live):
            shared = min((site.layer[1] for site in live if site.layer), default=len(stacks[0].layers))
        noise = any("neftune_noise_alpha" in vars(module) for module in attachment.model.modules())
        layers = [attachment.model.get_submodule(layer.path) for stack in stacks[:1] for layer in stack.layers]
        looked_into = looked_into or any(map(reads_lower_keys, layers)) or _collects(attachment, batch or {})
        hidden = not constant and has_reentrant_checkpoints(attachment.model)
        self.layers = [] if noise or looked_into or hidden else layers[:shared]
        self._kept = Capture()

    def capture(self, *modules: nn.Module, until_gradient: bool = False) -> Capture:
        """Around the first view: keeps what the last layer below puts out, and after it what `modules` do."""
        self._kept = Capture(*self.layers[-1:], *modules, until_gradient=until_gradient)
        return self._kept

    def second(self, model: nn.Module, view: Callable[[], View], seen: Callable[[View], Tensor]) -> View:
        """`view()`, which computes the second view, without the layers below where that is the same.

        seen: what the consistency is computed from.
        """
        state = step_state(self.attachment)
        if not self.layers or self._kept.outputs[0] is None or state.shares_lower is False:
            return view()
        if state.shares_lower is None:
            return self._prove(model, view, seen)
        with self._replayed():
            return view()

    def _prove(self, model: nn.Module, view: Callable[[], View], seen: Callable[[View], Tensor]) -> View:
        before = RandomState(model)
        whole = view()
        after = RandomState(model)
        before.restore()
        with torch.no_grad(), self._replayed():
            same = torch.equal(seen(whole), seen(view()))
        after.restore()
        step_state(self.attachment).shares_lower = everywhere(model, same)
        return whole

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        output = detached(self._kept.outputs[0]) if self.constant else self._kept.outputs[0]
        with another_forward(self.layers, lambda *args, **kwargs: output):
            yield


def _collects(attachment: Attachment, batch: Batch) -> bool:
    """Whether outputs of all layers are asked for: a mixture of experts balances its routers by them."""
    config = find_transformer(attachment.model)[1].config
    asked = {name: batch.get(name) for name in COLLECTED}
    return any(
        value if value is not None else any(getattr(part, name, False) for part in (config, config.get_text_config()))
        for name, value in asked.items()
    )


def _is_below(site: Site, heads: Sequence[str]) -> bool:
    """Whether the site belongs to no layer and to no head: what enters the layers passes it."""
    return site.layer is None and site.path not in heads
