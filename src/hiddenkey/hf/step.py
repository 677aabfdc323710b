"""One training step's losses, for any loop: task, consistency, total."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..consistency import CONSISTENCIES, Consistency
from .attach import Attachment, find_attachment
from .views import Batch, Compared, LastLayer, compared, second_view, tie, twice

TaskLoss = Callable[[nn.Module, dict[str, Any], "Tensor | int | None"], tuple[Tensor, Any]]


@dataclass(frozen=True)
class StepLoss:
    """The losses of one step (scalars): total = task + weight * consistency.

    consistency is None where the recipe has none. outputs: the model's, of the first view.
    """

    total: Tensor
    task: Tensor
    consistency: Tensor | None
    outputs: Any


def model_loss(model: nn.Module, batch: dict[str, Any], num_items: Tensor | int | None) -> tuple[Tensor, Any]:
    """The loss that a transformers model computes from the labels in its batch."""
    outputs = model(**batch) if num_items is None else model(**batch, num_items_in_batch=num_items)
    return outputs["loss"], outputs


def consistency_step(
    model: nn.Module,
    batch: Batch,
    *,
    num_items: Tensor | int | None = None,
    task_loss: TaskLoss = model_loss,
    scale: float = 1.0,
) -> StepLoss:
    """The losses of one step of a model with a recipe attached (arXiv 2403.00812, section 3.2).

    batch: the model's keyword arguments, with `labels`. num_items: label tokens of the whole accumulated batch
    where the task loss is a sum over them (causal language models in transformers). task_loss: another way to
    get (loss, outputs) from (model, batch, num_items). scale: by which a trainer has multiplied its task loss,
    for the consistency too.

    Raises ValueError where nothing is attached, or labels are missing while the recipe has a consistency.
    """
    attachment = find_attachment(model)
    if attachment is None:
        raise ValueError("no recipe is attached to this model; call hiddenkey.attach(model, 'hiddenkey@0.1') first")
    recipe = attachment.recipe
    if recipe.consistency is None:
        loss, outputs = task_loss(model, dict(batch), num_items)
        return StepLoss(loss, loss, None, outputs)
    if batch.get("labels") is None:
        raise ValueError(
            f"the consistency {recipe.consistency!r} needs 'labels' in the batch, got {', '.join(batch)}"
        )
    consistency = CONSISTENCIES[recipe.consistency]
    views = _both if consistency.both else _first_and_constant
    task, term, outputs = views(model, dict(batch), num_items, task_loss, attachment, consistency)
    term = term.to(task.device) * scale
    return StepLoss(task + recipe.weight * term, task, term, outputs)


def _first_and_constant(
    model: nn.Module,
    batch: dict[str, Any],
    num_items: Tensor | int | None,
    task_loss: TaskLoss,
    attachment: Attachment,
    consistency: Consistency,
) -> tuple[Tensor, Tensor, Any]:
    with LastLayer(attachment) as last:
        task, outputs = task_loss(model, dict(batch), num_items)
        first = compared(outputs, last.output, batch, attachment, consistency)
        constant = second_view(model, batch, consistency)
        second = compared(constant, last.output, batch, attachment, consistency)
    return task, tie(consistency, first, second, num_items), outputs


def _both(
    model: nn.Module,
    batch: dict[str, Any],
    num_items: Tensor | int | None,
    task_loss: TaskLoss,
    attachment: Attachment,
    consistency: Consistency,
) -> tuple[Tensor, Tensor, Any]:
    doubled = twice(batch)
    with LastLayer(attachment) as last:
        task, outputs = task_loss(model, dict(doubled), None if num_items is None else num_items * 2)
        views = compared(outputs, last.output, doubled, attachment, consistency)
    halves = zip(views.logits.chunk(2), (None, None) if views.valid is None else views.valid.chunk(2), strict=True)
    first, second = (Compared(logits, valid) for logits, valid in halves)
    return task, tie(consistency, first, second, num_items), outputs
