"""`hiddenkey.doctor`: every check, one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ...errors import AttachError, UserError
from ...recipe import Recipe, parse
from ..attach import attach
from ..attachment import find_attachment
from ..compared_outputs import named, uncached
from ..preserve import RandomState
from ..structure import require_model
from .effect import check_effect
from .findings import Diagnosis, Finding
from .gradients import check_consistency, check_reach, check_recompute
from .made_up_batches import make_batches
from .model_under_test import ModelUnderTest, fresh_counts, preserved
from .outputs import check_causality, check_evaluation
from .rates import check_rates
from .surroundings import check_attached, check_cost, check_keys, check_mode, check_other_dropouts, check_ranks

CHECKS: tuple[Callable[[ModelUnderTest], Iterator[Finding]], ...] = (
    check_rates,
    check_effect,
    check_recompute,
    check_evaluation,
    check_reach,
    check_causality,
    check_other_dropouts,
    check_keys,
    check_consistency,
    check_ranks,
    check_cost,
)


def doctor(
    model: nn.Module,
    recipe: str | Recipe | None = None,
    batches: Sequence[Mapping[str, Any]] | None = None,
    *,
    rounds: int = 4,
    size: int = 4,
    length: int = 32,
    progress: Callable[[Finding], None] | None = None,
) -> Diagnosis:
    """Whether `recipe` really is at work on `model`: one finding per check, green or red, with the reason.

    recipe: None where one is attached already; otherwise it is attached for the examination, in training mode.
    batches: the model's keyword arguments, on its device; None: two made up from its configuration, of `size`
    examples of `length` tokens. rounds: how often each batch is run to count draws.
    progress: is given every finding as soon as there is one.

    The model is left as it was: weights, buffers, gradients, modes, random states, hooks, counts of draws.

    Raises AttachError where no recipe is given or attached, or another one than given is; UserError where no batch
    is given or can be made, a number is below 1, the model is sharded or has no weights, or gives no tensor; and what
    `plan` raises. What is wrong with the drops is a finding, no exception.
    """
    for name, value in {"rounds": rounds, "size": size, "length": length}.items():
        if value < 1:
            raise UserError(f"{name} = {value} is not allowed: it is 1 or more")
    require_model(model, "doctor")
    _require_whole_weights(model)
    attachment = find_attachment(model)
    if attachment is None and recipe is None:
        raise AttachError("no recipe is attached to this model; name one: hiddenkey.doctor(model, 'hiddenkey@0.1')")
    if attachment is not None and recipe is not None and parse(recipe) != attachment.recipe:
        raise AttachError(
            f"the recipe '{attachment.recipe}' is attached to this model, not '{parse(recipe)}': leave the "
            "recipe out, or detach first"
        )
    random_state = RandomState(model)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        if attachment is None:
            assert recipe is not None
            attachment = stack.enter_context(attach(model, recipe))
            model.train()
        stack.enter_context(fresh_counts(attachment))
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # they repeat what the findings say
        if batches is None:
            batches = make_batches(model, 2, size, length)
        if isinstance(batches, Mapping):
            raise UserError("batches is a list of batches, here one batch; give [batch]")
        if not batches:
            raise UserError("batches is empty; give at least one batch, or None to have some made")
        # As training runs it: with a cache, transformers does not look for packed documents in the positions.
        as_trained = [named(model, uncached(model, batch)) for batch in batches]
        findings = []
        for finding in _findings(ModelUnderTest(model, attachment, as_trained, rounds, random_state)):
            findings.append(finding)
            if progress:
                progress(finding)
    return Diagnosis(str(attachment.recipe), attachment.plan.model, tuple(findings))


def _findings(tested: ModelUnderTest) -> Iterator[Finding]:
    attached = list(check_attached(tested))
    yield from attached
    yield from check_mode(tested)
    if any(finding.verdict == "wrong" for finding in attached):
        yield Finding("the rest", "skipped", "a training forward would stop at the above; mend that first")
        return
    if not tested.trains:
        tested.model.train()  # one cause, one red line: the rest is told as it would be in training
    for check in CHECKS:
        yield from check(tested)


def _require_whole_weights(model: nn.Module) -> None:
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
        raise UserError("the doctor needs whole parameters; examine the model before it is sharded")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise UserError("the doctor runs the model, and this one has no weights; load it with from_pretrained")
