"""The step of a causal language model whose loss can be computed from its last hidden states."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..consistency import Consistency
from .adapters import adds_to_loss
from .attach import Attachment
from .code import config_names_in
from .outer_forward import is_own, parameters
from .own_loss import takes_the_stock_loss
from .structure import LANGUAGE_MODELS, find_transformer, reads_lower_keys
from .token_loss import Head, Share, TokenLoss
from .views import IGNORED, Batch

SOFT_CAP = re.compile("soft_?cap")


class HiddenStates:
    """While active, keeps the last hidden states (B, T, D) of the decoder under the head."""

    def __init__(self, transformer: PreTrainedModel) -> None:
        self.decoder = transformer.get_decoder()
        self.states: Tensor | None = None

    @contextmanager
    def record(self) -> Iterator[None]:
        handle = self.decoder.register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.states = output[0]

    def take(self) -> Tensor | None:
        """The states of the last forward; None where the decoder was not called as a module."""
        states, self.states = self.states, None
        return states


def frozen_head(attachment: Attachment) -> Head | None:
    """The model's head where its logits are a frozen linear map of its last hidden states, or None.

    None too where the weight is quantised, or is elsewhere until the head is called; a sharded one is gathered.
    """
    transformer = find_transformer(attachment.model)[1]
    head = transformer.get_output_embeddings()
    fits = (
        type(transformer).__name__.endswith(LANGUAGE_MODELS)
        and "logits_to_keep" in parameters(transformer)
        and getattr(type(head), "forward", None) is nn.Linear.forward
        and _is_plain(head)
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not any(site.path in attachment.plan.structure.heads for site in attachment.plan.sites)
        and not _cuts_tokens(transformer)
        and not _caps_logits(transformer)
        and not adds_to_loss(attachment.model)
    )
    return Head(whole(head.weight), whole(head.bias)) if fits else None


def is_next_token_loss(model: nn.Module, batch: Batch) -> bool:
    """Whether the model's loss of the batch is transformers' cross entropy of next tokens, with nothing added."""
    transformer = find_transformer(model)[1]
    routers = batch.get("output_router_logits")
    if routers is None:
        routers = getattr(transformer.config, "output_router_logits", False)
    return (
        takes_the_stock_loss(transformer)
        and not is_own(model)
        and batch.get("shift_labels") is None
        and not routers
        and not getattr(transformer, "z_loss_coefficient", 0)
    )


def _cuts_tokens(transformer: PreTrainedModel) -> bool:
    """Whether the decoder itself leaves tokens out for which no logits are asked, as Gemma 4's upper layers do."""
    takes_it = "logits_to_keep" in parameters(transformer.get_decoder())
    return takes_it and reads_lower_keys(transformer)


def _caps_logits(transformer: PreTrainedModel) -> bool:
    """Whether the forward caps its logits (Gemma), which small logits do not show."""
    caps = (name for name in config_names_in(transformer) if SOFT_CAP.search(name))
    return any(getattr(transformer.config, name, None) for name in caps)


def _is_plain(head: Any) -> bool:
    """Whether its weight is numbers in the usual layout, here or in parts on several processes; not quantised.

    DeepSpeed's ZeRO-3 has a weight here only while its module is called.
    """
    plain = type(head.weight) in (nn.Parameter, Tensor) or hasattr(head.weight, "full_tensor")
    layout = head.weight.shape == (head.out_features, head.in_features)
    come_and_go = hasattr(head.weight, "ds_id")
    return plain and layout and not come_and_go and not head.weight.is_meta and head.weight.is_floating_point()


def whole(parameter: Any) -> Any:
    """A frozen parameter as a plain tensor, gathered where processes hold a part each (FSDP2, tensor parallel)."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def agrees(head: Head, states: Tensor, logits: Tensor) -> bool:
    """Whether the model's logits of the last token are the head's: no scale, nothing else in between, one device.

    By the norm of each row, because under autocast every logit is rounded to a part of the largest ones.
    """
    if states.device != head.weight.device:
        return False
    ours = head.logits(states[:, -1].detach())
    apart = torch.linalg.vector_norm(ours - logits[:, -1].to(ours), dim=-1)
    return bool((apart <= 1e-2 * torch.linalg.vector_norm(ours, dim=-1)).all())


def token_losses(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    head: Head,
    consistency: Consistency,
    weight: float,
    num_items: Tensor | int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, task, consistency) from the hidden states (B, T, D) of two views and the labels (B, T)."""
    labels = labels[:, 1:].to(first.device)
    num_items = num_items.to(first.device) if isinstance(num_items, Tensor) else num_items
    valid = labels != IGNORED
    count: Tensor | int = valid.sum().clamp(min=1) if num_items is None else num_items
    states = first[:, :-1][valid], second[:, :-1][valid]
    share = Share(1.0, weight, count)
    total, task, term = TokenLoss.apply(*states, labels[valid], head, consistency, share)
    return total, task / count, term / count
