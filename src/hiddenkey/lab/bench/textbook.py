"""Rivals written plainly, as their papers print them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ...hf.views import IGNORED
from .models import StepCase

DROPKEY = "textbook_dropkey"
FAR = -1e12


def dropkey(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor, scale: float | None = None
) -> Tensor:
    """DropKey (arXiv 2208.02646, algorithm 1): (B, H, Q, D), with mask and keep over (B, H, Q, K), mask additive."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        logits = logits + mask
    logits = logits + (~keep).to(logits.dtype) * FAR
    return logits.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def bernoulli_keep(query: Tensor, key: Tensor, rate: float) -> Tensor:
    """One draw for every head, query and key, kept with probability 1 - rate."""
    cells = query.new_full((*query.shape[:3], key.shape[2]), 1 - rate)
    return torch.bernoulli(cells).bool()


def dropkey_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same as an attention function of transformers; the rate is the module's `textbook_rate`."""
    assert module.training
    keep = bernoulli_keep(query, key, float(module.textbook_rate))  # type: ignore[arg-type]
    output = dropkey(query, key, value, attention_mask, keep, scaling)
    return output.transpose(1, 2).contiguous(), None


def rdrop_loss(model: nn.Module, case: StepCase) -> Tensor:
    """R-Drop (arXiv 2106.14448, algorithm 1, α = 1): the mean of two task losses and of two KL, from whole logits."""
    first, second = model(**case.batch), model(**case.batch)
    p, q = (compared(outputs["logits"], case) for outputs in (first, second))
    log_p, log_q = F.log_softmax(p.float(), -1), F.log_softmax(q.float(), -1)
    forth = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
    back = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()
    return (first["loss"] + second["loss"]) / 2 + (forth + back) / 2


def compared(logits: Tensor, case: StepCase) -> Tensor:
    """The logits of a classifier, or those at label positions of a language model: (N, V)."""
    if case.task == "classification":
        return logits
    return logits[:, :-1][case.batch["labels"][:, 1:] != IGNORED]


AttentionInterface.register(DROPKEY, dropkey_forward)
AttentionMaskInterface.register(DROPKEY, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
