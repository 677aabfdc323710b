"""What can be seen in gradients: recomputed draws are the same, every parameter is reached, two views are tied."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from ...consistency import CONSISTENCIES
from ...errors import UserError
from ..attachment import step_state
from ..checks import some
from ..structure import find_transformer
from ..training_step import consistency_step
from .findings import Finding
from .model_under_test import REFUSALS, SEED, ModelUnderTest, seed_all
from .outputs import close, difference
from .rates import ENOUGH, TOO_LITTLE, fallen, recorded

OTHER_MASKS = ": the second forward draws other masks (is preserve_rng_state off?)"


def check_reach(tested: ModelUnderTest) -> Iterator[Finding]:
    """Every trainable parameter gets a finite gradient, but for those that get none in the plain model either."""
    trained = [name for name, p in tested.model.named_parameters() if p.requires_grad]
    if not trained:
        yield Finding("gradients", "wrong", "no parameter is trainable; add an adapter, or unfreeze something")
        return
    _, found = tested.gradients(tested.model)
    _, plain = tested.gradients(tested.twin)
    # By the parameter, which the twin shares: a wrapper around the model, or another inside of it, changes names.
    reached = {id(p) for name, p in tested.twin.named_parameters() if name in plain}
    lost = {name: p for name, p in tested.model.named_parameters() if p.requires_grad and name not in found}
    ours = [name for name, p in lost.items() if id(p) in reached]
    rest = [name for name in lost if name not in ours]
    infinite = [name for name in found if not found[name].isfinite().all()]
    if ours:
        yield Finding("gradients", "wrong", f"none reaches {some(ours)}, which the plain model does reach")
    if infinite:
        yield Finding("gradients", "wrong", f"not finite in {some(infinite)}")
    if not ours and not infinite:
        yield Finding("gradients", "ok", f"finite in {len(found)} of {len(trained)} trainable parameters")
    if rest:
        yield Finding("gradients", "note", f"none reaches {some(rest)}, nor does it without the recipe")


def check_recompute(tested: ModelUnderTest) -> Iterator[Finding]:
    """Loss and gradients are the same with activations kept and recomputed, under one random state."""
    # Not what was compiled around it: that draws in another way, and recomputes as the compiler likes.
    model, transformer = tested.attachment.model, tested.transformer
    if not transformer.supports_gradient_checkpointing or not _checkpointed(model):
        yield Finding("recompute", "skipped", f"{type(transformer).__name__} does not recompute activations")
        return
    if not tested.is_trainable:
        yield Finding("recompute", "skipped", "no parameter is trainable")
        return
    with _recomputing(model) as how:
        try:
            again_loss, again = tested.gradients(model)
        except CheckpointError:
            yield Finding("recompute", "wrong", f"what is recomputed {how} is not what was computed{OTHER_MASKS}")
            return
        except REFUSALS as error:
            yield _not_recomputed(tested, error)
            return
    loss, wanted = tested.gradients(model)
    if not loss.isfinite():
        reason = f"the loss of the first batch is {float(loss)}, which compares with nothing"
        yield Finding("recompute", "skipped", reason)
        return
    apart = _apart(again, wanted)
    values = {"loss": difference(again_loss, loss), "gradients": apart}
    same = values["loss"] <= close(loss.dtype) and apart <= 10 * close(loss.dtype)
    reason = f"gradients recomputed {how} differ by {apart:.2g} of their norm from those without"
    if not again:
        reason = f"no gradient comes through activations recomputed {how}: use use_reentrant=False"
    elif not same:
        reason += OTHER_MASKS
    yield Finding("recompute", "ok" if same else "wrong", reason, values=values)


@contextmanager
def _recomputing(model: nn.Module) -> Iterator[str]:
    """Activations are recomputed, as the model is set to or as is usual; gives which. Off afterwards.

    Off, because the other checks look at the plain backward.
    """
    flagged = _checkpointed(model)
    how = "as the model is set to"
    if not any(module.gradient_checkpointing for module in flagged):
        how = "with use_reentrant=False"
        for module in flagged:
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield how
    finally:
        for module in flagged:
            module.gradient_checkpointing = False


def _checkpointed(model: nn.Module) -> list[Any]:
    return [module for module in find_transformer(model)[1].modules() if hasattr(module, "gradient_checkpointing")]


def _not_recomputed(tested: ModelUnderTest, error: Exception) -> Finding:
    """Whose fault it is that the backward failed: tried on the model without the recipe."""
    with _recomputing(tested.twin):
        try:
            tested.gradients(tested.twin)
        except REFUSALS:
            reason = f"this model can't recompute activations, with the recipe or without: {error}"
            return Finding("recompute", "skipped", reason)
    reason = f"activations can't be recomputed with the recipe, as they can without: {error}"
    return Finding("recompute", "wrong", reason)


def check_consistency(tested: ModelUnderTest) -> Iterator[Finding]:
    """The two views differ, and the term that ties them has a gradient."""
    recipe = tested.attachment.recipe
    if recipe.consistency is None:
        yield Finding("consistency", "skipped", "the recipe has none")
        return
    if tested.batch.get("labels") is None:
        yield Finding("consistency", "skipped", "the batches have no labels, so there is no loss to add it to")
        return
    seed_all(SEED)
    try:
        with recorded(tested) as records:
            step = consistency_step(tested.model, tested.batch)
    except UserError as error:
        yield Finding("consistency", "wrong", str(error))
        return
    assert step.consistency is not None
    value = float(step.consistency)
    name = f"{recipe.consistency}*{recipe.weight:g}"
    if not math.isfinite(value):
        yield Finding("consistency", "wrong", f"{name} is {value:g}, as are the logits of one view or both")
        return
    if not value > 0:
        if any(record.drawn for record in records.values()) and fallen(records) < ENOUGH:
            yield Finding("consistency", "skipped", TOO_LITTLE)
        else:
            yield Finding("consistency", "wrong", f"{name} is {value:g}: the two views are the same")
        return
    reach = _reach_of_the_term(tested)
    kind = "inference" if CONSISTENCIES[recipe.consistency].clean else "another draw"
    reason = f"{name}: the view differs from {kind}, the term is {value:.4g} and reaches {reach} parameters"
    yield Finding("consistency", "ok" if reach else "wrong", reason, values={"term": value, "parameters": reach})


def _reach_of_the_term(tested: ModelUnderTest) -> int:
    """How many trainable parameters get a gradient that is not zero from the consistency alone."""
    seed_all(SEED)
    state = step_state(tested.attachment)
    dense, state.dense = state.dense, True  # without chunks of tokens, in which only the sum has a gradient
    term = consistency_step(tested.model, tested.batch).consistency
    state.dense = dense
    trained = [p for p in tested.model.parameters() if p.requires_grad]
    if term is None or not term.requires_grad or not trained:
        return 0
    found = torch.autograd.grad(term, trained, allow_unused=True)
    return sum(gradient is not None and bool(gradient.any()) for gradient in found)


def _apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The relative difference of all gradients together; infinite where one set lacks a parameter."""
    if set(found) != set(wanted) or not wanted:
        return float("inf")
    square = sum(float((found[name] - value).float().square().sum()) for name, value in wanted.items())
    norm = sum(float(value.float().square().sum()) for value in wanted.values())
    return (square / max(norm, 1e-60)) ** 0.5
