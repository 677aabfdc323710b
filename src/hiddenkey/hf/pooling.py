"""The token that a regression predicts from; its vectors are compared (arXiv 2403.00812, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .adapters import virtual_tokens
from .attach import Attachment
from .modes import evaluation
from .outer_forward import named_outputs, without_labels
from .structure import find_transformer


def pooled(last: Tensor, batch: Mapping[str, Any], attachment: Attachment) -> Tensor:
    """(B, D) of the last layer's (B, T, D): the first token of an encoder, the last real token of a decoder.

    Raises UserError for a model that predicts from others, which is looked at once, but again for a batch with
    padding at its end behind a prompt, where transformers takes the last place.
    """
    places = _places(last, batch, attachment)
    prompted = _decodes(attachment) and virtual_tokens(attachment.model) > 0
    if not attachment.pooling_seen or (prompted and bool((places < last.shape[1] - 1).any())):
        _refuse_other_pooling(batch, attachment)
        attachment.pooling_seen = True
    return last[torch.arange(len(last), device=last.device), places]


def _places(last: Tensor, batch: Mapping[str, Any], attachment: Attachment) -> Tensor:
    """(B): where the token is, virtual tokens before it or not."""
    if not _decodes(attachment):
        return torch.zeros(len(last), dtype=torch.long, device=last.device)
    real = _real(batch, find_transformer(attachment.model)[1])
    if real is None:
        return torch.full((len(last),), last.shape[1] - 1, device=last.device)
    return (torch.arange(real.shape[1], device=real.device) * real).argmax(-1) + last.shape[1] - real.shape[1]


def _decodes(attachment: Attachment) -> bool:
    stack = attachment.plan.structure.last
    return stack is not None and stack.latter_half


def _real(batch: Mapping[str, Any], transformer: Any) -> Tensor | None:
    """(B, T): which tokens are no padding, as transformers' classifiers see it: by their ids, whatever the mask; None
    where they take the last place.
    """
    pad, ids = transformer.config.get_text_config().pad_token_id, batch.get("input_ids")
    return None if pad is None or ids is None else ids != pad


def _refuse_other_pooling(batch: Mapping[str, Any], attachment: Attachment) -> None:
    last, read = _tokens_read(batch, attachment)
    others = torch.ones_like(read)
    if last.dim() == 3 and len(last) == len(batch["labels"]):
        others[torch.arange(len(last), device=last.device), _places(last, batch, attachment)] = False
    if not (read & others).any() and read.any():
        return
    token = "last real token" if _decodes(attachment) else "first token"
    name = type(find_transformer(attachment.model)[1]).__name__
    raise UserError(
        f"the consistency {attachment.recipe.consistency!r} of a regression compares the last layer's vector of the "
        f"{token}, but {name} does not predict from that alone (rather from a mean over tokens, from <eos>, from "
        "several layers, or behind a prompt from the last place, which needs padding on the left); use 'mse', which "
        "compares the predictions"
    )


def _tokens_read(batch: Mapping[str, Any], attachment: Attachment) -> tuple[Tensor, Tensor]:
    """The last layer's output, and which of its tokens the predictions have gradient at, in a pass without drops.

    Without the compiler: in one of its graphs the one has no gradient at the other.
    """
    model, seen = attachment.model, []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        seen.append(state.detach().requires_grad_())
        return (seen[-1], *output[1:]) if isinstance(output, tuple) else seen[-1]

    stack = attachment.plan.structure.last
    assert stack is not None  # whose last layer's output was kept
    handle = model.get_submodule(stack.layers[-1].path).register_forward_hook(cut)
    try:
        with (
            attachment.watch.aside(),
            evaluation(model),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            predictions = named_outputs(model(**without_labels(model, batch)))["logits"]
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(predictions.sum(), seen[-1], materialize_grads=True)
    return seen[-1], gradient.ne(0).any(-1)
