"""One training step's losses, for any loop: task, consistency, total."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..consistency import CONSISTENCIES, Consistency, consistency_loss
from ..errors import AttachError, UserError
from .attachment import Attachment, find_attachment, step_state
from .chunked_loss import Head, HiddenStates, Share, TokenLoss, agrees, frozen_head, is_next_token_loss, token_losses
from .compared_outputs import (
    IGNORED,
    Batch,
    Compared,
    LastLayer,
    compared,
    copied,
    count_labels,
    labels_of,
    named,
    second_view,
    tie,
    uncached,
)
from .distributed import check_wrapper, everywhere
from .outer_forward import named_outputs, outermost
from .preserve import RandomState, another_forward
from .shared_layers import LowerLayers
from .source_reading import counts_items
from .structure import find_transformer

Items = Tensor | int | None
TaskLoss = Callable[[nn.Module, dict[str, Any], Items], tuple[Tensor, Any]]


@dataclass(frozen=True)
class StepLoss:
    """The losses of one step (scalars): total = task + weight * consistency.

    consistency is None where the recipe has none. outputs: the model's, of the first view; with only the last token's
    logits where the consistency is computed in chunks of tokens, and None in TRL's trainers.
    """

    total: Tensor
    task: Tensor
    consistency: Tensor | None
    outputs: Any = field(repr=False)

    def __str__(self) -> str:
        losses = {"total": self.total, "task": self.task, "consistency": self.consistency}
        return ", ".join(f"{name} {float(loss.detach()):.4g}" for name, loss in losses.items() if loss is not None)


@dataclass(frozen=True)
class Step:
    """What one step is made of."""

    model: nn.Module
    batch: dict[str, Any]
    num_items: Items
    task_loss: TaskLoss | None
    attachment: Attachment
    consistency: Consistency

    def task(self, batch: dict[str, Any], num_items: Items) -> tuple[Tensor, Any]:
        return _pair((self.task_loss or model_loss)(self.model, copied(batch), num_items))


def model_loss(model: nn.Module, batch: dict[str, Any], num_items: Items) -> tuple[Tensor, Any]:
    """The loss that the model computes from the labels in its batch.

    Of an accumulated batch it is this batch's share. Most classifiers return the mean over this batch whatever
    num_items is, so theirs is multiplied by this batch's share of the labels: of none it is 0.
    """
    labels = batch.get("labels")
    divides = num_items is not None and counts_items(outermost(model), labels if isinstance(labels, Tensor) else None)
    counted = {"num_items_in_batch": num_items} if divides else {}
    outputs = model(**batch, **counted)
    found = named_outputs(outputs)
    if found.get("loss") is None:
        raise UserError(
            f"the model computes no loss from {', '.join(batch)}, it puts out {', '.join(found)}; a training step "
            "needs 'labels' in the batch, and a 'loss' in the outputs, which is the first of a tuple"
        )
    if num_items is None or counted:
        return found["loss"], outputs
    if not isinstance(labels, Tensor):
        raise UserError(
            f"num_items divides by labels, and the batch of {', '.join(batch)} has no 'labels' to count; leave it out"
        )
    count = count_labels(model, labels)
    if not count:  # a mean over nothing, and so would its gradient be
        return found["logits"][:0].sum(), outputs
    return found["loss"] * (count / num_items), outputs


def _pair(found: Any) -> tuple[Tensor, Any]:
    """(loss, outputs) of a task loss. Raises UserError where it gave something else."""
    pair = isinstance(found, tuple) and len(found) == 2
    if not pair or not isinstance(found[0], Tensor) or isinstance(found[1], Tensor | None):
        kinds = ", ".join(type(part).__name__ for part in found) if isinstance(found, tuple) else type(found).__name__
        raise UserError(f"task_loss returns (loss, outputs), a tensor and the model's outputs by name; got {kinds}")
    return found


def consistency_step(
    model: nn.Module,
    batch: Batch,
    *,
    num_items: Items = None,
    task_loss: TaskLoss | None = None,
    scale: float = 1.0,
) -> StepLoss:
    """The losses of one step of a model with a recipe attached (arXiv 2403.00812, section 3.2).

    batch: the model's keyword arguments, with `labels`. num_items: labels of the whole accumulated batch (examples
    of a classifier, tokens that are predicted of a language model), by which the sums over this batch are divided;
    None: means over this batch. task_loss: another way to get (loss, outputs) from (model, batch, num_items); None:
    the model's own loss. scale: by which a trainer multiplies its losses; that of `task_loss` is multiplied already.

    A causal language model with a frozen head is computed in chunks of tokens, so that no (tokens × vocabulary)
    tensor is built, and its layers below the first drop once for both views. The mean over a batch without any label
    is NaN, as transformers' own is, but 0 in chunks.

    Raises AttachError where nothing is attached; UserError where labels are missing, where nothing would be dropped
    because the model is in evaluation mode, for outputs that the consistency does not compare, and for gradient from
    both views through DistributedDataParallel and reentrant checkpoints; RuntimeError where the model was changed
    after attach, so that a drop would be lost.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"a batch is a mapping of the model's arguments, with 'labels'; got a {type(batch).__name__}")
    attachment = find_attachment(model)
    if attachment is None:
        raise AttachError("no recipe is attached to this model; call hiddenkey.attach(model, 'hiddenkey@0.1') first")
    with attachment.watch.step():
        losses = _losses(attachment, model, named(model, batch), num_items, task_loss, scale)
    learns = losses.total.requires_grad or not torch.is_grad_enabled()
    if not learns and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "nothing in this model can be trained; an adapter that goes on is loaded with "
            "PeftModel.from_pretrained(model, folder, is_trainable=True)"
        )
    return losses


def _losses(
    attachment: Attachment, model: nn.Module, batch: Batch, num_items: Items, task_loss: TaskLoss | None, scale: float
) -> StepLoss:
    recipe = attachment.recipe
    own = scale if task_loss is None else 1.0
    if recipe.consistency is None:
        loss, outputs = _pair((task_loss or model_loss)(model, dict(batch), num_items))
        loss = loss * own
        return StepLoss(loss, loss, None, outputs)
    if batch.get("labels") is None:
        raise UserError(f"the consistency {recipe.consistency!r} needs 'labels' in the batch, got {', '.join(batch)}")
    if batch.get("past_key_values") is not None:
        raise UserError(
            f"the consistency {recipe.consistency!r} takes two views of the batch, and the first would write into "
            "its past_key_values; give the whole text as input_ids in their place"
        )
    consistency, batch = CONSISTENCIES[recipe.consistency], uncached(model, batch)
    step = Step(model, batch, num_items, task_loss, attachment, consistency)
    check_wrapper(model, step.consistency)
    chunks = (
        task_loss is None
        and not consistency.scalar
        and not step_state(attachment).dense
        and "logits_to_keep" not in batch
    )
    head = frozen_head(attachment) if chunks and is_next_token_loss(model, batch) else None
    if head is not None:
        chunked = _chunked(step, head)
        if chunked is not None:
            total, task, term, outputs = chunked
            return StepLoss(total * scale, task * scale, term * scale, outputs)
    task, term, outputs = _dense(step)
    task, term = task * own, term.to(task.device) * scale
    return StepLoss(task + recipe.weight * term, task, term, outputs)


def _chunked(step: Step, head: Head) -> tuple[Tensor, Tensor, Tensor, Any] | None:
    """(total, task, consistency, outputs) from hidden states; None where this model's logits are not the head's."""
    hidden, state = HiddenStates(find_transformer(step.model)[1]), step_state(step.attachment)
    inputs = {name: value for name, value in step.batch.items() if name != "labels"}
    lower = LowerLayers(step.attachment, constant=not step.consistency.both, batch=inputs)
    draws = RandomState(step.model) if state.dense is None else None
    with hidden.record(), lower.record():
        outputs = step.model(**inputs, logits_to_keep=1)
    first = hidden.take()
    fits = first is not None and _is_whole(first, step) and agrees(head, first, outputs["logits"])
    state.dense = first is None or not everywhere(step.model, fits)
    if state.dense or first is None:
        # As if it had not been tried: a run that goes on in another process tries again.
        if draws is not None:
            draws.restore()
        return None

    def other() -> Tensor:
        with hidden.record():
            second_view(step.model, step.batch, step.consistency, logits_to_keep=1)
        states = hidden.take()
        assert states is not None
        return states

    second = lower.second(step.model, other, lambda states: states)
    weight = step.attachment.recipe.weight
    labels = labels_of(step.batch, first.shape[1], step.model)
    losses = token_losses(first, second, labels, head, step.consistency, weight, step.num_items)
    return *losses, outputs


def _is_whole(states: Tensor, step: Step) -> bool:
    """Whether there is a state for every label: some decoders leave tokens out for which no logits are asked."""
    return states.shape[:2] == labels_of(step.batch, states.shape[1], step.model).shape


def _dense(step: Step) -> tuple[Tensor, Tensor, Any]:
    """(task, consistency, outputs) from the model's own loss and logits."""
    lower = LowerLayers(
        step.attachment,
        constant=not step.consistency.both,
        batch=step.batch,
        # The caller's task loss, which the second view computes too, may look into any layer.
        looked_into=step.consistency.both and step.task_loss is not None,
    )
    with LastLayer(step.attachment) as last:
        with lower.record():
            task, outputs = step.task(step.batch, step.num_items)
        first = compared(step.model, outputs, last.output, step.batch, step.attachment, step.consistency)
        if task.requires_grad and not first.logits.requires_grad:
            raise UserError(
                "the outputs that come with the task loss carry no gradient, so the consistency would teach nothing; "
                "let task_loss return (loss, outputs) of one forward pass"
            )

        def other() -> tuple[Tensor, Compared]:
            if step.consistency.both:
                other_task, others = step.task(step.batch, step.num_items)
            else:
                other_task, others = task, second_view(step.model, step.batch, step.consistency)
            return other_task, compared(
                step.model, others, last.output, step.batch, step.attachment, step.consistency
            )

        other_task, second = lower.second(step.model, other, lambda view: view[1].logits)
    if step.consistency.both:
        task = (task + other_task) / 2
    return task, tie(step.consistency, first, second, step.num_items), outputs


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
    state = step_state(attachment)
    head = None if state.dense else frozen_head(attachment)
    if head is None:
        return None
    with torch.no_grad():
        logits = first.logits(model, inputs, logits_to_keep=1)
    state.dense = not everywhere(model, agrees(head, first.states, logits))
    return None if state.dense else head


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
