"""The consistency beside a trainer's own loss of a language model.

TRL's trainers compute log probabilities from the last hidden states and build no logits, and DPO calls the model
twice. So the last hidden states of the forward pass that learns are kept while the trainer computes its loss, and
compared with those of a second view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..consistency import CONSISTENCIES, Consistency, consistency_loss
from ..errors import UserError
from .attach import Attachment
from .language import agrees, frozen_head
from .lower import LowerLayers
from .modes import another_forward
from .ranks import everywhere
from .step import Items, StepLoss
from .structure import find_transformer
from .token_loss import Head, Share, TokenLoss
from .views import IGNORED, Batch, second_view, uncached

NO_INPUTS = ("labels", "shift_labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")
Group = tuple[Tensor, Tensor | int]


@dataclass(frozen=True)
class ComparedTokens:
    """Which tokens are compared: labels (B, T), -100 where not. by_sequence: the mean over sequences of the mean over
    the tokens of each; else the sum over tokens by the denominator of the task loss.
    """

    labels: Tensor
    by_sequence: bool

    def groups(self, num_items: Items) -> list[Group]:
        """Tokens that predict a label, bool (B, T - 1), with the denominator of their sum."""
        valid = self.labels[:, 1:] != IGNORED
        if not self.by_sequence:
            return [(valid, valid.sum().clamp(min=1) if num_items is None else num_items)]
        rows = torch.eye(len(valid), dtype=torch.bool, device=valid.device)[:, :, None]
        return [(valid & row, (valid & row).sum().clamp(min=1) * len(valid)) for row in rows]


def compared_in(batch: Batch, trainer: str) -> ComparedTokens:
    """What is compared in a trainer's batch: the tokens with labels, or those of DPO's completions.

    Raises UserError where neither is there.
    """
    if batch.get("labels") is not None:
        return ComparedTokens(batch["labels"], by_sequence=False)
    if "completion_mask" in batch and "input_ids" in batch:
        return ComparedTokens(
            batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED), by_sequence=True
        )
    raise UserError(
        f"a consistency compares tokens that have labels, or DPO's completions in 'input_ids'; a batch of {trainer} "
        f"({', '.join(batch)}) has neither, as where a trainer generates its own completions; attach the recipe "
        "without its consistency"
    )


class Pass:
    """What the decoder under the head puts out in one forward pass."""

    def __init__(self, transformer: PreTrainedModel) -> None:
        self.decoder = transformer.get_decoder()
        self.output: Any = None

    @property
    def states(self) -> Tensor:
        """The last hidden states (B, T, D)."""
        states: Tensor = self.output[0]
        return states

    @contextmanager
    def record(self, lower: LowerLayers | None = None, *, learning: bool = True) -> Iterator[None]:
        """Keep the first output while active, and with it what `lower` records; learning: the first with gradient, as
        a trainer's loss may make other passes, of a reference or for metrics.
        """
        with ExitStack() as recording:
            if lower is not None:
                recording.enter_context(lower.record())

            def keep(module: nn.Module, args: Any, output: Any) -> None:
                if self.output is None and (output[0].requires_grad or not learning):
                    self.output = output
                    recording.close()

            handle = self.decoder.register_forward_hook(keep)
            try:
                yield
            finally:
                handle.remove()

    def logits(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Tensor:
        """The model's logits (B, T, V) from these states, by its own code after the decoder: caps, scales and all."""
        with another_forward([self.decoder], lambda *args, **kwargs: self.output):
            logits: Tensor = model(**inputs, **options)["logits"]
        return logits


def step_beside(
    attachment: Attachment,
    model: nn.Module,
    batch: Batch,
    compared: ComparedTokens,
    loss: Callable[[], Tensor],
    *,
    num_items: Items = None,
    scale: float = 1.0,
) -> StepLoss:
    """The losses of one step whose task loss is `loss()`, which calls the model once with gradient.

    num_items, scale: as in `consistency_step`, for the consistency alone. For a consistency with gradient on both
    sides `loss` is called twice.

    Raises UserError where `loss` does not call the model's decoder with gradient, where the decoder's tokens are not
    those of the batch, or the consistency compares predictions.
    """
    recipe = attachment.recipe
    assert recipe.consistency is not None
    consistency = CONSISTENCIES[recipe.consistency]
    if consistency.scalar:
        raise UserError(
            f"the consistency {consistency.name!r} compares predictions of a regression, but this is a language "
            "model; use 'kl'"
        )
    inputs = {name: value for name, value in uncached(model, batch).items() if name not in NO_INPUTS}
    transformer, lower = find_transformer(model)[1], LowerLayers(attachment, constant=True, batch=inputs)
    first = Pass(transformer)
    with attachment.watch.step():
        with first.record(lower):
            task = loss()
        _check(first, compared)
        head = _head(attachment, model, inputs, first)
        if consistency.both:
            # All layers again: the loss may make a reference pass through them.
            second = Pass(transformer)
            with second.record():
                task = (task + loss()) / 2
        else:
            options = {} if head is None else {"logits_to_keep": 1}

            def other() -> Pass:
                view = Pass(transformer)
                with view.record(learning=False):
                    second_view(model, inputs, consistency, **options)
                return view

            second = lower.second(model, other, lambda view: view.states)
        views = [view.states if head is not None else view.logits(model, inputs) for view in (first, second)]
    term = _term(views[0], views[1], compared, num_items, head, consistency) * scale
    return StepLoss(task + recipe.weight * term, task, term, None)


def _check(first: Pass, compared: ComparedTokens) -> None:
    if first.output is None:
        raise UserError(
            f"the trainer's loss never calls {type(first.decoder).__name__} with gradient, so there is nothing to "
            "compare; attach the recipe without its consistency"
        )
    if first.states.shape[:2] != compared.labels.shape:
        raise UserError(
            f"the model works on {tuple(first.states.shape[:2])} tokens, but the batch has "
            f"{tuple(compared.labels.shape)}: an adapter adds its own; attach the recipe without its consistency"
        )


def _head(attachment: Attachment, model: nn.Module, inputs: dict[str, Any], first: Pass) -> Head | None:
    """The frozen head whose logits are the model's, or None."""
    head = None if attachment.dense else frozen_head(attachment)
    if head is None:
        return None
    with torch.no_grad():
        logits = first.logits(model, inputs, logits_to_keep=1)
    attachment.dense = not everywhere(model, agrees(head, first.states, logits))
    return None if attachment.dense else head


def _term(
    first: Tensor,
    second: Tensor,
    compared: ComparedTokens,
    num_items: Items,
    head: Head | None,
    consistency: Consistency,
) -> Tensor:
    """The consistency of two views: hidden states (B, T, D) with a head, logits (B, T, V) without."""
    first, second, labels = first[:, :-1], second[:, :-1], compared.labels[:, 1:].to(first.device)
    term = first.new_zeros(())
    num_items = num_items.to(first.device) if isinstance(num_items, Tensor) else num_items
    for valid, count in compared.groups(num_items):
        rows = valid.to(first.device)
        if head is None:
            term = term + consistency_loss(consistency.name, first, second, valid=rows, reduction="sum") / count
        else:
            share = Share(0.0, 1.0, count)
            term = term + TokenLoss.apply(first[rows], second[rows], labels[rows], head, consistency, share)[0]
    return term
