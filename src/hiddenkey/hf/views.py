"""The two views of a batch, and what a consistency compares in them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..consistency import Consistency, consistency_loss
from ..errors import UserError
from .attach import Attachment
from .structure import find_transformer

Batch = Mapping[str, Any]
IGNORED = -100


@dataclass(frozen=True)
class Compared:
    """What is compared: logits (…, V) of one view, and which rows count (bool (…), None: all)."""

    logits: Tensor
    valid: Tensor | None


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient, every module's own mode given back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class LastLayer:
    """While active, keeps what the last layer of the last stack puts out: (B, T, D)."""

    def __init__(self, attachment: Attachment) -> None:
        path = attachment.plan.structure.stacks[-1].layers[-1].path
        self.layer = attachment.model.get_submodule(path)
        self.output: Tensor | None = None

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output[0] if isinstance(output, tuple) else output

    def __enter__(self) -> LastLayer:
        self._handle = self.layer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def second_view(model: nn.Module, batch: Batch, consistency: Consistency, **options: Any) -> Any:
    """The outputs of the second view: the inference pass, or another draw, held constant unless both get gradient.

    options: further arguments of the model.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"} | options
    transformer = find_transformer(model)[1]
    if "use_cache" in inspect.signature(transformer.forward).parameters:
        inputs["use_cache"] = False
    if transformer.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = transformer.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    if consistency.clean:
        with inference(model):
            return model(**inputs)
    with nullcontext() if consistency.both else torch.no_grad():
        return model(**inputs)


def compared(
    outputs: Any, last: Tensor | None, batch: Batch, attachment: Attachment, consistency: Consistency
) -> Compared:
    """What `consistency` compares in the outputs of one view (arXiv 2403.00812, section 3.2).

    Classification: the classifier's logits. Regression: the pooled token's last-layer vector, or the prediction
    itself for a scalar consistency. Generation: the logits at label positions.
    """
    labels, logits = batch["labels"], outputs["logits"]
    if logits.dim() == 3 and labels.dim() == 2 and logits.shape[:2] == labels.shape:
        return _tokens(logits, labels, attachment)
    if logits.shape[-1] == 1 or consistency.scalar:
        if not (logits.shape[-1] == 1 and labels.is_floating_point()):
            raise UserError(
                f"the consistency {consistency.name!r} compares predictions of a regression, but this model has "
                f"{logits.shape[-1]} outputs for labels of {labels.dtype}; use 'kl'"
            )
        return Compared(logits if consistency.scalar else _pooled(last, batch, attachment), None)
    if labels.is_floating_point():
        raise UserError(
            f"labels of {labels.dtype} for {logits.shape[-1]} outputs are several yes/no answers, not one "
            f"distribution, so {consistency.name!r} is not defined for them; leave the consistency out"
        )
    return Compared(logits, labels != IGNORED if labels.shape == logits.shape[:-1] else None)


def _tokens(logits: Tensor, labels: Tensor, attachment: Attachment) -> Compared:
    transformer = find_transformer(attachment.model)[1]
    shifted = attachment.plan.structure.stacks[-1].latter_half and "Token" not in type(transformer).__name__
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return Compared(logits, labels != IGNORED)


def _pooled(last: Tensor | None, batch: Batch, attachment: Attachment) -> Tensor:
    """(B, D): the first token of an encoder, the last real token of a decoder."""
    assert last is not None
    if not attachment.plan.structure.stacks[-1].latter_half:
        return last[:, 0]
    mask = batch.get("attention_mask")
    if mask is None:
        return last[:, -1]
    index = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(-1)
    return last[torch.arange(last.shape[0], device=last.device), index]


def tie(consistency: Consistency, first: Compared, second: Compared, num_items: Tensor | int | None) -> Tensor:
    """The consistency of the two views, with the denominator of the task loss.

    num_items: label tokens in the whole accumulated batch, as transformers counts them; None: the mean over the
    rows of this batch.
    """
    if num_items is None or first.valid is None:
        return consistency_loss(consistency.name, first.logits, second.logits, valid=first.valid)
    total = consistency_loss(consistency.name, first.logits, second.logits, valid=first.valid, reduction="sum")
    return total / num_items
