"""One training step's losses, for any loop: task, consistency, total."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..consistency import CONSISTENCIES, Consistency
from ..errors import AttachError, UserError
from .attachment import Attachment, find_attachment, step_state
from .capture import Capture, states_of
from .chunked_loss import Head, agrees, frozen_head, is_next_token_loss, token_losses
from .compared_outputs import (
    Batch,
    Compared,
    ComparedTokens,
    compared,
    copied,
    count_labels,
    labels_of,
    last_layer,
    named,
    second_view,
    tie,
    token_consistency,
    uncached,
)
from .distributed import check_wrapper, everywhere
from .outer_forward import named_outputs, outermost, takes_the_rest
from .preserve import RandomState, another_forward, evaluation
from .shared_layers import LowerLayers
from .source_reading import parameters
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

    def compared(self, outputs: Any, last: Capture) -> Compared:
        return compared(self.model, outputs, last.states, self.batch, self.attachment, self.consistency)

    def task(self, batch: dict[str, Any], num_items: Items) -> tuple[Tensor, Any]:
        return _pair((self.task_loss or model_loss)(self.model, copied(batch), num_items))


def model_loss(model: nn.Module, batch: dict[str, Any], num_items: Items) -> tuple[Tensor, Any]:
    """The loss that the model computes from the labels in its batch.

    Of an accumulated batch it is this batch's share. Most classifiers return the mean over this batch whatever
    num_items is, so theirs is multiplied by this batch's share of the labels: of none it is 0.
    """
    labels = batch.get("labels")
    counted = num_items is not None and _divides(model, batch, num_items)
    outputs = model(**batch, **({"num_items_in_batch": num_items} if counted else {}))
    loss = _loss_in(outputs, batch)
    if num_items is None or counted:
        return loss, outputs
    if not isinstance(labels, Tensor):
        raise UserError(
            f"num_items divides by labels, and the batch of {', '.join(batch)} has no 'labels' to count; leave it out"
        )
    count = count_labels(model, labels)
    if not count:  # a mean over nothing, and so would its gradient be
        return named_outputs(outputs)["logits"][:0].sum(), outputs
    return loss * (count / num_items), outputs


def _loss_in(outputs: Any, batch: Batch) -> Tensor:
    found = named_outputs(outputs)
    if found.get("loss") is None:
        raise UserError(
            f"the model computes no loss from {', '.join(batch)}, it puts out {', '.join(found)}; a training step "
            "needs 'labels' in the batch, and a 'loss' in the outputs, which is the first of a tuple"
        )
    loss: Tensor = found["loss"]
    return loss


def _divides(model: nn.Module, batch: Batch, num_items: Tensor | int) -> bool:
    """Whether the model divides its summed loss by `num_items_in_batch`, as few do that take it: tried once."""
    attachment, outer = find_attachment(model), outermost(model)
    hands_on = isinstance(outer, PreTrainedModel) and takes_the_rest(outer)
    if attachment is None or not (hands_on or "num_items_in_batch" in parameters(outer)):
        return False

    def loss(times: int) -> Tensor:
        return _loss_in(model(**copied(batch), num_items_in_batch=times * num_items), batch)

    state = step_state(attachment)
    if state.divides is None:
        state.divides = falls(attachment, model, loss)
    return bool(state.divides)


def falls(attachment: Attachment, model: nn.Module, loss: Callable[[int], Tensor]) -> bool | None:
    """Whether a loss, called with the factor that its step grows by, falls with it, by trying 1 and 2; None where a
    batch shows nothing, having no label. Asked of the loss, as neither its signature nor a name tells.

    In training mode, as fused kernels put out whole logits in evaluation; but nothing of the recipe is drawn.
    """
    draws, losses = RandomState(model), []
    eager = torch.compiler.set_stance("force_eager")
    with attachment.watch.aside(), evaluation(nn.ModuleList(attachment.switches)), torch.no_grad(), eager:
        for times in (1, 2):
            losses.append(float(loss(times)))
            draws.restore()
    if not everywhere(model, math.isfinite(losses[0]) and losses[0] != 0):
        return None
    return everywhere(model, abs(losses[1] / losses[0] - 1) > 0.25)


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
        chunked = _from_hidden_states(step, head)
        if chunked is not None:
            total, task, term, outputs = chunked
            return StepLoss(total * scale, task * scale, term * scale, outputs)
    task, term, outputs = _from_logits(step)
    task, term = task * own, term.to(task.device) * scale
    return StepLoss(task + recipe.weight * term, task, term, outputs)


def _from_logits(step: Step) -> tuple[Tensor, Tensor, Any]:
    """(task, consistency, outputs) from the model's own loss and logits."""
    lower = LowerLayers(
        step.attachment,
        constant=not step.consistency.both,
        batch=step.batch,
        # The caller's task loss, which the second view computes too, may look into any layer.
        looked_into=step.consistency.both and step.task_loss is not None,
    )
    last = last_layer(step.attachment)
    with lower.capture(*last) as kept:
        task, outputs = step.task(step.batch, step.num_items)
    first = step.compared(outputs, kept)
    if task.requires_grad and not first.logits.requires_grad:
        raise UserError(
            "the outputs that come with the task loss carry no gradient, so the consistency would teach nothing; "
            "let task_loss return (loss, outputs) of one forward pass"
        )

    def other() -> tuple[Tensor, Compared]:
        with Capture(*last) as kept:
            if step.consistency.both:
                other_task, others = step.task(step.batch, step.num_items)
            else:
                other_task, others = task, second_view(step.model, step.batch, step.consistency)
        return other_task, step.compared(others, kept)

    other_task, second = lower.second(step.model, other, lambda view: view[1].logits)
    if step.consistency.both:
        task = (task + other_task) / 2
    return task, tie(step.consistency, first, second, step.num_items), outputs


NO_INPUTS = ("labels", "shift_labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")
Found = TypeVar("Found")


class HiddenViews:
    """Two views of a language model's batch, as the decoder under its head puts them out.

    batch: the model's arguments; those that are not for the decoder are left out of `inputs`.
    """

    def __init__(self, attachment: Attachment, model: nn.Module, batch: Batch, consistency: Consistency) -> None:
        self.model, self.consistency = model, consistency
        self.inputs = {name: value for name, value in batch.items() if name not in NO_INPUTS}
        self.decoder = find_transformer(model)[1].get_decoder()
        self.lower = LowerLayers(attachment, constant=not consistency.both, batch=self.inputs)

    def first(self, forward: Callable[[], Found]) -> tuple[Any, Found]:
        """(decoder's output, what `forward` returns), of the pass in it that has gradient where it makes several."""
        with self.lower.capture(self.decoder, until_gradient=True) as kept:
            found = forward()
        return kept.outputs[-1], found

    def second(self, **options: Any) -> Any:
        """The decoder's output in the second view. options: further arguments of the model."""

        def view() -> Any:
            with Capture(self.decoder) as kept:
                second_view(self.model, self.inputs, self.consistency, **options)
            return kept.outputs[-1]

        return self.lower.second(self.model, view, states_of)

    def logits(self, output: Any, **options: Any) -> Tensor:
        """The model's logits (B, T, V) from what its decoder put out, by its own code: caps, scales and all."""
        with another_forward([self.decoder], lambda *args, **kwargs: output):
            logits: Tensor = self.model(**self.inputs, **options)["logits"]
        return logits


def _from_hidden_states(step: Step, head: Head) -> tuple[Tensor, Tensor, Tensor, Any] | None:
    """(total, task, consistency, outputs) from hidden states; None where this model's logits are not the head's."""
    state, views = step_state(step.attachment), HiddenViews(step.attachment, step.model, step.batch, step.consistency)
    draws = RandomState(step.model) if state.dense is None else None
    output, outputs = views.first(lambda: step.model(**views.inputs, logits_to_keep=1))
    first = states_of(output)
    # The decoder may be called not as a module, or leave out tokens for which no logits are asked.
    labels = step.batch["labels"] if first is None else labels_of(step.batch, first.shape[1], step.model)
    fits = first is not None and first.shape[:2] == labels.shape and agrees(head, first, outputs["logits"])
    state.dense = not everywhere(step.model, fits)
    if state.dense:
        # As if it had not been tried: a run that goes on in another process tries again.
        if draws is not None:
            draws.restore()
        return None
    second, tokens = states_of(views.second(logits_to_keep=1)), ComparedTokens(labels, by_sequence=False)
    weights = {"task": 1.0, "weight": step.attachment.recipe.weight}
    return *token_losses(first, second, tokens, step.num_items, head, step.consistency, **weights), outputs


def step_around_loss(
    attachment: Attachment,
    model: nn.Module,
    batch: Batch,
    tokens: ComparedTokens,
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
    views, state = HiddenViews(attachment, model, uncached(model, batch), consistency), step_state(attachment)
    with attachment.watch.step():
        first, task = views.first(loss)
        _check(views, first, tokens)
        head = None if state.dense else frozen_head(attachment)
        if head is not None:
            with torch.no_grad():
                logits = views.logits(first, logits_to_keep=1)
            state.dense = not everywhere(model, agrees(head, states_of(first), logits))
            head = None if state.dense else head
        if consistency.both:  # all layers again: the loss may make a reference pass through them
            second, other_task = HiddenViews(attachment, model, views.inputs, consistency).first(loss)
            task = (task + other_task) / 2
        else:
            second = views.second(**({} if head is None else {"logits_to_keep": 1}))
        if head is None:
            term = token_consistency(views.logits(first), views.logits(second), tokens, num_items, consistency)
    if head is not None:
        states = states_of(first), states_of(second)
        term = token_losses(*states, tokens, num_items, head, consistency, task=0.0, weight=1.0)[0]
    term = term * scale
    return StepLoss(task + recipe.weight * term, task, term, None)


def _check(views: HiddenViews, first: Any, tokens: ComparedTokens) -> None:
    states = states_of(first)
    if states is None or not states.requires_grad:
        raise UserError(
            f"the trainer's loss never calls {type(views.decoder).__name__} with gradient, so there is nothing to "
            "compare; attach the recipe without its consistency"
        )
    if states.shape[:2] != tokens.labels.shape:
        raise UserError(
            f"the model works on {tuple(states.shape[:2])} tokens, but the batch has "
            f"{tuple(tokens.labels.shape)}: an adapter adds its own; attach the recipe without its consistency"
        )
